import functools
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lplb_ep.planning import reference as cpu
from lplb_ep.planning import solvers
from lplb_ep.planning.planner import Planner
from lplb_ep.tools import bench, calls
from lplb_ep.tools.cli import main


def test_a_placement_with_ballast_has_a_copy_of_an_expert_on_every_rank():
    placement = bench.make_placement("ballast", 4, 1, torch.ones(16))
    assert sorted(placement.copy_rank[0].tolist()) == [0, 1, 2, 3]
    assert (placement.copy_rank[1:, 1:] == -1).all()
    assert placement.num_local_slots == 5


def test_batches_are_the_same_every_time_and_skewed():
    one, two = (bench.make_batches(4, 64, 100, 8) for _ in range(2))
    assert len(one.topk_idx) == len(one.counts) == bench.NUM_BATCHES
    for topk, again, counts in zip(one.topk_idx, two.topk_idx, one.counts, strict=True):
        assert torch.equal(topk, again)
        assert topk.shape == (100, 8)
        assert all(len(set(row)) == 8 for row in topk.tolist())
        assert torch.equal(counts[2], cpu.count(topk, 64))
        assert counts.sum(1).tolist() == [800] * 4
    assert torch.equal(one.counts, two.counts)
    load = one.counts.sum((0, 1)).double()
    assert load.max() > 2 * load.mean()
    assert np.corrcoef(load.numpy(), one.history.numpy())[0, 1] > 0.8


def test_measurements_are_a_table():
    measured = dict.fromkeys((*bench.TIMES, *bench.NUMBERS), 1.25)
    heading, _, row = bench.table([("EP8", measured)]).splitlines()
    words = "us count solve solve + number route plan in one eager tokens above T* launches bytes"
    assert " ".join(heading.split()) == words
    assert row.split() == ["EP8", *["1.2"] * 7, *["1"] * 3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ranks", "0"], "--ranks must be at least 1; got 0"),
        (["--ranks", "8", "--experts", "0"], "--experts must be at least 1; got 0"),
        (["--ranks", "8", "--tokens", "0"], "--tokens must be at least 1; got 0"),
        (["--ranks", "8", "--topk", "300"], "--topk must be at least 1 and at most 256; got 300"),
        (["--ranks", "8", "--topk", "-1"], "--topk must be at least 1 and at most 256; got -1"),
        (["--ranks", "8", "--tokens", "9", "--redundant", "-1"], "--redundant must be"),
        (["--ranks", "8", "--tokens", "9", "--placement", "star"], "star"),
        (["--placement", "cube"], "--placement and --redundant need --ranks"),
        (["--redundant", "2"], "--placement and --redundant need --ranks"),
        (["--calls", "--solver", "flow"], "--solver is for plans on the GPU"),
        (["--calls", "--topk", "99"], "--topk must be at most 11 with --calls"),
        (["--calls", "--ranks", "0"], "--ranks must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(options, says, fails, monkeypatch):
    monkeypatch.setattr(solvers, "check_device", lambda *_: None)
    assert says in fails("bench", *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_the_command_says_so(fails):
    assert fails("bench", "--ranks", "8") == "lplb-ep: error: there is no CUDA device"


@pytest.mark.usefixtures("clean_environment")
def test_calls_are_timed_in_every_mode(capsys, monkeypatch, tmp_path):
    """With no GPU; the buffers in force are distinguished by their calls."""
    homes, plans = [], []
    for name, seen in (("home", homes), ("_route", plans)):
        monkeypatch.setattr(Planner, name, counting(getattr(Planner, name), seen))
    monkeypatch.setattr(calls, "NUM_CALLS", 3)
    path = tmp_path / "out.json"
    assert main(["bench", "--calls", "--experts", "16", "--topk", "2", "--json", str(path)]) == 0
    measured = json.loads(path.read_text())["calls"]
    buffers = set(measured) - {"Planner"}
    assert len(buffers) == 7
    for name, costs in measured.items():
        assert set(costs) == ({"0", "home", "1"} if name in buffers else {"home", "1"})
        assert all(us >= 0 for cost in costs.values() for us in cost)
    heading, _, *rows = capsys.readouterr().out.splitlines()[2:]
    assert heading.split()[:4] == ["us,", "LPLB_EP", "=", "0:"]
    assert [row.split()[0] for row in rows] == [*measured]
    # Each of three kinds of dispatch, and the planner alone.
    assert len(homes) == len(plans) == 4 * (calls.NUM_WARM + 3)
    assert not dist.is_initialized()


def counting(method, seen):
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        seen.append(self)
        return method(self, *args, **kwargs)

    return call
