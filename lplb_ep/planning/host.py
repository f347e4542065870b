"""Plans made on the CPU: the default without a GPU, and the definition of every plan."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from ..comm.exchange import Exchange, Limit
from ..comm.torch_exchange import TorchExchange
from ..errors import RankError
from ..logs import logger
from ..placement.table import Placement
from ..problem import MAX_TOTAL, Problem
from . import reference
from .backend import REASONS, Batch, row_size
from .guests_by_cost import plan_load, push_waits
from .plan import Plan, Results, number_of
from .reuse import reuse
from .solve import judge, rank_load
from .statistics import HostStatistics, batches_by_status
from .stay import count_by_rank, stays
from .structs import HEAD, Head, Status

log = logger(__name__)


class HostBackend:
    """A `Backend` on the CPU. A call waits for its input and is done on return.

    Args:
        placement: the copies.
        problem: what bounds a plan beside the counts, checked.
        rank: this rank.
        head: the integers that an exchanged row begins with, between its status and the number of
            the batch.
        row_size: integers of an exchanged row; those behind the counts stay 0.
        sample_every, mark_every: as `HostStatistics` has `every` and `mark_every`.
        every: batches from one that is exchanged and solved to the next.
        layer: names the layer in messages.
    """

    capturable = False
    checks_late = False

    def __init__(
        self,
        placement: Placement,
        problem: Problem,
        rank: int,
        head: list[int],
        row_size: int,
        *,
        sample_every: int = 0,
        mark_every: int = 0,
        every: int = 1,
        layer: str = "a layer",
    ) -> None:
        self._placement, self._problem, self._rank, self._head = placement, problem, rank, head
        self._layer = layer
        self._row_size, self._num_exchanges = row_size, 0
        self._every, self._until_due = every, 0
        self._exchanged: Results | None = None
        self.statistics = HostStatistics(sample_every, mark_every)

    def prepare(self, placement: Placement, head: list[int]) -> Callable[[], None]:
        """As `Backend.prepare`."""

        def commit() -> None:
            self._placement, self._head = placement, head
            self._until_due, self._exchanged = 0, None

        return commit

    def synchronize(self) -> None:
        """Nothing is pending."""

    def raise_errors(self) -> None:
        """Nothing is found late."""

    def mask(self, given: torch.Tensor, planned: torch.Tensor) -> torch.Tensor:
        """As `Backend.mask`."""
        return torch.where(given < 0, -1, planned)

    def refuse(self, exchange: Exchange) -> None:
        """As `Backend.refuse`."""
        if self._is_due():
            self._gather(exchange, torch.zeros(self._placement.num_experts).int(), Status.REFUSED)

    def route(self, batch: Batch, exchange: Exchange) -> Plan:
        """As `Backend.route`."""
        picks = batch.topk_idx.cpu()
        counts = reference.count(picks, self._placement.num_experts)
        if not self._is_due():
            return self._reuse(batch, picks, counts)
        self._exchanged = None  # unless it is solved, those behind it go home
        words = counts
        if batch.keeps is not None:
            words = torch.cat([counts, count_by_rank(batch.keeps.cpu(), self._placement)])
        rows = self._gather(exchange, words, batch.status)
        refused_by = torch.nonzero(rows[:, Head.STATUS] == Status.REFUSED).flatten().tolist()
        if refused_by:
            raise RankError(f"ranks {refused_by} refused their topk_idx; see their errors")
        status = Status(int(rows[:, Head.STATUS].max()))
        number = number_of(rows[self._rank, 1:HEAD].clone())
        counts, given = rows[:, HEAD:].split([len(counts), len(words) - len(counts)], 1)
        given_load = None if batch.keeps is None else given.long().sum(0)
        return self._route(batch, picks, counts.contiguous(), status, number, given_load)

    def route_given(self, batch: Batch, counts: torch.Tensor) -> Plan:
        """As `Backend.route_given`."""
        picks, given = batch.topk_idx.cpu(), counts.cpu().long()
        wrong = torch.nonzero((given < 0) | (given > MAX_TOTAL))
        if len(wrong):
            r, e = wrong[0].tolist()
            raise ValueError(
                f"counts[{r}, {e}] must be in [0, {MAX_TOTAL}]; got {int(given[r, e])}"
            )
        own = reference.count(picks, self._placement.num_experts)
        wrong = torch.nonzero(given[self._rank] != own)
        if len(wrong):
            e = int(wrong[0])
            raise ValueError(
                f"counts[{self._rank}, {e}] is {int(given[self._rank, e])}, and topk_idx picks "
                f"expert {e} {int(own[e])} times"
            )
        return self._route(batch, picks, given.int(), batch.status)

    def _is_due(self) -> bool:
        """Whether the batch that comes is exchanged: every so many are, whatever becomes of them.

        So ranks need not tell each other which.
        """
        is_due = self._until_due == 0
        self._until_due = (self._until_due or self._every) - 1
        return is_due

    def _reuse(self, batch: Batch, picks: torch.Tensor, own: torch.Tensor) -> Plan:
        """Splits own picks in proportion to the quotas of the last batch that was exchanged."""
        p, status = self._placement, Status.REUSED
        exchanged = self._exchanged or _no_results(p)
        results = exchanged._replace(status=torch.tensor(int(status), dtype=torch.int32))
        shares = reuse(own, results.quota, self._rank, p.num_ranks)
        physical = reference.rewrite(picks, shares, p).to(batch.topk_idx.device)
        about = results.guests.numpy(), p, self._rank
        how = {"by_tokens": False, "again": batch.is_again}
        self.statistics.add(status, own, results.rank_load, *about, **how)
        judged = functools.partial(judge, placement=p, problem=self._problem)
        kept, split = functools.partial(Results, *results), functools.partial(split_on_host, p)
        return Plan(physical, kept, split, judged, None, p)

    def _gather(self, exchange: Exchange, words: torch.Tensor, status: Status) -> torch.Tensor:
        """[R, HEAD + N] int32. `words`: [N] of this rank: counts, and what comes behind them."""
        size = HEAD + len(words)
        row = torch.zeros(self._row_size, dtype=torch.int32)
        self._num_exchanges = (self._num_exchanges + 1) % 2**31
        row[:HEAD] = torch.tensor([status, *self._head, self._num_exchanges])
        row[HEAD:size] = words
        rows = exchange.gather(row)
        others = (rows[:, 1:HEAD] != row[1:HEAD]).any(1)
        if others.any() and status != Status.REFUSED:
            is_absent = (rows[:, Head.PLANNER] == 0) & (rows[:, Head.STATUS] == Status.REFUSED)
            if is_absent.any():
                absent = torch.nonzero(is_absent).flatten().tolist()
                raise RankError(f"ranks {absent} could not make their planner; see their errors")
            raise RankError(
                f"ranks {torch.nonzero(others).flatten().tolist()} plan another batch than this "
                "rank: another placement, another slot, or the same ones in another order"
            )
        return rows[:, :size]

    def _route(
        self,
        batch: Batch,
        picks: torch.Tensor,
        counts: torch.Tensor,
        status: Status,
        number: torch.Tensor | None = None,
        given_load: torch.Tensor | None = None,
    ) -> Plan:
        load, base = counts.long().sum(0), self._problem.base_load
        total = int(load.sum()) + (0 if base is None else int(base.sum()))
        if bool((counts < 0).any()) or total > MAX_TOTAL:
            counts, load, status = counts * 0, load * 0, max(status, Status.BAD_COUNTS)
        elif not self._problem.is_feasible(load, self._placement):
            status = max(status, Status.INFEASIBLE)
        elif status is Status.OPTIMAL:
            by = None if given_load is None else given_load.numpy()
            if stays(load.numpy(), self._placement, self._problem, by):
                status = Status.STAYED
        p, filled, on_ranks = self._placement, self._placement, None
        guests = np.full((p.num_ranks, p.num_guests_per_rank), -1, np.int32)
        quota = torch.zeros(p.logical_to_physical.shape, dtype=torch.int32)
        if status is Status.OPTIMAL:
            guests, found = plan_load(load.numpy(), p, self._problem)
            if guests.size:
                filled = p.with_guests(guests)
            quota = torch.from_numpy(found.astype(np.int32))
            shares = reference.split(counts, quota, filled)
            physical = reference.rewrite(picks, shares[self._rank], filled)
        elif status is Status.STAYED and batch.keeps is not None:
            physical, on_ranks = batch.keeps.cpu().clone(), given_load
        else:
            quota[:, 0] = load
            physical = reference.rewrite_home(picks, self._placement)
            is_new = not batches_by_status(self.statistics.totals)[status]
            if status in REASONS and is_new and self._rank == 0:  # all ranks know of it
                log_home(self._layer, status)
        if on_ranks is None:
            on_ranks = rank_load(quota, filled)
        bounds = self._problem.bounds
        about = guests, self._placement, self._rank, bounds["base_load"], bounds["speed"]
        by_tokens = self._problem.objective_name == "tokens"
        how = {"by_tokens": by_tokens, "again": batch.is_again}
        self.statistics.add(status, load, on_ranks, *about, **how)
        ends = torch.tensor(int(status), dtype=torch.int32)
        kept = Results(counts, quota, on_ranks.int(), ends, torch.from_numpy(guests))
        self._exchanged, results = kept, functools.partial(Results, *kept)
        split = functools.partial(split_on_host, filled)
        number = number if guests.size else None
        waits = push_waits(guests, p, self._problem)
        judged = functools.partial(judge, placement=filled, problem=self._problem, waits=waits)
        return Plan(physical.to(batch.topk_idx.device), results, split, judged, number, filled)


def refuse_first(placement: Placement, group: dist.ProcessGroup, limit: Limit) -> None:
    """Sends a refusal to ranks that wait for a first batch, for a planner that could not be made.

    Collective, instead of that batch. The row is of planner 0, which is none.

    Args:
        placement: of the batch.
        group: the ranks, whose rows travel by `torch.distributed`.
        limit: how long ranks wait.

    Raises:
        RankError: a rank did not come in time.
    """
    row = torch.zeros(row_size(placement), dtype=torch.int32)
    row[Head.STATUS] = Status.REFUSED
    TorchExchange(group, limit).gather(row)


def split_on_host(placement: Placement, counts: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """`reference.split` for tensors on any device."""
    return reference.split(counts.cpu(), quota.cpu(), placement).to(counts.device)


def log_home(layer: str, status: Status) -> None:
    """Says why a batch of a layer goes to the home slots."""
    log.warning("a batch of %s goes to the home slots: %s", layer, REASONS[status])


def _no_results(placement: Placement) -> Results:
    """Those of a batch that went home. The ones behind it then go home, too."""
    zeros = functools.partial(torch.zeros, dtype=torch.int32)
    R, E = placement.num_ranks, placement.num_experts
    quota = zeros(placement.logical_to_physical.shape)
    return Results(zeros(R, E), quota, zeros(R), zeros(()), zeros(R, 0))
