"""`Placement`: which logical expert each physical slot holds, and back; its builders and files.

Shape letters of the whole package:

    R  num_ranks              ranks of the expert-parallel group
    E  num_experts            logical experts: the choices of the router
    P  num_physical_experts   physical experts: slots, numbered rank-major, P / R on each rank
    C  max_replicas           most copies that any expert has; column 0 is its home
    G  num_guests_per_rank    guest slots: the last slots of each rank, filled for one batch
    T, K                      tokens of a rank, picks of a token (top-k)
    B                         batches
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError
from . import files
from .active import take_part
from .eplb import fill_from_history
from .guests import fill_in_order
from .inputs import engine_map
from .optimize.build import fill_for_lp
from .topology import fill_by_topology
from .value import Value


class Placement(Value):
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

    @classmethod
    def homes_only(
        cls,
        num_experts: int,
        num_ranks: int,
        num_guests_per_rank: int = 0,
        *,
        num_ranks_per_node: int | None = None,
        active_ranks: npt.ArrayLike | None = None,
    ) -> Placement:
        """Experts in order, equally many on each rank, without replicas. It needs no loads.

        Args:
            num_experts: E, a multiple of the number of active ranks.
            num_ranks: R.
            num_guests_per_rank: empty guest slots behind the homes, as for `Placement`.
            num_ranks_per_node: as for `Placement`.
            active_ranks: the ranks that take part, integers in [0, R); the slots of others are
                empty, and get no guests. Default: all.

        Raises:
            PlacementError: these ranks do not divide E, or another argument does not fit.
        """
        active = take_part(active_ranks, num_ranks, num_ranks_per_node)
        homes = fill_in_order(num_experts, active.num_active, active.num_active_per_node)
        return cls(**active.on_all_ranks(homes)).with_guest_slots(num_guests_per_rank)

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
        active_ranks: npt.ArrayLike | None = None,
    ) -> Placement:
        """LPLB's placement: each rank's hottest experts get one replica each, on fixed ranks.

        The table is the one that LPLB's planner makes (github.com/deepseek-ai/LPLB). A topology
        is LPLB's `r2o` [G, D], for groups of G ranks: rank i of a group copies from rank
        `r2o[i, d]` of that group. Home experts fill slots 0 … E / R - 1 of each rank; the k-th
        slot after them holds the k-th home expert of rank `r2o[i, k % D]`. Groups of ranks share no
        expert, so each group is a linear program of its own.

        With a load, home experts are packed on the ranks by load, in descending order on each, so
        that the hottest are the replicated ones. Without one they are in order, and the first are
        replicated.

        With a load on several nodes, as in LPLB, the number of groups of ranks decides. If it is a
        multiple of the number of nodes, as many groups of consecutive experts are formed, and each
        stays on one node. A node that is one group of ranks then keeps its consecutive experts.
        Otherwise experts are packed over all ranks.

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
            active_ranks: as for `homes_only`. The topology is one of these ranks, in their order.

        Raises:
            PlacementError: names the argument that does not fit, or the rank and column of `r2o`.
        """
        active = take_part(active_ranks, num_ranks, num_ranks_per_node)
        filled = fill_by_topology(
            topology,
            num_experts=num_experts,
            num_ranks=active.num_active,
            num_redundant_per_rank=num_redundant_per_rank,
            load=load,
            num_ranks_per_node=active.num_active_per_node,
        )
        return cls(**active.on_all_ranks(filled)).with_guest_slots(num_guests_per_rank)

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
        active_ranks: npt.ArrayLike | None = None,
    ) -> Placement:
        """EPLB's placement of one layer: the hottest experts get most copies, packed by load.

        EPLB's policies (github.com/deepseek-ai/EPLB), in float64, ties to the lower expert.
        Hierarchical: groups of experts are packed on nodes, and replicated and packed inside
        their node. Global: over all ranks. Like EPLB, this judges rank loads by the even split of
        each expert over its copies.

        A second copy on a rank never helps a plan. So no expert gets more copies than its node has
        ranks, and second copies on a rank are swapped with other ranks' experts. Both are done only
        where the maximum rank load does not grow, so two copies on a rank may remain.

        Ranks get equal numbers of homes, where possible, instead of each expert's first slot. So
        each rank has as many slots that may take other replicas when loads change.

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
            active_ranks: as for `homes_only`. Where nodes have unequal numbers of these ranks, they
                are placed as those of one node.

        Raises:
            PlacementError: names the argument that does not fit, or the expert with a bad load.
        """
        active = take_part(active_ranks, num_ranks, num_ranks_per_node)
        shape = active.num_active, num_redundant_per_rank, active.num_active_per_node
        filled = fill_from_history(load, *shape, num_groups)
        return cls(**active.on_all_ranks(filled)).with_guest_slots(num_guests_per_rank)

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
        active_ranks: npt.ArrayLike | None = None,
    ) -> Placement:
        """A placement on which the linear program's optimum is lowest for possible future loads.

        A local search over copies and homes minimises the optimum T* in scenarios: the samples, and
        loads that drift away from them, little or far. Each strength of drift has the same weight
        (see `lplb_ep/placement/optimize`). Each call is for one layer, and takes seconds for 256
        experts on 64 ranks.

        The same arguments give the same placement on one machine, unless `time_budget_s` ends the
        search. Another machine may round in another way. So compute a placement on one rank and
        broadcast it, or load it from a file.

        Args:
            samples: [E] or [N, E] numbers of at least 0, in any unit: batches or histories. Only
                the shares within a sample matter; samples without load are left out.
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
            fixed_homes: homes of `start` do not move, and only its other slots may change.
            max_changes: the most slots of `start` that may change, each a copy of weights.
            max_copies: the most copies of an expert after a change of `start`.
            percentile: in [0, 100]: minimise this percentile over all scenarios, not the means
                at each strength of drift.
            drift: in [0, 1], how far loads may drift: 1 minus the least expected correlation of log
                loads. 0: the samples as they are.
            seed: of the scenarios.
            max_steps: moves that a search tries, each a copy changed or two swapped; a fresh
                placement is searched for from a few starts. Default: 400, with `start` 300.
            time_budget_s: seconds, at least 0, after which the search ends with the best table so
                far. The present step and an exact judgement take further time.
            num_guests_per_rank: empty guest slots behind those, as for `Placement`; the search
                ignores guests. Default: none; with `start` its own.
            active_ranks: as for `from_history`. Default: all; with `start` those that hold experts
                there.

        Raises:
            PlacementError: names the argument that does not fit, or the expert with a bad load.
            TypeError: `start` is not a `Placement`.
        """
        guests = 0 if num_guests_per_rank is None else num_guests_per_rank
        if start is not None:
            check_placement(start)
            guests = start.num_guests_per_rank if num_guests_per_rank is None else guests
            start = start.with_guest_slots(0)
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
            active_ranks=active_ranks,
        )
        return cls(**filled).with_guest_slots(guests)

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
            table: [P] or [layers, P] integers, -1 = an empty slot. It is a tensor on any device, an
                array or nested lists. Or it is a mapping with one of these as
                "physical_to_logical_map", as in SGLang's `--init-expert-location` files.
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
            resident = cls(
                slots, num_ranks, num_experts=num_experts, num_ranks_per_node=num_ranks_per_node
            )
            return resident.with_guest_slots(num_guests_per_rank)

        if layers.ndim == 1:
            return make(layers)
        placements = []
        for layer, layer_slots in enumerate(layers):
            try:
                placements.append(make(layer_slots))
            except PlacementError as error:
                raise PlacementError(f"layer {layer}: {error}") from error
        return placements

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
