"""The overriding methods: what the drop-ins do in place of DeepEP's, and around them.

An override that has nothing to do passes the caller's arguments on untouched.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ContractError
from ..layer import channels
from ..placement.table import Placement
from ..settings import Settings
from .calls import Call, Original, is_inside
from .channels import BufferState, LayerUse, state_of
from .context import layer_in_force, planned_by, refuse_when_off, used
from .plans import PlannedCall, plan

Hook = Callable[[Any, BufferState, Call], Any]
"""Makes a call of a buffer, whose state it is given."""


def override(function: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """A method in the place of one of DeepEP's, which goes by `hook` where ranks balance."""
    original = Original(function)

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_inside.get():
            return function(self, *args, **kwargs)
        state: BufferState | None = getattr(self, "_lplb_state", None)
        if state is None:  # made before the patch
            if used() is not None:
                state_of(self)
            return function(self, *args, **kwargs)
        if state.settings.mode == "0":
            if used() is not None:
                refuse_when_off(state.settings, "use()")
            return function(self, *args, **kwargs)
        return hook(self, state, Call(original, [self, *args], kwargs))

    return method


def refuse_unknown(class_name: str, method: str) -> Hook:
    """The hook of a method that takes experts and is not in the contract."""

    def refuse(self: Any, state: BufferState, call: Call) -> Any:
        if planned_by(self, state) is None:
            return call.forward()
        raise ContractError(
            f"{class_name}.{method} takes experts, and lplb_ep does not know what it does with "
            "them: it cannot be called while a placement is in force"
        )

    return refuse


# --- Buffer: high throughput ----------------------------------------------------------------------


def _get_dispatch_layout(self: Any, state: BufferState, call: Call) -> Any:
    use = planned_by(self, state)
    if use is None:
        return call.forward()

    def check(topk_idx: torch.Tensor) -> None:
        limits = state.contract.limits
        limits.check_picks(topk_idx, limits.topk)
        if state.low_latency_mode:  # else this was checked with the placement
            state.check_slots(use.layer.placement)

    planned = plan(self, state, use, call, check)
    layout = call.forward()
    state.planned[state.contract.key_of("get_dispatch_layout", layout)] = planned
    return layout


def _dispatch(self: Any, state: BufferState, call: Call) -> Any:
    """Takes the plan of the layout that it is given."""
    layout, handle = call["is_token_in_rank"], call["handle"]
    for part in handle if isinstance(handle, (tuple, list)) else ():
        planned = _plan_of(state, part)  # the layout that was planned is one of the parts
        if planned is not None:
            planned.check_current()
    if handle is not None or layout is None:
        return call.forward()  # a cached dispatch; or an incomplete one, which DeepEP refuses
    planned = _plan_of(state, layout)
    if planned is None:
        if state.is_registered:
            raise ContractError(
                "is_token_in_rank is not from this buffer's get_dispatch_layout: a layout made "
                "elsewhere does not know the plan"
            )
        return call.forward()
    if call["topk_idx"] is not None:
        planned.replace_picks(call)
    event = call.event("previous_event")
    if event is not None:
        # The caller's may be older than the rewrite, which the communication must not overtake.
        event.current_stream_wait()
        call["previous_event"] = self.capture()
    return planned.forward(call)


def _plan_of(state: BufferState, key: Any) -> PlannedCall | None:
    """The plan that a later call names by a tensor or handle, if it is one of this buffer's."""
    if key is None or isinstance(key, (int, tuple, list)):  # these take no weak references
        return None
    planned: PlannedCall | None = state.planned.get(key)
    return planned


# --- Buffer: low latency --------------------------------------------------------------------------


def _low_latency_dispatch(self: Any, state: BufferState, call: Call) -> Any:
    use = planned_by(self, state)
    if use is None:
        return call.forward()

    def check(topk_idx: torch.Tensor) -> None:
        _check_low_latency(self, state, use, call, topk_idx)

    planned = plan(self, state, use, call, check)
    out = planned.forward(call)
    state.planned[state.contract.key_of("low_latency_dispatch", out)] = planned
    return out


