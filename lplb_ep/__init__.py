"""Exact load balance for DeepEP expert parallelism. Nothing is imported before it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `Buffer` and the other names of DeepEP are only known at run time
    from .layers import attach, use
    from .placement import Placement
    from .planner import Plan, Planner, check_plan
    from .replicas import Replicas
    from .settings import (
        ContractError,
        InfeasibleError,
        MissingPackageError,
        PlacementError,
        RankError,
        Settings,
    )
    from .solver import Solution, solve

__version__ = "0.1.0"

_PUBLIC = {
    "Settings": "settings",
    "PlacementError": "settings",
    "InfeasibleError": "settings",
    "ContractError": "settings",
    "RankError": "settings",
    "MissingPackageError": "settings",
    "Placement": "placement",
    "Solution": "solver",
    "solve": "solver",
    "Plan": "planner",
    "Planner": "planner",
    "check_plan": "planner",
    "Replicas": "replicas",
    "Buffer": "buffer",
    "ElasticBuffer": "buffer",
    "EPHandle": "buffer",
    "use": "layers",
    "attach": "layers",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lplb_ep' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lplb_ep.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
