"""Guest slots: the last slots of each rank, which batches fill with experts of other ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError
from .inputs import integers, whole

Array = npt.NDArray[Any]


def slots_of_guests(num_ranks: int, num_local_slots: int, num_guests_per_rank: int) -> Array:
    """[R, G]: the guest slots of each rank, its last ones."""
    first = num_local_slots * np.arange(1, num_ranks + 1) - num_guests_per_rank
    return first[:, None] + np.arange(num_guests_per_rank)


def columns_with_guests(
    table: Array,
    num_ranks: int,
    num_experts: int,
    num_guests_per_rank: int,
    max_replicas: int | None,
) -> int | None:
    """The columns of the tables by expert: any expert may get a guest on every other rank.

    Args:
        table: [P] integers, the expert in each slot, -1 = unused.
        num_ranks: R, which divides P.
        num_experts: E.
        num_guests_per_rank: G.
        max_replicas: C as it was asked for; None: as many as are needed.

    Returns:
        C; without guest slots as it was asked for.

    Raises:
        PlacementError: a guest slot is not empty, or all slots are guest slots, or C is too small.
    """
    if not num_guests_per_rank:
        return max_replicas
    num_local_slots = table.size // num_ranks
    if num_guests_per_rank >= num_local_slots:
        raise PlacementError(
            f"num_guests_per_rank must be less than the {num_local_slots} slots of a rank; got "
            f"{num_guests_per_rank}"
        )
    guests = slots_of_guests(num_ranks, num_local_slots, num_guests_per_rank).ravel()
    wrong = guests[table[guests] >= 0]
    if wrong.size:
        raise PlacementError(
            f"slot {wrong[0]} is a guest slot, which a batch fills: it must be -1; it holds expert "
            f"{table[wrong[0]]}"
        )
    slots = np.flatnonzero(table >= 0)
    is_on_rank = np.zeros((num_experts, num_ranks), bool)
    is_on_rank[table[slots], slots // num_local_slots] = True
    twice = np.bincount(table[slots], minlength=num_experts) - is_on_rank.sum(axis=1)
    least = num_ranks + int(twice.max())
    if max_replicas is not None and whole("max_replicas", max_replicas) < least:
        raise PlacementError(
            f"max_replicas must be at least {least} with guest slots: any expert may get a guest "
            f"on every rank; got {max_replicas}"
        )
    return least if max_replicas is None else max_replicas


def resize_guest_slots(
    table: Array, home: Array, num_ranks: int, before: int, after: int
) -> tuple[Array, Array]:
    """The same copies with another number of guest slots, all of them empty.

    Args:
        table: [P] integers, the expert in each slot, -1 = unused.
        home: [E] the slot of each expert's home.
        num_ranks: R, which divides P.
        before: guest slots of each rank in `table`.
        after: those of each rank in the result.

    Returns:
        The table and the homes' slots.
    """
    num_local_slots = table.size // num_ranks
    residents = table.reshape(num_ranks, -1)[:, : num_local_slots - before]
    rows = np.concatenate([residents, np.full((num_ranks, after), -1)], axis=1)
    return rows.ravel(), home + (after - before) * (home // num_local_slots)


def with_guests_in(
    table: Array,
    home_rank: Array,
    num_ranks: int,
    num_ranks_per_node: int,
    num_guests_per_rank: int,
    guests: npt.ArrayLike,
) -> Array:
    """A table whose guest slots hold guests.

    Args:
        table: [P] integers, the expert in each slot, -1 = unused.
        home_rank: [E] the rank of each expert's home.
        num_ranks: R.
        num_ranks_per_node: ranks that reach each other's guest slots.
        num_guests_per_rank: G.
        guests: [R, G] integers, the expert in each guest slot, -1 = empty.

    Returns:
        [P].

    Raises:
        PlacementError: `guests` has another shape, names no expert or one that the rank holds, or
            one whose home is on another node. Or the rank holds no expert.
    """
    chosen = integers("guests", guests, dims=(2,))
    if chosen.shape != (num_ranks, num_guests_per_rank):
        raise PlacementError(
            f"guests must be [{num_ranks}, {num_guests_per_rank}], the guest slots of each rank; "
            f"got {list(chosen.shape)}"
        )
    rows = table.reshape(num_ranks, -1).copy()
    residents = rows[:, : rows.shape[1] - num_guests_per_rank]
    for rank, slot in np.argwhere(chosen != -1):
        expert = chosen[rank, slot]
        where = f"guests[{rank}, {slot}]"
        if not 0 <= expert < home_rank.size:
            raise PlacementError(
                f"{where} must be -1 or an expert in [0, {home_rank.size}); got {expert}"
            )
        if (residents[rank] < 0).all():
            raise PlacementError(f"{where} is expert {expert}, and rank {rank} takes no part")
        if expert in residents[rank] or expert in chosen[rank, :slot]:
            raise PlacementError(f"{where} is expert {expert}, which rank {rank} holds already")
        if home_rank[expert] // num_ranks_per_node != rank // num_ranks_per_node:
            raise PlacementError(
                f"{where} is expert {expert}, whose home is on rank {home_rank[expert]}: a guest's "
                f"home must be on its rank's node of {num_ranks_per_node} ranks"
            )
    rows[:, rows.shape[1] - num_guests_per_rank :] = chosen
    return rows.ravel()


def fill_in_order(
    num_experts: int, num_ranks: int, num_ranks_per_node: int | None
) -> dict[str, Any]:
    """The arguments of the placement that has experts in order and no replicas.

    Raises:
        PlacementError: R does not divide E, or an argument is no whole number.
    """
    experts, ranks = whole("num_experts", num_experts), whole("num_ranks", num_ranks)
    if experts % ranks:
        raise PlacementError(
            f"num_ranks must divide num_experts: {ranks} does not divide {experts}"
        )
    return {
        "physical_to_logical": np.arange(experts),
        "num_ranks": ranks,
        "num_experts": experts,
        "num_ranks_per_node": num_ranks_per_node,
    }
