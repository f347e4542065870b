"""Tables of experts chosen so that the linear program's optimum stays low for loads that may come.

The optimum T* of a load is the largest, over sets S of ranks, of the load of experts whose copies
all lie in S, over |S|. `optimize` minimises its excess over the mean in scenarios: the samples, and
loads at several strengths of drift from them, at each of which to halve it is worth as much. (A
mean over all would be that of the far ones, most of whose excess no table can help.) Four parts:

- starts: copies by expected load, spread so that ranks share as few experts as can be;
- for all scenarios at once, quotas balanced along pairs of copies (coordinate descent on the sum of
  squares), whose level sets are the S above: the upper and the lower bound on each T*;
- a local search. The sets found so far are kept as cuts (Kelley 1960, Benders 1962): from them the
  effect of every change of a slot and every swap of two is known at once, to first order by
  products of matrices. The best are then balanced, which keeps one or brings new cuts;
- the exact solver, which chooses between the tables that searches began with and came to. The
  bounds leave a gap of its own to each, 0.02 of the mean for some of LPLB's pairs.

"mean" below is the mean rank load, the unit of all loads. The same arguments give the same table on
one machine, whatever its threads, unless a time budget ends the search. Other libraries or other
instructions may round a logarithm in another way: ranks should share a table that one of them made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .eplb import pack, replicate
from .optimum import Network, solve

Array = npt.NDArray[Any]

NUM_SCENARIOS = 256  # that moves are found on
NUM_JUDGES = 640  # that decide whether a move is kept
NUM_EXACT = 40  # of the judges, on which tables are compared by exact optima
RUINS = 10  # in a row that fail, then it ends
RUIN_SLOTS = 6  # emptied at a time
NUM_SEARCHES = 2  # from the best starts
FIRST_PATIENCE = 8  # moves in a row that fail, then these end, and the best goes on
PATIENCE = 30  # moves in a row that fail, then the search ends
RUIN_PATIENCE = 10  # the same after slots were emptied
MAX_STEPS = 400  # moves that a search tries
REFINE_STEPS = 300  # the same from a given start, where slots are emptied until the steps are used
FLATTEN = (0.6, 0.8, 0.5, 0.4, 1.0, 0.3, 0.2)  # powers of the load by which starts give out copies
WALK = 6  # steps of the walks between ranks that a start avoids
TRIES = 8  # of proposed moves, before others are proposed
NUM_CUTS = 4  # kept of each scenario
SHORTLIST = 96  # moves of each kind whose effect on all cuts is computed
LEVELS = 8  # of drift, see `scenarios`; divides the numbers of scenarios
BEND = 3  # more levels are near than far
SLACK = 0.05  # of the mean: an excess far below this is as good as none
LEAST_GAIN = 5e-4  # of a move, of the score: less is the choice of scenarios, not of loads
MAX_SWEEPS = 24
GAP = 1e-3  # between the bounds, of the mean: balancing ends below
SMOOTH = 0.05  # of the mean: cuts this close to a scenario's highest count as high as it


def optimize(
    samples: Array,
    num_ranks: int,
    num_local_slots: int,
    *,
    num_nodes: int = 1,
    num_groups: int = 1,
    start: Array | None = None,
    movable: Array | None = None,
    max_changes: int | None = None,
    max_copies: int | None = None,
    percentile: float | None = None,
    drift: float = 0.8,
    seed: int = 0,
    max_steps: int | None = None,
    time_budget_s: float | None = None,
) -> Array:
    """A table for the loads that may come.

    Args:
        samples: [N, E] float64, at least 0, each with a positive sum.
        num_ranks: R, a multiple of `num_nodes`.
        num_local_slots: slots on each rank; E or more on all of them, and of a node as many as
            the experts that are packed on it.
        num_nodes: nodes that an expert's copies stay within; 1: anywhere.
        num_groups: groups of consecutive experts, which drift together, and with several nodes stay
            on one; divides E, and is a multiple of `num_nodes`. 1: no groups.
        start: [P] int64 table to improve, -1 = empty; None: make one.
        movable: [P] bool, slots of `start` that may change; None: all.
        max_changes: slots that may differ from `start`; None: all.
        max_copies: of an expert that the search comes to from `start`; None: any number.
        percentile: of the scenarios' optima to minimise, in [0, 100]; None: the mean at each
            strength of drift.
        drift: see `scenarios`.
        seed: of the scenarios.
        max_steps: moves that a search tries; None: MAX_STEPS, from `start` REFINE_STEPS.
        time_budget_s: after it the step under way is the last, and one more table is judged
            exactly; the best so far.

    Returns:
        [P] int64. Unless `start` leaves some empty, every slot is filled.
    """
    begin = time.perf_counter()
    rng = np.random.default_rng(seed)
    load, judge = (
        num_ranks * scenarios(samples, num, drift, num_groups, rng)
        for num in (NUM_SCENARIOS, NUM_JUDGES)
    )
    tables: Iterable[Array]
    if start is not None:
        tables = [start]
    else:
        whole = 1 if num_nodes == 1 else num_groups if num_groups > 1 else samples.shape[1]
        shape = (num_ranks, num_local_slots, num_nodes, whole)
        tables = _starts(load, samples.mean(axis=0), *shape)
    slots = num_ranks * num_local_slots
    if max_steps is None:
        max_steps = MAX_STEPS if start is None else REFINE_STEPS
    limits = Limits(
        movable=np.ones(slots, bool) if movable is None else movable,
        max_changes=slots if max_changes is None else max_changes,
        max_copies=num_ranks if max_copies is None else max_copies,
        num_nodes=num_nodes,
        max_steps=max_steps,
        deadline=float("inf") if time_budget_s is None else begin + time_budget_s,
    )
    searches: list[Search] = []
    for table in tables:
        if any((search.first == table).all() for search in searches):
            continue
        searches.append(Search(load, judge, table, num_ranks, percentile, limits))
        if limits.late():
            break
    searches = sorted(searches, key=Search.judgement)[:NUM_SEARCHES]
    finals = [search.result() for search in searches]
    for search in searches:
        search.run(FIRST_PATIENCE)
        finals.append(search.result())
    best = min(searches, key=Search.exactly)
    best.run(PATIENCE)
    if start is not None:
        best.ruin_and_recreate(rng)
    finals.append(best.result())
    return min(finals, key=lambda final: final.score).table


def even_homes(table: Array, num_experts: int, num_ranks: int) -> Array:
    """Chooses homes among the copies, as many on each rank as can be.

    Args:
        table: [P] int64, every slot filled.
        num_experts: E.
        num_ranks: R.

    Returns:
        [E] the slot of each expert's home.
    """
    from scipy.optimize import linear_sum_assignment

    first = _first_slots(table, num_experts, num_ranks)
    num_slots = table.size // num_ranks
    # The j-th home of a rank costs j: all ranks get as many as they can, and none too many.
    seat = np.tile(np.arange(num_slots), num_ranks)
    cost = np.where(np.repeat(first >= 0, num_slots, axis=0), seat[:, None], 1e6)
    column, expert = linear_sum_assignment(cost)
    home = np.empty(num_experts, int)
    home[expert] = first[column // num_slots, expert]
    return home


def arrange(table: Array, load: Array, num_ranks: int) -> tuple[Array, Array]:
    """Chooses homes, as many on each rank as can be, and puts them first on it, by load.

    Args:
        table: [P] int64, every slot filled.
        load: [E] float64.
        num_ranks: R.

    Returns:
        The table [P], and the slot of each expert's home [E].
    """
    rows = table.reshape(num_ranks, -1)
    home_rank = even_homes(table, load.size, num_ranks) // rows.shape[1]
    out = np.empty_like(rows)
    for rank, row in enumerate(rows):
        out[rank] = row[np.lexsort((row, -load[row], home_rank[row] != rank))]
    first = _first_slots(out.ravel(), load.size, num_ranks)
    return out.ravel(), first[home_rank, np.arange(load.size)]


def _first_slots(table: Array, num_experts: int, num_ranks: int) -> Array:
    """[R, E]: the first slot of each expert on each rank; -1: none."""
    first = np.full((num_ranks, num_experts), -1)
    slot = np.arange(table.size)[::-1]  # of several the first is written last
    first[slot // (table.size // num_ranks), table[::-1]] = slot
    return first


def scenarios(
    samples: Array, num: int, drift: float, num_groups: int, rng: np.random.Generator
) -> Array:
    """Loads that may come: samples, from as they are to `drift` away from them.

    Logarithms of loads are taken to wander as a stationary first-order autoregression, popularity
    of an expert and of its group each with the spread that the samples show: with correlation rho,
    log p' = rho log p + sqrt(1 - rho^2) log q. Equal parts have rho = 1 - drift u^3 for u from 0 to
    1: most stay near, for loads mostly do, and what can still be won is there.

    Args:
        samples: [N, E] float64, at least 0, each with a positive sum.
        num: K.
        drift: in [0, 1].
        num_groups: groups of consecutive experts that share a factor; 1: none.
        rng: where chance comes from.

    Returns:
        [K, E] float64; each scenario sums to 1. They are in order of drift, LEVELS equal parts.
    """
    experts = samples.shape[1]
    share = samples / samples.sum(axis=1, keepdims=True)
    base = share[np.arange(num) % len(samples)]
    size = experts // num_groups
    floor = 0.01 / experts  # a dead expert may come back
    group = np.log(np.maximum(base.reshape(num, num_groups, size).mean(axis=2), floor))
    group -= group.mean(axis=1, keepdims=True)
    own = np.log(np.maximum(base, floor)) - np.repeat(group, size, axis=1)
    # The lognormal distribution that fits the tokens, not the experts: cold ones say little of
    # what hot ones may do, and dead ones nothing.
    middle = (base * own).sum(axis=1, keepdims=True)
    variance = (base * (own - middle) ** 2).sum(axis=1, keepdims=True)
    log = own - (middle - variance) + np.repeat(group, size, axis=1)
    # Groups differ by chance, too, as far as their experts do.
    chance = np.expm1(variance) / size
    group_spread = np.sqrt(np.maximum((group**2).mean(axis=1, keepdims=True) - chance, 0))
    step = np.repeat(group_spread * rng.standard_normal(group.shape), size, axis=1)
    step += np.sqrt(variance) * rng.standard_normal(own.shape)
    away = drift * (np.arange(num)[:, None] * LEVELS // num / (LEVELS - 1)) ** BEND
    load = np.exp((1 - away) * log + np.sqrt(1 - (1 - away) ** 2) * step)
    load = np.where(away > 0, load, base)
    return load / load.sum(axis=1, keepdims=True)


def spread(loads: Array, num_ranks: int, num_local_slots: int, flatten: float = 1.0) -> Array:
    """A start: copies by load, on ranks that share few experts.

    Each further slot goes to the expert whose copies are most loaded; copies of experts that have
    several are laid first, the heaviest first, a round of all ranks at a time, then the others:
    so ranks differ little in what they can pass on. A copy goes where it repeats fewest pairs of
    ranks, then to the rank that is lightest when the copy is heavy: so experts that drift together
    are spread, too.

    Args:
        loads: [K, E] float64, scenarios or their mean alone.
        num_ranks: R.
        num_local_slots: slots on each rank.
        flatten: power of the load by which copies are given out: less than 1 for more pairs.

    Returns:
        [R, num_local_slots] int64.
    """
    load = loads.mean(axis=0)
    expert = replicate(load**flatten, num_ranks * num_local_slots, num_ranks)
    copies = np.bincount(expert)
    share = load / copies
    holds = np.zeros((load.size, num_ranks), bool)
    shared = np.zeros((num_ranks, num_ranks))
    total, filled = np.zeros((num_ranks, len(loads))), np.zeros(num_ranks, int)
    table = np.zeros((num_ranks, num_local_slots), int)
    for e in expert[np.lexsort((expert, -share[expert], copies[expert] == 1))]:
        near = holds[e].astype(float)
        for _ in range(WALK):
            near = near + np.einsum("rs,s->r", shared, near)  # never BLAS, as @ is
        # The keys in order: not twice on a rank, all ranks equally full, new pairs, light ranks.
        full = np.where(filled < num_local_slots, 0, np.inf)
        weight = np.einsum("rk,k->r", total, loads[:, e])
        rank = np.lexsort((weight, near, filled, holds[e], full))[0]
        shared[rank, holds[e]] += 1
        shared[holds[e], rank] += 1
        holds[e, rank] = True
        table[rank, filled[rank]] = e
        filled[rank] += 1
        total[rank] += loads[:, e] / copies[e]
    return table


def pairs(load: Array, num_ranks: int, num_local_slots: int) -> Array:
    """Another start, LPLB's: experts packed by load, each rank's heaviest copied to other ranks,
    each at a distance of its own.

    Args:
        load: [E] float64; R divides E.
        num_ranks: R.
        num_local_slots: from E / R to 2 E / R.

    Returns:
        [R, num_local_slots] int64.
    """
    home = pack(load, num_ranks)
    more = num_local_slots - home.shape[1]
    shift = np.maximum(
        np.rint(num_ranks ** (np.arange(more) / max(more, 1))), np.arange(1, more + 1)
    )
    source = (np.arange(num_ranks)[:, None] + shift.astype(int)) % num_ranks
    return np.concatenate([home, home[source, np.arange(more)]], axis=1)


def _starts(
    loads: Array,
    seen: Array,
    num_ranks: int,
    num_local_slots: int,
    num_nodes: int,
    num_groups: int,
) -> Iterator[Array]:
    """[P] each: tables to choose from, in each node for the groups of experts packed on it as EPLB
    packs them. The most even one comes first, for a time budget may end it there.

    Args:
        loads: [K, E] scenarios.
        seen: [E] mean load of the samples.
        num_ranks, num_local_slots, num_nodes: as for `optimize`.
        num_groups: that stay whole on a node.
    """
    expected = loads.mean(axis=0)
    size, ranks = expected.size // num_groups, num_ranks // num_nodes
    nodes = pack(expected.reshape(num_groups, size).sum(axis=1), num_nodes)
    experts = [(groups[:, None] * size + np.arange(size)).ravel() for groups in nodes]
    kinds: list[tuple[Callable[..., Array], Array]] = [
        *((partial(spread, flatten=power), expected[None]) for power in FLATTEN),
        *((partial(spread, flatten=power), loads) for power in FLATTEN[:3]),
    ]
    if experts[0].size % ranks == 0 and num_local_slots <= 2 * experts[0].size // ranks:
        kinds += [(pairs, expected), (pairs, seen)]
    for kind, load in kinds:
        rows = [e[kind(load[..., e], ranks, num_local_slots)] for e in experts]
        yield np.concatenate(rows).ravel()


@dataclass(frozen=True)
class Limits:
    """What a search may change, and how long it takes."""

    movable: Array
    """[P] bool: slots that may change."""
    max_changes: int
    """Slots that may differ from the first table."""
    max_copies: int
    """Copies of an expert."""
    num_nodes: int
    """Nodes that an expert's copies stay within; 1: anywhere."""
    max_steps: int
    deadline: float
    """On `time.perf_counter`."""

    def late(self) -> bool:
        return time.perf_counter() > self.deadline


