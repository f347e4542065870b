"""Counts that travel between GPUs: by NVSHMEM, by CUDA IPC and by torch.distributed."""

import os
import signal
import time
import unittest.mock

import mps
import numpy as np
import oracle
import pytest
import ranks
import torch
import torch.distributed as dist

from lplb_ep import ContractError, Planner, RankError, check_plan
from lplb_ep.comm import nvshmem, reachability
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.plan import Status

pytestmark = pytest.mark.gpu

KINDS = ("nvshmem", "ipc", "torch")


def place(num_ranks, num_experts=64):
    rng = np.random.default_rng(num_ranks)
    return oracle.random_placement(rng, num_ranks, num_experts, 2)


def topk_of(rng, placement, dtype=torch.int64):
    """Every rank's picks, drawn by every rank: odd numbers of them, and none."""
    E = placement.num_experts
    tokens = rng.integers(0, 300, placement.num_ranks) * rng.integers(0, 2, placement.num_ranks)
    weights = rng.lognormal(0, 1.2, E)
    return [torch.from_numpy(oracle.random_topk(rng, int(t), 4, weights)).to(dtype) for t in tokens]


def use_gpu(group):
    torch.cuda.set_device(group.rank() % torch.cuda.device_count())


def plan_all_kinds(group, num_batches):
    use_gpu(group)
    placement = place(group.size())
    planners = {kind: Planner(placement, group, counts=kind, solver="flow") for kind in KINDS}
    rng, be_late = np.random.default_rng(1), np.random.default_rng(group.rank())
    for batch in range(num_batches):
        topks = topk_of(rng, placement, torch.int32 if batch % 2 else torch.int64)
        mine = topks[group.rank()].cuda()
        torch.cuda._sleep(int(be_late.integers(0, 2_000_000)))  # up to a millisecond
        plans = {kind: planner(mine) for kind, planner in planners.items()}
        for kind, plan in plans.items():
            counts = torch.stack([cpu.count(t, placement.num_experts) for t in topks])
            assert torch.equal(plan.counts.cpu(), counts), (kind, batch)
            check_plan(plan, mine, placement, group.rank())
            for name in ("topk_idx", "quota", "rank_load", "status"):
                assert torch.equal(getattr(plan, name), getattr(plans["torch"], name)), (kind, name)
    assert {kind: planner.counts for kind, planner in planners.items()} == {k: k for k in KINDS}
    return {kind: dict(planner.num_batches) for kind, planner in planners.items()}


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_all_exchanges_give_the_same_plans(node, num_ranks):
    for numbers in node(num_ranks, plan_all_kinds, 30, timeout=120):
        assert numbers == {kind: {Status.OPTIMAL: 30} for kind in KINDS}


