"""Checks of arguments of placements and builders; tensors, arrays and lists become arrays."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError


def integers(
    name: str, values: npt.ArrayLike, dims: tuple[int, ...] = (1,)
) -> npt.NDArray[np.int64]:
    """A new int64 array of `values`, which may be a torch tensor on any device.

    Args:
        name: the argument, for messages.
        values: integers.
        dims: the numbers of dimensions that are valid.

    Raises:
        PlacementError: the values are no integers, or have another number of dimensions.
    """
    array = _array(name, values)
    if array.ndim not in dims or array.dtype.kind not in "iu":
        raise PlacementError(
            f"{name} must be integers with {' or '.join(map(str, dims))} dimensions, got shape "
            f"{list(array.shape)} of {array.dtype}"
        )
    return array.astype(np.int64)


def engine_map(table: npt.ArrayLike | Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """A serving engine's table, [P] or [layers, P], that may be an entry of a mapping.

    Raises:
        PlacementError: the entry is missing, or the table is not of integers.
    """
    name = "physical_to_logical_map"
    if isinstance(table, Mapping) and name not in table:
        raise PlacementError(f"table must have the key {name!r}, got the keys {list(table)}")
    slots = table[name] if isinstance(table, Mapping) else table
    return integers(name, slots, dims=(1, 2))


def whole(name: str, value: int | None, least: int = 1) -> int:
    """A whole number of at least `least`, of any integer type but bool.

    Raises:
        PlacementError: it is None, no integer, or less.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise PlacementError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def optional_whole(name: str, value: int | None, least: int = 1) -> int | None:
    """As `whole`, but None is valid and stays None.

    Raises:
        PlacementError: as `whole`.
    """
    return None if value is None else whole(name, value, least)


def check_experts(table: npt.NDArray[Any], num_experts: int) -> None:
    """Raises PlacementError unless a table [P] of integers holds all of E experts, and -1, only."""
    wrong = np.flatnonzero((table < -1) | (table >= num_experts))
    if wrong.size:
        raise PlacementError(
            f"slot {wrong[0]} holds expert {table[wrong[0]]}, expected -1 (unused) or one of "
            f"[0, {num_experts})"
        )
    # Of more experts than slots one of the first P + 1 is missing.
    missing = np.setdiff1d(np.arange(min(num_experts, table.size + 1)), table)
    if missing.size:
        which = ", ".join(map(str, missing[:8]))
        raise PlacementError(
            f"no slot holds expert {which} (of {num_experts} experts, in {table.size} slots)"
        )


def check_at_most(name: str, value: float | None, most: float) -> None:
    """Raises PlacementError unless the value is in [0, `most`] or None."""
    if value is not None and not 0 <= value <= most:
        raise PlacementError(f"{name} must be in [0, {most}]; got {value}")


def ranks_per_node(num_ranks: int, num_ranks_per_node: int | None) -> int:
    """The ranks of a node, by default all of them.

    Raises:
        PlacementError: they do not divide the ranks.
    """
    if num_ranks_per_node is None:
        return num_ranks
    node = whole("num_ranks_per_node", num_ranks_per_node)
    if num_ranks % node:
        raise PlacementError(
            f"num_ranks_per_node must divide num_ranks: {node} does not divide {num_ranks}"
        )
    return node


def slots_per_rank(
    num_experts: int, num_ranks: int, num_redundant_per_rank: int | None, num_nodes: int
) -> int:
    """Slots on each rank: an equal part of the experts, rounded up, and the redundant ones.

    Args:
        num_experts: E.
        num_ranks: R.
        num_redundant_per_rank: replicas on each rank, at least 0.
        num_nodes: nodes that an expert's copies stay within; 1: anywhere.

    Raises:
        PlacementError: a rank would have more slots than experts that it may hold.
    """
    redundant = whole("num_redundant_per_rank", num_redundant_per_rank, least=0)
    slots = -(-num_experts // num_ranks) + redundant
    if slots > num_experts // num_nodes:
        raise PlacementError(
            f"num_redundant_per_rank is too large: {slots} slots on a rank, for "
            f"{num_experts // num_nodes} experts{' of its node' if num_nodes > 1 else ''}; "
            f"got {redundant}"
        )
    return slots


def expert_groups(num_experts: int, num_groups: int | None) -> int:
    """The number of groups of consecutive experts, by default 1.

    Raises:
        PlacementError: it does not divide the number of experts.
    """
    groups = 1 if num_groups is None else whole("num_groups", num_groups)
    if num_experts % groups:
        raise PlacementError(
            f"num_groups must divide the number of experts: {groups} does not divide {num_experts}"
        )
    return groups


def loads(load: npt.ArrayLike, num_experts: int | None = None) -> npt.NDArray[np.float64]:
    """Loads as float64, [E] or [N, E] as they are given.

    Args:
        load: numbers of at least 0.
        num_experts: E; None: any.

    Raises:
        PlacementError: another shape or dtype, or a load that is negative or not finite; the
            message names the expert.
    """
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


def expert_load(load: npt.ArrayLike, num_experts: int | None = None) -> npt.NDArray[np.float64]:
    """[E]: the load of each expert, summed over batches; arguments and errors as for `loads`."""
    array = loads(load, num_experts)
    return array.reshape(-1, array.shape[-1]).sum(axis=0)


def _array(name: str, values: Any) -> npt.NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # bfloat16 has no NumPy counterpart.
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise PlacementError(f"{name} must be an array, got rows of unequal length") from error
