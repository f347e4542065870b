"""The plan of a call: made from its picks, and found again by the calls that follow it."""

from __future__ import annotations

import numbers
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ContractError
from ..layer import Layer
from ..placement.table import Placement
from ..planning.inputs import num_ids
from ..planning.planner import Planner
from .calls import Call
from .channels import BufferState, LayerUse, channel
from .checks import Check
from .guest_calls import PushedGuests, plan_with_guests, without_guests


class Picks:
    """The picks that were planned, to hold those of a later call against.

    Args:
        topk_idx: [T, K] of the caller, who may write to it before the later call.
        slots: [T, K] of the same dtype and device, in its place.
        keep_values: whether to keep a copy and compare values, which waits for a GPU. Else a
            tensor's version tells whether it was written to, which NumPy and `.data` do not count.
    """

    __slots__ = ("_slots", "_tensor", "_values", "_version")

    def __init__(self, topk_idx: torch.Tensor, slots: torch.Tensor, keep_values: bool) -> None:
        self._tensor, self._slots = weakref.ref(topk_idx), slots
        # Inference tensors have no version.
        counts = not (keep_values or topk_idx.is_inference())
        self._version = topk_idx._version if counts else None
        self._values = topk_idx.clone() if keep_values else None

    def may_be_masked(self, given: Any, *, allowed: bool) -> bool:
        """Holds the picks of a later call against these, as far as they are known.

        Args:
            given: of the later call.
            allowed: whether some of the picks may have become -1 since.

        Returns:
            Whether some may have.

        Raises:
            ContractError: the call brings other picks.
        """
        shown, values, slots = type(given).__name__, self._values, self._slots
        if isinstance(given, torch.Tensor):
            same = self._version is not None and given is self._tensor()
            if same and given._version == self._version:
                return False
            like = slots.shape, slots.dtype, slots.device
            if (given.shape, given.dtype, given.device) == like:
                if values is None:
                    return allowed
                if torch.equal(given, values):
                    return False
                if allowed and bool(((given == values) | (given == -1)).all()):
                    return True
            shown = f"{list(given.shape)} of {given.dtype} on {given.device}"
        raise ContractError(
            f"topk_idx ({shown}) is not the one that was planned "
            f"({list(slots.shape)} of {slots.dtype} on {slots.device})"
        )


@dataclass(eq=False)
class PlannedCall:
    """The plan of a call, for the calls that follow it."""

    planner: Planner
    layer: Layer
    placement: Placement
    picks: Picks
    physical: torch.Tensor
    guests: PushedGuests | None = None
    """None where the layer has none."""

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
        if self.placement is not self.layer.placement:
            raise ContractError(
                "replicas were refreshed between this batch's dispatch and its end or backward "
                "pass (a recompute?): call Refresher.step() where no batch is in flight"
            )

    def replace_picks(self, call: Call, *, may_be_masked: bool = False) -> None:
        """Puts the planned slots in place of a later call's picks.

        Args:
            call: the later call.
            may_be_masked: whether some picks may have become -1 since, which they stay.

        Raises:
            ContractError: the call brings other picks than those that were planned.
        """
        given, slots = call["topk_idx"], self.physical
        if self.picks.may_be_masked(given, allowed=may_be_masked):
            slots = self.planner.mask(given, slots)
        call["topk_idx"] = slots


def plan(
    buffer: Any,
    state: BufferState,
    use: LayerUse,
    call: Call,
    check: Check,
) -> PlannedCall:
    """Makes the plan of a call, and puts slots and P in place of its experts and E.

    Args:
        buffer: the buffer of the call.
        state: of the buffer.
        use: the layer that the call goes by.
        call: a call with `topk_idx`, `num_experts` and `previous_event`.
        check: of the method.

    Raises:
        Exception: the call is wrong. Where ranks exchange counts, the others wait for this rank's,
            and raise a RankError.
    """
    settings, layer = state.settings, use.layer
    placement, planner = layer.placement, channel(state, use)
    balances = settings.mode == "1"
    try:
        call.check()
        topk_idx = call["topk_idx"]
        _check_num_experts(call["num_experts"], placement, settings.indices)
        check(buffer, state, placement, call, topk_idx)
        # Unlike DeepEP's kernels, planning runs on the current stream: it must wait as they would.
        event = call.event("previous_event")
        if event is not None:
            event.current_stream_wait()
    except Exception as error:  # whatever it is, the others must not wait for this rank's counts
        if balances:
            planner.refuse(error)
        raise
    indices, distinct = settings.indices, state.contract.distinct_picks
    pushed = None
    if balances:
        stale = not (settings.replicas == "valid" or layer.is_valid)
        if placement.num_guests_per_rank:
            kinds = {"indices": indices, "distinct": distinct}
            physical, pushed = plan_with_guests(planner, use, topk_idx, stale, **kinds)
        else:
            physical = planner.route(topk_idx, stale=stale, indices=indices, distinct=distinct)
    else:
        physical = planner.home(topk_idx, indices=indices, distinct=distinct)
        pushed = without_guests(use)
    if event is not None:
        call["previous_event"] = buffer.capture()
    call["topk_idx"], call["num_experts"] = physical, placement.num_physical_experts
    picks = Picks(topk_idx, physical, settings.check or not topk_idx.is_cuda)
    return PlannedCall(planner, layer, placement, picks, physical, pushed)


def _check_num_experts(num_experts: Any, placement: Placement, indices: str) -> None:
    expected = num_ids(placement, indices)
    # A tensor would compare, and a CUDA tensor synchronise. The first test is the faster one.
    is_whole = type(num_experts) is int or isinstance(num_experts, numbers.Integral)
    if is_whole and num_experts == expected:
        return
    E, P = num_ids(placement, "logical"), num_ids(placement, "physical")
    shown = num_experts if is_whole or num_experts is None else type(num_experts).__name__
    guests = placement.num_physical_experts - P
    beside = f", beside {guests} guest slots, which callers do not count" if guests else ""
    hint = ""
    if is_whole and num_experts in (E, P):
        hint = " (LPLB_EP_INDICES says which of the two callers use)"
    raise ContractError(
        f"num_experts must be {expected} with {indices} indices on this placement "
        f"({E} experts in {P} slots{beside}); got {shown}{hint}"
    )
