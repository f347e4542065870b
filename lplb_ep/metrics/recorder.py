"""A recording of the loads of a running program, for `lplb-ep replay` and `place`."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..layer import Layer
from ..logs import logger
from .layers import Ended
from .recording_file import write_recording

log = logger(__name__)

MAX_BYTES = 64 << 20
"""Of the loads that a recorder holds, and so of its file, but for compression."""
_FIRST_S, _INTERVAL_S = 10, 60
_SHARE_OF_TIME = 0.02
"""Of the time of one core, that writing may take."""

_Batch = tuple[int, int, int]
"""`Planner.generation`, how many batches came before, the slot: the same for all layers of a model.
"""


class Recorder:
    """Takes the samples of planners, and writes them to a file again and again.

    When they take too much memory, every second batch is dropped, and so on. So the file has a
    bounded size, and covers the whole run.

    Args:
        path: the file, which is replaced.
        every: batches from one sample to the next.
        max_bytes: of the loads that it holds.
    """

    def __init__(self, path: Path, every: int, max_bytes: int = MAX_BYTES) -> None:
        self.path, self._every, self._max_bytes = path, every, max_bytes
        self._stride, self._num_new = 1, 0
        self._loads: dict[str, dict[_Batch, npt.NDArray[np.int32]]] = {}
        self._next_write, self._said = time.monotonic() + _FIRST_S, ""

    def is_writable(self) -> bool:
        """Whether the file can be written, now; if not, that is logged."""
        try:
            check_writable(self.path)
        except OSError as error:
            self._say(error)
            return False
        return True

    def take(
        self, layers: Iterable[Layer], ended: Iterable[Ended] = (), *, all_done: bool = False
    ) -> None:
        """Takes the samples that there are.

        Args:
            layers: whose planners are asked.
            ended: further ones, which are no more.
            all_done: as `Statistics.take_samples` has it.
        """
        asked = [(layer, planner) for layer in layers for planner in [*layer.planners]]
        for layer, planner in [*asked, *((one.layer, one) for one in ended)]:
            for before, load in planner.statistics.take_samples(all_done=all_done).items():
                if before // self._every % self._stride == 0:
                    batch = planner.generation, before, planner.slot
                    self._loads.setdefault(layer.label, {})[batch] = load
                    self._num_new += 1
        while self._num_bytes > self._max_bytes and self._thin_out():
            pass

    def write(self, *, now: bool = False) -> None:
        """Writes the file if there are new samples and enough time has passed.

        Args:
            now: whether to write whatever the time.
        """
        start = time.monotonic()
        if not self._num_new or not (now or start >= self._next_write):
            return
        try:
            self._write()
        except OSError as error:
            self._say(error)
        taken = time.monotonic() - start
        self._next_write = start + max(_INTERVAL_S, taken / _SHARE_OF_TIME)

    @property
    def _num_bytes(self) -> int:
        return sum(load.nbytes for loads in self._loads.values() for load in loads.values())

    def _thin_out(self) -> bool:
        """Whether there was something to drop."""
        self._stride *= 2
        before = self._num_bytes
        for loads in self._loads.values():
            for batch in [b for b in loads if b[1] // self._every % self._stride]:
                del loads[batch]
        return self._num_bytes < before

    def _write(self) -> None:
        names, counts, batches = self._table()
        part, number = _part(self.path), self._every * self._stride
        try:
            with open(part, "wb") as file:
                write_recording(
                    file,
                    counts,
                    _numbers(names),
                    f"a run, every {number} batches" if number > 1 else "a run, every batch",
                    names=np.array(names),
                    batches=np.array(batches),
                )
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
        self._num_new = 0

    def _table(self) -> tuple[list[str], npt.NDArray[np.int32], list[int]]:
        """The layers' names, their loads [N, L, E], and how many batches came before each.

        A layer without a sample of a batch has zeros there, which readers take for idle.
        """
        sizes = [next(iter(loads.values())).size for loads in self._loads.values()]
        num_experts = max(sizes, key=sizes.count)
        chosen = {
            name: loads
            for (name, loads), size in zip(self._loads.items(), sizes, strict=True)
            if size == num_experts
        }
        if len(chosen) < len(sizes):
            left = sorted(self._loads.keys() - chosen.keys())
            self._say(f"{', '.join(left)} have other numbers of experts and are left out")
        batches = sorted({batch for loads in chosen.values() for batch in loads})
        counts = np.zeros((len(batches), len(chosen), num_experts), np.int32)
        for layer, loads in enumerate(chosen.values()):
            for row, batch in enumerate(batches):
                if batch in loads:
                    counts[row, layer] = loads[batch]
        return [*chosen], counts, [before for _, before, _ in batches]

    def _say(self, what: Any) -> None:
        """Logs an obstacle, once."""
        if isinstance(what, OSError):
            what = f"{self.path} cannot be written: {what.strerror}"
        if what != self._said:
            self._said = what
            log.error("LPLB_EP_RECORD: %s", what)


def check_writable(path: Path) -> None:
    """Looks whether a recording can be written, now.

    Raises:
        OSError: it cannot; says why.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    part = _part(path)
    try:
        part.write_bytes(b"")
    finally:
        part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def _numbers(names: Sequence[str]) -> list[int]:
    """The layers' numbers in the model, where their names have numbers that tell them apart."""
    found = [[int(number) for number in re.findall(r"\d+", name)] for name in names]
    for numbers in zip(*found, strict=False):
        if len(set(numbers)) == len(names):
            return list(numbers)
    return list(range(len(names)))
