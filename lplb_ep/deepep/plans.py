"""The plan of a call: made from its picks, and found again by the calls that follow."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..errors import ContractError
from ..planning.planner import Planner
from ..weights.pool import outside_of_checkpoints
from .calls import Call
from .channels import BufferState, LayerUse, channel, state_of
from .checks import Check
from .guest_calls import PushedGuests, plan_with_guests, without_guests

_NAME = "_lplb_planned"


class PlannedCall:
    """The plan of a call, for the calls that follow it.

    It travels on the object by which those name it: a handle, or a tensor in one. So it lives as
    long, and is found at once.

    Args:
        state: of the call's buffer.
        planner: that made the plan.
        topk_idx: [T, K] of the caller, who may write to it before a later call.
        slots: [T, K] of the same dtype and device, in its place.
        keep_values: whether to keep a copy of `topk_idx` and compare values, which waits for a GPU.
            Else a tensor's version tells whether it was written to, which NumPy and `.data` do not
            count.
        guests: None where the layer has none.
    """

    __slots__ = (
        "_state",
        "_tensor",
        "_values",
        "_version",
        "guests",
        "placement",
        "planner",
        "slots",
    )

    def __init__(
        self,
        state: BufferState,
        planner: Planner,
        topk_idx: torch.Tensor,
        slots: torch.Tensor,
        keep_values: bool,
        guests: PushedGuests | None = None,
    ) -> None:
        self._state, self.planner, self.placement = state, planner, planner.placement
        self.slots, self.guests = slots, guests
        self._tensor, self._version, self._values = weakref.ref(topk_idx), None, None
        if keep_values:
            self._values = topk_idx.clone()
        elif not topk_idx.is_inference():  # which has no version
            self._version = topk_idx._version

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy or pickle of what it travels on has no plan."""
        return type(None), ()

    @staticmethod
    def of(key: Any, state: BufferState) -> PlannedCall | None:
        """The plan that a later call of the same buffer names by a tensor or handle, if any."""
        planned: PlannedCall | None = getattr(key, _NAME, None)
        return planned if planned is not None and planned._state is state else None

    def travel_on(self, key: Any) -> None:
        """Has later calls find the plan by a tensor or handle."""
        setattr(key, _NAME, self)

    def slots_for(self, given: Any, *, may_be_masked: bool = False) -> torch.Tensor:
        """The slots for the picks of a later call, compared with those that were planned.

        Args:
            given: `topk_idx` of the later call.
            may_be_masked: whether some of the picks may have become -1 since, which they stay.

        Raises:
            ContractError: the call brings other picks, as far as they are known.
        """
        values, slots = self._values, self.slots
        if isinstance(given, torch.Tensor):
            same = self._version is not None and given is self._tensor()
            if same and given._version == self._version:
                return slots
            like = slots.shape, slots.dtype, slots.device
            if (given.shape, given.dtype, given.device) == like:
                if values is None:
                    return self.planner.mask(given, slots) if may_be_masked else slots
                if torch.equal(given, values):
                    return slots
                if may_be_masked and bool(((given == values) | (given == -1)).all()):
                    return self.planner.mask(given, slots)
            shown = f"{list(given.shape)} of {given.dtype} on {given.device}"
        else:
            shown = type(given).__name__
        raise ContractError(
            f"topk_idx ({shown}) is not the one that was planned "
            f"({list(slots.shape)} of {slots.dtype} on {slots.device})"
        )

    def forward(self, buffer: Any, call: Call) -> Any:
        """Makes a dispatch, in which DeepEP waits for the other ranks.

        With it guests arrive, unless the layer itself waits for them.

        It may wait for a rank whose counts did not come, until DeepEP gives up: that is raised
        then. If DeepEP goes on, so does this rank, since the others count on it in the combine.
        """
        try:
            out = call.forward()
        except Exception:
            self.planner.raise_errors(wait=False)
            raise
        if self.guests is None or self.guests.weights.layer_waits:
            return out
        return self.guests.arrive(buffer, out)

    def forward_again(self, buffer: Any, call: Call) -> Any:
        """Makes a dispatch by a cached handle: other rows, or gradients, for the same slots."""
        self.check_current()
        if self.guests is None:
            return call.forward()
        self.guests.bring_back()
        return self.guests.arrive(buffer, call.forward())

    def check_current(self) -> None:
        """Raises ContractError where slots may hold other experts than those it was planned for."""
        if self.placement is not self.planner.layer.placement:
            raise ContractError(
                "replicas were refreshed between this batch's dispatch and its end or backward "
                "pass (a recompute?): call Refresher.step() where no batch is in flight"
            )


def plan(buffer: Any, state: BufferState, use: LayerUse, call: Call, check: Check) -> PlannedCall:
    """Makes the plan of a call, and puts slots and P in place of its experts and E.

    Args:
        buffer: the buffer of the call.
        state: of the buffer.
        use: the layer for which the call plans.
        call: a call with `topk_idx`, `num_experts` and `previous_event`.
        check: of the method.

    Raises:
        Exception: the call is wrong. Where ranks exchange counts, the others wait for this rank's,
            and raise a RankError.
    """
    settings, layer = state.settings, use.layer
    placement, default = layer.placement, state.default
    planner = state.planners.get(use)
    if (
        planner is None
        or planner.placement is not placement
        or (default is not None and default.layer is not layer)
    ):
        planner = channel(state, use)
    balances = settings.mode == "1"
    try:
        form = check.form(call)
        if form is None or (use, form) not in state.checked:
            check(buffer, state, placement, call)
            state.know(use, form)
        topk_idx: torch.Tensor = call["topk_idx"]
        # Unlike DeepEP's kernels, planning runs on the current stream: it must wait as they would.
        event = call.event("previous_event") if "previous_event" in call else None
        if event is not None:
            event.current_stream_wait()
        stale = balances and not (settings.replicas == "valid" or layer.is_valid)
    except Exception as error:  # whatever it is, the others must not wait for this rank's counts
        if balances:
            planner.refuse(error)
        raise
    indices, distinct = settings.indices, state.contract.distinct_picks
    pushed = None
    if balances:
        if placement.num_guests_per_rank:
            kinds = {"indices": indices, "distinct": distinct}
            slots, pushed = plan_with_guests(planner, use, topk_idx, stale, **kinds)
        else:
            slots = planner.route(topk_idx, stale=stale, indices=indices, distinct=distinct)
    else:
        slots = planner.home(topk_idx, indices=indices, distinct=distinct)
        pushed = without_guests(use)
    if event is not None:
        call["previous_event"] = buffer.capture()
    call["topk_idx"], call["num_experts"] = slots, placement.num_physical_experts
    keep_values = settings.check or not topk_idx.is_cuda
    return PlannedCall(state, planner, topk_idx, slots, keep_values, pushed)


def bring_guests_back(buffer: Any, handle: Any) -> None:
    """Begins to bring the guests of a batch back, for experts that run again without a dispatch.

    On all ranks alike. A layer that waits for its guests itself waits for these, too.

    Args:
        buffer: one that plans.
        handle: of its dispatch.

    Raises:
        ContractError: as the cached dispatch.
    """
    planned = PlannedCall.of(handle, state_of(buffer))
    if planned is None or planned.guests is None:
        return
    planned.check_current()
    with outside_of_checkpoints():
        planned.guests.bring_back()
        if not planned.guests.weights.layer_waits:
            planned.guests.weights.wait(planned.guests.slot)
