"""A rank's launches of a plan in the emulator, as the host makes them on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import emulator
import numpy as np

from lplb_ep.comm.copies import barrier_program
from lplb_ep.gpu.jit import Program
from lplb_ep.placement.table import Placement
from lplb_ep.planning import guest_layout, kernels, layout, solvers, structs
from lplb_ep.planning.device_tables import MAX_ROUNDS
from lplb_ep.planning.solvers import (
    DEVICE_SOLVERS,
    GUEST_OBJECTIVE_SOLVERS,
    GUEST_SOLVERS,
    OBJECTIVE_SOLVERS,
    Variant,
)
from lplb_ep.planning.stay import num_words
from lplb_ep.planning.structs import HEAD
from lplb_ep.problem import Problem

FOREVER = 10**15  # ns
VARIANTS = [
    Variant(size, parts, turns, more)
    for size, parts, turns, more in (
        (8, 4, 1, False),
        (8, 4, 3, True),
        (16, 2, 1, False),
        (16, 4, 2, False),
        (32, 2, 2, False),
        (32, 4, 3, False),
        (64, 2, 3, False),
        (64, 4, 3, True),
        (128, 2, 6, True),
    )
]
"""Of the flow: each number of edges once and each size to 64 twice. The others are `long`."""


GUEST_VARIANTS = [v for v in GUEST_SOLVERS["flow"].variants() if v.size != 32]
"""Of the flow with guests; the others are `long`."""


OBJECTIVE_VARIANTS = [v for v in OBJECTIVE_SOLVERS["flow"].variants() if v.size in (8, 64)]
"""Of plans by another objective than tokens; the others are `long`."""


GUEST_OBJECTIVE_VARIANTS = [
    v for v in GUEST_OBJECTIVE_SOLVERS["flow"].variants() if v.size in (8, 64)
]
"""Of plans by cost with guests; the others are `long`."""


def given_program(variant: Variant) -> Program:
    """The program of a variant for guests that are given."""
    return replace(GUEST_SOLVERS["flow"].program(variant), source="given.cu")


def route_program(dtype: Any) -> Program:
    """The program of route.cu for indices of a dtype."""
    index = {np.dtype(np.int32): "int", np.dtype(np.int64): "long long"}[np.dtype(dtype)]
    return next(one for one in kernels.programs() if one.defines.get("INDEX") == index)


PROGRAMS = [
    *map(DEVICE_SOLVERS["flow"].program, VARIANTS),
    *map(given_program, GUEST_VARIANTS),
    *map(GUEST_SOLVERS["flow"].program, GUEST_VARIANTS),
    replace(GUEST_SOLVERS["flow"], num_cluster_blocks=1).program(GUEST_VARIANTS[0]),
    *map(OBJECTIVE_SOLVERS["flow"].program, OBJECTIVE_VARIANTS),
    *map(OBJECTIVE_SOLVERS["flow"].plan_program, OBJECTIVE_VARIANTS),
    *map(GUEST_OBJECTIVE_SOLVERS["flow"].program, GUEST_OBJECTIVE_VARIANTS),
    *map(DEVICE_SOLVERS["cusolverdx"].program, DEVICE_SOLVERS["cusolverdx"].variants()),
    *map(DEVICE_SOLVERS["flow"].plan_program, VARIANTS),
    *map(route_program, (np.int32, np.int64)),
    barrier_program(),
]
"""What every run of the tests builds: each kernel at least once."""


def variant_for(placement: Placement, solver: str, objective: str = "tokens") -> Variant:
    """A variant of `PROGRAMS` that takes a placement, where possible of its own size."""
    own = layout.capacity_for(placement)
    variants = VARIANTS if solver == "flow" else DEVICE_SOLVERS[solver].variants()
    if placement.num_guests_per_rank:
        variants = GUEST_VARIANTS
    if objective != "tokens":
        has_guests = placement.num_guests_per_rank > 0
        variants = GUEST_OBJECTIVE_VARIANTS if has_guests else OBJECTIVE_VARIANTS
    return next(
        v for v in variants if v.size >= own.size and (v.more or v.parts * v.turns >= own.max_edges)
    )


@dataclass
class Plan:
    """What a batch leaves behind, in the emulator's memory."""

    experts: np.ndarray
    positions: np.ndarray
    histograms: np.ndarray
    rows: np.ndarray
    counts: np.ndarray
    quota: np.ndarray
    rank_load: np.ndarray
    endings: np.ndarray
    guests: np.ndarray
    physical: np.ndarray
    status: np.ndarray


