"""What a plan on the GPU costs: time of each step, launches, workspace, and the gap to T*."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..placement.table import Placement
from ..planning import device as cuda
from ..planning import reference as cpu
from ..planning.plan import Status
from ..planning.planner import Planner
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
        of_ranks[num_ranks // 2] = cpu.count(topk, num_experts).numpy()
        topks.append(topk)
        counts.append(torch.from_numpy(of_ranks.astype(np.int32)))
    return Batches(torch.from_numpy(np.exp(history)), topks, torch.stack(counts))


def make_placement(
    kind: str, num_ranks: int, num_redundant_per_rank: int, history: torch.Tensor
) -> Placement:
    """By EPLB ("eplb") or along a topology.

    Raises:
        ValueError: there is no such placement; the message says why.
    """
    shape = {"num_ranks": num_ranks, "num_redundant_per_rank": num_redundant_per_rank}
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


def measure(placement: Placement, batches: Batches, solver: str = "flow") -> dict[str, float]:
    """Times of the steps and of the whole plan, by CUDA graphs on the current device.

    The other ranks' rows lie in device memory, and this rank counts into its own row among them.
    An exchange is not included.

    Args:
        placement: the copies.
        batches: of its numbers of ranks and experts.
        solver: one on the GPU.

    Returns:
        Microseconds of each step: "count", "solve + number" (the kernel of a plan) and "route"
        (split and rewrite). "solve" is the solver alone, on loads that are summed already.
        "plan" is all steps. "eager" is the wall time, in microseconds, of a `Planner` call on
        the CPU. "above": tokens of the worst batch above its optimum. "workspace": bytes that a
        planner holds.
    """
    topks = [topk.cuda() for topk in batches.topk_idx]
    rows = torch.zeros(
        len(topks), placement.num_ranks, cuda.NUM_HEAD + placement.num_experts, dtype=torch.int32
    )
    rows[:, :, 1] = 1
    rows[:, :, 4] = torch.arange(1, len(topks) + 1)[:, None]
    rows[:, :, cuda.NUM_HEAD :] = batches.counts
    return {
        **_measure_plan(placement, topks, rows, solver),
        **_measure_steps(placement, topks, rows.cuda(), solver),
        "eager": _measure_eager(placement, topks, batches.counts.cuda(), solver),
    }


def _make_steps(placement: Placement, solver: str) -> cuda.Steps:
    device = torch.device("cuda", torch.cuda.current_device())
    row_size = cuda.NUM_HEAD + placement.num_experts
    rank = placement.num_ranks // 2
    return cuda.Steps(placement, rank, device, [1, 0, 0], len(Status), row_size, solver)


def _measure_plan(
    placement: Placement, topks: list[torch.Tensor], full: torch.Tensor, solver: str
) -> dict[str, float]:
    """Of `measure`: plan, count, above and workspace."""
    steps, rows = _make_steps(placement, solver), full.cuda()
    rows[:, steps.rank] = 0  # counted anew by every replay, and zero again after it

    def count(i: int) -> cuda.Picks:
        steps.row = rows[i, steps.rank]
        if i == 0:
            steps.num_exchanges.zero_()
        return steps.count(topks[i], Status.OPTIMAL, exchanged=True)

    def plan(i: int) -> tuple[torch.Tensor, ...]:
        picks = count(i)
        solved = steps.solve(picks, rows[i], Status.OPTIMAL, exchanged=True)
        return (*steps.route(picks, solved, exchanged=True), solved.rank_load)

    taken, above = time_graph(plan), 0
    for i, load in enumerate(full[:, :, cuda.NUM_HEAD :].long().sum(1)):
        _, status, rank_load = plan(i)
        assert int(status) == Status.OPTIMAL, f"batch {i} ended with status {int(status)}"
        best = math.ceil(cpu.solve(load, placement).bound)
        above = max(above, int(rank_load.max()) - best)
    _check_told(steps)
    return {
        "plan": taken,
        "count": time_graph(count),
        "above": above,
        "workspace": steps.num_bytes,
    }


def _measure_steps(
    placement: Placement, topks: list[torch.Tensor], rows: torch.Tensor, solver: str
) -> dict[str, float]:
    """Of `measure`: solve, solve + number and route."""
    loads = rows[:, :, cuda.NUM_HEAD :].sum(1, dtype=torch.int32)
    # Of each batch its own: what one counts lies in their memory until the next is counted.
    of_batch = [_make_steps(placement, solver) for _ in topks]
    picks = [
        steps.count(topk, Status.OPTIMAL, exchanged=False)
        for steps, topk in zip(of_batch, topks, strict=True)
    ]

    def solve(i: int) -> cuda.Solved:
        return of_batch[i].solve(picks[i], rows[i], Status.OPTIMAL, exchanged=True)

    solved = [solve(i) for i in range(len(topks))]
    alone = of_batch[0].solver
    times = {
        "solve": time_graph(lambda i: alone(loads[i : i + 1])),
        "solve + number": time_graph(solve),
        "route": time_graph(lambda i: of_batch[i].route(picks[i], solved[i], exchanged=False)),
    }
    _check_told(*of_batch)
    return times


def _measure_eager(
    placement: Placement, topks: list[torch.Tensor], counts: torch.Tensor, solver: str
) -> float:
    planner = Planner(placement, rank=placement.num_ranks // 2, counts="given", solver=solver)
    taken = []
    for i in range(NUM_EAGER):
        topk, given = topks[i % NUM_BATCHES], counts[i % NUM_BATCHES]
        torch.cuda.synchronize()
        start = time.perf_counter()
        planner(topk, counts=given)
        taken.append(1e6 * (time.perf_counter() - start))
    planner.raise_errors()
    return statistics.median(taken)


def _check_told(*of_batch: cuda.Steps) -> None:
    torch.cuda.synchronize()
    for i, steps in enumerate(of_batch):
        assert not steps.told.any(), f"steps {i} set error flags {steps.told.nonzero()[0].tolist()}"


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
    planner = Planner(placement, rank=placement.num_ranks // 2, counts="given", solver=solver)
    topk_idx, counts = batches.topk_idx[0].cuda(), batches.counts[0].cuda()
    planner(topk_idx, counts=counts)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of events lost between cycles; there is one
        with torch.profiler.profile(activities=activities) as profile:
            planner(topk_idx, counts=counts)
            torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events() or ())


TIMES = ("count", "solve", "solve + number", "route", "plan", "eager")
NUMBERS = ("above", "launches", "workspace")


def table(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Of named measurements."""
    return text_table(
        ["us", *TIMES, "tokens above T*", "launches", "bytes"],
        [
            [name, *(f"{m[c]:.1f}" for c in TIMES), *(f"{m[c]:.0f}" for c in NUMBERS)]
            for name, m in rows
        ],
    )
