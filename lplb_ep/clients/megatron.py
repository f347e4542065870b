"""Megatron-Core: its MoE layers over DeepEP's `Buffer`, balanced. Nothing is converted.

Three things of a layer are put in place of Megatron's. The dispatcher's manager dispatches with the
layer in force. It knows the slots of a rank, P / R. And the experts' own forward pass runs over
those slots. The dispatcher itself still has E / R experts, and so have the experts module,
the optimizer, DDP's buckets and checkpoints.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..comm.collectives import together
from ..deepep import drop_in
from ..deepep.channels import PlannerSettings, state_of
from ..deepep.context import use
from ..deepep.patch import provide
from ..layer import Layer
from ..logs import logger
from ..placement.table import Placement
from ..settings import Settings
from ..weights.slots import is_distributed
from .balance import Balance, SharedReplacement, is_off, make_guests, refuse
from .megatron_experts import Experts, Slots, experts_of, obstacles
from .megatron_guests import GuestsInTurn
from .megatron_homes import are_in_order, check_movable, move_home, saves_by_expert
from .megatron_placements import placements_for
from .megatron_replicas import StaticCopies, send_home_with_ddp

log = logger(__name__)

# A DDP of Megatron-Core registers its hooks from there.
_DDP = "megatron.core.distributed.distributed_data_parallel"
# Switches of weight gradients that are added to `main_grad` by kernels, and not by autograd.
_FUSED = ("gradient_accumulation_fusion", "fuse_wgrad_accumulation")


def provide_buffers() -> None:
    """Gives Megatron-Core the embedded buffers where DeepEP is not installed.

    Call it before Megatron-Core is imported. `lplb-ep run` does so itself.
    """
    provide()


def balance(
    model: nn.Module | Sequence[nn.Module],
    *,
    guests: int | None = None,
    replicas: int = 0,
    load: Tensor | None = None,
    placement: Placement | Mapping[int, Placement] | None = None,
) -> Balance:
    """Balances every MoE layer of a model. Collective over each expert-parallel group, if off, too.

    Call it when parameters have their dtype and device: after `Float16Module`, before or after DDP
    and the optimizer. While LPLB_EP is 0 or unset, nothing is changed.

    Args:
        model: a module, or the model chunks of a pipeline.
        guests: guest slots of a rank; by default 3 for 16 of its experts, from 1 to 8.
        replicas: static copies of a rank, instead of guests. They need Megatron-Core's DDP.
        load: [L, E] tokens of the experts of this model's layers, the same on all ranks that have
            these layers. Replicas are chosen for it, and with guests homes are placed by it.
        placement: homes with replicas, or with guest slots, for all layers or by `layer_number`.
            Each rank has E / R homes. If these are not in the router's order, weights are moved
            there. Then call it before DDP and the optimizer are made.

    Returns:
        The balanced layers. Keep them as long as the model. `remove()` restores the model, if its
        homes are in the router's order.

    Raises:
        ContractError: a layer uses something that is not supported, or the placement does not fit.
            The message names all of it.
        PlacementError, ValueError, RankError: the arguments do not fit, or differ by rank.
    """
    chunks = [model] if isinstance(model, nn.Module) else [*model]
    layers = dict(_moe_layers(chunks))
    if not layers and is_off():
        return Balance()
    if not layers and any(map(_is_stage, chunks)):
        return Balance(notes=["this stage of the pipeline has no MoE layers"])
    refuse("this model", [] if layers else ["it has no MoELayer with several expert ranks"])
    return _balanced(layers, guests, replicas, load, placement)


kept: list[Balance] = []
"""What `balance_when_called` has balanced."""


def balance_when_called(kind: Any) -> None:
    """Balances MoE layers of this process by guests when the first batch reaches one.

    It is for programs that cannot be edited. All layers made before that batch share a pool.

    Args:
        kind: Megatron-Core's `MoELayer`.
    """
    waiting: list[weakref.ref[Any]] = []
    initialize = kind.__init__

    @functools.wraps(initialize)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        initialize(self, *args, **kwargs)
        waiting.append(weakref.ref(self))

    def balance_those() -> None:
        alive = [module for ref in waiting if (module := ref()) is not None]
        waiting.clear()
        layers = {
            f"{number}: layer {module.layer_number}": module
            for number, module in enumerate(alive)
            if module.ep_group.size() > 1 and not _is_balanced(module)
        }
        if layers and (made := _balanced(layers)).layers:
            kept.append(made)

    def behind(method: Any) -> Any:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if waiting:
                balance_those()
            return method(self, *args, **kwargs)

        return call

    kind.__init__ = __init__
    # A schedule of two micro-batches in flight calls a layer's parts, and routes first.
    kind.forward, kind.route = behind(kind.forward), behind(kind.route)


def _balanced(
    layers: dict[str, Any],
    guests: int | None = None,
    replicas: int = 0,
    load: Tensor | None = None,
    placement: Any = None,
) -> Balance:
    """Balances layers, or leaves them as they are if it fails. Collective, with LPLB_EP=0 too."""
    made, placements = Balance(), []
    with together(_group_of(next(iter(layers.values()))), "balance()") as facts:
        settings = Settings.from_env()
        facts["LPLB_EP"] = settings.mode
        if settings.mode != "0":
            refuse("this model", _FILE if settings.placement else [])
            for name, module in layers.items():
                refuse(name, [*_obstacles(module)])
            placements = placements_for(layers, guests, replicas, load, placement)
            for one in dict.fromkeys(placements):
                PlannerSettings.of(settings).check_placement(one)
            facts["guests of a rank"] = placements[0].num_guests_per_rank
        for name, one in zip(layers, placements, strict=False):
            facts[f"placement of {name}"] = one.fingerprint()[:12]
    if not placements:
        return made
    try:
        _give_buffers(made)
        _give_slots(made, layers, placements)
    except BaseException:
        made.remove()
        raise
    if not all(map(are_in_order, placements)):
        made.stays = (
            "its experts are not in the router's order. Save a distributed checkpoint, which is, "
            "and load it with LPLB_EP=0"
        )
    return made


_FILE = ["LPLB_EP_PLACEMENT is set, which is for programs without this call: give placement="]
_buffers = SharedReplacement()


def _give_buffers(made: Balance) -> None:
    """Has all layers call buffers that plan."""
    from megatron.core.transformer.moe import fused_a2a

    def forget() -> None:
        fused_a2a._buffer = None  # the class is looked up when the next batch comes

    made.undo_with(forget)
    _buffers.give(made, fused_a2a, "Buffer", lambda _: _shared(drop_in.Buffer))
    forget()  # it is of another class, or was made while LPLB_EP was another


def _shared(base: Any) -> type:
    """A drop-in for all models of a process: calls of models that are not balanced pass.

    Megatron-Core passes experts, whatever LPLB_EP_INDICES says.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        base.__init__(self, *args, indices="logical", **kwargs)
        state_of(self).is_shared = True

    return type(base.__name__, (base,), {"__init__": __init__, "__doc__": base.__doc__})


