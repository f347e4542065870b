"""The steps of a plan on the GPU: count, solve, split, rewrite, and no synchronisation.

Shapes and launch choices are pure functions of the placement and the number of picks. The kernels
are `kernels/route.cu` (count, split, rewrite) and, to solve, `kernels/flow.cu` or
`kernels/interior.cu`, where the flow starts from an interior-point method's optimum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from ..comm.copies import barrier_program
from ..comm.exchange import Relay, Windows
from ..gpu.device import check_device, launch, load
from ..gpu.jit import CuSolverDx, Kernels, Program, max_shared_bytes
from ..placement.table import Placement
from . import layout as network
from . import structs
from .structs import HEAD as NUM_HEAD

STATIC_SHARED_BYTES = 3 * 1024
"""The most shared memory that a kernel has beside what it is launched with, some of it CUDA's."""
NUM_THREADS = 1024
"""Of a block that counts or rewrites."""
NUM_SOLVER_THREADS = 256
"""Of a block that solves; fewer would take long to add up the counts."""
MAX_CHUNKS = 64
"""Blocks that a rank's picks are spread over."""
MAX_BATCH = 65_535
"""Loads that a launch solves; a grid's limit."""
MAX_ROUNDS = 10_000
"""Far above what any instance took (about a hundred); a component that needs more goes home."""

_IN_ROUTE = (structs.COUNT, structs.GATHER, structs.BROADCAST, structs.ROUTE, structs.SPLIT)
"""The kernels of route.cu."""


def programs() -> list[Program]:
    """Every variant of every kernel, for `lplb-ep compile`."""
    return [
        *(_solver(solver, v) for solver in network.SHARES for v in network.variants(solver)),
        *(_route(dtype) for dtype in (torch.int32, torch.int64)),
        barrier_program(),
    ]


def num_solver_bytes(placement: Placement, solver: str, refreshable: bool = False) -> int:
    """What a block of the solver is launched with.

    Raises:
        ValueError: a component is too large for one block; names its size.
    """
    variant = network.variant(placement, solver, refreshable)
    size, num_arcs = variant.size, network.room(placement, refreshable).max_arcs
    flow = num_arcs * (4 + structs.ARC.size + 4 + 2)
    num_warps = NUM_SOLVER_THREADS // 32
    num_bytes = max(flow, 4 * (1 + num_warps) * placement.num_experts)  # to solve, or to number
    if solver == "cusolverdx":  # before it, a matrix, two right-hand sides, six numbers an arc
        num_bytes += 8 * (size * (size + 2) + 2 + 6 * num_arcs)
    return num_bytes


def num_route_bytes(placement: Placement, refreshable: bool = False) -> int:
    """What a block that splits and rewrites is launched with."""
    routes = network.routes(placement, network.room(placement, refreshable))
    num_nodes = placement.num_ranks // placement.num_ranks_per_node
    several, copies = len(routes.experts), len(routes.copies)
    return 4 * (placement.num_experts + several + 1 + 6 * copies + several * (num_nodes + 2))


def check_fit(placement: Placement, solver: str, max_bytes: int, refreshable: bool = False) -> None:
    """Whether the kernels take a placement.

    Args:
        placement: the copies.
        solver: "flow" or "cusolverdx".
        max_bytes: shared memory of a block.
        refreshable: whether other replicas must fit, too.

    Raises:
        ValueError: a component is too large for one block, or a block has not enough shared memory;
            names the sizes.
    """
    copies = (placement.copy_rank >= 0).sum(1)
    for what, num_bytes in (
        (f"the solver {solver}", num_solver_bytes(placement, solver, refreshable)),
        ("rewriting", num_route_bytes(placement, refreshable)),
    ):
        if num_bytes + STATIC_SHARED_BYTES > max_bytes:
            raise ValueError(
                f"a block has {max_bytes} bytes of shared memory, and {what} takes "
                f"{num_bytes + STATIC_SHARED_BYTES} for {placement.num_experts} experts, "
                f"{copies[copies > 1].sum()} copies of those with several, and "
                f"{placement.num_ranks // placement.num_ranks_per_node} nodes"
            )


