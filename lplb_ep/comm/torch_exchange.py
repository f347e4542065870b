"""The exchange by a collective of `torch.distributed`, and its reaction to missing ranks.

With gloo the CPU waits, and raises. With NCCL the GPU waits, and a thread logs. Which ranks are
missing is looked for only then; while all ranks come soon, an exchange costs its collective.
"""

from __future__ import annotations

import datetime
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ..errors import ContractError, RankError
from ..gpu.device import captures_go_on
from .collectives import gather_rows, memory_of
from .exchange import Limit
from .stalls import Stall, closed_connections, grace_s, patience_s
from .watchdog import report, watch

# Groups on which an exchange of gloo has failed, and how.
_failed: WeakKeyDictionary[dist.ProcessGroup, str] = WeakKeyDictionary()


class TorchExchange:
    """A collective of `torch.distributed`; NCCL's moves device memory only.

    The group is held weakly: one that is still held when the interpreter ends can abort it.

    Args:
        group: the ranks.
        limit: how long ranks wait. With NCCL the GPU goes on waiting, and the missing ranks are
            logged.
        what: the rows, for messages.
    """

    kind = "torch"
    windows = None

    def __init__(self, group: dist.ProcessGroup, limit: Limit, what: str = "counts") -> None:
        self._group, self._limit, self._what = weakref.ref(group), limit, what
        self._device = memory_of(group)
        self.waits_on_host = self._device.type == "cpu"
        self.capturable = not self.waits_on_host
        self._watch = None if self.waits_on_host else _watch_of(group, limit)

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """As `Exchange.gather`, of rows of any shape and dtype.

        Raises:
            ContractError: the group is destroyed.
            RankError: with gloo, a rank did not come in time, now or before; names it.
        """
        group = self._group()
        if group is None:
            raise ContractError("the group that this exchange was made for is destroyed")
        if self._watch is None:
            check_unbroken(group)
            rows = gather_rows(
                row.cpu(), group, lambda w: wait_on_host(group, w, self._limit, self._what)
            )
            return rows.to(row.device)
        rows = gather_rows(row.to(self._device), group)
        if not torch.cuda.is_current_stream_capturing():
            self._watch.record(self._limit.name, self._what)
        return rows.to(row.device)


def most_of(exchange: TorchExchange, value: int) -> int:
    """The largest of the ranks' numbers, each from 0 to 255. Collective, and the CPU waits."""
    return int(exchange.gather(torch.tensor([value], dtype=torch.uint8, device="cpu")).max())


def check_unbroken(group: dist.ProcessGroup) -> None:
    """Raises the RankError again by which a collective of gloo failed: ranks are out of step."""
    if group in _failed:
        raise RankError(_failed[group])


def wait_on_host(
    group: dist.ProcessGroup, work: dist.Work, limit: Limit, what: str = "counts"
) -> None:
    """Waits on the CPU for a collective of gloo.

    Args:
        group: the ranks.
        work: the collective.
        limit: how long.
        what: what the ranks send, for messages.

    Raises:
        RankError: a rank did not come in time; names it. Later collectives of the group raise it,
            too.
    """
    started, stall = time.monotonic(), None
    message, cause = "", None
    try:
        if _ends(work, patience_s(limit.timeout_s)):
            return
        stall = Stall(group, what)
        if not _ends_late(work, stall, limit):
            message = stall.explain(limit.name, limit.timeout_s)
    except RuntimeError as error:
        cause = error
        waited_s = 0.0 if stall is None else time.monotonic() - started
        stall = stall or Stall(group, what)
        message = _explain(group, stall, limit, waited_s, str(error))
    stall.end(gives_up=bool(message))
    if message:
        message += ". The exchange is broken: every later plan on this group raises this"
        _failed[group] = message
        if limit.abort:
            report(message, abort=True)
        raise RankError(message) from cause


def _ends_late(work: dist.Work, stall: Stall, limit: Limit) -> bool:
    if _ends(work, limit.timeout_s - patience_s(limit.timeout_s)):
        return True
    stall.ask()
    until = time.monotonic() + grace_s(limit.timeout_s)
    while time.monotonic() < until and not stall.is_settled(set()):
        if _ends(work, 0.02):
            return True
    return False


