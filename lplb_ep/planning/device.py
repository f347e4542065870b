"""Plans made on a GPU, bit for bit those of the host, with no wait of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..comm.exchange import Exchange, Windows
from ..gpu.launch import on_device
from ..placement.table import Placement
from ..problem import MAX_TOTAL, Problem
from . import structs
from .backend import Batch
from .device_tables import MAX_ROUNDS, DeviceTables, to_device
from .error_flags import ErrorFlags
from .guests_by_cost import push_waits
from .host import split_on_host
from .inputs import logical_table
from .kernels import NUM_THREADS, route_kernel
from .launches import Launches, Workspace
from .plan import Plan, Results, number_of
from .reuse import check_windows
from .solve import judge
from .statistics import DeviceStatistics
from .structs import Status
from .values import Reached

NUM_SPLIT_THREADS = 64


class DeviceBackend:
    """A `Backend` on the GPU that is current when it is made.

    All steps run on the current stream, so a CUDA graph may capture them. A batch on another stream
    than the last one's runs after it, outside of graphs. All batches share a workspace, so the
    backend must live until its last batch, and the last replay of a graph, is done. Slots are
    allocated for each batch, and so are the other results where the caller may ask for the plan.

    Args:
        placement: the copies.
        problem: what bounds a plan beside the counts, checked.
        rank: this rank.
        head: the integers that an exchanged row begins with, between its status and the number of
            the batch.
        row_size: integers of an exchanged row; those behind the counts stay 0.
        solver: one of `DEVICE_SOLVERS`.
        refreshable: whether other replicas will replace these.
        moves_homes: whether these may have other homes, too.
        windows: where kernels exchange rows; None: rows travel by other means.
        timeout_s: how long a batch waits for the rows, in seconds.
        abort_on_timeout: whether the process ends when a row is missing after that time.
        one_launch: as `Workspace` has it.
        sample_every, mark_every: as `DeviceStatistics` has `every` and `mark_every`.
        every: as `Workspace` has it.
        layer: names the layer in messages.

    Raises:
        ValueError: as `DeviceTables` and `check_windows`.
        MissingPackageError, CompileError: as `DeviceTables`.
    """

    capturable = True
    checks_late = True

    def __init__(
        self,
        placement: Placement,
        problem: Problem,
        rank: int,
        head: Sequence[int],
        row_size: int,
        *,
        solver: str,
        refreshable: bool = False,
        moves_homes: bool = False,
        windows: Windows | None = None,
        timeout_s: float = 60,
        abort_on_timeout: bool = False,
        one_launch: int = 0,
        sample_every: int = 0,
        every: int = 1,
        mark_every: int = 0,
        layer: str = "a layer",
    ) -> None:
        check_windows(every, windows)
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._index: int = self._device.index
        self._rank, self.problem = rank, problem
        self.tables = DeviceTables(
            placement, self._device, solver, refreshable, moves_homes, problem
        )
        self.error_flags = ErrorFlags(placement, rank, layer, timeout_s, abort_on_timeout)
        self.raise_errors = self.error_flags.raise_errors  # called for each batch
        by_tokens = problem.objective_name == "tokens"
        self.statistics = DeviceStatistics(
            placement, self._device, sample_every, by_tokens, mark_every
        )
        self.workspace = Workspace(
            self.tables,
            self.error_flags,
            rank,
            head,
            row_size,
            to_device(list(problem.bounds.values()), self._device),
            problem.guest_rule,
            problem.least_gain,
            windows,
            round(1e9 * timeout_s),
            MAX_ROUNDS,
            one_launch,
            every,
            self.statistics,
        )
        self._number = number_of(self.workspace.head)
        self._windows = windows
        # As functions of `torch.cuda`, without their objects and checks.
        self._current_device = torch._C._cuda_getDevice
        self._current_stream = torch._C._cuda_getCurrentRawStream
        self._launches: dict[tuple[torch.dtype, str, bool, bool], Launches] = {}
        self._stream = torch.cuda.current_stream(self._device)
        self._stream_address: int = self._stream.cuda_stream
        self._stream.synchronize()  # the first batch may run on any

    @property
    def has_relay(self) -> bool:
        """Whether the first rank of a node passes rows to other nodes."""
        return self.workspace.relay is not None

    @property
    def num_bytes(self) -> int:
        """Device memory that the backend holds between batches."""
        return self.tables.num_bytes + self.workspace.num_bytes

    def prepare(self, placement: Placement, head: list[int]) -> Callable[[], None]:
        """As `Backend.prepare`. Captured graphs then plan with the new copies, too."""
        switch = self.tables.prepare(placement)
        new_head = torch.tensor(head, dtype=torch.int32).to(self._device)
        # The ids of slots change with the copies: those tables belong to one placement.
        logical = logical_table(placement, self._device)

        def commit() -> None:
            switch()
            self.workspace.head[:-1].copy_(new_head)
            self.workspace.logical.copy_(logical)
            self.workspace.begin_turns()

        return commit

    def synchronize(self) -> None:
        """Waits for all that this GPU was given, replays of graphs included."""
        torch.cuda.synchronize(self._device)

    def refuse(self, exchange: Exchange) -> None:
        """As `Backend.refuse`. Waits for no one: the rank at fault may be gone."""
        nothing = torch.empty(0, 1, dtype=torch.int64, device=self._device)
        key = nothing.dtype, "logical", False, True
        launches = self._launches.get(key) or self._make_launches(*key)
        try:
            with on_device(self._index):
                results = self.workspace.results.data_ptr()
                launches.set_batch(nothing, Status.REFUSED, 0, results, in_steps=True)
                launches.count(self._enter_stream(), waits=False)
                if self._windows is None:
                    exchange.gather(self.workspace.row)
        finally:
            self.workspace.row.zero_()

    def mask(self, given: torch.Tensor, planned: torch.Tensor) -> torch.Tensor:
        """As `Backend.mask`, in one launch where both tensors lie on this GPU."""
        if given.get_device() != self._index or planned.get_device() != self._index:
            return torch.where(given < 0, -1, planned)
        given, planned = given.contiguous(), planned.contiguous()
        out = torch.empty_like(planned)
        num_blocks = -(-out.numel() // NUM_THREADS)
        if num_blocks:
            arguments = structs.MASK.arrange(
                given=given.data_ptr(),
                planned=planned.data_ptr(),
                out=out.data_ptr(),
                num_picks=out.numel(),
            )
            kernel = route_kernel(out.dtype, self._index, structs.MASK)
            kernel((num_blocks, 1), NUM_THREADS, 0, self._device, arguments)
        return out

    def route(self, batch: Batch, exchange: Exchange) -> Plan:
        """As `Backend.route`."""
        if self._current_device() != self._index:
            with torch.cuda.device(self._device):
                return self.route(batch, exchange)
        try:  # what takes memory or a compiler, before this rank's counts are sent
            topk_idx = self._on_device(batch.topk_idx)  # held until it is counted
            launches, physical, results = self._arrange(batch, topk_idx, batch.status, True)
            launch = launches.together(batch.is_captured)
        except Exception:
            self.refuse(exchange)
            raise
        stream = self._enter_stream()
        try:
            if launch is not None:
                launch(stream)
            else:
                launches.count(stream)
                if self._windows is None:
                    # Held until `solve` is launched. The memory of a tensor that is dropped goes to
                    # the next one, and `solve` would read results in their place.
                    rows = exchange.gather(self.workspace.row)
                    launches.set_rows(rows)
                launches.solve(stream)
                launches.route(stream)
        except BaseException:
            self.workspace.row.zero_()  # or its counts would be added to the next batch's
            raise
        return self._plan(batch, physical, results, True)

    def route_given(self, batch: Batch, counts: torch.Tensor) -> Plan:
        """As `Backend.route_given`."""
        if counts.dtype == torch.int64:  # or a number beyond int32 would wrap around
            counts = torch.where((counts < 0) | (counts > MAX_TOTAL), -1, counts)
        counts = counts.to(self._device, torch.int32).contiguous()
        with on_device(self._index):
            topk_idx = self._on_device(batch.topk_idx)  # held until it is counted
            launches, physical, results = self._arrange(batch, topk_idx, Status.OPTIMAL, False)
            launches.set_rows(counts, batch.status)
            launch = launches.together(batch.is_captured)
            assert launch is not None, "no rows travel"
            launch(self._enter_stream())
        return self._plan(batch, physical, results, False)

    def _on_device(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """`topk_idx` itself where it lies as kernels read it, else a copy."""
        if topk_idx.get_device() == self._index and topk_idx.is_contiguous():
            return topk_idx
        return topk_idx.to(self._device).contiguous()

    def _arrange(
        self, batch: Batch, topk_idx: torch.Tensor, status: Status, exchanged: bool
    ) -> tuple[Launches, torch.Tensor, torch.Tensor]:
        """The launches of a batch, and memory for its slots [T, K] and results.

        Args:
            batch: what this rank brings.
            topk_idx: its picks on this GPU, contiguous.
            status: for the head of the row.
            exchanged: whether rows are exchanged; else counts are given.
        """
        key = topk_idx.dtype, batch.indices, batch.distinct, exchanged
        launches = self._launches.get(key) or self._make_launches(*key)
        physical, results = torch.empty_like(topk_idx), self.workspace.results
        if batch.wants_plan and self.workspace.every == 1:
            results = torch.empty_like(results)
        addresses = physical.data_ptr(), results.data_ptr()
        launches.set_batch(topk_idx, status, *addresses, again=batch.is_again)
        return launches, physical, results

    def _plan(
        self, batch: Batch, physical: torch.Tensor, results: torch.Tensor, exchanged: bool
    ) -> Plan:
        """The plan of a batch that was launched."""
        if not batch.wants_plan and batch.topk_idx.get_device() == self._index:
            return Plan(physical, _not_kept, _not_kept, _not_kept)
        if self.workspace.every > 1:  # they stay for the batches that follow
            results = results.clone()
        # A captured plan's numbers are those of the last replay, by the placement in force then.
        made_on = None if batch.is_captured else self.tables.placement
        if batch.topk_idx.get_device() != self._index:
            physical = physical.to(batch.topk_idx.device)
        number = None
        if exchanged and batch.wants_plan and self.tables.placement.num_guests_per_rank:
            number = self._number.clone()  # the next batch raises it
        return Plan(
            physical,
            lambda: self._results(results),
            lambda *solved: self._split(made_on, results, *solved),
            lambda *solved, **known: self._judge(made_on, results, *solved, **known),
            number,
            made_on,
        )

    def _results(self, results: torch.Tensor) -> Results:
        p = self.tables.placement
        _, counts, quota, rank_load, status, guests = results.split(self.workspace.result_sizes)
        return Results(
            counts.view(p.num_ranks, p.num_experts),
            quota.view(p.num_experts, p.max_replicas),
            rank_load,
            status[0],
            guests.view(p.num_ranks, p.num_guests_per_rank),
        )

    def _split(
        self,
        made_on: Placement | None,
        results: torch.Tensor,
        counts: torch.Tensor,
        quota: torch.Tensor,
    ) -> torch.Tensor:
        if self.tables.placement.num_guests_per_rank:  # the tables are the last batch's
            filled = (made_on or self.tables.placement).with_guests(
                self._results(results).guests.cpu().numpy()
            )
            return split_on_host(filled, counts, quota)
        if made_on is not None and made_on is not self.tables.placement:  # before a refresh
            return split_on_host(made_on, counts, quota)
        p, on_gpu = self.tables.placement, (counts.to(self._device), quota.to(self._device))
        shares = torch.zeros(p.num_ranks, *quota.shape, dtype=torch.int32, device=self._device)
        num_nodes = p.num_ranks // p.num_ranks_per_node
        most = int((p.copy_rank >= 0).sum(1).max())  # useful copies, at most one a rank
        route_kernel(torch.int64, self._index, structs.SPLIT)(
            (p.num_experts, 1),
            NUM_SPLIT_THREADS,
            4 * ((4 + NUM_SPLIT_THREADS) * most + num_nodes),
            self._device,
            structs.SPLIT.arrange(
                table=self.tables.table,
                counts=on_gpu[0].data_ptr(),
                quota=on_gpu[1].data_ptr(),
                shares=shares.data_ptr(),
            ),
        )
        return shares.to(counts.device)

    def _judge(
        self,
        made_on: Placement | None,
        results: torch.Tensor,
        quota: torch.Tensor,
        load: torch.Tensor,
        on_ranks: torch.Tensor,
    ) -> Reached:
        placement = made_on or self.tables.placement
        waits: npt.NDArray[np.int64] | int = 0
        if placement.num_guests_per_rank:
            guests = self._results(results).guests.cpu().numpy()
            waits = push_waits(guests, placement, self.problem)
            placement = placement.with_guests(guests)
        return judge(quota, load, placement, self.problem, waits, on_ranks)

    def _make_launches(
        self, dtype: torch.dtype, indices: str, distinct: bool, exchanged: bool
    ) -> Launches:
        key = (dtype, indices, distinct, exchanged)
        launches = self._launches[key] = Launches(self.workspace, *key)
        return launches

    def _enter_stream(self) -> int:
        """The current stream's address, behind the last batch's."""
        address: int = self._current_stream(self._index)
        if address != self._stream_address and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            self._stream, self._stream_address = stream, address
        return address


def _not_kept(*_: Any) -> Any:
    raise AssertionError("a batch that wants no plan leaves its results to the next one")
