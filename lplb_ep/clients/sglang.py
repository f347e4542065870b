"""SGLang: its MoE layers plan by its expert locations, through its own dispatchers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import ContractError
from .engines import EngineLayers, describe, log, switch_on

balanced: list[EngineLayers] = []
"""The layers of the model in this process."""


def register() -> None:
    """What SGLang calls in each of its processes: the entry point of its general plugins.

    It does nothing unless `LPLB_EP` is 1 or home. Then a model whose router picks physical experts
    is balanced once it is loaded, and follows SGLang's rebalancing.
    """
    if not switch_on("SGLang"):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model", _add, HookType.AFTER
    )
    HookRegistry.register(
        "sglang.srt.eplb.expert_location.ExpertLocationMetadata.update", _follow, HookType.AFTER
    )


def balance(model: torch.nn.Module, num_ranks: int, num_ranks_per_node: int | None = None) -> Any:
    """Has the MoE layers of a loaded model plan their batches. Local.

    Their channels are made when they first dispatch, which must not be while a graph is captured.

    Args:
        model: the model; its layers have a `dispatcher` and a `layer_id`.
        num_ranks: R, the ranks of expert parallelism.
        num_ranks_per_node: as for `Placement`.

    Returns:
        The `EngineLayers`; None where SGLang has no expert locations, so there are no copies. Call
        its `refresh` on every rank after `ExpertLocationMetadata.update`; `register` does.

    Raises:
        ContractError: a layer dispatches otherwise than by DeepEP, or its experts are not those of
            the table; names the layer.
        PlacementError: as `EngineLayers`.
    """
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    if metadata is None:
        log.warning("SGLang has no expert locations: start it with --ep-num-redundant-experts")
        return None
    modules = dict(_moe_layers(model))
    if not modules:
        raise ContractError("the model has no MoE layers")
    engine = EngineLayers(
        lambda: get_global_expert_location_metadata().physical_to_logical_map_cpu,
        modules,
        num_ranks,
        metadata.num_logical_experts,
        num_ranks_per_node,
    )
    for number, module in modules.items():
        for slot, parts in enumerate(_dispatchers(number, module)):
            for dispatcher in parts:
                if dispatcher.num_experts != metadata.num_physical_experts:
                    raise ContractError(
                        f"MoE layer {number} of SGLang dispatches to {dispatcher.num_experts} "
                        f"experts, and its table has {metadata.num_physical_experts} slots. Shared "
                        "experts that are fused with the routed ones are not balanced"
                    )
                _put_in_force(engine, number, dispatcher, slot)
    log.info("%d MoE layers plan their batches (lplb_ep)", len(modules))
    return engine


def _moe_layers(model: torch.nn.Module) -> Iterator[tuple[int, Any]]:
    module: Any
    for module in model.modules():
        if hasattr(module, "dispatcher") and hasattr(module, "layer_id"):
            yield module.layer_id, module


def _dispatchers(number: int, module: Any) -> list[list[Any]]:
    """Of each micro-batch, the objects that call DeepEP.

    Raises:
        ContractError: the layer does not dispatch by DeepEP.
    """
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPDispatcher
    from sglang.srt.layers.moe.token_dispatcher.deepep_v2 import DeepEPv2Dispatcher

    found = module.dispatcher
    out = []
    for inner in getattr(found, "_inners", [found]):
        if isinstance(inner, DeepEPv2Dispatcher):
            out.append([inner._impl])
        elif isinstance(inner, DeepEPDispatcher):
            names = ("_normal_dispatcher", "_low_latency_dispatcher")
            out.append([getattr(inner, name) for name in names if hasattr(inner, name)])
        else:
            raise ContractError(
                f"MoE layer {number} of SGLang dispatches by {type(inner).__name__}, which lplb_ep "
                "does not balance: start SGLang with --moe-a2a-backend deepep or deepep_v2"
            )
    return out


def _put_in_force(engine: EngineLayers, number: int, dispatcher: Any, slot: int) -> None:
    """Around the methods that call DeepEP's dispatch."""
    if hasattr(dispatcher, "dispatch_a"):
        for method in ("dispatch_a", "dispatch_b"):
            engine.put_in_force(number, dispatcher, method, lambda: slot)
        return
    dispatcher.dispatch = _with_own_dummy(engine, number, dispatcher)
    engine.put_in_force(number, dispatcher, "dispatch", lambda: slot)


def _with_own_dummy(engine: EngineLayers, number: int, dispatcher: Any) -> Callable[..., Any]:
    """The dispatch of a V2 dispatcher, with another token for a rank that has none in a prefill.

    SGLang's own dummy picks the slots 0, 1, 2, …, of which two may hold one expert. DeepEP's kernel
    takes no token that picks an expert twice. This one picks the homes of the first experts.
    """
    from sglang.srt.layers.dp_attention import get_is_extend_in_batch

    dispatch = dispatcher.dispatch
    if not hasattr(dispatcher, "_pad_empty_combine"):
        raise ContractError(
            "SGLang's DeepEP V2 dispatcher marks its dummy tokens otherwise than lplb_ep knows"
        )

    @functools.wraps(dispatch)
    def dispatch_with_own_dummy(hidden_states: torch.Tensor, topk_output: Any) -> Any:
        if hidden_states.shape[0] or not get_is_extend_in_batch():
            return dispatch(hidden_states, topk_output)
        ids, weights = topk_output.topk_ids, topk_output.topk_weights
        homes = torch.tensor(engine.layers[number].placement.home[: ids.shape[1]].tolist())
        dummy = topk_output._replace(
            topk_ids=homes.to(ids).unsqueeze(0), topk_weights=weights.new_zeros(1, ids.shape[1])
        )
        out = dispatch(hidden_states.new_zeros(1, hidden_states.shape[1]), dummy)
        dispatcher._pad_empty_combine = True  # its row is dropped again, as SGLang's would be
        return out

    return dispatch_with_own_dummy


def _add(_: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """After `ModelRunner.load_model`."""
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata
    from sglang.srt.runtime_context import get_parallel

    if balanced or getattr(runner, "is_draft_worker", False):
        return  # a draft model's experts have no copies
    if not hasattr(ExpertLocationMetadata.update, "__wrapped__"):
        raise ContractError("SGLang did not put the hook on ExpertLocationMetadata.update")
    parallel = get_parallel()
    if getattr(runner, "enable_elastic_ep", False):
        raise ContractError(
            "lplb_ep does not balance SGLang's elastic expert parallelism, which changes the "
            "number of ranks: start SGLang without --elastic-ep-backend, or set LPLB_EP=0"
        )
    per_node = parallel.moe_ep_size // max(1, parallel.nnodes)
    engine = balance(runner.model, parallel.moe_ep_size, per_node)
    if engine is not None:
        balanced.append(engine)


def _follow(*_: Any) -> None:
    """After `ExpertLocationMetadata.update`."""
    for engine in balanced:
        if moved := engine.refresh():
            planned = describe(engine.num_batches)
            log.info("experts of %d MoE layers have moved; planned: %s", len(moved), planned)
