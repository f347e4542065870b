"""The moves of a search: a slot gets another expert, or two slots swap; which are allowed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


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
    """Moves that the search may try."""
    deadline: float
    """On `time.perf_counter`, in seconds."""

    def are_late(self) -> bool:
        """Whether the deadline has passed."""
        return time.perf_counter() > self.deadline


class Move(NamedTuple):
    """`slot` gets expert `other`, or slots `slot` and `other` swap their experts."""

    slot: int
    other: int
    swap: bool

    def applied(self, table: Array, values: Array) -> Array:
        """A copy of `values` after the move.

        Args:
            table: [P], before the move.
            values: the table itself, or quotas [P, K].
        """
        slot, other = self.slot, self.other
        values = values.copy()
        if self.swap:
            values[[slot, other]] = values[[other, slot]]
        elif values.ndim == 1:
            values[slot] = other
        else:  # the tokens go to the first copy that is left
            left = np.flatnonzero((table == table[slot]) & (np.arange(len(values)) != slot))
            values[left[:1]] += values[slot]
            values[slot] = 0
        return values


class Slots:
    """The slots of a search's tables. In these, expert E stands for an empty slot.

    Args:
        table: [P] int64, -1 = empty. A slot that holds what a lower slot of its rank holds counts
            as empty too.
        num_ranks: R.
        num_experts: E.
        limits: what may change.
    """

    start: Array
    """[P] int64: the table that the search starts from."""
    second: Array
    """[E + 1]: second copies on a rank, which come back where their slots get nothing else."""

    def __init__(self, table: Array, num_ranks: int, num_experts: int, limits: Limits) -> None:
        self.num_ranks, self.empty, self.limits = num_ranks, num_experts, limits
        self.rank = np.repeat(np.arange(num_ranks), table.size // num_ranks)
        self.node = self.rank * limits.num_nodes // num_ranks
        self.start = table.copy()
        first = np.unique(self.rank * self.empty + table, return_index=True)[1]
        second = np.setdiff1d(np.arange(table.size), first)
        self.second = np.bincount(table[second][table[second] >= 0], minlength=self.empty + 1)
        self.start[second] = self.empty
        self.start[table < 0] = self.empty

    def holds(self, table: Array) -> Array:
        """[E + 1, R] bool: the ranks that hold each expert; none holds the empty one."""
        holds = np.zeros((self.empty + 1, self.num_ranks), bool)
        holds[table, self.rank] = True
        holds[self.empty] = False
        return holds

    def changes_left(self, table: Array) -> int:
        """How many more slots of a table may differ from the start."""
        return self.limits.max_changes - int((table != self.start).sum())

    def forbidden(self, table: Array) -> tuple[Array, Array]:
        """[P, E] and [P, P] bool: replacements and swaps that the limits forbid."""
        limits, rank, holds = self.limits, self.rank, self.holds(table)
        left = self.changes_left(table)
        cost = (table == self.start).astype(int)
        fixed = ~limits.movable | (cost > left)
        fixed |= (holds.sum(axis=1)[table] == 1) & (table != self.empty)
        replace = holds[:, rank].T | fixed[:, None]
        replace |= holds.sum(axis=1) + self.second >= limits.max_copies
        home = np.zeros(self.empty + 1, int)
        home[table] = self.node
        replace |= self.node[:, None] != home

        there = holds[table][:, rank]
        swap = there | there.T | (self.node[:, None] != self.node)
        swap |= ~(limits.movable[:, None] & limits.movable)
        swap |= cost[:, None] + cost > left
        swap |= np.tri(table.size, dtype=bool)
        return replace[:, : self.empty], swap
