"""Which placement a call goes by: a view's, a context's, a buffer's; and its channel.

One buffer serves every layer of a model, and every layer has a placement of its own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..comm.collectives import everyone, together
from ..errors import ContractError
from ..layer import Layer, channels, layer_of
from ..placement.table import Placement
from ..planning.planner import Planner
from ..settings import Settings
from ..weights.slots import slot_parameters

log = logging.getLogger(__name__)

Target = tuple[Layer, int]
"""A layer, and the micro-batch slot whose channel plans for it."""

# What is in force, innermost last: who put it there (an attached layer, or None) and what.
_entered: ContextVar[tuple[tuple[object, Target], ...]] = ContextVar("lplb_ep.use", default=())


def used() -> Target | None:
    """What `use` or an attached layer put in force."""
    entered = _entered.get()
    return entered[-1][1] if entered else None


_of_files: dict[Placement, Layer] = {}


def layer_of_file(path: str) -> Layer:
    """The layer of `LPLB_EP_PLACEMENT`: one in a process, whatever the number of buffers.

    Raises:
        PlacementError, OSError: as `Placement.load`.
    """
    placement = Placement.load(path)
    return _of_files.setdefault(placement, layer_of(placement))


@contextlib.contextmanager
def use(target: Layer | Placement, slot: int = 0) -> Iterator[None]:
    """Puts a placement in force on every buffer, for calls that cannot be given a view.

    A context variable, read only when a plan is made: a backward pass needs none. Free to enter.

    Args:
        target: the layer that runs inside, or the placement object that stands for it.
        slot: which of the micro-batches in flight; each has a channel of its own.

    Raises:
        TypeError: `target` is neither a layer nor a placement.
    """
    token = _entered.set((*_entered.get(), (None, (layer_of(target), slot))))
    try:
        yield
    finally:
        _entered.reset(token)


@dataclass(eq=False)
class BufferState:
    """What the drop-in keeps on a buffer."""

    settings: Settings
    group: Any
    size_hint: Callable[..., int] | None = None
    """DeepEP's own `get_low_latency_rdma_size_hint`, which counts the slots it is told."""
    default: Target | None = None
    """What the buffer was made with, while no other placement has been in force on it: a call that
    strayed out of its layer (a recompute) must not plan with another layer's copies."""
    warned: bool = False
    destroyed: bool = False
    low_latency_slots: int | None = None
    """P of the low-latency calls, which lay the buffer out by it."""
    planned: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    """From the tensor or handle by which a later call names the plan, weakly held."""

    @property
    def registered(self) -> bool:
        """The ranks have planned, so a model with replica slots calls: a call with no placement is
        an error, on a buffer that replaces another too."""
        return isinstance(self.group, dist.ProcessGroup) and self.group in channels


def register(
    state: BufferState,
    target: Layer | Placement,
    slot: int,
    check: Callable[[Layer], None] = lambda layer: None,
) -> Target:
    """Makes the channel of a placement and slot. Collective, also where it exists already: ranks
    that bring different placements must meet here, not in their exchanges.

    Args:
        state: of the buffer.
        target: the layer, or the placement object that stands for one.
        slot: which of the micro-batches in flight.
        check: raises what is wrong with the layer on this rank; the other ranks then raise, too.

    Raises:
        RankError: names the ranks that bring another placement or slot, or failed.
        Exception: what failed on this rank.
    """
    group = state.group if isinstance(state.group, dist.ProcessGroup) else None
    with together(group, "placement") as facts:
        layer = layer_of(target)
        check(layer)
        facts.update(placement=layer.placement.fingerprint(), slot=slot)
    own = layer, slot
    if group is not None and not all(everyone(group, _planner(state, own) is not None)):
        _make(state, own, compare=True)
    channel(state, own)
    return own


def channel(state: BufferState, target: Target) -> Planner:
    """The planner of a placement and slot. Local where it exists, or where counts travel by torch's
    collectives: every batch compares its placement anyway. Else the ranks share memory for it."""
    if not isinstance(state.group, dist.ProcessGroup):
        raise ContractError(
            "balancing needs a buffer on a torch.distributed group; "
            f"this one is on {type(state.group).__name__}"
        )
    planner = _planner(state, target) or _make(state, target, compare=False)
    if state.default is not None and target[0] is not state.default[0]:
        state.default = None
    return planner


