"""Plans made on the GPU against the CPU's steps, which define them."""

import numpy as np
import oracle
import pytest
import torch

from lplb_ep import (
    ContractError,
    Placement,
    Planner,
    RankError,
    buffer,
    check_plan,
    cpu,
    cuda,
    network,
)
from lplb_ep.plan import Status

pytestmark = pytest.mark.gpu

TWO = Placement([0, 1, 2, 0], 2)


class Rows:
    """An exchange whose other rows lie in device memory: those of ranks in step with this one."""

    def __init__(self, counts, rank, **changes):
        self.counts, self.rank, self.changes = counts, rank, changes

    def gather(self, row):
        rows = row.expand(len(self.counts), -1).clone()
        rows[:, 0] = 0
        rows[:, 5 : 5 + self.counts.shape[1]] = self.counts
        rows[self.rank] = row
        for (rank, word), value in self.changes.get("at", {}).items():
            rows[rank, word] = value
        return rows


def batch(rng, placement, num_tokens, num_topk, dtype=torch.int64):
    """A [T, K] for each rank, on the GPU, and their counts."""
    E = placement.num_experts
    topks = [
        torch.from_numpy(
            oracle.random_topk(rng, tokens, min(num_topk, E), rng.lognormal(0, 1.2, E))
        ).to("cuda", dtype)
        for tokens in num_tokens
    ]
    return topks, torch.stack([cpu.count(t.cpu(), E) for t in topks]).cuda()


