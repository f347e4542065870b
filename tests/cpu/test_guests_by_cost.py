"""Guests that a plan by cost chooses: pushes count, against every choice there is."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch

from lplb_ep import CostModel, Layer, Placement, Planner, Problem, check_plan, solve
from lplb_ep.planning import reference
from lplb_ep.planning.guests import choose_guests
from lplb_ep.planning.guests_by_cost import Planned, plan_by_cost, push_waits
from lplb_ep.planning.layout import guest_components
from lplb_ep.planning.objectives import exact_solution, improve
from lplb_ep.planning.solvers import check_fit, solver_record
from lplb_ep.planning.values import rank_costs

TILES = CostModel("tiles", 8, (100, 160), 60, 5, push=150)


def problem_of(placement, cost=TILES, **fields):
    return Problem(objective="cost", cost=cost, guest_min_tokens=1, **fields).checked(placement)


def value_of(guests, load, placement, problem):
    """What the largest rank costs with these guests, from the flow's solution."""
    filled, waits = placement.with_guests(guests), push_waits(guests, placement, problem)
    quota = reference.solve(torch.from_numpy(load), filled).quota.numpy().astype(np.int64)
    quota = improve(quota, load, filled, problem, np.full(len(waits), True), waits)
    return rank_costs(quota, filled, problem, waits).max()


def value_of_plan(plan, placement, problem):
    """What the largest rank costs by a plan."""
    waits = push_waits(plan.guests, placement, problem)
    return rank_costs(plan.quota, placement.with_guests(plan.guests), problem, waits).max()


def instance(seed, num_ranks=3, num_experts=6, num_guests=1):
    rng = np.random.default_rng(seed)
    placement = Placement.homes_only(num_experts, num_ranks, num_guests_per_rank=num_guests)
    load = rng.poisson(rng.lognormal(3.5, 1.2, num_experts)).astype(np.int64)
    return placement, load, replace(TILES, push=int(rng.choice([0, 50, 200, 800])))


def test_a_rank_waits_for_its_guests_and_for_what_their_homes_send():
    placement = Placement.homes_only(6, 3, num_guests_per_rank=2)
    problem = problem_of(placement)

    def waits(guests):
        return push_waits(guests, placement, problem).tolist()

    assert waits([[-1, -1], [-1, -1], [-1, -1]]) == [0, 0, 0]
    assert waits([[2, -1], [-1, -1], [-1, -1]]) == [150, 0, 0]
    assert waits([[2, 4], [-1, -1], [-1, -1]]) == [300, 0, 0]
    # Rank 0 sends two, so both ranks that get one wait for both.
    assert waits([[-1, -1], [0, -1], [1, -1]]) == [0, 300, 300]
    quota = np.zeros((6, 3), np.int64)
    quota[:, 0] = 8
    costs = rank_costs(quota, placement, problem, np.array([150, 0, 0]))
    assert costs.tolist() == [5 + 200 + 150, 5 + 200, 5 + 200]


@pytest.mark.parametrize(("push", "number"), [(0, 1), (600, 1), (661, 0), (10_000, 0)])
def test_a_guest_is_taken_where_it_gains_more_than_its_push(push, number):
    """96 rows are 12 tiles, which cost 760. One of them costs 100 on the other rank."""
    placement = Placement.homes_only(2, 2, num_guests_per_rank=1)
    problem = problem_of(placement, replace(TILES, push=push))
    guests = plan_by_cost(np.array([96, 0]), placement, problem).guests
    assert (guests >= 0).sum() == number
    by_tokens = choose_guests(np.array([96, 0]), placement, problem)
    assert (by_tokens >= 0).sum() == 1


def test_guests_never_cost_more_than_none():
    """Where those that tokens ask for may cost several times as much."""
    worse = 0
    for seed in range(60):
        placement, load, cost = instance(seed, 4, 12, 2)
        problem = problem_of(placement, cost)
        none = np.full((4, 2), -1)
        found = plan_by_cost(load, placement, problem)
        at_most = value_of(none, load, placement, problem)
        value = value_of_plan(found, placement, problem)
        assert value < at_most or (found.guests == none).all()
        by_tokens = choose_guests(load, placement, problem)
        assert value <= max(at_most, value_of(by_tokens, load, placement, problem))
        worse += value_of(by_tokens, load, placement, problem) > at_most
    assert worse > 2


