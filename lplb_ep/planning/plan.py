"""A `Plan`: the routing of one batch on one rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .structs import Status as Status


@dataclass(frozen=True)
class Plan:
    """The routing of one batch on one rank; all but `topk_idx` is the same on every rank."""

    topk_idx: torch.Tensor
    """[T, K] of the input's dtype and device: slots in [0, P), -1 where the input has -1."""
    counts: torch.Tensor
    """[R, E] int32: tokens on each source rank that picked each expert."""
    quota: torch.Tensor
    """[E, C] int32: tokens that each copy computes."""
    rank_load: torch.Tensor
    """[R] int32: tokens that each rank computes, base loads not included."""
    status: torch.Tensor
    """[] int32, a `Status`."""
    _split: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    @property
    def split(self) -> torch.Tensor:
        """[R, E, C] int32: how many of each copy's tokens come from each source rank.

        It is made when it is asked for: routing a rank's picks takes its own shares only.
        """
        return self._split(self.counts, self.quota)

    def to(self, device: torch.device) -> Plan:
        """The same plan on another device."""
        tensors = (f.name for f in dataclasses.fields(self) if f.name != "_split")
        return dataclasses.replace(self, **{t: getattr(self, t).to(device) for t in tensors})


class Routed(NamedTuple):
    """A batch that was routed, whose `Plan` is made only for those who ask."""

    topk_idx: torch.Tensor
    """As `Plan.topk_idx`."""
    plan: Callable[[], Plan]