def many_batches(group, kind, num_batches, graph):
    """Batches whose counts say which batch they are of."""
    use_gpu(group)
    placement = place(group.size())
    planner = Planner(placement, group, counts=kind, solver="flow")
    R, E = group.size(), placement.num_experts
    number = torch.zeros((), dtype=torch.int64, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    picks = torch.arange(64 * 4, device="cuda").reshape(64, 4)

    def of_rank(rank):
        """Other picks on every rank and in every batch, some of them none."""
        expert = (picks * (rank + 1) + number * 7) % (E + 1)
        return torch.where(expert == E, -1, expert)

    def one():
        plan = planner(of_rank(group.rank()))
        for rank in range(R):
            chosen = of_rank(rank).flatten()
            ones = (chosen >= 0).int()
            counts = torch.zeros(E, dtype=torch.int32, device="cuda")
            counts.scatter_add_(0, chosen.clamp(min=0), ones)
            wrong.add_((plan.counts[rank] != counts).any())
        wrong.add_(plan.status != 0)
        number.add_(1)

    for _ in range(3):
        one()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            one()
    dist.barrier(group)
    before, start = torch.cuda.mem_get_info()[0], time.perf_counter()
    for _ in range(num_batches):
        captured.replay() if graph else one()
    torch.cuda.synchronize()
    took = time.perf_counter() - start
    dist.barrier(group)
    assert int(wrong) == 0
    assert int(number) == num_batches + 3
    if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1":  # or others' memory changes, too
        assert before - torch.cuda.mem_get_info()[0] < 64 << 20
    return took


@pytest.mark.parametrize("kind", ["nvshmem", "ipc"])
def test_ten_thousand_replays_of_a_graph(node, kind):
    node(8, many_batches, kind, 10_000, True, timeout=200)


@pytest.mark.parametrize("kind", ["nvshmem", "ipc"])
def test_ten_thousand_batches(node, kind):
    node(8, many_batches, kind, 10_000, False, timeout=300)


def miss_one(group, kind):
    """The last rank does not come to the second batch."""
    use_gpu(group)
    said = ranks.Said()
    placement = place(group.size())
    planner = Planner(placement, group, counts=kind, solver="flow", timeout_s=1)
    topk = torch.arange(8, device="cuda").reshape(2, 4)
    assert int(planner(topk).status) == Status.OPTIMAL
    if group.rank() == group.size() - 1:
        dist.barrier(group)
        return "absent"
    start = time.perf_counter()
    plan = planner(topk)
    assert int(plan.status) == Status.TIMED_OUT
    took = time.perf_counter() - start
    # The tokens are where the home slots are: none is lost.
    homes = torch.tensor(placement.home.tolist())[topk.cpu()]
    assert torch.equal(plan.topk_idx.cpu(), homes)
    time.sleep(1)  # longer than the watchdog sleeps
    lost = f"ranks [{group.size() - 1}] sent no counts within 1 s"
    assert any(lost in line for line in said.lines), said.lines
    dist.barrier(group)
    with pytest.raises(RankError, match=r"ranks \[3\] sent no counts within 1 s"):
        planner(topk)
    return took


@pytest.mark.parametrize("kind", ["nvshmem", "ipc"])
def test_a_rank_that_does_not_come_is_named_in_time(node, kind):
    *others, absent = node(4, miss_one, kind)
    assert absent == "absent"
    assert all(1 <= took < 3 for took in others)


def nodes_of(group, size):
    """Has ranks believe that they are on several nodes, while their planners are made."""
    name = f"{reachability._node()}/{group.rank() // size}"
    return unittest.mock.patch.object(reachability, "_node", return_value=name)


def refuse_one(group, kind, refuses, node_size):
    """One rank refuses its input; afterwards all go on, by calls and by replays of a graph."""
    use_gpu(group)
    placement = place(group.size())
    with nodes_of(group, node_size):
        planner = Planner(placement, group, counts=kind, solver="flow")
    topk = torch.arange(8, device="cuda").reshape(2, 4)
    graph = torch.cuda.CUDAGraph()
    for captured in (None, graph):
        plan = planner(topk)
        assert int(plan.status) == Status.OPTIMAL
        if captured is not None:
            with torch.cuda.graph(captured):
                plan = planner(topk)
        if group.rank() == refuses:
            with pytest.raises(ValueError, match="topk_idx"):
                planner(topk.float())
        else:
            assert int(planner(topk).status) == Status.REFUSED
            with pytest.raises(RankError, match="refused"):
                planner.raise_errors()
        torch.cuda.synchronize()
        dist.barrier(group)
        for batch in range(5):
            torch.cuda._sleep(1_000_000 * ((group.rank() + batch) % 3))
            if captured is None:
                plan = planner(topk)
            else:
                captured.replay()
            assert int(plan.status) == Status.OPTIMAL, batch
            assert int(plan.counts.sum()) == 8 * group.size()
        planner.raise_errors()


@pytest.mark.parametrize(
    ("kind", "refuses", "node_size"),
    [("nvshmem", 1, 4), ("ipc", 1, 4), ("nvshmem", 1, 2), ("nvshmem", 2, 2)],
)
def test_a_refusal_reaches_the_others_and_all_go_on(node, kind, refuses, node_size):
    ranks.close()  # a group knows where its ranks are
    node(4, refuse_one, kind, refuses, node_size)
    ranks.close()


def miss_across(group, absent):
    """On two nodes, of which one rank does not come to the second batch."""
    use_gpu(group)
    with nodes_of(group, 2):
        planner = Planner(place(group.size()), group, counts="nvshmem", solver="flow", timeout_s=2)
    topk = torch.arange(8, device="cuda").reshape(2, 4)
    assert int(planner(topk).status) == Status.OPTIMAL
    torch.cuda.synchronize()
    dist.barrier(group)
    if group.rank() != absent:
        planner(topk)
        with pytest.raises(RankError) as raised:
            planner.raise_errors()
    dist.barrier(group)
    return "absent" if group.rank() == absent else str(raised.value).split(" sent")[0]


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        (1, ["ranks [1]", "absent", "ranks [1]", "ranks [1]"]),
        # The first rank of a node: whom it would have spoken for is not heard of, either.
        (2, ["ranks [2, 3]", "ranks [2, 3]", "absent", "ranks [0, 1, 2]"]),
    ],
)
def test_a_rank_that_does_not_come_is_named_on_other_nodes(node, absent, said):
    ranks.close()
    assert node(4, miss_across, absent) == said
    ranks.close()


