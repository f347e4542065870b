"""Placements as JSON files: of one layer, or of several layers by numbers or names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import PlacementError
from ..plain_files import read_json, write_json

T = TypeVar("T")
Path = str | os.PathLike[str]

# The first key of a file names its kind; the value is the version of the format.
_ONE, SEVERAL = "lplb_ep_placement", "lplb_ep_placements"
_VERSION = 1


def write_one(path: Path, state: Mapping[str, Any]) -> None:
    """Writes one layer's file.

    Args:
        path: the file, which is replaced.
        state: the arguments of the placement.

    Raises:
        OSError: the file is not writable.
    """
    write_json(path, {_ONE: _VERSION, **state})


def write_layers(path: Path, states: Mapping[int | str, Mapping[str, Any]]) -> None:
    """Writes the file of several layers.

    Args:
        path: the file, which is replaced.
        states: the arguments of each layer's placement, by the layer's number or name.

    Raises:
        PlacementError: a name is empty, or is a number.
        OSError: the file is not writable.
    """
    for layer in states:
        if isinstance(layer, str) and (not layer or layer.isdecimal()):
            raise PlacementError(f"the name of a layer must be that of a module; got {layer!r}")
    layers = {str(layer): state for layer, state in states.items()}
    write_json(path, {SEVERAL: _VERSION, "layers": layers})


def read_one(path: Path, make: Callable[..., T]) -> T:
    """The placement of one layer's file, or of a file of several layers that has one.

    Args:
        path: the file.
        make: called with the arguments of the placement.

    Raises:
        PlacementError: the file is of another kind, or its placement is invalid.
        OSError: the file is not readable.
    """
    content = read_content(path)
    if isinstance(content, dict) and SEVERAL in content:
        made = read_layers(path, make)
        if len(made) == 1:
            return next(iter(made.values()))
        raise PlacementError(
            f"{os.fspath(path)} has placements of {len(made)} layers: load_placements reads it"
        )
    version = content.pop(_ONE, None) if isinstance(content, dict) else None
    if version != _VERSION:
        raise PlacementError(f"{os.fspath(path)} is not a placement saved by this version")
    return _made(content, make, os.fspath(path))


def read_layers(path: Path, make: Callable[..., T]) -> dict[int | str, T]:
    """The placements of a file of several layers, by the layers' numbers or names.

    Args:
        path: the file.
        make: called with the arguments of each placement.

    Raises:
        PlacementError: the file is of another kind, or a placement is invalid.
        OSError: the file is not readable.
    """
    content = read_content(path)
    if isinstance(content, dict) and _ONE in content:
        raise PlacementError(f"{os.fspath(path)} has one placement, and no layer that it is of")
    if not isinstance(content, dict) or content.get(SEVERAL) != _VERSION:
        raise PlacementError(f"{os.fspath(path)} has no placements saved by this version")
    layers = content.get("layers")
    if not isinstance(layers, dict) or "" in layers:
        raise PlacementError(f"{os.fspath(path)}: layers must be placements by number or name")
    made: dict[int | str, T] = {}
    for name, state in layers.items():
        layer = int(name) if name.isdecimal() else name
        if layer in made:
            raise PlacementError(f"{os.fspath(path)}: layer {layer} comes twice")
        made[layer] = _made(state, make, f"{os.fspath(path)}, layer {layer!r}")
    return made


def _made(state: Any, make: Callable[..., T], where: str) -> T:
    if not isinstance(state, dict):
        raise PlacementError(f"{where}: a placement must be an object; got {state!r}")
    try:
        return make(**state)
    except (PlacementError, TypeError) as error:
        raise PlacementError(f"{where}: {error}") from error


def read_content(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        PlacementError: the file is not JSON.
        OSError: the file is not readable.
    """
    try:
        return read_json(path)
    except ValueError as error:
        raise PlacementError(str(error)) from None
