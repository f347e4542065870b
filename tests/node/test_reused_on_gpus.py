"""Batches by the quotas of an earlier one, between GPUs: by calls and by replays of a graph."""

import numpy as np
import oracle
import pytest
import torch

from lplb_ep import Planner, check_plan
from lplb_ep.planning.plan import Status

pytestmark = pytest.mark.gpu

EVERY, NUM_TOKENS, NUM_TOPK = 3, 96, 4


@torch.no_grad()
def plan_some(group, kind):
    """How each batch ends on this rank. Its plan is checked, whoever makes it."""
    torch.cuda.set_device(group.rank() % torch.cuda.device_count())
    rng, E = np.random.default_rng(7), 64
    placement = oracle.random_placement(rng, group.size(), E, 2)
    planner = Planner(placement, group, counts=kind, solver="flow", every=EVERY)
    static = torch.zeros(NUM_TOKENS, NUM_TOPK, dtype=torch.int64, device="cuda")
    own = np.random.default_rng(group.rank())
    ends, last = [], None

    def new_batch():
        topk = oracle.random_topk(own, NUM_TOKENS, NUM_TOPK, own.lognormal(0, 1, E))
        static.copy_(torch.from_numpy(topk))

    def look_at(plan):
        nonlocal last
        torch.cuda.synchronize()
        check_plan(plan, static, placement, group.rank())
        ends.append(Status(int(plan.status)))
        if ends[-1] is Status.REUSED:
            assert torch.equal(plan.quota, last)
        last = plan.quota.clone()

    for _ in range(4):
        new_batch()
        look_at(planner(static))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = planner(static)
    for n in range(8):
        new_batch()
        if n == 5:  # a call between replays is one of them
            look_at(planner(static))
            continue
        graph.replay()
        look_at(captured)
    planner.raise_errors()
    return ends, dict(planner.num_batches)


@pytest.mark.parametrize("kind", ["nvshmem", "ipc"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_in_so_many_batches_is_exchanged(node, num_ranks, kind):
    expected = [Status.REUSED if n % EVERY else Status.OPTIMAL for n in range(12)]
    for ends, by_status in node(num_ranks, plan_some, kind, timeout=120):
        assert ends == expected
        assert by_status == {s: expected.count(s) for s in (Status.OPTIMAL, Status.REUSED)}