def _solver(solver: str, variant: network.Variant) -> Program:
    defines = {name.upper(): value for name, value in variant._asdict().items()}
    defines["THREADS"] = NUM_SOLVER_THREADS
    if solver == "flow":
        return Program("flow.cu", defines)
    factor = CuSolverDx("potrf", variant.size, NUM_SOLVER_THREADS)
    substitute = CuSolverDx("potrs", variant.size, NUM_SOLVER_THREADS, num_right_hand_sides=2)
    return Program("interior.cu", defines, (factor, substitute))


def _route(dtype: torch.dtype) -> Program:
    index = "int" if dtype == torch.int32 else "long long"
    return Program("route.cu", {"INDEX": index, "THREADS": NUM_THREADS})


@functools.cache
def _kernels(make: Callable[..., Program], variant: tuple[Any, ...], device: int) -> Kernels:
    """Compiled or found in the cache, and loaded on a device."""
    return load(make(*variant), device)


def _upload(tables: network.Tables | network.Routes, device: torch.device) -> list[torch.Tensor]:
    """Its arrays as bytes, in the order of its fields."""
    arrays = [np.ascontiguousarray(getattr(tables, field.name)) for field in fields(tables)]
    return [torch.from_numpy(array.view(np.uint8).copy()).to(device) for array in arrays]


def _addresses(
    tables: network.Tables | network.Routes, sent: Sequence[torch.Tensor]
) -> dict[str, int]:
    """Where the arrays of `tables` were sent to, by name."""
    return {f.name: tensor.data_ptr() for f, tensor in zip(fields(tables), sent, strict=True)}


