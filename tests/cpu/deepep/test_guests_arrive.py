"""Who waits for guests that a dispatch brings: its hook, its event, or the current stream."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lplb_ep.deepep import guest_calls
from lplb_ep.deepep.guest_calls import PushedGuests


class Event:
    """An `EventOverlap`, which can be called with `with` and not as a function."""

    def __init__(self, log, event):
        self.log, self.event, self.extra_tensors = log, event, ("kept",)

    def current_stream_wait(self):
        self.log.append("event")


class CallableEvent(Event):
    """One that is a function, too."""

    def __call__(self):
        raise AssertionError("it is no hook")


class Parts:
    """The layer's `Guests`, and the buffer of the call."""

    def __init__(self, log):
        self.log = log

    def wait(self, slot):
        self.log.append(f"guests of {slot}")

    def skip(self, slot):
        raise AssertionError("the batch has guests")

    def capture(self):
        self.log.append("capture")
        return Event(self.log, "both")


@pytest.fixture
def log(monkeypatch):
    found = []

    @contextlib.contextmanager
    def stream(name):
        found.append(f"on {name}")
        yield
        found.append("back")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(guest_calls, "_side_stream", lambda device: f"side of {device}")
    return found


def arrive(log, *out, stay=True):
    parts = Parts(log)
    return PushedGuests(parts, 1, stay).arrive(parts, out)


def test_a_hook_waits_for_rows_and_then_for_guests(log):
    out = arrive(log, "rows", CallableEvent(log, "recorded"), lambda: log.append("rows") or "done")
    assert log == []
    assert out[0] == "rows"
    assert isinstance(out[1], CallableEvent)
    assert out[2]() == "done"
    assert log == ["rows", "guests of 1"]


@pytest.mark.parametrize("kind", [Event, CallableEvent])
def test_a_recorded_event_waits_for_both_beside_the_current_stream(kind, log):
    out = arrive(log, "rows", kind(log, "recorded"), "handle")
    assert log == ["on side of 3", "event", "guests of 1", "capture", "back"]
    assert (out[0], out[1].event, out[2]) == ("rows", "both", "handle")
    assert out[1].extra_tensors == ("kept",)


def test_else_the_current_stream_waits(log):
    results = "rows", Event(log, None), None
    assert arrive(log, *results) == results
    assert log == ["guests of 1"]


def test_a_batch_that_goes_home_waits_for_no_guests(log):
    hook = log.append
    assert arrive(log, "rows", hook, stay=None) == ("rows", hook)
    assert log == []
