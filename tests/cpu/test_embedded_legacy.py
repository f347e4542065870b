"""The embedded `Buffer` against loops over every rank's batch: dispatch and combine."""

import pytest
import ranks
import torch
from batches import (
    BF16,
    F16,
    F32,
    F64,
    FP8,
    SIZES,
    H,
    add,
    computed,
    local_picks,
    make_batches,
    nothing,
    origins,
    ranks_of,
    same,
    stack,
)

from lplb_ep.embedded import Buffer


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
