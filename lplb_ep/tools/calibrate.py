"""A cost model of this GPU, fitted to times of slots with various rows and active slots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from ..cost import CostModel

TILES = (64, 128, 256)
"""Rows of a step that are tried; the one that fits best counts."""
NUM_MIXED = 200
"""Batches of mixed rows that a model is fitted to, and as many others that it is judged on."""

Timer = Callable[[Sequence[int]], float]
"""Rows of each slot → nanoseconds of the rank."""
Rows = npt.NDArray[np.int64]


class Calibration(NamedTuple):
    """A fitted model, and how far it is off."""

    model: CostModel
    error: float
    """Of its times, the median over batches of mixed rows that it was not fitted to."""
    worst: float
    """Of one of them."""
    num_timed: int
    """Batches that were timed."""


def calibrate(
    time: Timer,
    num_slots: int,
    max_rows: int,
    name: str,
    about: str = "",
    tiles: Sequence[int] = TILES,
) -> Calibration:
    """Times batches and fits a model: least squares of relative errors, costs that never fall.

    Args:
        time: takes the rows of each slot.
        num_slots: of the rank, at least 2: the times of one slot do not tell its own constant from
            the rank's.
        max_rows: the most of a slot, in the mean of the largest batches.
        name, about: of the model.
        tiles: rows of a step, of which the best is taken.

    Raises:
        ValueError: an argument is out of range.
    """
    check_sizes(num_slots, max_rows, tiles)
    rng = np.random.default_rng(2026)
    batches = _designed(num_slots, max_rows) + _mixed(rng, num_slots, max_rows)
    timed = np.array([time(rows.tolist()) for rows in batches])
    others = _mixed(rng, num_slots, max_rows)
    truth = np.array([time(rows.tolist()) for rows in others])
    fits = []
    for tile in tiles:
        model = _fit(batches, timed, tile, max_rows, name, about)
        fits.append((statistics.median(_errors(model, batches, timed)), model))
    _, best = min(fits, key=lambda fit: fit[0])
    errors = _errors(best, others, truth)
    return Calibration(best, statistics.median(errors), max(errors), len(timed) + len(truth))


def check_sizes(num_slots: int, max_rows: int, tiles: Sequence[int] = TILES) -> None:
    """Checks whether a model can be fitted to batches of such sizes, as `calibrate` has them.

    Raises:
        ValueError: there are too few slots or rows; names both.
    """
    if num_slots < 2 or max_rows < max(tiles):
        raise ValueError(
            f"calibration needs num_slots of at least 2 and max_rows of {max(tiles)}; "
            f"got {num_slots} and {max_rows}"
        )


def _designed(num_slots: int, max_rows: int) -> list[Rows]:
    """Few active slots, and equal rows of all: the first and the last of each 64."""
    few = sorted({max(1, num_slots * part // 8) for part in range(1, 9)})
    active = [np.where(np.arange(num_slots) < n, rows, 0) for n in few for rows in (4, 128)]
    ends = [rows for rows in range(64, max_rows + 1, 64) if rows <= 1024 or rows % 512 == 0]
    return active + [np.full(num_slots, rows + more) for rows in ends for more in (0, 1)]


def _mixed(rng: np.random.Generator, num_slots: int, max_rows: int) -> list[Rows]:
    """Rows as skewed as recorded ones, from almost none to `max_rows` in the mean."""
    means = np.exp(rng.uniform(np.log(2), np.log(max_rows), NUM_MIXED))
    weights = rng.lognormal(0, 0.8, (NUM_MIXED, num_slots))
    weights *= rng.random((NUM_MIXED, num_slots)) < rng.uniform(0.3, 1.3, (NUM_MIXED, 1))
    weights[:, 0] += 1e-3  # or a batch might have no rows
    weights *= (means / np.maximum(weights.mean(1), 1e-9))[:, None]
    return list(np.ceil(np.minimum(weights, 4 * max_rows)).astype(np.int64))


def _fit(
    batches: list[Rows],
    timed: npt.NDArray[np.float64],
    tile: int,
    max_rows: int,
    name: str,
    about: str,
) -> CostModel:
    """Nanoseconds of a rank, of each further tile of a slot, and of those beyond the table."""
    num_steps = max(1, min(2048, max_rows) // tile)
    columns = np.zeros((len(batches), 2 + num_steps))
    for row, batch in zip(columns, batches, strict=True):
        of_slots = -(-batch // tile)
        row[0] = 1
        row[1 : 1 + num_steps] = (of_slots[:, None] >= np.arange(1, num_steps + 1)).sum(0)
        row[-1] = np.maximum(of_slots - num_steps, 0).sum()
    found = nnls(columns / timed[:, None], np.ones(len(timed)))[0]
    steps = np.rint(np.cumsum(found[1:-1])).astype(int).tolist()
    return CostModel(name, tile, tuple(steps), round(found[-1]), round(found[0]), about)


def _errors(model: CostModel, batches: list[Rows], timed: npt.NDArray[np.float64]) -> list[float]:
    said = [model.fixed + int(model.of_slots(rows).sum()) for rows in batches]
    return [abs(one / time - 1) for one, time in zip(said, timed.tolist(), strict=True)]