class Move(NamedTuple):
    """`slot` gets expert `other`, or slots `slot` and `other` swap what they hold."""

    slot: int
    other: int
    swap: bool


class Final(NamedTuple):
    """What a search came to, and its score by exact optima."""

    score: float
    table: Array


class Search:
    """A table, its quotas in every scenario, and the cuts found so far.

    The search proposes moves by what they do to `load`, of which it knows cuts, and keeps those
    that `judge` confirms: else it would fit the table to the chance of a few scenarios.

    Args:
        load, judge: [K, E] scenarios, each sums to R.
        table: [P] int64; a slot that holds what a lower slot of its rank holds counts as empty.
        num_ranks: R.
        percentile: of the scenarios' optima, in [0, 100]; None: the mean at each level of drift.
        limits: what may change.
    """

    def __init__(
        self,
        load: Array,
        judge: Array,
        table: Array,
        num_ranks: int,
        percentile: float | None,
        limits: Limits,
    ) -> None:
        self.num_ranks, self.percentile, self.limits = num_ranks, percentile, limits
        # Expert E stands for an empty slot; it has no load.
        self.load, self.judge = (
            np.pad(loads, ((0, 0), (0, 1))).astype(np.float32) for loads in (load, judge)
        )
        self.empty = load.shape[1]
        self.rank = np.repeat(np.arange(num_ranks), table.size // num_ranks)
        self.node = self.rank * limits.num_nodes // num_ranks
        self.first, self.table = table, table.copy()
        first = np.unique(self.rank * self.empty + table, return_index=True)[1]
        second = np.setdiff1d(np.arange(table.size), first)
        # They come back where their slots get nothing else.
        self.second = np.bincount(table[second][table[second] >= 0], minlength=self.empty + 1)
        self.table[second] = self.empty
        self.table[table < 0] = self.empty
        self.start = self.table
        self.sets = np.ones((len(load), NUM_CUTS, num_ranks), bool)
        self.value = np.ones(self.sets.shape[:2])
        self.quota, upper, ranks = self._balanced(self.table, self.load)
        self.score = float(self._score(upper))
        self.judged, self.verdict, _ = self._balanced(self.table, self.judge)
        self._add(ranks)
        self.refused: list[Move] = []
        self.steps = 0
        self.compared: tuple[Array, float] | None = None

    def run(self, patience: int) -> None:
        """Improves the table until no move gains, so many in a row failed, or limits end it."""
        failed = 0
        while failed < patience and not self._ended():
            moves = self._best_moves()
            if not moves:
                return
            for move in moves:
                self.steps += 1
                if self._made(move):
                    failed = 0
                    break
                self.refused.append(move)
                failed += 1
                if self._ended():
                    break

    def _made(self, move: Move) -> bool:
        """Makes a move if all scenarios gain from it and the judges confirm it."""
        table = self._moved(move, self.table)
        quota, upper, ranks = self._balanced(table, self.load, self._moved(move, self.quota))
        self._add(ranks)
        score = float(self._score(upper))
        if score > self.score - LEAST_GAIN / 2:
            return False
        judged, verdict, _ = self._balanced(table, self.judge, self._moved(move, self.judged))
        if not self._confirmed(self.verdict, verdict):
            return False
        self.table, self.quota, self.score = table, quota, score
        self.judged, self.verdict = judged, verdict
        self.refused.clear()
        return True

    def ruin_and_recreate(self, rng: np.random.Generator) -> None:
        """Leaves a local optimum (Schrimpf et al. 2000): empties some slots, improves that, and
        keeps what the judges confirm, until several attempts in a row fail."""
        failed = 0
        while (
            failed < RUINS and not self._ended() and self.judgement() > np.log(SLACK) + LEAST_GAIN
        ):
            kept = (self.table, self.quota, self.score, self.judged, self.verdict)
            holders = self._holds().sum(axis=1)
            for slot in rng.permutation(np.flatnonzero(self.limits.movable))[:RUIN_SLOTS]:
                unchanged = self.table[slot] == self.start[slot]
                if holders[self.table[slot]] > 1 and (self._changes_left() or not unchanged):
                    holders[self.table[slot]] -= 1
                    move = Move(int(slot), self.empty, False)
                    quota, judged = (self._moved(move, q) for q in (self.quota, self.judged))
                    self.table, self.quota, self.judged = (
                        self._moved(move, self.table),
                        quota,
                        judged,
                    )
            self.quota, upper, ranks = self._balanced(self.table, self.load, self.quota)
            self.score = float(self._score(upper))
            self.judged, self.verdict, _ = self._balanced(self.table, self.judge, self.judged)
            self._add(ranks)
            self.refused.clear()
            self.run(RUIN_PATIENCE)
            if self._confirmed(kept[4], self.verdict):
                failed = 0
            else:
                self.table, self.quota, self.score, self.judged, self.verdict = kept
                failed += 1

    def _ended(self) -> bool:
        return self.limits.late() or self.steps >= self.limits.max_steps

    def _changes_left(self) -> int:
        return self.limits.max_changes - int((self.table != self.start).sum())

    def judgement(self) -> float:
        """The score of the table in the judges' scenarios."""
        return float(self._score(self.verdict))

    def exactly(self) -> float:
        """The score by exact optima, of the same loads for all tables.

        Bounds do for the moves of one table, which share their gap. That of different tables
        differs: it is measured on some of the judges, and taken off at each level of drift.
        """
        if self.compared is None or self.compared[0] is not self.table:
            some = np.arange(NUM_JUDGES).reshape(LEVELS, -1)[:, : NUM_EXACT // LEVELS].ravel()
            gap = self.verdict[some] - exact_optima(self._holds()[:-1], self.judge[some, :-1])
            of_level = gap.reshape(LEVELS, -1).mean(axis=1)
            exact = self.verdict - np.repeat(of_level, NUM_JUDGES // LEVELS)
            self.compared = self.table, float(self._score(exact))
        return self.compared[1]

    def result(self) -> Final:
        """The table as it is; slots that the search left empty hold what they did."""
        table = np.where(self.table == self.empty, self.first, self.table)
        return Final(self.exactly(), table)

    def _confirmed(self, before: Array, after: Array) -> bool:
        """Whether the judges gain, and for the mean by more than its standard error."""
        least = LEAST_GAIN / 2
        if self.percentile is None:
            gain = self._worth(before) * (before - after)
            least = max(least, gain.std() / np.sqrt(gain.size))
        return bool(self._score(before) - self._score(after) >= least)

    def _balanced(
        self, table: Array, load: Array, quota: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """`balance` of a table, from its first slots or from `quota`."""
        if quota is None:
            quota = np.zeros((table.size, len(load)), np.float32)
            held, slot = np.unique(table, return_index=True)
            quota[slot] = load.T[held]
        return balance(quota, table, self.num_ranks, load)

    def _score(self, optimum: Array) -> Array:
        """optimum: [K, ..]; returns [..]: the mean logarithm of the excess at a level."""
        excess = self._excess(optimum)
        return np.log(SLACK + excess).mean(axis=0)

    def _excess(self, optimum: Array) -> Array:
        """optimum: [K, ..]; returns [levels, ..] over the mean, one level for a percentile."""
        if self.percentile is None:
            levels = optimum.reshape(LEVELS, -1, *optimum.shape[1:]).mean(axis=1)
        else:
            # Of loads that agree on the percentile, the lower mean.
            levels = np.percentile(optimum, self.percentile, axis=0)[None]
            levels = levels + 0.01 * (optimum.mean(axis=0) - 1)
        return np.maximum(levels - 1, 0)

    def _worth(self, optimum: Array) -> Array:
        """[K]: derivative of the score by each optimum, times K."""
        worth = 1 / (SLACK + self._excess(optimum))
        return np.repeat(worth, len(optimum) // len(worth))

    def _add(self, ranks: Array) -> None:
        """Keeps each scenario's new set in place of its lowest cut."""
        new = np.flatnonzero((self.sets != ranks[:, None]).any(axis=2).all(axis=1))
        self.sets[new, self.value[new].argmin(axis=1)] = ranks[new]

    def _holds(self) -> Array:
        """[E + 1, R] bool; nobody holds the empty expert."""
        holds = np.zeros((self.empty + 1, self.num_ranks), bool)
        holds[self.table, self.rank] = True
        holds[self.empty] = False
        return holds

    def _cuts(self) -> tuple[Array, Array, Array, Array]:
        """Of all cuts [K * NUM_CUTS]: ranks outside, what a cut gains for each expert that loses
        its only copy outside, what it loses for each that gets its first, and its value."""
        outside = (~self.sets).reshape(-1, self.num_ranks).astype(np.float32)
        size = self.num_ranks - outside.sum(axis=1, keepdims=True)
        copies = outside @ self._holds().T.astype(np.float32)
        load = np.repeat(self.load, NUM_CUTS, axis=0) / size
        caught, free = np.where(copies == 1, load, 0), np.where(copies == 0, load, 0)
        return outside, caught, free, free.sum(axis=1)

    def _best_moves(self) -> list[Move]:
        """The moves after which the cuts are lowest, of those that gain; the best first."""
        outside, caught, free, value = self._cuts()
        num = len(self.load)
        self.value = by_scenario = value.reshape(num, -1)
        highest = by_scenario.max(axis=1, keepdims=True)
        weight = np.exp((by_scenario - highest) / SMOOTH)
        weight /= weight.sum(axis=1, keepdims=True)
        if self.percentile is not None:
            weight[highest[:, 0] < np.percentile(highest, self.percentile) - SMOOTH] = 0
        active = (weight.ravel() > 1e-2) & (value > 1 + GAP)
        if not active.any():
            return []
        weight *= self._worth(highest[:, 0])[:, None]
        gains = self._first_order(
            weight.ravel()[active, None], outside[active], caught[active], free[active]
        )
        (slot, expert), (one, two) = (_smallest(gain, SHORTLIST) for gain in gains)
        if not slot.size + one.size:
            return []
        rank, table = self.rank, self.table
        change = outside[:, rank[slot]] * (caught[:, table[slot]] - free[:, expert])
        a, b = outside[:, rank[one]], outside[:, rank[two]]
        swap = a * (1 - b) * (caught[:, table[one]] - free[:, table[two]])
        swap += b * (1 - a) * (caught[:, table[two]] - free[:, table[one]])
        after = value[:, None] + np.concatenate([change, swap], axis=1)
        after = after.reshape(num, NUM_CUTS, -1).max(axis=1)
        score = self._score(np.maximum(after, self._alone(slot, expert, one.size)))
        best = np.argsort(score)[:TRIES]
        return [
            Move(int(slot[i]), int(expert[i]), False)
            if i < slot.size
            else Move(int(one[i - slot.size]), int(two[i - slot.size]), True)
            for i in best[score[best] < self.score - LEAST_GAIN]
        ]

    def _alone(self, slot: Array, expert: Array, num_swaps: int) -> Array:
        """[K, moves]: what the ranks of one expert must take, of the hardest, after a slot got an
        expert, and after swaps. No kept cut shows that a copy of a hot expert does no good on
        another rank instead."""
        copies = np.bincount(self.table, minlength=self.empty + 1).clip(min=1)
        each = self.load / copies
        hardest = np.argsort(-each, axis=1)[:, :3]  # one at least is neither of a move's two
        old = self.table[slot]
        others = (hardest[:, :, None] != expert) & (hardest[:, :, None] != old)
        values = np.take_along_axis(each, hardest, axis=1)[:, :, None]
        rest = np.where(others, values, 0).max(axis=1)
        more = self.load[:, expert] / (copies[expert] + 1)
        fewer = self.load[:, old] / (copies[old] - 1).clip(min=1)
        replaced = np.maximum(rest, np.maximum(more, fewer))
        swapped = np.repeat(values[:, :1, 0], num_swaps, axis=1)
        return np.concatenate([replaced, swapped], axis=1)

    def _first_order(
        self, weight: Array, outside: Array, caught: Array, free: Array
    ) -> tuple[Array, Array]:
        """Change of the smoothed score in a unit of its own, inf where forbidden: [P, E] slot gets
        expert, [P, P] slots swap."""
        table, rank, limits = self.table, self.rank, self.limits
        holds = self._holds()
        changed = table != self.start
        left = self._changes_left()
        cost = (~changed).astype(int)
        # Products of whole numbers, 20 bits each of up to 2**10 cuts, are exact in float64: the
        # order of a sum, which is another with another number of BLAS threads, then makes no
        # difference.
        most = free.max(initial=caught.max())
        weight, caught, free = (
            np.rint(x * (2**20 / top)).astype(np.float64)
            for x, top in ((weight, weight.max()), (caught, most), (free, most))
        )
        out = weight * outside
        leave, inside = out[:, rank] * caught[:, table], 1.0 - outside

        replace = leave.sum(axis=0)[:, None] - (out.T @ free)[rank]
        fixed = ~limits.movable | (cost > left)
        fixed |= (holds.sum(axis=1)[table] == 1) & (table != self.empty)
        replace[fixed] = np.inf
        replace[holds[:, rank].T] = np.inf
        replace[:, holds.sum(axis=1) + self.second >= limits.max_copies] = np.inf
        replace[:, self.empty] = np.inf
        home = np.zeros(self.empty + 1, int)
        home[table] = self.node
        replace[self.node[:, None] != home] = np.inf

        swap = (leave.T @ inside)[:, rank] - (out.T @ (inside[:, rank] * free[:, table]))[rank]
        swap = swap + swap.T
        there = holds[table][:, rank]
        forbidden = there | there.T | (self.node[:, None] != self.node)
        forbidden |= ~(limits.movable[:, None] & limits.movable)
        forbidden |= cost[:, None] + cost > left
        swap[forbidden | np.tri(table.size, dtype=bool)] = np.inf
        for move in self.refused:
            (swap if move.swap else replace)[move.slot, move.other] = np.inf
        return replace[:, : self.empty], swap

    def _moved(self, move: Move, values: Array) -> Array:
        """A table [P], or quotas [P, K], after a move."""
        slot, other = move.slot, move.other
        values = values.copy()
        if move.swap:
            values[[slot, other]] = values[[other, slot]]
        elif values.ndim == 1:
            values[slot] = other
        else:  # the tokens go to the first copy that is left
            left = np.flatnonzero(
                (self.table == self.table[slot]) & (np.arange(len(values)) != slot)
            )
            values[left[:1]] += values[slot]
            values[slot] = 0
        return values


def _smallest(gain: Array, most: int) -> tuple[Array, Array]:
    """Row and column of the up to `most` smallest entries that are finite."""
    flat = gain.ravel()
    chosen = np.argpartition(flat, min(most, flat.size - 1))[:most]
    chosen = chosen[np.isfinite(flat[chosen])]
    row, column = np.unravel_index(chosen, gain.shape)
    return row, column


def balance(quota: Array, table: Array, num_ranks: int, load: Array) -> tuple[Array, Array, Array]:
    """Spreads experts over their copies, in all scenarios at once.

    Sweeps over pairs of copies, in classes that touch no rank twice, each pair levelling its two
    ranks. The limit is the plan with the least sum of squares, whose level sets are the tight ones;
    on the way every prefix of the ranks in order of load is tried for its bound.

    Args:
        quota: [P, K] float32 of each slot, from which to start.
        table: [P] int64, E = empty.
        num_ranks: R.
        load: [K, E + 1] float32.

    Returns:
        The quotas; [K] the largest rank loads, upper bounds on T*; [K, R] bool, the sets with
        the highest lower bounds.
    """
    num = len(load)
    classes = _pairs(table, num_ranks, load.shape[1] - 1)
    rank_load = quota.reshape(num_ranks, -1, num).sum(axis=1)
    order = np.argsort(table, kind="stable")
    first = np.flatnonzero(np.diff(table[order], prepend=-1))
    rank_of = order // (table.size // num_ranks)
    weight = load.T[table[order][first]]
    size = np.arange(1, num_ranks + 1)[:, None]
    columns = np.arange(num)
    for sweep in range(MAX_SWEEPS):
        for one, two, r, s in classes:
            step = np.clip((rank_load[r] - rank_load[s]) / 2, -quota[two], quota[one])
            quota[one] -= step
            quota[two] += step
            rank_load[r] -= step
            rank_load[s] += step
        if sweep % 8 != 7:
            continue
        descending = np.argsort(-rank_load, axis=0, kind="stable")
        place = np.empty_like(descending)
        np.put_along_axis(place, descending, np.arange(num_ranks)[:, None], axis=0)
        # An expert is confined to the first ranks that hold all its copies.
        last = np.maximum.reduceat(place[rank_of], first, axis=0)
        held = np.bincount((last * num + columns).ravel(), weight.ravel(), num_ranks * num)
        bound = np.cumsum(held.reshape(num_ranks, num), axis=0) / size
        best = bound.argmax(axis=0)
        upper = rank_load.max(axis=0)
        if (upper - bound[best, columns]).mean() < GAP:
            break
    return quota, upper, (place <= best).T


def exact_optima(holds: Array, loads: Array) -> Array:
    """[K]: T* of each load by the exact solver.

    Args:
        holds: [E, R] bool, the ranks that hold each expert.
        loads: [K, E], each sums to R.
    """
    num_ranks = holds.shape[1]
    # The ranks of each expert in descending order, so that column 0 holds one.
    copy_rank = np.sort(np.where(holds, np.arange(num_ranks), -1), axis=1)[:, ::-1]
    network = Network(copy_rank, num_ranks)
    tokens = 2**28 // num_ranks  # of the mean rank: its rounding is far below what is compared
    whole = np.rint(loads * tokens).astype(np.int64)
    return np.array([float(solve(load, network).bound) / tokens for load in whole])


def _pairs(table: Array, num_ranks: int, empty: int) -> list[tuple[Array, ...]]:
    """Pairs of slots with copies of one expert, in classes that touch each rank once at most:
    slots one and two, their ranks. Of many copies, each with the next two."""
    num_local = table.size // num_ranks
    classes: list[tuple[set[int], list[tuple[int, int]]]] = []
    slots: dict[int, list[int]] = {}
    for slot, expert in enumerate(table.tolist()):
        if expert != empty:
            slots.setdefault(expert, []).append(slot)
    for copies in slots.values():
        n = len(copies)
        near = {tuple(sorted((i, (i + d) % n))) for i in range(n) for d in (1, 2) if n > d}
        for i, j in sorted(near):
            pair = copies[i], copies[j]
            ranks = {slot // num_local for slot in pair}
            chosen = next((c for c in classes if not c[0] & ranks), None)
            if chosen is None:
                chosen = (set(), [])
                classes.append(chosen)
            chosen[0].update(ranks)
            chosen[1].append(pair)
    pairs = [np.array(members).T for _, members in classes]
    return [(one, two, one // num_local, two // num_local) for one, two in pairs]