def _rewrite(tables: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> None:
    """In place, for kernels that a graph has captured read them where they are."""
    for table, values in zip(tables, new, strict=True):
        table.copy_(values)


def check(
    placement: Placement | None = None, solver: str = "flow", refreshable: bool = False
) -> None:
    """Whether plans can be made here, on the current device.

    Raises:
        MissingPackageError: there is no CUDA device that the kernels run on, or a package is
            missing; says which.
        ValueError: the placement is too large for the kernels; names the size.
    """
    check_device(*(("mathdx", "nvJitLink") if solver == "cusolverdx" else ()))
    if placement is not None:
        check_fit(placement, solver, max_shared_bytes(torch.cuda.current_device()), refreshable)


class Solver:
    """The exact solver of one placement on one GPU.

    Args:
        placement: the copies; which must fit (`check_fit`).
        device: where loads lie; kernels are compiled now, if they never were.
        solver: "flow" or "cusolverdx".
        refreshable: whether other replicas will replace these.

    Raises:
        ValueError: the placement is too large; names the size.
        MissingPackageError: a package that compiles or launches kernels is missing.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        solver: str = "flow",
        refreshable: bool = False,
    ) -> None:
        check_fit(placement, solver, max_shared_bytes(device.index), refreshable)
        self.room = network.room(placement, refreshable)
        self._variant = network.variant(placement, solver, refreshable)
        built = network.tables(placement, self._variant, self.room)
        self.placement, self.device = placement, device
        self.max_rounds = MAX_ROUNDS
        """Rounds of flow that a component may take."""
        self.tables = _upload(built, device)
        self._network = structs.NETWORK.pack(
            **_addresses(built, self.tables),
            max_arcs=built.arcs.shape[1],
            max_edges=built.edges.shape[2],
            max_experts=built.experts.shape[1],
        )
        self.num_components = len(built.shape)
        self._num_shared_bytes = num_solver_bytes(placement, solver, refreshable)
        kernels = _kernels(_solver, (solver, self._variant), device.index)
        self._kernel, self._general = (
            kernels.kernel(one.name, one.formats) for one in (structs.SOLVE, structs.SOLVE_GENERAL)
        )

    def prepare(self, placement: Placement) -> Callable[[], None]:
        """Makes tables of a placement with other copies; what is returned puts them in force.

        Raises:
            ValueError: they do not fit where this one's lie.
        """
        new = _upload(network.tables(placement, self._variant, self.room), self.device)

        def commit() -> None:
            _rewrite(self.tables, new)
            self.placement = placement

        return commit

    def __call__(
        self,
        load: torch.Tensor,
        base_load: torch.Tensor | None = None,
        speed: torch.Tensor | None = None,
        max_quota: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Solves a batch of loads on the current stream; no synchronisation, graphs may capture it.

        Args:
            load: [B, E] int32 on this device; B is at most MAX_BATCH, and each row totals at most
                2**31 - 1, `base_load` included.
            base_load: [R] int32, at least 0: what stays on each rank; default 0.
            speed: [R] int32, positive, totals at most 2**15 - 1: of each rank; default 1.
            max_quota: [E, C] int32, at least 0: the most tokens of each copy, which must suffice
                for the load; default: no limit. All three hold for all rows.

        Returns:
            quota: [B, E, C] int32, rows sum to the load.
            rank_load: [B, R] int32, without base loads; with them its maximum is ceil(T*), of each
                component by itself (with speeds: no whole-numbered plan takes less time).
            status: [B, G] int32, a `Status` of each component. OPTIMAL. NOT_CONVERGED: its quotas
                are whole and complete, but not the best. INFEASIBLE or BAD_COUNTS: no quotas.

        Raises:
            ValueError: `load` has another shape, dtype or device.
        """
        p = self.placement
        shape = [*load.shape[:-1], p.num_experts]
        if load.ndim != 2 or list(load.shape) != shape or load.dtype != torch.int32:
            raise ValueError(
                f"load must be [B, {p.num_experts}] int32; got {list(load.shape)} of {load.dtype}"
            )
        if load.device != self.device or len(load) > MAX_BATCH:
            raise ValueError(
                f"load must be at most {MAX_BATCH} rows on {self.device}; "
                f"got {len(load)} on {load.device}"
            )
        load = load.contiguous()
        counts = structs.COUNTS.pack(
            rows=load.data_ptr(), num_rows=1, stride=0, batch_stride=p.num_experts, head=0, rank=0
        )
        options = tuple(
            None if option is None else option.to(self.device, torch.int32).contiguous()
            for option in (base_load, speed, max_quota)
        )
        quota, rank_load, endings = self.launch(counts, len(load), options=options)
        return quota, rank_load, endings[..., 0]

    def launch(
        self,
        counts: bytes,
        num_batches: int,
        picks: Picks | None = None,
        counted: torch.Tensor | None = None,
        error_flags: int = 0,
        status: int = 0,
        options: Sequence[torch.Tensor | None] = (None, None, None),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `__call__` does, on a struct of counts; and for the picks of a single batch, numbers
        them and copies the counts to `counted`. For the status [B, G, 2]: status and total."""
        p, empty = self.placement, functools.partial(torch.empty, dtype=torch.int32)
        out = (
            empty(num_batches, p.num_experts, p.max_replicas, device=self.device),
            empty(num_batches, p.num_ranks, device=self.device),
            empty(num_batches, self.num_components, 2, device=self.device),
        )
        if num_batches:
            quota, rank_load, endings = (tensor.data_ptr() for tensor in out)
            base, speed, cap = (0 if one is None else one.data_ptr() for one in options)
            problem = structs.PROBLEM.pack(
                counts=counts,
                net=self._network,
                picks=bytes(structs.PICKS.size) if picks is None else picks.struct,
                quota=quota,
                rank_load=rank_load,
                endings=endings,
                counted=0 if counted is None else counted.data_ptr(),
                error_flags=error_flags,
                base=base,
                speed=speed,
                cap=cap,
                num_components=self.num_components,
                num_ranks=p.num_ranks,
                num_experts=p.num_experts,
                max_replicas=p.max_replicas,
                max_rounds=self.max_rounds,
                status=status,
            )
            num_chunks = 0 if picks is None else picks.num_chunks
            grid = (self.num_components + num_chunks, num_batches)
            general = any(option is not None for option in options[1:])
            kernel, num_bytes = self._general if general else self._kernel, self._num_shared_bytes
            launch(kernel, grid, NUM_SOLVER_THREADS, num_bytes, self.device, problem)
        return out


@dataclass(frozen=True)
class Picks:
    """What `Steps.count` leaves for the other steps."""

    topk_idx: torch.Tensor
    scratch: torch.Tensor
    num_chunks: int
    struct: bytes
    rows: torch.Tensor | None
    """[R, NUM_HEAD + E] int32, what all ranks sent, where windows exchange it."""


@dataclass(frozen=True)
class Solved:
    """What `Steps.solve` leaves, of `Plan`'s shapes."""

    counts: torch.Tensor
    quota: torch.Tensor
    rank_load: torch.Tensor
    endings: torch.Tensor
    """[G, 2] int32, of each component: status, total."""


class Steps:
    """The four steps of a planner's batches on one GPU, and the memory that they share.

    Everything runs on the current stream and the CPU waits for nothing, so a CUDA graph may capture
    it. A batch on another stream than the last one's runs after it, outside of graphs. The memory
    must live until the last batch, and the last replay of a graph, is done. What goes wrong on the
    device is told in `told`, in the host's memory.

    Args:
        placement: the copies.
        rank: this rank.
        device: where `topk_idx` lies.
        head: the integers that an exchanged row begins with, between its status and the number of
            the batch.
        num_statuses: how many statuses a batch may end with.
        row_size: integers of an exchanged row; those behind the counts stay 0.
        solver: "flow" or "cusolverdx".
        windows: where the kernels exchange rows; None: they travel by other means.
        timeout_s: how long a batch waits for the rows.
        refreshable: whether other replicas will replace these.
    """

    def __init__(
        self,
        placement: Placement,
        rank: int,
        device: torch.device,
        head: Sequence[int],
        num_statuses: int,
        row_size: int,
        solver: str,
        windows: Windows | None = None,
        timeout_s: float = 60,
        refreshable: bool = False,
    ) -> None:
        self.placement, self.rank, self.device = placement, rank, device
        self.solver = Solver(placement, device, solver, refreshable)
        built = network.routes(placement, self.solver.room)
        self._tables = _upload(built, device)
        p, several, copies = placement, len(built.experts), len(built.copies)
        self._table = structs.TABLE.pack(
            **_addresses(built, self._tables),
            num_several=several,
            num_copies=copies,
            num_ranks=p.num_ranks,
            num_ranks_per_node=p.num_ranks_per_node,
            num_experts=p.num_experts,
            max_replicas=p.max_replicas,
        )
        self._num_route_bytes = num_route_bytes(placement, refreshable)
        zeros = functools.partial(torch.zeros, dtype=torch.int32)
        self.row = zeros(row_size, device=device)
        """[row_size] this rank's row of an exchange, between `count` and `route`."""
        self.head = torch.tensor([*head, 0], dtype=torch.int32, device=device)
        """[NUM_HEAD - 1] what a row begins with behind its status."""
        self.num_exchanges = self.head[-1:]
        """[1] the last of it, the number of the last batch that was exchanged."""
        self.num_by_status = zeros(num_statuses, device=device)
        """[num_statuses] batches planned so far that ended so."""
        self._histograms = zeros(MAX_CHUNKS, p.num_experts, device=device)
        told = zeros(p.num_ranks + structs.NUM_ERROR_FLAGS).pin_memory()
        self._told = told
        self.missing, self.told = told.numpy()[: p.num_ranks], told.numpy()[p.num_ranks :]
        """[R] 1 where a rank's row did not come in time; and [NUM_ERROR_FLAGS] 1 where a batch
        ended with that status, then for each `ErrorFlag`."""
        self.timeout_s = timeout_s
        addresses = [] if windows is None else windows.addresses
        self._windows = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._relay = None if windows is None else windows.relay
        self._exchange = zeros(4, device=device)  # what a batch leaves for the next
        self._kernels = {
            (one.name, dtype): _kernels(_route, (dtype,), device.index).kernel(
                one.name, one.formats
            )
            for one in _IN_ROUTE
            for dtype in (torch.int32, torch.int64)
        }
        self._stream = torch.cuda.current_stream(device)
        self._stream.synchronize()  # the first batch may run on any

    def prepare(self, placement: Placement, head: Sequence[int]) -> Callable[[], None]:
        """Makes tables of a placement with other copies; what is returned puts them in force, and
        `head` in the place of the last one. Captured graphs then plan with them, too.

        Raises:
            ValueError: they do not fit where this one's lie.
        """
        solver = self.solver.prepare(placement)
        new = _upload(network.routes(placement, self.solver.room), self.device)
        new_head = torch.tensor(head, dtype=torch.int32).to(self.device)

        def commit() -> None:
            solver()
            _rewrite(self._tables, new)
            self.head[:-1].copy_(new_head)
            self.placement = placement

        return commit

    @property
    def num_bytes(self) -> int:
        """Of device memory that this holds, beside what a batch takes and gives back."""
        held = (*self._tables, *self.solver.tables, self.row, self._histograms)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def _error_flags(self) -> int:
        """The address of `told`."""
        return self._told.data_ptr() + 4 * len(self.missing)

    def count(
        self, topk_idx: torch.Tensor, status: int, *, exchanged: bool, waits: bool = True
    ) -> Picks:
        """Counts picks, into `row` if they are to be exchanged; with windows, exchanges it.

        Args:
            topk_idx: [T, K] int32 or int64 on this device.
            status: how this rank fares, for the head of the row.
            exchanged: whether the other ranks get `row`; it is zero again after `route`.
            waits: whether to wait, on the GPU, for the rows that all ranks send. Those that do not
                come in time end the batch as TIMED_OUT, and are `missing`. If not, the next batch
                waits for them before it sends: they say that the others have read those of the
                batch before, in whose place its own go.
        """
        stream = torch.cuda.current_stream(self.device)
        if stream != self._stream and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._stream)
            self._stream = stream
        num_picks, E = topk_idx.numel(), self.placement.num_experts
        chunk = -(-max(1, num_picks) // MAX_CHUNKS)
        chunk = -(-chunk // 128) * 128  # whole cache lines of every kind of index
        num_chunks = max(1, -(-num_picks // chunk))
        scratch = torch.empty(6 * num_picks, dtype=torch.uint8, device=self.device)
        positions = scratch.data_ptr()
        packed = structs.PICKS.pack(
            experts=positions + 4 * num_picks,
            positions=positions,
            histograms=self._histograms.data_ptr(),
            num_picks=num_picks,
            num_chunks=num_chunks,
            chunk=chunk,
            num_experts=E,
        )
        topk_idx = topk_idx.contiguous()
        rows, window = None, bytes(structs.WINDOW.size)
        if exchanged and len(self._windows):
            rows = torch.empty(
                self.placement.num_ranks, NUM_HEAD + E, dtype=torch.int32, device=self.device
            )
            window = structs.WINDOW.pack(
                peers=self._windows.data_ptr(),
                state=self._exchange.data_ptr(),
                rows=rows.data_ptr(),
                missing=self._told.data_ptr(),
                limit_ns=round(1e9 * self.timeout_s),
                num_ranks=self.placement.num_ranks,
                rank=self.rank,
                waits=waits and self._relay is None,
            )
        launch(
            self._kernels["count", topk_idx.dtype],
            (num_chunks, 1),
            NUM_THREADS,
            4 * (NUM_HEAD + E),
            self.device,
            *structs.COUNT.arrange(
                topk_idx=topk_idx.data_ptr(),
                picks=packed,
                logical=0,
                num_ids=E,
                num_topk=0,
                row=self.row.data_ptr() if exchanged else 0,
                head=self.head.data_ptr(),
                error_flags=self._error_flags,
                window=window,
                status=status,
            ),
        )
        if self._relay is not None and rows is not None:
            self._relay_rows(self._relay, window)
        return Picks(topk_idx, scratch, num_chunks, packed, rows)

    def _relay_rows(self, relay: Relay, window: bytes) -> None:
        """For the other ranks' sake, whether or not this one waits."""
        packed = structs.RELAY.pack(
            sent=relay.sent,
            received=relay.received,
            signals=relay.signals,
            node=relay.node,
            node_size=relay.num_ranks_per_node,
        )
        arguments = structs.GATHER.arrange(
            window=window,
            relay=packed,
            num_batches=self.num_exchanges.data_ptr(),
            size=NUM_HEAD + self.placement.num_experts,
        )
        for one in (structs.GATHER, structs.BROADCAST):
            kernel = self._kernels[one.name, torch.int64]
            launch(kernel, (1, 1), NUM_THREADS, 0, self.device, *arguments)
            if one is structs.GATHER:
                relay.put(torch.cuda.current_stream(self.device).cuda_stream)

    def solve(self, picks: Picks, rows: torch.Tensor, status: int, *, exchanged: bool) -> Solved:
        """Solves, and meanwhile numbers the picks.

        Args:
            picks: what `count` returned.
            rows: [R, row_size] exchanged rows, or [R, E] counts; int32 on this device.
            status: how the batch fares, by what the rows do not say.
            exchanged: which of the two rows are.
        """
        p = self.placement
        counts = structs.COUNTS.pack(
            rows=rows.data_ptr(),
            num_rows=p.num_ranks,
            stride=rows.stride(0),
            batch_stride=0,
            head=NUM_HEAD if exchanged else 0,
            rank=self.rank,
        )
        counted = torch.empty(p.num_ranks, p.num_experts, dtype=torch.int32, device=self.device)
        quota, rank_load, endings = self.solver.launch(
            counts, 1, picks, counted, self._error_flags, status
        )
        return Solved(counted, quota[0], rank_load[0], endings[0])

    def route(
        self, picks: Picks, solved: Solved, *, exchanged: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits and rewrites: the physical topk_idx [T, K], and the batch's status []. Where that
        is not optimal, `solved` becomes the plan in which every token is at home."""
        ended = torch.empty((), dtype=torch.int32, device=self.device)
        physical = torch.empty_like(picks.topk_idx)
        batch = structs.BATCH.pack(
            counts=solved.counts.data_ptr(),
            quota=solved.quota.data_ptr(),
            rank_load=solved.rank_load.data_ptr(),
            endings=solved.endings.data_ptr(),
            status=ended.data_ptr(),
            num_by_status=self.num_by_status.data_ptr(),
            error_flags=self._error_flags,
            row=self.row.data_ptr() if exchanged else 0,
            num_components=len(solved.endings),
            rank=self.rank,
        )
        launch(
            self._kernels["route", physical.dtype],
            (picks.num_chunks, 1),
            NUM_THREADS,
            self._num_route_bytes,
            self.device,
            *structs.ROUTE.arrange(
                picks=picks.struct, table=self._table, batch=batch, physical=physical.data_ptr()
            ),
        )
        return physical, ended

    def split(self, counts: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        """As `cpu.split`: [R, E] and [E, C] int32 on this device to [R, E, C]."""
        p, num_threads = self.placement, 64
        out = torch.zeros(p.num_ranks, *quota.shape, dtype=torch.int32, device=self.device)
        num_nodes = p.num_ranks // p.num_ranks_per_node
        most = int((p.copy_rank >= 0).sum(1).max())  # useful copies, at most one a rank
        num_bytes = 4 * ((4 + num_threads) * most + num_nodes)
        launch(
            self._kernels["split", torch.int64],
            (p.num_experts, 1),
            num_threads,
            num_bytes,
            self.device,
            *structs.SPLIT.arrange(
                table=self._table,
                counts=counts.data_ptr(),
                quota=quota.data_ptr(),
                shares=out.data_ptr(),
            ),
        )
        return out
