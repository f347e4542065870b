"""The layer that a call plans for: a view's, a context's or a buffer's.

One buffer serves every layer of a model, and every layer has a placement of its own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.utils.hooks import RemovableHandle

from ..errors import ContractError
from ..layer import Layer
from ..logs import logger
from ..placement.table import Placement
from ..settings import Settings
from ..weights.slots import slot_parameters
from .channels import BufferState, LayerUse, layer_use, register, state_of

log = logger(__name__)


class _Entered(NamedTuple):
    """A layer that is in force in this context."""

    attachment: object | None
    """Who put it there; None: `use`."""
    use: LayerUse


_entered: ContextVar[tuple[_Entered, ...]] = ContextVar("lplb_ep.use", default=())
"""Those that are in force, innermost last."""

_attached: WeakKeyDictionary[torch.nn.Module, list[_Entered]] = WeakKeyDictionary()
"""Of each module its attachments, the last one made last."""

_BACKWARD = ("torch.autograd", "torch.autograd.graph")
"""The modules of torch whose functions begin a backward pass."""


def used() -> LayerUse | None:
    """The layer that `use` or an attached module put in force."""
    entered = _entered.get()
    return entered[-1].use if entered else None


@contextlib.contextmanager
def use(placement: Layer | Placement, slot: int = 0) -> Iterator[None]:
    """Puts a placement in force on every buffer, for calls that have no view.

    It sets a context variable, which is read only when a plan is made: a backward pass needs none.
    Entering is local.

    Args:
        placement: the layer that runs inside, or the placement object that stands for it.
        slot: which of the micro-batches in flight; each has a channel of its own.

    Raises:
        TypeError: `placement` is neither a layer nor a placement.
        ValueError: `slot` is not a whole number in [0, 2**31).
    """
    token = _entered.set((*_entered.get(), _Entered(None, layer_use(placement, slot))))
    try:
        yield
    finally:
        _entered.reset(token)


def modules_running() -> Iterator[torch.nn.Module]:
    """Yields the modules whose code runs in this thread, innermost first.

    These are the `self` of a method, or of a function within one, that has not returned. A backward
    pass is no part of the method that began it. So a checkpoint inside a module is of that module
    in the recompute, too.
    """
    last: torch.nn.Module | None = None
    # This frame is left out: its locals, once read, would hold the frame itself. Only the garbage
    # collector would then free it and its callers.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") not in _BACKWARD:
        owner = _self_of(frame)
        if isinstance(owner, torch.nn.Module) and owner is not last:
            yield owner
            last = owner
        frame = frame.f_back


def _self_of(frame: FrameType) -> object:
    """The `self` of a function that runs, if it has one.

    Before Python 3.13, reading a frame's locals keeps them alive until its function returns.
    """
    code = frame.f_code
    names = (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
    return frame.f_locals.get("self") if "self" in names else None


def layer_running() -> LayerUse | None:
    """The layer of the innermost attached module whose code runs in this thread."""
    for module in modules_running():
        attachments = _attached.get(module)
        if attachments:
            return attachments[-1].use
    return None


def layer_in_force(buffer: Any, state: BufferState) -> LayerUse | None:
    """The view's layer, else the context's, else the buffer's own."""
    own: LayerUse | None = getattr(buffer, "_lplb_use", None)
    if own is not None:
        return own
    entered = _entered.get()
    return entered[-1].use if entered else state.default


def planned_by(buffer: Any, state: BufferState) -> LayerUse | None:
    """The layer for which a call plans; None: pass the call on.

    Raises:
        ContractError: nothing is in force, callers pass experts, and the ranks have planned before.
    """
    own: LayerUse | None = getattr(buffer, "_lplb_use", None)
    use = layer_in_force(buffer, state) if own is None else own
    if use is not None:
        return use
    if state.must_plan:
        use = layer_running() if state.find_modules is None else state.find_modules()
        if use is None:
            raise ContractError(_nothing_in_force(state))
        return use
    if not state.warned:
        state.warned = True
        log.warning(
            "LPLB_EP=%s, and no placement is %s: calls are passed on unchanged",
            state.settings.mode,
            "in force for a call" if state.is_registered else "registered on this buffer",
        )
    return None


def _nothing_in_force(state: BufferState) -> str:
    running = ", ".join(type(module).__name__ for module in modules_running()) or "none"
    where = (
        "Call the buffer through buffer.view(placement), within lplb_ep.use(placement), or from "
        "code of a module that was attached"
        if state.find_modules is None
        else f"Name its layer's module in {state.settings.placement}"
    )
    return (
        "no placement is in force for this call, and these ranks have planned with some, or have "
        f"placements by module. {where}. Modules whose code calls it, innermost first: {running}"
    )


