"""The CPU time of the drop-in's calls and of a plan on a GPU, with launches replaced by nothing.

    taskset -c 0 python benchmarks/host_time.py [--calls N] [--cold MB] [--profile CASE]

It needs no GPU: CUDA, CuPy and DeepEP's classes are stand-ins that do nothing, and tensors lie on
the CPU. Only the drop-in's Python is left, so changes of a tenth of a microsecond show. Launches
and queries of CUDA are left out; `benchmarks/calls.py` measures those. Each figure is the least of
several medians, in microseconds of the calling thread.

Between the calls of a program, CUDA's driver and DeepEP run, and little of the drop-in's code and
data is left in a CPU's caches. That makes the calls several times slower. `--cold MB` reads so much
memory before each call; it must be more than the last cache holds. Figures are lower quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import itertools
import os
import pstats
import statistics
import time
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

os.environ |= {"LPLB_EP": "1", "LPLB_EP_REPLICAS": "valid", "LPLB_EP_BACKEND": "deep_ep"}

from lplb_ep import Placement, Planner
from lplb_ep.comm.exchange import WindowExchange, Windows
from lplb_ep.deepep import drop_in, plans
from lplb_ep.gpu import launch
from lplb_ep.layer import channels
from lplb_ep.planning import device, device_tables, error_flags, planner, solvers

NUM_EXPERTS, NUM_TOPK, HIDDEN = 120, 8, 7168
PLACEMENT = Placement([*range(NUM_EXPERTS), 0, 1], num_ranks=1, home=list(range(NUM_EXPERTS)))
NUM_SLOTS = PLACEMENT.num_physical_experts
TOKENS, LOW_LATENCY_TOKENS = 64, 8
NUM_BATCHES, NUM_MEDIANS, NUM_COLD = 15, 5, 200


def stand_in_for_cuda() -> None:
    """Has plans "run" on a GPU that is the host, and takes no time."""

    def nothing(*_: Any) -> None:
        pass

    stream = types.SimpleNamespace(cuda_stream=1234, synchronize=nothing, wait_stream=nothing)
    cuda: Any = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.current_device = lambda: -1  # as tensors of the host say
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_stream = lambda device=None: stream
    cuda.synchronize = nothing
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=132)
    cuda.device = lambda device: contextlib.nullcontext()
    torch._C._cuda_getCurrentRawStream = lambda index: 1234
    vars(torch._C)["_cuda_getDevice"] = lambda: -1
    on_host = types.SimpleNamespace(**vars(torch))
    on_host.device = lambda kind, index: torch.device("cpu")
    vars(device)["torch"] = on_host
    make_backend = device.DeviceBackend.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        make_backend(self, *args, **kwargs)
        self._index = torch.cuda.current_device()

    vars(planner)["DeviceBackend"].__init__ = make

    class Function:
        ptr = 1

    class Module:
        def load(self, data: bytes) -> None:
            pass

        def get_function(self, name: str) -> Any:
            return Function()

    driver = types.SimpleNamespace(
        launchKernel=nothing, funcGetAttribute=lambda *_: 0, funcSetAttribute=nothing
    )
    runtime = types.SimpleNamespace(
        getDevice=lambda: 0, setDevice=nothing, deviceGetAttribute=lambda *_: 232448
    )
    modules = types.SimpleNamespace(driver=driver, runtime=runtime, Module=Module)
    made: dict[str, Any] = {
        "_cupy": lambda: types.SimpleNamespace(cuda=modules),
        "captures_go_on": contextlib.nullcontext,
        "compile_cubin": lambda *_: types.SimpleNamespace(data=b""),
    }
    vars(launch).update(made)
    names = ("Create", "AddKernelNode_v2", "InstantiateWithFlags", "ExecKernelNodeSetParams_v2")
    names += ("Launch", "ExecDestroy", "Destroy")
    graphs = types.SimpleNamespace(**{f"cuGraph{name}": nothing for name in names})
    vars(launch)["_cuda_driver"] = lambda: graphs
    for module in (launch, solvers, device_tables):
        vars(module)["max_shared_bytes"] = lambda device: 232448
    vars(solvers)["check_device"] = nothing
    vars(error_flags)["watch"] = lambda *_, **__: None
    vars(planner)["connect"] = lambda counts, *_, **__: (
        None if counts == "given" else WindowExchange("ipc", Windows([4096]))
    )
    planned = plans.PlannedCall
    vars(plans)["PlannedCall"] = lambda state, planner, topk_idx, slots, keep_values, guests: (
        planned(state, planner, topk_idx, slots, False, guests)
    )
    torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[method-assign, assignment]


class Handle:
    """Of a dispatch of V2."""


class Plain:
    """What DeepEP's classes have in common, moving nothing."""

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        explicitly_destroy: bool = False,
    ) -> None:
        self.group, self.num_rdma_bytes = group, num_rdma_bytes

    def capture(self) -> Any:
        return None

    def destroy(self) -> None:
        pass


