"""Whole MoE layers at the size of DeepSeek-V3's experts: guests beside replicas and plain DeepEP.

    python benchmarks/whole_layer.py FILE --key LIVE --learn-from LEARNED [--ranks N]
        [--experts 128] [--guests 4] [--tokens 4096] [--shift] [--markdown FILE] [--json FILE]
    python benchmarks/whole_layer.py FILE ... --embedded   # small, on the CPU

Each rank has a GPU of its own. Layers run one after another: layout, dispatch, experts (grouped
GEMMs in and out), combine; then, with gradients, the same way back. All layers share one pool
of guests. Loads are recorded ones, folded to the number of experts; a rank's picks are drawn by
them. With `--shift` a layer's live load is that of another layer, as after a change of traffic.

- plain: DeepEP, experts in order.
- replicas: `Placement.for_lp` with two redundant slots a rank, learned on LEARNED.
- guests, in order: no replicas, homes in the router's order, G guest slots a rank.
- guests, placed: no replicas, homes by `for_lp` on LEARNED, G guest slots a rank.
- forced: DeepEP with picks that are equal for all experts, as a router forced into balance makes.

The time of a way is a pass over all layers, divided by their number, by the GPU's clock. It is the
slowest rank's median over passes. Outputs are compared with plain's in every way but forced. So are
gradients of the first layer's expert with most load, in the ways with guests.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lplb_ep
from lplb_ep import GuestPool, Guests, Placement
from lplb_ep.comm.collectives import everyone
from lplb_ep.tools.recordings import load_recording

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import ranks
from moe_layer import Combine, Dispatch

WAYS = ("plain", "replicas", "guests, in order", "guests, placed", "forced")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run, the same on every rank."""

    num_experts: int
    num_tokens: int
    num_topk: int
    hidden: int
    width: int
    num_guests: int
    num_redundant: int
    num_warm: int
    num_runs: int
    on_gpu: bool

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32


