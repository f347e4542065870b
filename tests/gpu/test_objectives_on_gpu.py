"""Plans by active slots and by cost on the GPU: those of the CPU from the same exact solution."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from variants import guest_placement_of, make_batch, placement_of, plan_once

import lplb_ep
from lplb_ep import CostModel, Layer, Placement, Problem
from lplb_ep.cost import H200
from lplb_ep.planning import objectives, solvers
from lplb_ep.planning.device_tables import LoadSolver
from lplb_ep.planning.solvers import GUEST_OBJECTIVE_SOLVERS, OBJECTIVE_SOLVERS

pytestmark = pytest.mark.gpu

OBJECTIVES = ("experts", "cost", "auto")


def on_gpu(placement, loads, problem):
    """[B, E, C] quotas of loads, on the CPU."""
    solver = LoadSolver(placement, torch.device("cuda", 0), problem=problem)
    base = problem.base_load
    return solver(loads.int().cuda(), base_load=base)[0].cpu().numpy().astype(np.int64)


def check(placement, loads, monkeypatch, **fields):
    """The flow's solutions are those of the variant that plans by other objectives."""
    flow = dataclasses.replace(solvers.DEVICE_SOLVERS["flow"], shares=((4, 3, 1),))
    base = fields.get("base_load")
    with monkeypatch.context() as patch:
        patch.setitem(solvers.DEVICE_SOLVERS, "flow", flow)
        tokens = on_gpu(placement, loads, Problem(base_load=base))
        active = None if base is None else (base > 0).long()
        whole = on_gpu(placement, loads > 0, Problem(base_load=active))
    for objective in OBJECTIVES:
        problem = Problem(objective=objective, **fields)
        quota = on_gpu(placement, loads, problem)
        exact = whole if objective == "experts" else tokens
        for load, given, one in zip(loads.numpy(), quota, exact, strict=True):
            expected = objectives.quotas_by_objective(load, placement, problem, one)
            assert (given == expected).all()


@pytest.mark.parametrize("variant", OBJECTIVE_SOLVERS["flow"].variants(), ids=str)
def test_every_variant_plans_as_the_cpu(variant, monkeypatch):
    rng = np.random.default_rng(variant.size)
    for R in (variant.size // 2 + 1, variant.size - 1, variant.size):
        placement = oracle.random_placement(rng, R, 4 * R, 2)
        scales = (3.0, 30.0, 100.0, 300.0)
        loads = torch.from_numpy(np.stack([oracle.random_load(rng, 4 * R, s) for s in scales]))
        base = torch.from_numpy(rng.integers(0, 300, R))
        check(placement, loads, monkeypatch, cost=H200)
        check(placement, loads, monkeypatch, base_load=base, cost=CostModel("any", 50, (9, 9), 4))


@pytest.mark.parametrize(("R", "redundant"), [(8, 2), (32, 2), (64, 2)])
@pytest.mark.parametrize("tokens", [8, 64, 512, 4096])
def test_loads_of_deepseek_v3s_size(R, redundant, tokens, monkeypatch):
    rng = np.random.default_rng(tokens)
    popularity = rng.lognormal(0, 0.7, 256)
    placement = Placement.from_history(
        torch.from_numpy(popularity), num_ranks=R, num_redundant_per_rank=redundant
    )
    drifted = popularity * rng.lognormal(0, 0.3, (8, 256))
    loads = np.stack([rng.multinomial(R * 8 * tokens, row / row.sum()) for row in drifted])
    check(placement, torch.from_numpy(loads), monkeypatch)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_planners_and_solve(objective):
    variant = OBJECTIVE_SOLVERS["flow"].variants()[0]
    placement, rng = placement_of(variant), np.random.default_rng(9)
    topk, counts = make_batch(rng, placement, placement.num_ranks // 2)
    layer = Layer(placement, Problem(objective=objective))
    for exchanged in (False, True):
        plan_once(layer, "flow", topk, counts, exchanged)  # holds `check_plan`
    loads = torch.from_numpy(rng.poisson(200, (5, placement.num_experts)))
    found = lplb_ep.solve(loads.cuda(), placement, "flow", objective=objective)
    expected = lplb_ep.solve(loads, placement, "cpu", objective=objective)
    assert torch.equal(found.lower_bound.cpu(), expected.lower_bound)
    if objective == "experts":
        assert torch.equal(found.reached.cpu(), expected.reached)


def same_as_the_cpu(placement, loads, **fields):
    """Plans by cost with guests are the CPU's, bit for bit. Returns the guests."""
    found = lplb_ep.solve(loads.cuda(), placement, "flow", objective="cost", **fields)
    expected = lplb_ep.solve(loads, placement, "cpu", objective="cost", **fields)
    assert torch.equal(found.guests.cpu(), expected.guests)
    assert torch.equal(found.quota.cpu(), expected.quota)
    assert torch.equal(found.rank_load.cpu(), expected.rank_load)
    return expected.guests


@pytest.mark.parametrize("variant", GUEST_OBJECTIVE_SOLVERS["flow"].variants(), ids=str)
def test_every_variant_plans_guests_by_cost_as_the_cpu(variant):
    rng, placement = np.random.default_rng(variant.size), guest_placement_of(variant)
    loads = torch.from_numpy(rng.poisson(200 * rng.lognormal(0, 1.2, (4, placement.num_experts))))
    base = torch.from_numpy(rng.integers(0, 300, placement.num_ranks))
    cost = dataclasses.replace(H200, tile=16, push=20_000)
    assert (same_as_the_cpu(placement, loads, cost=cost) >= 0).any()
    same_as_the_cpu(placement, loads, cost=cost, base_load=base)


@pytest.mark.parametrize(("R", "node", "G"), [(8, 8, 6), (8, 4, 1), (32, 32, 2), (64, 8, 1)])
@pytest.mark.parametrize("tokens", [64, 1024, 8192])
def test_guests_by_cost_of_deepseek_v3s_size(R, node, G, tokens):
    rng = np.random.default_rng(tokens)
    placement = Placement.homes_only(256, R, G, num_ranks_per_node=node)
    popularity = rng.lognormal(0, 0.7, (3, 256))
    loads = [rng.multinomial(R * 8 * tokens, row / row.sum()) for row in popularity]
    same_as_the_cpu(placement, torch.from_numpy(np.stack(loads)))
