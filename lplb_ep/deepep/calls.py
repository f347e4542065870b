"""One call of an overridden method: its arguments by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..errors import ContractError

is_inside: ContextVar[bool] = ContextVar("lplb_ep.inside", default=False)
"""Set while DeepEP runs: methods that it calls of itself are given slots already."""


class Original:
    """A method of DeepEP's, and the names and defaults of its arguments.

    Args:
        function: the method.
        num_owners: how many of its first arguments a call has no names for: 1 for `self`.
    """

    def __init__(self, function: Callable[..., Any], num_owners: int = 1) -> None:
        self.function = function
        self._signature = inspect.signature(function)
        parameters = [*self._signature.parameters.values()][num_owners:]
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._by_place = [p.name for p in parameters if p.kind in by_place]
        self.defaults = {
            p.name: None if p.default is inspect.Parameter.empty else p.default for p in parameters
        }

    def call(self, owner: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call of the method, with arguments that it may not take: `Call.check` says so.

        Args:
            owner: what comes before the arguments with names: the instance.
            args: those without a name in the call.
            kwargs: those with one.
        """
        call = Call(kwargs)
        if args:
            call.update(zip(self._by_place, args, strict=False))
            if len(call) != len(args) + len(kwargs):  # too many, or one of them twice
                call, owner = Call(kwargs), (*owner, *args)
        call.original, call.owner = self, owner
        return call

    def bind(self, *args: Any, **kwargs: Any) -> None:
        """Raises TypeError where the method does not take such arguments, as a call of it does."""
        self._signature.bind(*args, **kwargs)


class Call(dict[str, Any]):
    """The arguments of one call, and the method to pass them to.

    It is a dictionary, so that reads need no function of Python. Between DeepEP's calls none is
    left in a CPU's caches, and each takes a microsecond. `call.get(name)` is None where the
    argument was not passed. `call[name]` is its default then. It raises ContractError where the
    method has no argument of that name.
    """

    __slots__ = ("original", "owner")
    original: Original
    owner: tuple[Any, ...]

    def __missing__(self, name: str) -> Any:
        defaults = self.original.defaults
        if name in defaults:
            return defaults[name]
        where = self.original.function.__qualname__
        raise ContractError(f"{where} has no argument {name!r}, on which lplb_ep relies")

    def event(self, name: str) -> Any:
        """An event argument. None where there is none or it carries none, as DeepEP reads it."""
        event = self.get(name)
        return None if getattr(event, "event", event) is None else event

    def check(self) -> None:
        """Raises TypeError where the method does not take these arguments."""
        self.original.bind(*self.owner, **self)

    def forward(self) -> Any:
        """Makes the call."""
        token = is_inside.set(True)
        try:
            return self.original.function(*self.owner, **self)
        finally:
            is_inside.reset(token)
