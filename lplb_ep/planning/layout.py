"""A placement as the kernels read it: arrays laid out as the structs of `kernels/`.

Pure functions of the placement; `device_tables.py` sends them to a device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cost import MAX_STEPS, CostModel
from ..placement.optimum import components
from ..placement.table import Placement
from . import structs
from .search_rules import AUTO_GAP, NO_LIMIT, Aim
from .structs import ARC, COPY, EDGE, MAX_EXPERTS, MAX_PLACES

SIZES = (8, 16, 32, 64, 128, 256)
"""The numbers of ranks of a component that kernels are compiled for."""
MAX_RANKS = SIZES[-1]
"""Of one component: an edge has its target in a byte."""
WORD_RANKS = 64
"""Of one component whose ranks are bits of a word. Beyond, it takes tokens alone, and no guests."""

NO_EDGE = np.array((-1, -1, 0, 0, 0), EDGE.dtype)


@dataclass(frozen=True)
class Capacity:
    """How large the tables of a placement are laid out, and of those that replace it."""

    num_components: int
    """G; of a placement with fewer, the last are empty."""
    size: int
    """Ranks of a component, one of `SIZES`."""
    max_arcs: int
    """A multiple of four, to keep what follows in shared memory aligned."""
    max_edges: int
    """Of a rank."""
    max_experts: int
    """Of a component."""
    num_several: int
    """M, experts with several copies."""
    num_copies: int
    """N, copies of those."""
    num_guests: int = 0
    """Guest slots of a rank."""
    num_places: int = 0
    """Slots of a rank; not counted without guest slots."""
    max_replicas: int = 0
    """Of a component, beside homes and guests; not counted without guest slots."""

    def check_holds(self, needed: Capacity) -> None:
        """Raises ValueError unless tables that need `needed` fit in; names what does not."""
        for f in fields(self):
            if getattr(needed, f.name) > getattr(self, f.name):
                raise ValueError(
                    f"the kernels' tables have space for {f.name} {getattr(self, f.name)}, and the "
                    f"placement needs {getattr(needed, f.name)}"
                )


@functools.lru_cache(maxsize=1024)
def own_capacity(placement: Placement) -> Capacity:
    """What the placement's own tables need.

    Raises:
        ValueError: a component is too large for one block; names its size.
    """
    component = placement.component
    num_ranks, num_experts = component_sizes(placement, component)
    if num_ranks.max() > MAX_RANKS:
        raise ValueError(
            f"the GPU solver takes components of at most {MAX_RANKS} ranks; "
            f"the largest has {num_ranks.max()}"
        )
    useful = placement.copy_rank >= 0
    number = np.broadcast_to(useful.sum(1, keepdims=True), useful.shape)
    several = useful & (number > 1)
    num_arcs = np.bincount(component[placement.copy_rank[several]], minlength=1)
    return Capacity(
        num_components=num_ranks.size,
        size=next(size for size in SIZES if size >= num_ranks.max()),
        max_arcs=_four(int(num_arcs.max())),
        max_edges=int(np.bincount(placement.copy_rank[useful], number[useful] - 1).max()),
        max_experts=int(num_experts.max()),
        num_several=int(several.any(1).sum()),
        num_copies=int(several.sum()),
    )


def component_sizes(
    placement: Placement, component: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Ranks and experts of each component, whose label each rank [R] has.

    Raises:
        ValueError: there are too many experts in all; names their number.
    """
    if placement.num_experts >= 2**15:
        raise ValueError(
            f"the GPU solver takes at most {2**15 - 1} experts; got {placement.num_experts}"
        )
    return np.bincount(component), np.bincount(component[placement.home_rank])


def check_word(num_ranks: int, num_experts: int, what: str) -> None:
    """Checks whether a component fits kernels that have its ranks as bits of a word.

    Args:
        num_ranks, num_experts: of the largest component.
        what: the part that has such kernels.

    Raises:
        ValueError: it does not; names its size.
    """
    if num_ranks > WORD_RANKS or num_experts > MAX_EXPERTS:
        raise ValueError(
            f"{what} takes components of at most {WORD_RANKS} ranks and {MAX_EXPERTS} experts "
            f"on the GPU; the largest has {num_ranks} ranks, {num_experts} experts"
        )


