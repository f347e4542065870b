"""A `Plan`: the routing of one batch on one rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..placement.table import Placement
from .structs import Status as Status
from .values import Reached


class Results(NamedTuple):
    """The results of a solver, as fields of a `Plan`."""

    counts: torch.Tensor
    quota: torch.Tensor
    rank_load: torch.Tensor
    status: torch.Tensor
    guests: torch.Tensor


def number_of(head: torch.Tensor) -> torch.Tensor:
    """[1] int64: a batch's number, of the head [HEAD - 1] int32 of its row behind the status."""
    return head[-2:].view(torch.int64)


class Plan:
    """The routing of one batch on one rank; all but `topk_idx` is the same on every rank.

    Where `status` is REUSED, only `topk_idx` and `status` are of this batch. All else is of the
    batch whose quotas it uses, the last one that was exchanged and that this rank did not refuse.

    Where `status` is STAYED and picks keep slots that an engine gave, ranks do not know what each
    copy computes. Then `quota` and `split` are 0; `counts` and `rank_load` are right.

    Args:
        topk_idx: the slots of the picks.
        results: makes the results when they are first read. Most callers read none.
        split: makes the split [R, E, C] of counts [R, E] and quotas [E, C].
        judge: evaluates quotas [E, C] of a load [E] on the CPU, by rank loads `on_ranks` [R].
        number: of the batch, where there are guest slots and counts were exchanged.
        placement: by which the plan was made; None: the one in force when it is read.
    """

    topk_idx: torch.Tensor
    """[T, K] of the input's dtype and device: slots in [0, P), -1 where the input has -1."""
    number: torch.Tensor | None
    """[1] int64 where plans are made: the batch's number, the same on all ranks.

    No other batch of the group has it, up to 2**24 planners and 2**31 batches of each. None without
    guest slots, or where counts were given."""

    def __init__(
        self,
        topk_idx: torch.Tensor,
        results: Callable[[], Results],
        split: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        judge: Callable[..., Reached],
        number: torch.Tensor | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.topk_idx, self.number, self._placement = topk_idx, number, placement
        self._make_results, self._split, self._judge = results, split, judge

    def __repr__(self) -> str:
        """The imbalance (max / mean rank load) and what the largest rank has, beside the bound.

        It waits for a GPU.
        """
        head = f"Plan({' x '.join(map(str, self.topk_idx.shape))} picks"
        try:
            load, status = self.rank_load.double(), Status(int(self.status))
        except AssertionError:  # a batch that wanted none left no results
            return f"{head}, no results kept)"
        ranks = len(load) if self._placement is None else self._placement.active_ranks.size
        if status is Status.REUSED:
            return f"{head}, REUSED, by quotas of an earlier batch)"
        imbalance = float(load.max() * ranks / load.sum()) if load.any() else 1.0
        value, bound = map(float, self.reached[:2])
        guests = int((self.guests >= 0).sum())
        return (
            f"{head}, {status.name}, imbalance {imbalance:.3f}, largest rank {value:g}, bound "
            f"{bound:g}{f', {guests} guests' if guests else ''})"
        )

    @functools.cached_property
    def _results(self) -> Results:
        device = self.topk_idx.device
        return Results(*(tensor.to(device) for tensor in self._make_results()))

    @property
    def counts(self) -> torch.Tensor:
        """[R, E] int32: tokens on each source rank that picked each expert."""
        return self._results.counts

    @property
    def quota(self) -> torch.Tensor:
        """[E, C] int32: tokens that each copy computes."""
        return self._results.quota

    @property
    def rank_load(self) -> torch.Tensor:
        """[R] int32: tokens that each rank computes, base loads not included."""
        return self._results.rank_load

    @property
    def status(self) -> torch.Tensor:
        """[] int32, a `Status`."""
        return self._results.status

    @property
    def guests(self) -> torch.Tensor:
        """[R, G] int32: the expert that each guest slot holds for this batch, -1 = none.

        Quotas and split are by the columns of `placement.with_guests(guests)`.
        """
        return self._results.guests

    @property
    def split(self) -> torch.Tensor:
        """[R, E, C] int32: how many of each copy's tokens come from each source rank.

        It is made when it is read, since routing a rank's picks needs its own shares only.
        """
        return self._split(self.counts, self.quota)

    @functools.cached_property
    def reached(self) -> Reached:
        """The value of the largest rank in the unit of the objective, and the bound of all plans.

        With guest slots the bound is of all plans with the same guests.

        The CPU computes it when it is read, from the results, which waits for a GPU.
        """
        load, on_ranks = self.counts.cpu().long().sum(0), self.rank_load.cpu()
        return self._judge(self.quota.cpu(), load, on_ranks=on_ranks)
