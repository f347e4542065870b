"""DeepEP's own limits: refused where a placement is registered, or before counts are exchanged."""

import dataclasses
import inspect
import sys
import types

import pytest
import ranks
import torch
from recording_buffer import recorder
from test_contract import made

import lplb_ep
from lplb_ep import ContractError, Placement
from lplb_ep.deepep import contract, drop_in, limits


def even(num_ranks, num_local_slots, num_experts):
    """Every rank has the same number of slots, the first ones home to experts."""
    slots = num_ranks * num_local_slots
    return Placement([slot % num_experts for slot in range(slots)], num_ranks)


def deep_eps(patch, version, class_name):
    """A recording class that passes for DeepEP's of that version."""
    base = getattr(recorder(), class_name)
    signature = made(version, class_name)

    class Made(base):
        def __init__(
            self,
            group,
            num_nvl_bytes=0,
            num_rdma_bytes=0,
            low_latency_mode=False,
            num_qps_per_rank=24,
            num_max_tokens_per_rank=1 << 20,
        ):
            super().__init__(group, num_nvl_bytes, num_rdma_bytes)
            self.num_max_tokens_per_rank = num_max_tokens_per_rank

    if version != "1.2.1" and class_name == "Buffer":
        Made.__init__.__signature__ = inspect.signature(signature.__init__)
    Made.__name__, Made.__module__ = class_name, "deep_ep.buffer"
    package = types.ModuleType("deep_ep")
    package.__version__ = version
    patch.setitem(sys.modules, "deep_ep", package)
    return drop_in.drop_in_of(Made)


@pytest.fixture
def deep_ep_of(monkeypatch, group, mode):
    """Makes a buffer of a version of DeepEP on one rank."""
    mode("1")

    def make(version, class_name="Buffer", **options):
        return deep_eps(monkeypatch, version, class_name)(group, **options)

    return make


# --- where a placement is registered --------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.2.1", "2.1.0"])
def test_throughput_takes_128_slots_a_rank_within_a_node(deep_ep_of, version):
    buffer = deep_ep_of(version, num_nvl_bytes=1 << 20)
    buffer.view(even(1, 128, 120))
    message = (
        rf"DeepEP {version}'s Buffer takes at most 128 slots a rank. The placement of 120 experts "
        r"has 129 slots on each of 1 ranks: take fewer replicas a rank, or more ranks"
    )
    with pytest.raises(ContractError, match=message):
        buffer.view(even(1, 129, 120))
    with lplb_ep.use(even(1, 129, 120)), pytest.raises(ContractError, match=message):
        buffer.get_dispatch_layout(torch.zeros(1, 1).long(), 120)
    with pytest.raises(ContractError, match=message):
        deep_ep_of(version, num_nvl_bytes=128, placement=even(1, 129, 120), num_local_slots=129)
    assert buffer.log == []


def test_elastic_buffers_take_256_slots_a_rank(deep_ep_of):
    buffer = deep_ep_of("2.1.0", "ElasticBuffer")
    buffer.view(even(1, 256, 200))
    with pytest.raises(ContractError, match=r"DeepEP 2.1.0's ElasticBuffer takes at most 256 slo"):
        buffer.view(even(1, 257, 200))


def test_low_latency_takes_a_slot_for_each_queue_pair(deep_ep_of):
    options = {"low_latency_mode": True, "num_nvl_bytes": 1 << 20}
    buffer = deep_ep_of("1.2.1", num_qps_per_rank=130, **options)
    placement = even(1, 130, 120)
    buffer.view(placement)
    with pytest.raises(ContractError, match=r"num_qps_per_rank=24, .* has 130 slots .*=130"):
        deep_ep_of("1.2.1", **options).view(placement)
    # A buffer of both kinds takes it for low latency, and not for high throughput.
    with pytest.raises(ContractError, match=r"takes at most 128 slots a rank"):
        buffer.view(placement).get_dispatch_layout(torch.zeros(1, 1).long(), 120)


LEGACY, ELASTIC = limits.LEGACY_1_2_1, limits.ELASTIC


@pytest.mark.parametrize(
    ("of_class", "placement", "num_ranks_per_node", "message"),
    [
        (LEGACY, (8, 128), None, ""),
        (LEGACY, (8, 129), None, "at most 128 slots a rank"),
        (LEGACY, (16, 64), 8, ""),
        (LEGACY, (16, 65), 8, "at most 64 slots a rank with nodes of 8 ranks"),
        (limits.LEGACY_2, (8, 129), None, "at most 128 slots a rank"),
        (limits.LEGACY_2, (16, 65), 8, "at most 64 slots a rank with nodes of 8 ranks"),
        (ELASTIC, (8, 256), None, ""),
        (ELASTIC, (4, 257), None, "at most 256 slots a rank"),
        (ELASTIC, (16, 129), None, "at most 2048 slots in all"),
        (ELASTIC, (16, 120), 8, ""),
        (ELASTIC, (16, 121), 8, "at most 120 slots a rank with nodes of 8 ranks"),
        (limits.NONE, (16, 300), 8, ""),
    ],
)
def test_slots_are_held_against_the_kernels(of_class, placement, num_ranks_per_node, message):
    placement = even(*placement, 64)
    if not message:
        of_class.check_slots(placement, num_ranks_per_node)
    else:
        with pytest.raises(ContractError, match=message):
            of_class.check_slots(placement, num_ranks_per_node)


