"""Plans by active slots and by cost, emulated: those of the CPU from the same exact solution."""

from dataclasses import replace

import numpy as np
import oracle
import plans
import pytest
import torch
from emulator import ORDERS

from lplb_ep import CostModel, Placement, Problem
from lplb_ep.cost import H200
from lplb_ep.planning import objectives
from lplb_ep.planning.search_rules import AUTO_GAP
from lplb_ep.planning.solvers import OBJECTIVE_SOLVERS
from lplb_ep.planning.structs import Status

OBJECTIVES = ("experts", "cost", "auto")
LONG = [v for v in OBJECTIVE_SOLVERS["flow"].variants() if v not in plans.OBJECTIVE_VARIANTS]


def solve(memory, rank, loads, order, base):
    """Quotas and rank loads [B, ...] of loads."""
    bounds = {} if base is None else {"base": memory.array(base, np.int32)}
    launch, quota, rank_load, endings = rank.solve_loads(loads, **bounds)
    memory.run([launch], order=order)
    assert (endings[..., 0] == Status.OPTIMAL).all()
    return quota.copy().astype(np.int64), rank_load.copy()


def check(memory, library, placement, loads, cost, base=None, orders=ORDERS, variant=None):
    """The kernel's quotas are the definition's, from the flow's solutions of the same variant."""
    variant = variant or plans.variant_for(placement, "flow", "auto")
    flow = plans.Rank(memory, placement, 0, library, variant=variant)
    tokens, _ = solve(memory, flow, loads, 0, base)
    active = None if base is None else base > 0
    whole, _ = solve(memory, flow, (loads > 0).astype(np.int64), 0, active)
    differ = []
    for objective in OBJECTIVES:
        problem = Problem(
            objective=objective,
            cost=cost,
            base_load=None if base is None else torch.from_numpy(base),
        ).checked(placement)
        rank = plans.Rank(memory, placement, 0, library, variant=variant, problem=problem)
        exact = whole if objective == "experts" else tokens
        expected = [
            objectives.quotas_by_objective(load, placement, problem, one)
            for load, one in zip(loads, exact, strict=True)
        ]
        expert, column = np.nonzero(placement.copy_rank >= 0)
        of_ranks = placement.copy_rank[expert, column]
        for order in orders:
            quota, rank_load = solve(memory, rank, loads, order, base)
            assert (quota == np.stack(expected)).all(), f"other quotas in order {order}"
            for given, loaded in zip(quota, rank_load, strict=True):
                sums = np.bincount(of_ranks, given[expert, column], placement.num_ranks)
                assert (sums == loaded).all()
        differ.append(np.any(quota != tokens))
    return differ


def random_cost(rng):
    """A table of an H200's shape, or of any; tiles of any size."""
    if rng.random() < 0.5:
        return CostModel("scaled", int(rng.choice([32, 100, 128])), H200.steps, H200.slope, 700)
    steps = np.cumsum(rng.integers(0, 50, rng.integers(1, 20))).tolist()
    return CostModel("any", int(rng.integers(1, 200)), tuple(steps), int(rng.integers(0, 40)))


@pytest.mark.parametrize("R", [2, 5, 8, 24, 33, 64])
def test_any_placement_is_planned_as_by_the_cpu(R, memory, library):
    rng = np.random.default_rng(R)
    differ = []
    for _ in range(2):
        E = int(rng.integers(R, 3 * R + 20))
        copies = int(rng.integers(1, 4)), int(rng.integers(2, 9))
        placement = oracle.random_placement(rng, R, E, *copies)
        scales = [float(scale) for scale in rng.choice([3, 30, 100, 300], 3)]
        loads = np.stack([oracle.random_load(rng, E, scale) for scale in scales])
        base = rng.integers(0, 300, R) if rng.random() < 0.5 else None
        orders = ORDERS if R <= 8 else ORDERS[-1:]
        differ.append(check(memory, library, placement, loads, random_cost(rng), base, orders))
    assert R == 2 or np.any(differ, axis=0).all(), "every objective has plans of its own"


