"""A serving engine's slots over real DeepEP: graphs that are captured once, and replayed with other
picks and other tables of experts. Every token's result is held against plain DeepEP's, which goes
where the engine's own picks say."""

import mps
import numpy as np
import oracle
import over_deep_ep
import pytest
import ranks
import torch
from over_deep_ep import NUM_EXPERTS, NUM_TOPK, TOLERANCE, quotas, scale, use_gpu

import lplb_ep
from lplb_ep import Placement, Planner, solve
from lplb_ep.clients.engines import EngineLayers

HAS_V2 = hasattr(over_deep_ep.deep_ep(), "ElasticBuffer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(over_deep_ep.deep_ep() is None, reason="no DeepEP"),
    # Its kernels want all of a GPU at once.
    pytest.mark.skipif(not mps.has_gpu_each(), reason="no GPU for each rank"),
]

HIDDEN, MOST = 2048, 64
NUM_REDUNDANT = 4  # slots of a rank
ENVIRON = {"LPLB_EP": "1", "LPLB_EP_INDICES": "physical"}
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def fresh_ranks():
    """NVSHMEM is started by DeepEP here, and by the counts in other tests."""
    ranks.close()
    yield
    ranks.close()


def deal(rng, num_ranks):
    """[P] any experts in any slots, none empty; the same on all ranks."""
    num_slots = NUM_EXPERTS + NUM_REDUNDANT * num_ranks
    hot = rng.choice(NUM_EXPERTS, num_slots - NUM_EXPERTS, p=rng.dirichlet(np.ones(NUM_EXPERTS)))
    return torch.from_numpy(rng.permutation(np.append(np.arange(NUM_EXPERTS), hot)))