def _give_slots(made: Balance, layers: dict[str, Any], placements: list[Placement]) -> None:
    """Gives layers guest slots or replicas, and moves experts home."""
    group = next(iter(layers.values())).token_dispatcher._comm_manager.group
    experts = {name: experts_of(module) for name, module in layers.items()}
    moved = {n: p for n, p in zip(experts, placements, strict=True) if not are_in_order(p)}
    for name, placement in moved.items():
        check_movable(name, experts[name], placement, group)
    local = {name: own.local for name, own in experts.items()}
    if placements[0].num_guests_per_rank:
        num_in_flight = 1 + any(
            module.config.overlap_moe_expert_parallel_comm for module in layers.values()
        )
        for one in make_guests(made, local, placements, group, num_in_flight):
            assert one.guests is not None, "it was made with guests"
            guests = GuestsInTurn(one.guests, made.pools)
            _install(made, layers[one.name], one.layer, experts[one.name], guests)
    else:
        copies = []
        for (name, module), placement in zip(layers.items(), placements, strict=True):
            static = StaticCopies(name, local[name], placement, group)
            _install(made, module, static.balanced.layer, experts[name], static)
            made.layers.append(static.balanced)
            copies.append(static)
        send_home_with_ddp(made, copies)
    for name, placement in moved.items():
        saved = saves_by_expert(experts[name], placement, group.rank())
        made.replace(layers[name].experts, "sharded_state_dict", saved)
        move_home(experts[name], placement, group)


