"""The experts of Megatron-Core's MoE layers: a module each, or the weights of one grouped GEMM.

Both keep their own forward pass. It runs with a stand-in for `self`, whose experts are those of all
slots of a rank. Nothing is registered with the model.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ContractError

_LINEARS = ("linear_fc1", "linear_fc2")
_KINDS = ("weight", "bias")


Weights = Mapping[str, Sequence[Sequence[Tensor]]]


class Slots(Protocol):
    """What computes the slots of a rank: guests, or copies that stay."""

    @property
    def own(self) -> Collection[int]:
        """The local slots of the rank's own experts; the others have copies."""

    def prepare(self) -> int:
        """Says that a batch is to be dispatched. Returns which of the micro-batches in flight."""

    def modules(self, x: Tensor) -> tuple[Tensor, list[Callable[..., Any]]]:
        """The rows to go on with, and a callable for each slot."""

    def weights(self, x: Tensor) -> tuple[Tensor, Weights]:
        """The rows to go on with. By name the weights of all slots, in lists that follow."""

    def late_weights(self) -> tuple[Weights, Callable[[], None]]:
        """As `weights`, as leaves whose gradients come behind the backward pass; what takes them.

        It is called once the leaves have `grad`, and hands gradients on to the parameters.
        """


class Experts(Protocol):
    """The experts of a layer on this rank."""

    local: nn.ModuleList
    """Its E / R experts, each a module with parameters of its own."""
    copies: dist.ProcessGroup
    """The ranks that have the same experts (expert data parallelism)."""

    def methods(self, slots: Slots) -> dict[str, Callable[..., Any]]:
        """By name the experts' own forward pass, and what belongs to it, over a rank's slots."""

    def saved(self, number: int, expert: int, num_experts: int, *args: Any) -> dict[str, Any]:
        """What distributed checkpoints hold of one expert, by the names of its place.

        Args:
            number: of its place on this rank.
            expert: its number among all.
            num_experts: E.
            args: of Megatron's `sharded_state_dict`.
        """


