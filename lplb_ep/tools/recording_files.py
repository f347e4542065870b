"""The contents of recordings' files: arrays, and dumps of engines, in one file or several."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..plain_files import read_plain

Array = npt.NDArray[Any]
ENDS = (".npz", ".npy", ".pt", ".pth", ".json", ".csv")
_IN_DIRECTORIES = (".pt", ".npy", ".csv", ".json")
_LEFT_OUT = tuple(end for end in ENDS if end not in _IN_DIRECTORIES)
_COLUMNS = ("layer", "expert", "count")
MAX_EXPERTS = 2**15
"""Of a layer. Larger numbers are no experts: counts of them would take all memory."""
MAX_LAYERS = 2**15
"""Of a model, likewise."""
_MOST_BYTES = 16 * 10**9
"""Of counts."""


class Content(NamedTuple):
    """What a recording's files hold."""

    arrays: dict[str, Array]
    """By name, or one by ""."""
    kind: str = ""
    """What an engine calls them. What has one, and layers with numbers, are counts."""
    layers: tuple[int, ...] | None = None
    """The numbers of the layers, where the files say them."""
    remarks: tuple[str, ...] = ()
    """Remarks on the parts, in sentences."""


def read_arrays(path: Path) -> Content:
    """The arrays of a recording's files.

    Args:
        path: the file, or a directory with the parts of one recording.

    Raises:
        ValueError: the content is none of a recording; or a part comes twice, or is missing.
        OSError: a file cannot be read.
    """
    if path.is_dir():
        return _read_directory(path)
    if path.suffix.lower() not in ENDS:
        is_metrics = path.suffix.lower() == ".jsonl"
        raise ValueError(
            f"{path}: a recording is a directory, or a file that ends in {_or(ENDS)}"
            f"{'; metrics of a run are for lplb-ep report' if is_metrics else ''}"
        )
    content = read_plain(path)
    if path.suffix.lower() in (".pt", ".pth"):
        return _of_torch(path, [path], [content])
    if path.suffix.lower() == ".csv":
        array, layers = _of_csv(path, content)
        return Content({"": array}, layers=layers)
    if path.suffix.lower() == ".json":
        return _of_json(path, content)
    return Content(content if isinstance(content, dict) else {"": content})


def _read_directory(path: Path) -> Content:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in _IN_DIRECTORIES)
    kinds = sorted({file.suffix.lower() for file in files})
    if not files:
        raise ValueError(f"{path}: no {_or(_IN_DIRECTORIES)} file in this directory")
    if len(kinds) > 1:
        raise ValueError(f"{path}: has {' and '.join(kinds)} files; a recording's are of one kind")
    left = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _LEFT_OUT)
    remarks = [f"files in the directory that are no parts are left out: {', '.join(left)}"]
    found = _read_parts(path, files)
    return found._replace(remarks=(*found.remarks, *(remarks if left else [])))


def _read_parts(path: Path, files: Sequence[Path]) -> Content:
    if files[0].suffix.lower() == ".pt":
        return _of_torch(path, files, [read_plain(file) for file in files])
    parts = [read_arrays(file) for file in files]
    arrays = [next(iter(part.arrays.values())) for part in parts]
    for file, array in zip(files, arrays, strict=True):
        if array.ndim not in (2, 3) or array.shape[-2:] != arrays[0].shape[-2:]:
            raise ValueError(
                f"{file}: parts of one recording must be alike, [layers, experts] or [batches, "
                f"layers, experts]; got {list(array.shape)} beside {list(arrays[0].shape)}"
            )
    if len({part.layers for part in parts}) > 1:
        raise ValueError(f"{path}: its files differ in the numbers of their layers")
    batches = [a.reshape(-1, *a.shape[-2:]) for a in arrays]
    whole, remarks = _in_order(path, files, batches)
    return Content({"": whole}, "counts", parts[0].layers, remarks)


