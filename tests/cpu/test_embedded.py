"""The embedded buffers against loops over every rank's batch, and DeepEP's documented interface."""

import functools
import inspect
import re
from pathlib import Path

import pytest
import ranks
import torch

from lplb_ep import embedded
from lplb_ep.embedded import (
    Buffer,
    Config,
    ElasticBuffer,
    EPHandle,
    EventHandle,
    EventOverlap,
)
from lplb_ep.embedded.fp8 import cast_to_fp8

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FP8 = torch.float8_e4m3fn
H = 8


class Batch:
    """A rank's tokens. Made the same way by every rank, so that each can know all of them."""

    def __init__(self, rank, T, K, E, dtype, hidden, idx_dtype, masked):
        g = torch.Generator().manual_seed(1000 * rank + 10 * K + E)
        self.T = T
        self.x = torch.randn(T, hidden, generator=g).to(dtype)
        self.scales = torch.rand(T, 2, generator=g)
        self.w = torch.rand(T, K, generator=g)
        self.idx = torch.rand(T, E, generator=g).argsort(1)[:, :K].to(idx_dtype).contiguous()
        self.idx[torch.rand(T, K, generator=g) < masked] = -1
        self.bias = [torch.randn(T, hidden, generator=g).to(dtype) for _ in range(2)]


def make_batches(R, sizes, K=3, E=16, dtype=F32, hidden=H, idx_dtype=torch.int64, masked=0.2):
    """One batch for each rank; their sizes go round `sizes`."""
    return [
        Batch(r, sizes[r % len(sizes)], K, E, dtype, hidden, idx_dtype, masked) for r in range(R)
    ]


def same(got, expected):
    """Bit for bit: NaN equals NaN, and float8 can be compared."""
    assert got.dtype == expected.dtype, (got.dtype, expected.dtype)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    bits = [t.contiguous().flatten().view(torch.uint8) for t in (got, expected)]
    assert torch.equal(*bits), f"\n{got}\n{expected}"


def stack(rows, like):
    return torch.stack(rows) if rows else like.new_empty(0, *like.shape[1:])


def nothing(t):
    """Whether memory is as DeepEP would leave it: here, all bits set."""
    return bool((t.contiguous().flatten().view(torch.uint8) == 255).all())


