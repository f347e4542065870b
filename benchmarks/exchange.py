"""What the exchange of counts costs: plans with 2, 4 and 8 ranks that share one GPU under MPS.

    python benchmarks/exchange.py [--ranks R ...] [--tokens T ...] [--json FILE]

Times are microseconds of a plan (E = 256, top-8, EPLB's copies): the slowest rank's median. All
ranks replay a CUDA graph at once. Counts travel by NVSHMEM or CUDA IPC, or are given, and then no
rank waits. The difference is what the exchange adds. The columns "(1)" have the plans in one
launch, for batches that one launch can plan. "Reused": plans by the quotas of an earlier batch
(LPLB_EP_EVERY), without an exchange. `--alone` also measures other exchanges of the counts:
NVSHMEM's `fcollect`, launched by the host, and gloo's all-gather, staged through the host. Ranks
that share a GPU start MPS, and their figures say nothing of NVLink. With a GPU each, they do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lplb_ep import Placement, Planner
from lplb_ep.planning import reference as cpu
from lplb_ep.settings import MAX_ONE_LAUNCH
from lplb_ep.tools import bench
from lplb_ep.tools.tables import text_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import mps
import ranks

NUM_EXPERTS, NUM_TOPK = 256, 8
NUM_PLANS, NUM_REPLAYS = 20, 30  # plans of a graph; replays of it
SLEEP_CYCLES = 20_000_000  # 10 ms: all ranks are there, with all that they will launch


def microseconds(group: dist.ProcessGroup, enqueue: Callable[[], Any]) -> float:
    """The median, by the GPU's clock, of one of the `NUM_PLANS` things that a call puts on the
    stream of all ranks. They meet in those of a first call, which is not timed: else the time would
    be that between the ranks' launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(NUM_REPLAYS):
        dist.barrier(group)
        torch.cuda._sleep(SLEEP_CYCLES)
        enqueue()
        start.record()
        enqueue()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / NUM_PLANS)
    return statistics.median(times)


def plan_time(group: dist.ProcessGroup, plan: Callable[..., Any], *args: Any) -> float:
    for _ in range(3):
        plan(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(NUM_PLANS):
            plan(*args)
    return microseconds(group, graph.replay)


def fcollect_time(group: dist.ProcessGroup) -> float:
    from nvshmem import core

    row = core.tensor((NUM_EXPERTS,), dtype=torch.int32)
    rows = core.tensor((group.size() * NUM_EXPERTS,), dtype=torch.int32)
    stream = core.NvshmemStream(torch.cuda.current_stream())

    def enqueue() -> None:
        for _ in range(NUM_PLANS):
            core.fcollect(core.Teams.TEAM_WORLD, rows, row, stream=stream)

    took = microseconds(group, enqueue)
    for tensor in (row, rows):
        core.free_tensor(tensor)
    return took


def gloo_time(group: dist.ProcessGroup, row: torch.Tensor) -> float:
    """From a row on the GPU to all rows there, by the host's clock."""
    times = []
    for _ in range(NUM_REPLAYS):
        dist.barrier(group)
        start = time.perf_counter()
        here = row.cpu()
        rows = [torch.empty_like(here) for _ in range(group.size())]
        dist.all_gather(rows, here, group=group)
        torch.stack(rows).cuda()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(group: dist.ProcessGroup, num_tokens: int, alone: bool) -> dict[str, float]:
    """Of one rank."""
    torch.cuda.set_device(group.rank() % torch.cuda.device_count())
    popularity = torch.randn(NUM_EXPERTS, generator=torch.Generator().manual_seed(0)).mul(0.6).exp()
    placement = Placement.from_history(popularity, num_ranks=group.size(), num_redundant_per_rank=2)
    torch.manual_seed(1 + group.rank())
    topk_idx = torch.multinomial(popularity.expand(num_tokens, -1), NUM_TOPK).cuda()
    counts = torch.stack(ranks_counts(group, topk_idx)).cuda()
    planners: dict[str, tuple[Planner, list[torch.Tensor]]] = {
        kind: (Planner(placement, group, counts=kind, solver="flow"), [topk_idx])
        for kind in ("nvshmem", "ipc")
    }
    given = Planner(placement, rank=group.rank(), counts="given", solver="flow")
    planners["given"] = given, [topk_idx, counts]
    times = {}
    for kind, (planner, arguments) in planners.items():
        times[kind] = plan_time(group, planner, *arguments)
        if topk_idx.numel() <= MAX_ONE_LAUNCH:
            options = {"solver": "flow", "rank": group.rank(), "one_launch": MAX_ONE_LAUNCH}
            one = Planner(placement, group, counts=kind, slot=1, **options)
            if one._backend.workspace.plan is not None:
                times[f"{kind} (1)"] = plan_time(group, one, *arguments)
        if kind != "given":
            with torch.no_grad():
                reusing = Planner(placement, group, counts=kind, solver="flow", slot=2, every=2**30)
                # Slots alone: a plan would be a copy of the kept results.
                times[f"{kind} reused"] = plan_time(group, reusing.route, *arguments)
    if alone:
        times["fcollect"] = fcollect_time(group)
        times["gloo"] = gloo_time(group, counts[group.rank()])
    return times


def ranks_counts(group: dist.ProcessGroup, topk_idx: torch.Tensor) -> list[torch.Tensor]:
    own = cpu.count(topk_idx.cpu(), NUM_EXPERTS)
    rows = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(rows, own, group=group)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 128, 256, 4096])
    parser.add_argument("--alone", action="store_true", help="others' ways for the counts alone")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with mps.service() as environ_of:
        for num_ranks in args.ranks:
            environ = environ_of(num_ranks)
            for num_tokens in args.tokens:
                asked = measure, num_tokens, args.alone
                of_ranks = ranks.run(num_ranks, *asked, environ=environ, timeout=120)
                found[f"{num_ranks} x {num_tokens}"] = {
                    column: max(times[column] for times in of_ranks) for column in of_ranks[0]
                }
    columns = list(dict.fromkeys(column for times in found.values() for column in times))
    rows = [
        [name, *(f"{times[c]:.1f}" if c in times else "" for c in columns)]
        for name, times in found.items()
    ]
    print(text_table(["ranks x tokens; us", *columns], rows))
    if args.json:
        Path(args.json).write_text(json.dumps({**bench.conditions(), "us": found}, indent=1))


if __name__ == "__main__":
    main()
