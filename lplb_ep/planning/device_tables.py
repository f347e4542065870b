"""A placement on a GPU, in the layout of the kernels; and loads that are solved there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch

from ..gpu.launch import Kernel, max_shared_bytes
from ..placement.table import Placement
from ..problem import GuestRule, Problem
from ..settings import MAX_ONE_LAUNCH
from . import structs
from .guest_layout import (
    GuestTables,
    choice_shape,
    guest_tables,
    no_routes,
    pack_choices,
    pack_guest_network,
    pack_guests,
)
from .kernels import plan_kernel, solver_kernel
from .layout import (
    Routes,
    Tables,
    capacity_for,
    cost_table,
    pack_network,
    pack_objective,
    pack_table,
    routes,
    tables,
)
from .solvers import (
    check_fit,
    num_plan_bytes,
    num_route_bytes,
    solver_record,
    why_in_steps,
)
from .structs import Status

_USUAL = Problem()
_USUAL_RULE = _USUAL.guest_rule

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
        refreshable, moves_homes: as for `capacity_for`.
        problem: what plans minimise, checked.

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
        moves_homes: bool = False,
        problem: Problem = _USUAL,
    ) -> None:
        capability, objective = torch.cuda.get_device_capability(device), problem.objective_name
        most_bytes = max_shared_bytes(device.index)
        check_fit(placement, solver, most_bytes, refreshable, capability, objective)
        p, record = placement, solver_record(solver, placement, objective)
        self.placement, self.device = placement, device
        self._capacity = capacity = capacity_for(placement, refreshable, moves_homes)
        self._record, self._variant = record, record.variant(capacity)
        self.solve_signature = record.kernels[0]
        """The arguments of both kernels that solve."""
        self.solve, self.solve_general = (
            solver_kernel(record, self._variant, device.index, signature)
            for signature in record.kernels
        )
        self.num_components = capacity.num_components
        self.num_solver_threads = record.num_threads
        """Threads of a block that solves."""
        self._num_blocks = num_blocks = record.num_blocks(capability)
        self.num_solver_bytes = record.num_shared_bytes(capacity, p.num_experts, num_blocks)
        """Dynamic shared memory of a block that solves."""
        self.num_route_bytes = num_route_bytes(placement, refreshable)
        """Dynamic shared memory of a block that rewrites."""
        of_plan = objective, problem.least_gain
        self.num_plan_bytes = num_plan_bytes(placement, capacity, MAX_ONE_LAUNCH, *of_plan)
        """Dynamic shared memory of a block that makes a whole plan."""
        homes = {"refreshable": refreshable, "moves_homes": moves_homes}
        self.in_steps = why_in_steps(
            placement,
            solver,
            most_bytes,
            objective=objective,
            least_gain=problem.least_gain,
            **homes,
        )
        """Why no kernel makes whole plans; empty: one does."""
        self._tables, self._routes = self._make(placement)
        pack = pack_guest_network if p.num_guests_per_rank else pack_network
        self.network = pack(capacity, _addresses(self._tables))
        """The struct `Network`."""
        self.table = pack_table(p, capacity, _addresses(self._routes))
        """The struct `Table`."""
        self._costs, self.objective = torch.empty(0, device=device), b""
        """The struct `Objective`; empty: of tokens."""
        self._cost = problem.cost_model
        if objective != "tokens":
            self._costs = torch.from_numpy(cost_table(self._cost)).to(device)
            self.objective = pack_objective(objective, self._cost, self._costs.data_ptr())
        self._plans = self.make_plans(1)

    @property
    def num_bytes(self) -> int:
        """Device memory that the tables take."""
        held = (*self._tables.values(), *self._routes.values(), self._costs, *self._plans)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def num_solver_blocks(self, num_chunks: int = 0) -> int:
        """Blocks of a launch that solves, and numbers that many chunks of picks: whole clusters."""
        solving = self._num_blocks * self._record.num_choices * self.num_components
        return solving + self._num_blocks * -(-num_chunks // self._num_blocks)

    def plan_kernel(self, bounds: Sequence[torch.Tensor | None]) -> Kernel | None:
        """The kernel of whole plans in one launch, compiled now if it never was; None: `in_steps`.

        Raises:
            MissingPackageError, CompileError: as `DeviceTables`.
        """
        if self.in_steps:
            return None
        signature = structs.PLAN if is_plain(bounds) else structs.PLAN_GENERAL
        signature = structs.PLAN_BY_OBJECTIVE if self.objective else signature
        return plan_kernel(self._record, self._variant, self.device.index, signature)

    def make_plans(self, num_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for plans by cost with guests, of which one batch has several; see `Choices`."""
        has_choices = self.objective and self.placement.num_guests_per_rank
        shape = num_batches if has_choices else 0, *choice_shape(self._capacity)
        num_done = torch.zeros(shape[:2], dtype=torch.int32, device=self.device)
        return num_done.new_empty(shape), num_done

    def arguments(
        self,
        problem: bytes,
        rule: GuestRule,
        chosen: int = 0,
        *,
        num_loads: int = 0,
        plans: Sequence[torch.Tensor] | None = None,
    ) -> list[bytes]:
        """The arguments of a kernel that solves.

        Args:
            problem: the struct `Problem`.
            rule: when a batch takes guests.
            chosen: where guests are written, [B, R, G].
            num_loads: B; 0: there is one batch, and tables to rewrite by are made for its guests.
            plans: memory of `make_plans` for B loads; None: that of one batch.
        """
        by = [self.objective] if self.objective else []
        if not self.placement.num_guests_per_rank:
            return [problem, *by]
        routed = {} if num_loads else _addresses(self._routes)
        tables = self.placement, self._capacity, _addresses(self._tables)
        if by:
            memory = [one.data_ptr() for one in plans or self._plans]
            by.append(pack_choices(self._cost, rule, *memory))
        return [problem, pack_guests(*tables, routed, rule, chosen), *by]

    def _make(
        self, placement: Placement
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The tables of a placement on the device: the solver's, and those to rewrite by."""
        built: tuple[Tables | GuestTables, Routes]
        if placement.num_guests_per_rank:  # whose routes each batch makes
            built = guest_tables(placement, self._capacity), no_routes(placement, self._capacity)
        else:
            built = tables(placement, self._capacity), routes(placement, self._capacity)
        return _upload(built[0], self.device), _upload(built[1], self.device)

    def prepare(self, placement: Placement) -> Callable[[], None]:
        """Makes tables of a placement with other copies, for captured graphs, too.

        Returns:
            A function that puts them in force and cannot fail.

        Raises:
            ValueError: they do not fit where the first placement's lie.
        """
        new_tables, new_routes = self._make(placement)

        def commit() -> None:
            # In place: kernels that a graph has captured read them where they are.
            for old, new in ((self._tables, new_tables), (self._routes, new_routes)):
                for name, table in old.items():
                    table.copy_(new[name])
            self.placement = placement

        return commit


def _upload(built: Tables | GuestTables | Routes, device: torch.device) -> dict[str, torch.Tensor]:
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
        placement, device, solver, problem: as for `DeviceTables`.

    Raises:
        ValueError, MissingPackageError, CompileError: as `DeviceTables`.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        solver: str = "flow",
        problem: Problem = _USUAL,
    ) -> None:
        self._tables = DeviceTables(placement, device, solver, problem=problem)
        self.max_rounds = MAX_ROUNDS

    def __call__(
        self,
        load: torch.Tensor,
        base_load: torch.Tensor | None = None,
        speed: torch.Tensor | None = None,
        max_quota: torch.Tensor | None = None,
        guest_rule: GuestRule = _USUAL_RULE,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Solves a batch of loads on the current stream. Nothing waits; a graph may capture it.

        Args:
            load: [B, E] int32 on this device; B is at most MAX_BATCH, and each row totals at most
                2**31 - 1, `base_load` included.
            base_load: [R] int32, at least 0: load that stays on each rank; default 0.
            speed: [R] int32, positive, totals at most 2**15 - 1: of each rank; default 1.
            max_quota: [E, C] int32, at least 0: the most tokens of each copy; default: no limit.
                All three hold for all rows.
            guest_rule: when a load takes guests.

        Returns:
            quota: [B, E, C] int32, rows sum to the load.
            rank_load: [B, R] int32, without base loads; with them its maximum is ceil(T*), of each
                component by itself (with speeds: no whole-numbered plan takes less time).
            status: [B, G] int32 of each component, a `Status`. OPTIMAL; NOT_CONVERGED: quotas are
                whole and complete, but not the best; BAD_COUNTS, INFEASIBLE: there are no quotas.
            guests: [B, R, G] int32, the expert in each guest slot, -1 = none.

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
        endings = empty(len(load), self._tables.num_components, structs.ENDING.size // 4)
        guests = empty(len(load), p.num_ranks, p.num_guests_per_rank)
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
            grid = (self._tables.num_solver_blocks(), len(load))
            plans = self._tables.make_plans(len(load))
            arguments = self._tables.arguments(
                problem, guest_rule, guests.data_ptr(), num_loads=len(load), plans=plans
            )
            sizes = self._tables.num_solver_threads, self._tables.num_solver_bytes
            kernel(grid, *sizes, device, arguments)
        return quota, rank_load, endings[..., 0], guests


def to_device(
    bounds: Sequence[torch.Tensor | None], device: torch.device
) -> list[torch.Tensor | None]:
    """Base loads, speeds and limits as the kernels read them."""
    return [
        None if bound is None else bound.to(device, torch.int32).contiguous() for bound in bounds
    ]


def kernel_of(tables: DeviceTables, bounds: Sequence[torch.Tensor | None]) -> Kernel:
    """The kernel for base loads, speeds and limits: speeds and limits need the general one."""
    return tables.solve if is_plain(bounds) else tables.solve_general


def is_plain(bounds: Sequence[torch.Tensor | None]) -> bool:
    """Whether there are neither speeds nor limits."""
    return all(bound is None for bound in bounds[1:])


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
    least_gain: int = 0,
    turn: int = 0,
    given_load: int = 0,
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
        least_gain=least_gain,
        turn=turn,
        given_load=given_load,
    )


def solve_on_device(
    loads: torch.Tensor, placement: Placement, solver: str, problem: Problem
) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Solves loads [B, E] on the current GPU.

    Returns:
        quotas: [B] of [E, C] int32 on the CPU, None where the solver ran out of rounds.
        guests: [B, R, G] int32 on the CPU.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    solve_batch = LoadSolver(placement, device, solver, problem)
    quotas: list[torch.Tensor | None] = []
    chosen: list[torch.Tensor] = []
    for part in loads.split(MAX_BATCH):
        quota, _, status, guests = solve_batch(
            part.to(device, torch.int32), **problem.bounds, guest_rule=problem.guest_rule
        )
        ended = (status == Status.OPTIMAL).all(1).tolist()
        quotas += [q if ok else None for q, ok in zip(quota.cpu(), ended, strict=True)]
        chosen.append(guests.cpu())
    return quotas, torch.cat(chosen)