@dataclass(frozen=True)
class Picks:
    """A rank's picks, on their way through the kernels."""

    given: np.ndarray
    struct: bytes
    num_chunks: int


class Rank:
    """One rank of a group that plans on a placement.

    Args:
        memory: where all lies.
        placement: the copies.
        rank: this one.
        library: gives a program's library.
        solver: "flow" or "cusolverdx".
        variant: of the solver; None: one of `PROGRAMS`.
        dtype: of indices.
        chunk: picks of a block, a multiple of 32.
        tag: of the placement, for the head of a row.
        given: whether guests are given instead of chosen.
        one_block: whether a component has no cluster, as on GPUs older than sm_90.
        least_gain: tokens off the fullest rank for which a batch leaves home.
        keeps: whether picks are slots, which they keep where a batch stays.
        num_samples, every, mark_every: as `Statistics` has them.
        exchanges_every: batches from one that is exchanged to the next.
    """

    def __init__(
        self,
        memory: emulator.Memory,
        placement: Placement,
        rank: int,
        library: Any,
        *,
        solver: str = "flow",
        variant: Variant | None = None,
        dtype: Any = np.int64,
        chunk: int = 128,
        tag: int = 77,
        given: bool = False,
        one_block: bool = False,
        least_gain: int = 0,
        keeps: bool = False,
        num_samples: int = 0,
        every: int = 0,
        exchanges_every: int = 1,
        mark_every: int = 0,
        problem: Problem | None = None,
    ) -> None:
        self.memory, self.placement, self.rank, self.chunk = memory, placement, rank, chunk
        self._dtype = np.dtype(dtype)
        objective = "tokens" if problem is None else problem.objective_name
        variant = variant or variant_for(placement, solver, objective)
        capacity = replace(layout.capacity_for(placement), size=variant.size)
        record = solvers.solver_record(solver, placement, objective)
        if one_block:
            record = replace(record, num_cluster_blocks=1)
        self._objective, self._problem_of = b"", problem
        if problem is not None and objective != "tokens":
            costs = memory.array(layout.cost_table(problem.cost_model), np.int32)
            at = costs.ctypes.data
            self._objective = layout.pack_objective(objective, problem.cost_model, at)
        self.route_library = library(route_program(dtype))
        plans_whole = variant in record.plan_variants()
        self.plan_library = library(record.plan_program(variant)) if plans_whole else None
        self._num_blocks = num_blocks = record.num_cluster_blocks
        self._num_choices = record.num_choices
        self._num_solver_bytes = record.num_shared_bytes(
            capacity, placement.num_experts, num_blocks
        )
        self._num_route_bytes = solvers.num_route_bytes(placement)
        self.num_components, self._kernels = capacity.num_components, record.kernels
        self._num_threads = record.num_threads
        p, self._capacity = placement, capacity
        if p.num_guests_per_rank:
            self.solve_library = library((given_program if given else record.program)(variant))
            self._tables = self._put(guest_layout.guest_tables(p, capacity))
            self._network = guest_layout.pack_guest_network(capacity, self._tables)
            self.routes = self._put(guest_layout.no_routes(p, capacity))
        else:
            self.solve_library = library(record.program(variant))
            self._network = layout.pack_network(capacity, self._put(layout.tables(p, capacity)))
            self.routes = self._put(layout.routes(p, capacity))
        self.table = layout.pack_table(p, capacity, self.routes)
        self.guest_rule = (problem or Problem()).guest_rule
        self.num_words = num_words(p.num_experts, p.num_ranks, least_gain)
        self.row = memory.zeros(self.num_words)
        self.head = memory.array([tag, 2, 3, 0], np.int32)
        self.error_flags = memory.zeros(structs.NUM_ERROR_FLAGS)
        self.totals = memory.zeros(structs.NUM_WORDS, np.int64)
        self.samples = memory.zeros((num_samples, p.num_experts))
        self.sampled = memory.zeros(num_samples)
        self._every, self._mark_every = every, mark_every
        self.least_gain, self.again = least_gain, 0
        self.keeps = keeps
        self.given_load = memory.empty(p.num_ranks)
        self._exchanges_every = exchanges_every
        self.turn = memory.array([exchanges_every - 1], np.int32)
        self.missing = memory.zeros(p.num_ranks)
        self.state = memory.zeros(4)
        self.peers = memory.zeros(p.num_ranks, np.int64)
        self.window = memory.zeros((2, p.num_ranks, self.num_words), np.uint64)

    def _put(self, tables: Any) -> dict[str, int]:
        named = {f.name: getattr(tables, f.name) for f in fields(tables)}
        return {name: self.memory.array(values).ctypes.data for name, values in named.items()}

    @property
    def _turn_address(self) -> int:
        return self.turn.ctypes.data if self._exchanges_every > 1 else 0

    def plan(self, topk_idx: np.ndarray) -> Plan:
        """Memory for a batch's results."""
        p, empty = self.placement, self.memory.empty
        num_chunks = max(1, -(-topk_idx.size // self.chunk))
        return Plan(
            experts=empty(topk_idx.size, np.int16),
            positions=empty(topk_idx.size),
            histograms=empty((num_chunks, p.num_experts)),
            rows=empty((p.num_ranks, self.num_words)),
            counts=empty((p.num_ranks, p.num_experts)),
            quota=empty((p.num_experts, p.max_replicas)),
            rank_load=empty(p.num_ranks),
            endings=empty((self.num_components, structs.ENDING.size // 4)),
            guests=empty((p.num_ranks, p.num_guests_per_rank)),
            physical=empty(topk_idx.shape, self._dtype),
            status=empty(1),
        )

    def picks(self, topk_idx: np.ndarray, plan: Plan) -> Picks:
        """The picks of a batch, laid out for the kernels."""
        num_chunks = len(plan.histograms)
        packed = structs.PICKS.pack(
            experts=plan.experts.ctypes.data,
            positions=plan.positions.ctypes.data,
            histograms=plan.histograms.ctypes.data,
            num_picks=topk_idx.size,
            num_chunks=num_chunks,
            chunk=self.chunk,
            num_experts=self.placement.num_experts,
        )
        return Picks(self.memory.array(topk_idx, self._dtype), packed, num_chunks)

    def window_struct(self, plan: Plan, *, waits: bool = True, limit_ns: int = FOREVER) -> bytes:
        """Where this rank's rows are exchanged; `peers` must be filled in."""
        return structs.WINDOW.pack(
            peers=self.peers.ctypes.data,
            state=self.state.ctypes.data,
            rows=plan.rows.ctypes.data,
            missing=self.missing.ctypes.data,
            limit_ns=limit_ns,
            num_ranks=self.placement.num_ranks,
            rank=self.rank,
            waits=waits,
            every=self._exchanges_every,
            turn=self._turn_address,
            size=self.num_words,
        )

    def count(
        self,
        picks: Picks,
        *,
        exchanged: bool = True,
        window: bytes = bytes(structs.WINDOW.size),
        status: int = 0,
        logical: np.ndarray | None = None,
        num_topk: int = 0,
    ) -> emulator.Operation:
        """The launch of `count`."""
        return self.route_library.kernel("count")(
            (picks.num_chunks, 1),
            kernels.NUM_THREADS,
            4 * self.num_words,
            topk_idx=picks.given,
            picks=picks.struct,
            logical=0 if logical is None else logical,
            num_ids=self.placement.num_experts if logical is None else len(logical),
            num_topk=num_topk,
            row=self.row if exchanged else 0,
            head=self.head,
            error_flags=self.error_flags,
            window=window,
            status=status,
            num_local=self.placement.num_local_slots if self.keeps else 0,
        )

    def solve(
        self,
        picks: Picks,
        plan: Plan,
        rows: np.ndarray,
        *,
        head: int = HEAD,
        status: int = 0,
        max_rounds: int = MAX_ROUNDS,
        **bounds: np.ndarray,
    ) -> emulator.Operation:
        """The launch of `solve`, or with speeds or capacities of `solve_general`."""
        problem = self._problem(picks, plan, rows, head, status, max_rounds, bounds)
        helpers = -(-picks.num_chunks // self._num_blocks)  # whole clusters of them
        grid = self._num_blocks * (self._num_choices * self.num_components + helpers), 1
        return self._solve(grid, problem, bounds, plan.guests, self.routes)

    def _problem(
        self,
        picks: Picks,
        plan: Plan,
        rows: np.ndarray,
        head: int,
        status: int,
        max_rounds: int,
        bounds: Mapping[str, np.ndarray],
    ) -> bytes:
        return structs.PROBLEM.pack(
            counts=structs.COUNTS.pack(
                rows=rows.ctypes.data,
                num_rows=self.placement.num_ranks,
                stride=rows.shape[1],
                batch_stride=0,
                head=head,
                rank=self.rank,
            ),
            net=self._network,
            picks=picks.struct,
            quota=plan.quota.ctypes.data,
            rank_load=plan.rank_load.ctypes.data,
            endings=plan.endings.ctypes.data,
            counted=plan.counts.ctypes.data,
            error_flags=self.error_flags.ctypes.data,
            **self._rest_of_problem(bounds, max_rounds, status),
        )

    def solve_loads(
        self, loads: np.ndarray, guests: np.ndarray | None = None, **bounds: np.ndarray
    ) -> tuple[Any, ...]:
        """The launch of a solver for loads [B, E], its quotas, rank loads and endings.

        `guests`: [B, R, G], where they are written.
        """
        p, empty = self.placement, self.memory.empty
        loads = self.memory.array(loads, np.int32)
        quota = empty((len(loads), p.num_experts, p.max_replicas))
        rank_load = empty((len(loads), p.num_ranks))
        endings = empty((len(loads), self.num_components, structs.ENDING.size // 4))
        problem = structs.PROBLEM.pack(
            counts=structs.COUNTS.pack(
                rows=loads.ctypes.data,
                num_rows=1,
                stride=0,
                batch_stride=p.num_experts,
                head=0,
                rank=0,
            ),
            net=self._network,
            picks=bytes(structs.PICKS.size),
            quota=quota.ctypes.data,
            rank_load=rank_load.ctypes.data,
            endings=endings.ctypes.data,
            counted=0,
            error_flags=0,
            **self._rest_of_problem(bounds, MAX_ROUNDS, 0),
        )
        grid = self._num_blocks * self._num_choices * self.num_components, len(loads)
        launch = self._solve(grid, problem, bounds, guests, {})
        return launch, quota, rank_load, endings

    def _rest_of_problem(
        self, bounds: Mapping[str, np.ndarray], max_rounds: int, status: int
    ) -> dict[str, int]:
        p, names = self.placement, ("base", "speed", "cap")
        assert bounds.keys() <= set(names), "a bound of another name"
        return {
            **{name: bounds[name].ctypes.data if name in bounds else 0 for name in names},
            "num_components": self.num_components,
            "num_ranks": p.num_ranks,
            "num_experts": p.num_experts,
            "max_replicas": p.max_replicas,
            "max_rounds": max_rounds,
            "status": status,
            "least_gain": self.least_gain,
            "turn": self._turn_address,
            "given_load": self.given_load.ctypes.data if self.keeps else 0,
        }

    def _solve(
        self,
        grid: tuple[int, int],
        problem: bytes,
        bounds: Mapping[str, np.ndarray],
        guests: np.ndarray | None,
        routes: Mapping[str, int],
    ) -> emulator.Operation:
        arguments = {"problem": problem}
        if self._objective:
            arguments["objective"] = self._objective
        if self.placement.num_guests_per_rank:
            assert guests is not None, "guests are written somewhere"
            arguments["guests"] = guest_layout.pack_guests(
                *(self.placement, self._capacity, self._tables, routes, self.guest_rule),
                guests.ctypes.data,
            )
            if self._objective:
                arguments["choices"] = self._choices(grid[1])
        name = self._kernels[bool({"speed", "cap"} & bounds.keys())].name
        return self.solve_library.kernel(name)(
            grid, self._num_threads, self._num_solver_bytes, **arguments
        )

    def _choices(self, num_batches: int) -> bytes:
        assert self._problem_of is not None, "another objective than tokens is given"
        shape = num_batches, *guest_layout.choice_shape(self._capacity)
        plans, self.num_done = self.memory.empty(shape), self.memory.zeros(shape[:2])
        at = plans.ctypes.data, self.num_done.ctypes.data
        return guest_layout.pack_choices(self._problem_of.cost_model, self.guest_rule, *at)

    @property
    def num_by_status(self) -> np.ndarray:
        """How many batches ended with each status."""
        return self.totals[structs.NUM_TALLIES : structs.NUM_TOTALS]

    def route(
        self, picks: Picks, plan: Plan, *, exchanged: bool = True, **bounds: np.ndarray
    ) -> emulator.Operation:
        """The launch of `route`; `bounds`: base loads and speeds, for the statistics."""
        batch = self._batch(plan, self.row.ctypes.data if exchanged else 0, bounds)
        name = kernels.route_signature(self._exchanges_every, self.least_gain).name
        return self.route_library.kernel(name)(
            (picks.num_chunks + 1, 1),
            kernels.NUM_THREADS,
            self._num_route_bytes,
            picks=picks.struct,
            table=self.table,
            batch=batch,
            given=picks.given if self.keeps else 0,
            physical=plan.physical,
        )

    def _batch(self, plan: Plan, row: int, bounds: Mapping[str, np.ndarray]) -> bytes:
        statistics = structs.STATISTICS.pack(
            totals=self.totals.ctypes.data,
            samples=self.samples.ctypes.data,
            sampled=self.sampled.ctypes.data,
            num_samples=len(self.samples),
            every=self._every,
            by_tokens=1,
            mark_every=self._mark_every,
            **{b: bounds[b].ctypes.data if b in bounds else 0 for b in ("base", "speed")},
        )
        return structs.BATCH.pack(
            counts=plan.counts.ctypes.data,
            quota=plan.quota.ctypes.data,
            rank_load=plan.rank_load.ctypes.data,
            endings=plan.endings.ctypes.data,
            status=plan.status.ctypes.data,
            statistics=statistics,
            error_flags=self.error_flags.ctypes.data,
            row=row,
            guests=plan.guests.ctypes.data,
            num_components=self.num_components,
            rank=self.rank,
            num_guests=plan.guests.size,
            least_gain=self.least_gain,
            turn=self._turn_address,
            own=plan.rows[self.rank, HEAD:].ctypes.data,
            again=self.again,
            given_load=self.given_load.ctypes.data if self.keeps else 0,
        )

    def whole(
        self,
        picks: Picks,
        plan: Plan,
        rows: np.ndarray,
        *,
        window: bytes = bytes(structs.WINDOW.size),
        status: int = 0,
        of_batch: int = 0,
        logical: np.ndarray | None = None,
        num_topk: int = 0,
        max_rounds: int = MAX_ROUNDS,
        **bounds: np.ndarray,
    ) -> emulator.Operation:
        """The launch of `plan`, or with speeds or capacities of `plan_general`.

        `rows`: [R, E] given counts, or with a window [R, num_words]. `status`: of this rank;
        `of_batch`: as far as the counts do not say it.
        """
        given, size = picks.given, self._dtype.itemsize
        packed = structs.PICKS.pack(
            experts=0,
            positions=0,
            histograms=0,
            num_picks=given.size,
            num_chunks=1,
            chunk=given.size,
            num_experts=self.placement.num_experts,
        )
        head = 0 if rows.shape[1] == self.placement.num_experts else HEAD
        general = bool({"speed", "cap"} & bounds.keys())
        by = {"objective": self._objective} if self._objective else {}
        name = "plan_by_objective" if by else "plan_general" if general else "plan"
        objective = "auto" if by else "tokens"
        sizes = self.placement, self._capacity, given.size
        return self.plan_library.kernel(name)(
            (1, 1),
            solvers.NUM_PLAN_THREADS,
            solvers.num_plan_bytes(*sizes, objective, self.least_gain),
            **by,
            topk_idx=given,
            picks=packed,
            logical=0 if logical is None else logical,
            num_ids=self.placement.num_experts if logical is None else len(logical),
            num_topk=num_topk,
            head=self.head,
            window=window,
            status=status,
            problem=self._problem(picks, plan, rows, head, of_batch, max_rounds, bounds),
            table=self.table,
            batch=self._batch(plan, 0, bounds),
            physical=plan.physical,
            wide=size == 8,
        )

    def split(self, counts: np.ndarray, quota: np.ndarray) -> tuple[emulator.Operation, np.ndarray]:
        """The launch of `split`, and the shares."""
        p, num_threads = self.placement, 64
        shares = self.memory.zeros((p.num_ranks, *quota.shape))
        num_nodes = p.num_ranks // p.num_ranks_per_node
        most = int((p.copy_rank >= 0).sum(1).max())
        launch = self.route_library.kernel("split")(
            (p.num_experts, 1),
            num_threads,
            4 * ((4 + num_threads) * most + num_nodes),
            table=self.table,
            counts=counts,
            quota=quota,
            shares=shares,
        )
        return launch, shares