def join(group):
    """NVSHMEM runs already, as DeepEP's buffers start it, and they are done with it before us."""
    from nvshmem import bindings

    use_gpu(group)
    topk = torch.arange(8, device="cuda").reshape(2, 4)
    nvshmem.join(group, 1)  # in the buffer's place
    assert nvshmem.runs()
    nvshmem._started.clear()
    before = torch.cuda.mem_get_info()[0]
    planner = Planner(place(group.size()), group, counts="nvshmem", solver="flow")
    taken = before - torch.cuda.mem_get_info()[0]
    assert not nvshmem.has_started_nvshmem()
    planner(topk)
    torch.cuda.synchronize()
    dist.barrier(group)
    bindings.hostlib_finalize()
    assert nvshmem.runs()
    for _ in range(10):
        plan = planner(topk)
        assert int(plan.counts.sum()) == 8 * group.size()
        assert int(plan.status) == Status.OPTIMAL
    dist.barrier(group)
    return taken


def test_a_world_that_is_joined_outlives_who_started_it(node):
    ranks.close()
    node(4, join)
    ranks.close()


def streams(group, kind):
    """Two channels in flight on two streams."""
    use_gpu(group)
    placement = place(group.size())
    planners = [Planner(placement, group, counts=kind, solver="flow", slot=i) for i in range(2)]
    queues = [torch.cuda.Stream() for _ in planners]
    rng = np.random.default_rng(3)
    for _ in range(20):
        plans = []
        for planner, queue in zip(planners, queues, strict=True):
            topks = topk_of(rng, placement)
            mine = topks[group.rank()].cuda()
            queue.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(queue):
                plans.append((planner(mine), mine, topks))
        torch.cuda.synchronize()
        for plan, mine, topks in plans:
            counts = torch.stack([cpu.count(t, placement.num_experts) for t in topks])
            assert torch.equal(plan.counts.cpu(), counts)
            check_plan(plan, mine, placement, group.rank())


@pytest.mark.parametrize("kind", ["nvshmem", "ipc"])
def test_channels_are_independent(node, kind):
    node(4, streams, kind)


def differ(group, kind):
    use_gpu(group)
    placement = place(group.size(), 64 + (group.rank() == 1) * 2)
    with pytest.raises(RankError, match=r"placement.*ranks \[1\]"):
        Planner(placement, group, counts=kind, solver="flow")


def test_ranks_that_differ_are_named(node):
    node(4, differ, "ipc")


def lose_one(group, kind, on_timeout):
    """The last rank is killed between two batches."""
    use_gpu(group)
    said = ranks.Said()
    planner = Planner(
        place(group.size()),
        group,
        counts=kind,
        solver="flow",
        timeout_s=2,
        abort_on_timeout=on_timeout == "abort",
    )
    topk = torch.arange(8, device="cuda").reshape(2, 4)
    assert int(planner(topk).status) == Status.OPTIMAL
    torch.cuda.synchronize()
    dist.barrier(group)
    if group.rank() == group.size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    start = time.perf_counter()
    planner(topk)
    with pytest.raises(RankError, match=r"ranks \[3\] sent no counts within 2 s"):
        planner.raise_errors()
    took = time.perf_counter() - start
    assert 2 <= took < 4
    time.sleep(1)  # longer than the watchdog sleeps
    assert any("ranks [3] sent no counts within 2 s" in line for line in said.lines), said.lines
    raise AssertionError("as it should be")


@pytest.mark.parametrize("kind", ["nvshmem", "ipc"])
@pytest.mark.parametrize("on_timeout", ["raise", "abort"])
def test_a_killed_rank_is_named_in_time(kind, on_timeout):
    with mps.service() as environ_of, pytest.raises(ranks.RanksFailedError) as failed:
        ranks.run(4, lose_one, kind, on_timeout, environ=environ_of(4))
    gone = ("EOFError", "its process ended")
    expected = ("AssertionError", "as it should be") if on_timeout == "raise" else gone
    assert failed.value.errors == [expected] * 3 + [gone]


