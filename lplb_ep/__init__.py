"""Exact load balance for DeepEP expert parallelism. Nothing is imported before it is used.

Type checkers read `__init__.pyi` in this file's place.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "Settings": "settings",
    "PlacementError": "errors",
    "InfeasibleError": "errors",
    "ContractError": "errors",
    "RankError": "errors",
    "MissingPackageError": "errors",
    "CompileError": "errors",
    "Placement": "placement.table",
    "Layer": "layer",
    "load_placements": "placement.layer_files",
    "save_placements": "placement.layer_files",
    "Solution": "planning.solve",
    "solve": "planning.solve",
    "Plan": "planning.plan",
    "Planner": "planning.planner",
    "Problem": "problem",
    "CostModel": "cost",
    "check_plan": "planning.check",
    "Replicas": "weights.replicas",
    "Guests": "weights.guests",
    "GuestPool": "weights.pool",
    "mark_stale": "layer",
    "mark_valid": "layer",
    "Refresher": "weights.refresh",
    "Buffer": "deepep.drop_in",
    "ElasticBuffer": "deepep.drop_in",
    "EPHandle": "deepep.drop_in",
    "EventOverlap": "deepep.drop_in",
    "EventHandle": "deepep.drop_in",
    "Config": "deepep.drop_in",
    "topk_idx_t": "deepep.drop_in",
    "use": "deepep.context",
    "attach": "deepep.context",
}

_MODULES = ("metrics",)

__all__ = ["__version__", *_PUBLIC, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lplb_ep.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lplb_ep' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lplb_ep.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
