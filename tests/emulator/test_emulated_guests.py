"""The kernels of placements with guest slots, emulated, against the CPU's plans of filled ones."""

import math

import numpy as np
import oracle
import plans
import pytest
import torch
from emulator import ORDERS
from test_emulated_solvers import check_legal, hot, random_loads

from lplb_ep import Placement
from lplb_ep.planning import layout
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.guests import choose_guests
from lplb_ep.planning.solve import judge, least_value
from lplb_ep.planning.solvers import GUEST_SOLVERS
from lplb_ep.planning.structs import MAX_TOTAL, Status
from lplb_ep.problem import Problem

LONG = [v for v in GUEST_SOLVERS["flow"].variants() if v not in plans.GUEST_VARIANTS]


SHAPES = [(1, None), (2, 1), (8, 4), (13, None), (32, 8), (33, None)]
"""Ranks, and ranks of a node."""


def random_guest_placement(rng, R, E, redundant, G, node=None):
    """Residents anywhere, or on the nodes of their homes alone, and guest slots."""
    residents = oracle.random_placement(rng, R, E, redundant, 8, node)
    rows = residents.physical_to_logical.reshape(R, -1).copy()
    if rng.random() < 0.5:
        rows[residents.node[residents.home_rank[rows]] != residents.node[:, None]] = -1
    table = np.concatenate([rows, np.full((R, G), -1)], axis=1)
    return Placement(
        table.ravel(), R, num_experts=E, num_ranks_per_node=node, num_guests_per_rank=G
    )


def random_guests(rng, placement, share=0.8, favourite=None):
    """[R, G] of any guests that there may be; often of one expert, `favourite`."""
    p = placement
    guests = np.full((p.num_ranks, p.num_guests_per_rank), -1)
    for rank in p.active_ranks:
        held = p.physical_to_logical.reshape(p.num_ranks, -1)[rank]
        near = np.flatnonzero(p.node[p.home_rank] == p.node[rank])
        for slot in range(p.num_guests_per_rank):
            able = np.setdiff1d(near, np.concatenate([held, guests[rank]]))
            if able.size and rng.random() < share:
                liked = favourite in able and rng.random() < 0.5
                guests[rank, slot] = favourite if liked else rng.choice(able)
    return guests


def best(placement, filled, load, base=None):
    """The optimum of each component in which guests may come, whole."""
    component = layout.guest_components(placement)
    home = component[placement.home_rank]
    bases = np.zeros(placement.num_ranks, np.int64) if base is None else base
    optima = []
    for g in range(component.max() + 1):
        own = {"base_load": torch.from_numpy(np.where(component == g, bases, 0))}
        bound = cpu.solve(torch.from_numpy(np.where(home == g, load, 0)), filled, **own).bound
        optima.append(math.ceil(bound))
    return optima


def check(memory, rank, guests, loads, orders=ORDERS, **bounds):
    """Quotas of the residents and these guests, the best of each component, in every order."""
    placement, first = rank.placement, None
    filled = placement.with_guests(guests)
    given = {name: memory.array(value, np.int32) for name, value in bounds.items()}
    for order in orders:
        chosen = memory.array(np.broadcast_to(guests, (len(loads), *guests.shape)), np.int32)
        launch, quota, rank_load, endings = rank.solve_loads(loads, chosen, **given)
        memory.run([launch], order=order)
        assert (endings[..., 0] == Status.OPTIMAL).all()
        assert (chosen == guests).all()
        check_legal(filled, loads, quota, rank_load)
        first = quota.copy() if first is None else first
        assert (quota == first).all(), f"other quotas in order {order}"
    component, base = layout.guest_components(placement), bounds.get("base", 0)
    for load, loaded in zip(loads, rank_load, strict=True):
        largest = np.zeros(component.max() + 1, np.int64)
        np.maximum.at(largest, component, loaded + base)
        assert largest.tolist() == best(placement, filled, load, bounds.get("base"))


@pytest.mark.parametrize(
    "variant",
    [*plans.GUEST_VARIANTS, *(pytest.param(v, marks=pytest.mark.long) for v in LONG)],
    ids=lambda v: "-".join(str(int(x)) for x in v),
)
def test_every_variant_is_exact(variant, memory, library):
    rng = np.random.default_rng(variant.size)
    for R, redundant, G in ((variant.size, 0, 1), (variant.size - 1, 1, 1), (variant.size, 0, 3)):
        placement = random_guest_placement(rng, R, 3 * R + 5, redundant, G)
        if (
            not variant.more
            and layout.capacity_for(placement).max_edges > variant.parts * variant.turns
        ):
            continue
        rank = plans.Rank(memory, placement, 0, library, variant=variant, given=True)
        loads = np.stack([*random_loads(rng, placement.num_experts, 1), hot(rng, placement)])
        check(memory, rank, random_guests(rng, placement, favourite=int(loads[1].argmax())), loads)


