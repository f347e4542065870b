"""Guests of a batch: which experts of other ranks the guest slots hold, by the batch's loads.

Sixteen greedy fills with different rules run side by side, and the best one counts. On a GPU a
warp runs each. A fill moves tokens from ranks above a limit to ranks below it. It uses the copies
that are there first, and places a guest where these do not help. All is done in whole numbers, and
every tie is decided, so that CPU and GPU choose the same guests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..placement.table import Placement
from ..problem import GUEST_PARTS, MAX_TOTAL, GuestRule, Problem
from . import reference
from .fill_rules import CLOSE, NUM_ROUNDS, NUM_TARGETS, RULES, Rule
from .layout import guest_components
from .values import base_load

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


def choose_guests(load: Int64, placement: Placement, problem: Problem) -> Int32:
    """Fills the guest slots for a batch; pure, deterministic, in whole numbers.

    Guests stay on their home's node. So each *domain* chooses by itself: a node, or all nodes that
    replicas join. Ranks without an expert get no guests, and are no part of a domain. A *level* is
    a load over a rank's speed, rounded up, in tokens of the fastest rank. At equal speeds it is the
    load. The *target* is the largest mean level of a domain, and the tolerance more. A domain has
    no guests where its residents' optimum is within the target. Nor has it where they would gain
    less than `guest_min_tokens`. Each guest is placed for so many tokens or more. That does not
    bound the quotas: of the plans with the least T*, a solver may find one with fewer.

    Every expert starts split evenly over its residents, by rank, the rest to the first. `_fill`
    says what a fill does. Of two fills that one is better which comes first by

    1. whether all ranks reach the target; else the largest level, in steps of 1 / 2 ** `CLOSE`
    2. its number of guests
    3. the most guests that one rank is home to
    4. its number in all rounds

    In later rounds fill i aims at lo + ⌈(hi - lo) / 8⌉ (i mod 8). Here hi is the largest level of
    the best fill. First lo is the target. In the last round it is the largest aim below all that
    were reached.

    Args:
        load: [E] whole numbers, tokens of each expert in the batch.
        placement: the residents and the guest slots.
        problem: base loads, speeds and the rule, checked. Its load does not count.

    Returns:
        [R, G] int32: the expert of each guest slot, -1 = empty; empty ones come last.
    """
    residents = reference.solve(torch.from_numpy(load), placement, **problem.bounds).quota.numpy()
    expert, column = np.nonzero(residents)
    reached = np.zeros(placement.num_ranks, np.int64)
    np.add.at(reached, placement.copy_rank[expert, column], residents[expert, column])
    return fill_guests(load, placement, problem, problem.guest_rule, reached).guests


class Filled(NamedTuple):
    """Guests, and the tokens of every copy in the fill that chose them."""

    guests: Int32
    """[R, G], -1 = empty."""
    tokens: Int64
    """[R, E]; where there are no guests, experts are split evenly over their residents."""


def fill_guests(
    load: Int64,
    placement: Placement,
    problem: Problem,
    rule: GuestRule,
    reached: Int64 | None = None,
) -> Filled:
    """As `choose_guests`, by any rule.

    Args:
        load, placement, problem: as for `choose_guests`.
        rule: when a batch takes guests.
        reached: [R] tokens of each rank without guests, by which a domain has none; None: those of
            the even split.
    """
    R = placement.num_ranks
    guests = np.full((R, placement.num_guests_per_rank), -1, np.int32)
    base = base_load(problem, placement)
    speed = np.ones(R, np.int64) if problem.speed is None else problem.speed.numpy()
    fastest = int(speed.max())
    holds = _holders(placement)
    tokens = _even_split(load, holds)
    out = tokens.copy()
    label = guest_components(placement)
    domains = [np.flatnonzero(label == d) for d in range(label.max() + 1)]
    rank_load = tokens.sum(axis=1) + base
    mean = max(
        -(-int(rank_load[ranks].sum()) * fastest // int(speed[ranks].sum())) for ranks in domains
    )
    target = min(mean + mean * rule.tolerance // GUEST_PARTS, MAX_TOTAL)
    level = _levels(rank_load if reached is None else reached + base, speed, fastest)
    local = np.empty(R, np.int64)
    for ranks in domains:
        best = int(level[ranks].max())
        if best <= target:
            continue
        local[ranks] = np.arange(ranks.size)
        is_here = label[placement.home_rank] == label[ranks[0]]
        domain = _Domain(
            *_places(holds[ranks], tokens[ranks], guests.shape[1]),
            load=rank_load[ranks],
            holds=holds[ranks],
            home=np.where(is_here, local[placement.home_rank], -1),
            node=placement.node[ranks],
            speed=speed[ranks],
            fastest=fastest,
            num_guests=guests.shape[1],
            least=rule.min_tokens,
        )
        found = domain.best_fill(target)
        if found.level <= best - rule.min_tokens:
            guests[ranks] = found.guests
            out[ranks] = 0
            rank, place = np.nonzero(found.expert >= 0)
            out[ranks[rank], found.expert[rank, place]] = found.tokens[rank, place]
    return Filled(guests, out)


def split_evenly(load: Int64, placement: Placement) -> Int64:
    """[R, E]: the tokens of each rank, each expert split evenly over the ranks that hold it."""
    return _even_split(load, _holders(placement))


def _even_split(load: Int64, holds: Bool) -> Int64:
    tokens = np.zeros(holds.shape, np.int64)
    number = holds.sum(axis=0)
    nth = np.cumsum(holds, axis=0) - 1
    tokens[holds] = (load // number + (nth < load % number))[holds]
    return tokens


def _holders(placement: Placement) -> Bool:
    """[R, E]: whether a rank holds a copy of an expert."""
    holds = np.zeros((placement.num_ranks, placement.num_experts), bool)
    expert, column = np.nonzero(placement.copy_rank >= 0)
    holds[placement.copy_rank[expert, column], expert] = True
    return holds


def _levels(load: Int64, speed: Int64, fastest: int) -> Int64:
    return -(-load * fastest // speed)


def _places(holds: Bool, tokens: Int64, num_guests: int) -> tuple[Int64, Int64]:
    """[R, S] each: the expert and the tokens of each place (`_Domain`), from tables [R, E]."""
    number = holds.sum(axis=1)
    expert = np.full((len(holds), int(number.max()) + num_guests), -1)
    rank, held = np.nonzero(holds)
    place = np.arange(rank.size) - (np.cumsum(number) - number)[rank]
    expert[rank, place] = held
    at_place = np.zeros_like(expert)
    at_place[rank, place] = tokens[rank, held]
    return expert, at_place


class _Fill(NamedTuple):
    """What a fill found."""

    key: tuple[int, int, int, int]
    """Smaller is better."""
    level: int
    """The largest of a rank."""
    does_reach: bool
    """Whether all ranks are within what it aimed at."""
    guests: Int64
    """[R, G], -1 = empty."""
    expert: Int64
    tokens: Int64
    """[R, S] of each place (`_Domain`)."""


@dataclass(frozen=True)
class _Domain:
    """A domain's ranks and experts, by local number, before a fill.

    A rank's places are its residents by number of the expert, then its guest slots.
    """

    expert: Int64
    """[R, S] in each place, -1 = none."""
    tokens: Int64
    """[R, S] of each place."""
    load: Int64
    """[R] base loads included."""
    holds: Bool
    """[R, E] whether a rank holds a copy."""
    home: Int64
    """[E] local rank, -1 = in another domain."""
    node: Int32
    """[R]."""
    speed: Int64
    """[R]."""
    fastest: int
    """The largest speed of all ranks."""
    num_guests: int
    """G."""
    least: int
    """The fewest tokens of a guest, and the least excess that counts."""

    def best_fill(self, target: int) -> _Fill:
        """The best of all rounds, by the rules of `choose_guests`."""
        number = len(RULES)
        best = min((self._try(i, target, target) for i in range(number)), key=lambda f: f.key)
        lowest = target
        for first in range(number, NUM_ROUNDS * number, number):
            if best.key[0] == 0:
                break
            step = -(-(best.level - lowest) // NUM_TARGETS)
            aims = [lowest + step * (i % NUM_TARGETS) for i in range(number)]
            fills = [self._try(first + i, aim, target) for i, aim in enumerate(aims)]
            best = min([best, *fills], key=lambda f: f.key)
            reached = [aim for aim, fill in zip(aims, fills, strict=True) if fill.does_reach]
            end = min([best.level, *reached])
            lowest = max([lowest, *(aim for aim in aims if aim < end)])
        return best

    def _limits(self, level: int) -> Int64:
        """[R]: the most load of each rank at a level."""
        return level * self.speed // self.fastest

    def _try(self, number: int, aim: int, target: int) -> _Fill:
        """Fill `number` of all rounds, which aims at a level, and its quality."""
        filled = _fill(self, RULES[number % len(RULES)], number, self._limits(aim))
        level = int(_levels(filled.load, self.speed, self.fastest).max())
        guests = filled.expert[:, self.expert.shape[1] - self.num_guests :]
        sent = np.bincount(self.home[guests[guests >= 0]], minlength=1)
        bucket = 0
        if self._is_over(filled.load, target):
            bucket = -(-(level - target) // max(1, target >> CLOSE))
        key = (bucket, int((guests >= 0).sum()), int(sent.max()), number)
        reaches = not self._is_over(filled.load, aim)
        return _Fill(key, level, reaches, guests, filled.expert, filled.tokens)

    def _is_over(self, load: Int64, level: int) -> bool:
        """Whether a rank's excess over a level counts."""
        return bool((load - self._limits(level) >= self.least).any())


