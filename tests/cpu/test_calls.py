"""The benchmarks of DeepEP's calls run without a GPU, and say what they measured."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "calls.py"
COLUMNS = "| us | CPU | wall | CPU, synchronised | wall, synchronised |"
WAYS = ("plain", "balanced")
PAIRS = [
    "low latency, 8 tokens a rank",
    "layout, dispatch and combine, 64 tokens a rank",
    "V2 dispatch and combine, 64 tokens a rank, with the CPU's sync",
    "V2 dispatch and combine, 64 tokens a rank, without the CPU's sync",
]


def run(*options, cwd):
    command = [sys.executable, "-W", "error", str(BENCHMARK), "--embedded", *options]
    short = ["--batches", "1", "--calls", "2", "--hidden", "128", "--commit", "abc"]
    return subprocess.run([*command, *short], capture_output=True, text=True, timeout=240, cwd=cwd)


def test_time_on_the_host_is_measured_without_a_gpu(tmp_path):
    script = BENCHMARK.with_name("host_time.py")
    command = [sys.executable, "-W", "error", str(script), "--calls", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = dict(line.rsplit(maxsplit=1) for line in result.stdout.splitlines())
    pairs = [f"{name}, {way}" for name in ("low latency", "legacy", "V2") for way in WAYS]
    assert [*found] == [*pairs, "slots", "plan", "plan, counts given"]
    assert all(float(us) > 0 for us in found.values())


def test_whole_layers_are_measured_in_pairs(tmp_path):
    """Each way's outputs are compared with plain's, by both kinds of calls."""
    script = BENCHMARK.with_name("paired_layers.py")
    loads = np.random.default_rng(0).integers(1, 1000, (2, 64))
    np.savez(tmp_path / "loads.npz", live=loads, learned=loads[:, ::-1])
    command = [sys.executable, "-W", "error", str(script), "loads.npz", "--embedded"]
    options = ["--key", "live", "--learn-from", "learned", "--layers", "1", "--tokens", "8"]
    result = subprocess.run(
        [*command, *options, "--rounds", "2", "--json", "found.json"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    names = [f"{calls}, 8 tokens, eager" for calls in ("throughput", "low-latency")]
    assert [row[0] for row in found["rows"]] == [*found["ranks"][0]] == names
    for rank in found["ranks"]:
        for times in rank.values():
            assert [*times] == ["plain", "even", "balanced", "forced"]
            assert all(len(taken) == 2 and min(taken) > 0 for taken in times.values())


def test_every_case_is_measured(tmp_path):
    options = ["--ranks", "2", "--replicas", "tracked", "--indices", "physical"]
    files = ["--json", "found.json", "--markdown", "found.md"]
    result = run(*options, *files, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "found.md").read_text() == result.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["commit"], found["ranks"], found["hidden"]) == ("abc", 2, 128)
    ways = ("plain", "balanced", "**above plain**")
    plans = (f"a plan alone, 64 tokens a rank: counts {how}" for how in ("given", "by torch"))
    assert list(found["us"]) == [*(f"{pair}: {way}" for pair in PAIRS for way in ways), *plans]
    for name, times in found["us"].items():
        assert len(times) == 4
        assert all(map(math.isfinite, times))
        assert "above" in name or min(times) > 0
        row = " | ".join(f"{time:.1f}" for time in times)
        assert f"| {name} | {row} |" in result.stdout
    assert COLUMNS in result.stdout


def test_a_case_that_fails_is_named(tmp_path):
    result = run("--cases", "plan", "--topk", "65", cwd=tmp_path)  # of 64 experts
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "failed: plan"
    assert result.stdout.splitlines()[-2] == COLUMNS
