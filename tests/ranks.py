"""Runs a function on several gloo ranks, each a process of its own.

The processes are forked from a server that has torch imported, and stay for the whole test session.
So a test on eight ranks costs milliseconds and not eight imports of torch.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

AFTER_FAILURE_S = 60
"""How long the other ranks get when one has failed, for which they may wait in vain."""

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "scipy.sparse.csgraph"])


def _serve(rank: int, num_ranks: int, store: str, pipe: Any) -> None:
    import datetime
    import faulthandler
    import warnings

    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    stacks = open(f"{store}.stack{rank}", "w")  # noqa: SIM115  (as long as the process)
    faulthandler.register(signal.SIGUSR1, stacks)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=180),
    )
    while (task := pipe.recv()) is not None:
        function, args, kwargs, environ = task
        saved = dict(os.environ)
        os.environ.update(environ)
        try:
            pipe.send((True, function(dist.group.WORLD, *args, **kwargs)))
        except BaseException as error:  # noqa: BLE001  (shown in the parent)
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
        finally:
            os.environ.clear()
            os.environ.update(saved)
    dist.destroy_process_group()


class _Pool:
    def __init__(self, num_ranks: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="lplb_ep_test_")
        self.pipes, self.processes = [], []
        for rank in range(num_ranks):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve,
                args=(rank, num_ranks, f"{self.folder.name}/store", theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def stack(self, rank: int) -> str:
        """Where a rank is; empty if it is stopped or still starts."""
        process, path = self.processes[rank], Path(self.folder.name) / f"store.stack{rank}"
        if not process.is_alive() or not path.exists():
            return ""
        assert process.pid is not None, "it has started"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1.0)
        return path.read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


@functools.cache
def _pool(num_ranks: int) -> _Pool:
    pool = _Pool(num_ranks)
    _pools.append(pool)
    atexit.register(pool.close)
    return pool


_pools: list[_Pool] = []


def close() -> None:
    """Ends all ranks; the next `run` starts new ones."""
    for pool in _pools:
        pool.close()
    _pools.clear()
    _pool.cache_clear()


class Said(logging.Handler):
    """The lines that the package logs on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("lplb_ep").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class RanksFailedError(AssertionError):
    """What the ranks raised: `errors[rank]` is (type name, message) or None."""

    def __init__(self, failures: dict[int, tuple[str, str, str]], num_ranks: int) -> None:
        self.errors = [failures[r][:2] if r in failures else None for r in range(num_ranks)]
        first = min(failures)
        super().__init__(f"ranks {sorted(failures)} failed; rank {first}:\n{failures[first][2]}")


def run(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    environ: dict[str, str] | None = None,
    timeout: float = 180.0,
    **kwargs: Any,
) -> list[Any]:
    """`[function(group, *args, **kwargs) for each rank]`, run on `num_ranks` gloo ranks at once.

    `function` must be importable (defined at a test module's top level). If a rank raises, the call
    fails with `RanksFailedError`. A rank whose process ended has "EOFError" there. Ranks that hang
    are killed after `timeout` seconds, or after `AFTER_FAILURE_S` if another rank has failed.
    """
    pool = _pool(num_ranks)
    for pipe in pool.pipes:
        pipe.send((function, args, kwargs, environ or {}))
    results, failures = {}, {}
    waiting, until = dict(enumerate(pool.pipes)), time.monotonic() + timeout
    while waiting:
        ready = connection.wait([*waiting.values()], max(0.0, until - time.monotonic()))
        if not ready:
            late = min(waiting)
            said = f"rank {late} of {num_ranks} did not answer in time\n{pool.stack(late)}"
            close()
            cause = RanksFailedError(failures, num_ranks) if failures else None
            raise TimeoutError(said) from cause
        for rank, pipe in [(rank, pipe) for rank, pipe in waiting.items() if pipe in ready]:
            try:
                ok, results[rank] = pipe.recv()
            except (EOFError, ConnectionResetError):
                ok, results[rank] = False, ("EOFError", "its process ended", "its process ended")
            if not ok:
                failures[rank] = results[rank]
                until = min(until, time.monotonic() + AFTER_FAILURE_S)
            del waiting[rank]
    if failures:
        raise RanksFailedError(failures, num_ranks)
    return [results[rank] for rank in range(num_ranks)]
