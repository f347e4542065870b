"""The best split of loads over given copies, exactly: quotas, the optimum T*, and its proof.

The linear program is the flow of a network, so SciPy's maximum flows on whole numbers solve it.
Nothing is rounded, and no tolerance decides.
"""

from __future__ import annotations

import heapq
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, maximum_flow

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class Optimum(NamedTuple):
    """What `solve` finds for one load."""

    quota: Int64
    """[E, C], tokens of each copy."""
    bound: Fraction
    """T*, the optimum of the linear program."""
    tight_ranks: Bool
    """[R], ranks that together keep at least T* times their speed, whatever the plan."""


class Network:
    """The copies of a placement as a flow network: an arc for each copy of experts with several.

    Nodes are the ranks, these experts, a source and a sink. Edges are listed in the order
    source → rank, rank → sink, rank → expert (a token leaves a copy), expert → rank (it enters
    another).

    Args:
        copy_rank: [E, C] integers, the rank of each copy, -1 where it gets no tokens. An expert
            names no rank twice, and column 0 is its home.
        num_ranks: R.
    """

    component: npt.NDArray[np.int32]
    """[R], the label of each rank's component: ranks are joined where they share an expert."""

    def __init__(self, copy_rank: npt.NDArray[Any], num_ranks: int) -> None:
        self.copy_rank = copy_rank
        self.component = components(copy_rank, num_ranks)
        present = copy_rank >= 0
        self.expert, self.column = np.nonzero(present & (present.sum(axis=1) > 1)[:, None])
        self.rank = copy_rank[self.expert, self.column].astype(np.int64)
        ranks = np.arange(num_ranks)
        self.node = num_ranks + np.unique(self.expert, return_inverse=True)[1]
        self.num_nodes = int(self.node.max(initial=num_ranks - 1)) + 3
        self.source, self.sink = self.num_nodes - 2, self.num_nodes - 1
        rows = np.concatenate([np.full_like(ranks, self.source), ranks, self.rank, self.node])
        columns = np.concatenate([ranks, np.full_like(ranks, self.sink), self.node, self.rank])
        shape = (self.num_nodes, self.num_nodes)
        matrix = coo_array((np.arange(rows.size), (rows, columns)), shape=shape).tocsr()
        matrix.sort_indices()
        self._indices, self._indptr = (a.astype(np.int32) for a in (matrix.indices, matrix.indptr))
        # The edge that each entry of the sparse matrix stands for.
        self._edge = matrix.data

    def push(self, tokens: Int64, capacity: Int64, excess: Int64) -> tuple[Int64, Bool]:
        """Moves as much of the positive `excess` as fits to ranks where it is negative.

        Args:
            tokens, capacity: for each arc, tokens that may leave and enter its copy.
            excess: [R] load above the limit.

        Returns:
            moved: for each arc, tokens that leave it (negative: enter it).
            over: [R] a minimum cut: ranks that stay above the limit, and all ranks to which their
                load could still move. Empty if all excess found a place.
        """
        total = int(np.maximum(excess, 0).sum())
        if total == 0:
            return np.zeros_like(tokens), np.zeros(excess.size, bool)
        assert total < 2**31, f"excess of {total} does not fit SciPy's 32-bit flows"
        # No edge needs more than all of the excess, and one that could carry it all is in no cut.
        above, below = np.maximum(excess, 0), np.maximum(-excess, 0)
        edges = [above, np.minimum(below, total)]
        edges += [np.minimum(tokens, total), np.minimum(capacity, total)]
        graph: Any = csr_array(
            (np.concatenate(edges).astype(np.int32)[self._edge], self._indices, self._indptr),
            shape=(self.num_nodes, self.num_nodes),
        )
        flow = maximum_flow(graph, self.source, self.sink).flow
        moved = np.asarray(flow[self.rank, self.node]).ravel().astype(np.int64)
        can_leave, can_enter = edges[2] > moved, edges[3] > -moved
        over = above > np.asarray(flow[[self.source], : excess.size].todense()).ravel()
        while True:
            entered = np.zeros(self.num_nodes, bool)
            entered[self.node[can_leave & over[self.rank]]] = True
            new = self.rank[can_enter & entered[self.node] & ~over[self.rank]]
            if new.size == 0:
                return moved, over
            over[new] = True


def components(copy_rank: npt.NDArray[Any], num_ranks: int) -> npt.NDArray[np.int32]:
    """[R]: labels from 0, equal for ranks that are joined by experts which they share.

    Args:
        copy_rank: [E, C] integers, as for `Network`.
        num_ranks: R.
    """
    expert, column = np.nonzero(copy_rank >= 0)
    joined = coo_array(
        (np.ones(expert.size), (copy_rank[expert, 0], copy_rank[expert, column])),
        shape=(num_ranks, num_ranks),
    )
    return connected_components(joined, directed=False)[1].astype(np.int32)


