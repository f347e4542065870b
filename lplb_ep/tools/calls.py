"""The CPU time of the drop-in's calls, on embedded buffers with one rank, and of a planner."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__
from ..deepep import drop_in
from ..placement.table import Placement
from ..planning.planner import Planner
from ..settings import put_in_environment
from .bench import Batches
from .tables import text_table

MODES = ("0", "home", "1")
HIDDEN, NUM_WARM, NUM_CALLS = 128, 20, 400

Cost = tuple[float, float]
"""Microseconds of a call, medians: CPU time of the calling thread, and wall time."""
_Timed = Callable[..., Any]
"""Calls a function under a name: `timed(name, function, *args, **kwargs)`."""


def measure_calls(placement: Placement, batches: Batches) -> dict[str, dict[str, Cost]]:
    """Times calls on the CPU in every mode of `LPLB_EP`; torch has one thread.

    The buffers have one rank, so that nothing waits for another, and one copy of each expert. In
    mode 0 a call is passed on as it is. The planner is given the counts of all ranks. Sets
    `LPLB_EP`, `LPLB_EP_BACKEND` and `LPLB_EP_PLACEMENT` of this process.

    Args:
        placement: of the planner, for the batches' numbers of ranks and experts.
        batches: the first one is dispatched and planned, the same at every call.

    Returns:
        The cost by call, then by mode.
    """
    put_in_environment("backend", "embedded")
    put_in_environment("placement", "")
    topk_idx, num_experts = batches.topk_idx[0], len(batches.history)
    planner = Planner(placement, rank=placement.num_ranks // 2, counts="given", solver="cpu")
    calls: dict[str, dict[str, Cost]] = defaultdict(dict)

    def add(mode: str, run: Callable[[_Timed], object]) -> None:
        for name, cost in _medians(run).items():
            calls[name][mode] = cost

    with _one_rank() as group:
        for mode in MODES:
            put_in_environment("mode", mode)  # a buffer reads its settings when it is made
            for make in (_throughput, _low_latency, _elastic):
                add(mode, make(group, mode, topk_idx, num_experts))
        add("home", lambda timed: timed("Planner", planner.home, topk_idx))
        add("1", lambda timed: timed("Planner", planner, topk_idx, counts=batches.counts[0]))
    return dict(calls)


def _throughput(
    group: dist.ProcessGroup, mode: str, topk_idx: torch.Tensor, num_experts: int
) -> Callable[[_Timed], object]:
    buffer = _in_force(drop_in.Buffer(group), mode, num_experts)
    x, weights = _rows(topk_idx)

    def run(timed: _Timed) -> None:
        layout = timed("get_dispatch_layout", buffer.get_dispatch_layout, topk_idx, num_experts)
        received = timed(
            "dispatch",
            buffer.dispatch,
            x,
            num_tokens_per_rank=layout[0],
            is_token_in_rank=layout[3],
            num_tokens_per_expert=layout[2],
            topk_idx=topk_idx,
            topk_weights=weights,
        )
        timed("combine", buffer.combine, received[0], received[4])

    return run


def _low_latency(
    group: dist.ProcessGroup, mode: str, topk_idx: torch.Tensor, num_experts: int
) -> Callable[[_Timed], object]:
    size = (len(topk_idx), HIDDEN, 1, num_experts)
    num_bytes = drop_in.Buffer.get_low_latency_rdma_size_hint(*size)
    buffer = drop_in.Buffer(group, 0, num_bytes, low_latency_mode=True)
    buffer = _in_force(buffer, mode, num_experts)
    x, weights = _rows(topk_idx)

    def run(timed: _Timed) -> None:
        received, _, handle, *_ = timed(
            "low_latency_dispatch",
            buffer.low_latency_dispatch,
            x,
            topk_idx,
            len(topk_idx),
            num_experts,
            use_fp8=False,
        )
        combine = buffer.low_latency_combine
        timed("low_latency_combine", combine, received, topk_idx, weights, handle)

    return run


def _elastic(
    group: dist.ProcessGroup, mode: str, topk_idx: torch.Tensor, num_experts: int
) -> Callable[[_Timed], object]:
    size = {"num_max_tokens_per_rank": len(topk_idx), "hidden": HIDDEN}
    buffer = _in_force(drop_in.ElasticBuffer(group, **size), mode, num_experts)
    x, weights = _rows(topk_idx)

    def run(timed: _Timed) -> None:
        received = timed(
            "ElasticBuffer.dispatch", buffer.dispatch, x, topk_idx, weights, num_experts=num_experts
        )
        timed("ElasticBuffer.combine", buffer.combine, received[0], received[3])

    return run


def _in_force(buffer: Any, mode: str, num_experts: int) -> Any:
    return buffer if mode == "0" else buffer.view(Placement(range(num_experts), 1))


def _rows(topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weights for the picks."""
    rows = torch.ones(len(topk_idx), HIDDEN, dtype=torch.bfloat16)
    return rows, torch.ones(topk_idx.shape, dtype=torch.float32)


@contextmanager
def _one_rank() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone, and one thread for torch."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.distributed_c10d._get_default_group()
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(num_threads)


def _medians(run: Callable[[_Timed], object]) -> dict[str, Cost]:
    """The cost of each call that `run` makes, by name."""
    taken: dict[str, list[Cost]] = defaultdict(list)

    def timed(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        result = call(*args, **kwargs)
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
        taken[name].append((1e6 * cpu, 1e6 * wall))
        return result

    for _ in range(NUM_WARM + NUM_CALLS):
        run(timed)
    return {
        name: tuple(statistics.median(times) for times in zip(*costs[NUM_WARM:], strict=True))
        for name, costs in taken.items()
    }


def conditions() -> dict[str, object]:
    """Where and with what this is measured."""
    return {
        "device": "CPU, embedded buffers with one rank",
        "torch": torch.__version__,
        "lplb_ep": __version__,
        "each": f"median of {NUM_CALLS}",
    }


def table(calls: Mapping[str, Mapping[str, Cost]]) -> str:
    """The costs as text: a line for each call, two columns for each mode."""
    header = [f"{mode}: {time}" for mode in MODES for time in ("CPU", "wall")]
    rows = [
        [name, *(cell for mode in MODES for cell in _cells(costs.get(mode)))]
        for name, costs in calls.items()
    ]
    return text_table(["us, LPLB_EP =", *header], rows)


def _cells(cost: Cost | None) -> list[str]:
    return ["", ""] if cost is None else [f"{us:.1f}" for us in cost]
