"""The tables of a placement that replaces another."""

from __future__ import annotations

import pickle

import pytest
import torch
from refreshing import (
    E,
    R,
    moved,
    ring,
    traffic,
)

import lplb_ep
from lplb_ep import (
    Placement,
    PlacementError,
    Planner,
    Replicas,
    check_plan,
)
from lplb_ep.planning import reference
from lplb_ep.planning.home import HomeRoutes
from lplb_ep.planning.plan import Status


def test_copies_are_replaced_at_the_same_homes_and_width():
    old = Placement([3, 0, 1, 2, 0, -1], 2, home=[4, 2, 3, 0], num_ranks_per_node=1)
    new = old.with_copies([3, -1, 1, 2, 0, 1])
    assert new.home.tolist() == old.home.tolist()
    assert (new.num_ranks_per_node, new.max_replicas) == (1, 2)
    assert new != old
    assert new.may_replace(old)
    moved = Placement(new.physical_to_logical, 2, home=[4, 5, 3, 0], num_ranks_per_node=1)
    assert not moved.may_replace(old)
    with pytest.raises(PlacementError, match="home of expert 3 is slot 0, which holds expert 1"):
        old.with_copies([1, 0, 1, 2, 0, 3])
    with pytest.raises(PlacementError, match="expert 1 has 3 copies, more than max_replicas = 2"):
        old.with_copies([3, 1, 1, 2, 0, 1])
    with pytest.raises(PlacementError, match="must have the 6 slots"):
        old.with_copies([3, 0, 1, 2, 0, -1, -1, -1])


def test_columns_for_copies_are_part_of_a_placement(tmp_path):
    old = Placement([0, 1, 0, 2], 2)
    wide = Placement([0, 1, 0, 2], 2, max_replicas=4)
    assert wide.logical_to_physical.tolist() == [[0, 2, -1, -1], [1, -1, -1, -1], [3, -1, -1, -1]]
    assert wide != old
    assert wide == old.with_copies(old.physical_to_logical, 4)
    wide.save(tmp_path / "wide.json")
    assert Placement.load(tmp_path / "wide.json") == wide == pickle.loads(pickle.dumps(wide))
    load = torch.tensor([7, 1, 2])
    solved = [lplb_ep.solve(load, p) for p in (old, wide)]
    assert torch.equal(solved[0].quota, solved[1].quota[:, :2])
    assert (solved[1].quota[:, 2:] == 0).all()


def test_a_prepared_planner_plans_as_one_that_is_made_anew():
    placement = ring()
    planner = Planner(placement, rank=1, counts="given", check=True)
    topk = traffic("new", 1, 0)
    counts = torch.stack([reference.count(traffic("new", r, 0), E) for r in range(R)])
    before = planner(topk, counts=counts)
    planned = planner.num_batches
    new = placement.with_copies(moved())
    planner.prepare(new)  # is not in force before the call
    assert torch.equal(planner(topk, counts=counts).topk_idx, before.topk_idx)
    assert planner.num_batches - planned == {Status.OPTIMAL: 1}
    planner.prepare(new)()
    planner.layer.replace(new)
    after = planner(topk, counts=counts)
    expected = Planner(Placement(moved(), R), rank=1, counts="given")(topk, counts=counts)
    assert torch.equal(after.topk_idx, expected.topk_idx)
    assert not torch.equal(after.topk_idx, before.topk_idx)
    check_plan(
        before, topk, placement, 1
    )  # its split is still by the placement that it was made on
    with pytest.raises(ValueError, match="not one of this planner's layer"):
        planner.prepare(Placement(ring().physical_to_logical[::-1], R))
    with pytest.raises(ValueError, match="max_replicas must stay 2, the columns"):
        planner.prepare(placement.with_copies(moved(), 3))
    experts = torch.nn.Linear(1, 3, bias=False)
    with pytest.raises(ValueError, match="not one of these replicas' layer"):
        Replicas(experts, Placement([0, 1, 0], 1)).prepare(Placement([0, 1, 0], 1, home=[2, 1]))


def test_a_planner_of_an_engines_layer_takes_homes_elsewhere():
    layer = lplb_ep.Layer(Placement([0, 1, 0, 2], 2, num_experts=3, max_replicas=2))
    planner = Planner(layer, rank=0, counts="given", check=True)
    topk = torch.tensor([[0], [0], [1], [2]])
    counts = torch.tensor([[2, 1, 1], [0, 0, 0]])
    new = Placement([2, 0, 1, 2], 2, num_experts=3, max_replicas=2)
    with pytest.raises(ValueError, match="not one of this planner's layer"):
        planner.prepare(new)
    layer.moves_homes = True
    for wrong in (
        Placement([2, 0, 1, 2, -1, -1], 2, num_experts=3, max_replicas=2),
        Placement([2, 0, 1, 3], 2, max_replicas=2),
    ):
        with pytest.raises(ValueError, match="not one of this planner's layer"):
            planner.prepare(wrong)
    planner.prepare(new)()
    layer.replace(new)
    plan = planner(topk, counts=counts)
    assert plan.topk_idx.tolist() == [[1], [1], [2], [3]]
    again = planner(torch.tensor([[1], [1], [2], [0]]), counts=counts, indices="physical")
    assert torch.equal(again.topk_idx, plan.topk_idx)


def test_slots_go_home_by_the_copies_in_force(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    old = Placement([0, 1, 0, 2, 3, 1], 2, home=[0, 1, 3, 4])
    new = old.with_copies([0, 1, 3, 2, 3, -1])
    planner, device = Planner(old, rank=0, counts="given"), torch.device("cpu")
    homes = planner._homes[device] = HomeRoutes(old, device)  # as of a GPU's tensors
    slots = torch.tensor([[2, 4, -1]])
    assert homes(slots, "physical").tolist() == [[0, 4, -1]]
    planner.prepare(new)()
    assert homes(slots, "physical").tolist() == [[4, 4, -1]]
    assert homes(torch.tensor([[3, 0]])).tolist() == [[4, 0]]
    homes.raise_errors()
    homes(torch.tensor([[5]]), "physical")  # which holds nothing now
    with pytest.raises(ValueError, match="or its slot"):
        homes.raise_errors()
