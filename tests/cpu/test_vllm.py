"""vLLM's own dispatch classes and EPLB, unmodified, over the embedded buffers.

They run where vLLM can be imported: its wheel without its compiled kernels does (CONTRIBUTING.md).
What needs a GPU in them is replaced: pinned memory for counts, and the schedule of micro-batches.
"""

import importlib.util
import logging
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import serving
import torch

import lplb_ep
from lplb_ep import ContractError
from lplb_ep.clients import vllm as client
from lplb_ep.layer import channels

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="no vLLM")
ENVIRON = {"LPLB_EP": "1", "LPLB_EP_BACKEND": "embedded", "VLLM_TARGET_DEVICE": "empty"}


def imported():
    """vLLM's modules, over the embedded buffers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert client.switch_on("vLLM")
        import vllm.model_executor.layers.fused_moe.modular_kernel as kernel
        from vllm.model_executor.layers.fused_moe import topk_weight_and_reduce
        from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
        from vllm.model_executor.layers.fused_moe.prepare_finalize import (
            deepep_ht,
            deepep_ll,
            deepep_v2,
        )
        from vllm.v1.worker import ubatching
    logging.getLogger("vllm").setLevel(logging.ERROR)
    for module in (ubatching, deepep_ht, deepep_ll, deepep_v2):
        module.dbo_current_ubatch_id = serving.current
    # Its own stages counts in pinned memory, which needs a GPU.
    kernel.ExpertTokensMetadata.make_from_list = staticmethod(
        lambda counts, device: kernel.ExpertTokensMetadata(
            expert_num_tokens=torch.tensor(counts), expert_num_tokens_cpu=torch.tensor(counts)
        )
    )
    reduce = {
        "ht": topk_weight_and_reduce.TopKWeightAndReduceNoOP(),
        "ll": topk_weight_and_reduce.TopKWeightAndReduceDelegate(),
        "v2": topk_weight_and_reduce.TopKWeightAndReduceNoOP(),
    }
    return SimpleNamespace(
        deepep_ht=deepep_ht,
        deepep_ll=deepep_ll,
        deepep_v2=deepep_v2,
        unquantized=FUSED_MOE_UNQUANTIZED_CONFIG,
        reduce=reduce,
    )


def dispatcher_of(vllm, kind, buffer, group):
    """As its `maybe_make_prepare_finalize` makes it."""
    num_ranks, own = group.size(), serving.NUM_SLOTS // group.size()
    if kind == "ll":
        return vllm.deepep_ll.DeepEPLLPrepareAndFinalize(buffer, serving.MOST_TOKENS, num_ranks)
    if kind == "ht":
        return vllm.deepep_ht.DeepEPHTPrepareAndFinalize(
            buffer, num_ranks, num_ranks, group.rank() * own
        )
    return vllm.deepep_v2.DeepEPV2PrepareAndFinalize(
        *(buffer, num_ranks, num_ranks, group.rank() * own, serving.NUM_SLOTS, serving.NUM_TOPK)
    )


def layer_of(dispatcher):
    """What of vLLM's MoE layer leads to its dispatcher."""
    method = SimpleNamespace(moe_kernel=SimpleNamespace(prepare_finalize=dispatcher))
    return SimpleNamespace(routed_experts=SimpleNamespace(quant_method=method))


def model_state(dispatchers, tables, num_micro_batches):
    model = SimpleNamespace(
        moe_layers=[layer_of(d) for d in dispatchers], num_logical_experts=serving.NUM_EXPERTS
    )
    return SimpleNamespace(
        model=model,
        physical_to_logical_map=tables,
        num_unpadded_tokens_tensors=[torch.tensor(0)] * num_micro_batches,
    )


def served(group, kind, num_micro_batches):
    vllm = imported()
    import deep_ep

    tables = serving.table(np.random.default_rng(1), 2)
    buffer = serving.buffer_of(kind, deep_ep, group)
    dispatchers = [dispatcher_of(vllm, kind, buffer, group) for _ in range(2)]
    engine = client.balance(model_state(dispatchers, tables, num_micro_batches))
    made = [p for p in channels[group].values() if p.layer in engine.layers.values()]
    assert len(made) == 2 * num_micro_batches  # before the first batch
    reduce = (vllm.reduce[kind],)
    args = kind, dispatchers, tables, engine.refresh, num_micro_batches, 6, vllm.unquantized
    return serving.serve(group, *args, reduce=reduce)


@needs_vllm
@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("kind", serving.STAND_INS)
def test_its_own_dispatch_classes_are_balanced(kind, num_micro_batches):
    out = ranks.run(2, served, kind, num_micro_batches, environ=ENVIRON, timeout=300)
    serving.is_best(out)


def refused(group, made, expected):
    """Balances a model of one layer that dispatches as `made` says."""
    buffer = serving.buffer_of("ht", lplb_ep, group)
    if made == "passthrough":
        dispatcher = SimpleNamespace()
    elif made == "another buffer":
        dispatcher = serving.HighThroughput(object(), group.size(), group.rank())
    else:
        dispatcher = serving.HighThroughput(buffer, group.size(), group.rank())
        dispatcher.global_to_physical = torch.arange(serving.NUM_SLOTS)
    tables = serving.table(np.random.default_rng(1), 1)
    with pytest.raises(ContractError, match=expected):
        client.balance(model_state([dispatcher], tables, 1))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("passthrough", "MoE layer 0 of vLLM dispatches by SimpleNamespace.*--all2all-backend"),
        ("another buffer", "MoE layer 0 of vLLM dispatches by object of builtins"),
        ("round robin", "MoE layer 0 of vLLM places experts round robin"),
    ],
)
def test_what_is_not_balanced_is_refused_by_name(made, expected):
    ranks.run(1, refused, made, expected, environ=ENVIRON)


def test_elastic_expert_parallelism_is_refused_by_name():
    config = SimpleNamespace(enable_elastic_ep=True)
    with pytest.raises(ContractError, match="elastic expert parallelism"):
        client._add(SimpleNamespace(parallel_config=config, model_states={}))


def test_nothing_is_done_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it would raise
    monkeypatch.setenv("LPLB_EP", "0")
    client.register()
