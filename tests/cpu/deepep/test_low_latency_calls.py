"""Low-latency calls, and the buffers that they fit into."""

import pytest
import torch
from recording_buffer import PLACEMENT, TOPK, E, P, X, arrived, planned, recorder

from lplb_ep import ContractError, Placement
from lplb_ep.deepep import drop_in as buffer


def test_low_latency_calls_see_slots(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=4 * 8 * P)
    handle = drop_in.low_latency_dispatch(X, TOPK, 4, E, use_fp8=False)[2]
    got = arrived(drop_in, "low_latency_dispatch")
    assert got["num_experts"] == P
    assert torch.equal(got["topk_idx"], planned())
    assert len(handle) == 5
    assert handle[4] == P
    drop_in.low_latency_combine(X, TOPK, X, handle)
    got = arrived(drop_in, "low_latency_combine")
    assert torch.equal(got["topk_idx"], planned())
    assert got["handle"] is handle
    drop_in.clean_low_latency_buffer(4, 8, E)
    assert arrived(drop_in, "clean_low_latency_buffer")["num_experts"] == P
    with pytest.raises(ContractError, match="handle is not from this buffer"):
        drop_in.low_latency_combine(X, TOPK, X, (X.clone(), *handle[1:]))
    with pytest.raises(ContractError, match="is not the one that was planned"):
        drop_in.low_latency_combine(X, TOPK.flip(0), X, handle)


@pytest.mark.parametrize("in_place", [True, False])
def test_picks_masked_before_a_low_latency_combine_stay_masked(make, mode, in_place):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=1 << 20)
    topk = TOPK.clone()
    handle = drop_in.low_latency_dispatch(X, topk, 4, E)[2]
    masked = topk if in_place else topk.clone()
    masked[2] = -1
    drop_in.low_latency_combine(X, masked, X, handle)
    expected = planned()
    expected[2] = -1
    assert torch.equal(arrived(drop_in, "low_latency_combine")["topk_idx"], expected)
    masked[0, 0] = 3
    with pytest.raises(ContractError, match="is not the one that was planned"):
        drop_in.low_latency_combine(X, masked, X, handle)


def test_a_buffer_sized_for_the_experts_is_refused_with_both_sizes(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=4 * 8 * E)
    with pytest.raises(ContractError, match=r"num_rdma_bytes is 128, and 6 slots need 192"):
        drop_in.low_latency_dispatch(X, TOPK, 4, E)
    assert drop_in.log == []


def test_low_latency_layers_of_one_buffer_have_the_same_number_of_slots(make, mode):
    mode("1")
    drop_in = make(num_rdma_bytes=1 << 20)
    drop_in.view(PLACEMENT).low_latency_dispatch(X, TOPK, 4, E)
    larger = drop_in.view(Placement([0, 1, 2, 3, 0, 2, 1, 0], 1))
    with pytest.raises(ContractError, match="placements of 6 slots, and this one has 8"):
        larger.low_latency_dispatch(X, TOPK, 4, E)


def test_size_hints_count_slots(make, mode, tmp_path):
    def hint(num_experts):
        return type(drop_in).get_low_latency_rdma_size_hint(4, 8, 1, num_experts) // 32

    mode("0")
    drop_in = make()
    assert hint(E) == E
    mode("1")
    assert hint(E) == E
    mode("1", LPLB_EP_NUM_PHYSICAL_EXPERTS="5")
    assert hint(E) == 5
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    assert hint(E) == P
    mode("1", LPLB_EP_NUM_PHYSICAL_EXPERTS="7")
    assert hint(E) == 7
    mode("1", LPLB_EP_NUM_PHYSICAL_EXPERTS="0")
    drop_in.view(Placement([0, 1, 2, 3, 0, 2, 1, 0], 1))
    assert hint(E) == 8  # the largest
    assert hint(9) == 9  # of another model
    assert type(drop_in).num_sms == 20


def test_a_subclass_may_size_the_buffer_its_own_way(mode, group):
    mode("1")

    class Padded(buffer.drop_in_of(recorder().Buffer)):
        @staticmethod
        def get_low_latency_rdma_size_hint(*args):
            return 1000 + buffer.drop_in_of(recorder().Buffer).get_low_latency_rdma_size_hint(*args)

    drop_in = Padded(group, placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=4 * 8 * P)
    drop_in.low_latency_dispatch(X, TOPK, 4, E)
    assert arrived(drop_in, "low_latency_dispatch")["num_experts"] == P


def test_a_saved_placement_counts_before_the_buffer_is_made(make, mode, tmp_path):
    PLACEMENT.save(tmp_path / "placement.json")
    mode("home", LPLB_EP_PLACEMENT=str(tmp_path / "placement.json"))
    cls = buffer.drop_in_of(recorder().Buffer)
    assert cls.get_low_latency_rdma_size_hint(4, 8, 1, E) == 4 * 8 * P
    drop_in = make()
    drop_in.get_dispatch_layout(TOPK, E)
    assert arrived(drop_in, "get_dispatch_layout")["num_experts"] == P


def test_calls_that_count_experts_count_the_slots_in_force(make, mode):
    mode("1")
    drop_in = make(num_rdma_bytes=1 << 20)
    view, larger = drop_in.view(PLACEMENT), drop_in.view(Placement([0, 1, 2, 3, 0, 2, 1, 0], 1))

    def cleaned(buffer):
        buffer.clean_low_latency_buffer(4, 8, E)
        return arrived(drop_in, "clean_low_latency_buffer")["num_experts"]

    assert [cleaned(b) for b in (view, larger, drop_in)] == [P, 8, 8]
    view.low_latency_dispatch(X, TOPK, 4, E)  # lays the buffer out
    assert [cleaned(b) for b in (view, larger, drop_in)] == [P, P, P]


def test_a_buffer_that_comes_too_late_for_its_nvshmem_is_refused(group, mode, monkeypatch):
    mode("1")

    class Buffer(recorder().Buffer):
        def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False):
            self.group, self.num_rdma_bytes = group, num_rdma_bytes

    drop_in = buffer.drop_in_of(Buffer)
    monkeypatch.setattr(buffer, "has_started_nvshmem", lambda: True)
    drop_in(group, 1 << 20)
    with pytest.raises(ContractError, match="NVSHMEM was started for the counts already"):
        drop_in(group, 0, 1 << 20, low_latency_mode=True)
    monkeypatch.setattr(buffer, "has_started_nvshmem", lambda: False)
    drop_in(group, 0, 1 << 20, low_latency_mode=True)
