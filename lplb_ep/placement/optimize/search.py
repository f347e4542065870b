"""A local search from one table: moves that scenarios propose and validation scenarios confirm."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .bounds import balance, exact_optima
from .cuts import Cuts
from .moves import Limits, Move, Slots
from .objective import LEAST_GAIN, SLACK, Objective
from .scenarios import LEVELS

Array = npt.NDArray[Any]

_NUM_EXACT = 40  # validation scenarios, on which tables are compared by exact optima
_NUM_RUINS = 10  # in a row that fail, then the search ends
_RUIN_SLOTS = 6  # emptied at a time
_RUIN_PATIENCE = 10  # moves in a row that fail after slots were emptied, then that attempt ends


class Final(NamedTuple):
    """A search's result, and its score by exact optima."""

    score: float
    table: Array


class _State(NamedTuple):
    """A table, and its quotas and bounds in the scenarios that propose and that validate."""

    table: Array
    """[P] int64, E = empty."""
    quota: Array
    """[P, K] float32, in the scenarios that propose."""
    score: float
    """Of the table, in the scenarios that propose."""
    validation_quota: Array
    """[P, K] float32, in the scenarios that validate."""
    validation: Array
    """[K] upper bounds on the optima of the scenarios that validate."""


class Search:
    """A table, its quotas in every scenario, and the cuts found so far.

    The search proposes moves by their effect on `load`, of which it knows cuts. It keeps those that
    `validation` confirms. Otherwise it would fit the table to a few random scenarios.

    Args:
        load: [K, E] scenarios that propose moves; each sums to R.
        validation: [K', E] scenarios that confirm moves; each sums to R.
        table: [P] int64; a slot that holds what a lower slot of its rank holds counts as empty.
        num_ranks: R.
        percentile: of the scenarios' optima, in [0, 100]; None: the mean at each level of drift.
        limits: what may change.
    """

    def __init__(
        self,
        load: Array,
        validation: Array,
        table: Array,
        num_ranks: int,
        percentile: float | None,
        limits: Limits,
    ) -> None:
        # Expert E stands for an empty slot; it has no load.
        self.load, self.validation = (
            np.pad(loads, ((0, 0), (0, 1))).astype(np.float32) for loads in (load, validation)
        )
        self.first, self.limits, self.objective = table, limits, Objective(percentile)
        self.slots = Slots(table, num_ranks, load.shape[1], limits)
        self.cuts = Cuts(self.load, self.slots, self.objective)
        self._refused: list[Move] = []
        self._steps = 0
        self._compared: tuple[Array, float] | None = None
        start = self.slots.start
        self._state = self._evaluated(
            start, self._first_quota(start, self.load), self._first_quota(start, self.validation)
        )

    def run(self, patience: int) -> None:
        """Improves the table until no move gains, `patience` moves in a row failed, or limits end
        it."""
        failed = 0
        while failed < patience and not self._has_ended():
            moves = self.cuts.best_moves(self._state.table, self._state.score, self._refused)
            if not moves:
                return
            for move in moves:
                self._steps += 1
                if self._made(move):
                    failed = 0
                    break
                self._refused.append(move)
                failed += 1
                if self._has_ended():
                    break

    def ruin_and_recreate(self, rng: np.random.Generator) -> None:
        """Leaves a local optimum (Schrimpf et al. 2000): empties some slots and improves the rest.

        An attempt stays if the validation scenarios confirm it. Several failed attempts in a row
        end it.
        """
        failed = 0
        while (
            failed < _NUM_RUINS
            and not self._has_ended()
            and self.bounded_score() > np.log(SLACK) + LEAST_GAIN
        ):
            kept = self._state
            self._state = self._ruined(rng)
            self._refused.clear()
            self.run(_RUIN_PATIENCE)
            if self.objective.confirms(kept.validation, self._state.validation):
                failed = 0
            else:
                self._state = kept
                failed += 1

    def bounded_score(self) -> float:
        """The score of the table in the validation scenarios, by upper bounds."""
        return float(self.objective.score(self._state.validation))

    def exact_score(self) -> float:
        """The score by exact optima, of the same loads for all tables.

        Bounds suffice for the moves of one table, which share their gap. The gap of another table
        differs. So it is measured on some validation scenarios, and taken off at each level.
        """
        table, validation = self._state.table, self._state.validation
        if self._compared is None or self._compared[0] is not table:
            by_level = np.arange(len(validation)).reshape(LEVELS, -1)
            some = by_level[:, : _NUM_EXACT // LEVELS].ravel()
            optima = exact_optima(self.slots.holds(table)[:-1], self.validation[some, :-1])
            of_level = (validation[some] - optima).reshape(LEVELS, -1).mean(axis=1)
            exact = validation - np.repeat(of_level, by_level.shape[1])
            self._compared = table, float(self.objective.score(exact))
        return self._compared[1]

    def result(self) -> Final:
        """The table as it is; slots that the search left empty hold their first expert."""
        table = self._state.table
        return Final(self.exact_score(), np.where(table == self.slots.empty, self.first, table))

    def _has_ended(self) -> bool:
        return self.limits.are_late() or self._steps >= self.limits.max_steps

    def _made(self, move: Move) -> bool:
        """Makes a move if all scenarios gain from it and the validation confirms it."""
        old = self._state
        table = move.applied(old.table, old.table)
        quota, score = self._proposed(table, move.applied(old.table, old.quota))
        if score > old.score - LEAST_GAIN / 2:
            return False
        validation_quota, validation = self._validated(
            table, move.applied(old.table, old.validation_quota)
        )
        if not self.objective.confirms(old.validation, validation):
            return False
        self._state = _State(table, quota, score, validation_quota, validation)
        self._refused.clear()
        return True

    def _ruined(self, rng: np.random.Generator) -> _State:
        """The table with some movable slots emptied, as far as every expert keeps a copy."""
        table, quota, validation_quota = (
            self._state.table,
            self._state.quota,
            self._state.validation_quota,
        )
        holders = self.slots.holds(table).sum(axis=1)
        for slot in rng.permutation(np.flatnonzero(self.limits.movable))[:_RUIN_SLOTS]:
            is_changed = table[slot] != self.slots.start[slot]
            if holders[table[slot]] > 1 and (self.slots.changes_left(table) or is_changed):
                holders[table[slot]] -= 1
                move = Move(int(slot), self.slots.empty, False)
                table, quota, validation_quota = (
                    move.applied(table, values) for values in (table, quota, validation_quota)
                )
        return self._evaluated(table, quota, validation_quota)

    def _evaluated(self, table: Array, quota: Array, validation_quota: Array) -> _State:
        """A table with the quotas to start from."""
        quota, score = self._proposed(table, quota)
        return _State(table, quota, score, *self._validated(table, validation_quota))

    def _proposed(self, table: Array, quota: Array) -> tuple[Array, float]:
        """The quotas and the score in the scenarios that propose, whose cuts are kept."""
        quota, upper, ranks = balance(quota, table, self.slots.num_ranks, self.load)
        self.cuts.add(ranks)
        return quota, float(self.objective.score(upper))

    def _validated(self, table: Array, quota: Array) -> tuple[Array, Array]:
        """The quotas and the upper bounds in the scenarios that validate."""
        quota, upper, _ = balance(quota, table, self.slots.num_ranks, self.validation)
        return quota, upper

    def _first_quota(self, table: Array, load: Array) -> Array:
        """[P, K]: all of each expert's load in its first slot."""
        quota = np.zeros((table.size, len(load)), np.float32)
        held, slot = np.unique(table, return_index=True)
        quota[slot] = load.T[held]
        return quota
