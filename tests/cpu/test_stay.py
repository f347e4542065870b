"""Batches that stay at home, or in an engine's slots: the rule, and what a planner makes of it."""

import numpy as np
import oracle
import pytest
import ranks
import tallied
import torch

from lplb_ep import ContractError, Layer, Placement, Planner, Problem, check_plan, solve
from lplb_ep.planning.plan import Plan, Status
from lplb_ep.planning.stay import count_by_rank, stays


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
            must_stay = stays(load, placement, problem)
            num_stayed += must_stay
            assert not must_stay or gain < least
    assert num_stayed > 60


def test_the_bound_is_the_mean_or_what_a_rank_cannot_pass_on():
    placement = Placement([0, 1, 2, 0], 2)

    def must_stay(load, least):
        return stays(np.array(load), placement, Problem(min_gain=least).checked(placement))

    assert not must_stay([7, 0, 0], 3)  # 7 at home, a mean of 4
    assert must_stay([7, 0, 0], 4)
    assert not must_stay([2, 6, 0], 2)  # 8, of which 6 stay
    assert must_stay([2, 6, 0], 3)
    assert not must_stay([0, 0, 0], 0)  # never, by default
    assert must_stay([0, 0, 0], 1)


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


def test_given_slots_are_compared_in_place_of_homes():
    rng, seen = np.random.default_rng(1), set()
    for _ in range(60):
        R = int(rng.integers(1, 7))
        placement = oracle.random_placement(rng, R, 24, 2)
        base = torch.from_numpy(rng.integers(0, 20, R))
        topk = oracle.random_topk(rng, 90, 4, rng.lognormal(0, 1.2, 24))
        slots = torch.from_numpy(oracle.slots_of(rng, topk, placement))
        load = np.bincount(topk[topk >= 0], minlength=24)
        given_load = np.bincount(slots[slots >= 0] // placement.num_local_slots, None, R)
        assert count_by_rank(slots, placement).tolist() == given_load.tolist()
        best = solve(torch.from_numpy(load), placement, "cpu", base_load=base).rank_load
        gain = int((given_load + base.numpy()).max() - (best + base).max())
        for least in (1, gain, gain + 1, gain + 40):
            problem = Problem(base_load=base, min_gain=max(0, least)).checked(placement)
            must_stay = stays(load, placement, problem, given_load)
            assert not must_stay or gain < least
            seen.add((must_stay, stays(load, placement, problem)))
    assert len(seen) == 4


def keep_slots(group, layer, many):
    """How batches of an engine's slots end on this rank, and at home; checked."""
    rank, placement, problem = group.rank(), layer.placement, layer.problem
    held = torch.tensor(placement.physical_to_logical)
    planner, exact = Planner(layer, group, check=True), Planner(placement, group)
    expected, ends = tallied.Tallied(rank, base_load=problem.base_load), []
    for slots in many:
        logical = [torch.where(one < 0, -1, held[one].long()) for one in slots]
        given_load = torch.stack([count_by_rank(one, placement) for one in slots]).sum(0)
        load = torch.cat(logical).flatten()
        load = np.bincount(load[load >= 0], minlength=placement.num_experts)
        by = load, placement, problem.checked(placement)
        must_stay, at_home = stays(*by, given_load.long().numpy()), stays(*by)
        plan = planner(slots[rank], indices="physical")
        assert planner.route(slots[rank], indices="physical").equal(plan.topk_idx)
        by_experts = planner(logical[rank])
        if must_stay:
            assert int(plan.status) == Status.STAYED
            assert plan.topk_idx.equal(slots[rank])
            assert plan.topk_idx is not slots[rank]
            assert plan.rank_load.equal(given_load)
            assert not plan.quota.any()
            assert plan.reached.value == int((given_load + problem.base_load).max())
            assert plan.reached.bound == by_experts.reached.bound
        else:
            check_plan(plan, logical[rank], placement, rank, problem, slots[rank])
            assert int(plan.status) == Status.OPTIMAL
            if not problem.base_load.any():
                assert plan.topk_idx.equal(exact(logical[rank]).topk_idx)
        assert plan.counts.equal(by_experts.counts)
        assert (int(by_experts.status) == Status.STAYED) == at_home
        for one in (plan, plan, by_experts):
            expected.add(one, placement)
        stale = planner(slots[rank], indices="physical", stale=rank == 0)
        assert int(stale.status) == Status.STALE
        assert (stale.quota[:, 0].numpy() == load).all()
        expected.add(stale, placement)
        ends.append((must_stay, at_home))
    assert tallied.read(planner) == expected.totals
    return ends


@pytest.mark.parametrize("R", [1, 4])
def test_a_batch_that_stays_keeps_its_engines_slots(R):
    """By the slots of all ranks, also where a rank has no tokens."""
    rng = np.random.default_rng(10)
    placement = oracle.random_placement(rng, R, 12, 2)
    base = torch.from_numpy(rng.integers(0, 9, R)) * int(R > 1)
    many = []
    for i in range(40):
        weight = rng.lognormal(0, 0.3, 12)
        numbers = [int(n) for n in rng.integers(0, 60, R)]
        numbers[i % R] *= i % 4 > 0
        topks = [oracle.random_topk(rng, n, 2, weight) for n in numbers]
        slots = [oracle.slots_of(rng, topk, placement) for topk in topks]
        many.append([torch.from_numpy(one) for one in slots])
    layer = Layer(placement, Problem(min_gain=16, base_load=base))
    ends = ranks.run(R, keep_slots, layer, many)
    assert all(one == ends[0] for one in ends)
    assert R == 1 or len(set(ends[0])) == 4  # by given slots and by homes


def test_where_counts_are_given_such_a_batch_goes_home():
    """Nobody knows the slots of the other ranks."""
    placement = Placement([0, 1, 2, 0], 2)
    planner = Planner(placement, rank=0, counts="given", min_gain=99)
    plan = planner([[0], [3]], counts=[[2, 0, 0], [0, 1, 1]], indices="physical")
    assert int(plan.status) == Status.STAYED
    assert plan.topk_idx.tolist() == [[0], [0]]
    assert plan.quota[:, 0].tolist() == [2, 1, 1]


@torch.no_grad()
def test_slots_are_kept_where_every_batch_is_exchanged():
    planner = Planner(Placement([0, 1, 2, 0], 1), min_gain=1, every=2)
    for _ in range(2):
        planner([[0, 1]])
        with pytest.raises(ContractError, match="LPLB_EP_MIN_GAIN with an engine's slots"):
            planner([[0, 1]], indices="physical")


def test_check_plan_finds_faults_of_slots_that_are_kept():
    placement, slots = Placement([0, 1, 2, 0], 1), torch.tensor([[0, 1], [3, 2]])
    layer = Layer(placement, Problem(min_gain=1))
    plan = Planner(layer)(slots, indices="physical")
    held = torch.tensor(placement.physical_to_logical)[slots].long()

    def check(topk_idx=plan.topk_idx, problem=layer.problem, **results):
        whole = plan._results._replace(**results)
        changed = Plan(topk_idx, lambda: whole, plan._split, plan._judge)
        check_plan(changed, held, placement, 0, problem, slots)

    check()
    for change, message in (
        ({"topk_idx": torch.tensor([[3, 1], [0, 2]])}, "did not keep its slot"),
        ({"quota": plan.quota + 1}, "there are quotas"),
        ({"rank_load": plan.rank_load + 1}, "rank_load is not the load"),
        ({"problem": Problem()}, "against the rule"),
    ):
        with pytest.raises(AssertionError, match=message):
            check(**change)
