"""A placement with guest slots as the kernels read it: its residents, in their layout.

Pure functions of the placement. What depends on the guests of a batch the kernels make themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cost import CostModel
from ..placement.table import Placement
from ..problem import GuestRule
from . import structs
from .fill_rules import NUM_CHOICES
from .layout import Capacity, Routes, guest_capacity, guest_components, pack_network
from .structs import COPY, REPLICA, RESIDENT


@dataclass(frozen=True)
class GuestTables:
    """What the solver is given: parts of its `Network` and of its `Guests`, G components."""

    shape: npt.NDArray[np.int32]
    """[G, 4]: the ranks of each component; the rest depends on the guests. None behind the last."""
    experts: npt.NDArray[np.int32]
    """[G, max_experts] expert | size + its number in the component << 16; -1 behind the last."""
    ranks: npt.NDArray[np.int32]
    """[G, size] local rank → rank."""
    num_experts: npt.NDArray[np.int32]
    """[G]"""
    residents: npt.NDArray[Any]
    """[G, max_experts] of `Resident`."""
    replicas: npt.NDArray[Any]
    """[G, max_replicas] of `Replica`, -1 behind the last."""
    places: npt.NDArray[np.int16]
    """[G, size, slots of a rank that are no guest slots]: numbers of the experts with a copy on
    each local rank, ascending, -1 behind the last."""


@functools.lru_cache(maxsize=1024)
def guest_tables(placement: Placement, capacity: Capacity) -> GuestTables:
    """The tables of a placement with guest slots, laid out in a capacity.

    Raises:
        ValueError: a component is too large for one block, or they do not fit in; names the size.
    """
    capacity.check_holds(guest_capacity(placement))
    p, component, home = placement, guest_components(placement), placement.home_rank
    num_components, size = capacity.num_components, capacity.size
    out = GuestTables(
        shape=np.zeros((num_components, 4), np.int32),
        experts=np.full((num_components, capacity.max_experts), -1, np.int32),
        ranks=np.zeros((num_components, size), np.int32),
        num_experts=np.zeros(num_components, np.int32),
        residents=np.zeros((num_components, capacity.max_experts), RESIDENT.dtype),
        replicas=np.zeros((num_components, capacity.max_replicas), REPLICA.dtype),
        places=np.full(
            (num_components, size, p.num_local_slots - p.num_guests_per_rank), -1, np.int16
        ),
    )
    out.residents["expert"] = out.replicas["expert"] = -1
    useful = p.copy_rank >= 0
    local, number = np.zeros(p.num_ranks, np.int64), np.zeros(p.num_experts, np.int64)
    for g in range(int(component.max()) + 1):
        members, own = np.flatnonzero(component == g), np.flatnonzero(component[home] == g)
        local[members], number[own] = np.arange(members.size), np.arange(own.size)
        out.shape[g, 0], out.num_experts[g] = members.size, own.size
        out.ranks[g, : members.size] = members
        out.experts[g, : own.size] = own | size + number[own] << 16
        residents = out.residents[g, : own.size]
        bits = np.where(useful[own], np.uint64(1) << local[p.copy_rank[own]].astype(np.uint64), 0)
        residents["ranks"] = np.bitwise_or.reduce(bits.astype(np.uint64), axis=1)
        residents["slot"], residents["expert"] = p.home[own], own
        residents["home"] = local[home[own]]
        residents["columns"] = (p.logical_to_physical[own] >= 0).sum(axis=1)
        for r, rank in enumerate(members):
            held = number[own[(p.copy_rank[own] == rank).any(axis=1)]]
            out.places[g, r, : held.size] = held
        row, column = np.nonzero(useful[own, 1:])
        expert, column = own[row], column + 1
        replicas = out.replicas[g, : expert.size]
        replicas["slot"] = p.logical_to_physical[expert, column]
        replicas["expert"], replicas["rank"] = row, local[p.copy_rank[expert, column]]
        replicas["column"] = column
        replicas["nth"] = (useful.cumsum(axis=1) - 1)[expert, column]
    return out


def no_routes(placement: Placement, capacity: Capacity) -> Routes:
    """Tables for `kernels/route.cu` to be filled in with each batch."""
    return Routes(
        lookup=placement.home,
        experts=np.zeros(capacity.num_several, np.int32),
        first=np.zeros(capacity.num_several + 1, np.int32),
        copies=np.zeros(capacity.num_copies, COPY.dtype),
        home_rank=placement.home_rank,
    )


def pack_guest_network(capacity: Capacity, addresses: Mapping[str, int]) -> bytes:
    """The struct `Network` of guest tables, by their addresses on a device."""
    # Which depend on the guests:
    made = ("arcs", "copies", "first_arc", "edges")
    given = {name: addresses[name] for name in ("shape", "experts", "ranks")}
    return pack_network(capacity, {**given, **dict.fromkeys(made, 0)})


def choice_shape(capacity: Capacity) -> tuple[int, int, int]:
    """The shape of `plans` of the struct `Choices`, for each batch."""
    words = 4 + capacity.size * (capacity.num_guests + capacity.num_places)
    return capacity.num_components, NUM_CHOICES, words


def pack_choices(cost: CostModel, rule: GuestRule, plans: int, num_done: int) -> bytes:
    """The struct `Choices`.

    Args:
        cost: the cost of a push, and of rows.
        rule: when a batch takes guests.
        plans: where they are written, [B, *choice_shape] int32.
        num_done: [B, G] int32 zeros.
    """
    assert cost.push is not None, "a checked problem has the cost of a push"
    return structs.CHOICES.pack(
        plans=plans,
        num_done=num_done,
        push=cost.push,
        worth=max(rule.min_tokens, cost.push_rows),
    )


def pack_guests(
    placement: Placement,
    capacity: Capacity,
    addresses: Mapping[str, int],
    routes: Mapping[str, int],
    rule: GuestRule,
    chosen: int = 0,
) -> bytes:
    """The struct `Guests`.

    Args:
        placement: the residents and the guest slots.
        capacity: of its tables.
        addresses: of the arrays of `GuestTables` on a device.
        routes: of those of `no_routes`, to be filled in; empty: nothing is rewritten.
        rule: when a batch takes guests.
        chosen: where guests are written, [B, R, G].
    """
    return structs.GUESTS.pack(
        **{name: addresses[name] for name in ("residents", "replicas", "num_experts", "places")},
        chosen=chosen,
        **{name: routes.get(name, 0) for name in ("lookup", "experts", "first", "copies")},
        num_slots=placement.num_guests_per_rank,
        num_local_slots=placement.num_local_slots,
        num_ranks_per_node=placement.num_ranks_per_node,
        max_replicas=capacity.max_replicas,
        max_several=capacity.num_several // capacity.num_components,
        max_copies=capacity.num_copies // capacity.num_components,
        **rule._asdict(),
    )
