"""The value of a plan by its objective, and a bound that no plan is below; on the CPU."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..placement.table import Placement
from ..problem import Problem
from . import reference

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class Reached(NamedTuple):
    """The value of a plan in the unit of its objective, and the bound of all plans."""

    value: Fraction | int
    """Of the largest rank, with base loads: tokens over speed, active slots, or nanoseconds."""
    bound: Fraction
    """No plan on the placement, with the same guests, has less."""
    tight_ranks: torch.Tensor
    """[R] bool: ranks that together prove the bound."""


def reached(
    quota: Int64, load: Int64, placement: Placement, problem: Problem, waits: Int64 | int = 0
) -> Reached:
    """The value of quotas [E, C] of a load [E] by `experts`, `cost` or `auto`, and the bound."""
    base = base_load(problem, placement)
    active = active_solution(load, placement, problem)
    if problem.objective_name == "experts":
        value = int(_of_ranks(quota > 0, base > 0, placement).max())
        return Reached(value, active.bound, active.tight_ranks)
    # Costs have two bounds. One is of the least that each expert costs over as many copies, and
    # these costs are split at will. The other is of the active slots, each with its first step.
    cost = problem.cost_model
    copies = (placement.copy_rank >= 0).sum(1)
    costs = torch.from_numpy(cost.least_of_experts(load, copies))
    stays = torch.from_numpy(cost.of_slots(base) + waits)
    # Flows are of 31 bits. Larger costs are counted in units of a power of two, rounded down.
    unit = max(0, int(costs.sum() + stays.sum()).bit_length() - 31)
    split = reference.solve(costs >> unit, placement, base_load=stays >> unit)
    by_slots = -(-active.bound.numerator // active.bound.denominator) * cost.steps[0]
    bound, tight_ranks = split.bound * 2**unit, split.tight_ranks
    if by_slots > bound:
        bound, tight_ranks = Fraction(by_slots), active.tight_ranks
    value = int(rank_costs(quota, placement, problem, waits).max())
    return Reached(value, cost.fixed + bound, tight_ranks)


def rank_costs(
    quota: Int64, placement: Placement, problem: Problem, waits: Int64 | int = 0
) -> Int64:
    """[R] nanoseconds of each rank, by quotas [E, C], and by its wait for guests."""
    cost, base = problem.cost_model, base_load(problem, placement)
    return cost.fixed + _of_ranks(cost.of_slots(quota), cost.of_slots(base) + waits, placement)


def active_solution(load: Int64, placement: Placement, problem: Problem) -> reference.Optimum:
    """The flow with one unit for each expert that has tokens, and for each base load."""
    base = torch.from_numpy((base_load(problem, placement) > 0).astype(np.int64))
    return reference.solve(torch.from_numpy((load > 0).astype(np.int64)), placement, base_load=base)


def base_load(problem: Problem, placement: Placement) -> Int64:
    """[R] tokens that stay on each rank; 0 where the problem has none."""
    base = problem.base_load
    return np.zeros(placement.num_ranks, np.int64) if base is None else base.numpy()


def _of_ranks(
    of_copies: npt.NDArray[np.generic], base: Int64 | Bool, placement: Placement
) -> Int64:
    """[R]: sums of [E, C] over the copies of each rank, on top of [R]."""
    expert, column = np.nonzero(placement.copy_rank >= 0)
    out = base.astype(np.int64)
    np.add.at(out, placement.copy_rank[expert, column], of_copies[expert, column])
    return out
