"""Stands for Transformer Engine: its grouped linear layer in torch, with the attributes of 2.6.

Megatron-Core's own wrappers of it, and its `TEGroupedMLP`, run over this one.
"""

import contextlib
import copy
import functools
import importlib.util
import queue
import sys
import types
from unittest import mock

import torch
from torch import nn

VERSION = "2.6.0"


class GroupedLinear(nn.Module):
    """Of Transformer Engine: `weight0`, … and `bias0`, … are parameters, or empty tensors."""

    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        fuse_wgrad_accumulation=False,
        bias=True,
        return_bias=False,
        params_dtype=None,
        device="cuda",
        delay_wgrad_compute=False,
        **_,
    ):
        super().__init__()
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias, self.return_bias, self.apply_bias = (
            bias,
            return_bias,
            bias and not return_bias,
        )
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        make = functools.partial(torch.empty, dtype=params_dtype, device=device)
        for i in range(num_gemms):
            setattr(self, f"weight{i}", nn.Parameter(make(out_features, in_features)))
            setattr(self, f"bias{i}", nn.Parameter(make(out_features)) if bias else make(0))
        self.delayed = queue.Queue() if delay_wgrad_compute else None
        self.wgrad_accumulation_and_reduce_hooks = []
        for parameter in self.parameters() if delay_wgrad_compute else []:
            parameter.skip_backward_post_hook = True

    def register_wgrad_accumulation_and_reduce_hooks(self, hook):
        self.wgrad_accumulation_and_reduce_hooks.append(hook)

    def _trigger_wgrad_accumulation_and_reduce_hooks(self):
        for hook in self.wgrad_accumulation_and_reduce_hooks:
            hook()

    def need_backward_dw(self):
        return self.delayed is not None

    @torch.no_grad()
    def backward_dw(self):
        if not self.need_backward_dw() or self.delayed.empty():
            return
        gradients, wgrads, biases = self.delayed.get()()
        for wgrad, gradient in zip(wgrads, gradients, strict=True):
            (wgrad.add_ if self.fuse_wgrad_accumulation else wgrad.copy_)(gradient)
        if not self.fuse_wgrad_accumulation:
            for i in range(self.num_gemms):
                getattr(self, f"weight{i}").grad = wgrads[i]
        for i, gradient in enumerate(biases):
            bias = getattr(self, f"bias{i}")
            if bias.grad is None:
                bias.grad = gradient
        self._trigger_wgrad_accumulation_and_reduce_hooks()

    def init_fp8_metadata(self, num_gemms=1):
        """There is none."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        """There is none."""

    def forward(self, inp, m_splits, is_first_microbatch=None):
        if len(m_splits) != self.num_gemms:
            raise ValueError(f"{len(m_splits)} splits for {self.num_gemms} GEMMs")
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        # In FP8 it keeps casts for the next micro-batch, which must not be of weights that change.
        assert is_first_microbatch is None or self._parameters, "casts would be kept"
        given = biases if self.apply_bias else []
        fused = self.fuse_wgrad_accumulation
        out = _Grouped.apply(inp, m_splits, fused, self.delayed, *weights, *given)
        return (out, biases) if self.return_bias else out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inp, m_splits, fused, delayed, *tensors):
        n = len(m_splits)
        ctx.save_for_backward(inp)
        ctx.delayed = delayed
        ctx.tensors, ctx.m_splits, ctx.fused = tensors, m_splits, fused
        biases = tensors[n:] or [None] * n
        return torch.cat(
            [
                nn.functional.linear(x, w.detach(), None if b is None else b.detach())
                for x, w, b in zip(inp.split(m_splits), tensors, biases, strict=False)
            ]
        )

    @staticmethod
    def backward(ctx, grad):
        (inp,) = ctx.saved_tensors
        n, parts = len(ctx.m_splits), grad.split(ctx.m_splits)
        weights = ctx.tensors[:n]
        dgrad = torch.cat([g @ w for g, w in zip(parts, weights, strict=True)])
        inputs, num_biases = inp.split(ctx.m_splits), len(ctx.tensors) - n
        if not weights[0].requires_grad:
            return dgrad, None, None, None, *[None] * len(ctx.tensors)

        def gradients():
            return [g.t() @ x for g, x in zip(parts, inputs, strict=True)]

        def biases():
            return [g.sum(0) for g in parts[:num_biases]]

        # Rows of one tensor, as Transformer Engine returns them.
        nothing = float("nan")
        wgrads = [*torch.full((n, *weights[0].shape), nothing, dtype=weights[0].dtype)]
        for weight in weights if ctx.fused else []:
            weight.grad_added_to_main_grad = True
        if ctx.delayed is not None:
            into = [weight.main_grad for weight in weights] if ctx.fused else wgrads
            ctx.delayed.put(lambda: (gradients(), into, biases()))
            return dgrad, None, None, None, *wgrads, *[None] * num_biases
        for i, gradient in enumerate(gradients()):
            if ctx.fused:
                weights[i].main_grad.add_(gradient)
            else:
                wgrads[i].copy_(gradient)
        return dgrad, None, None, None, *wgrads, *biases()


class _Package(types.ModuleType):
    """Has a class for each name that it is asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


