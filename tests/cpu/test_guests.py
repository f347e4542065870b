"""Placements with guest slots, and plans that fill them: everything but which guests are best."""

import pickle

import numpy as np
import oracle
import pytest
import ranks
import torch
from oracle import fits, linear_program, random_load, random_placement, random_topk

from lplb_ep import Placement, PlacementError, Planner, solve
from lplb_ep.layer import Layer
from lplb_ep.planning.check import check_plan
from lplb_ep.planning.guests import choose_guests
from lplb_ep.planning.plan import Status
from lplb_ep.planning.planner import tag_of
from lplb_ep.planning.solvers import check_fit
from lplb_ep.problem import Problem


def test_guest_slots_are_the_last_of_each_rank_and_empty():
    placement = Placement.homes_only(8, 4, 2, num_ranks_per_node=2)
    assert placement.num_physical_experts == 16
    assert placement.num_local_slots == 4
    assert placement.guest_slots.tolist() == [[2, 3], [6, 7], [10, 11], [14, 15]]
    assert (placement.physical_to_logical[placement.guest_slots] == -1).all()
    assert placement.home.tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert placement.max_replicas == 4  # any expert may get a guest on every other rank
    assert placement.with_guest_slots(0) == Placement.homes_only(8, 4, num_ranks_per_node=2)
    assert placement.with_guest_slots(0).num_physical_experts == 8


def test_guest_slots_decide_equality_and_survive_copies(tmp_path):
    plain, placement = Placement.homes_only(8, 4), Placement.homes_only(8, 4, 1)
    assert plain != placement
    assert plain.fingerprint() != placement.fingerprint()
    unused = Placement(placement.physical_to_logical, 4, num_experts=8, max_replicas=4)
    assert unused != placement  # slots that stay empty are no guest slots
    assert "1 guest slots a rank" in repr(placement)
    assert "guest" not in repr(plain)
    placement.save(tmp_path / "placement.json")
    for same in (
        pickle.loads(pickle.dumps(placement)),
        Placement.load(tmp_path / "placement.json"),
    ):
        assert same == placement
        assert hash(same) == hash(placement)
        assert same.num_guests_per_rank == 1
        assert same.max_replicas == 4
    assert plain.fingerprint() == Placement(np.arange(8), 4, num_guests_per_rank=0).fingerprint()


def test_guests_are_copies_behind_the_residents():
    table = [0, 1, 2, -1, 2, 3, 1, -1, 4, 5, 0, -1]
    placement = Placement(table, 3, num_guests_per_rank=1)
    assert placement.max_replicas == 3
    filled = placement.with_guests([[4], [0], [-1]])
    assert filled.physical_to_logical.tolist() == [0, 1, 2, 4, 2, 3, 1, 0, 4, 5, 0, -1]
    assert filled.logical_to_physical[0].tolist() == [0, 10, 7]
    assert filled.copy_rank[4].tolist() == [2, 0, -1]
    assert (filled.max_replicas, filled.num_guests_per_rank) == (3, 0)
    assert (filled.home == placement.home).all()
    for columns in np.array(placement.logical_to_physical).T:  # residents keep their columns
        assert (filled.logical_to_physical == columns[:, None]).any(1)[columns >= 0].all()


@pytest.mark.parametrize(
    ("guests", "message"),
    [
        ([[0], [-1]], "rank 0 holds already"),
        ([[2], [1]], "rank 1 holds already"),
        ([[4], [-1]], r"expert in \[0, 4\); got 4"),
        ([[-2], [-1]], r"expert in \[0, 4\); got -2"),
        ([[2, -1], [-1, -1]], r"must be \[2, 1\]"),
        ([[2.0], [-1.0]], "integers"),
    ],
)
def test_wrong_guests_are_refused(guests, message):
    placement = Placement([0, 1, -1, 2, 3, -1], 2, num_guests_per_rank=1)
    if "rank 1" in message:
        placement = Placement([0, 1, -1, 2, 1, -1], 2, num_guests_per_rank=1)
    if "expert" in message and "4" in message:
        placement = Placement([0, 1, -1, 2, 3, -1], 2, num_guests_per_rank=1)
    with pytest.raises(PlacementError, match=message):
        placement.with_guests(guests)