@pytest.mark.parametrize("tokens", [1, 16, 256])
def test_placements_of_real_size_are_planned_as_by_the_cpu(tokens, memory, library):
    """Chains of several moves, and steps that shrink."""
    rng = np.random.default_rng(tokens)
    popularity = rng.lognormal(0, 0.7, 128)
    placement = Placement.from_history(
        torch.from_numpy(popularity), num_ranks=16, num_redundant_per_rank=2
    )
    drifted = popularity * rng.lognormal(0, 0.4, 128)
    loads = rng.multinomial(16 * 8 * tokens, drifted / drifted.sum(), 2).astype(np.int64)
    check(memory, library, placement, loads, H200, orders=ORDERS[:1])


def test_costs_that_favour_cuts(memory, library):
    """Where two slots of half the rows cost less than one of all, no bound is of whole experts."""
    convex = CostModel("convex", 16, (10, 30, 60, 100, 150, 210, 280), 80)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        placement = oracle.random_placement(rng, 6, 18, 2)
        loads = rng.poisson(rng.lognormal(3.5, 0.6, (3, 18)))
        check(memory, library, placement, loads, convex, orders=ORDERS[:1])


def test_rows_that_cost_just_what_is_left(memory, library):
    """Where a tile costs 1, aims meet steps of the table; with these seeds it matters."""
    units = CostModel("units", 4, tuple(range(1, 20)), 1)
    rows = CostModel("rows", 1, (1,), 1)
    for seed, cost in ((5, units), (6, units), (11, units), (5, rows), (15, rows), (31, rows)):
        rng = np.random.default_rng(seed)
        placement = oracle.random_placement(rng, 6, 18, 2)
        loads = rng.poisson(rng.lognormal(3.5, 0.8, 18))[None]
        check(memory, library, placement, loads, cost, orders=ORDERS[:1])


def test_the_flow_comes_behind_a_search_that_does_not_suffice(memory, library):
    """More copies than threads that push, so that others put the even split back."""
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        popularity = rng.lognormal(0, 0.7, 64)
        placement = Placement.from_history(
            torch.from_numpy(popularity), num_ranks=8, num_redundant_per_rank=4
        )
        drifted = popularity * rng.lognormal(0, 0.4, 64)
        loads = rng.multinomial(8 * 8 * 64, drifted / drifted.sum())[None].astype(np.int64)
        check(memory, library, placement, loads, H200, orders=ORDERS[-1:])


def test_fronts_of_more_arcs_than_lanes(memory, library):
    """Of which the last lanes' have nowhere to go: in these the emulator saw a barrier missing."""
    for seed in (50, 66, 93):
        rng = np.random.default_rng(seed)
        placement = oracle.random_placement(rng, 8, 100, 40)
        loads = rng.poisson(300 * rng.lognormal(0, 1.2, (2, 100)))
        cost = replace(H200, tile=16)
        check(memory, library, placement, loads, cost, orders=ORDERS[-1:])


def test_the_plan_by_tokens_may_be_the_cheapest(memory, library):
    """Of five thousand random instances it is so in this one."""
    rng = np.random.default_rng(4378)
    R = int(rng.integers(4, 9))
    E = int(rng.integers(R, 3 * R))
    copies = int(rng.integers(1, 4)), int(rng.integers(2, 9))
    placement = oracle.random_placement(rng, R, E, *copies)
    load = rng.poisson(rng.lognormal(float(rng.choice([3.5, 4.5, 5.2])), 0.8, E))
    cost = CostModel("scaled", int(rng.choice([32, 64, 128])), H200.steps, H200.slope, 700)
    check(memory, library, placement, load[None], cost, orders=ORDERS[:1])


def test_all_tokens_at_home_are_as_cheap_as_any_plan(memory, library):
    """And above the bound, so that the others are made: with this table and these seeds."""
    steps = (30_900, 36_500, 71_300, 76_200, 103_300, 108_250, 135_400, 140_300)
    stairs = CostModel("stairs", 128, steps, 16_025, 40_000)
    for seed in (2, 18, 36):
        rng = np.random.default_rng(seed)
        placement = oracle.random_placement(rng, 6, 18, 2)
        loads = rng.poisson(rng.lognormal(4.0, 0.8, 18))[None]
        check(memory, library, placement, loads, stairs, orders=ORDERS[:1])
        problem = Problem(objective="auto", cost=stairs)
        home = np.pad(loads[0, :, None], ((0, 0), (0, placement.max_replicas - 1)))
        assert (objectives.quotas_by_objective(loads[0], placement, problem) == home).all()


