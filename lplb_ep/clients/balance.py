"""Functions that clients share: the balanced layers, reports on them, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ContractError, PlacementError
from ..layer import Layer
from ..metrics.layers import LayerStats, stats_of
from ..placement.inputs import loads
from ..placement.table import Placement
from ..planning.solve import solve
from ..settings import Settings
from ..weights.guests import Guests
from ..weights.pool import GuestPool
from ..weights.replicas import Replicas
from ..weights.standing import StandingReplicas

MOST_GUESTS = 8


def is_off() -> bool:
    """Whether LPLB_EP is 0 or unset, so that a model stays as it is."""
    return Settings.from_env().mode == "0"


def guests_for(num_experts: int, num_ranks: int) -> int:
    """The default number of guest slots of a rank: 3 for 16 of its experts, from 1 to 8.

    With that many DeepSeek-V3's loads reach the tolerance with homes in the router's order, at 4, 8
    and 32 experts a rank (docs/guests.md).
    """
    per_rank = num_experts // num_ranks
    return max(1, min(MOST_GUESTS, round(per_rank * 3 / 16)))


def placement_for(load: Tensor, num_ranks: int, replicas: int) -> Placement:
    """Replicas for a load, homes in the router's order: those that a batch of it takes as guests.

    Slots that no guest takes get the expert with most load that is on another rank.

    Args:
        load: [E] tokens.
        num_ranks: R.
        replicas: D, of a rank.

    Raises:
        PlacementError: R does not divide E, D is negative or more than other ranks have experts, or
            a load is negative or not finite.
    """
    num_experts = len(load)
    homes = Placement.homes_only(num_experts, num_ranks, replicas)
    most = num_experts - num_experts // num_ranks
    if replicas > most:
        raise PlacementError(
            f"replicas must be at most {most}, the number of experts on other ranks; got {replicas}"
        )
    tokens = loads(load.double().cpu().numpy(), num_experts)
    scaled = torch.from_numpy(tokens / max(tokens.sum(), 1) * 2**20).long()
    guests = solve(scaled, homes, guest_tolerance=0.0, guest_min_tokens=1).guests
    assert guests is not None, "the placement has guest slots"
    own, slots = num_experts // num_ranks, []
    for rank, chosen in enumerate(guests.tolist()):
        here = [*range(rank * own, (rank + 1) * own), *(e for e in chosen if e >= 0)]
        others = sorted(
            set(range(num_experts)) - set(here),
            key=lambda e: (-int(scaled[e]), (e // own - rank) % num_ranks, e),
        )
        slots += [*here, *others[: own + replicas - len(here)]]
    return Placement(slots, num_ranks)


def refuse(what: str, reasons: Sequence[str]) -> None:
    """Raises where a model cannot be balanced.

    Args:
        what: the model, or a layer of it.
        reasons: each names something that is not supported, and says how to go without.

    Raises:
        ContractError: there are reasons; has all of them.
    """
    if reasons:
        raise ContractError(f"{what} cannot be balanced: {'; '.join(reasons)}")


@dataclass(eq=False)
class BalancedLayer:
    """An MoE layer of a model that a client balances.

    It keeps its layer's `Guests` and `Replicas` alive, which the layer refers to weakly.
    """

    layer: Layer
    guests: Guests | None = None
    replicas: Replicas | StandingReplicas | None = None

    @property
    def name(self) -> str:
        """Of its module in the model."""
        return self.layer.name

    def report(self) -> LayerStats:
        """Statistics of the layer's batches. Local, and waits for no batch."""
        return stats_of([self.layer])[0]


@dataclass(eq=False)
class Balance:
    """A model that a client balances, until `remove`."""

    layers: list[BalancedLayer] = field(default_factory=list)
    """Empty while LPLB_EP is 0 or unset."""
    pools: list[GuestPool] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Changes of the model beside its MoE layers."""
    stays: str = ""
    """The reason why `remove` cannot restore the model; empty: it can."""
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def undo_with(self, function: Callable[[], None]) -> None:
        """Adds a step that `remove` undoes; the last one is undone first."""
        self._undo.append(function)

    def replace(self, target: object, name: str, value: object) -> None:
        """Replaces an attribute of an object, until `remove`."""
        had, old = name in vars(target), vars(target).get(name)
        setattr(target, name, value)
        self.undo_with(lambda: setattr(target, name, old) if had else delattr(target, name))

    def report(self) -> list[LayerStats]:
        """Statistics of each layer's batches. Local, and waits for no batch."""
        return stats_of(layer.layer for layer in self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "\n".join(self.notes) or "nothing is balanced: LPLB_EP is 0 or unset"
        held = [*self.pools, *(layer.replicas for layer in self.layers)]
        memory = sum(copies.num_bytes for copies in held if copies is not None)
        has_guests = self.layers[0].layer.placement.num_guests_per_rank
        what = f"{memory / 2**20:.1f} MiB for {'guests' if has_guests else 'replicas'}"
        lines = [f"{len(self.layers)} MoE layers, {what}", *self.notes]
        return "\n".join([*lines, *map(str, self.report())])

    def remove(self) -> None:
        """Restores the model as it was. Local; no batch may be in flight.

        Raises:
            ContractError: the model cannot be restored; nothing is done then.
        """
        if self.stays:
            raise ContractError(f"the balanced model cannot be given back: {self.stays}")
        while self._undo:
            self._undo.pop()()
        self.layers.clear()
        self.pools.clear()
        self.notes.clear()


class SharedReplacement:
    """Another attribute of an object that all balanced models need, until the last is removed.

    A model that was dropped without `remove` leaves it there. So it must not harm other models.
    """

    def __init__(self) -> None:
        self._num_users = 0

    def give(
        self, balance: Balance, target: object, name: str, make: Callable[[Any], object]
    ) -> None:
        """Replaces the attribute, if that was not done for another model.

        Args:
            balance: of a model that needs it.
            target: the object, always the same one.
            name: of its attribute.
            make: returns the new value, given the old one.
        """
        if not self._num_users:
            self._old = getattr(target, name)
            setattr(target, name, make(self._old))
        self._num_users += 1
        balance.undo_with(lambda: self._take(target, name))

    def _take(self, target: object, name: str) -> None:
        self._num_users -= 1
        if not self._num_users:
            setattr(target, name, self._old)


def make_guests(
    balance: Balance,
    experts: Mapping[str, nn.Module],
    placements: Sequence[Placement],
    group: dist.ProcessGroup,
    num_in_flight: int = 1,
) -> list[BalancedLayer]:
    """Gives layers guest slots, and pools that they share. Collective.

    Args:
        balance: what the layers are added to.
        experts: by the names of their layers, what holds the E / R experts of this rank, as
            `Guests` takes them.
        placements: of each layer, all with as many guest slots.
        group: the expert-parallel group.
        num_in_flight: micro-batches in flight together: each has a pool, the last of the balance's.

    Returns:
        The layers, in order.
    """
    pools = [
        GuestPool(group, placements[0].num_guests_per_rank, [*experts.values()], slot=slot)
        for slot in range(num_in_flight)
    ]
    balance.pools += pools
    made = []
    for (name, module), placement in zip(experts.items(), placements, strict=True):
        layer = Layer(placement, name=name)
        made.append(BalancedLayer(layer, Guests(module, layer, group, pools)))
    balance.layers += made
    return made
