"""Sets of ranks that bound the optimum of each scenario, and the moves that lower these bounds."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .bounds import GAP
from .moves import Move, Slots
from .objective import LEAST_GAIN, Objective

Array = npt.NDArray[Any]

_NUM_CUTS = 4  # kept of each scenario
_SHORTLIST = 96  # moves of each kind whose effect on all cuts is computed
_NUM_BEST = 8  # moves that are proposed at a time
_SMOOTH = 0.05  # of the mean: cuts this close to a scenario's highest count as high as it


class _Effects(NamedTuple):
    """The cuts [K * _NUM_CUTS] as a table meets them."""

    outside: Array
    """[cuts, R] float32: 1 for the ranks outside a cut."""
    caught: Array
    """[cuts, E + 1]: load that a cut gains for each expert that loses its only copy outside."""
    free: Array
    """[cuts, E + 1]: load that a cut loses for each expert that gets its first copy outside."""
    value: Array
    """[cuts]: the lower bound that a cut proves."""


class Cuts:
    """The highest sets of ranks that were found so far for each scenario.

    Args:
        load: [K, E + 1] float32 scenarios, each sums to R.
        slots: the slots of the tables.
        objective: of the scenarios' optima.
    """

    def __init__(self, load: Array, slots: Slots, objective: Objective) -> None:
        self.load, self.slots, self.objective = load, slots, objective
        self._sets = np.ones((len(load), _NUM_CUTS, slots.num_ranks), bool)
        self._value = np.ones(self._sets.shape[:2])

    def add(self, ranks: Array) -> None:
        """Keeps each scenario's set, [K, R] bool, in place of its lowest, where it is new."""
        new = np.flatnonzero((self._sets != ranks[:, None]).any(axis=2).all(axis=1))
        self._sets[new, self._value[new].argmin(axis=1)] = ranks[new]

    def best_moves(self, table: Array, score: float, refused: Collection[Move]) -> list[Move]:
        """The moves after which the cuts are lowest, of those that gain; the best first.

        Args:
            table: [P] int64.
            score: of the table.
            refused: moves to leave out.
        """
        effects = self._effects(table)
        num = len(self.load)
        self._value = by_scenario = effects.value.reshape(num, -1)
        highest = by_scenario.max(axis=1, keepdims=True)
        weight = np.exp((by_scenario - highest) / _SMOOTH)
        weight /= weight.sum(axis=1, keepdims=True)
        percentile = self.objective.percentile
        if percentile is not None:
            weight[highest[:, 0] < np.percentile(highest, percentile) - _SMOOTH] = 0
        active = (weight.ravel() > 1e-2) & (effects.value > 1 + GAP)
        if not active.any():
            return []
        weight *= self.objective.worth(highest[:, 0])[:, None]
        gains = first_order(
            self.slots, table, weight.ravel()[active, None], *(x[active] for x in effects[:3])
        )
        for gain, forbidden in zip(gains, self.slots.forbidden(table), strict=True):
            gain[forbidden] = np.inf
        replace, swap = gains
        for move in refused:
            (swap if move.swap else replace)[move.slot, move.other] = np.inf
        (slot, expert), (one, two) = (_smallest(gain, _SHORTLIST) for gain in gains)
        if not slot.size + one.size:
            return []
        after = self._values_after(table, effects, slot, expert, one, two)
        scores = self.objective.score(np.maximum(after, self._alone(table, slot, expert, one.size)))
        best = np.argsort(scores)[:_NUM_BEST]
        return [
            Move(int(slot[i]), int(expert[i]), False)
            if i < slot.size
            else Move(int(one[i - slot.size]), int(two[i - slot.size]), True)
            for i in best[scores[best] < score - LEAST_GAIN]
        ]

    def _effects(self, table: Array) -> _Effects:
        outside = (~self._sets).reshape(-1, self.slots.num_ranks).astype(np.float32)
        size = self.slots.num_ranks - outside.sum(axis=1, keepdims=True)
        copies = outside @ self.slots.holds(table).T.astype(np.float32)
        load = np.repeat(self.load, _NUM_CUTS, axis=0) / size
        caught, free = np.where(copies == 1, load, 0), np.where(copies == 0, load, 0)
        return _Effects(outside, caught, free, free.sum(axis=1))

    def _values_after(
        self, table: Array, effects: _Effects, slot: Array, expert: Array, one: Array, two: Array
    ) -> Array:
        """[K, moves]: the highest cut after a slot got an expert, and after slots were swapped."""
        outside, caught, free, value = effects
        rank = self.slots.rank
        change = outside[:, rank[slot]] * (caught[:, table[slot]] - free[:, expert])
        a, b = outside[:, rank[one]], outside[:, rank[two]]
        swap = a * (1 - b) * (caught[:, table[one]] - free[:, table[two]])
        swap += b * (1 - a) * (caught[:, table[two]] - free[:, table[one]])
        after = value[:, None] + np.concatenate([change, swap], axis=1)
        highest: Array = after.reshape(len(self.load), _NUM_CUTS, -1).max(axis=1)
        return highest

    def _alone(self, table: Array, slot: Array, expert: Array, num_swaps: int) -> Array:
        """[K, moves]: the load that the ranks of one expert must take, of the hardest expert.

        It comes after a slot got an expert, and after swaps. No kept cut shows that a copy of a hot
        expert does no good on another rank instead.
        """
        copies = np.bincount(table, minlength=self.slots.empty + 1).clip(min=1)
        each = self.load / copies
        hardest = np.argsort(-each, axis=1)[:, :3]  # one at least is neither of a move's two
        old = table[slot]
        others = (hardest[:, :, None] != expert) & (hardest[:, :, None] != old)
        values = np.take_along_axis(each, hardest, axis=1)[:, :, None]
        rest = np.where(others, values, 0).max(axis=1)
        more = self.load[:, expert] / (copies[expert] + 1)
        fewer = self.load[:, old] / (copies[old] - 1).clip(min=1)
        replaced = np.maximum(rest, np.maximum(more, fewer))
        swapped = np.repeat(values[:, :1, 0], num_swaps, axis=1)
        return np.concatenate([replaced, swapped], axis=1)


