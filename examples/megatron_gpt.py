"""A small Mixture-of-Experts GPT of Megatron-Core, trained on real text, every batch balanced.

Megatron-Core is as installed, and so is the model: a `GPTModel` with its local layers, the flex
dispatcher over DeepEP's buffers, `DistributedDataParallel`, Megatron's optimizer. What balancing
adds to a program is marked with (1) and (2):

    (1) where DeepEP is not installed, Megatron-Core is given the embedded buffers
    (2) one call balances all MoE layers; LPLB_EP=1 switches it on

Run it with `python examples/megatron_gpt.py` (4 processes on this machine's CPU), or on GPUs under
`torchrun --nproc-per-node 8`. `--balance` says how tokens are routed. Plain is Megatron-Core alone.
Home has every token at its expert's home. Forced has routers that pick at random, evenly.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
import sysconfig
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

VOCABULARY = 256
MODES = {"plain": "0", "home": "home", "guests": "1", "replicas": "1", "forced": "0"}
"""The value of LPLB_EP in each mode."""


@dataclass
class Record:
    """What a run leaves, the same on every rank."""

    mode: str
    seed: int
    losses: torch.Tensor
    """[S] mean over all ranks."""
    seconds: torch.Tensor
    """[S] of the slowest rank."""
    rows: torch.Tensor
    """[S, L, R]: rows that a rank's experts computed in each MoE layer."""
    loads: torch.Tensor
    """[L, E]: rows of each expert in all steps, of a run without guests or replicas."""
    memory_bytes: int
    """The most that torch had allocated, and the pool of guests, on the rank with most."""
    report: str

    @property
    def imbalance(self) -> torch.Tensor:
        """[S]: largest / mean rank load, mean over the layers."""
        rows = self.rows.double()
        return (rows.amax(-1) / rows.mean(-1).clamp(min=1)).mean(-1)


# --- the model -----------------------------------------------------------------------------------


def config_of(args: argparse.Namespace, forced: bool):
    from megatron.core.transformer import TransformerConfig

    dtype = getattr(torch, args.dtype)
    return TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=max(1, args.hidden // 128),
        ffn_hidden_size=args.ffn,
        moe_ffn_hidden_size=args.ffn,
        num_moe_experts=args.experts,
        moe_router_topk=args.topk,
        expert_model_parallel_size=args.ranks,
        expert_tensor_parallel_size=1,
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="deepep",
        moe_flex_dispatcher_num_sms=4 if args.shared else None,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_router_force_load_balancing=forced,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=not forced,
        moe_router_bias_update_rate=0.0,
        add_bias_linear=False,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=args.device.type == "cpu",
        perform_initialization=False,
    )


@torch.no_grad()
def initialize(model, args: argparse.Namespace, seed: int, rank: int) -> None:
    """The same weights in every mode. An expert's are its own, wherever it is.

    Small models on one text are balanced or not by chance. `--skew` gives the routers a lasting
    liking for early experts: the bias by which DeepSeek-V3's routers choose, left as it is.
    """
    first = rank * args.experts // args.ranks
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "layernorm" in name:
            continue
        parts, offset = name.split("."), 0
        if "local_experts" in parts:
            offset = 1 + first + int(parts[parts.index("local_experts") + 1])
        generator = torch.Generator(args.device).manual_seed(
            ((seed * 1009 + offset) * 1009 + number * (not offset)) * 31 + ("fc2" in name)
        )
        parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    for layer in model.decoder.layers:
        if layer.mlp.router.expert_bias is not None:
            layer.mlp.router.expert_bias.copy_(torch.linspace(args.skew, -args.skew, args.experts))


def text() -> torch.Tensor:
    """Python's own library, as bytes: up to 8 MB."""
    library, found, size = Path(sysconfig.get_paths()["stdlib"]), [], 0
    for path in sorted(library.glob("*.py")):
        found.append(path.read_bytes())
        size += len(found[-1])
        if size > 8_000_000:
            break
    return torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8)


