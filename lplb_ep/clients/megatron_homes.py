"""Homes of Megatron-Core's experts in another order than the router's.

Weights go there before the model is trained. Checkpoints have each expert by its number, and so
they have the optimizer's state: its tensors follow those of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..comm.alltoall import make_transport
from ..comm.collectives import together
from ..errors import ContractError
from ..placement.table import Placement
from ..weights.slots import slots_of
from ..weights.transfers import Move, Mover
from .megatron_experts import Experts

# Formats of the distributed optimizer's state that know a tensor by what it belongs to.
_BY_TENSOR = ("fully_reshardable", "fully_sharded_model_space")


def experts_by_place(placement: Placement) -> list[int]:
    """The experts at home in each place, E / R of each rank one after the other."""
    return [int(expert) for expert in placement.physical_to_logical[np.sort(placement.home)]]


def are_in_order(placement: Placement) -> bool:
    """Whether the homes are in the router's order."""
    return experts_by_place(placement) == [*range(placement.num_experts)]


def check_movable(
    name: str, experts: Experts, placement: Placement, group: dist.ProcessGroup
) -> None:
    """Whether experts may go to the homes of a placement. Collective.

    Args:
        name: of the layer.
        experts: of the layer, in the router's order.
        placement: has E / R homes on each rank.
        group: the expert-parallel group.

    Raises:
        ContractError: DDP or an optimizer has parameters already.
        RankError: ranks that hold the same experts have other placements.
    """
    with together(experts.copies, f"homes of {name}") as facts:
        facts["placement"] = placement.fingerprint()
    with together(group, f"homes of {name}"):
        for parameter in experts.local.parameters():
            if hasattr(parameter, "main_grad") or hasattr(parameter, "main_param"):
                raise ContractError(
                    f"the homes of {name} are not in the router's order, and DDP or an optimizer "
                    "has its experts already: call balance() before these are made"
                )


@torch.no_grad()
def move_home(experts: Experts, placement: Placement, group: dist.ProcessGroup) -> None:
    """Moves weights from the router's order to the homes of a placement. Collective."""
    own, slots = len(experts.local), slots_of(experts.local, len(experts.local))
    pairs = [pair for pair in enumerate(experts_by_place(placement)) if pair[0] != pair[1]]
    moves = [
        Move(expert, place, of_name, of_name[0].weight.dtype)
        for of_name in slots.values()
        for place, expert in pairs
    ]
    device = next(experts.local.parameters()).device
    mover = Mover(make_transport(group, device), group.rank(), group.size(), own)
    arrived = mover.send(mover.pack("weight", moves))
    # Places change with one another: all is read before any is written.
    for slot, weight in [(slot, weight.clone()) for slot, weight in arrived]:
        slot.weight.copy_(weight)


def saves_by_expert(experts: Experts, placement: Placement, rank: int) -> Callable[..., Any]:
    """`sharded_state_dict` of experts whose homes are elsewhere than in the router's order."""
    own = placement.num_experts // placement.num_ranks
    here = experts_by_place(placement)[rank * own :][:own]

    def sharded_state_dict(
        prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        kind = (metadata or {}).get("distrib_optim_sharding_type", _BY_TENSOR[0])
        if kind not in _BY_TENSOR:
            raise ContractError(
                f"distrib_optim_sharding_type is {kind!r}, which knows the optimizer's state by "
                "place, and homes are not in the router's order: set 'fully_reshardable'"
            )
        found = {}
        for number, expert in enumerate(here):
            found.update(
                experts.saved(
                    number, expert, placement.num_experts, prefix, sharded_offsets, metadata
                )
            )
        return found

    return sharded_state_dict
