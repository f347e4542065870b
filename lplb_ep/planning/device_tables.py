"""A placement on a GPU, in the layout of the kernels; and loads that are solved there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch

from ..gpu.launch import Kernel, max_shared_bytes
from ..placement.table import Placement
from ..problem import Problem
from . import structs
from .kernels import solver_kernel
from .layout import Routes, Tables, capacity_for, routes, tables
from .solvers import DEVICE_SOLVERS, NUM_THREADS, check_fit, num_route_bytes
from .structs import Status

MAX_BATCH = 65_535
"""Loads that a launch solves; a grid's limit."""
MAX_ROUNDS = 10_000
"""Rounds of flow of a component, far above the about hundred that were seen. One that needs more
goes home."""


class DeviceTables:
    """A placement's tables on one GPU: built once, and rewritten in place when replicas move.

    Args:
        placement: the copies, which must fit (`check_fit`).
        device: the GPU; the solver's kernels are compiled now, if they never were.
        solver: one of `DEVICE_SOLVERS`.
        refreshable: whether any other replicas must fit, too.

    Raises:
        ValueError: the placement is too large; names the size.
        MissingPackageError: a package that compiles or launches kernels is missing.
        CompileError: a kernel does not compile.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        solver: str = "flow",
        refreshable: bool = False,
    ) -> None:
        check_fit(placement, solver, max_shared_bytes(device.index), refreshable)
        p, record = placement, DEVICE_SOLVERS[solver]
        self.placement, self.device = placement, device
        self._capacity = capacity = capacity_for(placement, refreshable)
        variant = record.variant(capacity)
        self.solve, self.solve_general = (
            solver_kernel(solver, variant, device.index, signature)
            for signature in (structs.SOLVE, structs.SOLVE_GENERAL)
        )
        self.num_components = capacity.num_components
        self.num_solver_bytes = record.num_shared_bytes(capacity, p.num_experts)
        """Dynamic shared memory of a block that solves."""
        self.num_route_bytes = num_route_bytes(placement, refreshable)
        """Dynamic shared memory of a block that rewrites."""
        built, routed = tables(placement, capacity), routes(placement, capacity)
        self._tables, self._routes = _upload(built, device), _upload(routed, device)
        self.network = structs.NETWORK.pack(
            **_addresses(self._tables),
            max_arcs=built.arcs.shape[1],
            max_edges=built.edges.shape[2],
            max_experts=built.experts.shape[1],
        )
        """The struct `Network`."""
        self.table = structs.TABLE.pack(
            **_addresses(self._routes),
            num_several=len(routed.experts),
            num_copies=len(routed.copies),
            num_ranks=p.num_ranks,
            num_ranks_per_node=p.num_ranks_per_node,
            num_experts=p.num_experts,
            max_replicas=p.max_replicas,
        )
        """The struct `Table`."""

    @property
    def num_bytes(self) -> int:
        """Device memory that the tables take."""
        held = (*self._tables.values(), *self._routes.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def prepare(self, placement: Placement) -> Callable[[], None]:
        """Makes tables of a placement with other copies, for captured graphs, too.

        Returns:
            A function that puts them in force and cannot fail.

        Raises:
            ValueError: they do not fit where the first placement's lie.
        """
        new_tables = _upload(tables(placement, self._capacity), self.device)
        new_routes = _upload(routes(placement, self._capacity), self.device)

        def commit() -> None:
            # In place: kernels that a graph has captured read them where they are.
            for old, new in ((self._tables, new_tables), (self._routes, new_routes)):
                for name, table in old.items():
                    table.copy_(new[name])
            self.placement = placement

        return commit


def _upload(built: Tables | Routes, device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays as bytes, by name."""
    arrays = {f.name: np.ascontiguousarray(getattr(built, f.name)) for f in fields(built)}
    return {
        name: torch.from_numpy(array.view(np.uint8).copy()).to(device)
        for name, array in arrays.items()
    }


def _addresses(sent: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in sent.items()}


