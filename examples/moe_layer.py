"""A Mixture-of-Experts language model trained over 8 ranks, every batch balanced.

Read it from top to bottom as the way to integrate lplb_ep. What a plain DeepEP layer does not
have is marked with (1) to (6):

    (1) the buffer comes from lplb_ep, and the environment variable LPLB_EP switches it
    (2) the router picks logical experts, the layer holds slots: P / R of them on each rank
    (3) each layer calls the buffer through a view with its own placement
    (4) gradients of replicas are summed into their home before the optimizer's step
    (5) weights of homes are copied to their replicas after it
    (6) a new placement gets its weights from the logical experts of the old one

Run it with `python examples/moe_layer.py` (8 processes on this machine) or under `torchrun`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import lplb_ep
from lplb_ep import Placement, Replicas

HIDDEN, EXPERT_WIDTH, NUM_LAYERS, SEQUENCE, VOCABULARY = 64, 64, 2, 64, 256


# --- tokens to experts and back, as in DeepEP's README -------------------------------------------


class Dispatch(torch.autograd.Function):
    """Sends each token to the ranks of its experts; the gradient is a combine."""

    @staticmethod
    def forward(ctx, x, topk_weights, topk_idx, num_experts, buffer):
        # The call that plans: the drop-in counts, exchanges, solves and rewrites in here.
        per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(
            topk_idx, num_experts
        )
        recv_x, recv_topk_idx, recv_topk_weights, recv_counts, handle, _ = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(recv_topk_idx)
        return recv_x, recv_topk_weights, recv_topk_idx, recv_counts, handle

    @staticmethod
    def backward(ctx, grad_x, grad_weights, *_):
        grad_x, grad_weights, _ = ctx.buffer.combine(
            grad_x.contiguous(), ctx.handle, topk_weights=grad_weights
        )
        return grad_x, grad_weights, None, None, None


class Combine(torch.autograd.Function):
    """Sums what a token's experts made of it; the gradient is a cached dispatch."""

    @staticmethod
    def forward(ctx, x, handle, buffer):
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(x, handle)[0]

    @staticmethod
    def backward(ctx, grad):
        grad, *_ = ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)
        return grad, None, None


# --- the model -----------------------------------------------------------------------------------


class Experts(nn.Module):
    """The feed-forward networks of this rank's slots, stacked."""

    def __init__(self, num_local_slots: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_local_slots, HIDDEN, EXPERT_WIDTH) / HIDDEN**0.5)
        self.w2 = nn.Parameter(
            torch.randn(num_local_slots, EXPERT_WIDTH, HIDDEN) / EXPERT_WIDTH**0.5
        )

    def forward(self, x, slots, weights):
        """x [N, hidden], slots and weights [N, K]: local slot of each pick, -1 = not here."""
        out = torch.zeros_like(x)
        for slot, (w1, w2) in enumerate(zip(self.w1, self.w2, strict=True)):
            row, column = torch.nonzero(slots == slot, as_tuple=True)
            y = F.gelu(x[row] @ w1) @ w2
            out = out.index_add(0, row, y * weights[row, column, None])
        return out


class MoE(nn.Module):
    """Top-k routed experts. The router knows E logical experts; the slots are the placement's."""

    def __init__(self, num_experts: int, num_local_slots: int, num_topk: int) -> None:
        super().__init__()
        self.num_experts, self.num_topk = num_experts, num_topk
        self.router = nn.Linear(HIDDEN, num_experts, bias=False)
        self.experts = Experts(num_local_slots)  # (2)
        self.replicas: Replicas | None = None
        self.pick = None  # with --trace: picks experts in the router's place

    def place(self, placement: Placement, buffer, group) -> None:
        """Gives the layer a placement, and its experts their weights. Collective."""
        old, self.placement = self.replicas, placement
        self.replicas = Replicas(self.experts, placement, group)
        if old is not None:  # (6)
            experts = [{}] * group.size()
            dist.all_gather_object(experts, {k: v.clone() for k, v in old.state_dict().items()})
            self.replicas.load_state_dict({k: v for part in experts for k, v in part.items()})
        self.replicas.copy_weights()  # (5)
        self.buffer = buffer.view(placement)  # (3)

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        if self.pick is None:
            topk_idx = scores.topk(self.num_topk, dim=-1).indices
        else:
            topk_idx = self.pick(len(x), self.num_topk)
        weights = scores.gather(-1, topk_idx)
        recv_x, recv_weights, recv_slots, recv_counts, handle = Dispatch.apply(
            x, weights / weights.sum(-1, keepdim=True), topk_idx, self.num_experts, self.buffer
        )
        self.topk_idx, self.received = topk_idx, sum(recv_counts)  # for the report
        return Combine.apply(self.experts(recv_x, recv_slots, recv_weights), handle, self.buffer)


