"""The rules of the search for a plan by active slots or cost, here and in `kernels/search.cuh`."""

from __future__ import annotations

import enum

from ..cost import MAX_STEPS


class Aim(enum.IntEnum):
    """The quantities beside tokens whose largest value over ranks a plan minimises."""

    EXPERTS = 0
    """Active slots, and then tokens."""
    COST = 1
    """Nanoseconds."""


CHAIN = 4
"""Moves of a chain at most."""
SEARCH_ROUNDS = 64
"""Rounds of a search at most; 44 have been seen."""
NUM_AIMS = 4
"""Aims of the largest rank that are tried in a round."""
NUM_OTHERS = 12
"""Other ranks that pass rows on in the same round, at most."""
FINEST = 9
"""A search ends where no step of 2 to the minus this of its bound is left."""
SHRINK = 2
"""A step that leads nowhere becomes 2 to the minus this of it."""
NO_LIMIT = 2**31 - 1
"""Active slots of a rank that has as many as it likes."""
AUTO_GAP = 3_000
"""Nanoseconds for each rank by which a plan must be above the bound for `auto` to search. On an
H200 a search takes as much time, and a plan cannot gain more than that distance."""
COUNT_BITS = 15
"""Bits to which what ranks count is compared; the largest rank has one less."""

SEARCH_CONSTANTS = (
    ("int", "MAX_COST_STEPS", MAX_STEPS, "of a cost model"),
    ("int", "CHAIN", CHAIN, "moves of a chain, at most"),
    ("int", "SEARCH_ROUNDS", SEARCH_ROUNDS, "rounds of a search, at most"),
    ("int", "NUM_AIMS", NUM_AIMS, "aims of the largest rank in a round"),
    ("int", "NUM_OTHERS", NUM_OTHERS, "other ranks that pass on rows in a round, at most"),
    ("int", "FINEST", FINEST, "2 to the minus this of a bound is its last step"),
    ("int", "SHRINK", SHRINK, "a step without a chain becomes 2 to the minus this of it"),
    ("int", "COUNT_BITS", COUNT_BITS, "to which what ranks count is compared"),
)
"""Type, name, value and meaning, for the kernels."""
