"""What the kernels know of a placement: arrays laid out as the structs of `kernels/`.

Pure functions of the placement; `cuda.py` sends them to a device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from .placement import Placement

MAX_RANKS, MAX_EXPERTS = 64, 512
"""Of one component: ranks are bits of a word; the tables of the experts lie in shared memory."""
SIZES = (8, 16, 32, 64)
"""The most ranks of a component, for each variant of a solver."""

PARTS = {"flow": (2, 4, 8), "cusolverdx": (4,)}
"""By solver, how many threads share the arcs of a rank: as many as it has arcs, if possible."""

ARC = np.dtype([("ranks", "u8"), ("quota", "i4"), ("place", "i2"), ("rank", "i2")])
COPY = np.dtype([("rank", "i2"), ("node", "i2"), ("slot", "i4"), ("expert", "i4"), ("quota", "i4")])


def variants(solver: str) -> list[tuple[int, int]]:
    """Of a solver's kernel: one of `SIZES` and one of `PARTS`, whole warps of threads in all."""
    return [(s, parts) for s in SIZES for parts in PARTS[solver] if s * parts % 32 == 0]


@dataclass(frozen=True)
class Tables:
    """What `kernels/flow.cu` knows of a placement: its `Network`, G components at fixed strides."""

    shape: npt.NDArray[np.int32]
    """[G, 4]: ranks and arcs of each component, and the most arcs of one of its ranks; 0."""
    arcs: npt.NDArray[Any]
    """[G, max_arcs] of `Arc`, by local rank, then expert."""
    copies: npt.NDArray[np.int16]
    """[G, max_arcs] arcs by expert, then local rank."""
    first_arc: npt.NDArray[np.int16]
    """[G, size + 1] the first arc of each local rank."""
    experts: npt.NDArray[np.int32]
    """[G, max_experts] expert | local rank of its only copy << 16; of one with several, not the
    rank but size + the place of its arcs in `copies`; -1 behind the last."""
    ranks: npt.NDArray[np.int32]
    """[G, size] local rank → rank."""

    @property
    def size(self) -> int:
        """The most ranks that the solver's variant takes, one of `SIZES`."""
        return self.ranks.shape[1]

    def parts(self, solver: str) -> int:
        """One of the solver's `variants` for this size."""
        able = [parts for size, parts in variants(solver) if size == self.size]
        return next((parts for parts in able if parts >= self.shape[:, 2].max()), able[-1])


@dataclass(frozen=True)
class Room:
    """How large the tables of a placement are laid out, and of those that replace it."""

    num_components: int
    """G; of a placement with fewer, the last are empty."""
    size: int
    """Ranks of a component, one of `SIZES`."""
    max_arcs: int
    max_experts: int
    num_several: int
    """M, experts with several copies."""
    num_copies: int
    """N, copies of those."""

    def hold(self, needed: Room) -> None:
        """Raises ValueError unless tables that need `needed` fit in; names what does not."""
        for f in fields(self):
            if getattr(needed, f.name) > getattr(self, f.name):
                raise ValueError(
                    f"the kernels' tables have room for {f.name} {getattr(self, f.name)}, and the "
                    f"placement needs {getattr(needed, f.name)}"
                )


@functools.lru_cache(maxsize=1024)
def _needed(placement: Placement) -> Room:
    component, home = placement.component, placement.home_rank
    num_components = int(component.max()) + 1
    num_ranks = np.bincount(component)
    num_experts = np.bincount(component[home], minlength=num_components)
    if num_ranks.max() > MAX_RANKS or num_experts.max() > MAX_EXPERTS:
        raise ValueError(
            f"the GPU solver takes components of at most {MAX_RANKS} ranks and {MAX_EXPERTS} "
            f"experts; the largest has {num_ranks.max()} ranks, {num_experts.max()} experts"
        )
    useful = placement.copy_rank >= 0
    several = useful.sum(1) > 1
    rank = placement.copy_rank[useful & several[:, None]]
    num_arcs = np.bincount(component[rank], minlength=num_components)
    return Room(
        num_components,
        next(size for size in SIZES if size >= num_ranks.max()),
        _even(num_arcs.max()),
        int(num_experts.max()),
        int(several.sum()),
        rank.size,
    )


