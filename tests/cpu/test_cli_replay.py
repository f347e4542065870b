"""`lplb-ep replay` and `lplb-ep place`."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lplb_ep import Placement
from lplb_ep.cost import CostModel
from lplb_ep.placement.layer_files import load_placements, placements_of_modules, save_placements
from lplb_ep.tools import cli
from lplb_ep.tools.recordings import load_recording
from lplb_ep.tools.replay import replay

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def recording(tmp_path):
    """A file with two arrays of [3 layers, 16 experts], and what they hold."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.lognormal(6, 1, (3, 16)).astype(np.int64) for name in ("new", "old")}
    path = tmp_path / "counts.npz"
    np.savez(path, **arrays)
    return path, arrays


@pytest.mark.parametrize("kind", ["cube", "ring:4", "torus:2x4", "eplb"])
@pytest.mark.parametrize("learned", ["new", "old"])
def test_replay(recording, tmp_path, capsys, kind, learned):
    path, arrays = recording
    argv = ["replay", path, "--key", "new", "--placement", kind, "--ranks", 8, "--redundant", 2]
    argv += ["--json", tmp_path / "out.json"]
    if learned != "new":
        argv += ["--learn-from", learned]
    assert cli.main([str(a) for a in argv]) == 0
    shape = {"num_ranks": 8, "num_redundant_per_rank": 2}
    placements = [
        Placement.from_history(load, **shape)
        if kind == "eplb"
        else Placement.from_topology(kind, num_experts=16, load=load, **shape)
        for load in arrays[learned]
    ]
    expected = replay(load_recording(path, key="new"), placements)
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["imbalance"] == expected.to_json()["imbalance"]
    assert told["learned_from"] == f"counts.npz: {learned}"
    assert (told["num_ranks"], told["num_physical_experts"]) == (8, 32)
    out = capsys.readouterr().out
    assert out.endswith(expected.table() + "\n")
    assert ("learned from counts.npz: old" in out) == (learned == "old")


def test_replay_with_quotas_that_batches_share(tmp_path, capsys, fails):
    counts = np.random.default_rng(1).lognormal(6, 1, (6, 2, 16)).astype(np.int64)
    np.save(tmp_path / "a.npy", counts)
    shape = ["--placement", "eplb", "--ranks", 4, "--redundant", 1]
    argv = ["replay", tmp_path / "a.npy", "--layout", "counts", *shape]
    out = ["--json", tmp_path / "out.json", "--picture", tmp_path / "a.svg", "--every", 3]
    assert cli.main([str(a) for a in (*argv, *out)]) == 0
    told = json.loads((tmp_path / "out.json").read_text())["imbalance"]
    assert told["reused"][::3] == told["lp"][::3]
    assert all(np.greater(told["reused"], told["bound"]).all(1)[[1, 2, 4, 5]])
    assert "one in 3 batches is solved" in capsys.readouterr().out
    assert "quotas reused" in (tmp_path / "a.svg").read_text()
    says = fails(*argv, "--every", 2, "--refresh", 2)
    assert says.endswith("--every does not go with --refresh")
    says = fails(*argv, "--every", 2, "--guests", 1)
    assert "--every (LPLB_EP_EVERY) does not go with guest slots" in says
    assert "--every must be a whole number in [1, 2**31); got 0" in fails(*argv, "--every", 0)


