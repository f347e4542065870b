"""One batch from `topk_idx` to a `Plan`: count, exchange, solve, split, rewrite."""

from __future__ import annotations

import collections
import functools
import logging
from collections.abc import Callable
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .. import __version__
from ..comm.collectives import together
from ..comm.connect import connect
from ..comm.exchange import Exchange
from ..comm.watchdog import look, missing_ranks, watch
from ..errors import ContractError, RankError
from ..layer import Layer, check_slot, layer_of
from ..placement.table import Placement
from . import device as cuda
from . import reference as cpu
from .plan import Plan, Status, check_plan, check_topk_idx
from .solve import choose_solver, rank_load, solver_fact
from .structs import MAX_TOTAL, ErrorFlag, Head

log = logging.getLogger(__name__)


_REASONS = {
    Status.STALE: "STALE, the replicas' weights are not known to equal their homes' on some rank. "
    "Replicas.copy_weights() makes them so; LPLB_EP_REPLICAS=valid says that the program does",
    Status.BAD_COUNTS: "BAD_COUNTS, the ranks' counts are negative or total more than 2**31 - 1",
    Status.INFEASIBLE: "INFEASIBLE, an expert's load is more than the capacities of its copies",
    Status.NOT_CONVERGED: "NOT_CONVERGED, the solver ran out of rounds; please report the load",
}


# An exchanged row begins with a `Head`, and the counts follow.
# Rows are padded to a multiple, so that ranks that plan with placements of different E still meet.
_ROW_MULTIPLE = 1024

# How many planners were made for a group, so that two on one placement are told apart.
_num_made: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


