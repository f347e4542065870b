"""Which placement a call goes by: a view's, a context's, a buffer's; and its channel.

One buffer serves every layer of a model, and every layer has a placement of its own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from . import replicas
from .exchange import agree
from .placement import Placement
from .planner import Planner
from .settings import ContractError, Settings

log = logging.getLogger(__name__)

Target = tuple[Placement, int]
"""A placement, and the micro-batch slot whose channel plans with it."""

used: ContextVar[Target | None] = ContextVar("lplb_ep.use", default=None)


@contextlib.contextmanager
def use(placement: Placement, slot: int = 0) -> Iterator[None]:
    """Puts a placement in force on every buffer, for calls that cannot be given a view.

    A context variable, read only when a plan is made: a backward pass needs none. Free to enter.

    Args:
        placement: the copies of the layer that runs inside.
        slot: which of the micro-batches in flight; each has a channel of its own.
    """
    token = used.set((placement, slot))
    try:
        yield
    finally:
        used.reset(token)


@dataclass(eq=False)
class BufferState:
    """What the drop-in keeps on a buffer."""

    settings: Settings
    group: Any
    default: Target | None = None
    registered: bool = False
    """A placement was registered on this buffer: from then on a call without one is an error."""
    warned: bool = False
    low_latency_slots: int | None = None
    """P of the low-latency calls, which lay the buffer out by it."""
    planned: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    """From the tensor or handle by which a later call names the plan, weakly held."""


# Channels outlive buffers, which frameworks replace by larger ones, and end with their group.
channels: WeakKeyDictionary[dist.ProcessGroup, dict[Target, Planner]] = WeakKeyDictionary()


def register(state: BufferState, target: Target, refusal: Exception | None = None) -> None:
    """Makes the channel of a placement and slot. Collective, also where it exists already: ranks
    that bring different placements must meet here, not in their exchanges.

    Raises:
        RankError: names the ranks that bring another placement or slot, or a refusal.
        Exception: `refusal`, what this rank found wrong beforehand.
    """
    placement, slot = target
    group = state.group if isinstance(state.group, dist.ProcessGroup) else None
    agree(group, "placement", {"placement": placement.fingerprint(), "slot": slot}, refusal)
    channel(state, target)


def channel(state: BufferState, target: Target) -> Planner:
    """The planner of a placement and slot. Local: every batch compares its placement anyway."""
    if not isinstance(state.group, dist.ProcessGroup):
        raise ContractError(
            "balancing needs a buffer on a torch.distributed group; "
            f"this one is on {type(state.group).__name__}"
        )
    of_group = channels.setdefault(state.group, {})
    if target not in of_group:
        placement, slot = target
        of_group[target] = Planner(
            placement,
            state.group,
            counts=state.settings.counts,
            solver=state.settings.solver,
            slot=slot,
            compare=False,
        )
    state.registered = True
    return of_group[target]


def state_of(buffer: Any) -> BufferState:
    """What the drop-in keeps on a buffer.

    Raises:
        ContractError: the buffer was made before `patch`, so nothing is kept.
    """
    state: BufferState | None = getattr(buffer, "_lplb_state", None)
    if state is None:
        raise ContractError(
            "this buffer was made before lplb_ep was patched in, and plans nothing: make it after"
        )
    return state


def target_of(buffer: Any, state: BufferState) -> Target | None:
    """The view's placement, else the context's, else the buffer's own."""
    return getattr(buffer, "_lplb_target", None) or used.get() or state.default


def in_force(buffer: Any, state: BufferState) -> Target | None:
    """What a call that plans goes by; None: pass it on.

    Raises:
        ContractError: nothing is in force on a buffer that had a placement registered.
    """
    target = target_of(buffer, state)
    if target is None and state.registered:
        raise ContractError(
            "no placement is in force for this call, and this buffer has had one: call it "
            "through buffer.view(placement), within lplb_ep.use(placement), or from a module "
            "that was attached"
        )
    if target is None and not state.warned:
        state.warned = True
        log.warning(
            "LPLB_EP=%s, and no placement is registered on this buffer: calls are passed on "
            "unchanged",
            state.settings.mode,
        )
    return target


def refuse_when_off(settings: Settings, what: str) -> None:
    if settings.mode == "0":
        raise ContractError(
            f"{what} was given a placement, and LPLB_EP is 0 (or unset), which suits only a model "
            "without replica slots; set LPLB_EP=home or LPLB_EP=1"
        )


def check_slots(placement: Placement, num_local_slots: int | None) -> None:
    if num_local_slots != placement.num_local_slots:
        raise ContractError(
            f"num_local_slots must be the slots a rank has in the placement and in the model, "
            f"{placement.num_local_slots}; got {num_local_slots}"
        )


def attach(
    module: torch.nn.Module,
    placement: Placement,
    *,
    num_local_slots: int,
    buffer: Any = None,
    experts: torch.nn.Module | None = None,
    slot: int = 0,
) -> Attached:
    """Declares that a layer has a placement's slots, and puts it in force while the layer runs.

    Collective where `buffer` is given.

    Args:
        module: the MoE layer, whose forward calls the buffer.
        placement: its copies.
        num_local_slots: P / R, the expert slots that the layer has on each rank.
        buffer: the buffer it will call; its channel is made now, not at the first batch.
        experts: the layer's slots, for a check of their weights: a ModuleList of P / R modules,
            or a module whose parameters all have P / R as leading dimension. Default:
            `module.experts` if there is one.
        slot: which of the micro-batches in flight; each has a channel of its own.

    Returns:
        A handle whose `remove()` detaches the layer.

    Raises:
        ContractError: LPLB_EP is 0, or the slots are not the placement's.
        ValueError: the weights do not have that many slots; names the parameter.
    """
    state = None if buffer is None else state_of(buffer)
    target, refusal = (placement, slot), None
    try:
        refuse_when_off(Settings.from_env() if state is None else state.settings, "attach()")
        check_slots(placement, num_local_slots)
        experts = getattr(module, "experts", None) if experts is None else experts
        if experts is not None:
            replicas.slot_parameters(experts, num_local_slots)
    except (ContractError, ValueError) as error:
        refusal = error
    if state is not None:
        register(state, target, refusal)
    elif refusal is not None:
        raise refusal
    outer: list[Target | None] = []

    def enter(*_: Any) -> None:
        outer.append(used.get())
        # Around it, `use(placement, slot)` may have said which micro-batch this is.
        inherited = outer[-1] is not None and outer[-1][0] is placement
        used.set(outer[-1] if inherited else target)

    def leave(*_: Any) -> None:
        used.set(outer.pop())

    before = module.register_forward_pre_hook(enter)
    after = module.register_forward_hook(leave, always_call=True)
    return Attached(before, after)


@dataclass(frozen=True)
class Attached:
    """A layer's attachment."""

    _before: RemovableHandle
    _after: RemovableHandle

    def remove(self) -> None:
        """Detaches the layer: its calls no longer have a placement from it."""
        self._before.remove()
        self._after.remove()
