"""Static copies of Megatron-Core's experts: modules of their own, beside those of the model.

The model keeps its E / R experts on a rank, so that DDP, optimizer and checkpoints see no copies.
A copy's gradients go home before DDP hands a bucket on, and its weights come at the next dispatch.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..comm.alltoall import limit_of_experts
from ..comm.collectives import together
from ..comm.torch_exchange import TorchExchange, most_of
from ..errors import ContractError
from ..layer import Layer
from ..logs import logger
from ..placement.table import Placement
from ..weights.guest_gradients import hand_on
from ..weights.pool import outside_of_checkpoints
from ..weights.replicas import Replicas
from .balance import Balance, BalancedLayer, SharedReplacement

log = logger(__name__)

_requires_grad = attrgetter("requires_grad")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StaticCopies:
    """The copies of one layer's experts. Construction is collective.

    Args:
        name: of the layer.
        local_experts: this rank's own.
        placement: has their homes, and replicas in the other slots.
        group: the expert-parallel group.
    """

    def __init__(
        self, name: str, local_experts: nn.ModuleList, placement: Placement, group: Any
    ) -> None:
        first, own = group.rank() * placement.num_local_slots, iter(local_experts)
        homes = {*placement.home.tolist()}
        here = range(first, first + placement.num_local_slots)
        self.slots = nn.ModuleList(
            next(own) if slot in homes else _twin(local_experts[0]) for slot in here
        )
        # The same order on all ranks, wherever the homes are: autograd follows it.
        self._order = sorted(range(len(here)), key=lambda n: (here[n] not in homes, n))
        self.num_own, self._group = len(local_experts), group
        self._exchange = TorchExchange(group, limit_of_experts(), "weights")
        self.own = frozenset(self._order[: self.num_own])  # local slots
        layer = Layer(placement, name=name)
        self.replicas = Replicas(self.slots, layer, group)
        self.balanced = BalancedLayer(layer, replicas=self.replicas)
        self._own = [*local_experts.parameters()]
        self._flags = [*map(_requires_grad, self._own)]
        self._trained = [p for p in self._own if p.requires_grad]
        self._are_old = True
        self._are_in_ddp = self._are_trained = self._has_said = False
        layer.watch(self)

    @property
    def is_valid(self) -> bool:
        """Whether the same parameters are trained as at construction: copies are so. Local."""
        is_valid = [*map(_requires_grad, self._own)] == self._flags
        if not is_valid and not self._has_said:
            log.warning(
                "batches of %s go home: experts are frozen or trained (requires_grad) that were not"
                " when the model was balanced. Call remove() and balance() again",
                self.balanced.name,
            )
        self._has_said = not is_valid
        return is_valid

    def mark_valid(self) -> None:
        """Nothing, as `mark_stale`: copies are trained as at construction, or not."""

    def mark_stale(self) -> None:
        """Nothing."""

    def modules(self, x: Tensor) -> tuple[Tensor, list[Callable[..., Any]]]:
        """The rows to go on with, and what computes each local slot."""
        x, of_slots = self._watched(x)
        return x, [
            functools.partial(_run, slot, weights)
            for slot, weights in zip(self.slots, of_slots, strict=True)
        ]

    def weights(self, x: Tensor) -> tuple[Tensor, dict[str, tuple[list[Tensor]]]]:
        """The rows to go on with, and by name the weights of each local slot."""
        x, of_slots = self._watched(x)
        return x, {name: ([of[name] for of in of_slots],) for name in of_slots[0]}

    def late_weights(self) -> tuple[dict[str, tuple[list[Tensor]]], Callable[[], None]]:
        """As `weights`, as leaves whose gradients come behind the backward pass; what takes them.

        It is called once the leaves have `grad`, and hands the homes' gradients on.
        """
        order = self._in_order()
        leaves = [
            [p.detach().requires_grad_(p.requires_grad) for p in slot.parameters()]
            for slot in order
        ]

        def take() -> None:
            own, copies = leaves[: self.num_own], leaves[self.num_own :]
            self.take_gradients([leaf.grad for of_slot in copies for leaf in of_slot])
            homes = [p for slot in order[: self.num_own] for p in slot.parameters()]
            hand_on(homes, [leaf.grad for of_slot in own for leaf in of_slot])

        of_slots = dict(zip(self._order, leaves, strict=True))
        names = [name for name, _ in order[0].named_parameters()]
        return {
            name: ([of_slots[slot][number] for slot in range(len(order))],)
            for number, name in enumerate(names)
        }, take

    def is_in(self, bucket_group: Any) -> bool:
        """Whether DDP reduces gradients of this layer's homes with these buckets."""
        return not bucket_group.params.isdisjoint(self._trained)

    def prepare(self) -> int:
        """Brings weights where they are due: a batch is to be dispatched. Collective.

        Returns:
            0: copies are no micro-batch's alone.

        Raises:
            ContractError: gradients are wanted, and no DDP of Megatron-Core takes them.
            RankError: so it is on another rank.
        """
        if self._trained and torch.is_grad_enabled():
            self._start_gradients()
        if self._are_old or self._were_written():
            self.replicas.copy_weights()
            self._are_old = False
        return 0

    def _were_written(self) -> bool:
        """Whether weights were written on a rank without a step, where nothing is trained.

        That is inference behind `load_state_dict`. Collective there. In training a batch goes home
        then, until the step's gradients are reduced: ranks need not agree on each batch.
        """
        return not torch.is_grad_enabled() and bool(
            most_of(self._exchange, not self.replicas.is_valid)
        )

    def _start_gradients(self) -> None:
        """Has memory for gradients of copies, which are sent on all ranks or on none."""
        if not self._are_in_ddp:
            with together(self._group, f"gradients of {self.balanced.name}'s replicas"):
                self._check_ddp()
        self._are_in_ddp = self._are_trained = True
        for slot in self._in_order()[self.num_own :]:
            for parameter, home in zip(slot.parameters(), self._own, strict=False):
                copied: Any = parameter
                if copied.requires_grad and not hasattr(copied, "main_grad"):
                    with outside_of_checkpoints():
                        dtype = home.main_grad.dtype  # type: ignore[attr-defined]
                        copied.main_grad = torch.zeros_like(copied, dtype=dtype)

    def _check_ddp(self) -> None:
        if not all(hasattr(p, "main_grad") for p in self._trained):
            raise ContractError(
                "gradients of replicas go home before Megatron-Core's DistributedDataParallel "
                "hands them on, and the model is in none"
                if all(map(_requires_grad, self._trained))
                else f"experts of {self.balanced.name} were frozen (requires_grad) between "
                "balance() and Megatron-Core's DistributedDataParallel: freeze them before both"
            )

    def take_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds a batch's gradients to those of this rank's copies.

        Args:
            gradients: of each copy's parameters, one copy after the other.
        """
        slots = self._in_order()[self.num_own :]
        copies: list[Any] = [p for slot in slots for p in slot.parameters()]
        for parameter, gradient in zip(copies, gradients, strict=True):
            if gradient is not None:
                parameter.main_grad.add_(gradient)

    def reduce_gradients(self) -> None:
        """Sends gradients home, if batches were dispatched since the last time. Collective."""
        if self._are_trained:
            self.replicas.reduce_gradients(are_alike=True)  # all that are trained have some
            self._are_old, self._are_trained = True, False

    def drop_gradients(self) -> None:
        """Zeroes the copies' gradients, of a step that was given up. On all ranks alike."""
        self._are_trained = False
        for slot in self._in_order()[self.num_own :]:
            for parameter in slot.parameters():
                if hasattr(parameter, "main_grad"):
                    parameter.main_grad.zero_()

    def _in_order(self) -> list[nn.Module]:
        """This rank's own experts, then its copies."""
        return [self.slots[number] for number in self._order]

    def _watched(self, x: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The rows and by slot and name the weights, of which `_Copies` sees the gradients."""
        slots = [dict(slot.named_parameters()) for slot in self._in_order()]
        tensors = [
            parameter if number < self.num_own else parameter.detach()
            for number, of_slot in enumerate(slots)
            for parameter in of_slot.values()
        ]
        if self._trained and torch.is_grad_enabled():
            x, *tensors = _Copies.apply(self, x, *tensors)
        rest, found = iter(tensors), {}
        for number, of_slot in zip(self._order, slots, strict=True):
            found[number] = {name: next(rest) for name in of_slot}
        return x, [found[number] for number in range(len(slots))]


class _Copies(torch.autograd.Function):
    """Passes a layer's rows and weights on. Once their gradients are there it keeps the copies'.

    Homes get theirs behind this, and DDP hands a bucket on when the last one has. So by then all
    copies have what they add. The rows have it run on every rank, also where none came.
    """

    @staticmethod
    def forward(ctx: Any, copies: StaticCopies, x: Tensor, *tensors: Tensor) -> Any:
        """Returns the rows and weights that it is given, first those of homes."""
        ctx.set_materialize_grads(False)
        num_names = len(tensors) // len(copies.slots)
        ctx.copies, ctx.num_own = copies, num_names * copies.num_own
        copied = copies.slots[copies._order[-1]].parameters()
        is_fixed = [not t.requires_grad for t in tensors[: ctx.num_own]]
        is_fixed += [not p.requires_grad for p in copied] * (len(copies.slots) - copies.num_own)
        ctx.mark_non_differentiable(
            *(t for t, fixed in zip(tensors, is_fixed, strict=True) if fixed)
        )
        return x, *tensors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, x: Tensor | None, *gradients: Tensor | None) -> Any:
        """Gradients of the rows and of the homes."""
        own, copies = gradients[: ctx.num_own], gradients[ctx.num_own :]
        ctx.copies.take_gradients(copies)
        return None, x, *own, *(None for _ in copies)


_alive: list[weakref.ref[StaticCopies]] = []
_start_grad_sync, _zero_grad_buffer = SharedReplacement(), SharedReplacement()


def send_home_with_ddp(made: Balance, copies: Sequence[StaticCopies]) -> None:
    """Has gradients of copies sent home, or dropped, before DDP's are, until `made` is removed.

    DDP sends buckets from one function. It is called when the last of their gradients is ready
    (`overlap_grad_reduce`), when a pipeline's schedule says so, or at the end of a step. The
    order is the same on all ranks, since they have as many experts of the same shapes.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    _start_grad_sync.give(made, _ParamAndGradBucketGroup, "start_grad_sync", _behind_homes)
    _zero_grad_buffer.give(made, DistributedDataParallel, "zero_grad_buffer", _with_copies)
    added = [weakref.ref(layer) for layer in copies]
    _alive[:] = [*(layer for layer in _alive if layer() is not None), *added]

    def forget() -> None:
        _alive[:] = [layer for layer in _alive if layer not in added]

    made.undo_with(forget)


def _layers_in(bucket_groups: Sequence[Any]) -> list[StaticCopies]:
    """The layers of which DDP reduces gradients with these buckets, in the order of all ranks."""
    alive = [layer for known in _alive if (layer := known()) is not None]
    return [layer for layer in alive if any(map(layer.is_in, bucket_groups))]


def _behind_homes(original: Callable[..., Any]) -> Callable[..., Any]:
    """The reduction of buckets, once the gradients of copies are in them."""

    @functools.wraps(original)
    def start_grad_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        for layer in _layers_in([self]):
            layer.reduce_gradients()
        return original(self, *args, **kwargs)

    return start_grad_sync


def _with_copies(original: Callable[..., Any]) -> Callable[..., Any]:
    """The start of a step's gradients, those of copies among them."""

    @functools.wraps(original)
    def zero_grad_buffer(self: Any) -> None:
        for layer in _layers_in([*self.bucket_groups, *self.expert_parallel_bucket_groups]):
            layer.drop_gradients()
        original(self)

    return zero_grad_buffer


def _run(module: nn.Module, weights: dict[str, Tensor], *args: Any) -> Any:
    """Calls a module with other tensors than its own parameters."""
    return functional_call(module, weights, args, tie_weights=False)


def _twin(module: nn.Module) -> nn.Module:
    """A module like another one, with parameters of its own and nobody's hooks."""
    twin = copy.copy(module)
    for name in _HOOKS:
        setattr(twin, name, OrderedDict())
    twin._parameters = {
        name: None
        if parameter is None
        else nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        for name, parameter in module._parameters.items()
    }
    twin._modules = {
        name: None if part is None else _twin(part) for name, part in module._modules.items()
    }
    return twin
