"""The copies of each expert, derived from the experts that the slots hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError
from .inputs import integers, whole

Array = npt.NDArray[Any]


def slots_of_experts(
    table: Array,
    num_ranks: int,
    num_experts: int,
    home: npt.ArrayLike | None = None,
    max_replicas: int | None = None,
) -> Array:
    """The slots of each expert's copies.

    Args:
        table: [P] integers, the expert in each slot, -1 = unused; every expert has a slot.
        num_ranks: R.
        num_experts: E.
        home: [E] the slot of each expert's home; None: its first in the order below.
        max_replicas: C; None: as many as the most copies of an expert.

    Returns:
        [E, C]: the home, then the others by local slot and then by rank, -1 padded.

    Raises:
        PlacementError: a home that does not hold its expert, or more copies than `max_replicas`.
    """
    order: Array = np.arange(table.size).reshape(num_ranks, -1).T.ravel()
    order = order[table[order] >= 0]
    if home is not None:
        first = _checked_home(home, table, num_experts)
        order = np.concatenate([first, order[~np.isin(order, first)]])
    expert = table[order]
    by_expert = np.argsort(expert, kind="stable")
    order, expert = order[by_expert], expert[by_expert]
    count = np.bincount(expert, minlength=num_experts)
    start = np.cumsum(count) - count
    columns = int(count.max())
    if max_replicas is not None:
        columns = whole("max_replicas", max_replicas)
        if columns > table.size:
            raise PlacementError(
                f"max_replicas must be at most the {table.size} slots; got {columns}"
            )
        if count.max() > columns:
            raise PlacementError(
                f"expert {count.argmax()} has {count.max()} copies, more than max_replicas = "
                f"{columns}"
            )
    slots = np.full((num_experts, columns), -1)
    slots[expert, np.arange(order.size) - start[expert]] = order
    return slots


def ranks_of_copies(slots: Array, num_local_slots: int) -> Array:
    """The ranks that an expert's tokens may go to.

    Args:
        slots: [E, C] integers, as `slots_of_experts` returns them.
        num_local_slots: slots on each rank.

    Returns:
        [E, C]: the rank of each copy, -1 where there is none, or where a lower column is on the
        same rank.
    """
    rank = np.where(slots >= 0, slots // num_local_slots, -1)
    for column in range(1, rank.shape[1]):
        repeated = (rank[:, :column] == rank[:, column : column + 1]).any(axis=1)
        rank[repeated, column] = -1
    return rank


def _checked_home(home: npt.ArrayLike, table: Array, num_experts: int) -> Array:
    first = integers("home", home)
    if first.shape != (num_experts,):
        raise PlacementError(f"home must have one slot per expert: {num_experts}, got {first.size}")
    for expert, slot in enumerate(first):
        held = table[slot] if 0 <= slot < table.size else None
        if held != expert:
            raise PlacementError(
                f"home of expert {expert} is slot {slot}, which holds "
                f"{'nothing: no such slot' if held is None else f'expert {held}'}"
            )
    return first
