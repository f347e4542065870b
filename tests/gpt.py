"""A small GPT of Megatron-Core with MoE layers, trained on gloo ranks."""

import contextlib
import dataclasses
import logging
import queue
import warnings
from unittest import mock

import torch
from grouped import grouped_experts, transformer_engine, without_fp8

from lplb_ep import ContractError

EXPERTS, HIDDEN, SEQUENCE, VOCABULARY = 8, 32, 16, 64


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run."""

    ep: int = 2
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    steps: int = 2
    micro_batches: int = 2
    config: dict = dataclasses.field(default_factory=dict)
    ddp: dict = dataclasses.field(default_factory=dict)
    optimizer: dict = dataclasses.field(default_factory=dict)
    balance: dict = dataclasses.field(default_factory=lambda: {"guests": 2})
    skew: float = 1.0
    grouped: str = ""
    """Experts are a `TEGroupedMLP`, if it is "grouped" or "fused" (see `grouped_experts`)."""
    frozen: str = ""
    """Part of the names of parameters that are not trained."""


joined = None
"""The sizes of the groups that Megatron-Core has in this process."""


def join(parallel_state, run):
    """Makes Megatron-Core's groups, if it has others. They are two dozen, with threads for each.

    Those of a model that was trained stay in memory: DDP's gradient accumulators refer to it, and
    no collector sees them. So runs of the same sizes share theirs.
    """
    global joined
    sizes = run.tp, run.ep, run.pp, run.vpp
    if joined == sizes:
        return
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=run.tp,
        pipeline_model_parallel_size=run.pp,
        virtual_pipeline_model_parallel_size=run.vpp,
        expert_model_parallel_size=run.ep,
        expert_tensor_parallel_size=1,
    )
    joined = sizes


@contextlib.contextmanager
def megatron(run):
    """Megatron-Core with its groups, on this rank's CPU."""
    from lplb_ep.clients.megatron import provide_buffers
    from lplb_ep.clients.without_gpu import without_gpu
    from lplb_ep.deepep.patch import unpatch

    provide_buffers()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core import parallel_state

            logging.getLogger("megatron").setLevel(logging.ERROR)
            join(parallel_state, run)
            with without_gpu(), norms_of_parts(run), without_fp8():
                yield
    finally:
        unpatch()


@contextlib.contextmanager
def norms_of_parts(run):
    """torch's norms where each tensor-parallel rank has a part of the sequence.

    Megatron-Core has them with Transformer Engine or Apex alone.
    """
    from megatron.core.models import backends
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import transformer_block

    class Norm(torch.nn.LayerNorm):
        def __init__(self, config, hidden_size, eps=1e-5, **_):
            super().__init__(hidden_size, eps=eps)
            for parameter in self.parameters():
                parameter.sequence_parallel = True  # so that gradients are summed

    with contextlib.ExitStack() as stack:
        if run.tp > 1:
            for module, name in (
                (backends, "LNImpl"),
                (gpt_layer_specs, "LNImpl"),
                (transformer_block, "LayerNormImpl"),
            ):
                stack.enter_context(mock.patch.object(module, name, Norm))
        yield