def _check_low_latency(
    buffer: Any, state: BufferState, use: LayerUse, call: Call, topk_idx: torch.Tensor
) -> None:
    """Raises ContractError unless the call fits into the buffer and DeepEP's limits."""
    x, tokens = call["x"], call["num_max_dispatch_tokens_per_rank"]
    _check_rows(x, topk_idx)
    if not isinstance(tokens, int):
        raise ContractError(
            f"num_max_dispatch_tokens_per_rank must be a whole number; got {tokens!r}"
        )
    if len(topk_idx) > tokens:
        raise ContractError(
            f"x must have at most num_max_dispatch_tokens_per_rank={tokens} tokens; "
            f"got {len(topk_idx)}"
        )
    placement = use.layer.placement
    E, P = placement.num_experts, placement.num_physical_experts
    sizes = (tokens, x.shape[1], P, topk_idx.shape[1])
    if sizes in state.low_latency_calls:
        return
    limits = state.contract.limits
    limits.check_low_latency_rows(x)
    limits.check_picks(topk_idx, limits.low_latency_topk)
    limits.check_low_latency(placement, state.num_qps)
    needed, of_experts = (_num_rdma_bytes(state, sizes, placement, slots) for slots in (P, E))
    if buffer.num_rdma_bytes < needed:
        raise ContractError(
            f"num_rdma_bytes is {buffer.num_rdma_bytes}, and {P} slots need {needed} "
            f"({E} experts: {of_experts}); make the placement, "
            "or set LPLB_EP_NUM_PHYSICAL_EXPERTS, before get_low_latency_rdma_size_hint"
        )
    if state.low_latency_slots not in (None, P):
        # DeepEP lays the buffer out by the number of experts, and cleans only what it knows of.
        raise ContractError(
            f"this buffer's low-latency calls have had placements of {state.low_latency_slots} "
            f"slots, and this one has {P}: make a buffer for each number of slots"
        )
    state.low_latency_slots = P
    state.low_latency_calls.add(sizes)


def _num_rdma_bytes(
    state: BufferState, sizes: tuple[int, ...], placement: Placement, num_slots: int
) -> int:
    assert state.size_hint is not None, "a buffer with low_latency_dispatch has a size hint"
    return state.size_hint(
        num_max_dispatch_tokens_per_rank=sizes[0],
        hidden=sizes[1],
        num_ranks=placement.num_ranks,
        num_experts=num_slots,
    )


def _low_latency_combine(self: Any, state: BufferState, call: Call) -> Any:
    handle = call["handle"]
    planned = _plan_of(state, handle[0]) if isinstance(handle, (tuple, list)) and handle else None
    if planned is not None:
        planned.check_current()
        planned.replace_picks(call, may_be_masked=True)
    elif state.is_registered:
        raise ContractError("handle is not from this buffer's low_latency_dispatch")
    return call.forward()


# --- ElasticBuffer --------------------------------------------------------------------------------


def _elastic_dispatch(self: Any, state: BufferState, call: Call) -> Any:
    handle = call["handle"]
    if handle is not None:
        planned = _plan_of(state, handle)
        if planned is not None:
            planned.check_current()
            if call["num_experts"] == planned.placement.num_experts:
                call["num_experts"] = planned.placement.num_physical_experts
        return call.forward()
    use = planned_by(self, state)
    if use is None:
        return call.forward()

    def check(topk_idx: torch.Tensor) -> None:
        _check_elastic(self, state, call, topk_idx)

    planned = plan(self, state, use, call, check)
    out = planned.forward(call)
    state.planned[state.contract.key_of("dispatch", out)] = planned
    return out