def solve(
    load: Int64,
    network: Network,
    *,
    base_load: Int64 | None = None,
    speed: Int64 | None = None,
    max_quota: Int64 | None = None,
    start: Int64 | None = None,
) -> Optimum:
    """Integer quotas with the smallest possible maximum time of a rank, and the proof that it is.

    Every token starts at its home. Maximum flows push the load of ranks above a limit T along
    chains of replicas to ranks below it. Where a flow falls short, its minimum cut is a set S of
    ranks that must keep its load. So load(S) / speed(S) is a lower bound, and gives the next T.
    This is Newton's method on a parametric cut (Dinkelbach 1967, Radzik 1993): the first T that
    leaves no excess is the best whole-numbered one. Flows scaled by the bound's denominator then
    raise the bound to T* itself. Each component of the network has a T of its own; all of them
    share each flow.

    Args:
        load: [E] whole numbers.
        network: the copies.
        base_load: [R] whole numbers, load that stays on each rank; default 0.
        speed: [R] positive whole numbers; a rank's time is its load over its speed; default 1.
        max_quota: [E, C] whole numbers, the most tokens of each copy, which must suffice for the
            load; default: no limit.
        start: [E, C] quotas for this load, within `max_quota`, to start from; default: at home.
            From an optimum the proof takes little more than finding that nothing moves.
    """
    component = network.component
    rank_load = np.zeros(component.size, np.int64)
    if base_load is not None:
        rank_load += base_load
    speeds = np.ones_like(rank_load) if speed is None else speed
    quota = np.zeros(network.copy_rank.shape, np.int64)
    quota[:, 0] = load
    most = np.full(quota.shape, quota.sum())
    if max_quota is not None:
        most = np.where(network.copy_rank >= 0, max_quota, 0)
        filled = np.cumsum(most, axis=1) - most
        quota = np.clip(quota[:, :1] - filled, 0, most)
    if start is not None:
        quota = start.copy()
    expert, column = np.nonzero(quota)
    np.add.at(rank_load, network.copy_rank[expert, column], quota[expert, column])
    most = most[network.expert, network.column]
    movable = quota[network.expert, network.column]

    stuck = rank_load.copy()
    np.subtract.at(stuck, network.rank, movable)
    bounds = _first_bounds(component, rank_load, stuck, speeds)
    times = [_whole_time(b.load, speeds[b.ranks]) for b in bounds]
    while True:
        limit = np.array([int(times[i] * int(s)) for i, s in zip(component, speeds, strict=True)])
        moved, over = network.push(movable, most - movable, rank_load - limit)
        movable = movable - moved
        np.subtract.at(rank_load, network.rank, moved)
        if not over.any():
            break
        for label in np.unique(component[over]):
            ranks = over & (component == label)
            found = _Bound(ranks, rank_load[ranks].sum(), speeds)
            times[label] = _whole_time(found.load, speeds[found.ranks])
            bounds[label] = max(bounds[label], found, key=lambda b: b.ratio)
    quota[network.expert, network.column] = movable

    while True:
        ratios = [bounds[label].ratio for label in component]
        scale = np.array([r.denominator for r in ratios])
        limit = np.array([r.numerator for r in ratios]) * speeds
        by_arc = scale[network.rank]
        scaled = scale * rank_load
        moved, over = network.push(by_arc * movable, by_arc * (most - movable), scaled - limit)
        if not over.any():
            break
        np.subtract.at(scaled, network.rank, moved)
        for label in np.unique(component[over]):
            ranks = over & (component == label)
            kept = scaled[ranks].sum() // bounds[label].ratio.denominator
            bounds[label] = _Bound(ranks, kept, speeds)

    highest = max(bounds, key=lambda b: b.ratio)
    return Optimum(quota, highest.ratio, highest.ranks)


class _Bound:
    """`ranks` keep `load` between them, so the longest of their times is at least `ratio`."""

    def __init__(self, ranks: Bool, load: int, speeds: Int64) -> None:
        self.ranks, self.load = ranks, int(load)
        self.ratio = Fraction(self.load, int(speeds[ranks].sum()))


def _first_bounds(
    component: npt.NDArray[np.int32], rank_load: Int64, stuck: Int64, speeds: Int64
) -> list[_Bound]:
    """Of each component, the better of two bounds that need no flow: its mean, and the largest
    load that must stay on one rank."""
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
