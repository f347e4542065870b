import copy
import doctest
import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lplb_ep.errors import PlacementError
from lplb_ep.layer import layer_of
from lplb_ep.placement import eplb
from lplb_ep.placement.layer_files import load_placements, save_placements
from lplb_ep.placement.table import Placement

# Three ranks of four slots, two of them unused. Expert 0 is on every rank, expert 4 twice on rank
# 1, expert 1 on ranks 2 (local slot 1) and 0 (local slot 3).
TABLE = [0, 2, -1, 1, 4, 3, 4, 0, 0, 1, -1, 5]


def history(seed, num_experts, power=1):
    """Loads below 2**20 from raw bits, which NumPy keeps the same in every version."""
    bits = np.random.PCG64(seed).random_raw(num_experts) >> np.uint64(44)
    return (bits if power == 1 else bits**3 >> np.uint64(40)).astype(np.int64)


def even_split(placement, load):
    """The largest rank load where each copy gets an equal share of its expert's load, exactly."""
    table = placement.physical_to_logical
    copies = np.bincount(table)
    return max(
        sum(Fraction(int(load[expert]), int(copies[expert])) for expert in rank)
        for rank in table.reshape(placement.num_ranks, -1)
    )


def ranks_of(placement, expert):
    return np.flatnonzero(placement.physical_to_logical == expert) // placement.num_local_slots


def second_copies(placement):
    return int((placement.logical_to_physical >= 0).sum() - (placement.copy_rank >= 0).sum())


# The tables.


def test_tables_of_a_small_placement():
    placement = Placement(TABLE, 3)
    assert (placement.num_ranks, placement.num_ranks_per_node, placement.num_experts) == (3, 3, 6)
    assert (placement.num_physical_experts, placement.num_local_slots) == (12, 4)
    assert placement.max_replicas == 3
    assert placement.physical_to_logical.tolist() == TABLE
    assert placement.logical_to_physical.tolist() == [
        [0, 8, 7],  # by local slot, then by rank
        [9, 3, -1],
        [1, -1, -1],
        [5, -1, -1],
        [4, 6, -1],
        [11, -1, -1],
    ]
    assert placement.copy_rank.tolist() == [
        [0, 2, 1],
        [2, 0, -1],
        [0, -1, -1],
        [1, -1, -1],
        [1, -1, -1],  # the second copy on rank 1 never gets tokens
        [2, -1, -1],
    ]
    assert placement.home.tolist() == [0, 9, 1, 5, 4, 11]
    assert placement.home_rank.tolist() == [0, 2, 0, 1, 1, 2]
    assert placement.node.tolist() == [0, 0, 0]
    for name in ("physical_to_logical", "logical_to_physical", "copy_rank", "node", "component"):
        assert getattr(placement, name).dtype == np.int32


def test_home_moves_column_zero():
    placement = Placement(TABLE, 3, home=torch.tensor([7, 3, 1, 5, 6, 11]))
    assert placement.logical_to_physical[[0, 1, 4]].tolist() == [[7, 0, 8], [3, 9, -1], [6, 4, -1]]
    assert placement.copy_rank[[0, 1, 4]].tolist() == [[1, 0, 2], [0, 2, -1], [1, -1, -1]]
    assert placement != Placement(TABLE, 3)
    assert placement != Placement(TABLE, 3, home=[7, 3, 1, 5, 4, 11])
    assert Placement(TABLE, 3, home=[0, 9, 1, 5, 4, 11]) == Placement(TABLE, 3)


def test_three_copies_of_which_two_meet():
    placement = Placement([0, 1, 0, 0], 2)
    assert placement.logical_to_physical.tolist() == [[0, 2, 3], [1, -1, -1]]
    assert placement.copy_rank.tolist() == [[0, 1, -1], [0, -1, -1]]
    placement = Placement([0, 1, 0, 0], 2, home=[3, 1])
    assert placement.logical_to_physical.tolist() == [[3, 0, 2], [1, -1, -1]]
    assert placement.copy_rank.tolist() == [[1, 0, -1], [0, -1, -1]]


