"""The example runs as its reader would run it, and shows what it promises."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchtitan")

EXAMPLE = Path(__file__).parents[3] / "examples" / "torchtitan_moe.py"


@pytest.mark.long
def test_plain_and_balanced_runs_learn_the_same(tmp_path):
    sizes = "--ranks 2 --steps 4 --dim 64 --width 64 --sequences 4 --checkpointing selective"
    runs = ["--runs", "plain,balanced", "--out", str(tmp_path / "picture.png")]
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), *sizes.split(), *runs],
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, "LPLB_EP_GUEST_MIN_TOKENS": "1"},
    )
    assert result.returncode == 0, result.stderr
    plain, balanced = json.loads((tmp_path / "picture.json").read_text())
    assert balanced["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert set(balanced["batches"]) == {f"layers.{n}.moe.routed_experts" for n in range(2)}
    assert all(batches == {"OPTIMAL": 4} for batches in balanced["batches"].values())
    assert plain["batches"] == {}
    for step in range(4):
        assert max(balanced["imbalance"][step]) < 1.05
        assert max(balanced["imbalance"][step]) < max(plain["imbalance"][step])
    assert "| balanced |" in (tmp_path / "picture.md").read_text()
    assert "4/4 steps" in result.stdout
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("forced", "said"),
    [(150.0, "Balanced gains 40 of the 50 tokens/s"), (99.0, "Even forced routing gains nothing")],
)
def test_a_share_of_no_gain_is_none(monkeypatch, forced, said):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    spec = importlib.util.spec_from_file_location("torchtitan_moe", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    speeds = {"plain": 100.0, "balanced": 140.0, "forced": forced}
    fields = dict(device="H200", losses=[1.0], imbalance=[[1.0]], memory_gib=1.0, pool_mib=0.0)
    table = example.table([{**fields, "run": n, "tokens_per_s": s} for n, s in speeds.items()])
    assert said in table