def test_guests_must_differ_and_stay_on_their_node():
    placement = Placement.homes_only(8, 4, 2, num_ranks_per_node=2)
    none = [[-1, -1]] * 3
    with pytest.raises(PlacementError, match=r"guests\[0, 1\] is expert 2, which rank 0 holds"):
        placement.with_guests([[2, 2], *none])
    with pytest.raises(PlacementError, match="home is on rank 2: a guest's home must be on"):
        placement.with_guests([[4, -1], *none])


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ([0, 1, 2, 3], {}, "slot 1 is a guest slot, which a batch fills: it must be -1"),
        ([0, -1, 1, -1], {"num_guests_per_rank": 2}, "must be less than the 2 slots of a rank"),
        ([0, -1, 1, -1], {"num_guests_per_rank": -1}, "num_guests_per_rank must be a whole number"),
        ([0, -1, 1, -1], {"num_guests_per_rank": True}, "of at least 0, got True"),
        ([0, -1, 1, -1], {"max_replicas": 1}, "max_replicas must be at least 2 with guest slots"),
        # Two copies on one rank take a column more.
        ([0, 0, -1, 1, 2, -1], {"max_replicas": 2}, "max_replicas must be at least 3"),
    ],
)
def test_wrong_guest_slots_are_refused(table, options, message):
    with pytest.raises(PlacementError, match=message):
        Placement(table, 2, **{"num_guests_per_rank": 1, **options})


def test_every_builder_makes_guest_slots():
    load = np.arange(1, 17)
    made = [
        (Placement.homes_only(16, 4), Placement.homes_only(16, 4, 2)),
        *(
            (build(), build(num_guests_per_rank=2))
            for build in (
                lambda **more: Placement.from_topology(
                    "ring", num_experts=16, num_ranks=4, load=load, **more
                ),
                lambda **more: Placement.from_history(
                    load, num_ranks=4, num_redundant_per_rank=1, **more
                ),
                lambda **more: Placement.for_lp(load, 4, 1, max_steps=5, **more),
                lambda **more: Placement.from_physical_to_logical(
                    np.append(np.arange(16), [4, 8, 12, 0]), 4, **more
                ),
            )
        ),
    ]
    for plain, placement in made:
        assert placement.num_guests_per_rank == 2
        assert placement.num_physical_experts == plain.num_physical_experts + 8
        assert placement.with_guest_slots(0) == plain
        assert (placement.home_rank == plain.home_rank).all()
    with pytest.raises(PlacementError, match="num_ranks must divide num_experts"):
        Placement.homes_only(10, 4, 1)
    with pytest.raises(PlacementError, match="num_guests_per_rank must be a whole number"):
        Placement.homes_only(8, 4, 1.5)


def test_a_search_from_a_placement_keeps_its_guest_slots():
    load = np.arange(1, 17)
    start = Placement.for_lp(load, 4, 1, max_steps=0, num_guests_per_rank=2)
    found = Placement.for_lp(load[::-1], start=start, fixed_homes=True, max_steps=20)
    assert found.num_guests_per_rank == 2
    assert found.may_replace(start)
    other = Placement.for_lp(load[::-1], start=start, max_steps=0, num_guests_per_rank=0)
    assert other == start.with_guest_slots(0)


def test_replicas_are_replaced_beside_guest_slots():
    placement = Placement([0, 1, 2, -1, 2, 3, 0, -1], 2, num_guests_per_rank=1)
    other = placement.with_copies([0, 1, 3, -1, 2, 3, 1, -1])
    assert other.may_replace(placement)
    assert other.num_guests_per_rank == 1
    assert other.max_replicas == placement.max_replicas
    with pytest.raises(PlacementError, match="slot 3 is a guest slot"):
        placement.with_copies([0, 1, 3, 2, 2, 3, 1, -1])
    without = Placement(placement.physical_to_logical, 2, max_replicas=2)
    assert not without.may_replace(placement)
    assert not placement.may_replace(without)