def _even(number: int) -> int:
    """At least 2; keeps what follows the arcs aligned."""
    return int(-(-max(1, number) // 2) * 2)


def room(placement: Placement) -> Room:
    """What the placement's tables need; where its layer is refreshed, what they would with any
    other replicas, but that they may not fall into more components.

    Raises:
        ValueError: a component is too large for one block; names its size.
    """
    needed = _needed(placement)
    if not placement.layer.refreshed:
        return needed
    E, num_replicas = placement.num_experts, placement.num_physical_experts - placement.num_experts
    several = min(E, num_replicas)
    return Room(
        needed.num_components,
        next(s for s in SIZES if s >= min(placement.num_ranks, MAX_RANKS)),
        _even(num_replicas + several),
        min(E, MAX_EXPERTS),
        several,
        num_replicas + several,
    )


@functools.lru_cache(maxsize=1024)
def tables(placement: Placement, room: Room) -> Tables:
    """Its tables, laid out in `room`.

    Raises:
        ValueError: a component is too large for one block, or they do not fit in; names the size.
    """
    room.hold(_needed(placement))
    component, home, size = placement.component, placement.home_rank, room.size
    several = (placement.copy_rank >= 0).sum(1) > 1
    expert, column = np.nonzero((placement.copy_rank >= 0) & several[:, None])
    rank = placement.copy_rank[expert, column]
    num_components, max_arcs = room.num_components, room.max_arcs
    out = Tables(
        shape=np.zeros((num_components, 4), np.int32),
        arcs=np.zeros((num_components, max_arcs), ARC),
        copies=np.zeros((num_components, max_arcs), np.int16),
        first_arc=np.zeros((num_components, size + 1), np.int16),
        experts=np.full((num_components, room.max_experts), -1, np.int32),
        ranks=np.zeros((num_components, size), np.int32),
    )
    local = np.zeros(placement.num_ranks, np.int64)
    for g in range(int(component.max()) + 1):
        members = np.flatnonzero(component == g)
        local[members] = np.arange(members.size)
        mine = np.flatnonzero(component[rank] == g)
        mine = mine[np.lexsort((expert[mine], local[rank[mine]]))]
        e, r, n = expert[mine], local[rank[mine]], mine.size
        holders = np.zeros(placement.num_experts, np.uint64)
        np.bitwise_or.at(holders, e, np.uint64(1) << r.astype(np.uint64))
        by_expert = np.lexsort((r, e))
        out.arcs["ranks"][g, :n] = holders[e]
        out.arcs["quota"][g, :n] = e * placement.max_replicas + column[mine]
        out.arcs["place"][g, :n] = np.searchsorted(e[by_expert], e)
        out.arcs["rank"][g, :n] = r
        out.copies[g, :n] = by_expert
        out.first_arc[g] = np.searchsorted(r, np.arange(size + 1))
        own = np.flatnonzero(component[home] == g)
        place = size + np.searchsorted(e[by_expert], own)
        out.experts[g, : own.size] = own | np.where(several[own], place, local[home[own]]) << 16
        out.ranks[g, : members.size] = members
        out.shape[g] = members.size, n, np.diff(out.first_arc[g]).max(), 0
    if placement.num_experts >= 2**15:
        raise ValueError(
            f"the GPU solver takes at most {2**15 - 1} experts; got {placement.num_experts}"
        )
    return out


@dataclass(frozen=True)
class Routes:
    """What `kernels/route.cu` knows of a placement: its `Table`. Copies that can get no tokens (a
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
def routes(placement: Placement, room: Room) -> Routes:
    """Its tables, laid out in `room`, which must hold them."""
    useful = placement.copy_rank >= 0
    several = useful.sum(1) > 1
    lookup = np.where(several, -np.cumsum(several), placement.home)
    expert, column = np.nonzero(useful & several[:, None])
    copies = np.zeros(room.num_copies, COPY)
    used = copies[: expert.size]
    used["rank"] = placement.copy_rank[expert, column]
    used["node"] = placement.node[used["rank"]]
    used["slot"] = placement.logical_to_physical[expert, column]
    used["expert"] = expert
    used["quota"] = expert * placement.max_replicas + column
    experts = np.flatnonzero(several)
    first = np.full(room.num_several + 1, expert.size)
    first[: experts.size] = np.searchsorted(expert, experts)
    return Routes(
        lookup.astype(np.int32),
        np.pad(experts, (0, room.num_several - experts.size)).astype(np.int32),
        first.astype(np.int32),
        copies,
        placement.home_rank,
    )
