"""Checks of a planner's arguments, and of a batch's indices and counts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from ..placement.table import Placement
from ..problem import Integers, as_integers
from ..settings import MAX_ONE_LAUNCH

INDICES = ("logical", "physical")
"""What `topk_idx` names: experts, or slots that an engine has chosen itself. An engine knows of no
guest slots, so its slots are numbered without them."""
_DTYPES = frozenset((torch.int32, torch.int64))
MAX_PICKS = 2**31 - 2**14
"""Picks of a rank in a batch: kernels cut them into chunks, which end within 32 bits."""


def num_ids(placement: Placement, indices: str) -> int:
    """How many ids there are of a kind: E logical experts, or all slots but guest slots.

    Raises:
        ValueError: `indices` is not one of `INDICES`.
    """
    if indices not in INDICES:
        raise ValueError(f"indices must be one of {', '.join(INDICES)}; got {indices!r}")
    if indices == "logical":
        return placement.num_experts
    return placement.num_ranks * placement.num_resident_slots


def check_topk_idx(topk_idx: torch.Tensor) -> None:
    """Checks what the CPU knows of `topk_idx` wherever it lies.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is not [T, K] int32 or int64, or has more than `MAX_PICKS` entries.
    """
    if not isinstance(topk_idx, torch.Tensor):
        raise TypeError(f"topk_idx must be a tensor [T, K]; got a {type(topk_idx).__name__}")
    if topk_idx.ndim != 2 or topk_idx.dtype not in _DTYPES:
        raise ValueError(
            f"topk_idx must be [T, K] of int32 or int64; "
            f"got {list(topk_idx.shape)} of {topk_idx.dtype}"
        )
    if topk_idx.numel() > MAX_PICKS:
        raise ValueError(f"topk_idx must have at most {MAX_PICKS} entries; got {topk_idx.numel()}")


def as_picks(topk_idx: Integers) -> torch.Tensor:
    """The checked `topk_idx` [T, K]: itself where kernels take its dtype, else as int64.

    Raises:
        TypeError: it is no tensor, array or list.
        ValueError: as `check_topk_idx`.
    """
    if not isinstance(topk_idx, torch.Tensor) or topk_idx.dtype not in _DTYPES:
        topk_idx = as_integers("topk_idx", topk_idx).long()
    check_topk_idx(topk_idx)
    return topk_idx


def as_counts(counts: Integers, placement: Placement) -> torch.Tensor:
    """The checked counts [R, E]: themselves where kernels take their dtype, else as int64.

    Raises:
        TypeError: they are no tensor, array or list.
        ValueError: as `check_counts`.
    """
    if not isinstance(counts, torch.Tensor) or counts.dtype not in _DTYPES:
        counts = as_integers("counts", counts).long()
    check_counts(counts, placement)
    return counts


def logical_picks(
    topk_idx: torch.Tensor, placement: Placement, indices: str = "logical", distinct: bool = False
) -> torch.Tensor:
    """Checks every entry of `topk_idx` and names the experts.

    Args:
        topk_idx: [T, K] int32 or int64; on a GPU the CPU waits for it.
        placement: the copies.
        indices: one of `INDICES`.
        distinct: whether a token must pick K different experts.

    Returns:
        [T, K] of the same dtype and device: logical experts, -1 = no pick; `topk_idx` itself where
        it names them.

    Raises:
        ValueError: an entry is out of range, names an empty slot, or repeats an expert.
    """
    count = num_ids(placement, indices)
    wrong = torch.nonzero((topk_idx < -1) | (topk_idx >= count))
    if len(wrong):
        t, k = wrong[0].tolist()
        what = "an expert" if indices == "logical" else "a slot"
        raise ValueError(
            f"topk_idx[{t}, {k}] is {int(topk_idx[t, k])}; expected -1 or {what} in [0, {count})"
        )
    logical = topk_idx
    if indices == "physical":
        logical = logical_table(placement, topk_idx.device)[topk_idx.long()].to(topk_idx.dtype)
        wrong = torch.nonzero((logical < 0) & (topk_idx >= 0))
        if len(wrong):
            slot = int(topk_idx[tuple(wrong[0].tolist())])
            raise ValueError(f"topk_idx names slot {slot}, which holds no expert")
    if distinct:
        ordered = logical.sort(1).values
        wrong = torch.nonzero((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
        if len(wrong):
            t, k = wrong[0].tolist()
            raise ValueError(f"topk_idx[{t}] picks expert {int(ordered[t, k])} twice")
    return logical


@functools.lru_cache(maxsize=1024)
def logical_table(placement: Placement, device: torch.device) -> torch.Tensor:
    """[P - R G + 1] int32: the expert of each slot by an engine's number, and -1 at the end.

    It is -1 for an empty slot.
    """
    slots = np.delete(placement.physical_to_logical, placement.guest_slots)
    return torch.from_numpy(np.append(slots, np.int32(-1))).to(device)


def check_counts(counts: torch.Tensor, placement: Placement) -> None:
    """Checks given counts.

    Raises:
        TypeError: they are no tensor.
        ValueError: they are not [R, E] int32 or int64.
    """
    shape = (placement.num_ranks, placement.num_experts)
    if not isinstance(counts, torch.Tensor):
        raise TypeError(f"counts must be a tensor; got a {type(counts).__name__}")
    if tuple(counts.shape) != shape or counts.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"counts must be {list(shape)} of int32 or int64; "
            f"got {list(counts.shape)} of {counts.dtype}"
        )


def check_limits(timeout_s: float, one_launch: int, sample_every: int, mark_every: int) -> None:
    """Checks the numbers that bound a planner's work, as `Planner` has them.

    Raises:
        ValueError: one of them is not in its range.
    """
    if not (isinstance(timeout_s, (int, float)) and 0 < timeout_s < 2**31):
        raise ValueError(
            "timeout_s must be a number of seconds, more than 0 and less than 2**31; "
            f"got {timeout_s!r}"
        )
    if not (isinstance(one_launch, int) and 0 <= one_launch <= MAX_ONE_LAUNCH):
        raise ValueError(
            f"one_launch must be a whole number in [0, {MAX_ONE_LAUNCH}]; got {one_launch!r}"
        )
    for name, every in (("sample_every", sample_every), ("mark_every", mark_every)):
        if not (isinstance(every, int) and 0 <= every < 2**31):
            raise ValueError(f"{name} must be a whole number in [0, 2**31); got {every!r}")


def own_rank(placement: Placement, group: dist.ProcessGroup | None, rank: int | None) -> int:
    """A planner's rank: that in its group, or the given one where there is none.

    Raises:
        ValueError: the group has not the placement's ranks, or `rank` does not fit.
    """
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


graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that runs, -1 outside of any."""
