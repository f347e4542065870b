"""DeepEP's low-latency calls, balanced: every token arrives where it was planned, in graphs too."""

import importlib.util

import mps
import numpy as np
import over_deep_ep
import pytest
import ranks
import torch
from over_deep_ep import FP8_TOLERANCE, NUM_EXPERTS, TOLERANCE, close, place, quotas, use_gpu

import lplb_ep
from lplb_ep import Planner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="no DeepEP"),
    # Its kernels want all of a GPU at once.
    pytest.mark.skipif(not mps.has_gpu_each(), reason="no GPU for each rank"),
]

HIDDEN, MOST = 2048, 64
ENVIRON = {"LPLB_EP": "1", "LPLB_EP_REPLICAS": "valid"}


@pytest.fixture(autouse=True)
def fresh_ranks():
    """NVSHMEM is started by DeepEP here, and by the counts in other tests."""
    ranks.close()
    yield
    ranks.close()


def make_buffer(group, placement):
    num_bytes = lplb_ep.Buffer.get_low_latency_rdma_size_hint(
        MOST, HIDDEN, group.size(), placement.num_physical_experts
    )
    return lplb_ep.Buffer(
        group,
        num_rdma_bytes=num_bytes,
        low_latency_mode=True,
        num_qps_per_rank=placement.num_local_slots,
        placement=placement,
        num_local_slots=placement.num_local_slots,
        explicitly_destroy=True,
    )


def layer(buffer, scales, x, topk_idx, weights, *, hook=False, fp8=False):
    """Dispatch, experts and combine, as a decode loop calls them; `scales` are the experts."""
    received, numbers, handle, _, receive = buffer.low_latency_dispatch(
        x, topk_idx, MOST, NUM_EXPERTS, use_fp8=fp8, return_recv_hook=hook
    )
    if hook:
        receive()
    received = over_deep_ep.widen(received) if fp8 else received.float()
    out = (received * scales[:, None, None]).bfloat16()
    combined, _, receive = buffer.low_latency_combine(
        out, topk_idx, weights, handle, return_recv_hook=hook
    )
    if hook:
        receive()
    return combined, numbers


def batches(group, num_batches):
    use_gpu(group)
    placement = place(group.size(), 30)
    buffer = make_buffer(group, placement)
    judge = Planner(placement, group, counts="torch", solver="flow", slot=1)
    scales = over_deep_ep.scale(over_deep_ep.experts_of(placement, group.rank()))
    rng = np.random.default_rng(100 + group.rank())
    for batch in range(num_batches):
        num_tokens = 0 if batch % 5 == 4 else int(rng.integers(1, MOST + 1))
        x, topk_idx, weights = over_deep_ep.draw(rng, HIDDEN, num_tokens)
        fp8 = batch % 3 == 2
        out, numbers = layer(buffer, scales, x, topk_idx, weights, hook=batch % 2 == 1, fp8=fp8)
        smallest = over_deep_ep.subnormal(x) if fp8 and num_tokens else 1e-6
        close(out, x, topk_idx, weights, FP8_TOLERANCE if fp8 else TOLERANCE, smallest)
        assert numbers.tolist() == quotas(judge(topk_idx), placement, group.rank())
    buffer.destroy()


def test_every_token_arrives_where_it_was_planned(node):
    node(2, batches, 60, environ=ENVIRON, timeout=120)


def replays(group, num_replays):
    """A graph of one layer, whose replays are given other picks."""
    use_gpu(group)
    placement = place(group.size(), 31)
    buffer = make_buffer(group, placement)
    judge = Planner(placement, group, counts="torch", solver="flow", slot=1)
    scales = over_deep_ep.scale(over_deep_ep.experts_of(placement, group.rank()))
    rng = np.random.default_rng(7 + group.rank())
    given = over_deep_ep.draw(rng, HIDDEN, MOST)
    layer(buffer, scales, *given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, numbers = layer(buffer, scales, *given)
    for _ in range(num_replays):
        for static, new in zip(given, over_deep_ep.draw(rng, HIDDEN, MOST), strict=True):
            static.copy_(new)
        graph.replay()
        close(out, *given)
        assert numbers.tolist() == quotas(judge(given[1]), placement, group.rank())
    buffer.destroy()


def test_a_graph_replays_other_picks(node):
    node(2, replays, 40, environ=ENVIRON, timeout=120)
