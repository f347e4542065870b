"""The conditions that every plan meets: for tests, and for `LPLB_EP_CHECK=1`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..placement.table import Placement
from ..problem import Problem
from . import reference
from .guests_by_cost import guests_of, plan_load, push_waits
from .plan import Plan
from .reuse import reuse
from .solve import judge, least_value, rank_load
from .stay import count_by_rank, stays
from .structs import Status


def check_plan(
    plan: Plan,
    topk_idx: torch.Tensor,
    placement: Placement,
    rank: int,
    problem: Problem | None = None,
    given: torch.Tensor | None = None,
) -> None:
    """Checks all conditions that a plan must meet.

    Args:
        plan: the plan of rank `rank`.
        topk_idx: [T, K], the logical experts from which it was made.
        placement: the copies.
        rank: this rank.
        problem: bounds of the plan beside its counts; by default none.
        given: [T, K], the slots that an engine gave, where counts were exchanged; by default none.

    Raises:
        AssertionError: names the broken invariant.
    """

    def hold(condition: object, message: str) -> None:
        if not bool(condition):
            raise AssertionError(f"plan of rank {rank}: {message}")

    problem = Problem() if problem is None else problem
    status, guests = Status(int(plan.status)), plan.guests.cpu()
    if status is Status.REUSED:
        hold(not (fault := _fault_of_reused(plan, topk_idx, placement, rank)), fault)
        return
    hold(not (fault := _fault_of_guests(plan, status, placement, problem)), fault)
    placement = placement.with_guests(guests)
    R, E, C = placement.num_ranks, placement.num_experts, placement.max_replicas
    physical, logical = plan.topk_idx.cpu(), topk_idx.cpu()
    counts, quota, shares = plan.counts.cpu(), plan.quota.cpu(), plan.split.cpu()
    for what in ("dtype", "device", "shape"):
        same = getattr(plan.topk_idx, what) == getattr(topk_idx, what)
        hold(same, f"topk_idx changed its {what}")
    if status is Status.BAD_COUNTS:
        hold(not (fault := _fault_without_counts(plan, logical, placement)), fault)
        return
    of_shape = {"counts": (counts, (R, E)), "quota": (quota, (E, C)), "split": (shares, (R, E, C))}
    for name, (values, shape) in of_shape.items():
        hold(values.shape == shape, f"{name} is {list(values.shape)}")

    hold(((physical == -1) == (logical == -1)).all(), "-1 was not kept")
    held = torch.tensor(placement.physical_to_logical)[physical.long().clamp(min=0)]
    hold((held == logical)[logical >= 0].all(), "a pick went to a slot of another expert")
    hold(counts[rank].equal(reference.count(logical, E)), "counts are not this rank's picks'")

    if status is Status.STAYED and given is not None:
        hold(not (fault := _fault_of_kept(plan, given.cpu(), placement, problem)), fault)
        return
    absent = torch.tensor(placement.copy_rank < 0)
    hold((shares >= 0).all() and (quota >= 0).all(), "a negative quota")
    hold((quota[absent] == 0).all(), "a quota where no copy can take tokens")
    hold((quota.sum(1) == counts.sum(0)).all(), "quotas do not sum to the load")
    hold((shares.sum(0) == quota).all(), "the split does not sum to the quotas")
    hold((shares.sum(2) == counts).all(), "the split does not sum to the counts")
    slots = torch.tensor(placement.logical_to_physical).long()
    took = reference.count(physical, placement.num_physical_experts)
    hold((took[slots] * ~absent == shares[rank]).all(), "slots got other picks than their share")
    e, c = torch.nonzero(~absent, as_tuple=True)
    own = torch.tensor(placement.copy_rank).long()[e, c]
    stay = torch.minimum(counts[own, e], quota[e, c])
    hold((shares[own, e, c] >= stay).all(), "a copy passed over tokens of its own rank")

    on_ranks = plan.rank_load.cpu().long()
    hold(on_ranks.equal(rank_load(quota, placement)), "rank_load is not the load of the quotas")
    load = counts.long().sum(0)
    if status in (Status.OPTIMAL, Status.STAYED) and given is None:
        must_stay = stays(load.numpy(), placement, problem)
        hold(must_stay == (status is Status.STAYED), "it stays at home, or not, against the rule")
    if status is Status.OPTIMAL:
        if problem.max_quota is not None:
            hold((quota <= problem.max_quota.cpu()).all(), "a quota above its max_quota")
        hold(not (fault := _fault_of(quota, load, placement, problem, guests.numpy())), fault)
    else:
        hold((quota[:, 1:] == 0).all(), "a plan that is not optimal must send every token home")


def _fault_of_guests(plan: Plan, status: Status, placement: Placement, problem: Problem) -> str:
    """The fault of a plan's guests; empty: none. By cost no quotas but the CPU's are right."""
    guests, load = plan.guests.cpu().numpy(), plan.counts.cpu().long().sum(0).numpy()
    chosen = np.full_like(guests, -1)
    if status is Status.OPTIMAL and guests.size and problem.objective_name != "tokens":
        chosen, quota = plan_load(load, placement, problem)
        if not np.array_equal(plan.quota.cpu().numpy(), quota):
            return "quotas are not those of the definition"
    elif status is Status.OPTIMAL:
        chosen = guests_of(load, placement, problem)
    return "" if np.array_equal(guests, chosen) else "guests are not those of the definition"


def _fault_of(
    quota: torch.Tensor,
    load: torch.Tensor,
    placement: Placement,
    problem: Problem,
    guests: npt.NDArray[np.int32],
) -> str:
    how = judge(quota, load, placement, problem, push_waits(guests, placement, problem))
    best = least_value(how, quota, load, placement, problem)
    if best is None or how.value == best:
        return ""
    what = "active slots" if problem.objective_name == "experts" else "load"
    return f"the largest rank {what} is {how.value}, not {best}"


def _fault_without_counts(plan: Plan, logical: torch.Tensor, placement: Placement) -> str:
    """Invalid counts say nothing: there are no quotas, and every pick is at its home."""
    for name in ("counts", "quota", "split", "rank_load"):
        if getattr(plan, name).any():
            return f"{name} is not 0, of invalid counts"
    at_home = plan.topk_idx.cpu().equal(reference.rewrite_home(logical, placement))
    return "" if at_home else "a pick is not at its home"


def _fault_of_kept(plan: Plan, given: torch.Tensor, placement: Placement, problem: Problem) -> str:
    """The fault of a plan that keeps slots; empty: none. Others' slots show in rank loads alone."""
    load, on_ranks = plan.counts.cpu().long().sum(0), plan.rank_load.cpu().long()
    if not plan.topk_idx.cpu().equal(given):
        return "a pick did not keep its slot"
    if plan.quota.any() or plan.split.any():
        return "there are quotas of slots that were kept"
    if (on_ranks < count_by_rank(given, placement)).any() or on_ranks.sum() != load.sum():
        return "rank_load is not the load of the slots that were kept"
    if not stays(load.numpy(), placement, problem, on_ranks.numpy()):
        return "it keeps its slots against the rule"
    return ""


def _fault_of_reused(plan: Plan, topk_idx: torch.Tensor, placement: Placement, rank: int) -> str:
    logical, quota = topk_idx.cpu(), plan.quota.cpu()
    own = reference.count(logical, placement.num_experts)
    shares = reuse(own, quota, rank, placement.num_ranks)
    if plan.topk_idx.device != topk_idx.device:
        return "topk_idx changed its device"
    if plan.topk_idx.cpu().equal(reference.rewrite(logical, shares, placement)):
        return ""
    return "picks are not split in proportion to the quotas of an earlier batch"
