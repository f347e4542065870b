"""The choice of replicas to move: made by the loads of some steps, judged on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..logs import logger
from ..placement.table import Placement
from ..planning.solve import solve
from ..problem import MAX_TOTAL
from ..settings import Settings

log = logger(__name__)

Int64 = npt.NDArray[np.int64]
Choose = Callable[..., Placement]
"""As `Placement.for_lp`: (samples [N, E], num_ranks, num_redundant_per_rank, start=,
fixed_homes=True, within_node=, max_changes=, max_copies=, seed=, time_budget_s=) → a placement with
the homes and slots of `start`. Both are without guest slots."""

MAX_COPIES = 8
"""Copies of an expert that a refresh may reach, unless the first placement has more. They are the
columns of quotas, which captured graphs keep."""
OFTEN = 0.75
"""The part of the steps in which a layer must have been unbalanced."""
MENDS = 0.25
"""The part of T*'s excess over the mean that new replicas must remove to be worth a move."""


@dataclass(frozen=True)
class Job:
    """A layer to examine."""

    layer: int
    loads: Int64
    """[N, E] tokens of each expert, in each of the last steps."""
    placement: Placement
    choose: Choose
    settings: Settings


@dataclass(frozen=True)
class Proposal:
    """Other replicas for a layer."""

    layer: int
    physical_to_logical: npt.NDArray[np.int32]
    """[P]"""
    imbalance_before: float
    """Mean T* / mean rank load, on loads that the replicas were not chosen by."""
    imbalance_after: float


def propose(job: Job) -> Proposal | None:
    """Examines the loads of a layer, and chooses other replicas where that is worth it.

    Two conditions must hold. T* / mean was above the threshold in three of four steps. Replicas are
    chosen by every other step, and judged by their gain in the steps between. It must be a quarter
    of the excess over 1, and more than its standard error.

    Raises:
        PlacementError: the chosen placement has other homes.
    """
    loads, old, settings = job.loads[job.loads.sum(1) > 0], job.placement, job.settings
    if len(loads) < 2:
        return None
    before = imbalance(loads, old)
    if (before > settings.refresh_threshold).mean() < OFTEN:
        return None
    chosen = job.choose(
        loads[::2],
        old.num_ranks,
        old.num_resident_slots - -(-old.num_experts // old.num_ranks),
        start=_residents(old),
        fixed_homes=True,
        within_node=_stays_within_nodes(old),
        max_changes=settings.refresh_changes,
        max_copies=old.max_replicas,
        seed=job.layer,
        time_budget_s=settings.refresh_seconds,
    )
    chosen = chosen.with_guest_slots(old.num_guests_per_rank)
    if chosen.max_replicas > old.max_replicas:
        log.warning(
            "layer %d: %d copies of an expert were chosen, and the capacity is %d",
            *(job.layer, chosen.max_replicas, old.max_replicas),
        )
        return None
    new = old.with_copies(chosen.physical_to_logical)
    gain = before[1::2] - imbalance(loads[1::2], new)
    was, gained = float(before[1::2].mean()), float(gain.mean())
    error = gain.std(ddof=1) / np.sqrt(gain.size) if gain.size > 1 else 0  # of one it is unknown
    if not gained >= max(MENDS * (was - 1), error) or new == old:
        return None
    return Proposal(job.layer, new.physical_to_logical, was, was - gained)


def imbalance(loads: Int64, placement: Placement) -> npt.NDArray[np.float64]:
    """[N] T* / mean rank load, the best that any plan makes of loads [N, E] that are not 0.

    Guests do not count: the better the residents are, the fewer guests a batch needs.
    """
    scaled = torch.from_numpy(loads // (1 + loads.sum(1, keepdims=True) // MAX_TOTAL))
    residents = placement.with_guest_slots(0)
    mean = scaled.sum(1) / residents.active_ranks.size
    return (solve(scaled, residents, "cpu").lower_bound / mean).numpy()


def widened(placement: Placement) -> Placement:
    """The same copies, in tables with columns for `MAX_COPIES` of an expert."""
    copies = max(placement.max_replicas, min(placement.num_ranks, MAX_COPIES))
    return placement.with_copies(placement.physical_to_logical, copies)


def num_moved(old: Placement, new: Placement) -> int:
    """Copies of `new` on ranks where `old` has none of their expert."""

    def held(placement: Placement) -> npt.NDArray[np.bool_]:
        expert, column = np.nonzero(placement.copy_rank >= 0)
        out = np.zeros((placement.num_experts, placement.num_ranks), bool)
        out[expert, placement.copy_rank[expert, column]] = True
        return out

    return int((held(new) & ~held(old)).sum())


def _residents(placement: Placement) -> Placement:
    """The same copies and columns without guest slots."""
    residents = placement.with_guest_slots(0)
    return residents.with_copies(residents.physical_to_logical, placement.max_replicas)


def _stays_within_nodes(placement: Placement) -> bool:
    """Whether a refresh must keep all copies of an expert on one of several nodes.

    So it is where they are there now, and a node has enough experts to fill its slots.
    """
    num_nodes = placement.num_ranks // placement.num_ranks_per_node
    if num_nodes == 1 or placement.num_experts % num_nodes:
        return False
    node = np.where(placement.copy_rank < 0, -1, placement.node[placement.copy_rank])
    apart = (node >= 0) & (node != node[:, :1])
    return not apart.any() and placement.num_resident_slots * num_nodes <= placement.num_experts
