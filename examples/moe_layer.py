"""A Mixture-of-Experts language model trained over 8 ranks, every batch balanced.

Read it from top to bottom as the way to integrate lplb_ep. What a plain DeepEP layer does not
have is marked with (1) to (4):

    (1) The buffer comes from lplb_ep, and the environment variable LPLB_EP switches it.
    (2) The router picks logical experts. A rank has slots for its own experts, and behind them
        slots for guests. Guests are experts of other ranks, which come for a batch that needs them.
    (3) Each layer calls the buffer through a view with its own placement.
    (4) The experts' weights come from `Guests`. The weights of guests are fetched while tokens are
        dispatched. Their gradients are home before the optimizer sees them.

Guests need no more. Static copies (`--guests 0 --redundant 2`) take three further steps:

    (5) Gradients of replicas are summed into their home before the optimizer's step.
    (6) Weights of homes are copied to their replicas after it.
    (7) A new placement is made for the recent load, with the weights of the old one's experts.

Run it with `python examples/moe_layer.py` (8 processes on this machine) or under `torchrun`. Where
DeepEP is installed and there is a GPU, it runs on GPUs. Elsewhere it runs on the CPU with lplb_ep's
embedded buffers. It says which. report.py measures, checks and draws.
"""

from __future__ import annotations

import argparse
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from report import Observer, writable_picture
from torch import nn

import lplb_ep
from lplb_ep import GuestPool, Guests, Placement, Replicas
from lplb_ep.deepep.drop_in import choose_backend
from lplb_ep.settings import Settings

EXPERT_WIDTH, NUM_LAYERS, SEQUENCE, VOCABULARY = 64, 2, 64, 256


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
            grad_x.contiguous(), ctx.handle, topk_weights=grad_weights.contiguous()
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

    def __init__(self, num_slots: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_slots, hidden, EXPERT_WIDTH) / hidden**0.5)
        self.w2 = nn.Parameter(torch.randn(num_slots, EXPERT_WIDTH, hidden) / EXPERT_WIDTH**0.5)

    def forward(self, x, slots, weights, guests):
        """x [N, hidden], slots and weights [N, K]: local slot of each pick, -1 = not here."""
        own = [*zip(self.w1, self.w2, strict=True)]
        if guests is not None:  # (4)
            x, stacks = guests.weights(x)
            w1, w2 = ([*residents, *others] for residents, others in stacks.values())
            own = [*zip(w1, w2, strict=True)]
        out = torch.zeros_like(x)
        for slot, (w1, w2) in enumerate(own):
            row, column = torch.nonzero(slots == slot, as_tuple=True)
            y = F.gelu(x[row] @ w1) @ w2
            out = out.index_add(0, row, y * weights[row, column, None])
        return out


class MoE(nn.Module):
    """Top-k routed experts. The router knows E logical experts; the slots are the placement's."""

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        num_slots: int,
        num_topk: int,
        row_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_experts, self.num_topk = num_experts, num_topk
        self.row_dtype = row_dtype  # of rows that are dispatched and combined
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.experts = Experts(num_slots, hidden)  # (2)
        self.guests: Guests | None = None
        self.replicas: Replicas | None = None

    def place(self, placement: Placement, buffer, group, pool: GuestPool | None) -> None:
        """Gives the layer a placement, and its experts their weights. Collective."""
        old, self.placement = self.replicas, placement
        if pool is not None:
            self.guests = Guests(self.experts, placement, group, pool)  # (4)
        self.replicas = Replicas(self.experts, placement, group)
        if old is not None:  # (7)
            experts = [{}] * group.size()
            own = {k: v.to("cpu", copy=True) for k, v in old.state_dict().items()}
            dist.all_gather_object(experts, own)
            self.replicas.load_state_dict({k: v for part in experts for k, v in part.items()})
        self.replicas.copy_weights()  # (6)
        self.buffer = buffer.view(placement)  # (3)

    def choose(self, scores):
        return scores.topk(self.num_topk, dim=-1).indices

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        topk_idx = self.choose(scores)
        weights = scores.gather(-1, topk_idx)
        weights = weights / weights.sum(-1, keepdim=True)
        recv_x, recv_weights, recv_slots, recv_counts, handle = Dispatch.apply(
            x.to(self.row_dtype), weights, topk_idx, self.num_experts, self.buffer
        )
        self.topk_idx, self.received = topk_idx, sum(recv_counts)  # this rank's, of this batch
        out = self.experts(recv_x.to(x.dtype), recv_slots, recv_weights, self.guests)
        return Combine.apply(out.to(self.row_dtype), handle, self.buffer).to(x.dtype)

    def picks(self) -> torch.Tensor:
        """[E]: how many tokens of this rank's last batch picked each expert."""
        return torch.bincount(self.topk_idx.flatten().cpu(), minlength=self.num_experts)


