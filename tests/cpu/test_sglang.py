"""SGLang's own dispatchers and expert locations, unmodified, over the embedded buffers.

They run where SGLang can be imported: its wheel without its kernels can (CONTRIBUTING.md). What
asks a GPU or the server is replaced: the size of the buffer, the dtype, prefill or decode.
"""

import importlib.util
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import serving
import torch

from lplb_ep.clients import sglang as client
from lplb_ep.layer import channels

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="no SGLang")
ENVIRON = {"LPLB_EP": "1", "LPLB_EP_BACKEND": "embedded"}
KINDS = ("normal", "low latency", "v2 prefill", "v2 expanded prefill", "v2 decode")


def imported(kind, group):
    """SGLang's modules, as a server of this kind would find them, and its buffer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert client.switch_on("SGLang")
        from sglang.srt.eplb import expert_location
        from sglang.srt.layers import dp_attention
        from sglang.srt.layers.moe import topk
        from sglang.srt.layers.moe.token_dispatcher import deepep, deepep_v2
        from sglang.srt.layers.moe.utils import DeepEPMode, DeepEPv2Fp8ScaleFormat
    import deep_ep

    prefill = kind in ("normal", "v2 prefill", "v2 expanded prefill")
    for module in (dp_attention, deepep, deepep_v2):
        module.get_is_extend_in_batch = lambda: prefill
    deepep.get_deepep_output_dtype = lambda self: deepep.DispatcherOutputDtype.BF16
    deepep.deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True  # its other runners are switched off
    if kind.startswith("v2"):
        buffer = serving.buffer_of("v2", deep_ep, group)
        deepep_v2.DeepEPv2Buffer.get_buffer = classmethod(lambda cls, *args: buffer)
        deepep_v2._DeepEPv2Impl._masked_token_capacity = lambda self, tokens, size: 128
    else:
        num_slots = serving.NUM_SLOTS
        num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
            128, serving.HIDDEN, group.size(), num_slots
        )
        buffer = deep_ep.Buffer(group, 1 << 24, num_bytes, low_latency_mode=True)
        state = deepep.DeepEPBuffer._state()
        state.buffer, state.hidden_size, state.num_experts = buffer, serving.HIDDEN, num_slots
        state.num_max_dispatch_tokens_per_rank = 128
    return SimpleNamespace(
        deepep=deepep,
        deepep_v2=deepep_v2,
        expert_location=expert_location,
        topk=topk,
        mode=DeepEPMode.AUTO,
        scale_format=DeepEPv2Fp8ScaleFormat(tma_aligned=False, ue8m0=False),
    )


def dispatcher_of(sglang, kind, group):
    """One for a micro-batch of a layer."""
    num_slots, own = serving.NUM_SLOTS, serving.NUM_SLOTS // group.size()
    if not kind.startswith("v2"):
        return sglang.deepep.DeepEPDispatcher(
            *(group, serving.NUM_TOPK, True, num_slots, own, serving.HIDDEN, torch.bfloat16),
            deepep_mode=sglang.mode,
            async_finish=True,
            return_recv_hook=True,
        )
    made = object.__new__(sglang.deepep_v2.DeepEPv2Dispatcher)  # which asks for server arguments
    made._impl = sglang.deepep_v2._DeepEPv2Impl(
        *(group, serving.NUM_TOPK, num_slots, own, serving.HIDDEN, sglang.scale_format),
        num_max_dispatch_tokens_per_rank=serving.MOST_TOKENS,
        use_fp8_dispatch=False,
    )
    made._impl._prefill_expand_enabled = kind == "v2 expanded prefill"
    return made


class MoE(torch.nn.Module):
    """What the client knows of SGLang's MoE layer."""

    def __init__(self, layer_id, inners):
        super().__init__()
        self.layer_id = layer_id
        self.dispatcher = SimpleNamespace(_inners=inners) if len(inners) > 1 else inners[0]


