"""torchtitan 0.3 over DeepEP V2: experts get guests or replicas, by an override or a converter.

Importing this module imports torchtitan. See docs/torchtitan.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torchtitan.config import derive, override
from torchtitan.distributed.spmd_types import maybe_set_sparse_mesh
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import DeepEPTokenDispatcher
from torchtitan.protocols.model import ModelConfigConverter

from ..comm.collectives import everyone
from ..deepep.channels import state_of
from ..deepep.context import attach
from ..deepep.drop_in import chosen_module
from ..deepep.patch import patch
from ..deepep.plans import bring_guests_back
from ..layer import Layer
from ..placement.table import Placement
from ..weights.guests import Guests
from ..weights.pool import GuestPool, outside_of_checkpoints, shapes_of
from ..weights.standing import StandingReplicas
from .balance import Balance, BalancedLayer, guests_for, placement_for, refuse

VERSION = "0.3"
"""The torchtitan whose modules this one knows."""


class BalancedRoutedExperts(RoutedExperts):
    """torchtitan's routed experts, whose batches are balanced by guests, or by replicas.

    Parameters, their names, and so checkpoints, are those of `RoutedExperts`. While LPLB_EP is 0 or
    unset, the forward pass is, too.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        """As `RoutedExperts.Config`."""

        guests: int | None = None
        """Guest slots a rank; None: by the number of its experts (`guests_for`)."""
        replicas: int = 0
        """Static copies a rank, in the place of guests."""
        load: list[float] | None = None
        """[E] tokens of the experts, for which replicas are chosen; None: equal."""

    def __init__(self, config: Config) -> None:
        _prepare()
        super().__init__(config)
        self.balanced: BalancedLayer | None = None
        """None: LPLB_EP is 0, or the model was not parallelized."""
        self.pool: GuestPool | None = None
        """Of its guests, which other layers share; None before the first batch."""
        self._asked = config

    def parallelize(self, parallel_dims: Any) -> None:
        """As torchtitan's, then gives the layer its placement. Collective.

        Raises:
            ContractError: there is no expert parallelism.
            PlacementError: its degree does not divide the experts.
            RankError: ranks ask for different placements.
        """
        super().parallelize(parallel_dims)
        mesh = self.token_dispatcher.ep_mesh
        if mesh is None:
            refuse("this model", ["its experts are on one rank: set expert_parallel_degree"])
        buffer = _buffer()
        state = state_of(buffer)
        if state.settings.mode == "0":
            return
        num_experts, num_ranks = self.token_dispatcher.num_experts, mesh.size()
        guests, replicas, load = self._asked.guests, self._asked.replicas, self._asked.load
        if replicas:
            rows = torch.ones(num_experts) if load is None else torch.tensor(load)
            placement = placement_for(rows, num_ranks, replicas)
        else:
            placement = Placement.homes_only(
                num_experts,
                num_ranks,
                guests_for(num_experts, num_ranks) if guests is None else guests,
                num_ranks_per_node=state.num_ranks_per_node,
            )
        self.balanced = BalancedLayer(Layer(placement))
        slots = placement.num_local_slots
        attach(self, self.balanced.layer, num_local_slots=slots, buffer=buffer, experts=False)

    @torch.compiler.disable(
        reason="lplb_ep plans each batch anew: leave `model` out of compile.components"
    )
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a module's call. A graph of `torch.compile` ends here, and begins anew behind it."""
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """As `RoutedExperts.forward`: the names of the arguments are torchtitan's."""
        balanced = self.balanced
        if balanced is None:
            return super().forward(
                x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E
            )
        B, _, D = x_BLD.shape
        x_TD, K = x_BLD.view(-1, D), topk_scores_BLK.size(-1)
        copies = None
        if state_of(_buffer()).settings.mode == "1":
            copies = self._copies(balanced)
        rows, counts, metadata = self.token_dispatcher.dispatch(
            x_TD,
            topk_scores_BLK.view(-1, K),
            topk_expert_ids_BLK.view(-1, K),
            num_local_tokens_per_expert_E,
        )
        with maybe_set_sparse_mesh():
            out = self._compute(copies, rows, counts, metadata.state)
        return self.token_dispatcher.combine(out, metadata, x_TD).view(B, -1, D)

    def _copies(self, balanced: BalancedLayer) -> Guests | StandingReplicas:
        """What brings copies for the batch at hand. Collective.

        It is made for the first batch, since weights have their device and dtype then.
        """
        if isinstance(balanced.replicas, StandingReplicas):
            balanced.replicas.prepare()
            return balanced.replicas
        if balanced.guests is not None:
            return balanced.guests
        group, layer = self.token_dispatcher.ep_mesh.get_group(), balanced.layer
        with outside_of_checkpoints():
            if self._asked.replicas:
                balanced.replicas = StandingReplicas(self.inner_experts, layer, group)
            else:
                slots = layer.placement.num_guests_per_rank
                self.pool = _pool(group, slots, self.inner_experts)
                given = self.inner_experts, layer, group, self.pool
                balanced.guests = Guests(*given, layer_waits=True)
        return self._copies(balanced)

    def _compute(
        self, copies: Guests | StandingReplicas | None, rows: Tensor, counts: Tensor, state: Any
    ) -> Tensor:
        """The experts' outputs for rows in the order of the local slots: copies' are a suffix.

        Args:
            copies: of this layer; None: every token is at home.
            rows: [N, D].
            counts: [P / R] rows of each slot.
            state: of the dispatch.
        """
        sizes = _handle_of(state).num_recv_tokens_per_expert_list
        dispatcher = self.token_dispatcher
        num_own = dispatcher.num_experts // dispatcher.ep_mesh.size()
        if copies is None:
            return self.inner_experts(rows, counts[:num_own])
        rows, weights, arrive = copies.split_weights(rows)
        own, behind = rows.split([sum(sizes[:num_own]), sum(sizes[num_own:])])
        out = functional_call(self.inner_experts, weights, (own, counts[:num_own]))
        if len(behind):
            others = functional_call(self.inner_experts, arrive(), (behind, counts[num_own:]))
            out = torch.cat([out, others])
        return out


