"""`Placement`: its tables, what makes it a value, its files, and maps of serving engines."""

import copy
import doctest
import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch

from lplb_ep.errors import PlacementError
from lplb_ep.layer import layer_of
from lplb_ep.placement.layer_files import (
    load_placements,
    placements_of_modules,
    save_placements,
)
from lplb_ep.placement.table import Placement

# Three ranks of four slots, two of them unused. Expert 0 is on every rank, expert 4 twice on rank
# 1, expert 1 on ranks 2 (local slot 1) and 0 (local slot 3).
TABLE = [0, 2, -1, 1, 4, 3, 4, 0, 0, 1, -1, 5]


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
    with pytest.raises(PlacementError, match="has one placement, and no layer"):
        load_placements(path)
    path.write_text("{")
    with pytest.raises(PlacementError, match="is not JSON"):
        load_placements(path)
    path.write_text(json.dumps({"lplb_ep_placements": 1, "layers": {"": {"num_ranks": 2}}}))
    with pytest.raises(PlacementError, match="by number or name"):
        load_placements(path)
    path.write_text(json.dumps({"lplb_ep_placements": 1, "layers": {"0": {"num_ranks": 2}}}))
    with pytest.raises(PlacementError, match=r"layers\.json"):
        load_placements(path)


def test_placements_of_modules_are_named(tmp_path):
    path = tmp_path / "layers.json"
    layers = {"layers.3.mlp": Placement(TABLE, 3), "head.*": Placement([0, 1, 1, 0], 2)}
    save_placements(path, layers)
    assert load_placements(path) == placements_of_modules(path) == layers
    for name in ("", "3"):
        with pytest.raises(PlacementError, match="must be that of a module"):
            save_placements(path, {name: layers["head.*"]})
    save_placements(path, {"mlp": layers["head.*"]})
    assert list(placements_of_modules(path)) == ["mlp"]
    save_placements(path, {7: layers["head.*"]})  # the only one is for all layers
    assert placements_of_modules(path) == {"": layers["head.*"]}
    layers["head.*"].save(path)
    assert placements_of_modules(path) == {"": layers["head.*"]}
    for several in ({3: layers["head.*"], 7: layers["head.*"]}, {3: layers["head.*"], **layers}):
        save_placements(path, several)
        with pytest.raises(PlacementError, match=r"by layer number, .* place --names"):
            placements_of_modules(path)
