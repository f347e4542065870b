"""Whole MoE layers in interleaved pairs: what a plan costs, and what it gains, by batch size.

    python benchmarks/paired_layers.py FILE --key LIVE --learn-from LEARNED [--ranks N]
        [--tokens 8 32 128 512 4096] [--calls throughput low-latency] [--json FILE]
    python benchmarks/paired_layers.py FILE ... --embedded   # small, on the CPU, without graphs

Each rank has a GPU of its own. Layers run one after another, forward: dispatch, experts (grouped
GEMMs in and out), combine. No call waits on the CPU for received counts. So a graph may hold all
layers. Loads are recorded ones, folded to the number of experts; a rank's picks are drawn by them.

- plain: DeepEP, experts in order.
- even: EPLB's copies, two redundant slots a rank. Each expert's picks take its copies by turns.
- balanced: `Placement.for_lp`'s copies, as many, and the drop-in. `LPLB_EP_OBJECTIVE` and the other
  settings of plans are taken from the environment.
- forced: DeepEP with picks that are equal for all experts, as a router forced into balance makes.

One round runs each way once, in an order that turns. A round's time is the slowest rank's, by the
GPU's clock. Figures are medians of milliseconds a layer. "Against plain" is the mean over rounds of
a way's time divided by plain's in the same round, with its 95 % interval (1.96 standard errors).
Outputs are compared with plain's in every way but forced.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from calls import plain_of
from torch import Tensor
from whole_layer import Experts, Sizes, environ_of, folded, forced_picks, picks

import lplb_ep
from lplb_ep import Placement
from lplb_ep.tools.recordings import load_recording
from lplb_ep.tools.tables import markdown_table, text_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import ranks

WAYS = ("plain", "even", "balanced", "forced")
CALLS = ("throughput", "low-latency")
MAX_LOW_LATENCY = 256  # tokens of a rank


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows times their slot's matrix. Those behind the last slot's become anything."""
    if x.is_cuda:
        return torch._grouped_mm(x, weight, offs=ends)
    out, begin = torch.full((len(x), weight.shape[2]), torch.nan), 0
    for end, matrix in zip(ends.tolist(), weight, strict=True):
        out[begin:end] = x[begin:end] @ matrix
        begin = end
    return out


