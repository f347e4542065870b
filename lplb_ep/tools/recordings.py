"""Recordings of real routing: how many tokens picked each expert; files in and out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..metrics.recording_file import write_recording
from ..plain_files import write_json
from ..problem import MAX_TOTAL
from .recording_files import MAX_EXPERTS, MAX_LAYERS, read_arrays
from .routed_ids import count_ids

LAYOUTS = {
    "counts": "[layers, experts] or [batches, layers, experts]",
    "layer-token": "[layers, tokens, k] expert ids",
    "token-layer": "[tokens, layers, k] expert ids (vLLM's routed_experts)",
}
WRITTEN = (".npz", ".json", ".pt")
"""The ends of names that `save_recording` knows."""
# What a batch of a layer is scaled to at least where it has fractions, to keep the shares.
_WHOLE_ENOUGH = 2**24

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Recording:
    """How many tokens picked each expert, batch by batch."""

    counts: torch.Tensor
    """[N, L, E] int64: N batches, L layers, E logical experts."""
    layers: tuple[int, ...]
    """The L layers' numbers in the model. Layers that route nothing (dense ones) are left out."""
    source: str
    """Where the counts come from, in words."""
    scale: float = 1.0
    """`counts` are this many times what was recorded, rounded. It is not 1 where that has
    fractions, or totals that no solver takes: only shares matter there."""
    num_dropped: int = 0
    """Rows of tokens that were padding, of recorded expert ids."""
    remarks: tuple[str, ...] = ()
    """On the parts of a directory, in sentences."""

    @classmethod
    def of(
        cls,
        counts: npt.ArrayLike | torch.Tensor,
        source: str,
        *,
        layers: Sequence[int] | None = None,
        num_dropped: int = 0,
    ) -> Recording:
        """A recording of `counts` without its idle batches and layers.

        Args:
            counts: [L, E] or [N, L, E] numbers of at least 0, of any dtype: tokens, or means.
            source: where they come from, in words.
            layers: the L layers' numbers; by default 0, 1, …
            num_dropped: rows that are not in `counts`.

        Raises:
            ValueError: another shape, values that are not counts, or nothing but zeros.
        """
        array = _numbers(counts)
        if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "iuf":
            raise ValueError(
                f"{source}: counts must be {LAYOUTS['counts']}; got {array.dtype} "
                f"{list(array.shape)}"
            )
        array = array.reshape(-1, *array.shape[-2:])
        numbers = np.arange(array.shape[1]) if layers is None else np.asarray(layers)
        if numbers.shape != array.shape[1:2]:
            raise ValueError(f"{source}: layers must have {array.shape[1]} numbers")
        if array.shape[2] > MAX_EXPERTS:
            raise ValueError(
                f"{source}: a layer may have {MAX_EXPERTS} experts; got {array.shape[2]}"
            )
        wrong = np.argwhere(~((array >= 0) & np.isfinite(array)))
        if len(wrong):
            batch, layer, expert = wrong[0].tolist()
            raise ValueError(
                f"{source}: counts must be finite numbers of at least 0; got "
                f"{array[batch, layer, expert]} for batch {batch}, layer {numbers[layer]}, "
                f"expert {expert}"
            )
        busy = array > 0
        batches, used = busy.any((1, 2)), busy.any((0, 2))
        if not batches.any():
            raise ValueError(f"{source}: all counts are 0")
        whole, scale = _whole(array[batches][:, used])
        vanished = np.argwhere(~whole.any((0, 2)))
        if len(vanished):
            layer = int(numbers[used][vanished[0, 0]])
            raise ValueError(f"{source}: the counts of layer {layer} vanish beside those of others")
        kept = tuple(numbers[used].tolist())
        return cls(torch.from_numpy(whole), kept, source, scale, num_dropped)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[2]

    @property
    def load(self) -> torch.Tensor:
        """[L, E] int64: each layer's load over all batches, what a placement can be learned on.

        Where the sums are more than a solver takes, they are scaled down: only shares matter."""
        return torch.from_numpy(_whole(self.counts.sum(0).numpy())[0])

    def drawn(self, num_rows: int, seed: int = 0) -> Recording:
        """Batches of another size: each layer's rows are drawn at random with its batch's shares.

        Cells without tokens stay so.

        Args:
            num_rows: tokens of all experts together, in each layer of each batch.
            seed: of the random numbers.

        Raises:
            ValueError: `num_rows` is not in [1, 2**31 - 1].
        """
        if not 1 <= num_rows <= MAX_TOTAL:
            raise ValueError(f"num_rows must be in [1, {MAX_TOTAL}]; got {num_rows}")
        rng = np.random.default_rng(seed)
        counts = self.counts.numpy().astype(np.float64)
        totals = counts.sum(2, keepdims=True)
        shares = np.divide(counts, totals, out=counts, where=totals > 0)
        drawn = rng.multinomial(np.where(totals[..., 0] > 0, num_rows, 0), shares)
        remark = f"{num_rows} rows are drawn at random for each layer of a batch"
        remarks = (*self.remarks, remark)
        return replace(self, counts=torch.from_numpy(drawn), remarks=remarks, scale=1.0)

    def check_like(self, other: Recording) -> None:
        """Refuses another model's recording.

        Raises:
            ValueError: layers or the number of experts differ; says in what.
        """
        if (self.layers, self.num_experts) == (other.layers, other.num_experts):
            return
        said = (
            f"{self.source} has {len(self.layers)} layers of {self.num_experts} experts; "
            f"{other.source} has {len(other.layers)} of {other.num_experts}"
        )
        alone = sorted({*self.layers} ^ {*other.layers})
        if alone:
            said += f"; only one of them has layer {alone[0]}"
        raise ValueError(said)

    def notes(self) -> list[str]:
        """What a reader of the counts must know, each in a sentence."""
        notes = [*self.remarks]
        idle = int((self.counts.sum(2) == 0).sum())
        if idle:
            cells = self.counts.shape[0] * self.counts.shape[1]
            notes.append(
                f"{idle} of {cells} cells (a layer in a batch) have no tokens: no mean or median "
                "has them"
            )
        if self.num_dropped:
            notes.append(f"{self.num_dropped} rows of tokens are padding and left out")
        if self.scale != 1:
            notes.append(f"counts are scaled by {self.scale:.6g}: only shares matter")
        return notes


