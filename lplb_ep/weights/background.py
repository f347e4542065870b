"""Replicas chosen in a separate process, beside the program's steps."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import IO

import torch

from ..logs import logger
from ..settings import environment_for_one_core
from .proposals import Job, Proposal, propose

log = logger(__name__)


class Background:
    """Examines layers in a process of its own.

    In a thread, Python's lock would have every call of torch in the program's own loop wait.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._proposals: queue.SimpleQueue[Proposal] = queue.SimpleQueue()
        self._ended = threading.Event()

    @property
    def is_busy(self) -> bool:
        """Whether it has not answered all jobs yet."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, jobs: Sequence[Job]) -> None:
        """Begins with these jobs, and returns at once; not while it is busy."""
        if self._process is None or self._process.poll() is not None:
            path = f"import sys; sys.path[:] = {[*map(str, sys.path)]}; "
            run = f"from {__name__} import serve; serve()"
            self._process = subprocess.Popen(
                [sys.executable, "-c", path + run],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment_for_one_core(),
            )
            weakref.finalize(self, _end, self._process, self._ended)
        # A thread, because pipes hold little: it waits for them outside of Python's lock.
        arguments = (self._process, jobs, self._proposals, self._ended)
        self._thread = threading.Thread(target=_converse, args=arguments, daemon=True)
        self._thread.start()

    def take(self) -> list[Proposal]:
        """The proposals since the last call."""
        return [self._proposals.get() for _ in range(self._proposals.qsize())]


def serve(requests: IO[bytes] | None = None) -> None:
    """The process in the background: answers lists of jobs.

    It writes each job's proposal, or the message of its error, and None after the last one.
    """
    requests = sys.stdin.buffer if requests is None else requests
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # text that `choose` prints is no answer
    os.nice(10)
    torch.set_num_threads(1)
    while True:
        try:
            jobs = pickle.load(requests)
        except EOFError:
            return
        for job in jobs:
            try:
                answer: Proposal | str | None = propose(job)
            except Exception as error:
                log.exception("layer %d", job.layer)
                answer = f"choosing replicas for layer {job.layer} failed: {error!r}"
            if answer is not None:
                pickle.dump(answer, answers)
                answers.flush()
        pickle.dump(None, answers)
        answers.flush()


def _converse(
    process: subprocess.Popen[bytes],
    jobs: Sequence[Job],
    proposals: queue.SimpleQueue[Proposal],
    ended: threading.Event,
) -> None:
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None, "it was made with a pipe"
    assert stdout is not None, "it was made with a pipe"
    try:
        pickle.dump(jobs, stdin)
        stdin.flush()
        while (answer := pickle.load(stdout)) is not None:
            if isinstance(answer, Proposal):
                proposals.put(answer)
            else:
                log.warning("%s; the layer keeps its placement", answer)
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):
        _close(process)
        if not ended.is_set():
            log.warning(
                "the process that chooses replicas ended with status %d; its error is on stderr. "
                "Placements stay as they are",
                process.wait(),
            )


def _end(process: subprocess.Popen[bytes], ended: threading.Event) -> None:
    ended.set()
    process.kill()
    process.wait()
    _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # bytes that were not read are of no use
            if pipe is not None:
                pipe.close()
