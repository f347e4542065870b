"""Mistakes that the embedded buffers name."""

import functools

import pytest
import ranks
import torch
from batches import (
    BF16,
    H,
)

from lplb_ep.embedded import (
    Buffer,
    ElasticBuffer,
    EventHandle,
)


def mistakes(group):
    """What each mistake raises, by name: (type, message)."""
    R, E, T, K = group.size(), 16, 4, 2
    g = torch.Generator().manual_seed(group.rank())
    x = torch.randn(T, H, generator=g)
    idx = torch.rand(T, E, generator=g).argsort(1)[:, :K].contiguous()
    w = torch.rand(T, K, generator=g)
    buffer = Buffer(group)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, E)
    layout = dict(
        num_tokens_per_rank=per_rank,
        num_tokens_per_expert=per_expert,
        is_token_in_rank=in_rank,
        topk_idx=idx,
        topk_weights=w,
    )
    recv_x, _, recv_w, _, handle, _ = buffer.dispatch(x, **layout)
    size = Buffer.get_low_latency_rdma_size_hint(T, H, R, E)
    low = Buffer(group, 0, size, low_latency_mode=True)
    slots, _, low_handle, _, _ = low.low_latency_dispatch(x, idx, T, E, use_fp8=False)
    elastic = ElasticBuffer(group, num_max_tokens_per_rank=T, hidden=H)
    once = ElasticBuffer(group, num_max_tokens_per_rank=T, hidden=H, allow_multiple_reduction=False)
    options = dict(topk_idx=idx, topk_weights=w, num_experts=E)
    elastic_x, _, elastic_w, elastic_handle, _ = elastic.dispatch(x, **options)
    expanded_x, _, expanded_w, expanded, _ = once.dispatch(x, **options, do_expand=True)

    def dispatch(x=x, **changes):
        buffer.dispatch(x, **{**layout, **changes})

    def low_dispatch(x=x, idx=idx, slots=T, experts=E, **changes):
        low.low_latency_dispatch(x, idx, slots, experts, **{"use_fp8": False, **changes})

    def low_combine(x=slots, idx=idx, w=w, handle=low_handle, **changes):
        low.low_latency_combine(x, idx, w, handle, **changes)

    def elastic_dispatch(x=x, **changes):
        elastic.dispatch(x, **{**options, **changes})

    def pending(call):
        waiting = Buffer(group, 0, size, low_latency_mode=True)
        _, _, handle, _, hook = waiting.low_latency_dispatch(
            x, idx, T, E, use_fp8=False, return_recv_hook=True
        )
        try:
            call(waiting, handle, hook)
        finally:
            waiting._pending = None

    def destroyed(kind, call, **sizes):
        gone = kind(group, explicitly_destroy=True, **sizes)
        gone.destroy()
        call(gone)

    def with_entry(value):
        changed = idx.clone()
        changed[1, 1] = value
        return changed

    twice = idx.clone()
    twice[2] = 5
    elsewhere = (idx + E // R) % E
    long = torch.int64
    cases = {
        # Buffer
        "no group": lambda: Buffer(None),
        "nvl bytes": lambda: Buffer(group, 100),
        "rdma bytes without use": lambda: Buffer(group, 0, 128),
        "odd SMs": lambda: Buffer.set_num_sms(7),
        "layout: experts": lambda: buffer.get_dispatch_layout(idx, E + 1),
        "layout: no experts": lambda: buffer.get_dispatch_layout(idx, 0),
        "layout: index too large": lambda: buffer.get_dispatch_layout(with_entry(E), E),
        "layout: index below -1": lambda: buffer.get_dispatch_layout(with_entry(-2), E),
        "layout: dtype": lambda: buffer.get_dispatch_layout(idx.float(), E),
        "layout: shape": lambda: buffer.get_dispatch_layout(idx[0], E),
        "layout: strides": lambda: buffer.get_dispatch_layout(idx.t(), E),
        "layout: not a tensor": lambda: buffer.get_dispatch_layout(idx.tolist(), E),
        "stream without event": lambda: buffer.get_dispatch_layout(
            idx, E, async_finish=True, allocate_on_comm_stream=True
        ),
        "x: shape": lambda: dispatch(x[0]),
        "x: strides": lambda: dispatch(x.t().contiguous().t()),
        "x: scales": lambda: dispatch((x, torch.ones(T + 1, 1))),
        "no layout": lambda: buffer.dispatch(x),
        "no counts": lambda: dispatch(num_tokens_per_expert=None),
        "layout of other tokens": lambda: dispatch(is_token_in_rank=in_rank[1:]),
        "layout of other ranks": lambda: dispatch(num_tokens_per_rank=per_rank[1:]),
        "layout that disagrees": lambda: dispatch(num_tokens_per_rank=per_rank + 1),
        "layout of other picks": lambda: dispatch(topk_idx=elsewhere),
        "counts of other picks": lambda: dispatch(num_tokens_per_expert=per_expert.flip(0)),
        "counts: dtype": lambda: dispatch(num_tokens_per_expert=per_expert.to(long)),
        "counts: number": lambda: dispatch(num_tokens_per_expert=per_expert[1:].contiguous()),
        "weights without picks": lambda: dispatch(topk_idx=None),
        "picks without weights": lambda: dispatch(topk_weights=None),
        "weights: dtype": lambda: dispatch(topk_weights=w.to(BF16)),
        "alignment": lambda: dispatch(expert_alignment=0),
        "too few worst tokens": lambda: dispatch(num_worst_tokens=1),
        "worst tokens without picks": lambda: dispatch(
            topk_idx=None, topk_weights=None, num_worst_tokens=99
        ),
        "picks with a handle": lambda: buffer.dispatch(x, handle=handle, topk_idx=idx),
        "handle of other tokens": lambda: buffer.dispatch(x[1:], handle=handle),
        "handle of something else": lambda: buffer.dispatch(x, handle=low_handle),
        "combine: rows": lambda: buffer.combine(recv_x[1:], handle),
        "combine: dtype": lambda: buffer.combine(recv_x.int(), handle),
        "combine: weights": lambda: buffer.combine(recv_x, handle, topk_weights=recv_w[1:]),
        "combine: bias": lambda: buffer.combine(recv_x, handle, bias=x[1:]),
        "combine: bias dtype": lambda: buffer.combine(recv_x, handle, bias=x.to(BF16)),
        "combine: three biases": lambda: buffer.combine(recv_x, handle, bias=(x, x, x)),
        "combine: handle": lambda: buffer.combine(recv_x, handle[:5]),
        "destroy unasked": buffer.destroy,
        "destroyed": lambda: destroyed(Buffer, lambda b: b.get_dispatch_layout(idx, E)),
        "destroyed twice": lambda: destroyed(Buffer, lambda b: b.destroy()),
        # Low latency
        "not low latency": lambda: buffer.low_latency_dispatch(x, idx, T, E, use_fp8=False),
        "clean: sizes": lambda: low.clean_low_latency_buffer(2 * T, H, E),
        "low: sized for fewer experts": lambda: low_dispatch(experts=4 * E),
        "low: too many tokens": lambda: low_dispatch(slots=T - 1),
        "low: x dtype": lambda: low_dispatch(x.int()),
        "low: statistics": lambda: low_dispatch(
            cumulative_local_expert_recv_stats=torch.zeros(E, dtype=torch.int32)
        ),
        "low: waits": lambda: low_dispatch(dispatch_wait_recv_cost_stats=torch.zeros(R)),
        "low: fp8 rows": lambda: low_dispatch(use_fp8=True),
        "low: ue8m0": lambda: low_dispatch(use_ue8m0=True),
        "low: event and hook": lambda: low_dispatch(async_finish=True, return_recv_hook=True),
        "low combine: rows": lambda: low_combine(slots[:, 1:].contiguous()),
        "low combine: other picks": lambda: low_combine(idx=elsewhere),
        "low combine: weights": lambda: low_combine(w=w[:, 1:].contiguous()),
        "low combine: out": lambda: low_combine(out=x.double()),
        "low combine: no buffer": lambda: low_combine(zero_copy=True),
        "low combine: logfmt": lambda: low_combine(zero_copy=True, use_logfmt=True),
        "dispatch before the hook": lambda: pending(
            lambda b, handle, hook: b.low_latency_dispatch(x, idx, T, E, use_fp8=False)
        ),
        "combine before the hook": lambda: pending(
            lambda b, handle, hook: b.low_latency_combine(slots, idx, w, handle)
        ),
        "hook twice": lambda: pending(lambda b, handle, hook: (hook(), hook())),
        # ElasticBuffer
        "elastic: no sizes": lambda: ElasticBuffer(group),
        "elastic: bytes": lambda: ElasticBuffer(group, 1000),
        "elastic: no experts": lambda: elastic_dispatch(num_experts=None),
        "elastic: no picks": lambda: elastic_dispatch(topk_idx=None),
        "elastic: too many tokens": lambda: elastic_dispatch(num_max_tokens_per_rank=T - 1),
        "elastic: index too large": lambda: elastic_dispatch(topk_idx=with_entry(E)),
        "elastic: expert twice": lambda: elastic_dispatch(topk_idx=twice),
        "elastic: weights": lambda: elastic_dispatch(topk_weights=w[1:]),
        "elastic: statistics": lambda: elastic_dispatch(
            cumulative_local_expert_recv_stats=torch.zeros(E // R)
        ),
        "elastic: alignment": lambda: elastic_dispatch(expert_alignment=0),
        "elastic: padding": lambda: elastic_dispatch(do_zero_padding=True),
        "elastic: queue pairs": lambda: elastic_dispatch(num_qps=1000),
        "elastic: event": lambda: elastic_dispatch(previous_event=EventHandle()),
        "elastic: picks with a handle": lambda: elastic_dispatch(handle=elastic_handle),
        "elastic: sync with a handle": lambda: elastic.dispatch(
            x, handle=elastic_handle, do_cpu_sync=True
        ),
        "elastic: handle of other tokens": lambda: elastic.dispatch(x[1:], handle=elastic_handle),
        "elastic: handle of other experts": lambda: elastic.dispatch(
            x, handle=elastic_handle, num_experts=2 * E
        ),
        "elastic: handle of other layout": lambda: elastic.dispatch(
            x, handle=elastic_handle, do_expand=True
        ),
        "elastic combine: rows": lambda: elastic.combine(elastic_x[1:], elastic_handle),
        "elastic combine: weights": lambda: elastic.combine(
            elastic_x, elastic_handle, topk_weights=elastic_w[:, 0].contiguous()
        ),
        "elastic combine: bias": lambda: elastic.combine(
            elastic_x, elastic_handle, bias=(x, x.double())
        ),
        "elastic combine: weights of one reduction": lambda: once.combine(
            expanded_x, expanded, topk_weights=expanded_w
        ),
        "elastic: SMs": lambda: elastic.get_theoretical_num_sms(E + 1, K),
        "elastic: scale-out picks": lambda: elastic.get_theoretical_num_sms(E, K, 1),
        "elastic: destroy unasked": elastic.destroy,
        "elastic: destroyed": lambda: destroyed(
            ElasticBuffer, lambda b: b.barrier(), num_bytes=2 << 20
        ),
    }
    raised = {}
    for name, mistake in cases.items():
        try:
            mistake()
        except (ValueError, RuntimeError) as error:
            raised[name] = (type(error).__name__, str(error))
    return raised


MISTAKES = {
    "no group": "group must be a torch.distributed group; got None",
    "nvl bytes": "num_nvl_bytes must be a multiple of 128; got 100",
    "rdma bytes without use": "num_rdma_bytes must be 0 without low_latency_mode",
    "odd SMs": "new_num_sms must be even; got 7",
    "layout: experts": "num_experts must be a positive multiple of the 2 ranks; got 17",
    "layout: no experts": "num_experts must be a positive multiple of the 2 ranks; got 0",
    "layout: index too large": "topk_idx must be -1 or in [0, 16); got 16 for token 1, pick 1",
    "layout: index below -1": "topk_idx must be -1 or in [0, 16); got -2 for token 1, pick 1",
    "layout: dtype": "topk_idx must have shape [any, any] and dtype int32 or int64; got shape "
    "[4, 2], dtype float32",
    "layout: shape": "topk_idx must have shape [any, any]",
    "layout: strides": "topk_idx must be contiguous; got strides (1, 2)",
    "layout: not a tensor": "topk_idx must be a tensor; got list",
    "stream without event": "allocate_on_comm_stream=True needs a previous_event",
    "x: shape": "x must have shape [any, any]; got shape [8]",
    "x: strides": "x must be contiguous; got strides (1, 4)",
    "x: scales": "the scales of x must have shape [4, any]; got shape [5, 1]",
    "no layout": "is_token_in_rank must be a tensor; got NoneType",
    "no counts": "num_tokens_per_expert must be a tensor; got NoneType",
    "layout of other tokens": "is_token_in_rank must have shape [4, 2] and dtype bool; got",
    "layout of other ranks": "num_tokens_per_rank must have shape [2] and dtype int32; got",
    "layout that disagrees": "num_tokens_per_rank must agree with is_token_in_rank",
    "layout of other picks": "is_token_in_rank must be the layout of topk_idx",
    "counts of other picks": "num_tokens_per_expert must count topk_idx",
    "counts: dtype": "num_tokens_per_expert must have shape [any] and dtype int32; got",
    "counts: number": "num_tokens_per_expert must be for a positive multiple of the 2 ranks",
    "weights without picks": "topk_idx must be a tensor; got NoneType",
    "picks without weights": "topk_weights must be a tensor; got NoneType",
    "weights: dtype": "topk_weights must have shape [4, 2] and dtype float32 or float64; got",
    "alignment": "expert_alignment must be positive; got 0",
    "too few worst tokens": "num_worst_tokens must be 0, or with topk_idx at least",
    "worst tokens without picks": "num_worst_tokens must be 0, or with topk_idx at least",
    "picks with a handle": "topk_idx and topk_weights must be None with a handle",
    "handle of other tokens": "is_token_in_rank of handle must have shape [3, 2]",
    "handle of something else": "handle must be the tuple of six that dispatch returns",
    "combine: rows": "x must have shape",
    "combine: dtype": "dtype float32 or float64 or bfloat16",
    "combine: weights": "topk_weights must have shape",
    "combine: bias": "bias must have shape [4, 8] and dtype float32; got shape [3, 8]",
    "combine: bias dtype": "bias must have shape [4, 8] and dtype float32; got",
    "combine: three biases": "bias must be a tensor or a tuple of two; got a tuple of 3",
    "combine: handle": "handle must be the tuple of six that dispatch returns",
    "destroy unasked": "destroy() needs a buffer made with explicitly_destroy=True",
    "destroyed": "the buffer was destroyed",
    "destroyed twice": "the buffer was destroyed",
    "not low latency": "low-latency calls need a buffer made with low_latency_mode=True",
    "clean: sizes": "num_rdma_bytes must be at least",
    "low: sized for fewer experts": "num_rdma_bytes must be at least",
    "low: too many tokens": "num_max_dispatch_tokens_per_rank must be at least the 4 tokens",
    "low: x dtype": "x must have shape [any, any] and dtype float32 or",
    "low: statistics": "cumulative_local_expert_recv_stats must have shape [8] and dtype int32",
    "low: waits": "dispatch_wait_recv_cost_stats must have shape [2] and dtype int64; got",
    "low: fp8 rows": "x must have rows of a multiple of 128 with FP8; got 8",
    "low: ue8m0": "use_ue8m0 must be False without round_scale; got True",
    "low: event and hook": "async_finish must be False with return_recv_hook=True; got True",
    "low combine: rows": "x must have shape [8, 8, 8]",
    "low combine: other picks": "topk_idx must hold the picks that were dispatched; got expert",
    "low combine: weights": "topk_weights must have shape [4, 2]",
    "low combine: out": "out must have shape [4, 8] and dtype float32; got",
    "low combine: no buffer": "zero_copy needs get_next_low_latency_combine_buffer() first",
    "low combine: logfmt": "zero_copy must be False with use_logfmt=True; got True",
    "dispatch before the hook": "call the hook of the previous low-latency call first",
    "combine before the hook": "call the hook of the previous low-latency call first",
    "hook twice": "this hook was called before",
    "elastic: no sizes": "num_max_tokens_per_rank and hidden must be positive; got 0 and 0",
    "elastic: bytes": "num_bytes must be a positive multiple of 2097152; got 1000",
    "elastic: no experts": "num_experts must be a positive multiple of the 2 ranks; got None",
    "elastic: no picks": "topk_idx must be a tensor; got NoneType",
    "elastic: too many tokens": "num_max_tokens_per_rank must be at least the 4 tokens of x; got 3",
    "elastic: index too large": "topk_idx must be -1 or in [0, 16); got 16 for token 1, pick 1",
    "elastic: expert twice": "topk_idx must not name an expert twice in a token; got 5 twice for "
    "token 2",
    "elastic: weights": "topk_weights must have shape [4, 2]",
    "elastic: statistics": "cumulative_local_expert_recv_stats must have shape [8]",
    "elastic: alignment": "expert_alignment must be positive; got 0",
    "elastic: padding": "do_zero_padding must be False without do_expand; got True",
    "elastic: queue pairs": "num_qps must be at most the 129 allocated; got 1000",
    "elastic: event": "allocate_on_comm_stream must be True with previous_event; got False",
    "elastic: picks with a handle": "must not be given with a handle",
    "elastic: sync with a handle": "must not be given with a handle",
    "elastic: handle of other tokens": "x must have shape [4, any]; got shape [3, 8]",
    "elastic: handle of other experts": "num_experts must be the handle's, 16; got 32",
    "elastic: handle of other layout": "do_expand must be the handle's, False; got True",
    "elastic combine: rows": "x must have shape",
    "elastic combine: weights": "topk_weights must have shape",
    "elastic combine: bias": "bias must have shape [4, 8] and dtype float32; got",
    "elastic combine: weights of one reduction": "topk_weights must be None for expanded rows",
    "elastic: SMs": "num_experts must be a multiple of the 2 ranks; got 17",
    "elastic: scale-out picks": "num_scaleout_topk must be 0; got 1",
    "elastic: destroy unasked": "destroy() needs a buffer made with explicitly_destroy=True",
    "elastic: destroyed": "the buffer was destroyed",
}
WRONG_STATE = {
    "destroy unasked",
    "destroyed",
    "destroyed twice",
    "not low latency",
    "low combine: no buffer",
    "dispatch before the hook",
    "combine before the hook",
    "hook twice",
    "elastic: destroy unasked",
    "elastic: destroyed",
}


@functools.cache
def raised_mistakes():
    return ranks.run(2, mistakes)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    for raised in raised_mistakes():
        assert name in raised, "no error"
        kind, message = raised[name]
        assert MISTAKES[name] in message
        assert kind == ("ContractError" if name in WRONG_STATE else "ValueError")


def test_every_mistake_is_expected():
    assert raised_mistakes()[0].keys() == MISTAKES.keys()
