"""What the drop-in adds to the time of DeepEP's calls, beside plain DeepEP in the same run.

    python benchmarks/calls.py [--ranks N] [--cases CASE ...] [--markdown FILE] [--json FILE]
    python benchmarks/calls.py --embedded   # on the CPU, with the embedded buffers

Each rank has a GPU of its own. Plain is the same buffer without the drop-in's methods. Its calls
get the slots that the balanced calls choose, so both move the same rows, which is checked. They
differ by the drop-in alone, and take turns in one process. Times are microseconds of a dispatch and
a combine, with the layout before them where there is one, or of a plan. Each rank takes its median,
and the slowest rank's is shown:

- "CPU" is processor time of the calling thread, and "wall" all time, of calls one after another.
  The GPU is synchronised before and after them, and their number divides the sum.
- "synchronised" is of one call before a synchronisation, as in a decode loop. "CPU" ends with the
  call, "wall" with the synchronisation.

DeepEP's calls that wait for received counts poll, and polling is processor time. With `--replicas
tracked` a `Replicas` of P / R small modules on each rank says that its weights are valid.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import importlib.metadata
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lplb_ep
from lplb_ep import Placement, Planner, Replicas

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import ranks

Ways = dict[str, Callable[[], Any]]
Times = dict[str, dict[str, list[float]]]
"""The medians of `COLUMNS` in microseconds, by call and by way."""
COLUMNS = ("CPU", "wall", "CPU, synchronised", "wall, synchronised")
MOST_SLOTS = 128  # a rank's, of DeepEP 1.2.1's throughput kernels
LOW_LATENCY_TOKENS, TOKENS = (8, 32, 128), 64
NUM_WARM = 20


@dataclass(frozen=True)
class Sizes:
    """The sizes of a case, the same on every rank."""

    num_experts: int
    num_redundant: int
    num_topk: int
    hidden: int
    num_batches: int
    num_calls: int
    """A batch's: calls between two synchronisations."""
    tracked: bool
    physical: bool
    on_gpu: bool

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    @property
    def module(self) -> str:
        """Of the buffers that move the rows."""
        return "deep_ep" if self.on_gpu else "lplb_ep.embedded"


@dataclass(frozen=True)
class Tokens:
    """A rank's tokens of one batch."""

    x: torch.Tensor
    """[T, hidden] bfloat16."""
    logical: torch.Tensor
    """[T, K] int64, experts."""
    slots: torch.Tensor
    """[T, K] int64, where the plan sends them."""
    weights: torch.Tensor
    """[T, K] float32."""
    counts: torch.Tensor
    """[R, E] int32, picks of each expert on every rank."""


class Layer:
    """A placement by a skewed history, and tokens of that skew."""

    def __init__(self, group: dist.ProcessGroup, sizes: Sizes) -> None:
        generator = torch.Generator().manual_seed(0)
        self.popularity = torch.randn(sizes.num_experts, generator=generator).mul(0.6).exp()
        self.placement = Placement.from_history(
            self.popularity, num_ranks=group.size(), num_redundant_per_rank=sizes.num_redundant
        )
        self.group, self.sizes = group, sizes
        self._planner: Planner | None = None
        self._replicas: Replicas | None = None

    def track_replicas(self) -> None:
        """Has a `Replicas` say that weights are valid, where that is asked for. Collective."""
        if self.sizes.tracked:
            modules = [
                torch.nn.Linear(8, 8, bias=False, device=self.sizes.device)
                for _ in range(self.placement.num_local_slots)
            ]
            self._replicas = Replicas(torch.nn.ModuleList(modules), self.placement, self.group)
            self._replicas.copy_weights()

    def draw(self, num_tokens: int) -> Tokens:
        """Collective: the slots are those of a plan."""
        if self._planner is None:
            self._planner = Planner(self.placement, self.group, counts="torch", slot=1)
        sizes, device = self.sizes, self.sizes.device
        generator = torch.Generator().manual_seed(1 + self.group.rank())
        popularity = self.popularity.expand(num_tokens, -1)
        logical = torch.multinomial(popularity, sizes.num_topk, generator=generator).to(device)
        plan = self._planner(logical)
        return Tokens(
            torch.randn(num_tokens, sizes.hidden, device=device).bfloat16(),
            logical,
            plan.topk_idx,
            torch.rand(num_tokens, sizes.num_topk, device=device),
            plan.counts,
        )

    def options(self) -> dict[str, Any]:
        """Of a buffer that balances this layer."""
        return {
            "placement": self.placement,
            "num_local_slots": self.placement.num_local_slots,
            "explicitly_destroy": True,
        }

    def ways(self, pair: Callable[..., Any], buffer: Any, tokens: Tokens) -> Ways:
        """Plain and balanced calls of `pair(buffer, tokens, picks, number of experts)`, which
        returns the rows that each slot of this rank received.

        Raises:
            RuntimeError: the two do not move the same rows.
        """
        P = self.placement.num_physical_experts
        given = (tokens.slots, P) if self.sizes.physical else (tokens.logical, len(self.popularity))
        ways: Ways = {
            "plain": functools.partial(
                pair, plain_of(buffer, self.sizes.module), tokens, tokens.slots, P
            ),
            "balanced": functools.partial(pair, buffer, tokens, *given),
        }
        rows = {way: torch.as_tensor(call()).tolist() for way, call in ways.items()}
        if rows["plain"] != rows["balanced"]:
            raise RuntimeError(f"plain and balanced calls moved different rows: {rows}")
        return ways


