"""Files of serving engines: their tables of slots, read and written.

The formats are those that the engines' own code reads, at the places named here:

- SGLang, `--init-expert-location`: `python/sglang/srt/eplb/expert_location.py`,
  `compute_initial_expert_location_metadata`. JSON or `torch.save` of `physical_to_logical_map`
  [layers, P], a row for each layer of the model, dense ones among them.
- TensorRT-LLM, `moe_config.load_balancer`: `tensorrt_llm/llmapi/llm_args.py`,
  `MoeLoadBalancerConfig`. YAML as `examples/wide_ep/ep_load_balancer/generate_eplb_config.py`
  writes it: `initial_global_assignments`, P experts by the number of each MoE layer.
- vllm-ascend, `expert_map_path`: `vllm_ascend/eplb/adaptor/vllm_adaptor.py`,
  `_expert_file_to_tensor`. JSON: a `layer_list` of `device_list`s of `device_expert`.
- vLLM: `vllm/distributed/eplb/eplb_state.py`, `physical_to_logical_map` [MoE layers, P]. vLLM reads
  no file of it: this is the array by itself, as `.npy` or of `torch.save`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import PlacementError
from ..plain_files import read_plain, write_json

Table = npt.NDArray[np.int64]

FORMATS: dict[str, tuple[str, ...]] = {
    "lplb-ep": (".json",),
    "sglang": (".json", ".pt"),
    "tensorrt-llm": (".yaml", ".yml"),
    "vllm-ascend": (".json",),
    "vllm": (".npy", ".pt"),
}
"""The ends of names that a file of each format may have."""
NO_PLACEMENTS = (".npz", ".csv", ".html")
"""The ends of names of other files: recordings, tables and pages."""
_NAMES = {
    "sglang": "SGLang's physical_to_logical_map",
    "tensorrt-llm": "TensorRT-LLM's initial_global_assignments",
    "vllm-ascend": "vllm-ascend's layer_list",
    "vllm": "vLLM's physical_to_logical_map",
}
_BY_SUFFIX = {".yaml": "tensorrt-llm", ".yml": "tensorrt-llm", ".pt": "sglang", ".npy": "vllm"}


class EngineTables(NamedTuple):
    """The placements of an engine's file."""

    kind: str
    """Whose it is and what, in words."""
    tables: dict[int, Table]
    """[P] int64 by layer: the expert in each slot, rank-major, -1 = unused."""
    in_model: bool
    """Whether layers have their numbers in the model. Else MoE layers are counted from 0."""
    num_ranks: int | None
    """R, where the file says it."""


def format_of(path: str | os.PathLike[str], chosen: str | None = None) -> str:
    """The format of a file to write: as chosen, or by the end of its name.

    Raises:
        PlacementError: there is no such format, its files end otherwise, or files of placements
            never end so.
    """
    end = Path(path).suffix.lower()
    if chosen is None:
        kind = _BY_SUFFIX.get(end, "lplb-ep")
        if end in NO_PLACEMENTS or (kind == "lplb-ep" and is_named_as_engine_file(path)):
            ends = ", ".join(sorted({end for ends in FORMATS.values() for end in ends}))
            raise PlacementError(
                f"a file of placements must end in one of {ends}; got {os.fspath(path)}"
            )
        return kind
    if chosen not in FORMATS:
        raise PlacementError(f"format must be one of {', '.join(FORMATS)}; got {chosen!r}")
    if end not in FORMATS[chosen]:
        raise PlacementError(
            f"a file of {chosen} must end in {' or '.join(FORMATS[chosen])}; got {os.fspath(path)}"
        )
    return chosen


def is_named_as_engine_file(path: str | os.PathLike[str]) -> bool:
    """Whether the end of a file's name says that it is one of an engine."""
    return Path(path).suffix.lower() in (".yaml", ".yml", ".pt", ".pth", ".npy")


def is_content_of_engine(content: Any) -> bool:
    """Whether a JSON file's content is that of an engine's file."""
    named = ("physical_to_logical_map", "logical_count", "layer_list", "initial_global_assignments")
    return isinstance(content, dict) and any(name in content for name in named)