@pytest.mark.parametrize("unit", [10, 1_000])
def test_auto_does_not_search_where_it_takes_longer_than_it_gains(unit, memory, library):
    """Loads of a batch differ in size, and costs in the unit. So only some are searched."""
    cost = CostModel("stairs", 10, tuple(unit * n for n in (50, 60, 110, 120)), 30 * unit)
    rng = np.random.default_rng(0)
    placement = oracle.random_placement(rng, 8, 20, 2)
    loads = np.stack([rng.poisson(rng.lognormal(3.3, 0.9, 20)) for _ in range(6)])
    base = rng.integers(0, 2, 8) * rng.integers(0, 200, 8)
    for given in (None, base):
        check(memory, library, placement, loads, cost, given, ORDERS[:1])
    auto, by_cost = (Problem(objective=name, cost=cost) for name in ("auto", "cost"))
    differs = [
        (
            objectives.quotas_by_objective(load, placement, auto)
            != objectives.quotas_by_objective(load, placement, by_cost)
        ).any()
        for load in loads
    ]
    assert set(differs) == ({True} if unit == 10 else {True, False})


@pytest.mark.parametrize("is_large", [False, True])
def test_auto_decides_at_its_limits_as_the_cpu(is_large, memory, library):
    """Just `AUTO_GAP` above the bound, or just the table's rows in the mean, with these seeds."""
    short = CostModel("short", 10, (50_000, 60_000, 110_000, 120_000), 30_000)
    stairs = CostModel("stairs", 10, tuple(3_000 * n for n in range(2, 18)), 3_000)
    assert stairs.slope == AUTO_GAP, "costs are multiples of the gap"
    for seed in (1, 8, 11) if is_large else (83, 88, 92):
        rng = np.random.default_rng(seed)
        placement = oracle.random_placement(rng, 4, 10, 2)
        load = rng.poisson(rng.lognormal(3.0, 0.9, 10))
        if is_large:
            load[load.argmax()] += short.table_rows * (load > 0).sum() - load.sum()
        check(
            memory, library, placement, load[None], short if is_large else stairs, orders=ORDERS[:1]
        )


def test_the_bound_of_mean_slots_rounds_up(memory, library):
    """With these seeds plans differ where it rounds down."""
    for seed in (18, 121, 499):
        rng = np.random.default_rng(seed)
        placement = oracle.random_placement(rng, 6, 18, 2)
        loads = rng.poisson(rng.lognormal(2.0 + seed % 3, 0.8, 18))[None]
        check(memory, library, placement, loads, H200, orders=ORDERS[:1])


def test_ranks_that_share_nothing_and_empty_batches(memory, library):
    placement = Placement([0, 1, 2, 0, 3, 4, 5, 3], 4, num_experts=6)
    loads = np.array([[0] * 6, [4, 3, 3, 0, 0, 9], [700, 5, 5, 300, 1, 1]])
    check(memory, library, placement, loads, H200, base=np.array([0, 3, 0, 200]))
    alone = Placement([0, 1, 2, 3], 2)
    check(memory, library, alone, np.array([[1, 2, 3, 4]]), H200)


def test_loads_of_two_to_the_31_rows(memory, library):
    placement = Placement([0, 1, 2, 0], 2)
    loads = np.array([[2**31 - 1 - 200, 100, 100], [2**30, 2**30 - 1, 0]])
    check(memory, library, placement, loads, H200)
    steep = CostModel("steep", 1, (2**31 - 1,), 2**31 - 1)
    check(memory, library, placement, loads, steep)


@pytest.mark.long
@pytest.mark.parametrize("variant", LONG, ids=lambda v: str(v.size))
def test_further_variants_plan_as_the_cpu(variant, memory, library):
    rng = np.random.default_rng(variant.size)
    for R in (variant.size - 1, variant.size):
        placement = oracle.random_placement(rng, R, 3 * R, 2)
        loads = np.stack([oracle.random_load(rng, 3 * R, scale) for scale in (10.0, 200.0)])
        check(memory, library, placement, loads, random_cost(rng), variant=variant)
