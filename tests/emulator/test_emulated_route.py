"""The kernels of route.cu, emulated: bit for bit the CPU's steps in every order of threads."""

import itertools
from types import SimpleNamespace

import numpy as np
import oracle
import plans
import pytest
import tallied
import torch
from emulator import ORDERS

from lplb_ep import Placement, Problem
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.stay import count_by_rank, stays
from lplb_ep.planning.structs import HEAD, MAX_TOTAL, NUM_TOTALS, ErrorFlag, Status

TWO = Placement([0, 1, 2, 0], 2)
SIZES = {"none": (0, 1), "one": (1, 1), "a warp": (16, 2), "more": (333, 7), "tiles": (2300, 2)}


def topk_of(rng, placement, num_tokens, num_topk):
    E = placement.num_experts
    return oracle.random_topk(rng, num_tokens, min(num_topk, E), rng.lognormal(0, 1.2, E))


def counted(memory, placement, topk, *, order=0, chunk=128, dtype=np.int64, **arguments):
    """What `count` leaves: the plan so far, and its rank."""
    rank = plans.Rank(memory, placement, 0, arguments.pop("library"), chunk=chunk, dtype=dtype)
    plan = rank.plan(topk)
    memory.run([rank.count(rank.picks(topk, plan), **arguments)], order=order)
    return rank, plan


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", SIZES)
def test_picks_are_counted(size, order, memory, library):
    rng = np.random.default_rng(len(size))
    placement = oracle.random_placement(rng, 4, 41, 1)
    topk = topk_of(rng, placement, *SIZES[size])
    for dtype in (np.int32, np.int64):
        rank, plan = counted(
            memory, placement, topk, order=order, dtype=dtype, status=Status.STALE, library=library
        )
        expected = cpu.count(torch.from_numpy(topk), 41).numpy()
        assert rank.row.tolist() == [Status.STALE, 77, 2, 3, 1, *expected]
        assert rank.head.tolist() == [77, 2, 3, 1]
        assert (plan.experts == topk.ravel()).all()
        assert (plan.histograms.sum(0) == expected).all()
        for histogram, begin in zip(plan.histograms, range(0, topk.size, 128), strict=False):
            part = topk.ravel()[begin : begin + 128]
            assert (histogram == np.bincount(part[part >= 0], minlength=41)).all()
        assert not rank.error_flags.any()


