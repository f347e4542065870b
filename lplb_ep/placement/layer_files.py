"""The placements of several layers as one file, by the layers' numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping

from .files import read_layers, write_layers
from .table import Placement


def save_placements(path: str | os.PathLike[str], placements: Mapping[int, Placement]) -> None:
    """Writes the placements of several layers, by their numbers, as JSON for `load_placements`.

    Raises:
        OSError: the file is not writable.
    """
    write_layers(path, {layer: one._state for layer, one in placements.items()})


def load_placements(path: str | os.PathLike[str]) -> dict[int, Placement]:
    """Reads a file of `save_placements`: each layer's placement by its number.

    Raises:
        PlacementError: the file is not such a file, or holds an invalid placement.
        OSError: the file is not readable.
    """
    return read_layers(path, Placement)
