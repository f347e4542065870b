"""Files of plain values: JSON, YAML, CSV, NumPy's and torch's. Each mistake is one clear line."""

from __future__ import annotations

import csv
import json
import os
import pickle
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

# What parsers raise on bytes that are not of their format, found with damaged files of each kind.
# It is everything but what says that the program itself is at fault or is to end.
_OF_PARSERS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.PickleError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_plain(path: str | os.PathLike[str]) -> Any:
    """What a file holds, by the end of its name.

    Returns:
        Of `.json` and `.yaml` (or `.yml`): lists, dictionaries, numbers and texts. Of `.npy`: an
        array. Of `.npz`: arrays by name. Of `.pt` (or `.pth`): what `torch.save` wrote, of tensors
        and plain values only. Of `.csv`: its rows as lists of texts.

    Raises:
        ValueError: the name has another end, the content is not of that kind, or it names a key
            twice.
        OSError: the file cannot be read.
    """
    file = Path(path)
    if file.suffix.lower() not in _KINDS:
        raise ValueError(f"{file}: the name must end in one of {', '.join(_KINDS)}")
    return _read(file, *_KINDS[file.suffix.lower()])


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds, whatever its name.

    Raises:
        ValueError: the content is no JSON, or it names a key twice.
        OSError: the file cannot be read.
    """
    return _read(Path(path), *_JSON)


def read_json_lines(path: str | os.PathLike[str]) -> tuple[list[Any], bool]:
    """What a file of JSON lines holds, whatever its name.

    Returns:
        The value of each line; and whether a last one is left out, of which only a part is there.

    Raises:
        ValueError: the content is no JSON lines, or one of them names a key twice.
        OSError: the file cannot be read.
    """
    values, is_cut = _read(Path(path), "a file of JSON lines", _read_json_lines, b"{")
    return values, is_cut


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes lists, dictionaries, numbers and texts as JSON.

    Raises:
        OSError: the file is not writable.
    """
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)


def _read(
    file: Path, what: str, read: Callable[[Path], Any], beginnings: bytes | tuple[bytes, ...]
) -> Any:
    with open(file, "rb") as content:  # what the system refuses is not the content's fault
        head = content.read(16)
    if not head.startswith(beginnings):
        began = repr(head.decode()) if head.isascii() else "other bytes"
        raise ValueError(
            f"{file} is not {what}: it {f'begins with {began}' if head else 'is empty'}"
        )
    try:
        with warnings.catch_warnings():  # a mistake is one line
            warnings.simplefilter("ignore")
            return read(file)
    except _ContentError as error:
        raise ValueError(f"{file} is not {what}: {error}") from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"{file} is not {what}: it has offsets that lie outside of it") from None
    except _OF_PARSERS:
        raise ValueError(f"{file} is not {what}: it is damaged, or has more than that") from None


class _ContentError(Exception):
    """A mistake in a content, in words that need no others."""


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dictionary of pairs, none of which may say again what another says."""
    content: dict[Any, Any] = {}
    for key, value in pairs:
        if key in content:
            raise _ContentError(f"it names {key!r} twice")
        content[key] = value
    return content


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise _ContentError(f"byte {error.start} is no UTF-8") from None
    except json.JSONDecodeError as error:
        raise _ContentError(str(error)) from None


def _read_json_lines(file: Path) -> tuple[list[Any], bool]:
    values: list[Any] = []
    *lines, rest = file.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, *([rest] if rest else [])], 1):
        try:
            values.append(json.loads(line.decode(), object_pairs_hook=_once))
        except ValueError as error:
            if number > len(lines):
                return values, True
            said = "no UTF-8" if isinstance(error, UnicodeDecodeError) else "a number is too long"
            if isinstance(error, json.JSONDecodeError):
                said = f"{error.msg}, at character {error.colno}"
            raise _ContentError(f"line {number}: {said}") from None
        except _ContentError as error:
            raise _ContentError(f"line {number}: {error}") from None
    return values, False


def _read_yaml(file: Path) -> Any:
    import yaml

    # The one in C is ten times as fast; not every build has it.
    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        return _once(
            (loader.construct_object(k), loader.construct_object(v, deep=True))
            for k, v in node.value
        )

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(file.read_bytes(), Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise _ContentError(f"{where}{' '.join(problem.split())}") from None


def _read_csv(file: Path) -> list[list[str]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        try:
            return [[cell.strip() for cell in row] for row in csv.reader(lines, strict=True) if row]
        except csv.Error as error:
            raise _ContentError(str(error)) from None
        except UnicodeDecodeError as error:
            raise _ContentError(f"byte {error.start} is no UTF-8") from None


def _read_npy(file: Path) -> Any:
    import numpy as np

    return np.load(file, allow_pickle=False)


def _read_npz(file: Path) -> Any:
    import numpy as np

    _check_archive(file)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_torch(file: Path) -> Any:
    import torch

    if zipfile.is_zipfile(file):
        _check_archive(file)
    content = torch.load(file, map_location="cpu", weights_only=True)
    parts, seen = [content], {id(content)}
    while parts:
        part = parts.pop()
        inner: Collection[Any] = ()
        if isinstance(part, torch.Tensor):
            _check_tensor(part)
        elif isinstance(part, Mapping):
            inner = part.values()
        elif isinstance(part, list | tuple):
            inner = part
        parts += [value for value in inner if id(value) not in seen]  # a list may hold itself
        seen.update(map(id, inner))
    return content


def _check_tensor(tensor: Any) -> None:
    """Refuses a tensor that has no array of its numbers."""
    kinds = {
        "sparse": str(tensor.layout) != "torch.strided",
        "nested": tensor.is_nested,
        "quantized": tensor.is_quantized,
        "without data": tensor.device.type != "cpu",
    }
    odd = [kind for kind, is_so in kinds.items() if is_so]
    if odd:
        raise _ContentError(f"it has a tensor that is {odd[0]}")


def _check_archive(file: Path) -> None:
    """Compares the parts of an archive with their checksums."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise _ContentError(f"its part {damaged!r} is damaged")


_JSON = ("JSON", _read_json, b"")
_YAML = ("YAML", _read_yaml, b"")
_TORCH = ("a file of plain tensors", _read_torch, (b"PK", b"\x80"))
# The ends of names; what the file then is, who reads it, and how it begins.
_KINDS: dict[str, tuple[str, Callable[[Path], Any], bytes | tuple[bytes, ...]]] = {
    ".json": _JSON,
    ".yaml": _YAML,
    ".yml": _YAML,
    ".csv": ("a table of comma-separated values", _read_csv, b""),
    ".npy": ("a NumPy file of plain arrays", _read_npy, b"\x93NUMPY"),
    ".npz": ("a NumPy file of plain arrays", _read_npz, b"PK"),
    ".pt": _TORCH,
    ".pth": _TORCH,
}
