"""Calls that plan, and those that take a plan: high throughput, and V2."""

import copy
import pickle
import time
import weakref

import pytest
import torch
from recording_buffer import PLACEMENT, TOPK, E, Event, P, X, arrived, planned, targets

import lplb_ep
from lplb_ep import ContractError, Placement, Planner
from lplb_ep.deepep.calls import Call
from lplb_ep.layer import channels
from lplb_ep.planning import planner


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", planned()), ("home", torch.tensor([[0, 1], [2, -1], [0, 3], [0, 2]]))],
)
def test_layout_and_dispatch_see_slots(make, mode, value, expected):
    mode(value)
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    before = TOPK.clone()
    layout = drop_in.get_dispatch_layout(TOPK, E)
    got = arrived(drop_in, "get_dispatch_layout")
    assert got["num_experts"] == P
    assert torch.equal(got["topk_idx"], expected)
    assert torch.equal(TOPK, before)
    x, recv_topk_idx, *_ = drop_in.dispatch(
        X, topk_idx=TOPK, is_token_in_rank=layout[3], topk_weights=X
    )
    assert x is X
    assert torch.equal(recv_topk_idx, expected)
    assert arrived(drop_in, "dispatch")["topk_weights"] is X
    drop_in.dispatch(X, is_token_in_rank=layout[3])
    assert arrived(drop_in, "dispatch").get("topk_idx") is None