@pytest.mark.parametrize("seed", range(20))
def test_tables_agree_with_their_definition(seed):
    rng = np.random.default_rng(seed)
    ranks, local, experts = (int(rng.integers(1, top)) for top in (7, 6, 9))
    local += -(-experts // ranks)
    table = np.full(ranks * local, -1)
    table[:experts] = np.arange(experts)
    table[experts:] = rng.integers(-1, experts, table.size - experts)
    table = rng.permutation(table)
    placement = Placement(table, ranks, num_experts=experts)
    for expert in range(experts):
        slots = [s for s in range(table.size) if table[s] == expert]
        slots.sort(key=lambda slot: (slot % local, slot // local))
        padding = [-1] * (placement.max_replicas - len(slots))
        assert placement.logical_to_physical[expert].tolist() == slots + padding
        seen, expected = set(), []
        for slot in slots:
            expected.append(-1 if slot // local in seen else slot // local)
            seen.add(slot // local)
        assert placement.copy_rank[expert].tolist() == expected + padding
    assert placement.max_replicas == np.bincount(table[table >= 0]).max()


@pytest.mark.parametrize(
    ("table", "num_ranks", "expected"),
    [
        ([0, 1, 2, 3], 4, [0, 1, 2, 3]),
        ([0, 1, 1, 0, 2, 3, 3, 2], 4, [0, 0, 1, 1]),
        ([0, 1, 2, 3, 1, 0, 3, 2], 4, [0, 1, 0, 1]),
        ([0, 1, 1, 2, 2, 3, 3, 4], 4, [0, 0, 0, 0]),  # a chain
        ([0, 0, 1, 1], 2, [0, 1]),  # second copies join nothing
        ([0, -1, -1, -1, 1, 0], 3, [0, 1, 0]),  # a rank without experts
    ],
)
def test_components_are_the_groups_of_ranks_that_share_experts(table, num_ranks, expected):
    component = Placement(table, num_ranks).component
    assert (component[:, None] == component).tolist() == [
        [a == b for b in expected] for a in expected
    ]
    assert sorted(set(component.tolist())) == list(range(len(set(expected))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1, 2], 2), "3 slots, 2 ranks"),
        (([], 1), "physical_to_logical must be integers"),
        ((np.empty(0, int), 1), "0 slots, 1 ranks"),
        (([0, 1], 0), "num_ranks must be a whole number of at least 1, got 0"),
        (([0, 1], 2.0), "num_ranks must be a whole number of at least 1, got 2.0"),
        (([0, 1], 2, None), "num_ranks_per_node"),
        (([0.0, 1.0], 2), "got shape \\[2\\] of float64"),
        (([True, False], 2), "of bool"),
        (([[0, 1]], 2), "got shape \\[1, 2\\]"),
        (([[0, 1], [0]], 2), "unequal length"),
        ((["a", "b"], 2), "physical_to_logical must be integers"),
        (([0, -2], 2), "slot 1 holds expert -2, expected -1 \\(unused\\) or one of \\[0, 1\\)"),
        (([0, 2], 2), "no slot holds expert 1 \\(of 3 experts, in 2 slots\\)"),
        (([-1, -1], 2), "no slot holds expert 0 \\(of 1 experts, in 2 slots\\)"),
        (([0, 10**12], 2), "no slot holds expert 1, 2 \\("),
    ],
)
def test_impossible_tables_are_refused_by_name(arguments, message):
    table, num_ranks, *node = arguments
    keywords = {"num_ranks_per_node": 3} if node else {}
    with pytest.raises(PlacementError, match=message):
        Placement(table, num_ranks, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_experts": 5}, "slot 11 holds expert 5, .* one of \\[0, 5\\)"),
        ({"num_experts": 8}, "no slot holds expert 6, 7 \\(of 8 experts"),
        ({"num_experts": 10**15}, "no slot holds expert 6, 7, 8"),
        ({"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0"),
        ({"num_ranks_per_node": 2}, "num_ranks_per_node must divide num_ranks: 2 does not .* 3"),
        ({"num_ranks_per_node": 0}, "num_ranks_per_node must be a whole number"),
        ({"home": [0, 9, 1, 5, 4]}, "one slot per expert: 6, got 5"),
        ({"home": [0, 9, 1, 5, 7, 11]}, "home of expert 4 is slot 7, which holds expert 0"),
        ({"home": [2, 9, 1, 5, 4, 11]}, "home of expert 0 is slot 2, which holds expert -1"),
        ({"home": [0, 9, 1, 5, 4, 12]}, "home of expert 5 is slot 12, .* no such slot"),
        ({"home": [-1, 9, 1, 5, 4, 11]}, "home of expert 0 is slot -1, .* no such slot"),
        ({"home": 3.5}, "home must be integers"),
    ],
)
def test_arguments_that_do_not_fit_the_table_are_refused_by_name(keywords, message):
    with pytest.raises(PlacementError, match=message):
        Placement(TABLE, 3, **keywords)


# A placement is a value.


def test_equal_placements_from_any_kind_of_integers():
    expected = Placement(TABLE, 3)
    for table in (np.array(TABLE, np.int16), torch.tensor(TABLE), torch.tensor(TABLE).int()):
        placement = Placement(table, np.int64(3), num_experts=np.int32(6))
        assert placement == expected
        assert hash(placement) == hash(expected)
        assert placement.fingerprint() == expected.fingerprint()
    assert expected != TABLE


def test_fingerprint_tells_apart_what_decides_a_plan():
    placements = [
        Placement([0, 1, 1, 0], 2),
        Placement([0, 1, 0, 1], 2),
        Placement([0, 1, 1, 0], 4),
        Placement([0, 1, 1, 0], 1),
        Placement([0, 1, 1, 0], 2, num_ranks_per_node=1),
        Placement([0, 1, 1, 0], 2, home=[3, 2]),
        Placement([0, 1, 1, 0, -1, -1], 2),
    ]
    assert len({p.fingerprint() for p in placements}) == len(placements)
    assert len(set(placements)) == len(placements)


def test_tables_can_be_changed_neither_by_their_owner_nor_through_the_input():
    table = np.array(TABLE, np.int32)
    placement = Placement(table, 3)
    table[:] = 0
    assert placement == Placement(TABLE, 3)
    copies = [placement, copy.copy(placement), copy.deepcopy(placement)]
    copies.append(pickle.loads(pickle.dumps(Placement(TABLE, 3, home=[7, 3, 1, 5, 6, 11]))))
    for value in copies:
        for name in ("physical_to_logical", "logical_to_physical", "copy_rank", "component"):
            with pytest.raises(ValueError, match="read-only"):
                getattr(value, name)[0] = 5
    assert copies[1] == copies[2] == placement
    assert copies[3] == Placement(TABLE, 3, home=[7, 3, 1, 5, 6, 11])


def test_attributes_do_not_change():
    placement = Placement(TABLE, 3)
    attributes = ["num_ranks", "physical_to_logical", "home", "component", "_fingerprint", "other"]
    for name in attributes:
        message = f"the {name} of a Placement does not change: make another one"
        with pytest.raises(FrozenInstanceError, match=message):
            setattr(placement, name, 1)
        with pytest.raises(AttributeError, match=message):
            delattr(placement, name)
    assert placement.component.tolist() == [0, 0, 0]  # found at the first use, and kept
    assert placement.component is placement.component
    assert placement == Placement(TABLE, 3)


@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "cached"])
def test_a_placements_layer_is_no_part_of_its_value(cached):
    plain, in_force = Placement(TABLE, 3), Placement(TABLE, 3)
    if cached:
        for name in ("node", "component"):
            getattr(in_force, name)
        in_force.fingerprint()
    layer = layer_of(in_force)
    assert layer_of(in_force) is layer
    assert in_force == plain
    assert hash(in_force) == hash(plain)
    assert repr(in_force) == repr(plain)
    assert pickle.dumps(in_force) == pickle.dumps(plain)
    duplicates = (copy.copy(in_force), copy.deepcopy(in_force))
    for other in (*duplicates, pickle.loads(pickle.dumps(in_force))):
        assert other == in_force
        assert layer_of(other) is not layer
    assert len({in_force, plain, *duplicates}) == 1