class SequentialExperts:
    """Those of `SequentialMLP`: a list of modules."""

    def __init__(self, experts: Any) -> None:
        self._experts, self.local = experts, experts.local_experts
        self.copies = experts.dp_group

    def methods(self, slots: Slots) -> dict[str, Callable[..., Any]]:
        """As `Experts.methods`."""
        experts, own = self._experts, type(self._experts).forward

        def forward(rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Any:
            rows, modules = slots.modules(rows)
            counts = tokens_per_expert.tolist()
            of_slot = [*zip(modules, rows.split(counts), probs.split(counts), strict=True)]
            # Experts with many rows come first: the GPU is busy with them while the CPU launches
            # the others. Parameters of a rank's own experts get a gradient without rows, too:
            # DDP hands a bucket on when all of it have one.
            used = [n for n, count in enumerate(counts) if count or n in slots.own]
            outputs = {}
            for number in sorted(used, key=lambda n: -counts[n]):
                module, of_rows, of_probs = of_slot[number]
                alone = _StandIn(experts, {"local_experts": [module], "num_local_experts": 1})
                count = tokens_per_expert[number : number + 1]
                outputs[number], _ = own(alone, of_rows, count, of_probs)
            # Biases are within the outputs, as in Megatron-Core's own loop.
            in_order = [outputs[number] for number in used]
            return torch.cat(in_order) if len(in_order) > 1 else in_order[0], None

        return {"forward": forward}

    def saved(self, number: int, expert: int, num_experts: int, *args: Any) -> dict[str, Any]:
        """As `Experts.saved`."""
        alone = {"local_experts": [self.local[number]], "num_local_experts": 1}
        found = _saved(self._experts, alone, expert, num_experts, args)
        old, new = "local_experts.0.", f"local_experts.{number}."
        return {key.replace(old, new, 1): value for key, value in found.items()}


class GroupedExperts:
    """Those of `TEGroupedMLP`, whose two linear layers have `weight0`, `weight1`, … each."""

    def __init__(self, experts: Any) -> None:
        self._experts, self.local = experts, nn.ModuleList()
        self.copies = experts.linear_fc1._pg_collection.expt_dp
        self._shared: list[tuple[dict[str, Any], str, Any]] = []
        for number in range(experts.num_local_experts):
            expert = nn.Module()
            for name in _LINEARS:
                part, linear = nn.Module(), getattr(experts, name)
                for kind in _KINDS:
                    parameter = linear._parameters.get(f"{kind}{number}")
                    if parameter is not None:
                        part.register_parameter(kind, parameter)
                        self._shared.append((linear._parameters, f"{kind}{number}", parameter))
                expert.add_module(name, part)
            self.local.append(expert)

    def methods(self, slots: Slots) -> dict[str, Callable[..., Any]]:
        """As `Experts.methods`. Raises ContractError where the parameters are others by then."""
        experts, own = self._experts, type(self._experts).forward
        linears = [getattr(experts, name) for name in _LINEARS]
        is_late = any(getattr(linear, "delay_wgrad_compute", False) for linear in linears)
        passed: deque[_Passed] = deque()

        def forward(rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Any:
            self._check_shared()
            take: Callable[[], None] | None = None
            named: Weights
            if is_late and torch.is_grad_enabled():
                named, take = slots.late_weights()
            else:
                rows, named = slots.weights(rows)
            weights = {name: [t for part in parts for t in part] for name, parts in named.items()}
            given = {
                name: _with_weights(
                    linear, {kind: weights.get(f"{name}.{kind}", []) for kind in _KINDS}
                )
                for name, linear in zip(_LINEARS, linears, strict=True)
            }
            if take is not None:
                rows = _Pass.apply(passed, _Passed([*given.values()], take), rows)
            return own(_StandIn(experts, given), rows, tokens_per_expert, probs)

        def backward_dw() -> None:
            if not passed:
                return
            batch = passed.popleft()
            for linear in reversed(batch.linears):
                linear.backward_dw()
            batch.take()
            for linear in reversed(linears):  # what DDP has registered
                linear._trigger_wgrad_accumulation_and_reduce_hooks()

        return {"forward": forward, **({"backward_dw": backward_dw} if is_late else {})}

    def saved(self, number: int, expert: int, num_experts: int, *args: Any) -> dict[str, Any]:
        """As `Experts.saved`."""
        alone = {}
        for name in _LINEARS:
            linear = getattr(self._experts, name)
            own = getattr(self.local[number], name)._parameters.items()
            groups = _StandIn(linear._pg_collection, {"ep": _Of(expert, num_experts)})
            parameters = {f"{kind}0": parameter for kind, parameter in own}
            alone[name] = _twin(linear, 1, _parameters=parameters, _pg_collection=groups)
        given = {**alone, "num_local_experts": 1, "_modules": alone}
        found = _saved(self._experts, given, expert, num_experts, args)
        return {_numbered(key, number): value for key, value in found.items()}

    def _check_shared(self) -> None:
        for table, name, parameter in self._shared:
            if table.get(name) is not parameter:
                raise ContractError(
                    f"the experts' parameter {name} is another one than when they were balanced: "
                    "call balance() behind what replaces parameters"
                )


def experts_of(module: Any) -> Experts:
    """The experts of an MoE layer, which `obstacles` has nothing against."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    is_list = isinstance(module.experts, SequentialMLP)
    return SequentialExperts(module.experts) if is_list else GroupedExperts(module.experts)


def obstacles(experts: nn.Module) -> Iterator[str]:
    """What of a layer's experts is not supported."""
    from megatron.core.transformer.moe.experts import (
        InferenceGroupedMLP,
        SequentialMLP,
        TEGroupedMLP,
    )

    if isinstance(experts, SequentialMLP):
        for name, module in experts.named_modules():
            if getattr(module, "need_backward_dw", bool)():
                yield f"the weight gradients of its {name} are delayed: build a TEGroupedMLP"
                break
        return
    if not isinstance(experts, TEGroupedMLP) or isinstance(experts, InferenceGroupedMLP):
        yield f"its experts are a {type(experts).__name__}: build a SequentialMLP or a TEGroupedMLP"
        return
    for name in (
        "use_transformer_engine_op_fuser",
        "moe_single_grouped_weight",
        "moe_single_grouped_bias",
        "quant_recipe",
        "fine_grained_activation_offloading",
    ):
        if value := getattr(experts.config, name, None):
            yield f"{name} is {value!r}: turn it off"
    for name, parameter in experts.named_parameters():
        if type(parameter) is not nn.Parameter:
            yield f"its parameter experts.{name} is a {type(parameter).__name__}, and no plain one"
            break
        if hasattr(parameter, "gtp_remat_size"):
            yield f"its parameter experts.{name} is gathered for each batch (GTP)"
            break


class _Passed(NamedTuple):
    """A batch whose experts have run backward, but for the gradients of their weights."""

    linears: Sequence[Any]
    """The grouped linear layers that have run."""
    take: Callable[[], None]
    """As of `Slots.late_weights`."""


class _Pass(torch.autograd.Function):
    """Passes a batch's rows on, and notes when they have come back: in the order of the layers'."""

    @staticmethod
    def forward(ctx: Any, passed: deque[_Passed], batch: _Passed, rows: Tensor) -> Tensor:
        """Returns the rows that it is given."""
        ctx.passed, ctx.batch = passed, batch
        return rows

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> Any:
        """The gradient that it is given."""
        ctx.passed.append(ctx.batch)
        return None, None, rows


class _StandIn:
    """An object as its own code sees it, with some attributes replaced."""

    def __init__(self, original: Any, given: Mapping[str, Any]) -> None:
        self.__dict__.update(given, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _Of:
    """Stands for a process group whose ranks have an expert each."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def _with_weights(linear: Any, weights: Mapping[str, Sequence[Tensor]]) -> Any:
    """Transformer Engine's grouped linear layer, with other weights in other number.

    Args:
        linear: the layer.
        weights: of each expert, by "weight" and "bias"; there may be no biases.
    """
    given = {f"{kind}{n}": t for kind, of_kind in weights.items() for n, t in enumerate(of_kind)}
    number = len(weights["weight"])
    if not weights["bias"] and hasattr(linear, "bias0"):  # an empty tensor
        given.update({f"bias{n}": linear.bias0 for n in range(number)})
    return _twin(
        linear,
        number,
        **given,
        _parameters={},
        # Casts of weights would be kept for the next micro-batch, which has other guests.
        disable_parameter_transpose_cache=True,
        # What DDP has registered runs once all gradients are home.
        wgrad_accumulation_and_reduce_hooks=[],
    )


def _twin(linear: Any, number: int, **given: Any) -> Any:
    """A grouped linear layer with another number of experts, and other attributes."""
    twin = copy.copy(linear)
    twin.__dict__.update(given, num_gemms=number)  # past __setattr__, which registers parameters
    return twin


def _saved(
    experts: Any, alone: Mapping[str, Any], expert: int, num_experts: int, args: Sequence[Any]
) -> dict[str, Any]:
    """Megatron's own, as if a rank had this expert and no other."""
    stand_in = _StandIn(experts, {**alone, "ep_group": _Of(expert, num_experts)})
    found: dict[str, Any] = type(experts).sharded_state_dict(stand_in, *args)
    return found


def _numbered(key: str, number: int) -> str:
    """A name of a grouped linear layer's only expert, as that of one of many."""
    if key.endswith("._extra_state"):
        return f"{key}{number or ''}"
    return f"{key.removesuffix('0')}{number}"
