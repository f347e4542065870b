"""A thread that names missing ranks at once, also while the program is blocked.

DeepEP may wait for the same rank, and never let the program reach the call that would raise.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from ..logs import logger

log = logger(__name__)

INTERVAL_S = 0.25

_T = TypeVar("_T")
_lock = threading.Lock()
_watched: WeakKeyDictionary[Any, tuple[Callable[[Any], str], bool]] = WeakKeyDictionary()
_threads: list[threading.Thread] = []


def watch(owner: _T, find: Callable[[_T], str], *, abort: bool) -> None:
    """Looks again and again, as long as an object lives, whether there is something to log.

    Args:
        owner: the object, held weakly: `find` must not hold it either.
        find: takes the owner and returns what to log now, most often nothing. It must not wait.
        abort: end the process when something was logged.
    """
    with _lock:
        _watched[owner] = find, abort
        if not _threads:
            _threads.append(threading.Thread(target=_run, name="lplb_ep watchdog", daemon=True))
            _threads[0].start()


def newly_missing(
    missing: npt.NDArray[np.int32], say: Callable[[], str]
) -> Callable[[object], str]:
    """Makes what finds missing ranks in memory that a GPU writes to, for `watch`.

    Args:
        missing: [R] 1 where a rank did not come. Each is found once until it is 0 again.
        say: what to log then.
    """
    said = np.zeros_like(missing)

    def find(_: object) -> str:
        late = missing == 1
        new = late & (said == 0)
        said[:] = late
        return say() if new.any() else ""

    return find


def missing_ranks(missing: npt.NDArray[np.int32], name: str, timeout_s: float) -> str:
    """Says which ranks' counts did not come into windows.

    Args:
        missing: [R] not 0 where a rank's did not.
        name: what was planned.
        timeout_s: how many seconds this rank waited.
    """
    ranks = np.flatnonzero(missing).tolist()
    return f"{late(ranks, name, timeout_s)}. That batch went to the home slots"


def late(ranks: list[int], name: str, timeout_s: float, what: str = "counts") -> str:
    """Says which ranks' counts did not come.

    Args:
        ranks: these ranks.
        name: what the counts are for.
        timeout_s: how many seconds this rank waited.
        what: what they should have sent, if not counts.
    """
    return f"ranks {ranks} sent no {what} within {timeout_s:g} s ({name}): ended, hung or slow"


def look(owner: object) -> None:
    """Looks now, for an owner that is about to clear what would be found."""
    with _lock:
        _look(owner)


def scan() -> None:
    """Looks at all that is watched, once."""
    with _lock:
        for owner in list(_watched):
            _look(owner)


def report(message: str, *, abort: bool) -> None:
    """Logs that ranks are missing.

    Args:
        message: what to log.
        abort: end the process then.
    """
    log.error("%s", message)
    if abort:
        log.error("LPLB_EP_ON_TIMEOUT=abort: this process ends")
        logging.shutdown()
        os.abort()


def _look(owner: object) -> None:
    find, abort = _watched[owner]
    if message := find(owner):
        report(message, abort=abort)


def _run() -> None:
    while True:
        time.sleep(INTERVAL_S)
        scan()