def config_of(run):
    from megatron.core.transformer import TransformerConfig

    settings = dict(
        num_layers=max(2, run.pp * (run.vpp or 1)),
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=48,
        moe_ffn_hidden_size=48,
        num_moe_experts=EXPERTS,
        tensor_model_parallel_size=run.tp,
        sequence_parallel=run.tp > 1,
        pipeline_model_parallel_size=run.pp,
        virtual_pipeline_model_parallel_size=run.vpp,
        expert_model_parallel_size=run.ep,
        expert_tensor_parallel_size=1,
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="deepep",
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        add_bias_linear=False,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    with transformer_engine() if run.grouped else contextlib.nullcontext():
        config = TransformerConfig(**{**settings, **run.config})
    if config.params_dtype is torch.float32:
        config.bf16 = False  # some options ask for it, and float32 shows more
    return config


def chunks_of(run, config):
    """The rank's model chunks; experts have weights of their own, by their numbers."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.module import Float16Module

    kind = grouped_experts(run.grouped == "fused") if run.grouped else contextlib.nullcontext()
    with kind:
        spec = [
            get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage)
            for stage in range(run.vpp or 1)
        ]
    chunks = []
    for stage in range(run.vpp or 1):
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        chunk = GPTModel(
            config,
            spec[stage],
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=False,
            vp_stage=stage if run.vpp else None,
        )
        for name, parameter in chunk.named_parameters():
            initialize(chunk, name, parameter, run)
            parameter.requires_grad = not run.frozen or run.frozen not in name
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def initialize(chunk, name, parameter, run):
    """The same weights wherever a layer or an expert is."""
    parts = name.split(".")
    if "layers" in parts:
        number = parts.index("layers") + 1
        parts[number] = str(chunk.decoder.layers[int(parts[number])].layer_number)
    if "experts" in parts:
        from megatron.core import parallel_state

        first = parallel_state.get_expert_model_parallel_rank() * (EXPERTS // run.ep)
        renumber(parts, lambda place: first + place)
    is_norm = "layernorm" in name
    if is_norm and not name.endswith("pre_mlp_layernorm.bias"):
        return
    generator = torch.Generator().manual_seed(sum(map(ord, ".".join(parts))) * 7919)
    # All tokens have something in common then, and routers favour some experts.
    scale = run.skew * HIDDEN**0.5 if is_norm else 1.0
    with torch.no_grad():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(values * scale * parameter.shape[-1] ** -0.5)


def renumber(parts, number_of):
    """Has a parameter's name an expert's number in the place of its place on the rank."""
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        parts[at] = str(number_of(int(parts[at])))
    else:  # weight0, weight1, … of grouped experts
        kind = parts[-1].rstrip("0123456789")
        parts[-1] = f"{kind}{number_of(int(parts[-1][len(kind) :]))}"


class Training:
    """A model of Megatron-Core with DDP and an optimizer."""

    def __init__(self, run):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from lplb_ep.clients.balance import Balance
        from lplb_ep.clients.megatron import balance

        self.run, self.config = run, config_of(run)
        chunks = chunks_of(run, self.config)
        off = run.balance.get("off")
        self.balance = Balance() if off else balance(chunks, **run.balance)
        ddp = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **run.ddp})
        self.chunks = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        options = dict(
            optimizer="adam",
            lr=0.01,
            clip_grad=0.5,
            bf16=self.config.bf16,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=ddp.use_distributed_optimizer,
            overlap_param_gather=ddp.overlap_param_gather,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(**{**options, **run.optimizer}), self.chunks
        )
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        syncs = [chunk.no_sync for chunk in self.chunks]
        self.config.no_sync_func = syncs if run.vpp else syncs[0]
        if run.vpp and ddp.overlap_grad_reduce:
            self.config.grad_sync_func = [chunk.start_grad_sync for chunk in self.chunks]
        if run.vpp and ddp.overlap_param_gather and ddp.align_param_gather:
            self.config.param_sync_func = [chunk.start_param_sync for chunk in self.chunks]

    def close(self):
        self.balance.stays = ""  # the model is not used again
        self.balance.remove()

    def batches(self):
        """Micro-batches of tokens, the same in every run."""
        generator = torch.Generator().manual_seed(self.data_rank())
        while True:
            yield torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=generator)

    def data_rank(self):
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_rank()

    def forward(self, batches, chunk, return_schedule_plan=False):
        tokens = next(batches)
        positions = torch.arange(SEQUENCE).expand(2, SEQUENCE)
        mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
        run = chunk.build_schedule_plan if return_schedule_plan else chunk
        out = run(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
        return out, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})

    def gradients(self, batches):
        """Forward and backward of a step. Returns the losses of its micro-batches."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        out = get_forward_backward_func()(
            forward_step_func=self.forward,
            data_iterator=batches,
            model=self.chunks if self.run.vpp else self.chunks[0],
            num_microbatches=self.run.micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=2,
        )
        return [float(loss["loss"]) for loss in out]

    def named_parameters(self):
        for number, chunk in enumerate(self.chunks):
            for name, parameter in chunk.module.named_parameters():
                yield f"{number}.{name}", parameter


def train(group, run):
    """Trains; returns losses, norms of gradients, first gradients, last weights, and the report."""
    with megatron(run):
        training = Training(run)
        with contextlib.closing(training):
            return trained(training)


def trained(training):
    run = training.run
    batches = [training.batches() for _ in training.chunks]
    losses, norms, gradients = [], [], {}
    for step in range(run.steps):
        losses += training.gradients(batches if run.vpp else batches[0])
        if step == 0:
            trained = [(n, p) for n, p in training.named_parameters() if p.requires_grad]
            gradients = {n: p.main_grad.clone() for n, p in trained}
        norms.append(float(training.optimizer.step()[1]))
    for chunk in training.chunks if run.ddp.get("overlap_param_gather") else []:
        chunk.start_param_sync(force_sync=True)
    weights = {n: p.detach().float().clone() for n, p in training.named_parameters()}
    return losses, norms, gradients, weights, training.balance.report()


def saved(training):
    """What Megatron-Core's distributed checkpoints hold of a model and its optimizer."""
    model = training.chunks[0].module
    return {
        "model": model.sharded_state_dict(),
        "optimizer": training.optimizer.sharded_state_dict(model.sharded_state_dict()),
    }


