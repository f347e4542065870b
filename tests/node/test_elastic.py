"""DeepEP V2's `ElasticBuffer`, balanced: every token arrives, where it was planned."""

import mps
import numpy as np
import over_deep_ep
import pytest
import torch
from over_deep_ep import (
    MOST_TOKENS,
    NUM_EXPERTS,
    NUM_TOPK,
    TOLERANCE,
    close,
    place,
    quotas,
    use_gpu,
)

import lplb_ep
from lplb_ep import Planner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hasattr(over_deep_ep.deep_ep(), "ElasticBuffer"), reason="no DeepEP V2"),
    # Ranks that share a GPU are refused by NCCL.
    pytest.mark.skipif(not mps.has_gpu_each(), reason="no GPU for each rank"),
]

HIDDEN = 2048
ENVIRON = {"LPLB_EP": "1", "LPLB_EP_REPLICAS": "valid"}


def make_buffer(group, placement):
    return lplb_ep.ElasticBuffer(
        group,
        num_max_tokens_per_rank=MOST_TOKENS,
        hidden=HIDDEN,
        num_topk=NUM_TOPK,
        placement=placement,
        num_local_slots=placement.num_local_slots,
        explicitly_destroy=True,
    )


def batches(group, num_batches):
    use_gpu(group)
    placement, rank = place(group.size(), 32), group.rank()
    buffer = make_buffer(group, placement)
    judge = Planner(placement, group, counts="torch", solver="flow", slot=1)
    rng = np.random.default_rng(100 + rank)
    for batch in range(num_batches):
        x, topk_idx, weights = over_deep_ep.draw(rng, HIDDEN, int(rng.integers(1, MOST_TOKENS)))
        do_cpu_sync = batch % 2 == 0
        received, slots, received_weights, handle, _ = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=weights,
            num_experts=NUM_EXPERTS,
            do_cpu_sync=do_cpu_sync,
        )
        planned = quotas(judge(topk_idx), placement, rank)
        sums = handle.psum_num_recv_tokens_per_expert.tolist()
        assert sums == np.cumsum(planned).tolist()
        if do_cpu_sync:
            assert handle.num_recv_tokens_per_expert_list == planned
        number = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        out = torch.zeros_like(received)  # rows behind the received ones are the worst case's
        out[:number] = over_deep_ep.compute(
            received[:number], slots[:number], received_weights[:number], placement, rank
        )
        combined, _, _ = buffer.combine(out, handle)
        close(combined, x, topk_idx, weights)
        # A backward pass: the tokens that were dispatched come back, by the same plan.
        again, *_ = buffer.dispatch(x, handle=handle, num_experts=NUM_EXPERTS)
        back, *_ = buffer.combine(again, handle)
        first_slots = torch.arange(0, placement.num_physical_experts, placement.num_local_slots)
        ranks_of = torch.bucketize(handle.topk_idx.cpu(), first_slots, right=True)
        copies = torch.tensor([len({*row} - {0}) for row in ranks_of.tolist()], device=x.device)
        off = (back.float() - x.float() * copies[:, None]).abs()
        assert (off <= TOLERANCE * copies[:, None] * x.abs()).all()
    buffer.destroy()


def test_every_token_arrives_where_it_was_planned(node):
    node(2, batches, 40, environ=ENVIRON, timeout=150)
