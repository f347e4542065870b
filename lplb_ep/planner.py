"""One batch from `topk_idx` to a `Plan`: count, exchange, solve, split, rewrite."""

from __future__ import annotations

import collections
import enum
import logging
import math
from dataclasses import dataclass
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from . import __version__, cpu
from .exchange import Exchange, LocalExchange, TorchExchange, agree, choose_counts
from .placement import Placement, check_placement
from .settings import ContractError, RankError
from .solver import MAX_TOTAL, choose_solver, rank_load, solve

log = logging.getLogger(__name__)


class Status(enum.IntEnum):
    """How a plan came about."""

    OPTIMAL = 0
    """No plan on this placement has a smaller maximum rank load."""
    STALE = 1
    """Replica weights are out of date on some rank: every token goes home."""
    BAD_COUNTS = 2
    """The exchanged counts cannot be: every token goes home."""


_REASONS = {
    Status.STALE: "STALE, the replicas' weights are not known to equal their homes' on some rank. "
    "Replicas.copy_weights() makes them so; LPLB_EP_REPLICAS=valid says that the program does",
    Status.BAD_COUNTS: "BAD_COUNTS, the ranks' counts are negative or total more than 2**31 - 1",
}


@dataclass(frozen=True)
class Plan:
    """The routing of one batch on one rank; all but `topk_idx` is the same on every rank."""

    topk_idx: torch.Tensor
    """[T, K] of the input's dtype and device: slots in [0, P), -1 where the input has -1."""
    counts: torch.Tensor
    """[R, E] int32: tokens on each source rank that picked each expert."""
    quota: torch.Tensor
    """[E, C] int32: tokens that each copy computes."""
    split: torch.Tensor
    """[R, E, C] int32: how many of them come from each source rank."""
    rank_load: torch.Tensor
    """[R] int32: tokens that each rank computes."""
    status: torch.Tensor
    """[] int32, a `Status`."""


# An exchanged row begins with how its rank fares and with what it plans: its placement's tag, the
# channel's slot, which of the group's planners this is, and the number of the batch. The counts
# follow.
_FINE, _STALE, _REFUSED = 0, 1, 2
_NUM_HEAD = 5
# Rows are padded to a multiple, so that ranks that plan with placements of different E still meet.
_ROW_MULTIPLE = 512

# How many planners were made for a group, so that two on one placement are told apart.
_num_made: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


