"""Placements as JSON files: one layer's, or those of several layers by their numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import PlacementError

T = TypeVar("T")
Path = str | os.PathLike[str]

# The first key of a file names its kind; the value is the version of the format.
_ONE, _SEVERAL = "lplb_ep_placement", "lplb_ep_placements"
_VERSION = 1


def write_one(path: Path, state: Mapping[str, Any]) -> None:
    """Writes one layer's file.

    Args:
        path: the file, which is replaced.
        state: the arguments of the placement.

    Raises:
        OSError: the file is not writable.
    """
    _write(path, {_ONE: _VERSION, **state})


def write_layers(path: Path, states: Mapping[int, Mapping[str, Any]]) -> None:
    """Writes the file of several layers.

    Args:
        path: the file, which is replaced.
        states: the arguments of each layer's placement, by the layer's number.

    Raises:
        OSError: the file is not writable.
    """
    layers = {str(layer): state for layer, state in states.items()}
    _write(path, {_SEVERAL: _VERSION, "layers": layers})


def read_one(path: Path, make: Callable[..., T]) -> T:
    """The placement of one layer's file, or of a file of several layers that has one.

    Args:
        path: the file.
        make: called with the arguments of the placement.

    Raises:
        PlacementError: the file is of another kind, or its placement is invalid.
        OSError: the file is not readable.
    """
    content = _read(path)
    if isinstance(content, dict) and _SEVERAL in content:
        made = read_layers(path, make)
        if len(made) == 1:
            return next(iter(made.values()))
        raise PlacementError(
            f"{os.fspath(path)} has placements of {len(made)} layers: load_placements reads it; "
            "a buffer (LPLB_EP_PLACEMENT, lplb-ep run --placement) takes a file of one, by "
            "Placement.save"
        )
    version = content.pop(_ONE, None) if isinstance(content, dict) else None
    if version != _VERSION:
        raise PlacementError(f"{os.fspath(path)} is not a placement saved by this version")
    return _made(content, make, os.fspath(path))


def read_layers(path: Path, make: Callable[..., T]) -> dict[int, T]:
    """The placements of a file of several layers, by the layers' numbers.

    Args:
        path: the file.
        make: called with the arguments of each placement.

    Raises:
        PlacementError: the file is of another kind, or a placement is invalid.
        OSError: the file is not readable.
    """
    content = _read(path)
    if not isinstance(content, dict) or content.get(_SEVERAL) != _VERSION:
        raise PlacementError(f"{os.fspath(path)} has no placements saved by this version")
    layers = content.get("layers")
    if not isinstance(layers, dict) or not all(map(str.isdecimal, layers)):
        raise PlacementError(f"{os.fspath(path)}: layers must be placements by layer number")
    return {
        int(layer): _made(state, make, f"{os.fspath(path)}, layer {layer}")
        for layer, state in layers.items()
    }


def _made(state: Any, make: Callable[..., T], where: str) -> T:
    if not isinstance(state, dict):
        raise PlacementError(f"{where}: a placement must be an object; got {state!r}")
    try:
        return make(**state)
    except (PlacementError, TypeError) as error:
        raise PlacementError(f"{where}: {error}") from error


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)


def _read(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise PlacementError(f"{os.fspath(path)} is not JSON: {error}") from error