def _four(number: int) -> int:
    return -(-max(1, number) // 4) * 4


def capacity_for(
    placement: Placement, refreshable: bool = False, moves_homes: bool = False
) -> Capacity:
    """How large the tables of a placement are laid out.

    Args:
        placement: the copies.
        refreshable: whether any other replicas must fit, too, as long as they do not fall into more
            components. They join more than 64 ranks, or 512 experts, only where these replicas do.
        moves_homes: of one that is refreshable, whether any experts must fit in any slots.

    Raises:
        ValueError: a component is too large for one block; names its size.
    """
    if placement.num_guests_per_rank:
        return guest_capacity(placement, refreshable)
    own, p = own_capacity(placement), placement
    if not refreshable:
        return own
    num_replicas = p.num_physical_experts - p.num_experts
    num_several = min(p.num_experts, num_replicas)
    # Small components keep the kernels that are fast for them.
    most_ranks = MAX_RANKS if moves_homes or own.size > WORD_RANKS else WORD_RANKS
    most_experts = p.num_experts if moves_homes or own.max_experts > MAX_EXPERTS else MAX_EXPERTS
    return Capacity(
        num_components=p.num_ranks if moves_homes else own.num_components,
        size=next(size for size in SIZES if size >= min(p.num_ranks, most_ranks)),
        max_arcs=_four(num_replicas + num_several),
        max_edges=min(num_replicas, p.num_local_slots * (p.max_replicas - 1)),
        max_experts=min(p.num_experts, most_experts),
        num_several=num_several,
        num_copies=num_replicas + num_several,
    )


@functools.lru_cache(maxsize=1024)
def guest_components(placement: Placement) -> npt.NDArray[np.int32]:
    """[R]: label of each rank's component where guests may come.

    Ranks of a node are joined, as are those that hold copies of one expert. A rank that takes no
    part is alone.
    """
    ranks = np.arange(placement.num_ranks)
    nodes = np.where(np.isin(ranks, placement.active_ranks), ranks, -1)
    nodes = -np.sort(-nodes.reshape(-1, placement.num_ranks_per_node))  # -1 is behind the others
    copies = placement.copy_rank
    joined = np.full((len(copies) + len(nodes), max(copies.shape[1], nodes.shape[1])), -1)
    joined[: len(copies), : copies.shape[1]] = copies
    joined[len(copies) :, : nodes.shape[1]] = nodes
    return components(joined, placement.num_ranks)


def check_nodes(placement: Placement, refreshable: bool = False) -> None:
    """Checks whether kernels that choose guests know the nodes of a component's ranks.

    They take a component's ranks for those of whole nodes, where it has several.

    Args:
        placement: the residents and the guest slots.
        refreshable: whether any other replicas may join nodes.

    Raises:
        ValueError: replicas join nodes, or may join them, of which some ranks take no part.
    """
    component, active = guest_components(placement), placement.active_ranks
    of_node = np.bincount(placement.node[active])
    is_part = (of_node > 0) & (of_node < placement.num_ranks_per_node)
    pairs = np.unique(np.stack([component[active], placement.node[active]]), axis=1)
    is_joined = np.bincount(pairs[0])[pairs[0]] > 1
    if refreshable:
        is_joined[:] = pairs.shape[1] > 1
    if (is_part[pairs[1]] & is_joined).any():
        raise ValueError(
            "with guest slots the GPU solver joins nodes by replicas only where all of their ranks "
            f"take part, or none; of {placement.num_ranks_per_node} there are "
            f"{', '.join(map(str, of_node))}"
        )


@functools.lru_cache(maxsize=1024)
def guest_capacity(placement: Placement, refreshable: bool = False) -> Capacity:
    """How large the tables of a placement with guest slots are laid out, for any guests.

    Args:
        placement, refreshable: as for `capacity_for`.

    Raises:
        ValueError: a component is too large for one block, or an expert has too many copies. Or as
            `check_nodes`.
    """
    check_nodes(placement, refreshable)
    p, component = placement, guest_components(placement)
    num_ranks, num_experts = component_sizes(placement, component)
    check_word(num_ranks.max(), num_experts.max(), "a placement with guest slots")
    if p.max_replicas > 255 or p.num_local_slots > MAX_PLACES:
        raise ValueError(
            "with guest slots the GPU solver takes at most 255 copies of an expert and "
            f"{MAX_PLACES} slots of a rank; got {p.max_replicas} and {p.num_local_slots}"
        )
    ranks, experts = int(num_ranks.max()), int(num_experts.max())
    replicas = p.copy_rank[:, 1:]
    residents = int(np.bincount(component[replicas[replicas >= 0]], minlength=1).max())
    if refreshable:
        ranks, experts = min(p.num_ranks, WORD_RANKS), min(p.num_experts, MAX_EXPERTS)
        residents = p.num_physical_experts - p.num_experts - p.num_guests_per_rank * p.num_ranks
    added = residents + ranks * p.num_guests_per_rank
    several = min(experts, added)
    return Capacity(
        num_components=num_ranks.size,
        size=next(size for size in SIZES if size >= ranks),
        max_arcs=_four(added + several),
        max_edges=max(1, min(added, p.num_local_slots * (ranks - 1))),
        max_experts=experts,
        # Each component has a part of its own, of which the last is never used.
        num_several=num_ranks.size * (several + 1),
        num_copies=num_ranks.size * (added + several),
        num_guests=p.num_guests_per_rank,
        num_places=p.num_local_slots,
        max_replicas=residents,
    )


@dataclass(frozen=True)
class Tables:
    """What the solvers know of a placement: their `Network`, G components at fixed strides."""

    shape: npt.NDArray[np.int32]
    """[G, 4]: of each component ranks, arcs, the most edges of a rank, and the largest `nth` of
    one. No ranks behind the last."""
    arcs: npt.NDArray[Any]
    """[G, max_arcs] of `Arc`, by local rank, then expert."""
    copies: npt.NDArray[np.int16]
    """[G, max_arcs] arcs by expert, then local rank."""
    first_arc: npt.NDArray[np.int16]
    """[G, size + 1] the first arc of each local rank."""
    edges: npt.NDArray[Any]
    """[G, size, max_edges] of `Edge`: of each local rank, -1 behind the last."""
    experts: npt.NDArray[np.int32]
    """[G, max_experts] expert | local rank of its only copy << 16; -1 behind the last. An expert
    with several copies has size + the place of its arcs in `copies` instead of a rank."""
    ranks: npt.NDArray[np.int32]
    """[G, size] local rank → rank."""


@functools.lru_cache(maxsize=1024)
def tables(placement: Placement, capacity: Capacity) -> Tables:
    """The tables of a placement, laid out in a capacity.

    Raises:
        ValueError: a component is too large for one block, or they do not fit in; names the size.
    """
    capacity.check_holds(own_capacity(placement))
    size, component, home = capacity.size, placement.component, placement.home_rank
    several = (placement.copy_rank >= 0).sum(1) > 1
    expert, column = np.nonzero((placement.copy_rank >= 0) & several[:, None])
    rank = placement.copy_rank[expert, column]
    num_components, max_arcs = capacity.num_components, capacity.max_arcs
    out = Tables(
        shape=np.zeros((num_components, 4), np.int32),
        arcs=np.zeros((num_components, max_arcs), ARC.dtype),
        copies=np.zeros((num_components, max_arcs), np.int16),
        first_arc=np.zeros((num_components, size + 1), np.int16),
        edges=np.full((num_components, size, max(1, capacity.max_edges)), NO_EDGE),
        experts=np.full((num_components, capacity.max_experts), -1, np.int32),
        ranks=np.zeros((num_components, size), np.int32),
    )
    local = np.zeros(placement.num_ranks, np.int64)
    for g in range(own_capacity(placement).num_components):
        members = np.flatnonzero(component == g)
        local[members] = np.arange(members.size)
        mine = np.flatnonzero(component[rank] == g)
        mine = mine[np.lexsort((expert[mine], local[rank[mine]]))]
        e, r, n = expert[mine], local[rank[mine]], mine.size
        by_expert = np.lexsort((r, e))
        out.arcs["ranks"][g, :n] = _holders(e, r, by_expert, size)
        out.arcs["quota"][g, :n] = e * placement.max_replicas + column[mine]
        out.arcs["place"][g, :n] = np.searchsorted(e[by_expert], e)
        out.arcs["rank"][g, :n] = r
        out.copies[g, :n] = by_expert
        out.first_arc[g] = np.searchsorted(r, np.arange(size + 1))
        own = np.flatnonzero(component[home] == g)
        place = size + np.searchsorted(e[by_expert], own)
        out.experts[g, : own.size] = own | np.where(several[own], place, local[home[own]]) << 16
        out.ranks[g, : members.size] = members
        edges = _edges(e, r, size)
        for of_rank, row in zip(edges, out.edges[g], strict=True):
            row[: of_rank.size] = of_rank
        most = max(of_rank.size for of_rank in edges)
        out.shape[g] = members.size, n, most, out.edges["nth"][g].max()
    return out


def _holders(
    expert: npt.NDArray[Any],
    rank: npt.NDArray[Any],
    by_expert: npt.NDArray[Any],
    size: int,
) -> npt.NDArray[np.uint64]:
    """For each arc of a component the copies of its expert: `ranks` of an `ARC`."""
    if size > WORD_RANKS:
        nth = np.empty(expert.size, np.int64)
        sorted_experts = expert[by_expert]
        nth[by_expert] = np.arange(expert.size) - np.searchsorted(sorted_experts, sorted_experts)
        return (np.bincount(expert, minlength=1)[expert] | nth << 32).astype(np.uint64)
    holders = np.zeros(expert.max(initial=0) + 1, np.uint64)
    np.bitwise_or.at(holders, expert, np.uint64(1) << rank.astype(np.uint64))
    return holders[expert]


def _edges(expert: npt.NDArray[Any], rank: npt.NDArray[Any], size: int) -> list[npt.NDArray[Any]]:
    """Of a component's arcs, sorted by rank: each rank's `EDGE`s, those of an arc together."""
    arc, to = np.nonzero((expert[:, None] == expert) & (rank[:, None] != rank))
    # Neighbours begin with different targets, not to fill all the same one.
    order = np.lexsort(((rank[to] - rank[arc]) % size, arc))
    edges = np.zeros(arc.size, EDGE.dtype)
    edges["arc"], edges["to"], edges["target"] = arc, to[order], rank[to[order]]
    edges["nth"] = np.arange(arc.size) - np.searchsorted(arc, arc)
    edges["number"] = np.bincount(arc)[arc]
    return np.split(edges, np.searchsorted(rank[arc], np.arange(1, size)))


def pack_network(capacity: Capacity, addresses: Mapping[str, int]) -> bytes:
    """The struct `Network` of tables in a capacity, by their addresses on a device."""
    return structs.NETWORK.pack(
        **addresses,
        max_arcs=capacity.max_arcs,
        max_edges=max(1, capacity.max_edges),
        max_experts=capacity.max_experts,
    )


def cost_table(cost: CostModel) -> npt.NDArray[np.int32]:
    """[2, MAX_STEPS + 1] as the struct `Objective` has its costs; 0 behind the last step."""
    out = np.zeros((2, MAX_STEPS + 1), np.int32)
    for row, values in zip(out, cost.tables[:2], strict=True):
        row[: values.size] = values
    return out


def pack_objective(objective: str, cost: CostModel, address: int) -> bytes:
    """The struct `Objective`, by the address of its costs on a device."""
    least_cost, least_tiles = cost.tables[2]
    return structs.OBJECTIVE.pack(
        costs=address,
        kind=Aim.EXPERTS if objective == "experts" else Aim.COST,
        num_steps=len(cost.steps),
        tile=cost.tile,
        slope=cost.slope,
        least_cost=least_cost,
        least_tiles=least_tiles,
        free_rows=cost.free_rows,
        most_rows=min(cost.table_rows, NO_LIMIT) if objective == "auto" else NO_LIMIT,
        least_gap=AUTO_GAP if objective == "auto" else 0,
    )


@dataclass(frozen=True)
class Routes:
    """A placement as `kernels/route.cu` reads it: its `Table`. Copies that can get no tokens (a
    second one on a rank) are left out."""

    lookup: npt.NDArray[np.int32]
    """[E] the slot of an expert's only copy, or ~m for the m-th expert with several."""
    experts: npt.NDArray[np.int32]
    """[M] which that is."""
    first: npt.NDArray[np.int32]
    """[M + 1] where the copies of each expert with several begin."""
    copies: npt.NDArray[Any]
    """[N] of `Copy`, the home first. Beyond the last, as beyond the last of the M, all is 0."""
    home_rank: npt.NDArray[np.int32]
    """[E]"""


@functools.lru_cache(maxsize=1024)
def routes(placement: Placement, capacity: Capacity) -> Routes:
    """The tables of a placement, laid out in a capacity that holds them."""
    useful = placement.copy_rank >= 0
    several = useful.sum(1) > 1
    lookup = np.where(several, -np.cumsum(several), placement.home)
    expert, column = np.nonzero(useful & several[:, None])
    copies = np.zeros(capacity.num_copies, COPY.dtype)
    used = copies[: expert.size]
    used["rank"] = placement.copy_rank[expert, column]
    used["node"] = placement.node[used["rank"]]
    used["slot"] = placement.logical_to_physical[expert, column]
    used["expert"] = expert
    used["quota"] = expert * placement.max_replicas + column
    experts = np.flatnonzero(several)
    first = np.full(capacity.num_several + 1, expert.size)
    first[: experts.size] = np.searchsorted(expert, experts)
    return Routes(
        lookup.astype(np.int32),
        np.pad(experts, (0, capacity.num_several - experts.size)).astype(np.int32),
        first.astype(np.int32),
        copies,
        placement.home_rank,
    )


def pack_table(placement: Placement, capacity: Capacity, addresses: Mapping[str, int]) -> bytes:
    """The struct `Table` of routes in a capacity, by their addresses on a device."""
    p = placement
    return structs.TABLE.pack(
        **addresses,
        num_several=capacity.num_several,
        num_copies=capacity.num_copies,
        num_ranks=p.num_ranks,
        num_ranks_per_node=p.num_ranks_per_node,
        num_experts=p.num_experts,
        max_replicas=p.max_replicas,
    )