@pytest.mark.parametrize(("R", "node"), SHAPES)
def test_any_residents_and_guests_are_solved_exactly(R, node, memory, library):
    rng = np.random.default_rng(R)
    for redundant, G in ((0, 2), (2, 1), (1, 3)):
        placement = random_guest_placement(
            rng, R, int(rng.integers(R, 4 * R + 9)), redundant, G, node
        )
        rank = plans.Rank(memory, placement, 0, library, given=True)
        loads = np.stack([*random_loads(rng, placement.num_experts, 2), hot(rng, placement)])
        base = rng.integers(0, 500, R)
        check(memory, rank, random_guests(rng, placement), loads)
        check(memory, rank, random_guests(rng, placement, 0.3), loads, orders=(0,), base=base)
        check(memory, rank, np.full((R, G), -1), loads, orders=(0,))


def planned(memory, library, placement, guests, counts, topk, rank=0, order=0, **changes):
    """The plan of a rank with given guests, launched as on a GPU with given counts."""
    one = plans.Rank(memory, placement, rank, library, given=True)
    plan = one.plan(topk)
    plan.guests[...] = guests
    memory_of = memory.array(counts, np.int32)
    picks = one.picks(topk, plan)
    plan.guests = memory.array(guests, np.int32)
    launches = [
        one.count(picks, exchanged=False),
        one.solve(picks, plan, memory_of, head=0, **changes),
        one.route(picks, plan, exchanged=False),
    ]
    memory.run(launches, order=order)
    return one, plan


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("R", "node", "redundant", "G"), [(8, None, 0, 1), (8, 4, 1, 2), (6, 2, 2, 1), (33, None, 1, 2)]
)
def test_picks_go_to_the_residents_and_guests(R, node, redundant, G, order, memory, library):
    rng = np.random.default_rng(R * G)
    for E in (R, 2 * R + 3):
        placement = random_guest_placement(rng, R, E, redundant, G, node)
        guests = random_guests(rng, placement)
        weight, rank = rng.lognormal(0, 1, E), int(rng.integers(R))
        topk = oracle.random_topk(rng, 40, 3, weight)
        counts = rng.poisson(10 * weight, (R, E))
        counts[rank] = np.bincount(topk[topk >= 0], minlength=E)
        _, plan = planned(memory, library, placement, guests, counts, topk, rank, order)
        assert plan.status[0] == Status.OPTIMAL
        assert (plan.guests == guests).all()
        filled = placement.with_guests(guests)
        quota, tokens = (
            torch.from_numpy(plan.quota.copy()),
            torch.from_numpy(counts.astype(np.int32)),
        )
        shares = cpu.split(tokens, quota, filled)
        expected = cpu.rewrite(torch.from_numpy(topk), shares[rank], filled)
        assert (plan.physical == expected.numpy()).all()
        check_legal(filled, counts.sum(0)[None], plan.quota[None], plan.rank_load[None])


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_that_goes_home_has_no_guests(order, memory, library):
    rng = np.random.default_rng(5)
    placement = random_guest_placement(rng, 8, 20, 1, 2, 4)
    guests, topk = random_guests(rng, placement), oracle.random_topk(rng, 40, 3, np.ones(20))
    counts = np.tile(np.bincount(topk[topk >= 0], minlength=20), (8, 1))
    home = cpu.rewrite_home(torch.from_numpy(topk), placement).numpy()
    for changes, status in (
        ({"status": Status.STALE}, Status.STALE),
        ({"max_rounds": 0}, Status.NOT_CONVERGED),
        ({"bad": -1}, Status.BAD_COUNTS),
        ({"bad": MAX_TOTAL}, Status.BAD_COUNTS),
    ):
        given = counts.copy()
        given[1, 3] = changes.pop("bad", given[1, 3])
        _, plan = planned(memory, library, placement, guests, given, topk, 0, order, **changes)
        assert plan.status[0] == status
        assert (plan.guests == -1).all()
        assert (plan.physical == home).all()
        counted = status < Status.BAD_COUNTS
        assert (plan.quota[:, 0] == counts.sum(0) * counted).all()
        assert (plan.quota[:, 1:] == 0).all()


