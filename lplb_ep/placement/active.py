"""Ranks that take part: a placement is made for them, and the slots of others stay empty."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError
from .inputs import integers, ranks_per_node, whole


class ActiveRanks(NamedTuple):
    """The ranks of a group that take part, and the group that they are by themselves."""

    ranks: npt.NDArray[np.int64]
    """[A], in order."""
    num_ranks: int
    """R, with those that do not."""
    num_ranks_per_node: int
    """Of all R."""
    num_active_per_node: int
    """Of the A. Where nodes have unequal numbers of them, the A stand for one node."""

    @property
    def num_active(self) -> int:
        """A."""
        return len(self.ranks)

    def on_all_ranks(self, filled: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a placement on A ranks, as those of one on R.

        Args:
            filled: `physical_to_logical` [P] and perhaps `home` [E]; ranks and nodes are replaced.
        """
        rows = np.asarray(filled["physical_to_logical"]).reshape(self.num_active, -1)
        table = np.full((self.num_ranks, rows.shape[1]), -1)
        table[self.ranks] = rows
        out = {
            **filled,
            "physical_to_logical": table.ravel(),
            "num_ranks": self.num_ranks,
            "num_ranks_per_node": self.num_ranks_per_node,
        }
        if "home" in filled:
            rank, slot = np.divmod(filled["home"], rows.shape[1])
            out["home"] = self.ranks[rank] * rows.shape[1] + slot
        return out


def take_part(
    active_ranks: npt.ArrayLike | None, num_ranks: int | None, num_ranks_per_node: int | None
) -> ActiveRanks:
    """The checked ranks that take part, by default all.

    Raises:
        PlacementError: a rank is out of range or comes twice, or there is none.
    """
    ranks = whole("num_ranks", num_ranks)
    node = ranks_per_node(ranks, num_ranks_per_node)
    if active_ranks is None:
        return ActiveRanks(np.arange(ranks), ranks, node, node)
    active = integers("active_ranks", active_ranks)
    wrong = active[(active < 0) | (active >= ranks)]
    if wrong.size or not active.size:
        got = wrong[0] if wrong.size else "none"
        raise PlacementError(f"active_ranks must be in [0, {ranks}); got {got}")
    active = np.sort(active)
    twice = active[1:][active[1:] == active[:-1]]
    if twice.size:
        raise PlacementError(f"active_ranks has rank {twice[0]} twice")
    of_node = np.bincount(active // node)
    equal = np.unique(of_node[of_node > 0])
    return ActiveRanks(active, ranks, node, int(equal[0]) if equal.size == 1 else active.size)
