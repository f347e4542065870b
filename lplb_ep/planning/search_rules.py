"""The rules of the search for a plan by active slots or cost, here and in `kernels/search.cuh`."""

from __future__ import annotations

import enum

from ..cost import MAX_STEPS


class Aim(enum.IntEnum):
    """What the largest rank is to have the least of, beside tokens."""

    EXPERTS = 0
    """Active slots, and then tokens."""
    COST = 1
    """Nanoseconds."""
    AUTO = 2
    """Of these plans, that for tokens and all tokens at home, the one that costs least."""


CHAIN = 4
"""Moves of a chain at most."""
MAX_SEARCHES = 64
"""Steps of a search at most; some forty have been seen."""
FINEST = 9
"""A search ends where no step of 2 to the minus this of its bound is left."""
SHRINK = 2
"""A step that leads nowhere becomes 2 to the minus this of it."""
NO_LIMIT = 2**31 - 1
"""Active slots of a rank that has as many as it likes."""
LARGEST_COUNT = 2**46 - 1
"""What ranks count is compared up to this: in nanoseconds nineteen hours."""

SEARCH_CONSTANTS = (
    ("int", "MAX_COST_STEPS", MAX_STEPS, "of a cost model"),
    ("int", "CHAIN", CHAIN, "moves of a chain, at most"),
    ("int", "MAX_SEARCHES", MAX_SEARCHES, "steps of a search, at most"),
    ("int", "FINEST", FINEST, "2 to the minus this of a bound is its last step"),
    ("int", "SHRINK", SHRINK, "a step without a chain becomes 2 to the minus this of it"),
    ("int", "NO_LIMIT", NO_LIMIT, "of active slots"),
    ("long long", "LARGEST_COUNT", LARGEST_COUNT, "of a rank, as compared"),
)
"""Type, name, value and meaning, for the kernels."""
