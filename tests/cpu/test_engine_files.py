"""Serving engines' files of placements: written as the engines read them, and read."""

import json

import numpy as np
import pytest
import torch
import yaml

from lplb_ep import Placement, PlacementError, load_placements, save_placements
from lplb_ep.placement.layer_files import placements_of_layers, placements_of_modules
from lplb_ep.tools import cli

pytestmark = pytest.mark.usefixtures("clean_environment")

TABLES = {3: [0, 1, 2, 3, 0, 2], 4: [3, 1, 2, 0, 1, 3]}
PLACEMENTS = {layer: Placement(table, 3, num_experts=4) for layer, table in TABLES.items()}


def sglang(path, num_experts):
    """`compute_initial_expert_location_metadata` and `init_by_mapping`, as far as they are tables.

    [layers, P]; a missing key or another one is an error there.
    """
    end = str(path)
    content = torch.load(path, weights_only=True) if end.endswith(".pt") else None
    content = json.loads(path.read_text()) if content is None else content
    (table,) = (content.pop(name) for name in ["physical_to_logical_map"])
    assert not content, "passed on as arguments"
    table = torch.as_tensor(table)
    copies = [[[] for _ in range(num_experts)] for _ in table]
    for layer, row in enumerate(table.tolist()):
        for slot, expert in enumerate(row):
            copies[layer][expert].append(slot)
    assert all(slots and min(slots) >= 0 for layer in copies for slots in layer)
    return dict(enumerate(table.tolist()))


