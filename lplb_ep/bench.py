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

from . import __version__, cpu, cuda
from .placement import Placement
from .plan import Status
from .planner import Planner
from .report import text_table

NUM_BATCHES, NUM_WARM, NUM_REPLAYS = 32, 3, 20


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
    """An expert's popularity is lognormal (sigma 0.6) times a factor for each 32 neighbours (0.33),
    as fitted to recordings; that of each batch drifts from the history's (correlation 0.94 of the
    logarithms, as between prompts of two lengths), and that of each rank a little more (sigma 0.1).
    """
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

    The other ranks' rows lie in device memory, in step with this rank's, which counts into its own
    place among them; an exchange is not included.

    Args:
        placement: the copies.
        batches: of its numbers of ranks and experts.
        solver: one on the GPU.

    Returns:
        Microseconds of "count", of "solve" (of loads that are summed already, and alone), of
        "solve + number" (the kernel of a plan), of "route" (split and rewrite) and of the "plan";
        "eager", microseconds that a call of a `Planner` keeps the CPU; "above", tokens of the
        worst batch above its optimum; "workspace", bytes that a planner holds.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    rank, row_size = placement.num_ranks // 2, cuda.NUM_HEAD + placement.num_experts
    steps = cuda.Steps(placement, rank, device, [1, 0, 0], len(Status), row_size, solver)
    topks = [topk.to(device) for topk in batches.topk_idx]
    rows = torch.zeros(len(topks), placement.num_ranks, row_size, dtype=torch.int32, device=device)
    rows[:, :, 1] = 1
    rows[:, :, 4] = torch.arange(1, len(topks) + 1, device=device)[:, None]
    rows[:, :, cuda.NUM_HEAD :] = batches.counts.to(device)
    full = rows.clone()
    rows[:, rank] = 0  # counted anew by every replay, and zero again after it

    def count(i: int) -> cuda.Picks:
        steps.row = rows[i, rank]
        if i == 0:
            steps.num_exchanges.zero_()
        return steps.count(topks[i], Status.OPTIMAL, exchanged=True)

    def plan(i: int) -> tuple[torch.Tensor, ...]:
        picks = count(i)
        solved = steps.solve(picks, rows[i], Status.OPTIMAL, exchanged=True)
        return (*steps.route(picks, solved, exchanged=True), solved.rank_load)

    times = {"plan": time_graph(plan)}
    above = 0
    for i, counts in enumerate(batches.counts):
        _, status, rank_load = plan(i)
        assert int(status) == Status.OPTIMAL, f"batch {i} ended with status {int(status)}"
        best = math.ceil(cpu.solve(counts.long().sum(0), placement).bound)
        above = max(above, int(rank_load.max()) - best)

    times["count"] = time_graph(count)
    picks = [count(i) for i in range(len(topks))]
    rows.copy_(full)
    loads = full[:, :, cuda.NUM_HEAD :].sum(1, dtype=torch.int32)
    alone = cuda.Solver(placement, device, solver)
    times["solve"] = time_graph(lambda i: alone(loads[i : i + 1]))

    def solve(i: int) -> cuda.Solved:
        return steps.solve(picks[i], rows[i], Status.OPTIMAL, exchanged=True)

    times["solve + number"] = time_graph(solve)
    solved = [solve(i) for i in range(len(topks))]
    times["route"] = time_graph(lambda i: steps.route(picks[i], solved[i], exchanged=False))

    planner = Planner(placement, rank=rank, counts="given", solver=solver)
    given = batches.counts.to(device)
    eager = []
    for i in range(len(topks)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        planner(topks[i], counts=given[i])
        eager.append(1e6 * (time.perf_counter() - start))
    return {
        **times,
        "eager": statistics.median(eager),
        "above": above,
        "workspace": steps.num_bytes,
    }


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
    with warnings.catch_warnings(), torch.profiler.profile(activities=activities) as profile:
        warnings.simplefilter("ignore")  # of events lost between cycles; there is one
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
