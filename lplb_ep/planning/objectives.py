"""Plans by active slots and by cost: the definition, on the CPU, in whole numbers.

An *exact* solution comes from the flow: of tokens, or of one unit for each expert with tokens. A
search improves it, or all tokens at home. The largest ranks pass rows on, each along a chain of
experts' copies, until no rank of the chain exceeds what the search aims at. On a GPU one block does
the same, bit for bit, from its own exact solution. There a warp looks for each chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..cost import CostModel
from ..placement.table import Placement
from ..problem import Problem
from . import reference
from .search_rules import (
    AUTO_GAP,
    CHAIN,
    COUNT_BITS,
    FINEST,
    NO_LIMIT,
    NUM_AIMS,
    NUM_OTHERS,
    SEARCH_ROUNDS,
    SHRINK,
)
from .values import active_solution, base_load

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
_Chain = list[tuple[int, int, int]]
"""Moves of rows: the arcs that they leave and enter, and their number."""


def exact_solution(load: Int64, placement: Placement, problem: Problem) -> Int64:
    """What a plan builds on, for a load [E], as the CPU's flow finds it.

    Returns:
        [E, C]: by `experts`, 1 where an expert with tokens is, with the fewest of them on the
        fullest rank. By others, quotas with the fewest tokens on the fullest rank.
    """
    if problem.objective_name == "experts":
        return active_solution(load, placement, problem).quota.numpy().astype(np.int64)
    optimum = reference.solve(torch.from_numpy(load), placement, **problem.bounds)
    return optimum.quota.numpy().astype(np.int64)


def quotas_by_objective(
    load: Int64, placement: Placement, problem: Problem, exact: Int64 | None = None
) -> Int64:
    """The quotas of a load by the problem's objective.

    - `experts`: the fewest active slots on the fullest rank, exactly. Then the fewest tokens on the
      fullest rank that a search finds within that number. Experts stay whole, but for those with
      more rows than cost the first step.
    - `cost`: all tokens at home, where no plan can cost less. Else a search starts at the solution
      for `tokens`. It starts at home where active slots are half of the bound or more, unless home
      costs more than 1.5 times as much. Of home, what the search finds and that solution, the first
      that costs least.
    - `auto`: the same, but for searches that take longer than they gain. So there is none where
      experts with tokens have more than `CostModel.table_rows` in the mean. Nor is there where home
      or the solution for `tokens` is within `AUTO_GAP` for each rank of the bound.

    The cost of a plan is its largest rank cost. Each component of the placement is separate.

    Args:
        load: [E] whole numbers, tokens of each expert.
        placement: the copies.
        problem: the objective, and base loads; checked.
        exact: what the plan builds on (`exact_solution`); None: the CPU's.

    Returns:
        [E, C] whole numbers, rows sum to the load.
    """
    exact = exact_solution(load, placement, problem) if exact is None else exact
    if problem.objective_name == "tokens":
        return exact
    out = exact.copy()
    out[:, 0] = np.where((placement.copy_rank >= 0).sum(1) > 1, out[:, 0], load)
    for label in range(int(placement.component.max()) + 1):
        out = improve(out, load, placement, problem, placement.component == label)
    return out


def improve(
    start: Int64,
    load: Int64,
    placement: Placement,
    problem: Problem,
    members: Bool,
    waits: Int64 | None = None,
) -> Int64:
    """Quotas [E, C] for some ranks, as `quotas_by_objective` has them from an exact solution.

    Args:
        start: [E, C], in the place of the exact solution.
        load, placement, problem: as there; guests are in their slots.
        members: [R] bool, the ranks. All copies of their experts are on them.
        waits: [R] nanoseconds that ranks wait for guests; None: there are no guest slots.
    """
    part = _Component(placement, members, load, base_load(problem, placement), waits)
    out, of_arcs = start.copy(), start[part.expert, part.column]
    if problem.objective_name == "experts":
        rows = part.solve_experts(of_arcs, problem.cost_model.free_rows)
    else:
        may_skip = problem.objective_name == "auto" and waits is None
        rows = part.solve_cost(of_arcs, problem.cost_model, may_skip)
    out[part.expert, part.column] = rows
    return out


class _Measure(Protocol):
    """What rows of a slot count."""

    def of_slots(self, rows: npt.ArrayLike) -> Int64:
        """Of slots by their rows."""

    def most_rows(self, cost: npt.ArrayLike) -> Int64:
        """The most rows of a slot that count at most so much; negative below 0."""


class _Tokens:
    """Rows count as they are."""

    def of_slots(self, rows: npt.ArrayLike) -> Int64:
        return np.asarray(rows, np.int64)

    most_rows = of_slots


class _Limits(NamedTuple):
    """The rules of a search."""

    measure: _Measure
    least: int
    """A lower bound of the largest rank, where the search ends."""
    most_active: int
    """Slots of a rank that may have rows."""
    splits_above: int
    """Only experts of more rows may go in parts."""


class _Component:
    """A component's ranks and copies. An *arc* is a copy of an expert with several.

    Args:
        placement: the copies.
        members: [R] bool, the component's ranks.
        load: [E] tokens of each expert.
        base: [R] tokens that stay.
        waits: [R] nanoseconds for pushes; None: there are no guest slots.
    """

    def __init__(
        self, placement: Placement, members: Bool, load: Int64, base: Int64, waits: Int64 | None
    ) -> None:
        copies = placement.copy_rank
        local = np.cumsum(members) - 1
        is_here = members[placement.home_rank]
        several = (copies >= 0).sum(1) > 1
        expert, column = np.nonzero((copies >= 0) & (several & is_here)[:, None])
        rank = local[copies[expert, column]]
        # Of equal moves that of the first arc counts.
        order = np.lexsort((expert, rank) if waits is None else (rank, expert))
        self.expert, self.column, self.rank = expert[order], column[order], rank[order]
        """[arcs] each, by local rank, then expert; with guest slots the other way around."""
        self.load, self.base = load, base[members]
        self._waits = 0 if waits is None else waits[members]
        single = np.flatnonzero(is_here & ~several)
        self._of_single, self._single_rank = load[single], local[copies[single, 0]]
        self._several = np.flatnonzero(is_here & several)
        same = (self.expert[:, None] == self.expert) & (self.rank[:, None] != self.rank)
        self.source, self.target = np.nonzero(same)
        """[edges] arcs, from one copy of an expert to another."""

    def solve_experts(self, exact: Int64, splits_above: int) -> Int64:
        """[arcs] the rows of each by active slots, from the units [arcs] of a flow.

        Experts of at most `splits_above` rows stay whole."""
        whole = exact * self.load[self.expert]
        most_active = int((self._staying_active() + self._sums(whole > 0)).max())
        bound = self._bound(_Tokens(), self._num_tokens())
        limits = _Limits(_Tokens(), bound, most_active, splits_above)
        return self._search(whole, limits)

    def solve_cost(self, tokens: Int64, cost: CostModel, may_skip: bool) -> Int64:
        """[arcs] the rows of each by cost, where these rows [arcs] are the solution for tokens.

        `may_skip`: without a search that would take longer than it gains."""
        of_several = self.load[self._several]
        total = int(self._staying(cost).sum() + cost.least_of_experts(of_several).sum())
        # Some rank has at least the mean number of active slots, and each costs the first step.
        active = self._staying_active()
        num_active = int(active.sum() + (of_several > 0).sum())
        mean = -(-num_active // active.size)
        by_slots = max(mean, int(active.max())) * cost.steps[0]
        limits = _Limits(cost, max(self._bound(cost, total), by_slots), NO_LIMIT, 0)
        home = np.where(self.column == 0, self.load[self.expert], 0)
        of_home, of_tokens = self.largest(home, cost), self.largest(tokens, cost)
        if of_home <= limits.least:
            return home
        if may_skip:
            gap = min(of_home, of_tokens) - limits.least
            is_large = self._num_tokens() > cost.table_rows * num_active
            if is_large or gap <= AUTO_GAP * self.base.size:
                return home if of_home <= of_tokens else tokens
        begins_at_home = 2 * by_slots >= limits.least and 2 * of_home <= 3 * of_tokens
        best = self._search(home if begins_at_home else tokens, limits)
        return min(home, best, tokens, key=lambda rows: self.largest(rows, cost))

    def largest(self, rows: Int64, measure: _Measure) -> int:
        """What the largest rank counts with these rows of the arcs."""
        return int((self._staying(measure) + self._sums(measure.of_slots(rows))).max())

    def _num_tokens(self) -> int:
        """Of base loads and experts."""
        return int(self.base.sum() + self._of_single.sum() + self.load[self._several].sum())

    def _bound(self, measure: _Measure, total: int) -> int:
        """What some rank counts at least, where all of them do so much."""
        return max(-(-total // self.base.size), int(self._staying(measure).max()))

    def _staying(self, measure: _Measure) -> Int64:
        """[R] what experts with one copy, base loads and waits count."""
        out = measure.of_slots(self.base) + self._waits
        np.add.at(out, self._single_rank, measure.of_slots(self._of_single))
        return out

    def _staying_active(self) -> Int64:
        out = (self.base > 0).astype(np.int64)
        np.add.at(out, self._single_rank, self._of_single > 0)
        return out

    def _sums(self, of_arcs: npt.NDArray[np.generic]) -> Int64:
        """[R] sums of [arcs]."""
        out = np.zeros(len(self.base), np.int64)
        np.add.at(out, self.rank, of_arcs)
        return out

    def _search(self, rows: Int64, limits: _Limits) -> Int64:
        """[arcs] improved rows.

        Each round takes the rank that counts most, the first of several, and aims below it. At
        first it aims halfway to the bound. `_chain` finds what to move. Where there is no chain the
        step shrinks, down to 2 to the minus `FINEST` of the bound. Up to `NUM_AIMS` steps are tried
        in a round. The shortest chain is moved, and of equal ones that of the largest step.

        Other ranks above the round's first aim look for chains no longer than that, too, the first
        `NUM_OTHERS` of them. They are moved in this order, as far as they touch no rank that moved
        before.
        """
        rows = rows.copy()
        finest = max(1, limits.least >> FINEST)
        step = 0
        for _ in range(SEARCH_ROUNDS):
            state = self._state(rows, limits.measure)
            worst = int(state.amount.argmax())
            above = int(state.amount[worst]) - limits.least
            if above <= 0:
                break
            steps = [step or max(finest, above // 2)]
            while steps[-1] > finest and len(steps) < NUM_AIMS:
                steps.append(max(finest, steps[-1] >> SHRINK))
            aims = [limits.least + max(0, above - step) for step in steps]
            chain: _Chain = []
            for attempt, aim in enumerate(aims):
                # A later aim's chain must be shorter.
                found = self._chain(state, worst, aim, limits, len(chain) - 1 if chain else CHAIN)
                if found:
                    chain, step = found, steps[attempt]
            if not chain:
                step = steps[-1]
                if step <= finest:
                    break
                step = max(finest, step >> SHRINK)
                continue
            others = np.flatnonzero(state.amount > aims[0])
            others = others[others != worst][:NUM_OTHERS]
            chains = [
                self._chain(state, int(other), aims[0], limits, len(chain)) for other in others
            ]
            moved = np.zeros(state.amount.size, bool)
            for moves in (chain, *chains):
                touched = self.rank[[arc for move in moves for arc in move[:2]]]
                if moved[touched].any():
                    continue
                moved[touched] = True
                for arc, to, number in moves:
                    rows[arc] -= number
                    rows[to] += number
        return rows

    def _state(self, rows: Int64, measure: _Measure) -> _State:
        amount = self._staying(measure) + self._sums(measure.of_slots(rows))
        return _State(rows, amount, self._staying_active() + self._sums(rows > 0))

    def _chain(self, state: _State, first: int, aim: int, limits: _Limits, most: int) -> _Chain:
        """At most so many moves of a chain from `first`, the last first; none: no chain.

        After them all ranks that they touch are within the aim and the limit of active slots. It is
        a search by breadth. A rank passes on what brings it within the aim, and the next one may
        have to pass on rows of another expert. The last may be `first` again. Each rank is reached
        once, by the best of the moves (`_moves`).
        """
        found = _Reach(state, first)
        front = np.arange(len(state.amount)) == first
        for length in range(most):
            moves = self._moves(state, found, front, first, aim, limits, length > 0)
            if not moves.arc.size:
                break
            if not moves.is_over[0]:
                return [moves.at(0), *found.back_from(int(self.rank[moves.arc[0]]), self.rank)]
            front = np.zeros_like(front)
            for i in range(moves.arc.size):
                to = int(self.rank[moves.to[i]])
                if to != first and not found.seen[to]:
                    found.take(i, to, moves, self.rank)
                    front[to] = True
        return []

    def _moves(
        self,
        state: _State,
        found: _Reach,
        front: Bool,
        first: int,
        aim: int,
        limits: _Limits,
        may_close: bool,
    ) -> _Moves:
        """The moves from ranks of the front, the best first.

        That is by whether they end a chain, and whether the target's active slots are within their
        limit. Then it is by what the target counts, by arc, and by target. What it counts is
        compared in units of a power of two, such that the largest rank has `COUNT_BITS` - 1 bits.
        """
        rows, of = state.rows, limits.measure.of_slots
        rank, to_rank = self.rank[self.source], self.rank[self.target]
        closes = (to_rank == first) & may_close & (self.target != found.root[rank])
        able = front[rank] & (rows[self.source] > 0) & (found.entered[rank] != self.source)
        able &= ~found.seen[to_rank] | closes
        arc, to = self.source[able], self.target[able]
        rank, to_rank, closes = rank[able], to_rank[able], closes[able]
        own = of(rows[arc])
        # The most that may stay, so that the rank is within the aim without the rest.
        keep = np.minimum(limits.measure.most_rows(own - found.amount[rank] + aim), rows[arc] - 1)
        must_leave = self.load[self.expert[arc]] <= limits.splits_above
        must_leave |= found.active[rank] > limits.most_active
        keep = np.where(must_leave, np.minimum(keep, 0), keep)
        moved = rows[arc] - keep
        amount = np.where(closes, found.root_amount[rank], state.amount[to_rank])
        amount = amount - of(rows[to]) + of(rows[to] + moved)
        active = np.where(closes, found.root_active[rank], state.active[to_rank]) + (rows[to] == 0)
        left = np.where(keep >= 0, found.active[rank] - (keep == 0), 0)
        is_possible = (keep >= 0) & (left <= limits.most_active)
        crowds = active > limits.most_active
        is_over = (amount > aim) | crowds
        unit = max(0, int(state.amount.max()).bit_length() - (COUNT_BITS - 1))
        count = np.minimum(amount >> unit, 2**COUNT_BITS - 1)
        order = np.lexsort((to_rank, arc, count, crowds, is_over))
        order = order[is_possible[order]]
        all_moves = _Moves(
            arc,
            to,
            moved,
            amount,
            active,
            is_over,
            found.amount[rank] - own + of(np.maximum(keep, 0)),
            left,
        )
        return _Moves(*(values[order] for values in all_moves))


@dataclass(frozen=True)
class _State:
    """A component's rows, and their values by rank."""

    rows: Int64
    """[arcs]"""
    amount: Int64
    """[R] what each rank counts."""
    active: Int64
    """[R] slots with rows."""


