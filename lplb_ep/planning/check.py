"""The conditions that every plan meets: for tests, and for `LPLB_EP_CHECK=1`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..placement.table import Placement
from ..problem import Problem
from . import reference
from .guests_by_cost import guests_of, push_waits
from .plan import Plan
from .reuse import reuse
from .solve import judge, least_value, rank_load
from .stay import stays_home
from .structs import Status


def check_plan(
    plan: Plan,
    topk_idx: torch.Tensor,
    placement: Placement,
    rank: int,
    problem: Problem | None = None,
) -> None:
    """Checks all conditions that a plan must meet.

    Args:
        plan: the plan of rank `rank`.
        topk_idx: [T, K], the logical experts from which it was made.
        placement: the copies.
        rank: this rank.
        problem: bounds of the plan beside its counts; by default none.

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
    chosen = guests_of(status, plan.counts.cpu().long().sum(0).numpy(), placement, problem)
    hold(guests.equal(torch.from_numpy(chosen)), "guests are not those of the definition")
    placement = placement.with_guests(guests)
    R, E, C = placement.num_ranks, placement.num_experts, placement.max_replicas
    physical, logical = plan.topk_idx.cpu(), topk_idx.cpu()
    counts, quota, shares = plan.counts.cpu(), plan.quota.cpu(), plan.split.cpu()
    hold(plan.topk_idx.dtype == topk_idx.dtype, "topk_idx changed its dtype")
    hold(plan.topk_idx.device == topk_idx.device, "topk_idx changed its device")
    hold(physical.shape == logical.shape, "topk_idx changed its shape")
    if status is Status.BAD_COUNTS:
        # Invalid counts say nothing: there are no quotas, and every pick is at its home.
        for name in ("counts", "quota", "split", "rank_load"):
            hold((getattr(plan, name) == 0).all(), f"{name} is not 0, of invalid counts")
        at_home = reference.rewrite_home(logical, placement)
        hold((physical == at_home).all(), "a pick is not at its home")
        return
    hold(counts.shape == (R, E), f"counts are {list(counts.shape)}")
    hold(quota.shape == (E, C), f"quota is {list(quota.shape)}")
    hold(shares.shape == (R, E, C), f"split is {list(shares.shape)}")

    hold(((physical == -1) == (logical == -1)).all(), "-1 was not kept")
    held = torch.tensor(placement.physical_to_logical)[physical.long().clamp(min=0)]
    hold((held == logical)[logical >= 0].all(), "a pick went to a slot of another expert")
    hold(
        (counts[rank] == reference.count(logical, E)).all(), "counts do not count this rank's picks"
    )

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

    load = rank_load(quota, placement)
    hold((plan.rank_load.cpu() == load).all(), "rank_load is not the load of the quotas")
    if status in (Status.OPTIMAL, Status.STAYED):
        stays = stays_home(counts.long().sum(0).numpy(), placement, problem)
        hold(stays == (status is Status.STAYED), "it stays at home, or not, against the rule")
    if status is Status.OPTIMAL:
        if problem.max_quota is not None:
            hold((quota <= problem.max_quota.cpu()).all(), "a quota above its max_quota")
        fault = _fault_of(quota, counts.long().sum(0), placement, problem, chosen)
        hold(not fault, fault)
    else:
        hold((quota[:, 1:] == 0).all(), "a plan that is not optimal must send every token home")


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


def _fault_of_reused(plan: Plan, topk_idx: torch.Tensor, placement: Placement, rank: int) -> str:
    logical, quota = topk_idx.cpu(), plan.quota.cpu()
    own = reference.count(logical, placement.num_experts)
    shares = reuse(own, quota, rank, placement.num_ranks)
    if plan.topk_idx.device != topk_idx.device:
        return "topk_idx changed its device"
    if plan.topk_idx.cpu().equal(reference.rewrite(logical, shares, placement)):
        return ""
    return "picks are not split in proportion to the quotas of an earlier batch"
