"""The placements of several layers as one file, by the layers' numbers or modules' names."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..errors import PlacementError
from .files import has_several, read_layers, write_layers
from .table import Placement


def save_placements(
    path: str | os.PathLike[str], placements: Mapping[int, Placement] | Mapping[str, Placement]
) -> None:
    """Writes the placements of several layers as JSON for `load_placements`.

    Args:
        path: the file, which is replaced.
        placements: by the layers' numbers. Or by names of modules, as `placements_of_modules` has
            them: such a file serves `LPLB_EP_PLACEMENT` too.

    Raises:
        PlacementError: a name is empty, or is a number.
        OSError: the file is not writable.
    """
    write_layers(path, {layer: one._state for layer, one in placements.items()})


def load_placements(path: str | os.PathLike[str]) -> dict[int | str, Placement]:
    """Reads a file of `save_placements`: each layer's placement by its number or name.

    Raises:
        PlacementError: the file is not such a file, or holds an invalid placement.
        OSError: the file is not readable.
    """
    return read_layers(path, Placement)


def placements_of_modules(path: str | os.PathLike[str]) -> dict[str, Placement]:
    """Reads a file for programs that cannot be edited: what `LPLB_EP_PLACEMENT` names.

    Returns:
        Placements by names of modules; of a file with one placement for all layers, by "". A name
        is a module's qualified name, or its end behind a dot. A part of it may be a pattern:
        "layers.*.mlp".

    Raises:
        PlacementError: the file is no file of placements, holds an invalid one, or has those of
            several layers by number.
        OSError: the file is not readable.
    """
    if not has_several(path):
        return {"": Placement.load(path)}
    placements = read_layers(path, Placement)
    named = {layer: placement for layer, placement in placements.items() if isinstance(layer, str)}
    if named and len(named) == len(placements):
        return named
    if len(placements) == 1:
        return {"": next(iter(placements.values()))}
    raise PlacementError(
        f"{os.fspath(path)} has placements by layer number, and a program's layers are found by "
        "module. Name them: lplb-ep place --names 'layers.{}.mlp', or save_placements(path, "
        "{'layers.3.mlp': ...})"
    )
