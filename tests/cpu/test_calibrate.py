"""`lplb-ep calibrate`: the fit, on synthetic timings, and the command where there is no GPU."""

import sys
import types

import numpy as np
import pytest
import torch

from lplb_ep import CostModel
from lplb_ep.tools import calibrate, cli, grouped_gemms

TRUE = CostModel(
    "true",
    128,
    (31_000, 37_000, 70_000, 76_000, 103_000, 108_000, 135_000, 140_000),
    16_000,
    40_000,
)


def timer_of(model, noise=0.0):
    rng = np.random.default_rng(0)

    def time(rows):
        exact = model.fixed + int(model.of_slots(rows).sum())
        return exact * rng.lognormal(0, noise)

    return time


def test_a_rank_that_goes_by_a_table_is_fitted():
    found = calibrate.calibrate(timer_of(TRUE), 34, 1024, "found")
    assert found.model.tile == 128
    assert found.error < 1e-3
    assert found.model.fixed == pytest.approx(40_000, abs=500)
    rows = np.arange(0, 3000)
    assert found.model.of_slots(rows) == pytest.approx(TRUE.of_slots(rows), abs=200)
    assert found.num_timed > 2 * calibrate.NUM_MIXED


def test_noise_does_not_make_costs_fall():
    found = calibrate.calibrate(timer_of(TRUE, noise=0.03), 34, 1024, "found")
    assert 0.01 < found.error < 0.05
    assert (np.diff(found.model.of_slots(np.arange(4000))) >= 0).all()


def test_what_no_table_has_is_reported_as_an_error():
    """Of a rank whose slots run side by side: the slowest alone counts."""
    found = calibrate.calibrate(lambda rows: 1e5 + 1e3 * max(rows), 34, 1024, "found")
    assert found.error > 0.1


@pytest.mark.parametrize("size", [(0, 1024), (1, 1024), (8, 100)])
def test_sizes_out_of_range_are_refused(size):
    """Of a single slot no time tells what the slot costs from what the rank does."""
    with pytest.raises(ValueError, match="needs num_slots of at least 2 and max_rows of 256; got"):
        calibrate.calibrate(timer_of(TRUE), *size, "found")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "experts are timed on a CUDA device, and there is none"),
        (["--gemm", "cutlass"], "--gemm must be one of torch, deep_gemm, transformer_engine; got"),
        (["--dtype", "int8"], "--dtype must be one of bfloat16, float16; got 'int8'"),
        (["--slots", "0"], "--slots must be at least 1; got 0"),
        (["--slots", "1"], "calibration needs --slots of at least 2 and --max-rows of 256; got 1"),
        (["--max-rows", "10"], "calibration needs --slots of at least 2 and --max-rows of 256"),
        (["--push-gbps", "0.01"], "--push-gbps 0.01 is too slow: a push takes 8.81 s"),
        (["--gemm", "deep_gemm", "--dtype", "float16"], "deep_gemm takes bfloat16 alone here"),
        (["-o", "no/such/folder/cost.json"], "there is no directory no/such/folder"),
    ],
)
def test_mistakes_take_one_line(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", "-o", str(tmp_path / "cost.json"), *options])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lplb-ep: error: ")
    assert message in line


def test_deep_gemm_multiplies_no_zeros(monkeypatch):
    """A GPU takes less time and power for them, so costs came out too low."""
    seen = []

    def multiply(x, weights, out, slots):
        assert x.count_nonzero() > 0.99 * x.numel()
        seen.append(slots.tolist())
        out.copy_((x.float()[:, None] @ weights[slots.long()].float().mT)[:, 0])

    deep_gemm = types.SimpleNamespace(
        m_grouped_bf16_gemm_nt_contiguous=multiply,
        get_m_alignment_for_contiguous_layout=lambda: 4,
    )
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm)
    options = {"device": "cpu", "dtype": torch.bfloat16}
    run = grouped_gemms._with_deep_gemm(3, 8, 16, options)(torch.empty(9, 8), [5, 0, 1])
    assert run().shape == (12, 8)
    assert seen == [[0] * 8 + [2] * 4] * 2


def test_the_command_writes_what_it_found(tmp_path, capsys, monkeypatch):
    class Experts:
        def __init__(self, *sizes, max_rows):
            assert sizes == (4, 64, 32, "bfloat16", "torch")
            self.nanoseconds = timer_of(TRUE)

    monkeypatch.setattr("lplb_ep.tools.grouped_gemms.Experts", Experts)
    monkeypatch.setattr("lplb_ep.tools.grouped_gemms.check_gemm", lambda *asked: None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "A GPU")
    path = tmp_path / "cost.json"
    sizes = ["--slots", "4", "--hidden", "64", "--width", "32", "--max-rows", "1024"]
    assert cli.main(["calibrate", "-o", str(path), *sizes]) == 0
    model = CostModel.load(path)
    assert (model.name, model.tile) == ("A GPU", 128)
    assert model.about.startswith("A GPU, 4 slots, experts 64 x 32, bfloat16, torch")
    assert "by 0.0 % in the median" in capsys.readouterr().out