def test_low_latency_slots_are_held_against_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = types.SimpleNamespace(multi_processor_count=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    LEGACY.check_low_latency(even(10, 14, 64), None)
    with pytest.raises(ContractError, match="at most 140 low-latency slots in all"):
        LEGACY.check_low_latency(even(10, 15, 64), None)


def too_many_slots(group):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_REPLICAS="valid")
    with pytest.MonkeyPatch.context() as patch:
        buffer = deep_eps(patch, "1.2.1", "Buffer")(group, num_nvl_bytes=1 << 20)
    buffer.view(even(2, 128, 256))
    buffer.view(even(2, 130, 256))


def test_every_rank_refuses_too_many_slots_before_the_first_dispatch():
    """Those of 256 experts and two replicas a rank on two ranks, which 1.2.1 asserts against."""
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, too_many_slots)
    for kind, text in failure.value.errors:
        assert kind == "ContractError"
        assert "takes at most 128 slots a rank" in text
        assert "256 experts has 130 slots on each of 2 ranks" in text


# --- calls ----------------------------------------------------------------------------------------


def test_low_latency_calls_are_held_against_the_kernels(deep_ep_of):
    options = {"low_latency_mode": True, "num_rdma_bytes": 1 << 30}
    placement = even(1, 6, 4)

    def call(buffer, hidden, topk, tokens=4):
        picks = torch.full((3, topk), -1)
        picks[:, 0] = 1
        x = torch.zeros(3, hidden, dtype=torch.bfloat16)
        return buffer.view(placement).low_latency_dispatch(x, picks, tokens, 4)

    old, new = (deep_ep_of(version, **options) for version in ("1.2.1", "2.1.0"))
    for buffer in (old, new):
        call(buffer, 7168, 11)
        with pytest.raises(ContractError, match="takes at most 11 picks of a token in this call"):
            call(buffer, 7168, 12)
        with pytest.raises(ContractError, match=r"rows of 2048, 2560, .* 8192 elements; x has r"):
            call(buffer, 1024, 8)
        with pytest.raises(ContractError, match="at most num_max_dispatch_tokens_per_rank=2 token"):
            call(buffer, 7168, 8, tokens=2)
    call(new, 3072, 8)
    with pytest.raises(ContractError, match="x has rows of 3072: use its other calls"):
        call(old, 3072, 8)


def test_picks_and_rows_are_held_against_the_kernels(deep_ep_of):
    placement, picks = even(1, 6, 4), torch.full((3, 33), -1)
    buffer = deep_ep_of("1.2.1", num_nvl_bytes=1 << 20).view(placement)
    buffer.get_dispatch_layout(picks[:, :32], 4)
    with pytest.raises(ContractError, match="Buffer takes at most 32 picks of a token"):
        buffer.get_dispatch_layout(picks, 4)
    elastic = deep_ep_of("2.1.0", "ElasticBuffer", num_max_tokens_per_rank=3).view(placement)
    x = torch.zeros(3, 16, dtype=torch.bfloat16)
    elastic.dispatch(x, picks[:, :32], 4)
    elastic.dispatch((x.to(torch.float8_e4m3fn).repeat(1, 2), x), picks[:, :32], 4)
    with pytest.raises(ContractError, match="ElasticBuffer takes at most 32 picks of a token"):
        elastic.dispatch(x, picks, 4)
    with pytest.raises(ContractError, match="multiple of 32 bytes; x has rows of 30 bytes: pad"):
        elastic.dispatch(x[:, :15], picks[:, :32], 4)


# --- which limits are known -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "known"),
    [("1.2.1+bef12c4", True), ("2.0.0", True), ("2.1.3", True), ("2.2.0", False), ("3.0", False)],
)
def test_a_later_deep_ep_asserts_for_itself(monkeypatch, version, known):
    package = types.ModuleType("deep_ep")
    package.__version__ = version
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    found = contract.contract_of(made("1.2.1", "Buffer")).limits
    owner = f"DeepEP {version}'s Buffer"
    owned = dataclasses.replace(limits.LEGACY_1_2_1, owner=owner, pick_dtype=torch.int64)
    assert found == (owned if known else limits.NONE)


@pytest.mark.parametrize("compiled_for", [None, torch.int32])
def test_picks_have_the_dtype_that_deep_ep_was_compiled_for(monkeypatch, compiled_for):
    package = types.ModuleType("deep_ep")
    package.__version__ = "1.2.1"
    if compiled_for is not None:
        package.topk_idx_t = compiled_for
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    found = contract.contract_of(made("1.2.1", "Buffer")).limits
    right, wrong = compiled_for or torch.int64, torch.int64 if compiled_for else torch.int32
    found.check_picks(torch.zeros(1, 2, dtype=right), None)
    with pytest.raises(ContractError, match=f"takes topk_idx of {right}; got {wrong}"):
        found.check_picks(torch.zeros(1, 2, dtype=wrong), None)


def test_limits_hold_for_a_deep_ep_without_a_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", types.ModuleType("deep_ep"))
    found = contract.contract_of(made("1.2.1", "Buffer")).limits
    assert found.owner == "DeepEP (version unknown)'s Buffer"
    assert found.slots_per_rank == 128


def test_embedded_buffers_have_no_limits_of_slots(group, mode):
    mode("1", LPLB_EP_BACKEND="embedded")
    for cls, options in ((lplb_ep.Buffer, {}), (lplb_ep.ElasticBuffer, {"num_bytes": 1 << 21})):
        view = cls(group, **options).view(even(1, 2100, 2000))
        assert view._lplb_state.planners
