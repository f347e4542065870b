"""The drop-in over DeepEP itself, within a node: every token arrives, where it was planned."""

import importlib.util
import time

import numpy as np
import over_deep_ep
import pytest
import torch
from over_deep_ep import (
    FP8_TOLERANCE,
    MOST_TOKENS,
    NUM_EXPERTS,
    TOLERANCE,
    close,
    compute,
    place,
    quotas,
    subnormal,
    use_gpu,
    widen,
)

import lplb_ep
from lplb_ep import Planner, RankError, check_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="no DeepEP"),
]

HIDDEN = 512


def make_buffer(group, placement):
    # As many as run at once on a rank's part of the GPU: DeepEP itself hangs with 8 of 14 SMs.
    lplb_ep.Buffer.set_num_sms(8 if group.size() < 8 else 4)
    return lplb_ep.Buffer(
        group,
        64 << 20,
        placement=placement,
        num_local_slots=placement.num_local_slots,
        explicitly_destroy=True,
    )


def draw(rng, *, empty):
    return over_deep_ep.draw(rng, HIDDEN, 0 if empty else int(rng.integers(1, MOST_TOKENS)))


def layer(buffer, group, placement, x, topk_idx, weights, *, asynchronous=False, **options):
    """Dispatch, experts and combine; as a framework calls them."""
    event = buffer.capture() if asynchronous else None
    if asynchronous:
        torch.cuda._sleep(20_000_000)  # a plan so late that a stream which did not wait would tell
    overlap = dict(async_finish=asynchronous, allocate_on_comm_stream=asynchronous)
    per_rank, per_rdma, per_expert, in_rank, done = buffer.get_dispatch_layout(
        topk_idx, NUM_EXPERTS, previous_event=event, **overlap
    )
    given = x
    if options.pop("fp8", False):
        blocks = x.float().view(len(x), -1, 128)
        amax = blocks.abs().amax(2, keepdim=True).clamp(min=1e-4)
        given = (
            (blocks * (448 / amax)).view_as(x).to(torch.float8_e4m3fn),
            (amax / 448).view(len(x), -1),
        )
    received, slots, received_weights, numbers, handle, done = buffer.dispatch(
        given,
        topk_idx=topk_idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=done if asynchronous else None,
        **overlap,
        **options,
    )
    if asynchronous:
        done.current_stream_wait()
    if isinstance(received, tuple):
        received = widen(received)
    out = compute(received, slots, received_weights, placement, group.rank())
    combined, _, done = buffer.combine(out, handle, async_finish=asynchronous)
    if asynchronous:
        done.current_stream_wait()
    return combined, slots, numbers, handle


def batches(group, num_batches, seed):
    use_gpu(group)
    placement = place(group.size(), seed)
    buffer = make_buffer(group, placement)
    assert type(buffer).__mro__[1].__module__.startswith("deep_ep")
    judge = Planner(placement, group, counts="torch", solver="flow", slot=1)
    rng = np.random.default_rng(100 + group.rank())
    for batch in range(num_batches):
        x, topk_idx, weights = draw(rng, empty=rng.random() < 0.2)
        out, slots, numbers, _ = layer(
            buffer, group, placement, x, topk_idx, weights, asynchronous=batch % 2 == 1
        )
        close(out, x, topk_idx, weights)
        plan = judge(topk_idx)
        check_plan(plan, topk_idx, placement, group.rank())
        assert numbers == quotas(plan, placement, group.rank())
        assert sum(numbers) == int(plan.rank_load[group.rank()]) == int((slots >= 0).sum())
    own = (lplb_ep.layer.layer_of(placement), 0)
    (channel,) = (p for key, p in lplb_ep.layer.channels[group].items() if key[:2] == own)
    buffer.destroy()
    return channel.counts, int(channel.num_batches[0])


@pytest.mark.parametrize("counts", ["nvshmem", "ipc", "torch"])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_every_token_arrives_where_it_was_planned(node, num_ranks, counts):
    environ = {"LPLB_EP": "1", "LPLB_EP_REPLICAS": "valid", "LPLB_EP_COUNTS": counts}
    for used, number in node(num_ranks, batches, 500, len(counts), environ=environ, timeout=120):
        assert (used, number) == (counts, 500)


def at_home(group):
    use_gpu(group)
    placement = place(group.size(), 20)
    buffer = make_buffer(group, placement)
    rng = np.random.default_rng(100 + group.rank())
    homes = {int(h) for h in placement.home}
    for _ in range(20):
        x, topk_idx, weights = draw(rng, empty=False)
        out, slots, _, _ = layer(buffer, group, placement, x, topk_idx, weights)
        close(out, x, topk_idx, weights)
        first = group.rank() * placement.num_local_slots
        assert {first + int(s) for s in slots.unique() if s >= 0} <= homes
    buffer.destroy()


