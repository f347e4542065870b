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
import operator
import os
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError
from .eplb import rebalance
from .optimize import arrange, even_homes, optimize
from .optimum import components
from .topology import redundant_to_original

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
        max_replicas: C, the columns of the tables by expert; by default no more than needed. More
            of them leave room for placements that replace this one.

    Raises:
        PlacementError: a table that cannot be: an expert without a copy, an entry out of range,
            ranks that do not divide, a home that does not hold its expert, more copies than C.
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
        max_replicas: int | None = None,
    ) -> None:
        table = _integers("physical_to_logical", physical_to_logical)
        num_slots = table.size
        num_ranks = _whole("num_ranks", num_ranks)
        if num_slots == 0 or num_slots % num_ranks:
            raise PlacementError(
                f"num_ranks must divide the number of slots: {num_slots} slots, {num_ranks} ranks"
            )
        experts = (
            max(int(table.max()) + 1, 1)
            if num_experts is None
            else _whole("num_experts", num_experts)
        )
        wrong = np.flatnonzero((table < -1) | (table >= experts))
        if wrong.size:
            raise PlacementError(
                f"slot {wrong[0]} holds expert {table[wrong[0]]}, expected -1 (unused) or one of "
                f"[0, {experts})"
            )
        # Of more experts than slots one of the first num_slots + 1 is missing.
        missing = np.setdiff1d(np.arange(min(experts, num_slots + 1)), table)
        if missing.size:
            which = ", ".join(map(str, missing[:8]))
            raise PlacementError(
                f"no slot holds expert {which} (of {experts} experts, in {num_slots} slots)"
            )

        self.num_ranks = num_ranks
        self.num_ranks_per_node = _ranks_per_node(num_ranks, num_ranks_per_node)
        self.num_experts = experts
        self.num_physical_experts = num_slots
        self.num_local_slots = num_slots // num_ranks
        self.physical_to_logical = _frozen(table)
        self.logical_to_physical = _frozen(self._copies(home, max_replicas))
        self.max_replicas = self.logical_to_physical.shape[1]

        rank = np.where(
            self.logical_to_physical >= 0, self.logical_to_physical // self.num_local_slots, -1
        )
        for column in range(1, self.max_replicas):
            repeated = (rank[:, :column] == rank[:, column : column + 1]).any(axis=1)
            rank[repeated, column] = -1
        self.copy_rank = _frozen(rank)

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
    ) -> Placement:
        """LPLB's placement: each rank's hottest experts get one replica each, on fixed ranks.

        The table is the one that LPLB's planner makes (github.com/deepseek-ai/LPLB). A topology
        is LPLB's `r2o` [G, D], for groups of G ranks: rank i of a group copies from rank
        `r2o[i, d]` of that group. Home experts fill slots 0 … E / R - 1 of each rank; the k-th
        slot after them holds the k-th home expert of rank `r2o[i, k % D]`. A group of ranks
        shares no expert with another, so each is an LP of its own.

        Args:
            topology: "cube" (8 ranks, 2 columns), "hypercube" (16, 2), "torus" (all ranks, as
                square as possible, 2) or "torus:4x8" (4 rows of 8 ranks), "ring" (all ranks, 1)
                or "ring:8"; or an `r2o`, [G, D] integers in [0, G), each column a permutation that
                maps no rank to itself.
            num_experts: E, a multiple of R.
            num_ranks: R, a multiple of G.
            num_redundant_per_rank: replicas on each rank, a multiple of D up to E / R. Default: D.
            load: [E] or [N, E] (summed) numbers of at least 0, in any unit. Home experts are then
                packed on the ranks by load and ordered by descending load on each, so that the
                hottest are the replicated ones. As in LPLB, where the number of groups of ranks
                is a multiple of the number of nodes, E is cut into as many groups of consecutive
                experts, and these are spread over the nodes whole (a node that is one group of
                ranks keeps its consecutive experts); otherwise, and on one node, experts are
                packed over all ranks. Without a load: experts in order, the first replicated.
            num_ranks_per_node: as for `Placement`.

        Raises:
            PlacementError: names the argument that does not fit, or the rank and column of `r2o`.
        """
        num_experts = _whole("num_experts", num_experts)
        num_ranks = _whole("num_ranks", num_ranks)
        node = _ranks_per_node(num_ranks, num_ranks_per_node)
        if not isinstance(topology, str):
            topology = _integers("topology", topology, dims=(2,))
        source = redundant_to_original(topology, num_ranks)
        size, columns = source.shape
        if num_experts % num_ranks:
            raise PlacementError(
                f"num_ranks must divide num_experts: {num_ranks} does not divide {num_experts}"
            )
        local = num_experts // num_ranks
        redundant = (
            columns
            if num_redundant_per_rank is None
            else _whole("num_redundant_per_rank", num_redundant_per_rank)
        )
        if redundant % columns or redundant > local:
            raise PlacementError(
                f"num_redundant_per_rank must be a multiple of the topology's {columns} columns, "
                f"up to num_experts / num_ranks = {local}; got {redundant}"
            )

        if load is None:
            home: npt.NDArray[Any] = np.arange(num_experts).reshape(num_ranks, local)
        else:
            weight = _expert_load(load, num_experts)
            groups, nodes = num_ranks // size, num_ranks // node
            whole = (nodes, groups) if groups % nodes == 0 else (1, 1)
            home = rebalance(weight, num_ranks, local, *whole)  # hottest first on each rank
        group_start = np.arange(num_ranks)[:, None] // size * size
        copied = group_start + np.tile(source, (num_ranks // size, redundant // columns))
        table = np.concatenate([home, home[copied, np.arange(redundant)]], axis=1)
        return cls(table.ravel(), num_ranks, num_experts=num_experts, num_ranks_per_node=node)

    @classmethod
    def from_history(
        cls,
        load: npt.ArrayLike,
        *,
        num_ranks: int,
        num_redundant_per_rank: int,
        num_ranks_per_node: int | None = None,
        num_groups: int | None = None,
    ) -> Placement:
        """EPLB's placement of one layer: the hottest experts get most copies, packed by load.

        EPLB's policies (github.com/deepseek-ai/EPLB), in float64, ties to the lower expert.
        Hierarchical: groups of experts are packed on nodes, and replicated and packed inside
        their node. Global: over all ranks. Like EPLB, this judges rank loads by the even split of
        each expert over its copies. A second copy on a rank is worth nothing to a plan, so no
        expert gets more copies than its node has ranks, and copies that meet are swapped apart,
        each only where the maximum rank load does not grow; two copies on a rank can remain.
        Homes are spread evenly, not each expert's first slot, so that as many slots of each rank
        can take other replicas when loads change.

        Args:
            load: [E] or [N, E] (summed) numbers of at least 0, in any unit.
            num_ranks: R.
            num_redundant_per_rank: replicas on each rank, at least 0. Where R does not divide E,
                ranks have ⌈E / R⌉ + num_redundant_per_rank slots, all of them filled.
            num_ranks_per_node: as for `Placement`.
            num_groups: groups of consecutive experts that the router limits its picks to; must
                divide E. With a multiple of the number of nodes the policy is hierarchical,
                otherwise, as by default, global.

        Raises:
            PlacementError: names the argument that does not fit, or the expert with a bad load.
        """
        weight = _expert_load(load)
        experts = weight.size
        num_ranks = _whole("num_ranks", num_ranks)
        nodes = num_ranks // _ranks_per_node(num_ranks, num_ranks_per_node)
        groups = 1 if num_groups is None else _whole("num_groups", num_groups)
        if experts % groups:
            raise PlacementError(
                f"num_groups must divide the number of experts: {groups} does not divide {experts}"
            )
        if groups % nodes:
            nodes = groups = 1
        redundant = _whole("num_redundant_per_rank", num_redundant_per_rank, least=0)
        slots = -(-experts // num_ranks) + redundant
        if slots > experts // nodes:
            raise PlacementError(
                f"num_redundant_per_rank is too large: {slots} slots on a rank, for "
                f"{experts // nodes} experts{' of its node' if nodes > 1 else ''}; got {redundant}"
            )
        table = rebalance(weight, num_ranks, slots, nodes, groups).ravel()
        return cls(
            table,
            num_ranks,
            num_experts=experts,
            num_ranks_per_node=num_ranks_per_node,
            home=even_homes(table, experts, num_ranks),
        )

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
    ) -> Placement:
        """A placement on which the linear program does best on the loads that may come.

        A local search over copies and homes that minimises the optimum T* in scenarios: the
        samples, and loads that drift away from them, little or far, each strength of drift counted
        alike (see `optimize`). One layer per call, seconds for 256 experts on 64 ranks. The same
        arguments give the same placement on one machine, unless `time_budget_s` ends the search;
        another machine may round in another way, so compute it on one rank and broadcast it, or
        load it from a file.

        Args:
            samples: [E] or [N, E] numbers of at least 0, in any unit: batches or histories. Only
                each one's shares count; those without load are left out.
            num_ranks, num_redundant_per_rank: as for `from_history`; with `start` its own.
            num_ranks_per_node: as for `Placement`; with `start` its own.
            num_groups: groups of consecutive experts that the router limits its picks to; must
                divide E. Their loads are taken to drift together.
            within_node: keep all copies of an expert, and all experts of a group, on one node;
                `num_groups`, or without it E, must then be a multiple of the number of nodes.
                Default: where there are several nodes and `num_groups` is a multiple of them, as
                `from_history` does.
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
            time_budget_s: end after so many seconds, at least 0, a step that is under way and an
                exact judgement, with the best so far.

        Raises:
            PlacementError: names the argument that does not fit, or the expert with a bad load.
        """
        load = _samples(samples)
        experts = load.shape[1]
        if start is not None:
            given = (num_ranks, num_redundant_per_rank, num_ranks_per_node, experts)
            num_ranks, num_redundant_per_rank, num_ranks_per_node = _shape_of(start, given)
        elif fixed_homes or max_changes is not None:
            raise PlacementError("fixed_homes and max_changes need a start")
        elif max_copies is not None:
            raise PlacementError("max_copies needs a start")
        num_ranks = _whole("num_ranks", num_ranks)
        node = _ranks_per_node(num_ranks, num_ranks_per_node)
        redundant = _whole("num_redundant_per_rank", num_redundant_per_rank, least=0)
        nodes, groups = _nodes_and_groups(experts, num_ranks // node, num_groups, within_node)
        slots = -(-experts // num_ranks) + redundant
        if slots > experts // nodes:
            raise PlacementError(
                f"num_redundant_per_rank is too large: {slots} slots on a rank, for "
                f"{experts // nodes} experts{' of its node' if nodes > 1 else ''}; got {redundant}"
            )
        _check_at_most("drift", drift, 1)
        _check_at_most("percentile", percentile, 100)
        _check_at_most("time_budget_s", time_budget_s, np.inf)
        movable = np.ones(num_ranks * slots, bool)
        if start is not None:
            if nodes > 1:
                _check_within_nodes(start)
            if fixed_homes:
                movable[start.home] = False
        table = optimize(
            load,
            num_ranks,
            slots,
            num_nodes=nodes,
            num_groups=groups,
            start=None if start is None else start.physical_to_logical.astype(np.int64),
            movable=movable,
            max_changes=_optional("max_changes", max_changes, least=0),
            max_copies=_optional("max_copies", max_copies),
            percentile=percentile,
            drift=drift,
            seed=_whole("seed", seed, least=0),
            max_steps=_optional("max_steps", max_steps, least=0),
            time_budget_s=time_budget_s,
        )
        if start is None:
            table, home = arrange(table, load.mean(axis=0), num_ranks)
        else:
            kept = table[start.home] == np.arange(experts)
            home = np.where(kept, start.home, cls(table, num_ranks, num_experts=experts).home)
        return cls(table, num_ranks, num_experts=experts, num_ranks_per_node=node, home=home)

    @classmethod
    def from_physical_to_logical(
        cls,
        table: npt.ArrayLike | Mapping[str, Any],
        num_ranks: int,
        *,
        num_experts: int | None = None,
        num_ranks_per_node: int | None = None,
    ) -> Placement | list[Placement]:
        """A serving engine's own placement, its `physical_to_logical_map`.

        vLLM (`EplbState`) and SGLang (`ExpertLocationMetadata`) keep an int64 tensor
        [layers, P] with slots numbered rank-major, as here. The values are copied: after the
        engine has moved experts, make the placements anew.

        Args:
            table: [P] or [layers, P] integers, -1 = a slot that holds nothing: a tensor on any
                device, an array or nested lists; or a mapping that has one as
                "physical_to_logical_map", which is what SGLang's `--init-expert-location` files
                hold.
            num_ranks: R; must divide P.
            num_experts: E; by default one more than the largest entry of all layers.
            num_ranks_per_node: as for `Placement`.

        Returns:
            A placement for [P]; for [layers, P] a list of them, one per layer.

        Raises:
            PlacementError: as for `Placement`; for [layers, P] the layer is named.
        """
        name = "physical_to_logical_map"
        if isinstance(table, Mapping) and name not in table:
            raise PlacementError(f"table must have the key {name!r}, got the keys {list(table)}")
        slots = table[name] if isinstance(table, Mapping) else table
        layers = _integers(name, slots, dims=(1, 2))
        if num_experts is None and layers.size:
            num_experts = max(int(layers.max()) + 1, 1)
        make = partial(
            cls,
            num_ranks=num_ranks,
            num_experts=num_experts,
            num_ranks_per_node=num_ranks_per_node,
        )
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
        )
        if out.num_physical_experts != self.num_physical_experts:
            raise PlacementError(
                f"physical_to_logical must have the {self.num_physical_experts} slots of the "
                f"placement that it replaces; got {out.num_physical_experts}"
            )
        return out

    def may_replace(self, other: Placement) -> bool:
        """Whether this placement differs from another in replicas and their number alone."""
        return (
            (self.num_ranks, self.num_ranks_per_node) == (other.num_ranks, other.num_ranks_per_node)
            and self.num_physical_experts == other.num_physical_experts
            and np.array_equal(self.home, other.home)
        )

    def _copies(self, home: npt.ArrayLike | None, max_replicas: int | None) -> npt.NDArray[Any]:
        """[E, C]: each expert's slots, its home first, then by (local slot, rank)."""
        slots = np.arange(self.num_physical_experts)
        order: npt.NDArray[Any] = slots.reshape(self.num_ranks, -1).T.ravel()
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
        columns = int(count.max())
        if max_replicas is not None:
            columns = _whole("max_replicas", max_replicas)
            if count.max() > columns:
                raise PlacementError(
                    f"expert {count.argmax()} has {count.max()} copies, and there is room for "
                    f"{columns}"
                )
        copies = np.full((self.num_experts, columns), -1)
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
        return _frozen(components(self.copy_rank, self.num_ranks))

    @cached_property
    def _state(self) -> dict[str, Any]:
        state = {
            "num_ranks": self.num_ranks,
            "num_ranks_per_node": self.num_ranks_per_node,
            "num_experts": self.num_experts,
            "physical_to_logical": self.physical_to_logical.tolist(),
            "home": self.home.tolist(),
        }
        if (self.logical_to_physical[:, -1] < 0).all():
            state["max_replicas"] = self.max_replicas
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
        # By its state: a pickled array would come back writable.
        return partial(Placement, **self._state), ()

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
        """Reads what `save` wrote, or `save_placements` for a single layer.

        Raises:
            PlacementError: the file is not a saved placement, holds those of several layers, or an
                impossible one.
            OSError: the file cannot be read.
        """
        state = _read_json(path)
        if isinstance(state, dict) and "lplb_ep_placements" in state:
            placements = load_placements(path)
            if len(placements) == 1:
                return next(iter(placements.values()))
            raise PlacementError(
                f"{os.fspath(path)} has placements of {len(placements)} layers: load_placements "
                "reads it; "
                "a buffer (LPLB_EP_PLACEMENT, lplb-ep run --placement) takes a file of one, by "
                "Placement.save"
            )
        version = state.pop("lplb_ep_placement", None) if isinstance(state, dict) else None
        if version != 1:
            raise PlacementError(f"{os.fspath(path)} is not a placement saved by this version")
        return _placement_of(state, os.fspath(path))


def save_placements(path: str | os.PathLike[str], placements: Mapping[int, Placement]) -> None:
    """Writes the placements of several layers, by their numbers, as JSON for `load_placements`."""
    layers = {str(layer): placement._state for layer, placement in placements.items()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"lplb_ep_placements": 1, "layers": layers}, file)


def load_placements(path: str | os.PathLike[str]) -> dict[int, Placement]:
    """Reads what `save_placements` wrote: each layer's placement by its number.

    Raises:
        PlacementError: the file is not such a file, or holds an impossible placement.
        OSError: the file cannot be read.
    """
    state = _read_json(path)
    if not isinstance(state, dict) or state.get("lplb_ep_placements") != 1:
        raise PlacementError(f"{os.fspath(path)} has no placements saved by this version")
    layers = state.get("layers")
    if not isinstance(layers, dict) or not all(map(str.isdecimal, layers)):
        raise PlacementError(f"{os.fspath(path)}: layers must be placements by layer number")
    return {
        int(layer): _placement_of(one, f"{os.fspath(path)}, layer {layer}")
        for layer, one in layers.items()
    }


def _placement_of(state: Any, where: str) -> Placement:
    if not isinstance(state, dict):
        raise PlacementError(f"{where}: a placement must be an object; got {state!r}")
    try:
        return Placement(**state)
    except (PlacementError, TypeError) as error:
        raise PlacementError(f"{where}: {error}") from error


def _read_json(path: str | os.PathLike[str]) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise PlacementError(f"{os.fspath(path)} is not JSON: {error}") from error


def check_placement(placement: object) -> None:
    """Raises TypeError unless it is a `Placement`."""
    if not isinstance(placement, Placement):
        raise TypeError(f"placement must be an lplb_ep.Placement; got a {type(placement).__name__}")


def _integers(
    name: str, values: npt.ArrayLike, dims: tuple[int, ...] = (1,)
) -> npt.NDArray[np.int64]:
    """`values` as an int64 array of its own; torch tensors on any device are taken too."""
    array = _array(name, values)
    if array.ndim not in dims or array.dtype.kind not in "iu":
        raise PlacementError(
            f"{name} must be integers with {' or '.join(map(str, dims))} dimensions, got shape "
            f"{list(array.shape)} of {array.dtype}"
        )
    return array.astype(np.int64)


def _nodes_and_groups(
    num_experts: int, num_nodes: int, num_groups: int | None, within_node: bool | None
) -> tuple[int, int]:
    """Nodes that copies stay within (1: anywhere), and groups of experts that stay together."""
    groups = 1 if num_groups is None else _whole("num_groups", num_groups)
    if num_experts % groups:
        raise PlacementError(
            f"num_groups must divide the number of experts: {groups} does not divide {num_experts}"
        )
    if within_node is None:
        within_node = num_groups is not None and groups % num_nodes == 0
    if not within_node:
        return 1, groups
    whole = num_experts if num_groups is None else groups
    if whole % num_nodes:
        raise PlacementError(
            f"within_node needs a multiple of {num_nodes} nodes: got {whole} "
            f"{'experts' if num_groups is None else 'groups'}"
        )
    return num_nodes, groups


def _shape_of(start: Placement, given: tuple[int | None, ...]) -> tuple[int, int, int]:
    """R, redundant slots and ranks of a node of a start; `given` are those and E, or None."""
    check_placement(start)
    redundant = start.num_local_slots + -start.num_experts // start.num_ranks
    shape = (start.num_ranks, redundant, start.num_ranks_per_node)
    names = ("num_ranks", "num_redundant_per_rank", "num_ranks_per_node", "the number of experts")
    for name, value, own in zip(names, given, (*shape, start.num_experts), strict=True):
        if value not in (None, own):
            raise PlacementError(f"{name} is given as {value}, and start has {own}")
    return shape


def _check_within_nodes(start: Placement) -> None:
    node = np.where(
        start.copy_rank >= 0, start.node[start.copy_rank], start.node[start.home_rank][:, None]
    )
    apart = np.flatnonzero((node != node[:, :1]).any(axis=1))
    if apart.size:
        raise PlacementError(f"within_node: start has expert {apart[0]} on several nodes")


def _samples(samples: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """[N, E]: samples that have load."""
    array = np.atleast_2d(_loads(samples))
    array = array[array.sum(axis=1) > 0]
    if not len(array):
        raise PlacementError("load must not be all zeros")
    return array


def _expert_load(load: npt.ArrayLike, num_experts: int | None = None) -> npt.NDArray[np.float64]:
    """[E]: the load of each expert, summed over batches."""
    array = _loads(load, num_experts)
    return array.reshape(-1, array.shape[-1]).sum(axis=0)


def _loads(load: npt.ArrayLike, num_experts: int | None = None) -> npt.NDArray[np.float64]:
    """[E] or [N, E], checked."""
    array = _array("load", load)
    if array.ndim not in (1, 2) or array.dtype.kind not in "iuf" or array.size == 0:
        raise PlacementError(
            f"load must be numbers [E] or [N, E], got shape {list(array.shape)} of {array.dtype}"
        )
    if num_experts not in (None, array.shape[-1]):
        raise PlacementError(
            f"load must have one entry per expert: {num_experts}, got {array.shape[-1]}"
        )
    wrong = np.argwhere(~((array >= 0) & np.isfinite(array)))
    if wrong.size:
        expert = wrong[0, -1]
        raise PlacementError(
            f"load of expert {expert} must be finite and at least 0, got {array[tuple(wrong[0])]}"
        )
    array = array.astype(np.float64)
    with np.errstate(over="ignore"):
        if not np.isfinite(array.sum()):
            raise PlacementError(f"load must have a finite sum, got entries up to {array.max():g}")
    return array


def _array(name: str, values: Any) -> npt.NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # bfloat16 has no NumPy counterpart.
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise PlacementError(f"{name} must be an array, got rows of unequal length") from error


def _whole(name: str, value: int | None, least: int = 1) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise PlacementError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def _optional(name: str, value: int | None, least: int = 1) -> int | None:
    """As `_whole`; None stays."""
    return None if value is None else _whole(name, value, least)


def _check_at_most(name: str, value: float | None, most: float) -> None:
    if value is not None and not 0 <= value <= most:
        raise PlacementError(f"{name} must be in [0, {most}]; got {value}")


def _ranks_per_node(num_ranks: int, num_ranks_per_node: int | None) -> int:
    if num_ranks_per_node is None:
        return num_ranks
    node = _whole("num_ranks_per_node", num_ranks_per_node)
    if num_ranks % node:
        raise PlacementError(
            f"num_ranks_per_node must divide num_ranks: {node} does not divide {num_ranks}"
        )
    return node


def _frozen(array: npt.NDArray[Any] | Iterable[int]) -> IntArray:
    out = np.ascontiguousarray(array, dtype=np.int32)
    out.setflags(write=False)
    return out