def save_recording(path: str | os.PathLike[str], recording: Recording) -> None:
    """Writes a recording for `load_recording`.

    Args:
        path: the file. A name that ends in `.npz` makes one that keeps everything. `.json` and
            `.pt` make SGLang's `logical_count` [N, layers, E], which its `--init-expert-location`
            takes (`python/sglang/srt/eplb/expert_location.py`); layers left out are zeros.
        recording: what to write.

    Raises:
        ValueError: the name ends in something else.
        OSError: the file is not writable.
    """
    check_name(path)
    end = Path(path).suffix
    if end == ".npz":
        about = recording.layers, recording.source, recording.scale
        write_recording(path, recording.counts.numpy(), *about)
        return
    counts = recording.counts
    whole = counts.new_zeros(len(counts), max(recording.layers) + 1, recording.num_experts)
    whole[:, list(recording.layers)] = counts
    if end == ".json":
        write_json(path, {"logical_count": whole.tolist()})
    else:
        torch.save({"logical_count": whole}, path)


def check_name(path: str | os.PathLike[str]) -> None:
    """Raises ValueError unless `save_recording` knows the end of the name."""
    if Path(path).suffix not in WRITTEN:
        raise ValueError(f"path must end in {', '.join(WRITTEN)}; got {os.fspath(path)}")