def save(group, run, path):
    """Trains, and saves. Returns the weights."""
    with megatron(run):
        from megatron.core import dist_checkpointing

        training = Training(run)
        batches = training.batches()
        for _ in range(run.steps):
            training.gradients(batches)
            training.optimizer.step()
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        # Its queue is a process, and these ranks may have none.
        results = queue.Queue()
        name = "get_write_results_queue"
        with mock.patch.object(filesystem_async, name, return_value=results):
            dist_checkpointing.save(saved(training), path)
        weights = {n: p.detach().clone() for n, p in training.named_parameters()}
        training.close()
        return weights


def load(group, run, path):
    """Loads, and trains on. Returns the weights before and after, and the report."""
    with megatron(run):
        from megatron.core import dist_checkpointing

        training = Training(run)
        for _, parameter in training.named_parameters():
            parameter.data.zero_()
        state = dist_checkpointing.load(saved(training), path)
        training.chunks[0].module.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        weights = {n: p.detach().clone() for n, p in training.named_parameters()}
        batches = training.batches()
        for _ in range(run.steps):
            training.gradients(batches)
            training.optimizer.step()
        after = {n: p.detach().clone() for n, p in training.named_parameters()}
        report = training.balance.report()
        training.close()
        return weights, after, report


def removed(group, run):
    """Balances and takes it back. Returns attributes before, with, and after it, and losses."""
    with megatron(run):
        training = Training(dataclasses.replace(run, balance={"off": True}))
        module = training.chunks[0].module
        before, loss = seams(module), training.gradients(training.batches())
        from lplb_ep.clients.megatron import balance

        balanced = balance(training.chunks)
        during, again = seams(module), training.gradients(training.batches())
        said = str(balanced)
        balanced.remove()
        after, last = seams(module), training.gradients(training.batches())
        training.close()
        return before, during, after, [loss, again, last], said, str(balanced)


def seams(model):
    """What balancing puts in place of Megatron's in the first MoE layer."""
    from megatron.core.transformer.moe import fused_a2a

    layer = model.decoder.layers[0].mlp
    manager = layer.token_dispatcher._comm_manager
    return (
        manager.num_local_experts,
        layer.token_dispatcher.num_local_experts,
        len(layer.experts.local_experts),
        "forward" in vars(layer.experts),
        "dispatch" in vars(manager),
        fused_a2a.Buffer.__module__,
        sorted(model.state_dict()),
    )


def refusal(group, run, change):
    """The error of a model with other settings than those that are supported."""
    from lplb_ep.clients.megatron import balance

    with megatron(run):
        chunks = chunks_of(run, config_of(run))
        for layer in chunks[0].decoder.layers:
            for path, value in change.items():
                target, *names = layer.mlp, *path.split(".")
                for name in names[:-1]:
                    target = getattr(target, name)
                setattr(target, names[-1], value)
        try:
            balance(chunks)
        except ContractError as error:
            return str(error)
    return ""


def refusal_of(group, run, options, twice=False):
    """The error of a call of `balance`, and what its layers are before and after it."""
    from lplb_ep.clients.megatron import balance

    with megatron(run):
        chunks = chunks_of(run, config_of(run))
        first = balance(chunks) if twice else None
        before, said = seams(chunks[0]), ""
        try:
            balance(chunks, **options)
        except (ContractError, ValueError) as error:
            said = str(error)
        after = seams(chunks[0])
        if first is not None:
            first.remove()
        return said, before, after


def two_models(group, run):
    """Losses and norms of two models: plain, balanced, when the first is given back, and both."""
    from lplb_ep.clients.megatron import balance

    with megatron(run):
        plain = dataclasses.replace(run, balance={"off": True})
        trainings = [Training(plain), Training(plain)]

        def losses(of):
            return [[*t.gradients(t.batches()), norm(t)] for t in of]

        def norm(training):
            return float(sum(p.main_grad.norm() for _, p in training.named_parameters()))

        found, balances = [losses(trainings)], [balance(t.chunks, **run.balance) for t in trainings]
        found.append(losses(trainings))
        balances[0].remove()
        found.append(losses(trainings))  # one of them is plain
        during = len(balances[1].report()[0].by_status)
        balances[1].remove()
        found.append(losses(trainings))
        return found, during


def stage(group, run):
    """Whether this rank's stage has MoE layers, its losses, and the reports on its layers."""
    with megatron(run):
        training = Training(run)
        has_experts = any("experts" in name for name, _ in training.named_parameters())
        losses, said = training.gradients(training.batches()), str(training.balance)
        training.close()
        return has_experts, losses, said
