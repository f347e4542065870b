"""The steps of a plan on the GPU; so far `solve`, on the device and without synchronisation.

Shapes and launch choices are pure functions of the placement; the kernel is `kernels/flow.cu`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .jit import Kernels, Program, compile_cubin
from .placement import Placement

MAX_RANKS, MAX_EXPERTS = 64, 512
"""Of one component: ranks are bits of a word; the tables of the experts lie in shared memory."""
MAX_SHARED_BYTES = 99 * 1024
"""What a block may have on every architecture from sm_80 on."""
NUM_THREADS = 256
MAX_ROUNDS = 10_000
"""Far above what any instance took (about a hundred); a component that needs more goes home."""

_ARC = np.dtype([("ranks", "u8"), ("quota", "i4"), ("place", "i2"), ("rank", "i2")])
_NETWORK = np.dtype([("tables", "u8", 6), ("max_arcs", "i4"), ("max_experts", "i4")])


@dataclass(frozen=True)
class Tables:
    """What `kernels/flow.cu` knows of a placement: its `Network`, G components at fixed strides."""

    shape: npt.NDArray[np.int32]
    """[G, 4]: ranks, arcs and experts of each component; 0."""
    arcs: npt.NDArray[Any]
    """[G, max_arcs] of `Arc`, by local rank, then expert."""
    copies: npt.NDArray[np.int16]
    """[G, max_arcs] arcs by expert, then local rank."""
    first_arc: npt.NDArray[np.int16]
    """[G, ranks_per_lane * 32 + 1] the first arc of each local rank."""
    experts: npt.NDArray[np.int32]
    """[G, max_experts] expert | local rank of its home << 16, or ranks_per_lane * 32 << 16 if it
    has several copies."""
    ranks: npt.NDArray[np.int32]
    """[G, ranks_per_lane * 32] local rank → rank."""

    @property
    def ranks_per_lane(self) -> int:
        return self.ranks.shape[1] // 32

    @property
    def num_shared_bytes(self) -> int:
        arcs, ranks = self.arcs.shape[1], self.ranks.shape[1]
        return arcs * (_ARC.itemsize + 4 + 4 + 2) + 2 * 4 * ranks + 2 * (ranks + 1)


@functools.lru_cache(maxsize=1024)
def tables(placement: Placement) -> Tables:
    """Raises ValueError for a component that is too large for one block; names its size."""
    component, home = placement.component, placement.home_rank
    num_components = int(component.max()) + 1
    num_ranks = np.bincount(component)
    num_experts = np.bincount(component[home], minlength=num_components)
    if num_ranks.max() > MAX_RANKS or num_experts.max() > MAX_EXPERTS:
        raise ValueError(
            f"the GPU solver takes components of at most {MAX_RANKS} ranks and {MAX_EXPERTS} "
            f"experts; the largest has {num_ranks.max()} ranks, {num_experts.max()} experts"
        )
    lanes = 32 if num_ranks.max() <= 32 else 64
    several = (placement.copy_rank >= 0).sum(1) > 1
    expert, column = np.nonzero((placement.copy_rank >= 0) & several[:, None])
    rank = placement.copy_rank[expert, column]
    num_arcs = np.bincount(component[rank], minlength=num_components)
    # An even number keeps what follows the arcs aligned.
    max_arcs = int(-(-max(1, num_arcs.max()) // 2) * 2)
    out = Tables(
        shape=np.zeros((num_components, 4), np.int32),
        arcs=np.zeros((num_components, max_arcs), _ARC),
        copies=np.zeros((num_components, max_arcs), np.int16),
        first_arc=np.zeros((num_components, lanes + 1), np.int16),
        experts=np.zeros((num_components, num_experts.max()), np.int32),
        ranks=np.zeros((num_components, lanes), np.int32),
    )
    local = np.zeros(placement.num_ranks, np.int64)
    for g in range(num_components):
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
        out.first_arc[g] = np.searchsorted(r, np.arange(lanes + 1))
        own = np.flatnonzero(component[home] == g)
        out.experts[g, : own.size] = own | np.where(several[own], lanes, local[home[own]]) << 16
        out.ranks[g, : members.size] = members
        out.shape[g] = members.size, n, own.size, 0
    if out.num_shared_bytes > MAX_SHARED_BYTES:
        raise ValueError(
            f"the tables of a component must fit {MAX_SHARED_BYTES} bytes of shared memory; "
            f"{max_arcs} copies of experts with several take {out.num_shared_bytes}"
        )
    return out


def programs() -> list[Program]:
    """Every variant of every kernel, for `lplb-ep compile`."""
    return [Program("flow.cu", {"RANKS_PER_LANE": lanes}) for lanes in (1, 2)]


@functools.cache
def _kernel(ranks_per_lane: int, device: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    program = programs()[ranks_per_lane - 1]
    kernels = Kernels(compile_cubin(program, f"sm_{major}{minor}"))
    return kernels.kernel("solve", num_shared_bytes=MAX_SHARED_BYTES)


class Solver:
    """The exact solver of one placement on one GPU.

    Args:
        placement: the copies.
        device: a CUDA device; its kernel is compiled and loaded now, its tables stay on it.

    Raises:
        ValueError: a component of the placement is too large for one block.
        MissingPackageError: CuPy or a compiler library is not installed.
        CompileError: the kernel does not compile; holds the log.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self.placement = placement
        built = tables(placement)
        self._tables = [
            torch.from_numpy(np.ascontiguousarray(table).view(np.uint8)).to(device)
            for table in (
                built.shape,
                built.arcs,
                built.copies,
                built.first_arc,
                built.experts,
                built.ranks,
            )
        ]
        self._network = np.zeros((), _NETWORK)
        self._network["tables"] = [table.data_ptr() for table in self._tables]
        self._network["max_arcs"] = built.arcs.shape[1]
        self._network["max_experts"] = built.experts.shape[1]
        self._num_components = len(built.shape)
        self._num_shared_bytes = built.num_shared_bytes
        self._kernel = _kernel(built.ranks_per_lane, self._tables[0].device.index)

    def __call__(
        self, load: torch.Tensor, max_rounds: int = MAX_ROUNDS
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Solves a batch of loads on the current stream; no synchronisation, graphs may capture it.

        Args:
            load: [B, E] int32 on this device, contiguous; each row totals at most 2**31 - 1.
            max_rounds: rounds of flow that a component may take.

        Returns:
            quota: [B, E, C] int32, rows sum to the load.
            rank_load: [B, R] int32; its maximum is ceil(T*), of each component by itself.
            status: [B] int32, 0 = optimal, 1 = a component ran out of rounds: its quotas are whole
                and complete, but not the best.
        """
        import cupy

        p, B = self.placement, len(load)
        quota = load.new_empty(B, p.num_experts, p.max_replicas)
        rank_load = load.new_empty(B, p.num_ranks)
        status = load.new_zeros(B)
        if B:
            self._kernel(
                (self._num_components, B),
                (NUM_THREADS,),
                (
                    load.data_ptr(),
                    self._network[()],
                    quota.data_ptr(),
                    rank_load.data_ptr(),
                    status.data_ptr(),
                    *map(np.int32, (p.num_ranks, p.num_experts, p.max_replicas, max_rounds)),
                ),
                shared_mem=self._num_shared_bytes,
                stream=cupy.cuda.Stream.from_external(torch.cuda.current_stream(load.device)),
            )
        return quota, rank_load, status
