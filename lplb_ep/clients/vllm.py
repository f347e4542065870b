"""vLLM: its MoE layers plan by the tables of its own EPLB, through its own dispatch classes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from ..deepep.channels import BufferState
from ..errors import ContractError
from .engines import EngineLayers, describe, switch_on

log = logging.getLogger("vllm.lplb_ep")  # whose lines vLLM shows

_BACKENDS = "deepep_high_throughput, deepep_low_latency or deepep_v2"

balanced: dict[int, EngineLayers] = {}
"""The layers of each of vLLM's `EplbModelState`s in this process, by its id."""


def register() -> None:
    """What vLLM calls in each of its processes: the entry point of its general plugins.

    It does nothing unless `LPLB_EP` is 1 or home. Then models with EPLB are balanced once they are
    loaded, and follow the engine's table.
    """
    if not switch_on("vLLM"):
        return
    from vllm.distributed.eplb.eplb_state import EplbState

    if hasattr(EplbState.add_model, "__wrapped__"):
        return
    EplbState.add_model = _after(EplbState.add_model, _add)
    EplbState.step = _after(EplbState.step, _follow)


def balance(model_state: Any) -> EngineLayers:
    """Has the MoE layers of a loaded model plan their batches. Collective.

    Args:
        model_state: the model's `EplbModelState`. Its table says which expert each slot holds, and
            its model has the layers. With micro-batches in flight (DBO) each has a channel.

    Returns:
        The layers. Call its `refresh` on every rank after each `EplbState.step`; `register` does.

    Raises:
        ContractError: a layer does not dispatch by DeepEP, or renames experts; names the layer.
        PlacementError: as `EngineLayers`.
        RankError: ranks have different tables.
    """
    model = model_state.model
    dispatchers = [_dispatcher(number, layer) for number, layer in enumerate(model.moe_layers)]
    if not dispatchers:
        raise ContractError("the model has no MoE layers")
    state: BufferState = dispatchers[0].buffer._lplb_state
    engine = EngineLayers(
        lambda: model_state.physical_to_logical_map,
        range(len(dispatchers)),
        dispatchers[0].num_dispatchers(),
        model.num_logical_experts,
        state.num_ranks_per_node,
    )
    num_slots = len(model_state.num_unpadded_tokens_tensors or [None])
    for number, dispatcher in enumerate(dispatchers):
        for slot in range(num_slots):
            dispatcher.buffer.view(engine.layers[number], slot)  # makes the channel, on all ranks
        engine.put_in_force(number, dispatcher, "prepare_async", _micro_batch())
    log.info("%d MoE layers plan their batches (lplb_ep)", len(dispatchers))
    return engine


def _dispatcher(number: int, layer: Any) -> Any:
    """The object by which a layer dispatches, and no other layer.

    Raises:
        ContractError: it is none of those that lplb_ep balances.
    """
    layer = getattr(layer, "routed_experts", layer)
    kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
    found: Any = getattr(kernel, "prepare_finalize", None)
    name = f"MoE layer {number} of vLLM"
    if not hasattr(found, "prepare_async") or not hasattr(found, "buffer"):
        raise ContractError(
            f"{name} dispatches by {type(found).__name__}, which lplb_ep does not balance: start "
            f"vLLM with --all2all-backend {_BACKENDS}"
        )
    if getattr(found.buffer, "_lplb_state", None) is None:
        raise ContractError(
            f"{name} dispatches by {type(found.buffer).__name__} of "
            f"{type(found.buffer).__module__}, which was made before lplb_ep was switched on, or "
            "is not DeepEP's"
        )
    if getattr(found, "global_to_physical", None) is not None:
        raise ContractError(
            f"{name} places experts round robin, and its table does not say so: start vLLM "
            "with --expert-placement-strategy linear"
        )
    return found


def _micro_batch() -> Callable[[], int]:
    """vLLM's function that says which of the micro-batches in flight runs in this thread."""
    from vllm.v1.worker.ubatching import dbo_current_ubatch_id

    function: Callable[[], int] = dbo_current_ubatch_id
    return function


def _after(method: Callable[..., Any], then: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = method(self, *args, **kwargs)
        then(self)
        return out

    return called


def _add(eplb_state: Any) -> None:
    if getattr(eplb_state.parallel_config, "enable_elastic_ep", False):
        raise ContractError(
            "lplb_ep does not balance vLLM's elastic expert parallelism, which changes the number "
            "of ranks: start vLLM without --enable-elastic-ep, or set LPLB_EP=0"
        )
    for model_state in eplb_state.model_states.values():
        if id(model_state) not in balanced:
            balanced[id(model_state)] = balance(model_state)


def _follow(eplb_state: Any) -> None:
    for model_state in eplb_state.model_states.values():
        if id(model_state) in balanced:
            engine = balanced[id(model_state)]
            if moved := engine.refresh():
                planned = describe(engine.num_batches)
                log.info("experts of %d MoE layers have moved; planned: %s", len(moved), planned)
