"""The recipe of a shared expert as ballast: its picks, its placement, and its example."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lplb_ep import Layer, Planner, Problem, check_plan
from lplb_ep.planning import reference

EXAMPLE = Path(__file__).parents[2] / "examples" / "shared_expert.py"
E, R, T = 16, 4, 50


@pytest.fixture
def recipe(monkeypatch):
    """The example's functions, in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    return importlib.import_module("shared_expert")


@pytest.mark.parametrize("objective", ["tokens", "cost"])
def test_shared_tokens_move_away_from_hot_ranks_alone(recipe, objective):
    rng = np.random.default_rng(0)
    placement = recipe.with_shared_expert(E, R)
    assert (placement.copy_rank >= 0).sum(1).tolist() == [1] * E + [R]
    weight = np.where(np.arange(E) < E // R, 2.0, 1.0)  # rank 0 is hot
    noise = rng.gumbel(size=(R, T, E)) + np.log(weight)
    routed = torch.from_numpy(np.argsort(-noise, axis=2)[:, :, :2].copy())
    picks = [recipe.with_shared_pick(topk, torch.rand(T, 2), E) for topk in routed]
    assert all((topk[:, 2] == E).all() and (weights[:, 2] == 1).all() for topk, weights in picks)
    topks = [topk for topk, _ in picks]
    counts = torch.stack([reference.count(topk, E + 1) for topk in topks])
    layer = Layer(placement, Problem(objective=objective))
    for rank, topk in enumerate(topks):
        plan = Planner(layer, rank=rank, counts="given")(topk, counts=counts)
        check_plan(plan, topk, placement, rank, layer.problem)
        if objective == "cost":
            continue
        assert plan.rank_load.max() == R * T * 3 // R  # even to the last token
        stays = plan.split[rank, E, (placement.copy_rank[E] == rank).argmax()]
        assert stays == min(T, plan.quota[E, (placement.copy_rank[E] == rank).argmax()])


def test_the_example_shows_what_ballast_gains():
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--tokens", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = re.findall(r"^EP(\d+) +(.+)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["8", "32"] * 2
    for number, (_, row) in enumerate(rows):
        alone, stays, ballast = (float(x) for x in re.findall(r"([\d.]+) / ", row))
        if number < 2:  # the fullest rank over the mean
            assert 1 <= ballast < stays < alone
        else:  # time, which a balance of tokens does not save where these are few
            assert 0 < alone < min(stays, ballast)
