"""The builder of `Placement.for_lp`: arguments checked, searches from starts, the best chosen."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import PlacementError
from ..active import take_part
from ..copies import slots_of_experts
from ..homes import homes_first
from ..inputs import (
    check_at_most,
    expert_groups,
    loads,
    optional_whole,
    slots_per_rank,
    whole,
)
from .moves import Limits
from .scenarios import scenarios
from .search import Search
from .starts import starts

Array = npt.NDArray[Any]

_NUM_SCENARIOS = 256  # that moves are found on
_NUM_VALIDATION = 640  # that decide whether a move is kept
_NUM_SEARCHES = 2  # from the best starts
_FIRST_PATIENCE = 8  # moves in a row that fail, then these end, and the best goes on
_PATIENCE = 30  # moves in a row that fail, then the search ends
_MAX_STEPS = 400  # moves that a search tries
_REFINE_STEPS = 300  # the same from a given start, where slots are emptied until the steps are used


class Start(Protocol):
    """A placement that a search improves, as far as the search knows it."""

    num_ranks: int
    num_ranks_per_node: int
    num_experts: int
    num_local_slots: int
    physical_to_logical: npt.NDArray[np.int32]
    copy_rank: npt.NDArray[np.int32]

    @property
    def active_ranks(self) -> npt.NDArray[np.int32]:
        """[A]: the ranks that hold an expert."""

    def on_ranks(self, ranks: npt.ArrayLike, num_ranks_per_node: int) -> Start:
        """The same of these ranks by themselves."""

    @property
    def home(self) -> npt.NDArray[np.int32]:
        """[E]: the slot of each expert's home."""

    @property
    def home_rank(self) -> npt.NDArray[np.int32]:
        """[E]: the rank of each expert's home."""


def fill_for_lp(
    samples: npt.ArrayLike,
    num_ranks: int | None,
    num_redundant_per_rank: int | None,
    num_ranks_per_node: int | None,
    num_groups: int | None,
    within_node: bool | None,
    start: Start | None,
    fixed_homes: bool,
    max_changes: int | None,
    max_copies: int | None,
    percentile: float | None,
    drift: float,
    seed: int,
    max_steps: int | None,
    time_budget_s: float | None,
    active_ranks: npt.ArrayLike | None,
) -> dict[str, Any]:
    """The arguments of the placement that `Placement.for_lp` makes, which documents these.

    Raises:
        PlacementError: names the argument that does not fit, or the expert with a bad load.
    """
    load = _samples(samples)
    experts = load.shape[1]
    if start is not None:
        given = (num_ranks, num_redundant_per_rank, num_ranks_per_node, experts)
        num_ranks, num_redundant_per_rank, num_ranks_per_node = _shape_of(start, given)
        active_ranks = start.active_ranks if active_ranks is None else active_ranks
    elif fixed_homes or max_changes is not None:
        raise PlacementError("fixed_homes and max_changes need a start")
    elif max_copies is not None:
        raise PlacementError("max_copies needs a start")
    active = take_part(active_ranks, num_ranks, num_ranks_per_node)
    num_ranks, node = active.num_active, active.num_active_per_node
    if within_node and node == num_ranks and active.num_ranks_per_node < active.num_ranks:
        raise PlacementError("within_node needs as many active_ranks on each node")
    if start is not None:
        start = start.on_ranks(active.ranks, node)
        num_redundant_per_rank = start.num_local_slots + -experts // num_ranks
    whole("num_redundant_per_rank", num_redundant_per_rank, least=0)
    nodes, groups = _nodes_and_groups(experts, num_ranks // node, num_groups, within_node)
    slots = slots_per_rank(experts, num_ranks, num_redundant_per_rank, nodes)
    check_at_most("drift", drift, 1)
    check_at_most("percentile", percentile, 100)
    check_at_most("time_budget_s", time_budget_s, np.inf)
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
        max_changes=optional_whole("max_changes", max_changes, least=0),
        max_copies=optional_whole("max_copies", max_copies),
        percentile=percentile,
        drift=drift,
        seed=whole("seed", seed, least=0),
        max_steps=optional_whole("max_steps", max_steps, least=0),
        time_budget_s=time_budget_s,
    )
    if start is None:
        table, home = homes_first(table, load.mean(axis=0), num_ranks)
    else:
        kept = table[start.home] == np.arange(experts)
        home = np.where(kept, start.home, slots_of_experts(table, num_ranks, experts)[:, 0])
    filled = {"physical_to_logical": table, "num_experts": experts, "home": home}
    return active.on_all_ranks(filled)


