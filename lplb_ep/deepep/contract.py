"""One table of all that the drop-ins rely on in DeepEP's classes, compared with the classes.

A method or an argument that DeepEP renames would let experts pass for slots without a word.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import operator
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import ContractError
from .limits import ELASTIC, LEGACY_1_2_1, LEGACY_2, NONE, Limits

NAMES_EXPERTS = ("topk_idx", "num_experts")
"""Arguments by which callers name experts where DeepEP must see slots."""
_KNOWN = (2, 1)
"""The last version of DeepEP whose limits were read."""


@dataclass(frozen=True)
class Method:
    """A method that the drop-in overrides or calls."""

    arguments: tuple[str, ...] = ()
    """Those that are read or replaced."""
    key: str = ""
    """Where in the result the object lies by which a later call names this one's plan."""
    get_key: Callable[[Any], Any] = lambda result: None
    """Takes it from there."""
    key_name: str = ""
    """The object in DeepEP's words."""
    is_key: Callable[[Any], bool] = lambda key: key is not None
    """Whether an object can be it."""
    group: str = ""
    """Methods of a group are all there or none is. Without a group, a method must be there."""


@dataclass(frozen=True)
class Contract:
    """All that is relied on in one of DeepEP's classes."""

    class_name: str
    methods: Mapping[str, Method]
    attributes: tuple[str, ...]
    """Of an instance, once it is made."""
    distinct_picks: bool
    """Whether DeepEP refuses a token that picks one expert twice."""
    num_ranks_per_node: int | None
    """Of every node where there are more ranks; None: DeepEP finds the nodes itself."""
    limits: Limits

    def key_of(self, method: str, result: Any) -> Any:
        """The object in a method's result by which later calls name its plan.

        Raises:
            ContractError: it is not there.
        """
        entry, key = self.methods[method], None
        try:
            key = entry.get_key(result)
            if entry.is_key(key):
                return key
        except (TypeError, IndexError, KeyError):
            pass
        raise ContractError(
            f"{self.class_name}.{method} must return {entry.key_name} as result{entry.key}; got "
            f"{type(key).__name__} in a result of {type(result).__name__}"
        )


def _is_handle(key: Any) -> bool:
    is_event = hasattr(key, "current_stream_wait")  # it lies beside the handle in the result
    return not (is_event or isinstance(key, (torch.Tensor, tuple, type(None))))


def _is_mask(key: Any) -> bool:
    return isinstance(key, torch.Tensor) and key.dtype is torch.bool


def _is_tensor(key: Any) -> bool:
    return isinstance(key, torch.Tensor)


_INTERNODE, _LOW_LATENCY = "internode", "low latency"
_BUFFER = {
    "__init__": Method(("group",)),
    "capture": Method(),
    "get_dispatch_layout": Method(
        ("topk_idx", "num_experts", "previous_event"),
        key="[3]",
        get_key=operator.itemgetter(3),
        key_name="is_token_in_rank",
        is_key=_is_mask,
    ),
    "dispatch": Method(("handle", "is_token_in_rank", "topk_idx", "previous_event")),
    "internode_dispatch": Method(
        ("handle", "is_token_in_rank", "topk_idx", "previous_event"), group=_INTERNODE
    ),
    "low_latency_dispatch": Method(
        ("x", "topk_idx", "num_max_dispatch_tokens_per_rank", "num_experts"),
        key="[2][0]",
        get_key=lambda result: result[2][0],
        key_name="the handle's first tensor",
        is_key=_is_tensor,
        group=_LOW_LATENCY,
    ),
    "low_latency_combine": Method(("topk_idx", "handle"), group=_LOW_LATENCY),
    "clean_low_latency_buffer": Method(("num_experts",), group=_LOW_LATENCY),
    "get_low_latency_rdma_size_hint": Method(
        ("num_max_dispatch_tokens_per_rank", "hidden", "num_ranks", "num_experts"),
        group=_LOW_LATENCY,
    ),
    "destroy": Method(),
}
_ELASTIC_BUFFER = {
    "__init__": Method(("group",)),
    "capture": Method(),
    "dispatch": Method(
        ("x", "topk_idx", "num_experts", "previous_event", "handle"),
        key="[3]",
        get_key=operator.itemgetter(3),
        key_name="an EPHandle",
        is_key=_is_handle,
    ),
    "get_theoretical_num_sms": Method(("num_experts",)),
    "destroy": Method(),
}

