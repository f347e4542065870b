"""Says at once that a rank does not come: the program itself may be stuck in DeepEP, which waits
for the same rank, and never reach the call that would raise."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

INTERVAL_S = 0.25

_lock = threading.Lock()
_watched: WeakKeyDictionary[object, Callable[[], None]] = WeakKeyDictionary()
_threads: list[threading.Thread] = []


def missing_ranks(missing: npt.NDArray[np.int32], placement: str, timeout_s: float) -> str:
    """What to say of the ranks that are missing."""
    return (
        f"ranks {np.flatnonzero(missing).tolist()} sent no counts within {timeout_s:g} s "
        f"(placement {placement}): ended, hung or slow. That batch went to the home slots"
    )


def watch(
    owner: object, missing: npt.NDArray[np.int32], say: Callable[[], str], *, abort: bool
) -> None:
    """Watches, as long as `owner` lives, memory that the GPU writes to.

    Args:
        owner: whose memory it is.
        missing: [R] not 0 where a rank did not come; each is said once until it is 0 again.
        say: what to log then.
        abort: end the process then.
    """

    said = np.zeros_like(missing)

    def look() -> None:
        new = (missing != 0) & (said == 0)
        said[:] = missing
        if not new.any():
            return
        log.error("%s", say())
        if abort:
            log.error("LPLB_EP_ON_TIMEOUT=abort: this process ends")
            logging.shutdown()
            os.abort()

    with _lock:
        _watched[owner] = look
        if not _threads:
            _threads.append(threading.Thread(target=_run, name="lplb_ep watchdog", daemon=True))
            _threads[0].start()


def look(owner: object) -> None:
    """Looks now at the memory of `owner`, which is about to clear it."""
    with _lock:
        _watched[owner]()


def _run() -> None:
    while True:
        time.sleep(INTERVAL_S)
        with _lock:
            for of_owner in list(_watched.values()):
                of_owner()
