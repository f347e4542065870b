"""One page that shows the statistics of a run: what its batches came to, window by window."""

from __future__ import annotations

import bisect
import collections
import datetime
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .metric_lines import Line, Metrics
from .report import filled

# Points in time that a page shows at most, and numbers of each kind: some megabytes in all.
_MOST_WINDOWS = 400
_MOST_NUMBERS = 60_000

_Array = npt.NDArray[np.float64]
_SUMS = {
    "home": "largest_home_load",
    "lp": "largest_load",
    "mean": "mean_load",
    "bound": "bound_load",
    "bound_mean": "bound_mean_load",
    "rows": "rows",
    "batches": "batches",
    "sent_home": "sent_home",
    "guests": "guests",
    "guest_bytes": "guest_bytes",
}
"""The page's names of sums, and those of `LayerStats`."""
_OVER = {"home": "mean", "lp": "mean", "bound": "bound_mean"}


def page_of_metrics(metrics: Metrics, notes: Sequence[str] = ()) -> str:
    """A page of HTML that needs nothing beside it.

    A point in time is a window of the file, or several. Its numbers are then of all their batches.

    Args:
        metrics: the windows.
        notes: what stands at the foot.
    """
    layers = names_of(metrics)
    place = {name: number for number, name in enumerate(layers)}
    starts, column = _points(metrics, len(layers))
    shape = len(starts), len(layers)
    sums = {name: np.zeros(shape) for name in (*_SUMS, "counted")}
    statuses = sorted({name for line in metrics.lines for name in line.stats.by_status})
    ended = {name: np.zeros(shape) for name in statuses}
    times = np.zeros(len(starts))
    for line in metrics.lines:
        at = column(line), place[line.stats.layer]
        for name, field in _SUMS.items():
            sums[name][at] += getattr(line.stats, field)
        sums["counted"][at] += line.num_counted
        for name, number in line.stats.by_status.items():
            ended[name][at] += number
        times[at[0]] = max(times[at[0]], line.time)
    # A point's time is when all layers had come so far; one that lags writes its batches later.
    times = np.maximum.accumulate(times)
    is_empty = sums["batches"] == 0
    data = {
        "kind": "metrics",
        "title": metrics.source,
        "about": about_metrics(metrics),
        "notes": list(notes),
        "layers": layers,
        "num_ranks": _num_ranks(metrics),
        "num_batches": max(line.before + line.stats.batches for line in metrics.lines),
        "starts": starts,
        "times": [time or None for time in times.tolist()],
        "sums": {
            name: _listed(np.where(is_empty, np.nan, values)) for name, values in sums.items()
        },
        "ended": {name: _listed(values) for name, values in ended.items()},
    }
    return filled(data)


def names_of(metrics: Metrics) -> list[str]:
    """The layers' names, in the order in which they first come."""
    return [*dict.fromkeys(line.stats.layer for line in metrics.lines)]


def about_metrics(metrics: Metrics) -> str:
    """What they are of, in words."""
    lines = metrics.lines
    first, last = (
        datetime.datetime.fromtimestamp(time, datetime.timezone.utc)
        for time in (lines[0].time, lines[-1].time)
    )
    batches = sum(line.stats.batches for line in lines)
    return (
        f"{_number(len(names_of(metrics)), 'layer')}, {_num_ranks(metrics)} ranks, "
        f"{_number(batches, 'batch', 'batches')} in {_number(len(lines), 'window')}, written from "
        f"{first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S} UTC"
    )


def _number(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def imbalance_by_layer(metrics: Metrics) -> dict[str, _Array]:
    """`home`, `lp` and `bound` of each layer [L], over all of its batches; NaN: unknown."""
    place = {name: number for number, name in enumerate(names_of(metrics))}
    found: dict[str, _Array] = {}
    for name, below in _OVER.items():
        pairs = np.zeros((2, len(place)))
        for line in metrics.lines:
            values = [getattr(line.stats, _SUMS[part]) for part in (name, below)]
            pairs[:, place[line.stats.layer]] += values
        found[name] = np.full(len(place), np.nan)
        np.divide(pairs[0], pairs[1], out=found[name], where=pairs[1] > 0)
    return found


def _points(metrics: Metrics, num_layers: int) -> tuple[list[int], Callable[[Line], int]]:
    """The first batches of the points in time; and which of them has a line.

    A point is a window, or several. Layers that are some batches apart share their points.
    """
    sizes = collections.Counter(line.stats.batches for line in metrics.lines)
    usual = max(sorted(sizes), key=lambda size: sizes[size])
    starts: list[int] = []
    for before in sorted({line.before for line in metrics.lines}):
        if not starts or before - starts[-1] >= usual / 2:
            starts.append(before)
    most = min(_MOST_WINDOWS, max(1, _MOST_NUMBERS // num_layers))
    starts = starts[:: -(-len(starts) // most)]

    def column(line: Line) -> int:
        return bisect.bisect(starts, line.before) - 1

    return starts, column


def _num_ranks(metrics: Metrics) -> str:
    return ", ".join(map(str, sorted({line.stats.num_ranks for line in metrics.lines})))


def _listed(values: _Array) -> list[float | None]:
    """In order, whole numbers as such; NaN is None."""
    return [
        None if np.isnan(value) else int(value) if value == int(value) else round(value, 3)
        for value in values.ravel().tolist()
    ]