@dataclass
class _State:
    """What a fill changes; shapes as in `_Domain`."""

    expert: Int64
    tokens: Int64
    load: Int64
    holds: Bool
    used: Int64
    """[R] guests of each rank."""

    def move(self, moved: int, source: int, place: int, to: int, to_place: int) -> None:
        """Moves tokens of a place of one rank to a place of another."""
        self.tokens[source, place] -= moved
        self.tokens[to, to_place] += moved
        self.load[source] -= moved
        self.load[to] += moved


def _fill(domain: _Domain, rule: Rule, number: int, limit: Int64) -> _State:
    """One fill, from the even split.

    In each step, as long as a rank is above its limit by the least tokens of a guest:

    1. The *source* is such a rank: with the largest excess, or with the highest random priority.
    2. Tokens move to a copy that a rank below its limit already has. They are as many as the
       copy has, the excess asks for and the other rank takes. The move of most tokens is made.
    3. Where no such move exists and the rule is by priority, the excess moves to a copy
       on another rank. That is the rank of least priority, if less than the source's.
    4. Where there is no such copy, a guest is placed (`_place_guest`). A source that cannot place
       one is passed over until some guest is placed.

    There are at most 8 R + R G steps. Ties go to the lowest place, then to the lowest rank.
    """
    R, G = len(domain.load), domain.num_guests
    state = _State(
        domain.expert.copy(),
        domain.tokens.copy(),
        domain.load.copy(),
        domain.holds.copy(),
        np.zeros(R, np.int64),
    )
    random = _random(number, R)
    priority = random >> 1
    noise = random & (rule.noise - 1) if rule.noise else np.zeros(R, np.int64)
    is_stuck = np.zeros(R, bool)
    for _ in range(8 * R + R * G):
        excess = state.load - limit
        may = (excess >= domain.least) & ~is_stuck
        if not may.any():
            break
        source = int(np.where(may, excess if rule.by_excess else priority, -1).argmax())
        if _use_copies(state, source, limit, None if rule.by_excess else priority):
            continue
        if _place_guest(domain, state, source, rule, limit, noise):
            is_stuck[:] = False
        else:
            is_stuck[source] = True
    return state


