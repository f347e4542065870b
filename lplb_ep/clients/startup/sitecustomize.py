"""Balances the layers when a Python process below `lplb-ep run --client megatron` starts.

It must be cheap, and need nothing of lplb_ep, for the processes that never import Megatron-Core.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_LAYERS = "megatron.core.transformer.moe.moe_layer"


class _Client:
    """A finder: once Megatron-Core's MoE layers are imported, the client hears of them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LAYERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            client = importlib.import_module("lplb_ep.clients.megatron")
            client.balance_when_called(module.MoELayer)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Client())

# This module hides the next one of its name: that of the patch, which hides others in turn.
_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _here]
_next = PathFinder.find_spec("sitecustomize")
if _next is not None and _next.loader is not None:
    sys.modules["sitecustomize"] = importlib.util.module_from_spec(_next)
    _next.loader.exec_module(sys.modules["sitecustomize"])