def _in_order(
    path: Path, files: Sequence[Path], batches: Sequence[Array]
) -> tuple[Array, tuple[str, ...]]:
    """Puts parts behind one another by the last number of their names; adds up those of ranks.

    Returns:
        [N, L, E], and remarks.
    """
    ranks = [re.search(r"rank[-_.]?(\d+)", file.stem, re.IGNORECASE) for file in files]
    if any(ranks) and not all(ranks):
        odd = files[ranks.index(None)]
        raise ValueError(f"{path}: the names of some files have a rank; {odd.name} has none")
    cells: dict[tuple[int, int], tuple[Path, Array]] = {}
    for number, (file, rank, batch) in enumerate(zip(files, ranks, batches, strict=True)):
        stem = file.stem if rank is None else file.stem[: rank.start()] + file.stem[rank.end() :]
        steps = re.findall(r"\d+", stem)
        step = int(steps[-1]) if steps else (0 if rank else number)
        key = (step, int(rank[1]) if rank else 0)
        if key in cells:
            raise ValueError(f"{path}: {cells[key][0].name} and {file.name} are the same part")
        cells[key] = (file, batch)
    steps_found = sorted({step for step, _ in cells})
    ranks_found = sorted({rank for _, rank in cells})
    remarks = _check_steps(path, steps_found)
    for step in steps_found:
        absent = _first_absent({rank for at, rank in cells if at == step}, ranks_found[-1])
        if absent is not None:
            name = cells[next(key for key in cells if key[0] == step)][0].name
            raise ValueError(f"{path}: rank {absent} is missing beside {name}")
    added = []
    for step in steps_found:
        parts = [cells[step, rank] for rank in ranks_found]
        for file, part in parts:
            if part.shape != parts[0][1].shape:
                raise ValueError(f"{file}: has {len(part)} batches; others have {len(parts[0][1])}")
        added.append(np.sum([part for _, part in parts], axis=0))
    return np.concatenate(added), remarks


def _check_steps(path: Path, steps: Sequence[int]) -> tuple[str, ...]:
    """Refuses a gap: a distance that is a multiple of the most common one.

    Returns:
        A remark where distances differ, and it is not clear that a part is missing.
    """
    distances = np.diff(steps).tolist()
    usual = max(sorted(set(distances)), key=distances.count, default=1)
    for before, distance in zip(steps, distances, strict=False):
        if distance > usual and distance % usual == 0 and distances.count(usual) > 1:
            raise ValueError(
                f"{path}: number {before + usual} is missing between {before} and "
                f"{before + distance}"
            )
    return _remark_on_gaps("numbers of files", steps)


def _remark_on_gaps(what: str, numbers: Sequence[int]) -> tuple[str, ...]:
    """A remark where sorted numbers do not have one distance, by the largest."""
    distances = np.diff(numbers).tolist()
    if len(set(distances)) < 2:
        return ()
    place = distances.index(max(distances))
    return (
        f"the {what} are not evenly spaced: {numbers[place + 1]} follows {numbers[place]}; is a "
        "part missing?",
    )


def _of_json(path: Path, content: Any) -> Content:
    """Nested lists; SGLang's `logical_count`; or the counts of layers by their numbers."""
    if isinstance(content, dict) and "logical_count" in content:
        return Content({"": _array(path, content["logical_count"])}, "SGLang logical_count")
    if isinstance(content, dict):
        if not content or not all(re.fullmatch(r"\d{1,9}", key) for key in content):
            raise ValueError(
                f"{path}: expected lists of counts, logical_count, or layers by number; it has "
                f"{_names(content)}"
            )
        layers = tuple(int(key) for key in content)
        if len(set(layers)) < len(layers):
            raise ValueError(f"{path}: a layer comes twice")
        if max(layers) >= MAX_LAYERS:
            raise ValueError(
                f"{path}: layers must be numbers in [0, {MAX_LAYERS}); got {max(layers)}"
            )
        return Content({"": _array(path, list(content.values()))}, "counts", layers)
    return Content({"": _array(path, content)})


def _of_csv(path: Path, rows: Sequence[Sequence[str]]) -> tuple[Array, tuple[int, ...] | None]:
    """A row of counts for each layer; or a row for each count, with the columns' names above."""
    if not rows:
        raise ValueError(f"{path}: it has no rows")
    head = [cell.lower() for cell in rows[0]]
    named = not all(map(_is_number, rows[0]))
    if named and set(_COLUMNS) <= set(head):
        return _of_cells(path, head, rows[1:])
    experts = head[1:] if head[0] == "layer" else head
    if named and [re.sub(r"\D", "", name) for name in experts] != [*map(str, range(len(experts)))]:
        raise ValueError(
            f"{path}: columns must be layer, expert and count, or e0, e1, … for the experts; got "
            f"{_row(head)}"
        )
    numbers = []
    for line, row in enumerate(rows[int(named) :], 1 + named):
        if len(row) != len(head) or not all(map(_is_number, row)):
            raise ValueError(f"{path}: row {line} must be {len(head)} numbers; got {_row(row)}")
        numbers.append([float(cell) for cell in row])
    table = _array(path, numbers)
    if named and head[0] == "layer" and table.size:
        layers = tuple(
            _number(path, line, "layer", row[0], MAX_LAYERS) for line, row in enumerate(rows[1:], 2)
        )
        if len(set(layers)) < len(layers):
            raise ValueError(f"{path}: a layer comes twice")
        return table[:, 1:], layers
    return table, None