def test_home_mode(node):
    node(4, at_home, environ={"LPLB_EP": "home"})


def options(group):
    use_gpu(group)
    placement = place(group.size(), 21)
    buffer = make_buffer(group, placement)
    judge = Planner(placement, group, counts="torch", solver="flow", slot=1)
    rng = np.random.default_rng(7 + group.rank())
    for _ in range(10):
        x, topk_idx, weights = draw(rng, empty=False)
        out, *_ = layer(buffer, group, placement, x, topk_idx, weights, fp8=True)
        close(out, x, topk_idx, weights, FP8_TOLERANCE, smallest=subnormal(x))
        most = MOST_TOKENS * group.size()
        out, slots, numbers, _ = layer(
            buffer, group, placement, x, topk_idx, weights, num_worst_tokens=most
        )
        close(out, x, topk_idx, weights)
        assert (len(slots), numbers) == (most, [])
        # A backward pass: what was dispatched comes back, by the same plan.
        _, _, _, handle = layer(buffer, group, placement, x, topk_idx, weights)
        again, *_ = buffer.dispatch(x, handle=handle)
        back, *_ = buffer.combine(again, handle)
        copies = handle[4].sum(1, keepdim=True)  # is_token_in_rank
        off = (back.float() - x.float() * copies).abs()
        assert (off <= TOLERANCE * copies * x.abs()).all()
        # The gradient of the weights, each of which one rank has; and DeepEP's other arguments.
        _, numbers = layer(buffer, group, placement, x, topk_idx, weights, expert_alignment=16)[1:3]
        assert all(number % 16 == 0 for number in numbers)
        config = type(buffer).get_dispatch_config(group.size())
        _, slots, _, handle = layer(buffer, group, placement, x, topk_idx, weights, config=config)
        mine = torch.full(slots.shape, float(group.rank() + 1), device="cuda")
        _, summed, _ = buffer.combine(again, handle, topk_weights=mine.masked_fill(slots < 0, 0))
        plan = judge(topk_idx)
        rank_of = plan.topk_idx // placement.num_local_slots
        assert torch.equal(summed, torch.where(topk_idx < 0, 0, rank_of + 1).float())
    buffer.destroy()


def test_fp8_worst_case_sizes_and_cached_dispatch(node):
    environ = {"LPLB_EP": "1", "LPLB_EP_REPLICAS": "valid", "LPLB_EP_COUNTS": "ipc"}
    node(4, options, environ=environ)


def stale(group):
    """Nobody said that the replicas are valid: all tokens go home, the same on all ranks."""
    use_gpu(group)
    placement = place(group.size(), 22)
    buffer = make_buffer(group, placement)
    x, topk_idx, weights = draw(np.random.default_rng(group.rank()), empty=False)
    out, slots, _, _ = layer(buffer, group, placement, x, topk_idx, weights)
    close(out, x, topk_idx, weights)
    first = group.rank() * placement.num_local_slots
    assert {first + int(s) for s in slots.unique() if s >= 0} <= {int(h) for h in placement.home}
    buffer.destroy()


def test_replicas_that_may_be_stale_get_nothing(node):
    node(4, stale, environ={"LPLB_EP": "1"})


def late(group):
    """The last rank comes to its second batch when the others have given up waiting. They go on
    with it, every token right, and raise where they would plan again; then it does."""
    use_gpu(group)
    placement = place(group.size(), 23)
    buffer = make_buffer(group, placement)
    x, topk_idx, weights = draw(np.random.default_rng(group.rank()), empty=False)
    layer(buffer, group, placement, x, topk_idx, weights)
    is_late = group.rank() == group.size() - 1
    if is_late:
        time.sleep(5)
    out, *_ = layer(buffer, group, placement, x, topk_idx, weights)
    close(out, x, topk_idx, weights)
    if is_late:
        layout = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
        assert layout is not None
        torch.cuda.synchronize()
    said = "refused" if is_late else r"ranks \[3\] sent no counts within 2 s"
    with pytest.raises(RankError, match=said):
        buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
    buffer.destroy()


def test_a_late_rank_is_named_and_none_is_stuck(node):
    environ = {"LPLB_EP": "1", "LPLB_EP_REPLICAS": "valid", "LPLB_EP_TIMEOUT_S": "2"}
    node(4, late, environ=environ)