def plain_of(buffer: Any, module: str) -> Any:
    """The buffer as DeepEP's own class has it: the same memory, without the drop-in's methods."""
    own = getattr(importlib.import_module(module), type(buffer).__name__)
    assert own in type(buffer).__mro__[1:], f"{type(buffer)} is no drop-in of {own}"
    plain = object.__new__(own)
    plain.__dict__ = buffer.__dict__
    return plain


def synchronise(sizes: Sizes) -> None:
    if sizes.on_gpu:
        torch.cuda.synchronize()


def measure(ways: Ways, sizes: Sizes) -> dict[str, list[float]]:
    """Of one rank: by way, the medians of `COLUMNS` in microseconds."""
    for call in ways.values():
        for _ in range(NUM_WARM):
            call()
    order = list(ways)
    taken: dict[str, list[list[float]]] = {way: [[] for _ in COLUMNS] for way in ways}
    for _ in range(sizes.num_batches):
        order.reverse()
        for way in order:
            call, (cpu, wall, cpu_each, wall_each) = ways[way], taken[way]
            call()  # the ranks meet in it
            synchronise(sizes)
            start, begin = time.perf_counter_ns(), time.thread_time_ns()
            for _ in range(sizes.num_calls):
                call()
            cpu.append((time.thread_time_ns() - begin) / sizes.num_calls)
            synchronise(sizes)
            wall.append((time.perf_counter_ns() - start) / sizes.num_calls)
            for _ in range(sizes.num_calls):
                start, begin = time.perf_counter_ns(), time.thread_time_ns()
                call()
                cpu_each.append(time.thread_time_ns() - begin)
                synchronise(sizes)
                wall_each.append(time.perf_counter_ns() - start)
    return {
        way: [statistics.median(column) / 1e3 for column in columns]
        for way, columns in taken.items()
    }


def graphs(ways: Ways) -> Ways:
    """The same calls as CUDA graphs of one each."""
    replays: Ways = {}
    for way, call in ways.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        replays[way] = graph.replay
    return replays


# --- the cases: each yields what to measure, by name ----------------------------------------------


def low_latency(group: dist.ProcessGroup, sizes: Sizes) -> Iterator[tuple[str, Ways]]:
    """Low-latency dispatch and combine, eager and as a graph."""
    layer = Layer(group, sizes)
    of_ranks = LOW_LATENCY_TOKENS if sizes.on_gpu else LOW_LATENCY_TOKENS[:1]
    P, most = layer.placement.num_physical_experts, max(of_ranks)
    num_bytes = lplb_ep.Buffer.get_low_latency_rdma_size_hint(most, sizes.hidden, group.size(), P)
    buffer = lplb_ep.Buffer(
        group,
        num_rdma_bytes=num_bytes,
        low_latency_mode=True,
        num_qps_per_rank=P // group.size(),
        **layer.options(),
    )
    layer.track_replicas()

    def pair(buffer: Any, tokens: Tokens, picks: torch.Tensor, num_experts: int) -> Any:
        received, numbers, handle, _, _ = buffer.low_latency_dispatch(
            tokens.x, picks, most, num_experts, use_fp8=False
        )
        buffer.low_latency_combine(received, picks, tokens.weights, handle)
        return numbers

    for num_tokens in of_ranks:
        ways = layer.ways(pair, buffer, layer.draw(num_tokens))
        yield f"low latency, {num_tokens} tokens a rank", ways
        if sizes.on_gpu:
            yield f"low latency, {num_tokens} tokens a rank, as a graph", graphs(ways)


