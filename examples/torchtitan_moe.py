"""A small MoE language model of torchtitan's layers, trained over DeepEP V2: plain and balanced.

Each block has torchtitan's own `MoE`: its router, dispatcher and experts, unmodified. Expert
parallelism is torchtitan's, and FSDP2 shards the model as usual. One line balances it, marked (1).

    python examples/torchtitan_moe.py --ranks 4       # plain, balanced, forced; then a picture
    LPLB_EP=1 torchrun --nproc-per-node 8 examples/torchtitan_moe.py   # one run, as LPLB_EP says

It trains on the language reference that every Python has, from the same weights and on the same
text in each run. `forced` is torchtitan's round-robin routing: the most that balance can gain. It
runs on GPUs with DeepEP V2, which wants one for each rank, else on the CPU with lplb_ep's
embedded buffers.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from report import progress, writable_picture
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

VOCABULARY = 256
RUNS = {  # of what LPLB_EP says, whether routing is forced, and the seed of the text
    "plain": ("0", False, 0),
    "balanced": ("1", False, 0),
    "forced": ("0", True, 0),
    "reseeded": ("0", False, 1),  # how much two plain runs differ
}


# --- the model -----------------------------------------------------------------------------------


def moe_config(args: argparse.Namespace):
    """torchtitan's config of an MoE layer over DeepEP, balanced if the environment says so."""
    import spmd_types as spmd
    from torchtitan.models.common.config_utils import (
        make_moe_config,
        make_routed_experts_config,
        make_router_config,
    )
    from torchtitan.models.common.moe_sharding import set_moe_sharding_config

    from lplb_ep.clients.torchtitan import BalanceConverter

    def init(weight: torch.Tensor, scale: float = 1.0) -> None:
        nn.init.normal_(weight, std=scale * weight.shape[-1] ** -0.5)

    names = {"w1_EFD": spmd.S(1), "w2_EDF": spmd.S(2), "w3_EFD": spmd.S(1)}
    config = make_moe_config(
        num_experts=args.experts,
        router=make_router_config(
            dim=args.dim,
            num_experts=args.experts,
            gate_param_init={"weight": functools.partial(init, scale=args.router_scale)},
            top_k=args.topk,
            score_func="softmax",
            route_norm=args.topk > 1,  # of one expert it would leave the router untrained
        ),
        routed_experts=make_routed_experts_config(
            dim=args.dim,
            hidden_dim=args.width,
            num_experts=args.experts,
            top_k=args.topk,
            param_init=dict.fromkeys(names, init),
            comm_backend="deepep",
            num_max_tokens_per_rank=args.sequences * args.sequence,
        ),
        load_balance_coeff=None,  # nothing evens out what the router learns
    )
    config.router._debug_force_load_balance = args.forced
    set_moe_sharding_config(config, enable_ep=True, enable_sp=False, expert_param_layout=names)
    asked = BalanceConverter.Config(guests=args.guests, replicas=args.replicas)
    return asked.build().convert(config)  # (1)


