"""The objective of a search: optima of many scenarios as one number, and when one is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .scenarios import LEVELS

Array = npt.NDArray[Any]

SLACK = 0.05
"""Of the mean: an excess far below this is as good as none."""
LEAST_GAIN = 5e-4
"""Of a move, in the score: a smaller gain is due to the choice of scenarios, not to loads."""


@dataclass(frozen=True)
class Objective:
    """The mean logarithm of the excess over the mean rank load, over the strengths of drift.

    Args:
        percentile: of the scenarios' optima, in [0, 100], which then is the only level; None: the
            mean at each strength of drift.
    """

    percentile: float | None

    def score(self, optimum: Array) -> Array:
        """The lower, the better, [..].

        Args:
            optimum: [K, ..], of each scenario.
        """
        score: Array = np.log(SLACK + self._excess(optimum)).mean(axis=0)
        return score

    def worth(self, optimum: Array) -> Array:
        """The derivative of the score by each optimum, times K: [K].

        Args:
            optimum: [K].
        """
        worth = 1 / (SLACK + self._excess(optimum))
        return np.repeat(worth, len(optimum) // len(worth))

    def confirms(self, before: Array, after: Array) -> bool:
        """Whether optima [K] gain, and gain more than a standard error where they are a mean."""
        least = LEAST_GAIN / 2
        if self.percentile is None:
            gain = self.worth(before) * (before - after)
            least = max(least, gain.std() / np.sqrt(gain.size))
        return bool(self.score(before) - self.score(after) >= least)

    def _excess(self, optimum: Array) -> Array:
        """[levels, ..] over the mean of optima [K, ..]; a percentile is one level."""
        if self.percentile is None:
            levels = optimum.reshape(LEVELS, -1, *optimum.shape[1:]).mean(axis=1)
        else:
            # Of loads that agree on the percentile, the lower mean.
            levels = np.percentile(optimum, self.percentile, axis=0)[None]
            levels = levels + 0.01 * (optimum.mean(axis=0) - 1)
        return np.maximum(levels - 1, 0)
