"""The launches of a plan on a GPU, prepared once: a batch overwrites a few arguments."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..comm.exchange import Windows
from ..gpu.abi import Signature
from ..gpu.launch import Kernel, Launch, LaunchGraph
from ..problem import GuestRule
from . import structs
from .device_tables import DeviceTables, kernel_of, problem_of
from .error_flags import ErrorFlags
from .inputs import logical_table, num_ids
from .kernels import MAX_CHUNKS, NUM_THREADS, route_kernel, route_signature
from .solvers import NUM_PLAN_THREADS
from .statistics import DeviceStatistics
from .stay import num_words
from .structs import HEAD, Status

_CHUNK_MULTIPLE = 128  # picks: whole cache lines of every kind of index
_BYTES_OF_PICK = 6  # a position and an expert


class Workspace:
    """Device memory that all batches of a planner share, and what their launches have in common.

    Args:
        tables: the placement.
        error_flags: where kernels say what they found wrong.
        rank: this rank.
        head: the integers that an exchanged row begins with, between its status and the number of
            the batch.
        row_size: integers of this rank's row, of which the last ones may stay 0.
        bounds: base loads [R], speeds [R] and limits [E, C], int32 on the GPU; None: none.
        guest_rule: when a batch takes guests.
        least_gain: tokens off the fullest rank for which a batch leaves home.
        windows: where kernels exchange rows; None: rows travel by other means.
        limit_ns: how long a batch waits for the rows.
        max_rounds: of a solver.
        one_launch: the most picks of a batch that is planned in one launch; 0: none.
        every: one in so many batches is exchanged and solved. The others use the results that it
            left in `results`.
        statistics: memory for the sums over its batches.
    """

    def __init__(
        self,
        tables: DeviceTables,
        error_flags: ErrorFlags,
        rank: int,
        head: Sequence[int],
        row_size: int,
        bounds: Sequence[torch.Tensor | None],
        guest_rule: GuestRule,
        least_gain: int,
        windows: Windows | None,
        limit_ns: int,
        max_rounds: int,
        one_launch: int,
        every: int,
        statistics: DeviceStatistics,
    ) -> None:
        p, device = tables.placement, tables.device
        R, E, C, G = p.num_ranks, p.num_experts, p.max_replicas, tables.num_components
        zeros = functools.partial(torch.zeros, dtype=torch.int32, device=device)
        self.tables, self.error_flags, self.rank = tables, error_flags, rank
        self.one_launch = one_launch
        self.plan = tables.plan_kernel(bounds) if one_launch else None
        """The kernel of whole plans of small batches, where there is one."""
        self.bounds, self.guest_rule, self.max_rounds = bounds, guest_rule, max_rounds
        self.row = zeros(row_size)
        """[row_size] this rank's row of an exchange, between `count` and `route`."""
        self.head = torch.tensor([*head, 0], dtype=torch.int32, device=device)
        """[HEAD - 1] integers of the head behind its status. The last is the number of the batch,
        which `count` raises, in replays of a graph, too."""
        self.statistics = statistics
        self.histograms = zeros(MAX_CHUNKS, p.num_experts)
        self.logical = logical_table(p, device).clone()
        """The expert of each slot of an engine, rewritten in place when replicas move."""
        self.scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._outgrown: list[torch.Tensor] = []  # which captured graphs may use
        self.least_gain, self.num_words = least_gain, num_words(E, R, least_gain)
        self.rows = zeros(R if windows else 0, self.num_words)
        """[R, num_words] rows of all ranks, where windows exchange them."""
        self.given_load = zeros(R if least_gain else 0)
        """[R] loads by the slots that a batch came with, from `solve` to `route`."""
        addresses = windows.addresses if windows else []
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._state = zeros(4)
        self.every, self.turn = every, zeros(1) + every - 1
        """[1] batches since the last that was exchanged, which `count` raises, in replays, too."""
        self.relay = windows.relay if windows else None
        self.window = bytes(structs.WINDOW.size)
        """The struct `Window`."""
        if windows is not None:
            self.window = structs.WINDOW.pack(
                peers=self._addresses.data_ptr(),
                state=self._state.data_ptr(),
                rows=self.rows.data_ptr(),
                missing=error_flags.missing_address,
                limit_ns=limit_ns,
                num_ranks=p.num_ranks,
                rank=rank,
                waits=self.relay is None,
                every=every,
                turn=self.turn_address,
                size=self.num_words,
            )
        of_endings = structs.ENDING.size // 4 * G
        self.result_sizes = [of_endings, R * E, E * C, R, 1, R * p.num_guests_per_rank]
        """Integers of what a plan consists of: endings, counts, quotas, rank loads, status and
        guests."""
        self.results = zeros(sum(self.result_sizes))
        """[sum of `result_sizes`] those of a batch that nobody asks for. Where quotas are reused,
        those of the last that was exchanged."""

    def begin_turns(self) -> None:
        """Has the next batch be exchanged, and no quotas of earlier ones be reused."""
        self.turn.fill_(self.every - 1)
        self.results.zero_()

    @property
    def turn_address(self) -> int:
        """Of `turn`, for kernels; 0 where all batches are exchanged."""
        return self.turn.data_ptr() if self.every > 1 else 0

    @property
    def own_counts(self) -> int:
        """The address of [E] this rank's counts, where windows exchange rows; else 0."""
        return self.rows[self.rank, HEAD:].data_ptr() if self.rows.numel() else 0

    @property
    def num_bytes(self) -> int:
        """Device memory that it takes."""
        held = [one for one in vars(self).values() if isinstance(one, torch.Tensor)]
        held += [*self._outgrown, *(one for one in self.bounds if one is not None)]
        of_tensors = sum(tensor.numel() * tensor.element_size() for tensor in held)
        return of_tensors + self.statistics.num_bytes

    def reserve(self, num_picks: int) -> None:
        """Makes `scratch` large enough for a batch."""
        if self.scratch.numel() < _BYTES_OF_PICK * num_picks:
            self._outgrown.append(self.scratch)
            # Twice as large at least: batches that grow by a token each would leave many behind.
            size = max(_BYTES_OF_PICK * num_picks, 2 * self.scratch.numel())
            self.scratch = torch.empty(size, dtype=torch.uint8, device=self.tables.device)


