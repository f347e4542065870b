"""Independent judges: other libraries' answers to the same linear program, and random instances.

Nothing here may import a solver of `lplb_ep` (a test holds this).
"""

from __future__ import annotations

import math
import types
from fractions import Fraction

import networkx
import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from lplb_ep.placement.table import Placement


def linear_program(placement, load, base_load=None, speed=None, max_quota=None) -> float:
    """T* by HiGHS: minimise T subject to every rank's (load + base) / speed <= T."""
    expert, column = np.nonzero(placement.copy_rank >= 0)
    rank = placement.copy_rank[expert, column]
    n, R, E = expert.size, placement.num_ranks, placement.num_experts
    speeds = np.ones(R) if speed is None else np.asarray(speed, float)
    ranks = scipy.sparse.coo_array(
        (
            np.append(np.ones(n), -speeds),
            (np.append(rank, np.arange(R)), np.append(np.arange(n), np.full(R, n))),
        ),
        shape=(R, n + 1),
    )
    experts = scipy.sparse.coo_array((np.ones(n), (expert, np.arange(n))), shape=(E, n + 1))
    upper = np.full(n, np.inf) if max_quota is None else np.asarray(max_quota)[expert, column]
    result = linprog(
        np.append(np.zeros(n), 1.0),
        A_ub=ranks.tocsr(),
        b_ub=np.zeros(R) if base_load is None else -np.asarray(base_load, float),
        A_eq=experts.tocsr(),
        b_eq=np.asarray(load, float),
        bounds=np.stack([np.zeros(n + 1), np.append(upper, np.inf)], axis=1),
        method="highs",
    )
    assert result.status == 0, result.message
    return float(result.fun)


