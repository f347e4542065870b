"""The identity of an MoE layer: its placement in force, planners, replicas and observers."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.distributed as dist

from .placement.table import Placement, check_placement
from .problem import Problem


class Planning(Protocol):
    """The protocol by which a layer uses a planner."""

    placement: Placement
    """The placement that it plans on."""


class Weights(Protocol):
    """The protocol by which a layer uses its `Replicas`."""

    @property
    def is_valid(self) -> bool:
        """Whether the replicas' weights are known to equal their homes'."""

    def mark_valid(self) -> None:
        """Declares them equal."""

    def mark_stale(self) -> None:
        """Declares that home weights changed."""


class GuestWeights(Protocol):
    """The protocol by which a layer, and a call that plans, use the layer's `Guests`."""

    layer_waits: bool
    """Whether the layer itself waits for guests, and its dispatch does not."""

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""

    @property
    def is_valid(self) -> bool:
        """Whether this rank can send and receive guests."""

    def prepare(self, slot: int) -> None:
        """Makes the current stream wait, before a plan, for all work on the guests' memory."""

    def push(
        self,
        guests: torch.Tensor,
        slot: int,
        status: torch.Tensor,
        number: torch.Tensor | None,
    ) -> Any:
        """Begins to push the guests [R, G] of a plan; returns an object for the batch."""

    def push_again(self, stay: Any, slot: int) -> None:
        """Brings a batch's guests back where others took their place."""

    def wait(self, slot: int) -> None:
        """Makes the current stream wait until the guests have arrived."""

    def skip(self, slot: int) -> None:
        """Says that a batch has no guests."""