class Permute(torch.autograd.Function):
    """Rows of tokens in the order of their experts; the gradient sums a token's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor, here: Tensor) -> Tensor:
        ctx.save_for_backward(places, here)
        return x[rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        places, here = ctx.saved_tensors
        return _sum_rows(grad, places, here.to(grad.dtype)), None, None, None


class Unpermute(torch.autograd.Function):
    """Weighted sums of each token's rows."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weights: Tensor, order: Tensor, places: Tensor, here: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y, weights, order)
        return _sum_rows(y, places, (weights * here).to(y.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, weights, order = ctx.saved_tensors
        of_rows = grad[order // weights.shape[1]]
        of_weights = torch.zeros_like(weights)
        of_weights.view(-1)[order] = (of_rows * y).sum(1, dtype=weights.dtype)
        return of_rows * weights.view(-1)[order, None].to(y.dtype), of_weights, None, None, None


def _sum_rows(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """[N, hidden]: of each token the rows at `places` [N, K], weighted."""
    if not len(rows):
        return rows.new_zeros(len(places), rows.shape[1])
    return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)


class Share(torch.autograd.Function):
    """All rows, and those from a place on as well. Nobody needs the gradient of these in the first.

    With `Join`, rows of residents and guests are neither taken apart nor put together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        ctx.begin = begin
        return x.view_as(x), x[begin:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, behind: Tensor) -> Any:
        grad[ctx.begin :] = behind
        return grad, None


class Join(torch.autograd.Function):
    """Rows from a place on are written over those that are there."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, behind: Tensor) -> Tensor:
        ctx.begin = len(y) - len(behind)
        ctx.mark_dirty(y)
        y[ctx.begin :] = behind
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, grad[ctx.begin :]


def grouped(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Rows times their expert's matrix. Those behind the last expert's become anything."""
    if x.is_cuda:
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return torch._grouped_mm(x, weight, offs=ends.to(x.device, non_blocking=True))
    behind = len(x) - sum(counts)
    *parts, _ = x.split([*counts, behind])
    found = [part @ matrix for part, matrix in zip(parts, weight, strict=True)]
    return torch.cat([*found, x.new_full((behind, weight.shape[2]), torch.nan)])


def feed_forward(rows: Tensor, weights: dict[str, Tensor], counts: list[int]) -> Tensor:
    gate, up = grouped(rows, weights["enter"], counts).chunk(2, 1)
    return grouped(F.silu(gate) * up, weights["leave"], counts)


class Experts(nn.Module):
    """The gated feed-forward networks of a rank's resident slots, stacked."""

    def __init__(self, experts: list[int], layer: int, sizes: Sizes) -> None:
        super().__init__()
        self.experts = experts
        shapes = {
            "enter": (sizes.hidden, 2 * sizes.width),
            "leave": (sizes.width, sizes.hidden),
        }
        for name, shape in shapes.items():
            stack = torch.empty(len(experts), *shape, dtype=sizes.dtype, device=sizes.device)
            for row, expert in zip(stack, experts, strict=True):
                generator = torch.Generator(sizes.device).manual_seed(1000 * layer + expert)
                row.normal_(0, shape[0] ** -0.5, generator=generator)
            self.register_parameter(name, nn.Parameter(stack))

    def forward(
        self,
        x: Tensor,
        own: dict[str, Tensor],
        arrive: Callable[[], dict[str, Tensor]],
        counts: list[int],
    ) -> Tensor:
        """x: rows in the order of the slots; own: weights of the first; arrive: of those behind."""
        residents, guests = counts[: len(self.experts)], counts[len(self.experts) :]
        if not sum(guests):  # nothing to wait for
            return feed_forward(x, own, residents)
        x, behind = Share.apply(x, sum(residents))
        y = feed_forward(x, own, residents)
        return Join.apply(y, feed_forward(behind, arrive(), guests))


class MoE:
    """A layer on this rank: a buffer to call, experts, and a fixed routing."""

    def __init__(
        self,
        buffer: Any,
        experts: Experts,
        pool: GuestPool | None,
        guests: Guests | None,
        topk_idx: Tensor,
        sizes: Sizes,
    ) -> None:
        self.buffer, self.experts, self.guests = buffer, experts, guests
        self.pools = [] if pool is None else [pool]
        self.topk_idx, self.sizes = topk_idx, sizes
        self.table = torch.empty(0, dtype=torch.int32)  # of the last batch's guests
        self.topk_weights = torch.full(
            topk_idx.shape, 1 / sizes.num_topk, device=topk_idx.device, requires_grad=True
        )

    def __call__(self, x: Tensor) -> Tensor:
        x, weights, slots, counts, handle = Dispatch.apply(
            x, self.topk_weights, self.topk_idx, self.sizes.num_experts, self.buffer
        )
        own, arrive = dict(self.experts.named_parameters()), dict
        if self.guests is not None:  # they arrive while residents compute
            stay = self.pools[0].stay
            assert stay is not None, "a batch went home"
            self.table = stay.guests
            x, own, arrive = self.guests.split_weights(x)
        flat = slots.flatten()
        order = flat.argsort(stable=True)[len(flat) - sum(counts) :]
        places = torch.zeros_like(flat).scatter_(
            0, order, torch.arange(len(order), device=flat.device, dtype=flat.dtype)
        )
        places, here = places.view_as(slots), slots >= 0
        self.num_rows = sum(counts)
        rows = Permute.apply(x, order // slots.shape[1], places, here)
        y = self.experts(rows, own, arrive, counts)
        return Combine.apply(Unpermute.apply(y, weights, order, places, here), handle, self.buffer)


def folded(load: np.ndarray, num_experts: int) -> Tensor:
    """[E] load of neighbouring experts as one."""
    return torch.as_tensor(load).view(num_experts, -1).sum(1)


def picks(load: Tensor, sizes: Sizes, seed: int) -> Tensor:
    """[T, K] distinct experts, drawn with the load as weights."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(sizes.num_tokens, sizes.num_experts, generator=generator)
    keys = load.double().clamp(min=1e-3).log() - (-noise.double().log()).log()
    return keys.topk(sizes.num_topk, 1).indices


def forced_picks(sizes: Sizes) -> Tensor:
    """[T, K] distinct experts, each as often as the others."""
    step = sizes.num_experts // sizes.num_topk
    first = torch.arange(sizes.num_tokens)[:, None] % step
    return first + step * torch.arange(sizes.num_topk)


def measure(
    group: dist.ProcessGroup, sizes: Sizes, live: list[Tensor], learned: list[Tensor]
) -> dict[str, Any]:
    """One rank's: by way, medians and memory."""
    if sizes.on_gpu:
        torch.cuda.set_device(group.rank())
    library = importlib.import_module("deep_ep" if sizes.on_gpu else "lplb_ep.embedded")
    row_bytes, num_ranks = 2 * sizes.hidden, group.size()
    num_bytes = max(
        config.get_nvl_buffer_size_hint(row_bytes, num_ranks)
        for config in (
            lplb_ep.Buffer.get_dispatch_config(num_ranks),
            lplb_ep.Buffer.get_combine_config(num_ranks),
        )
    )
    plain = library.Buffer(group, num_bytes, explicitly_destroy=True)
    balanced = lplb_ep.Buffer(group, num_bytes, explicitly_destroy=True)
    generator = torch.Generator().manual_seed(group.rank())
    x = torch.randn(sizes.num_tokens, sizes.hidden, generator=generator)
    x = x.to(sizes.device, sizes.dtype)
    found: dict[str, Any] = {}
    expected: Tensor | None = None
    gradient: Tensor | None = None
    for way in WAYS:
        layers = make_layers(way, group, sizes, live, learned, plain, balanced)
        out = forward(layers, x).detach()
        if expected is None:
            expected = out
        elif way != "forced":
            error = float((out - expected).abs().max() / expected.abs().max())
            assert error < (0.05 if sizes.on_gpu else 1e-4), f"{way} differs from plain: {error}"
        found[way] = {
            "forward": passes(lambda layers=layers: forward(layers, x), group, sizes),
            "forward and backward": passes(
                lambda layers=layers: both_ways(layers, x), group, sizes
            ),
            **facts(layers),
        }
        bound = 0.05 if sizes.on_gpu else 1e-4
        if way == "plain" or way.startswith("guests"):
            got = gradient_of(int(live[0].argmax()), layers[0], group)
            gradient = got if gradient is None else gradient
            error = float((got - gradient).abs().max() / gradient.abs().max())
            assert error < bound, f"gradients of {way} differ from plain's: {error}"
        del layers
        if sizes.on_gpu:
            torch.cuda.empty_cache()
    for buffer in (plain, balanced):
        buffer.destroy()
    return found


def make_layers(
    way: str,
    group: dist.ProcessGroup,
    sizes: Sizes,
    live: list[Tensor],
    learned: list[Tensor],
    plain: Any,
    balanced: Any,
) -> list[MoE]:
    """The layers of one way. Collective."""
    num_guests = sizes.num_guests if way.startswith("guests") else 0
    num_redundant = sizes.num_redundant if way == "replicas" else 0
    fixed: dict[str, Any] = dict(num_ranks=group.size(), num_guests_per_rank=num_guests)
    made: list[tuple[Placement, Experts]] = []
    for number, load in enumerate(learned):
        if way in ("replicas", "guests, placed"):
            placement = Placement.for_lp(
                load[None], num_redundant_per_rank=num_redundant, seed=0, **fixed
            )
        else:
            placement = Placement.homes_only(sizes.num_experts, **fixed)
        local = placement.physical_to_logical.reshape(group.size(), -1)[group.rank()]
        made.append((placement, Experts([e for e in local.tolist() if e >= 0], number, sizes)))
    pool = GuestPool(group, num_guests, [e for _, e in made]) if num_guests else None
    layers = []
    for number, (placement, experts) in enumerate(made):
        guests = None
        if num_guests:
            guests = Guests(experts, placement, group, pool, layer_waits=True)
        uses_plan = way in ("replicas", "guests, in order", "guests, placed")
        seed = 100 * number + group.rank()
        chosen = forced_picks(sizes) if way == "forced" else picks(live[number], sizes, seed)
        layers.append(
            MoE(
                balanced.view(placement) if uses_plan else plain,
                experts,
                pool,
                guests,
                chosen.to(sizes.device),
                sizes,
            )
        )
    return layers


def forward(layers: list[MoE], x: Tensor) -> Tensor:
    with torch.no_grad():
        for layer in layers:
            x = x + layer(x)
    return x


def gradient_of(expert: int, layer: MoE, group: dist.ProcessGroup) -> Tensor:
    """[64, 2 width] the first rows of an expert's gradient, from the rank where it is at home."""
    held, mine = layer.experts.experts, None
    if expert in held:
        grad = layer.experts.enter.grad
        assert grad is not None, "the layer has run both ways"
        mine = grad[held.index(expert), :64].float().cpu()
    return next(one for one in everyone(group, mine) if one is not None)


def both_ways(layers: list[MoE], x: Tensor) -> None:
    for layer in layers:
        layer.experts.zero_grad()
    x = x.clone().requires_grad_()
    for layer in layers:
        x = x + layer(x)
    x.backward(torch.ones_like(x))


def passes(run: Callable[[], Any], group: dist.ProcessGroup, sizes: Sizes) -> list[float]:
    """Milliseconds of each pass over all layers."""
    times = []
    for _ in range(sizes.num_warm + sizes.num_runs):
        dist.barrier(group)
        if sizes.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
    return times[sizes.num_warm :]


def facts(layers: list[MoE]) -> dict[str, Any]:
    """Rows of this rank in each layer's last batch, and the memory of its experts in bytes."""
    weights = sum(p.numel() * p.itemsize for layer in layers for p in layer.experts.parameters())
    pools = {id(pool): pool.num_bytes for layer in layers for pool in layer.pools}
    return {
        "rows": [layer.num_rows for layer in layers],
        "copies": [int((layer.table >= 0).sum()) for layer in layers],
        "weights": weights,
        "pool": sum(pools.values()),
    }


def summary(of_ranks: list[dict[str, Any]], num_layers: int) -> dict[str, dict[str, float]]:
    """By way: milliseconds a layer, the worst layer's balance, copies, gigabytes of a rank."""
    found = {}
    for way in WAYS:
        ranks_ = [of_rank[way] for of_rank in of_ranks]
        times = {
            what: statistics.median(map(max, *(rank[what] for rank in ranks_))) / num_layers
            for what in ("forward", "forward and backward")
        }
        rows = list(zip(*(rank["rows"] for rank in ranks_), strict=True))
        found[way] = {
            **times,
            "largest / mean rows": max(len(of) * max(of) / sum(of) for of in rows),
            "copies a layer": statistics.mean(ranks_[0]["copies"]),
            "weights, GB a layer": max(rank["weights"] for rank in ranks_) / num_layers / 1e9,
            "pool, GB": max(rank["pool"] for rank in ranks_) / 1e9,
        }
    return found


def markdown(found: dict[str, dict[str, float]]) -> str:
    """A table with the ways as rows."""
    columns = list(next(iter(found.values())))
    lines = [f"| ms a layer | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    lines += [
        f"| {way} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |"
        for way, row in found.items()
    ]
    return "\n".join(lines)


def environ_of(embedded: bool) -> dict[str, str]:
    """The settings of ranks that run whole layers."""
    return {
        "LPLB_EP": "1",
        "LPLB_EP_REPLICAS": "valid",  # equal experts are made alike
        "LPLB_EP_BACKEND": "embedded" if embedded else "deep_ep",
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording")
    parser.add_argument("--key", required=True)
    parser.add_argument("--learn-from", metavar="KEY", required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 30, 50], help="recorded ones")
    parser.add_argument("--shift", action="store_true", help="each live load is another layer's")
    parser.add_argument("--ranks", type=int, help="default: one for each GPU; embedded: 2")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--guests", type=int, default=4, help="a rank")
    parser.add_argument("--tokens", type=int, help="a rank; default 4096, embedded 512")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--embedded", action="store_true", help="small, on the CPU")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--markdown", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    args.ranks = args.ranks or (2 if args.embedded else torch.cuda.device_count())
    if args.ranks < 1:
        parser.error("there is no CUDA device: --embedded measures on the CPU")
    args.tokens = args.tokens or (512 if args.embedded else 4096)
    return args


def main() -> None:
    args = parse()
    hidden, width = (64, 32) if args.embedded else (7168, 2048)
    sizes = Sizes(
        num_experts=args.experts,
        num_tokens=args.tokens,
        num_topk=8,
        hidden=hidden,
        width=width,
        num_guests=args.guests,
        num_redundant=2,
        num_warm=3,
        num_runs=args.runs,
        on_gpu=not args.embedded,
    )
    live, learned = (
        load_recording(args.recording, key=key).counts.sum(0) for key in (args.key, args.learn_from)
    )
    away = len(live) // 2 if args.shift else 0
    of_ranks = ranks.run(
        args.ranks,
        measure,
        sizes,
        [folded(live[(layer + away) % len(live)], args.experts) for layer in args.layers],
        [folded(learned[layer], args.experts) for layer in args.layers],
        environ=environ_of(args.embedded),
        timeout=args.timeout,
    )
    ranks.close()
    found = summary(of_ranks, len(args.layers))
    print(text := markdown(found))
    if args.markdown:
        Path(args.markdown).write_text(text + "\n")
    if args.json:
        Path(args.json).write_text(json.dumps({"ms": found, "ranks": of_ranks}, indent=1))


if __name__ == "__main__":
    main()
