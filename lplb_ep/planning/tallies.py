"""The sums that a planner keeps over its batches, alike on the host and on the device."""

from __future__ import annotations

import enum


class Tally(enum.IntEnum):
    """Sums over batches whose counts are known: of a status below BAD_COUNTS.

    A load is of one rank, in rows, base loads included. With speeds it is in rows of a rank of mean
    speed, rounded up. All but OWN_HOME, OWN, SENT and RECEIVED is the same on every rank.
    """

    ROWS = 0
    """Picks of all ranks."""
    LOAD = 1
    """Rows and base loads of all ranks."""
    HOME = 2
    """The largest load, had every token gone home."""
    GOT = 3
    """The largest load."""
    BOUND = 4
    """The optimum, T*, of the batches of which it is known: those that were planned by tokens."""
    BOUND_LOAD = 5
    """LOAD of these batches."""
    OWN_HOME = 6
    """Rows of this rank, had every token gone home."""
    OWN = 7
    """Rows of this rank."""
    GUESTS = 8
    """Guests of all ranks."""
    SENT = 9
    """Guests whose home is on this rank."""
    RECEIVED = 10
    """Guests on this rank."""
    RECOMPUTED = 11
    """Batches of any status that a backward pass planned again."""
    WORST_HOME = 12
    """No sum: HOME of the window's batch with the largest HOME / LOAD."""
    WORST_HOME_LOAD = 13
    """And its LOAD."""
    WORST = 14
    """No sum: GOT of the window's batch with the largest GOT / LOAD."""
    WORST_LOAD = 15
    """And its LOAD."""
    WINDOW = 16
    """No sum: the number of the window that these are of."""