class Batch:
    """What a graph reads: rows, the engine's slots and the router's weights, with its experts."""

    def __init__(self):
        self.x = torch.zeros(MOST, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        self.slots = torch.full((MOST, NUM_TOPK), -1, device=DEVICE, dtype=torch.int64)
        self.weights = torch.zeros(MOST, NUM_TOPK, device=DEVICE)
        self.experts = self.slots.clone()

    def draw(self, rng, table):
        """Another load, of another skew: some of the tokens, of experts that are hot now."""
        skew = rng.lognormal(0, rng.uniform(0.2, 2.5), NUM_EXPERTS)
        experts = oracle.random_topk(rng, MOST, NUM_TOPK, skew)
        experts[rng.integers(0, MOST + 1) :] = -1  # rows of padding, which go nowhere
        held = table.numpy()
        slots = [
            [-1 if e < 0 else rng.choice(np.flatnonzero(held == e)) for e in row] for row in experts
        ]
        self.x.copy_(torch.randn(MOST, HIDDEN))
        self.weights.copy_(torch.rand(MOST, NUM_TOPK))
        self.experts.copy_(torch.from_numpy(experts))
        self.slots.copy_(torch.tensor(slots))


class LowLatency:
    """An engine's dispatcher over the low-latency calls."""

    def __init__(self, group):
        self.num_slots = NUM_EXPERTS + NUM_REDUNDANT * group.size()
        num_bytes = lplb_ep.Buffer.get_low_latency_rdma_size_hint(
            MOST, HIDDEN, group.size(), self.num_slots
        )
        self.buffer = lplb_ep.Buffer(
            group,
            num_rdma_bytes=num_bytes,
            low_latency_mode=True,
            num_qps_per_rank=self.num_slots // group.size(),
            explicitly_destroy=True,
        )

    def dispatch(self, batch):
        rows, numbers, handle, _, receive = self.buffer.low_latency_dispatch(
            batch.x, batch.slots, MOST, self.num_slots, use_fp8=False, return_recv_hook=True
        )
        receive()  # before any other low-latency call, as engines do
        return rows, numbers, handle

    def compute(self, batch, came, factors):
        """The rows [T, H] that come back, and how many came to each slot."""
        rows, numbers, handle = came
        done = (rows.float() * factors[:, None, None]).bfloat16()
        out, _, receive = self.buffer.low_latency_combine(
            done, batch.slots, batch.weights, handle, return_recv_hook=True
        )
        receive()
        return out, numbers


class Elastic:
    """An engine's dispatcher over V2, as in a decode: not expanded, and no CPU that waits."""

    def __init__(self, group):
        self.num_slots = NUM_EXPERTS + NUM_REDUNDANT * group.size()
        self.buffer = lplb_ep.ElasticBuffer(
            group,
            num_max_tokens_per_rank=MOST,
            hidden=HIDDEN,
            num_topk=NUM_TOPK,
            explicitly_destroy=True,
        )

    def dispatch(self, batch):
        return self.buffer.dispatch(
            batch.x,
            topk_idx=batch.slots,
            topk_weights=batch.weights,
            num_experts=self.num_slots,
            num_max_tokens_per_rank=MOST,
            do_cpu_sync=False,
        )

    def compute(self, batch, came, factors):
        """The rows [T, H] that come back, and how many came to each slot."""
        rows, slots, weights, handle, _ = came
        # Rows behind the received ones are whatever was there.
        number = handle.psum_num_recv_tokens_per_scaleup_rank[-1]
        there = torch.arange(len(rows), device=DEVICE)[:, None] < number
        own = there & (slots >= 0) & (slots < len(factors))
        factor = factors[torch.where(own, slots, 0).long()] * torch.where(own, weights, 0)
        done = torch.where(there, rows.float() * factor.sum(1, keepdim=True), 0).bfloat16()
        out, _, _ = self.buffer.combine(done, handle)
        sums = handle.psum_num_recv_tokens_per_expert
        return out, torch.diff(sums, prepend=sums[:1] * 0)


DISPATCHERS = {"low latency": LowLatency, "v2": Elastic}


def plain_of(dispatcher):
    """The same buffer as DeepEP's own class has it, without the drop-in's methods."""
    drop_in = type(dispatcher.buffer)
    own = next(c for c in drop_in.__mro__ if c is not drop_in and c.__name__ == drop_in.__name__)
    plain, buffer = object.__new__(type(dispatcher)), object.__new__(own)
    buffer.__dict__ = dispatcher.buffer.__dict__
    plain.__dict__ = {**vars(dispatcher), "buffer": buffer}
    vars(plain).pop("dispatch", None)  # which puts a layer in force
    return plain


def captured(step):
    """A graph of a step, and what it writes; the step has run before, as engines warm up."""
    step()
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out


def replays(group, kind, num_micro_batches, num_replays):
    use_gpu(group)
    same, own = np.random.default_rng(11), np.random.default_rng((12, group.rank()))
    num_ranks, rank = group.size(), group.rank()
    tables = deal(same, num_ranks).unsqueeze(0)  # as vLLM's, but on the CPU
    factors = scale(tables.view(num_ranks, -1)[rank]).to(DEVICE)
    engine = EngineLayers(lambda: tables, [0], num_ranks, NUM_EXPERTS)
    dispatcher, current = DISPATCHERS[kind](group), [0]
    plain = plain_of(dispatcher)
    engine.put_in_force(0, dispatcher, "dispatch", lambda: current[0])
    batches = [Batch() for _ in range(num_micro_batches)]
    for batch in batches:
        batch.draw(own, tables[0])

    def step():
        """All micro-batches are in flight before the first comes back."""
        came = []
        for number, batch in enumerate(batches):
            current[0] = number
            came.append(dispatcher.dispatch(batch))
        return [dispatcher.compute(*both, factors) for both in zip(batches, came, strict=True)]

    def plain_step():
        return [plain.compute(batch, plain.dispatch(batch), factors) for batch in batches]

    replay, balanced = captured(step)
    replay_plain, picked = captured(plain_step)
    judge = Planner(engine.layers[0], group, counts="torch", solver="flow", slot=7)
    rows, num_equal = [], 0
    for number in range(num_replays):
        if number % 10 == 9:  # the engine moves experts between two steps
            tables[0].copy_(deal(same, num_ranks))
            factors.copy_(scale(tables.view(num_ranks, -1)[rank]))
            assert engine.refresh() == [0]
        for batch in batches:
            batch.draw(own, tables[0])
        replay()
        results = [(out.clone(), numbers.tolist()) for out, numbers in balanced]
        replay_plain()
        for batch, (out, numbers), (expected, unbalanced) in zip(
            batches, results, picked, strict=True
        ):
            there = (batch.experts >= 0).any(1)
            experts = batch.experts.clamp(min=0)
            weights = batch.weights * (batch.experts >= 0)
            factor = (scale(experts) * weights).sum(1, keepdim=True)
            size = (batch.x.float() * factor).abs()
            off = (out.float() - batch.x.float() * factor).abs()
            assert (off <= TOLERANCE * size + 1e-6)[there].all()
            off = (out.float() - expected.float()).abs()
            assert (off <= 2 * TOLERANCE * size + 1e-6)[there].all()
            num_equal += int((out == expected).all(1)[there].sum())
            assert numbers == quotas(judge(batch.experts), engine.layers[0].placement, rank)
            load = torch.bincount(batch.experts[batch.experts >= 0], minlength=NUM_EXPERTS)
            table = tables[0].tolist()
            rows.append((table, load.cpu(), sum(numbers), sum(unbalanced.tolist())))
    torch.cuda.synchronize()
    dispatcher.buffer.destroy()
    return rows, num_equal


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("kind", DISPATCHERS)
def test_a_graph_that_is_captured_once_serves_other_loads_and_tables(node, kind, num_micro_batches):
    if kind == "v2" and not HAS_V2:
        pytest.skip("no DeepEP V2")
    out = node(2, replays, kind, num_micro_batches, 60, environ=ENVIRON, timeout=240)
    report(kind, num_micro_batches, out)


def report(kind, num_micro_batches, out):
    """No rank's load exceeds the best for the copies that there were. Prints what was gained."""
    most = np.zeros(3)
    for batch in zip(*(rows for rows, _ in out), strict=True):
        placement = Placement(batch[0][0], len(batch), num_experts=NUM_EXPERTS)
        load = sum(one[1] for one in batch)
        balanced, picked = (max(one[n] for one in batch) for n in (2, 3))
        if int(load.sum()):
            assert balanced == int(solve(load, placement).rank_load.max())
        most += balanced, picked, int(load.sum()) / len(batch)
    print(
        f"\n{kind}, {num_micro_batches} in flight: max / mean rows {most[0] / most[2]:.3f}, by the "
        f"engine's own picks {most[1] / most[2]:.3f}; results equal plain's bit for bit in "
        f"{sum(equal for _, equal in out)} tokens"
    )
