"""Placements kept fresh: replicas are moved when the traffic has moved on, on every rank at once.

The first rank of a group watches the loads and has new replicas chosen, in a process of its own. At
a boundary between steps it offers them, and every rank gets ready; only when all of them are, they
switch. Whatever fails before leaves the old placement in force everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ..comm.collectives import everyone, together
from ..placement.table import Placement
from ..planning.solve import MAX_TOTAL, solve
from ..settings import Settings, environment_for_one_core
from .replicas import Replicas

log = logging.getLogger(__name__)

T = TypeVar("T")
Int64 = npt.NDArray[np.int64]
Choose = Callable[..., Placement]
"""As `Placement.for_lp`: (samples [N, E], num_ranks, num_redundant_per_rank, start=,
fixed_homes=True, within_node=, max_changes=, max_copies=, seed=, time_budget_s=) → a placement with
the homes and slots of `start`."""

MAX_COPIES = 8
"""Copies of one expert that a refresh may come to, unless the first placement has more already: the
quotas' columns, which captured graphs keep."""
OFTEN = 0.75
"""The part of the steps in which a layer must have been unbalanced."""
MENDS = 0.25
"""The part of T*'s excess over the mean that new replicas must take away to be worth a move."""


# --- what to move --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A layer to look at."""

    layer: int
    loads: Int64
    """[N, E] tokens of each expert, in each of the last steps."""
    placement: Placement
    choose: Choose
    settings: Settings


@dataclass(frozen=True)
class Proposal:
    """Other replicas for a layer."""

    layer: int
    physical_to_logical: npt.NDArray[np.int32]
    """[P]"""
    imbalance_before: float
    """Mean T* / mean rank load, on loads that the replicas were not chosen by."""
    imbalance_after: float


