"""EPLB's policy: the hottest experts get the most copies, packed on ranks by load.

These are the two policies of EPLB (Expert Parallelism Load Balancer, github.com/deepseek-ai/EPLB).
Hierarchical: groups of experts are packed on nodes; each node's hottest experts are replicated,
and its copies packed on its ranks. Global: the same with one group on one node. The "even split" is
EPLB's model of rank loads: each of an expert's copies gets an equal share of its load.

The same load gives the same table on every rank. Ties go to the lower expert, then the lower rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .homes import even_homes
from .inputs import expert_groups, expert_load, ranks_per_node, slots_per_rank, whole

Array = npt.NDArray[Any]


def fill_from_history(
    load: npt.ArrayLike,
    num_ranks: int,
    num_redundant_per_rank: int,
    num_ranks_per_node: int | None,
    num_groups: int | None,
) -> dict[str, Any]:
    """The arguments of the placement that `Placement.from_history` makes, which documents these.

    Raises:
        PlacementError: names the argument that does not fit, or the expert with a bad load.
    """
    weight = expert_load(load)
    num_ranks = whole("num_ranks", num_ranks)
    node = ranks_per_node(num_ranks, num_ranks_per_node)
    nodes, groups = num_ranks // node, expert_groups(weight.size, num_groups)
    if groups % nodes:
        nodes = groups = 1
    slots = slots_per_rank(weight.size, num_ranks, num_redundant_per_rank, nodes)
    table = rebalance(weight, num_ranks, slots, nodes, groups).ravel()
    return {
        "physical_to_logical": table,
        "num_ranks": num_ranks,
        "num_experts": weight.size,
        "num_ranks_per_node": node,
        "home": even_homes(table, weight.size, num_ranks),
    }


def rebalance(
    load: Array, num_ranks: int, num_local_slots: int, num_nodes: int = 1, num_groups: int = 1
) -> Array:
    """Replicates the hottest experts and packs all copies on ranks.

    Args:
        load: [E] float64, at least 0.
        num_ranks: R, a multiple of `num_nodes`.
        num_local_slots: slots on each rank, from E / R to E / num_nodes, so that no rank must
            hold an expert twice.
        num_nodes: nodes of R / num_nodes ranks; an expert's copies stay on one node.
        num_groups: groups of E / num_groups consecutive experts, a multiple of `num_nodes`; a
            group stays on one node.

    Returns:
        [R, num_local_slots] int64, the expert in each slot. On a rank they are in descending order
        of even split, but for copies that were swapped apart.
    """
    size = load.size // num_groups
    table = []
    for groups in pack(load.reshape(num_groups, size).sum(axis=1), num_nodes):
        experts = (groups[:, None] * size + np.arange(size)).ravel()
        table.append(experts[_fill_node(load[experts], num_ranks // num_nodes, num_local_slots)])
    return np.concatenate(table)


def pack(load: Array, num_packs: int) -> Array:
    """Packs items in descending order of load, each on the lightest pack that is not full.

    Args:
        load: [n] float64; `num_packs` must divide n.
        num_packs: packs of n / num_packs items.

    Returns:
        [num_packs, n / num_packs] int64, the items of each pack in the order they were packed.
        With one item a pack, pack i holds item i.
    """
    size = load.size // num_packs
    if size == 1:
        return np.arange(num_packs)[:, None]
    items: list[list[int]] = [[] for _ in range(num_packs)]
    total = np.zeros(num_packs)
    for item in np.argsort(-load, kind="stable").tolist():
        lightest = int(total.argmin())
        items[lightest].append(item)
        total[lightest] = total[lightest] + load[item] if len(items[lightest]) < size else np.inf
    return np.array(items)


def replicate(load: Array, num_slots: int, most: int) -> Array:
    """Gives each further slot to the expert whose copies are the most loaded.

    Args:
        load: [E] float64.
        num_slots: in [E, E * most].
        most: most copies of one expert.

    Returns:
        [num_slots] int64, the expert of each slot: all experts in order, then the replicas.
    """
    expert = np.arange(num_slots)
    copies = np.ones(load.size)
    for slot in range(load.size, num_slots):
        more = copies < most
        share = load / copies
        if not share[more].any():  # experts without load are alike, and take turns
            share = 1 / copies
        expert[slot] = np.where(more, share, -1).argmax()
        copies[expert[slot]] += 1
    return expert


def _fill_node(load: Array, num_ranks: int, num_local_slots: int) -> Array:
    """[num_ranks, num_local_slots]: experts of one node's slots.

    EPLB may put two copies of an expert on one rank. The second one is worth nothing to a plan
    that is made for each batch. So no expert gets more copies than ranks, unless EPLB's own packing
    has the smaller maximum of the even split. Copies that still meet are swapped apart where that
    maximum allows.
    """

    def candidate(most: int) -> tuple[Array, Array]:
        expert = replicate(load, num_ranks * num_local_slots, most)
        share = load / np.bincount(expert)
        return expert[pack(share[expert], num_ranks)], share

    table, share = min(
        (candidate(most) for most in (num_ranks, num_ranks * num_local_slots)),
        key=lambda packed: packed[1][packed[0]].sum(axis=1).max(),
    )
    _separate_copies(table, share)
    return table


def _separate_copies(table: Array, share: Array) -> None:
    """Swaps second copies off their rank, in place, never above the present maximum rank load."""
    moved = True
    while moved:
        moved = False
        for rank, slots in enumerate(table):
            for slot, expert in enumerate(slots):
                if expert not in slots[:slot]:
                    continue
                load = share[table].sum(axis=1)
                gain = share[table] - share[expert]
                heavier = np.maximum(load[rank] + gain, load[:, None] - gain)
                holds = (table == expert).any(axis=1, keepdims=True)
                heavier[holds | np.isin(table, slots)] = np.inf
                other = np.unravel_index(heavier.argmin(), table.shape)
                if heavier[other] <= load.max():
                    table[rank, slot], table[other] = table[other], expert
                    moved = True
