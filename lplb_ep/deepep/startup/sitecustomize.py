"""Patches DeepEP when a Python process below `lplb-ep run` starts, before its program.

`lplb-ep run` puts this directory on PYTHONPATH, and Python imports this module by its name. It must
be cheap, and need nothing of lplb_ep, for the processes that never import DeepEP.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# The drop-ins too: those made before the patch would plan a batch twice after it.
_OURS = ("lplb_ep.deepep.drop_in", "lplb_ep.deepep.patch")


class _Patch:
    """A finder and loader: whatever first imports DeepEP, by either name, gets it patched."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in ("deep_ep", *_OURS) else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Leaves it to Python to make the empty module."""

    def exec_module(self, module: ModuleType) -> None:
        # The import starts again without this finder; what it brings takes the module's place.
        sys.meta_path.remove(self)
        del sys.modules[module.__name__]
        try:
            importlib.import_module("lplb_ep.deepep.patch").patch()
        except BaseException:
            # Another try must find neither DeepEP unpatched nor a patch of dropped modules.
            sys.meta_path.insert(0, self)
            for name in _OURS:
                sys.modules.pop(name, None)
            raise


sys.meta_path.insert(0, _Patch())

# This module hides the next one of its name, such as a distribution's: that is due as well.
_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _here]
_next = PathFinder.find_spec("sitecustomize")
if _next is not None and _next.loader is not None:
    sys.modules["sitecustomize"] = importlib.util.module_from_spec(_next)
    _next.loader.exec_module(sys.modules["sitecustomize"])
