"""Ranks that take no part: their slots stay empty, and the mean is that of the others."""

import json

import numpy as np
import oracle
import pytest
import torch

from lplb_ep import Placement, PlacementError, Planner, Settings, check_plan, solve
from lplb_ep.planning.solvers import check_fit
from lplb_ep.tools import cli
from lplb_ep.tools.recordings import Recording
from lplb_ep.tools.replay import replay
from lplb_ep.tools.timeline import replay_over_time
from lplb_ep.weights.proposals import imbalance

LOAD = np.random.default_rng(0).lognormal(5, 1, 12).astype(int)


def builders(active, ranks=4, per_node=None):
    shape = {"num_ranks": ranks, "num_ranks_per_node": per_node, "active_ranks": active}
    yield Placement.homes_only(12, ranks, num_ranks_per_node=per_node, active_ranks=active)
    yield Placement.from_topology("ring", num_experts=12, load=LOAD, **shape)
    yield Placement.from_history(LOAD, num_redundant_per_rank=1, **shape)
    yield Placement.for_lp(LOAD, num_redundant_per_rank=1, max_steps=5, **shape)


@pytest.mark.parametrize("per_node", [None, 2])
def test_builders_leave_idle_ranks_empty(per_node):
    """On the others the placement is that of a group without idle ranks."""
    alone = list(builders(None, ranks=3))
    for placement, small in zip(builders([0, 1, 3], per_node=per_node), alone, strict=True):
        rows = placement.physical_to_logical.reshape(4, -1)
        assert (rows[2] == -1).all()
        assert (rows[[0, 1, 3]].ravel() == small.physical_to_logical).all()
        assert placement.active_ranks.tolist() == [0, 1, 3]
        assert (np.array([0, 1, 3])[small.home_rank] == placement.home_rank).all()
        assert placement.num_ranks_per_node == (per_node or 4)


def test_nodes_with_as_many_active_ranks_stay_nodes():
    """EPLB's hierarchical policy keeps each group of experts on a node."""
    shape = {"num_ranks": 6, "num_redundant_per_rank": 1, "num_ranks_per_node": 3, "num_groups": 2}
    placement = Placement.from_history(LOAD, active_ranks=[0, 1, 3, 5], **shape)
    nodes = placement.node[np.where(placement.copy_rank < 0, 0, placement.copy_rank)]
    of_home = placement.node[placement.home_rank]
    assert ((nodes == of_home[:, None]) | (placement.copy_rank < 0)).all()
    assert len(set(of_home[:6])) == len(set(of_home[6:])) == 1


def test_a_start_keeps_its_idle_ranks_empty():
    start = Placement([0, 1, 0, 1, -1, -1], 3)
    placed = Placement.for_lp([5, 9], start=start, fixed_homes=True)
    assert placed.physical_to_logical.tolist() == [0, 1, 0, 1, -1, -1]
    assert (placed.home == start.home).all()
    wider = Placement.for_lp([5, 9], start=start, active_ranks=[0, 1, 2])
    assert set(wider.active_ranks) >= {0, 1}


def test_a_start_with_idle_ranks_is_improved_on_the_others():
    start = next(builders([0, 1, 3]))
    table = start.physical_to_logical.reshape(4, -1)
    start = Placement(
        np.concatenate([table, np.where(table[:, :1] < 0, -1, [[0], [0], [0], [1]])], 1).ravel(),
        4,
        home=start.home_rank * 5 + start.home % 4,
    )
    better = Placement.for_lp(LOAD, start=start, fixed_homes=True)
    before, after = (oracle.linear_program(p, LOAD) for p in (start, better))
    assert better.active_ranks.tolist() == [0, 1, 3]
    assert (better.home == start.home).all()
    assert after < before - 1


@pytest.mark.parametrize(
    ("active", "says"),
    [
        ([0, 4], r"active_ranks must be in \[0, 4\); got 4"),
        ([-1], r"active_ranks must be in \[0, 4\); got -1"),
        ([1, 1], "active_ranks has rank 1 twice"),
        ([], "active_ranks must be"),
        ([0.5], "active_ranks must be integers"),
    ],
)
def test_ranks_that_do_not_fit(active, says):
    with pytest.raises(PlacementError, match=says):
        Placement.homes_only(12, 4, active_ranks=active)