class Buffer(Plain):
    """As `deep_ep.Buffer`."""

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        return 1 << 20

    def get_dispatch_layout(
        self,
        topk_idx: Any,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        return None, None, None, torch.empty(TOKENS, 1, dtype=torch.bool), None

    def dispatch(
        self,
        x: Any,
        handle: Any = None,
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        topk_idx: Any = None,
        topk_weights: Any = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        return x, None, None, [], (is_token_in_rank,), None

    def combine(self, x: Any, handle: Any) -> Any:
        return x, None, None

    def low_latency_dispatch(
        self,
        x: Any,
        topk_idx: Any,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
    ) -> Any:
        return x, None, (torch.empty(NUM_SLOTS, 16), None, 0, 0, 0), None, None

    def low_latency_combine(self, x: Any, topk_idx: Any, topk_weights: Any, handle: Any) -> Any:
        return x, None, None

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        pass


class ElasticBuffer(Plain):
    """As `deep_ep.ElasticBuffer`."""

    def dispatch(
        self,
        x: Any,
        topk_idx: Any = None,
        topk_weights: Any = None,
        num_experts: Any = None,
        num_max_tokens_per_rank: Any = None,
        previous_event: Any = None,
        handle: Any = None,
        do_cpu_sync: Any = None,
    ) -> Any:
        return x, None, None, handle or Handle(), None

    def combine(self, x: Any, handle: Any) -> Any:
        return x, None, None

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        return 24


def tokens(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, picks and weights."""
    picks = torch.stack([torch.randperm(NUM_EXPERTS)[:NUM_TOPK] for _ in range(number)])
    return torch.zeros(number, HIDDEN, dtype=torch.bfloat16), picks, torch.rand(picks.shape)


Case = Callable[[Any, int], object]
"""Calls of a buffer with a number of experts."""


def cases() -> dict[str, tuple[type, dict[str, Any], Case]]:
    """By name: the class, how it is made, and the calls."""
    x, picks, weights = tokens(TOKENS)
    few_x, few_picks, few_weights = tokens(LOW_LATENCY_TOKENS)

    def legacy(buffer: Any, num_experts: int) -> None:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(picks, num_experts)
        received = buffer.dispatch(
            x,
            topk_idx=picks,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        buffer.combine(received[0], received[4])

    def low_latency(buffer: Any, num_experts: int) -> None:
        out = buffer.low_latency_dispatch(few_x, few_picks, 128, num_experts, use_fp8=False)
        buffer.low_latency_combine(out[0], few_picks, few_weights, out[2])

    def elastic(buffer: Any, num_experts: int) -> None:
        out = buffer.dispatch(
            x, topk_idx=picks, topk_weights=weights, num_experts=num_experts, do_cpu_sync=False
        )
        buffer.combine(out[0], out[3])

    low_latency_options = {
        "num_rdma_bytes": 1 << 21,
        "low_latency_mode": True,
        "num_qps_per_rank": NUM_SLOTS,
    }
    return {
        "low latency": (Buffer, low_latency_options, low_latency),
        "legacy": (Buffer, {"num_nvl_bytes": 1 << 20}, legacy),
        "V2": (ElasticBuffer, {}, elastic),
    }


def microseconds(call: Callable[[], object], num_calls: int) -> float:
    """Of a call: the least of several medians of the mean of so many."""
    for _ in range(2 * num_calls):
        call()
    medians = []
    for _ in range(NUM_MEDIANS):
        taken = []
        for _ in range(NUM_BATCHES):
            start = time.thread_time_ns()
            for _ in itertools.repeat(None, num_calls):
                call()
            taken.append((time.thread_time_ns() - start) / num_calls / 1e3)
        medians.append(statistics.median(taken))
    return min(medians)


def microseconds_cold(call: Callable[[], object], num_bytes: int) -> float:
    """Of a call that finds nothing in a CPU's caches: the lower quartile."""
    memory, taken = torch.ones(num_bytes // 8, dtype=torch.float64), []
    for _ in range(NUM_COLD):
        memory.sum()
        start = time.thread_time_ns()
        call()
        taken.append((time.thread_time_ns() - start) / 1e3)
    return sorted(taken)[NUM_COLD // 4]


def profile(call: Callable[[], object], number: int = 3000) -> None:
    """Prints where a call spends its time."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in itertools.repeat(None, number):
        call()
    profiler.disable()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of the drop-in, without its launches")
    parser.add_argument("--calls", type=int, default=100, metavar="N", help="in a row; 100")
    parser.add_argument("--cold", type=int, metavar="MB", help="memory to read before each call")
    parser.add_argument("--profile", metavar="CASE", help="where one case spends its time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stand_in_for_cuda()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    calls: dict[str, Callable[[], object]] = {}
    for name, (base, options, case) in cases().items():
        options_of_layer = {"placement": PLACEMENT, "num_local_slots": NUM_SLOTS}
        buffer = drop_in.drop_in_of(base)(group, **options, **options_of_layer)
        calls[f"{name}, plain"] = functools.partial(case, base(group, **options), NUM_SLOTS)
        calls[f"{name}, balanced"] = functools.partial(case, buffer, NUM_EXPERTS)
    _, picks, _ = tokens(TOKENS)
    channel = next(iter(channels[group].values()))
    given = Planner(PLACEMENT, rank=0, counts="given", solver="flow", slot=1)
    counts = torch.zeros(1, NUM_EXPERTS, dtype=torch.int32)
    calls["slots"] = functools.partial(channel.route, picks)
    calls["plan"] = functools.partial(channel, picks)
    calls["plan, counts given"] = functools.partial(given, picks, counts=counts)
    for name, call in calls.items():
        if args.profile is None:
            microseconds_ = microseconds(call, args.calls)
            if args.cold:
                microseconds_ = microseconds_cold(call, 1_000_000 * args.cold)
            print(f"{name:22} {microseconds_:6.2f}", flush=True)
        elif args.profile == name:
            profile(call)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