class Block(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(args.dim), nn.RMSNorm(args.dim)
        self.qkv = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.out = nn.Linear(args.dim, args.dim, bias=False)
        self.moe = moe_config(args).build()

    def forward(self, x):
        heads = max(1, x.shape[-1] // 64)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.moe(self.norm2(x))


class LanguageModel(nn.Module):
    """A transformer over bytes."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, args.dim)
        self.position = nn.Parameter(torch.randn(args.sequence, args.dim) * 0.02)
        self.layers = nn.ModuleDict({str(n): Block(args) for n in range(args.layers)})
        self.norm, self.head = nn.RMSNorm(args.dim), nn.Linear(args.dim, VOCABULARY)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position
        for layer in self.layers.values():
            x = layer(x)
        return self.head(self.norm(x))


def make_model(args: argparse.Namespace) -> nn.Module:
    """The model, its experts over all ranks or as many as `--expert-ranks` says, sharded."""
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import activation_checkpoint as ac
    from torchtitan.distributed.utils import set_spmd_backend

    backend = "partial_dtensor"  # the others want a later torch
    set_spmd_backend(backend)
    size, ep = dist.get_world_size(), args.expert_ranks or dist.get_world_size()
    dims = ParallelDims(1, size, 1, 1, 1, ep=ep, world_size=size, spmd_backend=backend)
    dims.build_mesh()
    torch.manual_seed(0)  # the dense weights are the same on every rank
    model = LanguageModel(args).to(args.device)
    generator = torch.Generator().manual_seed(1 + dist.get_rank() % ep)  # the experts are not
    for layer in model.layers.values():
        layer.moe.init_states(buffer_device=args.device)
        layer.moe.parallelize(dims)
        for weight in layer.moe.routed_experts.inner_experts.parameters():
            part = weight.to_local().data
            part.copy_(torch.randn(part.shape, generator=generator) * part.shape[-1] ** -0.5)
    if args.checkpointing != "none":
        kind = {"full": ac.FullAC.Config, "selective": ac.SelectiveAC.Config}[args.checkpointing]
        kind().build().apply(model)
    on_gpu = args.device.type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if on_gpu else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in model.layers.values():  # gathered before they dispatch: guests need whole weights
        fully_shard(layer.moe.routed_experts, mesh=dims.get_mesh(["efsdp"]), mp_policy=policy)
        fully_shard(layer, mesh=dims.get_mesh(["fsdp"]), mp_policy=policy)
    fully_shard(model, mesh=dims.get_mesh(["fsdp"]), mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided
            module.set_force_sum_reduction_for_comms(True)
    return model


# --- training ------------------------------------------------------------------------------------


def text() -> torch.Tensor:
    """The language reference that comes with every Python, as bytes."""
    from pydoc_data.topics import topics

    return torch.frombuffer(bytearray("\n\n".join(topics.values()).encode()), dtype=torch.uint8)


def watch_rows(model: nn.Module, rows: torch.Tensor) -> None:
    """Adds up in `rows` [layers] how many rows this rank's experts compute in forward passes."""

    def count(number):
        def hook(module, args):
            if torch._C._current_graph_task_id() < 0:  # and not again in a recompute
                rows[number] += len(args[0])

        return hook

    for number, layer in enumerate(model.layers.values()):
        layer.moe.routed_experts.inner_experts.register_forward_pre_hook(count(number))


def train(args: argparse.Namespace) -> dict:
    """One rank's program; returns what was measured."""
    rank, size, on_gpu = dist.get_rank(), dist.get_world_size(), args.device.type == "cuda"
    model = make_model(args)
    rows = torch.zeros(args.layers, dtype=torch.int64)
    watch_rows(model, rows)
    experts = [p for name, p in model.named_parameters() if ".inner_experts." in name]
    dense = [p for name, p in model.named_parameters() if ".inner_experts." not in name]
    # On meshes of their own, which one fused step cannot have both.
    groups = [{"params": dense}, {"params": experts}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    data, sampler = text(), torch.Generator().manual_seed(1000 * args.seed + rank)
    losses, imbalances, times = [], [], []
    for step in range(args.steps):
        start = torch.randint(len(data) - args.sequence, (args.sequences, 1), generator=sampler)
        tokens = data[start + torch.arange(args.sequence + 1)].long().to(args.device)
        rows.zero_()
        began = time.perf_counter()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()) / size
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(float(loss))  # waits for the GPU
        times.append(time.perf_counter() - began)
        of_ranks = [torch.zeros_like(rows, device=args.device) for _ in range(size)]
        dist.all_gather(of_ranks, rows.to(args.device))
        loads = torch.stack(of_ranks).double().cpu()  # [R, layers]
        imbalances.append((loads.amax(0) / loads.mean(0)).tolist())
        if rank == 0:
            worst = max(imbalances[-1])
            progress(step + 1, args.steps, f"loss {losses[-1]:.3f}  imbalance {worst:.2f}")
    from lplb_ep.clients.torchtitan import balance_of

    balance = balance_of(model)
    if rank == 0 and balance.layers:
        print(balance, flush=True)
    settled = times[min(10, len(times) // 2) :]
    return {
        "run": args.run,
        "device": torch.cuda.get_device_name(args.device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "ranks": size,
        "sizes": {
            name: getattr(args, name)
            for name in ("layers", "dim", "width", "experts", "topk", "sequence", "sequences")
        },
        "guests": balance.layers[0].layer.placement.num_guests_per_rank if balance.layers else 0,
        "losses": losses,
        "imbalance": imbalances,
        "seconds": times,
        "tokens_per_s": args.sequences * args.sequence * size / statistics.median(settled),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "pool_mib": sum(pool.num_bytes for pool in balance.pools) / 2**20,
        "batches": {layer.name: layer.report().by_status for layer in balance.layers},
    }


def run_rank(args: argparse.Namespace) -> None:
    """A rank, started by torchrun or by `launch`."""
    local = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    # A linear layer returns a view. FSDP2 warns, for operations in place would break its hook.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    args.device = torch.device("cpu")
    num_gpus, shared = torch.cuda.device_count(), "NCCL_MULTI_RANK_GPU_ENABLE" in os.environ
    if num_gpus >= (1 if shared else int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
        args.device = torch.device("cuda", local % num_gpus)
        torch.cuda.set_device(args.device)
    else:  # torchtitan takes a machine without a GPU for one that has some
        os.environ["LPLB_EP_BACKEND"] = "embedded"
        import torchtitan.tools.utils as utils

        utils.device_type, utils.device_module = "cpu", torch.cpu
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
    result = train(args)
    if dist.get_rank() == 0:
        path = args.out.with_suffix(f".{args.run}.json")
        path.write_text(json.dumps(result))
        print(f"{args.run}: {result['tokens_per_s']:,.0f} tokens/s, {path}", flush=True)
    dist.destroy_process_group()


# --- several runs, and what they show ------------------------------------------------------------


def launch(args: argparse.Namespace, run: str) -> dict:
    """All ranks of a run on this machine."""
    mode, _, _ = RUNS[run]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "LPLB_EP": mode, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environ |= {"WORLD_SIZE": str(args.ranks), "LOCAL_WORLD_SIZE": str(args.ranks)}
    command = [sys.executable, *sys.argv, "--run", run]
    ranks = [
        subprocess.Popen(command, env={**environ, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(args.ranks)
    ]
    try:
        while (codes := [rank.poll() for rank in ranks]).count(0) < len(ranks):
            if any(codes):
                raise SystemExit(f"{run}: a rank failed")
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
    return json.loads(args.out.with_suffix(f".{run}.json").read_text())


def table(results: list[dict]) -> str:
    """What the runs showed, as Markdown."""
    rows = [
        "| run | tokens/s | loss, last 10 steps | imbalance, mean / worst step "
        "| memory, GiB | pool, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        worst = [max(layers) for layers in r["imbalance"]]
        memory = "" if r["memory_gib"] is None else f"{r['memory_gib']:.2f}"
        rows.append(
            f"| {r['run']} | {r['tokens_per_s']:,.0f} | {statistics.mean(r['losses'][-10:]):.4f} "
            f"| {statistics.mean(worst):.3f} / {max(worst):.3f} | {memory} | {r['pool_mib']:.1f} |"
        )
    by_run = {r["run"]: r for r in results}
    if {"plain", "balanced", "forced"} <= by_run.keys() and results[0]["device"] != "CPU":
        plain, balanced, forced = (
            by_run[n]["tokens_per_s"] for n in ("plain", "balanced", "forced")
        )
        if forced > plain:
            gained = f"{balanced - plain:,.0f} of the {forced - plain:,.0f} tokens/s"
            verdict = f"Balanced gains {gained} that forced routing gains over plain."
        else:
            verdict = (
                "Even forced routing gains nothing over plain: at these sizes a step does not wait "
                "for the experts of the fullest rank."
            )
        rows += ["", verdict]
    for name in by_run.keys() - {"plain", "forced"}:
        if "plain" in by_run:
            pairs = zip(by_run[name]["losses"], by_run["plain"]["losses"], strict=True)
            largest = max(abs(a - b) / b for a, b in pairs)
            rows += ["", f"Loss of {name} against plain: at most {largest:.2%} apart at a step."]
    return "\n".join(rows)


def draw(results: list[dict], path: Path) -> None:
    """Loss, imbalance and throughput of the runs, as a picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    on_gpu = results[0]["device"] != "CPU"  # whose plans are made beside the model's work
    figure, axes = pyplot.subplots(1, 2 + on_gpu, figsize=(5 + 4 * (1 + on_gpu), 3.6))
    loss, imbalance = axes[:2]
    for r in results:
        loss.plot(r["losses"], label=r["run"], linewidth=1)
        imbalance.plot([max(layers) for layers in r["imbalance"]], label=r["run"], linewidth=1)
    loss.set(title="loss", xlabel="step")
    loss.legend()
    imbalance.set(title="largest rank load / mean, worst layer", xlabel="step")
    if on_gpu:
        axes[2].bar([r["run"] for r in results], [r["tokens_per_s"] for r in results])
        axes[2].set(title=f"tokens/s, {results[0]['ranks']} x {results[0]['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small MoE model of torchtitan's layers.")
    parser.add_argument("--ranks", type=int, default=2, help="processes to start (not in torchrun)")
    parser.add_argument("--runs", default="plain,balanced,forced", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128, help="of a token, a multiple of 64")
    parser.add_argument("--width", type=int, default=128, help="of an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--expert-ranks", type=int, help="expert parallelism; default: all ranks")
    parser.add_argument("--topk", type=int, default=1)
    parser.add_argument(
        "--router-scale", type=float, default=2.0, help="of its first weights: more skew, with more"
    )
    parser.add_argument("--guests", type=int, help="guest slots a rank; default: by the experts")
    parser.add_argument("--replicas", type=int, default=0, help="static copies a rank, no guests")
    parser.add_argument("--sequence", type=int, default=64, help="bytes")
    parser.add_argument("--sequences", type=int, default=8, help="of each rank, a step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--checkpointing", choices=("none", "full", "selective"), default="none")
    parser.add_argument("--out", type=Path, default=Path("out/torchtitan_moe.png"))
    args = parser.parse_args(argv)
    writable_picture(parser, args.out)
    args.runs = args.runs.split(",")
    for run in [*args.runs, *([args.run] if args.run else [])]:
        if run not in RUNS:
            parser.error(f"--runs must be of {', '.join(RUNS)}; got {run}")
    mode = os.environ.get("LPLB_EP", "0").strip() or "0"
    default = {"0": "plain", "1": "balanced"}.get(mode, mode)
    args.run = args.run or default
    _, args.forced, args.seed = RUNS.get(args.run, ("", False, 0))
    return args


if __name__ == "__main__":
    arguments = parse()
    if "RANK" in os.environ:
        run_rank(arguments)
    else:
        found = []
        for name in arguments.runs:
            print(f"{name}:", flush=True)
            found.append(launch(arguments, name))
        text_of_table = table(found)
        print(text_of_table)
        arguments.out.with_suffix(".md").write_text(text_of_table + "\n")
        arguments.out.with_suffix(".json").write_text(json.dumps(found))
        if importlib.util.find_spec("matplotlib"):
            draw(found, arguments.out)
            print(f"wrote {arguments.out}")
        else:
            print("no picture: matplotlib is not installed")
            print(f"{arguments.out}")