def test_what_does_not_go_with_idle_ranks():
    with pytest.raises(PlacementError, match="rank 1 holds experts, and takes no part"):
        Placement.for_lp([1, 1], start=Placement([0, 1], 2), active_ranks=[0])
    shape = {"num_ranks": 4, "num_redundant_per_rank": 0, "num_ranks_per_node": 2}
    with pytest.raises(PlacementError, match="within_node needs as many active_ranks"):
        Placement.for_lp(LOAD, within_node=True, active_ranks=[0, 1, 3], **shape)


# --- beside guest slots ---------------------------------------------------------------------------


def with_guests(active, per_node=None, redundant=0):
    """Twelve experts on some of eight ranks, with two guest slots each."""
    shape = {"num_ranks": 8, "num_ranks_per_node": per_node, "active_ranks": active}
    if not redundant:
        return Placement.homes_only(12, num_guests_per_rank=2, **shape)
    more = {"num_redundant_per_rank": redundant, "num_guests_per_rank": 2}
    return Placement.from_history(LOAD, **shape, **more)


def alone(placement):
    """The ranks that take part as a group of their own, whole nodes if there are several."""
    rows = placement.physical_to_logical.reshape(8, -1)[placement.active_ranks]
    rank, slot = np.divmod(placement.home, placement.num_local_slots)
    per_node = np.unique(placement.node[placement.active_ranks], return_counts=True)[1]
    return Placement(
        rows.ravel(),
        len(rows),
        num_experts=12,
        num_ranks_per_node=int(per_node[0]),
        home=np.searchsorted(placement.active_ranks, rank) * placement.num_local_slots + slot,
        num_guests_per_rank=2,
    )


@pytest.mark.parametrize(
    ("active", "per_node", "redundant"),
    [
        ([0, 1, 3], None, 0),
        ([0, 1, 3], None, 1),
        ([2, 3, 4, 5, 6, 7], 8, 0),
        ([0, 1, 5, 6], 4, 0),
        ([0, 1, 5, 6], 4, 1),
        ([4, 5, 7], 4, 0),
    ],
)
def test_guests_are_those_of_the_active_ranks_by_themselves(active, per_node, redundant):
    placement = with_guests(active, per_node, redundant)
    assert placement.active_ranks.tolist() == active
    small, rng, number = alone(placement), np.random.default_rng(0), 0
    for _ in range(20):
        load = rng.poisson(200 * rng.lognormal(0, 1.2, 12))
        found = solve(load, placement)
        expected = solve(load, small)
        idle = np.setdiff1d(np.arange(8), active)
        assert (found.guests[idle] == -1).all()
        assert (found.rank_load[idle] == 0).all()
        assert found.guests[active].equal(expected.guests)
        assert found.quota.sum(1).tolist() == load.tolist()
        assert found.rank_load[active].tolist() == expected.rank_load.tolist()
        assert found.lower_bound == expected.lower_bound
        number += int((found.guests >= 0).sum())
    assert number > 20


def test_a_plan_with_guests_leaves_idle_ranks_alone():
    placement, rng = with_guests([0, 1, 3]), np.random.default_rng(0)
    counts = torch.from_numpy(rng.poisson(30 * rng.lognormal(0, 1.2, 12), (8, 12)))
    for rank in (1, 2):  # a rank that takes no part may have tokens
        topk = torch.arange(12).repeat_interleave(counts[rank])[:, None]
        plan = Planner(placement, rank=rank, counts="given")(topk, counts=counts)
        check_plan(plan, topk, placement, rank)
        assert int((plan.guests >= 0).sum()) > 0
        assert (plan.rank_load[[2, 4, 5, 6, 7]] == 0).all()
        assert "imbalance 1.0" in repr(plan), "of the ranks that take part"