def _explain(
    group: dist.ProcessGroup, stall: Stall, limit: Limit, waited_s: float, error: str
) -> str:
    """Says why a collective of gloo has failed; most often since a rank ended."""
    timed_out = "timed out" in error.lower()  # by the group's own limit
    closed: set[int] = set()
    stall.ask()
    until = time.monotonic() + grace_s(limit.timeout_s)
    while time.monotonic() < until and not stall.is_settled(closed):
        time.sleep(0.1)
        closed = set() if timed_out else closed_connections(group)
    if timed_out:
        return stall.explain(limit.name, round(waited_s, 1))
    return stall.explain_failure(limit.name, closed, has_waited=waited_s > 0)


def _ends(work: dist.Work, seconds: float) -> bool:
    """Waits for a collective at most so long.

    Raises:
        RuntimeError: it failed.
    """
    try:
        work.wait(datetime.timedelta(seconds=max(seconds, 0.001)))  # 0 is no limit
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # it may have ended well meanwhile
    return True


class Event(Protocol):
    """A place in the work of a GPU."""

    def record(self) -> None:
        """On the current stream."""

    def query(self) -> bool:
        """Whether the GPU has reached the event."""


class GpuWatch:
    """Watches the collectives of a group of NCCL, for which the CPU does not wait.

    One event is fixed until the GPU has reached it, and the other is behind the last
    collective. Replays of CUDA graphs record none, so they are not watched.

    Args:
        group: the ranks; held weakly.
        timeout_s: how many seconds a collective may take.
        make_event: for a test, makes other events than CUDA's of the current device.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout_s: float,
        make_event: Callable[[], Event] | None = None,
    ) -> None:
        self._group, self._timeout_s = weakref.ref(group), timeout_s
        self._lock = threading.Lock()
        make_event = make_event or _DeviceEvent
        self._last, self._watched = make_event(), make_event()
        self._name, self._what, self._is_new = "", "counts", False
        self._since: float | None = None  # when the watched event was fixed
        self._stall: Stall | None = None
        self._said = False

    def record(self, name: str, what: str = "counts") -> None:
        """Follows a collective, on the current stream.

        Args:
            name: what its rows are for.
            what: what they are.
        """
        with self._lock:
            self._last.record()
            self._name, self._what, self._is_new = name, what, True

    def find(self) -> str:
        """Names the missing ranks, once for each collective. It does not wait."""
        now = time.monotonic()
        if self._since is not None and self._watched.query():
            self._since, self._said = None, False
            if self._stall is not None:
                self._stall.end()
                self._stall = None
        with self._lock:
            if self._since is None and self._is_new:
                self._last, self._watched, self._is_new = self._watched, self._last, False
                self._since = now
        if self._since is None or self._said:
            return ""
        return self._find_missing(now - self._since)

    def _find_missing(self, waited_s: float) -> str:
        group = self._group()
        if group is None or waited_s < patience_s(self._timeout_s):
            return ""
        self._stall = self._stall or Stall(group, self._what)
        if waited_s < self._timeout_s:
            return ""
        self._stall.ask()
        if not self._stall.is_settled(set()) and waited_s < self._timeout_s + grace_s(
            self._timeout_s
        ):
            return ""
        self._said = True
        message = self._stall.explain(self._name, self._timeout_s)
        return f"{message}. The GPU goes on waiting"


class _DeviceEvent:
    """An event of the current device, which another thread may query at any time."""

    def __init__(self) -> None:
        self._event, self._device = torch.cuda.Event(), torch.cuda.current_device()

    def record(self) -> None:
        self._event.record()

    def query(self) -> bool:
        # Without a device set, a thread's first call would take memory of the first GPU.
        try:
            with torch.cuda.device(self._device), captures_go_on():
                return self._event.query()
        except RuntimeError:
            return True  # the GPU has failed, and the program's next call says so


_watches: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[float, bool], GpuWatch]] = (
    WeakKeyDictionary()
)


def _watch_of(group: dist.ProcessGroup, limit: Limit) -> GpuWatch:
    """One for all exchanges of a group: what hangs is logged once."""
    of_group, key = _watches.setdefault(group, {}), (limit.timeout_s, limit.abort)
    if key not in of_group:
        of_group[key] = GpuWatch(group, limit.timeout_s)
        watch(of_group[key], GpuWatch.find, abort=limit.abort)
    return of_group[key]
