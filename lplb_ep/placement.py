"""Which logical expert each physical slot holds.

Shape letters of the whole package:

    R  num_ranks              ranks of the expert-parallel group
    E  num_experts            logical experts: what the router picks
    P  num_physical_experts   physical experts: slots, numbered rank-major, P / R on each rank
    C  max_replicas           most copies that any expert has; column 0 is its home
    T, K                      tokens of a rank, picks of a token (top-k)
    B                         batches
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .settings import PlacementError

IntArray = npt.NDArray[np.int32]


class Placement:
    """A static table physical → logical and back; changes rarely, with a move of weights.

    Placements are values: the tables are read-only, equal tables compare and hash equal.

    Args:
        physical_to_logical: [P] integers, the logical expert in each slot, in [0, E), -1 = unused.
            Slots are numbered rank-major: rank r owns slots [r * P / R, (r + 1) * P / R).
        num_ranks: R; must divide P.
        num_experts: E; by default one more than the largest entry.
        num_ranks_per_node: ranks joined by NVLink, in rank order; must divide R. Default: all.
        home: [E] integers, the slot of each expert's home. By default its first slot by local
            slot number, then by rank, which is where LPLB and EPLB put the original.

    Raises:
        PlacementError: a table that cannot be: an expert without a copy, an entry out of range,
            ranks that do not divide, a home that does not hold its expert.
    """

    physical_to_logical: IntArray
    """[P] int32, -1 = unused slot."""
    logical_to_physical: IntArray
    """[E, C] int32, column 0 the home, then the replicas by local slot and rank, -1 padded."""
    copy_rank: IntArray
    """[E, C] int32, the rank of each copy, -1 where it can get no tokens: where there is no copy,
    or a lower column is a copy on the same rank (such a second copy always has quota 0)."""

    def __init__(
        self,
        physical_to_logical: npt.ArrayLike,
        num_ranks: int,
        *,
        num_experts: int | None = None,
        num_ranks_per_node: int | None = None,
        home: npt.ArrayLike | None = None,
    ) -> None:
        table = _integers("physical_to_logical", physical_to_logical)
        num_slots = table.size
        if num_ranks < 1 or num_slots == 0 or num_slots % num_ranks:
            raise PlacementError(
                f"num_ranks must divide the number of slots: {num_slots} slots, {num_ranks} ranks"
            )
        node = num_ranks if num_ranks_per_node is None else num_ranks_per_node
        if node < 1 or num_ranks % node:
            raise PlacementError(
                f"num_ranks_per_node must divide num_ranks: {node} does not divide {num_ranks}"
            )
        experts = int(table.max()) + 1 if num_experts is None else num_experts
        wrong = np.flatnonzero((table < -1) | (table >= experts))
        if wrong.size:
            raise PlacementError(
                f"slot {wrong[0]} holds expert {table[wrong[0]]}, expected -1 (unused) or one of "
                f"[0, {experts})"
            )
        missing = np.flatnonzero(np.bincount(table[table >= 0], minlength=experts) == 0)
        if experts < 1 or missing.size:
            which = ", ".join(map(str, missing[:8])) or "0"
            raise PlacementError(f"no slot holds expert {which} (of {experts} experts)")

        self.num_ranks = num_ranks
        self.num_ranks_per_node = node
        self.num_experts = experts
        self.num_physical_experts = num_slots
        self.num_local_slots = num_slots // num_ranks
        self.physical_to_logical = _frozen(table)
        self.logical_to_physical = _frozen(self._copies(home))
        self.max_replicas = self.logical_to_physical.shape[1]

        rank = np.where(
            self.logical_to_physical >= 0, self.logical_to_physical // self.num_local_slots, -1
        )
        for column in range(1, self.max_replicas):
            repeated = (rank[:, :column] == rank[:, column : column + 1]).any(axis=1)
            rank[repeated, column] = -1
        self.copy_rank = _frozen(rank)

    def _copies(self, home: npt.ArrayLike | None) -> npt.NDArray[Any]:
        """[E, C]: each expert's slots, its home first, then by (local slot, rank)."""
        slots = np.arange(self.num_physical_experts)
        order = slots.reshape(self.num_ranks, -1).T.ravel()
        order = order[self.physical_to_logical[order] >= 0]
        if home is not None:
            first = _integers("home", home)
            if first.shape != (self.num_experts,):
                raise PlacementError(
                    f"home must have one slot per expert: {self.num_experts}, got {first.size}"
                )
            for expert, slot in enumerate(first):
                held = self.physical_to_logical[slot] if 0 <= slot < slots.size else None
                if held != expert:
                    raise PlacementError(
                        f"home of expert {expert} is slot {slot}, which holds "
                        f"{'nothing: no such slot' if held is None else f'expert {held}'}"
                    )
            order = np.concatenate([first, order[~np.isin(order, first)]])
        expert = self.physical_to_logical[order]
        by_expert = np.argsort(expert, kind="stable")
        order, expert = order[by_expert], expert[by_expert]
        count = np.bincount(expert, minlength=self.num_experts)
        start = np.cumsum(count) - count
        copies = np.full((self.num_experts, count.max()), -1)
        copies[expert, np.arange(order.size) - start[expert]] = order
        return copies

    @property
    def home(self) -> IntArray:
        """[E] int32: the slot of each expert's home."""
        return self.logical_to_physical[:, 0]

    @property
    def home_rank(self) -> IntArray:
        """[E] int32: the rank of each expert's home."""
        return self.copy_rank[:, 0]

    @cached_property
    def node(self) -> IntArray:
        """[R] int32: the node of each rank."""
        return _frozen(np.arange(self.num_ranks) // self.num_ranks_per_node)

    @cached_property
    def component(self) -> IntArray:
        """[R] int32: label of each rank's connected component in the replica graph.

        Two ranks are joined where they hold copies of one expert; each component is an LP of its
        own.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        expert, column = np.nonzero(self.copy_rank >= 0)
        joined = coo_array(
            (np.ones(expert.size), (self.home_rank[expert], self.copy_rank[expert, column])),
            shape=(self.num_ranks, self.num_ranks),
        )
        return _frozen(connected_components(joined, directed=False)[1])

    @cached_property
    def _state(self) -> dict[str, Any]:
        return {
            "num_ranks": self.num_ranks,
            "num_ranks_per_node": self.num_ranks_per_node,
            "num_experts": self.num_experts,
            "physical_to_logical": self.physical_to_logical.tolist(),
            "home": self.home.tolist(),
        }

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._state, sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides a plan; ranks compare it."""
        return self._fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __repr__(self) -> str:
        return (
            f"Placement({self.num_experts} experts in {self.num_physical_experts} slots on "
            f"{self.num_ranks} ranks, up to {self.max_replicas} copies, {self._fingerprint[:8]})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the placement as JSON, for `Placement.load` and `LPLB_EP_PLACEMENT`."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"lplb_ep_placement": 1, **self._state}, file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placement:
        """Reads what `save` wrote.

        Raises:
            PlacementError: the file is not a saved placement, or holds an impossible one.
            OSError: the file cannot be read.
        """
        with open(path, encoding="utf-8") as file:
            try:
                state = json.load(file)
            except ValueError as error:
                raise PlacementError(f"{os.fspath(path)} is not JSON: {error}") from error
        version = state.pop("lplb_ep_placement", None) if isinstance(state, dict) else None
        if version != 1:
            raise PlacementError(f"{os.fspath(path)} is not a placement saved by this version")
        try:
            return cls(**state)
        except TypeError as error:
            raise PlacementError(f"{os.fspath(path)}: {error}") from error


def _integers(name: str, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """`values` as a flat int64 array; torch tensors on any device are taken too."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PlacementError(
            f"{name} must be a flat list of integers, got shape {list(array.shape)} of {array.dtype}"
        )
    return array.astype(np.int64)


def _frozen(array: npt.NDArray[Any] | Iterable[int]) -> IntArray:
    out = np.ascontiguousarray(array, dtype=np.int32)
    out.setflags(write=False)
    return out
