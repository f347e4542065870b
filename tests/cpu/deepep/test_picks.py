"""Picks of a later call, held against those that were planned, with values and without."""

from types import SimpleNamespace

import pytest
import torch
from recording_buffer import PLACEMENT, TOPK, E, P, X, arrived, planned

from lplb_ep import ContractError
from lplb_ep.deepep import plans
from lplb_ep.deepep.plans import PlannedCall

MASKED = object()


def planned_call(topk_idx, keep_values):
    """Of which slots equal picks. The planner masks them where it is asked to."""
    planner = SimpleNamespace(placement=PLACEMENT, mask=lambda given, slots: MASKED)
    return PlannedCall(None, planner, topk_idx, topk_idx, keep_values)


def is_masked(call, given, allowed=True):
    slots = call.slots_for(given, may_be_masked=allowed)
    assert slots is MASKED or slots is call.slots
    return slots is MASKED


def write(topk_idx):
    topk_idx[2] = -1
    return topk_idx


def write_through_a_view(topk_idx):
    topk_idx.view(-1)[4:6].fill_(-1)
    return topk_idx


@pytest.mark.parametrize(
    ("later", "masked"),
    [
        (lambda t: t, False),
        (write, True),
        (write_through_a_view, True),
        (lambda t: write(t.clone()), True),
    ],
)
@pytest.mark.parametrize("keep_values", [True, False])
def test_masked_picks_are_known_as_such(keep_values, later, masked):
    topk_idx = TOPK.clone()
    call = planned_call(topk_idx, keep_values)
    assert is_masked(call, later(topk_idx)) == masked


def test_equal_picks_in_another_tensor_are_known_by_their_values_only():
    for keep_values in (True, False):
        call = planned_call(TOPK, keep_values)
        assert is_masked(call, TOPK.clone()) != keep_values
        assert not is_masked(call, TOPK.clone(), allowed=False)


def test_inference_tensors_do_not_say_whether_they_were_written_to():
    with torch.inference_mode():
        topk_idx = TOPK.clone()
    assert is_masked(planned_call(topk_idx, False), topk_idx)
    assert not is_masked(planned_call(topk_idx, True), topk_idx)


@pytest.mark.parametrize("keep_values", [True, False])
@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (TOPK[:3], r"\[3, 2\] of torch.int64 on cpu"),
        (TOPK.int(), r"\[4, 2\] of torch.int32 on cpu"),
        (torch.empty(4, 2, dtype=torch.int64, device="meta"), r"\[4, 2\] of torch.int64 on meta"),
        (TOPK.tolist(), "list"),
        (None, "NoneType"),
    ],
)
def test_other_picks_are_refused(keep_values, other, shown):
    message = rf"topk_idx \({shown}\) is not the one that was planned \(\[4, 2\] of torch.int64 on"
    with pytest.raises(ContractError, match=message):
        planned_call(TOPK, keep_values).slots_for(other, may_be_masked=True)


def test_values_are_compared_where_they_are_kept():
    call = planned_call(TOPK, True)
    for other in (TOPK.flip(0), write(TOPK.clone())):
        with pytest.raises(ContractError, match="is not the one that was planned"):
            call.slots_for(other)


def test_picks_that_were_not_written_to_take_the_planned_slots_as_they_are(make, mode, monkeypatch):
    """As on a GPU, where values are not compared."""
    mode("1")
    monkeypatch.setattr(
        plans,
        "PlannedCall",
        lambda state, planner, topk_idx, slots, keep_values, guests: PlannedCall(
            state, planner, topk_idx, slots, False, guests
        ),
    )
    buffer = make(placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=1 << 20)
    topk_idx = TOPK.clone()
    handle = buffer.low_latency_dispatch(X, topk_idx, 4, E)[2]
    slots = arrived(buffer, "low_latency_dispatch")["topk_idx"]
    buffer.low_latency_combine(X, topk_idx, X, handle)
    assert arrived(buffer, "low_latency_combine")["topk_idx"] is slots
    buffer.low_latency_combine(X, write(topk_idx), X, handle)
    expected = write(planned().clone())
    assert torch.equal(arrived(buffer, "low_latency_combine")["topk_idx"], expected)
