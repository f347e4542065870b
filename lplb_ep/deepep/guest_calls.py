"""Guests in a call: pushed after its plan, and ready when its rows may be used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..layer import GuestWeights
from ..planning.planner import Planner
from .channels import LayerUse


@dataclass(eq=False)
class PushedGuests:
    """The guests of a planned batch."""

    weights: GuestWeights
    slot: int
    stay: Any = None
    """None for a batch that goes home."""

    def bring_back(self) -> None:
        """Pushes them again where their memory was used since, as a backward pass needs them."""
        if self.stay is None:
            self.weights.skip(self.slot)
        else:
            self.weights.push_again(self.stay, self.slot)

    def arrive(self, buffer: Any, out: Any) -> Any:
        """Has whoever uses the results of a dispatch wait for guests where it waits for the rows.

        Args:
            buffer: of the call.
            out: its results.

        Returns:
            The results. If they have a hook, or an event that was recorded, it waits for both.
            Else the current stream does.
        """
        if self.stay is None:
            return out
        for number, result in enumerate(out):
            is_event = hasattr(result, "current_stream_wait")
            if callable(result) and not is_event:
                return (*out[:number], self._hook_after(result), *out[number + 1 :])
        for number, result in enumerate(out):
            is_event = hasattr(result, "current_stream_wait")
            if is_event and result.event is not None and torch.cuda.is_initialized():
                return (*out[:number], self._event_after(buffer, result), *out[number + 1 :])
        self.weights.wait(self.slot)
        return out

    def _hook_after(self, hook: Callable[[], Any]) -> Callable[[], Any]:
        def wait() -> Any:
            done = hook()
            self.weights.wait(self.slot)
            return done

        return wait

    def _event_after(self, buffer: Any, event: Any) -> Any:
        with torch.cuda.stream(_side_stream(torch.cuda.current_device())):
            event.current_stream_wait()
            self.weights.wait(self.slot)
            both = buffer.capture()
        both.extra_tensors = getattr(event, "extra_tensors", None)
        return both


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Where events meet: it has nothing else to do, and keeps nobody waiting."""
    return torch.cuda.Stream(device)


def plan_with_guests(
    planner: Planner, use: LayerUse, topk_idx: torch.Tensor, stale: bool, **kinds: Any
) -> tuple[torch.Tensor, PushedGuests | None]:
    """Plans a batch of a layer with guest slots, and begins to push its guests.

    Without `Guests` that are valid on every rank, the batch goes home.

    Args:
        planner: of the layer.
        use: the layer, and which of its micro-batches.
        topk_idx: [T, K].
        stale: whether replicas are not known to be valid.
        kinds: further arguments of the planner.

    Returns:
        Slots [T, K], and the guests that are on their way.
    """
    weights = use.layer.guests
    if weights is None:
        return planner.route(topk_idx, stale=True, **kinds), None
    try:
        if is_valid := weights.is_valid:
            weights.prepare(use.slot)
    except Exception as error:  # noqa: BLE001  (raised when the others know, who wait for counts)
        planner.refuse(error)
    if not is_valid:
        return planner.route(topk_idx, stale=True, **kinds), without_guests(use)
    plan = planner(topk_idx, stale=stale, **kinds)
    stay = weights.push(plan.guests, use.slot, plan.status, plan.number)
    return plan.topk_idx, PushedGuests(weights, use.slot, stay)


def without_guests(use: LayerUse) -> PushedGuests | None:
    """For a batch that goes home: no guests. None where its layer has no `Guests`."""
    weights = use.layer.guests
    if weights is None:
        return None
    weights.skip(use.slot)
    return PushedGuests(weights, use.slot)