def choose(memory, rank, loads, order, **bounds):
    """Guests of loads, chosen by the kernel; their plans are exact."""
    bounds = {name: memory.array(value, np.int32) for name, value in bounds.items()}
    p = rank.placement
    guests = memory.empty((len(loads), p.num_ranks, p.num_guests_per_rank))
    launch, quota, rank_load, endings = rank.solve_loads(loads, guests, **bounds)
    memory.run([launch], order=order)
    assert (endings[..., 0] == Status.OPTIMAL).all()
    return guests.copy(), quota.copy(), rank_load.copy()


def check_choice(memory, rank, loads, orders=ORDERS, problem=None, **bounds):
    """The guests are those of the definition, in every order, and the quotas the best over them."""
    problem = (problem or Problem()).checked(rank.placement)
    rank.guest_rule = problem.guest_rule
    expected = np.stack([choose_guests(load, rank.placement, problem) for load in loads])
    for order in orders:
        guests, quota, rank_load = choose(memory, rank, loads, order, **bounds)
        assert (guests == expected).all(), f"other guests in order {order}"
    for load, chosen, given, loaded in zip(loads, guests, quota, rank_load, strict=True):
        filled = rank.placement.with_guests(chosen)
        check_legal(filled, load[None], given[None], loaded[None])
        solved = torch.from_numpy(given), torch.from_numpy(load), filled, problem
        how = judge(*solved)
        assert how.value == least_value(how, *solved)
    return int((guests >= 0).sum())


def skewed(rng, placement, number=2):
    """Loads of recorded skew, and one of a few hot ranks."""
    E = placement.num_experts
    weight = rng.lognormal(0, 1.2, (number, E))
    return np.stack([*rng.poisson(200 * weight), hot(rng, placement)])


@pytest.mark.parametrize(("R", "node"), SHAPES)
def test_guests_are_those_of_the_definition(R, node, memory, library):
    rng, number = np.random.default_rng(R), 0
    for redundant, G in ((0, 1), (0, 3), (1, 1), (2, 2)):
        E = int(rng.integers(R, 5 * R + 9))
        placement = random_guest_placement(rng, R, E, redundant, G, node)
        rank = plans.Rank(memory, placement, 0, library)
        loads = skewed(rng, placement, 2 if R < 32 else 1)  # seconds each
        number += check_choice(memory, rank, loads, orders=ORDERS[:2])
    assert number > 5 or R < 3


@pytest.mark.parametrize("redundant", [0, 1, 2])
def test_one_block_chooses_as_the_definition(redundant, memory, library):
    """Without clusters the block that solves the residents makes the fills, too."""
    rng = np.random.default_rng(redundant)
    placement = random_guest_placement(rng, 8, 26, redundant, 2, 4 + 4 * (redundant > 1))
    rank = plans.Rank(memory, placement, 0, library, one_block=True)
    loads = skewed(rng, placement)
    assert check_choice(memory, rank, loads, orders=ORDERS[:2]) > 2
    base = rng.integers(0, 400, 8)
    problem = Problem(base_load=torch.from_numpy(base))
    check_choice(memory, rank, loads, ORDERS[2:3], problem, base=base)
    # One that residents balance, behind one that they do not.
    calm = np.stack([loads[-1], np.full(26, 1000)])
    check_choice(memory, rank, calm, orders=ORDERS[:1])