def test_save_and_load(tmp_path):
    path = tmp_path / "placement.json"
    for placement in (
        Placement(TABLE, 3, num_ranks_per_node=1),
        Placement(TABLE, 3, home=[7, 3, 1, 5, 6, 11]),
    ):
        placement.save(path)
        loaded = Placement.load(path)
        assert loaded == placement
        assert (loaded.logical_to_physical == placement.logical_to_physical).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"not json", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1, 2]", "not a placement saved by this version"),
        (b'{"num_ranks": 2, "physical_to_logical": [0, 1]}', "not a placement saved"),
        (b'{"lplb_ep_placement": 2, "num_ranks": 1}', "not a placement saved by this version"),
        (b'{"lplb_ep_placement": 1, "num_ranks": 1}', "physical_to_logical"),
        (b'{"lplb_ep_placement": 1, "num_ranks": 1, "a": 1, "physical_to_logical": [0]}', "'a'"),
        (b'{"lplb_ep_placement": 1, "num_ranks": "2", "physical_to_logical": [0]}', "num_ranks"),
        (b'{"lplb_ep_placement": 1, "num_ranks": 2, "physical_to_logical": [0]}', "1 slots"),
        (b'{"lplb_ep_placement": 1, "num_ranks": 1, "physical_to_logical": {}}', "of object"),
    ],
)
def test_load_names_the_file_that_is_no_placement(tmp_path, text, message):
    path = tmp_path / "some_file.json"
    path.write_bytes(text)
    with pytest.raises(PlacementError, match=f"some_file.json.*{message}"):
        Placement.load(path)


