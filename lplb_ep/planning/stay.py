"""Batches that stay where they are, since no plan could gain enough: the definition, on the CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..placement.table import Placement
from ..problem import Problem
from .structs import HEAD
from .values import base_load

Int64 = npt.NDArray[np.int64]


def num_words(num_experts: int, num_ranks: int, least_gain: int) -> int:
    """Integers of an exchanged row: the head and the counts [E].

    Where a least gain is asked for, loads [R] follow: of this rank's picks, by given slots. They
    stay 0 where picks name experts.
    """
    return HEAD + num_experts + (num_ranks if least_gain else 0)


def count_by_rank(slots: torch.Tensor, placement: Placement) -> torch.Tensor:
    """How many picks go to each rank.

    Args:
        slots: [T, K] integers in [0, P), -1 = no pick.
        placement: the copies, without guest slots.

    Returns:
        [R] int32.
    """
    ranks = slots[slots >= 0] // placement.num_local_slots
    return torch.bincount(ranks, minlength=placement.num_ranks).int()


def stays(
    load: Int64, placement: Placement, problem: Problem, given_load: Int64 | None = None
) -> bool:
    """Whether a batch keeps the slots that it came with, by what all ranks know alike.

    It does where its fullest rank by these slots is above a lower bound by less than `min_gain`
    tokens. The bound is the largest mean rank load of a component, rounded up. Or it is the most
    that a rank has of base load and of experts with one copy, if that is more. The flow begins
    there, so nothing need be solved for it.

    Args:
        load: [E] tokens of each expert, which total less than 2**31 with base loads.
        placement: the copies, without guest slots.
        problem: checked.
        given_load: [R] tokens of each rank, base loads not included, by slots that an engine gave;
            None: the batch came with experts, and is compared at home.
    """
    if not problem.least_gain:
        return False
    R = placement.num_ranks
    base = base_load(problem, placement)
    home, single_load = base.copy(), base.copy()
    np.add.at(home, placement.home_rank, load)
    single = (placement.copy_rank >= 0).sum(1) == 1
    np.add.at(single_load, placement.home_rank[single], load[single])
    totals, sizes = np.zeros((2, R), np.int64)
    np.add.at(totals, placement.component, home)
    np.add.at(sizes, placement.component, 1)
    means = -(-totals // np.maximum(sizes, 1))
    bound = max(means.max(), single_load.max())
    stayed = home if given_load is None else base + given_load
    return bool(stayed.max() - bound < problem.least_gain)