class Layer:
    """One layer of one way on this rank: a buffer, experts, and a fixed routing.

    Args:
        buffer: whose methods the layer calls.
        experts: of this rank's slots.
        topk_idx: [T, K] int64, ids of experts as the buffer takes them.
        num_ids: of all ranks.
        sizes: of the run.
    """

    def __init__(
        self, buffer: Any, experts: Experts, topk_idx: Tensor, num_ids: int, sizes: Sizes
    ) -> None:
        self._buffer, self._topk_idx, self._sizes = buffer, topk_idx, sizes
        self._num_ids = num_ids
        self.num_slots = dist.get_world_size() * len(experts.experts)
        weights = dict(experts.named_parameters())
        self._enter, self._leave = weights["enter"].detach(), weights["leave"].detach()
        self._weights = torch.full(topk_idx.shape, 1 / sizes.num_topk, device=topk_idx.device)

    def _experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        gate, up = grouped(rows, self._enter, ends).chunk(2, 1)
        return grouped(F.silu(gate) * up, self._leave, ends)

    def throughput(self, x: Tensor) -> Tensor:
        """By `get_dispatch_layout`, `dispatch` and `combine`; rows received have a fixed size."""
        buffer, most = self._buffer, dist.get_world_size() * self._sizes.num_tokens
        to_ranks, to_nodes, to_experts, is_in_rank, _ = buffer.get_dispatch_layout(
            self._topk_idx, self._num_ids
        )
        received, slots, weights, _, handle, _ = buffer.dispatch(
            x,
            topk_idx=self._topk_idx,
            topk_weights=self._weights,
            num_tokens_per_rank=to_ranks,
            num_tokens_per_rdma_rank=to_nodes,
            num_tokens_per_expert=to_experts,
            is_token_in_rank=is_in_rank,
            num_worst_tokens=most,
        )
        num_slots, num_topk = len(self._enter), slots.shape[1]
        flat = torch.where(slots < 0, num_slots, slots).flatten()  # none behind the last slot
        order = flat.argsort(stable=True)
        counts = torch.zeros(num_slots + 1, dtype=torch.int64, device=flat.device)
        ends = counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_slots].cumsum(0)
        y = self._experts(received[order // num_topk], ends.int())
        y = y.nan_to_num(0)[order.argsort()].view(most, num_topk, -1)
        weights = torch.where(slots < 0, 0, weights).to(y.dtype)
        summed = torch.einsum("tkh,tk->th", torch.where(slots[..., None] < 0, 0, y), weights)
        return buffer.combine(summed, handle)[0]

    def low_latency(self, x: Tensor) -> Tensor:
        """By `low_latency_dispatch` and `low_latency_combine`, with rows packed for the GEMMs."""
        buffer = self._buffer
        received, counts, handle, _, _ = buffer.low_latency_dispatch(
            x, self._topk_idx, self._sizes.num_tokens, self._num_ids, use_fp8=False
        )
        num_slots, most, hidden = received.shape
        ends = counts.cumsum(0)
        # As many rows as all ranks' picks may be; the place of each among those received.
        number = torch.arange(self._num_rows(most, num_slots), device=x.device)
        slot = torch.searchsorted(ends, number, right=True).clamp(max=num_slots - 1)
        begin = ends - counts
        place = (slot * most + number - begin[slot]).clamp(max=num_slots * most - 1)
        rows = received.view(-1, hidden)[place]
        y = self._experts(rows, ends.int())
        is_row = (number < ends[-1])[:, None]
        # Places behind the last row are written with rows that nobody reads.
        target = torch.where(is_row[:, 0], place, num_slots * most)
        out = y.new_zeros(num_slots * most + 1, hidden)
        out[target] = torch.where(is_row, y, 0)
        out = out[:-1].view(num_slots, most, hidden)
        return buffer.low_latency_combine(out, self._topk_idx, self._weights, handle)[0]

    def _num_rows(self, most: int, num_slots: int) -> int:
        sizes = self._sizes
        return min(num_slots * most, dist.get_world_size() * sizes.num_tokens * sizes.num_topk)


def by_turns(topk_idx: Tensor, placement: Placement) -> Tensor:
    """[T, K] slots: each expert's picks take its copies one after another."""
    table = torch.from_numpy(placement.logical_to_physical.copy()).long()
    number = (table >= 0).sum(1)
    flat = topk_idx.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=placement.num_experts)
    nth = torch.empty_like(flat)
    nth[order] = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[flat[order]]
    return table[flat, nth % number[flat]].view_as(topk_idx)


def make_layers(
    way: str,
    group: dist.ProcessGroup,
    sizes: Sizes,
    live: list[Tensor],
    learned: list[Tensor],
    buffers: tuple[Any, Any],
) -> list[Layer]:
    """The layers of one way. Collective."""
    layers, rank = [], group.rank()
    shape: dict[str, Any] = {"num_ranks": group.size()}
    for number, (load, history) in enumerate(zip(live, learned, strict=True)):
        if way == "even":
            placement = Placement.from_history(
                history, num_redundant_per_rank=sizes.num_redundant, **shape
            )
        elif way == "balanced":
            placement = Placement.for_lp(
                history[None], num_redundant_per_rank=sizes.num_redundant, seed=0, **shape
            )
        else:
            placement = Placement.homes_only(sizes.num_experts, **shape)
        local = placement.physical_to_logical.reshape(group.size(), -1)[rank]
        experts = Experts(local.tolist(), number, sizes)
        seed = 100 * number + rank
        chosen = forced_picks(sizes) if way == "forced" else picks(load, sizes, seed)
        buffer, num_ids = buffers[0], sizes.num_experts
        if way == "even":
            chosen, num_ids = by_turns(chosen, placement), placement.num_physical_experts
        elif way == "balanced":
            buffer = buffers[1].view(placement)
        layers.append(Layer(buffer, experts, chosen.to(sizes.device), num_ids, sizes))
    return layers


def pass_of(layers: list[Layer], calls: str, x: Tensor) -> Callable[[], Tensor]:
    """A pass over all layers."""

    def run() -> Tensor:
        y = x
        for layer in layers:
            y = y + (layer.throughput(y) if calls == "throughput" else layer.low_latency(y))
        return y

    return run


def cleaning(buffer: Any, calls: str, sizes: Sizes, num_slots: int) -> Callable[[], None]:
    """Cleans a buffer for low-latency calls with another number of slots than the last ones."""
    if calls != "low-latency":
        return lambda: None
    return lambda: buffer.clean_low_latency_buffer(sizes.num_tokens, sizes.hidden, num_slots)


def captured(run: Callable[[], Tensor]) -> Callable[[], None]:
    """The replay of a graph of a pass."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], object], group: dist.ProcessGroup, on_gpu: bool) -> float:
    dist.barrier(group)
    if not on_gpu:
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def make_buffer(group: dist.ProcessGroup, all_sizes: list[Sizes], kinds: list[str]) -> Any:
    """The drop-in's buffer for all sizes, which is DeepEP's with `plain_of`. Collective.

    One buffer serves both kinds of calls, as in engines. DeepEP starts NVSHMEM with the first
    low-latency buffer, which must come before a layer's counts.
    """
    size, hidden = group.size(), all_sizes[0].hidden
    num_bytes = max(
        config.get_nvl_buffer_size_hint(2 * hidden, size)
        for config in (
            lplb_ep.Buffer.get_dispatch_config(size),
            lplb_ep.Buffer.get_combine_config(size),
        )
    )
    small = [s.num_tokens for s in all_sizes if s.num_tokens <= MAX_LOW_LATENCY]
    if "low-latency" not in kinds or not small:
        return lplb_ep.Buffer(group, num_bytes, explicitly_destroy=True)
    num_ids = all_sizes[0].num_experts + size * all_sizes[0].num_redundant
    return lplb_ep.Buffer(
        group,
        num_bytes,
        lplb_ep.Buffer.get_low_latency_rdma_size_hint(max(small), hidden, size, num_ids),
        low_latency_mode=True,
        num_qps_per_rank=num_ids // size,
        explicitly_destroy=True,
    )


def measure(
    group: dist.ProcessGroup,
    all_sizes: list[Sizes],
    kinds: list[str],
    live: list[Tensor],
    learned: list[Tensor],
    num_rounds: int,
) -> dict[str, dict[str, list[float]]]:
    """One rank's milliseconds of each round, by row of the table and way."""
    on_gpu = all_sizes[0].on_gpu
    if on_gpu:
        torch.cuda.set_device(group.rank())
    module = "deep_ep" if on_gpu else "lplb_ep.embedded"
    found: dict[str, dict[str, list[float]]] = {}
    buffer = make_buffer(group, all_sizes, kinds)
    plain = plain_of(buffer, module)
    for calls in kinds:
        for sizes in all_sizes:
            if calls == "low-latency" and sizes.num_tokens > MAX_LOW_LATENCY:
                continue
            generator = torch.Generator().manual_seed(group.rank())
            x = torch.randn(sizes.num_tokens, sizes.hidden, generator=generator)
            x = x.to(sizes.device, sizes.dtype)
            eager, clean, expected = {}, {}, None
            for way in WAYS:
                layers = make_layers(way, group, sizes, live, learned, (plain, buffer))
                clean[way] = cleaning(plain, calls, sizes, layers[0].num_slots)
                eager[way] = pass_of(layers, calls, x)
                clean[way]()
                out = eager[way]().float()
                expected = out if expected is None else expected
                if way != "forced":
                    error = float((out - expected).abs().max() / expected.abs().max())
                    assert error < (0.05 if on_gpu else 1e-4), f"{way} is off by {error}"
            modes: dict[str, dict[str, Callable[[], object]]] = {"eager": dict(eager)}
            if on_gpu:
                modes["graph"] = {way: captured(run) for way, run in eager.items()}
            for mode, runs in modes.items():
                times: dict[str, list[float]] = {way: [] for way in WAYS}
                for n in range(-2, num_rounds):
                    turn = n % len(WAYS)
                    for way in WAYS[turn:] + WAYS[:turn]:
                        clean[way]()
                        taken = milliseconds(runs[way], group, on_gpu)
                        if n >= 0:
                            times[way].append(taken)
                found[f"{calls}, {sizes.num_tokens} tokens, {mode}"] = times
            del eager, modes, layers, runs
    buffer.destroy()
    return found


def table_of(of_ranks: list[dict[str, dict[str, list[float]]]], num_layers: int) -> list[list[str]]:
    """A row for each kind of calls, size and mode."""
    rows = []
    for name in of_ranks[0]:
        rounds = {
            way: [max(times) for times in zip(*(rank[name][way] for rank in of_ranks), strict=True)]
            for way in WAYS
        }
        row = [name, *(f"{statistics.median(rounds[way]) / num_layers:.4f}" for way in WAYS)]
        for way in WAYS[1:]:
            ratios = [t / p - 1 for t, p in zip(rounds[way], rounds["plain"], strict=True)]
            error = 1.96 * statistics.stdev(ratios) / math.sqrt(len(ratios))
            row.append(f"{statistics.mean(ratios):+.1%} ± {error:.1%}")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording")
    parser.add_argument("--key", required=True)
    parser.add_argument("--learn-from", metavar="KEY", required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 30], help="recorded ones")
    parser.add_argument("--ranks", type=int, help="default: one for each GPU; embedded: 2")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", help="a rank")
    parser.add_argument("--calls", choices=CALLS, nargs="+", default=list(CALLS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--embedded", action="store_true", help="small, on the CPU")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--markdown", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    num_ranks = args.ranks or (2 if args.embedded else torch.cuda.device_count())
    if num_ranks < 1:
        parser.error("there is no CUDA device: --embedded measures on the CPU")
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, for an interval; got {args.rounds}")
    hidden, width = (512, 32) if args.embedded else (7168, 2048)
    first = Sizes(
        num_experts=args.experts,
        num_tokens=0,
        num_topk=args.topk,
        hidden=hidden,
        width=width,
        num_guests=0,
        num_redundant=2,
        num_warm=0,
        num_runs=0,
        on_gpu=not args.embedded,
    )
    tokens = args.tokens or ([8, 64] if args.embedded else [8, 32, 128, 512, 4096])
    live, learned = (
        [folded(np.asarray(counts[layer]), args.experts) for layer in args.layers]
        for counts in (
            load_recording(args.recording, key=key).counts.sum(0)
            for key in (args.key, args.learn_from)
        )
    )
    of_ranks = ranks.run(
        num_ranks,
        measure,
        [dataclasses.replace(first, num_tokens=number) for number in tokens],
        args.calls,
        live,
        learned,
        args.rounds,
        environ=environ_of(args.embedded),
        timeout=args.timeout,
    )
    ranks.close()
    rows = table_of(of_ranks, len(args.layers))
    head = ["ms a layer", *WAYS, *(f"{way} against plain" for way in WAYS[1:])]
    print(text_table(head, rows))
    if args.markdown:
        Path(args.markdown).write_text(markdown_table(head, rows))
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows, "ranks": of_ranks}, indent=1))


if __name__ == "__main__":
    main()
