"""The embedded buffers' interface is that of DeepEP's documentation."""

import inspect
import re
from pathlib import Path

import pytest
import ranks
import torch
from batches import BF16, F64, SIZES, H, make_batches, nothing, ranks_of

from lplb_ep import embedded
from lplb_ep.embedded import (
    Buffer,
    Config,
    ElasticBuffer,
    EPHandle,
    EventHandle,
    EventOverlap,
)

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


def held_too_long(group):
    """Results of low-latency calls are there until the call after the next: DeepEP has two buffers.

    Two micro-batches may be under way at a time, each dispatched before the other is combined.
    """
    x = torch.full((2, H), 1.0 + group.rank(), dtype=BF16)
    idx, w = torch.tensor([[0], [1]]), torch.ones(2, 1)
    buffer = Buffer(group, 0, 1 << 20, low_latency_mode=True)

    def dispatch():
        return buffer.low_latency_dispatch(x, idx, 2, 2, use_fp8=False)

    (one, _, of_one, _, _), (two, _, of_two, _, _) = dispatch(), dispatch()
    kept = one.clone()
    first, _, _ = buffer.low_latency_combine(one, idx, w, of_one)
    assert nothing(one), "the third call takes the memory of the first"
    assert not nothing(two)
    second, _, _ = buffer.low_latency_combine(two, idx, w, of_two)
    assert first.equal(x)
    assert second.equal(x)
    dispatch()
    assert nothing(first)
    assert not nothing(kept)


def test_results_of_low_latency_calls_do_not_last():
    ranks.run(2, held_too_long)


def disagree(group, name):
    """One rank's size is another's with one more."""
    rank, b = group.rank(), make_batches(2, (4, 4))[group.rank()]
    sizes = {"x": H, "num_experts": 16, "slots": 4}
    sizes[name] += {"x": 128, "num_experts": 2, "slots": 1}[name] * rank
    x = torch.zeros(4, sizes["x"], dtype=BF16)
    buffer = Buffer(group, 1 << 20, 1 << 22, low_latency_mode=True)
    elastic = ElasticBuffer(group, num_max_tokens_per_rank=sizes["slots"], hidden=H)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(b.idx, sizes["num_experts"])
    calls = {
        "low latency": lambda: buffer.low_latency_dispatch(
            x, b.idx, sizes["slots"], sizes["num_experts"], use_fp8=False
        ),
        "elastic": lambda: elastic.dispatch(x, b.idx, b.w, num_experts=sizes["num_experts"]),
        "legacy": lambda: buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, b.idx, b.w),
    }
    if name == "slots":
        del calls["legacy"]  # it has no such limit
    said = {}
    for call, make in calls.items():
        with pytest.raises(ValueError, match="must be the same on all ranks; got ") as error:
            make()
        said[call] = str(error.value)
    return said


@pytest.mark.parametrize("name", ["x", "num_experts", "slots"])
def test_sizes_that_differ_between_ranks_are_named_on_all(name):
    first, second = ranks.run(2, disagree, name)
    assert first == second
    shown = {"slots": "num_max_"}.get(name, name)
    assert all(message.startswith(shown) for message in first.values())
