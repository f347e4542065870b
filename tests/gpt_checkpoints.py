"""Checkpoints of the small GPT of `gpt.py`, by the numbers of its experts."""

import contextlib
import dataclasses
import queue
from unittest import mock

import torch
from gpt import EXPERTS, Run, Training, chunks_of, config_of, megatron, renumber

from lplb_ep import Placement

FULLY = {"distrib_optim_sharding_type": "fully_reshardable"}
SHARDED = dict(use_distributed_optimizer=True)


class FusedAdam(torch.optim.Optimizer):
    """Stands for Transformer Engine's, which counts steps by the group of parameters.

    With torch's, Megatron-Core's distributed optimizer loads no checkpoint.
    """

    def __init__(self, params, lr, weight_decay, betas, eps, capturable, adam_w_mode):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + bool(group["params"])
            one, two = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq") if not state else ():
                    state[name] = torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - one)
                state["exp_avg_sq"].lerp_(p.grad**2, 1 - two)
                mean = state["exp_avg"] / (1 - one ** group["step"])
                scale = (state["exp_avg_sq"] / (1 - two ** group["step"])).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(
                    mean, scale, value=-group["lr"]
                )


@contextlib.contextmanager
def fused_adam():
    """Megatron-Core as if Transformer Engine's Adam were installed."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with (
        mock.patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
    ):
        yield


def by_expert(training, value=lambda p: p.detach()):
    """Values of parameters on this rank, those of experts by their numbers among all."""
    from megatron.core import parallel_state

    own, rank = EXPERTS // training.run.ep, parallel_state.get_expert_model_parallel_rank()
    here = {}  # by the name of a layer
    for layer in training.balance.layers:
        home = layer.layer.placement.home.tolist()  # the slot of each expert
        by_slot = sorted(range(EXPERTS), key=home.__getitem__)
        here[layer.name] = by_slot[rank * own : (rank + 1) * own]
    found = {}
    for name, parameter in training.named_parameters():
        parts = name.split(".")
        if "experts" in parts:
            layer = ".".join(parts[1 : parts.index("experts")])
            in_order = range(rank * own, (rank + 1) * own)
            renumber(parts, here.get(layer, in_order).__getitem__)
        found[".".join(parts)] = value(parameter).float().clone()
    return found


def saved(training, metadata, is_loading=False):
    model = training.chunks[0].module
    names = model.sharded_state_dict(metadata=metadata)
    state = training.optimizer.sharded_state_dict(
        model.sharded_state_dict(metadata=metadata), is_loading=is_loading, metadata=metadata
    )
    return {"model": names, "optimizer": state}


def steps(training, batches):
    losses = []
    for _ in range(training.run.steps):
        losses += training.gradients(batches)
        training.optimizer.step()
    return losses


def go(group, run, source=None, target=None, metadata=None):
    """Loads a checkpoint, trains, and saves one. Weights before and after, losses, and a report."""
    with megatron(run), fused_adam(), contextlib.closing(Training(run)) as training:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        if source:
            for _, parameter in training.named_parameters():
                parameter.data.zero_()
            with torch.no_grad():
                state = dist_checkpointing.load(saved(training, metadata, True), source)
                training.chunks[0].module.load_state_dict(state["model"])
                training.optimizer.load_state_dict(state["optimizer"])
        before = by_expert(training)
        losses = steps(training, training.batches())
        for chunk in training.chunks if run.ddp.get("overlap_param_gather") else []:
            chunk.start_param_sync(force_sync=True)
        is_sharded = run.ddp.get("use_distributed_optimizer")  # each rank has a part of the sums
        gradients = {} if is_sharded else by_expert(training, lambda p: p.main_grad)
        if target:
            # Its queue is a process, and these ranks may have none.
            results = mock.Mock(return_value=queue.Queue())
            with mock.patch.object(filesystem_async, "get_write_results_queue", results):
                dist_checkpointing.save(saved(training, metadata), target)
        report = training.balance.report()
        after = by_expert(training)
        return before, after, losses, gradients, report


def settled(group, run, late):
    """What `balance` says of other homes where experts are in DDP already, or ranks disagree."""
    from lplb_ep.clients.megatron import balance

    with megatron(run):
        config = config_of(run)
        off = dataclasses.replace(run, balance={"off": True})
        chunks = Training(off).chunks if late else chunks_of(run, config)
        try:
            balance(chunks, load=load_of(0 if late else group.rank() // run.ep))
        except Exception as error:  # noqa: BLE001  (the test asks which one)
            return type(error).__name__, str(error)
    return "", ""


def load_of(seed):
    """Tokens of the experts of two layers; homes for them are in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, EXPERTS, generator=generator)


def placed(seed, **options):
    """With homes that are in no order."""
    return Run(**{"balance": {"load": load_of(seed)}, **options})


def placements(redundant=0, guests=0):
    """By the layers' numbers."""
    sizes = dict(num_ranks=2, num_redundant_per_rank=redundant, num_guests_per_rank=guests)
    return {n + 1: Placement.from_history(row.numpy(), **sizes) for n, row in enumerate(load_of(0))}


def whole(results, part):
    """Of all ranks: the experts are on one or several, all else on each."""
    found = {}
    for result in results:
        for name, value in result[part].items():
            torch.testing.assert_close(found.setdefault(name, value), value, rtol=0, atol=0)
    return found


def same(results, others, part, **tolerance):
    one, other = whole(results, part), whole(others, part)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            other[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )
