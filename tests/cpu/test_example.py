"""The example runs as its reader would run it, and shows what it promises."""

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import example_output
import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "moe_layer.py"
SMALL = ["--ranks", "4", "--experts", "16", "--topk", "2", "--sequences", "2", "--steps", "4"]
FEW = [*SMALL, "--ranks", "2"]  # each imports torch
STATIC = ["--guests", "0", "--redundant", "2"]


@pytest.fixture
def parse(monkeypatch):
    """The example's parser, in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    monkeypatch.delenv("LPLB_EP", raising=False)
    return importlib.import_module("moe_layer").parse


def run(*arguments, environ=None):
    result = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, "LPLB_EP_BACKEND": "embedded", **(environ or {})},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("copies", "dtype", "tolerance"),
    [
        ("guests", "float64", 1e-9),
        ("static", "float64", 1e-9),
        ("both", "float64", 1e-9),
        pytest.param("guests", "float32", 1e-4, marks=pytest.mark.long),
        pytest.param("guests", "bfloat16", 2**-8, marks=pytest.mark.long),
        pytest.param("static", "float32", 1e-4, marks=pytest.mark.long),
        pytest.param("static", "bfloat16", 2**-8, marks=pytest.mark.long),
    ],
)
def test_balanced_steps_equal_home_steps(tmp_path, copies, dtype, tolerance):
    picture = tmp_path / "picture.png"
    slots = {"guests": ["--guests", "2"], "static": STATIC, "both": ["--redundant", "1"]}[copies]
    out = run(*SMALL, *slots, "--balance", "both", "--dtype", dtype, "--out", str(picture))
    used = (
        rf"device: CPU; tokens: {dtype}; buffers: lplb_ep.embedded \(asked for\); counts: \w+; sol"
    )
    assert re.search(f"^{used}", out, re.MULTILINE)
    plans = example_output.check(out, tolerance, differs=True)
    if copies != "static":
        assert max(plans) < 1.3  # 32 tokens more are worth no guest here
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_environment_switches_the_mode(tmp_path):
    picture = ["--out", str(tmp_path / "picture.png")]
    out = run(*FEW, *picture, environ={"LPLB_EP": "home"})
    assert "(mode home)" in out
    assert "gradients differ" not in out
    rows = example_output.rows(out)
    assert len(rows) == 6
    for home, plan, *_ in rows:
        assert home == plan


def test_an_option_goes_before_the_environment(parse, monkeypatch):
    monkeypatch.setenv("LPLB_EP", "home")
    assert parse(SMALL).balance == "home"
    assert parse([*SMALL, "--balance", "on"]).balance == "on"


def test_a_recording_drives_the_routing(tmp_path):
    counts = np.ones((1, 1, 8), np.int64)
    counts[..., :2] = 200
    np.savez(tmp_path / "trace.npz", hot=counts, other=np.ones((1, 4), np.int64))
    out = run(
        *SMALL, "--balance", "on", "--trace", str(tmp_path / "trace.npz"),
        "--trace-key", "hot", "--trace-layout", "counts", "--out", str(tmp_path / "picture.png"),
    )  # fmt: skip
    assert "8 experts" in out
    assert "routing: loads 0, 0 of the recording's 1 layers" in out
    # Two experts get nearly all: two ranks of four work at home.
    (home, plan, *_) = re.search(r"layer 0, at first((?: +\d\.\d{3}){8})", out)[1].split()
    assert float(home) > 1.9
    assert float(plan) < 1.1


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("a recording", marks=pytest.mark.long),
        "top-1, and a rank that is home to none",
    ],
)
def test_the_comparison_holds_whatever_routes(tmp_path, case):
    counts = np.arange(1, 17)[None]
    np.save(tmp_path / "trace.npy", counts)
    options = {
        "a recording": ["--trace", str(tmp_path / "trace.npy"), "--ranks", "2", "--topk", "2"],
        "top-1, and a rank that is home to none": (
            ["--ranks", "4", "--experts", "4", *STATIC, "--topk", "1"]
        ),
    }[case]
    out = run(
        *options, "--sequences", "2", "--steps", "2", "--dtype", "float64",
        "--out", str(tmp_path / "picture.png"),
    )  # fmt: skip
    checks = re.findall(r"^(\d+) +([\d.]+) +([\d.]+) +([\d.e+-]+)$", out, re.MULTILINE)
    assert [int(step) for step, *_ in checks] == [0, 1]
    assert all(float(difference) < 1e-9 for *_, difference in checks)


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        (["--steps", "1"], {}, "--place-at must be in"),
        (["--ranks", "0"], {}, "--ranks must be at least 1"),
        (["--ranks", "1", "--redundant", "1"], {}, "--redundant must be 0 on a single rank"),
        (["--guests", "-1"], {}, "--guests must be at least 0"),
        (["--shift-at", "-1"], {}, "--shift-at must be at least 0"),
        (["--topk", "65"], {}, "--topk must be at most the 64 experts"),
        (["--experts", "20"], {}, "--experts must be a multiple of the 8 ranks"),
        (["--trace-key", "a"], {}, "--trace-key and --trace-layout say what to read of --trace"),
        (["--trace", "no.npz"], {}, "no.npz"),
        ([], {"LPLB_EP": "0"}, "LPLB_EP=0 is for layers without replica slots"),
        ([], {"LPLB_EP": "2"}, "LPLB_EP must be one of 0, home, 1; got '2'"),
    ],
)
def test_what_cannot_be_is_named(options, environ, message, parse, monkeypatch, capsys):
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as status:
        parse(options)
    assert status.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/picture.png", "--out: File exists: "),
        ("file/folder/picture.png", "--out: Not a directory: "),
        (".", "--out must be a file; "),
    ],
)
def test_what_is_in_a_pictures_way_is_named_before_training(out, message, parse, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        parse([*SMALL, "--out", str(tmp_path / out)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)],
)
def test_ranks_end_with_their_launcher(number):
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE), *FEW, "--steps", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell has what it runs in the background ignore Ctrl-C; this is about the foreground.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline().startswith("2 ranks")  # they all have met
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as Ctrl-C does
        else:
            process.send_signal(number)
        # The ranks write to the same pipes, which end with the last of them.
        _, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if number == signal.SIGINT:
        assert (process.returncode, errors) == (1, "interrupted\n")
    else:
        assert process.returncode == -number
