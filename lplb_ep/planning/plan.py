"""A `Plan`: the routing of one batch, and what every plan must be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..placement.table import Placement
from . import reference as cpu
from .solve import rank_load, solve
from .structs import Status


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
    """[R] int32: tokens that each rank computes."""
    status: torch.Tensor
    """[] int32, a `Status`."""
    _split: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    @property
    def split(self) -> torch.Tensor:
        """[R, E, C] int32: how many of each copy's tokens come from each source rank. Made when it
        is asked for: routing a rank's picks takes its own shares only."""
        return self._split(self.counts, self.quota)

    def to(self, device: torch.device) -> Plan:
        """The same plan on another device."""
        tensors = (f.name for f in dataclasses.fields(self) if f.name != "_split")
        return dataclasses.replace(self, **{t: getattr(self, t).to(device) for t in tensors})


MAX_PICKS = 2**31 - 2**14
"""Of a rank in a batch: the kernels cut them into chunks, which end within 32 bits."""


def check_topk_idx(
    topk_idx: torch.Tensor, num_experts: int, values: bool = True, distinct: bool = False
) -> None:
    """Checks a batch's picks.

    Args:
        topk_idx: [T, K], experts in [0, E), -1 = no pick.
        num_experts: E.
        values: whether values are looked at, which waits for a GPU.
        distinct: whether a token may pick an expert only once.

    Raises:
        TypeError: it is no tensor.
        ValueError: its shape, dtype or size is wrong, or a value, where values are looked at.
    """
    if not isinstance(topk_idx, torch.Tensor):
        raise TypeError(f"topk_idx must be a tensor [T, K]; got a {type(topk_idx).__name__}")
    if topk_idx.ndim != 2 or topk_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"topk_idx must be [T, K] of int32 or int64; "
            f"got {list(topk_idx.shape)} of {topk_idx.dtype}"
        )
    if topk_idx.numel() > MAX_PICKS:
        raise ValueError(f"topk_idx must have at most {MAX_PICKS} entries; got {topk_idx.numel()}")
    if not values:
        return
    wrong = torch.nonzero((topk_idx < -1) | (topk_idx >= num_experts))
    if len(wrong):
        t, k = wrong[0].tolist()
        raise ValueError(
            f"topk_idx[{t}, {k}] is {int(topk_idx[t, k])}; expected -1 or an expert in "
            f"[0, {num_experts})"
        )
    if distinct:
        ordered = topk_idx.sort(dim=1).values
        wrong = torch.nonzero((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
        if len(wrong):
            t, k = wrong[0].tolist()
            raise ValueError(f"topk_idx[{t}] picks expert {int(ordered[t, k])} twice")


def check_plan(plan: Plan, topk_idx: torch.Tensor, placement: Placement, rank: int) -> None:
    """Holds a plan against everything that a plan must be; for tests and `LPLB_EP_CHECK=1`.

    Args:
        plan: the plan that rank `rank` got.
        topk_idx: [T, K], the logical experts that it was made from.
        placement: the copies.
        rank: this rank.

    Raises:
        AssertionError: names the broken invariant.
    """

    def hold(condition: object, message: str) -> None:
        if not bool(condition):
            raise AssertionError(f"plan of rank {rank}: {message}")

    R, E, C = placement.num_ranks, placement.num_experts, placement.max_replicas
    physical, logical = plan.topk_idx.cpu(), topk_idx.cpu()
    counts, quota, shares = plan.counts.cpu(), plan.quota.cpu(), plan.split.cpu()
    hold(plan.topk_idx.dtype == topk_idx.dtype, "topk_idx changed its dtype")
    hold(plan.topk_idx.device == topk_idx.device, "topk_idx changed its device")
    hold(physical.shape == logical.shape, "topk_idx changed its shape")
    if int(plan.status) == Status.BAD_COUNTS:
        # Counts that cannot be say nothing: there are no quotas, and every pick is at its home.
        for name in ("counts", "quota", "split", "rank_load"):
            hold((getattr(plan, name) == 0).all(), f"{name} of counts that cannot be")
        hold((physical == cpu.rewrite_home(logical, placement)).all(), "a pick is not at its home")
        return
    hold(counts.shape == (R, E), f"counts are {list(counts.shape)}")
    hold(quota.shape == (E, C), f"quota is {list(quota.shape)}")
    hold(shares.shape == (R, E, C), f"split is {list(shares.shape)}")

    hold(((physical == -1) == (logical == -1)).all(), "-1 was not kept")
    held = torch.tensor(placement.physical_to_logical)[physical.long().clamp(min=0)]
    hold((held == logical)[logical >= 0].all(), "a pick went to a slot of another expert")
    hold((counts[rank] == cpu.count(logical, E)).all(), "counts do not count this rank's picks")

    absent = torch.tensor(placement.copy_rank < 0)
    hold((shares >= 0).all() and (quota >= 0).all(), "a negative quota")
    hold((quota[absent] == 0).all(), "a quota where no copy can take tokens")
    hold((quota.sum(1) == counts.sum(0)).all(), "quotas do not sum to the load")
    hold((shares.sum(0) == quota).all(), "the split does not sum to the quotas")
    hold((shares.sum(2) == counts).all(), "the split does not sum to the counts")
    slots = torch.tensor(placement.logical_to_physical).long()
    took = cpu.count(physical, placement.num_physical_experts)
    hold((took[slots] * ~absent == shares[rank]).all(), "slots got other picks than their share")
    e, c = torch.nonzero(~absent, as_tuple=True)
    own = torch.tensor(placement.copy_rank).long()[e, c]
    stay = torch.minimum(counts[own, e], quota[e, c])
    hold((shares[own, e, c] >= stay).all(), "a copy passed over tokens of its own rank")

    load = rank_load(quota, placement)
    hold((plan.rank_load.cpu() == load).all(), "rank_load is not the load of the quotas")
    if int(plan.status) == Status.OPTIMAL:
        best = math.ceil(solve(counts.sum(0), placement, "cpu").lower_bound)
        hold(load.max() == best, f"the largest rank load is {int(load.max())}, not {best}")
    else:
        hold((quota[:, 1:] == 0).all(), "a plan that is not optimal must send every token home")
