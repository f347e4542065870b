"""Placements with guest slots in the drop-ins: DeepEP sees every slot, engines see none of them."""

import pytest
import torch
from recording_buffer import TOPK, E, X, arrived

from lplb_ep import ContractError, Placement
from lplb_ep.deepep import limits

PLACEMENT = Placement([0, 1, 2, 3, 0, 2, -1, -1], 1, num_guests_per_rank=2)
P, ENGINE_P = 8, 6


def test_deep_ep_is_given_every_slot(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    drop_in.get_dispatch_layout(TOPK, E)
    assert arrived(drop_in, "get_dispatch_layout")["num_experts"] == P
    elastic = make("ElasticBuffer", placement=PLACEMENT, num_local_slots=P)
    handle = elastic.dispatch(X, TOPK, E)[-2]
    assert arrived(elastic, "dispatch")["num_experts"] == P
    elastic.dispatch(X, num_experts=E, handle=handle)
    assert arrived(elastic, "dispatch")["num_experts"] == P
    elastic.get_theoretical_num_sms(E, 2)
    assert arrived(elastic, "get_theoretical_num_sms")["num_experts"] == P
    with pytest.raises(ContractError, match=r"num_local_slots must be the slots .*, 8; got 6"):
        make(placement=PLACEMENT, num_local_slots=ENGINE_P)


def test_low_latency_buffers_count_every_slot(make, mode):
    mode("1")
    small = make(placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=4 * 8 * ENGINE_P)
    assert type(small).get_low_latency_rdma_size_hint(4, 8, 1, E) == 4 * 8 * P
    with pytest.raises(ContractError, match=r"num_rdma_bytes is 192, and 8 slots need 256"):
        small.low_latency_dispatch(X, TOPK, 4, E)
    drop_in = make(placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=4 * 8 * P)
    drop_in.low_latency_dispatch(X, TOPK, 4, E)
    assert arrived(drop_in, "low_latency_dispatch")["num_experts"] == P


def test_a_saved_placement_counts_its_guest_slots(make, mode, tmp_path):
    PLACEMENT.save(tmp_path / "placement.json")
    mode("home", LPLB_EP_PLACEMENT=str(tmp_path / "placement.json"))
    drop_in = make()
    assert type(drop_in).get_low_latency_rdma_size_hint(4, 8, 1, E) == 4 * 8 * P
    drop_in.get_dispatch_layout(TOPK, E)
    got = arrived(drop_in, "get_dispatch_layout")
    assert got["num_experts"] == P
    assert torch.equal(got["topk_idx"], TOPK)  # homes are the first slots here


def test_engines_do_not_count_guest_slots(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P, indices="physical")
    assert type(drop_in).get_low_latency_rdma_size_hint(4, 8, 1, ENGINE_P) == 4 * 8 * P
    chosen = torch.tensor([[4, 1], [5, -1], [0, 3], [4, 2]])  # copies that an engine picked
    drop_in.get_dispatch_layout(chosen, ENGINE_P)
    by_slot = arrived(drop_in, "get_dispatch_layout")
    assert by_slot["num_experts"] == P
    logical = make(placement=PLACEMENT, num_local_slots=P)
    logical.get_dispatch_layout(TOPK, E)
    by_expert = arrived(logical, "get_dispatch_layout")["topk_idx"]
    assert torch.equal(by_slot["topk_idx"], by_expert)
    message = r"num_experts must be 6 with physical indices .*beside 2 guest slots.*; got 8$"
    with pytest.raises(ContractError, match=message):
        drop_in.get_dispatch_layout(chosen, P)
    with pytest.raises(ValueError, match=r"topk_idx\[0, 0\] is 6; expected -1 or a slot in \[0, 6"):
        drop_in.get_dispatch_layout(torch.tensor([[6]]), ENGINE_P)


def test_engines_slots_on_several_ranks_are_translated():
    placement = Placement([0, 1, -1, 2, 3, -1], 2, num_guests_per_rank=1)
    from lplb_ep.planning.inputs import logical_picks, num_ids

    assert num_ids(placement, "physical") == 4
    slots = torch.tensor([[0, 1], [2, 3], [-1, 2]])
    assert logical_picks(slots, placement, "physical").tolist() == [[0, 1], [2, 3], [-1, 2]]


def test_deep_eps_limits_count_guest_slots():
    placement = Placement.homes_only(512, 4, 2)
    limit = limits.LEGACY_1_2_1
    limit.check_slots(placement.with_guest_slots(0), None)
    with pytest.raises(ContractError, match="has 130 slots on each of 4 ranks, 2 of them for gues"):
        limit.check_slots(placement, None)
    with pytest.raises(ContractError, match="make the buffer with num_qps_per_rank=130"):
        limit.check_low_latency(placement, 128)
    elastic = limits.ELASTIC
    with pytest.raises(ContractError, match="at most 2048 slots in all"):
        elastic.check_slots(Placement.homes_only(2048, 64, 1), None)