def _group_of(module: Any) -> Any:
    """The ranks that have a layer's experts."""
    manager = getattr(module.token_dispatcher, "_comm_manager", None)
    return module.ep_group if manager is None else manager.group


def _is_stage(chunk: nn.Module) -> bool:
    """Whether other ranks have other layers of the model."""
    configs = (getattr(module, "config", None) for module in chunk.modules())
    return any(getattr(config, "pipeline_model_parallel_size", 1) > 1 for config in configs)


def _moe_layers(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    """The MoE layers whose experts are on several ranks, by name."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for number, chunk in enumerate(chunks):
        prefix = f"{number}." if len(chunks) > 1 else ""
        for name, module in chunk.named_modules():
            if isinstance(module, MoELayer) and module.ep_group.size() > 1:
                yield prefix + name, module


def _obstacles(module: Any) -> Iterator[str]:
    """What of a layer is not supported."""
    config, dispatcher = module.config, module.token_dispatcher
    if config.moe_token_dispatcher_type != "flex":
        yield (
            f"moe_token_dispatcher_type is {config.moe_token_dispatcher_type!r}: set 'flex', with "
            "moe_flex_dispatcher_backend 'deepep'"
        )
    elif config.moe_flex_dispatcher_backend != "deepep":
        yield f"moe_flex_dispatcher_backend is {config.moe_flex_dispatcher_backend!r}: set 'deepep'"
    if dispatcher.tp_size > 1:
        yield f"expert_tensor_parallel_size is {dispatcher.tp_size}: set 1"
    if _is_balanced(module):
        yield "it is balanced already: remove() that first"
    yield from obstacles(module.experts)
    for name in (
        "fp8",
        "fp4",
    ):
        if getattr(config, name, None):
            yield f"{name} is {getattr(config, name)!r}: turn it off"
    for name, usual in (("cuda_graph_impl", "none"), ("transformer_impl", "")):
        value = getattr(config, name, usual)
        if value == "inference_optimized" or (name == "cuda_graph_impl" and value != usual):
            yield f"{name} is {value!r}: set another"
    for name, parameter in module.experts.named_parameters():
        if is_distributed(parameter) or hasattr(parameter, "__fsdp_param__"):
            yield f"its parameter experts.{name} is sharded (FSDP), and guests need it whole"
            break


def _is_balanced(module: Any) -> bool:
    return "dispatch" in vars(getattr(module.token_dispatcher, "_comm_manager", None) or object)


def _install(made: Balance, module: Any, layer: Layer, experts: Experts, slots: Slots) -> None:
    """Replaces Megatron's dispatch and experts of a layer."""
    manager = module.token_dispatcher._comm_manager
    made.replace(manager, "num_local_experts", layer.placement.num_local_slots)
    dispatch = _dispatch(manager.dispatch, layer, module.experts, slots)
    made.replace(manager, "dispatch", dispatch)
    for name, method in experts.methods(slots).items():
        made.replace(module.experts, name, method)
    for linear in module.experts.modules():
        for name in _FUSED:
            if getattr(linear, name, False):
                made.replace(linear, name, False)


def _dispatch(
    original: Callable[..., Tensor], layer: Layer, experts: nn.Module, slots: Slots
) -> Callable[..., Tensor]:
    """A manager's dispatch by a layer: in a recompute, too, which does not enter the module."""
    modules = [*experts.modules()]

    def dispatch(*args: Any, **kwargs: Any) -> Tensor:
        _await_parameters(modules)
        with use(layer, slots.prepare()):
            return original(*args, **kwargs)

    return dispatch


def _await_parameters(modules: Sequence[nn.Module]) -> None:
    """Has the current stream wait for parameters that an optimizer still gathers.

    DDP does so before each module runs (`overlap_param_gather`). Weights are pushed before that.
    """
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if hook.__module__ == _DDP:
                hook(module, ())