def read_tables(path: str | os.PathLike[str]) -> EngineTables:
    """Reads an engine's file, of whichever kind.

    Raises:
        PlacementError: it is none, or a part of it comes twice, is missing or does not fit.
        OSError: the file cannot be read.
    """
    where = os.fspath(path)
    try:
        content = read_plain(path)
    except ValueError as error:
        raise PlacementError(str(error)) from None
    if not isinstance(content, Mapping):
        return _of_vllm(where, content)
    content = _within_config(content)
    if "physical_to_logical_map" in content:
        others = [str(key) for key in content if key != "physical_to_logical_map"]
        if others:
            raise PlacementError(f"{where}: SGLang takes no {others[0]!r} beside its map")
        rows = _rows(where, content["physical_to_logical_map"])
        return EngineTables(_NAMES["sglang"], dict(enumerate(rows)), True, None)
    if "initial_global_assignments" in content:
        return _of_tensorrt_llm(where, content)
    if "layer_list" in content:
        return _of_vllm_ascend(where, content)
    if "logical_count" in content:
        raise PlacementError(
            f"{where} has loads (logical_count) and no placement: lplb-ep place makes one of them"
        )
    keys = ", ".join(repr(str(key)) for key in list(content)[:4])
    raise PlacementError(
        f"{where} is no placement: expected {', '.join(_NAMES.values())} or a file of lplb-ep; it "
        f"has {keys or 'nothing'}"
    )


def write_tables(
    path: str | os.PathLike[str],
    kind: str,
    tables: Mapping[int, Sequence[int]],
    num_ranks: int,
    num_experts: int,
) -> None:
    """Writes placements for an engine.

    Args:
        path: the file, which is replaced.
        kind: one of `FORMATS`, but for the first.
        tables: [P] by layer, the expert in each slot, rank-major.
        num_ranks: R, which divides P.
        num_experts: E.

    Raises:
        PlacementError: a slot is empty, layers differ in P, or a layer is missing between others.
        OSError: the file is not writable.
    """
    layers = sorted(tables)
    rows = [list(map(int, tables[layer])) for layer in layers]
    _check_sizes(f"a file for {kind}", rows)
    for layer, row in zip(layers, rows, strict=True):
        if -1 in row:
            raise PlacementError(
                f"layer {layer}: slot {row.index(-1)} is empty, and {_NAMES[kind]} fills every slot"
            )
    check_layers(kind, layers)
    if kind == "sglang":
        dense = [slot % num_experts for slot in range(len(rows[0]))]  # as SGLang's init_trivial
        every = [dense] * (layers[-1] + 1)
        for layer, row in zip(layers, rows, strict=True):
            every[layer] = row
        _write_map(path, every)
    elif kind == "tensorrt-llm":
        lines = [f"  {layer}: {row}" for layer, row in zip(layers, rows, strict=True)]
        head = ["initial_global_assignments:", *lines, "layer_updates_per_iter: 0"]
        Path(path).write_text("\n".join([*head, f"num_slots: {len(rows[0])}", ""]), "utf-8")
    elif kind == "vllm-ascend":
        write_json(path, _layer_list(rows, num_ranks))
    elif Path(path).suffix.lower() == ".npy":
        np.save(path, np.array(rows, np.int64))
    else:
        import torch

        torch.save(torch.tensor(rows), path)


def _write_map(path: str | os.PathLike[str], rows: Sequence[Sequence[int]]) -> None:
    # SGLang passes what else the file has on as arguments, and fails.
    if Path(path).suffix.lower() == ".pt":
        import torch

        torch.save({"physical_to_logical_map": torch.tensor(rows)}, path)
    else:
        write_json(path, {"physical_to_logical_map": rows})


def _layer_list(rows: Sequence[Sequence[int]], num_ranks: int) -> dict[str, Any]:
    layers = []
    for number, row in enumerate(rows):
        slots = len(row) // num_ranks
        devices = [
            {"device_id": rank, "device_expert": row[rank * slots : (rank + 1) * slots]}
            for rank in range(num_ranks)
        ]
        layers.append({"layer_id": number, "device_count": num_ranks, "device_list": devices})
    return {"moe_layer_count": len(rows), "layer_list": layers}