def _of_cells(
    path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[Array, tuple[int, ...]]:
    """Counts by `layer` and `expert`, and by `batch` where there is such a column; else 0."""
    wrong = set(head) - {*_COLUMNS, "batch"}
    if wrong or len(set(head)) < len(head):
        raise ValueError(
            f"{path}: columns must be layer, expert, count and perhaps batch; got {_row(head)}"
        )
    cells: dict[tuple[int, int, int], float] = {}
    for line, row in enumerate(rows, 2):
        if len(row) != len(head):
            raise ValueError(f"{path}: row {line} must have {len(head)} cells; got {_row(row)}")
        cell = dict(zip(head, row, strict=True))
        most = {"batch": 10**9, "layer": MAX_LAYERS, "expert": MAX_EXPERTS}
        place = [_number(path, line, n, cell.get(n, "0"), most[n]) for n in most]
        if not _is_number(cell["count"]):
            raise ValueError(f"{path}: row {line}: count must be a number; got {cell['count']!r}")
        key = (place[0], place[1], place[2])
        if key in cells:
            raise ValueError(
                f"{path}: row {line}: batch {place[0]}, layer {place[1]}, expert {place[2]} comes "
                "twice"
            )
        cells[key] = float(cell["count"])
    if not cells:
        raise ValueError(f"{path}: it has no rows")
    batches, layers = (sorted({key[i] for key in cells}) for i in (0, 1))
    experts = 1 + max(key[2] for key in cells)
    check_size(str(path), len(batches), len(layers), experts)
    counts = np.zeros((len(batches), len(layers), experts))
    for (batch, layer, expert), count in cells.items():
        counts[batches.index(batch), layers.index(layer), expert] = count
    return counts, tuple(layers)


def _of_torch(path: Path, files: Sequence[Path], contents: Sequence[Any]) -> Content:
    """A tensor, or the dumps of SGLang's recorder: `python/sglang/srt/eplb/expert_distribution.py`.

    `stat` and `stat_approx` write one `logical_count` [steps, layers, experts], `per_pass` and
    `per_token` a file of records for each rank.
    """
    first = contents[0]
    if len(files) == 1 and hasattr(first, "numpy"):
        return Content({"": _array(path, first)})
    if all(isinstance(c, dict) and "records" in c for c in contents):
        counts, num_ranks, remarks = _add_records(path, files, contents)
        return Content({"": counts}, f"SGLang records of {num_ranks} rank(s)", remarks=remarks)
    if isinstance(first, dict) and "logical_count" in first:
        if len(files) > 1:
            raise ValueError(f"{path}: each of its {len(files)} files is a recording; name one")
        return Content({"": _array(path, first["logical_count"])}, "SGLang logical_count")
    held = _names(first) if isinstance(first, dict) else f"a {type(first).__name__}"
    raise ValueError(
        f"{files[0]}: expected a tensor, or SGLang's dump with logical_count or records; it holds "
        f"{held}"
    )


def _add_records(
    path: Path, files: Sequence[Path], dumps: Sequence[Mapping[str, Any]]
) -> tuple[Array, int, tuple[str, ...]]:
    """The ranks' physical counts of each pass, by logical experts.

    Returns:
        [passes, layers, experts]; the number of ranks; remarks.

    Raises:
        ValueError: a rank's part of a pass comes twice, or is missing.
    """
    parts: dict[tuple[int, int, str], tuple[Path, Array]] = {}
    for file, dump in zip(files, dumps, strict=True):
        try:
            table = _slots(file, dump, "last_physical_to_logical_map")
            _check_table(file, table)
            for record in dump["records"]:
                physical = _slots(file, record, "global_physical_count")
                if physical.shape != table.shape or (physical < 0).any():
                    raise ValueError(
                        f"{file}: global_physical_count must be numbers of at least 0 for the "
                        f"{list(table.shape)} slots of last_physical_to_logical_map; got "
                        f"{list(physical.shape)}, from {physical.min()}"
                    )
                key = (operator.index(record["forward_pass_id"]), operator.index(record["rank"]))
                part = (*key, str(record.get("gatherer_key", "")))
                if part in parts:
                    raise ValueError(
                        f"{path}: pass {key[0]} of rank {key[1]} comes twice, in "
                        f"{parts[part][0].name} and {file.name}: two runs in one directory?"
                    )
                logical = np.zeros((len(physical), int(table.max()) + 1), np.int64)
                np.add.at(logical, (np.arange(len(physical))[:, None], table), physical)
                parts[part] = (file, logical)
        except (KeyError, AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"{file}: not SGLang's records: {error!r}") from None
    if not parts:
        raise ValueError(f"{path}: no forward pass was recorded")
    passes, ranks = sorted({key[0] for key in parts}), sorted({key[1] for key in parts})
    shapes = {counts.shape for _, counts in parts.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path}: its records are of different models: {sorted(shapes)}")
    there = {key[:2] for key in parts}
    for number in passes:
        absent = _first_absent({rank for at, rank in there if at == number}, ranks[-1])
        if absent is not None:
            raise ValueError(
                f"{path}: pass {number} of rank {absent} is missing; each of the ranks 0 to "
                f"{ranks[-1]} must have recorded the same passes"
            )
    counts = np.zeros((len(passes), *shapes.pop()), np.int64)
    for (number, _, _), (_, logical) in parts.items():
        counts[passes.index(number)] += logical
    return counts, len(ranks), _remark_on_gaps("numbers of passes", passes)


def _first_absent(ranks: Collection[int], last: int) -> int | None:
    """The first of the ranks 0 to `last` that is missing, however large the last one is."""
    return next((rank for rank in range(last + 1) if rank not in ranks), None)


def _slots(file: Path, holder: Any, name: str) -> Array:
    """A tensor [layers, slots] of whole numbers, of a dump or of one of its records.

    Raises:
        ValueError: it is of another kind.
        KeyError: it is missing.
        AttributeError: it is no tensor.
        TypeError: the holder is no dictionary.
    """
    if not isinstance(holder, Mapping):
        raise TypeError(f"a {type(holder).__name__} in the place of a record")
    values = holder[name].detach()
    values = np.asarray(values.double() if values.is_floating_point() else values)
    is_whole = values.dtype.kind in "iuf" and bool((values == np.rint(values)).all())
    if values.ndim != 2 or not values.size or not is_whole:
        raise ValueError(
            f"{file}: {name} must be whole numbers [layers, slots]; got {values.dtype} "
            f"{list(values.shape)}"
        )
    return np.asarray(values.astype(np.int64))


def _check_table(file: Path, table: Array) -> None:
    """Refuses a map of slots whose counts would take all memory.

    Raises:
        ValueError: a slot holds no expert, or one whose number is too large.
    """
    wrong = np.argwhere((table < 0) | (table >= MAX_EXPERTS))
    if len(wrong):
        place = ", ".join(map(str, wrong[0].tolist()))
        raise ValueError(
            f"{file}: last_physical_to_logical_map[{place}] must be an expert in [0, "
            f"{MAX_EXPERTS}); got {table[tuple(wrong[0])]}"
        )


def check_size(where: str, num_batches: int, num_layers: int, num_experts: int) -> None:
    """Refuses counts [N, L, E] that would take more memory than a machine should give.

    Raises:
        ValueError: names their sizes.
    """
    if 8 * num_batches * num_layers * num_experts > _MOST_BYTES:
        raise ValueError(
            f"{where}: {num_batches} batches, {num_layers} layers and {num_experts} experts are "
            f"{8e-9 * num_batches * num_layers * num_experts:.0f} GB of counts, more than "
            f"{_MOST_BYTES // 10**9} GB: take fewer batches"
        )


def _array(path: Path, values: Any) -> Array:
    """Numbers as an array, of a tensor or of nested lists."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # bfloat16 has no NumPy counterpart.
        return np.asarray(values.double() if values.is_floating_point() else values)
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        array = np.asarray(None)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path}: expected numbers in lists of equal length")
    return array


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(path: Path, line: int, name: str, text: str, most: int) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) >= most:
        raise ValueError(
            f"{path}: row {line}: {name} must be a whole number in [0, {most}); got {text!r}"
        )
    return int(text)


def _row(cells: Sequence[str]) -> str:
    return repr(", ".join(cells)[:80])


def _names(content: Mapping[Any, Any]) -> str:
    names = [repr(str(key)) for key in content]
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "") if names else "nothing"


def _or(ends: Sequence[str]) -> str:
    return f"{', '.join(ends[:-1])} or {ends[-1]}"