def first_order(
    slots: Slots, table: Array, weight: Array, outside: Array, caught: Array, free: Array
) -> tuple[Array, Array]:
    """The change of the smoothed score by every move, in a unit of its own.

    Args:
        slots: the slots of the table.
        table: [P] int64.
        weight: [cuts, 1], of each cut in the score.
        outside, caught, free: of the cuts, as in `_Effects`.

    Returns:
        [P, E] float64, a slot gets an expert; [P, P], two slots swap.
    """
    rank = slots.rank
    # Products of whole numbers, 20 bits each of up to 2**10 cuts, are exact in float64. So the
    # order of a sum, which differs with the number of BLAS threads, makes no difference.
    most = free.max(initial=caught.max())
    weight, caught, free = (
        np.rint(x * (2**20 / top)).astype(np.float64)
        for x, top in ((weight, weight.max()), (caught, most), (free, most))
    )
    out = weight * outside
    leave, inside = out[:, rank] * caught[:, table], 1.0 - outside
    replace = leave.sum(axis=0)[:, None] - (out.T @ free)[rank]
    swap = (leave.T @ inside)[:, rank] - (out.T @ (inside[:, rank] * free[:, table]))[rank]
    return replace[:, : slots.empty], swap + swap.T


def _smallest(gain: Array, most: int) -> tuple[Array, Array]:
    """Row and column of the up to `most` smallest entries that are finite."""
    flat = gain.ravel()
    chosen = np.argpartition(flat, min(most, flat.size - 1))[:most]
    chosen = chosen[np.isfinite(flat[chosen])]
    row, column = np.unravel_index(chosen, gain.shape)
    return row, column
