"""Plans by cost with guests, emulated: guests and quotas are those of the CPU."""

from dataclasses import replace

import numpy as np
import oracle
import plans
import pytest
import torch
from emulator import ORDERS
from test_emulated_guests import hot, random_guest_placement
from test_emulated_objectives import random_cost
from test_emulated_solvers import check_legal

from lplb_ep import CostModel, Placement, Problem
from lplb_ep.cost import H200
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.guests_by_cost import choice_rules, plan_by_cost
from lplb_ep.planning.solvers import GUEST_OBJECTIVE_SOLVERS
from lplb_ep.planning.structs import MAX_TOTAL, Status

VARIANTS = GUEST_OBJECTIVE_SOLVERS["flow"].variants()
LONG = [v for v in VARIANTS if v not in plans.GUEST_OBJECTIVE_VARIANTS]


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


def problem_of(placement, cost, **fields):
    return Problem(objective="cost", cost=cost, **fields).checked(placement)


def solve(memory, rank, loads, order, base=None):
    """Guests, quotas, rank loads and endings of loads."""
    p = rank.placement
    guests = memory.empty((len(loads), p.num_ranks, p.num_guests_per_rank))
    bounds = {} if base is None else {"base": memory.array(base, np.int32)}
    launch, *rest = rank.solve_loads(loads, guests, **bounds)
    memory.run([launch], order=order)
    assert (rank.num_done == 0).all(), "the next launch counts from 0"
    return [array.copy() for array in (guests, *rest)]


def check(memory, library, placement, loads, problem, orders=ORDERS[:1], variant=None):
    """Plans are those of the definition, in every order. Returns how many guests there are."""
    rank = plans.Rank(memory, placement, 0, library, variant=variant, problem=problem)
    base = None if problem.base_load is None else problem.base_load.numpy()
    expected = [plan_by_cost(load, placement, problem) for load in loads]
    for order in orders:
        guests, quota, rank_load, endings = solve(memory, rank, loads, order, base)
        assert (endings[..., 0] == Status.OPTIMAL).all()
        assert (guests == np.stack([one.guests for one in expected])).all(), f"order {order}"
        assert (quota == np.stack([one.quota for one in expected])).all(), f"order {order}"
        for one in zip(loads, guests, quota, rank_load, strict=True):
            load, chosen, given, loaded = one
            check_legal(placement.with_guests(chosen), load[None], given[None], loaded[None])
    return int((guests >= 0).sum())


def random_problem(rng, placement):
    """Costs of any shape or an H200's by smaller tiles, with pushes from free to very dear."""
    cost = replace(random_cost(rng), push=int(rng.choice([0, 5, 50, 500, 3000])))
    if rng.random() < 0.6:
        push = int(rng.choice([1000, 20_000, 100_000]))
        cost = replace(H200, tile=int(rng.choice([4, 16, 64])), push=push)
    base = torch.from_numpy(rng.integers(0, 200, placement.num_ranks))
    return problem_of(
        placement,
        cost,
        guest_min_tokens=int(rng.choice([1, 8, 64])),
        guest_tolerance=float(rng.choice([0, 0.02, 0.3])),
        base_load=base if rng.random() < 0.5 else None,
    )


def random_loads(rng, num_experts, number):
    weight = rng.lognormal(0, rng.choice([0.5, 1.2], (number, 1)), (number, num_experts))
    return rng.poisson(rng.choice([5, 50, 300], (number, 1)) * weight)


@pytest.mark.parametrize(
    ("R", "node", "number"),
    [
        *(
            (2, None, 3),
            (3, 1, 1),
            (5, None, 2),
            (8, 4, 2),
            (8, None, 2),
            (16, 8, 1),
            (33, None, 1),
        ),
        *(long(R, node, 40) for R, node in ((2, None), (4, 2), (6, 3), (7, None), (8, None))),
        *(long(R, node, 10) for R, node in ((12, 4), (16, None), (33, None), (40, 8), (64, None))),
    ],
)
def test_any_batch_is_planned_as_by_the_cpu(R, node, number, memory, library):
    rng, found = np.random.default_rng(R), 0
    for i in range(number):
        E, shape = int(rng.integers(R, 4 * R + 9)), (int(rng.integers(0, 3)), 1 + i % 3)
        placement = random_guest_placement(rng, R, E, *shape, node)
        loads = np.stack([*random_loads(rng, E, 2), hot(rng, placement)])
        problem = random_problem(rng, placement)
        found += check(memory, library, placement, loads, problem, ORDERS[i % 3 : i % 3 + 1])
    assert found > 0 or R == 3, "some batch has guests, unless each rank is a node"


def test_homes_in_order_in_every_order_of_threads(memory, library):
    rng = np.random.default_rng(1)
    placement = Placement.homes_only(32, 8, 3)
    problem = problem_of(placement, replace(H200, tile=16, push=20_000))
    loads = np.stack([*random_loads(rng, 32, 2), hot(rng, placement)])
    assert check(memory, library, placement, loads, problem, ORDERS) > 3


@pytest.mark.parametrize("variant", [*map(long, LONG)], ids=lambda v: str(v.size))
def test_further_variants_plan_as_the_cpu(variant, memory, library):
    rng = np.random.default_rng(variant.size)
    for R, redundant, G in ((variant.size, 0, 2), (variant.size - 1, 1, 1)):
        placement = random_guest_placement(rng, R, 3 * R + 5, redundant, G)
        loads = np.stack([*random_loads(rng, 3 * R + 5, 1), hot(rng, placement)])
        for order in ORDERS:
            problem = random_problem(rng, placement)
            check(memory, library, placement, loads, problem, [order], variant)