def random_case(rng):
    """A placement with guest slots, loads of up to 3 batches, and what bounds their plans."""
    num_ranks = int(rng.choice([2, 4, 6, 8]))
    num_experts = num_ranks * int(rng.integers(1, 5))
    nodes = int(rng.choice([1, 2]))
    residents = random_placement(
        rng, num_ranks, num_experts, int(rng.integers(3)), num_ranks_per_node=num_ranks // nodes
    )
    placement = residents.with_guest_slots(int(rng.integers(1, 4)))
    load = torch.from_numpy(
        np.stack([random_load(rng, num_experts) for _ in range(rng.integers(1, 4))])
    )
    bounds = {}
    if rng.random() < 0.3:
        bounds["base_load"] = torch.from_numpy(rng.integers(0, 100, num_ranks))
    if rng.random() < 0.3:
        bounds["speed"] = torch.from_numpy(rng.integers(1, 5, num_ranks))
    return placement, load, bounds


def test_solutions_are_optimal_on_residents_and_guests():
    rng = np.random.default_rng(0)
    num_guests = 0
    for _ in range(60):
        placement, load, bounds = random_case(rng)
        solution = solve(load, placement, guest_min_tokens=1, **bounds)
        R, G = placement.num_ranks, placement.num_guests_per_rank
        assert solution.guests.shape == (len(load), R, G)
        assert solution.guests.dtype == torch.int32
        for b, guests in enumerate(solution.guests):
            filled = placement.with_guests(guests)
            num_guests += int((guests >= 0).sum())
            quota = solution.quota[b]
            assert (quota.sum(1) == load[b]).all()
            assert (quota[torch.tensor(filled.copy_rank < 0)] == 0).all()
            judged = oracle.with_guests(placement, guests.numpy())
            bound = linear_program(judged, load[b].numpy(), **bounds)
            assert abs(bound - float(solution.lower_bound[b])) < 1e-6 * max(1, bound)
            if "speed" not in bounds:
                base = bounds.get("base_load", torch.zeros(R, dtype=torch.int64))
                reached = int((solution.rank_load[b] + base).max())
                assert fits(reached, judged, load[b].numpy(), **bounds)
                assert reached == 0 or not fits(reached - 1, judged, load[b].numpy(), **bounds)
    assert num_guests > 60


def test_guests_are_pure_and_keep_to_the_rule():
    rng = np.random.default_rng(1)
    for _ in range(60):
        placement, load, bounds = random_case(rng)
        problem = Problem(**bounds, guest_min_tokens=20, guest_tolerance=0.1).checked(placement)
        before = float(
            solve(
                load[0], placement.with_guests(placement.guest_slots * 0 - 1), **bounds
            ).lower_bound
        )
        guests = choose_guests(load[0].numpy(), placement, problem)
        assert guests.dtype == np.int32
        assert guests.shape == (placement.num_ranks, placement.num_guests_per_rank)
        again = pickle.loads(pickle.dumps(placement))
        assert (choose_guests(load[0].numpy().copy(), again, problem) == guests).all()
        speed = bounds.get("speed", torch.ones(placement.num_ranks))
        total = float(load[0].sum() + bounds.get("base_load", torch.zeros(1)).sum())
        if before <= 1.0999 * total / float(speed.sum()):
            assert (guests == -1).all()
        after = solve(load[0], placement, guest_min_tokens=20, guest_tolerance=0.1, **bounds)
        assert float(after.lower_bound) <= before + 1e-9


def test_loads_without_batches_have_no_guests():
    placement = Placement.homes_only(8, 4, 2)
    solution = solve(torch.zeros(0, 8, dtype=torch.int64), placement)
    assert solution.guests.shape == (0, 4, 2)
    assert solution.rank_load.shape == (0, 4)
    one = solve(torch.arange(8), placement)
    assert one.guests.shape == (4, 2)
    assert solve(torch.arange(8), Placement.homes_only(8, 4)).guests.shape == (4, 0)


