"""Batches that stay at home, since no plan could gain enough: the definition, on the CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..placement.table import Placement
from ..problem import Problem

Int64 = npt.NDArray[np.int64]


def stays_home(load: Int64, placement: Placement, problem: Problem) -> bool:
    """Whether a batch keeps its home slots, by the counts of all ranks alone.

    It does where its fullest rank at home is above a lower bound by less than `min_gain` tokens.
    The bound is the largest mean rank load of a component, rounded up. Or it is the most that a
    rank has of base load and of experts with one copy, if that is more. The flow begins there, so
    nothing need be solved for it.

    Args:
        load: [E] tokens of each expert, which total less than 2**31 with base loads.
        placement: the copies, without guest slots.
        problem: checked.
    """
    if not problem.least_gain:
        return False
    R = placement.num_ranks
    base = np.zeros(R, np.int64) if problem.base_load is None else problem.base_load.numpy()
    home, stays = base.copy(), base.copy()
    np.add.at(home, placement.home_rank, load)
    single = (placement.copy_rank >= 0).sum(1) == 1
    np.add.at(stays, placement.home_rank[single], load[single])
    totals, sizes = np.zeros((2, R), np.int64)
    np.add.at(totals, placement.component, home)
    np.add.at(sizes, placement.component, 1)
    means = -(-totals // np.maximum(sizes, 1))
    return bool(home.max() - max(means.max(), stays.max()) < problem.least_gain)
