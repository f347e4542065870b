"""The placements of Megatron-Core's MoE layers: homes, replicas, and guest slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..deepep.contract import BUFFER_1_2_1
from ..placement.table import Placement
from .balance import guests_for, placement_for, refuse


def placements_for(
    layers: Mapping[str, Any], guests: int | None, replicas: int, load: Tensor | None, given: Any
) -> list[Placement]:
    """A placement for each layer: with guest slots, or with replicas.

    Args:
        layers: the MoE layers, by name.
        guests: guest slots of a rank; None: by the number of its experts.
        replicas: static copies of a rank; 0: guests.
        load: [L, E] tokens, for which homes are placed, or replicas chosen; None: equal.
        given: a placement for all layers, or by the layers' numbers; None: made for the load.

    Raises:
        ContractError: a layer has no placement, or one that does not fit.
        PlacementError: R does not divide E, or a number is negative.
        ValueError: what was asked for does not go together, or the shape of `load`.
    """
    manager = next(iter(layers.values())).token_dispatcher._comm_manager
    num_experts, num_ranks = manager.num_experts, manager.group.size()
    for name, module in layers.items():
        found = module.token_dispatcher._comm_manager.num_experts
        if found != num_experts:
            refuse(
                name, [f"it has {found} experts, and other layers {num_experts}: call it for each"]
            )
    if guests and replicas:
        raise ValueError("guests and replicas do not go together: say one of them")
    if given is not None:
        if guests or replicas or load is not None:
            raise ValueError("a placement says all: leave guests, replicas and load out")
        return _given(layers, given, num_experts, num_ranks)
    _check_number("replicas", replicas, 0)
    if guests is not None and not replicas:
        _check_number("guests", guests, 1)
    load = None if load is None else torch.as_tensor(load)
    if load is not None and load.shape != (len(layers), num_experts):
        raise ValueError(
            f"load must be [{len(layers)}, {num_experts}], layers and experts; got "
            f"{list(load.shape)}"
        )
    if replicas:
        rows = torch.ones(len(layers), num_experts) if load is None else load
        return [placement_for(row, num_ranks, replicas) for row in rows]
    slots = guests_for(num_experts, num_ranks) if guests is None else guests
    node = _ranks_per_node(num_ranks)
    if load is None:
        one = Placement.homes_only(num_experts, num_ranks, slots, num_ranks_per_node=node)
        return [one] * len(layers)
    return [
        Placement.from_history(
            row.cpu().numpy(),
            num_ranks=num_ranks,
            num_redundant_per_rank=0,
            num_ranks_per_node=node,
            num_guests_per_rank=slots,
        )
        for row in load
    ]


def _check_number(name: str, number: object, least: int) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name} must be a whole number from {least}; got {number!r}")


def _ranks_per_node(num_ranks: int) -> int | None:
    """The ranks of a node as DeepEP's `Buffer` has them; None: there is one node."""
    node = BUFFER_1_2_1.num_ranks_per_node
    return node if node and num_ranks > node else None


def _given(
    layers: Mapping[str, Any], given: Any, num_experts: int, num_ranks: int
) -> list[Placement]:
    if not isinstance(given, (Placement, Mapping)):
        raise TypeError(
            "placement must be a Placement, or a dictionary by layer_number as load_placements "
            f"returns it; got a {type(given).__name__}"
        )
    placements: list[Placement] = []
    for name, module in layers.items():
        found: Any = given if isinstance(given, Placement) else given.get(module.layer_number)
        refuse(name, [*_misfits(found, num_experts, num_ranks)])
        if placements and placements[0].num_guests_per_rank != found.num_guests_per_rank:
            refuse(name, ["its placement has another number of guest slots than other layers'"])
        placements.append(found)
    return placements


def _misfits(placement: Placement | None, num_experts: int, num_ranks: int) -> Iterator[str]:
    if placement is None:
        yield "no placement is given for it"
    elif (placement.num_experts, placement.num_ranks) != (num_experts, num_ranks):
        yield (
            f"it has {num_experts} experts on {num_ranks} ranks, and its placement "
            f"{placement.num_experts} on {placement.num_ranks}"
        )
    else:
        own = num_experts // num_ranks
        if (np.bincount(placement.home_rank, minlength=num_ranks) != own).any():
            yield f"its placement must have the homes of {own} experts on each rank"
        elif placement.num_guests_per_rank and placement.num_resident_slots > own:
            yield "its placement has replicas and guest slots: it may have one of them"
        elif placement.num_local_slots == own:
            yield "its placement has neither replicas nor guest slots"
