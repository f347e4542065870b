"""Placements replaced under captured graphs: tables are rewritten where they are."""

import numpy as np
import oracle
import pytest
import torch
from test_plan import Rows, batch, compare

from lplb_ep import Placement, Planner
from lplb_ep.layer import layer_of
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.planner import tag_of
from lplb_ep.planning.solvers import DEVICE_SOLVERS
from lplb_ep.weights.proposals import widened

pytestmark = pytest.mark.gpu


def refreshed(placement):
    """As a `Refresher` leaves a layer's placement."""
    placement = widened(placement)
    layer_of(placement).is_refreshable = True
    return placement


def cube():
    return Placement.from_topology("cube", num_experts=64, num_ranks=16)


def any_table():
    return oracle.random_placement(np.random.default_rng(4), 8, 60, 3, num_ranks_per_node=4)


@pytest.mark.parametrize("solver", DEVICE_SOLVERS)
@pytest.mark.parametrize("make", [cube, any_table])
@pytest.mark.parametrize("exchanged", [True, False])
def test_captured_graphs_plan_with_what_is_in_force(solver, make, exchanged):
    rng = np.random.default_rng(0)
    first = placement = refreshed(make())
    R, E, rank = placement.num_ranks, placement.num_experts, 3
    seen = torch.zeros(E, dtype=torch.int64, device="cuda")
    layer = layer_of(placement)
    layer.observers.append(lambda counts: seen.add_(counts.sum(0)))
    planner = Planner(placement, rank=rank, counts="given", solver=solver)
    topks, counts = batch(rng, placement, [300] * R, 4)
    topk, given = topks[rank].clone(), {} if exchanged else {"counts": counts}
    if exchanged:
        planner.exchange = Rows(counts, rank)
    planner(topk, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = planner(topk, **given)
    for number in range(8):
        if number:
            new = oracle.random_copies(rng, first)
            while new.component.max() > first.component.max():
                new = oracle.random_copies(rng, first)
            commit = planner.prepare(new)
            graph.replay()
            compare(plan, topk, counts, placement, rank)  # not yet
            commit()
            layer.replace(new)
            placement = new
        topks, other = batch(rng, placement, rng.integers(0, 400, R).clip(1), 4)
        topks[rank] = torch.cat([topks[rank]] * 300)[:300]
        other[rank] = cpu.count(topks[rank].cpu(), E)
        topk.copy_(topks[rank])
        counts.copy_(other)
        before = seen.clone()
        graph.replay()
        compare(plan, topk, counts, placement, rank)
        assert torch.equal(seen - before, counts.sum(0))
        compare(planner(topk, **given), topk, counts, placement, rank)
        assert int(planner._backend.workspace.head[0]) == tag_of(placement)


def test_a_plan_from_before_keeps_its_split():
    placement = refreshed(cube())
    planner = Planner(placement, rank=3, counts="given")
    topks, counts = batch(np.random.default_rng(1), placement, [200] * 16, 4)
    plan = planner(topks[3], counts=counts)
    planner.prepare(oracle.random_copies(np.random.default_rng(2), placement))()
    compare(plan, topks[3], counts, placement, 3)


def test_what_does_not_fit_is_refused():
    placement = cube()  # without capacity
    planner = Planner(placement, rank=3, counts="given")
    table = placement.physical_to_logical.reshape(16, -1).copy()
    table[0, -1] = table[8, 3]  # a second copy joins the two groups
    with pytest.raises(ValueError, match="have space for size 8, and the placement needs 16"):
        planner.prepare(placement.with_copies(table.ravel()))
    placement = refreshed(cube())
    planner = Planner(placement, rank=3, counts="given")
    table = np.tile(placement.physical_to_logical.reshape(16, -1)[:, :4], 2)[:, :6]
    with pytest.raises(ValueError, match="space for num_components 2, and the placement needs 16"):
        planner.prepare(placement.with_copies(table.ravel()))
