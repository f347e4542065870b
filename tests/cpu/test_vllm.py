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


class Model:
    """What vLLM's EPLB asks of a model: layers, their weights by slot, and its sizes."""

    num_expert_groups, num_shared_experts = 1, 0
    num_routed_experts = num_logical_experts = serving.NUM_EXPERTS
    num_physical_experts = serving.NUM_SLOTS
    num_redundant_experts = serving.NUM_SLOTS - serving.NUM_EXPERTS

    def __init__(self, dispatchers, group):
        self.moe_layers = [layer_of(dispatcher) for dispatcher in dispatchers]
        self.num_moe_layers = len(dispatchers)
        self.num_local_physical_experts = serving.NUM_SLOTS // group.size()
        own = torch.arange(serving.NUM_SLOTS).view(group.size(), -1)[group.rank()]
        first = (own % serving.NUM_EXPERTS).float()  # vLLM's first table
        self.expert_weights = [[first[:, None].clone()] for _ in dispatchers]

    def set_eplb_state(self, *_):
        pass


def rebalanced(group, kind):
    """vLLM's `EplbState` counts loads, chooses tables and moves weights; the plugin follows."""
    vllm = imported()
    import deep_ep
    from vllm.distributed.eplb import eplb_state

    client.register()
    client.register()  # vLLM may load plugins more than once
    one = SimpleNamespace(device_group=group, cpu_group=group, world_size=group.size())
    for name in ("get_ep_group", "get_eplb_group"):
        setattr(eplb_state, name, lambda: one)
    eplb_state.get_node_count, eplb_state.PIN_MEMORY = (lambda: 1), False
    torch.Event = lambda **_: SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda _: 0.0
    )
    config = SimpleNamespace(
        enable_elastic_ep=False,
        num_ubatches=0,
        eplb_config=SimpleNamespace(
            use_async=False,
            window_size=4,
            step_interval=3,
            policy="default",
            communicator="torch_nccl",  # over the group of the CPU, where weights are there
            log_balancedness_interval=100,
        ),
    )
    buffer = serving.buffer_of(kind, deep_ep, group)
    dispatchers = [dispatcher_of(vllm, kind, buffer, group) for _ in range(2)]
    state = eplb_state.EplbState(config, torch.device("cpu"))
    model, model_config = Model(dispatchers, group), SimpleNamespace(compute_hash=lambda: "one")
    state.add_model(model, model_config, "a model")
    (engine,), tables = client.balanced.values(), state.model_states["one"].physical_to_logical_map
    first, loads = tables.clone(), state.model_states["one"].expert_load_pass

    def step():
        loads[:] = torch.randint(0, 100, loads.shape, generator=torch.Generator().manual_seed(7))
        with torch.inference_mode():
            state.step()
        # The weights that vLLM has moved are those of its table.
        own = tables.view(2, group.size(), -1)[:, group.rank()].float()
        for weights, held in zip(model.expert_weights, own, strict=True):
            assert torch.equal(weights[0][:, 0], held)

    args = kind, dispatchers, tables, step, 1, 8, vllm.unquantized
    seen = serving.serve(group, *args, reduce=(vllm.reduce[kind],), writes=False)
    assert not torch.equal(first, tables)
    client.balanced.clear()
    assert sum(engine.num_batches.values()) == 16
    return seen


@needs_vllm
@pytest.mark.parametrize("kind", serving.STAND_INS)
def test_its_rebalancing_is_followed(kind):
    try:
        out = ranks.run(2, rebalanced, kind, environ=ENVIRON, timeout=300)
    finally:
        ranks.close()  # which have a part of torch replaced
    serving.is_best(out)


@needs_vllm
@pytest.mark.parametrize("mode", ["0", "1"])
def test_vllm_finds_the_plugin(tmp_path, mode):
    program = (
        "import vllm.plugins; vllm.plugins.load_general_plugins()\n"
        "from vllm.distributed.eplb.eplb_state import EplbState as state\n"
        "print([hasattr(f, '__wrapped__') for f in (state.add_model, state.step)])"
    )
    said = serving.run_with_plugins(program, tmp_path, {**ENVIRON, "LPLB_EP": mode})
    assert said == str([mode == "1"] * 2)


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
