"""The placements of several layers as one file: the package's own, or a serving engine's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PlacementError
from .engine_files import (
    NO_PLACEMENTS,
    EngineTables,
    format_of,
    is_content_of_engine,
    is_named_as_engine_file,
    read_tables,
    write_tables,
)
from .files import SEVERAL, read_content, read_layers, write_layers
from .table import Placement


def save_placements(
    path: str | os.PathLike[str],
    placements: Mapping[int, Placement] | Mapping[str, Placement],
    format: str | None = None,
) -> None:
    """Writes the placements of several layers for `load_placements`, or for a serving engine.

    Args:
        path: the file, which is replaced.
        placements: by the layers' numbers in the model. Or by names of modules, as in
            `placements_of_modules`; `LPLB_EP_PLACEMENT` also takes such a file.
        format: "lplb-ep", "sglang", "tensorrt-llm", "vllm-ascend" or "vllm". Default: by the end of
            the name, `.yaml` for TensorRT-LLM, `.pt` for SGLang, `.npy` for vLLM, else our own.

    Raises:
        PlacementError: a name is empty, or is a number. Or the format does not fit the name, or the
            engine cannot have such placements: with empty slots, guest slots, or other sizes.
        OSError: the file is not writable.
    """
    kind = format_of(path, format)
    if kind == "lplb-ep":
        write_layers(path, {layer: one._state for layer, one in placements.items()})
        return
    tables: dict[int, Sequence[int]] = {}
    sizes = {(p.num_ranks, p.num_experts) for p in placements.values()}
    if len(sizes) != 1:
        raise PlacementError(f"layers must have the same ranks and experts; got {sorted(sizes)}")
    for layer, placement in placements.items():
        if not isinstance(layer, int):
            raise PlacementError(f"a file of {kind} has layers by number; got {layer!r}")
        if placement.num_guests_per_rank:
            raise PlacementError(f"a file of {kind} has no guest slots: num_guests_per_rank is 0")
        tables[layer] = placement.physical_to_logical.tolist()
    write_tables(path, kind, tables, *sizes.pop())


def load_placements(
    path: str | os.PathLike[str],
    num_ranks: int | None = None,
    *,
    num_experts: int | None = None,
    num_ranks_per_node: int | None = None,
) -> dict[int | str, Placement]:
    """Reads a file of `save_placements`, or a serving engine's (`placement/engine_files.py`).

    Args:
        path: the file.
        num_ranks: R, which most engines' files lack; must equal R of a file that has it.
        num_experts: E of an engine's file; by default one more than its largest entry.
        num_ranks_per_node: of an engine's file, as for `Placement`.

    Returns:
        Each layer's placement by its number or name. In files of vLLM and vllm-ascend MoE layers
        are counted from 0, without the dense layers of the model.

    Raises:
        PlacementError: the file is not such a file, or holds an invalid placement.
        OSError: the file is not readable.
    """
    found = _engine_tables(path)
    if found is not None:
        made = _placed(path, found, num_ranks, num_experts, num_ranks_per_node)
        return dict(made.items())
    placements = read_layers(path, Placement)
    for layer, placement in placements.items():
        if num_ranks not in (None, placement.num_ranks):
            raise PlacementError(
                f"{os.fspath(path)}, layer {layer}: has {placement.num_ranks} ranks, and "
                f"num_ranks is {num_ranks}"
            )
    return placements


def placements_of_layers(
    path: str | os.PathLike[str], layers: Sequence[int], **options: Any
) -> list[Placement]:
    """The placements of these layers, from a file of any kind.

    Args:
        path: a file with one placement for each layer, or one for all; or an engine's.
        layers: numbers in the model. From files that count MoE layers alone they are taken in their
            order, and must be as many.
        options: as for `load_placements`.

    Raises:
        PlacementError: as `load_placements`; or a layer has no placement.
        OSError: the file is not readable.
    """
    found = _engine_tables(path)
    if found is None and not _has_several(path):
        return [Placement.load(path)] * len(layers)
    placements = load_placements(path, **options)
    if found is not None and not found.in_model:
        if len(placements) != len(layers):
            raise PlacementError(
                f"{os.fspath(path)} has {len(placements)} MoE layers, and {len(layers)} are needed"
            )
        return list(placements.values())
    names = [layer for layer in placements if isinstance(layer, str)]
    if names:
        raise PlacementError(
            f"{os.fspath(path)} has layers by name ({names[0]!r}), and numbers are needed"
        )
    missing = [layer for layer in layers if layer not in placements]
    if missing:
        raise PlacementError(f"{os.fspath(path)} has no placement for layer {missing[0]}")
    return [placements[layer] for layer in layers]


def numbers_of_layers(path: str | os.PathLike[str]) -> list[int]:
    """The numbers in the model of the layers in a file; none where it is for layers of any number.

    Layers with experts in order, as SGLang has dense ones, are left out.

    Raises:
        PlacementError: as `load_placements`.
        OSError: the file is not readable.
    """
    found = _engine_tables(path)
    if found is not None:
        tables = found.tables if found.in_model else {}
        return [
            layer
            for layer, table in tables.items()
            if (table != np.arange(table.size) % (int(table.max()) + 1)).any()
        ]
    if not _has_several(path):
        return []
    return [layer for layer in read_layers(path, Placement) if isinstance(layer, int)]


def engine_of(path: str | os.PathLike[str]) -> str | None:
    """Whose a file of placements is and what, in words; None: our own.

    Raises:
        PlacementError: as `load_placements`.
        OSError: the file is not readable.
    """
    found = _engine_tables(path)
    return None if found is None else found.kind


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
    found = _engine_tables(path)
    if found is not None:
        raise PlacementError(
            f"{os.fspath(path)} is {found.kind}, which names no modules. Make a file that does: "
            f"lplb-ep place --start {os.fspath(path)} --ranks R --names 'layers.{{}}.mlp'"
        )
    if not _has_several(path):
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


def _engine_tables(path: str | os.PathLike[str]) -> EngineTables | None:
    """What an engine's file has; None of our own."""
    end = Path(path).suffix.lower()
    if end in NO_PLACEMENTS:
        raise PlacementError(f"{os.fspath(path)} is no file of placements: these are not {end}")
    content = None if is_named_as_engine_file(path) else read_content(path)
    if content is None or is_content_of_engine(content):
        return read_tables(path)
    return None


def _placed(
    path: str | os.PathLike[str],
    found: EngineTables,
    num_ranks: int | None,
    num_experts: int | None,
    num_ranks_per_node: int | None,
) -> dict[int, Placement]:
    """The placements of an engine's tables."""
    ranks = found.num_ranks if num_ranks is None else num_ranks
    if ranks is None:
        raise PlacementError(f"num_ranks must be given: {os.fspath(path)} ({found.kind}) has none")
    if found.num_ranks not in (None, ranks):
        raise PlacementError(
            f"{os.fspath(path)} has {found.num_ranks} ranks, and num_ranks is {num_ranks}"
        )
    if num_experts is None:
        num_experts = max(1 + max(int(table.max()) for table in found.tables.values()), 1)
    made = {}
    for layer, table in found.tables.items():
        try:
            made[layer] = Placement(
                table, ranks, num_experts=num_experts, num_ranks_per_node=num_ranks_per_node
            )
        except PlacementError as error:
            raise PlacementError(f"{os.fspath(path)}, layer {layer}: {error}") from None
    return made


def _has_several(path: str | os.PathLike[str]) -> bool:
    content = read_content(path)
    return isinstance(content, dict) and SEVERAL in content
