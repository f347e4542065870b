"""The four steps of a plan on the CPU: count, solve, split, rewrite.

This is the default without a GPU, and the definition that the GPU kernels are tested against.
Tensors come and go on the CPU; the arithmetic between is NumPy's in 64-bit integers, and the
maximum flows are SciPy's.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_flow

from ..placement.table import IntArray, Placement

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


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

    Every token starts at its home, and maximum flows push the load of ranks above a limit T along
    chains of replicas to ranks below it. Where a flow falls short, its minimum cut is a set S of
    ranks that its load cannot leave: load(S) / speed(S) is a lower bound, and gives the next T.
    This is Newton's method on a parametric cut (Dinkelbach 1967, Radzik 1993): the first T that
    leaves no excess is the best whole-numbered one. Flows scaled by the bound's denominator then
    raise the bound to T* itself. Each component of the replica graph has a T of its own; all of
    them share each flow.

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
    arcs = _arcs(placement)
    fixed = np.zeros(placement.num_ranks, np.int64)
    if base_load is not None:
        fixed += base_load.numpy()
    speeds = np.ones_like(fixed) if speed is None else speed.numpy().astype(np.int64)
    quota = np.zeros(placement.logical_to_physical.shape, np.int64)
    quota[:, 0] = load.numpy()
    most = np.full(quota.shape, quota.sum())
    if max_quota is not None:
        most = np.where(placement.copy_rank >= 0, max_quota.numpy().astype(np.int64), 0)
        filled = np.cumsum(most, axis=1) - most
        quota = np.clip(quota[:, :1] - filled, 0, most)
    if start is not None:
        quota = start.numpy().astype(np.int64)
    e, c = np.nonzero(quota)
    rank_load = fixed
    np.add.at(rank_load, placement.copy_rank[e, c], quota[e, c])
    most = most[arcs.expert, arcs.column]
    movable = quota[arcs.expert, arcs.column]

    component = placement.component
    stuck = rank_load.copy()
    np.subtract.at(stuck, arcs.rank, movable)
    bounds = _first_bounds(component, rank_load, stuck, speeds)
    times = [_whole_time(b.load, speeds[b.ranks]) for b in bounds]
    while True:
        limit = np.array([int(times[i] * int(s)) for i, s in zip(component, speeds, strict=True)])
        moved, over = _push(arcs, movable, most - movable, rank_load - limit)
        movable = movable - moved
        np.subtract.at(rank_load, arcs.rank, moved)
        if not over.any():
            break
        for label in np.unique(component[over]):
            ranks = over & (component == label)
            found = _Bound(ranks, rank_load[ranks].sum(), speeds)
            times[label] = _whole_time(found.load, speeds[found.ranks])
            bounds[label] = max(bounds[label], found, key=lambda b: b.ratio)
    quota[arcs.expert, arcs.column] = movable

    while True:
        ratios = [bounds[label].ratio for label in component]
        scale = np.array([r.denominator for r in ratios])
        limit = np.array([r.numerator for r in ratios]) * speeds
        by_arc = scale[arcs.rank]
        scaled = scale * rank_load
        moved, over = _push(arcs, by_arc * movable, by_arc * (most - movable), scaled - limit)
        if not over.any():
            break
        np.subtract.at(scaled, arcs.rank, moved)
        for label in np.unique(component[over]):
            ranks = over & (component == label)
            kept = scaled[ranks].sum() // bounds[label].ratio.denominator
            bounds[label] = _Bound(ranks, kept, speeds)

    highest = max(bounds, key=lambda b: b.ratio)
    return Optimum(
        torch.from_numpy(quota.astype(np.int32)), highest.ratio, torch.from_numpy(highest.ranks)
    )


class _Bound:
    """`ranks` keep `load` between them, so the longest of their times is at least `ratio`."""

    def __init__(self, ranks: Bool, load: int, speeds: Int64) -> None:
        self.ranks, self.load = ranks, int(load)
        self.ratio = Fraction(self.load, int(speeds[ranks].sum()))


def _first_bounds(
    component: IntArray, rank_load: Int64, stuck: Int64, speeds: Int64
) -> list[_Bound]:
    """Of each component, the better of two bounds that need no flow: its mean, and what cannot
    leave a single rank."""
    bounds = []
    for label in range(component.max() + 1):
        members = component == label
        worst = np.argmax(np.where(members, stuck / speeds, -1))
        alone = _Bound(np.arange(component.size) == worst, stuck[worst], speeds)
        mean = _Bound(members, rank_load[members].sum(), speeds)
        bounds.append(max(mean, alone, key=lambda bound: bound.ratio))
    return bounds


def _whole_time(total: int, speeds: Int64) -> Fraction:
    """The smallest time in which ranks of these speeds do `total` whole tokens between them."""
    time = Fraction(total, int(speeds.sum()))
    done = [int(time * int(s)) for s in speeds]
    short = total - sum(done)
    # At most one token per rank is lost to rounding: hand the rest to whoever ends it first.
    ends = [(Fraction(d + 1, int(s)), i) for i, (d, s) in enumerate(zip(done, speeds, strict=True))]
    heapq.heapify(ends)
    for _ in range(short):
        time, i = ends[0]
        heapq.heapreplace(ends, (time + Fraction(1, int(speeds[i])), i))
    return time


@dataclass(frozen=True)
class _Arcs:
    """The residual network of a placement: an arc per copy of each expert with several.

    Nodes are the ranks, the experts, a source and a sink; `rows` and `columns` list its edges in
    the order source → rank, rank → sink, rank → expert (a token leaves a copy), expert → rank (it
    enters another), and `order` is the place of each in the sparse matrix.
    """

    expert: Int64
    column: Int64
    rank: Int64
    node: Int64
    num_nodes: int
    indices: npt.NDArray[np.int32]
    indptr: npt.NDArray[np.int32]
    order: Int64

    @property
    def source(self) -> int:
        return self.num_nodes - 2

    @property
    def sink(self) -> int:
        return self.num_nodes - 1


@functools.lru_cache(maxsize=1024)
def _arcs(placement: Placement) -> _Arcs:
    present = placement.copy_rank >= 0
    expert, column = np.nonzero(present & (present.sum(axis=1) > 1)[:, None])
    rank = placement.copy_rank[expert, column].astype(np.int64)
    ranks = np.arange(placement.num_ranks)
    node = placement.num_ranks + np.unique(expert, return_inverse=True)[1]
    num_nodes = int(node.max(initial=placement.num_ranks - 1)) + 3
    source, sink = num_nodes - 2, num_nodes - 1
    rows = np.concatenate([np.full_like(ranks, source), ranks, rank, node])
    columns = np.concatenate([ranks, np.full_like(ranks, sink), node, rank])
    matrix = coo_array((np.arange(rows.size), (rows, columns)), shape=(num_nodes, num_nodes))
    matrix = matrix.tocsr()
    matrix.sort_indices()
    return _Arcs(
        expert,
        column,
        rank,
        node,
        num_nodes,
        matrix.indices.astype(np.int32),
        matrix.indptr.astype(np.int32),
        matrix.data,
    )


def _push(arcs: _Arcs, tokens: Int64, room: Int64, excess: Int64) -> tuple[Int64, Bool]:
    """Moves as much as can be of the positive `excess` to ranks where it is negative.

    Args:
        tokens, room: for each arc, tokens that may leave and enter its copy.
        excess: [R] load above the limit.

    Returns:
        moved: for each arc, tokens that leave it (negative: enter it).
        over: [R] ranks that stay above the limit, and all that their load could still reach: a
            minimum cut. Empty if all excess found a place.
    """
    total = int(np.maximum(excess, 0).sum())
    if total == 0:
        return np.zeros_like(tokens), np.zeros(excess.size, bool)
    assert total < 2**31, f"excess of {total} does not fit SciPy's 32-bit flows"
    # No edge needs more than all of the excess, and one that could carry it all is never in a cut.
    above, below = np.maximum(excess, 0), np.maximum(-excess, 0)
    leave, enter = np.minimum(tokens, total), np.minimum(room, total)
    capacity = np.concatenate([above, np.minimum(below, total), leave, enter]).astype(np.int32)
    graph: Any = csr_array(
        (capacity[arcs.order], arcs.indices, arcs.indptr), shape=(arcs.num_nodes, arcs.num_nodes)
    )
    flow = maximum_flow(graph, arcs.source, arcs.sink).flow
    moved = np.asarray(flow[arcs.rank, arcs.node]).ravel().astype(np.int64)
    can_leave, can_enter = leave > moved, enter > -moved
    over = above > np.asarray(flow[[arcs.source], : excess.size].todense()).ravel()
    while True:
        reached = np.zeros(arcs.num_nodes, bool)
        reached[arcs.node[can_leave & over[arcs.rank]]] = True
        new = arcs.rank[can_enter & reached[arcs.node] & ~over[arcs.rank]]
        if new.size == 0:
            return moved, over
        over[new] = True


def split(counts: torch.Tensor, quota: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Shares each copy's quota out to the source ranks.

    A copy takes tokens of its own rank first, then of ranks of its node, then of the rest, each in
    rank order; where several copies stand at one stage, lower columns first.

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