def on_two_nodes(group, num_batches, node_size):
    """Ranks that believe to be on several nodes, whose first ones alone reach each other."""
    use_gpu(group)
    placement = place(group.size())
    with nodes_of(group, node_size):
        across = Planner(placement, group, counts="nvshmem", solver="flow")
    other = 0 if group.rank() >= node_size else group.size() - 1
    assert across.exchange.windows.addresses[other] == 0
    by_torch = Planner(placement, group, counts="torch", solver="flow")
    rng = np.random.default_rng(1)
    static = torch.zeros(300, 4, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    for batch in range(num_batches):
        if batch == 2:
            with torch.cuda.graph(graph):
                replayed = across(static)
        mine = topk_of(rng, placement)[group.rank()].cuda()
        static.fill_(-1)[: len(mine)] = mine
        if batch < 2:
            plan = across(static)
        else:
            graph.replay()
            plan = replayed
        expected = by_torch(static)
        check_plan(plan, static, placement, group.rank())
        for name in ("counts", "topk_idx", "quota", "rank_load", "status"):
            assert torch.equal(getattr(plan, name), getattr(expected, name)), (batch, name)
    assert int(across.num_batches[Status.OPTIMAL]) == num_batches


@pytest.mark.parametrize(("num_ranks", "node_size"), [(4, 2), (8, 4), (8, 2)])
def test_counts_cross_nodes(node, num_ranks, node_size):
    """By NVSHMEM's own puts, which find the other "node" on the same GPU here."""
    ranks.close()  # a group knows where its ranks are
    node(num_ranks, on_two_nodes, 100, node_size, timeout=120)
    ranks.close()


def not_in_a_graph(group):
    use_gpu(group)
    planner = Planner(place(group.size()), group, counts="torch", solver="flow")
    topk = torch.arange(8, device="cuda").reshape(2, 4)
    planner(topk)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        topk.clone()
        with pytest.raises(ContractError, match="gloo"):
            planner(topk)


def test_counts_over_gloo_are_refused_under_capture(node):
    node(2, not_in_a_graph)


def by_nccl(group, num_batches):
    """Counts on GPU tensors by NCCL, which a graph may capture."""
    use_gpu(group)
    nccl = dist.new_group(backend="nccl")
    placement = place(group.size())
    by_torch = Planner(placement, nccl, counts="torch", solver="flow")
    by_words = Planner(placement, group, counts="ipc", solver="flow")
    rng = np.random.default_rng(1)
    static = torch.zeros(300, 4, dtype=torch.int64, device="cuda")
    by_torch(static)
    by_words(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = by_torch(static)
    for batch in range(num_batches):
        mine = topk_of(rng, placement)[group.rank()].cuda()
        static.fill_(-1)[: len(mine)] = mine
        plan, expected = by_torch(static), by_words(static)
        graph.replay()
        for name in ("counts", "topk_idx", "quota", "rank_load", "status"):
            assert torch.equal(getattr(plan, name), getattr(expected, name)), (batch, name)
            assert torch.equal(getattr(replayed, name), getattr(expected, name)), (batch, name)
    torch.cuda.synchronize()
    del graph, replayed
    dist.destroy_process_group(nccl)


@pytest.mark.skipif(not mps.has_gpu_each(), reason="NCCL wants a GPU for each rank")
def test_counts_over_nccl(node):
    node(2, by_nccl, 50)


def missed_over_nccl(group):
    """The last rank comes when the others have named it; they capture a graph meanwhile."""
    use_gpu(group)
    said, is_last = ranks.Said(), group.rank() == group.size() - 1
    nccl = dist.new_group(backend="nccl")
    planner = Planner(place(group.size()), nccl, counts="torch", solver="flow", timeout_s=1)
    topk = torch.arange(8, device="cuda").reshape(2, 4)
    planner(topk)
    # CUDA loads a kernel when it is first launched, and may wait for the GPU to do so.
    captured = torch.ones(4, device="cuda")
    _ = captured * 2
    torch.cuda.synchronize()
    if is_last:
        dist.barrier(group)
        plan = planner(topk)
    else:
        plan, graph = planner(topk), torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()  # unlike `torch.cuda.graph`, it does not wait for the GPU
            doubled = captured * 2
            time.sleep(1)  # the watchdog looks at the GPU several times
            graph.capture_end()
        until = time.monotonic() + 60
        while not said.lines and time.monotonic() < until:
            time.sleep(0.1)
        dist.barrier(group)
        torch.cuda.synchronize()
        graph.replay()
        assert doubled.tolist() == [2] * 4
    # Nothing is lost, and the next batches are planned.
    assert int(plan.status) == Status.OPTIMAL
    assert int(planner(topk).status) == Status.OPTIMAL
    torch.cuda.synchronize()
    dist.destroy_process_group(nccl)
    return said.lines


@pytest.mark.skipif(not mps.has_gpu_each(), reason="NCCL wants a GPU for each rank")
def test_a_rank_that_does_not_come_is_named_over_nccl(node):
    *others, last = node(2, missed_over_nccl)
    assert last == []
    for lines in others:
        assert len(lines) == 1
        assert "ranks [1] sent no counts within 1 s" in lines[0]
        assert lines[0].endswith("The GPU goes on waiting")