class Block(nn.Module):
    def __init__(self, hidden: int, **moe) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.moe = MoE(hidden, **moe)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.moe(self.norm2(x).flatten(0, 1)).view_as(x)


class LanguageModel(nn.Module):
    """A small transformer over bytes."""

    def __init__(self, hidden: int, **moe) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.position = nn.Parameter(torch.randn(SEQUENCE, hidden) * 0.02)
        self.blocks = nn.ModuleList(Block(hidden, **moe) for _ in range(NUM_LAYERS))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, VOCABULARY)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# --- training ------------------------------------------------------------------------------------


def texts() -> list[torch.Tensor]:
    """The language reference that comes with every Python, and then tables of numbers, as bytes."""
    from pydoc_data.topics import topics

    numbers = (f"{n:6d} {n * n:12d} {n**0.5:12.6f}\n" for n in range(20_000))
    return [
        torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        for text in ("\n\n".join(topics.values()), "".join(numbers))
    ]


class Trainer:
    """One rank's part of the training."""

    def __init__(self, args: argparse.Namespace, group: dist.ProcessGroup) -> None:
        self.args, self.group = args, group
        self.rank, self.num_ranks = group.rank(), group.size()
        torch.manual_seed(0)  # the dense weights are the same on every rank, ...
        self.model = LanguageModel(
            hidden=args.hidden,
            num_experts=args.experts,
            num_slots=args.experts // self.num_ranks + args.redundant,
            num_topk=args.topk,
            row_dtype=args.dtype,
        ).to(torch.float32 if args.dtype == torch.bfloat16 else args.dtype)
        generator = torch.Generator().manual_seed(1 + self.rank)  # ... the experts are not
        for block in self.model.blocks:
            for weight in block.moe.experts.parameters():
                weight.data.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        self.model.to(args.device)
        self.layers = [block.moe for block in self.model.blocks]
        self.dense = [p for name, p in self.model.named_parameters() if ".experts." not in name]
        self.buffer, self.pool = self.make_buffer(), None
        if args.guests:  # one serves all layers
            experts = [layer.experts for layer in self.layers]
            self.pool = GuestPool(group, args.guests, experts)  # (4)
        self.place(torch.ones(NUM_LAYERS, args.experts))  # no load is known yet
        self.texts, self.sampler = texts(), torch.Generator().manual_seed(100 + self.rank)

    def make_buffer(self):
        """One serves all layers; the environment is read when it is made. Collective."""
        kind, num_ranks = lplb_ep.Buffer, self.num_ranks  # (1)
        if self.args.shared:
            kind.set_num_sms(4)  # as many as run at once on a rank's part of a GPU
        configs = kind.get_dispatch_config(num_ranks), kind.get_combine_config(num_ranks)
        row_bytes = 2 * self.args.hidden
        sizes = [config.get_nvl_buffer_size_hint(row_bytes, num_ranks) for config in configs]
        return kind(self.group, max(sizes), explicitly_destroy=True)

    def place(self, loads: torch.Tensor) -> None:
        """Places each layer's experts for loads [layers, E], equal on all ranks. Collective."""
        for layer, load in zip(self.layers, loads, strict=True):
            placement = Placement.from_history(
                load,
                num_ranks=self.num_ranks,
                num_redundant_per_rank=self.args.redundant,
                num_guests_per_rank=self.args.guests,
            )
            layer.place(placement, self.buffer, self.group, self.pool)
        experts = [p for layer in self.layers for p in layer.replicas.optimizer_parameters()]
        # Rows of its state belong to experts that have moved: Adam's moments start anew.
        self.optimizer = torch.optim.AdamW([*self.dense, *experts], lr=self.args.lr)
        self.load = torch.zeros(NUM_LAYERS, self.args.experts, dtype=torch.int64)

    def place_by_load(self) -> None:
        """Places the experts for what they had to do since they were placed. Collective."""
        dist.all_reduce(self.load, group=self.group)
        self.place(self.load)  # (7)

    def batch(self, step: int) -> torch.Tensor:
        text = self.texts[step >= self.args.shift_at]
        start = torch.randint(
            len(text) - SEQUENCE, (self.args.sequences, 1), generator=self.sampler
        )
        return text[start + torch.arange(SEQUENCE + 1)].long().to(self.args.device)

    def gradients(self, tokens: torch.Tensor) -> float:
        """Leaves the gradients of the mean loss over all ranks; returns that loss. Collective."""
        self.model.zero_grad()
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / self.num_ranks
        loss.backward()
        for layer in self.layers:
            layer.replicas.reduce_gradients()  # (5)
        # Experts are whole here; what every rank holds is summed over the ranks.
        flat = torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in self.dense)])
        dist.all_reduce(flat, group=self.group)
        loss, *grads = flat.split([1, *(p.numel() for p in self.dense)])
        for parameter, grad in zip(self.dense, grads, strict=True):
            parameter.grad.copy_(grad.view_as(parameter))
        return float(loss)

    def step(self) -> None:
        self.optimizer.step()
        for layer in self.layers:
            layer.replicas.copy_weights()  # (6)
        self.load += torch.stack([layer.picks() for layer in self.layers])


