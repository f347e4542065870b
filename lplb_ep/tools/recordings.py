"""Recordings of real routing: how many tokens picked each expert; files in and out."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..problem import MAX_TOTAL

LAYOUTS = {
    "counts": "[layers, experts] or [batches, layers, experts]",
    "layer-token": "[layers, tokens, k] expert ids",
    "token-layer": "[tokens, layers, k] expert ids (vLLM's routed_experts)",
}


@dataclass(frozen=True)
class Recording:
    """How many tokens picked each expert, batch by batch."""

    counts: torch.Tensor
    """[N, L, E] int64: N batches, L layers, E logical experts."""
    layers: tuple[int, ...]
    """The L layers' numbers in the model. Layers that route nothing (dense ones) are left out."""
    source: str
    """Where the counts come from, in words."""

    @classmethod
    def of(
        cls, counts: torch.Tensor, source: str, *, layers: Sequence[int] | None = None
    ) -> Recording:
        """A recording of `counts` without its idle batches and layers.

        Args:
            counts: [L, E] or [N, L, E] whole numbers of at least 0, of any dtype.
            source: where they come from, in words.
            layers: the L layers' numbers; by default 0, 1, …

        Raises:
            ValueError: another shape, values that are not counts or too large for a solver, or
                nothing but zeros.
        """
        whole = counts.detach().cpu().long()
        if whole.ndim not in (2, 3) or not whole.numel():
            raise ValueError(
                f"{source}: counts must be {LAYOUTS['counts']}; got shape {list(counts.shape)}"
            )
        if (whole < 0).any() or (counts.is_floating_point() and not whole.equal(counts.cpu())):
            raise ValueError(f"{source}: counts must be whole numbers of at least 0")
        if (whole > MAX_TOTAL).any():  # sums could leave 64 bits
            raise ValueError(
                f"{source}: counts must be at most {MAX_TOTAL} each; got {int(whole.max())}"
            )
        whole = whole.reshape(-1, *whole.shape[-2:])
        numbers = torch.arange(whole.shape[1]) if layers is None else torch.tensor(layers)
        if numbers.shape != whole.shape[1:2]:
            raise ValueError(f"{source}: layers must have {whole.shape[1]} numbers")
        batch, layer = whole.sum((1, 2)) > 0, whole.sum((0, 2)) > 0
        if not batch.any():
            raise ValueError(f"{source}: all counts are 0")
        return cls(whole[batch][:, layer], tuple(numbers[layer].tolist()), source)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[2]

    @property
    def load(self) -> torch.Tensor:
        """[L, E] int64: each layer's load over all batches, what a placement can be learned on."""
        return self.counts.sum(0)


def save_recording(path: str | os.PathLike[str], recording: Recording) -> None:
    """Writes a recording for `load_recording`.

    Args:
        path: the file, its name ending in `.npz`.
        recording: what to write.

    Raises:
        ValueError: the name ends in something else.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"path must end in .npz; got {os.fspath(path)}")
    np.savez_compressed(
        path,
        lplb_ep_recording=1,
        counts=recording.counts.numpy(),
        layers=np.array(recording.layers),
        source=recording.source,
    )


def load_recording(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    layout: str | None = None,
    num_experts: int | None = None,
    tokens_per_batch: int | None = None,
) -> Recording:
    """Reads recorded routing.

    These can be read:
    - files of `save_recording`;
    - an array or tensor of counts or of expert ids in `.npy`, `.npz` or `.pt`;
    - SGLang's expert-distribution dumps, one file or a directory with one for each rank. Of
      `stat` and `stat_approx` that is one `logical_count`. Of `per_pass` and `per_token` it is
      records of physical counts, which are added up over the ranks.

    vLLM writes no file of loads. The `routed_experts` of its completions, which its server sends
    as base64 of a `.npy`, are ids in the layout `token-layer`.

    Args:
        path: the file or directory.
        key: which array of an `.npz` that holds several.
        layout: one of `LAYOUTS`. Two dimensions are counts; three need it, for they do not tell.
        num_experts: E, to check counts against; for ids the default is one more than the largest.
        tokens_per_batch: cuts ids into batches of so many tokens, in their order, and drops the
            rest; by default all tokens are one batch.

    Returns:
        The recording, without idle batches and layers. In ids, a layer whose picks are all the
        same expert is idle too: vLLM fills the dense layers with zeros.

    Raises:
        ValueError: what the file holds is none of this; the message names the file, what it holds
            and what was expected.
        OSError: the file cannot be read.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    file = Path(path)
    if file.is_dir() or file.suffix in (".pt", ".pth"):
        content = _load_torch(file)
        if not isinstance(content, torch.Tensor):
            if layout not in (None, "counts") or tokens_per_batch is not None:
                raise ValueError(f"{file}: holds counts; layout and tokens_per_batch are for ids")
            return _checked(Recording.of(*content), num_experts, key)
        arrays = {"": (content.double() if content.is_floating_point() else content).numpy()}
    elif file.suffix in (".npy", ".npz"):
        arrays = _load_numpy(file)
    else:
        raise ValueError(
            f"{file}: a recording is a .npy, .npz or .pt file, or a directory of .pt files"
        )
    if "lplb_ep_recording" in arrays:
        saved = torch.from_numpy(arrays["counts"])
        recording = Recording.of(saved, str(arrays["source"]), layers=arrays["layers"].tolist())
        return _checked(recording, num_experts, key)

    name, array = _pick(file, arrays, key)
    source = f"{file.name}: {name}" if name else file.name
    held = f"got {array.dtype} {list(array.shape)}"
    if array.dtype.kind not in "iuf" or array.ndim not in (2, 3):
        raise ValueError(f"{source}: expected numbers in 2 or 3 dimensions; {held}")
    if layout is None and array.ndim == 3:
        choices = "; ".join(f"{name} = {meaning}" for name, meaning in LAYOUTS.items())
        raise ValueError(f"{source}: layout must say what its 3 dimensions are: {choices}; {held}")
    if layout in (None, "counts"):
        if tokens_per_batch is not None:
            raise ValueError(f"{source}: tokens_per_batch is for ids; these are counts")
        return _checked(Recording.of(torch.from_numpy(array), source), num_experts)
    if array.ndim != 3 or array.dtype.kind == "f":
        raise ValueError(f"{source}: layout {layout} is {LAYOUTS[layout]}, integers; {held}")
    ids = array if layout == "layer-token" else array.transpose(1, 0, 2)
    return _count_ids(ids, source, num_experts, tokens_per_batch)


