"""The choice of each expert's home among its copies, where a search or a policy leaves it open."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def even_homes(table: Array, num_experts: int, num_ranks: int) -> Array:
    """Chooses homes among the copies, as equal in number on all ranks as the table allows.

    Args:
        table: [P] int64, every slot filled.
        num_experts: E.
        num_ranks: R.

    Returns:
        [E] the slot of each expert's home.
    """
    # Only these builders need it, and it takes long to import.
    from scipy.optimize import linear_sum_assignment

    first = _first_slots(table, num_experts, num_ranks)
    num_slots = table.size // num_ranks
    # The j-th home of a rank costs j: all ranks get as many as they can, and none too many.
    seat = np.tile(np.arange(num_slots), num_ranks)
    cost = np.where(np.repeat(first >= 0, num_slots, axis=0), seat[:, None], 1e6)
    column, expert = linear_sum_assignment(cost)
    home = np.empty(num_experts, int)
    home[expert] = first[column // num_slots, expert]
    return home


def homes_first(table: Array, load: Array, num_ranks: int) -> tuple[Array, Array]:
    """Chooses homes by `even_homes`, and reorders each rank's slots: homes first, by load.

    Args:
        table: [P] int64, every slot filled.
        load: [E] float64.
        num_ranks: R.

    Returns:
        The table [P], and the slot of each expert's home [E].
    """
    rows = table.reshape(num_ranks, -1)
    home_rank = even_homes(table, load.size, num_ranks) // rows.shape[1]
    out = np.empty_like(rows)
    for rank, row in enumerate(rows):
        out[rank] = row[np.lexsort((row, -load[row], home_rank[row] != rank))]
    first = _first_slots(out.ravel(), load.size, num_ranks)
    return out.ravel(), first[home_rank, np.arange(load.size)]


def _first_slots(table: Array, num_experts: int, num_ranks: int) -> Array:
    """[R, E]: the first slot of each expert on each rank; -1: none."""
    first = np.full((num_ranks, num_experts), -1)
    slot = np.arange(table.size)[::-1]  # of several the first is written last
    first[slot // (table.size // num_ranks), table[::-1]] = slot
    return first