class BalanceConverter(ModelConfigConverter):
    """Balances every layer of routed experts of a model, in torchtitan's list of converters."""

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        """Of the converter."""

        guests: int | None = None
        """Guest slots a rank; None: by the number of its experts (`guests_for`)."""
        replicas: int = 0
        """Static copies a rank, in the place of guests."""
        load: list[list[float]] | None = None
        """[L, E] tokens of the layers' experts, for which replicas are chosen; None: equal."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: Any) -> Any:
        """Replaces `RoutedExperts` by `BalancedRoutedExperts`.

        Raises:
            ContractError: the model has no routed experts, or some that cannot be balanced. Or the
                loads are of another number of layers.
        """
        found = [*model_config.traverse(RoutedExperts.Config)]
        refuse("this model", [] if found else ["it has no RoutedExperts"])
        asked = self.config
        loads = [None] * len(found) if asked.load is None else asked.load
        if len(loads) != len(found):
            refuse("this model", [f"it has {len(found)} MoE layers, and load has {len(loads)}"])
        for (_, config, parent, attribute), load in zip(found, loads, strict=True):
            new = _balanced(config, asked.guests, asked.replicas, load)
            if isinstance(parent, list):
                parent[attribute] = new
            else:
                setattr(parent, attribute, new)
        return model_config


@override(target=RoutedExperts.Config, description="Balanced by copies (lplb_ep).")
def balance(
    cfg: RoutedExperts.Config,
    *,
    guests: int | None = None,
    replicas: int = 0,
    load: list[float] | None = None,
) -> BalancedRoutedExperts.Config:
    """The override for `--override.imports lplb_ep.clients.torchtitan.balance`.

    Args:
        cfg: the layer's.
        guests: guest slots a rank; None: by the number of its experts (`guests_for`).
        replicas: static copies a rank, in the place of guests.
        load: [E] tokens of every layer's experts, for which replicas are chosen; None: equal.

    Raises:
        ContractError: these experts cannot be balanced.
    """
    return _balanced(cfg, guests, replicas, load)


def balance_of(model: nn.Module) -> Balance:
    """The balanced layers of a model, with statistics of their batches: for logs and tests."""
    found = Balance()
    for name, module in model.named_modules():
        if isinstance(module, BalancedRoutedExperts) and module.balanced is not None:
            module.balanced.layer.name = name.replace("._checkpoint_wrapped_module", "")
            found.layers.append(module.balanced)
            found.pools += [] if module.pool is None else [module.pool]
    found.pools[:] = dict.fromkeys(found.pools)  # layers share them
    return found


# --- inner ----------------------------------------------------------------------------------------


def _balanced(
    config: RoutedExperts.Config, guests: int | None, replicas: int, load: list[float] | None
) -> BalancedRoutedExperts.Config:
    reasons, found = [], version("torchtitan")
    if not found.startswith(f"{VERSION}."):
        reasons.append(f"torchtitan {found} is installed, and this is for {VERSION}")
    if type(config) is not RoutedExperts.Config:
        reasons.append(
            f"it has {type(config).__qualname__} in the place of RoutedExperts.Config, with a "
            "forward pass of its own"
        )
    if not (guests is None or (isinstance(guests, int) and guests >= 1)):
        reasons.append(f"guests must be a whole number from 1, or None; got {guests!r}")
    if not (isinstance(replicas, int) and replicas >= 0):
        reasons.append(f"replicas must be a whole number from 0; got {replicas!r}")
    elif replicas and guests is not None:
        reasons.append("guests and replicas do not go together: say one of them")
    num_experts = config.token_dispatcher.num_experts
    if load is not None and not replicas:
        reasons.append("load is what replicas are chosen for: say how many, too")
    elif load is not None and len(load) != num_experts:
        reasons.append(f"load has {len(load)} experts, and a layer {num_experts}")
    refuse("this model", [*reasons, *_obstacles(config.token_dispatcher)])
    asked = {"guests": guests, "replicas": replicas, "load": load}
    return derive(config, BalancedRoutedExperts.Config, **asked)


def _obstacles(dispatcher: Any) -> Iterator[str]:
    """What of a dispatcher's config is not supported."""
    if type(dispatcher) is not DeepEPTokenDispatcher.Config:
        yield f'it has a {type(dispatcher).__qualname__}: make it with moe_comm_backend="deepep"'
    elif dispatcher.cudagraphable:
        yield "its batches are captured in CUDA graphs: set cudagraphable=False"


