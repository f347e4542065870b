"""The embedded `ElasticBuffer` against loops over every rank's batch."""

import pytest
import ranks
import torch
from batches import (
    BF16,
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

from lplb_ep.embedded import ElasticBuffer


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
    assert nothing(recv_idx[N:]), "no -1, which callers take for none"
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
