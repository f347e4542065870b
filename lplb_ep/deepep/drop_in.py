"""The drop-ins for DeepEP's buffers: subclasses of its classes, or of the embedded ones.

A drop-in is made on first use, and DeepEP's class is then compared with the contract.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__
from ..comm.collectives import together
from ..comm.nvshmem import has_started_nvshmem
from ..errors import ContractError, MissingPackageError
from ..layer import Layer, channels
from ..logs import show
from ..metrics.layers import LayerStats, stats_of
from ..placement.table import Placement
from ..planning.solvers import solver_fact
from ..settings import Settings
from .calls import Original
from .channels import BufferState, LayerUse, PlannerSettings, layer_use, register, state_of
from .context import check_local_slots, refuse_when_off
from .contract import Contract, contract_of, unknown_methods
from .hooks import HOOKS, override, refuse_unknown, size_hint
from .modules import NamedLayers, layers_of_file

_SIZE_HINT = "get_low_latency_rdma_size_hint"


def choose_backend(backend: str) -> tuple[str, str]:
    """The module whose buffers move the tokens, and why.

    Args:
        backend: "auto", "deep_ep" or "embedded".

    Raises:
        MissingPackageError: DeepEP is requested and cannot be imported.
    """
    installed = importlib.util.find_spec("deep_ep") is not None
    if backend == "embedded":
        return "lplb_ep.embedded", "asked for"
    if backend == "deep_ep":
        if not installed:
            raise MissingPackageError(
                "LPLB_EP_BACKEND=deep_ep, and deep_ep is not installed; build it from its "
                "repository (https://github.com/deepseek-ai/DeepEP), or set LPLB_EP_BACKEND=auto"
            )
        return "deep_ep", "asked for"
    if not installed:
        return "lplb_ep.embedded", "deep_ep is not installed"
    if not torch.cuda.is_available():
        return "lplb_ep.embedded", "no CUDA device"
    return "deep_ep", "installed, and a CUDA device is there"


def chosen_module() -> ModuleType:
    """The module that the settings choose, imported."""
    try:
        backend = Settings.from_env().backend
    except ValueError:
        backend = "auto"  # a buffer raises it, when it is made, on all ranks
    return importlib.import_module(choose_backend(backend)[0])


def overrides(base: type) -> dict[str, Any]:
    """The methods that make a drop-in of one of DeepEP's classes.

    Raises:
        ContractError: the class lacks something that they rely on.
    """
    contract = contract_of(base)
    methods = {
        name: override(getattr(base, name), hook)
        for name, hook in HOOKS[contract.class_name].items()
        if hasattr(base, name)
    }
    for name in unknown_methods(base, contract):
        methods[name] = refuse_unknown(base, name)
    if hasattr(base, _SIZE_HINT):
        methods[_SIZE_HINT] = size_hint(getattr(base, _SIZE_HINT))
    return {**methods, "__init__": _init(base, contract), "view": _view, "stats": _stats}


@functools.cache
def drop_in_of(base: type) -> type:
    """The drop-in for one of DeepEP's classes, a subclass of it.

    Raises:
        ContractError: the class lacks something that the drop-in relies on.
    """
    return type(base.__name__, (base,), {**overrides(base), "__doc__": base.__doc__})


patched: dict[type, dict[str, Any]] = {}
"""The methods that a patched class had before, None where it had none of its own."""


def __getattr__(name: str) -> Any:
    if name in HOOKS:
        base = getattr(chosen_module(), name)
        return base if base in patched else drop_in_of(base)
    if name in ("EPHandle", "EventOverlap", "EventHandle", "Config", "topk_idx_t"):
        return getattr(chosen_module(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- making a buffer ------------------------------------------------------------------------------


def _init(base: type, contract: Contract) -> Callable[..., None]:
    original = Original(base.__init__)  # type: ignore[misc]

    @functools.wraps(original.function)
    def __init__(  # noqa: N807
        self: Any,
        *args: Any,
        placement: Layer | Placement | None = None,
        num_local_slots: int | None = None,
        indices: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = original.defaults | original.call((self,), args, kwargs)
        group, own = given["group"], None
        # Before DeepEP's own exchange, in which other ranks could wait for one that raises here.
        # With LPLB_EP=0 too: else a rank that misses the variable would leave the others waiting.
        with together(group if isinstance(group, dist.ProcessGroup) else None, "settings") as facts:
            original.bind(self, *args, **kwargs)
            settings = Settings.from_env()
            show(settings.log)
            if indices is not None:
                settings = dataclasses.replace(settings, indices=indices)
            planner_settings = PlannerSettings.of(settings)
            cost = planner_settings.cost
            own = _own_layers(settings, placement, num_local_slots)
            if settings.mode != "0" and not base.__module__.startswith("lplb_ep."):
                _refuse_late_nvshmem(given)
            facts |= {
                "buffer": f"{base.__module__}.{base.__name__}",
                "LPLB_EP": settings.mode,
                "indices": settings.indices,
                "replicas": settings.replicas,
                "counts": settings.counts,
                "LPLB_EP_SOLVER": settings.solver,
                "LPLB_EP_GUEST_TOLERANCE": settings.guest_tolerance,
                "LPLB_EP_GUEST_MIN_TOKENS": settings.guest_min_tokens,
                "LPLB_EP_OBJECTIVE": settings.objective,
                "LPLB_EP_COST": "none" if cost is None else cost.fingerprint(),
                "LPLB_EP_MIN_GAIN": settings.min_gain,
                "LPLB_EP_EVERY": settings.every,
                # The solver that this rank would take: it may lack a package.
                "solver": solver_fact(settings.solver) if settings.mode == "1" else "none",
                "placement": _fingerprint(own),
                "lplb_ep version": __version__,
            }
        original.function(self, *args, **kwargs)
        self._lplb_state = _state(self, base, contract, settings, planner_settings, given)
        if isinstance(own, NamedLayers):
            self._lplb_state.find_modules = own.running
        elif own is not None:
            self._lplb_state.default = own
            if settings.mode != "0":
                register(self._lplb_state, *own)

    return __init__


def _own_layers(
    settings: Settings, placement: Layer | Placement | None, num_local_slots: int | None
) -> LayerUse | NamedLayers | None:
    """The layer that a buffer is made with, or those of a file by modules' names; checked."""
    if placement is None and num_local_slots is not None:
        raise ContractError("num_local_slots goes with placement=, and there is none")
    if placement is None and not settings.placement:
        return None
    own: LayerUse | NamedLayers
    if placement is not None:
        own = layer_use(placement, 0)
        check_local_slots(own.layer.placement, num_local_slots)
    else:
        of_file = layers_of_file(settings.placement)
        own = of_file if isinstance(of_file, NamedLayers) else LayerUse(of_file, 0)
    refuse_when_off(settings, "Buffer")
    return own