def test_plans_fill_guest_slots_alike_on_every_rank():
    rng = np.random.default_rng(2)
    num_guests = 0
    for _ in range(20):
        placement, _, bounds = random_case(rng)
        layer = Layer(placement, Problem(**bounds, guest_min_tokens=4))
        R, E = placement.num_ranks, placement.num_experts
        weight = rng.lognormal(0, 1, E)
        picks = [torch.from_numpy(random_topk(rng, 64, min(4, E), weight)) for _ in range(R)]
        counts = torch.stack([torch.bincount(p[p >= 0], minlength=E) for p in picks])
        plans = []
        for rank in range(R):
            planner = Planner(layer, rank=rank, counts="given", solver="cpu", check=True)
            plans.append(planner(picks[rank], counts))
            check_plan(plans[-1], picks[rank], placement, rank, layer.problem)
        filled = placement.with_guests(plans[0].guests)
        load = counts.sum(0).numpy()
        judged = oracle.with_guests(placement, plans[0].guests.numpy())
        if not bounds:
            best = linear_program(judged, load)
            assert int(plans[0].rank_load.max()) == np.ceil(best - 1e-6)
        took = torch.zeros(placement.num_physical_experts, dtype=torch.int64)
        for plan, topk in zip(plans, picks, strict=True):
            assert (plan.guests == plans[0].guests).all()
            assert (plan.quota == plans[0].quota).all()
            chosen = plan.topk_idx >= 0
            held = torch.tensor(filled.physical_to_logical)[plan.topk_idx[chosen]]
            assert (held == topk[chosen]).all()
            took += torch.bincount(plan.topk_idx[chosen], minlength=len(took))
        assert (took.view(R, -1).sum(1) == plans[0].rank_load).all()
        num_guests += int((plans[0].guests >= 0).sum())
        stale = planner(picks[-1], counts, stale=True)
        assert int(stale.status) == Status.STALE
        assert (stale.guests == -1).all()
        home = torch.tensor(placement.home)[picks[-1].clamp(min=0)]
        assert (stale.topk_idx == torch.where(picks[-1] < 0, -1, home)).all()
    assert num_guests > 20


def test_a_forged_plan_is_found_out():
    placement = Placement.homes_only(4, 2, 1)
    topk = torch.zeros(100, 1, dtype=torch.int64)
    planner = Planner(placement, rank=0, counts="given", solver="cpu")
    plan = planner(topk, torch.tensor([[100, 0, 0, 0], [0, 0, 0, 0]]))
    assert plan.guests.tolist() == [[-1], [0]]
    assert plan.rank_load.tolist() == [50, 50]
    check_plan(plan, topk, placement, 0)
    plan._results = plan._results._replace(guests=torch.tensor([[-1], [1]], dtype=torch.int32))
    with pytest.raises(AssertionError, match="guests are not those of the definition"):
        check_plan(plan, topk, placement, 0)


def test_wrong_rules_are_refused():
    placement = Placement.homes_only(4, 2, 1)
    for tolerance in (-0.1, 1.5, "1"):
        with pytest.raises(ValueError, match="guest_tolerance must be a number"):
            Layer(placement, Problem(guest_tolerance=tolerance))
    for tokens in (0, -1, 2.5):
        with pytest.raises(ValueError, match="guest_min_tokens must be a whole number"):
            Layer(placement, Problem(guest_min_tokens=tokens))
    with pytest.raises(ValueError, match="max_quota limits copies by their columns"):
        solve(torch.arange(4), placement, max_quota=torch.full((4, 2), 9))


def test_ranks_compare_the_rule():
    problem = Problem(guest_tolerance=0.01, guest_min_tokens=32)
    assert problem.fingerprint() == Problem().fingerprint()
    assert problem.is_plain
    for other in (Problem(guest_tolerance=0.02), Problem(guest_min_tokens=9)):
        assert other.fingerprint() != Problem().fingerprint()
        assert not other.is_plain
    filled = Problem(guest_min_tokens=9).with_defaults(guest_tolerance=0.5, guest_min_tokens=7)
    assert filled.guest_rule == (5000, 9)