def tensorrt_llm(path, num_experts):
    """`MoeLoadBalancerConfig` and the asserts of its user, in `modules/fused_moe/interface.py`."""
    content = yaml.safe_load(path.read_text())
    assert set(content) == {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    for row in content["initial_global_assignments"].values():
        assert isinstance(row, list)
        assert len(row) == content["num_slots"] >= num_experts
        assert set(row) == set(range(num_experts))
    assert all(isinstance(layer, int) for layer in content["initial_global_assignments"])
    return content["initial_global_assignments"]


def vllm_ascend(path, num_experts):
    """`_expert_file_to_tensor`: a tensor [layers, devices, slots]."""
    content = json.loads(path.read_text())
    rows = []
    for layer in content["layer_list"]:
        rows.append([device["device_expert"] for device in layer["device_list"]])
    tensor = torch.tensor(rows, dtype=torch.int32)
    assert tensor.shape[:2] == (content["moe_layer_count"], layer["device_count"])
    return dict(enumerate(tensor.flatten(1).tolist()))


def vllm(path, num_experts):
    table = torch.load(path) if path.suffix == ".pt" else torch.from_numpy(np.load(path))
    assert table.dtype == torch.int64
    return dict(enumerate(table.tolist()))


READERS = {"sglang": sglang, "tensorrt-llm": tensorrt_llm, "vllm-ascend": vllm_ascend, "vllm": vllm}
KINDS = [
    ("sglang", ".json"),
    ("sglang", ".pt"),
    ("tensorrt-llm", ".yaml"),
    ("vllm-ascend", ".json"),
    ("vllm", ".npy"),
    ("vllm", ".pt"),
]


@pytest.mark.parametrize(("kind", "end"), KINDS)
def test_the_engine_reads_what_is_written_and_so_do_we(tmp_path, kind, end):
    path = tmp_path / f"a{end}"
    save_placements(path, PLACEMENTS, kind)
    in_model = kind in ("sglang", "tensorrt-llm")
    expected = TABLES if in_model else dict(enumerate(TABLES.values()))
    found = READERS[kind](path, 4)
    assert {layer: found[layer] for layer in expected} == expected
    read = load_placements(path, 3)
    assert {layer: read[layer].physical_to_logical.tolist() for layer in expected} == expected
    assert placements_of_layers(path, (3, 4), num_ranks=3) == [
        Placement(table, 3, num_experts=4) for table in TABLES.values()
    ]


def test_dense_layers_of_sglang_are_as_its_own_trivial_ones(tmp_path):
    save_placements(tmp_path / "a.pt", PLACEMENTS)
    assert sglang(tmp_path / "a.pt", 4)[0] == [0, 1, 2, 3, 0, 1]


def test_the_end_of_the_name_says_the_format(tmp_path):
    for end, read in ((".yaml", tensorrt_llm), (".pt", sglang), (".npy", vllm)):
        save_placements(tmp_path / f"a{end}", PLACEMENTS)
        assert read(tmp_path / f"a{end}", 4)
    save_placements(tmp_path / "a.json", PLACEMENTS)
    assert load_placements(tmp_path / "a.json") == PLACEMENTS


def test_only_vllm_ascend_says_the_ranks(tmp_path):
    save_placements(tmp_path / "a.json", PLACEMENTS, "vllm-ascend")
    assert list(load_placements(tmp_path / "a.json").values()) == list(PLACEMENTS.values())
    with pytest.raises(PlacementError, match="has 3 ranks, and num_ranks is 2"):
        load_placements(tmp_path / "a.json", 2)
    save_placements(tmp_path / "a.yaml", PLACEMENTS)
    with pytest.raises(PlacementError, match=r"num_ranks must be given: .*a\.yaml \(TensorRT"):
        load_placements(tmp_path / "a.yaml")
    save_placements(tmp_path / "own.json", PLACEMENTS)
    with pytest.raises(PlacementError, match="layer 3: has 3 ranks, and num_ranks is 2"):
        load_placements(tmp_path / "own.json", 2)


def test_a_file_of_the_engine_itself(tmp_path):
    """As generate_eplb_config.py writes it, and with what may be left out left out."""
    (tmp_path / "a.yaml").write_text(
        "initial_global_assignments:\n  3: [0, 1, 2, 0]\n  4:\n  - 1\n  - 0\n  - 2\n  - 2\n"
        "layer_updates_per_iter: 0\nnum_slots: 4\n"
    )
    assert load_placements(tmp_path / "a.yaml", 2)[4].physical_to_logical.tolist() == [1, 0, 2, 2]
    config = {"moe_config": {"load_balancer": {"initial_global_assignments": {5: [0, 1]}}}}
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump({**config, "backend": "pytorch"}))
    assert list(load_placements(tmp_path / "whole.yaml", 2)) == [5]
    devices = [{"device_expert": [0, 1]}, {"device_expert": [2, 0]}]
    (tmp_path / "a.json").write_text(
        json.dumps({"moe_layer_count": 1, "layer_list": [{"device_list": devices}]})
    )
    assert load_placements(tmp_path / "a.json")[0].num_ranks == 2


@pytest.mark.parametrize("kind", ["sglang", "tensorrt-llm", "vllm-ascend", "vllm"])
def test_what_an_engine_cannot_have_is_not_written(tmp_path, kind):
    path = tmp_path / {"tensorrt-llm": "a.yaml", "vllm": "a.npy"}.get(kind, "a.json")
    cases = {
        "slot 3 is empty": {0: Placement([0, 1, 2, -1], 2)},
        "has no guest slots": {0: Placement.homes_only(4, 2, 1)},
        "must have the same ranks and experts": {0: PLACEMENTS[3], 1: Placement([0, 1], 2)},
        "has layers by number; got 'mlp'": {"mlp": PLACEMENTS[3]},
        "all must have as many slots": {
            0: PLACEMENTS[3],
            1: Placement([0, 1, 2, 3, 0, 1, 2, 3, 0], 3),
        },
    }
    for says, placements in cases.items():
        with pytest.raises(PlacementError, match=says):
            save_placements(path, placements, kind)
        assert not path.exists()
    with pytest.raises(PlacementError, match="must end in"):
        save_placements(tmp_path / "a.txt", PLACEMENTS, kind)


