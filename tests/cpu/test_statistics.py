"""What a planner's batches come to, by the CPU: against the plans themselves."""

import numpy as np
import oracle
import pytest
import tallied
import torch

from lplb_ep import Layer, Placement, Planner, Problem
from lplb_ep.planning.statistics import MAX_SAMPLES
from lplb_ep.planning.structs import Status

E, R = 12, 4


def planner_of(placement, problem=None, **arguments):
    layer = Layer(placement, problem)
    return Planner(layer, rank=1, counts="given", solver="cpu", **arguments), layer


def batches(rng, number):
    """Given counts [R, E] and the picks [T, 1] of rank 1; some are wrong, or nothing at all."""
    weights = rng.lognormal(0, 1, (number, E))
    for i in range(number):
        counts = torch.from_numpy(rng.poisson(weights[i] * rng.choice([0, 1, 9]), (R, E)))
        topk = torch.arange(E).repeat_interleave(counts[1])[:, None]
        if rng.random() < 0.05:
            counts[0, 0] = counts[2, 3] = 2**31 - 1
        yield topk, counts


@pytest.mark.parametrize("kind", ["plain", "bounded", "guests", "experts"])
def test_totals_are_those_of_a_thousand_plans(kind):
    rng = np.random.default_rng(len(kind))
    placement = oracle.random_placement(rng, R, E, 2)
    problem, given = Problem(guest_min_tokens=1), {}
    if kind == "bounded":
        base = torch.tensor([5, 0, 40, 3])
        given = {"base_load": base, "speed": torch.tensor([1, 2, 3, 2])}
        problem = Problem(**given, max_quota=torch.full((E, placement.max_replicas), 60))
    if kind == "experts":
        problem, given = Problem(objective="experts"), {"by_tokens": False}
    if kind == "guests":
        placement = Placement.homes_only(E, R, 2, num_ranks_per_node=2)
    planner, _ = planner_of(placement, problem, mark_every=20)
    expected = tallied.Tallied(1, mark_every=20, **given)
    for i, (topk, counts) in enumerate(batches(rng, 250)):
        if i in (100, 101, 180):
            planner.statistics.begin_window()
            expected.begin_window(expected.window + 1)
        plan = planner(topk, counts=counts, stale=bool(rng.random() < 0.1))
        expected.add(plan, placement)
        assert tallied.read(planner) == expected.totals
        assert tallied.read(planner, marked=True) == expected.marked
    ends = {Status.OPTIMAL, Status.STALE, Status.BAD_COUNTS}
    ends |= {Status.INFEASIBLE} if kind == "bounded" else set()
    assert set(expected.batches) == set(planner.num_batches) == ends
    assert planner.num_batches == expected.batches


def test_samples_are_the_loads_of_every_nth_batch():
    rng = np.random.default_rng(1)
    placement = Placement.homes_only(E, R, 0)
    planner, _ = planner_of(placement, sample_every=3)
    expected, taken = tallied.Tallied(1, every=3), {}
    for i, (topk, counts) in enumerate(batches(rng, 100)):
        expected.add(planner(topk, counts=counts), placement)
        if i % 40 == 7:
            taken |= planner.statistics.take_samples()
    taken |= planner.statistics.take_samples()
    assert {b: load.tolist() for b, load in taken.items()} == expected.samples
    assert planner.statistics.take_samples() == {}
    for topk, counts in batches(rng, 3 * MAX_SAMPLES + 30):
        expected.add(planner(topk, counts=counts), placement)
    last = planner.statistics.take_samples()
    assert {b: load.tolist() for b, load in last.items()}.items() <= expected.samples.items()
    assert len(last) == MAX_SAMPLES
    assert max(last) == max(expected.samples)


def test_what_a_backward_pass_plans_again_is_counted_and_is_no_sample():
    placement = Placement.homes_only(E, R, 0)
    planner, _ = planner_of(placement, sample_every=2)
    expected = tallied.Tallied(1, every=2)
    for topk, counts in batches(np.random.default_rng(3), 20):
        expected.add(planner(topk, counts=counts), placement)
        again = []
        tallied.in_backward(
            lambda topk=topk, counts=counts, to=again: to.append(planner(topk, counts=counts))
        )
        expected.add(*again, placement, again=True)
        assert tallied.read(planner) == expected.totals
    taken = {b: load.tolist() for b, load in planner.statistics.take_samples().items()}
    assert taken == expected.samples
    assert max(taken) <= 18


def test_no_samples_are_kept_unless_asked_for():
    planner, _ = planner_of(Placement.homes_only(E, R, 0))
    for topk, counts in batches(np.random.default_rng(2), 5):
        planner(topk, counts=counts)
    assert planner.statistics.take_samples() == {}