class Planner:
    """Plans batches on one placement; a channel of its own between the ranks.

    Every rank makes its planners in the same order and calls them for every batch, with no tokens
    too: making one and each call are collective where there is a group. One thread and one stream
    at a time: micro-batches in flight together need a planner each.

    Args:
        placement: the copies.
        group: the expert-parallel group, of `placement.num_ranks` ranks in rank order.
        rank: this rank, where there is no group.
        counts: "auto", "torch", or "given" (each call brings the counts of all ranks).
        solver: "auto" or "cpu".
        slot: which of several planners on one placement and group this is.
        compare: whether the ranks compare placement and settings now, which makes this collective.
            Placements are compared with every exchange too, by a tag of 28 bits.

    Raises:
        TypeError: `placement` is not one.
        ValueError: arguments that do not fit together; the message names them.
        RankError: ranks differ in placement, settings or version, or one refused its arguments;
            names what and who.
    """

    def __init__(
        self,
        placement: Placement,
        group: dist.ProcessGroup | None = None,
        rank: int | None = None,
        counts: str = "auto",
        solver: str = "auto",
        *,
        slot: int = 0,
        compare: bool = True,
    ) -> None:
        facts: dict[str, object] = {}
        refusal = None
        try:
            check_placement(placement)
            self.rank = _own_rank(placement, group, rank)
            self.solver, _ = choose_solver(solver)
            self.counts, _ = choose_counts(counts, group is not None, placement.num_ranks)
            facts = {
                "placement": placement.fingerprint(),
                "slot": slot,
                "solver": self.solver,
                "counts": self.counts,
                "lplb_ep version": __version__,
            }
        except (TypeError, ValueError) as error:
            refusal = error
        if compare:
            agree(group, "Planner", facts, refusal)
        elif refusal is not None:
            raise refusal
        self.placement = placement
        self.exchange: Exchange | None = None
        if self.counts == "local":
            self.exchange = LocalExchange()
        elif self.counts == "torch":
            assert group is not None, "choose_counts takes torch only with a group"
            self.exchange = TorchExchange(group)
        self.num_batches: collections.Counter[Status] = collections.Counter()
        """Batches planned so far, by status."""
        number = 0
        if group is not None and compare:
            number = _num_made[group] = _num_made.get(group, 0) + 1
        self._head = [int(placement.fingerprint()[:7], 16), slot, number]
        self._num_exchanges = 0

    def __call__(
        self, topk_idx: torch.Tensor, counts: torch.Tensor | None = None, *, stale: bool = False
    ) -> Plan:
        """Plans one batch. Collective, unless `counts` are given.

        Args:
            topk_idx: [T, K] int32 or int64, logical experts in [0, E), -1 = no pick; any T from 0.
            counts: [R, E] integers, with counts="given" only; row `rank` must count `topk_idx`.
            stale: this rank's replica weights are out of date; one such rank sends all ranks'
                tokens home.

        Raises:
            TypeError: `topk_idx` or `counts` is no tensor.
            ValueError: `topk_idx` or `counts` of a wrong shape, dtype or range.
            RankError: another rank refused its input, or plans with another placement (every rank
                raises then, so none hangs).
            ContractError: a CUDA graph is being captured, which cannot hold work of the CPU.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ContractError("plans are made on the CPU, which a CUDA graph cannot capture")
        if (counts is None) == (self.exchange is None):
            raise ValueError(
                f"this planner's counts are {self.counts!r}: "
                + ("pass counts=" if counts is None else "counts= must not be passed")
            )
        if counts is not None:
            gathered = self._given(topk_idx, counts)
        else:
            gathered, stale = self._gather(topk_idx, stale)

        load = gathered.long().sum(0)
        if bool((gathered < 0).any()) or int(load.sum()) > MAX_TOTAL:
            gathered, status = torch.zeros_like(gathered), Status.BAD_COUNTS
            load = torch.zeros_like(load)
        else:
            status = Status.STALE if stale else Status.OPTIMAL
        if status is Status.OPTIMAL:
            quota = cpu.solve(load, self.placement).quota
            shares = cpu.split(gathered, quota, self.placement)
            physical = cpu.rewrite(topk_idx.cpu(), shares[self.rank], self.placement)
        else:
            shape = self.placement.logical_to_physical.shape
            quota = torch.zeros(shape, dtype=torch.int32)
            quota[:, 0] = load
            shares = torch.zeros(self.placement.num_ranks, *shape, dtype=torch.int32)
            shares[:, :, 0] = gathered
            physical = cpu.rewrite_home(topk_idx, self.placement)
        if status is not Status.OPTIMAL and self.num_batches[status] == 0:
            log.warning(
                "a batch goes to the home slots (placement %s): %s",
                self.placement.fingerprint()[:8],
                _REASONS[status],
            )
        self.num_batches[status] += 1
        device = topk_idx.device
        return Plan(
            topk_idx=physical.to(device),
            counts=gathered.to(device),
            quota=quota.to(device),
            split=shares.to(device),
            rank_load=rank_load(quota, self.placement).int().to(device),
            status=torch.tensor(int(status), dtype=torch.int32, device=device),
        )

    def home(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """Every token at its expert's home: nothing is exchanged or solved.

        Args:
            topk_idx: [T, K] int32 or int64, logical experts in [0, E), -1 = no pick.

        Returns:
            [T, K] of the same dtype and device: slots in [0, P), -1 where the input has -1.

        Raises:
            ValueError: `topk_idx` of a wrong shape, dtype or range.
        """
        check_topk_idx(topk_idx, self.placement.num_experts)
        return cpu.rewrite_home(topk_idx, self.placement)

    def _given(self, topk_idx: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        shape = (self.placement.num_ranks, self.placement.num_experts)
        if not isinstance(counts, torch.Tensor):
            raise TypeError(f"counts must be a tensor; got a {type(counts).__name__}")
        if tuple(counts.shape) != shape or counts.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"counts must be {list(shape)} of int32 or int64; "
                f"got {list(counts.shape)} of {counts.dtype}"
            )
        check_topk_idx(topk_idx, self.placement.num_experts)
        gathered = counts.cpu().long()
        wrong = torch.nonzero((gathered < 0) | (gathered > MAX_TOTAL))
        if len(wrong):
            r, e = wrong[0].tolist()
            raise ValueError(
                f"counts[{r}, {e}] must be in [0, {MAX_TOTAL}]; got {int(gathered[r, e])}"
            )
        own = cpu.count(topk_idx.cpu(), self.placement.num_experts)
        wrong = torch.nonzero(gathered[self.rank] != own)
        if len(wrong):
            e = int(wrong[0])
            raise ValueError(
                f"counts[{self.rank}, {e}] is {int(gathered[self.rank, e])}, and topk_idx picks "
                f"expert {e} {int(own[e])} times"
            )
        return gathered.int()

    def refuse(self, error: Exception) -> NoReturn:
        """Raises `error` after sending word to the other ranks, which wait for this one's counts
        and raise too. Collective, in the place of a call."""
        self._exchange(_REFUSED, torch.zeros(self.placement.num_experts, dtype=torch.int32))
        raise error

    def _exchange(self, state: int, counts: torch.Tensor) -> torch.Tensor:
        assert self.exchange is not None, "only a planner with an exchange gathers"
        size = _NUM_HEAD + self.placement.num_experts
        row = torch.zeros(-(-size // _ROW_MULTIPLE) * _ROW_MULTIPLE, dtype=torch.int32)
        self._num_exchanges = (self._num_exchanges + 1) % 2**31
        row[:_NUM_HEAD] = torch.tensor([state, *self._head, self._num_exchanges])
        row[_NUM_HEAD:size] = counts
        rows = self.exchange.gather(row)
        others = (rows[:, 1:_NUM_HEAD] != row[1:_NUM_HEAD]).any(1)
        if others.any() and state != _REFUSED:
            raise RankError(
                f"ranks {torch.nonzero(others).flatten().tolist()} plan another batch than this "
                "rank: another placement, another slot, or the same ones in another order"
            )
        return rows[:, :size]

    def _gather(self, topk_idx: torch.Tensor, stale: bool) -> tuple[torch.Tensor, bool]:
        try:
            check_topk_idx(topk_idx, self.placement.num_experts)
        except (TypeError, ValueError) as error:
            self.refuse(error)
        counts = cpu.count(topk_idx.cpu(), self.placement.num_experts)
        rows = self._exchange(_STALE if stale else _FINE, counts)
        refused_by = torch.nonzero(rows[:, 0] == _REFUSED).flatten().tolist()
        if refused_by:
            raise RankError(f"ranks {refused_by} refused their topk_idx; see their errors")
        return rows[:, _NUM_HEAD:].contiguous(), bool((rows[:, 0] == _STALE).any())


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


def check_topk_idx(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Raises TypeError unless `topk_idx` is a tensor, and ValueError unless it is [T, K] int32 or
    int64 within [-1, num_experts)."""
    if not isinstance(topk_idx, torch.Tensor):
        raise TypeError(f"topk_idx must be a tensor [T, K]; got a {type(topk_idx).__name__}")
    if topk_idx.ndim != 2 or topk_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"topk_idx must be [T, K] of int32 or int64; "
            f"got {list(topk_idx.shape)} of {topk_idx.dtype}"
        )
    wrong = torch.nonzero((topk_idx < -1) | (topk_idx >= num_experts))
    if len(wrong):
        t, k = wrong[0].tolist()
        raise ValueError(
            f"topk_idx[{t}, {k}] is {int(topk_idx[t, k])}; expected -1 or an expert in "
            f"[0, {num_experts})"
        )