def _random(number: int, num_ranks: int) -> Int64:
    """[R] 32 bits for each rank, from the number of the fill: a multiplicative hash."""
    bits = ((number * 64 + np.arange(num_ranks) + 1) * 0x9E3779B1) & 0xFFFFFFFF
    bits ^= bits >> 15
    bits = (bits * 0x85EBCA77) & 0xFFFFFFFF
    return bits ^ bits >> 13


def _use_copies(state: _State, source: int, limit: Int64, priority: Int64 | None) -> bool:
    """Steps 2 and 3 of a fill; whether tokens moved."""
    tokens, held = state.tokens[source], state.expert[source]
    shared = (state.holds[:, held] & (tokens > 0)).T
    shared[:, source] = False
    if not shared.any():
        return False
    need, slack = int(state.load[source] - limit[source]), limit - state.load
    may_move = np.minimum(tokens, need)[:, None]
    moved = np.where(shared, np.minimum(may_move, slack), 0)
    if moved.max() <= 0:
        if priority is None:
            return False
        shared &= priority < priority[source]
        if not shared.any():
            return False
        moved = np.broadcast_to(may_move, shared.shape)
        best = np.where(shared, priority, MAX_TOTAL + 1).argmin()
    else:
        best = moved.argmax()
    place, to = divmod(int(best), len(limit))
    to_place = int((state.expert[to] == held[place]).argmax())
    state.move(int(moved[place, to]), source, place, to, to_place)
    return True


