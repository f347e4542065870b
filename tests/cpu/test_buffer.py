"""The drop-in contract, on an inner buffer that records what reaches it."""

import functools
import gc
import inspect
import logging
import pickle
import sys
import threading
import time
import types
import weakref

import pytest
import ranks
import torch
import torch.distributed as dist

import lplb_ep
from lplb_ep import ContractError, Placement, Planner
from lplb_ep.deepep import context as layers
from lplb_ep.deepep import drop_in as buffer
from lplb_ep.deepep import patch as patching
from lplb_ep.deepep.calls import Call
from lplb_ep.layer import channels, layer_of
from lplb_ep.planning import planner
from lplb_ep.planning.plan import Status

PLACEMENT = Placement([0, 1, 2, 3, 0, 2], 1)
E, P = 4, 6
TOPK = torch.tensor([[0, 1], [2, -1], [0, 3], [0, 2]])
X = torch.zeros(4, 8)


class Event:
    def __init__(self, log, name):
        self.log, self.name, self.event = log, name, object()

    def current_stream_wait(self):
        self.log.append(("wait", self.name))


def recorded(method):
    """Writes every call down as it arrives: name, positional and keyword arguments."""

    @functools.wraps(method)
    def record(self, *args, **kwargs):
        self.log.append((method.__name__, args, kwargs))
        return method(self, *args, **kwargs)

    return record


def recorder():
    """A module with classes of DeepEP's names and signatures that move nothing."""

    class Recording:
        def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, explicitly_destroy=False):
            self.group, self.num_rdma_bytes, self.log = group, num_rdma_bytes, []
            self.runtime = types.SimpleNamespace(destroy=lambda: None)

        def capture(self):
            self.log.append(("capture", (), {}))
            return Event(self.log, "fresh")

        @recorded
        def destroy(self):
            self.runtime.destroy()
            self.runtime = None

    class Buffer(Recording):
        """As deep_ep.Buffer."""

        num_sms = 20

        @staticmethod
        def get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        ):
            return num_max_dispatch_tokens_per_rank * hidden * num_experts

        @recorded
        def get_dispatch_layout(
            self, topk_idx, num_experts, previous_event=None, async_finish=False
        ):
            in_rank = (topk_idx >= 0).any(1, keepdim=True)
            return torch.zeros(1), None, torch.zeros(num_experts), in_rank, None

        @recorded
        def dispatch(
            self,
            x,
            handle=None,
            num_tokens_per_rank=None,
            num_tokens_per_rdma_rank=None,
            is_token_in_rank=None,
            num_tokens_per_expert=None,
            topk_idx=None,
            topk_weights=None,
            previous_event=None,
        ):
            return x, topk_idx, topk_weights, [], (is_token_in_rank,), None

        @recorded
        def internode_dispatch(
            self, x, handle=None, is_token_in_rank=None, topk_idx=None, previous_event=None
        ):
            return x, topk_idx, None, [], (is_token_in_rank,), None

        @recorded
        def combine(self, x, handle, topk_weights=None):
            return x, None, None

        @recorded
        def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts):
            pass

        @recorded
        def low_latency_dispatch(
            self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, use_fp8=True
        ):
            handle = (torch.zeros(3), torch.zeros(3), 4, x.size(1), num_experts)
            return x, torch.zeros(num_experts), handle, None, None

        @recorded
        def low_latency_combine(self, x, topk_idx, topk_weights, handle, out=None):
            return x, None, None

    class EPHandle:
        pass

    class ElasticBuffer(Recording):
        """As deep_ep.ElasticBuffer."""

        @recorded
        def get_theoretical_num_sms(self, num_experts, num_topk):
            return 4

        @recorded
        def dispatch(self, x, topk_idx=None, num_experts=None, previous_event=None, handle=None):
            return x, topk_idx, None, handle or EPHandle(), None

        @recorded
        def combine(self, x, handle):
            return x, None, None

    module = types.ModuleType("deep_ep")
    module.Buffer, module.ElasticBuffer, module.EPHandle = Buffer, ElasticBuffer, EPHandle
    return module


@pytest.fixture
def mode(monkeypatch):
    """Sets LPLB_EP, and further variables; the replicas' weights are taken to be valid."""

    def set_mode(value, **others):
        for variable, setting in {"LPLB_EP": value, **others}.items():
            monkeypatch.setenv(variable, setting)

    monkeypatch.setenv("LPLB_EP_REPLICAS", "valid")
    return set_mode


