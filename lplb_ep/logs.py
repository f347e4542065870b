"""Messages of the package: each begins with the package's name and the rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any


class _Prefixed(logging.LoggerAdapter):
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Puts the package and the rank before a message."""
        return f"{_prefix((self.extra or {}).get('rank', _rank()))}: {msg}", kwargs

    def with_rank_of_now(self) -> _Prefixed:
        """The same logger for messages that may come when the job has left its groups."""
        return _Prefixed(self.logger, {"rank": _rank()})


def logger(name: str) -> _Prefixed:
    """The logger of a module, by its `__name__`."""
    return _Prefixed(logging.getLogger(name), {})


def is_first(group: Any) -> bool:
    """Whether this rank speaks for its group, or for the job where there is none.

    It does so where all ranks would say the same.
    """
    return not (_rank() if group is None else group.rank())


def show(level: str) -> None:
    """Shows the package's messages on standard error, as `Settings.log` asks for.

    Args:
        level: "info" or "debug"; else they are left to the program, which may have set up logging.
    """
    package = logging.getLogger("lplb_ep")
    if level not in ("info", "debug") or any(type(h) is _Shown for h in package.handlers):
        return
    handler = _Shown(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package.addHandler(handler)
    package.setLevel(level.upper())
    package.propagate = False  # or the program would show them, too


class _Shown(logging.StreamHandler):
    """The handler that `show` adds."""


def _prefix(rank: object) -> str:
    return "lplb_ep" if rank is None else f"lplb_ep rank {rank}"


def _rank() -> int | None:
    """In the job; None where it has no ranks."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_rank())
    return None