def refuse_when_off(settings: Settings, what: str) -> None:
    """Refuses a placement, given to `what`, while nothing is balanced.

    An engine that picks slots itself may have one: its own picks are passed on then.

    Raises:
        ContractError: LPLB_EP is 0, and callers pass experts.
    """
    if settings.mode == "0" and settings.indices == "logical":
        raise ContractError(
            f"{what} was given a placement, and LPLB_EP is 0 (or unset), which suits only a model "
            "without replica slots; set LPLB_EP=home or LPLB_EP=1"
        )


def check_local_slots(placement: Placement, num_local_slots: int | None) -> None:
    """Compares the slots that a model says it has on a rank with the placement's.

    Raises:
        ContractError: they differ.
    """
    if num_local_slots != placement.num_local_slots:
        raise ContractError(
            f"num_local_slots must be the slots a rank has in the placement and in the model, "
            f"{placement.num_local_slots}; got {num_local_slots}"
        )


def attach(
    module: torch.nn.Module,
    placement: Layer | Placement,
    *,
    num_local_slots: int,
    buffer: Any = None,
    experts: torch.nn.Module | Literal[False] | None = None,
    slot: int = 0,
) -> Attached:
    """Declares that a layer has a placement's slots; the placement is in force while it runs.

    Collective where `buffer` is given.

    Args:
        module: the MoE layer, whose forward calls the buffer.
        placement: its `Layer`, or the placement object that stands for one.
        num_local_slots: P / R, the expert slots that the layer has on each rank, guest slots too.
        buffer: the buffer that the layer will call; its channel is made now, not at the first
            batch.
        experts: the layer's slots, whose weights are checked: a ModuleList of P / R modules,
            or a module of parameters whose leading dimension is P / R. Guest slots do not count.
            Default: `module.experts` if there is one. False: no check, for weights with another
            layout.
        slot: which of the micro-batches in flight; each has a channel of its own.

    Returns:
        A handle whose `remove()` detaches the layer. Of several attachments the last one is in
        force.

    Raises:
        ContractError: the slots are not the placement's. Or LPLB_EP is 0, and callers pass experts.
        TypeError: `placement` is neither a layer nor a placement.
        ValueError: the weights do not have that many slots; names the parameter.
        ValueError: `slot` is not a whole number in [0, 2**31).
    """
    state = None if buffer is None else state_of(buffer)

    def check(layer: Layer) -> None:
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module must be a module; got a {type(module).__name__}")
        refuse_when_off(Settings.from_env() if state is None else state.settings, "attach()")
        check_local_slots(layer.placement, num_local_slots)
        weights = getattr(module, "experts", None) if experts is None else experts
        if weights is not None and weights is not False:
            slot_parameters(weights, layer.placement.num_resident_slots)

    if state is None or state.settings.mode == "0":
        own = layer_use(placement, slot)
        check(own.layer)
    else:
        own = register(state, placement, slot, check)
    attachment = object()

    def enter(*_: Any) -> None:
        # Around it, `use(placement, slot)` may have named the micro-batch.
        entered = _entered.get()
        named = (e.use for e in reversed(entered) if e.attachment is None)
        use = next((use for use in named if use.layer is own.layer), own)
        _entered.set((*entered, _Entered(attachment, use)))

    def leave(*_: Any) -> None:
        # Called also where a hook before `enter` raised, and then there is nothing to take back.
        entered = _entered.get()
        depths = [depth for depth, e in enumerate(entered) if e.attachment is attachment]
        if depths:
            _entered.set(entered[: depths[-1]])

    before = module.register_forward_pre_hook(enter)
    after = module.register_forward_hook(leave, always_call=True)
    entry, attachments = _Entered(attachment, own), _attached.setdefault(module, [])
    attachments.append(entry)

    def forget() -> None:
        attachments[:] = [other for other in attachments if other is not entry]

    return Attached(before, after, forget)


@dataclass(frozen=True)
class Attached:
    """A layer's attachment."""

    _before: RemovableHandle
    _after: RemovableHandle
    _forget: Callable[[], None]

    def remove(self) -> None:
        """Detaches the layer: its calls no longer have a placement from it."""
        self._before.remove()
        self._after.remove()
        self._forget()
