"""Messages and notes of the commands: options as they were typed, and files in their own words."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lplb_ep import Placement, PlacementError
from lplb_ep.placement.layer_files import save_placements
from lplb_ep.tools import cli
from lplb_ep.tools.commands.options import as_typed
from lplb_ep.tools.recordings import MAX_EXPERTS, Recording, load_recording, save_recording
from lplb_ep.tools.sample import sample

pytestmark = pytest.mark.usefixtures("clean_environment")

OUT = ["-o", "p.json"]
SHAPE = ["--ranks", "2", "--redundant", "1", "--placement", "eplb"]


def said(message, *texts):
    options = {"seed": "--seed", "key": "--key"}
    with pytest.raises(ValueError, match="--") as raised, as_typed(options, *texts):
        raise ValueError(message)
    return str(raised.value)


def test_only_arguments_become_options():
    assert said("seed must be 1; got 'seed', \"a seed's\" and it's key's key") == (
        "--seed must be 1; got 'seed', \"a seed's\" and it's key's --key"
    )
    assert said("my key file, seed 0: key must be", "my key file", "seed 0") == (
        "my key file, seed 0: --key must be"
    )
    assert said("seed and key must be", "see", "") == "--seed and --key must be"


def test_messages_leave_the_words_of_files_alone(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("seed layout.npz", seed=np.ones((2, 4)), key=np.ones((2, 4)))
    (tmp_path / "key.json").write_text('{"seed": [1, 2], "layout": [2]}')
    (tmp_path / "twice.json").write_text('{"key": [1, 2], "key": [2]}')
    (tmp_path / "a.csv").write_text("seed,key\n1,2\n")
    (tmp_path / "p.json").write_text(
        '{"lplb_ep_placements": 1, "layers": {"key": {"num_ranks": 0, "physical_to_logical": [0]}}}'
    )
    save_recording("sample.npz", sample(1, 4, 2, 10, 1))
    begins = "lplb-ep: error: "
    assert fails("replay", "seed layout.npz", *SHAPE) == (
        f"{begins}seed layout.npz: --key must name one of its arrays: 'seed' [2, 4], 'key' [2, 4]"
    )
    assert "it has 'seed', 'layout'" in fails("replay", "key.json", *SHAPE)
    assert "it names 'key' twice" in fails("replay", "twice.json", *SHAPE)
    assert "got 'seed, key'" in fails("replay", "a.csv", *SHAPE)
    assert fails("replay", "sample.npz", "--experts", "5", *SHAPE) == (
        f"{begins}sample.npz: --experts is 5, but counts are of 4 experts"
    )
    assert fails("replay", "sample.npz", "--key", "3", *SHAPE) == (
        f"{begins}sample.npz: no array '3'; the file is one recording"
    )
    replay = ["replay", "sample.npz", "--placement", "eplb", "--ranks", "2", "--redundant", "1"]
    save_recording("other.npz", sample(2, 4, 2, 10, 1))
    assert fails(*replay, "--refresh", "2", "--then", "other.npz") == (
        f"{begins}other.npz: sample, seed 0, workload 0 has 2 layers of 4 experts; sample.npz: "
        "sample, seed 0, workload 0 has 1 of 4; only one of them has layer 1"
    )
    assert "p.json, layer 'key': num_ranks must be" in fails(
        "place", "--start", "p.json", "-o", "q.json"
    )
    assert fails(*replay, "--learn-from", "gone.npz") == (
        f"{begins}--learn-from: there is no file gone.npz"
    )
    assert fails("sample", "-o", "seed path.txt") == (
        f"{begins}-o must end in .npz, .json, .pt; got seed path.txt"
    )


def test_ranks_that_end_before_they_begin(capsys, tmp_path):
    np.save(tmp_path / "a.npy", np.ones((1, 4)))
    with pytest.raises(SystemExit):
        cli.main(["replay", str(tmp_path / "a.npy"), *SHAPE, "--active-ranks", "0,5-2"])
    assert "--active-ranks: 5-2 ends before it begins; got '0,5-2'" in capsys.readouterr().err


def test_options_that_say_what_a_file_says_are_taken(fails, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.ones((1, 4)))
    path = tmp_path / "p.json"
    Placement([0, 1, -1, 2, 3, 0], 2, num_ranks_per_node=1).save(path)
    replay = ["replay", tmp_path / "a.npy", "--placement", path]
    same = ["--ranks", 2, "--redundant", 1, "--ranks-per-node", 1, "--active-ranks", "0-1"]
    assert cli.main([str(a) for a in [*replay, *same]]) == 0
    capsys.readouterr()
    for option, other, has in (
        ("--ranks", 4, 2),
        ("--redundant", 2, 1),
        ("--ranks-per-node", 2, 1),
        ("--active-ranks", "0", [0, 1]),
    ):
        line = fails(*replay, option, other)
        assert f"{option} is " in line
        assert line.endswith(f", and the placement in {path} has {has}")


# --- numbers of layers and of parts ---------------------------------------------------------------


@pytest.mark.parametrize("command", ["replay", "report", "place"])
def test_layers_of_a_placement_that_a_recording_lacks_are_told(tmp_path, capsys, command):
    np.save(tmp_path / "a.npy", np.ones((2, 4)))
    path = tmp_path / "p.json"
    output = tmp_path / ("o.html" if command == "report" else "o.json")
    placement = Placement([0, 1, 2, 3], 2)
    save_placements(path, dict.fromkeys(range(5), placement))
    options = ["--start", path] if command == "place" else ["--placement", path]
    options += [] if command == "replay" else ["-o", output]
    argv = [str(a) for a in [command, tmp_path / "a.npy", *options]]
    assert cli.main(argv) == 0
    says = (
        f"{path} has 3 layer(s) that the recording has not (2, 3, 4); its layers 0 to 1 are taken"
    )
    assert f"note       {says}" in capsys.readouterr().out
    if command == "report":
        assert says in output.read_text()
    save_placements(path, dict.fromkeys(range(3, 5), placement))
    assert cli.main([*argv, "--first-layer", "3"]) == 0
    assert "note" not in capsys.readouterr().out


def test_dense_layers_of_sglang_are_no_layers_that_are_lacking(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.ones((2, 4)))
    save_placements(tmp_path / "p.pt", dict.fromkeys((1, 2), Placement([3, 1, 2, 0], 2)))
    argv = [
        "replay",
        str(tmp_path / "a.npy"),
        "--placement",
        str(tmp_path / "p.pt"),
        "--ranks",
        "2",
    ]
    assert cli.main([*argv, "--first-layer", "1"]) == 0
    assert "note" not in capsys.readouterr().out


def test_recordings_of_the_same_number_of_other_layers_are_told_apart():
    one, two = (
        Recording.of(np.ones((2, 4)), name, layers=n) for name, n in (("a", (0, 2)), ("b", (0, 3)))
    )
    with pytest.raises(
        ValueError, match="a has 2 layers of 4 experts; b has 2 of 4; only one of them has layer 2"
    ):
        one.check_like(two)


def test_parts_that_are_not_evenly_spaced_are_told(tmp_path, capsys):
    for number in (0, 1, 3):
        np.save(tmp_path / f"{number}.npy", np.ones((1, 4)))
    assert cli.main(["replay", str(tmp_path), *SHAPE]) == 0
    says = "the numbers of files are not evenly spaced: 3 follows 1; is a part missing?"
    assert f"note       {says}" in capsys.readouterr().out
    for file in tmp_path.iterdir():
        file.unlink()
    record = [
        {"forward_pass_id": n, "rank": 0, "global_physical_count": torch.ones(1, 2)}
        for n in (4, 5, 9)
    ]
    dump = {"records": record, "last_physical_to_logical_map": torch.tensor([[0, 1]])}
    torch.save(dump, tmp_path / "run_0.pt")
    assert load_recording(tmp_path).notes() == [
        "the numbers of passes are not evenly spaced: 9 follows 5; is a part missing?"
    ]


# --- numbers that are absurd ----------------------------------------------------------------------


def write_absurd(folder, kind):
    """A recording with an expert or a layer that no model has; the options to read it."""
    ids = np.random.default_rng(0).random((2, 40, 8)).argsort(axis=2)[:, :, :2]
    ids[1, 7, 1] = 99999999
    if kind.startswith("ids"):
        end = kind.split()[1]
        path = folder / f"a.{end}"
        if end == "npy":
            np.save(path, ids)
        elif end == "npz":
            np.savez(path, ids=ids)
        else:
            torch.save(torch.from_numpy(ids), path)
        return path, ["--layout", "layer-token"]
    if kind == "experts":
        np.save(folder / "a.npy", ids[:1])
        return folder / "a.npy", ["--layout", "layer-token", "--experts", "99999999"]
    if kind in ("csv expert", "csv layer"):
        row = "0,99999999,1" if kind == "csv expert" else "99999999,0,1"
        (folder / "a.csv").write_text(f"layer,expert,count\n0,0,1\n{row}\n")
        return folder / "a.csv", []
    if kind == "csv rows":
        (folder / "a.csv").write_text("layer,e0,e1\n0,1,2\n99999999,1,2\n")
        return folder / "a.csv", []
    if kind == "json layer":
        (folder / "a.json").write_text(json.dumps({"0": [1, 2], "99999999": [1, 2]}))
        return folder / "a.json", []
    table = torch.tensor([[0, 99999999]])
    record = {"forward_pass_id": 1, "rank": 0, "global_physical_count": torch.ones(1, 2)}
    torch.save({"records": [record], "last_physical_to_logical_map": table}, folder / "a.pt")
    return folder / "a.pt", []


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("ids npy", "a.npy: ids must be -1 or in [0, 32768); got 99999999 for token 7 of layer 1"),
        (
            "ids npz",
            "a.npz: array 'ids': ids must be -1 or in [0, 32768); got 99999999 for token 7",
        ),
        ("ids pt", "a.pt: ids must be -1 or in [0, 32768); got 99999999 for token 7 of layer 1"),
        ("experts", "a.npy: --experts must be in [1, 32768]; got 99999999"),
        ("csv expert", "a.csv: row 3: expert must be a whole number in [0, 32768); got '99999999'"),
        ("csv layer", "a.csv: row 3: layer must be a whole number in [0, 32768); got '99999999'"),
        ("csv rows", "a.csv: row 3: layer must be a whole number in [0, 32768); got '99999999'"),
        ("json layer", "a.json: layers must be numbers in [0, 32768); got 99999999"),
        (
            "records",
            "a.pt: last_physical_to_logical_map[0, 1] must be an expert in [0, 32768); got",
        ),
    ],
)
def test_an_absurd_number_is_named_before_memory_is_taken(fails, tmp_path, monkeypatch, kind, says):
    path, options = write_absurd(tmp_path, kind)
    made = np.zeros

    def zeros(shape, *args, **kwargs):
        assert np.prod(shape) < 1e6, "it was to be refused before"
        return made(shape, *args, **kwargs)

    monkeypatch.setattr(np, "zeros", zeros)
    assert says in fails("replay", path, *options, *SHAPE)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["sample", "-o", "a.npz", "--experts", "99999999"],
            "--experts must be at most 32768; got",
        ),
        (["sample", "-o", "a.npz", "--batches", "99999999"], "410 GB of counts, more than 16 GB"),
        (
            ["place", "-o", "p.json", "--experts", "8", "--ranks", "4", "--guests", "99999999"],
            "--guests must be at most 32768; got 99999999",
        ),
        (
            ["place", "-o", "p.json", "--experts", "99999999", "--ranks", "8", "--guests", "1"],
            "--experts must be in [1, 32768]; got 99999999",
        ),
    ],
)
def test_absurd_options_are_named(fails, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(*argv)


def test_as_many_experts_as_are_allowed_are_read():
    counts = np.ones((1, MAX_EXPERTS))
    assert Recording.of(counts, "a").num_experts == MAX_EXPERTS
    with pytest.raises(ValueError, match="a: a layer may have 32768 experts; got 32769"):
        Recording.of(np.ones((1, MAX_EXPERTS + 1)), "a")


# --- odd input ------------------------------------------------------------------------------------


def test_odd_options_are_said_in_one_line(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begins = "lplb-ep: error: "
    save_recording("s.npz", sample(1, 4, 4, 10, 1))
    Path("dir").mkdir()
    replay = ["replay", "s.npz", *SHAPE]
    for option in (["--tokens-per-batch", "2"], ["--layout", "token-layer"]):
        assert fails(*replay, *option) == (
            f"{begins}s.npz: holds counts; --layout and --tokens-per-batch are for ids"
        )
    assert fails(*replay, "--refresh", "2") == (
        f"{begins}4 batches are too few: replicas that a look at 2 batches moves are in force 2 "
        "later"
    )
    for number in ("0", "99"):
        assert fails(*replay, "--refresh", "2", "--draw", number) == (
            f"{begins}s.npz: sample, seed 0, workload 0: --draw must be in [1, 40], the picks of a "
            f"layer; got {number}"
        )
    assert fails("replay", "", *SHAPE) == f"{begins}FILE must be a recording; got ''"
    assert fails(*replay, "--first-layer", "99999999") == (
        f"{begins}--first-layer must be in [0, 32768); got 99999999"
    )
    for option in ("--json", "--csv", "--picture"):
        assert fails(*replay, option, "") == f"{begins}{option} must be a file to write; got ''"
    assert fails("sample", "-o", "") == f"{begins}-o must be a file to write; got ''"
    place = ["place", "s.npz", "--ranks", "2", "--redundant", "1", "--seconds", "1"]
    assert cli.main([*place, "--names", "layers.{}.mlp", "-o", "p.json"]) == 0


def test_a_layout_is_for_the_files_that_need_one(fails, tmp_path, capsys):
    """Ids are replayed on what was learned from, and followed by, files that say what they are."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "ids.npy", rng.random((1, 64, 8)).argsort(axis=2)[:, :, :2])
    save_recording(tmp_path / "s.npz", sample(1, 8, 4, 64, 2))
    replay = ["replay", tmp_path / "ids.npy", "--layout", "layer-token", "--tokens-per-batch", "8"]
    learned = [*replay, *SHAPE, "--learn-from", tmp_path / "s.npz"]
    for argv in (learned, [*replay, *SHAPE, "--then", tmp_path / "s.npz", "--refresh", "2"]):
        assert cli.main([str(a) for a in argv]) == 0
    capsys.readouterr()
    assert "holds counts; --learn-layout and" in fails(*learned, "--learn-layout", "token-layer")


