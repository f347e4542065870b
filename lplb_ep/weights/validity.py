"""Whether replicas' weights still equal their homes': hooks on changes, and a comparison.

To have another event make replicas stale, register its hook in `_register_hooks` and let it call
`Watch.clear`. A change that has no hook belongs into `Watch.is_intact`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .slots import is_distributed, local_part

_live: weakref.WeakSet[Watch] = weakref.WeakSet()
_watches: WeakIdKeyDictionary = WeakIdKeyDictionary()  # Module -> WeakSet of Watch

_steps = [0]

_version = attrgetter("_version")


class _Distributed(NamedTuple):
    """A `DTensor` parameter as it was when it was marked."""

    table: dict[str, Any]
    """Of the module: its parameters by name."""
    name: str
    parameter: Tensor
    state: tuple[int, int, int]


class Watch:
    """Notices when the weights of modules may differ from those that were last marked.

    Hooks clear the mark: a step of any `torch.optim.Optimizer` that holds a parameter, a parameter
    that is registered, memory that is freed. Writes in place and other memory (`p.data = ...`) have
    no hook. They are found by comparing version counters and addresses whenever `is_intact` is
    asked: this is the cost of a question, so it runs in C, over lists that `mark` has made.

    Args:
        modules: hold the parameters. They must keep their submodules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._owners: list[tuple[dict[str, Any], str]] = []
        for module in dict.fromkeys(part for whole in modules for part in whole.modules()):
            for name, _ in module.named_parameters(recurse=False):
                self._owners.append((module._parameters, name))
                _watches.setdefault(module, weakref.WeakSet()).add(self)
        self.num_steps = 0
        """That optimizers have made of these very parameters."""
        self.clear()
        _live.add(self)
        _register_hooks()

    def mark(self) -> None:
        """Takes the weights as they are now for the right ones."""
        self.clear()
        # Freed memory may come back at the same address with other contents.
        freed = functools.partial(_freed, weakref.ref(self))
        for table, name in self._owners:
            parameter = table[name]
            self._ids.add(id(parameter))
            storage = local_part(parameter).untyped_storage()
            self._storages.append(weakref.ref(storage, freed))
            if is_distributed(parameter):
                marked = _Distributed(table, name, parameter, _state(parameter))
                self._distributed.append(marked)
            else:
                self._tables.append(table)
                self._names.append(name)
                self._parameters.append(parameter)
        self._versions.extend(map(_version, self._parameters))
        self._addresses.extend(map(Tensor.data_ptr, self._parameters))
        self._is_marked = True

    def clear(self) -> None:
        """Drops the mark: the weights may have changed."""
        self._is_marked = False
        # The parameters that are no `DTensor`, where they are registered, and what they were.
        self._tables: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._parameters: list[Tensor] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._distributed: list[_Distributed] = []
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []
        self._ids: set[int] = set()

    def holds_any_of(self, ids: set[int]) -> bool:
        """Whether a parameter that was marked has one of these ids."""
        return not ids.isdisjoint(self._ids)

    @property
    def is_intact(self) -> bool:
        """Whether nothing has changed since the mark, as far as it shows."""
        return (
            self._is_marked
            and all(map(is_, map(dict.get, self._tables, self._names), self._parameters))
            and [*map(_version, self._parameters)] == self._versions
            and [*map(Tensor.data_ptr, self._parameters)] == self._addresses
            and (not self._distributed or all(map(_is_unchanged, self._distributed)))
        )


def _is_unchanged(marked: _Distributed) -> bool:
    """Whether a module still has a `DTensor` as its weight, with the same contents.

    For forward and backward FSDP2 takes its sharded parameter out of the module and puts the
    gathered one in, without registering it. Who replaces a `DTensor` for good registers another,
    which `_registered` notices. Or its contents are replaced (`.to()`), which shows in `_state`.
    """
    registered = marked.table.get(marked.name)
    is_held = registered is marked.parameter or isinstance(registered, nn.Parameter)
    return is_held and _state(marked.parameter) == marked.state


def _state(parameter: Tensor) -> tuple[int, int, int]:
    """Version and address of a `DTensor`, which counts its own operations beside its part's."""
    local = local_part(parameter)
    return parameter._version, local._version, local.data_ptr()


@functools.cache
def _register_hooks() -> None:
    """Hooks for what may leave no trace: fused optimizers, and parameters that FSDP2 replaces."""
    register_optimizer_step_post_hook(_stepped)
    register_module_parameter_registration_hook(_registered)


def last_step() -> int:
    """How many steps optimizers have made since there is a `Watch`."""
    return _steps[0]


def _stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _steps[0] += 1
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for watch in list(_live):
        if watch.holds_any_of(stepped):
            watch.num_steps += 1
            watch.clear()


def _registered(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    for watch in list(_watches.get(module, ())):
        watch.clear()


def _freed(watch: weakref.ref[Watch], storage: object) -> None:
    if (still_there := watch()) is not None:
        still_there.clear()