def test_guest_slots_of_idle_ranks_are_kept_and_not_filled():
    placement = with_guests([0, 1, 3], redundant=1)
    better = Placement.for_lp(LOAD, start=placement, fixed_homes=True, max_steps=20)
    assert (better.num_guests_per_rank, better.active_ranks.tolist()) == (2, [0, 1, 3])
    fresh = Placement.for_lp(
        LOAD, 8, 0, num_guests_per_rank=2, active_ranks=[0, 1, 3], max_steps=20
    )
    assert fresh.active_ranks.tolist() == [0, 1, 3]
    assert better.may_replace(placement)
    wider = placement.physical_to_logical.copy()
    wider[2 * placement.num_local_slots] = 0
    assert not placement.with_copies(wider).may_replace(placement)
    guests = np.full((8, 2), -1)
    guests[2, 0] = 5
    with pytest.raises(
        PlacementError, match=r"guests\[2, 0\] is expert 5, and rank 2 takes no part"
    ):
        placement.with_guests(guests)


def test_the_gpu_takes_nodes_joined_by_replicas_as_a_whole():
    check_fit(with_guests([0, 1, 3]), "flow", 227 << 10)
    check_fit(with_guests([0, 1, 5, 6], 4), "flow", 227 << 10)
    joined = Placement([0, 1, 2, 0, 3, 1, 1, 2], 4, num_ranks_per_node=2)
    check_fit(joined.with_guest_slots(1), "flow", 227 << 10, refreshable=True)  # all take part
    table = [0, -1, -1, -1, -1, 0, -1, 1]
    partly = Placement(table, 4, num_ranks_per_node=2, num_experts=2).with_guest_slots(1)
    assert partly.active_ranks.tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="only where all of their ranks take part, or none; of 2"):
        check_fit(partly, "flow", 227 << 10)
    apart = with_guests([0, 1, 5], 4)
    check_fit(apart, "flow", 227 << 10)
    with pytest.raises(ValueError, match=r"of 4 there are 2, 1$"):
        check_fit(apart, "flow", 227 << 10, refreshable=True)


def test_the_mean_is_that_of_the_active_ranks():
    """A perfect plan on three of four ranks is balanced."""
    placement = Placement.homes_only(3, 4, active_ranks=[0, 1, 3])
    load = torch.full((2, 1, 3), 100)
    found = replay(Recording.of(load, "a test"), [placement])
    for column in (found.in_order, found.home, found.even, found.lp, found.bound):
        assert column.tolist() == [[1.0], [1.0]]
    assert imbalance(load[:, 0].numpy(), placement).tolist() == [1.0, 1.0]
    assert float(solve(load[0, 0], placement).lower_bound) == 100


def test_replicas_that_follow_stay_off_idle_ranks():
    loads = np.ones((12, 1, 12), int) * 100
    loads[:, 0, :2] = [2500, 900]
    start = Placement.from_history(
        np.ones(12), num_ranks=4, num_redundant_per_rank=1, active_ranks=[0, 1, 3]
    )
    settings = Settings(refresh=2, refresh_seconds=float("inf"))
    line = replay_over_time([Recording.of(loads, "a test")], [start], settings)
    assert line.moves
    assert (line.refreshed[:, :, 2] == 0).all()
    even = torch.tensor(loads.sum(2) / 3)
    assert line.imbalance()["refreshed"].equal(line.refreshed.amax(2) / even)


def test_commands_with_idle_ranks(tmp_path, capsys, clean_environment):
    np.save(tmp_path / "a.npy", np.tile(LOAD, (2, 1)))
    options = ["--ranks", "4", "--redundant", "1", "--active-ranks", "0-1,3"]
    output = tmp_path / "p.json"
    assert cli.main(["place", str(tmp_path / "a.npy"), *options, "-o", str(output)]) == 0
    for placement in ("eplb", str(output)):
        given = options if placement == "eplb" else []
        argv = ["replay", str(tmp_path / "a.npy"), "--placement", placement, *given]
        assert cli.main([*argv, "--json", str(tmp_path / "r.json")]) == 0
        lp = json.loads((tmp_path / "r.json").read_text())["imbalance"]["lp"]
        assert max(lp[0]) < 1.1, "with the mean of all ranks it is 1.333 at least"
        assert cli.main([*argv, "--guests", "1", "--json", str(tmp_path / "r.json")]) == 0
        told = json.loads((tmp_path / "r.json").read_text())
        assert 1 <= max(told["imbalance"]["lp"][0]) < 1.1
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["place", str(tmp_path / "a.npy"), "--active-ranks", "0-", "-o", "x.json"])
    assert "must be ranks such as 0-5,7; got '0-'" in capsys.readouterr().err