def test_a_file_with_layers_by_name_is_for_programs(fails, tmp_path):
    save_recording(tmp_path / "s.npz", sample(1, 4, 4, 10, 1))
    save_placements(tmp_path / "p.json", {"layers.0.mlp": Placement([0, 1, 2, 3], 2)})
    says = fails("replay", tmp_path / "s.npz", "--placement", tmp_path / "p.json")
    assert says.endswith("p.json has layers by name ('layers.0.mlp'), and numbers are needed")


def test_files_that_cannot_be_written_are_named_before_the_work(fails, tmp_path, monkeypatch):
    save_recording(tmp_path / "s.npz", sample(1, 4, 4, 10, 1))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    argv = ["replay", tmp_path / "s.npz", *SHAPE, "--json"]
    says = f"{tmp_path / 'out.json'} cannot be written: permission denied"
    assert says in fails(*argv, tmp_path / "out.json")


def test_no_output_takes_the_place_of_an_input_or_of_another_output(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_recording("s.npz", sample(1, 4, 4, 10, 1))
    os.link("s.npz", "t.npz")
    os.symlink("s.npz", "same.csv")
    Placement([0, 1, 2, 3], 2).save("p.json")
    replay, files = ["replay", "s.npz", *SHAPE], ("s.npz", "p.json")
    before = [Path(name).read_bytes() for name in files]
    for argv, option in (
        ([*replay, "--csv", "./s.npz"], "the recording"),
        ([*replay, "--csv", "same.csv"], "the recording"),
        ([*replay, "--learn-from", "t.npz:counts", "--json", "t.npz"], "--learn-from"),
        ([*replay, "--refresh", "2", "--then", "t.npz", "--json", "t.npz"], "--then"),
        (["replay", "s.npz", "--placement", "p.json", "--json", "p.json"], "--placement"),
        ([*replay, "--csv", "a.out", "--json", "a.out"], "--json"),
        (["report", "s.npz", "--csv", "a.html", "-o", "a.html"], "--csv"),
        (["place", "s.npz", "--ranks", "2", "--redundant", "1", "-o", "s.npz"], "the recording"),
    ):
        assert fails(*argv).endswith(f"would replace the file of {option}")
    assert [Path(name).read_bytes() for name in files] == before
    assert "p.json has one placement, and no layer" in fails("place", "--start", "p.json", *OUT)
    save_placements("p.json", {3: Placement([0, 1, 2, 3], 2)})
    assert cli.main(["place", "--start", "p.json", "--names", "a.{}", *OUT]) == 0
    assert cli.main([*replay, "--csv", "/dev/null", "--json", "/dev/null"]) == 0


@pytest.mark.parametrize("end", [".npz", ".csv", ".html", ".pth"])
def test_placements_are_written_where_they_can_be_read(fails, tmp_path, end):
    save_recording(tmp_path / "s.npz", sample(1, 4, 2, 10, 1))
    says = f"must end in one of .json, .npy, .pt, .yaml, .yml; got {tmp_path / 'p'}{end}"
    learned = ["place", tmp_path / "s.npz", "--ranks", "2", "--redundant", "1"]
    for argv in (learned, ["place", "--experts", "4", "--ranks", "2", "--guests", "1"]):
        assert fails(*argv, "-o", f"{tmp_path / 'p'}{end}").endswith(says)
    with pytest.raises(PlacementError, match=r"must end in one of"):
        save_placements(f"{tmp_path / 'p'}{end}", {0: Placement([0, 1], 2)})


@pytest.mark.parametrize("options", [["p.yaml"], ["p.pt"], ["p.json", "--format", "sglang"]])
def test_homes_of_all_layers_are_no_file_of_an_engine(fails, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    argv = ["place", "--experts", "4", "--ranks", "2", "--guests", "0", "-o", *options]
    assert fails(*argv).endswith("has a row for each layer: place needs a recording")
    assert not list(tmp_path.iterdir())


def test_memory_that_does_not_suffice_is_one_line(fails, tmp_path, monkeypatch):
    def replay(*arguments, **options):
        raise MemoryError("Unable to allocate 30 GiB")

    save_recording(tmp_path / "s.npz", sample(1, 4, 4, 10, 1))
    monkeypatch.setattr("lplb_ep.tools.replay.replay", replay)
    assert fails("replay", tmp_path / "s.npz", *SHAPE) == (
        "lplb-ep: error: the memory does not suffice: Unable to allocate 30 GiB"
    )


def test_files_of_a_directory_that_are_no_parts_are_told(tmp_path):
    np.save(tmp_path / "0.npy", np.ones((1, 4)))
    (tmp_path / "report.html").write_text("")
    assert load_recording(tmp_path).notes() == []
    save_recording(tmp_path / "s.npz", sample(1, 4, 2, 10, 1))
    assert load_recording(tmp_path).notes() == [
        "files in the directory that are no parts are left out: s.npz"
    ]
