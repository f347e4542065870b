"""The plan of a call: made from its picks, and found again by the calls that follow it."""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ContractError
from ..layer import Layer
from ..placement.table import Placement
from ..planning.inputs import check_topk_idx
from ..planning.planner import Planner
from .calls import Call
from .channels import BufferState, LayerUse, channel


class Picks:
    """The picks that were planned, to hold those of a later call against.

    Args:
        topk_idx: [T, K] of the caller, who may write to it before the later call.
        keep_values: whether to keep a copy. Comparing values of CUDA tensors synchronises.
    """

    __slots__ = ("_like", "_tensor", "_values", "_version")

    def __init__(self, topk_idx: torch.Tensor, *, keep_values: bool) -> None:
        self._tensor = weakref.ref(topk_idx)
        # Inference tensors do not count what is written to them.
        self._version = None if topk_idx.is_inference() else topk_idx._version
        self._like = topk_idx.shape, topk_idx.dtype, topk_idx.device
        self._values = topk_idx.clone() if keep_values else None

    def are(self, given: torch.Tensor) -> bool:
        """Whether `given` is the very tensor that was planned, and was not written to since."""
        if self._version is None or given is not self._tensor():
            return False
        return self._version == given._version

    def check(self, given: Any, *, may_be_masked: bool) -> None:
        """Holds the picks of a later call against these, as far as they are known.

        Args:
            given: of the later call.
            may_be_masked: whether some picks may have become -1.

        Raises:
            ContractError: they are others.
        """
        shape, dtype, device = self._like
        if isinstance(given, torch.Tensor):
            shown = f"{list(given.shape)} of {given.dtype} on {given.device}"
            same = (given.shape, given.dtype, given.device) == self._like
        else:
            shown, same = type(given).__name__, False
        if same and self._values is not None:
            masked = (given == -1) & may_be_masked
            same = bool(((given == self._values) | masked).all())
        if not same:
            raise ContractError(
                f"topk_idx ({shown}) is not the one that was planned "
                f"({list(shape)} of {dtype} on {device})"
            )


@dataclass(eq=False)
class PlannedCall:
    """What a call that planned leaves for the calls that follow it."""

    planner: Planner
    layer: Layer
    placement: Placement
    picks: Picks
    physical: torch.Tensor

    def forward(self, call: Call) -> Any:
        """Makes a call in which DeepEP waits for the other ranks.

        It may wait for a rank whose counts did not come, until DeepEP gives up: that is raised
        then. If DeepEP goes on, so does this rank, since the others count on it in the combine.
        """
        try:
            return call.forward()
        except Exception:
            self.planner.raise_errors(wait=False)
            raise

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
        if not self.picks.are(given):
            self.picks.check(given, may_be_masked=may_be_masked)
            if may_be_masked:
                slots = self.planner.mask(given, slots)
        call["topk_idx"] = slots


def plan(
    buffer: Any,
    state: BufferState,
    use: LayerUse,
    call: Call,
    check: Callable[[torch.Tensor], None] = lambda topk_idx: None,
) -> PlannedCall:
    """Makes the plan of a call, and puts slots and P in place of its experts and E.

    Args:
        buffer: the buffer of the call.
        state: of the buffer.
        use: the layer that the call goes by.
        call: a call with `topk_idx`, `num_experts` and `previous_event`.
        check: raises what else is wrong with the call, given its `topk_idx`.

    Raises:
        Exception: what is wrong with the call. Where the ranks exchange counts the others raise a
            RankError, since they wait for this rank's.
    """
    settings, layer = state.settings, use.layer
    placement, planner = layer.placement, channel(state, use)
    balances = settings.mode == "1"
    try:
        call.check()
        topk_idx = call["topk_idx"]
        _check_num_experts(call["num_experts"], placement, settings.indices)
        check_topk_idx(topk_idx)
        check(topk_idx)
        # Unlike DeepEP's kernels, planning runs on the current stream: it must wait as they would.
        event = call.event("previous_event")
        if event is not None:
            event.current_stream_wait()
    except Exception as error:  # whatever it is, the others must not wait for this rank's counts
        if balances:
            planner.refuse(error)
        raise
    indices, distinct = settings.indices, state.contract.distinct_picks
    if balances:
        stale = not (settings.replicas == "valid" or layer.is_valid)
        physical = planner.route(topk_idx, stale=stale, indices=indices, distinct=distinct)
    else:
        physical = planner.home(topk_idx, indices=indices, distinct=distinct)
    if event is not None:
        call["previous_event"] = buffer.capture()
    call["topk_idx"], call["num_experts"] = physical, placement.num_physical_experts
    picks = Picks(topk_idx, keep_values=settings.check or not topk_idx.is_cuda)
    return PlannedCall(planner, layer, placement, picks, physical)


def _check_num_experts(num_experts: Any, placement: Placement, indices: str) -> None:
    E, P = placement.num_experts, placement.num_physical_experts
    expected, other = (E, P) if indices == "logical" else (P, E)
    # A tensor would compare, and a CUDA tensor synchronise.
    is_whole = isinstance(num_experts, numbers.Integral)
    if is_whole and num_experts == expected:
        return
    shown = num_experts if is_whole or num_experts is None else type(num_experts).__name__
    hint = ""
    if is_whole and num_experts == other:
        hint = " (LPLB_EP_INDICES says which of the two callers use)"
    raise ContractError(
        f"num_experts must be {expected} with {indices} indices on this placement "
        f"({E} experts in {P} slots); got {shown}{hint}"
    )
