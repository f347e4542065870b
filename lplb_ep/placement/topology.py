"""LPLB's policy: each rank's first experts get replicas on fixed ranks, by a named pattern.

The names and graphs are those of LPLB (github.com/deepseek-ai/LPLB). So is `r2o`, "redundant to
original", an array [G, D] for groups of G ranks. Rank i of a group copies its d-th redundant expert
from rank `r2o[i, d]` of the group.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError
from .eplb import rebalance
from .inputs import expert_load, integers, ranks_per_node, whole

Array = npt.NDArray[Any]


def fill_by_topology(
    topology: str | npt.ArrayLike,
    num_experts: int,
    num_ranks: int,
    num_redundant_per_rank: int | None,
    load: npt.ArrayLike | None,
    num_ranks_per_node: int | None,
) -> dict[str, Any]:
    """The arguments of the placement that `Placement.from_topology` makes, which documents these.

    Raises:
        PlacementError: names the argument that does not fit, or the rank and column of `r2o`.
    """
    num_experts = whole("num_experts", num_experts)
    num_ranks = whole("num_ranks", num_ranks)
    node = ranks_per_node(num_ranks, num_ranks_per_node)
    source = redundant_to_original(topology, num_ranks)
    size, columns = source.shape
    if num_experts % num_ranks:
        raise PlacementError(
            f"num_ranks must divide num_experts: {num_ranks} does not divide {num_experts}"
        )
    local, redundant = num_experts // num_ranks, columns
    if num_redundant_per_rank is not None:
        redundant = whole("num_redundant_per_rank", num_redundant_per_rank)
    if redundant % columns or redundant > local:
        raise PlacementError(
            f"num_redundant_per_rank must be a multiple of the topology's {columns} columns, "
            f"up to num_experts / num_ranks = {local}; got {redundant}"
        )

    if load is None:
        home: Array = np.arange(num_experts).reshape(num_ranks, local)
    else:
        weight = expert_load(load, num_experts)
        groups, nodes = num_ranks // size, num_ranks // node
        whole_groups = (nodes, groups) if groups % nodes == 0 else (1, 1)
        home = rebalance(weight, num_ranks, local, *whole_groups)  # hottest first on each rank
    group_start = np.arange(num_ranks)[:, None] // size * size
    copied = group_start + np.tile(source, (num_ranks // size, redundant // columns))
    table = np.concatenate([home, home[copied, np.arange(redundant)]], axis=1)
    return {
        "physical_to_logical": table.ravel(),
        "num_ranks": num_ranks,
        "num_experts": num_experts,
        "num_ranks_per_node": node,
    }


def redundant_to_original(topology: str | npt.ArrayLike, num_ranks: int) -> Array:
    """The checked `r2o` of a topology.

    Args:
        topology: a name (see `Placement.from_topology`) or an `r2o`, [G, D] integers.
        num_ranks: R; G must divide it. The size of a "ring" or "torus" that names none.

    Returns:
        [G, D] integers, each column a permutation of [0, G) without a fixed point.

    Raises:
        PlacementError: an unknown name, a group size that does not divide R, or a column that is
            no such permutation.
    """
    if isinstance(topology, str):
        source = _named(topology, num_ranks)
    else:
        source = integers("topology", topology, dims=(2,))
    size, columns = source.shape
    if source.size == 0 or num_ranks % size:
        raise PlacementError(
            f"the topology's group size must divide num_ranks: groups of {size} ranks with "
            f"{columns} columns, {num_ranks} ranks"
        )
    ranks = np.arange(size)
    for column in range(columns):
        named = (source[:, column] == ranks[:, None]).sum(axis=1)
        wrong = np.flatnonzero(named != 1)
        if wrong.size:
            raise PlacementError(
                f"column {column} of the topology must be a permutation of the ranks 0 to "
                f"{size - 1}: rank {wrong[0]} is in it {named[wrong[0]]} times"
            )
        fixed = np.flatnonzero(source[:, column] == ranks)
        if fixed.size:
            raise PlacementError(
                f"column {column} of the topology copies rank {fixed[0]} to itself "
                "(a ring needs two ranks, a torus two rows and two columns)"
            )
    return source


def _named(name: str, num_ranks: int) -> Array:
    if name in ("cube", "hypercube"):
        rank = np.arange(8 if name == "cube" else 16)
        # Column 0 has rings of four ranks, and column 1 joins the fours. Those of a hypercube are
        # joined in rings of four again. The two of a cube are joined there and back, once along
        # edges and once along diagonals.
        four, place = rank // 4, rank % 4
        across = np.where(four == 0, (place + 2) % 4, place) if name == "cube" else place
        next_four = (four - 1) % (rank.size // 4)
        return np.stack([four * 4 + (place - 1) % 4, next_four * 4 + across], axis=1)
    if ring := re.fullmatch(r"ring(?::(\d+))?", name):
        return np.roll(np.arange(int(ring[1] or num_ranks)), -1)[:, None]
    if torus := re.fullmatch(r"torus(?::(\d+)x(\d+))?", name):
        rows = max(d for d in range(1, math.isqrt(num_ranks) + 1) if num_ranks % d == 0)
        shape = (int(torus[1]), int(torus[2])) if torus[1] else (rows, num_ranks // rows)
        grid = np.arange(math.prod(shape)).reshape(shape)
        return np.stack([np.roll(grid, -1, axis).ravel() for axis in (0, 1)], axis=1)
    raise PlacementError(
        "topology must be cube, hypercube, torus, torus:ROWSxCOLUMNS, ring, ring:SIZE or an "
        f"array [group size, columns]; got {name!r}"
    )
