"""The solvers' kernels, emulated, against the CPU's solver: optima in every order of threads."""

import math
from fractions import Fraction

import numpy as np
import oracle
import plans
import pytest
import torch
from builders import circulant
from emulator import ORDERS

import lplb_ep
from lplb_ep import Placement
from lplb_ep.planning import layout
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.solvers import DEVICE_SOLVERS
from lplb_ep.planning.structs import HEAD, MAX_TOTAL, Status

LONG = [v for v in DEVICE_SOLVERS["flow"].variants() if v not in plans.VARIANTS]


def solve(memory, rank, loads, order, **bounds):
    """Quotas, rank loads and endings of a batch of loads."""
    bounds = {name: memory.array(value, np.int32) for name, value in bounds.items()}
    launch, *out = rank.solve_loads(loads, **bounds)
    memory.run([launch], order=order)
    return [array.copy() for array in out]


def check_legal(placement, loads, quota, rank_load):
    """Quotas of these loads on copies that exist, and the rank loads that they make."""
    expert, column = np.nonzero(placement.copy_rank >= 0)
    rank = placement.copy_rank[expert, column]
    assert (quota >= 0).all()
    assert (quota[:, placement.copy_rank < 0] == 0).all()
    assert (quota.sum(2) == loads).all()
    for given, loaded in zip(quota, rank_load, strict=True):
        assert (np.bincount(rank, given[expert, column], placement.num_ranks) == loaded).all()


def optima(placement, load):
    """The optimum of each component by itself, whole."""
    home = placement.component[placement.home_rank]
    alone = (np.where(home == g, load, 0) for g in range(placement.component.max() + 1))
    return [math.ceil(cpu.solve(torch.from_numpy(part), placement).bound) for part in alone]


def check(memory, rank, loads, orders=ORDERS):
    """Optimal in each component, and the same bits in every order."""
    placement, first = rank.placement, None
    for order in orders:
        quota, rank_load, endings = solve(memory, rank, loads, order)
        assert (endings[..., 0] == Status.OPTIMAL).all()
        assert (endings[..., 1].sum(1) == loads.sum(1)).all()
        check_legal(placement, loads, quota, rank_load)
        first = quota if first is None else first
        assert (quota == first).all(), f"other quotas in order {order}"
    for load, loaded in zip(loads, rank_load, strict=True):
        largest = np.zeros(placement.component.max() + 1, np.int64)
        np.maximum.at(largest, placement.component, loaded)
        assert largest.tolist() == optima(placement, load)


def random_loads(rng, num_experts, number=3):
    scales = [float(scale) for scale in rng.choice([3, 100, 3000], number)]
    return np.stack([oracle.random_load(rng, num_experts, scale) for scale in scales])


