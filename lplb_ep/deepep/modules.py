"""Layers of a program that cannot be edited, each found by the running module.

`LPLB_EP_PLACEMENT` may name a file of placements by modules' names. A module is named by the
outermost module that has run with it. Once it is known it is attached like any other: it is in
force while its forward runs, in a recompute too, whatever ran before.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ..errors import ContractError
from ..layer import Layer, layer_of
from ..placement.layer_files import placements_of_modules
from ..placement.table import Placement
from .channels import LayerUse
from .context import attach, layer_running, modules_running

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that wrappers add: DDP's, of `torch.compile`, FSDP's, of a checkpoint."""


class NamedLayers:
    """The layers of a file, by the names of their modules.

    Args:
        path: the file.
        placements: by name, as of `placements_of_modules`.
    """

    def __init__(self, path: str, placements: Mapping[str, Placement]) -> None:
        self._path, self._placements = path, dict(placements)
        self._parts = {name: _parts(name) for name in placements}
        self._known: WeakSet[torch.nn.Module] = WeakSet()
        self._attached: WeakSet[torch.nn.Module] = WeakSet()
        self._hook = register_module_forward_pre_hook(self._begin)

    @property
    def placements(self) -> list[Placement]:
        """All of them."""
        return list(self._placements.values())

    def fingerprint(self) -> str:
        """Of names and placements, for ranks to compare."""
        said = sorted((name, one.fingerprint()) for name, one in self._placements.items())
        return hashlib.sha256(str(said).encode()).hexdigest()

    def running(self) -> LayerUse | None:
        """The layer whose module's code runs in this thread, where no hook said so.

        That is so in the recompute of a checkpoint inside the module. It is so, too, where the
        program imports DeepEP when its first layer runs already.

        Raises:
            ContractError: as `know`.
        """
        use = layer_running()
        if use is None:
            for module in collections.deque(modules_running(), maxlen=1):  # the outermost
                self.know(module)
            use = layer_running()
        return use

    def know(self, root: torch.nn.Module) -> None:
        """Attaches the modules below one that begins to run, unless it is known.

        Raises:
            ContractError: a name fits several modules, or a module several names; all are named.
        """
        if root in self._known:
            return
        found: dict[tuple[str, tuple[str, ...]], torch.nn.Module] = {}
        for qualified, module in root.named_modules(remove_duplicate=False):
            self._known.add(module)
            parts = _parts(qualified)
            for name in self._names_of(parts):
                found[name, parts] = module  # a wrapper is replaced by what it wraps
        self._check(found)
        for (name, parts), module in found.items():
            if module not in self._attached:
                self._attached.add(module)
                self._attach(module, self._placements[name], ".".join(parts))

    def remove(self) -> None:
        """Names no further modules. Those that are attached stay so."""
        self._hook.remove()

    def _begin(self, module: torch.nn.Module, _: Any) -> None:
        if not torch.compiler.is_compiling():
            self.know(module)

    def _names_of(self, parts: tuple[str, ...]) -> list[str]:
        fitting = []
        for name, pattern in self._parts.items():
            end = parts[len(parts) - len(pattern) :]
            if len(end) == len(pattern) and all(map(fnmatchcase, end, pattern)):
                fitting.append(name)
        return fitting

    def _check(self, found: Mapping[tuple[str, tuple[str, ...]], torch.nn.Module]) -> None:
        names: dict[int, set[str]] = {}
        modules: dict[str, dict[int, str]] = {}
        for (name, parts), module in found.items():
            names.setdefault(id(module), set()).add(name)
            modules.setdefault(name, {})[id(module)] = ".".join(parts)
        for several in names.values():
            if len(several) > 1:
                shown = ", ".join(sorted(several))
                raise ContractError(f"one module has several placements in {self._path}: {shown}")
        for name, fitting in modules.items():
            if len(fitting) > 1 and not set("*?[") & set(name):
                shown = ", ".join(sorted(fitting.values()))
                raise ContractError(
                    f"{name!r} of {self._path} fits several modules: {shown}. Give more of the "
                    "name of one, or a pattern for all of them"
                )

    def _attach(self, module: torch.nn.Module, placement: Placement, name: str) -> None:
        """With a layer of its own: modules of one placement have different weights."""
        experts = getattr(module, "experts", None)
        # Of a list it is known how many there are. Other experts may be laid out in any way.
        checked: torch.nn.Module | Literal[False] = False
        if isinstance(experts, torch.nn.ModuleList):
            checked = experts
        slots = placement.num_local_slots
        attach(module, Layer(placement, name=name), num_local_slots=slots, experts=checked)


_of_files: dict[str, Layer | NamedLayers] = {}


def layers_of_file(path: str) -> Layer | NamedLayers:
    """The layer for all modules, or those by name: one of each in a process.

    Raises:
        PlacementError, OSError: as `placements_of_modules`.
    """
    if path not in _of_files:
        placements = placements_of_modules(path)
        of_all = placements.get("")
        _of_files[path] = NamedLayers(path, placements) if of_all is None else layer_of(of_all)
    return _of_files[path]


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part and part not in _WRAPPERS)