def load_recording(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    layout: str | None = None,
    num_experts: int | None = None,
    tokens_per_batch: int | None = None,
    where_needed: bool = False,
) -> Recording:
    """Reads recorded routing.

    These can be read:
    - files of `save_recording`;
    - an array or tensor of counts or of expert ids in `.npy`, `.npz` or `.pt`;
    - counts as nested lists in `.json`, or by the numbers of layers;
    - a `.csv` of counts, a row for each layer; or with columns layer, expert, count, and batch;
    - a directory of `.npy`, `.json` or `.csv` files, each some batches, in the order of the last
      numbers in their names. Files with `rank0`, `rank1`, … in their names are added up;
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
        where_needed: whether `layout` and `tokens_per_batch` are for files that need them, and
            others pass over them.

    Returns:
        The recording, without idle batches and layers, and without padding (see `count_ids`).

    Raises:
        ValueError: the file holds none of this, or a part of it comes twice or is missing. The
            message names the file, what it holds and what was expected.
        OSError: the file cannot be read.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    file = Path(path)
    content = read_arrays(file)
    arrays = content.arrays
    is_saved = "lplb_ep_recording" in arrays
    if is_saved or content.kind or content.layers is not None:
        is_for_ids = layout not in (None, "counts") or tokens_per_batch is not None
        if is_for_ids and not where_needed:
            raise ValueError(f"{file}: holds counts; layout and tokens_per_batch are for ids")
        if is_saved:
            return _checked(file, _saved(file, arrays), num_experts, key)
        source = f"{file.name}: {content.kind}" if content.kind else file.name
        found = Recording.of(arrays[""], str(file), layers=content.layers)
        found = replace(found, source=source, remarks=content.remarks)
        return _checked(file, found, num_experts, key)

    name, array = _pick(file, arrays, key)
    where = f"{file}: array {name!r}" if name else str(file)
    source = f"{file.name}: {name}" if name else file.name
    held = f"got {array.dtype} {list(array.shape)}"
    if array.dtype.kind not in "iuf" or array.ndim not in (2, 3):
        raise ValueError(f"{where}: expected numbers in 2 or 3 dimensions; {held}")
    if layout is None and array.ndim == 3:
        choices = "; ".join(f"{name} = {meaning}" for name, meaning in LAYOUTS.items())
        raise ValueError(f"{where}: layout must say what its 3 dimensions are: {choices}; {held}")
    if layout in (None, "counts"):
        if tokens_per_batch is not None:
            raise ValueError(f"{where}: tokens_per_batch is for ids; these are counts")
        return _checked(file, replace(Recording.of(array, where), source=source), num_experts)
    if array.ndim != 3 or array.dtype.kind == "f" or not array.size:
        raise ValueError(f"{where}: layout {layout!r} is {LAYOUTS[layout]}, integers; {held}")
    ids = array if layout == "layer-token" else array.transpose(1, 0, 2)
    counted = count_ids(ids, where, num_experts, tokens_per_batch)
    found = Recording.of(counted.counts, where, num_dropped=counted.num_dropped)
    return replace(found, source=source)


def _saved(file: Path, arrays: Mapping[str, Array]) -> Recording:
    try:
        layers, source = arrays["layers"].tolist(), str(arrays["source"])
        scale, counts = float(arrays.get("scale", np.array(1.0))), arrays["counts"]
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{file}: lacks parts of a recording, or has others") from None
    numbers = arrays["layers"]
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or len(set(layers)) < len(layers):
        raise ValueError(f"{file}: layers must be different whole numbers; got {layers}")
    if min(layers, default=0) < 0 or not 0 < scale < np.inf:
        raise ValueError(f"{file}: lacks parts of a recording, or has others")
    if max(layers, default=0) >= MAX_LAYERS:
        raise ValueError(f"{file}: layers must be numbers below {MAX_LAYERS}; got {max(layers)}")
    found = Recording.of(counts, str(file), layers=layers)
    return replace(found, source=f"{file.name}: {source}", scale=scale * found.scale)


def _checked(
    file: Path, recording: Recording, num_experts: int | None, key: str | None = None
) -> Recording:
    if key is not None:
        raise ValueError(f"{file}: no array {key!r}; the file is one recording")
    if num_experts not in (None, recording.num_experts):
        raise ValueError(
            f"{file}: num_experts is {num_experts}, but counts are of "
            f"{recording.num_experts} experts"
        )
    return recording


def _pick(file: Path, arrays: Mapping[str, Array], key: str | None) -> tuple[str, Array]:
    named = ", ".join(f"{name!r} {list(a.shape)}" for name, a in arrays.items() if name)
    if key is not None:
        if key not in arrays:
            raise ValueError(f"{file}: no array {key!r}; it holds {named or 'one without a name'}")
        return key, arrays[key]
    if len(arrays) != 1:
        raise ValueError(f"{file}: key must name one of its arrays: {named or 'there are none'}")
    return next(iter(arrays.items()))


def _numbers(values: npt.ArrayLike | torch.Tensor) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # bfloat16 has no NumPy counterpart.
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _whole(values: Array) -> tuple[npt.NDArray[np.int64], float]:
    """Numbers [.., E] as whole ones whose totals a solver takes, and what they are multiplied by.

    Each total of an [E] is rounded as a whole, by the largest remainders.
    """
    exact = values.astype(np.float64)
    shrink = max(1.0, float(exact.max()) / 2.0**62)  # sums of the largest are no numbers
    exact /= shrink
    most = float(exact.sum(-1).max())
    whole = values.dtype.kind != "f" or bool((exact == np.rint(exact)).all())
    if whole and most <= MAX_TOTAL and shrink == 1:
        return values.astype(np.int64), 1.0
    scale = 1.0 if whole else 2.0 ** max(0, np.ceil(np.log2(_WHOLE_ENOUGH / most)))
    if most * scale > MAX_TOTAL:
        scale = (MAX_TOTAL // 2) / most
    exact *= scale
    out = np.floor(exact).astype(np.int64)
    rest = exact - out
    missing = np.rint(rest.sum(-1)).astype(np.int64)
    place = np.argsort(np.argsort(-rest, axis=-1, kind="stable"), axis=-1)
    return out + (place < missing[..., None]), scale / shrink