def test_the_number_of_a_batch_wraps_around(memory, library):
    rank = plans.Rank(memory, TWO, 0, library)
    topk = np.array([[0, 1]])
    rank.head[3] = MAX_TOTAL
    memory.run([rank.count(rank.picks(topk, rank.plan(topk)))])
    assert rank.row[HEAD - 1] == rank.head[3] == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_picks_out_of_range_are_refused(dtype, order, memory, library):
    wrong = [3, -2, 2**31 - 1, -(2**31)] + ([2**32, 2**40 + 1] if dtype == np.int64 else [])
    for number in wrong:
        topk = np.zeros((200, 2), np.int64)
        topk[133, 1] = number
        for exchanged in (True, False):
            rank, plan = counted(
                memory, TWO, topk, order=order, dtype=dtype, exchanged=exchanged, library=library
            )
            assert np.flatnonzero(rank.error_flags).tolist() == [ErrorFlag.OUT_OF_RANGE]
            assert plan.experts[267] == -1
            assert plan.histograms.sum(0).tolist() == [399, 0, 0]
            assert rank.row[0] == (Status.REFUSED if exchanged else 0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_physical_ids_stand_for_their_experts(dtype, order, memory, library):
    rng = np.random.default_rng(3)
    placement = oracle.random_placement(rng, 4, 30, 2)
    table = placement.physical_to_logical
    assert (table < 0).any()
    logical = memory.array(table, np.int32)
    slots = rng.choice(np.flatnonzero(table >= 0), (90, 3))
    slots[rng.random(slots.shape) < 0.1] = -1
    expected = np.where(slots < 0, -1, table[slots])
    rank, plan = counted(
        memory, placement, slots, order=order, dtype=dtype, logical=logical, library=library
    )
    assert (plan.experts == expected.ravel()).all()
    assert (rank.row[HEAD:] == cpu.count(torch.from_numpy(expected), 30).numpy()).all()
    assert not rank.error_flags.any()
    empty = int(np.flatnonzero(table < 0)[0])
    for wrong in (empty, len(table), -2):
        slots[7, 1] = wrong
        rank, plan = counted(
            memory, placement, slots, order=order, dtype=dtype, logical=logical, library=library
        )
        assert np.flatnonzero(rank.error_flags).tolist() == [ErrorFlag.OUT_OF_RANGE]
        assert rank.row[0] == Status.REFUSED
        assert plan.experts[22] == -1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("chunk", [32, 128])
def test_a_token_that_picks_an_expert_twice_is_refused(chunk, order, memory, library):
    rng = np.random.default_rng(4)
    placement = oracle.random_placement(rng, 4, 30, 1)
    topk = topk_of(rng, placement, 60, 6)  # a token's picks may lie in two chunks
    arguments = {"order": order, "chunk": chunk, "library": library}
    rank, _ = counted(memory, placement, topk, num_topk=6, **arguments)
    assert not rank.error_flags.any()
    assert rank.row[0] == Status.OPTIMAL
    for token, first, second in ((0, 0, 1), (5, 0, 5), (21, 2, 3), (59, 4, 5)):
        twice = topk.copy()
        twice[token, [first, second]] = 17
        for num_topk, flags in ((6, [ErrorFlag.REPEATED_PICK]), (0, [])):
            rank, plan = counted(memory, placement, twice, num_topk=num_topk, **arguments)
            assert np.flatnonzero(rank.error_flags).tolist() == flags
            assert rank.row[0] == (Status.REFUSED if flags else Status.OPTIMAL)
            assert (plan.experts == twice.ravel()).all()
    none = topk.copy()
    none[3, :4] = -1  # no pick of an expert, however often
    assert not counted(memory, placement, none, num_topk=6, **arguments)[0].error_flags.any()


def test_two_slots_of_one_expert_are_a_repeated_pick(memory, library):
    logical = memory.array(TWO.physical_to_logical, np.int32)
    for slots, repeated in (([[0, 1], [2, 3]], False), ([[0, 1], [3, 0]], True)):
        rank, _ = counted(
            memory, TWO, np.array(slots), logical=logical, num_topk=2, library=library
        )
        assert rank.error_flags[ErrorFlag.REPEATED_PICK] == repeated


def expected_positions(topk):
    flat = topk.ravel()
    return [int((flat[:i] == e).sum()) if e >= 0 else 0 for i, e in enumerate(flat)]


def run_plan(
    memory,
    rank,
    topk,
    counts,
    *,
    order=0,
    given=False,
    one=False,
    status=0,
    max_rounds=10_000,
    of_ranks=(),
    by_rank=None,
):
    """A batch with the counts of the other ranks in its memory: three launches, or one.

    `of_ranks`: base loads and speeds. `by_rank`: where picks are slots, [R, R] of each rank.
    """
    p, logical = rank.placement, None
    rows = np.zeros((p.num_ranks, p.num_experts if given else rank.num_words), np.int64)
    begin = 0 if given else HEAD
    rows[:, begin : begin + p.num_experts] = counts
    if by_rank is not None:
        rows[:, HEAD + p.num_experts :] = by_rank
        logical = memory.array(p.physical_to_logical, np.int32)
    if not given:
        rows[:, 1:HEAD] = 77, 2, 3, 1
        rows[0, 0] = status
    plan = rank.plan(topk)
    picks = rank.picks(topk, plan)
    if one:
        rows = memory.array(rows, np.int32)
        whole = rank.whole(
            picks, plan, rows, of_batch=status, max_rounds=max_rounds, **dict(of_ranks)
        )
        memory.run([whole], order=order)
        return plan
    launches = [
        rank.count(picks, exchanged=not given, logical=logical),
        rank.solve(
            picks,
            plan,
            memory.array(rows, np.int32),
            head=0 if given else HEAD,
            status=status if given else 0,
            max_rounds=max_rounds,
            **dict(of_ranks),
        ),
        rank.route(picks, plan, exchanged=not given, **dict(of_ranks)),
    ]
    memory.run(launches, order=order)
    return plan


FORMS = ({}, {"given": True}, {"given": True, "one": True})
"""Of a plan's launches: counts in exchanged rows, given, and given to one launch."""


def check_routed(rank, plan, topk, counts, one=False):
    """Bit for bit what the CPU's steps make of the plan's quotas."""
    placement = rank.placement
    counts = torch.from_numpy(counts).int()
    assert plan.status.tolist() == [Status.OPTIMAL]
    shares = cpu.split(counts, torch.from_numpy(plan.quota.copy()), placement)
    expected = cpu.rewrite(torch.from_numpy(topk), shares[rank.rank], placement)
    assert (plan.physical == expected.numpy()).all()
    assert (plan.counts == counts.numpy()).all()
    assert one or plan.positions.tolist() == expected_positions(topk)
    best = cpu.solve(counts.sum(0), placement).bound
    assert plan.rank_load.max() == -(-best.numerator // best.denominator)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("R", "node", "size", "chunk", "solver"),
    [
        (1, 1, "more", 128, "flow"),
        (4, 4, "none", 128, "flow"),
        (4, 2, "more", 256, "flow"),
        (8, 8, "more", 1024, "cusolverdx"),
        (8, 2, "tiles", 2304, "flow"),
        (8, 1, "more", 128, "cusolverdx"),
        (12, 4, "a warp", 128, "flow"),
    ],
)
def test_a_batch_is_routed_as_on_the_cpu(R, node, size, chunk, solver, order, memory, library):
    rng = np.random.default_rng(R + node)
    placement = oracle.random_placement(rng, R, 36, 2, num_ranks_per_node=node)
    topks = [topk_of(rng, placement, *SIZES[size])]
    topks += [topk_of(rng, placement, int(rng.integers(0, 90)), 4) for _ in range(R - 1)]
    this = R // 2
    topks[0], topks[this] = topks[this], topks[0]
    counts = np.stack([cpu.count(torch.from_numpy(t), 36).numpy() for t in topks])
    dtype = np.int32 if order == 1 else np.int64
    rank = plans.Rank(memory, placement, this, library, solver=solver, chunk=chunk, dtype=dtype)
    forms = FORMS if solver == "flow" else FORMS[:2]
    for form in forms:
        plan = run_plan(memory, rank, topks[this], counts, order=order, **form)
        check_routed(rank, plan, topks[this], counts, form.get("one", False))
        assert not rank.row.any()
        assert not rank.error_flags.any()
        rank.head[3] = 0
    assert rank.num_by_status[Status.OPTIMAL] == len(forms)


@pytest.mark.parametrize(
    ("R", "node", "E", "one"),
    [(96, 8, 512, False), (128, 16, 1024, False), (65, 65, 96, True)],
    ids=str,
)
def test_a_batch_of_many_ranks_and_experts(R, node, E, one, memory, library):
    """Experts beyond a byte, and more of them than the threads of a block that solves."""
    rng = np.random.default_rng(R + E)
    placement = oracle.random_placement(rng, R, E, 3, num_ranks_per_node=node)
    this, weight = R - 1, rng.lognormal(0, 1.2, E)
    topk = oracle.random_topk(rng, 200, 8, weight)
    counts = rng.poisson(weight, (R, E))
    counts[this] = cpu.count(torch.from_numpy(topk), E).numpy()
    rank = plans.Rank(memory, placement, this, library, chunk=512)
    for order in ORDERS:
        for form in FORMS[2:] if one else FORMS[:2]:
            rank.head[3] = 0
            plan = run_plan(memory, rank, topk, counts, order=order, **form)
            check_routed(rank, plan, topk, counts, one)
            assert not rank.error_flags.any()
    launch, shares = rank.split(plan.counts, plan.quota)
    memory.run([launch])
    counts, quota = torch.from_numpy(counts).int(), torch.from_numpy(plan.quota.copy())
    assert (shares == cpu.split(counts, quota, placement).numpy()).all()


def test_a_batch_of_several_components(memory, library):
    rng = np.random.default_rng(7)
    cube = Placement.from_topology("cube", num_experts=64, num_ranks=16, num_redundant_per_rank=2)
    topks = [topk_of(rng, cube, 80, 4) for _ in range(16)]
    counts = np.stack([cpu.count(torch.from_numpy(t), 64).numpy() for t in topks])
    rank = plans.Rank(memory, cube, 5, library)
    assert rank.num_components == 2
    for order in ORDERS:
        for form in FORMS:
            rank.head[3] = 0
            plan = run_plan(memory, rank, topks[5], counts, order=order, **form)
            check_routed(rank, plan, topks[5], counts, form.get("one", False))


@pytest.mark.parametrize("order", ORDERS)
def test_batches_that_do_not_end_well_go_home(order, memory, library):
    rng = np.random.default_rng(8)
    placement = oracle.random_placement(rng, 4, 40, 2, num_ranks_per_node=2)
    topks = [topk_of(rng, placement, 300, 4) for _ in range(4)]
    counts = np.stack([cpu.count(torch.from_numpy(t), 40).numpy() for t in topks])
    homes = cpu.rewrite_home(torch.from_numpy(topks[2]), placement).numpy()
    rank = plans.Rank(memory, placement, 2, library)
    seen = dict.fromkeys(Status, 0)

    def ends(expected, wrong=None, **arguments):
        rank.error_flags[:] = 0
        rank.head[3] = 0
        given = counts.copy()
        if wrong is not None:
            given[1, 5] = wrong
        plan = run_plan(memory, rank, topks[2], given, order=order, **arguments)
        assert plan.status.tolist() == [expected]
        assert (plan.physical == homes).all()
        assert np.flatnonzero(rank.error_flags).tolist() == [expected]
        seen[expected] += 1
        assert rank.num_by_status.tolist() == list(seen.values())
        assert not rank.row.any()
        if expected >= Status.BAD_COUNTS:
            assert not plan.counts.any()
            assert not plan.quota.any()
            assert not plan.rank_load.any()
            return
        load = counts.sum(0)
        assert (plan.counts == counts).all()
        assert (plan.quota[:, 0] == load).all()
        assert not plan.quota[:, 1:].any()
        assert (plan.rank_load == np.bincount(placement.home_rank, load, 4)).all()

    ends(Status.NOT_CONVERGED, max_rounds=1)
    ends(Status.BAD_COUNTS, wrong=-1)
    ends(Status.NOT_CONVERGED, max_rounds=1, **FORMS[2])
    for status in (Status.STALE, Status.INFEASIBLE, Status.REFUSED, Status.TIMED_OUT):
        for form in FORMS:
            ends(status, status=status, **form)
        ends(max(status, Status.BAD_COUNTS), wrong=-1, status=status)
        ends(max(status, Status.BAD_COUNTS), wrong=-1, status=status, **FORMS[2])


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]], ids=("rows", "one launch"))
@pytest.mark.parametrize("order", ORDERS)
def test_totals_are_summed_over_components(form, order, memory, library):
    """By every block alike, also of those that begin when others have sent the batch home."""
    apart = Placement([0, 1, 0, 1, 2, 3, 2, 3], 4)
    topk = np.arange(4).repeat(60)[:, None]
    counts = np.zeros((4, 4), np.int64)
    counts[0], counts[1, 1] = 60, 2**30
    counts[1, 2] = MAX_TOTAL - counts.sum()
    rank = plans.Rank(memory, apart, 0, library, chunk=32)
    plan = run_plan(memory, rank, topk, counts, order=order, **form)
    check_routed(rank, plan, topk, counts, form.get("one", False))
    counts[1, 2] += 1
    rank.head[3] = 0
    plan = run_plan(memory, rank, topk, counts, order=order, **form)
    assert plan.status.tolist() == [Status.BAD_COUNTS]
    assert (plan.physical == cpu.rewrite_home(torch.from_numpy(topk), apart).numpy()).all()


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]], ids=("rows", "one launch"))
@pytest.mark.parametrize("order", ORDERS)
def test_any_of_many_components_ends_the_batch(form, order, memory, library):
    """More than a warp has threads, and each knows its own status and total only."""
    placement = Placement(np.arange(80), 40)
    rank = plans.Rank(memory, placement, 0, library)
    assert rank.num_components == 40
    topk, counts = np.array([[0, 1]]), np.zeros((40, 80), np.int64)
    counts[0, :2] = 1

    def status(**changed):
        given = counts.copy()
        for expert, number in changed.items():
            given[7, int(expert[1:])] = number
        rank.head[3] = 0
        return run_plan(memory, rank, topk, given, order=order, **form).status.tolist()

    assert status() == [Status.OPTIMAL]
    for expert in (0, 3, 71):
        assert status(**{f"e{expert}": -1}) == [Status.BAD_COUNTS]
    assert status(e3=2**30, e76=2**30 - 3) == [Status.OPTIMAL]
    assert status(e3=2**30, e76=2**30 - 2) == [Status.BAD_COUNTS]