def compare(plan, topk, counts, placement, rank):
    """Bit for bit what the CPU's steps make of the same quotas; the quotas are the best."""
    check_plan(plan, topk, placement, rank)
    assert torch.equal(plan.counts, counts)
    shares = cpu.split(plan.counts.cpu(), plan.quota.cpu(), placement)
    assert torch.equal(plan.split.cpu(), shares)
    assert torch.equal(plan.topk_idx.cpu(), cpu.rewrite(topk.cpu(), shares[rank], placement))
    assert plan.topk_idx.is_contiguous()
    assert int(plan.status) == Status.OPTIMAL


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("R", [1, 2, 8, 16, 24, 48, 64])
@pytest.mark.parametrize("solver", network.SHARES)
def test_every_step_is_the_cpus(R, dtype, solver):
    rng = np.random.default_rng(R)
    for _ in range(6):
        node = int(rng.choice([n for n in (1, 2, 4, 8, 16, 64) if R % n == 0]))
        placement = oracle.random_placement(
            rng, R, int(rng.integers(9, 300)), int(rng.integers(0, 4)), num_ranks_per_node=node
        )
        num_tokens = rng.integers(0, 300, R) * (rng.random(R) < 0.8)
        num_tokens[0] = rng.choice([0, 1, 31, 129, 5000])
        topks, counts = batch(rng, placement, num_tokens, int(rng.integers(1, 17)), dtype)
        for rank in {0, R // 2, R - 1}:
            given = Planner(placement, rank=rank, counts="given", solver=solver)
            plan = given(topks[rank], counts=counts)
            compare(plan, topks[rank], counts, placement, rank)
            exchanging = Planner(placement, rank=rank, counts="given", solver=solver)
            exchanging.exchange = Rows(counts, rank)
            for _ in range(2):
                again = exchanging(topks[rank])
                for field in ("topk_idx", "counts", "quota", "rank_load", "status", "split"):
                    assert torch.equal(getattr(plan, field), getattr(again, field)), field


def test_large_batches_and_many_components():
    rng = np.random.default_rng(0)
    cube = Placement.from_topology("cube", num_experts=256, num_ranks=64, num_redundant_per_rank=2)
    for num_tokens, num_topk in ((8192, 8), (100_000, 16), (3, 1)):
        topks, counts = batch(rng, cube, [num_tokens] + [64] * 63, num_topk)
        plan = Planner(cube, rank=0, counts="given", solver="flow")(topks[0], counts=counts)
        compare(plan, topks[0], counts, cube, 0)


def test_a_slice_of_a_larger_tensor_and_host_tensors_are_taken():
    topk = torch.tensor([[0, 9, 1], [2, 9, -1], [0, 9, 1]], device="cuda")[:, ::2]
    planner = Planner(Placement([0, 1, 2, 0], 1), solver="flow")
    check_plan(planner(topk), topk, planner.placement, 0)
    check_plan(planner(topk.cpu()), topk.cpu(), planner.placement, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_graphs_replay_with_new_indices(dtype):
    rng = np.random.default_rng(1)
    placement = oracle.random_placement(rng, 8, 64, 2)
    batches = [batch(rng, placement, [200] * 8, 4, dtype) for _ in range(5)]
    planner = Planner(placement, rank=3, counts="given", solver="flow")
    topk, counts = batches[0][0][3].clone(), batches[0][1].clone()
    planner(topk, counts=counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = planner(topk, counts=counts)
    for topks, new in batches:
        topk.copy_(topks[3])
        counts.copy_(new)
        graph.replay()
        compare(plan, topks[3], new, placement, 3)
    assert planner.num_batches == {Status.OPTIMAL: 6}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_and_nothing_is_allocated_from_the_device():
    rng = np.random.default_rng(2)
    placement = oracle.random_placement(rng, 8, 64, 2)
    topks, counts = batch(rng, placement, [500] * 8, 8)
    planner = Planner(placement, rank=0, counts="given", solver="flow")
    planner.exchange = Rows(counts, 0)
    planner(topks[0])
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            planner(topks[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_planners_on_streams_of_their_own():
    rng = np.random.default_rng(3)
    placements = [oracle.random_placement(rng, 8, 128, 2) for _ in range(3)]
    batches = [batch(rng, p, [2000] + [100] * 7, 8) for p in placements]
    planners = [Planner(p, rank=0, counts="given", solver="flow") for p in placements]
    streams = [torch.cuda.Stream() for _ in placements]
    torch.cuda.synchronize()
    plans = [[], [], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                plans[i].append(planners[i](batches[i][0][0], counts=batches[i][1]))
    torch.cuda.synchronize()
    for i, placement in enumerate(placements):
        for plan in plans[i]:
            compare(plan, batches[i][0][0], batches[i][1], placement, 0)


def home(plan, topk, placement, rank, status):
    check_plan(plan, topk, placement, rank)
    assert int(plan.status) == status
    assert torch.equal(plan.topk_idx.cpu(), cpu.rewrite_home(topk.cpu(), placement))


def test_stale_replicas_send_tokens_home(caplog):
    topk = torch.tensor([[0, 1], [0, 2]], device="cuda")
    counts = torch.tensor([[2, 1, 1], [3, 0, 0]], device="cuda").int()
    planner = Planner(TWO, rank=0, counts="given", solver="flow")
    home(planner(topk, counts=counts, stale=True), topk, TWO, 0, Status.STALE)
    for own, peer in ((True, 0), (False, int(Status.STALE))):
        planner = Planner(TWO, rank=0, counts="given", solver="flow")
        planner.exchange = Rows(counts, 0, at={(1, 0): peer})
        home(planner(topk, stale=own), topk, TWO, 0, Status.STALE)
    torch.cuda.synchronize()
    planner(topk)
    planner(topk)
    assert caplog.text.count("STALE, the replicas") == 1
    assert planner.num_batches == {Status.STALE: 3}


@pytest.mark.parametrize("bad", [[[3, 0, 0], [-1, 0, 0]], [[3, 0, 0], [2**31 - 3, 0, 0]]])
def test_counts_that_cannot_be_send_the_batch_home(bad):
    topk = torch.tensor([[0, 0, 0]], device="cuda")
    counts = torch.tensor(bad, device="cuda")
    planner = Planner(TWO, rank=0, counts="given", solver="flow")
    home(planner(topk, counts=counts), topk, TWO, 0, Status.BAD_COUNTS)
    home(planner(topk, counts=counts.int()), topk, TWO, 0, Status.BAD_COUNTS)


def test_totals_are_summed_over_components():
    alone = Placement([0, 1, 0, 1, 2, 3, 2, 3], 4)
    counts = torch.zeros(4, 4, dtype=torch.int32, device="cuda")
    counts[1, 1], counts[1, 2] = 2**30, 2**30 - 1
    topk = torch.empty(0, 2, dtype=torch.int64, device="cuda")
    planner = Planner(alone, rank=0, counts="given", solver="flow")
    assert int(planner(topk, counts=counts).status) == Status.OPTIMAL
    counts[1, 2] += 1
    home(planner(topk, counts=counts), topk, alone, 0, Status.BAD_COUNTS)


def test_a_solver_that_does_not_finish_sends_the_batch_home(caplog):
    rng = np.random.default_rng(4)
    placement = oracle.random_placement(rng, 16, 128, 2)
    topks, counts = batch(rng, placement, [300] * 16, 8)
    planner = Planner(placement, rank=0, counts="given", solver="flow")
    planner._steps._steps.solver.max_rounds = 1
    home(planner(topks[0], counts=counts), topks[0], placement, 0, Status.NOT_CONVERGED)
    planner._steps._steps.solver.max_rounds = cuda.MAX_ROUNDS
    torch.cuda.synchronize()
    compare(planner(topks[0], counts=counts), topks[0], counts, placement, 0)
    assert caplog.text.count("NOT_CONVERGED") == 1


def test_what_only_the_gpu_sees_raises_at_the_next_call():
    good = torch.tensor([[0, 1]], device="cuda")
    counts = torch.tensor([[1, 1, 0], [5, 0, 0]], device="cuda").int()

    def then(planner, bad, error, message, **kwargs):
        plan = planner(bad, **kwargs)
        torch.cuda.synchronize()
        with pytest.raises(error, match=message):
            planner(good, **kwargs)
        planner(good, **kwargs)
        torch.cuda.synchronize()
        return plan

    for wrong in (3, -2, 2**40):
        planner = Planner(TWO, rank=0, counts="given", solver="flow")
        planner.exchange = Rows(counts, 0)
        bad = torch.tensor([[0, wrong]], device="cuda")
        plan = then(planner, bad, ValueError, "neither -1 nor an expert in")
        assert int(plan.status) == Status.REFUSED
        assert plan.topk_idx.tolist() == [[0, -1]]
    planner = Planner(TWO, rank=0, counts="given", solver="flow")
    bad = torch.tensor([[1, 1]], device="cuda")
    then(planner, bad, ValueError, "counts were not those of its topk_idx", counts=counts)
    for word, error in ((0, "refused an earlier batch"), (1, "planned different batches")):
        planner = Planner(TWO, rank=0, counts="given", solver="flow")
        exchange = Rows(counts, 0, at={(1, word): int(Status.REFUSED) if word == 0 else 77})
        planner.exchange = exchange
        planner(good)
        torch.cuda.synchronize()
        exchange.changes = {}
        with pytest.raises(RankError, match=error):
            planner(good)
        compare(planner(good), good, counts, TWO, 0)


def test_checks_raise_at_once():
    planner = Planner(Placement([0, 1, 2, 0], 1), solver="flow", check=True)
    with pytest.raises(ValueError, match=r"topk_idx\[0, 1\] is 3; expected -1 or an expert"):
        planner(torch.tensor([[0, 3]], device="cuda"))
    planner(torch.tensor([[0, 2]], device="cuda"))


def test_what_cannot_be_captured_is_refused():
    topk = torch.tensor([[0, 1]], device="cuda")
    for kwargs in ({"solver": "cpu"}, {"solver": "flow", "check": True}):
        planner = Planner(Placement([0, 1, 2, 0], 1), **kwargs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            topk += 0  # an empty graph is warned of
            with pytest.raises(ContractError, match="cannot capture"):
                planner(topk)


def test_engines_slots_are_mapped_without_waiting():
    """Physical indices of the drop-in: a slot that holds no expert raises at the next call."""
    placement = Placement([0, 1, -1, 0], 1)
    chosen = torch.tensor([[3, 1], [0, -1]], device="cuda")
    for bad in (2, 4, -2):
        assert buffer._logical(chosen, 4, placement, "physical").tolist() == [[0, 1], [0, -1]]
        wrong = buffer._logical(torch.tensor([[bad]], device="cuda"), 4, placement, "physical")
        planner = Planner(placement, solver="flow")
        planner(wrong)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match="neither -1 nor an expert"):
            planner(chosen)
