"""The names that programs import from `deep_ep.utils`."""

from .events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