def test_loads_of_two_to_the_31_tokens_and_the_dearest_rows(memory, library):
    placement = Placement.homes_only(8, 4, 1)
    loads = np.zeros((2, 8), np.int64)
    loads[0, 3] = MAX_TOTAL
    loads[1] = MAX_TOTAL // 8
    dear = CostModel("dear", 1, (MAX_TOTAL,), MAX_TOTAL, push=MAX_TOTAL)
    usual = replace(H200, push=280_000)
    assert sum(
        check(memory, library, placement, loads, problem_of(placement, c)) for c in (dear, usual)
    )


def test_a_second_search_drops_guests_too(memory, library):
    """In these two of 1,500 batches another choice costs least if ranks still wait for them."""
    for tile, load in (
        (16, [208, 19, 21, 281, 81, 116, 61, 146, 21, 163]),
        (4, [110, 63, 70, 88, 145]),
    ):
        placement = Placement.homes_only(len(load), 5, 1)
        cost = replace(H200, tile=tile, push=20_000)
        problem = problem_of(placement, cost, guest_min_tokens=1)
        assert check(memory, library, placement, np.array([load]), problem) > 0


def test_ranks_that_take_no_part_and_empty_batches(memory, library):
    shape = {"num_ranks": 8, "num_ranks_per_node": 4, "active_ranks": [0, 1, 5, 6]}
    placement = Placement.homes_only(16, num_guests_per_rank=2, **shape)
    loads = np.zeros((2, 16), np.int64)
    loads[1, :8] = np.arange(8) * 100
    problem = problem_of(placement, replace(H200, tile=16, push=1000))
    assert check(memory, library, placement, loads, problem) > 0


def planned(memory, library, placement, problem, counts, topk, rank=0, order=0, **changes):
    """The plan of a rank, launched as on a GPU with given counts."""
    one = plans.Rank(memory, placement, rank, library, problem=problem)
    plan = one.plan(topk)
    picks = one.picks(topk, plan)
    launches = [
        one.count(picks, exchanged=False),
        one.solve(picks, plan, memory.array(counts, np.int32), head=0, **changes),
        one.route(picks, plan, exchanged=False),
    ]
    memory.run(launches, order=order)
    return plan


@pytest.mark.parametrize(("node", "redundant", "order"), [(8, 1, 0), (4, 0, 1), (4, 1, 2)])
def test_picks_go_to_the_residents_and_guests(node, redundant, order, memory, library):
    rng = np.random.default_rng(node + redundant)
    placement = random_guest_placement(rng, 8, 20, redundant, 2, node)
    problem = problem_of(placement, replace(H200, tile=4, push=10_000), guest_min_tokens=1)
    weight, rank = rng.lognormal(0, 1.2, 20), int(rng.integers(8))
    topk = oracle.random_topk(rng, 40, 3, weight)
    counts = rng.poisson(10 * weight, (8, 20))
    counts[rank] = np.bincount(topk[topk >= 0], minlength=20)
    plan = planned(memory, library, placement, problem, counts, topk, rank, order)
    guests, quota = plan_by_cost(counts.sum(0), placement, problem)
    assert plan.status[0] == Status.OPTIMAL
    assert (plan.guests == guests).all()
    assert (plan.quota == quota).all()
    assert (guests >= 0).any()
    filled, tokens = placement.with_guests(guests), torch.from_numpy(counts.astype(np.int32))
    shares = cpu.split(tokens, torch.from_numpy(plan.quota.copy()), filled)
    expected = cpu.rewrite(torch.from_numpy(topk), shares[rank], filled)
    assert (plan.physical == expected.numpy()).all()


@pytest.mark.parametrize(
    ("bad", "status", "ends"),
    [
        (None, Status.STALE, Status.STALE),
        (-1, Status.OPTIMAL, Status.BAD_COUNTS),
        (MAX_TOTAL, Status.OPTIMAL, Status.BAD_COUNTS),
    ],
)
def test_a_batch_that_goes_home_has_no_guests(bad, status, ends, memory, library):
    rng = np.random.default_rng(5)
    placement = random_guest_placement(rng, 8, 20, 1, 2, 4)
    problem = problem_of(placement, replace(H200, push=1000))
    topk = oracle.random_topk(rng, 40, 3, np.ones(20))
    counts = np.tile(np.bincount(topk[topk >= 0], minlength=20), (8, 1))
    given = counts.copy()
    if bad is not None:
        given[1, 3] = bad
    plan = planned(memory, library, placement, problem, given, topk, status=status)
    assert plan.status[0] == ends
    assert (plan.guests == -1).all()
    assert (plan.physical == cpu.rewrite_home(torch.from_numpy(topk), placement).numpy()).all()
    assert (plan.quota[:, 0] == counts.sum(0) * (ends < Status.BAD_COUNTS)).all()
    assert (plan.quota[:, 1:] == 0).all()


def test_rules_of_choices_are_within_the_problems():
    placement = Placement.homes_only(8, 4, 1)
    cost = CostModel("tiles", 8, (100, 160), 60, push=300)
    problem = problem_of(placement, cost, guest_tolerance=0.15, guest_min_tokens=20)
    rules = choice_rules(problem)
    assert [rule.tolerance for rule in rules] == [1500, 1500, 1500, 1500, 1500, 2000, 5000]
    assert [rule.min_tokens for rule in rules] == [32, 32, 32, 20, 20, 20, 20]