def test_with_replicas_a_plan_may_cost_more_than_tokens_but_not_than_home():
    """There is no flow. In few instances the residents' exact plan by tokens costs less."""
    more = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        rows = np.array([[*range(3 * r, 3 * r + 3), *rng.integers(0, 12, 2), -1] for r in range(4)])
        placement = Placement(rows.ravel(), 4, num_experts=12, num_guests_per_rank=1)
        load = rng.poisson(rng.choice([20, 100, 400]) * rng.lognormal(0, 1, 12))
        problem = problem_of(placement, replace(TILES, push=400))
        value = value_of_plan(plan_by_cost(load, placement, problem), placement, problem)
        tokens = exact_solution(load, placement, problem)
        home = np.where(np.arange(tokens.shape[1]) == 0, load[:, None], 0)
        assert value <= rank_costs(home, placement, problem).max()
        more.append(value / rank_costs(tokens, placement, problem).max() - 1)
    assert 0 < np.mean(np.array(more) > 0) <= 0.1
    assert max(more) < 0.1


def test_choices_are_close_to_the_best_there_is():
    """Of all guests that three ranks may have, one each."""
    gaps, taken = [], 0
    for seed in range(40):
        placement, load, cost = instance(seed)
        problem = problem_of(placement, cost)
        choices = [[e for e in range(-1, 6) if e < 0 or e // 2 != rank] for rank in range(3)]
        best = np.inf
        for chosen in itertools.product(*choices):
            guests = np.array(chosen)[:, None]
            if push_waits(guests, placement, problem).max() < best:  # all else comes on top
                best = min(best, value_of(guests, load, placement, problem))
        found = plan_by_cost(load, placement, problem)
        taken += (found.guests >= 0).any()
        gaps.append(value_of_plan(found, placement, problem) / best - 1)
    assert 10 < taken < 40
    assert np.median(gaps) <= 0.01
    assert np.mean(np.array(gaps) <= 0.05) >= 0.8


def best_of_all(load, placement, cost):
    """The least largest cost of three ranks with one guest each: all guests and all splits.

    Enumerated, with no solver. Of two copies one may as well have whole tiles."""
    home, best = placement.home_rank, np.inf
    of_rows = functools.partial(oracle.cost_of_rows, cost.steps, cost.tile, cost.slope)
    choices = [[-1, *np.flatnonzero(home != rank)] for rank in range(3)]
    for chosen in itertools.product(*choices):
        ranks = oracle.with_guests(placement, np.array(chosen)[:, None]).copy_rank
        sent = np.bincount(home[[e for e in chosen if e >= 0]], minlength=3)
        pushes = [0 if e < 0 else max(1, sent[home[e]]) for e in chosen]
        fixed = [cost.fixed + cost.push * number for number in pushes]
        splits = []
        for expert, rows in enumerate(load.tolist()):
            held = [r for r in ranks[expert].tolist() if r >= 0]
            if len(held) == 1:
                fixed[held[0]] += of_rows(rows)
                continue
            parts = {n for i in range(0, rows + cost.tile, cost.tile) for n in (i, rows - i)}
            parts = [n for n in parts if 0 <= n <= rows]
            cuts = [c for c in itertools.product(parts, repeat=len(held) - 1) if sum(c) <= rows]
            rest = [map(of_rows, (*c, rows - sum(c))) for c in cuts]
            splits.append([list(zip(held, one, strict=True)) for one in rest])
        if max(fixed) >= best:
            continue
        for split in itertools.product(*splits):
            costs = list(fixed)
            for rank, more in itertools.chain(*split):
                costs[rank] += more
            best = min(best, max(costs))
    return best


def test_plans_are_close_to_the_best_guests_and_splits():
    gaps = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        placement = Placement.homes_only(6, 3, num_guests_per_rank=1)
        load = rng.poisson(rng.lognormal(3.2, 1.0, 6)).astype(np.int64)
        cost = replace(TILES, push=int(rng.choice([0, 50, 200, 400])))
        problem = problem_of(placement, cost)
        value = value_of_plan(plan_by_cost(load, placement, problem), placement, problem)
        gaps.append(value / best_of_all(load, placement, cost) - 1)
    assert min(gaps) >= 0
    assert np.mean(np.array(gaps) <= 0.01) >= 0.7
    assert np.mean(np.array(gaps) <= 0.05) >= 0.85
    assert max(gaps) <= 0.12


def test_guests_without_tokens_are_not_pushed():
    for seed in range(40):
        placement, load, cost = instance(seed, 4, 12, 2)
        problem = problem_of(placement, cost)
        guests, quota = plan_by_cost(load, placement, problem)
        filled = placement.with_guests(guests)
        for rank, slots in enumerate(guests):
            for expert in slots[slots >= 0]:
                assert quota[expert][filled.copy_rank[expert] == rank].sum() > 0


def test_plans_hold_the_guests_and_their_waits():
    placement = Placement.homes_only(2, 2, num_guests_per_rank=1)
    layer = Layer(placement, problem_of(placement))
    layer.mark_valid()
    counts, topk = torch.tensor([[96, 0], [0, 0]]), torch.tensor([[0]] * 96)
    plan = Planner(layer, rank=0, counts="given", check=True)(topk, counts=counts)
    check_plan(plan, topk, placement, 0, layer.problem)
    assert plan.guests.tolist() == [[-1], [0]]
    solution = solve(counts.sum(0), placement, "cpu", objective="cost", cost=TILES)
    assert solution.guests.equal(plan.guests)
    assert (
        plan.reached.value
        == solution.reached
        == value_of_plan(Planned(plan.guests.numpy(), plan.quota.numpy()), placement, layer.problem)
    )
    assert solution.lower_bound <= solution.reached
    # The rank that waits computes less: 40 rows and a push, beside 56.
    assert solution.rank_load.tolist() == [56, 40]
    stale = Planner(layer, rank=0, counts="given")(topk, counts=counts, stale=True)
    assert (stale.guests == -1).all()


def test_what_does_not_go_together_is_refused_by_name():
    placement = Placement.homes_only(4, 2, num_guests_per_rank=1)
    with pytest.raises(ValueError, match="the objective 'experts' does not go with guest slots"):
        Problem(objective="experts").checked(placement)
    with pytest.raises(ValueError, match="the cost model 'tiles' has no `push`: set it"):
        Problem(objective="auto", cost=replace(TILES, push=None)).checked(placement)
    assert Problem(objective="tokens", cost=replace(TILES, push=None)).checked(placement)
    with pytest.raises(ValueError, match="cusolverdx minimises tokens, not cost; flow does"):
        solver_record("cusolverdx", placement, "cost")
    with pytest.raises(ValueError, match=r"the solver flow takes \d+ for .* 1 guest slots a rank"):
        check_fit(placement, "flow", 8 * 1024, objective="cost")
    check_fit(placement, "flow", 99 * 1024, objective="cost")
    many = Placement.homes_only(65, 65, num_guests_per_rank=1)
    with pytest.raises(ValueError, match="guest slots takes components of at most 64 ranks"):
        check_fit(many, "flow", 227 * 1024, objective="cost")


def test_pushes_are_compared_between_ranks_and_kept_in_files(tmp_path):
    with_push, without = (Problem(objective="cost", cost=replace(TILES, push=n)) for n in (9, None))
    assert with_push.fingerprint() != without.fingerprint()
    TILES.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json") == TILES
    with pytest.raises(ValueError, match="push of a cost model must be whole numbers"):
        replace(TILES, push=-1)


def test_each_domain_chooses_by_itself():
    """One of two nodes has nothing to gain, and its plan is the one that it has alone."""
    problem_for = {}
    placements = [Placement.homes_only(4 * n, 2 * n, 1, num_ranks_per_node=2) for n in (1, 2)]
    for placement in placements:
        problem_for[placement] = problem_of(placement, replace(TILES, push=50))
    alone, both = placements
    assert guest_components(both).tolist() == [0, 0, 1, 1]
    hot, calm = [96, 0, 0, 0], [40, 8, 8, 40]
    first = plan_by_cost(np.array(hot), alone, problem_for[alone])
    second = plan_by_cost(np.array(calm), alone, problem_for[alone])
    plan = plan_by_cost(np.array(hot + calm), both, problem_for[both])
    assert (first.guests >= 0).any()
    assert (second.guests == -1).all()
    assert plan.guests[:2].tolist() == first.guests.tolist()
    assert plan.guests[2:].tolist() == second.guests.tolist()
    assert (plan.quota.sum(1) == hot + calm).all()