class LoadSolver:
    """Solves loads on one GPU: the exact quotas alone, without a plan.

    Args:
        placement, device, solver: as for `DeviceTables`.

    Raises:
        ValueError, MissingPackageError, CompileError: as `DeviceTables`.
    """

    def __init__(self, placement: Placement, device: torch.device, solver: str = "flow") -> None:
        self._tables = DeviceTables(placement, device, solver)
        self.max_rounds = MAX_ROUNDS

    def __call__(
        self,
        load: torch.Tensor,
        base_load: torch.Tensor | None = None,
        speed: torch.Tensor | None = None,
        max_quota: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Solves a batch of loads on the current stream. Nothing waits; a graph may capture it.

        Args:
            load: [B, E] int32 on this device; B is at most MAX_BATCH, and each row totals at most
                2**31 - 1, `base_load` included.
            base_load: [R] int32, at least 0: load that stays on each rank; default 0.
            speed: [R] int32, positive, totals at most 2**15 - 1: of each rank; default 1.
            max_quota: [E, C] int32, at least 0: the most tokens of each copy; default: no limit.
                All three hold for all rows.

        Returns:
            quota: [B, E, C] int32, rows sum to the load.
            rank_load: [B, R] int32, without base loads; with them its maximum is ceil(T*), of each
                component by itself (with speeds: no whole-numbered plan takes less time).
            status: [B, G] int32 of each component, a `Status`. OPTIMAL; NOT_CONVERGED: quotas are
                whole and complete, but not the best; BAD_COUNTS, INFEASIBLE: there are no quotas.

        Raises:
            ValueError: `load` has another shape, dtype or device.
        """
        p, device = self._tables.placement, self._tables.device
        shape = [*load.shape[:-1], p.num_experts]
        if load.ndim != 2 or list(load.shape) != shape or load.dtype != torch.int32:
            raise ValueError(
                f"load must be [B, {p.num_experts}] int32; got {list(load.shape)} of {load.dtype}"
            )
        if load.device != device or len(load) > MAX_BATCH:
            raise ValueError(
                f"load must be at most {MAX_BATCH} rows on {device}; "
                f"got {len(load)} on {load.device}"
            )
        load = load.contiguous()
        bounds = to_device((base_load, speed, max_quota), device)
        empty = functools.partial(torch.empty, dtype=torch.int32, device=device)
        quota = empty(len(load), p.num_experts, p.max_replicas)
        rank_load = empty(len(load), p.num_ranks)
        endings = empty(len(load), self._tables.num_components, 2)
        if len(load):
            problem = problem_of(
                self._tables,
                bounds,
                self.max_rounds,
                counts=structs.COUNTS.pack(
                    rows=load.data_ptr(),
                    num_rows=1,
                    stride=0,
                    batch_stride=p.num_experts,
                    head=0,
                    rank=0,
                ),
                quota=quota.data_ptr(),
                rank_load=rank_load.data_ptr(),
                endings=endings.data_ptr(),
            )
            kernel = kernel_of(self._tables, bounds)
            grid = (self._tables.num_components, len(load))
            kernel(grid, NUM_THREADS, self._tables.num_solver_bytes, device, [problem])
        return quota, rank_load, endings[..., 0]


def to_device(
    bounds: Sequence[torch.Tensor | None], device: torch.device
) -> list[torch.Tensor | None]:
    """Base loads, speeds and limits as the kernels read them."""
    return [
        None if bound is None else bound.to(device, torch.int32).contiguous() for bound in bounds
    ]


def kernel_of(tables: DeviceTables, bounds: Sequence[torch.Tensor | None]) -> Kernel:
    """The kernel for base loads, speeds and limits: speeds and limits need the general one."""
    plain = all(bound is None for bound in bounds[1:])
    return tables.solve if plain else tables.solve_general


def problem_of(
    tables: DeviceTables,
    bounds: Sequence[torch.Tensor | None],
    max_rounds: int,
    *,
    counts: bytes = bytes(structs.COUNTS.size),
    quota: int = 0,
    rank_load: int = 0,
    endings: int = 0,
    error_flags: int = 0,
) -> bytes:
    """The struct `Problem`. Fields that are left out are written before a launch, or not needed."""
    p = tables.placement
    base, speed, cap = (0 if bound is None else bound.data_ptr() for bound in bounds)
    return structs.PROBLEM.pack(
        counts=counts,
        net=tables.network,
        picks=bytes(structs.PICKS.size),
        quota=quota,
        rank_load=rank_load,
        endings=endings,
        counted=0,
        error_flags=error_flags,
        base=base,
        speed=speed,
        cap=cap,
        num_components=tables.num_components,
        num_ranks=p.num_ranks,
        num_experts=p.num_experts,
        max_replicas=p.max_replicas,
        max_rounds=max_rounds,
        status=Status.OPTIMAL,
    )


def solve_on_device(
    loads: torch.Tensor, placement: Placement, solver: str, problem: Problem
) -> list[torch.Tensor | None]:
    """Solves loads [B, E] on the current GPU.

    Returns:
        [B] of [E, C] int32 on the CPU, None where the solver ran out of rounds.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    solve_batch = LoadSolver(placement, device, solver)
    quotas: list[torch.Tensor | None] = []
    for part in loads.split(MAX_BATCH):
        quota, _, status = solve_batch(part.to(device, torch.int32), **problem.bounds)
        ended = (status == Status.OPTIMAL).all(1).tolist()
        quotas += [q if ok else None for q, ok in zip(quota.cpu(), ended, strict=True)]
    return quotas
