"""Guests on the GPU: those of the CPU's definition, and plans that are exact over them."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from test_plan import Rows
from variants import guest_placement_of

import lplb_ep
from lplb_ep import Layer, Placement, Planner, Problem, check_plan
from lplb_ep.cost import H200
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.plan import Status
from lplb_ep.planning.solvers import GUEST_SOLVERS

pytestmark = pytest.mark.gpu


def skewed(rng, E, number, scale=300):
    """Loads [B, E] of more skew than recorded ones."""
    return torch.from_numpy(rng.poisson(scale * rng.lognormal(0, 1.2, (number, E))))


@pytest.mark.parametrize("variant", GUEST_SOLVERS["flow"].variants(), ids=str)
@pytest.mark.parametrize("bound", [None, "base_load", "speed"])
def test_every_variant_chooses_as_the_cpu_and_is_exact(variant, bound):
    rng = np.random.default_rng(variant.size)
    placement = guest_placement_of(variant)
    loads = skewed(rng, placement.num_experts, 8)
    values = torch.from_numpy(rng.integers(1, 9, placement.num_ranks))
    bounds = {} if bound is None else {bound: values * (100 if bound == "base_load" else 1)}
    found = lplb_ep.solve(loads.cuda(), placement, "flow", **bounds)  # holds guests and optima
    assert found.num_unfinished == 0
    assert (found.guests >= 0).any()
    expected = lplb_ep.solve(loads, placement, "cpu", **bounds)
    assert torch.equal(found.guests.cpu(), expected.guests)
    assert torch.equal(found.lower_bound.cpu(), expected.lower_bound)


@pytest.mark.parametrize(
    ("R", "node", "G"), [(8, 8, 1), (8, 8, 6), (64, 64, 1), (64, 8, 2), (32, 16, 2)]
)
def test_homes_in_order(R, node, G):
    rng = np.random.default_rng(R * G)
    placement = Placement.homes_only(256, R, G, num_ranks_per_node=node)
    found = lplb_ep.solve(skewed(rng, 256, 16).cuda(), placement, "flow")
    assert (found.guests >= 0).sum() > 16


def make_batch(rng, placement, rank):
    """Picks [T, K] of a rank and the counts [R, E] of all, on the GPU."""
    weight = rng.lognormal(0, 1.2, placement.num_experts)
    topk = torch.from_numpy(oracle.random_topk(rng, 500, 4, weight))
    counts = torch.from_numpy(rng.poisson(20 * weight, (placement.num_ranks, weight.size))).int()
    counts[rank] = cpu.count(topk, weight.size)
    return topk.cuda(), counts.cuda()


@pytest.mark.parametrize(
    ("R", "node", "redundant"), [(8, 8, 0), (8, 4, 0), (16, 16, 1), (64, 64, 1)]
)
def test_plans_have_the_guests_of_the_definition(R, node, redundant):
    rng, rank = np.random.default_rng(R), R // 2
    placement = Placement.from_history(
        rng.lognormal(0, 1, 4 * R),
        num_ranks=R,
        num_redundant_per_rank=redundant,
        num_ranks_per_node=node,
        num_guests_per_rank=2,
    )
    given = Planner(placement, rank=rank, counts="given", solver="flow")
    exchanged = Planner(placement, rank=rank, counts="given", solver="flow")
    for _ in range(5):
        topk, counts = make_batch(rng, placement, rank)
        exchanged.exchange = Rows(counts, rank)
        plans = given(topk, counts=counts), exchanged(topk)
        for plan in plans:
            check_plan(plan, topk, placement, rank)
            assert int(plan.status) == Status.OPTIMAL
        assert torch.equal(plans[0].topk_idx, plans[1].topk_idx)
    assert (plans[0].guests >= 0).any()


def test_a_batch_that_goes_home_has_no_guests():
    rng = np.random.default_rng(1)
    placement = Placement.homes_only(32, 8, 2)
    planner = Planner(placement, rank=3, counts="given", solver="flow")
    topk, counts = make_batch(rng, placement, 3)
    check_plan(planner(topk, counts=counts), topk, placement, 3)
    plan = planner(topk, counts=counts, stale=True)
    assert int(plan.status) == Status.STALE
    assert (plan.guests == -1).all()
    check_plan(plan, topk, placement, 3)
    assert (planner(topk, counts=counts).guests >= 0).any()


@pytest.mark.parametrize(
    "problem",
    [Problem(), Problem(objective="auto", cost=dataclasses.replace(H200, tile=16, push=20_000))],
    ids=["tokens", "auto"],
)
def test_a_graph_chooses_anew_in_each_replay(problem):
    rng = np.random.default_rng(2)
    placement = Placement.homes_only(64, 16, 2)
    layer = Layer(placement, problem)
    planner = Planner(layer, rank=5, counts="given", solver="flow")
    batches = [make_batch(rng, placement, 5) for _ in range(6)]
    topk, counts = (x.clone() for x in batches[0])
    planner(topk, counts=counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = planner(topk, counts=counts)
        slots, guests = plan.topk_idx, plan.guests
    for one, of_all in batches:
        topk.copy_(one)
        counts.copy_(of_all)
        graph.replay()
        eager = planner(one, counts=of_all)
        assert torch.equal(slots, eager.topk_idx)
        assert torch.equal(guests, eager.guests)
        check_plan(eager, one, placement, 5, layer.problem)
    planner.raise_errors()


def test_other_solvers_and_large_nodes_are_refused_by_name():
    placement = Placement.homes_only(16, 4, 1)
    with pytest.raises(ValueError, match="cusolverdx takes no guest slots"):
        Planner(placement, rank=0, counts="given", solver="cusolverdx")
    many = Placement.homes_only(128, 128, 1)
    with pytest.raises(ValueError, match="at most 64 ranks"):
        Planner(many, rank=0, counts="given", solver="flow")
    assert Planner(many, rank=0, counts="given").solver == "cpu"
