"""Tables that searches start from: replicas by expected load, on ranks that share few experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..eplb import pack, replicate

Array = npt.NDArray[Any]

# Powers of the load by which starts give out copies: less than 1 makes more pairs of copies.
_FLATTEN = (0.6, 0.8, 0.5, 0.4, 1.0, 0.3, 0.2)
# Steps of the walks between ranks that a start avoids.
_WALK = 6


def starts(
    loads: Array,
    seen: Array,
    num_ranks: int,
    num_local_slots: int,
    num_nodes: int,
    num_groups: int,
) -> Iterator[Array]:
    """Tables to choose from, each [P]; groups of experts are packed on nodes as EPLB packs them.

    The most even table comes first, since a time budget may end the search there.

    Args:
        loads: [K, E] scenarios.
        seen: [E] mean load of the samples.
        num_ranks: R, a multiple of `num_nodes`.
        num_local_slots: slots on each rank.
        num_nodes: nodes that an expert's copies stay within.
        num_groups: groups of consecutive experts that stay on one node.
    """
    expected = loads.mean(axis=0)
    size, ranks = expected.size // num_groups, num_ranks // num_nodes
    nodes = pack(expected.reshape(num_groups, size).sum(axis=1), num_nodes)
    experts = [(groups[:, None] * size + np.arange(size)).ravel() for groups in nodes]
    kinds: list[tuple[Callable[..., Array], Array]] = [
        *((partial(expander, flatten=power), expected[None]) for power in _FLATTEN),
        *((partial(expander, flatten=power), loads) for power in _FLATTEN[:3]),
    ]
    if experts[0].size % ranks == 0 and num_local_slots <= 2 * experts[0].size // ranks:
        kinds += [(pairs, expected), (pairs, seen)]
    for kind, load in kinds:
        rows = [e[kind(load[..., e], ranks, num_local_slots)] for e in experts]
        yield np.concatenate(rows).ravel()


def expander(loads: Array, num_ranks: int, num_local_slots: int, flatten: float = 1.0) -> Array:
    """Copies by load, on ranks that few short paths of shared experts join: a replica graph that
    resembles an expander.

    Each further slot goes to the expert whose copies are most loaded. Experts with several copies
    are laid first, the heaviest first, one slot of every rank at a time, then the others. So ranks
    differ little in the load that they can pass on. A copy goes where it repeats the fewest paths
    between ranks, then to the rank that is lightest when the copy is heavy. So experts that drift
    together are separated, too.

    Args:
        loads: [K, E] float64, scenarios or their mean alone.
        num_ranks: R.
        num_local_slots: slots on each rank.
        flatten: power of the load by which copies are given out: less than 1 for more pairs.

    Returns:
        [R, num_local_slots] int64.
    """
    load = loads.mean(axis=0)
    expert = replicate(load**flatten, num_ranks * num_local_slots, num_ranks)
    copies = np.bincount(expert)
    share = load / copies
    holds = np.zeros((load.size, num_ranks), bool)
    shared = np.zeros((num_ranks, num_ranks))
    total, filled = np.zeros((num_ranks, len(loads))), np.zeros(num_ranks, int)
    table = np.zeros((num_ranks, num_local_slots), int)
    for e in expert[np.lexsort((expert, -share[expert], copies[expert] == 1))]:
        near = holds[e].astype(float)
        for _ in range(_WALK):
            # Never BLAS, as @ is: its sums depend on the number of threads.
            near = near + np.einsum("rs,s->r", shared, near)
        # The keys in order: not twice on a rank, all ranks equally full, new pairs, light ranks.
        full = np.where(filled < num_local_slots, 0, np.inf)
        weight = np.einsum("rk,k->r", total, loads[:, e])
        rank = np.lexsort((weight, near, filled, holds[e], full))[0]
        shared[rank, holds[e]] += 1
        shared[holds[e], rank] += 1
        holds[e, rank] = True
        table[rank, filled[rank]] = e
        filled[rank] += 1
        total[rank] += loads[:, e] / copies[e]
    return table


def pairs(load: Array, num_ranks: int, num_local_slots: int) -> Array:
    """LPLB's kind of table: experts packed by load, each rank's heaviest copied to other ranks.

    Each of a rank's replicas is at a distance of its own.

    Args:
        load: [E] float64; R divides E.
        num_ranks: R.
        num_local_slots: from E / R to 2 E / R.

    Returns:
        [R, num_local_slots] int64.
    """
    home = pack(load, num_ranks)
    more = num_local_slots - home.shape[1]
    shift = np.maximum(
        np.rint(num_ranks ** (np.arange(more) / max(more, 1))), np.arange(1, more + 1)
    )
    source = (np.arange(num_ranks)[:, None] + shift.astype(int)) % num_ranks
    return np.concatenate([home, home[source, np.arange(more)]], axis=1)