def _place_guest(
    domain: _Domain, state: _State, source: int, rule: Rule, limit: Int64, noise: Int64
) -> bool:
    """Step 4 of a fill; whether a guest was placed, which takes tokens from the source.

    Its rank is on the source's node, and so is its home. It has a free slot and slack for the least
    tokens. Enough is what the source's largest
    expert may bring, up to the excess. Of ranks with enough the narrowest is taken. Where there is
    none, or by the rule, it is the widest of all. Widths are slacks with noise added.

    The guest aims at the excess, as far as there is slack. It aims at all of the slack where the
    rank's last slot would waste too much of it (`Rule.shift`). Then the source must have a free
    slot: it goes below its limit, and takes another's tokens. Slack to spare is that of ranks with
    a free slot, less all excess.

    The expert is one that the rank does not hold, with the least tokens of a guest at the source.
    The one with fewest tokens that suffice is taken. Where there is none, or by the rule, it is the
    one with most. Where no expert may come, the next rank is tried.
    """
    G, least = domain.num_guests, domain.least
    held = state.expert[source]
    is_near = domain.node == domain.node[source]
    may_leave = (domain.home[held] >= 0) & is_near[domain.home[held]]
    tokens = np.where(may_leave, state.tokens[source], 0)
    slack = limit - state.load
    need = -int(slack[source])
    want = min(need, int(tokens.max()))
    may = is_near & (slack >= least) & (state.used < G)
    if tokens.max() < least:
        return False
    width = slack + (slack * noise >> 10)
    spare = int(slack[(slack < 0) | (state.used < G)].sum())
    while may.any():
        fits = may & (slack >= want)
        if rule.widest or not fits.any():
            to = int(np.where(may, width, -1).argmax())
        else:
            to = int(np.where(fits, width, 2 * MAX_TOTAL).argmin())
        aim = min(need, int(slack[to]))
        is_last = state.used[to] == G - 1 and state.used[source] < G
        if slack[to] > need and is_last and slack[to] - need > spare >> rule.shift:
            aim = int(slack[to])
        able = (tokens >= least) & ~state.holds[to, held]
        if able.any():
            suffice = able & (tokens >= aim)
            if rule.largest or not suffice.any():
                place = int(np.where(able, tokens, -1).argmax())
            else:
                place = int(np.where(suffice, tokens, MAX_TOTAL + 1).argmin())
            slot = state.expert.shape[1] - G + int(state.used[to])
            state.expert[to, slot] = held[place]
            state.move(min(aim, int(tokens[place])), source, place, to, slot)
            state.holds[to, held[place]] = True
            state.used[to] += 1
            return True
        may[to] = False
    return False
