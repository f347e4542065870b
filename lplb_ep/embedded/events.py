"""The events that asynchronous calls return. Their work is done already."""

from __future__ import annotations

import torch

from ..errors import ContractError


class EventHandle:
    """Stands for a recorded CUDA event.

    The embedded buffers finish every call before they return, so there is nothing to wait for.
    """

    def current_stream_wait(self) -> None:
        """Returns at once."""


class EventOverlap:
    """DeepEP's wrapper of an event, for both versions.

    Attributes:
        event: the `EventHandle`, or None for a call that was not asynchronous.
        extra_tensors: kept alive with the event, as in DeepEP.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._release_handle = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Waits for the event; with `release_handle` drops it afterwards.

        Raises:
            ContractError: there is no event: the call that returned this was synchronous.
        """
        if self.event is None:
            raise ContractError(
                "there is no event to wait for; the call that returned it was not asynchronous"
            )
        self.event.current_stream_wait()
        if release_handle:
            self.event = None

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        self._release_handle = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release_handle)
        self._release_handle = False


def finished_event(asynchronous: bool) -> EventOverlap:
    """The event that a call returns: None unless the call is asynchronous."""
    return EventOverlap(EventHandle() if asynchronous else None)
