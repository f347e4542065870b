"""Static copies of Megatron-Core's experts: modules of their own, beside those of the model.

The model keeps its E / R experts on a rank, so that DDP, optimizer and checkpoints see no copies.
A copy's gradients go home before DDP hands gradients on, and its weights come at the next dispatch.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ContractError
from ..layer import Layer
from ..placement.table import Placement
from ..weights.replicas import Replicas
from .balance import Balance, BalancedLayer, SharedReplacement, refuse

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
        self.slots = nn.ModuleList(
            next(own) if slot in homes else _twin(local_experts[0])
            for slot in range(first, first + placement.num_local_slots)
        )
        layer = Layer(placement, name=name)
        self.replicas = Replicas(self.slots, layer, group)
        self.balanced = BalancedLayer(layer, replicas=self.replicas)
        trained = [p for p in local_experts.parameters() if p.requires_grad]
        self._first = trained[0] if trained else None
        self._are_old, self._are_trained = True, False

    def modules(self, x: Tensor) -> tuple[Tensor, list[Callable[..., Any]]]:
        """The rows, and what computes each local slot."""
        return x, [*self.slots]

    def weights(self, x: Tensor) -> tuple[Tensor, dict[str, tuple[list[Tensor]]]]:
        """The rows, and by name the weights of each local slot."""
        named = [dict(slot.named_parameters()) for slot in self.slots]
        return x, {name: ([of_slot[name] for of_slot in named],) for name in named[0]}

    def is_of(self, ddp: Any) -> bool:
        """Whether a DDP reduces the gradients of this layer's homes."""
        return self._first is not None and self._first in ddp.param_to_bucket_group

    def prepare(self) -> None:
        """Brings weights where they are due: a batch is to be dispatched. Collective.

        Raises:
            ContractError: gradients are wanted, and no DDP of Megatron-Core takes them.
        """
        if torch.is_grad_enabled() and self._first is not None:
            if not hasattr(self._first, "main_grad"):
                raise ContractError(
                    "gradients of replicas go home before Megatron-Core's "
                    "DistributedDataParallel hands them on, and the model is in none"
                )
            self._are_trained = True
        if self._are_old:
            self.replicas.copy_weights()
            self._are_old = False

    def reduce_gradients(self) -> None:
        """Sends gradients home, if batches were trained since the last time. Collective."""
        if self._are_trained:
            self.replicas.reduce_gradients()
            self._are_old, self._are_trained = True, False


_alive: list[StaticCopies] = []
_finish_grad_sync = SharedReplacement()


def send_home_with_ddp(made: Balance, copies: Sequence[StaticCopies]) -> None:
    """Has gradients of copies sent home before a DDP reduces any, until `made` is removed."""
    from megatron.core.distributed import DistributedDataParallel

    _finish_grad_sync.give(made, DistributedDataParallel, "finish_grad_sync", _behind_homes)
    _alive.extend(copies)
    for layer in copies:
        made.undo_with(functools.partial(_alive.remove, layer))


def _behind_homes(original: Callable[..., Any]) -> Callable[..., Any]:
    """DDP's end of a step's gradients, once those of copies are home."""

    @functools.wraps(original)
    def finish_grad_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = [layer for layer in _alive if layer.is_of(self)]
        if own and self.ddp_config.overlap_grad_reduce:
            refuse("a model with replicas", ["overlap_grad_reduce is True: turn it off"])
        for layer in own:
            layer.reduce_gradients()
        return original(self, *args, **kwargs)

    return finish_grad_sync


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
