"""Bounds on the optimum of a table in many scenarios at once, and the exact optimum of a few."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..optimum import Network, solve

Array = npt.NDArray[Any]

GAP = 1e-3
"""Of the mean: balancing ends where the bounds are closer on average."""
_MAX_SWEEPS = 24


def balance(quota: Array, table: Array, num_ranks: int, load: Array) -> tuple[Array, Array, Array]:
    """Balances the quotas of all copies, in all scenarios at once.

    Sweeps go over pairs of copies, in classes that use no rank twice, and each pair levels its two
    ranks. The limit is the plan with the least sum of squares, whose level sets are the tight ones.
    On the way every prefix of the ranks in order of load is tried for its bound.

    Args:
        quota: [P, K] float32 of each slot, from which to start.
        table: [P] int64, E = empty.
        num_ranks: R.
        load: [K, E + 1] float32.

    Returns:
        The quotas; [K] the largest rank loads, upper bounds on T*; [K, R] bool, the sets with
        the highest lower bounds.
    """
    num = len(load)
    classes = _pairs(table, num_ranks, load.shape[1] - 1)
    rank_load = quota.reshape(num_ranks, -1, num).sum(axis=1)
    order = np.argsort(table, kind="stable")
    first = np.flatnonzero(np.diff(table[order], prepend=-1))
    rank_of = order // (table.size // num_ranks)
    weight = load.T[table[order][first]]
    size = np.arange(1, num_ranks + 1)[:, None]
    columns = np.arange(num)
    for sweep in range(_MAX_SWEEPS):
        for one, two, r, s in classes:
            step = np.clip((rank_load[r] - rank_load[s]) / 2, -quota[two], quota[one])
            quota[one] -= step
            quota[two] += step
            rank_load[r] -= step
            rank_load[s] += step
        if sweep % 8 != 7:
            continue
        descending = np.argsort(-rank_load, axis=0, kind="stable")
        place = np.empty_like(descending)
        np.put_along_axis(place, descending, np.arange(num_ranks)[:, None], axis=0)
        # An expert is confined to the first ranks that hold all its copies.
        last = np.maximum.reduceat(place[rank_of], first, axis=0)
        held = np.bincount((last * num + columns).ravel(), weight.ravel(), num_ranks * num)
        bound = np.cumsum(held.reshape(num_ranks, num), axis=0) / size
        best = bound.argmax(axis=0)
        upper = rank_load.max(axis=0)
        if (upper - bound[best, columns]).mean() < GAP:
            break
    return quota, upper, (place <= best).T


def exact_optima(holds: Array, loads: Array) -> Array:
    """The optimum T* of each load, [K], by the exact solver.

    Args:
        holds: [E, R] bool, the ranks that hold each expert.
        loads: [K, E], each sums to R.
    """
    num_ranks = holds.shape[1]
    # The ranks of each expert in descending order, so that column 0 is a copy.
    copy_rank = np.sort(np.where(holds, np.arange(num_ranks), -1), axis=1)[:, ::-1]
    network = Network(copy_rank, num_ranks)
    # Tokens of the mean rank: so many that their rounding is far below the differences of tables.
    tokens = 2**28 // num_ranks
    whole = np.rint(loads * tokens).astype(np.int64)
    return np.array([float(solve(load, network).bound) / tokens for load in whole])


def _pairs(table: Array, num_ranks: int, empty: int) -> list[tuple[Array, ...]]:
    """Pairs of slots with copies of one expert: slots one and two, and their ranks.

    They come in classes that use each rank once at most. Each of many copies is paired with the
    next two.
    """
    num_local = table.size // num_ranks
    classes: list[tuple[set[int], list[tuple[int, int]]]] = []
    slots: dict[int, list[int]] = {}
    for slot, expert in enumerate(table.tolist()):
        if expert != empty:
            slots.setdefault(expert, []).append(slot)
    for copies in slots.values():
        n = len(copies)
        near = {tuple(sorted((i, (i + d) % n))) for i in range(n) for d in (1, 2) if n > d}
        for i, j in sorted(near):
            pair = copies[i], copies[j]
            ranks = {slot // num_local for slot in pair}
            chosen = next((c for c in classes if not c[0] & ranks), None)
            if chosen is None:
                chosen = (set(), [])
                classes.append(chosen)
            chosen[0].update(ranks)
            chosen[1].append(pair)
    pairs = [np.array(members).T for _, members in classes]
    return [(one, two, one // num_local, two // num_local) for one, two in pairs]