def _fingerprint(own: LayerUse | NamedLayers | None) -> str:
    if isinstance(own, LayerUse):
        return own.layer.placement.fingerprint()
    return "none" if own is None else own.fingerprint()


def _state(
    buffer: Any,
    base: type,
    contract: Contract,
    settings: Settings,
    planner_settings: PlannerSettings,
    given: dict[str, Any],
) -> BufferState:
    """The state of a buffer that was made just now."""
    for attribute in contract.attributes:
        if not hasattr(buffer, attribute):
            raise ContractError(
                f"{type(buffer).__name__} has no attribute {attribute}, on which lplb_ep relies"
            )
    group, num_ranks_per_node = buffer.group, contract.num_ranks_per_node
    if num_ranks_per_node is None:
        several = getattr(buffer, "num_scaleout_ranks", 1) > 1
        num_ranks_per_node = buffer.num_scaleup_ranks if several else None
    elif not isinstance(group, dist.ProcessGroup) or group.size() <= num_ranks_per_node:
        num_ranks_per_node = None
    hint = getattr(base, _SIZE_HINT, None)
    return BufferState(
        settings,
        planner_settings,
        group,
        contract,
        low_latency_mode=bool(given.get("low_latency_mode")),
        has_nvlink_memory=contract.num_ranks_per_node is None or bool(given.get("num_nvl_bytes")),
        num_qps=given.get("num_qps_per_rank"),
        num_ranks_per_node=num_ranks_per_node,
        size_hint=hint and inspect.unwrap(hint),
    )


def _refuse_late_nvshmem(given: dict[str, Any]) -> None:
    """NVSHMEM reads its options when it is first started, and DeepEP's are not the counts'."""
    group = given["group"]
    across = isinstance(group, dist.ProcessGroup) and group.size() > 8  # of one node, for DeepEP
    if not (given.get("num_rdma_bytes") and (given.get("low_latency_mode") or across)):
        return
    if has_started_nvshmem():
        raise ContractError(
            "NVSHMEM was started for the counts already, without what DeepEP needs of it: make "
            "this buffer before any layer's placement, or set LPLB_EP_COUNTS=ipc"
        )


# --- views ----------------------------------------------------------------------------------------


def _view(self: Any, placement: Layer | Placement, slot: int = 0) -> Any:
    """A facade over the same buffer with a placement of its own in force: one for each layer.

    Collective: every rank makes its views in the same order.

    Args:
        placement: the layer, or the placement object that stands for one.
        slot: which of the micro-batches in flight; each has a channel of its own.

    Returns:
        An instance of this buffer's class that shares all of its state.

    Raises:
        ContractError: LPLB_EP is 0, and callers pass experts.
        TypeError: `placement` is neither a layer nor a placement.
        ValueError: `slot` is not a whole number in [0, 2**31).
        RankError: ranks bring different placements or slots.
    """
    state = state_of(self)
    refuse_when_off(state.settings, "view()")  # on every rank alike
    is_off = state.settings.mode == "0"
    use = layer_use(placement, slot) if is_off else register(state, placement, slot)
    view: Any = object.__new__(_view_class(self.__class__))
    view.__dict__ = self.__dict__
    view._lplb_use = use
    return view


def _stats(self: Any) -> list[LayerStats]:
    """Statistics of each layer that plans in this buffer's group; of a view, its own layer.

    It waits for no batch, and nothing is exchanged: each rank has all numbers.

    Returns:
        The statistics since `lplb_ep.metrics.reset`, as of the last batch that is done.
    """
    state, own = state_of(self), getattr(self, "_lplb_use", None)
    if own is not None:
        return stats_of([own.layer])
    return stats_of(dict.fromkeys(layer for layer, *_ in channels.get(state.group, {})))


@functools.cache
def _view_class(base: type) -> type:
    if "_lplb_use" in vars(base):  # a view of a view
        return base
    # The layer is the only thing of a view's own; all else lives in the dict that it shares.
    return type(base.__name__, (base,), {"__slots__": ("_lplb_use",), "__doc__": base.__doc__})