class Block(nn.Module):
    def __init__(self, **moe) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoE(**moe)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.moe(self.norm2(x).flatten(0, 1)).view_as(x)


class LanguageModel(nn.Module):
    """A small transformer over bytes."""

    def __init__(self, **moe) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.position = nn.Parameter(torch.randn(SEQUENCE, HIDDEN) * 0.02)
        self.blocks = nn.ModuleList(Block(**moe) for _ in range(NUM_LAYERS))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# --- training ------------------------------------------------------------------------------------


def text() -> torch.Tensor:
    """The language reference that comes with every Python, as bytes."""
    from pydoc_data.topics import topics

    return torch.frombuffer(bytearray("\n\n".join(topics.values()).encode()), dtype=torch.uint8)


def recorded_routing(path: str, layers: list[MoE], generator: torch.Generator) -> None:
    """Lets a recording choose the experts: each token's K are drawn by the recorded loads."""
    from lplb_ep.report import load_recording

    counts = load_recording(path).counts.sum(0)  # [layers, experts]
    for number, layer in enumerate(layers):
        log_load = counts[number * len(counts) // len(layers)].double().clamp(min=1e-3).log()

        def pick(num_tokens, num_topk, log_load=log_load):
            noise = torch.rand(num_tokens, len(log_load), generator=generator, dtype=torch.float64)
            return (log_load - (-noise.log()).log()).topk(num_topk, dim=-1).indices  # Gumbel top-k

        layer.pick = pick


class Trainer:
    """One rank's part of the training."""

    def __init__(self, args: argparse.Namespace, group: dist.ProcessGroup) -> None:
        self.args, self.group = args, group
        self.rank, self.num_ranks = group.rank(), group.size()
        num_local_slots = args.experts // self.num_ranks + args.redundant
        torch.manual_seed(0)  # the dense weights are the same on every rank, ...
        self.model = LanguageModel(
            num_experts=args.experts, num_local_slots=num_local_slots, num_topk=args.topk
        ).to(args.dtype)
        self.layers = [block.moe for block in self.model.blocks]
        generator = torch.Generator().manual_seed(1 + self.rank)  # ... the experts are not
        for layer in self.layers:
            for weight in layer.experts.parameters():
                weight.data.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        self.picker = torch.Generator()
        if args.trace:
            recorded_routing(args.trace, self.layers, self.picker)
        # One buffer serves all layers; the environment is read when it is made.
        self.buffer = lplb_ep.Buffer(group)  # (1)
        self.home_buffer = None
        if args.balance == "both":
            os.environ["LPLB_EP"] = "home"
            self.home_buffer = lplb_ep.Buffer(group)
        self.place([torch.ones(args.experts)] * NUM_LAYERS)
        self.dense = [p for name, p in self.model.named_parameters() if ".experts." not in name]
        self.text, self.sampler = text(), torch.Generator().manual_seed(100 + self.rank)

    def place(self, loads: list[torch.Tensor]) -> None:
        """Places each layer's experts for a load [E]. Collective."""
        for layer, load in zip(self.layers, loads, strict=True):
            placement = lplb_ep.Placement.from_history(
                load, num_ranks=self.num_ranks, num_redundant_per_rank=self.args.redundant
            )
            layer.place(placement, self.buffer, self.group)
        # Rows of its state belong to experts that have moved: Adam's moments start anew.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.args.lr)

    def batch(self) -> torch.Tensor:
        start = torch.randint(
            len(self.text) - SEQUENCE, (self.args.sequences, 1), generator=self.sampler
        )
        return self.text[start + torch.arange(SEQUENCE + 1)].long()

    def gradients(self, tokens: torch.Tensor) -> torch.Tensor:
        """Leaves the gradients of the mean loss over all ranks; returns that loss. Collective."""
        self.picker.manual_seed(int(tokens.sum()))  # a batch is routed alike in every pass
        self.model.zero_grad()
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / self.num_ranks
        loss.backward()
        for layer in self.layers:
            layer.replicas.reduce_gradients()  # (4)
        # Experts are whole here; what every rank holds is summed over the ranks.
        flat = torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in self.dense)])
        dist.all_reduce(flat, group=self.group)
        loss, *grads = flat.split([1, *(p.numel() for p in self.dense)])
        for parameter, grad in zip(self.dense, grads, strict=True):
            parameter.grad.copy_(grad.view_as(parameter))
        return loss

    def step(self) -> None:
        self.optimizer.step()
        for layer in self.layers:
            layer.replicas.copy_weights()  # (5)

    def gradients_at_home(self, tokens: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        """The same with every token at its home: the loss, and all gradients."""
        views = [layer.buffer for layer in self.layers]
        for layer in self.layers:
            layer.buffer = self.home_buffer.view(layer.placement)
        loss, grads = float(self.gradients(tokens)), self.logical_gradients()
        for layer, view in zip(self.layers, views, strict=True):
            layer.buffer = view
            layer.replicas.copy_weights()  # stale after reduce_gradients: a step should follow
        return loss, grads

    def difference(self, grads: list[torch.Tensor]) -> float:
        """The largest difference from `grads`, over the largest gradient. Collective."""
        # A rank may be home to no expert, and then has no gradients of any.
        pairs = [(a, b) for a, b in zip(self.logical_gradients(), grads, strict=True) if len(b)]
        out = torch.tensor(
            [
                max(float((a - b).abs().max()) for a, b in pairs),
                max(float(b.abs().max()) for _, b in pairs),
            ],
            dtype=torch.float64,
        )
        dist.all_reduce(out, op=dist.ReduceOp.MAX, group=self.group)
        return float(out[0] / out[1])

    def logical_gradients(self) -> list[torch.Tensor]:
        """Of every weight the model is made of: dense ones, and the experts whose home is here."""
        grads = [p.grad.clone() for p in self.dense]
        for layer in self.layers:
            home = torch.tensor(layer.placement.home)
            here = home[home // layer.placement.num_local_slots == self.rank]
            local = here.long() % layer.placement.num_local_slots
            grads += [p.grad[local].clone() for p in layer.experts.parameters()]
        return grads


@dataclass
class Record:
    """What a rank keeps of the training, for the report."""

    placements: list[list[Placement]] = field(default_factory=list)  # [steps][layers]
    picks: list[torch.Tensor] = field(default_factory=list)  # [steps] of [layers, E]
    received: list[torch.Tensor] = field(default_factory=list)  # [steps] of [layers]
    checks: list[tuple[int, float, float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, layers: list[MoE], loss: float) -> None:
        self.losses.append(loss)
        self.placements.append([layer.placement for layer in layers])
        self.picks.append(
            torch.stack(
                [torch.bincount(m.topk_idx.flatten(), minlength=m.num_experts) for m in layers]
            )
        )
        self.received.append(torch.tensor([layer.received for layer in layers]))


def train(args: argparse.Namespace, group: dist.ProcessGroup) -> tuple[Trainer, Record]:
    trainer, record = Trainer(args, group), Record()
    start = time.perf_counter()
    for step in range(args.steps):
        if step == args.place_at:
            # What the experts of each layer had to do lately, on all ranks.
            loads = sum(record.picks[-args.place_at :])
            dist.all_reduce(loads, group=group)
            trainer.place(list(loads))
        tokens = trainer.batch()
        compared = args.balance == "both" and step in (0, args.steps // 2, args.steps - 1)
        if compared:
            home_loss, home_grads = trainer.gradients_at_home(tokens)
        loss = trainer.gradients(tokens)
        if compared:
            record.checks.append((step, float(loss), home_loss, trainer.difference(home_grads)))
        record.add(trainer.layers, float(loss))
        trainer.step()
        if group.rank() == 0:
            progress(step + 1, args.steps, f"loss {float(loss):.3f}")
    record.seconds = time.perf_counter() - start
    return trainer, record


# --- the report ----------------------------------------------------------------------------------


def progress(done: int, total: int, note: str) -> None:
    if sys.stdout.isatty() or done == total or done % max(1, total // 10) == 0:
        bar = "█" * (30 * done // total)
        end = "\r" if sys.stdout.isatty() and done < total else "\n"
        print(f"  {bar:░<30} {done:>4}/{total} steps  {note}", end=end, flush=True)


def median_ms(function, times: int = 21) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def plan_times(trainer: Trainer) -> tuple[float, float]:
    """Milliseconds of a plan: with the counts of all ranks at hand, and with their exchange."""
    layer, group = trainer.layers[-1], trainer.group
    exchanging = lplb_ep.Planner(layer.placement, group)
    given = lplb_ep.Planner(layer.placement, rank=group.rank(), counts="given")
    counts, alone = exchanging(layer.topk_idx).counts, 0.0
    if group.rank() == 0:  # while the others wait
        alone = median_ms(lambda: given(layer.topk_idx, counts=counts))
    dist.barrier(group)
    return alone, median_ms(lambda: exchanging(layer.topk_idx))


def report(args: argparse.Namespace, trainer: Trainer, record: Record) -> None:
    """Prints the tables and draws the picture, on rank 0; collective."""
    from lplb_ep.report import plot_training, text_table

    group, num_ranks = trainer.group, trainer.num_ranks
    picks, received = torch.stack(record.picks), torch.stack(record.received)
    dist.all_reduce(picks, group=group)  # [steps, layers, E]
    everyone = [torch.empty_like(received) for _ in range(num_ranks)]
    dist.all_gather(everyone, received, group=group)
    after = torch.stack(everyone, dim=-1)  # [steps, layers, R]
    alone_ms, exchanged_ms = plan_times(trainer)
    if trainer.rank:
        return

    before = torch.zeros_like(after)
    bound = torch.zeros(after.shape[:2], dtype=torch.float64)
    for step, placements in enumerate(record.placements):
        for layer, placement in enumerate(placements):
            home_rank = torch.tensor(placement.home_rank).long()
            before[step, layer].index_add_(0, home_rank, picks[step, layer])
            bound[step, layer] = lplb_ep.solve(picks[step, layer], placement).lower_bound
    mean = after.double().mean(-1)

    def row(name: str, steps: slice, layer: int) -> list[str]:
        numbers = [
            (before[steps, layer].amax(-1) / mean[steps, layer]),
            (after[steps, layer].amax(-1) / mean[steps, layer]),
            (bound[steps, layer] / mean[steps, layer]),
        ]
        return [name, *(f"{n.mean():.3f}" for n in numbers), *(f"{n.max():.3f}" for n in numbers)]

    early, late = slice(0, args.place_at), slice(args.place_at, None)
    rows = [
        row(f"layer {layer}, {name}", steps, layer)
        for name, steps in (("placed evenly", early), ("placed by load", late))
        for layer in range(NUM_LAYERS)
    ]
    header = ["max / mean rank load", "home", "plan", "bound", "home", "plan", "bound"]
    print(f"\nImbalance, mean and worst of the steps (mode {args.balance})\n")
    print(text_table(header, rows))
    print("\nPlan of a batch on this machine, median\n")
    print(
        text_table(
            ["", "ms"],
            [
                ["count, solve, split, rewrite", f"{alone_ms:.2f}"],
                [f"with the exchange, {num_ranks} ranks at once", f"{exchanged_ms:.2f}"],
            ],
        )
    )
    if record.checks:
        print("\nBalanced against every token at home: the same step, twice\n")
        print(
            text_table(
                ["step", "loss, balanced", "loss, home", "gradients differ by"],
                [[str(s), f"{a:.9f}", f"{b:.9f}", f"{d:.1e}"] for s, a, b, d in record.checks],
            )
        )
    picture = Path(args.out)
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_training(
        picture,
        rank_load_before=before[:, 0],
        rank_load_after=after[:, 0],
        lower_bound=bound[:, 0],
        title=f"MoE layer 0: {args.experts} experts on {num_ranks} ranks, "
        f"{args.redundant} redundant slots each",
        marks={args.place_at: "placed by load"},
    )
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}[args.dtype]
    for step, balanced, home, difference in record.checks:
        if not (abs(balanced - home) <= tolerance * home and difference <= tolerance):
            sys.exit(f"step {step}: balanced and home differ by more than {tolerance}")
    print(f"\n{args.steps} steps in {record.seconds:.0f} s; picture: {picture}")


# --- processes -----------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small MoE model, every batch balanced.")
    parser.add_argument(
        "--balance",
        choices=("home", "on", "both"),
        default={"1": "on", "home": "home"}.get(os.environ.get("LPLB_EP", ""), "both"),
        help="every token at home; balanced; or balanced, and compared with home at three steps "
        "(default: by LPLB_EP, else both)",
    )
    parser.add_argument("--trace", metavar="FILE", help="a recording that drives the routing")
    parser.add_argument("--ranks", type=int, default=8, help="processes to start (not in torchrun)")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--redundant", type=int, default=2, help="redundant slots on each rank")
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--place-at", type=int, help="step to place anew by load; default steps/4")
    parser.add_argument("--sequences", type=int, default=8, help=f"of {SEQUENCE} bytes, a rank")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--out", default="out/moe_layer.png", help="the picture")
    args = parser.parse_args(argv)
    args.dtype = getattr(torch, args.dtype)
    args.ranks = int(os.environ.get("WORLD_SIZE", args.ranks))  # torchrun's
    args.place_at = max(1, args.steps // 4) if args.place_at is None else args.place_at
    if args.trace:
        from lplb_ep.report import load_recording

        args.experts = load_recording(args.trace).num_experts
    for name, least in (("ranks", 1), ("topk", 1), ("sequences", 1), ("redundant", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}; got {getattr(args, name)}")
    if not 1 <= args.place_at < args.steps:
        parser.error(
            f"--place-at must be in [1, --steps); got {args.place_at} of {args.steps} steps"
        )
    if args.topk > args.experts:
        parser.error(f"--topk must be at most the {args.experts} experts; got {args.topk}")
    if args.ranks == 1 and args.redundant:
        parser.error("--redundant must be 0 on a single rank: a copy there helps no plan")
    if args.experts % args.ranks:
        parser.error(f"--experts must be a multiple of the {args.ranks} ranks; got {args.experts}")
    return args


def main(args: argparse.Namespace, rank: int | None = None, store: str | None = None) -> None:
    """One rank's program."""
    torch.set_num_threads(1)
    os.environ["LPLB_EP"] = "home" if args.balance == "home" else "1"
    if store is None:
        dist.init_process_group("gloo")  # torchrun's environment
    else:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=args.ranks)
    if dist.get_rank() == 0:
        print(
            f"{dist.get_world_size()} ranks, {args.experts} experts, top-{args.topk}, "
            f"{args.redundant} redundant slots a rank, "
            f"buffers of {lplb_ep.Buffer.__mro__[1].__module__}"
        )
    report(args, *train(args, dist.group.WORLD))
    dist.destroy_process_group()


def launch(rank: int, args: argparse.Namespace, store: str) -> None:
    main(args, rank, store)


if __name__ == "__main__":
    arguments = parse()
    if "RANK" in os.environ:
        main(arguments)
    else:
        import multiprocessing

        # The ranks are forked from a server that has imported what takes long.
        multiprocessing.set_forkserver_preload(
            ["torch._dynamo", "lplb_ep.buffer", "lplb_ep.embedded", "lplb_ep.report"]
        )
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                launch,
                (arguments, f"{folder}/store"),
                nprocs=arguments.ranks,
                start_method="forkserver",
            )