def ranks_of(batch, t, L):
    return sorted({e // L for e in batch.idx[t].tolist() if e >= 0})


def origins(batches, rank, L):
    """The (source rank, token) that a rank receives, in DeepEP's order."""
    return [(s, t) for s, b in enumerate(batches) for t in range(b.T) if rank in ranks_of(b, t, L)]


def local_picks(batch, t, rank, L):
    return [e - rank * L if e >= 0 and e // L == rank else -1 for e in batch.idx[t].tolist()]


def add(terms, dtype):
    """The sum in the given order in float32 (float64 for float64), rounded once."""
    acc = torch.zeros(1, dtype=F64 if dtype == F64 else F32)
    for term in terms:
        acc = acc + term.to(acc.dtype)
    return acc.to(dtype)


def computed(row, rank, expert=0):
    """What an expert of a rank makes of a row: nothing that sums to the same by accident."""
    out = row.dtype if row.dtype != FP8 else BF16
    return (row.double() * (rank + 1) / 3 + expert).to(out)


# --- Buffer: dispatch and combine -----------------------------------------------------------------

SIZES = {
    "different": (5, 3, 0, 4, 6, 1, 2, 5),
    "none": (0,),
    "one token on one rank": (0, 1),
}


def legacy_round_trip(group, case):
    rank, R = group.rank(), group.size()
    E, L = case.get("E", 16), case.get("E", 16) // R
    pair = case.pop("pair", False)
    batches = make_batches(R, **case)
    b, K = batches[rank], batches[rank].idx.shape[1]
    buffer = Buffer(group, 1 << 20)
    expected = origins(batches, rank, L)
    N = len(expected)

    # Layout
    per_rank, rdma, per_expert, in_rank, event = buffer.get_dispatch_layout(
        b.idx, E, async_finish=True
    )
    event.current_stream_wait()
    same(
        in_rank,
        torch.tensor(
            [[r in ranks_of(b, t, L) for r in range(R)] for t in range(b.T)], dtype=torch.bool
        ).view(b.T, R),
    )
    same(per_rank, torch.tensor([in_rank[:, r].sum() for r in range(R)], dtype=torch.int32))
    same(per_expert, torch.tensor([(b.idx == e).sum() for e in range(E)], dtype=torch.int32))
    assert rdma is None

    layout = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }
    x = (b.x, b.scales) if pair else b.x
    recv_x, recv_idx, recv_w, per_expert_list, handle, event = buffer.dispatch(
        x,
        **layout,
        topk_idx=b.idx,
        topk_weights=b.w,
        expert_alignment=4,
        previous_event=buffer.capture(),
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    with event:
        pass

    # What arrived
    data = recv_x[0] if pair else recv_x
    rows = stack([batches[s].x[t] for s, t in expected], b.x)
    same(data, rows)
    if pair:
        same(recv_x[1], stack([batches[s].scales[t] for s, t in expected], b.scales))
    picks = [local_picks(batches[s], t, rank, L) for s, t in expected]
    same(recv_idx, torch.tensor(picks, dtype=b.idx.dtype).view(N, K))
    weights = stack([batches[s].w[t] for s, t in expected], b.w)
    same(recv_w, torch.where(recv_idx < 0, 0, weights))
    counts = [sum(p.count(e) for p in picks) for e in range(L)]
    assert per_expert_list == [-(-c // 4) * 4 for c in counts]

    # The handle
    prefix, channel_prefix, recv_channel_prefix, source, handle_in_rank, head = handle
    sent = torch.tensor(
        [[sum(d in ranks_of(o, t, L) for t in range(o.T)) for d in range(R)] for o in batches],
        dtype=torch.int32,
    )
    same(prefix, sent.cumsum(0, dtype=torch.int32))
    same(channel_prefix, sent[rank].view(R, 1))
    same(recv_channel_prefix, torch.zeros(R, 1, dtype=torch.int32))
    same(source, torch.tensor([t for _, t in expected], dtype=torch.int32))
    assert handle_in_rank is in_rank
    for d in range(R):
        going = [t for t in range(b.T) if in_rank[t, d]]
        assert head[:, d].tolist() == [going.index(t) if t in going else -1 for t in range(b.T)]

    # Without picks; and again along the same ways
    bare = buffer.dispatch(x, **layout)
    assert bare[1] is None
    assert bare[2] is None
    assert bare[3] == counts
    cached = buffer.dispatch(x, handle=handle)
    assert cached[1:5] == (None, None, None, None)
    for again in (bare[0], cached[0]):
        same(again[0] if pair else again, rows)
    assert cached[5].event is None

    # The worst case
    worst = N + 3
    worst_x, worst_idx, worst_w, worst_list, worst_handle, _ = buffer.dispatch(
        x, **layout, topk_idx=b.idx, topk_weights=b.w, num_worst_tokens=worst
    )
    worst_data = worst_x[0] if pair else worst_x
    assert worst_list == []
    same(worst_data[:N], rows)
    same(worst_idx[:N], recv_idx)
    same(worst_w[:N], recv_w)
    assert len(worst_data) == len(worst_idx) == len(worst_w) == worst
    assert (worst_idx[N:] == -1).all()
    assert nothing(worst_data[N:])
    worst_again = buffer.dispatch(x, handle=worst_handle)[0]
    same(worst_again[0] if pair else worst_again, worst_data)

    # Combine
    y = stack([computed(row, rank) for row in rows], computed(b.x, 0))
    worst_y = torch.full((worst, y.shape[1]), float("nan")).to(y.dtype)
    worst_y[:N] = y
    biases = [t.to(y.dtype) for t in b.bias]
    for bias in (None, biases[0], tuple(biases), (None, biases[1])):
        given = [] if bias is None else [bias] if torch.is_tensor(bias) else list(bias)
        terms = [
            [g[t] for g in given if g is not None]
            + [computed(b.x[t], r) for r in ranks_of(b, t, L)]
            for t in range(b.T)
        ]
        combined = stack([add([torch.zeros(H), *ts], y.dtype) for ts in terms], y)
        got, none, _ = buffer.combine(y, handle, bias=bias)
        same(got, combined)
        assert none is None
        same(buffer.combine(worst_y, worst_handle, bias=bias)[0], combined)
    got, got_w, event = buffer.combine(y, handle, topk_weights=recv_w, async_finish=True)
    event.current_stream_wait()
    same(got_w, torch.where(b.idx < 0, 0, b.w))


LEGACY = {
    "bf16": dict(dtype=BF16, sizes=SIZES["different"]),
    "f16, int32 indices": dict(dtype=F16, sizes=SIZES["different"], idx_dtype=torch.int32),
    "f32": dict(dtype=F32, sizes=SIZES["different"]),
    "f64, one pick": dict(dtype=F64, sizes=SIZES["different"], K=1),
    "fp8 with scales": dict(dtype=FP8, sizes=SIZES["different"], pair=True),
    "no tokens": dict(sizes=SIZES["none"]),
    "one token": dict(sizes=SIZES["one token on one rank"]),
    "no picks": dict(sizes=SIZES["different"], masked=1.0),
    "many picks": dict(sizes=SIZES["different"], K=8, E=8),
}


@pytest.mark.parametrize(
    ("R", "case"),
    [(2, c) for c in LEGACY] + [(1, "bf16"), (4, "f32"), (4, "fp8 with scales"), (8, "bf16")],
)
def test_dispatch_and_combine(R, case):
    ranks.run(R, legacy_round_trip, dict(LEGACY[case]))


# --- Buffer: low latency --------------------------------------------------------------------------

FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(FP8).float()


def to_fp8(row, round_scale):
    """A row's FP8 codes and scales, by looking for the nearest of the values that FP8 has."""
    codes, scales = [], []
    for block in row.float().split(128):
        largest = max(float(block.abs().max()), float(torch.tensor(1e-4)))
        inverse = torch.tensor(largest) * torch.tensor(1 / 448)
        scale = torch.tensor(448.0) / torch.tensor(largest)
        if round_scale:
            power = next(p for p in range(-126, 128) if 2.0**p >= float(inverse))
            inverse, scale = torch.tensor(2.0**power), torch.tensor(2.0**-power)
        distance = (FP8_VALUES - (block * scale).unsqueeze(1)).abs()
        nearest = distance == distance.nan_to_num(torch.inf).min(1, keepdim=True).values
        for value, tie in zip(block, nearest, strict=True):
            same_sign = [c for c in tie.nonzero().flatten().tolist() if (c > 127) == (value < 0)]
            codes.append(min(same_sign, key=lambda code: code % 2))
        scales.append(inverse)
    return torch.tensor(codes, dtype=torch.uint8).view(FP8), torch.stack(scales)


def low_latency_round_trip(group, case, fp8=None, hook=False):
    rank, R = group.rank(), group.size()
    E, L = 16, 16 // R
    M = max(case["sizes"]) + 1
    batches = make_batches(R, E=E, **case)
    b = batches[rank]
    width = b.x.shape[1]
    size = Buffer.get_low_latency_rdma_size_hint(M, width, R, E)
    buffer = Buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=L)
    buffer.clean_low_latency_buffer(M, width, E)
    stats = torch.full((L,), 7, dtype=torch.int32)
    waits = torch.zeros(R, dtype=torch.int64)
    options = fp8 or {"use_fp8": False}
    expected = [
        [
            (s, t)
            for s, o in enumerate(batches)
            for t in range(o.T)
            if rank * L + e in o.idx[t].tolist()
        ]
        for e in range(L)
    ]
    counts = [len(rows) for rows in expected]

    recv, recv_count, handle, event, arrive = buffer.low_latency_dispatch(
        b.x, b.idx, M, E, stats, waits, **options, async_finish=not hook, return_recv_hook=hook
    )
    x = recv[0] if fp8 else recv
    if hook:
        assert nothing(x), "data before the hook"
        assert nothing(handle[0])
        assert (stats == 7).all()
        assert event.event is None
        arrive()
    else:
        assert arrive is None
        event.current_stream_wait()

    # What arrived
    assert recv_count.tolist() == counts
    assert recv_count.dtype == torch.int32
    assert stats.tolist() == [7 + c for c in counts]
    source, layout, *sizes = handle
    assert sizes == [M, width, E]
    assert x.shape == (L, R * M, width)
    for e, rows in enumerate(expected):
        assert source[e, : counts[e]].tolist() == [t for _, t in rows]
        sent = [sum(s == r for s, _ in rows) for r in range(R)]
        assert (layout[e] & 0xFFFFFFFF).tolist() == sent
        assert (layout[e] >> 32).tolist() == [sum(sent[:r]) for r in range(R)]
        assert nothing(x[e, counts[e] :])
        values = [batches[s].x[t] for s, t in rows]
        if fp8:
            cast = [to_fp8(v, fp8.get("round_scale", False)) for v in values]
            same(x[e, : counts[e]], stack([v for v, _ in cast], x[e]))
            scales = recv[1][e, : counts[e]]
            if fp8.get("use_ue8m0"):
                exponents = scales.contiguous().view(torch.uint8)
                scales = torch.exp2(exponents.float() - 127)
            same(scales, stack([s for _, s in cast], scales))
        else:
            same(x[e, : counts[e]], stack(values, b.x))
    if fp8:
        packed = 512 if fp8.get("use_ue8m0") else 128
        assert recv[1].shape == (L, R * M, width // packed)
        assert recv[1].stride(1) == 1, "column-major, for TMA"

    # Combine: the experts' rows, weighted by the source in the order of its picks
    y = torch.full((L, R * M, width), float("nan")).to(b.x.dtype)
    for e, rows in enumerate(expected):
        for i, (s, t) in enumerate(rows):
            y[e, i] = computed(batches[s].x[t], rank, e)
    acc = F64 if b.x.dtype == F64 else F32
    combined = stack(
        [
            add(
                [torch.zeros(width)]
                + [
                    computed(b.x[t], e // L, e % L).to(acc) * b.w[t, k].to(acc)
                    for k, e in enumerate(b.idx[t].tolist())
                    if e >= 0
                ],
                b.x.dtype,
            )
            for t in range(b.T)
        ],
        b.x,
    )
    out = torch.zeros_like(b.x)
    for zero_copy in (False, True):
        given = y
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle)[:] = y
            assert buffer.get_next_low_latency_combine_buffer(handle).dtype == y.dtype
            given = torch.zeros_like(y)
        got, event, arrive = buffer.low_latency_combine(
            given,
            b.idx,
            b.w,
            handle,
            zero_copy=zero_copy,
            out=out if zero_copy else None,
            async_finish=not hook,
            return_recv_hook=hook,
            combine_wait_recv_cost_stats=waits,
        )
        assert (got is out) == zero_copy
        if hook:
            assert (got == 0).all() if zero_copy else nothing(got), "data before the hook"
            arrive()
        same(got, combined)
    assert not waits.any()

    # Picks may be dropped, and columns change places, between dispatch and combine
    fewer = b.idx.flip(1).clone()
    fewer[::2, 0] = -1
    weights = b.w.flip(1).contiguous()
    got, _, arrive = buffer.low_latency_combine(y, fewer, weights, handle, use_logfmt=True)
    terms = [
        add(
            [torch.zeros(width)]
            + [
                computed(b.x[t], e // L, e % L).to(acc) * weights[t, k].to(acc)
                for k, e in enumerate(fewer[t].tolist())
                if e >= 0
            ],
            b.x.dtype,
        )
        for t in range(b.T)
    ]
    same(got, stack(terms, b.x))


LOW_LATENCY = {
    "bf16": (dict(dtype=BF16, sizes=SIZES["different"]), None, False),
    "f32, hook": (dict(dtype=F32, sizes=SIZES["different"]), None, True),
    "f64, int32 indices": (
        dict(dtype=F64, sizes=SIZES["different"], idx_dtype=torch.int32),
        None,
        False,
    ),
    "fp8": (dict(dtype=BF16, sizes=(3, 0, 2), hidden=256), {"use_fp8": True}, False),
    "fp8, round scales, hook": (
        dict(dtype=BF16, sizes=(3, 0, 2), hidden=256),
        {"round_scale": True},
        True,
    ),
    "fp8, UE8M0": (
        dict(dtype=F32, sizes=(2, 0, 1), hidden=512),
        {"round_scale": True, "use_ue8m0": True},
        False,
    ),
    "no tokens": (dict(dtype=BF16, sizes=(0,)), None, True),
    "no picks": (dict(dtype=BF16, sizes=(3, 1), masked=1.0), None, False),
    "one pick": (dict(dtype=BF16, sizes=(3, 1), K=1), None, False),
}


@pytest.mark.parametrize(
    ("R", "case"),
    [(2, c) for c in LOW_LATENCY] + [(1, "bf16"), (4, "f32, hook"), (8, "bf16"), (8, "fp8")],
)
def test_low_latency(R, case):
    ranks.run(R, low_latency_round_trip, *LOW_LATENCY[case])


def test_fp8_cast_of_zeros_and_of_large_rows():
    x = torch.zeros(3, 128)
    x[1] = torch.linspace(-1e30, 1e30, 128)
    x[2, 5] = 448.0 * 2**-20
    for round_scale in (False, True):
        values, scales = cast_to_fp8(x, round_scale, False)
        for row, value, scale in zip(x, values, scales, strict=True):
            same(value, to_fp8(row, round_scale)[0])
            same(scale, to_fp8(row, round_scale)[1])


# --- ElasticBuffer --------------------------------------------------------------------------------


def elastic_round_trip(group, case, alignment=1, pair=False, sync=True, multiple=True):
    rank, R = group.rank(), group.size()
    E, L = 16, 16 // R
    limit = max(case["sizes"]) + 2
    batches = make_batches(R, E=E, **case)
    b = batches[rank]
    K = b.idx.shape[1]
    buffer = ElasticBuffer(
        group, num_max_tokens_per_rank=limit, hidden=H, allow_multiple_reduction=multiple
    )
    expected = origins(batches, rank, L)
    N = len(expected)
    rows = stack([batches[s].x[t] for s, t in expected], b.x)
    weights = stack([batches[s].w[t] for s, t in expected], b.w)
    picks = [local_picks(batches[s], t, rank, L) for s, t in expected]
    counts = [sum(p.count(e) for p in picks) for e in range(L)]
    aligned = [-(-c // alignment) * alignment for c in counts]
    slots, first = {}, 0  # of (row, pick) in the expanded layout
    for e in range(L):
        here = [(i, p.index(e)) for i, p in enumerate(picks) if e in p]
        slots.update({at: first + j for j, at in enumerate(here)})
        first += aligned[e]
    size, expanded_size = N, sum(aligned)
    if not sync:
        size = R * limit
        expanded_size = -(-(size * min(K, L) + (alignment - 1) * L) // alignment) * alignment

    # Dispatch, plain and expanded
    x = (b.x, b.scales) if pair else b.x
    stats = torch.ones(L, dtype=torch.int32)
    given = dict(
        topk_idx=b.idx,
        topk_weights=b.w,
        num_experts=E,
        expert_alignment=alignment,
        do_cpu_sync=None if sync else False,
    )
    recv_x, recv_idx, recv_w, handle, event = buffer.dispatch(
        x,
        **given,
        cumulative_local_expert_recv_stats=stats,
        previous_event=buffer.capture(),
        async_with_compute_stream=True,
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait(release_handle=True)
    expanded_x, none, expanded_w, expanded, event = buffer.dispatch(
        x, **given, do_expand=True, do_handle_copy=False, use_tma_aligned_col_major_sf=True
    )
    assert none is None
    assert event.event is None
    assert stats.tolist() == [1 + c for c in counts]
    assert handle.topk_idx is not b.idx
    assert expanded.topk_idx is b.idx

    data, expanded_data = (recv_x[0], expanded_x[0]) if pair else (recv_x, expanded_x)
    assert len(data) == len(recv_idx) == len(recv_w) == size
    assert len(expanded_data) == len(expanded_w) == expanded_size
    same(data[:N], rows)
    same(recv_idx[:N], torch.tensor(picks, dtype=b.idx.dtype).view(N, K))
    same(recv_w[:N], weights)
    assert nothing(data[N:])
    for (i, k), slot in slots.items():
        same(expanded_data[slot], rows[i])
        same(expanded_w[slot], weights[i, k])
    padding = sorted(set(range(expanded_size)) - set(slots.values()))
    assert nothing(expanded_data[padding])
    if pair:
        scales = stack([batches[s].scales[t] for s, t in expected], b.scales)
        same(recv_x[1][:N], scales)
        assert expanded_x[1].stride() == (1, -(-expanded_size // 4) * 4)
        for (i, _), slot in slots.items():
            same(expanded_x[1][slot], scales[i])

    # The handles
    sent = [sum(s == r for s, _ in expected) for r in range(R)]
    for h in (handle, expanded):
        assert h.psum_num_recv_tokens_per_scaleup_rank.tolist() == [
            sum(sent[: r + 1]) for r in range(R)
        ]
        assert h.num_unaligned_recv_tokens_per_expert.tolist() == counts
        assert h.num_recv_tokens_per_expert_list == (aligned if sync else [])
        assert (h.num_recv_tokens, h.num_expanded_tokens) == (size, expanded_size)
        assert len(h.recv_src_metadata) == size
        for i, (s, t) in enumerate(expected):
            last = max(k for k in range(K) if picks[i][k] >= 0)
            assert h.recv_src_metadata[i, :2].tolist() == [s * limit + t, s * K + last]
            if h.do_expand:
                assert h.recv_src_metadata[i, 2:].tolist() == [
                    slots.get((i, k), -1) for k in range(K)
                ]
        for t in range(b.T):
            to = [e // L if e >= 0 else -1 for e in b.idx[t].tolist()]
            for k, d in enumerate(to):
                before = sum(d in ranks_of(b, u, L) for u in range(t))
                slot = rank * limit + before if d >= 0 and d not in to[k + 1 :] else -1
                assert h.dst_buffer_slot_idx[t, k] == slot
    ends, expanded_ends = (h.psum_num_recv_tokens_per_expert.tolist() for h in (handle, expanded))
    assert ends == [sum(aligned[: e + 1]) for e in range(L)]
    assert expanded_ends == [sum(aligned[:e]) + counts[e] for e in range(L)]

    # The same ways again; expanded with weights, and padding cleared
    again_x, again_idx, again_w, again, _ = buffer.dispatch(x, handle=handle)
    assert again is handle
    assert again_w is None
    same(again_idx, recv_idx)
    same(again_x[0] if pair else again_x, data)
    again_x, _, again_w, again, _ = buffer.dispatch(
        x, topk_weights=b.w, handle=expanded, do_expand=True, do_zero_padding=True
    )
    assert again is expanded
    again_data = again_x[0] if pair else again_x
    for slot in slots.values():
        same(again_data[slot], expanded_data[slot])
        same(again_w[slot], expanded_w[slot])
    between = [p for p in padding if p < sum(aligned)]
    assert (again_data[between].float() == 0).all()
    assert (again_w[between] == 0).all()
    if pair:
        assert (again_x[1][between] == 0).all()

    # Combine
    kind = computed(b.x, 0).dtype
    y = torch.full((size, H), float("nan")).to(kind)
    z = torch.full((expanded_size, H), float("nan")).to(kind)
    for i in range(N):
        y[i] = computed(rows[i], rank)
    for (i, k), slot in slots.items():
        z[slot] = computed(rows[i], rank, picks[i][k])
    biases = [t.to(kind) for t in b.bias]
    for bias in (None, biases[0], tuple(biases)):
        first_terms = [] if bias is None else [bias] if torch.is_tensor(bias) else biases
        plain, reduced = [], []
        for t in range(b.T):
            to = b.idx[t].tolist()
            own = [g[t] for g in first_terms] or [torch.zeros(H)]
            by_last = [
                e // L
                for k, e in enumerate(to)
                if e >= 0 and e // L not in [f // L for f in to[k + 1 :]]
            ]
            plain.append(add(own + [computed(b.x[t], d) for d in by_last], kind))
            terms = {d: [computed(b.x[t], d, e % L) for e in to if e // L == d] for d in by_last}
            each = [computed(b.x[t], e // L, e % L) for e in to if e >= 0]
            summed = [add(terms[d], kind) for d in by_last]
            reduced.append(add(own + (summed if multiple else each), kind))
        got, got_w, _ = buffer.combine(y, handle, topk_weights=recv_w, bias=bias)
        same(got, stack(plain, y))
        same(got_w, torch.where(b.idx < 0, 0, b.w))
        z_weights = expanded_w if multiple else None
        got, got_w, _ = buffer.combine(z, expanded, topk_weights=z_weights, bias=bias)
        same(got, stack(reduced, z))
        if multiple:
            same(got_w, torch.where(b.idx < 0, 0, b.w))


ELASTIC = {
    "bf16": (dict(dtype=BF16, sizes=SIZES["different"], K=5), {}),
    "bf16, aligned, without sync": (
        dict(dtype=BF16, sizes=SIZES["different"], K=5),
        dict(alignment=4, sync=False),
    ),
    "bf16, one reduction": (
        dict(dtype=BF16, sizes=SIZES["different"], K=5),
        dict(alignment=4, multiple=False),
    ),
    "f32, int32 indices": (
        dict(dtype=F32, sizes=SIZES["different"], idx_dtype=torch.int32),
        dict(alignment=8),
    ),
    "f64, one pick": (dict(dtype=F64, sizes=SIZES["different"], K=1), {}),
    "fp8 with scales": (dict(dtype=FP8, sizes=SIZES["different"]), dict(alignment=4, pair=True)),
    "no tokens": (dict(sizes=SIZES["none"]), dict(alignment=4)),
    "no tokens, without sync": (dict(sizes=SIZES["none"]), dict(alignment=4, sync=False)),
    "one token": (dict(sizes=SIZES["one token on one rank"]), {}),
    "no picks": (dict(sizes=SIZES["different"], masked=1.0), dict(alignment=4)),
    "all experts": (dict(dtype=BF16, sizes=(2, 1), K=16, masked=0.0), dict(alignment=3)),
}


@pytest.mark.parametrize(
    ("R", "case"),
    [(2, c) for c in ELASTIC]
    + [(1, "bf16"), (4, "bf16, one reduction"), (4, "fp8 with scales"), (8, "bf16")]
    + [(8, "bf16, aligned, without sync")],
)
def test_elastic(R, case):
    batch, options = ELASTIC[case]
    ranks.run(R, elastic_round_trip, batch, **options)


# --- mistakes -------------------------------------------------------------------------------------


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
    "combine before the hook": "call the dispatch's hook before combining",
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


# --- the rest of the interface --------------------------------------------------------------------

SIGNATURES = {
    Buffer: {
        "__init__": "self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, "
        "num_qps_per_rank=24, allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, "
        "explicitly_destroy=False, comm=None",
        "destroy": "self",
        "is_sm90_compiled": "",
        "set_num_sms": "new_num_sms",
        "capture": "",
        "get_low_latency_rdma_size_hint": "num_max_dispatch_tokens_per_rank, hidden, num_ranks, "
        "num_experts",
        "get_comm_stream": "self",
        "get_dispatch_config": "num_ranks",
        "get_combine_config": "num_ranks",
        "get_dispatch_layout": "self, topk_idx, num_experts, previous_event=None, "
        "async_finish=False, allocate_on_comm_stream=False",
        "dispatch": "self, x, handle=None, num_tokens_per_rank=None, "
        "num_tokens_per_rdma_rank=None, is_token_in_rank=None, num_tokens_per_expert=None, "
        "topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0, config=None, "
        "previous_event=None, async_finish=False, allocate_on_comm_stream=False",
        "combine": "self, x, handle, topk_weights=None, bias=None, config=None, "
        "previous_event=None, async_finish=False, allocate_on_comm_stream=False",
        "clean_low_latency_buffer": "self, num_max_dispatch_tokens_per_rank, hidden, num_experts",
        "low_latency_dispatch": "self, x, topk_idx, num_max_dispatch_tokens_per_rank, "
        "num_experts, cumulative_local_expert_recv_stats=None, "
        "dispatch_wait_recv_cost_stats=None, use_fp8=True, round_scale=False, use_ue8m0=False, "
        "async_finish=False, return_recv_hook=False",
        "low_latency_combine": "self, x, topk_idx, topk_weights, handle, use_logfmt=False, "
        "zero_copy=False, async_finish=False, return_recv_hook=False, out=None, "
        "combine_wait_recv_cost_stats=None",
        "get_next_low_latency_combine_buffer": "self, handle",
    },
    ElasticBuffer: {
        "__init__": "self, group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, "
        "hidden=0, num_topk=0, use_fp8_dispatch=False, deterministic=False, "
        "allow_hybrid_mode=True, allow_multiple_reduction=True, prefer_overlap_with_compute=True, "
        "sl_idx=3, num_allocated_qps=0, num_cpu_timeout_secs=300, num_gpu_timeout_secs=100, "
        "explicitly_destroy=False",
        "destroy": "self",
        "get_buffer_size_hint": "group, num_max_tokens_per_rank, hidden, num_topk=0, "
        "use_fp8_dispatch=False, allow_hybrid_mode=True, allow_multiple_reduction=True",
        "get_comm_stream": "self",
        "barrier": "self, use_comm_stream=True, with_cpu_sync=False, sequential=True",
        "capture": "",
        "get_physical_domain_size": "self",
        "get_logical_domain_size": "self",
        "get_theoretical_num_sms": "self, num_experts, num_topk, num_scaleout_topk=0, rdma_gbs=0, "
        "nvlink_gbs=0, sm_read_gbs=200, sm_write_gbs=50",
        "get_theoretical_num_qps": "self, num_sms",
        "dispatch": "self, x, topk_idx=None, topk_weights=None, "
        "cumulative_local_expert_recv_stats=None, num_experts=None, num_max_tokens_per_rank=None, "
        "expert_alignment=None, num_sms=0, num_qps=0, previous_event=None, "
        "previous_event_before_epilogue=None, async_with_compute_stream=False, "
        "allocate_on_comm_stream=False, handle=None, do_handle_copy=True, do_cpu_sync=None, "
        "do_expand=False, do_zero_padding=False, use_tma_aligned_col_major_sf=False",
        "combine": "self, x, handle, topk_weights=None, bias=None, num_sms=0, num_qps=0, "
        "previous_event=None, previous_event_before_epilogue=None, "
        "async_with_compute_stream=False, allocate_on_comm_stream=False",
    },
    EPHandle: {
        "__init__": "self, do_expand, num_experts, expert_alignment, num_max_tokens_per_rank, "
        "num_sms, topk_idx, num_recv_tokens, num_expanded_tokens, num_recv_tokens_per_expert_list, "
        "psum_num_recv_tokens_per_scaleup_rank, psum_num_recv_tokens_per_expert, "
        "num_unaligned_recv_tokens_per_expert, recv_src_metadata, dst_buffer_slot_idx, "
        "token_metadata_at_forward, channel_linked_list",
    },
    Config: {
        "__init__": "self, num_sms=20, num_max_nvl_chunked_send_tokens=6, "
        "num_max_nvl_chunked_recv_tokens=256, num_max_rdma_chunked_send_tokens=6, "
        "num_max_rdma_chunked_recv_tokens=256",
    },
    EventOverlap: {
        "__init__": "self, event=None, extra_tensors=None",
        "current_stream_wait": "self, release_handle=False",
    },
}


@pytest.mark.parametrize(
    ("kind", "method"), [(kind, method) for kind, table in SIGNATURES.items() for method in table]
)
def test_signatures_are_deep_eps(kind, method):
    def parameters(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    documented = eval(f"lambda {SIGNATURES[kind][method]}: None")
    assert parameters(getattr(kind, method)) == parameters(documented)
    static = isinstance(inspect.getattr_static(kind, method), staticmethod)
    assert static != SIGNATURES[kind][method].startswith("self")


def test_names_are_deep_eps():
    assert embedded.topk_idx_t == torch.int64
    assert isinstance(Buffer.capture(), EventOverlap)
    assert isinstance(ElasticBuffer.capture(), EventHandle)
    assert not Buffer.is_sm90_compiled()
    with pytest.raises(AttributeError, match="no attribute 'HybridEPBuffer'"):
        _ = embedded.HybridEPBuffer


def test_the_number_of_sms_is_the_classes():
    class Drop(Buffer):
        pass

    before = Buffer.num_sms
    try:
        Drop.set_num_sms(24)
        assert Buffer.num_sms == Drop.num_sms == 24
        assert Buffer.get_dispatch_config(3) == Config(24, 6, 256, 6, 128)
        assert Buffer.get_combine_config(160) == Config(24, 4, 256, 6, 128)
    finally:
        Buffer.set_num_sms(before)


def test_config_checks_and_sizes():
    assert Config(20, 6, 256, 6, 128).num_max_rdma_chunked_recv_tokens == 132
    # 10 channels * 8 ranks * (queue + 256 rows of 4096 bytes and 8 + 128 * 12 + 128 * 4 more)
    hint = 10 * 8 * (5 * 4 + 256 * (4096 + 8 + 128 * 12 + 128 * 4))
    assert Config().get_nvl_buffer_size_hint(4096, 8) == -(-hint // 128) * 128
    assert Config().get_rdma_buffer_size_hint(4096, 8) == 0
    # 10 channels * 2 nodes * (queues + 258 rows of both directions)
    hint = 10 * 2 * ((8 * 2 + 2) * 2 * 4 + 258 * 2 * (4096 + 8 + 128 * 12 + 128 * 4 + 16))
    assert Config().get_rdma_buffer_size_hint(4096, 16) == -(-hint // 128) * 128
    for bad in ((-1,), (20, 0), (20, 6, 6), (20, 6, 256, 0), (20, 6, 256, 6, 6)):
        with pytest.raises(ValueError, match=r"got Config\("):
            Config(*bad)


def test_low_latency_size_hint():
    # DeepEP's README: 128 tokens, 7168 elements, 8 ranks, 288 experts. By hand from config.hpp:
    message = 7168 * 2 + max(16, 56 * 4)
    size = 2 * (288 * 128 * message) + 2 * (288 * 128 * max(7168 * 2 + 16, message)) + 2 * 1152
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 288)
    assert hint == (size + 128) // 128 * 128
    sizes = [Buffer.get_low_latency_rdma_size_hint(4, 64, 2, e) for e in (2, 4, 8, 16)]
    assert sizes == sorted(set(sizes))


def interface_of_the_elastic_buffer(group):
    buffer = ElasticBuffer(
        group, num_max_tokens_per_rank=64, hidden=128, num_topk=4, explicitly_destroy=True
    )
    # 64 tokens * 2 ranks * (256 + 13 ints) fits 2 MiB
    assert buffer.num_bytes == 2 << 20
    bigger = ElasticBuffer.get_buffer_size_hint(group, 4096, 4096, 8)
    token = 4096 * 2 + 128  # 25 integers, rounded up to 32 bytes
    assert bigger == -(-4096 * 2 * token // (2 << 20)) * (2 << 20)
    smaller = ElasticBuffer.get_buffer_size_hint(group, 4096, 4096, 8, use_fp8_dispatch=True)
    returned = 4096 * 2 * (4096 * 2 + 64)  # a combine is in bfloat16, and needs more
    assert smaller == -(-returned // (2 << 20)) * (2 << 20)
    assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == (1, 2)
    assert (buffer.rank_idx, buffer.num_ranks) == (group.rank(), 2)
    assert (buffer.scaleout_rank_idx, buffer.scaleup_rank_idx) == (0, group.rank())
    assert buffer.get_theoretical_num_sms(16, 4) == 4
    assert buffer.get_theoretical_num_qps(4) == 65
    assert buffer.get_theoretical_num_qps(24) == buffer.num_allocated_qps == 129
    direct = ElasticBuffer(group, 2 << 20, allow_hybrid_mode=False)
    assert (direct.get_theoretical_num_qps(4), direct.get_theoretical_num_qps(24)) == (4, 9)
    buffer.barrier()
    buffer.destroy()
    buffer.destroy()


def test_interface_of_the_elastic_buffer():
    ranks.run(2, interface_of_the_elastic_buffer)


def test_events():
    event = EventOverlap(EventHandle(), (torch.zeros(1),))
    with event as entered:
        assert entered is event
    assert event.event is not None
    with event(release_handle=True):
        assert event.event is not None
    assert event.event is None
    with event:
        pass
    with pytest.raises(RuntimeError, match="no event to wait for"):
        event.current_stream_wait()


def gradients_stay_out(group):
    b = make_batches(2, (4,), dtype=F64)[group.rank()]
    x, w = b.x.requires_grad_(), b.w.requires_grad_()
    buffer = Buffer(group, 0, 1 << 20, low_latency_mode=True)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(b.idx, 16)
    recv_x, _, recv_w, _, handle, _ = buffer.dispatch(
        x, None, per_rank, None, in_rank, per_expert, b.idx, w
    )
    combined, combined_w, _ = buffer.combine(
        recv_x.requires_grad_(), handle, recv_w.requires_grad_(), bias=x
    )
    y, _, low_handle, _, _ = buffer.low_latency_dispatch(x, b.idx, 4, 16, use_fp8=False)
    low, _, _ = buffer.low_latency_combine(y.requires_grad_(), b.idx, w, low_handle)
    elastic = ElasticBuffer(group, num_max_tokens_per_rank=4, hidden=H)
    rows, _, row_w, elastic_handle, _ = elastic.dispatch(x, b.idx, w, num_experts=16)
    back, back_w, _ = elastic.combine(
        rows.requires_grad_(), elastic_handle, row_w.requires_grad_(), bias=x
    )
    return [t.requires_grad for t in (combined, combined_w, low, back, back_w)]


def test_outputs_are_not_part_of_autograds_graph():
    assert ranks.run(2, gradients_stay_out) == [[False] * 5] * 2


def kept_buffer(group):
    """The memory for a zero-copy combine stays the same until the next low-latency call."""
    x, idx = torch.ones(2, H, dtype=BF16), torch.tensor([[0], [1]])
    buffer = Buffer(group, 0, 1 << 20, low_latency_mode=True)
    _, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 2, 2, use_fp8=False)
    first = buffer.get_next_low_latency_combine_buffer(handle)
    assert buffer.get_next_low_latency_combine_buffer(handle) is first
    buffer.low_latency_dispatch(x, idx, 2, 2, use_fp8=False)
    assert buffer.get_next_low_latency_combine_buffer(handle) is not first


def test_the_combine_buffer_is_kept():
    ranks.run(2, kept_buffer)


def documented_example(group, code):
    b = make_batches(2, SIZES["different"])[group.rank()]
    names = dict(group=group, x=b.x, topk_idx=b.idx, topk_weights=b.w, num_experts=16)
    exec(code, names)
    copies = torch.tensor([len(ranks_of(b, t, 8)) for t in range(b.T)])
    torch.testing.assert_close(names["combined"], b.x * copies.unsqueeze(1))


def test_documented_example():
    text = (Path(__file__).parents[2] / "docs" / "embedded.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    ranks.run(2, documented_example, code)