def test_replay_in_time(recording, tmp_path, capsys, fails):
    path, _ = recording
    model = CostModel("mine", 16, (9_000,), 2_000, 4_000, about="a test")
    model.save(tmp_path / "cost.json")
    argv = ["replay", path, "--key", "new", "--ranks", 8]
    eplb = ["--placement", "eplb", "--redundant", 2]
    files = ["--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv"]
    options = [*eplb, *files, "--rows-per-rank", 100, "--cost", tmp_path / "cost.json"]
    assert cli.main([str(a) for a in (*argv, *options)]) == 0
    out = capsys.readouterr().out
    assert "800 rows are drawn at random for each layer of a batch" in out
    assert "model      mine: a test\n" in out
    assert "placement  eplb, 8 ranks, 32 slots for 16 experts, batches of 100 rows a rank\n" in out
    told = json.loads((tmp_path / "out.json").read_text())
    assert (told["cost_model"], told["rows_per_rank"]) == ("mine", 100)
    told = told["cost_ms"]
    assert np.less_equal(told["by_cost"], told["lp"]).all()
    head, *rows = csv.reader((tmp_path / "out.csv").read_text().splitlines())
    assert [float(row[head.index("by_cost_ms")]) for row in rows] == told["by_cost"][0]

    assert cli.main([str(a) for a in (*argv, "--guests", 1, "--cost", "h200")]) == 0
    assert "experts, its wait for guests included" in capsys.readouterr().out
    says = fails(*argv, "--guests", 1, "--cost", tmp_path / "cost.json")
    assert "the cost model 'mine' has no `push`" in says
    assert "cost.json: No such file" in fails(*argv, *eplb, "--cost", "cost.json")
    assert "--cost must be a file of calibrate, or h200; got ''" in fails(*argv, *eplb, "--cost=")
    np.save(tmp_path / "means.npy", np.full((2, 16), 0.5))
    says = fails("replay", tmp_path / "means.npy", "--ranks", 8, *eplb, "--cost", "h200")
    assert says.endswith("draw batches of a size with --rows-per-rank")
    for option in (["--cost", "h200"], ["--rows-per-rank", 9]):
        says = fails(*argv, *eplb, *option, "--refresh", 2)
        assert says.endswith(f"{option[0]} does not go with --refresh")
    says = fails(*argv, *eplb, "--rows-per-rank", 0)
    assert "--rows-per-rank times the ranks that take part must be in [1, " in says
    says = fails(*argv, *options, "--json", tmp_path / "cost.json")
    assert "would replace the file of --cost" in says
    sizes = {layer: Placement.homes_only(16, ranks) for layer, ranks in enumerate((8, 8, 4))}
    save_placements(tmp_path / "sizes.json", sizes)
    given = "replay", path, "--key", "new", "--placement", tmp_path / "sizes.json"
    says = fails(*given, "--rows-per-rank", 9)
    assert says.endswith("--rows-per-rank needs placements of equally many ranks")


