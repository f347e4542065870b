"""Statistics of a run that `lplb_ep.metrics.LineFile` wrote: windows of each layer's batches."""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..metrics.layers import LayerStats
from ..metrics.line_file import FIELDS, VERSION
from ..plain_files import read_json_lines
from ..planning.structs import Status

_MOST = 2.0**53
"""Numbers are below it, or a page would round them."""
_LAST_TIME = 1e11
"""A time that pages can show, in seconds."""
_HALF = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can name, and no file can hold."""
_AROUND = ("lplb_ep_metrics", "run", "time", "before")
_TYPES = {field.name: str(field.type) for field in fields(LayerStats)}
_MAY_BE_MISSING = ("home_imbalance", "imbalance", "bound")
_WORST: dict[str, Any] = dict.fromkeys(_TYPES.keys() - {*FIELDS}, math.nan)


@dataclass(frozen=True)
class Line:
    """A window of one layer's batches."""

    time: float
    """When it was written, in seconds since 1970."""
    before: int
    """How many batches of the layer the run wrote before."""
    stats: LayerStats
    """Of these batches."""

    @property
    def num_counted(self) -> int:
        """Batches whose counts are known: rows and loads are of these."""
        known = [status.name for status in Status if status < Status.BAD_COUNTS]
        return sum(self.stats.by_status.get(name, 0) for name in known)


@dataclass(frozen=True)
class Metrics:
    """The windows of a run."""

    source: str
    """The file's name."""
    lines: tuple[Line, ...]
    """In the order in which they were written. Those of a layer follow one another."""
    is_cut: bool
    """Whether a last line was left out, of which only a part is there."""

    def rows(self) -> Iterator[Sequence[Any]]:
        """A table of the windows, its head first. Unknown values are empty."""
        names = [name for name in FIELDS if name not in ("layer", "by_status")]
        ends = [status.name for status in Status]
        yield ["layer", "batch", "time", *names, *ends]
        for line in self.lines:
            values = [getattr(line.stats, name) for name in names]
            known = ["" if value != value else value for value in values]  # NaN is none of itself
            numbers = [line.stats.by_status.get(name, 0) for name in ends]
            yield [line.stats.layer, line.before, line.time, *known, *numbers]


def read_metrics(path: str | os.PathLike[str]) -> Metrics:
    """Reads a file of `LineFile`, or of `LPLB_EP_METRICS`. It may still grow.

    Raises:
        ValueError: the file holds something else, lines of several runs, or lines that do not
            follow one another. The message names the file and the line.
        OSError: the file cannot be read.
    """
    file = Path(path)
    if file.is_file() and not file.stat().st_size:
        raise ValueError(f"{file} is empty: the run has no window of batches yet")
    values, is_cut = read_json_lines(file)
    lines: list[Line] = []
    ends: dict[str, int] = {}
    for number, value in enumerate(values, 1):
        try:
            line = _line(value)
            if value["run"] != values[0]["run"]:
                raise ValueError(
                    f"is of the run {value['run']!r}, and the first of {values[0]['run']!r}: a "
                    "file has one run"
                )
            layer = line.stats.layer
            if line.before != ends.get(layer, line.before):
                raise ValueError(
                    f"{layer!r} goes on at batch {line.before} and not at {ends[layer]}: lines are "
                    "missing, or come twice"
                )
        except ValueError as error:
            raise ValueError(f"{file}: line {number} {error}") from None
        ends[layer] = line.before + line.stats.batches
        lines.append(line)
    if not lines:
        raise ValueError(f"{file}: it has no whole line")
    return Metrics(file.name, tuple(lines), is_cut)


def _line(value: Any) -> Line:
    """A line of a file, checked."""
    if not isinstance(value, dict) or "lplb_ep_metrics" not in value:
        raise ValueError("is none of lplb_ep's metrics")
    if value["lplb_ep_metrics"] != VERSION:
        raise ValueError(
            f"is of version {reprlib.repr(value['lplb_ep_metrics'])}; only {VERSION} can be read"
        )
    known = {*_AROUND, *FIELDS}
    odd = sorted(known ^ value.keys())
    if odd:
        raise ValueError(f"{'lacks' if odd[0] in known else 'has an unknown'} {odd[0]!r}")
    if not isinstance(value["run"], str):
        raise ValueError(f"has a run that is no text: {reprlib.repr(value['run'])}")
    made = {name: _checked(name, _TYPES[name], value[name]) for name in FIELDS}
    stats = LayerStats(**made, **_WORST)
    if stats.batches != sum(stats.by_status.values()) or not stats.batches:
        raise ValueError(f"has {stats.batches} batches, and ends of {stats.by_status}")
    time = _checked("time", "float", value["time"])
    if time > _LAST_TIME:
        raise ValueError(f"has an impossible time: {time}")
    return Line(time, _checked("before", "int", value["before"]), stats)


def _checked(name: str, kind: str, value: Any) -> Any:
    """A value of a field's type."""
    if kind == "str" and isinstance(value, str) and not _HALF.search(value):
        return value
    if kind == "int" and type(value) is int and 0 <= value < _MOST:
        return value
    if kind == "float" and type(value) in (int, float) and 0 <= value < _MOST:
        return float(value)
    if kind == "float" and value is None and name in _MAY_BE_MISSING:
        return math.nan
    if kind == "dict[str, int]" and isinstance(value, dict):
        for status, number in value.items():
            if status not in Status.__members__:
                raise ValueError(f"has an unknown status: {status!r}")
            _checked(f"{name} {status}", "int", number)
        return value
    raise ValueError(f"has a wrong {name}: {reprlib.repr(value)}")
