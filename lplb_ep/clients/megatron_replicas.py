"""Static copies of Megatron-Core's experts: modules of their own, beside those of the model.

The model keeps its E / R experts on a rank, so that DDP, optimizer and checkpoints see no copies.
A copy's gradients go home before DDP hands gradients on, and its weights come at the next dispatch.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ContractError
from ..layer import Layer
from ..placement.table import Placement
from ..planning.solve import solve
from ..weights.replicas import Replicas
from .balance import Balance, BalancedLayer, refuse

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StaticCopies:
    """The copies of one layer's experts. Construction is collective.

    Args:
        name: of the layer.
        local_experts: this rank's own, in the router's order.
        placement: homes in the router's order, and replicas behind them.
        group: the expert-parallel group.
    """

    def __init__(
        self, name: str, local_experts: nn.ModuleList, placement: Placement, group: Any
    ) -> None:
        self.slots = nn.ModuleList(local_experts)
        for _ in range(placement.num_local_slots - len(local_experts)):
            self.slots.append(_twin(local_experts[0]))
        layer = Layer(placement)
        self.replicas = Replicas(self.slots, layer, group)
        self.balanced = BalancedLayer(name, layer, replicas=self.replicas)
        self._first = next(local_experts.parameters())
        self._are_old, self._are_trained = True, False

    def modules(self, rows: Tensor) -> tuple[Tensor, list[nn.Module]]:
        """The rows, and what computes each local slot."""
        return rows, [*self.slots]

    def is_of(self, ddp: Any) -> bool:
        """Whether a DDP reduces the gradients of this layer's homes."""
        return self._first in ddp.param_to_bucket_group

    def prepare(self) -> None:
        """Brings weights where they are due: a batch is to be dispatched. Collective.

        Raises:
            ContractError: gradients are wanted, and no DDP of Megatron-Core takes them.
        """
        if torch.is_grad_enabled():
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


def placements_for(
    layers: Mapping[str, Any], replicas: int, load: Tensor | None, given: Any
) -> list[Placement]:
    """A placement for each layer, homes in the router's order.

    Args:
        layers: the MoE layers, by name.
        replicas: D, of a rank.
        load: [L, E] tokens; None: equal.
        given: a placement for all layers, or by the layers' numbers; None: made for the load.

    Raises:
        ContractError: homes are elsewhere, or a layer has no placement.
        ValueError: the shape of `load`.
    """
    manager = next(iter(layers.values())).token_dispatcher._comm_manager
    num_experts, num_ranks = manager.num_experts, manager.group.size()
    if given is None:
        loads = torch.ones(len(layers), num_experts) if load is None else load
        if loads.shape != (len(layers), num_experts):
            raise ValueError(
                f"load must be [{len(layers)}, {num_experts}], layers and experts; got "
                f"{list(loads.shape)}"
            )
        return [placement_for(row, num_ranks, replicas) for row in loads]
    placements = []
    for name, module in layers.items():
        found = given if isinstance(given, Placement) else given.get(module.layer_number)
        refuse(name, [*_misfits(found, num_experts, num_ranks)])
        placements.append(found)
    return placements


def placement_for(load: Tensor, num_ranks: int, replicas: int) -> Placement:
    """Replicas for a load, homes in the router's order: those that a batch of it takes as guests.

    Slots that no guest takes get the expert with most load that is on another rank.

    Args:
        load: [E] tokens.
        num_ranks: R.
        replicas: D, of a rank.
    """
    num_experts = len(load)
    homes = Placement.homes_only(num_experts, num_ranks, replicas)
    scaled = (load.double() / load.double().sum().clamp(min=1) * 2**20).long().cpu()
    guests = solve(scaled, homes, guest_tolerance=0.0, guest_min_tokens=1).guests
    assert guests is not None, "the placement has guest slots"
    own, slots = num_experts // num_ranks, []
    for rank, chosen in enumerate(guests.tolist()):
        here = [*range(rank * own, (rank + 1) * own), *(e for e in chosen if e >= 0)]
        others = sorted(
            set(range(num_experts)) - set(here),
            key=lambda e: (-int(scaled[e]), (e // own - rank) % num_ranks, e),
        )
        slots += [*here, *others[: own + replicas - len(here)]]
    return Placement(slots, num_ranks)


def send_home_with_ddp(made: Balance, copies: Sequence[StaticCopies]) -> None:
    """Has gradients of copies sent home before a DDP reduces any, until `made` is removed."""
    from megatron.core.distributed import DistributedDataParallel

    original: Callable[..., Any] = DistributedDataParallel.finish_grad_sync

    def finish_grad_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = [layer for layer in copies if layer.is_of(self)]
        if own and self.ddp_config.overlap_grad_reduce:
            refuse("a model with replicas", ["overlap_grad_reduce is True: turn it off"])
        for layer in own:
            layer.reduce_gradients()
        return original(self, *args, **kwargs)

    made.replace(DistributedDataParallel, "finish_grad_sync", finish_grad_sync)


def _misfits(placement: Placement | None, num_experts: int, num_ranks: int) -> list[str]:
    if placement is None:
        return ["no placement is given for it"]
    if (placement.num_experts, placement.num_ranks) != (num_experts, num_ranks):
        return [
            f"it has {num_experts} experts on {num_ranks} ranks, and its placement "
            f"{placement.num_experts} on {placement.num_ranks}"
        ]
    if placement.num_guests_per_rank:
        return ["its placement has guest slots: say guests="]
    own = num_experts // num_ranks
    homes = [e // own * placement.num_local_slots + e % own for e in range(num_experts)]
    if placement.home.tolist() != homes:
        return [
            "its placement has homes elsewhere than in the router's order, which weights and "
            "checkpoints have"
        ]
    return []


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