def test_no_torch_needed():
    code = """
import sys
sys.modules["torch"] = None
from lplb_ep.placement import Placement, load_placements, save_placements
import numpy as np
Placement.from_topology("cube", num_experts=16, num_ranks=8, load=np.arange(16))
Placement.from_history(np.arange(16), num_ranks=8, num_redundant_per_rank=1)
Placement.from_physical_to_logical([[0, 1, 1, 0]], 2)[0].component
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_examples_of_the_documentation():
    path = Path(__file__).parents[2] / "docs" / "placements.md"
    result = doctest.testfile(str(path), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0


# Topologies.


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


# Computed with LPLB's planner (its torch code on the CPU): "cube" on 16 ranks in nodes of 8, that
# is two expert groups on two nodes, and on one node of 16.
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


# History.


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


# Maps of serving engines.

# vLLM's example: two layers, four experts on three ranks of two slots.
VLLM_MAP = [[0, 1, 2, 3, 0, 1], [0, 2, 0, 1, 0, 3]]


@pytest.mark.parametrize(
    "kind",
    [
        list,
        np.array,
        torch.tensor,
        lambda table: torch.tensor(table, dtype=torch.int32),
        lambda table: {"physical_to_logical_map": table},
        lambda table: {"physical_to_logical_map": torch.tensor(table), "other": 1},
        lambda table: json.loads(json.dumps({"physical_to_logical_map": table})),
    ],
)
def test_maps_of_engines(kind):
    placements = Placement.from_physical_to_logical(kind(VLLM_MAP), 3, num_ranks_per_node=1)
    assert placements == [Placement(layer, 3, num_ranks_per_node=1) for layer in VLLM_MAP]
    one = Placement.from_physical_to_logical(kind(VLLM_MAP[0]), 3)
    assert one == Placement(VLLM_MAP[0], 3)


def test_map_with_empty_slots_and_experts_counted_over_all_layers():
    table = [[0, 1, -1, 0], [0, 1, 2, -1]]
    with pytest.raises(PlacementError, match=r"layer 0: no slot holds expert 2 \(of 3 experts"):
        Placement.from_physical_to_logical(table, 2)
    with pytest.raises(PlacementError, match=r"layer 1: slot 2 holds expert 2"):
        Placement.from_physical_to_logical(table, 2, num_experts=2)
    placement = Placement.from_physical_to_logical(table[0], 2)
    assert placement.physical_to_logical.tolist() == [0, 1, -1, 0]


def test_map_is_copied():
    table = torch.tensor(VLLM_MAP)
    placements = Placement.from_physical_to_logical(table, 3)
    table.fill_(0)
    assert placements[1].physical_to_logical.tolist() == VLLM_MAP[1]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"logical_count": [[1, 2]]},
            "key 'physical_to_logical_map', got .* \\['logical_count'\\]",
        ),
        (VLLM_MAP[0][:5], "5 slots, 3 ranks"),
        ([VLLM_MAP], "physical_to_logical_map must be integers with 1 or 2 dimensions"),
        (torch.tensor(VLLM_MAP).float(), "of float64"),
        ([[0, 1, 2], [0, 1]], "unequal length"),
        (np.empty((2, 0), int), "layer 0: .* 0 slots, 3 ranks"),
    ],
)
def test_maps_are_refused_by_name(table, message):
    with pytest.raises(PlacementError, match=message):
        Placement.from_physical_to_logical(table, 3)


def test_placements_of_layers_come_back_by_their_numbers(tmp_path):
    path = tmp_path / "layers.json"
    layers = {3: Placement(TABLE, 3), 7: Placement([0, 1, 1, 0], 2, home=[3, 1])}
    save_placements(path, layers)
    assert load_placements(path) == layers
    with pytest.raises(PlacementError, match="placements of 2 layers: load_placements reads it"):
        Placement.load(path)
    save_placements(path, {7: layers[7]})
    assert Placement.load(path) == layers[7]
    Placement(TABLE, 3).save(path)
    with pytest.raises(PlacementError, match="has no placements"):
        load_placements(path)
    path.write_text("{")
    with pytest.raises(PlacementError, match="is not JSON"):
        load_placements(path)
    path.write_text(json.dumps({"lplb_ep_placements": 1, "layers": {"0": {"num_ranks": 2}}}))
    with pytest.raises(PlacementError, match=r"layers\.json"):
        load_placements(path)
