"""The methods with which the drop-ins replace DeepEP's.

One that has nothing to do passes the caller's arguments on untouched.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from ..errors import ContractError
from ..layer import channels
from ..placement.layer_files import placements_of_modules
from ..placement.table import Placement
from ..planning.inputs import num_ids
from ..settings import Settings
from .calls import Call, Original, is_inside
from .channels import BufferState, state_of
from .checks import ELASTIC, LAYOUT, LOW_LATENCY
from .context import layer_in_force, planned_by, refuse_when_off, used
from .plans import PlannedCall, plan

Hook = Callable[[Any, BufferState, Call], Any]
"""Makes a call of a buffer, whose state it is given."""


def override(function: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """A method that replaces one of DeepEP's, and calls `hook` where ranks balance."""
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
        if state.is_off:
            if used() is not None:
                refuse_when_off(state.settings, "use()")
            return function(self, *args, **kwargs)
        return hook(self, state, original.call((self,), args, kwargs))

    return method


def refuse_unknown(base: type, name: str) -> Any:
    """The override of a method that takes experts and is not in the contract.

    A static or class method belongs to no buffer: it is refused once these ranks have planned, too.
    """
    member = inspect.getattr_static(base, name)
    message = (
        f"{base.__name__}.{name} takes experts, and lplb_ep does not know what it does with "
        "them: it cannot be called while a placement is in force"
    )

    def refuse(self: Any, state: BufferState, call: Call) -> Any:
        if planned_by(self, state) is None:
            return call.forward()
        raise ContractError(message)

    if not isinstance(member, (staticmethod, classmethod)):
        return override(getattr(base, name), refuse)

    @functools.wraps(member.__func__)
    def function(*args: Any, **kwargs: Any) -> Any:
        if not is_inside.get() and (used() is not None or any(channels.values())):
            raise ContractError(message)
        return member.__func__(*args, **kwargs)

    return type(member)(function)


# --- Buffer: high throughput ----------------------------------------------------------------------


def _get_dispatch_layout(self: Any, state: BufferState, call: Call) -> Any:
    use = planned_by(self, state)
    if use is None:
        return call.forward()
    planned = plan(self, state, use, call, LAYOUT)
    layout = call.forward()
    planned.travel_on(state.key_of("get_dispatch_layout", layout))
    return layout


def _dispatch(self: Any, state: BufferState, call: Call) -> Any:
    """Takes the plan of the layout that it is given."""
    layout, handle = call.get("is_token_in_rank"), call.get("handle")
    for part in handle if isinstance(handle, (tuple, list)) else ():
        planned = PlannedCall.of(part, state)  # the layout that was planned is one of the parts
        if planned is not None:
            return planned.forward_again(self, call)
    if handle is not None or layout is None:
        return call.forward()  # a cached dispatch; or an incomplete one, which DeepEP refuses
    planned = PlannedCall.of(layout, state)
    if planned is None:
        if state.must_plan:
            raise ContractError(
                "is_token_in_rank is not from this buffer's get_dispatch_layout: a layout made "
                "elsewhere does not know the plan"
            )
        return call.forward()
    if (given := call.get("topk_idx")) is not None:
        call["topk_idx"] = planned.slots_for(given)
    event = call.event("previous_event") if "previous_event" in call else None
    if event is not None:
        # The caller's may be older than the rewrite, which the communication must not overtake.
        event.current_stream_wait()
        call["previous_event"] = self.capture()
    return planned.forward(self, call)


# --- Buffer: low latency --------------------------------------------------------------------------


def _low_latency_dispatch(self: Any, state: BufferState, call: Call) -> Any:
    use = planned_by(self, state)
    if use is None:
        return call.forward()
    planned = plan(self, state, use, call, LOW_LATENCY)
    out = planned.forward(self, call)
    planned.travel_on(state.key_of("low_latency_dispatch", out))
    return out


def _low_latency_combine(self: Any, state: BufferState, call: Call) -> Any:
    handle = call.get("handle")
    first = handle[0] if isinstance(handle, (tuple, list)) and handle else None
    planned = PlannedCall.of(first, state)
    if planned is not None:
        planned.check_current()
        call["topk_idx"] = planned.slots_for(call["topk_idx"], may_be_masked=True)
    elif state.must_plan:
        raise ContractError("handle is not from this buffer's low_latency_dispatch")
    return call.forward()


# --- ElasticBuffer --------------------------------------------------------------------------------


def _elastic_dispatch(self: Any, state: BufferState, call: Call) -> Any:
    handle = call.get("handle")
    if handle is not None:
        planned = PlannedCall.of(handle, state)
        if planned is None:
            return call.forward()
        if call["num_experts"] in _ids(planned.placement):
            call["num_experts"] = planned.placement.num_physical_experts
        return planned.forward_again(self, call)
    use = planned_by(self, state)
    if use is None:
        return call.forward()
    planned = plan(self, state, use, call, ELASTIC)
    out = planned.forward(self, call)
    planned.travel_on(state.key_of("dispatch", out))
    return out


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
    original = Original(function, num_owners=0)

    @functools.wraps(function)
    def get_low_latency_rdma_size_hint(*args: Any, **kwargs: Any) -> int:
        settings = Settings.from_env()
        if settings.mode == "0":
            return function(*args, **kwargs)
        call = original.call((), args, kwargs)
        known = [p.placement for planners in channels.values() for p in planners.values()]
        if settings.placement:
            known += placements_of_modules(settings.placement).values()
        call["num_experts"] = _num_slots(call["num_experts"], known, settings.num_physical_experts)
        return call.forward()

    return staticmethod(get_low_latency_rdma_size_hint)


def _num_slots(num_experts: int, placements: Iterable[Placement], at_least: int = 0) -> int:
    """The slots of that many experts: of the largest placement of so many."""
    if not isinstance(num_experts, numbers.Integral):  # which DeepEP refuses
        return num_experts
    slots = [p.num_physical_experts for p in placements if num_experts in _ids(p)]
    return max([num_experts, at_least, *slots])


def _ids(placement: Placement) -> tuple[int, int]:
    """By which numbers of experts a caller may mean a placement: logical, or an engine's slots."""
    return num_ids(placement, "logical"), num_ids(placement, "physical")


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
