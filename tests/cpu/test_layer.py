"""A whole MoE layer over the drop-ins: no token lost, none misrouted, loads as planned."""

import math

import numpy as np
import oracle
import pytest
import ranks
import torch

import lplb_ep

HIDDEN = 128


def expert(e, x):
    """Tells experts apart, and is not linear, so that a token computed twice shows."""
    return x * (e + 1.0) + torch.sin(x) * e


def expected(x, topk_idx, weights):
    out = torch.zeros_like(x)
    for t, k in torch.nonzero(topk_idx >= 0).tolist():
        out[t] += weights[t, k] * expert(int(topk_idx[t, k]), x[t])
    return out


def slot_experts(placement, rank):
    slots = placement.num_local_slots
    return placement.physical_to_logical[rank * slots : (rank + 1) * slots]


def compute(x, slots, weights, held):
    """Rows [N, H] with local slots and weights [N, K] → what this rank's experts make of them."""
    out = torch.zeros_like(x)
    for n, k in torch.nonzero(slots >= 0).tolist():
        assert held[slots[n, k]] >= 0, "a token came to an unused slot"
        out[n] += weights[n, k] * expert(int(held[slots[n, k]]), x[n])
    return out


def legacy(buffer, held, num_experts, x, topk_idx, weights):
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    recv_x, slots, recv_weights, received, handle, _ = buffer.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
    )
    assert [int((slots == s).sum()) for s in range(len(held))] == received
    again = buffer.dispatch(x, handle=handle)[0]
    assert torch.equal(again, recv_x)
    return buffer.combine(compute(recv_x, slots, recv_weights, held), handle)[0], sum(received)


def elastic(buffer, held, num_experts, x, topk_idx, weights):
    recv_x, slots, recv_weights, handle, _ = buffer.dispatch(
        x, topk_idx, weights, num_experts=num_experts, num_max_tokens_per_rank=64
    )
    again = buffer.dispatch(x, handle=handle, num_experts=num_experts)[0]
    assert torch.equal(again, recv_x)
    y = compute(recv_x, slots, recv_weights, held)
    return buffer.combine(y, handle)[0], int((slots >= 0).sum())


def expanded(buffer, held, num_experts, x, topk_idx, weights):
    recv_x, _, recv_weights, handle, _ = buffer.dispatch(
        x, topk_idx, weights, num_experts=num_experts, num_max_tokens_per_rank=64, do_expand=True
    )
    ends = handle.psum_num_recv_tokens_per_expert.tolist()
    y = torch.zeros_like(recv_x)
    for slot, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        for row in range(start, end):
            y[row] = recv_weights[row] * expert(int(held[slot]), recv_x[row])
    return buffer.combine(y, handle)[0], ends[-1]


def low_latency(buffer, held, num_experts, x, topk_idx, weights):
    recv_x, received, handle, _, hook = buffer.low_latency_dispatch(
        x, topk_idx, 64, num_experts, use_fp8=False, return_recv_hook=True
    )
    hook()
    y = torch.zeros_like(recv_x)
    for slot, number in enumerate(received.tolist()):
        y[slot, :number] = expert(int(held[slot]), recv_x[slot, :number])
    combined, _, hook = buffer.low_latency_combine(
        y, topk_idx, weights, handle, return_recv_hook=True
    )
    hook()
    return combined, int(received.sum())


PATHS = {
    "legacy": (lplb_ep.Buffer, legacy, {}),
    "elastic": (lplb_ep.ElasticBuffer, elastic, {"num_bytes": 1 << 21}),
    "expanded": (lplb_ep.ElasticBuffer, expanded, {"num_bytes": 1 << 21}),
    "low latency": (
        lplb_ep.Buffer,
        low_latency,
        {"low_latency_mode": True, "num_rdma_bytes": 1 << 30},
    ),
}


def run_layer(group, path, mode, indices, placement, topks, seed):
    """Returns the loads of all ranks, after checking this rank's output."""
    cls, layer, options = PATHS[path]
    rank = group.rank()
    buffer = cls(group, **options, indices=indices)
    buffer = buffer.view(placement)
    torch.manual_seed(seed + rank)
    topk_idx = topks[rank]
    dtype = torch.float32 if path == "low latency" else torch.float64
    x = torch.randn(len(topk_idx), HIDDEN, dtype=dtype)
    weights = torch.rand(topk_idx.shape, dtype=dtype)
    given, num_experts = topk_idx, placement.num_experts
    if indices == "physical":  # an engine's own choice among the copies
        number = (placement.logical_to_physical >= 0).sum(1)
        column = torch.randint(1 << 20, topk_idx.shape) % torch.tensor(number)[topk_idx]
        given = torch.tensor(placement.logical_to_physical)[topk_idx, column].to(topk_idx.dtype)
        given = torch.where(topk_idx < 0, -1, given)
        num_experts = placement.num_physical_experts
    held = slot_experts(placement, rank)
    out, load = layer(buffer, held, num_experts, x, given, weights)
    reference = expected(x, topk_idx, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(out, reference, rtol=tolerance, atol=tolerance)
    return load


@pytest.mark.parametrize("indices", ["logical", "physical"])
@pytest.mark.parametrize("mode", ["home", "1"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("R", [1, 4])
def test_every_path_computes_every_pick_once(path, mode, indices, R):
    rng = np.random.default_rng([R, *path.encode()])
    environ = {"LPLB_EP": mode, "LPLB_EP_REPLICAS": "valid", "LPLB_EP_CHECK": "1"}
    for seed in range(3):
        E = int(rng.integers(8, 20))
        placement = oracle.random_placement(rng, R, E, 2, num_ranks_per_node=max(1, R // 2))
        weight = rng.lognormal(0, 1, E)
        num_tokens = rng.integers(0, 20, R) * (rng.random(R) < 0.8)
        K = int(rng.integers(1, 7))
        topks = [torch.from_numpy(oracle.random_topk(rng, t, K, weight, 0.1)) for t in num_tokens]
        loads = ranks.run(
            R, run_layer, path, mode, indices, placement, topks, seed, environ=environ
        )
        picks = torch.cat([t.flatten() for t in topks])
        load = torch.bincount(picks[picks >= 0], minlength=E)
        assert sum(loads) == int(load.sum())
        if mode == "1":
            assert max(loads) == math.ceil(lplb_ep.solve(load, placement).lower_bound)
        else:
            home = np.bincount(placement.home_rank, weights=load.numpy(), minlength=R)
            assert loads == home.astype(int).tolist()
