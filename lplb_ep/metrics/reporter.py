"""A thread beside the program: its layers' statistics in the log and a file, and their loads.

It reads what planners keep on their devices, so replays of CUDA graphs are seen, too. The program
waits for nothing of it.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Sequence
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any
from weakref import finalize

import torch

from ..layer import Layer
from ..logs import logger
from ..settings import Settings
from .layers import Ended, LayerStats, Window, all_layers
from .line_file import LineFile
from .rank_files import path_of_rank, remove_stale
from .recorder import Recorder

log = logger(__name__)

INTERVAL_S = 1.0


class Reporter:
    """Reports on the layers of which this process has the first rank of a group.

    Args:
        log_every: batches of a layer from one line to the next; 0: there are none.
        recorder: takes samples of loads; None: none are taken.
        lines: has the lines of the log as numbers; None: they are not written.
    """

    def __init__(
        self, log_every: int, recorder: Recorder | None, lines: LineFile | None = None
    ) -> None:
        self._log_every, self._recorder, self._lines = log_every, recorder, lines
        self._said = ""
        self._log = log.with_rank_of_now()
        self._window, self._lock = Window(), threading.Lock()
        self._ended: collections.deque[Ended] = collections.deque()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lplb_ep reporter", daemon=True)

    @property
    def has_work(self) -> bool:
        """Whether there is anything to report."""
        return self._recorder is not None or self._lines is not None or self._logs

    @property
    def _logs(self) -> bool:
        return self._log_every > 0 and is_logged()

    def start(self) -> None:
        """Reports from now on, until the process ends."""
        self._thread.start()
        # Processes of multiprocessing end without what `atexit` has.
        Finalize(None, self.stop, exitpriority=0)

    def stop(self) -> None:
        """Reports what there is, for the last time."""
        self._ends.set()
        self._thread.join(10 * INTERVAL_S)
        self._try(last=True)

    def follow(self, planner: Any) -> None:
        """Reports on the last batches of a planner, too, which ends with its group.

        Programs leave their group before they end, so no later look would find it.
        """
        left = Ended(
            planner.layer, planner.rank, planner.slot, planner.generation, planner.statistics
        )
        # It may come while another thread looks, or this one: nothing is read there.
        finalize(planner, self._ended.append, left).atexit = False

    def look(self, *, last: bool = False) -> None:
        """Reports news. Planners that another thread makes meanwhile may wait for the next.

        Args:
            last: whether this is the end.
        """
        with self._lock:
            layers = [layer for layer in all_layers() if _is_first(layer)]
            ended = [self._ended.popleft() for _ in range(len(self._ended))]
            if self._logs or self._lines is not None:
                found = self._window.stats(layers, renew_at=1, marked=not last)
                by_layer: dict[Layer, list[Ended]] = {}
                for one in ended:
                    by_layer.setdefault(one.layer, []).append(one)
                found += self._window.stats_of_planners([*by_layer.items()], renew_at=1)
                self._tell([stats for stats in found if stats.batches])
            if self._recorder is not None:
                self._recorder.take(layers, ended, all_done=last and _is_idle())
                self._recorder.write(now=last)

    def _tell(self, found: Sequence[LayerStats]) -> None:
        if self._logs:
            for stats in found:
                self._log.info("%s", stats)
        if self._lines is not None:
            try:
                self._lines.add(found)
            except OSError as error:
                if self._said != str(error):  # once
                    self._said = str(error)
                    _say_unwritable(self._lines.path, error)

    def _run(self) -> None:
        while not self._ends.wait(INTERVAL_S):
            self._try()

    def _try(self, *, last: bool = False) -> None:
        try:
            self.look(last=last)
        except RuntimeError as error:  # a set that changed, batches that come too fast, a lost GPU
            self._log.debug("no report now: %s", error)


def is_logged() -> bool:
    """Whether lines about layers are shown, as logging is set up now."""
    return log.isEnabledFor(logging.INFO)


def _is_first(layer: Layer) -> bool:
    return any(planner.rank == 0 for planner in layer.planners)


def _is_idle() -> bool:
    return not torch.cuda.is_initialized() or torch.cuda.current_stream().query()


_reporters: list[Reporter] = []
_cleared: set[Path] = set()
_lock = threading.Lock()


def report(settings: Settings, planner: Any) -> None:
    """Has one thread of this process report on a planner and on all others.

    The first rank of a group reports. Others only remove files that an earlier job left.

    Args:
        settings: the first ones that ask for a report say which.
        planner: the planner.
    """
    with _lock:
        is_first = planner.rank == 0
        for path in {*map(Path, filter(None, (settings.record, settings.metrics)))} - _cleared:
            remove_stale(path, writes=is_first or bool(_reporters))
            _cleared.add(path)
        if not is_first:
            return
        if not _reporters:
            _start(settings)
        for reporter in _reporters:
            reporter.follow(planner)


def _start(settings: Settings) -> None:
    recorder = None
    if settings.record:
        recorder = Recorder(path_of_rank(Path(settings.record)), settings.record_every)
        if not recorder.is_writable():
            recorder = None
    lines = None
    if settings.metrics:
        path = path_of_rank(Path(settings.metrics))
        try:
            lines = LineFile(path)
        except OSError as error:
            _say_unwritable(path, error)
    reporter = Reporter(settings.log_every, recorder, lines)
    if reporter.has_work:
        _reporters.append(reporter)
        reporter.start()


def _say_unwritable(path: Path, error: OSError) -> None:
    log.error("LPLB_EP_METRICS: %s cannot be written: %s", path, error.strerror)
