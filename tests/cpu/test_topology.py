"""LPLB's topologies: the tables that LPLB makes, and the arguments that are refused."""

import numpy as np
import pytest
import torch
from builders import history, ranks_of

from lplb_ep.errors import PlacementError
from lplb_ep.placement.table import Placement


def named_topology(name, num_ranks):
    """The tables as LPLB writes them, ring and torus by their formulas."""
    if name == "cube":
        return np.array([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]).T
    if name == "hypercube":
        rings = [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14]
        return np.array([rings, [12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]).T
    if name.startswith("ring"):
        size = int(name[5:] or num_ranks)
        return np.array([[(rank + 1) % size] for rank in range(size)])
    rows, columns = map(int, name[6:].split("x"))
    return np.array(
        [
            [(i + 1) % rows * columns + j, i * columns + (j + 1) % columns]
            for i in range(rows)
            for j in range(columns)
        ]
    )


def lplb_table(r2o, homes, num_redundant_per_rank):
    """[R, slots]: LPLB's physical experts, given each rank's home experts, hottest first."""
    table = []
    for rank, home in enumerate(homes):
        group = rank // len(r2o) * len(r2o)
        replicas = []
        for combined in range(num_redundant_per_rank // len(r2o[0])):
            for column, original in enumerate(r2o[rank - group]):
                k = combined * len(r2o[0]) + column
                replicas.append(homes[group + original][k])
        table.append([*home, *replicas])
    return table


@pytest.mark.parametrize("with_load", [False, True])
@pytest.mark.parametrize("combined", [1, 2])
@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [
        ("cube", 8),
        ("cube", 32),
        ("hypercube", 16),
        ("hypercube", 32),
        ("ring", 5),
        ("ring", 2),
        ("ring:4", 12),
        ("torus:2x4", 8),
        ("torus:3x2", 12),
        ("torus:4x4", 16),
    ],
)
def test_topology_makes_the_table_of_lplb(name, num_ranks, combined, with_load):
    r2o = named_topology(name, num_ranks)
    size, columns = r2o.shape
    local = 5
    experts, redundant = num_ranks * local, combined * columns
    load = history(num_ranks, experts) if with_load else None
    placement = Placement.from_topology(
        name,
        num_experts=experts,
        num_ranks=num_ranks,
        num_redundant_per_rank=redundant,
        load=load,
    )
    assert placement.num_local_slots == local + redundant
    table = placement.physical_to_logical.reshape(num_ranks, -1)
    homes = table[:, :local]
    assert sorted(homes.ravel()) == list(range(experts))
    assert table.tolist() == lplb_table(r2o.tolist(), homes.tolist(), redundant)
    if with_load:
        assert (np.diff(load[homes], axis=1) <= 0).all()
        # Greedy packing by descending load, written out once more.
        total, packed = [0] * num_ranks, [[] for _ in range(num_ranks)]
        for expert in np.argsort(-load, kind="stable").tolist():
            rank = min(
                (r for r in range(num_ranks) if len(packed[r]) < local), key=total.__getitem__
            )
            packed[rank].append(expert)
            total[rank] += int(load[expert])
        assert homes.tolist() == packed
    else:
        assert homes.ravel().tolist() == list(range(experts))

    # What a plan relies on.
    assert (placement.home % placement.num_local_slots < local).all()
    replicated = set(homes[:, :redundant].ravel().tolist())
    for expert in range(experts):
        ranks = ranks_of(placement, expert).tolist()
        assert len(set(ranks)) == len(ranks) == (2 if expert in replicated else 1)
        assert len({rank // size for rank in ranks}) == 1
    group = np.arange(num_ranks) // size
    assert (
        (placement.component[:, None] == placement.component) == (group[:, None] == group)
    ).all()
    for column in range(redundant):
        copied = placement.home_rank[table[:, local + column]]
        assert sorted(copied) == list(range(num_ranks))
        assert (copied != np.arange(num_ranks)).all()


# Computed with LPLB's planner (its torch code on the CPU): "cube" on 16 ranks in nodes of 8, and on
# one node of 16. Nodes of 8 make two expert groups on two nodes.
LPLB_TABLES = [
    (
        (7, 32, 1),
        8,
        "1 6 8 13 5 3 1 9 7 12 5 4 8 11 7 10 2 4 14 6 0 10 2 3 15 13 0 12 14 9 15 11 16 24 17 30 "
        "19 23 16 29 27 21 19 31 17 20 27 26 28 31 25 24 18 26 28 23 22 30 18 21 25 29 22 20",
    ),
    (
        (8, 48, 3),
        16,
        "42 39 24 20 11 1 8 34 42 47 40 32 43 1 31 20 25 21 40 10 4 31 12 3 39 38 10 13 4 8 14 11 "
        "16 38 32 3 47 23 14 25 46 35 2 19 9 41 22 0 46 45 37 7 33 41 29 19 6 44 37 36 28 29 26 17 "
        "35 30 36 15 28 22 18 9 27 30 7 17 45 5 18 6",
    ),
]


@pytest.mark.parametrize(("recipe", "num_ranks_per_node", "expected"), LPLB_TABLES)
def test_topology_with_load_makes_the_tables_that_lplb_made(recipe, num_ranks_per_node, expected):
    placement = Placement.from_topology(
        "cube",
        num_experts=recipe[1],
        num_ranks=16,
        load=history(*recipe),
        num_ranks_per_node=num_ranks_per_node,
    )
    assert placement.physical_to_logical.tolist() == list(map(int, expected.split()))
    assert placement.num_ranks_per_node == num_ranks_per_node


def test_topology_on_nodes_follows_the_number_of_groups():
    def groups_of_ranks(topology, num_ranks_per_node):
        placement = Placement.from_topology(
            topology,
            num_experts=64,
            num_ranks=16,
            load=history(3, 64),
            num_ranks_per_node=num_ranks_per_node,
        )
        table = placement.physical_to_logical.reshape(16, -1)[:, :4]
        return [set(table[start : start + 4].ravel().tolist()) for start in range(0, 16, 4)]

    # Two groups of ranks, two nodes: each keeps its half of the experts.
    halves = groups_of_ranks("cube", 8)
    assert halves[0] | halves[1] == set(range(32))
    # Four groups, two nodes: quarters of the experts are paired by load, but not split.
    quarters = groups_of_ranks("ring:4", 8)
    on_first_node = quarters[0] | quarters[1]
    quarter_load = history(3, 64).reshape(4, 16).sum(axis=1)
    heaviest, lightest = quarter_load.argmax(), quarter_load.argmin()
    assert on_first_node >= set(range(heaviest * 16, heaviest * 16 + 16))
    assert on_first_node >= set(range(lightest * 16, lightest * 16 + 16))
    # One group, two nodes: packed over all ranks, as without nodes.
    assert groups_of_ranks("hypercube", 8) == groups_of_ranks("hypercube", None)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_custom_topology(kind):
    r2o = [[1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 1, 2]]
    placement = Placement.from_topology(kind(r2o), num_experts=12, num_ranks=4)
    assert placement.physical_to_logical.reshape(4, 6).tolist() == lplb_table(
        r2o, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]], 3
    )
    ring = Placement.from_topology([[1], [2], [0]], num_experts=6, num_ranks=6)
    assert ring == Placement.from_topology("ring:3", num_experts=6, num_ranks=6)


def test_torus_without_a_shape_is_as_square_as_possible():
    for num_ranks, shape in ((8, "2x4"), (12, "3x4"), (16, "4x4"), (20, "4x5"), (64, "8x8")):
        make = {"num_experts": 2 * num_ranks, "num_ranks": num_ranks}
        assert Placement.from_topology("torus", **make) == Placement.from_topology(
            f"torus:{shape}", **make
        )


@pytest.mark.parametrize(
    ("topology", "changes", "message"),
    [
        ("pyramid", {}, "topology must be cube, hypercube, .* got 'pyramid'"),
        ("cube:8", {}, "got 'cube:8'"),
        ("ring:x", {}, "got 'ring:x'"),
        ("torus:8", {}, "got 'torus:8'"),
        ("cube", {"num_ranks": 4}, "groups of 8 ranks with 2 columns, 4 ranks"),
        ("cube", {"num_ranks": 12, "num_experts": 36}, "groups of 8 ranks .* 12 ranks"),
        ("hypercube", {}, "groups of 16 ranks with 2 columns, 8 ranks"),
        ("ring:3", {}, "groups of 3 ranks with 1 columns, 8 ranks"),
        ("ring:0", {}, "groups of 0 ranks"),
        ("ring", {"num_ranks": 1}, "column 0 .* copies rank 0 to itself \\(a ring needs two ranks"),
        ("torus", {"num_ranks": 7, "num_experts": 14}, "column 0 .* rank 0 to itself .* two rows"),
        ("torus:4x1", {"num_ranks": 4}, "column 1 of the topology copies rank 0 to itself"),
        ([[1, 0], [0, 1]], {}, "column 1 of the topology copies rank 0 to itself"),
        ([[1], [1]], {}, "column 0 .* permutation of the ranks 0 to 1: rank 0 is in it 0 times"),
        ([[1], [2]], {}, "rank 0 is in it 0 times"),
        ([[-1], [0]], {}, "rank 1 is in it 0 times"),
        ([1, 0], {}, "topology must be integers with 2 dimensions, got shape \\[2\\]"),
        ([[0.5], [1.0]], {}, "topology must be integers"),
        (np.empty((0, 2), int), {}, "groups of 0 ranks"),
        (np.empty((8, 0), int), {}, "with 0 columns"),
        ("cube", {"num_experts": 36}, "num_ranks must divide num_experts: 8 does not divide 36"),
        ("cube", {"num_redundant_per_rank": 3}, "multiple of .* 2 columns, up to .* = 4; got 3"),
        ("cube", {"num_redundant_per_rank": 6}, "up to num_experts / num_ranks = 4; got 6"),
        ("cube", {"num_redundant_per_rank": 0}, "num_redundant_per_rank .* at least 1, got 0"),
        ("cube", {"num_experts": 8}, "up to num_experts / num_ranks = 1; got 2"),
        ("cube", {"num_experts": 32.0}, "num_experts must be a whole number .* got 32.0"),
        ("cube", {"num_ranks_per_node": 3}, "3 does not divide 8"),
        ("cube", {"load": [1] * 31}, "one entry per expert: 32, got 31"),
    ],
)
def test_topology_refuses_by_name(topology, changes, message):
    keywords = {"num_experts": 32, "num_ranks": 8, **changes}
    with pytest.raises(PlacementError, match=message):
        Placement.from_topology(topology, **keywords)
