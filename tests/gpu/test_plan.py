"""Plans made on the GPU against the CPU's steps, which define them."""

import numpy as np
import oracle
import pytest
import torch
import variants

from lplb_ep import ContractError, Layer, Placement, Planner, Problem, RankError, check_plan
from lplb_ep.comm.exchange import LocalExchange
from lplb_ep.planning import device, launches
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.plan import Status
from lplb_ep.planning.solvers import DEVICE_SOLVERS
from lplb_ep.settings import MAX_ONE_LAUNCH

pytestmark = pytest.mark.gpu

TWO = Placement([0, 1, 2, 0], 2)


class Rows(LocalExchange):
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


@pytest.mark.parametrize("variant", DEVICE_SOLVERS["flow"].variants(), ids=str)
def test_one_launch_plans_as_the_cpu_does(variant):
    variants.run_solver("flow", variant, MAX_ONE_LAUNCH)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_launch_exchanges_rows(dtype):
    variants.run_windows(dtype, True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("R", [1, 2, 8, 16, 24, 48, 64])
@pytest.mark.parametrize("solver", DEVICE_SOLVERS)
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


def test_a_split_does_not_grow_with_second_copies():
    placement = Placement([*[0] * 599, 1, *[0] * 599, 2], 2)
    topks, counts = batch(np.random.default_rng(5), placement, [300, 40], 2)
    for rank in range(2):
        plan = Planner(placement, rank=rank, counts="given", solver="flow")(
            topks[rank], counts=counts
        )
        compare(plan, topks[rank], counts, placement, rank)


def test_a_slice_of_a_larger_tensor_and_host_tensors_are_taken():
    topk = torch.tensor([[0, 9, 1], [2, 9, -1], [0, 9, 1]], device="cuda")[:, ::2]
    planner = Planner(Placement([0, 1, 2, 0], 1), solver="flow")
    check_plan(planner(topk), topk, planner.placement, 0)
    check_plan(planner(topk.cpu()), topk.cpu(), planner.placement, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("solver", DEVICE_SOLVERS)
def test_graphs_replay_with_new_indices(dtype, solver):
    rng = np.random.default_rng(1)
    placement = oracle.random_placement(rng, 8, 64, 2)
    batches = [batch(rng, placement, [200] * 8, 4, dtype) for _ in range(5)]
    planner = Planner(placement, rank=3, counts="given", solver=solver)
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


CYCLES = 200_000_000  # of a kernel that sleeps: a tenth of a second


@pytest.mark.parametrize("solver", DEVICE_SOLVERS)
def test_planners_on_streams_of_their_own(solver):
    """Together: none waits for one whose stream has stopped, and all come out right."""
    rng = np.random.default_rng(3)
    placements = [oracle.random_placement(rng, 8, 128, 2) for _ in range(3)]
    batches = [batch(rng, p, [2000] + [100] * 7, 8) for p in placements]
    planners = [Planner(p, rank=0, counts="given", solver=solver) for p in placements]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in placements]
    plans = [[], [], []]
    for round_ in range(21):  # the first has memory to allocate
        if round_ == 1:
            torch.cuda.synchronize()
            with torch.cuda.stream(streams[0]):
                torch.cuda._sleep(CYCLES)
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                plans[i].append(planners[i](batches[i][0][0], counts=batches[i][1]))
    streams[1].synchronize()
    streams[2].synchronize()
    assert not streams[0].query()
    torch.cuda.synchronize()
    for i, placement in enumerate(placements):
        for plan in plans[i]:
            compare(plan, batches[i][0][0], batches[i][1], placement, 0)


def test_a_planner_on_another_stream_runs_after_its_last_batch():
    rng = np.random.default_rng(13)
    placement = oracle.random_placement(rng, 8, 128, 2)
    batches = [batch(rng, placement, [2000] + [100] * 7, 8) for _ in range(2)]
    planner = Planner(placement, rank=0, counts="given", solver="flow")
    torch.cuda.synchronize()
    plans, streams = [], [torch.cuda.Stream() for _ in batches]
    for stream, (topks, counts) in zip(streams, batches, strict=True):
        with torch.cuda.stream(stream):
            if not plans:
                torch.cuda._sleep(CYCLES)
            plans.append(planner(topks[0], counts=counts))
    streams[1].synchronize()
    assert streams[0].query()
    for plan, (topks, counts) in zip(plans, batches, strict=True):
        compare(plan, topks[0], counts, placement, 0)


def test_the_first_call_may_be_on_any_stream():
    """Though the tables and zeros were sent behind a kernel that sleeps."""
    rng = np.random.default_rng(14)
    placement = oracle.random_placement(rng, 8, 128, 2)
    topks, counts = batch(rng, placement, [2000] + [100] * 7, 8)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    planner = Planner(placement, rank=0, counts="given", solver="flow")
    planner.exchange = Rows(counts, 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        plan = planner(topks[0])
        stream.synchronize()
        compare(plan, topks[0], counts, placement, 0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_planner_of_a_device_that_is_not_the_current_one():
    topk = torch.tensor([[0, 1], [0, 2]], device="cuda:1")
    with torch.cuda.device(1):
        planner = Planner(Placement([0, 1, 2, 0], 1), solver="flow")
    check_plan(planner(topk), topk, planner.placement, 0)


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
    assert caplog.text.count("STALE, some rank's replicas") == 1
    assert planner.num_batches == {Status.STALE: 3}


@pytest.mark.parametrize("bad", [[[3, 0, 0], [-1, 0, 0]], [[3, 0, 0], [2**31 - 3, 0, 0]]])
def test_counts_that_cannot_be_send_the_batch_home(bad):
    topk = torch.tensor([[0, 0, 0]], device="cuda")
    counts = torch.tensor(bad, device="cuda")
    planner = Planner(TWO, rank=0, counts="given", solver="flow")
    home(planner(topk, counts=counts), topk, TWO, 0, Status.BAD_COUNTS)
    home(planner(topk, counts=counts.int()), topk, TWO, 0, Status.BAD_COUNTS)


@pytest.mark.parametrize("wrapped", [2**32 + 5, -(2**32) + 5])
def test_counts_beyond_32_bits_do_not_wrap_to_small_ones(wrapped):
    topk = torch.tensor([[0, 0, 0]], device="cuda")
    counts = torch.tensor([[3, 0, 0], [wrapped, 0, 0]], device="cuda")
    planner = Planner(TWO, rank=0, counts="given", solver="flow")
    home(planner(topk, counts=counts), topk, TWO, 0, Status.BAD_COUNTS)


APART = Placement([0, 1, 0, 1, 2, 3, 2, 3], 4)  # two components of two ranks


def test_totals_are_summed_over_components():
    """By every block alike, also of those that begin when others have sent the batch home."""
    topk = torch.arange(4, device="cuda").repeat(64 * 1024)[:, None]
    counts = torch.zeros(4, 4, dtype=torch.int32, device="cuda")
    counts[0] = 64 * 1024
    counts[1, 1] = 2**30
    counts[1, 2] = 2**31 - 1 - int(counts.long().sum())
    planner = Planner(APART, rank=0, counts="given", solver="flow")
    assert int(planner(topk, counts=counts).status) == Status.OPTIMAL
    counts[1, 2] += 1
    for stale in [False] * 20 + [True]:
        plan = planner(topk, counts=counts, stale=stale)
        home(plan, topk, APART, 0, Status.BAD_COUNTS)


def test_invalid_counts_outweigh_a_solver_that_does_not_finish(monkeypatch):
    topk = torch.empty(0, 1, dtype=torch.int64, device="cuda")
    counts = torch.zeros(4, 4, dtype=torch.int32, device="cuda")
    counts[1, 0], counts[2, 2] = 10**6, -1
    monkeypatch.setattr(device, "MAX_ROUNDS", 0)
    planner = Planner(APART, rank=0, counts="given", solver="flow")
    home(planner(topk, counts=counts), topk, APART, 0, Status.BAD_COUNTS)
    counts[2, 2] = 1
    home(planner(topk, counts=counts), topk, APART, 0, Status.NOT_CONVERGED)


def test_a_solver_that_does_not_finish_sends_the_batch_home(caplog, monkeypatch):
    rng = np.random.default_rng(4)
    placement = oracle.random_placement(rng, 16, 128, 2)
    topks, counts = batch(rng, placement, [300] * 16, 8)
    able = Planner(placement, rank=0, counts="given", solver="flow")
    monkeypatch.setattr(device, "MAX_ROUNDS", 1)
    planner = Planner(placement, rank=0, counts="given", solver="flow")
    for _ in range(2):
        home(planner(topks[0], counts=counts), topks[0], placement, 0, Status.NOT_CONVERGED)
        torch.cuda.synchronize()
    compare(able(topks[0], counts=counts), topks[0], counts, placement, 0)
    planner.raise_errors()
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
    for word, value, error in (
        (0, int(Status.REFUSED), "refused an earlier batch"),
        (0, 77, "planned different batches"),
        (0, -3, "planned different batches"),
        (1, 77, "planned different batches"),
    ):
        planner = Planner(TWO, rank=0, counts="given", solver="flow")
        exchange = Rows(counts, 0, at={(1, word): value})
        planner.exchange = exchange
        planner(good)
        torch.cuda.synchronize()
        exchange.changes = {}
        with pytest.raises(RankError, match=error):
            planner(good)
        compare(planner(good), good, counts, TWO, 0)


def test_what_the_gpu_told_is_sent_to_the_others():
    """Their GPUs may lag behind: they plan one more batch, and wait for this rank's row."""
    counts = torch.tensor([[1, 1, 0], [5, 0, 0]], device="cuda").int()
    planner = Planner(TWO, rank=0, counts="given", solver="flow")
    exchange = planner.exchange = Rows(counts, 0)
    planner(torch.tensor([[0, 3]], device="cuda"))
    torch.cuda.synchronize()
    sent = []
    exchange.gather = lambda row: sent.append(row.tolist())
    with pytest.raises(ValueError, match="neither -1 nor an expert"):
        planner(torch.tensor([[0, 1]], device="cuda"))
    ((status, *_, number, zero, one, two),) = [row[: 5 + 3] for row in sent]
    assert (status, number, zero, one, two) == (Status.REFUSED, 2, 0, 0, 0)


@pytest.mark.parametrize("step", ["solve", "route"])
def test_a_batch_that_fails_leaves_nothing_for_the_next(step, monkeypatch):
    topk = torch.tensor([[0, 1]], device="cuda")
    counts = torch.tensor([[1, 1, 0], [5, 0, 0]], device="cuda").int()
    planner = Planner(TWO, rank=0, counts="given", solver="flow")
    planner.exchange = Rows(counts, 0)

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(launches.Launches, step, fail)
        with pytest.raises(KeyboardInterrupt):
            planner(topk)
    compare(planner(topk), topk, counts, TWO, 0)


def test_faults_in_replays_are_raised_when_asked_for():
    topk = torch.tensor([[0, 1]], device="cuda")
    planner = Planner(Placement([0, 1, 2, 0], 1), solver="flow")
    planner(topk)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planner(topk)
    graph.replay()
    planner.raise_errors()
    topk[0, 0] = 3
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(CYCLES)
        graph.replay()
    with pytest.raises(ValueError, match="neither -1 nor an expert"):
        planner.raise_errors()
    planner.raise_errors()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_home_slots_wait_for_nothing_and_tell_what_is_wrong():
    topk = torch.tensor([[0, 1], [2, -1]], device="cuda")
    planner = Planner(TWO, rank=0, counts="given", solver="cpu")
    first, graph = planner.home(topk), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = planner.home(topk)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = planner.home(topk.int())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    for slots in (first, captured, again):
        assert slots.tolist() == cpu.rewrite_home(topk.cpu(), TWO).tolist()
    assert again.dtype == torch.int32
    for wrong in (3, -2, 2**40):
        topk[0, 1] = wrong
        assert planner.home(topk).tolist() == [[int(TWO.home[0]), -1], [int(TWO.home[2]), -1]]
        with pytest.raises(ValueError, match="neither -1 nor an expert"):
            planner.home(topk)
    graph.replay()
    with pytest.raises(ValueError, match="neither -1 nor an expert"):
        planner.raise_errors()


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
    planner, host = Planner(Placement([0, 1, 2, 0], 1), solver="flow"), topk.cpu()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        topk += 0
        with pytest.raises(ContractError, match="topk_idx lies on the CPU"):
            planner(host)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_engines_slots_are_mapped_without_waiting():
    """Physical indices: a slot that holds no expert raises at the next call."""
    placement = Placement([0, 1, -1, 0], 1)
    chosen = torch.tensor([[3, 1], [0, -1]], device="cuda")
    for bad in (2, 4, -2):
        planner = Planner(placement, solver="flow")
        plan = planner(chosen, indices="physical")
        compare(plan, torch.tensor([[0, 1], [0, -1]], device="cuda"), plan.counts, placement, 0)
        wrong = torch.tensor([[bad]], device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            planner.route(wrong, indices="physical")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match="neither -1 nor an expert"):
            planner(chosen, indices="physical")


def test_slots_alone_are_those_of_the_plan():
    """`route` writes results into memory of its own, which no later plan may see."""
    rng = np.random.default_rng(23)
    placement = oracle.random_placement(rng, 8, 60, 2)
    batches = [batch(rng, placement, [300] * 8, 4) for _ in range(6)]
    planner = Planner(placement, rank=3, counts="given", solver="flow")
    exchange = planner.exchange = Rows(batches[0][1], 3)
    plans = []
    for topks, counts in batches:
        exchange.counts = counts
        plans.append(planner(topks[3]))
        slots = planner.route(topks[3])
        assert torch.equal(slots, plans[-1].topk_idx)
    for plan, (topks, counts) in zip(plans, batches, strict=True):
        compare(plan, topks[3], counts, placement, 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("exchanged", [True, False])
def test_physical_ids_are_mapped_on_the_way(dtype, exchanged):
    """Of any copy, an empty slot and ids out of range among them."""
    rng = np.random.default_rng(21)
    table = oracle.random_placement(rng, 8, 60, 2).physical_to_logical.reshape(8, -1)
    placement = Placement(np.pad(table, ((0, 0), (0, 1)), constant_values=-1).ravel(), 8)
    topks, counts = batch(rng, placement, [300] * 8, 4, dtype)
    slots = topks[3].clone()
    for t, k in np.ndindex(*slots.shape):
        if slots[t, k] >= 0:
            held = np.flatnonzero(placement.physical_to_logical == int(slots[t, k]))
            slots[t, k] = int(rng.choice(held))
    planner = Planner(placement, rank=3, counts="given", solver="flow")
    given = {} if exchanged else {"counts": counts}
    if exchanged:
        planner.exchange = Rows(counts, 3)
    compare(planner(slots, indices="physical", **given), topks[3], counts, placement, 3)
    assert torch.equal(planner.home(slots, indices="physical"), planner.home(topks[3]))
    empty = int(np.flatnonzero(placement.physical_to_logical < 0)[0])
    for wrong in (empty, placement.num_physical_experts, -2):
        bad = slots.clone()
        bad[5, 1] = wrong
        planner(bad, indices="physical", **given)
        with pytest.raises(ValueError, match="neither -1 nor an expert"):
            planner.raise_errors()
        planner.home(bad, indices="physical")
        with pytest.raises(ValueError, match="neither -1 nor an expert"):
            planner.raise_errors()


@pytest.mark.parametrize("num_topk", [1, 2, 3, 8])
def test_repeated_picks_are_refused_where_they_must_be_distinct(num_topk):
    rng = np.random.default_rng(num_topk)
    topks, counts = batch(rng, APART, [2000, 10, 10, 10], min(num_topk, 4))
    planner = Planner(APART, rank=0, counts="given", solver="flow")
    planner.exchange = Rows(counts, 0)
    compare(planner(topks[0], distinct=True), topks[0], counts, APART, 0)
    planner.raise_errors()
    bad = topks[0].clone()
    bad[1500] = bad[1500, 0].clamp(min=0)
    plan = planner(bad, distinct=True)
    if bad.shape[1] == 1:
        planner.raise_errors()
        return
    assert int(plan.status) == Status.REFUSED
    with pytest.raises(ValueError, match="picked an expert twice"):
        planner.raise_errors()
    counts[0] = cpu.count(bad.cpu(), APART.num_experts)
    compare(planner(bad), bad, counts, APART, 0)  # legal where they need not be


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_masked_picks_stay_masked(dtype):
    planner = Planner(TWO, rank=0, counts="given", solver="flow")
    for shape in ((0, 2), (1, 1), (3000, 8)):
        given = torch.randint(-1, 3, shape, device="cuda").to(dtype)
        planned = torch.randint(-1, 4, shape, device="cuda").to(dtype)
        expected = torch.where(given < 0, -1, planned)
        assert torch.equal(planner.mask(given, planned), expected)
        assert torch.equal(planner.mask(given.t().contiguous().t(), planned), expected)


@pytest.mark.parametrize("solver", DEVICE_SOLVERS)
@pytest.mark.parametrize("bounds", ["base_load", "speed", "max_quota", "all"])
def test_what_bounds_a_layer_bounds_its_plans(solver, bounds):
    rng = np.random.default_rng(17)
    for _ in range(4):
        placement = oracle.random_placement(rng, 8, 60, 2)
        topks, counts = batch(rng, placement, [300] * 8, 4)
        load = counts.sum(0).cpu()
        values = {
            "base_load": torch.from_numpy(rng.integers(0, 800, 8)),
            "speed": torch.from_numpy(rng.integers(1, 6, 8)),
            "max_quota": load[:, None].expand(60, placement.max_replicas) * 3 // 4 + 1,
        }
        layer = Layer(
            placement, Problem(**{k: v for k, v in values.items() if bounds in (k, "all")})
        )
        given = Planner(layer, rank=2, counts="given", solver=solver)
        plan = given(topks[2], counts=counts)
        check_plan(plan, topks[2], placement, 2, layer.problem)
        on_host = Planner(layer, rank=2, counts="given", solver="cpu")
        assert int(plan.status) == int(on_host(topks[2].cpu(), counts=counts.cpu()).status)


def test_base_loads_count_towards_the_total():
    topk = torch.tensor([[0]], device="cuda")
    counts = torch.tensor([[1, 0, 0], [2**30, 0, 0]], device="cuda").int()
    for base, status in ((2**30 - 3, Status.OPTIMAL), (2**30 - 1, Status.BAD_COUNTS)):
        layer = Layer(TWO, Problem(base_load=torch.tensor([base, 0])))
        plan = Planner(layer, rank=0, counts="given", solver="flow")(topk, counts=counts)
        assert int(plan.status) == status
