"""What the command says where a file, a directory or a person stops it: one plain line."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from lplb_ep import Placement
from lplb_ep.tools import cli
from lplb_ep.tools.commands import inputs

pytestmark = pytest.mark.usefixtures("clean_environment")

SHAPE = ["--ranks", "2", "--redundant", "1", "--placement", "eplb"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.npy", b"some text", "is not a NumPy file of plain arrays: it begins with 'some text'"),
        ("a.pt", b"some text", "is not a file of plain tensors: it begins with 'some text'"),
        ("a.npz", b"some text", "is not a NumPy file of plain arrays: it begins with 'some text'"),
        ("a.npy", b"", "it is empty"),
        ("a.pt", b"\x80\x02}q\x00.", "is not a file of plain tensors: it is damaged"),
        ("a.json", b"\xff\xfe", "is not JSON: byte 0 is no UTF-8"),
        ("a.json", b"[[1, NaN]]", "got nan for batch 0, layer 0, expert 1"),
        ("a.csv", b"1,-2\n", "got -2.0 for batch 0, layer 0, expert 1"),
        ("a.json", b"[" * 100_000, "is not JSON: it is damaged"),
    ],
)
def test_files_that_are_no_recording_in_plain_words(fails, tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    line = fails("replay", path, *SHAPE)
    assert str(path) in line or name in line
    assert says in line


def test_files_that_the_system_refuses(fails, tmp_path, monkeypatch):
    assert fails("replay", tmp_path / "none.npy", *SHAPE) == (
        f"lplb-ep: error: {tmp_path}/none.npy: No such file or directory"
    )
    np.save(tmp_path / "0.npy", np.ones((1, 2)))
    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    assert fails("replay", tmp_path, *SHAPE) == f"lplb-ep: error: {tmp_path}: Permission denied"


def test_run_says_that_nothing_is_balanced(tmp_path):
    (tmp_path / "a.py").write_text("")
    for options, says in (
        (["--client", "megatron"], "so nothing is balanced: add --mode 1"),
        ([], ""),
    ):
        command = [sys.executable, "-m", "lplb_ep.tools.cli", "run", *options, tmp_path / "a.py"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert says in done.stderr
        assert bool(says) == bool(done.stderr)


def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))


def interrupted(code, *argv):
    """A command, as a process that prints a line and gets a signal then: its status and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; from lplb_ep.tools import cli; {code}", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )
    process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    return process.returncode, told.strip()


def test_a_signal_ends_a_command_in_one_line(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).lognormal(5, 1, (40, 256)))
    argv = ["place", tmp_path / "a.npy", "--ranks", 8, "--redundant", 2, "-o", tmp_path / "o.json"]
    # It is searching, or importing: either is to end so.
    found = interrupted("print(flush=True); sys.exit(cli.main())", *map(str, argv))
    assert found == (130, "lplb-ep: interrupted")
    assert not (tmp_path / "o.json").exists()


def test_a_signal_is_not_lost_in_a_library():
    lost = """
def run(args, rest):
    try:
        print(flush=True)
        time.sleep(60)
    except BaseException:
        return 0
cli.doctor._run = run
sys.exit(cli.main())"""
    assert interrupted(f"import time{lost}", "doctor") == (130, "lplb-ep: interrupted")


def test_a_signal_before_a_command_begins_is_one_line_too(capsys, monkeypatch):
    def add(commands):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.doctor, "add", add)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.strip() == "lplb-ep: interrupted"


def test_totals_beyond_a_solver_are_placed_and_replayed(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.array([[1500000000, 1500000000, 5, 5]]))
    options = ["--ranks", "2", "--redundant", "1"]
    output = str(tmp_path / "o.json")
    assert cli.main(["place", str(tmp_path / "a.npy"), *options, "-o", output]) == 0
    assert "only shares matter" in capsys.readouterr().out
    assert cli.main(["replay", str(tmp_path / "a.npy"), "--placement", output]) == 0
    assert "only shares matter" in capsys.readouterr().out


def test_padding_is_told(tmp_path, capsys):
    ids = np.array([[[0, 0], [0, 0]], [[1, 3], [-1, -1]], [[2, 0], [-1, -1]]])
    np.save(tmp_path / "ids.npy", ids)
    argv = ["replay", str(tmp_path / "ids.npy"), "--layout", "layer-token", *SHAPE]
    assert cli.main(argv) == 0
    assert "2 rows of tokens are padding and left out" in capsys.readouterr().out


def test_long_work_is_counted_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "a.npy", np.ones((3, 4)))
    monkeypatch.setattr(inputs, "_SILENCE_S", -1)
    assert cli.main(["replay", str(tmp_path / "a.npy"), *SHAPE]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{what} layer {i} of 3" for what in ("placing", "replaying") for i in (1, 2, 3)
    ]


def test_refreshes_are_told_with_the_layers_of_all(tmp_path, capsys):
    """One layer of three moves; the others are even."""
    loads = np.ones((12, 3, 4), int) * 100
    loads[:, 1] = [900, 500, 50, 50]
    np.save(tmp_path / "a.npy", loads)
    Placement([0, 1, 2, 2, 3, 3], 2).save(tmp_path / "p.json")
    argv = ["replay", str(tmp_path / "a.npy"), "--layout", "counts", "--refresh", "2"]
    assert cli.main([*argv, "--placement", str(tmp_path / "p.json"), "--seconds", "inf"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("refreshes")]
    assert "in 1 of 3 layers" in line


def test_sglang_runs_that_met_in_one_directory(fails, tmp_path):
    for run in (1, 2):
        record = {"forward_pass_id": 5, "rank": 0, "global_physical_count": torch.ones(1, 2)}
        table = torch.tensor([[0, 1]])
        torch.save(
            {"records": [record], "last_physical_to_logical_map": table}, tmp_path / f"{run}_0.pt"
        )
    line = fails("replay", tmp_path, *SHAPE)
    assert "pass 5 of rank 0 comes twice, in 1_0.pt and 2_0.pt" in line
