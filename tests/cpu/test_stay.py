"""Batches that stay at home: the rule, and what a planner makes of it."""

import numpy as np
import oracle
import pytest
import torch

from lplb_ep import Layer, Placement, Planner, Problem, check_plan, solve
from lplb_ep.planning.plan import Status
from lplb_ep.planning.stay import stays_home


def test_no_plan_of_a_batch_that_stays_could_gain_as_much():
    rng, num_stayed = np.random.default_rng(0), 0
    for _ in range(60):
        placement = oracle.random_placement(rng, int(rng.integers(1, 7)), 24, 2)
        load = oracle.random_load(rng, 24, 50.0)
        base = torch.from_numpy(rng.integers(0, 60, placement.num_ranks))
        at_home = base.numpy() + np.bincount(placement.home_rank, load, placement.num_ranks)
        best = solve(torch.from_numpy(load), placement, "cpu", base_load=base)
        gain = int(at_home.max()) - int((best.rank_load.numpy() + base.numpy()).max())
        for least in (1, gain, gain + 1, gain + 40):
            problem = Problem(base_load=base, min_gain=least).checked(placement)
            stays = stays_home(load, placement, problem)
            num_stayed += stays
            assert not stays or gain < least
    assert num_stayed > 60


def test_the_bound_is_the_mean_or_what_a_rank_cannot_pass_on():
    placement = Placement([0, 1, 2, 0], 2)

    def stays(load, least):
        return stays_home(np.array(load), placement, Problem(min_gain=least).checked(placement))

    assert not stays([7, 0, 0], 3)  # 7 at home, a mean of 4
    assert stays([7, 0, 0], 4)
    assert not stays([2, 6, 0], 2)  # 8, of which 6 stay
    assert stays([2, 6, 0], 3)
    assert not stays([0, 0, 0], 0)  # never, by default
    assert stays([0, 0, 0], 1)


def test_a_planner_keeps_such_a_batch_at_home():
    placement, topk = Placement([0, 1, 2, 0], 2), torch.tensor([[0, 1], [0, 2], [0, -1]])
    layer = Layer(placement, Problem(min_gain=2))
    planner = Planner(layer, rank=0, counts="given", solver="cpu")
    for others, status in (([0, 0, 1], Status.STAYED), ([3, 0, 0], Status.OPTIMAL)):
        plan = planner(topk, counts=torch.tensor([[3, 1, 1], others]))
        assert int(plan.status) == status
        check_plan(plan, topk, placement, 0, layer.problem)
    plan = planner(topk, counts=torch.tensor([[3, 1, 1], [0, 0, 1]]), stale=True)
    assert int(plan.status) == Status.STALE
    assert planner.num_batches[Status.STAYED] == 1


def test_what_a_gain_does_not_go_with_is_refused():
    placement = Placement([0, 1, 2, 0], 2)
    for wrong in (-1, 2**31, 1.5):
        with pytest.raises(ValueError, match="min_gain must be a whole number"):
            Problem(min_gain=wrong).checked(placement)
    for bounds, named in (
        ({"speed": torch.ones(2, dtype=torch.int64)}, "speed"),
        ({"max_quota": torch.ones(3, 2, dtype=torch.int64)}, "max_quota"),
        ({"objective": "auto"}, "the objective 'auto'"),
    ):
        Problem(min_gain=0, **bounds).checked(placement)
        with pytest.raises(ValueError, match=f"LPLB_EP_MIN_GAIN.* {named}"):
            Problem(min_gain=1, **bounds).checked(placement)
    with pytest.raises(ValueError, match="guest slots"):
        Problem(min_gain=1).checked(Placement.homes_only(4, 2, num_guests_per_rank=1))
    same, other = Problem(min_gain=0), Problem(min_gain=5)
    assert same.fingerprint() == Problem().fingerprint() != other.fingerprint()
    assert same.is_plain
    assert not other.is_plain