@pytest.mark.parametrize(
    ("R", "node", "active"),
    [
        (8, None, [0, 1, 3]),
        (8, 4, [0, 1, 5, 6]),
        (8, 4, [0, 1, 2, 3]),
        (8, 2, [0, 1, 4, 5, 6, 7]),
        (33, None, range(5, 30)),
    ],
)
def test_ranks_that_take_no_part_get_no_guests(R, node, active, memory, library):
    rng, number = np.random.default_rng(R), 0
    idle = np.setdiff1d(np.arange(R), active)
    base = rng.integers(0, 300, R)
    problem = Problem(base_load=torch.from_numpy(base))
    shape = {"num_ranks": R, "num_ranks_per_node": node, "active_ranks": [*active]}
    for placement in (
        Placement.homes_only(4 * len(active), num_guests_per_rank=2, **shape),
        Placement.from_history(
            rng.lognormal(0, 1, 3 * len(active)),
            num_redundant_per_rank=1,
            num_guests_per_rank=1,
            num_groups=len(np.unique(np.array(active) // (node or R))),  # no node is joined
            **shape,
        ),
    ):
        rank = plans.Rank(memory, placement, 0, library)
        loads = skewed(rng, placement)
        number += check_choice(memory, rank, loads, orders=ORDERS[:2])
        check_choice(memory, rank, loads, ORDERS[2:3], problem, base=base)
        guests, _, rank_load = choose(memory, rank, loads, ORDERS[0])
        assert (guests[:, idle] == -1).all()
        assert (rank_load[:, idle] == 0).all()
    assert number > 2


@pytest.mark.parametrize(("R", "E", "G"), [(8, 256, 6), (4, 150, 2), (64, 256, 1)])
def test_ranks_of_many_experts(R, E, G, memory, library):
    """A lane looks at one place of a rank, at two, or at more."""
    rng = np.random.default_rng(E)
    placement = Placement.homes_only(E - E % R, R, G)
    rank = plans.Rank(memory, placement, 0, library)
    assert check_choice(memory, rank, skewed(rng, placement, 1), orders=ORDERS[:1]) > G


@pytest.mark.parametrize(("E", "redundant", "G"), [(512, 0, 8), (200, 100, 1)])
def test_more_places_and_replicas_than_threads(E, redundant, G, memory, library):
    rng = np.random.default_rng(E)
    placement = Placement.homes_only(E, 8, G)
    if redundant:
        placement = random_guest_placement(rng, 8, E, redundant, G)
        assert layout.capacity_for(placement).max_replicas > GUEST_SOLVERS["flow"].num_threads
    assert 8 * placement.num_local_slots > GUEST_SOLVERS["flow"].num_threads
    loads = skewed(rng, placement, 1)
    guests = random_guests(rng, placement, favourite=int(loads[1].argmax()))
    check_choice(memory, plans.Rank(memory, placement, 0, library), loads, ORDERS[2:3])
    rank = plans.Rank(memory, placement, 0, library, given=True)
    check(memory, rank, guests, loads, ORDERS[1:2])


@pytest.mark.parametrize("R", [3, 8, 20, 64])
def test_other_rules_base_loads_and_speeds(R, memory, library):
    rng = np.random.default_rng(200 + R)
    for redundant, G in ((0, 2), (1, 1)):
        placement = random_guest_placement(rng, R, 3 * R, redundant, G)
        rank = plans.Rank(memory, placement, 0, library)
        loads = skewed(rng, placement, 1)
        bounds = {"base": rng.integers(0, 900, R), "speed": rng.integers(1, 9, R)}
        names = {"base": "base_load", "speed": "speed"}
        one = () if R == 64 else ({"base"}, {"speed"})  # seconds each
        for own in ({}, *one, {"base", "speed"}):
            given = {name: bounds[name] for name in sorted(own)}
            of_problem = {names[name]: torch.from_numpy(value) for name, value in given.items()}
            tolerance, least = float(rng.choice([0, 0.01, 0.3])), int(rng.choice([1, 32, 200]))
            problem = Problem(**of_problem, guest_tolerance=tolerance, guest_min_tokens=least)
            check_choice(memory, rank, loads, ORDERS[2:3], problem, **given)


def test_guests_of_two_to_the_31_tokens(memory, library):
    rng = np.random.default_rng(3)
    placement = Placement.homes_only(32, 8, 2)
    share = rng.lognormal(0, 2, 32)
    load = np.floor(share / share.sum() * MAX_TOTAL).astype(np.int64)
    load[0] += MAX_TOTAL - load.sum()
    one = np.zeros_like(load)
    one[5] = MAX_TOTAL
    rank = plans.Rank(memory, placement, 0, library)
    assert check_choice(memory, rank, np.stack([load, one])) > 3


def test_residents_that_suffice_need_no_guests(memory, library):
    for placement in (
        Placement.homes_only(16, 8, 1),
        Placement(np.tile([0, 1, -1], 4), 4, num_guests_per_rank=1),
    ):
        rank = plans.Rank(memory, placement, 0, library)
        loads = np.full((2, placement.num_experts), 1000)
        loads[1, 0] += 15
        assert check_choice(memory, rank, loads) == 0


def test_guests_that_do_not_help_the_slowest_rank_are_not_taken(memory, library):
    placement, base = Placement.homes_only(9, 3, 1), np.array([5000, 0, 0])
    rank = plans.Rank(memory, placement, 0, library)
    problem = Problem(base_load=torch.from_numpy(base))
    loads = np.array([[0, 0, 0, 1500, 1000, 500, 10, 10, 10]])
    assert check_choice(memory, rank, loads, problem=problem, base=base) == 0
