"""DeepEP's own Python classes, without its compiled extension, where sources of it are to be had.

`LPLB_TEST_DEEP_EP` names folders that hold a `deep_ep` folder each, as a checkout does.
"""

import importlib
import inspect
import os
import sys
import types
import warnings

FOLDERS = [folder for folder in os.environ.get("LPLB_TEST_DEEP_EP", "").split(os.pathsep) if folder]
# The version that a module belongs to, and its class.
CLASSES = {
    "deep_ep.buffer": ("1.2.1", "Buffer"),
    "deep_ep.buffers.legacy": ("2.1.0", "Buffer"),
    "deep_ep.buffers.elastic": ("2.1.0", "ElasticBuffer"),
}


class Extension(types.ModuleType):
    """Stands for the compiled extension: every other name in it is an empty class."""

    @staticmethod
    def get_low_latency_rdma_size_hint(num_tokens, hidden, num_ranks, num_experts):
        return num_tokens * hidden * num_experts

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {})
        setattr(self, name, value)
        return value


def load(folder):
    """The classes of a folder's `deep_ep`, by version and name; its `__init__` is not run."""
    package = types.ModuleType("deep_ep")
    package.__path__ = [os.path.join(folder, "deep_ep")]
    sys.modules["deep_ep"] = package
    for name in ("deep_ep_cpp", "deep_ep._C"):
        sys.modules[name] = Extension(name)
    found = {}
    for name, (version, class_name) in CLASSES.items():
        path = os.path.join(folder, *name.split(".")) + ".py"
        if os.path.exists(path):
            package.__version__ = version
            with warnings.catch_warnings():  # of the parts of torch that it imports
                warnings.simplefilter("ignore")
                found[version, class_name] = getattr(importlib.import_module(name), class_name)
    return found


def signatures(cls):
    """Public methods as lines: `name(argument, optional=)`, and `static` before static ones."""
    for name in sorted(vars(cls)):
        method = inspect.getattr_static(cls, name)
        static = isinstance(method, staticmethod)
        if (name.startswith("_") and name != "__init__") or not (
            static or inspect.isfunction(method)
        ):
            continue
        arguments = [
            parameter.name + ("" if parameter.default is parameter.empty else "=")
            for parameter in inspect.signature(getattr(cls, name)).parameters.values()
        ]
        yield f"{'static ' if static else ''}{name}({', '.join(arguments)})"