def hot(rng, placement):
    """Nearly all tokens on a few ranks' experts: the limit must rise several times."""
    load = rng.integers(0, 4, placement.num_experts)
    chosen = rng.choice(placement.num_ranks, max(1, placement.num_ranks // 6), replace=False)
    load[np.isin(placement.home_rank, chosen)] += rng.integers(200, 2000)
    return load


@pytest.mark.parametrize(
    "variant",
    [*plans.VARIANTS, *(pytest.param(v, marks=pytest.mark.long) for v in LONG)],
    ids=lambda v: "-".join(str(int(x)) for x in v),
)
def test_every_variant_of_the_flow_is_exact(variant, memory, library):
    rng = np.random.default_rng(variant.size + variant.parts * variant.turns)
    num_edges = variant.parts * variant.turns + 2 * variant.more
    for ranks in (variant.size, variant.size - 1):
        placement = circulant(rng, ranks, num_edges)
        assert variant.more or layout.own_capacity(placement).max_edges == num_edges
        rank = plans.Rank(memory, placement, 0, library, variant=variant)
        loads = random_loads(rng, placement.num_experts, 2)
        check(memory, rank, np.concatenate([loads, [hot(rng, placement)]]))


@pytest.mark.parametrize("solver", DEVICE_SOLVERS)
@pytest.mark.parametrize("R", [1, 2, 8, 13, 32, 33, 64])
def test_any_placement_is_solved_exactly(R, solver, memory, library):
    rng = np.random.default_rng(R)
    for _ in range(3):
        E = int(rng.integers(R, 3 * R + 20))
        placement = oracle.random_placement(
            rng, R, E, int(rng.integers(0, 4)), int(rng.integers(2, 9))
        )
        rank = plans.Rank(memory, placement, 0, library, solver=solver)
        check(memory, rank, np.stack([*random_loads(rng, E, 2), hot(rng, placement)]))


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("R", "E"),
    [(65, 384), (96, 512), (128, 1024), *map(long, (72, 128, 129, 256), (256, 768, 600, 512))],
)
def test_more_ranks_than_a_word_has_bits(R, E, memory, library):
    rng = np.random.default_rng(R + E)
    placement = oracle.random_placement(rng, R, E, 3)
    assert layout.own_capacity(placement).size == (128 if R <= 128 else 256)
    variants = [v for v in DEVICE_SOLVERS["flow"].variants() if v.size == 256 and R > 128]
    rank = plans.Rank(memory, placement, 0, library, variant=variants[0] if variants else None)
    loads = np.stack([*random_loads(rng, E, 2), hot(rng, placement)])
    # Where few tokens stay, the limit is that of a set of ranks.
    check(memory, rank, np.concatenate([loads, loads * ((placement.copy_rank >= 0).sum(1) > 1)]))


@pytest.mark.parametrize(
    ("solver", "sizes"), [("flow", (8, 40)), ("cusolverdx", (8, 40)), ("flow", (100,))]
)
def test_experts_with_a_copy_on_every_rank(solver, sizes, memory, library):
    """Far more edges a rank than its threads take at once, and than a word has bits."""
    rng = np.random.default_rng(0)
    for R in sizes:
        everywhere, once = np.repeat(np.arange(3), R), np.arange(3, 3 + 2 * R)
        table = np.concatenate([x.reshape(-1, R) for x in (everywhere, once)])
        placement = Placement(table.T.ravel(), R)
        loads = random_loads(rng, placement.num_experts)
        loads[:, 0] += rng.integers(0, 1 + loads.sum(1))
        rank = plans.Rank(memory, placement, 0, library, solver=solver)
        check(memory, rank, loads)


@pytest.mark.parametrize("solver", DEVICE_SOLVERS)
def test_a_batch_of_two_to_the_31_tokens(solver, memory, library):
    rng = np.random.default_rng(1)
    placement = oracle.random_placement(rng, 8, 40, 2)
    share = rng.lognormal(0, 2, 40)
    load = np.floor(share / share.sum() * MAX_TOTAL).astype(np.int64)
    load[0] += MAX_TOTAL - load.sum()
    rank = plans.Rank(memory, placement, 0, library, solver=solver)
    check(memory, rank, load[None])


def random_bounds(rng, placement, loads):
    """Base loads, speeds and capacities that suffice, in any combination."""
    R, E, C = placement.num_ranks, placement.num_experts, placement.max_replicas
    bounds = {}
    if rng.random() < 0.5:
        bounds["base"] = rng.integers(0, 3000, R)
    if rng.random() < 0.6:
        bounds["speed"] = rng.integers(1, rng.choice([3, 9, 500]), R)
    if rng.random() < 0.6:
        present = placement.copy_rank >= 0
        share = loads.max(0) / np.maximum(1, present.sum(1))
        most = np.ceil(rng.uniform(0.3, 3, (E, C)) * share[:, None]).astype(np.int64)
        most[:, 0] += np.maximum(0, loads.max(0) - (most * present).sum(1))
        bounds["cap"] = most
    return bounds


def slowest(rank_load, bounds):
    """The exact time of the slowest rank."""
    load = rank_load.astype(np.int64) + bounds.get("base", 0)
    paces = bounds.get("speed", np.ones_like(load))
    return max(Fraction(int(n), int(s)) for n, s in zip(load, paces, strict=True))


@pytest.mark.parametrize("R", [1, 3, 8, 20, 33, 64, 65, *map(long, (96, 128))])
def test_base_loads_speeds_and_capacities(R, memory, library):
    rng = np.random.default_rng(100 + R)
    names = {"base": "base_load", "speed": "speed", "cap": "max_quota"}
    for _ in range(6 if R <= 64 else 2):
        E = int(rng.integers(R, 2 * R + 20))
        placement = oracle.random_placement(rng, R, E, int(rng.integers(0, 4)))
        loads = random_loads(rng, E, 2)
        bounds = random_bounds(rng, placement, loads)
        rank = plans.Rank(memory, placement, 0, library)
        runs = [solve(memory, rank, loads, order, **bounds) for order in ORDERS]
        options = {names[name]: torch.from_numpy(value) for name, value in bounds.items()}
        for quota, rank_load, endings in runs:
            assert (endings[..., 0] == Status.OPTIMAL).all()
            assert (quota == runs[0][0]).all()
            check_legal(placement, loads, quota, rank_load)
            assert (quota <= bounds.get("cap", MAX_TOTAL)).all()
        for load, loaded in zip(loads, rank_load, strict=True):
            best = lplb_ep.solve(torch.from_numpy(load), placement, "cpu", **options)
            assert slowest(loaded, bounds) == slowest(best.rank_load.numpy(), bounds)


APART = Placement([0, 1, 0, 1, 2, 3, 2, 3], 4)  # two components of two ranks
SINGLE = Placement([0, 1, 2, 0], 2)  # experts 1 and 2 have one copy


def test_capacities_that_do_not_suffice_are_infeasible(memory, library):
    rank = plans.Rank(memory, SINGLE, 0, library)
    cap = np.array([[3, 4], [5, 0], [2, 0]])
    for load, status in (
        ([7, 5, 2], Status.OPTIMAL),
        ([8, 5, 2], Status.INFEASIBLE),
        ([0, 6, 0], Status.INFEASIBLE),
        ([0, 0, 3], Status.INFEASIBLE),
        ([8, 5, -1], Status.BAD_COUNTS),
    ):
        for order in ORDERS:
            _, _, endings = solve(memory, rank, np.array([load]), order, cap=cap)
            assert endings[0, :, 0].tolist() == [status], load


def test_base_loads_count_towards_the_total(memory, library):
    rank = plans.Rank(memory, APART, 0, library)
    for base, status in ((MAX_TOTAL - 6, Status.OPTIMAL), (MAX_TOTAL - 5, Status.BAD_COUNTS)):
        load = np.array([[4, 0, 2, 1]])
        bounds = {"base": [2, base - 2, 5, 0]}
        quota, rank_load, endings = solve(memory, rank, load, 0, **bounds)
        totals = endings[0, :, 1].astype(np.int64)
        assert endings[0, 1, :2].tolist() == [Status.OPTIMAL, 3 + 5]
        assert endings[0, 0, 0] == (Status.OPTIMAL if base + 4 <= MAX_TOTAL else status)
        if status == Status.OPTIMAL:
            assert totals[0] == 4 + base
            assert rank_load[0, :2].tolist() == [4, 0]
            check_legal(APART, load, quota, rank_load)


def exchanged(memory, rank, counts, *, at=(), status=0, max_rounds=10_000, order=0):
    """The ending of each component by exchanged rows; `at`: words that are overwritten."""
    counts = np.asarray(counts)
    rows = np.zeros((rank.placement.num_ranks, HEAD + rank.placement.num_experts), np.int64)
    rows[:, 1:HEAD] = 77, 2, 3, 1
    rows[:, HEAD:] = counts
    for row, word, value in at:
        rows[row, word] = value
    topk = np.repeat(np.arange(rank.placement.num_experts), counts[rank.rank].clip(0, 99))[:, None]
    plan = rank.plan(topk)
    picks = rank.picks(topk, plan)
    launches = [
        rank.count(picks),
        rank.solve(picks, plan, memory.array(rows, np.int32), status=status, max_rounds=max_rounds),
    ]
    memory.run(launches, order=order)
    assert (plan.counts == rows[:, HEAD:]).all()  # by the blocks that do not solve
    return plan.endings[:, 0].tolist(), plan


@pytest.mark.parametrize("order", ORDERS)
def test_the_head_of_a_row_says_how_its_batch_fares(order, memory, library):
    rank = plans.Rank(memory, APART, 1, library)
    counts = [[1, 0, 2, 0], [5, 3, 1, 1], [0, 0, 0, 9], [1, 1, 1, 1]]

    def ends(**changes):
        return exchanged(memory, rank, counts, order=order, **changes)[0]

    assert ends() == [Status.OPTIMAL] * 2
    for status in Status:
        assert ends(at=[(3, 0, status)]) == [status] * 2
        assert ends(status=status) == [status] * 2
    for unknown in (len(Status), 77, -3):
        assert ends(at=[(3, 0, unknown)]) == [Status.OUT_OF_STEP] * 2
    for word in range(1, HEAD):
        assert ends(at=[(2, word, 12)]) == [Status.OUT_OF_STEP] * 2
        assert ends(at=[(2, word, 12), (0, 0, Status.TIMED_OUT)]) == [Status.TIMED_OUT] * 2
    # Where several things are wrong, the larger status holds.
    bad = (0, HEAD + 2, -1)
    assert ends(at=[bad]) == [Status.OPTIMAL, Status.BAD_COUNTS]
    assert ends(at=[bad, (1, 0, Status.STALE)]) == [Status.STALE, Status.BAD_COUNTS]
    assert ends(at=[bad, (1, 0, Status.REFUSED)]) == [Status.REFUSED] * 2


@pytest.mark.parametrize("order", ORDERS)
def test_totals_beyond_32_bits_are_bad_counts(order, memory, library):
    rank = plans.Rank(memory, APART, 0, library)
    half = 2**30
    for counts, statuses in (
        ([[half, half - 1, 0, 0]], [0, 0]),
        ([[half, half, 0, 0]], [Status.BAD_COUNTS, 0]),
        ([[half, 0, 0, 0], [half, 0, 0, 0]], [Status.BAD_COUNTS, 0]),
        ([[0, 0, MAX_TOTAL, 1]], [0, Status.BAD_COUNTS]),
        ([[0, 0, MAX_TOTAL, 0], [0, 0, MAX_TOTAL, 0], [0, 0, 2, 0]], [0, Status.BAD_COUNTS]),
    ):
        rows = np.zeros((4, 4), np.int64)
        rows[1 : 1 + len(counts)] = counts
        assert exchanged(memory, rank, rows, order=order)[0] == statuses


def test_rounds_that_do_not_suffice_lose_no_token(memory, library):
    rng = np.random.default_rng(4)
    placement = oracle.random_placement(rng, 16, 48, 2)
    rank = plans.Rank(memory, placement, 0, library)
    counts = np.zeros((16, 48), np.int64)
    counts[0] = hot(rng, placement)
    rounds, statuses = 0, [Status.NOT_CONVERGED]
    while Status.NOT_CONVERGED in statuses:
        statuses, plan = exchanged(memory, rank, counts, max_rounds=rounds)
        check_legal(placement, counts.sum(0)[None], plan.quota[None], plan.rank_load[None])
        rounds += 1
    assert rounds > 3
    assert plan.rank_load.max() == max(optima(placement, counts.sum(0)))