def _check_elastic(buffer: Any, state: BufferState, call: Call, topk_idx: torch.Tensor) -> None:
    """Raises ContractError unless the call fits together and into DeepEP's limits."""
    x, limits = call["x"], state.contract.limits
    rows = x[0] if isinstance(x, tuple) and x else x
    _check_rows(rows, topk_idx)
    most = call.get("num_max_tokens_per_rank")
    if most is None:
        most = getattr(buffer, "num_max_tokens_per_rank", None)
    if most is not None and len(topk_idx) > most:
        raise ContractError(
            f"x must have at most num_max_tokens_per_rank={most} tokens; got {len(topk_idx)}"
        )
    weights = call.get("topk_weights")
    if weights is not None and getattr(weights, "shape", None) != topk_idx.shape:
        shown = getattr(weights, "shape", type(weights).__name__)
        raise ContractError(
            f"topk_weights must be as topk_idx, {list(topk_idx.shape)}; got {shown}"
        )
    limits.check_rows(rows)
    limits.check_picks(topk_idx, limits.topk)


def _check_rows(x: Any, topk_idx: torch.Tensor) -> None:
    """Raises ContractError unless there is a row for the picks of each token."""
    if not isinstance(x, torch.Tensor) or x.ndim != 2:
        raise ContractError(
            f"x must be a tensor [tokens, hidden]; got {getattr(x, 'shape', type(x).__name__)}"
        )
    if len(x) != len(topk_idx):
        raise ContractError(
            f"x must have a row for each token of topk_idx, {len(topk_idx)}; got {len(x)}"
        )


# --- numbers of experts, and the end --------------------------------------------------------------


def _count_slots(self: Any, state: BufferState, call: Call) -> Any:
    """For calls that only ask how many experts there are.

    Of the placement in force, if one is, else of any.
    """
    use = layer_in_force(self, state)
    known: Iterable[Placement] = ()
    if use is not None:
        known = (use.layer.placement,)
    elif isinstance(state.group, dist.ProcessGroup):
        known = [planner.placement for planner in channels.get(state.group, {}).values()]
    call["num_experts"] = _num_slots(call["num_experts"], known)
    return call.forward()


def _clean(self: Any, state: BufferState, call: Call) -> Any:
    if state.low_latency_slots is None:
        return _count_slots(self, state, call)
    call["num_experts"] = state.low_latency_slots  # what its calls have laid the buffer out by
    return call.forward()


def _destroy(self: Any, state: BufferState, call: Call) -> Any:
    """Once: a buffer and its views may be destroyed in any order."""
    if state.destroyed:
        return None
    out = call.forward()
    state.destroyed = True
    return out


def size_hint(function: Callable[..., int]) -> staticmethod[..., int]:
    """The override of `get_low_latency_rdma_size_hint`, which belongs to no buffer."""
    original = Original(function)

    @functools.wraps(function)
    def get_low_latency_rdma_size_hint(*args: Any, **kwargs: Any) -> int:
        settings = Settings.from_env()
        if settings.mode == "0":
            return function(*args, **kwargs)
        call = Call(original, [*args], kwargs)
        known = [p.placement for planners in channels.values() for p in planners.values()]
        if settings.placement:
            known.append(Placement.load(settings.placement))
        call["num_experts"] = _num_slots(call["num_experts"], known, settings.num_physical_experts)
        return call.forward()

    return staticmethod(get_low_latency_rdma_size_hint)


def _num_slots(num_experts: int, placements: Iterable[Placement], at_least: int = 0) -> int:
    """The slots of that many experts: of the largest placement of so many."""
    if not isinstance(num_experts, numbers.Integral):  # which DeepEP refuses
        return num_experts
    slots = [p.num_physical_experts for p in placements if p.num_experts == num_experts]
    return max([num_experts, at_least, *slots])


HOOKS: dict[str, dict[str, Hook]] = {
    "Buffer": {
        "get_dispatch_layout": _get_dispatch_layout,
        "dispatch": _dispatch,
        "internode_dispatch": _dispatch,
        "low_latency_dispatch": _low_latency_dispatch,
        "low_latency_combine": _low_latency_combine,
        "clean_low_latency_buffer": _clean,
        "destroy": _destroy,
    },
    "ElasticBuffer": {
        "dispatch": _elastic_dispatch,
        "get_theoretical_num_sms": _count_slots,
        "destroy": _destroy,
    },
}
"""By class and method."""
