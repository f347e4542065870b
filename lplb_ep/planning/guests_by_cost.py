"""Guests and quotas of a batch by its objective: by tokens, or by time that includes pushes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..placement.table import Placement
from ..problem import GuestRule, Problem
from .fill_rules import CHOICE_RULES
from .guests import Bool, Filled, Int32, Int64, choose_guests, fill_guests, split_evenly
from .layout import guest_components
from .objectives import improve, quotas_by_objective
from .values import rank_costs


class Planned(NamedTuple):
    """A batch's plan."""

    guests: Int32
    """[R, G], -1 = empty."""
    quota: Int64
    """[E, C] of the residents and these guests."""


def plan_load(load: Int64, placement: Placement, problem: Problem) -> Planned:
    """Guests and quotas of a load, as the CPU plans them; arguments as of `choose_guests`."""
    if problem.objective_name != "tokens" and placement.num_guests_per_rank:
        return plan_by_cost(load, placement, problem)
    guests = guests_of(load, placement, problem)
    filled = placement.with_guests(guests) if guests.size else placement
    return Planned(guests, quotas_by_objective(load, filled, problem))


def guests_of(load: Int64, placement: Placement, problem: Problem) -> Int32:
    """[R, G] int32: the guests alone, which with the objective `tokens` takes less time."""
    if not placement.num_guests_per_rank:
        return np.full((placement.num_ranks, 0), -1, np.int32)
    if problem.objective_name == "tokens":
        return choose_guests(load, placement, problem)
    return plan_by_cost(load, placement, problem).guests


def plan_by_cost(load: Int64, placement: Placement, problem: Problem) -> Planned:
    """Of several choices of guests the one whose largest rank costs least, and its quotas.

    There are guests only where the largest rank's cost falls by more than their pushes cost
    (`push_waits`). The first choice has no guests, and its experts are split evenly over their
    residents. Each other one has the guests and tokens of a fill (`fill_guests`) by a rule of
    `CHOICE_RULES`. A search improves these tokens by cost (`improve`). Guests that then have no
    tokens are dropped. Where there were such, a second search has the waits without them.

    No tolerance is below the problem's, and no guest is chosen for fewer than its least tokens.
    Each domain takes a choice by itself. Of choices that cost the same, the one with fewer guests
    counts, then the first.

    Args:
        load: [E] whole numbers, tokens of each expert in the batch.
        placement: the residents and the guest slots.
        problem: the objective, the cost model, base loads and the rule, checked.
    """
    label, rules = guest_components(placement), choice_rules(problem)
    filled = [fill_guests(load, placement, problem, rule) for rule in rules]
    guests = np.full((placement.num_ranks, placement.num_guests_per_rank), -1, np.int32)
    tokens = split_evenly(load, placement)
    filled.insert(0, Filled(guests.copy(), tokens.copy()))
    for part in range(int(label.max()) + 1):
        members = label == part
        best = min(
            (
                _plan(one, members, load, placement, problem)
                for i, one in enumerate(filled)
                if i == 0 or (one.guests[members] >= 0).any()
            ),
            key=lambda one: (one.value, (one.guests >= 0).sum()),
        )
        guests[members], tokens[members] = best.guests[members], best.tokens[members]
    return Planned(guests, _quotas(tokens, placement.with_guests(guests)))


def choice_rules(problem: Problem) -> list[GuestRule]:
    """The rules of the choices behind the first."""
    tolerance, least = problem.guest_rule
    many = max(least, problem.cost_model.push_rows)
    return [
        GuestRule(max(tolerance, rule.tolerance), many if rule.is_worth else least)
        for rule in CHOICE_RULES
    ]


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


class _Choice(NamedTuple):
    """Guests of a domain, and its plan by cost with them."""

    guests: Int32
    """[R, G], -1 on other domains' ranks."""
    tokens: Int64
    """[R, E] of each copy."""
    value: int
    """What the largest rank costs."""


def _plan(
    filled: Filled, members: Bool, load: Int64, placement: Placement, problem: Problem
) -> _Choice:
    """The plan of a domain, whose ranks are `members` [R], with the guests of a fill."""
    guests, tokens = np.where(members[:, None], filled.guests, -1).astype(np.int32), filled.tokens
    for _ in range(2):
        with_guests = placement.with_guests(guests)
        start, waits = _quotas(tokens, with_guests), push_waits(guests, placement, problem)
        quota = improve(start, load, with_guests, problem, members, waits)
        expert, column = np.nonzero(with_guests.copy_rank >= 0)
        tokens = np.zeros_like(filled.tokens)
        tokens[with_guests.copy_rank[expert, column], expert] = quota[expert, column]
        is_used = np.take_along_axis(tokens > 0, np.maximum(guests, 0), axis=1) & (guests >= 0)
        if (is_used == (guests >= 0)).all():
            break
        guests = _those(is_used, guests)
    costs = rank_costs(quota, with_guests, problem, push_waits(guests, placement, problem))
    return _Choice(guests, tokens, int(costs[members].max()))


def _quotas(tokens: Int64, placement: Placement) -> Int64:
    """[E, C]: tokens [R, E] of the copies of a placement."""
    expert, column = np.nonzero(placement.copy_rank >= 0)
    out = np.zeros(placement.copy_rank.shape, np.int64)
    out[expert, column] = tokens[placement.copy_rank[expert, column], expert]
    return out


def _those(is_kept: Bool, guests: Int32) -> Int32:
    """[R, G] some of the guests, in the first slots."""
    order = np.argsort(~is_kept, axis=1, kind="stable")
    return np.take_along_axis(np.where(is_kept, guests, -1), order, axis=1).astype(np.int32)
