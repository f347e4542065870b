"""Calls that the drop-in passes on."""

import logging

import pytest
import torch
from recording_buffer import (
    PLACEMENT,
    TOPK,
    E,
    Event,
    Handle,
    P,
    X,
    arrived,
    parameters,
    planned,
    recorder,
)

import lplb_ep
from lplb_ep import ContractError
from lplb_ep.deepep import drop_in as buffer
from lplb_ep.layer import channels

CALLS = {
    "Buffer": [
        ("get_dispatch_layout", (TOPK, E), {}),
        ("get_dispatch_layout", (TOPK,), {"num_experts": 7, "async_finish": True}),
        ("dispatch", (X,), {"topk_idx": TOPK, "is_token_in_rank": TOPK > 0, "topk_weights": X}),
        ("dispatch", (X, (1, 2)), {}),
        ("combine", (X, (1,)), {}),
        ("clean_low_latency_buffer", (4, 8, E), {}),
        ("low_latency_dispatch", (X, TOPK, 4), {"num_experts": E}),
        ("low_latency_combine", (X, TOPK, X, (X, X, 4, 8, E)), {"out": X}),
    ],
    "ElasticBuffer": [
        ("dispatch", (X, TOPK), {"num_experts": E}),
        ("dispatch", (X,), {"handle": Handle()}),
        ("combine", (X,), {"handle": Handle()}),
        ("get_theoretical_num_sms", (E, 2), {}),
    ],
}


@pytest.mark.parametrize(
    ("name", "method", "args", "kwargs"),
    [(name, *call) for name, calls in CALLS.items() for call in calls],
)
def test_off_the_very_same_arguments_arrive(make, mode, name, method, args, kwargs):
    mode("0")
    drop_in = make(name)
    getattr(drop_in, method)(*args, **kwargs)
    ((called, got, named),) = drop_in.log
    assert called == method
    assert len(got) == len(args)
    assert all(a is b for a, b in zip(got, args, strict=True))
    assert list(named) == list(kwargs)
    assert all(named[key] is kwargs[key] for key in kwargs)


@pytest.mark.parametrize("value", ["1", "home"])
@pytest.mark.parametrize("name", CALLS)
def test_before_any_placement_calls_pass_with_one_warning(make, mode, caplog, name, value):
    mode(value)
    drop_in = make(name)
    for method, args, kwargs in CALLS[name]:
        drop_in.log.clear()
        getattr(drop_in, method)(*args, **kwargs)
        ((called, _, _),) = drop_in.log
        assert called == method
        got = arrived(drop_in, method)
        expected = {**dict(zip(parameters(drop_in, method), args, strict=False)), **kwargs}
        assert all(got[key] is expected[key] for key in expected)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "no placement is registered on this buffer" in caplog.text


def test_off_every_way_to_give_a_placement_raises(make, mode, tmp_path):
    mode("0")
    with pytest.raises(ContractError, match="LPLB_EP is 0"):
        make(placement=PLACEMENT, num_local_slots=P)
    drop_in = make()
    with pytest.raises(ContractError, match=r"view.* LPLB_EP is 0"):
        drop_in.view(PLACEMENT)
    with lplb_ep.use(PLACEMENT), pytest.raises(ContractError, match=r"use.* LPLB_EP is 0"):
        drop_in.get_dispatch_layout(TOPK, E)
    with pytest.raises(ContractError, match=r"attach.* LPLB_EP is 0"):
        lplb_ep.attach(torch.nn.Linear(1, 1), PLACEMENT, num_local_slots=P)
    PLACEMENT.save(tmp_path / "placement.json")
    mode("0", LPLB_EP_PLACEMENT=str(tmp_path / "placement.json"))
    with pytest.raises(ContractError, match="LPLB_EP is 0"):
        make()
    assert drop_in.log == []


@pytest.mark.parametrize(
    ("name", "method", "args", "kwargs"),
    [(name, *call) for name, calls in CALLS.items() for call in calls],
)
def test_off_an_engines_slots_pass_whatever_placement_it_gave(
    make, mode, name, method, args, kwargs
):
    """It has chosen copies itself: its own choice is what balance is compared with."""
    mode("0", LPLB_EP_INDICES="physical")
    drop_in = make(name, placement=PLACEMENT, num_local_slots=P)
    lplb_ep.attach(torch.nn.Linear(1, 1), PLACEMENT, num_local_slots=P, buffer=drop_in)
    for buffer_ in (drop_in, drop_in.view(PLACEMENT), drop_in.view(PLACEMENT, slot=1)):
        with lplb_ep.use(PLACEMENT):
            getattr(buffer_, method)(*args, **kwargs)
        ((called, got, named),) = drop_in.log
        assert called == method
        assert all(a is b for a, b in zip(got, args, strict=True))
        assert all(named[key] is kwargs[key] for key in kwargs)
        drop_in.log.clear()
    assert not any(channels.values())
    with pytest.raises(ContractError, match="num_local_slots"):
        make(name, placement=PLACEMENT, num_local_slots=P + 1)


def test_deep_eps_own_calls_inside_a_call_are_left_alone(group, mode):
    """Across nodes its dispatch calls internode_dispatch, with slots and a right event."""
    mode("1")

    class Buffer(recorder().Buffer):
        def dispatch(
            self, x, is_token_in_rank=None, topk_idx=None, previous_event=None, handle=None
        ):
            return self.internode_dispatch(x, handle, is_token_in_rank, topk_idx, previous_event)

    drop_in = buffer.drop_in_of(Buffer)(group, placement=PLACEMENT, num_local_slots=P)
    layout = drop_in.get_dispatch_layout(TOPK, E)
    drop_in.log.clear()
    got = drop_in.dispatch(X, layout[3], TOPK, Event(drop_in.log, "given"))[1]
    assert torch.equal(got, planned())
    assert [entry[0] for entry in drop_in.log] == ["wait", "capture", "internode_dispatch"]


def test_a_buffer_and_its_views_are_destroyed_in_any_order(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    view = drop_in.view(PLACEMENT)
    view.destroy()
    drop_in.destroy()
    view.destroy()
    assert [name for name, *_ in drop_in.log].count("destroy") == 1


def test_slots_of_an_engine_pass_where_no_placement_is_in_force(make, mode, caplog):
    """They are right as they are. Experts would be taken for slots, which is an error."""
    mode("1", LPLB_EP_INDICES="physical")
    drop_in = make()
    drop_in.view(PLACEMENT)
    layout = drop_in.get_dispatch_layout(TOPK, P)
    drop_in.dispatch(X, is_token_in_rank=layout[3], topk_idx=TOPK)
    drop_in.low_latency_combine(X, TOPK, X, (X, X, 4, 8, P))
    for method in ("get_dispatch_layout", "dispatch", "low_latency_combine"):
        assert arrived(drop_in, method)["topk_idx"] is TOPK
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "no placement is in force for a call" in caplog.text
