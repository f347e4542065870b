"""The patch: the drop-ins' methods on the original classes, which programs import by name."""

from __future__ import annotations

import sys

from ..logs import logger
from ..settings import Settings
from .drop_in import chosen_module, overrides, patched
from .hooks import HOOKS
from .modules import layers_of_file

log = logger(__name__)


def provide() -> None:
    """Gives the embedded module DeepEP's name, where DeepEP is not available.

    A program that imports `deep_ep` then runs without it, and its buffers plan nothing.
    """
    module = chosen_module()
    if sys.modules.setdefault("deep_ep", module).__name__ == "lplb_ep.embedded":
        sys.modules["deep_ep.utils"] = module.utils


def patch() -> None:
    """Puts the overriding methods on the original classes.

    Where DeepEP is not available, the embedded module takes its name, as by `provide`.

    Raises:
        ContractError: a class lacks something that the methods rely on. None is changed then.
    """
    module = chosen_module()
    bases = [getattr(module, name) for name in HOOKS if hasattr(module, name)]
    made = {base: overrides(base) for base in bases if base not in patched}
    provide()
    for base, methods in made.items():
        patched[base] = {name: vars(base).get(name) for name in methods}
        for name, method in methods.items():
            setattr(base, name, method)
    _find_modules()
    if hasattr(module, "HybridEPBuffer"):
        log.warning("HybridEPBuffer is not balanced: it is left as it is")


def _find_modules() -> None:
    """Looks for the modules of `LPLB_EP_PLACEMENT` from now on: they may run before a buffer is."""
    try:
        settings = Settings.from_env()
        if settings.mode != "0" and settings.placement:
            layers_of_file(settings.placement)
    except (ValueError, OSError):
        pass  # a buffer raises it, when it is made, on all ranks


def unpatch() -> None:
    """Takes back what `patch` did, or `provide`."""
    for base, originals in patched.items():
        for name, method in originals.items():
            if method is None:
                delattr(base, name)
            else:
                setattr(base, name, method)
    patched.clear()
    if getattr(sys.modules.get("deep_ep"), "__name__", "") == "lplb_ep.embedded":
        for name in ("deep_ep", "deep_ep.utils"):
            sys.modules.pop(name, None)
