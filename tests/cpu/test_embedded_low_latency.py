"""The embedded `Buffer` against loops over every rank's batch: low latency."""

import pytest
import ranks
import torch
from batches import BF16, F32, F64, FP8, SIZES, add, computed, make_batches, nothing, same, stack

from lplb_ep.embedded import Buffer
from lplb_ep.embedded.fp8 import cast_to_fp8

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