def test_two_layouts_in_flight_keep_their_plans(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    other = torch.tensor([[3, 3], [0, 0], [0, 0], [0, 0]])
    first, second = (drop_in.get_dispatch_layout(t, E)[3] for t in (TOPK, other))
    got = drop_in.dispatch(X, topk_idx=TOPK, is_token_in_rank=first)[1]
    assert torch.equal(got, planned())
    got = drop_in.dispatch(X, topk_idx=other, is_token_in_rank=second)[1]
    assert torch.equal(got, planned(topk=other))


def test_plans_live_as_long_as_what_names_them(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    layout = drop_in.get_dispatch_layout(TOPK, E)
    slots = weakref.ref(layout[3]._lplb_planned.slots)
    drop_in.log.clear()
    assert slots() is not None
    del layout
    assert slots() is None


def test_copies_of_what_names_a_plan_have_none(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    mask = drop_in.get_dispatch_layout(TOPK, E)[3]
    for copied in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert torch.equal(copied, mask)
        with pytest.raises(ContractError, match="is not from this buffer's get_dispatch_layout"):
            drop_in.dispatch(X, topk_idx=TOPK, is_token_in_rank=copied)


def test_cached_dispatch_and_combine_plan_nothing(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    planner = next(iter(targets().values()))
    handle, elsewhere = (1, 2, 3), Placement([0, 1], 1)
    with lplb_ep.use(elsewhere):
        drop_in.dispatch(X, handle)
        drop_in.combine(X, handle)
    assert [name for name, _, _ in drop_in.log] == ["dispatch", "combine"]
    for name in ("dispatch", "combine"):
        assert arrived(drop_in, name) == {"x": X, "handle": handle}
    assert sum(planner.num_batches.values()) == 0


def test_internode_dispatch_takes_the_plan(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    layout = drop_in.get_dispatch_layout(TOPK, E)
    got = drop_in.internode_dispatch(X, is_token_in_rank=layout[3], topk_idx=TOPK)[1]
    assert torch.equal(got, planned())


def test_elastic_handles_carry_the_plan(make, mode):
    mode("1")
    drop_in = make("ElasticBuffer", placement=PLACEMENT, num_local_slots=P)
    handle = drop_in.dispatch(X, TOPK, num_experts=E)[3]
    got = arrived(drop_in, "dispatch")
    assert got["num_experts"] == P
    assert torch.equal(got["topk_idx"], planned())
    with lplb_ep.use(Placement([0, 1], 1)):
        drop_in.dispatch(X, num_experts=E, handle=handle)
    got = arrived(drop_in, "dispatch")
    assert got["num_experts"] == P
    assert got["handle"] is handle
    assert got.get("topk_idx") is None
    drop_in.dispatch(X, handle=handle)
    assert arrived(drop_in, "dispatch").get("num_experts") is None
    drop_in.get_theoretical_num_sms(E, 2)
    assert arrived(drop_in, "get_theoretical_num_sms")["num_experts"] == P


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_index_dtype_that_comes_in_goes_out(make, mode, dtype):
    mode("1")
    drop_in = make("ElasticBuffer", placement=PLACEMENT, num_local_slots=P)
    assert drop_in.dispatch(X, TOPK.to(dtype), E)[1].dtype == dtype


def test_physical_indices_are_planned_by_their_experts(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P, indices="physical")
    chosen = torch.tensor([[4, 1], [5, -1], [0, 3], [4, 2]])  # copies that an engine picked
    layout = drop_in.get_dispatch_layout(chosen, P)
    assert torch.equal(arrived(drop_in, "get_dispatch_layout")["topk_idx"], planned())
    got = drop_in.dispatch(X, topk_idx=chosen, is_token_in_rank=layout[3])[1]
    assert torch.equal(got, planned())


def test_physical_indices_may_not_name_unused_slots(make, mode):
    mode("1")
    placement = Placement([0, 1, -1, 0], 1)
    drop_in = make(placement=placement, num_local_slots=4, indices="physical")
    with pytest.raises(ValueError, match="slot 2, which holds no expert"):
        drop_in.get_dispatch_layout(torch.tensor([[2]]), 4)
    with pytest.raises(ValueError, match=r"topk_idx\[0, 0\] is 4; expected -1 or .* \[0, 4\)"):
        drop_in.get_dispatch_layout(torch.tensor([[4]]), 4)


@pytest.mark.parametrize(
    ("indices", "num_experts", "message"),
    [
        ("logical", P, "num_experts must be 4 with logical indices .*; got 6.*LPLB_EP_INDICES"),
        ("logical", 5, "num_experts must be 4 with logical indices .*; got 5$"),
        ("physical", E, "num_experts must be 6 with physical indices .*; got 4.*LPLB_EP_INDICES"),
    ],
)
def test_num_experts_that_does_not_fit_is_refused(make, mode, indices, num_experts, message):
    mode("1", LPLB_EP_INDICES=indices)
    for name in ("Buffer", "ElasticBuffer"):
        drop_in = make(name, placement=PLACEMENT, num_local_slots=P)
        args = (TOPK, num_experts) if name == "Buffer" else (X, TOPK, num_experts)
        planning = getattr(drop_in, "get_dispatch_layout" if name == "Buffer" else "dispatch")
        with pytest.raises(ContractError, match=message):
            planning(*args)
        assert drop_in.log == []


@pytest.mark.parametrize("value", ["1", "home"])
def test_slots_where_experts_belong_are_refused(make, mode, value):
    mode(value)
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    with pytest.raises(ValueError, match=r"topk_idx\[1, 0\] is 5; expected -1 or .* \[0, 4\)"):
        drop_in.get_dispatch_layout(torch.tensor([[0, 1], [5, 0]]), E)


def test_foreign_layouts_and_indices_are_refused(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    layout = drop_in.get_dispatch_layout(TOPK, E)
    with pytest.raises(ContractError, match="is_token_in_rank is not from this buffer"):
        drop_in.dispatch(X, topk_idx=TOPK, is_token_in_rank=layout[3].clone())
    for other in (TOPK[:3], TOPK.flip(0), torch.zeros_like(TOPK)):
        with pytest.raises(ContractError, match="is not the one that was planned"):
            drop_in.dispatch(X, topk_idx=other, is_token_in_rank=layout[3])
    drop_in.dispatch(X, topk_idx=TOPK.clone(), is_token_in_rank=layout[3])


def test_picks_changed_between_layout_and_dispatch_are_refused(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    topk = TOPK.clone()
    layout = drop_in.get_dispatch_layout(topk, E)
    topk[2] = -1
    with pytest.raises(ContractError, match="is not the one that was planned"):
        drop_in.dispatch(X, topk_idx=topk, is_token_in_rank=layout[3])


def test_what_is_no_tensor_is_named(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=1 << 20)
    for topk in (None, TOPK.tolist(), TOPK.numpy()):
        with pytest.raises(TypeError, match=r"topk_idx must be a tensor \[T, K\]; got a"):
            drop_in.get_dispatch_layout(topk, E)
    with pytest.raises(ContractError, match=r"x must be a tensor \[tokens, hidden\]; got list"):
        drop_in.low_latency_dispatch([1.0], TOPK, 4, E)


@pytest.mark.parametrize("value", ["1", "home"])
def test_no_index_is_read_before_it_is_rewritten(make, mode, monkeypatch, value):
    """The caller's event is waited for, the plan made (slowly), a fresh event captured after it,
    and only that one handed on."""
    mode(value)
    log = []
    for name in ("route", "home"):
        original = getattr(Planner, name)

        def slow(self, *args, _original=original, **kwargs):
            log.append(("planning", (), {}))
            time.sleep(0.05)
            out = _original(self, *args, **kwargs)
            log.append(("rewritten", (), {}))
            return out

        monkeypatch.setattr(Planner, name, slow)

    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    drop_in.log = log
    stale = Event(log, "stale")
    layout = drop_in.get_dispatch_layout(TOPK, E, previous_event=stale, async_finish=True)
    assert [entry[:2] if entry[0] == "wait" else entry[0] for entry in log] == [
        ("wait", "stale"),
        "planning",
        "rewritten",
        "capture",
        "get_dispatch_layout",
    ]
    assert arrived(drop_in, "get_dispatch_layout")["previous_event"].name == "fresh"
    # Megatron-Core hands dispatch the event that it captured before the layout.
    log.clear()
    drop_in.dispatch(X, topk_idx=TOPK, is_token_in_rank=layout[3], previous_event=stale)
    assert [entry[0] for entry in log] == ["wait", "capture", "dispatch"]
    assert arrived(drop_in, "dispatch")["previous_event"].name == "fresh"

    elastic = make("ElasticBuffer", placement=PLACEMENT, num_local_slots=P)
    log.clear()
    elastic.log = log
    elastic.dispatch(X, TOPK, E, previous_event=stale)
    assert [entry[0] for entry in log] == ["wait", "planning", "rewritten", "capture", "dispatch"]
    assert arrived(elastic, "dispatch")["previous_event"].name == "fresh"


def test_no_event_stays_no_event(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    empty = Event([], "empty")
    empty.event = None  # deep_ep.EventOverlap() carries none
    for event in (None, empty):
        drop_in.log.clear()
        drop_in.get_dispatch_layout(TOPK, E, previous_event=event)
        assert [entry[0] for entry in drop_in.log] == ["get_dispatch_layout"]
        assert arrived(drop_in, "get_dispatch_layout")["previous_event"] is event


def test_every_plan_is_checked_on_demand(make, mode, monkeypatch):
    checked = []
    monkeypatch.setattr(planner, "check_plan", lambda *args: checked.append(args))
    for value in ("0", "1"):
        mode("1", LPLB_EP_CHECK=value)
        channels.clear()  # which keep what they were made with
        make(placement=PLACEMENT, num_local_slots=P).get_dispatch_layout(TOPK, E)
    ((plan, topk, placement, rank, *_),) = checked
    assert torch.equal(plan.topk_idx, planned())
    assert (topk is TOPK, placement, rank) == (True, PLACEMENT, 0)


def test_what_became_of_a_plan_is_raised_when_deep_ep_gives_up(make, mode, monkeypatch):
    """It waits for the very rank whose counts did not come."""
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    layout = drop_in.get_dispatch_layout(TOPK, E)
    told = lplb_ep.RankError("ranks [3] sent no counts within 60 s")

    def raise_errors(self, *, wait):
        assert not wait
        raise told

    monkeypatch.setattr(Planner, "raise_errors", raise_errors)
    # While DeepEP goes on, so does this rank, or the others would be left alone in the combine.
    drop_in.dispatch(X, topk_idx=TOPK, is_token_in_rank=layout[3])
    failure = RuntimeError("DeepEP error: CPU recv timeout")
    monkeypatch.setattr(Call, "forward", lambda self: (_ for _ in ()).throw(failure))
    with pytest.raises(lplb_ep.RankError) as caught:
        drop_in.dispatch(X, topk_idx=TOPK, is_token_in_rank=layout[3])
    assert caught.value is told
    assert caught.value.__context__ is failure


@pytest.mark.parametrize("counts", ["nvshmem", "ipc", "torch", "auto"])
def test_at_home_it_does_not_matter_how_counts_would_travel(make, mode, monkeypatch, counts):
    mode("home")
    monkeypatch.setenv("LPLB_EP_COUNTS", counts)
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    layout = drop_in.get_dispatch_layout(TOPK, E)
    drop_in.dispatch(X, topk_idx=TOPK, is_token_in_rank=layout[3])
    assert torch.equal(arrived(drop_in, "dispatch")["topk_idx"], TOPK)  # homes are slots 0 to 3
