"""The example on GPUs, as its reader would run it: over DeepEP, with counts between the GPUs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import example_output
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "moe_layer.py"
SMALL = ["--experts", "16", "--topk", "2", "--sequences", "2", "--steps", "4"]
TOLERANCE = 2**-8  # as report.py derives it

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="no DeepEP"),
]


def run(service, tmp_path, num_ranks, by=(), environ=None):
    options = ["--ranks", str(num_ranks), *SMALL, "--out", str(tmp_path / "picture.png")]
    result = subprocess.run(
        [sys.executable, *by, str(EXAMPLE), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **service(num_ranks), **(environ or {})},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def check(out, num_ranks):
    assert f"{num_ranks} ranks, 16 experts" in out
    example_output.check(out, TOLERANCE)


@pytest.mark.parametrize(("num_ranks", "counts"), [(2, "auto"), (4, "ipc"), (4, "torch")])
def test_over_deep_ep(service, tmp_path, num_ranks, counts):
    out = run(service, tmp_path, num_ranks, environ={"LPLB_EP_COUNTS": counts})
    check(out, num_ranks)
    used = "(nvshmem|ipc)" if counts == "auto" else counts
    assert re.search(
        rf"^device: .*NVIDIA.*; tokens: bfloat16; buffers: deep_ep \(.*\); counts: {used}; "
        "solver: flow$",
        out,
        re.MULTILINE,
    )


def test_under_torchrun(service, tmp_path):
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = run(service, tmp_path, 2, by=by)
    check(out, 2)
    assert "buffers: deep_ep" in out


def test_every_token_at_home(service, tmp_path):
    out = run(service, tmp_path, 2, environ={"LPLB_EP": "home"})
    assert "(mode home)" in out
    assert re.search("buffers: deep_ep .*; nothing to plan$", out, re.MULTILINE)


def test_without_deep_ep_it_stays_on_the_cpu(service, tmp_path):
    out = run(service, tmp_path, 2, environ={"LPLB_EP_BACKEND": "embedded"})
    assert "device: CPU; tokens: float32; buffers: lplb_ep.embedded (asked for); counts: " in out