def train(args: argparse.Namespace) -> None:
    """One rank's program."""
    torch.set_num_threads(1)
    trainer = Trainer(args, dist.group.WORLD)
    observer = Observer(args, trainer)  # measures and checks; nothing of the training needs it
    for step in range(args.steps):
        if step == args.place_at and args.redundant:
            trainer.place_by_load()
        tokens = trainer.batch(step)
        observer.before(step, tokens)
        loss = trainer.gradients(tokens)
        observer.after(step, loss)
        trainer.step()
    for buffer in (trainer.buffer, *observer.buffers):
        buffer.destroy()
    observer.report()
    dist.destroy_process_group()


# --- options and processes -----------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small MoE model, every batch balanced.")
    parser.add_argument(
        "--balance",
        choices=("home", "on", "both"),
        help="every token at home; balanced; or balanced, and compared with home at three steps "
        "(default: as LPLB_EP says, else both)",
    )
    parser.add_argument("--trace", metavar="FILE", help="a recording that drives the routing")
    parser.add_argument("--trace-key", metavar="KEY", help="which array of an .npz")
    parser.add_argument("--trace-layout", metavar="LAYOUT", help="what its three dimensions are")
    parser.add_argument("--ranks", type=int, default=8, help="processes to start (not in torchrun)")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--guests", type=int, default=4, help="guest slots on each rank")
    parser.add_argument("--redundant", type=int, default=0, help="static copies on each rank")
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--place-at", type=int, help="step to place anew by load; default steps/4")
    parser.add_argument("--shift-at", type=int, help="step of another text; default 2/3 of them")
    parser.add_argument("--sequences", type=int, default=8, help=f"of {SEQUENCE} bytes, a rank")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "float64"),
        help="what tokens travel in; with bfloat16 the model computes in float32 (default: "
        "bfloat16 with DeepEP, which moves nothing else, float32 without)",
    )
    parser.add_argument("--out", default="out/moe_layer.png", help="the picture")
    args = parser.parse_args(argv)
    try:  # what cannot be is said here, once, and not by every rank
        args.library, args.because = choose_backend(Settings.from_env().backend)
        mode = os.environ.get("LPLB_EP", "").strip()
        args.balance = args.balance or {"": "both", "home": "home", "1": "on"}.get(mode)
        if args.balance is None:
            parser.error("LPLB_EP=0 is for layers without replica slots: say home or 1")
        args.recorded = None
        if args.trace:
            from lplb_ep.tools.recordings import load_recording

            recording = load_recording(args.trace, key=args.trace_key, layout=args.trace_layout)
            args.recorded, args.experts = recording.load, recording.num_experts
        elif args.trace_key or args.trace_layout:
            parser.error("--trace-key and --trace-layout say what to read of --trace")
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    with_deep_ep = args.library == "deep_ep"
    if with_deep_ep and args.dtype not in (None, "bfloat16"):
        parser.error(f"--dtype must be bfloat16 with DeepEP; got {args.dtype}")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if with_deep_ep else "float32"))
    args.hidden = 256 if with_deep_ep else 64  # its kernels take rows of whole 512 bytes
    args.ranks = int(os.environ.get("WORLD_SIZE", args.ranks))  # torchrun's
    args.place_at = max(1, args.steps // 4) if args.place_at is None else args.place_at
    args.shift_at = 2 * args.steps // 3 if args.shift_at is None else args.shift_at
    least_of = {"ranks": 1, "topk": 1, "sequences": 1, "redundant": 0, "guests": 0, "shift_at": 0}
    for name, least in least_of.items():
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least {least}; got {getattr(args, name)}")
    if not 1 <= args.place_at < args.steps:
        parser.error(
            f"--place-at must be in [1, --steps); got {args.place_at} of {args.steps} steps"
        )
    if args.topk > args.experts:
        parser.error(f"--topk must be at most the {args.experts} experts; got {args.topk}")
    if args.ranks == 1:
        if args.redundant:
            parser.error("--redundant must be 0 on a single rank: a copy there helps no plan")
        args.guests = 0  # likewise
    if args.experts % args.ranks:
        parser.error(f"--experts must be a multiple of the {args.ranks} ranks; got {args.experts}")
    writable_picture(parser, args.out)
    return args


def start(args: argparse.Namespace, local_rank: int, num_local_ranks: int, **rendezvous) -> None:
    """Joins the ranks and trains: on GPUs with DeepEP, else on the CPU."""
    num_gpus = torch.cuda.device_count()
    args.device = torch.device("cpu")
    args.shared = 0 < num_gpus < num_local_ranks  # NCCL refuses two ranks on one GPU
    if num_gpus:
        torch.cuda.set_device(local_rank % num_gpus)
        if args.library == "deep_ep":
            args.device = torch.device("cuda", local_rank % num_gpus)
    own_gpu = args.device.type == "cuda" and not args.shared
    dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo", **rendezvous)
    train(args)


def rank_of(rank: int, args: argparse.Namespace, port: int) -> None:
    """The process of a rank. It ends with the launcher, however that ends."""
    launcher = multiprocessing.parent_process()
    threading.Thread(target=lambda: (launcher.join(), os._exit(1)), daemon=True).start()
    store = dist.TCPStore("127.0.0.1", port)
    start(args, rank, args.ranks, store=store, rank=rank, world_size=args.ranks)


def launch(args: argparse.Namespace) -> None:
    """Runs all ranks on this machine."""
    # They are forked from a server that has imported what takes long.
    multiprocessing.forkserver.set_forkserver_preload(
        ["torch._dynamo", "lplb_ep.deepep.drop_in", "lplb_ep.embedded", "lplb_ep.tools.plots"]
    )
    # The server and its forks inherit that Ctrl-C is ignored; it is for the launcher alone.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        torch.multiprocessing.start_processes(
            rank_of, (args, store.port), nprocs=args.ranks, daemon=True, start_method="forkserver"
        )
    except KeyboardInterrupt:
        # First: ranks whose store ends before they do would complain of it.
        ranks = multiprocessing.active_children()
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(1)  # at once: an orderly end would wait for ranks that wait for one another


if __name__ == "__main__":
    arguments = parse()
    with mock.patch.dict(os.environ, LPLB_EP="home" if arguments.balance == "home" else "1"):
        if "RANK" in os.environ:  # torchrun's
            local = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
            start(arguments, *local)
        else:
            launch(arguments)