def ascend(**changes):
    devices = [{"device_id": 0, "device_expert": [0, 1]}, {"device_id": 1, "device_expert": [1, 0]}]
    layer = {"layer_id": 0, "device_count": 2, "device_list": devices}
    return {"moe_layer_count": 1, "layer_list": [{**layer, **changes}]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"physical_to_logical_map": [[0, 1], [0]]}, "all must have as many slots"),
        ({"physical_to_logical_map": [[0, 0]], "x": 1}, "SGLang takes no 'x' beside its map"),
        ({"physical_to_logical_map": [[0, 2]]}, "no slot holds expert 1"),
        ({"physical_to_logical_map": [[0, -2]]}, "must hold experts or -1; got -2"),
        ({"physical_to_logical_map": [[0, 1.0]]}, "must be a list of experts' numbers"),
        ({"physical_to_logical_map": [[0, True]]}, "must be a list of experts' numbers"),
        ({"physical_to_logical_map": []}, "expected integers"),
        ({"logical_count": [[1, 2]]}, "has loads .* lplb-ep place makes one"),
        ({"initial_global_assignments": {"3": [0, 1], "03": [1, 0]}}, "must be different numbers"),
        ({"initial_global_assignments": {"3": [0, 1]}, "num_slots": 3}, "num_slots is 3, and"),
        ({"initial_global_assignments": {"a": [0, 1]}}, "must be different numbers; got 'a'"),
        (ascend(layer_id=1), "layer_id must be 0; got 1"),
        (ascend(device_count=3), "device_count must be 2; got 3"),
        (ascend(device_list=[]), "device_list must be a list of devices"),
        (ascend(device_list=[{"device_id": 0}]), "device_count must be 1|has no device_expert"),
        ({"moe_layer_count": 2, "layer_list": ascend()["layer_list"]}, "count must be 2|must be 1"),
        ({"layer_list": []}, "layer_list must be a list of layers"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, content, says):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlacementError, match=says) as error:
        load_placements(path, 2)
    assert str(path) in str(error.value)


def test_a_layer_twice_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("initial_global_assignments:\n  3: [0]\n  3: [0]\n")
    with pytest.raises(PlacementError, match="it names 3 twice"):
        load_placements(tmp_path / "a.yaml", 1)
    (tmp_path / "a.json").write_text('{"lplb_ep_placements": 1, "layers": {"3": {}, "03": {}}}')
    with pytest.raises(PlacementError, match=r"3.*comes twice|physical_to_logical"):
        load_placements(tmp_path / "a.json")


def test_files_without_modules_say_how_to_name_them(tmp_path):
    save_placements(tmp_path / "a.json", PLACEMENTS, "sglang")
    with pytest.raises(
        PlacementError, match=r"which names no modules\. Make a file that does: lplb-ep"
    ):
        placements_of_modules(tmp_path / "a.json")


# --- commands -------------------------------------------------------------------------------------


@pytest.fixture
def recording(tmp_path):
    loads = np.random.default_rng(0).lognormal(5, 1, (2, 8)).astype(int)
    np.save(tmp_path / "counts.npy", loads)
    return str(tmp_path / "counts.npy")


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """A recording of layers 3 and 4, and the placements that `place` made of it."""
    folder = tmp_path_factory.mktemp("placed")
    loads = np.random.default_rng(0).lognormal(5, 1, (2, 8)).astype(int)
    np.save(folder / "counts.npy", loads)
    recording, own = str(folder / "counts.npy"), str(folder / "own.json")
    shape = ["--ranks", "4", "--redundant", "1", "--first-layer", "3", "--seconds", "1"]
    assert cli.main(["place", recording, *shape, "-o", own]) == 0
    return recording, own


@pytest.mark.parametrize(("kind", "end"), KINDS)
def test_replay_and_place_read_what_place_writes(tmp_path, placed, kind, end):
    (recording, own), output = placed, str(tmp_path / f"a{end}")
    assert cli.main(["place", "--start", own, "-o", output, "--format", kind]) == 0
    ranks = [] if kind == "vllm-ascend" else ["--ranks", "4"]
    told = []
    for placement in ([own], [output, *ranks]):
        argv = ["replay", recording, "--first-layer", "3", "--placement", *placement]
        assert cli.main([*argv, "--json", str(tmp_path / "r.json")]) == 0
        told.append(json.loads((tmp_path / "r.json").read_text())["imbalance"])
    for column in ("even", "lp", "bound"):  # engines' files do not say the homes
        assert told[0][column] == told[1][column]
    again = ["place", recording, "--start", output, *ranks, "--first-layer", "3", "--seconds", "0"]
    assert cli.main([*again, "--max-changes", "1", "-o", str(tmp_path / "again.json")]) == 0


