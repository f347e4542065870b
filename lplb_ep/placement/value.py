"""A placement as a frozen value: its table, and other values that follow from the table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import FrozenInstanceError
from functools import cached_property, partial
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError
from .copies import ranks_of_copies, slots_of_experts
from .guests import columns_with_guests, resize_guest_slots, slots_of_guests, with_guests_in
from .inputs import check_experts, integers, ranks_per_node, whole
from .optimum import components

IntArray = npt.NDArray[np.int32]
Self = TypeVar("Self", bound="Value")


class Value:
    """`Placement` without its builders and files; `Placement` documents arguments and errors."""

    num_ranks: int
    """R."""
    num_ranks_per_node: int
    """Ranks joined by NVLink; divides R."""
    num_experts: int
    """E."""
    num_physical_experts: int
    """P."""
    num_local_slots: int
    """P / R, slots on each rank."""
    num_guests_per_rank: int
    """G."""
    max_replicas: int
    """C."""
    physical_to_logical: IntArray
    """[P] int32, -1 = unused slot."""
    logical_to_physical: IntArray
    """[E, C] int32, column 0 the home, then the replicas by local slot and rank, -1 padded."""
    copy_rank: IntArray
    """[E, C] int32, the rank of each copy, -1 where it gets no tokens. That is where there is no
    copy, or a lower column is a copy on the same rank, so that its quota is always 0."""

    def __init__(
        self,
        physical_to_logical: npt.ArrayLike,
        num_ranks: int,
        *,
        num_experts: int | None = None,
        num_ranks_per_node: int | None = None,
        home: npt.ArrayLike | None = None,
        max_replicas: int | None = None,
        num_guests_per_rank: int = 0,
    ) -> None:
        table = integers("physical_to_logical", physical_to_logical)
        num_ranks = whole("num_ranks", num_ranks)
        if table.size == 0 or table.size % num_ranks:
            raise PlacementError(
                f"num_ranks must divide the number of slots: {table.size} slots, {num_ranks} ranks"
            )
        experts = max(int(table.max()) + 1, 1)
        if num_experts is not None:
            experts = whole("num_experts", num_experts)
        check_experts(table, experts)
        node = ranks_per_node(num_ranks, num_ranks_per_node)
        guests = whole("num_guests_per_rank", num_guests_per_rank, least=0)
        columns = columns_with_guests(table, num_ranks, experts, guests, max_replicas)
        slots = slots_of_experts(table, num_ranks, experts, home, columns)
        num_local_slots = table.size // num_ranks
        vars(self).update(
            num_ranks=num_ranks,
            num_ranks_per_node=node,
            num_experts=experts,
            num_physical_experts=table.size,
            num_local_slots=num_local_slots,
            num_guests_per_rank=guests,
            max_replicas=slots.shape[1],
            physical_to_logical=_frozen(table),
            logical_to_physical=_frozen(slots),
            copy_rank=_frozen(ranks_of_copies(slots, num_local_slots)),
        )

    def __setattr__(self, name: str, value: object = None) -> NoReturn:
        raise FrozenInstanceError(f"the {name} of a Placement does not change: make another one")

    __delattr__ = __setattr__

    def with_copies(
        self: Self, physical_to_logical: npt.ArrayLike, max_replicas: int | None = None
    ) -> Self:
        """Another placement for the same layer: homes, slots and nodes stay, replicas may not.

        Args:
            physical_to_logical: [P] integers, as for `Placement`.
            max_replicas: C; by default this one's.

        Raises:
            PlacementError: names the expert whose home would move or that has more copies than
                `max_replicas`, or the number of slots.
        """
        out = type(self)(
            physical_to_logical,
            self.num_ranks,
            num_experts=self.num_experts,
            num_ranks_per_node=self.num_ranks_per_node,
            home=self.home,
            max_replicas=self.max_replicas if max_replicas is None else max_replicas,
            num_guests_per_rank=self.num_guests_per_rank,
        )
        if out.num_physical_experts != self.num_physical_experts:
            raise PlacementError(
                f"physical_to_logical must have the {self.num_physical_experts} slots of the "
                f"placement that it replaces; got {out.num_physical_experts}"
            )
        return out

    def may_replace(self, other: Value, *, moves_homes: bool = False) -> bool:
        """Whether this placement differs from another only in replicas and their number.

        With guest slots the same ranks must take part, too.

        Args:
            other: the placement that it would replace.
            moves_homes: whether homes may differ, too, as for an engine that moves all its experts.
        """
        sizes = ("num_ranks", "num_ranks_per_node", "num_experts", "num_physical_experts")
        same = all(
            getattr(self, name) == getattr(other, name) for name in (*sizes, "num_guests_per_rank")
        )
        if self.num_guests_per_rank:
            same = same and np.array_equal(self.active_ranks, other.active_ranks)
        return same and (moves_homes or np.array_equal(self.home, other.home))

    def with_guests(self: Self, guests: npt.ArrayLike) -> Self:
        """The placement of one batch, whose guest slots hold further copies.

        Residents keep their columns. Guests take the columns behind them, by local slot and then
        by rank. C stays.

        Args:
            guests: [R, G] integers, the expert in each guest slot, -1 = empty.

        Raises:
            PlacementError: the shape is another, or an entry is no expert. Or the rank takes no
                part, or holds the expert already, or the expert's home is on another node.
        """
        shape = self.num_ranks, self.num_ranks_per_node, self.num_guests_per_rank
        return type(self)(
            with_guests_in(self.physical_to_logical, self.home_rank, *shape, guests),
            self.num_ranks,
            num_experts=self.num_experts,
            num_ranks_per_node=self.num_ranks_per_node,
            home=self.home,
            max_replicas=self.max_replicas,
        )

    def with_guest_slots(self: Self, num_guests_per_rank: int) -> Self:
        """The same residents with another number of guest slots; C changes as needed.

        Raises:
            PlacementError: it is no whole number of at least 0.
        """
        guests = whole("num_guests_per_rank", num_guests_per_rank, least=0)
        if guests == self.num_guests_per_rank:
            return self
        shape = self.num_ranks, self.num_guests_per_rank, guests
        table, home = resize_guest_slots(self.physical_to_logical, self.home, *shape)
        return type(self)(
            table,
            self.num_ranks,
            num_experts=self.num_experts,
            num_ranks_per_node=self.num_ranks_per_node,
            home=home,
            num_guests_per_rank=guests,
        )

    @property
    def num_resident_slots(self) -> int:
        """P / R - G: the slots of each rank before its guest slots."""
        return self.num_local_slots - self.num_guests_per_rank

    @cached_property
    def guest_slots(self) -> IntArray:
        """[R, G] int32: the guest slots of each rank."""
        shape = self.num_ranks, self.num_local_slots, self.num_guests_per_rank
        return _frozen(slots_of_guests(*shape))

    @property
    def home(self) -> IntArray:
        """[E] int32: the slot of each expert's home."""
        return self.logical_to_physical[:, 0]

    @property
    def home_rank(self) -> IntArray:
        """[E] int32: the rank of each expert's home."""
        return self.copy_rank[:, 0]

    @cached_property
    def active_ranks(self) -> IntArray:
        """[A] int32: the ranks that take part, which hold an expert. The others get no guests.

        The mean rank load, by which imbalance is measured, is that of these ranks.
        """
        ranks = np.flatnonzero(self.physical_to_logical >= 0) // self.num_local_slots
        return _frozen(np.unique(ranks))

    def on_ranks(self: Self, ranks: npt.ArrayLike, num_ranks_per_node: int) -> Self:
        """The placement of some ranks alone, which must hold all experts.

        Args:
            ranks: [A] integers, in order.
            num_ranks_per_node: of the A.

        Raises:
            PlacementError: another rank holds an expert.
        """
        kept = integers("ranks", ranks)
        left_out = np.setdiff1d(self.active_ranks, kept)
        if left_out.size:
            raise PlacementError(f"rank {left_out[0]} holds experts, and takes no part")
        rank, slot = np.divmod(self.home, self.num_local_slots)
        return type(self)(
            self.physical_to_logical.reshape(self.num_ranks, -1)[kept].ravel(),
            len(kept),
            num_experts=self.num_experts,
            num_ranks_per_node=num_ranks_per_node,
            home=np.searchsorted(kept, rank) * self.num_local_slots + slot,
            max_replicas=self.max_replicas,
        )

    @cached_property
    def node(self) -> IntArray:
        """[R] int32: the node of each rank."""
        return _frozen(np.arange(self.num_ranks) // self.num_ranks_per_node)

    @cached_property
    def component(self) -> IntArray:
        """[R] int32: label of each rank's connected component in the replica graph.

        Two ranks are joined where they hold copies of one expert. Each component is a linear
        program of its own.
        """
        return _frozen(components(self.copy_rank, self.num_ranks))

    @cached_property
    def _state(self) -> dict[str, Any]:
        """The arguments that make an equal placement, all of them JSON."""
        state = {
            "num_ranks": self.num_ranks,
            "num_ranks_per_node": self.num_ranks_per_node,
            "num_experts": self.num_experts,
            "physical_to_logical": self.physical_to_logical.tolist(),
            "home": self.home.tolist(),
        }
        if (self.logical_to_physical[:, -1] < 0).all():
            state["max_replicas"] = self.max_replicas
        if self.num_guests_per_rank:
            state["num_guests_per_rank"] = self.num_guests_per_rank
        return state

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._state, sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides a plan; ranks compare it."""
        return self._fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        # By the arguments alone. A pickled array would come back writable, and a copy must not
        # stand for the layer that `Layer` notes on this object.
        return partial(type(self), **self._state), ()

    def __repr__(self) -> str:
        guests = self.num_guests_per_rank
        return (
            f"Placement({self.num_experts} experts in {self.num_physical_experts} slots on "
            f"{self.num_ranks} ranks, up to {self.max_replicas} copies, "
            + (f"{guests} guest slots a rank, " if guests else "")
            + f"{self._fingerprint[:8]})"
        )


def _frozen(array: npt.NDArray[Any] | Iterable[int]) -> IntArray:
    out = np.ascontiguousarray(array, dtype=np.int32)
    out.setflags(write=False)
    return out