def _planner(state: BufferState, target: Target) -> Planner | None:
    """The planner that there is."""
    planner = channels.get(state.group, {}).get(target)
    return None if planner is None or planner.is_outdated else planner


def _make(state: BufferState, target: Target, *, compare: bool) -> Planner:
    layer, slot = target
    balances = state.settings.mode == "1"
    planner = Planner(
        layer,
        state.group,
        # At home nothing is exchanged or solved, and no kernel need be compiled.
        counts=state.settings.counts if balances else "given",
        solver=state.settings.solver if balances else "cpu",
        slot=slot,
        compare=compare,
        check=state.settings.check,
        timeout_s=state.settings.timeout_s,
        abort_on_timeout=state.settings.on_timeout == "abort",
    )
    channels.setdefault(state.group, {})[target] = planner
    return planner


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
    return getattr(buffer, "_lplb_target", None) or used() or state.default


def in_force(buffer: Any, state: BufferState) -> Target | None:
    """What a call that plans goes by; None: pass it on.

    Raises:
        ContractError: nothing is in force, and the ranks have planned before.
    """
    target = target_of(buffer, state)
    if target is None and state.registered:
        raise ContractError(
            "no placement is in force for this call, and these ranks have planned with some: call "
            "the buffer through buffer.view(placement), within lplb_ep.use(placement), or from a "
            "module that was attached. A checkpoint inside an attached module recomputes outside "
            "of it, and needs a view"
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
    """Refuses a placement, given to `what`, while nothing is balanced.

    Raises:
        ContractError: LPLB_EP is 0.
    """
    if settings.mode == "0":
        raise ContractError(
            f"{what} was given a placement, and LPLB_EP is 0 (or unset), which suits only a model "
            "without replica slots; set LPLB_EP=home or LPLB_EP=1"
        )


def check_slots(placement: Placement, num_local_slots: int | None) -> None:
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
    target: Layer | Placement,
    *,
    num_local_slots: int,
    buffer: Any = None,
    experts: torch.nn.Module | Literal[False] | None = None,
    slot: int = 0,
) -> Attached:
    """Declares that a layer has a placement's slots, and puts it in force while the layer runs.

    Collective where `buffer` is given.

    Args:
        module: the MoE layer, whose forward calls the buffer.
        target: its `Layer`, or the placement object that stands for one.
        num_local_slots: P / R, the expert slots that the layer has on each rank.
        buffer: the buffer it will call; its channel is made now, not at the first batch.
        experts: the layer's slots, for a check of their weights: a ModuleList of P / R modules,
            or a module whose parameters all have P / R as leading dimension. Default:
            `module.experts` if there is one. False: no check, for weights laid out otherwise.
        slot: which of the micro-batches in flight; each has a channel of its own.

    Returns:
        A handle whose `remove()` detaches the layer. Of several attachments the last one holds.

    Raises:
        ContractError: LPLB_EP is 0, or the slots are not the placement's.
        TypeError: `target` is neither a layer nor a placement.
        ValueError: the weights do not have that many slots; names the parameter.
    """
    state = None if buffer is None else state_of(buffer)

    def check(layer: Layer) -> None:
        refuse_when_off(Settings.from_env() if state is None else state.settings, "attach()")
        check_slots(layer.placement, num_local_slots)
        weights = getattr(module, "experts", None) if experts is None else experts
        if weights is not None and weights is not False:
            slot_parameters(weights, num_local_slots)

    if state is None:
        layer = layer_of(target)
        check(layer)
    else:
        layer, _ = register(state, target, slot, check)
    this, mine = object(), (layer, slot)

    def enter(*_: Any) -> None:
        # Around it, `use(placement, slot)` may have said which micro-batch this is.
        entered = _entered.get()
        said = (t for who, t in reversed(entered) if who is None and t[0] is mine[0])
        _entered.set((*entered, (this, next(said, mine))))

    def leave(*_: Any) -> None:
        # Called also where a hook before `enter` raised, and then there is nothing to take back.
        entered = _entered.get()
        depths = [depth for depth, (who, _) in enumerate(entered) if who is this]
        if depths:
            _entered.set(entered[: depths[-1]])

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