def test_place_writes_for_an_engine_at_once(tmp_path, placed, capsys):
    shape = ["--ranks", "4", "--redundant", "1", "--first-layer", "3", "--seconds", "0"]
    assert cli.main(["place", placed[0], *shape, "-o", str(tmp_path / "a.yaml")]) == 0
    assert list(tensorrt_llm(tmp_path / "a.yaml", 8)) == [3, 4]
    told = capsys.readouterr().out.splitlines()
    assert f"written    {tmp_path / 'a.yaml'}, in the format tensorrt-llm" in told


@pytest.mark.parametrize(("kind", "end"), KINDS)
def test_place_converts_without_a_recording(tmp_path, kind, end, capsys):
    first, second = tmp_path / f"a{end}", tmp_path / "named.json"
    save_placements(tmp_path / "own.json", PLACEMENTS)
    argv = ["place", "--start", str(tmp_path / "own.json"), "-o", str(first), "--format", kind]
    assert cli.main(argv) == 0
    argv = ["place", "--start", str(first), "--ranks", "3", "--names", "layers.{}.mlp"]
    assert cli.main([*argv, "-o", str(second)]) == 0
    named = placements_of_modules(second)
    layer = "layers.3.mlp" if kind in ("sglang", "tensorrt-llm") else "layers.0.mlp"
    assert named[layer].physical_to_logical.tolist() == TABLES[3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--format", "sglang", "-o", "a.yaml"], "a file of sglang must end in .json or .pt"),
        (["--format", "other", "-o", "a.json"], "--format must be one of lplb-ep, sglang"),
        (["--names", "a.{}", "-o", "a.yaml"], "--names does not go with a file of tensorrt-llm"),
        (["--guests", "1", "-o", "a.npy"], "--guests does not go with a file of vllm"),
    ],
)
def test_formats_that_do_not_fit_are_refused_before_the_search(fails, recording, options, says):
    assert says in fails("place", recording, "--ranks", "4", "--redundant", "1", *options)


def test_the_number_of_ranks_is_asked_for(fails, tmp_path, recording):
    save_placements(tmp_path / "a.yaml", {0: Placement([0, 1], 2)})
    line = fails("replay", recording, "--placement", tmp_path / "a.yaml")
    assert "--ranks must be given" in line


def test_files_that_count_layers_have_all_of_them(fails, tmp_path):
    """An engine would take the layers behind a missing one for others."""
    one = next(iter(PLACEMENTS.values()))
    for name, kind in (("a.npy", "vllm"), ("a.json", "vllm-ascend")):
        save_placements(tmp_path / name, {3: one, 4: one}, kind)
        with pytest.raises(PlacementError, match=f"a file of {kind} counts layers, and layer 4 is"):
            save_placements(tmp_path / name, {3: one, 5: one}, kind)
    save_placements(tmp_path / "a.yaml", {3: one, 5: one})
    counts = np.ones((3, 4))
    counts[1] = 0
    np.save(tmp_path / "counts.npy", counts)
    argv = ["place", tmp_path / "counts.npy", "--ranks", 2, "--redundant", 1, "-o"]
    assert "layer 1 is missing between 0 and 2" in fails(*argv, tmp_path / "p.npy")
    assert "--active-ranks does not go with a file of sglang" in fails(
        *argv, tmp_path / "p.pt", "--active-ranks", "0"
    )


def test_a_recording_is_no_file_of_placements(tmp_path):
    with pytest.raises(
        PlacementError, match=r"a\.npz is no file of placements: these are not \.npz"
    ):
        load_placements(tmp_path / "a.npz")