def _within_config(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The load balancer's part of TensorRT-LLM's whole configuration, or the content itself."""
    part: Any = content
    for key in ("moe_config", "load_balancer"):
        part = part.get(key) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else content


def _of_vllm(where: str, content: Any) -> EngineTables:
    rows = _rows(where, content)
    return EngineTables(_NAMES["vllm"], dict(enumerate(rows)), False, None)


def _of_tensorrt_llm(where: str, content: Mapping[str, Any]) -> EngineTables:
    layers = content["initial_global_assignments"]
    if not isinstance(layers, Mapping) or not layers:
        raise PlacementError(f"{where}: initial_global_assignments must be experts by layer")
    tables = {}
    for layer, row in layers.items():
        # JSON has no other keys than texts.
        number = int(layer) if isinstance(layer, str) and re.fullmatch(r"\d{1,9}", layer) else layer
        if not _is_int(number) or number < 0 or number in tables:
            raise PlacementError(f"{where}: layers must be different numbers; got {layer!r}")
        tables[number] = _row(f"{where}, layer {number}", row)
    _check_sizes(where, list(tables.values()))
    slots = content.get("num_slots")
    if slots is not None and (not _is_int(slots) or slots != len(next(iter(tables.values())))):
        raise PlacementError(
            f"{where}: num_slots is {slots!r}, and layers have {len(next(iter(tables.values())))}"
        )
    return EngineTables(_NAMES["tensorrt-llm"], tables, True, None)


def _of_vllm_ascend(where: str, content: Mapping[str, Any]) -> EngineTables:
    layers = content["layer_list"]
    if not isinstance(layers, list) or not layers:
        raise PlacementError(f"{where}: layer_list must be a list of layers")
    _check_number(where, "moe_layer_count", content.get("moe_layer_count"), len(layers))
    tables, ranks = {}, set()
    for number, layer in enumerate(layers):
        place = f"{where}, layer {number}"
        devices = layer.get("device_list") if isinstance(layer, Mapping) else None
        if not isinstance(devices, list) or not devices:
            raise PlacementError(f"{place}: device_list must be a list of devices")
        _check_number(place, "layer_id", layer.get("layer_id"), number)
        _check_number(place, "device_count", layer.get("device_count"), len(devices))
        rows = []
        for rank, device in enumerate(devices):
            if not isinstance(device, Mapping) or "device_expert" not in device:
                raise PlacementError(f"{place}: device {rank} has no device_expert")
            _check_number(place, "device_id", device.get("device_id"), rank)
            rows.append(_row(f"{place}, device {rank}", device["device_expert"]))
        _check_sizes(place, rows)
        tables[number] = np.concatenate(rows)
        ranks.add(len(devices))
    if len(ranks) > 1:
        raise PlacementError(f"{where}: layers differ in the number of devices: {sorted(ranks)}")
    _check_sizes(where, list(tables.values()))
    return EngineTables(_NAMES["vllm-ascend"], tables, False, ranks.pop())


def _rows(where: str, values: Any) -> list[Table]:
    """The rows of a table [layers, P] of integers: a tensor, an array, or lists."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = np.asarray(values.double() if values.is_floating_point() else values)
    if isinstance(values, np.ndarray):
        if values.ndim != 2 or values.dtype.kind not in "iu" or not values.size:
            raise PlacementError(
                f"{where}: expected integers [layers, slots]; got {values.dtype} "
                f"{list(values.shape)}"
            )
        values = values.tolist()
    if not isinstance(values, list) or not values:
        raise PlacementError(f"{where}: expected integers [layers, slots]")
    rows = [_row(f"{where}, layer {layer}", row) for layer, row in enumerate(values)]
    _check_sizes(where, rows)
    return rows


def _row(where: str, values: Any) -> Table:
    """The experts of a row: whole numbers from -1."""
    if not isinstance(values, list) or not values or not all(map(_is_int, values)):
        raise PlacementError(f"{where}: slots must be a list of experts' numbers")
    wrong = [value for value in values if not -1 <= value < 2**31]
    if wrong:
        raise PlacementError(f"{where}: slots must hold experts or -1; got {wrong[0]}")
    return np.array(values, np.int64)


def _check_sizes(where: str, rows: Sequence[Any]) -> None:
    sizes = sorted({len(row) for row in rows})
    if len(sizes) > 1:
        raise PlacementError(f"{where}: all must have as many slots; got {sizes}")


def check_layers(kind: str, layers: Sequence[int]) -> None:
    """Checks that a file of this format can have these layers.

    Args:
        kind: one of `FORMATS`.
        layers: their numbers, in order.

    Raises:
        PlacementError: the format counts layers, and one is missing between others.
    """
    for before, after in itertools.pairwise(layers):
        if kind in ("vllm", "vllm-ascend") and after != before + 1:
            raise PlacementError(
                f"a file of {kind} counts layers, and layer {before + 1} is missing between "
                f"{before} and {after}: those behind it would be taken for others"
            )


def _check_number(where: str, name: str, found: Any, expected: int) -> None:
    """Of a number that may be left out."""
    if found is not None and (not _is_int(found) or found != expected):
        raise PlacementError(f"{where}: {name} must be {expected}; got {found!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