def test_replay_of_a_saved_placement_with_a_picture(recording, tmp_path):
    path, _ = recording
    placement = Placement([*range(16)], 4)
    placement.save(tmp_path / "placement.json")
    argv = ["replay", path, "--key", "old", "--placement", tmp_path / "placement.json"]
    argv += ["--png", tmp_path / "out.png", "--json", tmp_path / "out.json"]
    assert cli.main([str(a) for a in argv]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    imbalance = json.loads((tmp_path / "out.json").read_text())["imbalance"]
    assert imbalance["home"] == imbalance["in_order"]


@pytest.mark.parametrize(
    ("end", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_pictures_of_every_kind_and_a_table(recording, tmp_path, end, begins):
    path, _ = recording
    argv = ["replay", path, "--key", "old", "--placement", "eplb", "--ranks", 4, "--redundant", 1]
    argv += ["--picture", tmp_path / f"out{end}", "--csv", tmp_path / "out.csv"]
    assert cli.main([str(a) for a in [*argv, "--json", tmp_path / "out.json"]]) == 0
    assert (tmp_path / f"out{end}").read_bytes().startswith(begins)
    head, *rows = csv.reader((tmp_path / "out.csv").read_text().splitlines())
    assert head == ["batch", "layer", "in_order", "home", "even", "lp", "bound"]
    imbalance = json.loads((tmp_path / "out.json").read_text())["imbalance"]
    found = [[float(cell) for cell in row] for row in rows]
    assert found == [[0, n, *(imbalance[c][0][n] for c in head[2:])] for n in range(3)]


def test_a_table_over_time(recording, tmp_path):
    path, _ = recording
    argv = ["replay", path, "--key", "old", "--then", "new", "--draw", 4, "--refresh", 2]
    argv += ["--placement", "eplb", "--ranks", 4, "--redundant", 1, "--seconds", "inf"]
    assert cli.main([str(a) for a in [*argv, "--csv", tmp_path / "out.csv"]]) == 0
    head, *rows = csv.reader((tmp_path / "out.csv").read_text().splitlines())
    assert head == ["batch", "layer", "home", "kept", "refreshed", "guests_kept", "guests"]
    assert len(rows) == 8 * 3


def test_place_writes_what_replay_reads(recording, tmp_path, capsys):
    output, picture = tmp_path / "placements.json", tmp_path / "graph.png"
    shape = ["--ranks", "4", "--redundant", "1", "--ranks-per-node", "2", "--seconds", "1"]
    argv = [
        "place",
        str(recording[0]),
        "--key",
        "new",
        *shape,
        "-o",
        str(output),
        "--png",
        str(picture),
    ]
    assert cli.main(argv) == 0
    table = capsys.readouterr().out
    assert "leave their node" in table
    assert picture.read_bytes().startswith(b"\x89PNG")
    counts = load_recording(recording[0], key="new")
    placements = load_placements(output)
    assert list(placements) == list(counts.layers)
    written = tmp_path / "replay.json"
    argv = [
        "replay",
        str(recording[0]),
        "--key",
        "new",
        "--placement",
        str(output),
        "--json",
        str(written),
    ]
    assert cli.main(argv) == 0
    expected = replay(counts, list(placements.values())).to_json()
    assert json.loads(written.read_text())["imbalance"] == expected["imbalance"]

    capsys.readouterr()
    again = tmp_path / "again.json"
    refine = ["--start", str(output), "--fixed-homes", "--max-changes", "1", "--seconds", "1"]
    assert cli.main(["place", str(recording[0]), "--key", "new", *refine, "-o", str(again)]) == 0
    changed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[6:]]
    for layer, placement in load_placements(again).items():
        before = placements[layer]
        different = before.physical_to_logical != placement.physical_to_logical
        assert (before.home == placement.home).all()
        assert changed[list(placements).index(layer)] == str(different.sum()) in "01"

    named = ["--names", "model.layers.{+3}.mlp", "-o", str(tmp_path / "named.json")]
    assert cli.main(["place", str(recording[0]), "--key", "new", *refine, *named]) == 0
    assert placements_of_modules(tmp_path / "named.json") == {
        f"model.layers.{layer + 3}.mlp": placement
        for layer, placement in load_placements(again).items()
    }


def test_replay_learns_a_placement_for_the_program(recording, tmp_path):
    written = tmp_path / "replay.json"
    argv = [
        "replay",
        str(recording[0]),
        "--key",
        "new",
        "--placement",
        "lp",
        "--ranks",
        "4",
        "--redundant",
        "1",
    ]
    assert cli.main([*argv, "--json", str(written)]) == 0
    summary = json.loads(written.read_text())["summary"]
    assert summary["lp"]["worst"] <= summary["even"]["worst"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "place needs --ranks and --redundant, or --start"),
        (
            ["--ranks", "4", "--redundant", "1", "--max-changes", "2"],
            "--max-changes need a --start",
        ),
        (["--ranks", "4", "--redundant", "1", "--drift", "2"], "--drift must be in [0, 1]; got 2"),
        (["--ranks", "4", "--redundant", "1", "-o", "none/p.json"], "-o none/p.json: there is no"),
        (["--ranks", "4", "--redundant", "1", "--seed", "-1"], "--seed must be at least 0; got -1"),
        (
            ["--ranks", "4", "--redundant", "1", "--seconds", "-1"],
            "--seconds must be at least 0; got -1",
        ),
        (["--ranks", "4", "--redundant", "1", "--seconds", "nan"], "--seconds must be at least 0"),
        (["--start", "{start}", "--ranks", "8"], "--ranks is given as 8, and --start has 4"),
        (
            ["--start", "{start}", "--redundant", "2"],
            "--redundant is given as 2, and --start has 0",
        ),
        (
            ["--start", "{start}", "--ranks-per-node", "2"],
            "--ranks-per-node is given as 2, and --start has 4",
        ),
        (["--start", "{other}"], "other.json has 8 experts in layer 0, and {dir}.npz 16"),
        (
            ["--start", "{crowded}"],
            "the number of redundant slots of --start is too large: 17 slots on a rank, for 16 ex",
        ),
        (["--names", "layers.3.mlp"], "--names must have {} once, for the layer's number"),
        (["-o", "{dir}"], "counts is a directory, not a file to write"),
        (["--png", "{dir}.png"], "counts.png is a directory, not a file to write"),
    ],
)
def test_place_says_what_is_wrong_in_one_line(recording, tmp_path, fails, options, says):
    files = {"start": tmp_path / "start.json", "other": tmp_path / "other.json"}
    for path, num_experts in zip(files.values(), (16, 8), strict=True):
        Placement([*range(num_experts)], 4).save(path)
    files |= {"crowded": tmp_path / "crowded.json", "dir": tmp_path / "counts"}
    Placement([*range(16), 0] * 4, 4).save(files["crowded"])
    for directory in ("counts", "counts.png"):
        (tmp_path / directory).mkdir()
    options = [option.format(**files) for option in options]
    says = says.replace("{dir}", str(files["dir"]))
    assert says in fails("place", recording[0], "--key", "new", "-o", tmp_path / "p.json", *options)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bytes(range(256)), "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1, 2]", "is not a placement saved by this version"),
        (b'{"0": 5}', "is not a placement saved by this version"),
        (b'{"lplb_ep_placement": 1, "num_ranks": 4}', "physical_to_logical"),
        (
            b'{"lplb_ep_placement": 1, "num_ranks": 4, "physical_to_logical": 5}',
            "physical_to_logical must be integers with 1 dimensions",
        ),
        (b'{"lplb_ep_placements": 1}', "layers must be placements by number or name"),
        (
            b'{"lplb_ep_placements": 1, "layers": [5]}',
            "layers must be placements by number or name",
        ),
        (b'{"lplb_ep_placements": 1, "layers": {"": {}}}', "layers must be placements by number"),
        (
            b'{"lplb_ep_placements": 1, "layers": {"0": 5}}',
            "start.json, layer 0: a placement must be an object; got 5",
        ),
    ],
)
def test_a_file_that_is_no_placement_is_said_in_one_line(recording, tmp_path, fails, content, says):
    path = tmp_path / "start.json"
    path.write_bytes(content)
    argv = [recording[0], "--key", "new"]
    for command in (
        ["place", *argv, "--start", path, "-o", "p.json"],
        ["replay", *argv, "--placement", path],
    ):
        line = fails(*command)
        assert says in line
        assert "start.json" in line