def fits(time, placement, load, base_load=None, speed=None, max_quota=None) -> bool:
    """Is there a whole-numbered plan in which no rank takes longer? By networkx's maximum flow."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(["source", "sink"])
    for rank in range(placement.num_ranks):
        base = 0 if base_load is None else int(base_load[rank])
        room = math.floor(Fraction(time) * (1 if speed is None else int(speed[rank]))) - base
        if room < 0:
            return False
        graph.add_edge(("rank", rank), "sink", capacity=room)
    for expert, ranks in enumerate(placement.copy_rank.tolist()):
        graph.add_edge("source", ("expert", expert), capacity=int(load[expert]))
        for column, rank in enumerate(ranks):
            if rank >= 0:
                edge = {} if max_quota is None else {"capacity": int(max_quota[expert, column])}
                graph.add_edge(("expert", expert), ("rank", rank), **edge)
    return networkx.maximum_flow_value(graph, "source", "sink") == int(np.sum(load))


def least_active(placement, load, base_load=None) -> int:
    """The fewest active slots that the fullest rank can have: by networkx's bipartite matching.

    Each rank has that many seats, less one where load stays. Every expert with tokens takes a seat
    of a rank that holds a copy.
    """
    R = placement.num_ranks
    active = np.flatnonzero(np.asarray(load) > 0).tolist()
    taken = np.zeros(R, int) if base_load is None else (np.asarray(base_load) > 0).astype(int)
    for most in range(int(taken.max()), len(active) + 2):
        graph = networkx.Graph()
        graph.add_nodes_from(("expert", e) for e in active)
        for e in active:
            for rank in placement.copy_rank[e][placement.copy_rank[e] >= 0].tolist():
                seats = range(most - int(taken[rank]))
                graph.add_edges_from((("expert", e), ("seat", rank, seat)) for seat in seats)
        top = [("expert", e) for e in active]
        matching = networkx.bipartite.hopcroft_karp_matching(graph, top_nodes=top)
        if all(expert in matching for expert in top):
            return most
    raise AssertionError("every expert has a copy")


def cost_of_rows(steps, tile, slope, rows) -> int:
    """Nanoseconds of a slot, by the definition of a cost model."""
    tiles = -(-int(rows) // tile)
    if tiles <= len(steps):
        return (0, *steps)[tiles]
    return steps[-1] + slope * (tiles - len(steps))


def least_cost(placement, load, steps, tile, slope, base_load=None, seconds=20.0):
    """The least largest rank cost, `fixed` left out: a mixed-integer program, by HiGHS.

    Each copy has one variable for each number of tiles that it may have.

    Returns:
        The best value found, or None; and a bound of all plans.
    """
    expert, column = np.nonzero(placement.copy_rank >= 0)
    rank, n = placement.copy_rank[expert, column], len(expert)
    most = [-(-int(load[e]) // tile) for e in expert]
    first = np.append(0, np.cumsum(most)) + 1 + n  # T, the rows, then tiles of each copy
    size = int(first[-1])
    rows, low, high = [], [], []

    def add(entries, least, greatest):
        rows.append(entries)
        low.append(least)
        high.append(greatest)

    for i in range(n):
        tiles = [(int(first[i]) + k, k + 1) for k in range(most[i])]
        add([(1 + i, 1.0), *((v, -float(tile * k)) for v, k in tiles)], -np.inf, 0)
        add([(v, 1.0) for v, _ in tiles], 0, 1)
    for e in range(placement.num_experts):
        add([(1 + i, 1.0) for i in np.flatnonzero(expert == e)], load[e], load[e])
    for r in range(placement.num_ranks):
        base = 0 if base_load is None else cost_of_rows(steps, tile, slope, base_load[r])
        of_rank = [
            (int(first[i]) + k, cost_of_rows(steps, tile, slope, tile * (k + 1)))
            for i in np.flatnonzero(rank == r)
            for k in range(most[i])
        ]
        add([(0, -1.0), *of_rank], -np.inf, -base)
    is_whole = np.ones(size)
    is_whole[: 1 + n] = 0
    upper = np.ones(size)
    upper[: 1 + n] = np.inf
    return _milp(rows, low, high, size, is_whole, upper, seconds)


def least_tokens_of_whole(placement, load, most_active, base_load=None, seconds=20.0):
    """The fewest tokens of the fullest rank, experts whole and at most so many active on a rank.

    Returns:
        As `least_cost`.
    """
    expert, column = np.nonzero((placement.copy_rank >= 0) & (np.asarray(load) > 0)[:, None])
    rank, n = placement.copy_rank[expert, column], len(expert)
    rows, low, high = [], [], []
    for e in np.unique(expert):
        rows.append([(1 + i, 1.0) for i in np.flatnonzero(expert == e)])
        low.append(1)
        high.append(1)
    for r in range(placement.num_ranks):
        base = 0 if base_load is None else int(base_load[r])
        mine = np.flatnonzero(rank == r)
        rows += [
            [(1 + i, 1.0) for i in mine],
            [(0, -1.0), *((1 + i, float(load[expert[i]])) for i in mine)],
        ]
        low += [-np.inf, -np.inf]
        high += [most_active - (base > 0), -base]
    upper = np.ones(1 + n)
    upper[0] = np.inf
    is_whole = np.ones(1 + n)
    is_whole[0] = 0
    return _milp(rows, low, high, 1 + n, is_whole, upper, seconds)


def _milp(rows, low, high, size, is_whole, upper, seconds):
    """Minimises the first variable; each of `rows` lists (variable, coefficient)."""
    entries = [(i, v, value) for i, row in enumerate(rows) for v, value in row]
    i, v, values = (np.array(one) for one in zip(*entries, strict=True))
    matrix = scipy.sparse.csr_array((values, (i, v)), shape=(len(rows), size))
    result = milp(
        np.eye(1, size)[0],
        constraints=LinearConstraint(matrix, low, high),
        integrality=is_whole,
        bounds=Bounds(np.zeros(size), upper),
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    best = None if result.x is None else float(result.fun)
    return best, best if result.mip_dual_bound is None else float(result.mip_dual_bound)


def with_guests(placement, guests):
    """Residents and guests [R, G] of one batch, as `linear_program` and `fits` take them.

    They are found slot by slot, and guests that may not be are refused by assertions.
    """
    R, G = placement.num_ranks, placement.num_guests_per_rank
    assert guests.shape == (R, G)
    rows = placement.physical_to_logical.reshape(R, -1)
    held = [[int(e) for e in row[: rows.shape[1] - G] if e >= 0] for row in rows]
    ranks = [[] for _ in range(placement.num_experts)]
    for expert, slot in enumerate(placement.home.tolist()):
        ranks[expert].append(slot // rows.shape[1])
    for rank in range(R):
        assert (rows[rank, rows.shape[1] - G :] == -1).all(), "a guest slot is not empty"
        for expert in guests[rank].tolist():
            if expert == -1:
                continue
            assert 0 <= expert < placement.num_experts, f"{expert} is no expert"
            assert expert not in held[rank], f"rank {rank} holds {expert} already"
            home, node = ranks[expert][0], placement.num_ranks_per_node
            assert home // node == rank // node, f"{expert} is at home on another node"
            held[rank].append(expert)
    for rank, experts in enumerate(held):
        for expert in experts:
            if rank not in ranks[expert]:
                ranks[expert].append(rank)
    most = max(map(len, ranks))
    table = np.array([row + [-1] * (most - len(row)) for row in ranks])
    return types.SimpleNamespace(num_ranks=R, num_experts=len(ranks), copy_rank=table)


def random_placement(
    rng, num_ranks, num_experts, num_redundant_per_rank, max_copies=8, num_ranks_per_node=None
) -> Placement:
    """Any table: experts anywhere, some copies doubled on a rank, some slots unused."""
    num_slots = num_ranks * (-(-num_experts // num_ranks) + num_redundant_per_rank)
    table = np.full(num_slots, -1)
    slots = rng.permutation(num_slots)
    table[slots[:num_experts]] = rng.permutation(num_experts)
    copies = np.ones(num_experts, int)
    for slot in slots[num_experts:]:
        able = np.flatnonzero(copies < max_copies)
        if able.size and rng.random() < 0.9:
            table[slot] = rng.choice(able)
            copies[table[slot]] += 1
    return Placement(
        table, num_ranks, num_experts=num_experts, num_ranks_per_node=num_ranks_per_node
    )


def random_load(rng, num_experts, scale=100.0) -> np.ndarray:
    """[E] int64: flat, skewed as recorded ones, Zipf, one hot, sparse, or nothing at all."""
    kind = rng.integers(6)
    if kind == 0:
        return np.zeros(num_experts, np.int64)
    if kind == 1:
        load = np.zeros(num_experts, np.int64)
        load[rng.integers(num_experts)] = int(scale * num_experts)
        return load
    if kind == 2:
        weight = rng.permutation(1.0 / np.arange(1, num_experts + 1))
    elif kind == 3:
        weight = np.ones(num_experts)
    else:
        # Sigmas fitted to DeepSeek-V3's routing: an expert's own, and that of 32 neighbours.
        weight = rng.lognormal(0, 0.6, num_experts)
        weight *= np.repeat(rng.lognormal(0, 0.33, -(-num_experts // 32)), 32)[:num_experts]
    load = rng.poisson(weight / weight.mean() * scale)
    return load * (rng.random(num_experts) < 0.5) if kind == 5 else load


def random_topk(rng, num_tokens, num_topk, weight, none=0.05) -> np.ndarray:
    """[T, K] int64: K different experts a token, likelier where `weight` is; some picks -1."""
    gumbel = rng.gumbel(size=(num_tokens, len(weight))) + np.log(np.asarray(weight) + 1e-9)
    topk = np.argsort(-gumbel, axis=1)[:, :num_topk]
    return np.where(rng.random(topk.shape) < none, -1, topk)


def slots_of(rng, topk, placement) -> np.ndarray:
    """[T, K] slots of an engine: copies by turns, at random, or always the last ones."""
    table, slots, kind = placement.physical_to_logical, np.full(topk.shape, -1), rng.integers(3)
    for expert in range(placement.num_experts):
        copies, picks = np.flatnonzero(table == expert), topk == expert
        turns = np.arange(picks.sum()), rng.integers(0, copies.size, picks.sum()), -1
        slots[picks] = copies[turns[kind] % copies.size]
    return slots


def random_copies(rng, placement) -> Placement:
    """Any other replicas in a placement's layer: of random experts, some slots unused."""
    table = placement.physical_to_logical.copy()
    copies = np.ones(placement.num_experts, int)
    for slot in np.setdiff1d(np.arange(table.size), placement.home):
        able = np.flatnonzero(copies < placement.max_replicas)
        table[slot] = rng.choice(able) if rng.random() < 0.9 else -1
        copies[table[slot]] += table[slot] >= 0
    return placement.with_copies(table)