class _Moves(NamedTuple):
    """Moves of rows along edges, in their order."""

    arc: Int64
    to: Int64
    """The arcs that rows leave and enter."""
    moved: Int64
    """Rows."""
    amount: Int64
    active: Int64
    """Of the target's rank, after the move."""
    is_over: Bool
    """Whether it must pass on rows."""
    rest: Int64
    left: Int64
    """What the source's rank counts after it, and its active slots."""

    def at(self, i: int) -> tuple[int, int, int]:
        """Arc, arc and rows of one."""
        return int(self.arc[i]), int(self.to[i]), int(self.moved[i])


class _Reach:
    """The ranks that a chain's search has reached, and how; [R] each."""

    def __init__(self, state: _State, first: int) -> None:
        size = len(state.amount)
        self.seen = np.arange(size) == first
        self.amount, self.active = state.amount.copy(), state.active.copy()
        """After the move that reached the rank."""
        self.entered = np.full(size, -1)
        """The arc by which the chain reached the rank."""
        self.root = np.full(size, -1)
        """The arc by which the chain left its first rank."""
        self.root_amount, self.root_active = np.zeros(size, np.int64), np.zeros(size, np.int64)
        """Of that rank since."""
        self.moves: dict[int, tuple[int, int, int]] = {}

    def take(self, i: int, to: int, moves: _Moves, rank: Int64) -> None:
        """Reaches a rank by move `i`."""
        arc = int(moves.arc[i])
        source = int(rank[arc])
        self.seen[to], self.moves[to] = True, moves.at(i)
        self.amount[to], self.active[to] = moves.amount[i], moves.active[i]
        self.entered[to] = moves.to[i]
        is_first = source not in self.moves
        self.root[to] = arc if is_first else self.root[source]
        self.root_amount[to] = moves.rest[i] if is_first else self.root_amount[source]
        self.root_active[to] = moves.left[i] if is_first else self.root_active[source]

    def back_from(self, at: int, rank: Int64) -> _Chain:
        """The moves that lead to a rank, the last first."""
        chain = []
        while at in self.moves:
            chain.append(self.moves[at])
            at = int(rank[self.moves[at][0]])
        return chain