@pytest.fixture
def group(tmp_path):
    """A gloo group of one rank, in this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    channels.clear()
    dist.destroy_process_group()


@pytest.fixture
def make(group):
    """Makes a drop-in over the recorder: `make("Buffer", placement=...)`."""

    def make_drop_in(name="Buffer", **kwargs):
        return buffer.drop_in_of(getattr(recorder(), name))(group, **kwargs)

    return make_drop_in


def targets():
    """The channels of the one group: (layer, slot) → planner."""
    found = channels.get(dist.group.WORLD, {})
    assert len({key[:2] for key in found}) == len(found)
    return {key[:2]: planner for key, planner in found.items()}


def planned(placement=PLACEMENT, topk=TOPK):
    counts = lplb_ep.planning.reference.count(topk, placement.num_experts)[None]
    return Planner(placement, rank=0, counts="given")(topk, counts=counts).topk_idx


def arrived(drop_in, name):
    """The arguments of the last call of that name to reach the inner buffer, by name."""
    (args, kwargs) = [entry[1:] for entry in drop_in.log if entry[0] == name][-1]
    return {**dict(zip(parameters(drop_in, name), args, strict=False)), **kwargs}


def parameters(drop_in, name):
    return list(inspect.signature(getattr(drop_in, name)).parameters)


# --- passed on -------------------------------------------------------------------------------


class Handle:
    pass


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


# --- planned ---------------------------------------------------------------------------------


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
    assert len(drop_in._lplb_state.planned) == 1
    drop_in.log.clear()
    del layout
    gc.collect()
    assert len(drop_in._lplb_state.planned) == 0


def test_cached_dispatch_and_combine_plan_nothing(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    planner = next(iter(targets().values()))
    handle, elsewhere = (1, 2, 3), Placement([0, 1], 1)
    with lplb_ep.use(elsewhere):
        drop_in.dispatch(X, handle)
        drop_in.combine(X, handle)
    assert [(name, args) for name, args, _ in drop_in.log] == [
        ("dispatch", (X, handle)),
        ("combine", (X, handle)),
    ]
    assert sum(planner.num_batches.values()) == 0


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
    for name in CALLS:
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


# --- events ----------------------------------------------------------------------------------


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


# --- low latency -----------------------------------------------------------------------------


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


def test_a_buffer_sized_for_the_experts_is_refused_with_both_sizes(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=4 * 8 * E)
    with pytest.raises(ContractError, match=r"num_rdma_bytes is 128, and 6 slots need 192"):
        drop_in.low_latency_dispatch(X, TOPK, 4, E)
    assert drop_in.log == []


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


def test_a_saved_placement_counts_before_the_buffer_is_made(make, mode, tmp_path):
    PLACEMENT.save(tmp_path / "placement.json")
    mode("home", LPLB_EP_PLACEMENT=str(tmp_path / "placement.json"))
    cls = buffer.drop_in_of(recorder().Buffer)
    assert cls.get_low_latency_rdma_size_hint(4, 8, 1, E) == 4 * 8 * P
    drop_in = make()
    drop_in.get_dispatch_layout(TOPK, E)
    assert arrived(drop_in, "get_dispatch_layout")["num_experts"] == P


# --- V2 --------------------------------------------------------------------------------------


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


# --- layers ----------------------------------------------------------------------------------


OTHER = Placement([3, 2, 1, 0], 1)


def slots_seen(drop_in):
    return arrived(drop_in, "get_dispatch_layout")["topk_idx"]


def test_views_share_the_buffer_and_have_their_own_placement(make, mode):
    mode("1")
    drop_in = make()
    one, two = drop_in.view(PLACEMENT), drop_in.view(OTHER)
    assert isinstance(one, type(drop_in))
    assert one.log is drop_in.log
    for _ in range(2):
        one.get_dispatch_layout(TOPK, E)
        assert torch.equal(slots_seen(drop_in), planned())
        layout = two.get_dispatch_layout(TOPK, E)
        assert torch.equal(slots_seen(drop_in), planned(OTHER))
    with lplb_ep.use(PLACEMENT):  # the view knows better
        two.get_dispatch_layout(TOPK, E)
    assert torch.equal(slots_seen(drop_in), planned(OTHER))
    again = two.view(PLACEMENT)
    again.get_dispatch_layout(TOPK, E)
    assert torch.equal(slots_seen(drop_in), planned())
    # A layout made through one view is known to all.
    drop_in.dispatch(X, topk_idx=TOPK, is_token_in_rank=layout[3])
    assert torch.equal(arrived(drop_in, "dispatch")["topk_idx"], planned(OTHER))
    one.destroy()
    assert drop_in.runtime is None
    assert two.runtime is None


def test_micro_batch_slots_have_channels_of_their_own(make, mode):
    mode("1")
    drop_in = make()
    drop_in.view(PLACEMENT)
    drop_in.view(PLACEMENT)
    assert len(targets()) == 1
    drop_in.view(PLACEMENT, slot=1)
    assert len(targets()) == 2
    make().view(PLACEMENT)  # a buffer that replaces another finds the channels there
    assert len(targets()) == 2


def test_of_two_equal_placements_only_the_stale_layer_plans_stale(make, mode, monkeypatch):
    mode("1")
    monkeypatch.setenv("LPLB_EP_REPLICAS", "tracked")
    first, second = lplb_ep.Layer(PLACEMENT), lplb_ep.Layer(PLACEMENT)
    copy = pickle.loads(pickle.dumps(PLACEMENT))
    assert copy == PLACEMENT
    assert layer_of(copy) is not layer_of(PLACEMENT)
    drop_in = make()
    first.mark_valid()
    for target in (first, second, copy):
        drop_in.view(target).get_dispatch_layout(TOPK, E)
    with lplb_ep.use(second, slot=1):
        drop_in.get_dispatch_layout(TOPK, E)
    fared = {target: next(iter(planner.num_batches)) for target, planner in targets().items()}
    stale = dict.fromkeys([(second, 0), (layer_of(copy), 0), (second, 1)], Status.STALE)
    assert fared == {(first, 0): Status.OPTIMAL, **stale}


def test_a_placement_from_the_environment_is_one_layer_for_all_buffers(
    make, mode, monkeypatch, tmp_path
):
    mode("1")
    PLACEMENT.save(tmp_path / "p.json")
    monkeypatch.setenv("LPLB_EP_PLACEMENT", str(tmp_path / "p.json"))
    monkeypatch.setenv("LPLB_EP_REPLICAS", "tracked")
    buffers = [make() for _ in range(3)]
    ((layer, _),) = targets()
    layer.mark_valid()
    for drop_in in buffers:
        drop_in.get_dispatch_layout(TOPK, E)
    assert targets()[layer, 0].num_batches == {Status.OPTIMAL: 3}


def test_use_is_in_force_inside_only(make, mode):
    mode("1")
    drop_in = make()
    with lplb_ep.use(PLACEMENT):
        drop_in.get_dispatch_layout(TOPK, E)
        assert torch.equal(slots_seen(drop_in), planned())
        with lplb_ep.use(OTHER):
            drop_in.get_dispatch_layout(TOPK, E)
            assert torch.equal(slots_seen(drop_in), planned(OTHER))
        drop_in.get_dispatch_layout(TOPK, E)
        assert torch.equal(slots_seen(drop_in), planned())
    with pytest.raises(ContractError, match="no placement is in force"):
        drop_in.get_dispatch_layout(TOPK, E)


class Layer(torch.nn.Module):
    def __init__(self, drop_in, num_slots=P):
        super().__init__()
        self.drop_in = drop_in
        self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(num_slots))

    def forward(self, topk_idx):
        return self.drop_in.get_dispatch_layout(topk_idx, E)


def test_attached_layers_run_with_their_placement(make, mode):
    mode("1")
    drop_in = make()
    attached = [Layer(drop_in), Layer(drop_in, 4)]
    handles = [
        lplb_ep.attach(layer, placement, num_local_slots=len(layer.experts), buffer=drop_in)
        for layer, placement in zip(attached, (PLACEMENT, OTHER), strict=True)
    ]
    assert len(targets()) == 2
    for layer, placement in zip(attached, (PLACEMENT, OTHER), strict=True):
        layer(TOPK)
        assert torch.equal(slots_seen(drop_in), planned(placement))
    # A forward that raises leaves nothing in force behind it.
    with pytest.raises(ValueError, match="topk_idx"):
        attached[0](torch.tensor([[9]]))
    with pytest.raises(ContractError, match="no placement is in force"):
        drop_in.get_dispatch_layout(TOPK, E)
    handles[0].remove()
    with pytest.raises(ContractError, match="no placement is in force"):
        attached[0](TOPK)


def test_attach_checks_the_model(make, mode):
    mode("1")
    layer = Layer(make())
    with pytest.raises(ContractError, match=r"num_local_slots must be .* 6; got 4"):
        lplb_ep.attach(layer, PLACEMENT, num_local_slots=4)
    with pytest.raises(ValueError, match="6"):
        lplb_ep.attach(Layer(None, 5), PLACEMENT, num_local_slots=P)
    stacked = torch.nn.Module()
    stacked.w1 = torch.nn.Parameter(torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match="w1"):
        lplb_ep.attach(layer, PLACEMENT, num_local_slots=P, experts=stacked)
    with pytest.raises(ContractError, match=r"num_local_slots must be .* 6; got None"):
        layer.drop_in.__class__(layer.drop_in.group, placement=PLACEMENT)


def test_stale_replicas_send_tokens_home_until_valid(make, mode, caplog):
    mode("1", LPLB_EP_REPLICAS="tracked")
    placement = Placement([0, 1, 2, 3, 0, 2], 1)
    # On one rank a second copy never has a quota, so look at the status that planners count.
    drop_in = make(placement=placement, num_local_slots=P)
    planner = next(iter(targets().values()))
    drop_in.get_dispatch_layout(TOPK, E)
    assert {s.name: n for s, n in planner.num_batches.items()} == {"STALE": 1}
    assert "STALE, the replicas' weights are not known" in caplog.text
    lplb_ep.mark_valid(placement)
    drop_in.get_dispatch_layout(TOPK, E)
    assert {s.name: n for s, n in planner.num_batches.items()} == {"STALE": 1, "OPTIMAL": 1}


# --- in place --------------------------------------------------------------------------------


@pytest.fixture
def deep_ep(monkeypatch):
    module = recorder()
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    monkeypatch.setattr(buffer, "choose_backend", lambda backend: ("deep_ep", "for the test"))
    yield module
    patching.unpatch()


def test_drop_ins_are_subclasses_made_on_first_use(deep_ep, mode, group):
    mode("1")
    assert issubclass(lplb_ep.Buffer, deep_ep.Buffer)
    assert lplb_ep.Buffer is lplb_ep.Buffer
    assert lplb_ep.Buffer.num_sms == 20
    assert lplb_ep.Buffer.__doc__ == "As deep_ep.Buffer."
    assert issubclass(lplb_ep.ElasticBuffer, deep_ep.ElasticBuffer)
    assert lplb_ep.EPHandle is deep_ep.EPHandle


def test_the_patch_reaches_names_imported_early(deep_ep, mode, group):
    mode("1")
    early, methods = deep_ep.Buffer, dict(vars(deep_ep.Buffer))
    older = early(group)
    patching.patch()
    patching.patch()
    assert lplb_ep.Buffer is early
    drop_in = early(group, placement=PLACEMENT, num_local_slots=P)
    drop_in.get_dispatch_layout(TOPK, E)
    (call,) = drop_in.log  # planned once, however often it was patched
    assert torch.equal(call[1][0], planned())
    assert isinstance(drop_in.view(OTHER), early)
    older.get_dispatch_layout(TOPK, E)  # made before the patch: as it was
    assert older.log[0][1][0] is TOPK
    patching.unpatch()
    assert dict(vars(deep_ep.Buffer)) == methods


def test_hybrid_buffers_are_left_alone_with_one_warning(deep_ep, mode, caplog):
    class HybridEPBuffer:
        def dispatch(self):
            pass

    deep_ep.HybridEPBuffer = HybridEPBuffer
    before = dict(vars(HybridEPBuffer))
    patching.patch()
    assert dict(vars(HybridEPBuffer)) == before
    assert caplog.text.count("HybridEPBuffer") == 1


def differing_modes(group):
    import os

    os.environ["LPLB_EP"] = "0" if group.rank() == 2 else "1"
    buffer.drop_in_of(recorder().Buffer)(group)


DIFFERENT = {
    "LPLB_EP": ("1", "home", "LPLB_EP: 1 on ranks [0]; home on ranks [1]"),
    "LPLB_EP_INDICES": ("logical", "physical", "indices: logical on ranks [0]; physical on"),
    "LPLB_EP_REPLICAS": ("tracked", "valid", "replicas: tracked on ranks [0]; valid on"),
    "LPLB_EP_COUNTS": ("auto", "torch", "counts: auto on ranks [0]; torch on"),
    "LPLB_EP_SOLVER": ("auto", "cpu", "LPLB_EP_SOLVER: auto on ranks [0]; cpu on"),
}


def differing_setting(group, variable, values):
    import os

    os.environ[variable] = values[group.rank()]
    buffer.drop_in_of(recorder().Buffer)(group)


@pytest.mark.parametrize("variable", DIFFERENT)
def test_settings_are_compared(variable):
    *values, message = DIFFERENT[variable]
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, differing_setting, variable, values)
    for kind, text in failure.value.errors:
        assert kind == "RankError"
        assert message in text


def misspelt_setting(group, variable, value):
    import os

    if group.rank() == 1:
        os.environ[variable] = value
    lplb_ep.Buffer(group)


@pytest.mark.parametrize("variable", ["LPLB_EP", "LPLB_EP_BACKEND", "LPLB_EP_CHECKS"])
def test_an_impossible_setting_on_one_rank_is_named_on_all(variable):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, misspelt_setting, variable, "bogus")
    (peer, theirs), (own, its) = failure.value.errors
    assert (peer, own) == ("RankError", "ValueError")
    assert "ranks [1] refused" in theirs
    assert variable in theirs
    assert variable in its


def solver_missing_on_one_rank(group):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_SOLVER="auto" if group.rank() == 0 else "flow")
    buffer.drop_in_of(recorder().Buffer)(group)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the solver is there")
def test_a_solver_that_one_rank_lacks_is_named_on_all():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, solver_missing_on_one_rank)
    (peer, theirs), (own, its) = failure.value.errors
    assert (peer, own) == ("RankError", "MissingPackageError")
    assert "rank 1: there is no CUDA device" in theirs
    assert its == "there is no CUDA device"


def other_buffer_on_one_rank(group):
    module = recorder()
    cls = module.Buffer
    if group.rank() == 1:
        cls.__module__ = "elsewhere"
    buffer.drop_in_of(cls)(group)


def test_ranks_with_buffers_of_different_libraries_are_named():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, other_buffer_on_one_rank)
    for kind, text in failure.value.errors:
        assert kind == "RankError"
        assert "ranks differ in buffer: " in text
        assert "elsewhere.Buffer on ranks [1]" in text


def test_ranks_with_different_modes_are_named():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(4, differing_modes)
    for kind, message in failure.value.errors:
        assert kind == "RankError"
        assert "ranks differ in LPLB_EP: 1 on ranks [0, 1, 3]; 0 on ranks [2]" in message


def test_a_missing_deep_ep_is_named():
    with pytest.raises(lplb_ep.MissingPackageError, match="deep_ep is not installed"):
        buffer.choose_backend("deep_ep")
    assert buffer.choose_backend("auto")[0] == "lplb_ep.embedded"


def differing_placements(group, where):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_REPLICAS="valid")
    first, second = Placement([0, 1, 2, 0], 2), Placement([0, 1, 2, 3, 0, 1], 2)
    drop_in = buffer.drop_in_of(recorder().Buffer)(group)
    drop_in.view(first)
    drop_in.view(second)
    mine = first if group.rank() == 0 else second
    if where == "view":
        drop_in.view(mine)
    else:
        with lplb_ep.use(mine):
            drop_in.get_dispatch_layout(torch.tensor([[0, 2]]), mine.num_experts)


@pytest.mark.parametrize(
    ("where", "message"),
    [("view", "ranks differ in placement"), ("batch", "plan another batch than this rank")],
)
def test_ranks_that_bring_different_known_placements_are_named(where, message):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, differing_placements, where)
    for kind, text in failure.value.errors:
        assert kind == "RankError"
        assert message in text


def refused_by_one(group):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_REPLICAS="valid", LPLB_EP_INDICES="physical")
    drop_in = buffer.drop_in_of(recorder().Buffer)(group)
    view = drop_in.view(Placement([0, 1, -1, 0], 2))
    view.get_dispatch_layout(torch.tensor([[0, 2 if group.rank() else 1]]), 4)


def test_slots_that_one_rank_may_not_name_raise_on_all():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, refused_by_one)
    (peer, its), (own, mine) = failure.value.errors
    assert (peer, own) == ("RankError", "ValueError")
    assert "ranks [1] refused" in its
    assert "slot 2, which holds no expert" in mine


def wrong_on_one_rank(group, what):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_REPLICAS="valid")
    odd = group.rank() == 1
    placement = Placement([0, 1, 2, 0], 2)
    cls = buffer.drop_in_of(recorder().Buffer)
    if what == "placement on one rank only":
        cls(group, **({"placement": placement, "num_local_slots": 2} if odd else {}))
    elif what == "slots":
        cls(group, placement=placement, num_local_slots=3 if odd else 2)
    elif what == "setting":
        os.environ["LPLB_EP_CHECK"] = "maybe" if odd else "1"
        cls(group)
    elif what == "attach":
        layer = Layer(cls(group), 2)
        lplb_ep.attach(layer, placement, num_local_slots=3 if odd else 2, buffer=layer.drop_in)
    else:
        drop_in = cls(group)
        slots = [drop_in.view(placement, slot) for slot in range(2)]
        slots[odd].get_dispatch_layout(torch.tensor([[0, 2]]), 3)


@pytest.mark.parametrize(
    ("what", "peer", "own"),
    [
        ("placement on one rank only", "differ in placement: none on ranks [0]", "differ in plac"),
        ("slots", "ranks [1] refused; rank 1: num_local_slots", "num_local_slots must be"),
        ("setting", "ranks [1] refused; rank 1: LPLB_EP_CHECK", "LPLB_EP_CHECK must be one of"),
        ("attach", "ranks [1] refused; rank 1: num_local_slots", "num_local_slots must be"),
        ("micro-batches", "ranks [1] plan another batch", "ranks [0] plan another batch"),
    ],
)
def test_what_is_wrong_on_one_rank_is_named_on_all(what, peer, own):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, wrong_on_one_rank, what)
    (_, theirs), (_, its) = failure.value.errors
    assert peer in theirs
    assert own in its


def test_low_latency_layers_of_one_buffer_have_the_same_number_of_slots(make, mode):
    mode("1")
    drop_in = make(num_rdma_bytes=1 << 20)
    drop_in.view(PLACEMENT).low_latency_dispatch(X, TOPK, 4, E)
    larger = drop_in.view(Placement([0, 1, 2, 3, 0, 2, 1, 0], 1))
    with pytest.raises(ContractError, match="placements of 6 slots, and this one has 8"):
        larger.low_latency_dispatch(X, TOPK, 4, E)


def test_buffers_made_before_the_patch_refuse_placements(deep_ep, mode, group):
    mode("1")
    older = deep_ep.Buffer(group)
    patching.patch()
    with lplb_ep.use(PLACEMENT), pytest.raises(ContractError, match="made before lplb_ep was"):
        older.get_dispatch_layout(TOPK, E)
    with pytest.raises(ContractError, match="made before lplb_ep was"):
        older.view(PLACEMENT)


def test_an_attached_layer_keeps_the_micro_batch_around_it(make, mode):
    mode("1")
    drop_in = make()
    layer = Layer(drop_in)
    lplb_ep.attach(layer, PLACEMENT, num_local_slots=P, buffer=drop_in)
    with lplb_ep.use(PLACEMENT, slot=1):
        layer(TOPK)
    assert {slot for _, slot in targets()} == {0, 1}


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


def test_picks_changed_between_layout_and_dispatch_are_refused(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    topk = TOPK.clone()
    layout = drop_in.get_dispatch_layout(topk, E)
    topk[2] = -1
    with pytest.raises(ContractError, match="is not the one that was planned"):
        drop_in.dispatch(X, topk_idx=topk, is_token_in_rank=layout[3])


def test_channels_end_with_their_group(tmp_path, mode):
    """A group that outlives destroy_process_group can abort the interpreter at its end."""
    mode("1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    drop_in = buffer.drop_in_of(recorder().Buffer)(group(), placement=PLACEMENT, num_local_slots=P)
    drop_in.get_dispatch_layout(TOPK, E)
    del drop_in
    dist.destroy_process_group()
    gc.collect()
    assert group() is None
    assert len(channels) == 0


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


def test_internode_dispatch_takes_the_plan(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    layout = drop_in.get_dispatch_layout(TOPK, E)
    got = drop_in.internode_dispatch(X, is_token_in_rank=layout[3], topk_idx=TOPK)[1]
    assert torch.equal(got, planned())


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


def test_a_subclass_may_size_the_buffer_its_own_way(mode, group):
    mode("1")

    class Padded(buffer.drop_in_of(recorder().Buffer)):
        @staticmethod
        def get_low_latency_rdma_size_hint(*args):
            return 1000 + buffer.drop_in_of(recorder().Buffer).get_low_latency_rdma_size_hint(*args)

    drop_in = Padded(group, placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=4 * 8 * P)
    drop_in.low_latency_dispatch(X, TOPK, 4, E)
    assert arrived(drop_in, "low_latency_dispatch")["num_experts"] == P


def test_use_goes_before_the_buffers_own_placement(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    with lplb_ep.use(OTHER):
        drop_in.get_dispatch_layout(TOPK, E)
    assert torch.equal(slots_seen(drop_in), planned(OTHER))


@pytest.mark.parametrize("how", ["attach", "use", "view"])
def test_a_default_does_not_stand_in_for_other_layers(make, mode, how):
    """A recompute inside of a layer runs outside of its hooks: it must not get the default."""
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    layer = Layer(drop_in)
    with lplb_ep.use(PLACEMENT, slot=1):  # its own, in another micro-batch
        layer(TOPK)
    drop_in.get_dispatch_layout(TOPK, E)
    if how == "attach":
        lplb_ep.attach(layer, OTHER, num_local_slots=4, experts=False, buffer=drop_in)
        layer(TOPK)
    elif how == "use":
        with lplb_ep.use(OTHER):
            layer(TOPK)
    else:
        drop_in.view(OTHER).get_dispatch_layout(TOPK, E)
    assert torch.equal(slots_seen(drop_in), planned(OTHER))
    with pytest.raises(ContractError, match="checkpoint inside an attached module"):
        drop_in.get_dispatch_layout(TOPK, E)


def test_a_buffer_that_replaces_another_knows_that_placements_exist(make, mode):
    mode("1")
    make().view(PLACEMENT)
    larger = make()
    with pytest.raises(ContractError, match="no placement is in force"):
        larger.get_dispatch_layout(TOPK, E)


def test_of_two_attachments_the_last_one_holds_and_nothing_stays(make, mode):
    mode("1")
    layer = Layer(make())
    first = lplb_ep.attach(layer, PLACEMENT, num_local_slots=P)
    second = lplb_ep.attach(layer, OTHER, num_local_slots=4, experts=False)
    layer(TOPK)
    assert torch.equal(slots_seen(layer.drop_in), planned(OTHER))
    assert layers.used() is None
    second.remove()
    layer(TOPK)
    assert torch.equal(slots_seen(layer.drop_in), planned())
    first.remove()
    assert layers.used() is None


def test_a_hook_that_fails_before_ours_takes_nothing_from_the_placement_around_it(make, mode):
    mode("1")
    layer = Layer(make())

    def fail(*_):
        raise RuntimeError("not today")

    layer.register_forward_pre_hook(fail)
    lplb_ep.attach(layer, PLACEMENT, num_local_slots=P)
    with lplb_ep.use(OTHER):
        with pytest.raises(RuntimeError, match="not today"):
            layer(TOPK)
        assert layers.used() == (layer_of(OTHER), 0)


def test_threads_in_one_attached_module_do_not_mix(make, mode):
    mode("1")
    inside, seen = threading.Barrier(2), []

    class Slow(torch.nn.Module):
        def forward(self, slot):
            inside.wait(10)
            seen.append((slot, layers.used()))
            inside.wait(10)

    module = Slow()
    lplb_ep.attach(module, PLACEMENT, num_local_slots=P)

    def run(slot):
        with lplb_ep.use(PLACEMENT, slot=slot):
            module(slot)
        seen.append((slot, layers.used()))

    workers = [threading.Thread(target=run, args=(slot,)) for slot in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(seen[:2]) == [(s, (layer_of(PLACEMENT), s)) for s in (1, 2)]
    assert sorted(seen[2:]) == [(1, None), (2, None)]


def test_weights_laid_out_otherwise_need_no_check(make, mode):
    mode("1")
    layer = Layer(make(), num_slots=3)  # Megatron-Core's experts are one module with all weights
    with pytest.raises(ValueError, match="experts must be 6 modules"):
        lplb_ep.attach(layer, PLACEMENT, num_local_slots=P)
    lplb_ep.attach(layer, PLACEMENT, num_local_slots=P, experts=False)
    layer(TOPK)
    assert torch.equal(slots_seen(layer.drop_in), planned())


def test_every_plan_is_checked_on_demand(make, mode, monkeypatch):
    checked = []
    monkeypatch.setattr(planner, "check_plan", lambda *args: checked.append(args))
    for value in ("0", "1"):
        mode("1", LPLB_EP_CHECK=value)
        channels.clear()  # which keep what they were made with
        make(placement=PLACEMENT, num_local_slots=P).get_dispatch_layout(TOPK, E)
    ((plan, topk, placement, rank, _),) = checked
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


@pytest.mark.parametrize("counts", ["nvshmem", "ipc", "torch", "auto"])
def test_at_home_it_does_not_matter_how_counts_would_travel(make, mode, monkeypatch, counts):
    mode("home")
    monkeypatch.setenv("LPLB_EP_COUNTS", counts)
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    layout = drop_in.get_dispatch_layout(TOPK, E)
    drop_in.dispatch(X, topk_idx=TOPK, is_token_in_rank=layout[3])
    assert torch.equal(arrived(drop_in, "dispatch")["topk_idx"], TOPK)  # homes are slots 0 to 3


def test_a_buffer_and_its_views_are_destroyed_in_any_order(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    view = drop_in.view(PLACEMENT)
    view.destroy()
    drop_in.destroy()
    view.destroy()
    assert [name for name, *_ in drop_in.log].count("destroy") == 1


def test_what_is_no_placement_is_named(make, mode):
    mode("1")
    table = [0, 1, 2, 3, 0, 2]
    drop_in = make()
    for wrong in (
        lambda: make(placement=table, num_local_slots=P),
        lambda: drop_in.view(table),
        lambda: lplb_ep.attach(torch.nn.Linear(1, 1), table, num_local_slots=P),
        lambda: lplb_ep.use(table).__enter__(),
        lambda: Planner(table, rank=0),
        lambda: lplb_ep.solve(torch.ones(4).int(), table),
    ):
        with pytest.raises(TypeError, match=r"placement must be an lplb_ep.Placement; got a list"):
            wrong()
    with pytest.raises(ContractError, match="num_local_slots goes with placement="):
        make(num_local_slots=P)
    with pytest.raises(ValueError, match=r"LPLB_EP_INDICES must be one of .*; got .bogus."):
        make(indices="bogus")


def test_what_is_no_tensor_is_named(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P, num_rdma_bytes=1 << 20)
    for topk in (None, TOPK.tolist(), TOPK.numpy()):
        with pytest.raises(TypeError, match=r"topk_idx must be a tensor \[T, K\]; got a"):
            drop_in.get_dispatch_layout(topk, E)
    with pytest.raises(ContractError, match=r"x must be a tensor \[tokens, hidden\]; got list"):
        drop_in.low_latency_dispatch([1.0], TOPK, 4, E)


def test_only_use_says_which_micro_batch_an_attached_layer_is_in(make, mode):
    mode("1")
    seen = []

    class Watch(torch.nn.Module):
        def __init__(self, inner=None):
            super().__init__()
            self.inner = inner

        def forward(self):
            seen.append(layers.used())
            if self.inner is not None:
                self.inner()

    inner = Watch()
    outer = Watch(inner)
    lplb_ep.attach(outer, PLACEMENT, num_local_slots=P)
    lplb_ep.attach(inner, PLACEMENT, num_local_slots=P, slot=1)
    outer()
    with lplb_ep.use(PLACEMENT, slot=2):
        outer()
    assert [slot for _, slot in seen] == [0, 1, 2, 2]
    # Equal placements of two layers are two: their replicas are valid or not each for themselves.
    equal = Placement(PLACEMENT.physical_to_logical, 1)
    with lplb_ep.use(equal, slot=3):
        inner()
    assert seen[-1][0] is layer_of(PLACEMENT)
    assert seen[-1][1] == 1


def test_a_default_does_not_stand_in_for_an_equal_placement_of_another_layer(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    with lplb_ep.use(Placement(PLACEMENT.physical_to_logical, 1)):
        drop_in.get_dispatch_layout(TOPK, E)
    with pytest.raises(ContractError, match="no placement is in force"):
        drop_in.get_dispatch_layout(TOPK, E)


def test_experts_that_are_no_module_are_named(make, mode):
    mode("1")
    layer = Layer(make())
    for experts, error, message in (
        (torch.nn.ModuleList(), ValueError, "experts must be 6 modules"),
        (6, TypeError, "experts must be a module; got a int"),
    ):
        with pytest.raises(error, match=message):
            lplb_ep.attach(layer, PLACEMENT, num_local_slots=P, experts=experts)
    for slot in (-1, 2**40, "x"):
        with pytest.raises(ValueError, match=r"slot must be a whole number in \[0, 2\*\*31\); got"):
            Planner(PLACEMENT, rank=0, counts="given", slot=slot)


def low_latency_wrong_on_one_rank(group, what):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_REPLICAS="valid")
    channels.clear()  # other tests left theirs out of step
    drop_in = buffer.drop_in_of(recorder().Buffer)(group, num_rdma_bytes=1 << 20)
    view = drop_in.view(Placement([0, 1, 2, 0], 2))
    x, tokens = torch.zeros(1, 8), 4
    if group.rank() == 1:
        x, tokens = (None, 4) if what == "x" else (x, None)
    view.low_latency_dispatch(x, torch.tensor([[0, 2]]), tokens, 3)


@pytest.mark.parametrize(
    ("what", "own"),
    [("x", "x must be a tensor"), ("tokens", "num_max_dispatch_tokens_per_rank must be a whole")],
)
def test_a_bad_low_latency_call_on_one_rank_raises_on_all(what, own):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, low_latency_wrong_on_one_rank, what)
    (peer, theirs), (kind, its) = failure.value.errors
    assert (peer, kind) == ("RankError", "ContractError")
    assert "ranks [1] refused" in theirs
    assert own in its