@functools.cache
def wrappers():
    """Megatron-Core's module of wrappers, over this stand-in; the rest of it sees none."""
    from megatron.core import utils
    from packaging.version import Version

    names = ["", ".common", ".common.recipe", ".pytorch", ".pytorch.fp8"]
    names += [".pytorch.distributed", ".pytorch.ops"]
    found = {f"transformer_engine{name}": _Package(name) for name in names}
    for name, module in found.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(found[parent], last, module)
    found["transformer_engine"].__version__ = VERSION
    found["transformer_engine.pytorch"].GroupedLinear = GroupedLinear
    spec = importlib.util.find_spec("megatron.core.extensions.transformer_engine")
    module = importlib.util.module_from_spec(spec)
    version = mock.patch.object(utils, "_te_version", Version(VERSION))
    with version, mock.patch.dict(sys.modules, found):
        spec.loader.exec_module(module)
    module.is_te_min_version = lambda least, *_: Version(VERSION) >= Version(least)
    return module


def transformer_engine():
    """Configs that are made within see Transformer Engine."""
    from megatron.core.transformer import transformer_config

    return mock.patch.object(transformer_config, "is_te_min_version", return_value=True)


@contextlib.contextmanager
def without_fp8():
    """Megatron-Core's checkpoints of a module's inputs alone ask Transformer Engine for FP8."""
    from megatron.core.tensor_parallel import random

    off = types.SimpleNamespace(is_fp8_enabled=lambda: False)
    nothing = lambda **_: contextlib.nullcontext()  # noqa: E731
    given = dict(FP8GlobalStateManager=off, fp8_autocast=nothing)
    with mock.patch.multiple(random, **given, activation_recompute_forward=nothing, create=True):
        yield


@contextlib.contextmanager
def grouped_experts(fused):
    """Models that are built within have a `TEGroupedMLP` in each MoE layer.

    Args:
        fused: whether it adds weight gradients to `main_grad` by itself.
    """
    from megatron.core.models import backends
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

    found = wrappers()
    parts = GroupedMLPSubmodules(
        linear_fc1=found.TEColumnParallelGroupedLinear,
        linear_fc2=found.TERowParallelGroupedLinear,
    )

    def build(num_local_experts, config, pg_collection=None, name=None):
        config = copy.copy(config)
        config.gradient_accumulation_fusion = fused
        return TEGroupedMLP(num_local_experts, config, parts, pg_collection, name)

    modules = mock.Mock(return_value=build)
    with mock.patch.object(backends.LocalSpecProvider, "grouped_mlp_modules", modules):
        yield