def legacy(group: dist.ProcessGroup, sizes: Sizes) -> Iterator[tuple[str, Ways]]:
    """Layout, dispatch and combine of the throughput kernels."""
    layer, row = Layer(group, sizes), 2 * sizes.hidden
    configs = (
        lplb_ep.Buffer.get_dispatch_config(group.size()),
        lplb_ep.Buffer.get_combine_config(group.size()),
    )
    num_bytes = max(config.get_nvl_buffer_size_hint(row, group.size()) for config in configs)
    buffer = lplb_ep.Buffer(group, num_bytes, **layer.options())
    layer.track_replicas()

    def pair(buffer: Any, tokens: Tokens, picks: torch.Tensor, num_experts: int) -> Any:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(picks, num_experts)
        received, _, _, numbers, handle, _ = buffer.dispatch(
            tokens.x,
            topk_idx=picks,
            topk_weights=tokens.weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        buffer.combine(received, handle)
        return numbers

    ways = layer.ways(pair, buffer, layer.draw(TOKENS))
    yield f"layout, dispatch and combine, {TOKENS} tokens a rank", ways


def elastic(group: dist.ProcessGroup, sizes: Sizes) -> Iterator[tuple[str, Ways]]:
    """Dispatch and combine of DeepEP V2's `ElasticBuffer`."""
    layer = Layer(group, sizes)
    buffer = lplb_ep.ElasticBuffer(
        group,
        num_max_tokens_per_rank=TOKENS,
        hidden=sizes.hidden,
        num_topk=sizes.num_topk,
        **layer.options(),
    )
    layer.track_replicas()

    def pair(
        buffer: Any, tokens: Tokens, picks: torch.Tensor, num_experts: int, *, do_cpu_sync: bool
    ) -> Any:
        received, _, _, handle, _ = buffer.dispatch(
            tokens.x,
            topk_idx=picks,
            topk_weights=tokens.weights,
            num_experts=num_experts,
            do_cpu_sync=do_cpu_sync,
        )
        buffer.combine(received, handle)
        return handle.psum_num_recv_tokens_per_expert

    tokens = layer.draw(TOKENS)
    for do_cpu_sync in (True, False):
        ways = layer.ways(functools.partial(pair, do_cpu_sync=do_cpu_sync), buffer, tokens)
        kind = "with" if do_cpu_sync else "without"
        yield f"V2 dispatch and combine, {TOKENS} tokens a rank, {kind} the CPU's sync", ways


def plan(group: dist.ProcessGroup, sizes: Sizes) -> Iterator[tuple[str, Ways]]:
    """A plan by `Planner` alone."""
    layer = Layer(group, sizes)
    tokens = layer.draw(TOKENS)
    alone = Planner(layer.placement, rank=group.rank(), counts="given", slot=2)
    together = Planner(layer.placement, group, slot=3)
    ways: Ways = {
        "counts given": lambda: alone(tokens.logical, counts=tokens.counts),
        f"counts by {together.counts}": lambda: together(tokens.logical),
    }
    yield f"a plan alone, {TOKENS} tokens a rank", ways
    for planner in (alone, together):
        planner.raise_errors()


CASES: dict[str, Callable[[dist.ProcessGroup, Sizes], Iterator[tuple[str, Ways]]]] = {
    "low-latency": low_latency,
    "legacy": legacy,
    "elastic": elastic,
    "plan": plan,
}


def run_case(
    group: dist.ProcessGroup, case: str, sizes: Sizes
) -> dict[str, dict[str, list[float]]]:
    """The medians of `COLUMNS` of one rank, by call and by way."""
    warnings.simplefilter("default")  # DeepEP's are its own affair
    if sizes.on_gpu:
        torch.cuda.set_device(group.rank() % torch.cuda.device_count())
    torch.manual_seed(group.rank())
    found = {}
    for name, ways in CASES[case](group, sizes):
        found[name] = measure(ways, sizes)
        if group.rank() == 0:
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


# --- what was found -------------------------------------------------------------------------------


def rows_of(of_ranks: list[Times]) -> list[tuple[str, list[float]]]:
    """The table's rows: by way the slowest rank's medians, and what balancing adds to plain."""
    rows = []
    for name, ways in of_ranks[0].items():
        slowest = {
            way: [max(of_rank[name][way][c] for of_rank in of_ranks) for c in range(len(COLUMNS))]
            for way in ways
        }
        rows += [(f"{name}: {way}", times) for way, times in slowest.items()]
        if "plain" in slowest:
            pairs = zip(slowest["balanced"], slowest["plain"], strict=True)
            rows.append((f"{name}: **above plain**", [ours - theirs for ours, theirs in pairs]))
    return rows


def markdown(rows: list[tuple[str, list[float]]]) -> str:
    lines = ["| us | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for name, times in rows:
        lines.append(f"| {name} | " + " | ".join(f"{t:.1f}" for t in times) + " |")
    return "\n".join(lines)


def conditions(sizes: Sizes, num_ranks: int, commit: str) -> dict[str, object]:
    """Where this was measured, and of what."""
    found: dict[str, object] = {
        "commit": commit or _commit(),
        "package": str(Path(lplb_ep.__file__).parent),
        "device": torch.cuda.get_device_name() if sizes.on_gpu else "CPU",
        "ranks": num_ranks,
        "buffers": f"{sizes.module} {_version('deep_ep') if sizes.on_gpu else ''}".strip(),
        **{name: _version(name) for name in ("torch", "cupy-cuda13x", "nvshmem4py-cu13")},
        "clock of the thread, ns": _resolution(),
        **asdict(sizes),
    }
    if sizes.on_gpu:
        found["NCCL"] = _nccl()
    return found


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _nccl() -> str:
    """The version that is loaded, which need not be the one that torch was compiled with."""
    version = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    return f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100}"


def _resolution() -> int:
    """The smallest step that the thread's clock is seen to take, its own reading included."""
    ticks = [time.thread_time_ns() for _ in range(1000)]
    return min(b - a for a, b in itertools.pairwise(ticks) if b > a)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embedded", action="store_true", help="on the CPU, smaller by default")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ranks", type=int, help="default: one for each GPU")
    parser.add_argument("--experts", type=int, help="default: 256, or 240 where 256 are too many")
    parser.add_argument("--redundant", type=int, default=2, help="slots beside the homes, a rank")
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--batches", type=int, default=15)
    parser.add_argument("--calls", type=int, default=20, help="of a batch")
    parser.add_argument("--replicas", choices=("valid", "tracked"), default="valid")
    parser.add_argument("--indices", choices=("logical", "physical"), default="logical")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for each case")
    parser.add_argument("--commit", default="", help="of the package, where there is no git")
    parser.add_argument("--markdown", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    args.ranks = args.ranks or (2 if args.embedded else torch.cuda.device_count())
    if args.ranks < 1:
        parser.error("there is no CUDA device: --embedded measures on the CPU")
    if args.experts is None and args.embedded:
        args.experts = 32 * args.ranks
    elif args.experts is None:
        fits = 256 // args.ranks + args.redundant <= MOST_SLOTS
        args.experts = 256 if fits else 240
    args.hidden = args.hidden or (512 if args.embedded else 7168)
    return args


def main() -> None:
    args = parse()
    sizes = Sizes(
        args.experts,
        args.redundant,
        args.topk,
        args.hidden,
        args.batches,
        args.calls,
        args.replicas == "tracked",
        args.indices == "physical",
        not args.embedded,
    )
    environ = {
        "LPLB_EP": "1",
        "LPLB_EP_REPLICAS": args.replicas,
        "LPLB_EP_INDICES": args.indices,
        "LPLB_EP_BACKEND": "embedded" if args.embedded else "deep_ep",
    }
    rows: list[tuple[str, list[float]]] = []
    failures = []
    for case in args.cases:
        try:
            rows += rows_of(
                ranks.run(args.ranks, run_case, case, sizes, environ=environ, timeout=args.timeout)
            )
        except (ranks.RanksFailedError, TimeoutError) as error:
            failures.append(case)
            print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        ranks.close()  # NVSHMEM starts anew, and a failed case holds no GPU
    about = conditions(sizes, args.ranks, args.commit)
    lines = [f"- {name}: {value}" for name, value in about.items()]
    text = "\n".join([*lines, "", markdown(rows)])
    print(text)
    if args.markdown:
        Path(args.markdown).write_text(text + "\n")
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "us": dict(rows)}, indent=1))
    if failures:
        raise SystemExit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
