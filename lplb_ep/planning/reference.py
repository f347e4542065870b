"""The four steps of a plan on the CPU: count, solve, split, rewrite.

This is the default without a GPU, and the definition that the GPU kernels are tested against.
Tensors come and go on the CPU; the arithmetic between is NumPy's in 64-bit integers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from ..placement import optimum
from ..placement.table import Placement

Int64 = npt.NDArray[np.int64]


def count(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many picks each expert has.

    Args:
        topk_idx: [T, K] int32 or int64, in [0, num_experts), -1 = no pick.
        num_experts: E.

    Returns:
        [E] int32.
    """
    return torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()


@dataclass(frozen=True)
class Optimum:
    """What `solve` finds for one batch."""

    quota: torch.Tensor
    """[E, C] int32, tokens of each copy."""
    bound: Fraction
    """T*, the optimum of the linear program."""
    tight_ranks: torch.Tensor
    """[R] bool, ranks that together keep at least T* times their speed, whatever the plan."""


def solve(
    load: torch.Tensor,
    placement: Placement,
    *,
    base_load: torch.Tensor | None = None,
    speed: torch.Tensor | None = None,
    max_quota: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> Optimum:
    """Integer quotas with the smallest possible maximum time of a rank, and the proof that it is.

    `placement.optimum` holds the method: maximum flows, and their minimum cuts.

    Args:
        load: [E] whole numbers.
        placement: the copies.
        base_load: [R] whole numbers, load that stays on each rank; default 0.
        speed: [R] positive whole numbers; a rank's time is its load over its speed; default 1.
        max_quota: [E, C] whole numbers, the most tokens of each copy, which must suffice for the
            load; default: no limit.
        start: [E, C] quotas for this load, within `max_quota`, to start from; default: at home.
            From an optimum the proof takes little more than finding that nothing moves.
    """
    options = {"base_load": base_load, "speed": speed, "max_quota": max_quota, "start": start}
    arrays = {name: t.numpy().astype(np.int64) for name, t in options.items() if t is not None}
    quota, bound, ranks = optimum.solve(load.numpy(), _network(placement), **arrays)
    return Optimum(torch.from_numpy(quota.astype(np.int32)), bound, torch.from_numpy(ranks))


@functools.lru_cache(maxsize=128)  # layers of a model; placements of batches with guests pass by
def _network(placement: Placement) -> optimum.Network:
    return optimum.Network(placement.copy_rank, placement.num_ranks)


def split(counts: torch.Tensor, quota: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Shares each copy's quota out to the source ranks.

    A copy takes tokens of its own rank first, then of ranks of its node, then of the rest, each in
    rank order. Where several copies stand at one stage, lower columns come first.

    Args:
        counts: [R, E] int32, tokens on each source rank that picked each expert.
        quota: [E, C] int32, rows sum to the expert's load.
        placement: the copies.

    Returns:
        [R, E, C] int32; sums over R to `quota`, over C to `counts`.
    """
    supply, demand = counts.numpy().astype(np.int64), quota.numpy().astype(np.int64)
    shares = np.zeros((placement.num_ranks, *demand.shape), np.int64)
    expert, column = np.nonzero(placement.copy_rank >= 0)
    rank = placement.copy_rank[expert, column]
    own = np.minimum(supply[rank, expert], demand[expert, column])
    shares[rank, expert, column] = own
    supply, demand = supply - shares.sum(axis=2), demand - shares.sum(axis=0)
    copy_node = np.where(placement.copy_rank >= 0, placement.node[placement.copy_rank], -1)
    for node in range(placement.num_ranks // placement.num_ranks_per_node):
        members = placement.node == node
        shares[members] += _overlap(supply[members], np.where(copy_node == node, demand, 0))
    supply = counts.numpy() - shares.sum(axis=2)
    demand = quota.numpy() - shares.sum(axis=0)
    shares += _overlap(supply, demand)
    return torch.from_numpy(shares.astype(np.int32))


def _overlap(supply: Int64, demand: Int64) -> Int64:
    """[N, E, C]: lays supplies [N, E] and demands [E, C] of each expert end to end, and meets."""
    supply_end, demand_end = np.cumsum(supply, axis=0), np.cumsum(demand, axis=1)
    end = np.minimum(supply_end[:, :, None], demand_end)
    start = np.maximum((supply_end - supply)[:, :, None], demand_end - demand)
    return np.maximum(end - start, 0)


def rewrite(topk_idx: torch.Tensor, shares: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Logical to physical: the k-th pick of an expert goes to the copy whose share holds k.

    Args:
        topk_idx: [T, K] int32 or int64, in [0, E), -1 = no pick; picks are numbered row-major.
        shares: [E, C] int32, this rank's row of `split`; rows sum to this rank's counts.
        placement: the copies.

    Returns:
        [T, K], fresh, of the same dtype: slots in [0, P), -1 where the input has -1.
    """
    flat = topk_idx.numpy().ravel()
    picks = np.flatnonzero(flat >= 0)
    expert = flat[picks]
    # NumPy sorts 16-bit integers by radix, several times faster.
    small = expert.astype(np.uint16) if placement.num_experts <= 2**16 else expert
    order = np.argsort(small, kind="stable")
    picks, expert = picks[order], expert[order]
    number = np.bincount(expert, minlength=placement.num_experts)
    nth = np.arange(picks.size) - (np.cumsum(number) - number)[expert]
    ends = np.cumsum(shares.numpy(), axis=1)
    column = (nth[:, None] >= ends[expert]).sum(axis=1)
    out = np.full_like(flat, -1)
    out[picks] = placement.logical_to_physical[expert, column]
    return torch.from_numpy(out.reshape(topk_idx.shape))


def rewrite_home(topk_idx: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Logical to physical with every pick at its home, on any device."""
    return _home_table(placement, topk_idx.device)[topk_idx.long()].to(topk_idx.dtype)


@functools.lru_cache(maxsize=1024)
def _home_table(placement: Placement, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.append(placement.home, -1)).to(device)
