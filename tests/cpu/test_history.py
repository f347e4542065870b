"""Placements from a history of loads: no worse than EPLB's, and the arguments that are refused."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from builders import history, ranks_of

from lplb_ep.errors import PlacementError
from lplb_ep.placement import eplb
from lplb_ep.placement.table import Placement


def even_split(placement, load):
    """The largest rank load where each copy gets an equal share of its expert's load, exactly."""
    table = placement.physical_to_logical
    copies = np.bincount(table)
    return max(
        sum(Fraction(int(load[expert]), int(copies[expert])) for expert in rank)
        for rank in table.reshape(placement.num_ranks, -1)
    )


def second_copies(placement):
    return int((placement.logical_to_physical >= 0).sum() - (placement.copy_rank >= 0).sum())


def test_history_makes_the_example_of_eplb():
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    expected = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    for load, table in zip(loads, expected, strict=True):
        # EPLB's 16 replicas on 8 GPUs: 12 experts need 2 slots a rank, which leaves 4 replicas.
        placement = Placement.from_history(
            load, num_ranks=8, num_redundant_per_rank=0, num_ranks_per_node=4, num_groups=4
        )
        assert placement.physical_to_logical.tolist() == table
        assert (placement.num_experts, placement.num_ranks_per_node) == (12, 4)


# seed, power, experts, ranks, redundant per rank, ranks per node, groups, EPLB's largest even split
EPLB_RESULTS = [
    (0, 1, 64, 8, 1, None, None, 4153787.000),
    (0, 3, 64, 8, 1, None, None, 2075306.500),
    (1, 1, 64, 8, 2, None, None, 4420795.500),
    (1, 3, 64, 8, 2, None, None, 2237696.500),
    (2, 1, 256, 32, 1, None, None, 4172554.500),
    (2, 3, 256, 32, 1, None, None, 2091928.500),
    (3, 1, 256, 64, 1, 8, 8, 2442801.500),
    (3, 3, 256, 64, 1, 8, 8, 1292110.000),
    (4, 1, 256, 32, 2, 8, 8, 4769550.500),
    (4, 3, 256, 32, 2, 8, 8, 2616121.500),
    (5, 1, 256, 16, 2, 8, 1, 8199899.500),
    (5, 3, 256, 16, 2, 8, 1, 4054569.500),
    (6, 1, 128, 8, 4, None, None, 9046909.000),
    (6, 3, 128, 8, 4, None, None, 5009702.000),
    (7, 1, 64, 16, 2, 8, 4, 2209755.500),
    (7, 3, 64, 16, 2, 8, 4, 1055460.250),
    (8, 1, 16, 2, 2, None, None, 3800145.500),
    (8, 3, 16, 2, 2, None, None, 1650194.000),
    (9, 1, 16, 4, 3, None, None, 2642966.500),
    (9, 3, 16, 4, 3, None, None, 1643896.000),
    (10, 1, 8, 8, 1, None, None, 603003.667),
    (10, 3, 8, 8, 1, None, None, 407192.667),
    (11, 1, 60, 12, 1, 6, 2, 2588512.000),
    (11, 3, 60, 12, 1, 6, 2, 1246173.500),
]


@pytest.mark.parametrize("case", EPLB_RESULTS)
def test_history_packs_as_well_as_eplb(case):
    seed, power, experts, ranks, redundant, node, groups, expected = case
    load = history(seed, experts, power)
    placement = Placement.from_history(
        load,
        num_ranks=ranks,
        num_redundant_per_rank=redundant,
        num_ranks_per_node=node,
        num_groups=groups,
    )
    assert placement.num_local_slots == experts // ranks + redundant
    assert (placement.physical_to_logical >= 0).all()
    assert float(even_split(placement, load)) <= expected + 1e-3
    nodes = 1 if node is None else ranks // node
    if groups is not None and groups % nodes == 0:
        group_nodes = [set() for _ in range(groups)]
        for expert in range(experts):
            group_nodes[expert * groups // experts] |= set(
                placement.node[ranks_of(placement, expert)]
            )
        assert all(len(on) == 1 for on in group_nodes)


