"""LPLB's fixed patterns of which rank holds a copy of which rank's experts, by name.

The names and graphs are those of LPLB (github.com/deepseek-ai/LPLB), as is `r2o`, "redundant to
original": an array [G, D] for a group of G ranks in which `r2o[i, d]` is the rank that rank i
copies its d-th redundant expert from.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError

Array = npt.NDArray[Any]


def redundant_to_original(topology: str | Array, num_ranks: int) -> Array:
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
    source = _named(topology, num_ranks) if isinstance(topology, str) else topology
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
        # Column 0: rings of four ranks. Column 1 joins the fours: those of the hypercube in rings
        # of four again; the two of the cube there and back, once along edges, once on diagonals.
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