def _prepare() -> None:
    """Has torchtitan's calls of DeepEP planned, also where there is no DeepEP or no GPU."""
    patch()
    from torchtitan.distributed.deepep import deepep

    embedded = chosen_module().__name__ == "lplb_ep.embedded"
    for name in ("dispatch", "combine"):  # torchtitan's are for CUDA alone
        has_one = torch._C._dispatch_has_kernel_for_dispatch_key(f"deepep::{name}", "CPU")
        if embedded and not has_one:
            deepep._lib.impl(name, getattr(deepep, f"_{name}_op_impl"), "CPU")


def _buffer() -> Any:
    """The one buffer that torchtitan has for all layers."""
    from torchtitan.distributed.deepep import deepep

    return deepep._buffer


_pools: WeakValueDictionary[Any, GuestPool] = WeakValueDictionary()


def _pool(group: dist.ProcessGroup, num_guests: int, experts: nn.Module) -> GuestPool:
    """The pool of all layers whose experts have these shapes. Collective."""
    key = group, num_guests, tuple(shapes_of(experts).items())
    pool = _pools.get(key)
    # Python collects a model that is gone sooner on some ranks than on others.
    if not all(everyone(group, pool is not None)) or pool is None:
        pool = _pools[key] = GuestPool(group, num_guests, experts)
    return pool


_handles: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Those of dispatches whose backward pass is to come, by torchtitan's numbers."""


def _handle_of(state: Any) -> Any:
    """The handle of a dispatch.

    In a recompute of selective checkpointing there was none: what it returned was saved. Its guests
    are brought back then, before the experts run again.
    """
    from torchtitan.distributed.deepep import deepep

    number = int(state.handle_id)
    handle = deepep._handle_cache.get(number)
    if handle is not None:
        _handles[number] = handle
        return handle
    bring_guests_back(_buffer(), _handles[number])
    return _handles[number]
