"""What statistics and a recording cost, on one GPU.

    python benchmarks/statistics_cost.py [--ranks R] [--layers N] [--layer-us US] [--json FILE]

First come microseconds of a plan (E = 256, top-8, EPLB's copies, counts given), from replays of a
CUDA graph with 32 batches. Kernels run without their statistics, as they are, and with samples of
every 16th batch and of each one. Kernels without statistics are compiled from a changed copy of the
sources. Each kind is measured several times by turns, and the median is shown.

Then comes reading, with N planners for N layers: the CPU time of a snapshot, and of the reporter's
thread each second while it records. The last figures are replays with and without such a thread
beside them. It reads a hundred times as often as in a job.

Shares are of the time of a layer with 64 tokens on each of two H200s, with dispatch and combine
(benchmarks/RESULTS.md). `--layer-us` gives another time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from lplb_ep import Layer, Placement, Planner, metrics
from lplb_ep.gpu import jit
from lplb_ep.metrics import reporter
from lplb_ep.metrics.recorder import Recorder
from lplb_ep.planning import kernels
from lplb_ep.tools import bench
from lplb_ep.tools.tables import text_table

NUM_EXPERTS, NUM_TOPK, NUM_TURNS = 256, 8, 5
LAYER_US = 2640
KINDS = {"without": 0, "with": 0, "a sample in 16": 16, "each a sample": 1}


def cut_kernels(directory: Path) -> Path:
    """The kernels in a directory of their own, without what keeps statistics."""
    sources = directory / "kernels"
    shutil.copytree(jit.KERNELS, sources)
    path = sources / "statistics.cuh"
    text = path.read_text("utf-8")
    text = cut(text, "word_of_totals", "return 0;")
    for name in ("keep_sample", "add_at_home", "tally"):
        text = cut(text, name, "return;")
    path.write_text(text, "utf-8")
    return sources


def cut(text: str, name: str, end: str) -> str:
    """A function that ends before it begins."""
    changed, number = re.subn(rf"(\b{name}\([^{{;]*\) \{{)", rf"\1 {end}", text, count=1)
    assert number == 1, f"{name} is not where it was"
    return changed


@contextlib.contextmanager
def kernels_of(sources: Path) -> Iterator[None]:
    """Has planners that are made inside run other sources."""
    loaded = (
        kernels.route_kernel,
        kernels._route_kernels,
        kernels._solver_kernels,
        kernels._plan_kernels,
    )
    with mock.patch.object(jit, "KERNELS", sources):
        for cache in loaded:
            cache.cache_clear()
        yield
    for cache in loaded:
        cache.cache_clear()


def planner_of(placement: Placement, every: int = 0, name: str = "") -> Planner:
    """A planner of its own layer, by the counts that a call brings."""
    rank = placement.num_ranks // 2
    return Planner(
        Layer(placement, name=name), rank=rank, counts="given", solver="flow", sample_every=every
    )


def time_plans(num_ranks: int, num_tokens: int, cut_sources: Path) -> dict[str, float]:
    """Microseconds of a plan, by kind."""
    batches = bench.make_batches(num_ranks, NUM_EXPERTS, num_tokens, NUM_TOPK)
    placement = bench.make_placement("eplb", num_ranks, 2, batches.history)
    topks, counts = [topk.cuda() for topk in batches.topk_idx], batches.counts.cuda()
    planners = {kind: planner_of(placement, every) for kind, every in KINDS.items() if every}
    planners["with"] = planner_of(placement)
    with kernels_of(cut_sources):
        planners["without"] = planner_of(placement)
        planners["without"](topks[0], counts=counts[0])  # which loads them
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(NUM_TURNS):
        kinds = [*KINDS] if turn % 2 == 0 else [*KINDS][::-1]
        for kind in kinds:
            planner = planners[kind]

            def plan(i: int, planner: Planner = planner) -> Any:
                return planner(topks[i], counts=counts[i])

            times[kind].append(bench.time_graph(plan))
    assert sum(planners["with"].num_batches.values()) > 0, "they are kept"
    assert not planners["without"].num_batches, "they are cut out"
    return {kind: statistics.median(taken) for kind, taken in times.items()}


def cpu_us(call: Callable[[], Any], number: int = 30) -> float:
    """The median of a call."""
    taken = []
    for _ in range(number):
        start = time.perf_counter()
        call()
        taken.append(1e6 * (time.perf_counter() - start))
    return statistics.median(taken)


def time_reading(num_ranks: int, num_layers: int, directory: Path) -> dict[str, float]:
    """Microseconds of the CPU for a snapshot and a look; of replays without and with a thread."""
    batches = bench.make_batches(num_ranks, NUM_EXPERTS, 64, NUM_TOPK)
    placement = bench.make_placement("eplb", num_ranks, 2, batches.history)
    topks, counts = [topk.cuda() for topk in batches.topk_idx], batches.counts.cuda()
    planners = [planner_of(placement, 16, f"layers.{i}") for i in range(num_layers)]

    def plans(i: int) -> Any:
        return [planner(topks[i], counts=counts[i]) for planner in planners]

    found = {"replay": bench.time_graph(plans)}
    recorder = Recorder(directory / "run.npz", 16)
    with mock.patch.object(reporter, "_is_first", return_value=True):
        look = reporter.Reporter(0, recorder).look
        found |= {"snapshot": cpu_us(metrics.snapshot), "look": cpu_us(look)}
        ends = threading.Event()

        def run() -> None:
            while not ends.wait(reporter.INTERVAL_S / 100):
                look()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            found["replay beside a reader"] = bench.time_graph(plans)
        finally:
            ends.set()
            thread.join()
    found["write"] = cpu_us(lambda: _write(recorder), 3)
    return found


def _write(recorder: Recorder) -> None:
    recorder._num_new = 1
    recorder.write(now=True)


def main() -> None:
    """Measures, and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8, metavar="R")
    parser.add_argument("--layers", type=int, default=58, metavar="N")
    parser.add_argument("--layer-us", type=float, default=LAYER_US, metavar="US")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        sources = cut_kernels(Path(directory))
        plans = {T: time_plans(args.ranks, T, sources) for T in (8, 64, 512, 4096)}
        reading = time_reading(args.ranks, args.layers, Path(directory))
    rows = [
        [
            str(T),
            *(f"{times[kind]:.2f}" for kind in KINDS),
            f"{times['with'] - times['without']:+.2f}",
            f"{(times['a sample in 16'] - times['without']) / args.layer_us:+.3%}",
        ]
        for T, times in plans.items()
    ]
    print(text_table(["us a plan, tokens", *KINDS, "statistics", "of a layer"], rows))
    print()
    print(
        text_table([f"us, {args.layers} layers", ""], [[n, f"{t:.1f}"] for n, t in reading.items()])
    )
    if args.json:
        found = {"conditions": bench.conditions(), "plans": plans, "reading": reading}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
