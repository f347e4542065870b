"""What a planner's batches come to on a GPU: against the plans, in calls and in replays."""

import numpy as np
import oracle
import pytest
import tallied
import torch

from lplb_ep import Layer, Placement, Planner, Problem
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.statistics import MAX_SAMPLES

pytestmark = pytest.mark.gpu

R, E, RANK, EVERY = 8, 64, 3, 4
SMALL, LARGE = 40, 1500  # tokens: by one launch and by three
BASE, SPEED = torch.arange(R) * 10, 1 + torch.arange(R) % 3
PLACEMENTS = {
    "plain": Placement.from_topology("cube", num_experts=E, num_ranks=R, num_redundant_per_rank=2),
    "bounded": Placement.from_topology(
        "cube", num_experts=E, num_ranks=R, num_redundant_per_rank=2
    ),
    "guests": Placement.homes_only(E, R, 2),
}


def batches(rng, number, num_tokens=SMALL):
    """Picks [T, 4] of this rank, and the counts of all; those of a few are too large."""
    made = []
    for _ in range(min(number, 40)):
        weights = rng.lognormal(0, 1.2, E)
        topks = [torch.from_numpy(oracle.random_topk(rng, T, 4, weights)) for T in [num_tokens] * R]
        counts = torch.stack([cpu.count(topk, E) for topk in topks]).int()
        if rng.random() < 0.05:
            counts[RANK - 1, :2] = 2**31 - 1
        made.append((topks[RANK].cuda(), counts.cuda()))
    yield from (made[i] for i in rng.integers(0, len(made), number))


def planner_of(kind):
    bounds = {"base_load": BASE, "speed": SPEED} if kind == "bounded" else {}
    layer = Layer(PLACEMENTS[kind], Problem(guest_min_tokens=1, **bounds))
    kept = {"sample_every": EVERY, "mark_every": 7}
    planner = Planner(layer, rank=RANK, counts="given", solver="flow", **kept)
    return planner, tallied.Tallied(RANK, every=EVERY, mark_every=7, **bounds)


def as_lists(samples):
    return {before: load.tolist() for before, load in samples.items()}


def host(plan):
    """A copy of a plan that the next replay does not write."""
    fields = ("counts", "rank_load", "status", "guests")
    made = type("Kept", (), {})()
    for field in fields:
        setattr(made, field, getattr(plan, field).cpu().clone())
    return made


@pytest.mark.parametrize("num_tokens", [SMALL, LARGE])
@pytest.mark.parametrize("kind", PLACEMENTS)
def test_calls_and_replays_count_alike(kind, num_tokens):
    rng = np.random.default_rng(len(kind))
    planner, expected = planner_of(kind)
    topk, counts = (tensor.clone() for tensor in next(batches(rng, 1, num_tokens)))
    placement, taken = planner.placement, {}
    for given, new in batches(rng, 100, num_tokens):
        expected.add(host(planner(given, counts=new, stale=bool(rng.random() < 0.1))), placement)
    torch.cuda.synchronize()
    assert tallied.read(planner) == expected.totals
    taken |= planner.statistics.take_samples(all_done=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = planner(topk, counts=counts)
    for i, (given, new) in enumerate(batches(rng, 1000, num_tokens)):
        topk.copy_(given)
        counts.copy_(new)
        graph.replay()
        expected.add(host(plan), placement)
        if i % 100 == 50:
            planner.statistics.begin_window()
            expected.begin_window(expected.window + 1)
            taken |= planner.statistics.take_samples()
    torch.cuda.synchronize()
    assert tallied.read(planner) == expected.totals
    assert tallied.read(planner, marked=True) == expected.marked
    assert planner.num_batches == expected.batches
    taken |= planner.statistics.take_samples(all_done=True)
    assert as_lists(taken) == expected.samples


def test_they_are_read_while_the_gpu_works_and_another_thread_captures():
    rng = np.random.default_rng(1)
    planner, expected = planner_of("plain")
    topk, counts = next(batches(rng, 1))
    plan = host(planner(topk, counts=counts))
    expected.add(plan, planner.placement)
    torch.cuda.synchronize()
    torch.cuda._sleep(2**31)  # a second or so
    planner(topk, counts=counts)
    assert tallied.read(planner) == expected.totals  # of the last batch that is done
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=side):
        planner(topk, counts=counts)
        expected.add(plan, planner.placement)  # the one that was waited for
        assert tallied.read(planner) == expected.totals
        planner.statistics.begin_window()
        planner.statistics.take_samples()
    graph.replay()
    torch.cuda.synchronize()
    expected.begin_window(1)
    expected.add(plan, planner.placement)
    assert tallied.read(planner) == expected.totals


def test_samples_that_are_not_read_in_time_are_lost():
    rng = np.random.default_rng(2)
    planner, expected = planner_of("plain")
    for topk, counts in batches(rng, EVERY * MAX_SAMPLES + 50):
        expected.add(host(planner(topk, counts=counts)), planner.placement)
    torch.cuda.synchronize()
    taken = as_lists(planner.statistics.take_samples(all_done=True))
    assert taken.items() <= expected.samples.items()
    assert 0 < len(taken) <= MAX_SAMPLES
    assert max(taken) == max(expected.samples)
