"""Batches planned by the quotas of an earlier batch: the definition, on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from ..comm.exchange import Windows
from ..errors import ContractError
from ..placement.table import Placement
from ..problem import Problem


def reuse(own: torch.Tensor, quota: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """Splits a rank's own picks in proportion to the quotas of an earlier batch.

    It takes nothing of other ranks. An expert's n picks are spaced evenly over its Q tokens of that
    batch, and each goes to the copy that has its place. So a copy gets its exact share, rounded up
    or down. The first pick's place differs from rank to rank, all places alike. So ranks do not
    round alike: where all have n picks, and Q = R n, all of them together meet the quotas.

    Systematic sampling (Madow and Madow, 1944), in whole numbers below 2**63.

    Args:
        own: [E] integers: this rank's picks of each expert.
        quota: [E, C] integers of the earlier batch, 0 where no copy is. An expert that had no
            tokens then goes home.
        rank: this rank.
        num_ranks: R.

    Returns:
        [E, C] int32; rows sum to `own`.
    """
    picks, ends = own.numpy().astype(np.int64)[:, None], np.cumsum(quota.numpy(), 1, dtype=np.int64)
    total = ends[:, -1:]
    turn = (rank + np.arange(len(ends)))[:, None] % num_ranks
    first = total * (2 * turn + 1) // (2 * num_ranks)
    before = (picks * ends - first + total - 1) // np.maximum(total, 1)
    return torch.from_numpy(
        np.diff(np.where(total > 0, before, picks), axis=1, prepend=0).astype(np.int32)
    )


def check_every(
    every: int, placement: Placement, problem: Problem, counts: str = "auto", one_launch: int = 0
) -> None:
    """Checks how often batches are exchanged, and what that goes with.

    Raises:
        ValueError: it is no whole number from 1. Or it is more than 1, with guest slots, limits of
            copies, counts that each call brings, or plans in one launch.
    """
    if not (isinstance(every, int) and 1 <= every < 2**31):
        raise ValueError(f"every must be a whole number in [1, 2**31); got {every!r}")
    others = {
        "guest slots": bool(placement.num_guests_per_rank),  # a guest is of one batch alone
        "max_quota": problem.max_quota is not None,  # which holds for the batch that is solved
        "counts that are given": counts == "given",  # with every batch
        "one_launch (LPLB_EP_ONE_LAUNCH)": one_launch > 0,
    }
    given = " and ".join(other for other, is_given in others.items() if is_given)
    if every > 1 and given:
        raise ValueError(f"every (LPLB_EP_EVERY) does not go with {given}: leave it 1")


def check_windows(every: int, windows: Windows | None) -> None:
    """Checks that a GPU may leave exchanges out. A graph can, where kernels make them.

    Raises:
        ValueError: `every` is more than 1, and rows travel by other means, or between nodes.
    """
    if every > 1 and (windows is None or windows.relay is not None):
        raise ValueError(
            "every (LPLB_EP_EVERY) on a GPU goes with counts that kernels exchange within a node: "
            "use LPLB_EP_COUNTS=nvshmem or ipc, the solver 'cpu', or leave it 1"
        )


def check_reusable(*, stale: bool, keeps: bool) -> None:
    """Checks that a batch may use the quotas of an earlier one.

    Args:
        stale: whether this rank's replicas are.
        keeps: whether batches may keep slots that an engine gave them.

    Raises:
        ContractError: one of both, or a backward pass may come.
    """
    if keeps:
        raise ContractError(
            "LPLB_EP_MIN_GAIN with an engine's slots does not go with LPLB_EP_EVERY above 1: a "
            "batch that keeps them has no quotas for those behind it. Set one of both"
        )
    if stale:
        raise ContractError(
            "this rank's replicas are stale, and with LPLB_EP_EVERY above 1 it cannot tell the "
            "others: keep replicas equal to their homes, or leave it 1"
        )
    if torch.is_grad_enabled():
        raise ContractError(
            "LPLB_EP_EVERY above 1 is for inference: a recompute in the backward pass would get "
            "another plan. Use torch.no_grad() or torch.inference_mode(), or leave it 1"
        )
