"""The rules by which fills choose guests, on the CPU and in `kernels/choose.cuh`."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """How a fill chooses."""

    by_excess: bool
    """The source is the rank with the largest excess. Else ranks come in random order. Then the
    excess of ranks that share experts gathers on the last of them, and one guest serves all."""
    widest: bool
    """A guest goes to the rank with most slack. Else to the one whose slack just suffices."""
    largest: bool
    """The guest is the expert with most tokens. Else the one whose tokens just suffice."""
    shift: int
    """A rank's last guest slot may take more than the source's excess. It does where more slack
    would be left than there is to spare, over 2 to this."""
    noise: int
    """Slacks are compared up to random parts of this in 1024; 0 or a power of two."""


RULES = (
    Rule(True, False, True, 31, 64),
    Rule(False, False, False, 31, 0),
    Rule(False, False, True, 31, 64),
    Rule(False, False, False, 31, 256),
    Rule(False, False, False, 1, 256),
    Rule(True, False, False, 31, 512),
    Rule(False, True, False, 0, 0),
    Rule(False, True, False, 31, 512),
    Rule(False, False, False, 0, 512),
    Rule(False, False, False, 1, 0),
    Rule(False, False, True, 31, 0),
    Rule(False, False, False, 31, 512),
    Rule(False, False, True, 31, 256),
    Rule(False, False, False, 1, 256),
    Rule(True, False, False, 2, 0),
    Rule(False, False, False, 2, 128),
)
"""Of the fills of a round."""
NUM_ROUNDS = 3
"""The first aims at the tolerance; the others, where none reaches that, between it and the best."""
NUM_TARGETS = 8
"""Different limits of the fills in a later round."""
CLOSE = 9
"""Largest loads within a part of 2 to the minus this count as equal; then fewer copies win."""


class ChoiceRule(NamedTuple):
    """How a choice of guests for a plan by cost differs from the one for a plan by tokens."""

    tolerance: int
    """In `GUEST_PARTS` of the mean, unless the problem's is larger."""
    is_worth: bool
    """Whether a guest has at least as many rows as cost as much as its push."""


CHOICE_RULES = (
    ChoiceRule(0, True),
    ChoiceRule(500, True),
    ChoiceRule(1000, True),
    ChoiceRule(0, False),
    ChoiceRule(1000, False),
    ChoiceRule(2000, False),
    ChoiceRule(5000, False),
)
"""Of the choices behind the first one, which has no guests."""
NUM_CHOICES = 1 + len(CHOICE_RULES)
