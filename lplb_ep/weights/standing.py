"""Replicas beside parameters that have no rows for them: guests that stay until weights change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.alltoall import limit_of_experts
from ..comm.torch_exchange import TorchExchange, most_of
from ..layer import Layer
from ..placement.table import Placement
from .guests import Guests
from .pool import GuestPool, Stay, outside_of_checkpoints

# What a rank says before a batch, if it does not have the weights: the largest counts.
_HAS_OLD, _CANNOT = 1, 2


class StandingReplicas:
    """The replicas of one layer's experts, in memory of their own.

    `Replicas` are rows of the experts' parameters, or modules beside them. Where a framework owns
    these and shards them (FSDP2), a rank has E / R rows. The layer then takes the weights of all
    slots from this object, as it does from `Guests`. Home weights are sent once after each change,
    most often a step of the optimizer. Gradients go home within each backward pass, before the
    homes' are handed on. The optimizer, `state_dict` and checkpoints do not contain the replicas.

    Construction is collective. The layer holds a weak reference to this object, and asks it whether
    the replicas are valid. Weights and gradients travel by all-to-alls of `torch.distributed`.

    Args:
        experts: this rank's E / R experts, as `Guests` take them.
        layer: its placement has the homes in order, E / R in the first slots of each rank.
        group: the expert-parallel group.

    Raises:
        ValueError: the homes are elsewhere, or as `Guests`.
        RankError: as `Guests`.
    """

    def __init__(self, experts: nn.Module, layer: Layer, group: dist.ProcessGroup) -> None:
        placement = layer.placement
        num_experts, num_ranks = placement.num_experts, placement.num_ranks
        slots = placement.physical_to_logical.tolist()
        table = torch.tensor(slots, dtype=torch.int32, device="cpu").reshape(num_ranks, -1)
        own = num_experts // num_ranks
        homes = Placement.homes_only(num_experts, num_ranks, table.shape[1] - own)
        if placement.home.tolist() != homes.home.tolist():
            raise ValueError(f"homes must be the first slots of each rank, in order: {placement!r}")
        self._table = table[:, own:].contiguous()
        self._pool = _StandingPool(group, table.shape[1] - own, experts, transport="torch")
        self._guests = Guests(experts, Layer(homes, name=layer.name), group, self._pool)
        self._exchange = TorchExchange(group, limit_of_experts(), "weights")
        self._stay: Stay | None = None
        layer.watch(self)

    @property
    def num_bytes(self) -> int:
        """Of the memory on each rank."""
        return self._pool.num_bytes

    @property
    def is_valid(self) -> bool:
        """Whether the replicas' weights equal the homes', as far as that shows. Local."""
        stay = self._stay
        return (
            stay is not None
            and self._guests.is_valid
            and stay.generation == self._guests.current_generation()
        )

    def mark_valid(self) -> None:
        """Nothing: weights are known to be valid from `prepare` on."""

    def mark_stale(self) -> None:
        """Has the next `prepare` bring weights, on all ranks."""
        self._stay = None

    def prepare(self) -> None:
        """Brings weights where the homes' have changed: a batch is to be dispatched. Collective.

        Ranks agree on it first. While a rank cannot send its own (`Guests.is_valid`), none does,
        and batches go home.
        """
        with outside_of_checkpoints():
            own = _CANNOT if not self._guests.is_valid else _HAS_OLD if not self.is_valid else 0
            if most_of(self._exchange, own) == _HAS_OLD:
                self._pool.join()
                self._stay = self._guests.push(self._table)

    def split_weights(
        self, x: Tensor
    ) -> tuple[Tensor, dict[str, Any], Callable[[], dict[str, Any]]]:
        """As `Guests.split_weights`, of replicas in the place of guests. They are there."""
        return self._guests.split_weights(x)


class _StandingPool(GuestPool):
    """Holds weights that a batch's backward pass leaves in place: gradients have other memory."""

    def clear(self) -> None:
        """Nothing."""
