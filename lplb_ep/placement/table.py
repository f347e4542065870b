"""`Placement`, the value: which logical expert each physical slot holds, and back.

Shape letters of the whole package:

    R  num_ranks              ranks of the expert-parallel group
    E  num_experts            logical experts: the choices of the router
    P  num_physical_experts   physical experts: slots, numbered rank-major, P / R on each rank
    C  max_replicas           most copies that any expert has; column 0 is its home
    T, K                      tokens of a rank, picks of a token (top-k)
    B                         batches
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import FrozenInstanceError
from functools import cached_property, partial
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError
from . import files
from .copies import ranks_of_copies, slots_of_experts
from .eplb import fill_from_history
from .guests import (
    add_guest_slots,
    columns_with_guests,
    drop_guest_slots,
    fill_in_order,
    slots_of_guests,
    with_guests_in,
)
from .inputs import check_experts, engine_map, integers, ranks_per_node, whole
from .optimize.build import fill_for_lp
from .optimum import components
from .topology import fill_by_topology

IntArray = npt.NDArray[np.int32]


class Placement:
    """A static table physical → logical and back; changes rarely, with a move of weights.

    Placements are frozen values. Attributes and tables do not change; equal tables compare and hash
    equal, and pickle as one.

    Args:
        physical_to_logical: [P] integers, the logical expert in each slot, in [0, E), -1 = unused.
            Slots are numbered rank-major: rank r owns slots [r * P / R, (r + 1) * P / R).
        num_ranks: R; must divide P.
        num_experts: E; by default one more than the largest entry.
        num_ranks_per_node: ranks joined by NVLink, in rank order; must divide R. Default: all.
        home: [E] integers, the slot of each expert's home. By default its first slot by local
            slot number, then by rank, which is where LPLB and EPLB put the original.
        max_replicas: C, the columns of the tables by expert; by default no more than needed. More
            columns allow more copies in placements that replace this one. With guest slots: R.
        num_guests_per_rank: G, the last slots of each rank, which must be -1. Each batch may fill
            them with copies of experts from other ranks of the node (`with_guests`).

    Raises:
        PlacementError: an argument does not fit. An entry is out of range, an expert has no copy
            or more than C, or a home does not hold its expert.
    """

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

    @classmethod
    def homes_only(
        cls,
        num_experts: int,
        num_ranks: int,
        num_guests_per_rank: int = 0,
        *,
        num_ranks_per_node: int | None = None,
    ) -> Placement:
        """Experts in order, E / R on each rank, and no replicas: nothing need be known of loads.

        Raises:
            PlacementError: R does not divide E, or another argument does not fit.
        """
        homes = fill_in_order(num_experts, num_ranks, num_ranks_per_node)
        return cls(**add_guest_slots(homes, num_guests_per_rank))

    @classmethod
    def from_topology(
        cls,
        topology: str | npt.ArrayLike,
        *,
        num_experts: int,
        num_ranks: int,
        num_redundant_per_rank: int | None = None,
        load: npt.ArrayLike | None = None,
        num_ranks_per_node: int | None = None,
        num_guests_per_rank: int = 0,
    ) -> Placement:
        """LPLB's placement: each rank's hottest experts get one replica each, on fixed ranks.

        The table is the one that LPLB's planner makes (github.com/deepseek-ai/LPLB). A topology
        is LPLB's `r2o` [G, D], for groups of G ranks: rank i of a group copies from rank
        `r2o[i, d]` of that group. Home experts fill slots 0 … E / R - 1 of each rank; the k-th
        slot after them holds the k-th home expert of rank `r2o[i, k % D]`. A group of ranks
        shares no expert with another, so each is a linear program of its own.

        With a load, home experts are packed on the ranks by load, in descending order on each, so
        that the hottest are the replicated ones. Without one they are in order, and the first are
        replicated.

        With a load on several nodes, as in LPLB, the number of groups of ranks decides. Where it is
        a multiple of the number of nodes, as many groups of consecutive experts stay whole on a
        node each. A node that is one group of ranks then keeps its consecutive experts. Otherwise
        experts are packed over all ranks.

        Args:
            topology: "cube" (8 ranks, 2 columns), "hypercube" (16, 2), "torus" (all ranks, 2),
                "ring" (all ranks, 1), "torus:4x8" (4 rows of 8 ranks) or "ring:8". A torus of all
                ranks is as square as possible. Or an `r2o`, [G, D] integers in [0, G), of which
                each column is a permutation that maps no rank to itself.
            num_experts: E, a multiple of R.
            num_ranks: R, a multiple of G.
            num_redundant_per_rank: replicas on each rank, a multiple of D up to E / R. Default: D.
            load: [E] or [N, E] (summed) numbers of at least 0, in any unit.
            num_ranks_per_node: as for `Placement`.
            num_guests_per_rank: empty guest slots behind those, as for `Placement`.

        Raises:
            PlacementError: names the argument that does not fit, or the rank and column of `r2o`.
        """
        filled = fill_by_topology(
            topology,
            num_experts=num_experts,
            num_ranks=num_ranks,
            num_redundant_per_rank=num_redundant_per_rank,
            load=load,
            num_ranks_per_node=num_ranks_per_node,
        )
        return cls(**add_guest_slots(filled, num_guests_per_rank))

    @classmethod
    def from_history(
        cls,
        load: npt.ArrayLike,
        *,
        num_ranks: int,
        num_redundant_per_rank: int,
        num_ranks_per_node: int | None = None,
        num_groups: int | None = None,
        num_guests_per_rank: int = 0,
    ) -> Placement:
        """EPLB's placement of one layer: the hottest experts get most copies, packed by load.

        EPLB's policies (github.com/deepseek-ai/EPLB), in float64, ties to the lower expert.
        Hierarchical: groups of experts are packed on nodes, and replicated and packed inside
        their node. Global: over all ranks. Like EPLB, this judges rank loads by the even split of
        each expert over its copies.

        A second copy on a rank is worth nothing to a plan. So no expert gets more copies than its
        node has ranks, and copies that meet are swapped apart. Both are done only where the maximum
        rank load does not grow, so two copies on a rank may remain.

        Homes are distributed evenly, not each expert's first slot. So as many slots of each rank
        may take other replicas when loads change.

        Args:
            load: [E] or [N, E] (summed) numbers of at least 0, in any unit.
            num_ranks: R.
            num_redundant_per_rank: replicas on each rank, at least 0. Where R does not divide E,
                ranks have ⌈E / R⌉ + num_redundant_per_rank slots, all of them filled.
            num_ranks_per_node: as for `Placement`.
            num_groups: groups of consecutive experts that the router limits its picks to; must
                divide E. With a multiple of the number of nodes the policy is hierarchical,
                otherwise, as by default, global.
            num_guests_per_rank: empty guest slots behind those, as for `Placement`.

        Raises:
            PlacementError: names the argument that does not fit, or the expert with a bad load.
        """
        filled = fill_from_history(
            load, num_ranks, num_redundant_per_rank, num_ranks_per_node, num_groups
        )
        return cls(**add_guest_slots(filled, num_guests_per_rank))

    @classmethod
    def for_lp(
        cls,
        samples: npt.ArrayLike,
        num_ranks: int | None = None,
        num_redundant_per_rank: int | None = None,
        *,
        num_ranks_per_node: int | None = None,
        num_groups: int | None = None,
        within_node: bool | None = None,
        start: Placement | None = None,
        fixed_homes: bool = False,
        max_changes: int | None = None,
        max_copies: int | None = None,
        percentile: float | None = None,
        drift: float = 0.8,
        seed: int = 0,
        max_steps: int | None = None,
        time_budget_s: float | None = None,
        num_guests_per_rank: int | None = None,
    ) -> Placement:
        """A placement on which the linear program does best on the loads that may come.

        A local search over copies and homes minimises the optimum T* in scenarios: the samples, and
        loads that drift away from them, little or far. Each strength of drift counts alike (see
        `lplb_ep/placement/optimize`). One layer per call, seconds for 256 experts on 64 ranks.

        The same arguments give the same placement on one machine, unless `time_budget_s` ends the
        search. Another machine may round in another way. So compute a placement on one rank and
        broadcast it, or load it from a file.

        Args:
            samples: [E] or [N, E] numbers of at least 0, in any unit: batches or histories. Only
                each one's shares count; those without load are left out.
            num_ranks: R; with `start` its own.
            num_redundant_per_rank: as for `from_history`; with `start` its own.
            num_ranks_per_node: as for `Placement`; with `start` its own.
            num_groups: groups of consecutive experts that the router limits its picks to; must
                divide E. Their loads are taken to drift together.
            within_node: keep all copies of an expert, and all experts of a group, on one node.
                `num_groups`, or without it E, must then be a multiple of the number of nodes.
                Default: where there are several nodes and `num_groups` is a multiple of them, as
                in `from_history`.
            start: a placement to improve instead of a fresh one. Slots that keep their expert
                stay where they are.
            fixed_homes: homes of `start` do not move, only its further slots may change.
            max_changes: the most slots of `start` that may change, each a copy of weights.
            max_copies: the most copies of an expert that a change of `start` may lead to.
            percentile: in [0, 100]: minimise this percentile over all scenarios, not the means
                at each strength of drift.
            drift: in [0, 1], how far loads may move away: 1 less the least correlation of log
                loads that is expected. 0: the samples as they are.
            seed: of the scenarios.
            max_steps: moves that a search tries, each a copy changed or two swapped; a fresh
                placement is searched for from a few starts. Default: 400, with `start` 300.
            time_budget_s: seconds, at least 0, after which the search ends with the best so far. A
                step that is under way and an exact judgement come on top.
            num_guests_per_rank: empty guest slots behind those, as for `Placement`; the search
                knows nothing of guests. Default: none; with `start` its own.

        Raises:
            PlacementError: names the argument that does not fit, or the expert with a bad load.
            TypeError: `start` is not a `Placement`.
        """
        guests = 0 if num_guests_per_rank is None else num_guests_per_rank
        if start is not None:
            check_placement(start)
            guests = start.num_guests_per_rank if num_guests_per_rank is None else guests
            start = start.residents
        filled = fill_for_lp(
            samples,
            num_ranks=num_ranks,
            num_redundant_per_rank=num_redundant_per_rank,
            num_ranks_per_node=num_ranks_per_node,
            num_groups=num_groups,
            within_node=within_node,
            start=start,
            fixed_homes=fixed_homes,
            max_changes=max_changes,
            max_copies=max_copies,
            percentile=percentile,
            drift=drift,
            seed=seed,
            max_steps=max_steps,
            time_budget_s=time_budget_s,
        )
        return cls(**add_guest_slots(filled, guests))

    @classmethod
    def from_physical_to_logical(
        cls,
        table: npt.ArrayLike | Mapping[str, Any],
        num_ranks: int,
        *,
        num_experts: int | None = None,
        num_ranks_per_node: int | None = None,
        num_guests_per_rank: int = 0,
    ) -> Placement | list[Placement]:
        """A serving engine's own placement, its `physical_to_logical_map`.

        vLLM (`EplbState`) and SGLang (`ExpertLocationMetadata`) keep an int64 tensor
        [layers, P] with slots numbered rank-major, as here. The values are copied: after the
        engine has moved experts, make the placements anew.

        Args:
            table: [P] or [layers, P] integers, -1 = a slot that holds nothing. It is a tensor on
                any device, an array or nested lists. Or it is a mapping that has one of these as
                "physical_to_logical_map", as SGLang's `--init-expert-location` files have.
            num_ranks: R; must divide P.
            num_experts: E; by default one more than the largest entry of all layers.
            num_ranks_per_node: as for `Placement`.
            num_guests_per_rank: empty guest slots behind the engine's, as for `Placement`.

        Returns:
            A placement for [P]; for [layers, P] a list of them, one per layer.

        Raises:
            PlacementError: as for `Placement`; for [layers, P] the layer is named.
        """
        layers = engine_map(table)
        if num_experts is None and layers.size:
            num_experts = max(int(layers.max()) + 1, 1)

        def make(slots: npt.NDArray[np.int64]) -> Placement:
            # Checked on its own first, so that messages name the engine's slots.
            resident = cls(
                slots, num_ranks, num_experts=num_experts, num_ranks_per_node=num_ranks_per_node
            )
            return cls(**add_guest_slots(resident._state, num_guests_per_rank))

        if layers.ndim == 1:
            return make(layers)
        placements = []
        for layer, layer_slots in enumerate(layers):
            try:
                placements.append(make(layer_slots))
            except PlacementError as error:
                raise PlacementError(f"layer {layer}: {error}") from error
        return placements

    def with_copies(
        self, physical_to_logical: npt.ArrayLike, max_replicas: int | None = None
    ) -> Placement:
        """Another placement for the same layer: homes, slots and nodes stay, replicas may not.

        Args:
            physical_to_logical: [P] integers, as for `Placement`.
            max_replicas: C; by default this one's.

        Raises:
            PlacementError: names the expert whose home would move or that has more copies than
                `max_replicas`, or the number of slots.
        """
        out = Placement(
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

    def may_replace(self, other: Placement) -> bool:
        """Whether this placement differs from another in replicas and their number alone."""
        same = ("num_ranks", "num_ranks_per_node", "num_physical_experts", "num_guests_per_rank")
        return all(getattr(self, name) == getattr(other, name) for name in same) and np.array_equal(
            self.home, other.home
        )

    def with_guests(self, guests: npt.ArrayLike) -> Placement:
        """The placement of one batch, whose guest slots hold copies like any other.

        Residents keep their columns. Guests take the columns behind them, by local slot and then
        by rank. C stays.

        Args:
            guests: [R, G] integers, the expert in each guest slot, -1 = empty.

        Raises:
            PlacementError: another shape, or an entry that is no expert. Or the rank holds it
                already, or its home is on another node.
        """
        shape = self.num_ranks, self.num_ranks_per_node, self.num_guests_per_rank
        return Placement(
            with_guests_in(self.physical_to_logical, self.home_rank, *shape, guests),
            self.num_ranks,
            num_experts=self.num_experts,
            num_ranks_per_node=self.num_ranks_per_node,
            home=self.home,
            max_replicas=self.max_replicas,
        )

    @cached_property
    def residents(self) -> Placement:
        """The same without guest slots, in the slots of engines that know of none."""
        if not self.num_guests_per_rank:
            return self
        shape = self.num_ranks, self.num_guests_per_rank
        table, home = drop_guest_slots(self.physical_to_logical, self.home, *shape)
        node, experts = self.num_ranks_per_node, self.num_experts
        return Placement(
            table, self.num_ranks, num_experts=experts, num_ranks_per_node=node, home=home
        )

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
        return isinstance(other, Placement) and self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        # By the arguments alone. A pickled array would come back writable, and a copy must not
        # stand for the layer that `Layer` notes on this object.
        return partial(Placement, **self._state), ()

    def __repr__(self) -> str:
        guests = self.num_guests_per_rank
        return (
            f"Placement({self.num_experts} experts in {self.num_physical_experts} slots on "
            f"{self.num_ranks} ranks, up to {self.max_replicas} copies, "
            + (f"{guests} guest slots a rank, " if guests else "")
            + f"{self._fingerprint[:8]})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the placement as JSON, for `Placement.load` and `LPLB_EP_PLACEMENT`.

        Raises:
            OSError: the file is not writable.
        """
        files.write_one(path, self._state)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placement:
        """Reads a file of `save`, or of `save_placements` for a single layer.

        Raises:
            PlacementError: the file is not a saved placement, holds those of several layers, or an
                invalid one.
            OSError: the file is not readable.
        """
        return files.read_one(path, cls)


def check_placement(placement: object) -> None:
    """Raises TypeError unless it is a `Placement`."""
    if not isinstance(placement, Placement):
        raise TypeError(f"placement must be an lplb_ep.Placement; got a {type(placement).__name__}")


def _frozen(array: npt.NDArray[Any] | Iterable[int]) -> IntArray:
    out = np.ascontiguousarray(array, dtype=np.int32)
    out.setflags(write=False)
    return out