def optimize(
    samples: Array,
    num_ranks: int,
    num_local_slots: int,
    *,
    num_nodes: int = 1,
    num_groups: int = 1,
    start: Array | None = None,
    movable: Array | None = None,
    max_changes: int | None = None,
    max_copies: int | None = None,
    percentile: float | None = None,
    drift: float = 0.8,
    seed: int = 0,
    max_steps: int | None = None,
    time_budget_s: float | None = None,
) -> Array:
    """A table for the loads that may come.

    Args:
        samples: [N, E] float64, at least 0, each with a positive sum.
        num_ranks: R, a multiple of `num_nodes`.
        num_local_slots: slots on each rank; E or more on all of them. A node has at least as many
            as the experts that are packed on it.
        num_nodes: nodes that an expert's copies stay within; 1: anywhere.
        num_groups: groups of consecutive experts, which drift together, and with several nodes stay
            on one; divides E, and is a multiple of `num_nodes`. 1: no groups.
        start: [P] int64 table to improve, -1 = empty; None: make one.
        movable: [P] bool, slots of `start` that may change; None: all.
        max_changes: slots that may differ from `start`; None: all.
        max_copies: of an expert, in a search from `start`; None: any number.
        percentile: of the scenarios' optima to minimise, in [0, 100]; None: the mean at each
            strength of drift.
        drift: see `scenarios`.
        seed: of the scenarios.
        max_steps: moves that a search tries; None: 400, from `start` 300.
        time_budget_s: after it the step under way is the last, and one more table is judged
            exactly; the best so far.

    Returns:
        [P] int64. Unless `start` leaves some empty, every slot is filled.
    """
    begin = time.perf_counter()
    rng = np.random.default_rng(seed)
    load, validation = (
        num_ranks * scenarios(samples, num, drift, num_groups, rng)
        for num in (_NUM_SCENARIOS, _NUM_VALIDATION)
    )
    tables: Iterable[Array]
    if start is not None:
        tables = [start]
    else:
        kept = 1 if num_nodes == 1 else num_groups if num_groups > 1 else samples.shape[1]
        shape = (num_ranks, num_local_slots, num_nodes, kept)
        tables = starts(load, samples.mean(axis=0), *shape)
    slots = num_ranks * num_local_slots
    if max_steps is None:
        max_steps = _MAX_STEPS if start is None else _REFINE_STEPS
    limits = Limits(
        movable=np.ones(slots, bool) if movable is None else movable,
        max_changes=slots if max_changes is None else max_changes,
        max_copies=num_ranks if max_copies is None else max_copies,
        num_nodes=num_nodes,
        max_steps=max_steps,
        deadline=float("inf") if time_budget_s is None else begin + time_budget_s,
    )
    searches: list[Search] = []
    for table in tables:
        if any((search.first == table).all() for search in searches):
            continue
        searches.append(Search(load, validation, table, num_ranks, percentile, limits))
        if limits.are_late():
            break
    searches = sorted(searches, key=Search.bounded_score)[:_NUM_SEARCHES]
    finals = [search.result() for search in searches]
    for search in searches:
        search.run(_FIRST_PATIENCE)
        finals.append(search.result())
    best = min(searches, key=Search.exact_score)
    best.run(_PATIENCE)
    if start is not None:
        best.ruin_and_recreate(rng)
    finals.append(best.result())
    return min(finals, key=lambda final: final.score).table


def _samples(samples: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """[N, E]: samples that have load."""
    array = np.atleast_2d(loads(samples))
    array = array[array.sum(axis=1) > 0]
    if not len(array):
        raise PlacementError("load must not be all zeros")
    return array


def _shape_of(start: Start, given: tuple[int | None, ...]) -> tuple[int, int, int]:
    """R, redundant slots and ranks of a node of a start; `given` are those and E, or None."""
    redundant = start.num_local_slots + -start.num_experts // start.num_ranks
    shape = (start.num_ranks, redundant, start.num_ranks_per_node)
    names = ("num_ranks", "num_redundant_per_rank", "num_ranks_per_node", "the number of experts")
    for name, value, own in zip(names, given, (*shape, start.num_experts), strict=True):
        if value not in (None, own):
            raise PlacementError(f"{name} is given as {value}, and start has {own}")
    return shape


def _nodes_and_groups(
    num_experts: int, num_nodes: int, num_groups: int | None, within_node: bool | None
) -> tuple[int, int]:
    """Nodes that copies stay within (1: anywhere), and groups of experts that stay together."""
    groups = expert_groups(num_experts, num_groups)
    if within_node is None:
        within_node = num_groups is not None and groups % num_nodes == 0
    if not within_node:
        return 1, groups
    packed = num_experts if num_groups is None else groups
    if packed % num_nodes:
        raise PlacementError(
            f"within_node needs a multiple of {num_nodes} nodes: got {packed} "
            f"{'experts' if num_groups is None else 'groups'}"
        )
    return num_nodes, groups


def _check_within_nodes(start: Start) -> None:
    rank = np.where(start.copy_rank >= 0, start.copy_rank, start.home_rank[:, None])
    node = rank // start.num_ranks_per_node
    apart = np.flatnonzero((node != node[:, :1]).any(axis=1))
    if apart.size:
        raise PlacementError(f"within_node: start has expert {apart[0]} on several nodes")
