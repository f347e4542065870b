"""The cost of a plan on the GPU: time of each step, launches, workspace, and the gap to T*."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import __version__
from ..placement.table import Placement
from ..planning import reference
from ..planning.device import DeviceBackend
from ..planning.device_tables import LoadSolver
from ..planning.launches import Launches
from ..planning.planner import Planner
from ..planning.structs import HEAD, Head, Status
from ..problem import Problem
from ..settings import MAX_ONE_LAUNCH
from .tables import text_table

NUM_BATCHES, NUM_WARM, NUM_REPLAYS, NUM_EAGER = 32, 3, 20, 128


USUAL = (
    ("cube", 8, 2),
    ("eplb", 8, 2),
    ("hypercube", 16, 2),
    ("eplb", 16, 2),
    ("ring", 32, 1),
    ("eplb", 32, 1),
    ("cube", 64, 2),
    ("torus", 64, 2),
    ("eplb", 64, 2),
)
"""Placement, ranks and redundant experts a rank."""
USUAL_WITH_GUESTS = (
    ("homes", 8, 0),
    ("homes", 64, 0),
    *(("eplb", ranks, few) for ranks in (8, 32, 64) for few in (0, 1)),
)
"""The same, where ranks have guest slots."""


@dataclass(frozen=True)
class Batches:
    """The same batches at every run, skewed as DeepSeek-V3's recorded ones are."""

    history: torch.Tensor
    """[E] the load that the placement is made for."""
    topk_idx: list[torch.Tensor]
    """[NUM_BATCHES] of [T, K] int64: the picks of rank R // 2."""
    counts: torch.Tensor
    """[NUM_BATCHES, R, E] int32: of every rank."""


