"""A file of statistics as JSON lines, for `lplb-ep report` and other readers."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .layers import LayerStats, Window, all_layers, by_name

VERSION = 1
FIELDS = tuple(
    field.name for field in dataclasses.fields(LayerStats) if not field.name.startswith("worst")
)
"""Of `LayerStats`, in a line. The worst batch of such a window is not known."""
MAX_BYTES = 64 << 20
"""Of a file. The one that is full stays beside the next."""


class LineFile:
    """A file that grows by a line for each layer and window of batches.

    A line is a JSON object: fields of `LayerStats`, and those that docs/metrics.md names.
    A full file is renamed, `run.jsonl` to `run.before.jsonl`, and begun anew. So two files have the
    last windows, of at least 64 MiB. Layers of one name are one layer.

    Args:
        path: the file, which is replaced. Its name ends in `.jsonl`. A full one of an earlier run
            is removed.

    Raises:
        ValueError: the name ends in something else.
        OSError: the file is not writable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # wherever the program goes
        if self.path.suffix != ".jsonl":
            raise ValueError(f"path must end in .jsonl; got {os.fspath(path)}")
        now = datetime.datetime.now(datetime.timezone.utc)
        self._run = f"{now:%Y-%m-%dT%H:%M:%SZ} {uuid.uuid4().hex[:8]}"
        self._begin = now.timestamp() - time.monotonic()  # the machine's clock may be set back
        self._window = Window()
        self._before: collections.Counter[str] = collections.Counter()
        self._waiting: dict[str, LayerStats] = {}
        check_writable(self.path)
        self.path.write_text("")
        self._full.unlink(missing_ok=True)  # of an earlier run

    @property
    def _full(self) -> Path:
        return self.path.with_name(f"{self.path.stem}.before.jsonl")

    def write(self) -> None:
        """Adds a line for each layer of this process that had batches since the last call.

        The first call has the batches since the process began. Call it on one rank of each group.

        Raises:
            OSError: the file is not writable.
            RuntimeError: batches come faster than they can be read.
        """
        self.add(self._window.stats(all_layers(), renew_at=1))

    def add(self, several: Iterable[LayerStats]) -> None:
        """Adds a line for each layer of the statistics that have batches.

        What cannot be written is part of the layer's next line.

        Args:
            several: of windows that do not overlap.

        Raises:
            OSError: the file is not writable.
        """
        new = [stats for stats in several if stats.batches]
        self._waiting = by_name([*self._waiting.values(), *new])
        if not self._waiting:
            return
        if self.path.exists() and self.path.stat().st_size > MAX_BYTES:
            os.replace(self.path, self._full)
        _append(self.path, "".join(map(self._line, self._waiting.values())).encode())
        self._before.update({layer: stats.batches for layer, stats in self._waiting.items()})
        self._waiting.clear()

    def _line(self, stats: LayerStats) -> str:
        values = {
            "lplb_ep_metrics": VERSION,
            "run": self._run,
            "time": round(self._begin + time.monotonic(), 3),
            "before": self._before[stats.layer],
            **{name: getattr(stats, name) for name in FIELDS},
        }
        known = {name: None if _is_nan(value) else value for name, value in values.items()}
        return f"{json.dumps(known, separators=(',', ':'), allow_nan=False)}\n"


def check_writable(path: Path) -> None:
    """Looks whether the file can be written, now. One that is there stays as it is.

    Raises:
        OSError: it cannot; says why.
    """
    is_new = not path.exists()
    if not (is_new or path.is_file() or path.is_dir()):  # a pipe would wait for a reader
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(path, "ab"):
        pass
    if is_new:
        Path(os.path.realpath(path)).unlink()


def _append(path: Path, content: bytes) -> None:
    """Adds it to a file, all or nothing: a part of a line would spoil the next."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