class Layer:
    """An MoE layer, identified by its object and not by a value.

    Two layers may have equal placements and different weights. So planners, replica weights and
    the placement in force belong to a layer. A `Placement` object may be passed instead of a layer.
    It stands for the first layer in which it was in force (`layer_of`).

    Args:
        placement: the placement that is in force at first.
        problem: bounds of every batch's plan beside its counts, such as base loads. Planners and
            buffers respect it.
        name: for messages and statistics, most often the name of its module in the model.

    Raises:
        TypeError: `placement` is not a `Placement`.
        ValueError, InfeasibleError: as `Problem.checked`, or the problem has a load.
    """

    placement: Placement
    """The placement in force; `replace` puts it there."""
    is_refreshable: bool
    """Whether a refresh may replace the placement. Planners then reserve capacity for that."""
    moves_homes: bool
    """Whether such a placement may have other homes, too: an engine moves all its experts."""
    observers: list[Callable[[torch.Tensor], None]]
    """Each observer is called with the counts [R, E] of every planned batch.

    Where `LPLB_EP_EVERY` leaves out an exchange, these are the counts exchanged last."""
    planners: WeakSet[Any]
    """The planners that were made for this layer, of whatever group."""
    name: str
    """For messages and statistics; empty: it has none."""
    guest_bytes: int
    """Weights of one guest, by the `Guests` that were made last; 0: there were none."""

    def __init__(
        self, placement: Placement, problem: Problem | None = None, name: str = ""
    ) -> None:
        check_placement(placement)
        self.name = name
        self._problem = Problem() if problem is None else problem.checked(placement)
        if self._problem.load is not None:
            raise ValueError("a layer's load comes with each batch; its problem must have none")
        self.replace(placement)
        self.is_refreshable = self.moves_homes = False
        self.observers = []
        self.planners = WeakSet()
        self._replicas: list[ref[Weights]] = []  # asked at every batch: a WeakSet takes 1 µs
        self._guests: ref[GuestWeights] | None = None
        self.guest_bytes = 0
        self._is_trusted = False

    @property
    def problem(self) -> Problem:
        """Bounds of every batch's plan beside its counts; planners are made for it."""
        return self._problem

    def replace(self, placement: Placement) -> None:
        """Puts another placement in force, with which all planners of the layer must plan."""
        self.placement = placement
        columns = placement.logical_to_physical.shape[1]
        if placement.num_guests_per_rank:  # columns are kept for guests
            columns = int((placement.logical_to_physical >= 0).sum(1).max())
        self._has_replicas = columns > 1
        # Kept on the object, which the layer refers to: a table beside them would keep both alive.
        vars(placement).setdefault("_layer", self)

    def __repr__(self) -> str:
        return f"Layer({self.placement!r})"

    def __reduce__(self) -> tuple[type[Layer], tuple[Placement, Problem, str]]:
        """Pickles and copies are layers of their own, of whose weights nothing is known."""
        return Layer, (self.placement, self.problem, self.name)

    @property
    def label(self) -> str:
        """Its name, or its number among the layers that were planned with. It may be the next."""
        return self.name or f"layer {planned_layers.get(self, _num_planned)}"

    def add_planner(self, planner: Any, kind: Hashable) -> int:
        """Adds a planner, which the layer holds weakly.

        Args:
            planner: the planner.
            kind: what tells it from others of the layer. Planners of all layers of a model are
                made alike, so the same batches go through those of one kind and number.

        Returns:
            How many of its kind were made before, in this process, for a layer of this label.
        """
        global _num_planned
        self.planners.add(planner)
        if self not in planned_layers:
            planned_layers[self] = _num_planned
            _num_planned += 1
        of_kind = self.label, kind
        _num_planners[of_kind] += 1
        return _num_planners[of_kind] - 1

    @property
    def is_valid(self) -> bool:
        """Whether tokens may go to replicas. Local, nothing is exchanged.

        True where no expert has a second copy. With live `Replicas`: whether all of them are
        valid. Without any: whether `mark_valid` was called since the last ones were made.
        """
        if not self._has_replicas:
            return True
        is_watched = False
        for weights in self._replicas:
            if (replicas := weights()) is not None:
                if not replicas.is_valid:
                    return False
                is_watched = True
        return is_watched or self._is_trusted

    def mark_valid(self) -> None:
        """Declares that the replicas' weights equal their homes', for engines that fill them.

        Live `Replicas` are marked and keep watching their weights. Without any, the declaration
        holds until `mark_stale`, or until `Replicas` are made.
        """
        live = self.replicas
        for replicas in live:
            replicas.mark_valid()
        if not live:
            self._is_trusted = True

    def mark_stale(self) -> None:
        """Takes `mark_valid` back: tokens go to home slots until the replicas are valid again."""
        for replicas in self.replicas:
            replicas.mark_stale()
        self._is_trusted = False

    def watch(self, replicas: Weights) -> None:
        """Adds `Replicas` of the layer's weights, which from now on decide whether it is valid."""
        self._replicas = [ref(live) for live in (*self.replicas, replicas)]
        self._is_trusted = False

    @property
    def replicas(self) -> list[Weights]:
        """The live `Replicas` that were made for this layer."""
        return [replicas for weights in self._replicas if (replicas := weights()) is not None]

    def take_guests(self, guests: GuestWeights) -> None:
        """Sets the `Guests` that push for the layer's batches, and holds them weakly."""
        self._guests = ref(guests)
        self.guest_bytes = guests.expert_bytes

    @property
    def guests(self) -> GuestWeights | None:
        """The live `Guests` that were made last for this layer, if any."""
        return None if self._guests is None else self._guests()

    def current_planners(self) -> list[Any]:
        """The live planners that plan with the placement in force."""
        return [planner for planner in self.planners if planner.placement is self.placement]


def layer_of(target: Layer | Placement) -> Layer:
    """The layer itself, or the one layer that a placement object stands for.

    Copies and unpickled placements are other objects, and stand for layers of their own.

    Raises:
        TypeError: `target` is neither.
    """
    if isinstance(target, Layer):
        return target
    check_placement(target)
    layer: Layer | None = vars(target).get("_layer")
    return Layer(target) if layer is None else layer


def mark_valid(placement: Layer | Placement) -> None:
    """Declares that a layer's replicas equal their homes: `Layer.mark_valid`."""
    layer_of(placement).mark_valid()


def mark_stale(placement: Layer | Placement) -> None:
    """Takes `mark_valid` back: `Layer.mark_stale`."""
    layer_of(placement).mark_stale()


def check_slot(slot: int) -> None:
    """Checks the number of a micro-batch slot.

    Raises:
        ValueError: it is not a whole number in [0, 2**31).
    """
    if not (isinstance(slot, int) and 0 <= slot < 2**31):
        raise ValueError(f"slot must be a whole number in [0, 2**31); got {slot!r}")


_num_planned = 0
_num_planners: collections.Counter[tuple[str, Hashable]] = collections.Counter()
planned_layers: WeakKeyDictionary[Layer, int] = WeakKeyDictionary()
"""The layers that planners were made for, in that order, and the number of each."""

channels: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Layer, int, Hashable], Any]]
channels = WeakKeyDictionary()
"""The planner of each layer, micro-batch slot and settings, by group. A channel outlives the
buffers that use it, since frameworks replace buffers by larger ones, and ends with its group."""
