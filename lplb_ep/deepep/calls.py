"""One call of an overridden method: its arguments by name, found by position and never bound."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..errors import ContractError

is_inside: ContextVar[bool] = ContextVar("lplb_ep.inside", default=False)
"""Set while DeepEP runs: methods that it calls of itself are given slots already."""


class Original:
    """A method of DeepEP's, and where each of its arguments stands in a call.

    Args:
        function: the method; of an instance, `self` is its first argument.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._signature = inspect.signature(function)
        parameters = self._signature.parameters.values()
        by_name_only = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        self.positions = {
            parameter.name: sys.maxsize if parameter.kind in by_name_only else position
            for position, parameter in enumerate(parameters)
        }
        """Of each argument; beyond every position where it is passed by name only."""
        self.defaults = {
            p.name: None if p.default is inspect.Parameter.empty else p.default for p in parameters
        }
        self.known: set[tuple[Any, ...]] = set()
        """Numbers of arguments, with names, that it takes."""

    def bind(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Raises TypeError where the method does not take such arguments, as a call of it does."""
        self._signature.bind(*args, **kwargs)


class Call:
    """The arguments of one call, and the method to pass them to."""

    __slots__ = ("_args", "_kwargs", "_original")

    def __init__(self, original: Original, args: list[Any], kwargs: dict[str, Any]) -> None:
        self._original, self._args, self._kwargs = original, args, kwargs

    def __getitem__(self, name: str) -> Any:
        """The argument, or its default.

        Raises:
            ContractError: the method has no argument of that name.
        """
        position = self._original.positions.get(name)
        if position is None:
            raise self._unknown(name)
        if position < len(self._args):
            return self._args[position]
        return self._kwargs[name] if name in self._kwargs else self._original.defaults[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Replaces the argument.

        Raises:
            ContractError: the method has no argument of that name.
        """
        position = self._original.positions.get(name)
        if position is None:
            raise self._unknown(name)
        if position < len(self._args):
            self._args[position] = value
        else:
            self._kwargs[name] = value

    def get(self, name: str) -> Any:
        """The argument, or its default; None where this version of the method does not have it."""
        return self[name] if name in self._original.positions else None

    def event(self, name: str) -> Any:
        """An event argument. None where there is none or it carries none, as DeepEP reads it."""
        event = self[name] if name in self._original.positions else None
        return None if getattr(event, "event", event) is None else event

    def check(self) -> None:
        """Raises TypeError where the method does not take these arguments.

        Binding takes as long as a plan, so a number of arguments with names is bound only once.
        """
        original, form = self._original, (len(self._args), *self._kwargs)
        if form not in original.known:
            original.bind(self._args, self._kwargs)
            original.known.add(form)

    def forward(self) -> Any:
        """Makes the call."""
        token = is_inside.set(True)
        try:
            return self._original.function(*self._args, **self._kwargs)
        finally:
            is_inside.reset(token)

    def _unknown(self, name: str) -> ContractError:
        where = self._original.function.__qualname__
        return ContractError(f"{where} has no argument {name!r}, on which lplb_ep relies")