def test_engines_number_slots_without_guest_slots():
    rng = np.random.default_rng(3)
    for _ in range(10):
        placement, _, _ = random_case(rng)
        resident = placement.with_guest_slots(0)
        R, E = placement.num_ranks, placement.num_experts
        topk = torch.from_numpy(random_topk(rng, 50, 2, np.ones(E)))
        # Any copy may name its expert.
        copies = (resident.logical_to_physical >= 0).sum(1)
        column = rng.integers(copies[topk.clamp(min=0)])
        slots = torch.from_numpy(resident.logical_to_physical[topk.clamp(min=0), column]).long()
        slots = torch.where(topk < 0, -1, slots)
        counts = torch.zeros(R, E, dtype=torch.int64)
        counts[0] = torch.bincount(topk[topk >= 0], minlength=E)
        planner = Planner(placement, rank=0, counts="given", solver="cpu", check=True)
        by_slot = planner(slots, counts, indices="physical")
        assert (by_slot.topk_idx == planner(topk, counts).topk_idx).all()
        assert (planner.home(slots, indices="physical") == planner.home(topk)).all()
        outside = torch.full((1, 1), R * resident.num_local_slots)
        with pytest.raises(ValueError, match=f"a slot in .0, {R * resident.num_local_slots}"):
            planner(outside, counts * 0, indices="physical")


def test_settings_of_a_drop_in_fill_the_rule():
    placement = Placement.homes_only(4, 2, 1)
    topk = torch.zeros(100, 1, dtype=torch.int64)
    counts = torch.tensor([[100, 0, 0, 0], [0, 0, 0, 0]])

    def guests(problem=None, **rule):
        planner = Planner(Layer(placement, problem), rank=0, counts="given", solver="cpu", **rule)
        return planner(topk, counts).guests.tolist()

    assert guests() == [[-1], [0]]
    assert guests(guest_min_tokens=51) == [[-1], [-1]]
    assert guests(guest_tolerance=1) == [[-1], [-1]]
    assert guests(Problem(guest_min_tokens=50), guest_min_tokens=51) == [[-1], [0]]
    with pytest.raises(ValueError, match="guest_min_tokens must be a whole number"):
        guests(guest_min_tokens=0)


def another_rule(group):
    placement = Placement.homes_only(4, 2, 1)
    Planner(placement, group, solver="cpu", guest_min_tokens=9 + group.rank())


def test_ranks_with_other_rules_are_named():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, another_rule)
    for kind, message in failure.value.errors:
        assert kind == "RankError"
        assert "ranks differ in problem" in message


def test_another_rule_is_another_tag():
    placement = Placement.homes_only(4, 2, 1)
    tags = {
        tag_of(placement, problem) for problem in (None, Problem(), Problem(guest_min_tokens=9))
    }
    assert len(tags) == 2
    assert tag_of(placement) != tag_of(placement.with_guest_slots(0))


def test_solvers_that_take_no_guest_slots_refuse_them_by_name():
    placement = Placement.homes_only(4, 2, 1)
    check_fit(placement, "flow", 99 * 1024)
    with pytest.raises(ValueError, match=r"cusolverdx takes no guest slots, and .* has 1 a rank"):
        check_fit(placement, "cusolverdx", 227 * 1024)
    many = Placement.homes_only(64, 64, 8)
    with pytest.raises(ValueError, match="with 8 guest slots a rank"):
        check_fit(many, "flow", 227 * 1024)
    across = Placement.homes_only(128, 128, 1)
    with pytest.raises(ValueError, match="at most 64 ranks"):
        check_fit(across, "flow", 227 * 1024)
    check_fit(Placement.homes_only(128, 128, 1, num_ranks_per_node=8), "flow", 227 * 1024)
