"""Options and outputs that commands share: files, one-line errors, results as JSON."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import CompileError, MissingPackageError

OPTIONS = {
    "num_ranks": "--ranks",
    "num_redundant_per_rank": "--redundant",
    "num_ranks_per_node": "--ranks-per-node",
    "num_groups": "--groups",
    "active_ranks": "--active-ranks",
    "num_guests_per_rank": "--guests",
    "num_experts": "--experts",
    "tokens_per_batch": "--tokens-per-batch",
    "key": "--key",
    "layout": "--layout",
    "max_changes": "--max-changes",
    "fixed_homes": "--fixed-homes",
    "start": "--start",
    "drift": "--drift",
    "percentile": "--percentile",
    "refresh": "--refresh",
    "seed": "--seed",
    "time_budget_s": "--seconds",
    "guest_tolerance": "--guest-tolerance",
    "guest_min_tokens": "--guest-min-tokens",
    "LPLB_EP_GUEST_TOLERANCE": "--guest-tolerance",
    "LPLB_EP_GUEST_MIN_TOKENS": "--guest-min-tokens",
    "LPLB_EP_REFRESH": "--refresh",
    "LPLB_EP_REFRESH_THRESHOLD": "--threshold",
    "LPLB_EP_REFRESH_CHANGES": "--changes",
    "LPLB_EP_REFRESH_SECONDS": "--seconds",
}
"""The library's arguments and settings, and the options for them."""


PICTURES = (".png", ".svg", ".pdf")
"""The ends of names of pictures."""


def add_outputs(parser: argparse.ArgumentParser, drawn: str) -> None:
    """Adds the files for programs, for spreadsheets and for people."""
    parser.add_argument("--json", metavar="PATH", help="write all numbers")
    parser.add_argument("--csv", metavar="PATH", help="write a row for each batch and layer")
    add_picture(parser, drawn)


def add_picture(parser: argparse.ArgumentParser, drawn: str) -> None:
    """Adds the file of a picture."""
    parser.add_argument(
        "--picture", "--png", metavar="PATH", help=f"draw {drawn}: .png, .svg or .pdf"
    )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with status 2 and one line for a mistake of the caller."""
    try:
        yield
    except BrokenPipeError:  # not a mistake: `main` ends quietly
        raise
    except (OSError, MemoryError, ValueError, MissingPackageError, CompileError) as error:
        print(f"lplb-ep: error: {in_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def in_one_line(error: BaseException) -> str:
    """What a mistake of the caller is, without Python's own words for it."""
    if isinstance(error, MemoryError):
        return f"the memory does not suffice: {error}".rstrip(": ")
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return str(error)


@contextlib.contextmanager
def as_typed(options: Mapping[str, str], *texts: str) -> Iterator[None]:
    """Puts the options that the caller typed in place of the library's arguments in an error.

    Args:
        options: by arguments; where there are none, nothing is replaced.
        texts: what stays as it is: names of files, and what files say of themselves. Further words
            of files are in quotes in the library's messages, and these stay, too.
    """
    try:
        yield
    except ValueError as error:
        if not options:
            raise
        kept = [re.escape(text) for text in sorted(filter(None, texts), key=len, reverse=True)]
        kept += [r"'(?:[^'\\]|\\.)*'", r'"(?:[^"\\]|\\.)*"']
        arguments = rf"(?<![\w./'-])({'|'.join(options)})(?![\w./'-])"
        said = re.sub(
            rf"(?<!\w)(?:{'|'.join(kept)})(?!\w)|{arguments}",
            lambda match: options[match[1]] if match[1] else match[0],
            str(error),
        )
        raise ValueError(said) from None


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses files that could not be written, before the work is done.

    Raises:
        ValueError: the directory does not exist or is not writable, or the name is unfit. Or the
            file would replace one that the command reads or writes. The option is named.
    """
    picture = getattr(args, "picture", None)
    paths = {f"--{name}": getattr(args, name, None) for name in ("json", "csv", "picture")}
    used = _inputs(args)
    for option, path in {**paths, "-o": getattr(args, "output", None)}.items():
        if path is None:
            continue
        file = Path(path)
        if not path:
            raise ValueError(f"{option} must be a file to write; got ''")
        if not file.parent.is_dir():
            raise ValueError(f"{option} {path}: there is no directory {file.parent}")
        if file.is_dir():
            raise ValueError(f"{option} {path} is a directory, not a file to write")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ValueError(f"{option} {path} cannot be written: permission denied")
        if file.is_file() or not file.exists():  # a device may be written by several
            other = used.setdefault(os.path.realpath(path), option)
            if other != option:
                raise ValueError(f"{option} {path} would replace the file of {other}")
    if picture and Path(picture).suffix.lower() not in PICTURES:
        raise ValueError(f"--picture must end in {', '.join(PICTURES)}; got {picture}")


def _inputs(args: argparse.Namespace) -> dict[str, str]:
    """The files that a command reads, and their options. `place` may replace that of --start."""
    found = {}
    for name in ("file", "placement", "learn_from", "then", "cost"):
        said = getattr(args, name, None) or []
        for text in [said] if isinstance(said, str) else said:
            option = "the recording" if name == "file" else f"--{name.replace('_', '-')}"
            for path in (text, text.rpartition(":")[0]):  # FILE or FILE:KEY
                if path and os.path.isfile(path):
                    found[os.path.realpath(path)] = option
    return found


def check_least(args: argparse.Namespace, *names: str) -> None:
    """Refuses options below 0.

    Raises:
        ValueError: one of the options is below 0; it is named.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0; got {value}")


def write_csv(path: str | None, rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table, its head first, if `--csv` asks for it."""
    if path:
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)


def write_json(path: str | None, content: Mapping[str, Any]) -> None:
    """Writes a result for programs, if `--json` asks for it."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