def check_plan(plan: Plan, topk_idx: torch.Tensor, placement: Placement, rank: int) -> None:
    """Holds a plan against everything that a plan must be; for tests and `LPLB_EP_CHECK=1`.

    Args:
        plan: the plan that rank `rank` got.
        topk_idx: [T, K], the logical experts that it was made from.
        placement: the copies.
        rank: this rank.

    Raises:
        AssertionError: names the broken invariant.
    """

    def hold(condition: object, message: str) -> None:
        if not bool(condition):
            raise AssertionError(f"plan of rank {rank}: {message}")

    R, E, C = placement.num_ranks, placement.num_experts, placement.max_replicas
    physical, logical = plan.topk_idx.cpu(), topk_idx.cpu()
    counts, quota, shares = plan.counts.cpu(), plan.quota.cpu(), plan.split.cpu()
    hold(plan.topk_idx.dtype == topk_idx.dtype, "topk_idx changed its dtype")
    hold(plan.topk_idx.device == topk_idx.device, "topk_idx changed its device")
    hold(physical.shape == logical.shape, "topk_idx changed its shape")
    if int(plan.status) == Status.BAD_COUNTS:
        # Counts that cannot be say nothing: there are no quotas, and every pick is at its home.
        for name in ("counts", "quota", "split", "rank_load"):
            hold((getattr(plan, name) == 0).all(), f"{name} of counts that cannot be")
        hold((physical == cpu.rewrite_home(logical, placement)).all(), "a pick is not at its home")
        return
    hold(counts.shape == (R, E), f"counts are {list(counts.shape)}")
    hold(quota.shape == (E, C), f"quota is {list(quota.shape)}")
    hold(shares.shape == (R, E, C), f"split is {list(shares.shape)}")

    hold(((physical == -1) == (logical == -1)).all(), "-1 was not kept")
    held = torch.tensor(placement.physical_to_logical)[physical.long().clamp(min=0)]
    hold((held == logical)[logical >= 0].all(), "a pick went to a slot of another expert")
    hold((counts[rank] == cpu.count(logical, E)).all(), "counts do not count this rank's picks")

    absent = torch.tensor(placement.copy_rank < 0)
    hold((shares >= 0).all() and (quota >= 0).all(), "a negative quota")
    hold((quota[absent] == 0).all(), "a quota where no copy can take tokens")
    hold((quota.sum(1) == counts.sum(0)).all(), "quotas do not sum to the load")
    hold((shares.sum(0) == quota).all(), "the split does not sum to the quotas")
    hold((shares.sum(2) == counts).all(), "the split does not sum to the counts")
    slots = torch.tensor(placement.logical_to_physical).long()
    took = cpu.count(physical, placement.num_physical_experts)
    hold((took[slots] * ~absent == shares[rank]).all(), "slots got other picks than their share")
    e, c = torch.nonzero(~absent, as_tuple=True)
    own = torch.tensor(placement.copy_rank).long()[e, c]
    stay = torch.minimum(counts[own, e], quota[e, c])
    hold((shares[own, e, c] >= stay).all(), "a copy passed over tokens of its own rank")

    load = rank_load(quota, placement)
    hold((plan.rank_load.cpu() == load).all(), "rank_load is not the load of the quotas")
    if int(plan.status) == Status.OPTIMAL:
        best = math.ceil(solve(counts.sum(0), placement, "cpu").lower_bound)
        hold(load.max() == best, f"the largest rank load is {int(load.max())}, not {best}")
    else:
        hold((quota[:, 1:] == 0).all(), "a plan that is not optimal must send every token home")