def make_batches(num_ranks: int, num_experts: int, num_tokens: int, num_topk: int) -> Batches:
    """Loads skewed as recorded ones are, from a fixed seed.

    An expert's popularity is lognormal (sigma 0.6) times a factor for each 32 neighbours (0.33).
    Each batch's popularity drifts from the history's, as between prompts of two lengths: the
    correlation of their logarithms is 0.94. Each rank's drifts a little more (sigma 0.1).

    Raises:
        ValueError: a number is out of range; the message names it.
    """
    for name, number, most in (
        ("num_ranks", num_ranks, math.inf),
        ("num_experts", num_experts, math.inf),
        ("num_tokens", num_tokens, math.inf),
        ("num_topk", num_topk, num_experts),
    ):
        if not 1 <= number <= most:
            limit = "" if most == math.inf else f" and at most {most}"
            raise ValueError(f"{name} must be at least 1{limit}; got {number}")
    rng = np.random.default_rng(2026)

    def popularity() -> Any:
        groups = rng.normal(0, 0.33, -(-num_experts // 32))
        return rng.normal(0, 0.6, num_experts) + np.repeat(groups, 32)[:num_experts]

    history, topks, counts = popularity(), [], []
    for _ in range(NUM_BATCHES):
        drifted = 0.94 * history + math.sqrt(1 - 0.94**2) * popularity()
        ranks = drifted + rng.normal(0, 0.1, (num_ranks, num_experts))
        # A token's K experts, likelier where they are popular, and all different (Gumbel).
        noise = rng.gumbel(size=(num_tokens, num_experts)).astype(np.float32)
        topk = (
            torch.from_numpy(noise + ranks[num_ranks // 2].astype(np.float32))
            .topk(num_topk)
            .indices
        )
        weight = np.exp(ranks)
        of_ranks = rng.multinomial(num_tokens * num_topk, weight / weight.sum(1, keepdims=True))
        of_ranks[num_ranks // 2] = reference.count(topk, num_experts).numpy()
        topks.append(topk)
        counts.append(torch.from_numpy(of_ranks.astype(np.int32)))
    return Batches(torch.from_numpy(np.exp(history)), topks, torch.stack(counts))


def make_placement(
    kind: str,
    num_ranks: int,
    num_redundant_per_rank: int,
    history: torch.Tensor,
    num_guests_per_rank: int = 0,
) -> Placement:
    """By EPLB ("eplb"), along a topology, experts in order alone ("homes"), or with a copy of the
    first of them on every rank ("ballast").

    Raises:
        ValueError: there is no such placement; the message says why.
    """
    shape = {
        "num_ranks": num_ranks,
        "num_redundant_per_rank": num_redundant_per_rank,
        "num_guests_per_rank": num_guests_per_rank,
    }
    if kind == "ballast":
        if num_guests_per_rank or len(history) % num_ranks:
            raise ValueError("ballast goes without guest slots, and with as many experts a rank")
        table = np.pad(np.arange(len(history)).reshape(num_ranks, -1), ((0, 0), (0, 1)))
        table[0, -1] = -1
        return Placement(table.ravel(), num_ranks)
    if kind == "homes":
        shape.pop("num_redundant_per_rank")
        return Placement.homes_only(len(history), **shape)
    if kind == "eplb":
        return Placement.from_history(history, **shape)
    return Placement.from_topology(kind, num_experts=len(history), load=history, **shape)


def time_graph(call: Callable[[int], Any]) -> float:
    """Microseconds of one `call(i)`: a CUDA graph of one for each batch, replayed; the median."""
    for i in range(NUM_BATCHES):
        call(i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(NUM_BATCHES)]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(NUM_WARM + NUM_REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(kept))
    return statistics.median(times[NUM_WARM:])


def measure(
    placement: Placement, batches: Batches, solver: str = "flow", objective: str = "tokens"
) -> dict[str, float]:
    """Times of the steps and of the whole plan, by CUDA graphs on the current device.

    The other ranks' rows lie in device memory, and this rank counts into its own row among them.
    An exchange is not included.

    Args:
        placement: the copies.
        batches: of its numbers of ranks and experts.
        solver: one on the GPU.
        objective: one of `settings.OBJECTIVES`.

    Returns:
        Microseconds of each step: "count", "solve + number" (the kernel of a plan) and "route"
        (split and rewrite). "solve" is the solver alone, on loads that are summed already.
        "plan" is all steps. "in one" is a plan in one launch, NaN where batches are too large for
        it or the solver has none. "eager" is the wall time, in microseconds, of a `Planner` call on
        the CPU. "above": tokens of the worst batch above the fewest that any plan has.
        "workspace": bytes that a planner holds.
    """
    topks = [topk.cuda() for topk in batches.topk_idx]
    rows = torch.zeros(
        len(topks), placement.num_ranks, HEAD + placement.num_experts, dtype=torch.int32
    )
    rows[:, :, Head.PLACEMENT] = 1
    rows[:, :, Head.BATCH] = torch.arange(1, len(topks) + 1)[:, None]
    rows[:, :, HEAD:] = batches.counts
    return {
        **_measure_plan(placement, topks, rows, solver, objective),
        **_measure_steps(placement, topks, rows.cuda(), solver, objective),
        "in one": _measure_one(placement, topks, batches.counts.cuda(), solver, objective),
        "eager": _measure_eager(placement, topks, batches.counts.cuda(), solver, objective),
    }


def _make_backend(placement: Placement, solver: str, objective: str) -> DeviceBackend:
    rank, row_size = placement.num_ranks // 2, HEAD + placement.num_experts
    problem = Problem(objective=objective)
    return DeviceBackend(placement, problem, rank, [1, 0, 0], row_size, solver=solver)


class _Steps:
    """The launches of one batch, with results of their own."""

    def __init__(
        self,
        backend: DeviceBackend,
        topk_idx: torch.Tensor,
        rows: torch.Tensor,
        own: torch.Tensor,
    ) -> None:
        """`rows`: [R, HEAD + E] exchanged rows; `own`: the row that this rank counts into."""
        workspace = self._workspace = backend.workspace
        workspace.row = own
        self._launches = Launches(workspace, topk_idx.dtype, "logical", False, True)
        self.physical, self.results = map(torch.empty_like, (topk_idx, workspace.results))
        self._launches.set_rows(rows)
        addresses = (self.physical.data_ptr(), self.results.data_ptr())
        self._launches.set_batch(topk_idx, Status.OPTIMAL, *addresses)

    def _stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream

    def count(self) -> None:
        self._launches.count(self._stream())

    def solve(self) -> None:
        self._launches.solve(self._stream())

    def route(self) -> None:
        self._launches.route(self._stream())

    @property
    def ended(self) -> tuple[Status, int, npt.NDArray[np.int32]]:
        """How the batch ended, the largest rank load, and the guests [R, G]."""
        *_, rank_load, status, guests = self.results.split(self._workspace.result_sizes)
        chosen = guests.cpu().numpy().reshape(rank_load.numel(), -1)
        return Status(int(status)), int(rank_load.max()), chosen


def _measure_plan(
    placement: Placement,
    topks: list[torch.Tensor],
    full: torch.Tensor,
    solver: str,
    objective: str,
) -> dict[str, float]:
    """Of `measure`: plan, count, above and workspace."""
    backend, rows = _make_backend(placement, solver, objective), full.cuda()
    rows[:, backend.workspace.rank] = 0  # counted anew by every replay, and zero again after it
    of_batch = [
        _Steps(backend, topk, of_all, of_all[backend.workspace.rank])
        for topk, of_all in zip(topks, rows, strict=True)
    ]

    def count(i: int) -> None:
        if i == 0:
            backend.workspace.head[-1:].zero_()  # the number of the batch
        of_batch[i].count()

    def plan(i: int) -> None:
        count(i)
        of_batch[i].solve()
        of_batch[i].route()

    taken, above = time_graph(plan), 0
    for i, load in enumerate(full[:, :, HEAD:].long().sum(1)):
        plan(i)
        status, most, guests = of_batch[i].ended
        assert status is Status.OPTIMAL, f"batch {i} ended with {status!r}"
        filled = placement.with_guests(guests) if guests.size else placement
        above = max(above, most - math.ceil(reference.solve(load, filled).bound))
    _check_error_flags(backend)
    return {
        "plan": taken,
        "count": time_graph(count),
        "above": above,
        "workspace": backend.num_bytes,
    }


def _measure_steps(
    placement: Placement,
    topks: list[torch.Tensor],
    rows: torch.Tensor,
    solver: str,
    objective: str,
) -> dict[str, float]:
    """Of `measure`: solve, solve + number and route."""
    loads = rows[:, :, HEAD:].sum(1, dtype=torch.int32)
    # A backend for each batch: the next count would overwrite the notes on the picks of the last.
    backends = [_make_backend(placement, solver, objective) for _ in topks]
    of_batch = [
        _Steps(backend, topk, of_all, backend.workspace.row)
        for backend, topk, of_all in zip(backends, topks, rows, strict=True)
    ]
    for steps in of_batch:
        steps.count()
    device, problem = torch.device("cuda", torch.cuda.current_device()), backends[0].problem
    alone = LoadSolver(placement, device, solver, problem)
    times = {
        "solve": time_graph(lambda i: alone(loads[i : i + 1])),
        "solve + number": time_graph(lambda i: of_batch[i].solve()),
        "route": time_graph(lambda i: of_batch[i].route()),
    }
    _check_error_flags(*backends)
    return times


def _make_planner(
    placement: Placement, solver: str, objective: str, one_launch: int = 0
) -> Planner:
    return Planner(
        placement,
        rank=placement.num_ranks // 2,
        counts="given",
        solver=solver,
        objective=objective,
        one_launch=one_launch,
    )


def _measure_one(
    placement: Placement,
    topks: list[torch.Tensor],
    counts: torch.Tensor,
    solver: str,
    objective: str,
) -> float:
    if solver != "flow" or topks[0].numel() > MAX_ONE_LAUNCH:
        return math.nan
    planner = _make_planner(placement, solver, objective, MAX_ONE_LAUNCH)
    backend = planner._backend
    assert isinstance(backend, DeviceBackend), "flow plans on the GPU"
    if backend.workspace.plan is None:  # several components, or not enough shared memory
        return math.nan
    taken = time_graph(lambda i: planner(topks[i], counts=counts[i]))
    planner.raise_errors()
    return taken


def _measure_eager(
    placement: Placement,
    topks: list[torch.Tensor],
    counts: torch.Tensor,
    solver: str,
    objective: str,
) -> float:
    planner = _make_planner(placement, solver, objective)
    taken = []
    for i in range(NUM_EAGER):
        topk, given = topks[i % NUM_BATCHES], counts[i % NUM_BATCHES]
        torch.cuda.synchronize()
        start = time.perf_counter()
        planner(topk, counts=given)
        taken.append(1e6 * (time.perf_counter() - start))
    planner.raise_errors()
    return statistics.median(taken)


def _check_error_flags(*backends: DeviceBackend) -> None:
    for backend in backends:
        backend.synchronize()
        found = backend.error_flags.flags.nonzero()[0].tolist()
        assert not found, f"kernels set error flags {found}"


def conditions() -> dict[str, object]:
    """Where this is measured."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "lplb_ep": __version__,
        "replays": f"{NUM_REPLAYS} of a graph of {NUM_BATCHES} batches, medians",
    }


def count_launches(placement: Placement, batches: Batches, solver: str = "flow") -> int:
    """Kernels, copies and fills that a plan puts on the GPU, by a profiler. From then on it slows
    all launches down: count when the times are taken."""
    planner = _make_planner(placement, solver, "tokens")
    topk_idx, counts = batches.topk_idx[0].cuda(), batches.counts[0].cuda()
    planner(topk_idx, counts=counts)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of events lost between cycles; there is one
        with torch.profiler.profile(activities=activities) as profile:
            planner(topk_idx, counts=counts)
            torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events() or ())


TIMES = ("count", "solve", "solve + number", "route", "plan", "in one", "eager")
NUMBERS = ("above", "launches", "workspace")


def table(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Of named measurements."""
    return text_table(
        ["us", *TIMES, "tokens above T*", "launches", "bytes"],
        [
            [
                name,
                *("–" if math.isnan(m[c]) else f"{m[c]:.1f}" for c in TIMES),
                *(f"{m[c]:.0f}" for c in NUMBERS),
            ]
            for name, m in rows
        ],
    )