class Caller:
    """Calls a layer's dispatcher as SGLang's layer does; its steps are those of `serving`."""

    def __init__(self, sglang, kind, inners, rank):
        self.sglang, self.kind, self.inners, self.rank = sglang, kind, inners, rank
        # In a prefill of V2 a rank without tokens sends one, to the homes of the first experts.
        picked = torch.arange(serving.NUM_TOPK).unsqueeze(0)
        self.dummy = picked if kind in ("v2 prefill", "v2 expanded prefill") else None

    def prepare(self, x, weights, slots, *_):
        output = self.sglang.topk.StandardTopKOutput(weights, slots, torch.empty(0))
        came = self.inners[serving.current()].dispatch(hidden_states=x, topk_output=output)
        if self.kind == "low latency":
            return came.hidden_states, None, serving.tokens(came.masked_m), None, None
        own = serving.NUM_SLOTS // 2
        if came.topk_ids is not None:
            ids = torch.where(came.topk_ids < 0, -1, came.topk_ids + self.rank * own)
            counts = torch.bincount(came.topk_ids[came.topk_ids >= 0].flatten(), minlength=own)
            return came.hidden_states, None, serving.tokens(counts), ids, came.topk_weights
        # Expanded: slot after slot, each beginning at a multiple of the alignment.
        align, ends = came.expert_alignment, came.psum_num_recv_tokens_per_expert
        starts = torch.cat([ends[:1] * 0, -(-ends[:-1] // align) * align])
        ids = torch.full((len(came.hidden_states), 1), -1)
        for slot, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            ids[start:end] = slot + self.rank * own
        weights = came.topk_weights.unsqueeze(1)
        return came.hidden_states, None, serving.tokens(ends - starts), ids, weights

    def finalize(self, output, rows, weights, slots, *_):
        modules = self.sglang.deepep, self.sglang.deepep_v2
        if self.kind == "low latency":
            given = modules[0].DeepEPLLCombineInput(rows, slots, weights)
        elif self.kind == "normal":
            given = modules[0].DeepEPNormalCombineInput(rows, slots, weights)
        else:
            given = modules[1].DeepEPv2CombineInput(rows, None, None)
        output.copy_(self.inners[serving.current()].combine(given))


def served(group, kind, num_micro_batches):
    sglang = imported(kind, group)
    tables = serving.table(np.random.default_rng(1), 5)  # with rows of layers that are not MoE
    copies = [[[0] * serving.NUM_SLOTS] * serving.NUM_EXPERTS] * len(tables)
    location = object.__new__(sglang.expert_location.ExpertLocationMetadata)
    location.physical_to_logical_map = location.physical_to_logical_map_cpu = tables
    location.logical_to_all_physical_map = torch.tensor(copies)
    sglang.expert_location.set_global_expert_location_metadata(location, allow_overwrite=True)
    layers = [
        MoE(n, [dispatcher_of(sglang, kind, group) for _ in range(num_micro_batches)])
        for n in (1, 3)
    ]
    engine = client.balance(torch.nn.ModuleList(layers), group.size())
    assert list(engine.layers) == [1, 3]
    callers = []
    for layer in layers:
        inners = getattr(layer.dispatcher, "_inners", [layer.dispatcher])
        callers.append(Caller(sglang, kind, inners, group.rank()))
    of_layers = tables[[1, 3]]  # `serve` writes to a copy, and SGLang's `update` to the table

    def refresh():
        new = tables.clone()
        new[[1, 3]] = of_layers
        tables.copy_(new)
        engine.refresh()

    steps = "ll" if kind == "low latency" else "ht"
    seen = serving.serve(group, steps, callers, of_layers, refresh, num_micro_batches, 6)
    made = [p for p in channels[group].values() if p.layer in engine.layers.values()]
    assert len(made) == 2 * num_micro_batches
    return seen


@needs_sglang
@pytest.mark.parametrize("mode", ["0", "1"])
def test_sglang_finds_the_plugin(tmp_path, mode):
    program = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.eplb.expert_location import ExpertLocationMetadata as locations\n"
        "from sglang.srt.model_executor.model_runner import ModelRunner as runner\n"
        "hooked = [hasattr(f, '__wrapped__') for f in (runner.load_model, locations.update)]\n"
        "print(hooked)"
    )
    said = serving.run_with_plugins(program, tmp_path, {**ENVIRON, "LPLB_EP": mode})
    assert said == str([mode == "1"] * 2)


@needs_sglang
@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_dispatchers_are_balanced(kind, num_micro_batches):
    out = ranks.run(2, served, kind, num_micro_batches, environ=ENVIRON, timeout=300)
    serving.is_best(out)