def test_history_sums_batches_and_takes_any_numbers():
    load = history(1, 64)
    make = {"num_ranks": 8, "num_redundant_per_rank": 2}
    expected = Placement.from_history(load, **make)
    parts = np.stack([load // 3, load - load // 3])
    for same in (load.tolist(), load * 0.5, torch.tensor(load), torch.tensor(parts), parts):
        assert Placement.from_history(same, **make) == expected
    small = load % 256  # exact in bfloat16
    assert Placement.from_history(torch.tensor(small).bfloat16(), **make) == Placement.from_history(
        small, **make
    )


def test_history_without_nodes_in_the_way_is_global():
    load = history(2, 64, 3)
    make = {"num_ranks": 16, "num_redundant_per_rank": 1}
    global_policy = Placement.from_history(load, **make)
    for keywords in (
        {"num_groups": 4},
        {"num_ranks_per_node": 4, "num_groups": 2},
        {"num_groups": 1},
    ):
        placement = Placement.from_history(load, **make, **keywords)
        assert placement.physical_to_logical.tolist() == global_policy.physical_to_logical.tolist()
    hierarchical = Placement.from_history(load, **make, num_ranks_per_node=4, num_groups=4)
    assert set(hierarchical.node[hierarchical.copy_rank[:16]].ravel()) != {0, 1, 2, 3}


@pytest.mark.parametrize("num_experts", [16, 20, 5])
def test_history_fills_all_slots_where_ranks_do_not_divide_experts(num_experts):
    load = history(5, num_experts)
    placement = Placement.from_history(load, num_ranks=8, num_redundant_per_rank=1)
    assert placement.num_local_slots == -(-num_experts // 8) + 1
    assert (placement.physical_to_logical >= 0).all()


def test_history_without_load_replicates_each_expert_once():
    placement = Placement.from_history(np.zeros(16), num_ranks=8, num_redundant_per_rank=2)
    assert np.bincount(placement.physical_to_logical).tolist() == [2] * 16
    assert second_copies(placement) == 0
    # And one expert with all the load gets a copy on every rank, the others share the rest.
    placement = Placement.from_history([7] + [0] * 15, num_ranks=8, num_redundant_per_rank=2)
    copies = np.bincount(placement.physical_to_logical)
    assert (copies[0], copies[1:].max() - copies[1:].min(), second_copies(placement)) == (8, 1, 0)


def test_history_ties_go_to_the_lower_expert_and_rank():
    placement = Placement.from_history([3] * 6, num_ranks=3, num_redundant_per_rank=1)
    assert np.bincount(placement.physical_to_logical).tolist() == [2, 2, 2, 1, 1, 1]
    assert placement.physical_to_logical.tolist() == [3, 2, 1, 4, 0, 1, 5, 2, 0]


@pytest.mark.parametrize(
    ("table", "share", "expected"),
    [
        # Rank loads 9, 7: against expert 2 they become 8, 8; against expert 1 or 4, 7 and 9.
        ([[0, 0, 3], [1, 2, 4]], [4, 2, 3, 1, 2], [[0, 2, 3], [1, 0, 4]]),
        # Rank loads 9, 7: any partner makes one of them 10.
        ([[0, 0, 2], [1, 3, 4]], [4, 5, 1, 1, 1], [[0, 0, 2], [1, 3, 4]]),
        # The only rank without expert 0 is the third.
        ([[0, 0], [1, 0], [2, 3]], [1, 1, 1, 2], [[0, 2], [1, 0], [0, 3]]),
        # Both ranks hold a pair: one swap parts both.
        ([[0, 0], [1, 1]], [1, 1], [[0, 1], [0, 1]]),
        # An expert with more copies than ranks cannot be parted.
        ([[0, 0], [0, 1]], [1, 1], [[0, 0], [0, 1]]),
    ],
)
def test_second_copies_are_swapped_apart_where_no_rank_gets_above_the_maximum(
    table, share, expected
):
    table = np.array(table)
    eplb._separate_copies(table, np.array(share, float))
    assert table.tolist() == expected


def test_history_gives_an_expert_more_copies_than_ranks_only_where_they_pack_better():
    # Four copies of expert 2 pack into 2 + 2 + 2; three and a copy of expert 0 into 7/3 + ...
    placement = Placement.from_history([1, 1, 4], num_ranks=3, num_redundant_per_rank=1)
    assert np.bincount(placement.physical_to_logical).tolist() == [1, 1, 4]
    assert even_split(placement, [1, 1, 4]) == 2
    # Five copies of expert 0 make 61 + 42.
    placement = Placement.from_history([100, 1, 1, 1], num_ranks=2, num_redundant_per_rank=2)
    assert np.bincount(placement.physical_to_logical).tolist() == [2, 2, 2, 2]
    assert even_split(placement, [100, 1, 1, 1]) == Fraction(103, 2)


def test_replicas_go_to_the_most_loaded_copies_up_to_a_limit():
    load = np.array([3.0, 12.0, 5.0])
    assert eplb.replicate(load, 3, 1).tolist() == [0, 1, 2]
    assert eplb.replicate(load, 8, 8).tolist() == [0, 1, 2, 1, 1, 2, 1, 0]
    assert eplb.replicate(load, 8, 3).tolist() == [0, 1, 2, 1, 1, 2, 0, 2]


def test_history_is_never_worse_for_its_care_for_second_copies():
    ranks, slots, parted = 4, 11, 0
    for seed in range(12):
        load = history(seed, 32, 3)
        expert = eplb.replicate(load, ranks * slots, ranks * slots)
        share = load / np.bincount(expert)
        plain = Placement(expert[eplb.pack(share[expert], ranks)].ravel(), ranks)
        placement = Placement.from_history(load, num_ranks=ranks, num_redundant_per_rank=3)
        assert even_split(placement, load) <= even_split(plain, load)
        assert second_copies(placement) <= second_copies(plain)
        parted += second_copies(plain) - second_copies(placement)
    assert parted > 0


@pytest.mark.parametrize(
    ("load", "changes", "message"),
    [
        (np.ones(30), {"num_groups": 4}, "num_groups must divide .* experts: 4 does not divide 30"),
        (np.ones(32), {"num_groups": 0}, "num_groups must be a whole number"),
        (np.ones(32), {"num_ranks": 0}, "num_ranks must be a whole number"),
        (np.ones(32), {"num_ranks_per_node": 3}, "3 does not divide 8"),
        (np.ones(32), {"num_redundant_per_rank": -1}, "at least 0, got -1"),
        (np.ones(8), {"num_redundant_per_rank": 8}, "9 slots on a rank, for 8 experts; got 8"),
        (
            np.ones(8),
            {"num_redundant_per_rank": 4, "num_ranks_per_node": 4, "num_groups": 2},
            "5 slots on a rank, for 4 experts of its node; got 4",
        ),
        ([1, 2, -3, 4], {}, "load of expert 2 must be finite and at least 0, got -3"),
        ([[1, 2, 3], [1, float("nan"), 3]], {}, "load of expert 1 must be finite .* got nan"),
        ([1, float("inf"), 1], {}, "load of expert 1 must be finite"),
        (
            np.ones((2, 2, 2)),
            {},
            "load must be numbers \\[E\\] or \\[N, E\\], got shape \\[2, 2, 2\\]",
        ),
        (3.0, {}, "load must be numbers"),
        ([], {}, "load must be numbers .* got shape \\[0\\]"),
        (["1", "2"], {}, "load must be numbers"),
        ([True, False], {}, "of bool"),
        ([[1, 2], [1]], {}, "unequal length"),
    ],
)
def test_history_refuses_by_name(load, changes, message):
    keywords = {"num_ranks": 8, "num_redundant_per_rank": 1, **changes}
    with pytest.raises(PlacementError, match=message):
        Placement.from_history(load, **keywords)