def _checked(recording: Recording, num_experts: int | None, key: str | None = None) -> Recording:
    if key is not None:
        raise ValueError(f"{recording.source}: no array {key!r}; the file is one recording")
    if num_experts not in (None, recording.num_experts):
        raise ValueError(
            f"{recording.source}: num_experts is {num_experts}, but counts are of "
            f"{recording.num_experts} experts"
        )
    return recording


def _load_numpy(file: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        content = np.load(file, allow_pickle=False)
        return {"": content} if file.suffix == ".npy" else dict(content)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: not a NumPy file of plain arrays: {error}") from error


def _pick(
    file: Path, arrays: Mapping[str, npt.NDArray[Any]], key: str | None
) -> tuple[str, npt.NDArray[Any]]:
    named = ", ".join(f"{name} {list(a.shape)}" for name, a in arrays.items() if name)
    if key is not None:
        if key not in arrays:
            raise ValueError(f"{file}: no array {key!r}; it holds {named or 'one without a name'}")
        return key, arrays[key]
    if len(arrays) != 1:
        raise ValueError(f"{file}: key must name one of its arrays: {named or 'there are none'}")
    return next(iter(arrays.items()))


def _load_torch(file: Path) -> torch.Tensor | tuple[torch.Tensor, str]:
    """The tensor of a `.pt` file, or counts and source of SGLang's dumps (`file` a directory: all
    in it)."""
    paths = sorted(file.glob("*.pt")) if file.is_dir() else [file]
    if not paths:
        raise ValueError(f"{file}: no .pt file in this directory")
    contents = []
    for path in paths:
        try:
            contents.append(torch.load(path, map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: not a file of plain tensors: {reason}") from error
    first = contents[0]
    if isinstance(first, torch.Tensor) and len(contents) == 1:
        return first
    if all(isinstance(c, dict) and "records" in c for c in contents):
        return _sglang_records(file, contents)
    if isinstance(first, dict) and isinstance(first.get("logical_count"), torch.Tensor):
        if len(contents) > 1:
            raise ValueError(f"{file}: each of its {len(paths)} files is a recording; name one")
        return first["logical_count"], f"{file.name}: SGLang logical_count"
    keys = ", ".join(map(str, first)) if isinstance(first, dict) else type(first).__name__
    raise ValueError(
        f"{paths[0]}: expected a tensor, or SGLang's dump with logical_count or records; it holds "
        f"{keys}"
    )


def _sglang_records(file: Path, dumps: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, str]:
    """Adds up the ranks' physical counts of each forward pass, and maps them to logical experts."""
    passes: dict[int, torch.Tensor] = {}
    ranks = set()
    for dump in dumps:
        try:
            table = dump["last_physical_to_logical_map"].long()
            for record in dump["records"]:
                physical = record["global_physical_count"].long()
                logical = physical.new_zeros(physical.shape[0], int(table.max()) + 1)
                logical.scatter_add_(1, table, physical)
                number = record["forward_pass_id"]
                passes[number] = passes.get(number, 0) + logical
                ranks.add(record["rank"])
        except (KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{file}: not SGLang's records: {error!r}") from error
    if not passes:
        raise ValueError(f"{file}: no forward pass was recorded")
    counts = torch.stack([passes[number] for number in sorted(passes)])
    return counts, f"{file.name}: SGLang records of {len(ranks)} rank(s)"


def _count_ids(
    ids: npt.NDArray[Any], source: str, num_experts: int | None, tokens_per_batch: int | None
) -> Recording:
    """ids: [L, T, K] integers, -1 = no pick."""
    num_layers, num_tokens, _ = ids.shape
    size = num_tokens if tokens_per_batch is None else tokens_per_batch
    if not 1 <= size <= num_tokens:
        raise ValueError(f"{source}: tokens_per_batch must be in [1, {num_tokens}]; got {size}")
    ids = ids.astype(np.int64)
    largest = int(ids.max(initial=-1))
    experts = largest + 1 if num_experts is None else num_experts
    if largest >= experts or int(ids.min(initial=0)) < -1:
        raise ValueError(f"{source}: ids must be -1 or in [0, {experts}); got up to {largest}")
    num_batches = num_tokens // size
    counts = np.zeros((num_batches, num_layers, experts), np.int64)
    for layer, picks in enumerate(ids[:, : num_batches * size]):
        if (picks == picks.flat[0]).all():
            continue
        ordered = np.sort(picks, axis=1)
        twice = np.flatnonzero(
            ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)).any(1)
        )
        if twice.size:
            raise ValueError(
                f"{source}: token {twice[0]} of layer {layer} picks an expert twice: "
                f"{picks[twice[0]].tolist()}; are these ids, and is the layout right?"
            )
        batch = np.repeat(np.arange(num_batches), size)[:, None]
        cell = (batch * experts + picks)[picks != -1]
        counts[:, layer] = np.bincount(cell, minlength=num_batches * experts).reshape(-1, experts)
    return Recording.of(torch.from_numpy(counts), source)