def test_given_counts_of_other_picks_are_told(memory, library):
    rank = plans.Rank(memory, TWO, 0, library)
    topk = np.array([[0, 1], [0, 2]])
    for form in FORMS[1:]:
        counts = np.array([[2, 1, 1], [3, 0, 0]])
        rank.error_flags[:] = 0
        assert run_plan(memory, rank, topk, counts, **form).status.tolist() == [0]
        assert not rank.error_flags.any()
        counts[0, 2] += 1
        plan = run_plan(memory, rank, topk, counts, **form)
        assert np.flatnonzero(rank.error_flags).tolist() == [ErrorFlag.MISCOUNTED]
        assert (TWO.physical_to_logical[plan.physical] == topk).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("R", "node"), [(1, 1), (6, 6), (8, 2), (70, 10)])
def test_shares_of_all_ranks_are_the_cpus(R, node, order, memory, library):
    rng = np.random.default_rng(R)
    if R > 64:  # more ranks than threads of a block; in components of ten
        placement = Placement(np.tile(np.arange(70).reshape(7, 1, 10), (1, 10, 1)).ravel(), 70)
        placement = Placement(placement.physical_to_logical, 70, num_ranks_per_node=node)
    else:
        placement = oracle.random_placement(rng, R, 40, 2, num_ranks_per_node=node)
    E = placement.num_experts
    counts = rng.poisson(rng.lognormal(1, 1, (R, E))).astype(np.int32)
    load = torch.from_numpy(counts).long().sum(0)
    quota = cpu.solve(load, placement).quota
    rank = plans.Rank(memory, placement, 0, library)
    for some in (quota, quota * 0):  # where none are known, nothing is shared out
        launch, shares = rank.split(memory.array(counts), memory.array(some.numpy()))
        memory.run([launch], order=order)
        assert (shares == cpu.split(torch.from_numpy(counts), some, placement).numpy()).all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_mask_keeps_what_was_no_pick(dtype, memory, library):
    rng = np.random.default_rng(9)
    given = memory.array(rng.integers(-1, 3, 700), dtype)
    planned = memory.array(rng.integers(0, 99, 700), dtype)
    kernel = library(plans.route_program(dtype)).kernel("mask")
    expected = np.where(given < 0, -1, planned)
    for out in (memory.empty(700, dtype), planned):
        launch = kernel((2, 1), 256, 0, given=given, planned=planned, out=out, num_picks=700)
        memory.run([launch], order=2)
        assert (out == expected).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("R", "E", "form"),
    [
        (4, 36, {}),
        (4, 36, FORMS[2]),
        (8, 1200, {}),
        (16, 32, {}),
        (16, 32, FORMS[2]),
        (40, 80, {}),
        (40, 80, FORMS[2]),
    ],
)
def test_statistics_are_those_of_the_plan(R, E, form, order, memory, library):
    """Of few experts and many ranks, whose rows threads share; of many; of many components."""
    rng = np.random.default_rng(R)
    placement = Placement(np.arange(E), R)
    if (R, E) == (4, 36):
        placement = oracle.random_placement(rng, R, E, 1)
    bounds = {"base_load": torch.from_numpy(rng.integers(0, 50, R)), "speed": torch.arange(R) + 1}
    on_device = {
        "base": memory.array(bounds["base_load"].numpy(), np.int32),
        "speed": memory.array(bounds["speed"].numpy(), np.int32),
    }
    rank = plans.Rank(memory, placement, 1, library, num_samples=2, every=2, mark_every=4)
    expected = tallied.Tallied(1, every=2, mark_every=4, **bounds)
    statuses = [0, Status.STALE, 0, Status.BAD_COUNTS, 0, Status.STALE, 0, 0, 0]
    for i, status in enumerate(statuses):
        if i == 4:
            expected.begin_window(7)
        topks = [topk_of(rng, placement, int(rng.integers(0, 90)), 2) for _ in range(R)]
        counts = np.stack([cpu.count(torch.from_numpy(t), E).numpy() for t in topks])
        if status == Status.BAD_COUNTS:
            counts[2, 3] = -1
        rank.head[3] = 0
        rank.totals[NUM_TOTALS] = expected.window
        rank.again = int(i in (2, 7))
        launched = {"order": order, "status": status, "of_ranks": on_device, **form}
        plan = run_plan(memory, rank, topks[1], counts, **launched)
        tensors = {name: torch.from_numpy(values) for name, values in vars(plan).items()}
        expected.add(SimpleNamespace(**tensors), placement, again=bool(rank.again))
        assert rank.totals[:NUM_TOTALS].tolist() == expected.totals, i
        assert rank.totals[NUM_TOTALS + 1 :].tolist() == expected.marked, i
        sampled = {before // 2 % 2: before for before in sorted(expected.samples)}
        assert rank.sampled.tolist() == [sampled.get(0, 0), sampled.get(1, 0)], i
    # Of the batches 0, 2, 4 and 6, without those that are planned again. The second has no counts.
    assert rank.sampled.tolist() == [4, 6]
    assert rank.samples.tolist() == [expected.samples[4], expected.samples[6]]


def must_stay(load, placement, base, least_gain, given_load=None):
    problem = Problem(base_load=torch.from_numpy(base), min_gain=least_gain).checked(placement)
    return stays(load, placement, problem, given_load)


def place(rng, is_cube):
    """Random copies on two nodes, or two cubes of eight ranks."""
    R, E = (16, 64) if is_cube else (4, 40)
    placement = oracle.random_placement(rng, R, E, 2, num_ranks_per_node=R // 2)
    if is_cube:
        placement = Placement.from_topology(
            "cube", num_experts=E, num_ranks=R, num_redundant_per_rank=2
        )
    return placement


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS, ids=("rows", "given", "one launch"))
@pytest.mark.parametrize("is_cube", [False, True])
def test_batches_that_would_gain_too_little_stay_home(is_cube, form, order, memory, library):
    """By all components together; one that has none beside it does not solve."""
    rng = np.random.default_rng(9)
    placement = place(rng, is_cube)
    R, E = placement.num_ranks, placement.num_experts
    base = rng.integers(0, 40, R)
    launched = {"order": order, "of_ranks": {"base": memory.array(base, np.int32)}, **form}
    for _ in range(3):
        topks = [topk_of(rng, placement, int(rng.integers(0, 90)), 4) for _ in range(R)]
        counts = np.stack([cpu.count(torch.from_numpy(t), E).numpy() for t in topks])
        load = counts.sum(0).astype(np.int64)
        # What a plan could gain at most, and one more.
        most = next(n for n in range(2 * load.sum() + 2) if must_stay(load, placement, base, n + 1))
        for least_gain, rounds in itertools.product((most, most + 1), (10_000, 0)):
            rank = plans.Rank(memory, placement, 1, library, least_gain=least_gain)
            plan = run_plan(memory, rank, topks[1], counts, max_rounds=rounds, **launched)
            status = Status.OPTIMAL if rounds else Status.NOT_CONVERGED
            # The CPU's does not look for a solution. So whether there is one does not matter.
            status = Status.STAYED if least_gain > most else status
            assert plan.status.tolist() == [status]
            assert rank.error_flags.any() == (status == Status.NOT_CONVERGED)
            assert rank.num_by_status[status] == 1
            assert (plan.counts == counts).all()
            if status == Status.STAYED:
                homes = cpu.rewrite_home(torch.from_numpy(topks[1]), placement)
                assert (plan.physical == homes.numpy()).all()
                assert (plan.quota[:, 0] == load).all()
                assert (plan.rank_load == np.bincount(placement.home_rank, load, R)).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("is_cube", [False, True])
def test_batches_that_would_gain_too_little_keep_their_slots(is_cube, order, memory, library):
    """By the loads that the rows of all ranks say, whatever the batch is at home."""
    rng = np.random.default_rng(9)
    placement = place(rng, is_cube)
    R, E = placement.num_ranks, placement.num_experts
    base = rng.integers(0, 40, R)
    expected = tallied.Tallied(1, base_load=torch.from_numpy(base))
    rank = plans.Rank(memory, placement, 1, library, least_gain=1, keeps=True)
    launched = {"order": order, "of_ranks": {"base": memory.array(base, np.int32)}}
    for _ in range(3):
        topks = [topk_of(rng, placement, int(rng.integers(0, 90)), 4) for _ in range(R)]
        many = [oracle.slots_of(rng, topk, placement) for topk in topks]
        counts = np.stack([cpu.count(torch.from_numpy(t), E).numpy() for t in topks])
        by_rank = torch.stack([count_by_rank(torch.from_numpy(one), placement) for one in many])
        load, given_load = counts.sum(0).astype(np.int64), by_rank.long().sum(0).numpy()
        by = load, placement, base
        most = next(n for n in range(2 * load.sum() + 99) if must_stay(*by, n + 1, given_load))
        for least_gain in {max(1, most), most + 1}:
            rank.head[3], rank.least_gain = 0, least_gain
            how = {"by_rank": by_rank.numpy(), **launched}
            plan = run_plan(memory, rank, many[1], counts, **how)
            stayed = least_gain > most
            assert plan.status.tolist() == [Status.STAYED if stayed else Status.OPTIMAL]
            if stayed:
                assert (plan.physical == many[1]).all()
                assert not plan.quota.any()
                assert plan.rank_load.tolist() == given_load.tolist()
            assert (plan.counts == counts).all()
            assert not rank.row.any()
            assert not rank.error_flags.any()
            tensors = {name: torch.from_numpy(values) for name, values in vars(plan).items()}
            expected.add(SimpleNamespace(**tensors), placement)
            assert rank.totals[:NUM_TOTALS].tolist() == expected.totals


@pytest.mark.parametrize("order", ORDERS)
def test_picks_are_counted_by_the_ranks_of_their_slots(order, memory, library):
    rng = np.random.default_rng(5)
    placement = oracle.random_placement(rng, 4, 30, 2)
    logical = memory.array(placement.physical_to_logical, np.int32)
    topk = topk_of(rng, placement, 200, 3)
    slots = oracle.slots_of(rng, topk, placement)
    rank = plans.Rank(memory, placement, 0, library, least_gain=9, keeps=True)
    memory.run([rank.count(rank.picks(slots, rank.plan(slots)), logical=logical)], order=order)
    by_rank = np.bincount(slots[slots >= 0] // placement.num_local_slots, minlength=4)
    experts = cpu.count(torch.from_numpy(topk), 30)
    assert rank.row.tolist() == [0, 77, 2, 3, 1, *experts, *by_rank]
    slots[7, 1] = placement.num_physical_experts  # a rank that is none
    memory.run([rank.count(rank.picks(slots, rank.plan(slots)), logical=logical)], order=order)
    assert rank.row[0] == Status.REFUSED