class Launches:
    """The launches of the batches of one kind.

    Args:
        workspace: of the planner.
        dtype: of `topk_idx`.
        indices: what `topk_idx` names, "logical" experts or "physical" ones.
        distinct: whether a token that picks one expert twice is refused.
        exchanged: whether rows are exchanged; else counts are given.
    """

    def __init__(
        self,
        workspace: Workspace,
        dtype: torch.dtype,
        indices: str,
        distinct: bool,
        exchanged: bool,
    ) -> None:
        self._workspace, self._distinct, self._exchanged = workspace, distinct, exchanged
        tables, flags = workspace.tables, workspace.error_flags.address
        p = tables.placement
        kernel = functools.partial(route_kernel, dtype, tables.device.index)
        physical = indices == "physical"
        keeps = physical and exchanged and workspace.least_gain > 0
        self._given_load = workspace.given_load.data_ptr() if keeps else 0
        given: dict[str, int | bytes] = {
            "topk_idx": 0,
            "picks": bytes(structs.PICKS.size),
            "logical": workspace.logical.data_ptr() if physical else 0,
            "num_ids": num_ids(p, indices),
            "num_topk": 0,
            "head": workspace.head.data_ptr(),
            "window": workspace.window if exchanged else bytes(structs.WINDOW.size),
            "status": Status.OPTIMAL,
        }
        row, num_local = workspace.row.data_ptr() if exchanged else 0, p.num_local_slots * keeps
        about: dict[str, Any] = {"least_gain": workspace.least_gain, "turn": workspace.turn_address}
        about |= {"error_flags": flags, "given_load": self._given_load}
        problem = problem_of(tables, workspace.bounds, workspace.max_rounds, **about)
        batch = self._batch(row)
        self._count = kernel(structs.COUNT).prepare(
            structs.COUNT.arrange(row=row, error_flags=flags, num_local=num_local, **given),
            NUM_THREADS,
            4 * workspace.num_words,
        )
        self._solve = kernel_of(tables, workspace.bounds).prepare(
            tables.arguments(problem, workspace.guest_rule),
            tables.num_solver_threads,
            tables.num_solver_bytes,
        )
        self._route = kernel(route_signature(workspace.every, workspace.least_gain)).prepare(
            structs.ROUTE.arrange(
                picks=given["picks"], table=tables.table, batch=batch, given=0, physical=0
            ),
            NUM_THREADS,
            tables.num_route_bytes,
        )
        # Whether nothing but kernels of this rank's GPU comes between its picks and its slots.
        self._by_kernels = not exchanged or (
            bool(workspace.rows.numel()) and workspace.relay is None
        )
        self._plan = self._plan_launch(problem=problem, wide=dtype == torch.int64, **given)
        self._relayed = self._relay_launches(kernel) if workspace.relay and exchanged else []
        self._make_writers()
        self._shape: Sequence[int] = ()
        self._scratch = workspace.scratch
        self._is_one = False
        self._status, self._results, self._again = Status.OPTIMAL, 0, False
        if exchanged and workspace.rows.numel():
            self.set_rows(workspace.rows)

    @property
    def _plan_signature(self) -> Signature:
        by_objective = bool(self._workspace.tables.objective)
        return structs.PLAN_BY_OBJECTIVE if by_objective else structs.PLAN

    def _plan_launch(self, **given: int | bytes) -> Launch | None:
        """The launch of whole plans, where small batches have one."""
        workspace, tables = self._workspace, self._workspace.tables
        if workspace.plan is None or not self._by_kernels:
            return None
        by = {"objective": tables.objective} if tables.objective else {}
        arguments = self._plan_signature.arrange(
            table=tables.table, batch=self._batch(0), physical=0, **by, **given
        )
        return workspace.plan.prepare(arguments, NUM_PLAN_THREADS, tables.num_plan_bytes)

    def _batch(self, row: int) -> bytes:
        """The struct `Batch`. Results are named before a launch."""
        workspace = self._workspace
        p = workspace.tables.placement
        return structs.BATCH.pack(
            counts=0,
            quota=0,
            rank_load=0,
            endings=0,
            status=0,
            guests=0,
            statistics=workspace.statistics.pack(*workspace.bounds[:2]),
            error_flags=workspace.error_flags.address,
            row=row,
            num_components=workspace.tables.num_components,
            rank=workspace.rank,
            num_guests=p.num_ranks * p.num_guests_per_rank,
            least_gain=workspace.least_gain,
            turn=workspace.turn_address,
            own=workspace.own_counts,
            again=0,
            given_load=self._given_load,
        )

    def _relay_launches(self, kernel: Callable[[Signature], Kernel]) -> list[Launch]:
        """What takes rows to other nodes and back; a launch of `put` comes between the two."""
        relay, window = self._workspace.relay, self._workspace.window
        assert relay is not None, "there are other nodes"
        packed = structs.RELAY.pack(
            sent=relay.sent,
            received=relay.received,
            signals=relay.signals,
            node=relay.node,
            node_size=relay.num_ranks_per_node,
        )
        return [
            kernel(signature).prepare(
                signature.arrange(
                    window=window,
                    relay=packed,
                    num_batches=self._workspace.head[-1:].data_ptr(),
                ),
                NUM_THREADS,
            )
            for signature in (structs.GATHER, structs.BROADCAST)
        ]

    def _make_writers(self) -> None:
        """Finds the fields that a batch overwrites."""
        solves = self._workspace.tables.solve_signature
        count, solve = (structs.COUNT, self._count), (solves, self._solve)
        route, plan = (structs.ROUTE, self._route), (self._plan_signature, self._plan)
        self._chosen: int | None = None
        if self._workspace.tables.placement.num_guests_per_rank:
            self._chosen = self._solve.word(*solves.span("guests.chosen"))
        of_picks = [field.name for field in structs.PICKS.fields]
        self._write_picks = [
            _writer("picks", of_picks, count),
            _writer("problem.picks", of_picks, solve),
            _writer("picks", of_picks, route),
        ]
        self._write_plan_picks = _writer("picks", of_picks, plan)
        self._write_num_topk = _writer("", ["num_topk"], count, plan)
        self._write_status = _writer("", ["status"], count, plan)
        self._write_waits = _writer("window", ["waits"], count)
        of_counts = [field.name for field in structs.COUNTS.fields]
        self._write_counts = _writer("problem.counts", of_counts, solve, plan)
        self._write_solver_status = _writer("problem", ["status"], solve, plan)
        of_solution = ["quota", "rank_load", "endings", "counted"]
        self._write_solution = _writer("problem", of_solution, solve, plan)
        of_batch = ["counts", "quota", "rank_load", "endings", "status", "guests"]
        self._write_batch = _writer("batch", of_batch, route, plan)
        self._write_again = _writer("batch", ["again"], route, plan)
        self._topk_idx = self._count.word(*structs.COUNT.span("topk_idx"))
        self._given, self._physical = (
            self._route.word(*structs.ROUTE.span(word)) for word in ("given", "physical")
        )
        if self._plan is not None:
            words = ("topk_idx", "physical")
            self._of_plan = [self._plan.word(*self._plan_signature.span(word)) for word in words]

    def _set_shape(self, shape: Sequence[int], in_steps: bool) -> None:
        """Chooses the launches of a batch, and gives them scratch memory for its picks."""
        workspace, (num_tokens, num_topk) = self._workspace, shape
        num_picks, E = num_tokens * num_topk, workspace.tables.placement.num_experts
        self._is_one = self._plan is not None and num_picks <= workspace.one_launch and not in_steps
        self._write_num_topk(num_topk if self._distinct else 0)
        if self._is_one:
            self._write_plan_picks(0, 0, 0, num_picks, 1, num_picks, E)
        else:
            workspace.reserve(num_picks)
            chunk = -(-max(1, num_picks) // MAX_CHUNKS)
            chunk = -(-chunk // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE
            num_chunks = max(1, -(-num_picks // chunk))
            positions = workspace.scratch.data_ptr()
            picks = positions + 4 * num_picks, positions, workspace.histograms.data_ptr()
            for write in self._write_picks:
                write(*picks, num_picks, num_chunks, chunk, E)
            self._count.resize(num_chunks)
            self._solve.resize(workspace.tables.num_solver_blocks(num_chunks))
            self._route.resize(num_chunks + 1)
        self._shape, self._scratch = () if in_steps else shape, workspace.scratch

    def set_batch(
        self,
        topk_idx: torch.Tensor,
        status: Status,
        physical: int,
        results: int,
        *,
        in_steps: bool = False,
        again: bool = False,
    ) -> None:
        """Names the batch of the launches that follow, and reserves scratch memory for it.

        Args:
            topk_idx: [T, K] on the GPU, contiguous.
            status: of this rank, for the head of the row.
            physical: address of the slots [T, K], where picks are rewritten.
            results: address of the integers of `Workspace.result_sizes`.
            in_steps: whether its steps are launched one by one: `count`, `solve` and `route`.
            again: whether a backward pass plans a batch again.
        """
        shape = topk_idx.shape
        if in_steps or shape != self._shape or self._scratch is not self._workspace.scratch:
            self._set_shape(shape, in_steps)
        if status is not self._status:
            self._write_status(status)
            self._status = status
        if results != self._results:
            self._set_results(results)
        if again is not self._again:
            self._write_again(again)
            self._again = again
        if self._is_one:
            assert self._plan is not None, "it was chosen"
            self._plan.point(self._of_plan[0], topk_idx.data_ptr())
            self._plan.point(self._of_plan[1], physical)
        else:
            self._count.point(self._topk_idx, topk_idx.data_ptr())
            self._route.point(self._physical, physical)
            if self._given_load:
                self._route.point(self._given, topk_idx.data_ptr())

    def together(self, is_captured: bool) -> Callable[[int], None] | None:
        """What launches the whole batch on a stream, given by its address.

        A small batch of one component is one launch, else it is three: as one graph, which no
        stream that is being captured takes. None: rows travel by other means than this GPU's
        kernels alone, and the steps are launched one by one.
        """
        if self._is_one:
            return self._plan
        if not self._by_kernels:
            return None
        return self._in_turn if is_captured else self._graph

    def _in_turn(self, stream: int) -> None:
        self.count(stream)
        self.solve(stream)
        self.route(stream)

    @functools.cached_property
    def _graph(self) -> LaunchGraph:
        return LaunchGraph([self._count, self._solve, self._route])

    def count(self, stream: int, *, waits: bool = True) -> None:
        """Counts picks, into the row if it is exchanged; with windows, exchanges it.

        Args:
            stream: the current one's address.
            waits: whether to wait, on the GPU, for the rows that all ranks send. Those that do not
                come in time end the batch as TIMED_OUT. If not, the next batch waits for them
                before it sends. They say that all ranks have read the rows that it overwrites.
        """
        if waits:
            self._count(stream)
        else:
            self._write_waits(0)
            try:
                self._count(stream)
            finally:
                self._write_waits(self._workspace.relay is None)
        if self._relayed:
            relay = self._workspace.relay
            assert relay is not None, "there are other nodes"
            # For the other ranks' sake, whether or not this one waits.
            self._relayed[0](stream)
            relay.put(stream)
            self._relayed[1](stream)

    def set_rows(self, rows: torch.Tensor, status: Status = Status.OPTIMAL) -> None:
        """Names the rows that `solve` adds up.

        Args:
            rows: [R, at least HEAD + E] exchanged rows, or [R, E] given counts; int32 on the GPU.
            status: of the batch, as far as the rows do not say it.
        """
        head = HEAD if self._exchanged else 0
        self._write_counts(
            rows.data_ptr(), rows.shape[0], rows.stride(0), 0, head, self._workspace.rank
        )
        self._write_solver_status(status)

    def solve(self, stream: int) -> None:
        """Solves, and meanwhile numbers the picks."""
        self._solve(stream)

    def route(self, stream: int) -> None:
        """Splits the quotas for this rank's tokens and rewrites the picks to slots.

        Where the batch is not optimal, the results become the plan with every token at home.
        """
        self._route(stream)

    def _set_results(self, results: int) -> None:
        endings, *sizes = self._workspace.result_sizes
        places = itertools.accumulate((4 * size for size in sizes), initial=results + 4 * endings)
        counts, quota, rank_load, status, guests, _ = places
        self._write_solution(quota, rank_load, results, counts)
        self._write_batch(counts, quota, rank_load, results, status, guests)
        if self._chosen is not None:
            self._solve.point(self._chosen, guests)
        self._results = results


def _writer(
    prefix: str, fields: Sequence[str], *prepared: tuple[Signature, Launch | None]
) -> Callable[..., None]:
    """A function that overwrites neighbouring fields of several launches, by their signatures."""
    paths = [f"{prefix}.{field}" if prefix else field for field in fields]
    writes = [launch.writer(*signature.span(*paths)) for signature, launch in prepared if launch]
    if len(writes) == 1:
        return writes[0]

    def write(*values: int) -> None:
        for one in writes:
            one(*values)

    return write
