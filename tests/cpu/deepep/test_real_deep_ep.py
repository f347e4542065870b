"""The drop-ins over DeepEP's own Python classes, whose compiled extension is a recording stub.

Runs where `LPLB_TEST_DEEP_EP` names folders with sources, as `deep_ep_sources.py` says.
"""

import functools
import sys
import types

import pytest
import torch
from deep_ep_sources import CLASSES, FOLDERS, load, signatures
from recording_buffer import PLACEMENT, TOPK, E, P, X, planned
from test_contract import SIGNATURES

from lplb_ep.deepep import contract, drop_in

pytestmark = pytest.mark.skipif(not FOLDERS, reason="LPLB_TEST_DEEP_EP names no sources")


@pytest.fixture
def real(monkeypatch):
    """DeepEP's classes, by version and name."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("deep_ep", "deep_ep_cpp")]:
        monkeypatch.delitem(sys.modules, name)
    found = {}
    for folder in FOLDERS:
        for name in [n for n in sys.modules if n.startswith("deep_ep.")]:
            del sys.modules[name]
        found |= load(folder)
    assert found, f"no class of DeepEP in {FOLDERS}"
    yield found
    for name in [n for n in sys.modules if n.split(".")[0] in ("deep_ep", "deep_ep_cpp")]:
        del sys.modules[name]


class Runtime:
    """The extension's buffer: records what reaches it, and returns results of the right number."""

    def __init__(self):
        self.calls = {}

    def get_num_rdma_ranks(self):
        return 1

    def __getattr__(self, name):
        return functools.partial(self._call, name)

    def _call(self, name, *args):
        self.calls[name] = args
        results = {
            "get_dispatch_layout": (X, None, X, torch.ones(4, 1, dtype=torch.bool), None),
            "intranode_dispatch": (X, None, args[2], args[3], [], *[X] * 5, None),
            "low_latency_dispatch": (X, None, X, torch.zeros(3), torch.zeros(3), None, None),
            "low_latency_combine": (X, None, None),
            "dispatch": (X, None, *[X] * 13, None) if name == "dispatch" else None,
        }
        return results[name]


@pytest.fixture
def over(real, group, mode, monkeypatch):
    """Makes a drop-in over one of the classes, with a stub for its runtime."""
    mode("1")

    def make(version, class_name, **attributes):
        if (version, class_name) not in real:
            pytest.skip(f"no sources of DeepEP {version}")
        base = real[version, class_name]

        @functools.wraps(base.__init__)
        def init(self, group, *args, **kwargs):
            self.group, self.group_size, self.runtime = group, group.size(), Runtime()
            self.__dict__.update(attributes)

        monkeypatch.setattr(base, "__init__", init)
        return drop_in.drop_in_of(base)(group).view(PLACEMENT)

    return make


def test_the_recorded_signatures_are_those_of_the_sources(real):
    for key, cls in real.items():
        recorded = {
            f"{'static ' if static else ''}{name}({arguments})"
            for name, static, arguments in SIGNATURES[key]
        }
        assert recorded == {*signatures(cls)}, key


@pytest.mark.parametrize(("version", "class_name"), CLASSES.values())
def test_the_class_keeps_the_contract(real, version, class_name):
    if (version, class_name) not in real:
        pytest.skip(f"no sources of DeepEP {version}")
    cls = real[version, class_name]
    found = contract.contract_of(cls)
    assert contract.unknown_methods(cls, found) == []
    made = drop_in.drop_in_of(cls)
    assert issubclass(made, cls)


@pytest.mark.parametrize("version", ["1.2.1", "2.1.0"])
def test_throughput_calls_reach_the_extension_with_slots(over, version):
    buffer = over(version, "Buffer", num_rdma_bytes=0)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(TOPK, E)
    calls = buffer.runtime.calls
    assert torch.equal(calls["get_dispatch_layout"][0], planned())
    assert calls["get_dispatch_layout"][1] == P
    _, _, _, _, handle, _ = buffer.dispatch(
        X,
        topk_idx=TOPK,
        topk_weights=X,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        config=types.SimpleNamespace(),
    )
    assert torch.equal(calls["intranode_dispatch"][2], planned())
    assert any(part is in_rank for part in handle)
    buffer.dispatch(X, handle=handle, config=types.SimpleNamespace())
    assert calls["intranode_dispatch"][2] is None


@pytest.mark.parametrize("version", ["1.2.1", "2.1.0"])
def test_low_latency_calls_reach_the_extension_with_slots(over, version):
    buffer = over(version, "Buffer", num_rdma_bytes=1 << 30, nvshmem_qp_depth=1024)
    x = torch.zeros(4, 7168, dtype=torch.bfloat16)
    *_, handle, _, _ = buffer.low_latency_dispatch(x, TOPK, 8, E, use_fp8=False)
    calls = buffer.runtime.calls
    assert torch.equal(calls["low_latency_dispatch"][1], planned())
    assert calls["low_latency_dispatch"][4:6] == (8, P)
    masked = TOPK.clone()
    masked[0] = -1
    buffer.low_latency_combine(x, masked, X, handle)
    assert torch.equal(calls["low_latency_combine"][1], torch.where(masked < 0, -1, planned()))


def test_elastic_calls_reach_the_extension_with_slots(over):
    buffer = over("2.1.0", "ElasticBuffer", num_allocated_qps=99, deterministic=False)
    buffer.num_max_tokens_per_rank = 4
    x = torch.zeros(4, 512, dtype=torch.bfloat16)
    counts = {"num_sms": 4, "num_qps": 1}
    *_, handle, _ = buffer.dispatch(x, TOPK, num_experts=E, **counts)
    assert type(handle).__name__ == "EPHandle"
    args = buffer.runtime.calls["dispatch"]
    assert torch.equal(args[2], planned())
    assert P in [argument for argument in args if isinstance(argument, int)]
    assert handle.num_experts == P
    buffer.dispatch(x, num_experts=E, handle=handle, **counts)  # asserts that E became P