class Planner:
    """Plans batches on one placement; a channel of its own between the ranks.

    Every rank makes its planners in the same order and calls them for every batch, with no tokens
    too: making one and each call are collective where there is a group. One thread at a time, and
    batches one after the other: micro-batches in flight together need a planner each.

    With the solver `cpu` a call waits for its input and is done on return. With the others all
    steps run on the GPU, on the current stream, and the CPU waits for nothing (but counts that
    travel by a group of gloo): a CUDA graph may capture a call. A call on another stream than the
    last one's runs after it; replays of graphs are the caller's to order. A planner must outlive
    its graphs and all that it has put on the GPU.

    What only the GPU sees, such as an index out of range, raises at a later call, when the GPU has
    got there. Replays of a graph make no call: `raise_errors` looks, and waits.

    Args:
        target: the layer, or the placement object that stands for one.
        group: the expert-parallel group, of `placement.num_ranks` ranks in rank order.
        rank: this rank, where there is no group.
        counts: "auto", "nvshmem", "ipc", "torch", or "given" (each call brings the counts of all
            ranks).
        solver: "auto", "cpu", "flow" or "cusolverdx". For the GPU, kernels are compiled now if they
            never were.
        slot: which of several planners on one placement and group this is.
        compare: whether the ranks compare placement and settings now, which makes this collective.
            Placements are compared with every exchange too, by a tag of 28 bits.
        check: verify every batch and its plan at once, which waits for the GPU.
        timeout_s: how long a kernel waits for another rank's counts.
        abort_on_timeout: whether the process ends then, instead of raising at the next call.

    Raises:
        TypeError: `target` is neither a layer nor a placement.
        ValueError: arguments that do not fit together; the message names them.
        MissingPackageError: the solver needs a GPU or a package that is not there.
        CompileError: a kernel does not compile.
        RankError: ranks differ in placement, settings or version, or one refused its arguments;
            names what and who.
    """

    def __init__(
        self,
        target: Layer | Placement,
        group: dist.ProcessGroup | None = None,
        rank: int | None = None,
        counts: str = "auto",
        solver: str = "auto",
        *,
        slot: int = 0,
        compare: bool = True,
        check: bool = False,
        timeout_s: float = 60,
        abort_on_timeout: bool = False,
    ) -> None:
        ranks = group if compare else None
        with together(ranks, "Planner") as facts:
            self.layer = layer_of(target)
            placement, refreshable = self.layer.placement, self.layer.is_refreshable
            self.rank = _own_rank(placement, group, rank)
            check_slot(slot)
            if not (isinstance(timeout_s, (int, float)) and 0 < timeout_s < 2**31):
                raise ValueError(
                    "timeout_s must be a number of seconds, more than 0 and less than 2**31; "
                    f"got {timeout_s!r}"
                )
            self.solver, _ = choose_solver(solver, placement, refreshable)
            facts["placement"] = placement.fingerprint()
            facts["slot"] = slot
            facts["solver"] = solver_fact(solver, placement, refreshable)
            facts["counts"] = counts
            facts["lplb_ep version"] = __version__
        self.placement = placement
        self.exchange = connect(
            counts,
            group,
            placement.num_ranks,
            cuda.NUM_HEAD + placement.num_experts,
            on_gpu=self.solver != "cpu",
        )
        self.counts = "given" if self.exchange is None else self.exchange.kind
        self._check = check
        self._homes: dict[torch.device, _Homes] = {}
        self._head = [_tag(placement), slot, _count_planner(group) if compare else 0]
        self._steps: _CpuSteps | _GpuSteps
        with together(ranks, "Planner"):
            self._steps = self._make_steps(timeout_s, abort_on_timeout)
        self.layer.planners.add(self)

    def _make_steps(self, timeout_s: float, abort_on_timeout: bool) -> _CpuSteps | _GpuSteps:
        size = cuda.NUM_HEAD + self.placement.num_experts
        row_size = -(-size // _ROW_MULTIPLE) * _ROW_MULTIPLE
        if self.solver == "cpu":
            return _CpuSteps(self.placement, self.rank, self._head, row_size)
        steps = cuda.Steps(
            self.placement,
            self.rank,
            torch.device("cuda", torch.cuda.current_device()),
            self._head,
            len(Status),
            row_size,
            self.solver,
            None if self.exchange is None else self.exchange.windows,
            timeout_s,
            self.layer.is_refreshable,
        )
        return _GpuSteps(steps, abort_on_timeout)

    @property
    def num_batches(self) -> collections.Counter[Status]:
        """Batches planned so far, by status; waits for the GPU."""
        return self._steps.num_batches()

    def raise_errors(self, *, wait: bool = True) -> None:
        """Raises what the GPU found wrong with earlier batches.

        For batches that a CUDA graph replays, and before going on after an error: every rank has
        been told of the same batches then. Of several faults the first is raised and the others
        are logged. Local, nothing is exchanged.

        Args:
            wait: whether to wait for the GPU first; if not, what it has found so far is raised.

        Raises:
            ValueError: a batch's `topk_idx` out of range, or given counts that were not its own.
            RankError: another rank refused its input, or ranks planned different batches.
        """
        if wait:
            self._steps.synchronize()
        self._steps.raise_told()
        for homes in self._homes.values():
            if wait:
                torch.cuda.synchronize(homes.device)
            homes.raise_told()

    def __call__(
        self,
        topk_idx: torch.Tensor,
        counts: torch.Tensor | None = None,
        *,
        stale: bool = False,
        distinct: bool = False,
    ) -> Plan:
        """Plans one batch. Collective, unless `counts` are given.

        Args:
            topk_idx: [T, K] int32 or int64, logical experts in [0, E), -1 = no pick; any T from 0.
            counts: [R, E] integers, with counts="given" only; row `rank` must count `topk_idx`.
            stale: this rank's replica weights are out of date; one such rank sends all ranks'
                tokens home. (A captured graph stays what it was captured with.)
            distinct: whether a token that picks one expert twice is refused.

        Raises:
            TypeError: `topk_idx` or `counts` is no tensor.
            ValueError: `topk_idx` or `counts` of a wrong shape, dtype or range; on the GPU, the
                range of an earlier call's. The other ranks are told, and raise too.
            RankError: another rank refused its input, or plans with another placement (every rank
                raises then, so none hangs); on the GPU, in an earlier call.
            ContractError: a CUDA graph is being captured, and this cannot be in one; or another
                placement is in force in the layer, and this planner was made before.
        """
        if self.is_outdated:
            raise ContractError(
                "this planner was made before its layer's placement was to be refreshed: make the "
                "Refresher first, then the planner"
            )
        if (counts is None) == (self.exchange is None):
            raise ValueError(
                f"this planner's counts are {self.counts!r}: "
                + ("pass counts=" if counts is None else "counts= must not be passed")
            )
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._check_capturable(topk_idx)
        self._raise_told()
        try:
            self._check_input(topk_idx, distinct)
            if counts is not None:
                _check_counts(counts, self.placement)
        except (TypeError, ValueError) as error:
            if self.exchange is None:
                raise
            self.refuse(error)
        status = Status.STALE if stale else Status.OPTIMAL
        if counts is not None:
            plan = self._steps.plan_given(topk_idx, counts, status)
        else:
            assert self.exchange is not None, "checked above"
            plan = self._steps.plan_exchanged(topk_idx, self.exchange, status)
        if self._check:
            self._steps.synchronize()
            self._steps.raise_told()
            check_plan(plan, topk_idx, self.placement, self.rank)
        for observe in self.layer.observers:
            observe(plan.counts)
        return plan

    @property
    def is_outdated(self) -> bool:
        """Whether another placement is in force in its layer, which it was not prepared for."""
        return self.placement is not self.layer.placement

    def prepare(self, placement: Placement) -> Callable[[], None]:
        """Makes ready for other copies in its layer (`Placement.with_copies`). Local.

        Returns:
            What puts them in force, to be called on every rank between the same batches; it cannot
            fail. On the GPU it writes tables in place, so CUDA graphs that hold calls of this
            planner stay valid, and plan with the new copies.

        Raises:
            ValueError: the placement is not of this layer, or on the GPU its tables do not fit
                where those of the first one lie; says by what.
        """
        if not placement.may_replace(self.placement):
            raise ValueError(f"{placement} is not one of this planner's layer: use with_copies")
        steps = self._steps.prepare(placement, [_tag(placement), *self._head[1:]])

        def commit() -> None:
            steps()
            self.placement = placement

        return commit

    def home(self, topk_idx: torch.Tensor, *, distinct: bool = False) -> torch.Tensor:
        """Every token at its expert's home: nothing is exchanged or solved.

        Of CUDA tensors the CPU waits for nothing, and a graph may capture a call that is not the
        first.

        Args:
            topk_idx: [T, K] int32 or int64, logical experts in [0, E), -1 = no pick.
            distinct: whether a token that picks one expert twice is refused.

        Returns:
            [T, K] of the same dtype and device: slots in [0, P), -1 where the input has -1.

        Raises:
            ValueError: `topk_idx` of a wrong shape, dtype or range; on the GPU, the range of an
                earlier call's.
        """
        on_gpu = isinstance(topk_idx, torch.Tensor) and topk_idx.is_cuda and not self._check
        num_experts = self.placement.num_experts
        check_topk_idx(topk_idx, num_experts, values=not on_gpu, distinct=distinct)
        if not on_gpu:
            return cpu.rewrite_home(topk_idx, self.placement)
        device = topk_idx.device
        if device not in self._homes:
            self._homes[device] = _Homes(self.placement, device)
        self._homes[device].raise_told()
        return self._homes[device](topk_idx)

    def mask(self, given: torch.Tensor, physical: torch.Tensor) -> torch.Tensor:
        """The planned slots of picks of which some were masked since.

        Args:
            given: [T, K], the picks as they are now, -1 = no pick.
            physical: [T, K], the slots that they were planned to.

        Returns:
            [T, K]: -1 where `given` is negative, else as `physical`.
        """
        return torch.where(given < 0, -1, physical)

    def refuse(self, error: Exception) -> NoReturn:
        """Raises `error` after sending word to the other ranks, which wait for this one's counts
        and raise too. Collective, in the place of a call."""
        assert self.exchange is not None, "only a planner with an exchange has ranks that wait"
        self._steps.refuse(self.exchange)
        raise error

    def _raise_told(self) -> None:
        """Raises what the GPU told of earlier batches, where others may wait for this rank's row
        after sending word to them."""
        if self.exchange is not None and self.exchange.waits_on_host:
            # Waits for the GPU in any case. So every rank is told of a batch before it comes to the
            # next, and none waits for another.
            self._steps.synchronize()
            self._steps.raise_told()
            return
        try:
            self._steps.raise_told()
        except (RankError, ValueError) as error:
            if self.exchange is None:
                raise
            self.refuse(error)

    def _check_input(self, topk_idx: torch.Tensor, distinct: bool) -> None:
        on_gpu = isinstance(self._steps, _GpuSteps) and not self._check
        num_experts = self.placement.num_experts
        check_topk_idx(topk_idx, num_experts, values=not on_gpu, distinct=distinct)

    def _check_capturable(self, topk_idx: torch.Tensor) -> None:
        if isinstance(self._steps, _CpuSteps):
            raise ContractError("plans are made on the CPU, which a CUDA graph cannot capture")
        if not getattr(topk_idx, "is_cuda", True):
            raise ContractError(
                "topk_idx lies on the CPU, and a CUDA graph cannot capture a call that fetches it"
            )
        if self._check:
            raise ContractError(
                "LPLB_EP_CHECK waits for the GPU, which a CUDA graph cannot capture"
            )
        if self.exchange is not None and not self.exchange.capturable:
            raise ContractError(
                "counts travel by a group of gloo, through the CPU, which a CUDA graph cannot "
                "capture; use a group of NCCL"
            )


def _count_planner(group: dist.ProcessGroup | None) -> int:
    """Which of the group's planners this is, from 1; 0 where there is no group."""
    if group is None:
        return 0
    _num_made[group] = _num_made.get(group, 0) + 1
    return _num_made[group]


def _tag(placement: Placement) -> int:
    """What ranks compare with every batch."""
    return int(placement.fingerprint()[:7], 16)


class _CpuSteps:
    """How a planner makes plans on the CPU."""

    def __init__(self, placement: Placement, rank: int, head: list[int], row_size: int) -> None:
        self._placement, self._rank, self._head = placement, rank, head
        self._row_size, self._num_exchanges = row_size, 0
        self._num_batches: collections.Counter[Status] = collections.Counter()

    def num_batches(self) -> collections.Counter[Status]:
        return self._num_batches

    def prepare(self, placement: Placement, head: list[int]) -> Callable[[], None]:
        def commit() -> None:
            self._placement, self._head = placement, head

        return commit

    def synchronize(self) -> None:
        """Nothing is under way."""

    def raise_told(self) -> None:
        """Nothing is told late."""

    def refuse(self, exchange: Exchange) -> None:
        self._gather(exchange, torch.zeros(self._placement.num_experts).int(), Status.REFUSED)

    def plan_exchanged(self, topk_idx: torch.Tensor, exchange: Exchange, status: Status) -> Plan:
        here = topk_idx.cpu()
        rows = self._gather(exchange, cpu.count(here, self._placement.num_experts), status)
        refused_by = torch.nonzero(rows[:, Head.STATUS] == Status.REFUSED).flatten().tolist()
        if refused_by:
            raise RankError(f"ranks {refused_by} refused their topk_idx; see their errors")
        return self._plan(
            topk_idx,
            here,
            rows[:, cuda.NUM_HEAD :].contiguous(),
            Status(int(rows[:, Head.STATUS].max())),
        )

    def plan_given(self, topk_idx: torch.Tensor, counts: torch.Tensor, status: Status) -> Plan:
        here, gathered = topk_idx.cpu(), counts.cpu().long()
        wrong = torch.nonzero((gathered < 0) | (gathered > MAX_TOTAL))
        if len(wrong):
            r, e = wrong[0].tolist()
            raise ValueError(
                f"counts[{r}, {e}] must be in [0, {MAX_TOTAL}]; got {int(gathered[r, e])}"
            )
        own = cpu.count(here, self._placement.num_experts)
        wrong = torch.nonzero(gathered[self._rank] != own)
        if len(wrong):
            e = int(wrong[0])
            raise ValueError(
                f"counts[{self._rank}, {e}] is {int(gathered[self._rank, e])}, and topk_idx picks "
                f"expert {e} {int(own[e])} times"
            )
        return self._plan(topk_idx, here, gathered.int(), status)

    def _gather(self, exchange: Exchange, counts: torch.Tensor, status: Status) -> torch.Tensor:
        """[R, head and counts] int32."""
        size = cuda.NUM_HEAD + self._placement.num_experts
        row = torch.zeros(self._row_size, dtype=torch.int32)
        self._num_exchanges = (self._num_exchanges + 1) % 2**31
        row[: cuda.NUM_HEAD] = torch.tensor([status, *self._head, self._num_exchanges])
        row[cuda.NUM_HEAD : size] = counts
        rows = exchange.gather(row)
        others = (rows[:, 1 : cuda.NUM_HEAD] != row[1 : cuda.NUM_HEAD]).any(1)
        if others.any() and status != Status.REFUSED:
            raise RankError(
                f"ranks {torch.nonzero(others).flatten().tolist()} plan another batch than this "
                "rank: another placement, another slot, or the same ones in another order"
            )
        return rows[:, :size]

    def _plan(
        self, topk_idx: torch.Tensor, here: torch.Tensor, counts: torch.Tensor, status: Status
    ) -> Plan:
        load = counts.long().sum(0)
        if bool((counts < 0).any()) or int(load.sum()) > MAX_TOTAL:
            counts, load, status = counts * 0, load * 0, Status.BAD_COUNTS
        if status is Status.OPTIMAL:
            quota = cpu.solve(load, self._placement).quota
            shares = cpu.split(counts, quota, self._placement)
            physical = cpu.rewrite(here, shares[self._rank], self._placement)
        else:
            quota = torch.zeros(self._placement.logical_to_physical.shape, dtype=torch.int32)
            quota[:, 0] = load
            physical = cpu.rewrite_home(here, self._placement)
            if self._num_batches[status] == 0:
                _log_once(self._placement, status)
        self._num_batches[status] += 1
        plan = Plan(
            topk_idx=physical,
            counts=counts,
            quota=quota,
            rank_load=rank_load(quota, self._placement).int(),
            status=torch.tensor(int(status), dtype=torch.int32),
            _split=functools.partial(_split_on_cpu, self._placement),
        )
        return plan.to(topk_idx.device)


def _split_on_cpu(placement: Placement, counts: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    return cpu.split(counts.cpu(), quota.cpu(), placement).to(counts.device)


class _GpuSteps:
    """How a planner makes plans on the GPU that is current when it is made."""

    def __init__(self, steps: cuda.Steps, abort_on_timeout: bool) -> None:
        self._steps, self._placement, self._device = steps, steps.placement, steps.device
        self._name = self._placement.fingerprint()[:8]
        self._logged: set[Status] = set()
        say = functools.partial(missing_ranks, steps.missing, self._name, steps.timeout_s)
        watch(self, steps.missing, say, abort=abort_on_timeout)

    def num_batches(self) -> collections.Counter[Status]:
        self.synchronize()
        numbers = self._steps.num_by_status.tolist()
        return collections.Counter({s: numbers[s] for s in Status if numbers[s]})

    def prepare(self, placement: Placement, head: list[int]) -> Callable[[], None]:
        steps = self._steps.prepare(placement, head)

        def commit() -> None:
            steps()
            self._placement = placement

        return commit

    def synchronize(self) -> None:
        """Waits for all that this GPU was given, replays of graphs included."""
        torch.cuda.synchronize(self._device)

    def raise_told(self) -> None:
        """Raises or logs what the GPU told of earlier batches."""
        told = self._steps.told
        if not told.any():
            return
        seen = told.nonzero()[0].tolist()
        told[seen] = 0
        for status in (_REASONS.keys() & seen) - self._logged:
            self._logged.add(status)
            _log_once(self._placement, status)
        faults = {
            ErrorFlag.OUT_OF_RANGE: _out_of_range(self._placement),
            ErrorFlag.REPEATED_PICK: ValueError(
                "a token of an earlier batch's topk_idx picked an expert twice"
            ),
            ErrorFlag.MISCOUNTED: ValueError(
                "an earlier batch's counts were not those of its topk_idx"
            ),
            Status.TIMED_OUT: RankError(
                missing_ranks(self._steps.missing, self._name, self._steps.timeout_s)
            ),
            Status.OUT_OF_STEP: RankError(
                "ranks planned different batches: another placement, another slot, or the same "
                "ones in another order"
            ),
            Status.REFUSED: RankError("a rank refused an earlier batch's topk_idx; see its error"),
        }
        if Status.TIMED_OUT in seen:
            look(self)  # so that it is logged
            self._steps.missing[:] = 0
        errors = [error for index, error in faults.items() if index in seen]
        for error in errors[1:]:
            log.error("%s", error)
        if errors:
            raise errors[0]

    def refuse(self, exchange: Exchange) -> None:
        """Sends word, and waits for no one: the rank at fault may be gone."""
        nothing = torch.empty(0, 1, dtype=torch.int64, device=self._device)
        try:
            self._steps.count(nothing, Status.REFUSED, exchanged=True, waits=False)
            if exchange.windows is None:
                exchange.gather(self._steps.row)
        finally:
            self._steps.row.zero_()

    def plan_exchanged(self, topk_idx: torch.Tensor, exchange: Exchange, status: Status) -> Plan:
        try:
            picks = self._steps.count(topk_idx.to(self._device), status, exchanged=True)
            rows = picks.rows
            if exchange.windows is None:
                rows = exchange.gather(self._steps.row)
            assert rows is not None, "windows leave them"
            return self._plan(topk_idx, picks, rows, Status.OPTIMAL, exchanged=True)
        except BaseException:
            self._steps.row.zero_()  # or what was counted would be added to the next batch
            raise

    def plan_given(self, topk_idx: torch.Tensor, counts: torch.Tensor, status: Status) -> Plan:
        picks = self._steps.count(topk_idx.to(self._device), 0, exchanged=False)
        if counts.dtype == torch.int64:  # what int32 cannot hold must not wrap around
            counts = torch.where((counts < 0) | (counts > MAX_TOTAL), -1, counts)
        counts = counts.to(self._device, torch.int32).contiguous()
        return self._plan(topk_idx, picks, counts, status, exchanged=False)

    def _plan(
        self,
        topk_idx: torch.Tensor,
        picks: cuda.Picks,
        rows: torch.Tensor,
        status: Status,
        *,
        exchanged: bool,
    ) -> Plan:
        solved = self._steps.solve(picks, rows, status, exchanged=exchanged)
        physical, ended = self._steps.route(picks, solved, exchanged=exchanged)
        # A captured plan's numbers are those of the last replay, on what was in force then.
        made_on = None if torch.cuda.is_current_stream_capturing() else self._placement
        plan = Plan(
            topk_idx=physical,
            counts=solved.counts,
            quota=solved.quota,
            rank_load=solved.rank_load,
            status=ended,
            _split=functools.partial(self._split, made_on),
        )
        return plan if topk_idx.device == self._device else plan.to(topk_idx.device)

    def _split(
        self, made_on: Placement | None, counts: torch.Tensor, quota: torch.Tensor
    ) -> torch.Tensor:
        if made_on is not None and made_on is not self._placement:  # before a refresh
            return _split_on_cpu(made_on, counts, quota)
        shares = self._steps.split(counts.to(self._device), quota.to(self._device))
        return shares.to(counts.device)


class _Homes:
    """Home slots of tensors on a GPU, by torch's own operations: nothing is compiled for them."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._placement, self.device = placement, device
        self._wrong = torch.zeros((), dtype=torch.bool, device=device)
        self._told = torch.zeros((), dtype=torch.bool).pin_memory()

    def raise_told(self) -> None:
        if self._told:
            self._wrong.zero_()
            self._told.zero_()
            raise _out_of_range(self._placement)

    def __call__(self, topk_idx: torch.Tensor) -> torch.Tensor:
        known = (topk_idx >= -1) & (topk_idx < self._placement.num_experts)
        self._wrong.logical_or_(~known.all())
        self._told.copy_(self._wrong, non_blocking=True)
        return cpu.rewrite_home(torch.where(known, topk_idx, -1), self._placement)


def _out_of_range(placement: Placement) -> ValueError:
    return ValueError(
        "an earlier batch's topk_idx had an entry that is neither -1 nor an expert in "
        f"[0, {placement.num_experts}); LPLB_EP_CHECK=1 names it at once"
    )


def _log_once(placement: Placement, status: Status) -> None:
    log.warning(
        "a batch goes to the home slots (placement %s): %s",
        placement.fingerprint()[:8],
        _REASONS[status],
    )


def _own_rank(placement: Placement, group: dist.ProcessGroup | None, rank: int | None) -> int:
    num_ranks = placement.num_ranks
    if group is not None and group.size() != num_ranks:
        raise ValueError(f"group has {group.size()} ranks, and the placement is for {num_ranks}")
    if group is not None and rank not in (None, group.rank()):
        raise ValueError(f"rank is {rank}, and in the group this is rank {group.rank()}")
    if rank is None:
        if group is None and num_ranks > 1:
            raise ValueError("rank must be given where there is no group")
        rank = 0 if group is None else group.rank()
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be in [0, {num_ranks}); got {rank}")
    return rank


def _check_counts(counts: torch.Tensor, placement: Placement) -> None:
    shape = (placement.num_ranks, placement.num_experts)
    if not isinstance(counts, torch.Tensor):
        raise TypeError(f"counts must be a tensor; got a {type(counts).__name__}")
    if tuple(counts.shape) != shape or counts.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"counts must be {list(shape)} of int32 or int64; "
            f"got {list(counts.shape)} of {counts.dtype}"
        )
