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
    """The optimum, T*, of a batch that was planned by tokens; of others the mean load, rounded up.
    """
    OWN_HOME = 5
    """Rows of this rank, had every token gone home."""
    OWN = 6
    """Rows of this rank."""
    GUESTS = 7
    """Guests of all ranks."""
    SENT = 8
    """Guests whose home is on this rank."""
    RECEIVED = 9
    """Guests on this rank."""
    WORST_HOME = 10
    """No sum: HOME of the window's batch with the largest HOME / LOAD."""
    WORST_HOME_LOAD = 11
    """And its LOAD."""
    WORST = 12
    """No sum: GOT of the window's batch with the largest GOT / LOAD."""
    WORST_LOAD = 13
    """And its LOAD."""
    WINDOW = 14
    """No sum: the number of the window that these are of."""