BUFFER_1_2_1 = Contract(
    "Buffer",
    _BUFFER,
    ("group", "num_rdma_bytes"),
    distinct_picks=False,
    num_ranks_per_node=8,
    limits=LEGACY_1_2_1,
)
BUFFER_2 = replace(BUFFER_1_2_1, limits=LEGACY_2)
"""DeepEP V2's legacy class. It has the name, methods and arguments of 1.2.1's, and more."""
ELASTIC_BUFFER = Contract(
    "ElasticBuffer",
    _ELASTIC_BUFFER,
    ("group",),
    distinct_picks=True,
    num_ranks_per_node=None,
    limits=ELASTIC,
)


def contract_of(base: type) -> Contract:
    """The contract of one of DeepEP's classes, or of an embedded one, after checking the class.

    Raises:
        ContractError: a method or an argument is missing; names class, method, argument, version.
    """
    version = version_of(base)
    if base.__name__ == ELASTIC_BUFFER.class_name:
        contract = ELASTIC_BUFFER
    elif base.__name__ == BUFFER_1_2_1.class_name:
        # Commits between 1.2.1 and V2 call themselves 1.2.1 as well.
        later = "enable_shrink" in _arguments(base.__init__)  # type: ignore[misc]
        contract = BUFFER_2 if later else BUFFER_1_2_1
    else:
        raise ContractError(f"lplb_ep has no drop-in for {base.__module__}.{base.__name__}")
    missing = _missing(base, contract)
    if missing:
        raise ContractError(
            f"{base.__module__}.{base.__name__} ({version}) lacks what lplb_ep relies on: "
            f"{'; '.join(missing)}. Use DeepEP 1.2.1 or 2.1, or an lplb_ep that knows this version"
        )
    return replace(contract, limits=_limits(base, contract, version))


def version_of(base: type) -> str:
    """The library of a class and its version, for messages: "DeepEP 1.2.1"."""
    package = base.__module__.partition(".")[0]
    if package == "lplb_ep":
        return "embedded"
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "DeepEP (version unknown)"
    return f"DeepEP {version}"


def unknown_methods(base: type, contract: Contract) -> list[str]:
    """Public methods that take experts and are not in the table: an API that came later.

    Static and class methods are among them.
    """
    return [
        name
        for name in dir(base)
        if not name.startswith("_") and name not in contract.methods
        if _is_method(inspect.getattr_static(base, name))
        if set(NAMES_EXPERTS) & set(_arguments(getattr(base, name)))
    ]


def _is_method(member: Any) -> bool:
    """Whether an attribute of a class is a method, of whatever kind its decorators have made it."""
    if isinstance(member, (staticmethod, classmethod, functools.partialmethod)):
        return True
    binds = hasattr(type(member), "__get__")
    return callable(member) and binds and not isinstance(member, type)


def _missing(base: type, contract: Contract) -> list[str]:
    groups = {m.group for name, m in contract.methods.items() if hasattr(base, name)}
    missing = []
    for name, method in contract.methods.items():
        if hasattr(base, name):
            arguments = _arguments(getattr(base, name))
            absent = [argument for argument in method.arguments if argument not in arguments]
            missing += [f"argument {argument} of method {name}" for argument in absent]
        elif not method.group or method.group in groups:
            missing.append(f"method {name}")
    return missing


def _arguments(function: Callable[..., Any]) -> list[str]:
    """Those that a caller can name."""
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind not in various]


def _limits(base: type, contract: Contract, version: str) -> Limits:
    if base.__module__.partition(".")[0] != "deep_ep":
        return NONE
    number = re.search(r"(\d+)\.(\d+)", version)
    if number is not None and (int(number[1]), int(number[2])) > _KNOWN:
        return NONE
    # 1.2.1 takes int64; later ones have a dtype by which they were compiled.
    dtype = getattr(sys.modules.get("deep_ep"), "topk_idx_t", torch.int64)
    owner = f"{version}'s {contract.class_name}"
    known = dtype if isinstance(dtype, torch.dtype) else None
    return replace(contract.limits, owner=owner, pick_dtype=known)
