"""Exact load balance for DeepEP expert parallelism. Nothing is imported before it is used.

Type checkers read `__init__.pyi` in this file's place.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Settings": "settings",
    "PlacementError": "settings",
    "InfeasibleError": "settings",
    "ContractError": "settings",
    "RankError": "settings",
    "MissingPackageError": "settings",
    "CompileError": "settings",
    "Placement": "placement",
    "Solution": "solver",
    "solve": "solver",
    "Plan": "plan",
    "Planner": "planner",
    "check_plan": "plan",
    "Replicas": "replicas",
    "Refresher": "refresh",
    "Buffer": "buffer",
    "ElasticBuffer": "buffer",
    "EPHandle": "buffer",
    "EventOverlap": "buffer",
    "EventHandle": "buffer",
    "Config": "buffer",
    "topk_idx_t": "buffer",
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
