"""One batch from `topk_idx` to a `Plan`: count, exchange, solve, split, rewrite."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .. import __version__
from ..comm.collectives import everyone, together
from ..comm.connect import connect
from ..comm.exchange import Exchange, Limit
from ..cost import CostModel
from ..errors import ContractError
from ..layer import Layer, check_slot, layer_of
from ..placement.table import Placement
from ..problem import Integers, Problem
from . import reference
from .backend import Backend, Batch, row_size
from .check import check_plan
from .device import DeviceBackend
from .home import HomeRoutes
from .host import HostBackend
from .inputs import (
    as_counts,
    as_picks,
    check_limits,
    check_topk_idx,
    graph_task,
    logical_picks,
    own_rank,
)
from .plan import Plan
from .reuse import check_every, check_reusable
from .solvers import choose_solver, in_steps, log_in_steps, log_on_cpu, solver_fact
from .statistics import Statistics, batches_by_status, read_totals
from .stay import num_words
from .structs import Status

# How many planners that exchange counts were made for a group: each has a number of its own there.
_num_made: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


class Planner:
    """Plans batches of one layer, by an exchange of its own between the ranks.

    Every rank makes its planners in the same order and calls them for every batch, even without
    tokens. Where there is a group, making one and each call are collective. Calls come from one
    thread at a time, and batches one after the other: micro-batches in flight together need a
    planner each.

    With the solver `cpu` a call waits for its input and is done on return. With the others all
    steps run on the GPU, on the current stream. The CPU then waits only if the exchange waits on
    the host. A CUDA graph may capture such a call. A call on another stream runs after the call
    before; the caller puts replays of graphs in order. A planner must outlive its graphs and its
    work on the GPU.

    Errors that only the GPU sees, such as an index out of range, raise at a later call, when the
    GPU has reached that batch. Replays of a graph make no call: `raise_errors` waits and raises.

    Args:
        placement: the layer, or the placement object that stands for one.
        group: the expert-parallel group, of `placement.num_ranks` ranks in rank order.
        rank: this rank, where there is no group.
        counts: how counts travel, one of `comm.connect.COUNTS`. With "given" each call brings the
            counts of all ranks.
        solver: one of `settings.SOLVERS`. For the GPU, missing kernels are compiled now.
        slot: the number of this planner among several of one layer and group.
        compare: whether the ranks compare placement and settings now, which makes this collective.
            Placements are compared with every exchange too, by a tag of 28 bits.
        check: verify every batch and its plan at once, which waits for the GPU.
        timeout_s: seconds for which a rank waits for another rank's counts.
        abort_on_timeout: whether the process ends then, instead of raising at the next call.
        guest_tolerance, guest_min_tokens, objective, cost, min_gain: as in `Problem`, where the
            layer's problem has none.
        one_launch: the most picks of a batch that a GPU plans in one launch and not in three, in
            [0, 2048]. The results are the same.
        every: one in so many batches is exchanged and solved. The others use the last quotas, in
            proportion (`planning.reuse`): for inference, with static copies.
        sample_every: the loads of one in so many batches are kept for a recording; 0: none.
        mark_every: the statistics of one in so many batches are kept for the log; 0: none.

    Raises:
        TypeError: `placement` is neither a layer nor a placement.
        ValueError: arguments that do not fit together; the message names them.
        MissingPackageError: the solver needs a GPU or a package that is not there.
        CompileError: a kernel does not compile.
        RankError: ranks differ in placement, settings or version, or one refused its arguments;
            names the difference and the ranks.
    """

    placement: Placement
    """The placement that it plans on."""
    exchange: Exchange | None
    """How counts travel; None where each call brings them."""
    counts: str
    """The kind of the exchange, or "given"."""
    solver: str
    """The solver that makes the quotas."""
    slot: int
    """Which of several planners of one layer and group it is."""
    generation: int
    """How many were made before for the layer's name, this slot, and with this `sample_every`."""

    def __init__(
        self,
        placement: Layer | Placement,
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
        guest_tolerance: float | None = None,
        guest_min_tokens: int | None = None,
        objective: str | None = None,
        cost: CostModel | None = None,
        min_gain: int | None = None,
        one_launch: int = 0,
        every: int = 1,
        sample_every: int = 0,
        mark_every: int = 0,
    ) -> None:
        ranks = group if compare else None
        with together(ranks, "Planner") as facts:
            self.layer = layer_of(placement)
            self.placement = placement = self.layer.placement
            self._problem = self.layer.problem.with_defaults(
                guest_tolerance=guest_tolerance,
                guest_min_tokens=guest_min_tokens,
                objective=objective,
                cost=cost,
                min_gain=min_gain,
            ).checked(placement)
            self.rank = own_rank(placement, group, rank)
            check_slot(slot)
            self.slot = slot
            check_limits(timeout_s, one_launch, sample_every, mark_every)
            check_every(every, placement, self._problem, counts, one_launch)
            self._every = every
            asked = solver, placement, self.layer.is_refreshable, self._problem.objective_name
            self.solver, why = choose_solver(*asked)
            if solver == "auto" and self.solver == "cpu" and self.rank == 0:
                log_on_cpu(why)
            facts["placement"] = placement.fingerprint()
            facts["problem"] = self._problem.fingerprint()
            facts["slot"], facts["every"], facts["counts"] = slot, every, counts
            facts["solver"] = solver_fact(*asked)
            facts["lplb_ep version"] = __version__
        self._is_on_gpu = self.solver != "cpu"
        self.exchange = connect(
            counts,
            group,
            placement.num_ranks,
            num_words(placement.num_experts, placement.num_ranks, self._problem.least_gain),
            Limit(self.layer.label, timeout_s, abort_on_timeout),
            on_gpu=self._is_on_gpu,
        )
        self.counts = "given" if self.exchange is None else self.exchange.kind
        self._check = check
        self._homes: dict[torch.device, HomeRoutes] = {}
        number = 0 if self.exchange is None else _next_number(group, compare)
        self._head = [tag_of(placement, self._problem, every), slot, number]
        self._backend: Backend
        with together(ranks, "Planner"):
            kept = {"sample_every": sample_every, "mark_every": mark_every}
            self._backend = self._make_backend(timeout_s, abort_on_timeout, one_launch, kept)
        if group is not None and number:
            _num_made[group] = number
        self.generation = self.layer.add_planner(self, (slot, sample_every))

    def _make_backend(
        self, timeout_s: float, abort_on_timeout: bool, one_launch: int, kept: Mapping[str, int]
    ) -> Backend:
        p, problem, head, size = self.placement, self._problem, self._head, row_size(self.placement)
        every, layer = self._every, self.layer.label
        if self.solver == "cpu":
            return HostBackend(p, problem, self.rank, head, size, every=every, layer=layer, **kept)
        made = DeviceBackend(
            p,
            problem,
            self.rank,
            head,
            size,
            solver=self.solver,
            refreshable=self.layer.is_refreshable,
            moves_homes=self.layer.moves_homes,
            windows=None if self.exchange is None else self.exchange.windows,
            timeout_s=timeout_s,
            abort_on_timeout=abort_on_timeout,
            one_launch=one_launch,
            every=every,
            layer=layer,
            **kept,
        )
        why = made.tables.in_steps or in_steps(self.counts, made.has_relay)
        if one_launch and why and self.rank == 0:
            log_in_steps(why)
        return made

    @property
    def num_batches(self) -> collections.Counter[Status]:
        """Batches planned so far, by status; waits for the GPU."""
        self._backend.synchronize()
        return batches_by_status(*read_totals([self.statistics]))

    @property
    def statistics(self) -> Statistics:
        """Statistics of its batches."""
        return self._backend.statistics

    @property
    def is_outdated(self) -> bool:
        """Whether its layer has another placement in force, for which it was not prepared."""
        return self.placement is not self.layer.placement

    def raise_errors(self, *, wait: bool = True) -> None:
        """Raises errors that the GPU found in earlier batches. Local: nothing is exchanged.

        Call it for batches that a CUDA graph replays, and before going on after an error, so that
        every rank knows of the same batches. Of several faults the first is raised and the others
        are logged.

        Args:
            wait: whether to wait for the GPU first; if not, only errors found so far are raised.

        Raises:
            ValueError: a batch's `topk_idx` out of range, or given counts that were not its own.
            RankError: another rank refused its input, or ranks planned different batches.
        """
        if wait:
            self._backend.synchronize()
        self._backend.raise_errors()
        for homes in self._homes.values():
            if wait:
                torch.cuda.synchronize(homes.device)
            homes.raise_errors()

    def __call__(
        self,
        topk_idx: Integers,
        counts: Integers | None = None,
        *,
        stale: bool = False,
        indices: str = "logical",
        distinct: bool = False,
    ) -> Plan:
        """Plans one batch. Collective, unless `counts` are given.

        Args:
            topk_idx: [T, K] integers, logical experts in [0, E), -1 = no pick; any T from 0. A
                tensor, an array or lists: all but tensors of int32 become int64.
            counts: [R, E] integers, likewise, with counts="given" only; row `rank` must count
                `topk_idx`.
            stale: this rank's replica weights are out of date; one such rank sends all ranks'
                tokens home. (A captured graph stays what it was captured with.)
            indices: "physical" where `topk_idx` has slots, numbered without guest slots. Where a
                least gain is asked for, it must be the same on all ranks.
            distinct: whether a token that picks one expert twice is refused.

        Raises:
            TypeError: `topk_idx` or `counts` is no tensor, array or list.
            ValueError: `topk_idx` or `counts` of a wrong shape, dtype or range, or a repeated pick;
                on the GPU, an earlier call's entries. The other ranks raise too.
            RankError: another rank refused its input, or plans with another placement (every rank
                raises then, so none hangs); on the GPU, in an earlier call.
            ContractError: a CUDA graph is being captured, and this call does not go into one. Or
                another placement is in force in the layer, and this planner was made before.
        """
        return self._route(topk_idx, counts, stale, indices, distinct, True)

    def route(
        self,
        topk_idx: torch.Tensor,
        *,
        stale: bool = False,
        indices: str = "logical",
        distinct: bool = False,
    ) -> torch.Tensor:
        """As a call, for callers that need only the slots [T, K] of the plan.

        Args:
            topk_idx: of a shape and dtype that `check_topk_idx` accepts.
        """
        return self._route(topk_idx, None, stale, indices, distinct, False).topk_idx

    def _route(
        self,
        topk_idx: Any,
        counts: Any,
        stale: bool,
        indices: str,
        distinct: bool,
        wants_plan: bool,
    ) -> Plan:
        backend, exchange = self._backend, self.exchange
        if self.placement is not self.layer.placement:
            raise ContractError(
                "this planner was made before its layer's placement was to be refreshed: make the "
                "Refresher first, then the planner"
            )
        if counts is None and exchange is None:
            raise ValueError("this planner's counts are 'given': pass counts= to its call")
        has_cuda = self._is_on_gpu or torch.cuda.is_initialized()
        captured = has_cuda and torch.cuda.is_current_stream_capturing()
        if captured:
            self._check_capturable(topk_idx=topk_idx, counts=counts)
        if exchange is not None and exchange.waits_on_host:
            # The CPU waits for the GPU in any case. So every rank knows of a batch's faults before
            # it comes to the next, and none waits for another.
            backend.synchronize()
            backend.raise_errors()
        try:
            backend.raise_errors()
            status = Status.STALE if stale else Status.OPTIMAL
            keeps = indices == "physical" and exchange is not None and self._problem.least_gain > 0
            if self._every > 1:
                check_reusable(stale=stale, keeps=keeps)
            if wants_plan:
                topk_idx = as_picks(topk_idx)
            if counts is not None:
                counts = self._checked_counts(counts)
            picks = topk_idx
            if self._check or not backend.checks_late:
                picks = logical_picks(topk_idx, self.placement, indices, distinct)
        except Exception as error:  # whatever it is, the others must not wait for this rank
            if exchange is None:
                raise
            self.refuse(error)
        wants_plan = wants_plan or self._check or bool(self.layer.observers)
        again = graph_task() >= 0
        if backend.checks_late:
            batch = Batch(topk_idx, status, indices, distinct, captured, wants_plan, again)
        else:
            batch = Batch(picks, status, keeps=topk_idx if keeps else None, is_again=again)
        if exchange is None:
            assert counts is not None, "they are given"
            plan = backend.route_given(batch, counts)
        else:
            plan = backend.route(batch, exchange)
        if self._check:
            backend.synchronize()
            backend.raise_errors()
            given = topk_idx if keeps else None
            check_plan(plan, picks, self.placement, self.rank, self._problem, given)
        for observe in self.layer.observers:
            observe(plan.counts)
        return plan

    def _checked_counts(self, counts: Integers) -> torch.Tensor:
        if self.exchange is not None:
            raise ValueError(
                f"this planner's counts are {self.counts!r}: counts= must not be passed"
            )
        return as_counts(counts, self.placement)

    def prepare(self, placement: Placement) -> Callable[[], None]:
        """Prepares for other copies in its layer (`Placement.with_copies`). Local.

        Returns:
            A function that puts the copies in force, to be called on every rank between the same
            batches. It never fails. On the GPU it writes tables in place. So CUDA graphs with calls
            of this planner stay valid, and plan with the new copies.

        Raises:
            ValueError: the placement is not of this layer, or has another `max_replicas`. Or on the
                GPU its tables do not fit the memory of the first ones; the message names the size.
        """
        if not placement.may_replace(self.placement, moves_homes=self.layer.moves_homes):
            raise ValueError(f"{placement} is not one of this planner's layer: use with_copies")
        columns = self.placement.max_replicas
        if placement.max_replicas != columns:
            raise ValueError(
                f"max_replicas must stay {columns}, the columns of this planner's quotas; "
                f"got {placement.max_replicas}"
            )
        head = [tag_of(placement, self._problem, self._every), *self._head[1:]]
        switches = [self._backend.prepare(placement, head)]
        switches += [homes.prepare(placement) for homes in self._homes.values()]

        def commit() -> None:
            for switch in switches:
                switch()
            self.placement = placement

        return commit

    def home(
        self, topk_idx: torch.Tensor, *, indices: str = "logical", distinct: bool = False
    ) -> torch.Tensor:
        """Every token at its expert's home: nothing is exchanged or solved.

        For CUDA tensors the CPU does not wait, and a graph may capture a call that is not the
        first.

        Args:
            topk_idx: [T, K] int32 or int64, logical experts in [0, E), -1 = no pick.
            indices: "physical" where `topk_idx` has slots, numbered without guest slots.
            distinct: whether a token that picks one expert twice is refused. In CUDA tensors it is
                refused with `check` only, since at home nothing depends on it.

        Returns:
            [T, K] of the same dtype and device: slots in [0, P), -1 where the input has -1.

        Raises:
            ValueError: `topk_idx` of a wrong shape, dtype or range; on the GPU, the range of an
                earlier call's.
        """
        check_topk_idx(topk_idx)
        if not topk_idx.is_cuda or self._check:
            picks = logical_picks(topk_idx, self.placement, indices, distinct)
            return reference.rewrite_home(picks, self.placement)
        device = topk_idx.device
        if device not in self._homes:
            self._homes[device] = HomeRoutes(self.placement, device)
        self._homes[device].raise_errors()
        return self._homes[device](topk_idx, indices)

    def mask(self, given: torch.Tensor, planned: torch.Tensor) -> torch.Tensor:
        """Planned slots, without those of picks that a caller has masked since.

        Args:
            given: [T, K] int32 or int64, negative = masked.
            planned: [T, K] of the same dtype and device: slots, -1 = no pick.

        Returns:
            [T, K] of the same dtype and device: `planned`, but -1 where `given` is negative.
        """
        return self._backend.mask(given, planned)

    def refuse(self, error: Exception) -> NoReturn:
        """Sends a refusal to the other ranks, which wait for this one's counts; raises `error`.

        They raise, too. Collective, instead of a call.
        """
        assert self.exchange is not None, "only a planner with an exchange has ranks that wait"
        self._backend.refuse(self.exchange)
        raise error

    def _check_capturable(self, **tensors: Any) -> None:
        if not self._backend.capturable:
            raise ContractError("plans are made on the CPU, which a CUDA graph cannot capture")
        for name, tensor in tensors.items():
            if not getattr(tensor, "is_cuda", tensor is None):
                raise ContractError(
                    f"{name} lies on the CPU, and a CUDA graph cannot capture a call that fetches "
                    "it"
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


def tag_of(placement: Placement, problem: Problem | None = None, every: int = 1) -> int:
    """28 bits that ranks compare in every exchange: of the placement, and of settings of plans."""
    if (problem is None or problem.is_plain) and every == 1:
        return int(placement.fingerprint()[:7], 16)
    of_problem = "" if problem is None else problem.fingerprint()
    both = placement.fingerprint() + of_problem + ("" if every == 1 else str(every))
    return int(hashlib.sha256(both.encode()).hexdigest()[:7], 16)


def _next_number(group: dist.ProcessGroup | None, agree: bool) -> int:
    """That of a planner, from 1: the same on all ranks, and of no other planner of the group.

    Ranks make planners in the same order. Where one has made more than others, since these failed
    say, the next that is made together gives all the same number again.
    """
    if group is None:
        return 0
    number = _num_made.get(group, 0) + 1
    return max(everyone(group, number)) if agree else number