def propose(job: Job) -> Proposal | None:
    """Looks at the loads of a layer, and chooses other replicas where that is worth it.

    It is where T* / mean was above the threshold in three of four steps, and the replicas chosen
    by every other step take away a quarter of the excess over 1 in the steps between, and more than
    the standard error of what they take away there.

    Raises:
        PlacementError: what was chosen has other homes.
    """
    loads, old, settings = job.loads[job.loads.sum(1) > 0], job.placement, job.settings
    if len(loads) < 2:
        return None
    before = imbalance(loads, old)
    if (before > settings.refresh_threshold).mean() < OFTEN:
        return None
    chosen = job.choose(
        loads[::2],
        old.num_ranks,
        old.num_local_slots - -(-old.num_experts // old.num_ranks),
        start=old,
        fixed_homes=True,
        within_node=_stays_within_nodes(old),
        max_changes=settings.refresh_changes,
        max_copies=old.max_replicas,
        seed=job.layer,
        time_budget_s=settings.refresh_seconds,
    )
    if chosen.max_replicas > old.max_replicas:
        log.warning(
            "layer %d: %d copies of an expert were chosen, and there is room for %d",
            *(job.layer, chosen.max_replicas, old.max_replicas),
        )
        return None
    new = old.with_copies(chosen.physical_to_logical)
    gain = before[1::2] - imbalance(loads[1::2], new)
    was, gained = float(before[1::2].mean()), float(gain.mean())
    error = gain.std(ddof=1) / np.sqrt(gain.size) if gain.size > 1 else 0  # of one it is not known
    if not gained >= max(MENDS * (was - 1), error) or new == old:
        return None
    return Proposal(job.layer, new.physical_to_logical, was, was - gained)


def imbalance(loads: Int64, placement: Placement) -> npt.NDArray[np.float64]:
    """[N] T* / mean rank load, the best that any plan makes of loads [N, E] that are not 0."""
    scaled = torch.from_numpy(loads // (1 + loads.sum(1, keepdims=True) // MAX_TOTAL))
    mean = scaled.sum(1) / placement.num_ranks
    return (solve(scaled, placement, "cpu").lower_bound / mean).numpy()


def with_room(placement: Placement) -> Placement:
    """The same, with room for `MAX_COPIES` of an expert."""
    copies = max(placement.max_replicas, min(placement.num_ranks, MAX_COPIES))
    return placement.with_copies(placement.physical_to_logical, copies)


def _stays_within_nodes(placement: Placement) -> bool:
    """Whether all copies of an expert are on one of several nodes: they stay there then, if there
    are enough experts on a node to fill its slots."""
    num_nodes = placement.num_ranks // placement.num_ranks_per_node
    if num_nodes == 1 or placement.num_experts % num_nodes:
        return False
    node = np.where(placement.copy_rank < 0, -1, placement.node[placement.copy_rank])
    apart = (node >= 0) & (node != node[:, :1])
    return not apart.any() and placement.num_local_slots * num_nodes <= placement.num_experts


def num_moved(old: Placement, new: Placement) -> int:
    """Copies of `new` on ranks where `old` has none of their expert."""

    def held(placement: Placement) -> npt.NDArray[np.bool_]:
        expert, column = np.nonzero(placement.copy_rank >= 0)
        out = np.zeros((placement.num_experts, placement.num_ranks), bool)
        out[expert, placement.copy_rank[expert, column]] = True
        return out

    return int((held(new) & ~held(old)).sum())


class Background:
    """Looks at layers in a process of its own.

    In a thread, Python's lock would have every call of torch in the program's own loop wait.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._proposals: queue.SimpleQueue[Proposal] = queue.SimpleQueue()
        self._ended = threading.Event()

    @property
    def is_busy(self) -> bool:
        """Whether it is still looking."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, jobs: Sequence[Job]) -> None:
        """Begins to look, and returns at once; not while it is busy."""
        if self._process is None or self._process.poll() is not None:
            path = f"import sys; sys.path[:] = {[*map(str, sys.path)]}; "
            serve = f"from {__name__} import serve; serve()"
            self._process = subprocess.Popen(
                [sys.executable, "-c", path + serve],
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
        """What has been proposed since it was last asked."""
        return [self._proposals.get() for _ in range(self._proposals.qsize())]


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
        with contextlib.suppress(OSError):  # what was not read is of no use
            if pipe is not None:
                pipe.close()


def serve(requests: IO[bytes] | None = None) -> None:
    """The process in the background: reads lists of jobs, writes their proposals and what went
    wrong, then None."""
    requests = sys.stdin.buffer if requests is None else requests
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what `choose` prints is no answer
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


# --- moving it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refreshed:
    """A layer whose replicas were moved."""

    layer: int
    """Its number in the `Refresher`'s list."""
    step: int
    """How many steps had ended."""
    placement: Placement
    """What is in force now."""
    num_copies: int
    """Replicas that were moved."""
    imbalance_before: float
    """Mean T* / mean rank load, in steps by which the replicas were not chosen."""
    imbalance_after: float
    """What it would have been with the new ones."""


class Refresher:
    """Moves replicas of layers whose traffic has moved on.

    Off unless `LPLB_EP_REFRESH` (or `settings`) says every how many steps to look; then a call of
    `step` does nothing. Homes, and with them the optimizer's state, stay where they are; so do the
    number of slots and the tables on the GPU, which are rewritten in place, so that captured CUDA
    graphs stay valid.

    Make it after the layers' `Replicas`, and before their planners, views and attachments: these
    leave room for other replicas only then. A channel that was made before is made anew.

    Args:
        layers: the replicas of each layer, all on one group, each with a placement object of its
            own.
        settings: whose `refresh…` count; by default the environment's.
        choose: chooses replicas, see `Choose`; by default `Placement.for_lp`. It is called in
            another process: a function that can be imported there.

    Raises:
        ValueError: no layers, a layer given twice or to another `Refresher`, too, layers on several
            groups, a placement object that serves several, more slots on a rank than experts, a
            `choose` that cannot be imported elsewhere.
        RankError: ranks differ in settings or placements.
    """

    def __init__(
        self,
        layers: Sequence[Replicas],
        *,
        settings: Settings | None = None,
        choose: Choose | None = None,
    ) -> None:
        group = layers[0].group if layers else None
        with together(group, "Refresher") as facts:
            self._settings = Settings.from_env() if settings is None else settings
            _check(layers, choose)
            for f in ("refresh", "refresh_threshold", "refresh_changes", "refresh_seconds"):
                facts[f] = str(getattr(self._settings, f))
            facts["placements"] = str([r.placement.fingerprint() for r in layers])
        self._layers, self._group, self._num_steps = list(layers), group, 0
        self._interval = self._settings.refresh
        if not self._interval:
            return
        self._choose: Choose = choose or Placement.for_lp
        self._chooses = group is None or group.rank() == 0
        self._background = Background()
        self._device = next(layers[0].experts.parameters()).device
        shape = (len(layers), layers[0].placement.num_experts)
        zeros = functools.partial(torch.zeros, dtype=torch.int64, device=self._device)
        self._now = zeros(*shape) if self._chooses else None
        """[L, E] load of the step that is under way."""
        self._window = zeros(self._interval, *shape) if self._chooses else None
        """[interval, L, E] loads of the last steps."""
        for number, replicas in enumerate(layers):
            replicas.placement = with_room(replicas.placement)
            replicas.layer.replace(replicas.placement)
            replicas.layer.is_refreshable = True
            if self._now is not None:
                replicas.layer.observers.append(functools.partial(_add, self._now[number]))

    def step(self) -> list[Refreshed]:
        """Ends a step; where replicas are to be moved, moves them on every rank.

        Call it where nothing is in flight: in training between optimizer steps, after
        `reduce_gradients` and with no micro-batch or recompute pending; in serving between the
        engine's steps. Before `copy_weights` it moves no weights itself, for that call then does;
        otherwise it moves those of the new replicas only. Nothing is exchanged, or waited for, but
        at every `LPLB_EP_REFRESH`-th call.

        Collective: every rank calls it after the same batches.

        Returns:
            The layers whose replicas were moved, the same on every rank; most often none.
        """
        if not self._interval:
            return []
        if self._now is not None and self._window is not None:
            self._window[self._num_steps % self._interval] = self._now
            self._now.zero_()
        self._num_steps += 1
        if self._num_steps % self._interval:
            return []
        busy = self._background.is_busy  # asked first: what it ends meanwhile is offered next time
        offered = self._broadcast(self._background.take() if self._chooses else [])
        moved = [done for proposal in offered if (done := self._switch(proposal)) is not None]
        if self._window is not None and not busy:
            self._look(self._window)
        return moved

    def _look(self, window: torch.Tensor) -> None:
        """Has other replicas chosen, by loads [interval, L, E], on the first rank. Raises nothing:
        the others could not know."""
        try:
            loads = window.to("cpu", copy=True).numpy()
            self._background.start(
                [
                    Job(number, loads[:, number], r.placement, self._choose, self._settings)
                    for number, r in enumerate(self._layers)
                ]
            )
        except Exception:
            log.exception("no replicas are looked for; placements stay as they are")

    def _broadcast(self, proposals: list[Proposal]) -> list[Proposal]:
        """The first rank's."""
        offer = [proposals]
        if self._group is not None and self._group.size() > 1:
            first = dist.get_global_rank(self._group, 0)
            dist.broadcast_object_list(offer, src=first, group=self._group)
        return offer[0]

    def _switch(self, proposal: Proposal) -> Refreshed | None:
        """Puts other replicas of a layer in force on every rank, or on none."""
        replicas = self._layers[proposal.layer]
        old, placement, valid, problem = replicas.placement, None, False, ""
        try:
            placement = old.with_copies(proposal.physical_to_logical)
            commits = [planner.prepare(placement) for planner in replicas.layer.current_planners()]
            change = replicas.prepare(placement)
            valid = change.is_valid
        except Exception as error:
            log.exception("layer %d cannot be refreshed here", proposal.layer)
            problem = str(error) or type(error).__name__
        fingerprint = "" if placement is None else placement.fingerprint()
        told = self._gather((problem, fingerprint, valid))
        if not self._all_ready(proposal.layer, [said for said, _, _ in told]):
            return None
        if len({held for _, held, _ in told}) > 1:
            log.warning("layer %d: ranks hold different placements, and stay", proposal.layer)
            return None
        # Where some are stale, the next `copy_weights` brings all of them.
        if all(valid for _, _, valid in told):
            try:
                change.fetch()
            except Exception as error:
                log.exception("layer %d: weights did not come", proposal.layer)
                problem = str(error) or type(error).__name__
            if not self._all_ready(proposal.layer, self._gather(problem)):
                return None
        assert placement is not None, "a rank that has none has a problem"
        self._wait_for_gpu()
        for commit in commits:
            commit()
        change.commit()
        replicas.layer.replace(placement)
        self._wait_for_gpu()
        return self._report(proposal, old, placement)

    def _gather(self, value: T) -> list[T]:
        return [value] if self._group is None else everyone(self._group, value)

    def _all_ready(self, layer: int, problems: Sequence[str]) -> bool:
        """Whether no rank has a problem; says which have, else."""
        ranks = [rank for rank, problem in enumerate(problems) if problem]
        if ranks:
            log.warning(
                "layer %d keeps its placement: ranks %s could not switch; rank %d: %s",
                *(layer, ranks, ranks[0], problems[ranks[0]]),
            )
        return not ranks

    def _wait_for_gpu(self) -> None:
        """Tables and weights are written on this stream, and read on any."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _report(self, proposal: Proposal, old: Placement, new: Placement) -> Refreshed:
        moved = num_moved(old, new)
        before, after = proposal.imbalance_before, proposal.imbalance_after
        log.info(
            "layer %d refreshed after step %d: %d replicas moved, imbalance %.3f -> %.3f",
            *(proposal.layer, self._num_steps, moved, before, after),
        )
        return Refreshed(proposal.layer, self._num_steps, new, moved, before, after)


def _add(load: torch.Tensor, counts: torch.Tensor) -> None:
    """Observes a batch: [E], of counts [R, E]. In place, for a captured graph to do it, too, and no
    method: caches keep placements, which must not keep a model. Micro-batches on streams of their
    own could overwrite one another's; one that is lost does not matter."""
    load += counts.sum(0).to(load.device)


def _check(layers: Sequence[Replicas], choose: Any) -> None:
    if not layers:
        raise ValueError("layers must have the replicas of at least one layer")
    for number, replicas in enumerate(layers):
        if any(replicas is other for other in layers[:number]):
            raise ValueError(f"layer {number} is in layers twice")
        if replicas.layer.is_refreshable:
            raise ValueError(f"layer {number} has a Refresher already")
        if replicas.group is not layers[0].group:
            raise ValueError(f"layer {number} is on another group than layer 0")
        if replicas.placement.num_experts != layers[0].placement.num_experts:
            raise ValueError(f"layer {number} has another number of experts than layer 0")
        if len(replicas.layer.replicas) > 1:
            raise ValueError(
                f"the placement object of layer {number} serves several layers: give each its own"
            )
        slots, ranks = replicas.placement.num_local_slots, replicas.placement.num_ranks
        if choose is None and slots > replicas.placement.num_experts and ranks > 1:
            raise ValueError(
                f"layer {number} has {slots} slots on a rank, more than there are experts: "
                f"{replicas.placement.num_experts}, and for_lp cannot fill them"
            )
    function = choose
    while isinstance(function, functools.partial):
        function = function.func
    # The second is what spawned processes call the program's own file.
    if getattr(function, "__module__", None) in ("__main__", "__mp_main__"):
        raise ValueError(
            "choose must be a function that can be imported elsewhere, "
            "which those of the program's own file cannot"
        )
    try:
        pickle.dumps(choose)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise ValueError(f"choose must be a function that can be imported: {error}") from error
