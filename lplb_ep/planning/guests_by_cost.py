"""Guests of a batch by the objective: by tokens, or as many as gain more time than pushes cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..placement.table import Placement
from ..problem import GUEST_PARTS, Problem
from .guests import Bool, Int32, Int64, choose_guests
from .objectives import quotas_by_objective, rank_costs
from .structs import Status


def guests_of(status: Status, load: Int64, placement: Placement, problem: Problem) -> Int32:
    """[R, G] int32: the guests of a batch that ends with a status; arguments as `choose_guests`."""
    none = np.full((placement.num_ranks, placement.num_guests_per_rank), -1, np.int32)
    if status is not Status.OPTIMAL or not none.size:
        return none
    if problem.objective_name == "tokens":
        return choose_guests(load, placement, problem)
    return choose_guests_by_cost(load, placement, problem)


def choose_guests_by_cost(load: Int64, placement: Placement, problem: Problem) -> Int32:
    """Guests for a plan by cost: of several choices the one whose largest rank costs least.

    A choice costs what its plan by cost does, with the waits for its pushes (`push_waits`). No
    guests are a choice, too. So there are guests only where the largest rank's cost falls by more
    than their pushes cost. Each other choice is that of `choose_guests` by a rule:

    1. by the problem's tolerance, guests of more rows than cost as much as a push
    2. by a tolerance of a tenth, likewise
    3. by a tolerance of a fifth, with the problem's least tokens
    4. by a tolerance of a half, likewise

    No tolerance is below the problem's, and no guest is chosen for fewer than its least tokens.
    Where guests get no tokens by the plan, the same choice without them is one more. Of choices
    that cost the same, the one with fewer guests counts, then the first.

    Args:
        load: [E] whole numbers, tokens of each expert in the batch.
        placement: the residents and the guest slots.
        problem: the objective, the cost model, base loads and the rule, checked.

    Returns:
        [R, G] int32: the expert of each guest slot, -1 = empty; empty ones come last.
    """
    cost, (tolerance, least) = problem.cost_model, problem.guest_rule
    assert cost.push is not None, "checked problems have the cost of a push"
    usual, many = tolerance / GUEST_PARTS, max(least, int(cost.most_rows(cost.push)))
    none = np.full((placement.num_ranks, placement.num_guests_per_rank), -1, np.int32)
    tried = [_plan(none, load, placement, problem)]
    for share, fewest in ((0.0, many), (0.1, many), (0.2, least), (0.5, least)):
        rule = replace(problem, guest_tolerance=max(usual, share), guest_min_tokens=fewest)
        guests = choose_guests(load, placement, rule)
        if any((guests == one.guests).all() for one in tried):
            continue
        tried.append(_plan(guests, load, placement, problem))
        if tried[-1].is_used.sum() < (guests >= 0).sum():
            guests = _those(tried[-1].is_used, guests)
            tried.append(_plan(guests, load, placement, problem))
    return min(tried, key=lambda one: (one.value, (one.guests >= 0).sum())).guests


def push_waits(guests: npt.ArrayLike, placement: Placement, problem: Problem) -> Int64:
    """[R] nanoseconds that each rank waits for its guests, by cost; 0 by other objectives.

    Pushes of a rank pass one after another over its link, those that come and those that leave. So
    a rank waits for as many pushes as it has guests, or as a home of one of them sends in all.

    Args:
        guests: [R, G] the expert in each guest slot, -1 = empty.
        placement: the residents, with or without these guests.
        problem: the objective and the cost of a push, checked.
    """
    rank, slot = np.nonzero(np.asarray(guests) >= 0)
    size, by_cost = placement.num_ranks, problem.objective_name in ("cost", "auto")
    if not by_cost or not rank.size:
        return np.zeros(size, np.int64)
    assert problem.cost_model.push is not None, "a checked problem has the cost of a push"
    home = placement.home_rank[np.asarray(guests)[rank, slot]]
    number = np.bincount(rank, minlength=size)
    np.maximum.at(number, rank, np.bincount(home, minlength=size)[home])
    return number * problem.cost_model.push


@dataclass(frozen=True)
class _Choice:
    """Guests, and what a plan by cost comes to with them."""

    guests: Int32
    """[R, G]"""
    value: int
    """What the largest rank costs."""
    is_used: Bool
    """[R, G] guests that get tokens."""


def _plan(guests: Int32, load: Int64, placement: Placement, problem: Problem) -> _Choice:
    filled, waits = placement.with_guests(guests), push_waits(guests, placement, problem)
    quota = quotas_by_objective(load, filled, problem, waits=waits)
    expert, column = np.nonzero(quota)
    has_rows = np.zeros((placement.num_ranks, placement.num_experts), bool)
    has_rows[filled.copy_rank[expert, column], expert] = True
    is_used = np.take_along_axis(has_rows, np.maximum(guests, 0), axis=1) & (guests >= 0)
    return _Choice(guests, int(rank_costs(quota, filled, problem, waits).max()), is_used)


def _those(is_kept: Bool, guests: Int32) -> Int32:
    """[R, G] some of the guests, in the first slots."""
    order = np.argsort(~is_kept, axis=1, kind="stable")
    return np.take_along_axis(np.where(is_kept, guests, -1), order, axis=1).astype(np.int32)