class Trainer:
    """One rank's part of a run."""

    def __init__(self, args: argparse.Namespace, mode: str, seed: int, load=None) -> None:
        from megatron.core import tensor_parallel
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        from lplb_ep.clients.megatron import balance

        self.args, self.rank = args, dist.get_rank()
        if args.device.type == "cuda":
            tensor_parallel.model_parallel_cuda_manual_seed(seed + 1, force_reset_rng=True)
        self.config = config_of(args, forced=mode == "forced")
        model = GPTModel(
            self.config,
            get_gpt_decoder_block_spec(self.config, use_transformer_engine=False),
            vocab_size=VOCABULARY,
            max_sequence_length=args.sequence,
            share_embeddings_and_output_weights=False,
        ).to(args.device)
        initialize(model, args, seed, self.rank)
        self.layers = [layer.mlp for layer in model.decoder.layers]
        self.rows: list[int] = []
        self.loads = torch.zeros(args.layers, args.experts // args.ranks, dtype=torch.int64)
        for layer in self.layers:
            layer.experts.register_forward_pre_hook(self.count_rows)
        if self.config.bf16:
            model = Float16Module(self.config, model)
        options = {"guests": args.guests} if mode == "guests" else {}
        if mode == "replicas":
            options = {"replicas": args.replicas, "load": load}
        self.balance = balance(model, **options)  # (2)
        parallel = DistributedDataParallelConfig(
            grad_reduce_in_fp32=self.config.bf16,
            overlap_grad_reduce=not args.shared,
            use_distributed_optimizer=args.distributed_optimizer,
        )
        self.model = DistributedDataParallel(self.config, parallel, model)
        settings = OptimizerConfig(
            lr=args.lr,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=self.config.bf16,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=args.distributed_optimizer,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.no_sync_func = self.model.no_sync
        self.sampler = torch.Generator().manual_seed(seed * 1009 + self.rank)

    def count_rows(self, experts, inputs) -> None:
        """Megatron-Core has the rows of each local expert on the CPU."""
        counts, layer = inputs[1].cpu(), len(self.rows) % len(self.layers)
        self.rows.append(int(counts.sum()))
        if len(counts) == self.loads.shape[1]:
            self.loads[layer] += counts

    def batches(self):
        """Sequences of bytes and what follows each, drawn from the text."""
        args, places = self.args, torch.arange(self.args.sequence + 1)
        while True:
            highest = len(args.text) - args.sequence
            start = torch.randint(highest, (args.sequences, 1), generator=self.sampler)
            yield args.text[start + places].long().to(args.device, non_blocking=True)

    def forward(self, batches, model):
        tokens = next(batches)
        size, device = self.args.sequence, self.args.device
        positions = torch.arange(size, device=device).expand(len(tokens), size)
        mask = torch.ones(1, 1, size, size, dtype=torch.bool, device=device).triu(1)
        losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
        mean = losses.float().mean()
        return mean, lambda loss: (loss, {"loss": loss.detach()})

    def step(self, number: int, batches) -> float:
        """Forward and backward of the micro-batches, and the optimizer's step. Returns the loss."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1.0, (number + 1) / 20)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        out = get_forward_backward_func()(
            forward_step_func=self.forward,
            data_iterator=batches,
            model=self.model,
            num_microbatches=self.args.micro_batches,
            seq_length=self.args.sequence,
            micro_batch_size=self.args.sequences,
        )
        self.optimizer.step()
        return sum(float(loss["loss"]) for loss in out) / len(out)

    def free(self) -> None:
        """Frees weights, gradients and the optimizer's state: DDP's hooks keep the model alive."""
        tensors = [p for group in self.optimizer.param_groups for p in group["params"]]
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for state in optimizer.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        tensors += self.model.parameters()
        for tensor in [*tensors, *(t.grad for t in tensors), *map(main_grad, tensors)]:
            if tensor is not None:
                tensor.untyped_storage().resize_(0)

    def run(self, mode: str, seed: int, progress) -> Record:
        """Trains. Collective."""
        args, batches = self.args, self.batches()
        losses, seconds = [], []
        on_gpu = args.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for number in range(args.steps):
            start = time.perf_counter()
            losses.append(self.step(number, batches))
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if self.rank == 0:
                progress(number + 1, args.steps, f"{mode}: loss {losses[-1]:.3f}")
        pool = sum(pool.num_bytes for pool in self.balance.pools)
        memory = torch.tensor(pool + (torch.cuda.max_memory_allocated() if on_gpu else 0))
        lists = [None] * args.ranks
        rows = torch.tensor(self.rows).view(args.steps, args.micro_batches, len(self.layers))
        own = (losses, seconds, rows.sum(1), memory, str(self.balance), self.loads)
        dist.all_gather_object(lists, own)
        return Record(
            mode,
            seed,
            torch.tensor([of_rank[0] for of_rank in lists]).mean(0),
            torch.tensor([of_rank[1] for of_rank in lists]).amax(0),
            torch.stack([of_rank[2] for of_rank in lists], -1),
            torch.cat([of_rank[5] for of_rank in lists], 1),
            int(max(of_rank[3] for of_rank in lists)),
            lists[0][4],
        )


def main_grad(parameter: torch.Tensor) -> torch.Tensor | None:
    """Where Megatron-Core's DDP collects a parameter's gradients."""
    return getattr(parameter, "main_grad", None)


def tokens_a_second(args: argparse.Namespace, record: Record) -> float:
    """Of all ranks, by the median step behind the first tenth."""
    per_step = args.ranks * args.micro_batches * args.sequences * args.sequence
    return per_step / float(record.seconds[args.steps // 10 :].median())


def run(args: argparse.Namespace, mode: str, seed: int, load=None) -> Record:
    """Makes a model and trains it, in the groups that there are. Collective."""
    from report import progress

    with mock.patch.dict(os.environ, LPLB_EP=MODES[mode]):
        trainer = Trainer(args, mode, seed, load)
        record = trainer.run(mode, seed, progress)
        trainer.balance.remove()
    trainer.free()
    del trainer
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
    return record


# --- options and processes -----------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Sizes of the model and of the run. Defaults are for the CPU."""
    for name, default, meaning in (
        ("ranks", 4, "processes to start, all of one expert-parallel group (not in torchrun)"),
        ("layers", 2, "MoE layers"),
        ("hidden", 128, "width of a token"),
        ("ffn", 128, "width within an expert"),
        ("experts", 16, "of each layer"),
        ("topk", 2, "experts of a token"),
        ("sequence", 64, "bytes of a sequence"),
        ("sequences", 8, "sequences of a micro-batch, on each rank"),
        ("micro-batches", 1, "of a step"),
        ("steps", 40, "optimizer steps"),
        ("replicas", 1, "static copies a rank, in mode replicas"),
        ("seed", 0, "of weights and data"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.add_argument("--guests", type=int, help="guest slots a rank; default: by the experts")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--skew", type=float, default=0.1, help="the routers' liking for early experts"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as the device")
    parser.add_argument("--distributed-optimizer", action="store_true")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a GPT of Megatron-Core, balanced.")
    parser.add_argument("--balance", choices=[*MODES], default="guests")
    parser.add_argument("--out", default="out/megatron_gpt.png", help="the picture")
    add_options(parser)
    args = parser.parse_args()
    from report import writable_picture

    writable_picture(parser, args.out)
    return args


@contextlib.contextmanager
def prepared(args: argparse.Namespace, **rendezvous):
    """Joins the ranks, and prepares Megatron-Core: on GPUs with DeepEP, else on the CPU."""
    from lplb_ep.clients.megatron import provide_buffers
    from lplb_ep.clients.without_gpu import without_gpu

    torch.set_num_threads(1)
    local = int(os.environ.get("LOCAL_RANK", rendezvous.get("rank", 0)))
    num_gpus = torch.cuda.device_count()
    args.ranks = int(os.environ.get("WORLD_SIZE", args.ranks))
    args.shared = 0 < num_gpus < int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    args.device = torch.device("cuda", local % num_gpus) if num_gpus else torch.device("cpu")
    args.dtype = args.dtype or ("bfloat16" if num_gpus else "float32")
    if num_gpus:
        torch.cuda.set_device(args.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if num_gpus else "gloo", **rendezvous)
    args.text = text()
    provide_buffers()  # (1)
    # Megatron-Core says what it lacks: Transformer Engine, Apex. Compiling would take a minute.
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=args.ranks, expert_tensor_parallel_size=1
    )
    with without_gpu(), torch.compiler.set_stance("force_eager"):
        yield
    dist.barrier()
    dist.destroy_process_group()


def main(rank: int, args: argparse.Namespace, port: int | None) -> None:
    """One rank's program."""
    rendezvous = {}
    if port is not None:
        store = dist.TCPStore("127.0.0.1", port)
        rendezvous = {"store": store, "rank": rank, "world_size": args.ranks}
    with prepared(args, **rendezvous):
        record = run(args, args.balance, args.seed)
        if dist.get_rank() == 0:
            show(args, record)


def show(args: argparse.Namespace, record: Record) -> None:
    from lplb_ep import MissingPackageError
    from lplb_ep.tools.plots import plot_runs

    print(record.report)
    print(
        f"loss {record.losses[0]:.3f} -> {record.losses[-1]:.3f}, imbalance of the ranks "
        f"{record.imbalance.mean():.3f}, {tokens_a_second(args, record):,.0f} tokens a second"
    )
    speed = {record.mode: tokens_a_second(args, record)}
    try:
        plot_runs(
            args.out,
            losses={record.mode: record.losses},
            imbalances={record.mode: record.imbalance},
            tokens_a_second=speed,
            title=f"Megatron-Core, {args.experts} experts on {args.ranks} ranks",
        )
    except MissingPackageError as error:
        print(f"no picture: {error}")
    else:
        print(f"wrote {args.out}")


def launch(function, args: argparse.Namespace) -> None:
    """Runs a function on every rank: this process is one under torchrun, else they are started."""
    if "RANK" in os.environ:
        function(int(os.environ["RANK"]), args, None)
        return
    os.environ["LOCAL_WORLD_SIZE"] = str(args.ranks)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(
        function, (args, store.port), nprocs=args.ranks, start_method="spawn"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    launch(main, parse())