def test_replay_of_ids_learned_from_another_file(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", rng.random((64, 2, 8)).argsort(axis=2)[:, :, :3])
    argv = ["replay", tmp_path / "a.npy", "--layout", "token-layer", "--experts", 8]
    argv += ["--tokens-per-batch", 16, "--learn-from", tmp_path / "b.npy", "--placement", "eplb"]
    argv += ["--ranks", 4, "--redundant", 1, "--ranks-per-node", 2, "--groups", 2]
    argv += ["--json", tmp_path / "out.json"]
    assert cli.main([str(a) for a in argv]) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["learned_from"] == "b.npy"
    assert np.shape(told["imbalance"]["lp"]) == (4, 2)


def test_replay_learns_from_a_key_and_layout_of_another_file(recording, tmp_path):
    """Ids in batches, on a placement learned on counts: they share neither key nor layout."""
    ids = np.random.default_rng(0).random((64, 3, 16)).argsort(axis=2)[:, :, :2]
    np.save(tmp_path / "ids.npy", ids)
    argv = ["replay", tmp_path / "ids.npy", "--layout", "token-layer", "--tokens-per-batch", 32]
    argv += ["--experts", 16, "--placement", "cube", "--ranks", 8]
    argv += ["--learn-from", f"{recording[0]}:old", "--learn-layout", "counts"]
    argv += ["--json", tmp_path / "out.json"]
    assert cli.main([str(a) for a in argv]) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["learned_from"] == "counts.npz: old"
    assert np.shape(told["imbalance"]["lp"]) == (2, 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--key must name one of its arrays: 'new' [3, 16], 'old' [3, 16]"),
        (["--key", "new", "--experts", "8"], "--experts is 8, but counts"),
        (["--key", "new", "--layout", "count"], "--layout must be one of counts, "),
        (["--key", "new", "--learn-from", "gone"], "--learn-from gone names no file; "),
        (["--key", "new", "--learn-from", "gone.npz"], "--learn-from: there is no file gone.npz"),
        (["--key", "new", "--learn-from", "{file}:gone"], "no array 'gone'; it holds 'new'"),
        (
            ["--key", "new", "--learn-from", "old", "--learn-layout", "count"],
            "--learn-layout must be one of counts, ",
        ),
        (["--key", "new", "--learn-layout", "counts"], "--learn-layout needs --learn-from"),
        (["--key", "new", "--placement", "star"], "--placement must be cube, "),
        (
            ["--key", "new", "--placement", "kube", "--ranks", "8"],
            "--placement must be cube, hypercube, torus, ring (or ring:SIZE, torus:ROWSxCOLUMNS), "
            "eplb, lp, homes (experts in order), or a file of place, Placement.save, SGLang, "
            "TensorRT-LLM, vllm-ascend or vLLM; got 'kube'",
        ),
        (
            ["--key", "new", "--placement", "cube", "--ranks", "8", "--groups", "2"],
            "--groups is for",
        ),
        (["--key", "new", "--placement", "eplb", "--ranks", "8"], "needs --ranks and --redundant"),
        (["--key", "new", "--placement", "ring"], "needs --ranks"),
        (["--key", "new", "--placement", "cube", "--ranks", "6"], "size must divide --ranks: "),
        (
            ["--key", "new", "--placement", "cube", "--ranks", "32"],
            "--ranks must divide the number of experts: 32 does not divide 16",
        ),
        (
            ["--key", "new", "--placement", "cube", "--ranks", "32", "--experts", "16"],
            "--ranks must divide --experts: 32 does not divide 16",
        ),
        (["--key", "new", "--placement", __file__, "--ranks", "8"], "is not JSON"),
        (["--json", "none/out.json"], "--json none/out.json: there is no directory none"),
        (["--png", "none/out.png"], "--picture none/out.png: there is no directory none"),
        (["--csv", "none/out.csv"], "--csv none/out.csv: there is no directory none"),
        (["--png", "out.jpg"], "--picture must end in .png, .svg, .pdf; got out.jpg"),
    ],
)
def test_replay_says_what_is_wrong_in_one_line(recording, fails, options, says):
    if "--placement" not in options:
        options = [*options, "--placement", "cube", "--ranks", "8"]
    options = [option.format(file=recording[0]) for option in options]
    assert says in fails("replay", recording[0], *options)


def test_replay_learns_from_the_same_model_only(recording, tmp_path, fails):
    np.save(tmp_path / "other.npy", np.ones((2, 16), int))
    options = ["--placement", "cube", "--ranks", 8, "--learn-from", tmp_path / "other.npy"]
    np.save(tmp_path / "one.npy", recording[1]["new"])
    says = fails("replay", tmp_path / "one.npy", *options)
    assert "other.npy has 2 layers of 16 experts; one.npy has 3 of 16" in says
    options[-1] = "gone.npy"
    says = fails("replay", tmp_path / "one.npy", *options)
    assert "--learn-from: there is no file gone.npy" in says


@pytest.mark.parametrize("unbuffered", ["", "1"])  # noticed at the end, or at the first line
def test_a_reader_that_leaves_ends_the_command_quietly(recording, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    options = ["--key", "new", "--placement", "cube", "--ranks", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "lplb_ep.tools.cli", "replay", recording[0], *options],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
