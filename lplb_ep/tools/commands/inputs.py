"""Recordings and placements that the options of `replay` and `place` name."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import OPTIONS, as_typed

if TYPE_CHECKING:
    from ...placement.table import Placement
    from ..recordings import Recording

_SILENCE_S = 10


def add_recording(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the file to read and how to read it."""
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs=None if required else "?",
        help="a recording: .npz, .npy, .pt, .json, .csv or a directory of its parts",
    )
    parser.add_argument("--key", help="which array of an .npz that holds several")
    parser.add_argument(
        "--layout", help="what three dimensions are: counts, layer-token or token-layer"
    )
    parser.add_argument("--experts", type=int, metavar="E", help="the number of logical experts")
    parser.add_argument(
        "--first-layer",
        type=int,
        default=0,
        metavar="N",
        help="the number in the model of the first layer in FILE; 0",
    )
    parser.add_argument(
        "--tokens-per-batch", type=int, metavar="T", help="cut expert ids into batches of T tokens"
    )


def read_recording(args: argparse.Namespace) -> Recording:
    """The recording that the arguments of `add_recording` name."""
    from ..recording_files import MAX_LAYERS
    from ..recordings import load_recording

    if not args.file:
        raise ValueError("FILE must be a recording; got ''")
    if not 0 <= args.first_layer < MAX_LAYERS:
        raise ValueError(f"--first-layer must be in [0, {MAX_LAYERS}); got {args.first_layer}")
    with as_typed(OPTIONS, args.file):
        recording = load_recording(
            args.file,
            key=args.key,
            layout=args.layout,
            num_experts=args.experts,
            tokens_per_batch=args.tokens_per_batch,
        )
    return _numbered(recording, args)


def _numbered(recording: Recording, args: argparse.Namespace) -> Recording:
    """With the layers' numbers in the model."""
    layers = tuple(layer + args.first_layer for layer in recording.layers)
    return dataclasses.replace(recording, layers=layers)


def add_guests(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the number of guest slots; `default` says what holds without it."""
    parser.add_argument(
        "--guests", type=int, metavar="G", help=f"guest slots on each rank; default: {default}"
    )


def check_guests(args: argparse.Namespace) -> None:
    """Refuses numbers of guest slots that would take all memory.

    Raises:
        ValueError: there are more than any rank has experts.
    """
    from ..recording_files import MAX_EXPERTS

    if args.guests is not None and args.guests > MAX_EXPERTS:
        raise ValueError(f"--guests must be at most {MAX_EXPERTS}; got {args.guests}")


def add_active_ranks(parser: argparse.ArgumentParser) -> None:
    """Adds the ranks that take part."""
    parser.add_argument(
        "--active-ranks",
        type=_ranks,
        metavar="RANKS",
        help="that take part, such as 0-5,7; the slots of others stay empty; default: all",
    )


def _ranks(text: str) -> list[int]:
    """Ranks and ranges of them, with commas between."""
    ranks: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if not ends:
            raise argparse.ArgumentTypeError(f"must be ranks such as 0-5,7; got {text!r}")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"{part.strip()} ends before it begins; got {text!r}")
        ranks += range(first, last + 1)
    return ranks


def read_another(
    args: argparse.Namespace,
    option: str,
    said: str,
    layout: str | None,
    tokens_per_batch: int | None = None,
) -> Recording:
    """The recording that an option names: a file, a file and its key, or a key of `args.file`."""
    from ..recording_files import ENDS
    from ..recordings import load_recording

    path, _, key = said.rpartition(":")
    named: tuple[str, str | None] = (args.file, said)
    if Path(said).exists():
        named = (said, args.key if said.endswith(".npz") else None)
    elif path and Path(path).exists():
        named = (path, key)
    elif not args.file.endswith(".npz") or said.lower().endswith(ENDS):
        raise ValueError(f"{option}: there is no file {said}")
    options = {**OPTIONS, "key": f"{option} FILE:KEY"}
    options["layout"] = "--learn-layout" if option == "--learn-from" else "--layout"
    try:
        with as_typed(options, *filter(None, named)):
            another = load_recording(
                named[0],
                key=named[1],
                layout=layout,
                num_experts=args.experts,
                tokens_per_batch=tokens_per_batch,
                where_needed=args.learn_layout is None or option != "--learn-from",
            )
    except ValueError as error:
        if named != (args.file, said):
            raise
        raise ValueError(f"{option} {said} names no file; {error}") from None
    return _numbered(another, args)


def read_placements(path: str, args: argparse.Namespace, recording: Recording) -> list[Placement]:
    """The placements of a recording's layers, from a file of ours or of a serving engine."""
    from ...placement.layer_files import engine_of, placements_of_layers

    shape = {}
    if engine_of(path) is not None:  # ours have a shape of their own
        shape = {"num_ranks": args.ranks, "num_ranks_per_node": args.ranks_per_node}
        shape["num_experts"] = recording.num_experts
    # A wrong field of our own file is no option's fault.
    with as_typed(OPTIONS if shape else {}, path):
        found = placements_of_layers(path, recording.layers, **shape)
    for number, placement in zip(recording.layers, found, strict=True):
        if placement.num_experts != recording.num_experts:
            raise ValueError(
                f"{path} has {placement.num_experts} experts in layer {number}, and {args.file} "
                f"{recording.num_experts}"
            )
    return found


def check_shape(path: str, placements: Iterable[Placement], args: argparse.Namespace) -> None:
    """Refuses options that say another shape than the placements of a file have.

    Raises:
        ValueError: names the option and both numbers.
    """
    for placement in placements:
        active = placement.active_ranks
        for name, found in (
            ("experts", placement.num_experts),
            ("ranks", placement.num_ranks),
            ("ranks_per_node", placement.num_ranks_per_node),
            ("redundant", placement.num_resident_slots - -(-placement.num_experts // active.size)),
            ("active_ranks", active.tolist()),
        ):
            said = getattr(args, name)
            said = sorted({*said}) if isinstance(said, list) else said
            if said not in (None, found):
                raise ValueError(
                    f"--{name.replace('_', '-')} is {said}, and the placement in {path} has {found}"
                )


def notes_on_layers(path: str, recording: Recording) -> list[str]:
    """What a reader must know of a file of placements that has more layers than the recording."""
    from ...placement.layer_files import numbers_of_layers

    further = sorted({*numbers_of_layers(path)} - {*recording.layers})
    if not further:
        return []
    shown = ", ".join(map(str, further[:6])) + (", …" if len(further) > 6 else "")
    first, last = recording.layers[0], recording.layers[-1]
    return [
        f"{path} has {len(further)} layer(s) that the recording has not ({shown}); its layers "
        f"{first} to {last} are taken: --first-layer says another first one"
    ]


def learn_for_lp(
    learned: Recording, start: Sequence[Placement] | None = None, **options: Any
) -> list[Placement]:
    """`Placement.for_lp` of each layer, the layers counted on a terminal."""
    from ...placement.table import Placement

    placements: list[Placement] = []
    progress, names = Progress("placing"), dict(OPTIONS)
    if options["num_redundant_per_rank"] is None:
        names["num_redundant_per_rank"] = "the number of redundant slots of --start"
    for layer in range(len(learned.layers)):
        with as_typed(names):
            before = None if start is None else start[layer]
            placements.append(Placement.for_lp(learned.counts[:, layer], start=before, **options))
        progress(layer + 1, len(learned.layers))
    return placements


def print_notes(notes: Iterable[str]) -> None:
    """Prints what a reader of the numbers must know."""
    for note in notes:
        print(f"note       {note}")


class Progress:
    """Counts layers on stderr: on a terminal each, elsewhere every ten seconds.

    Args:
        what: the word for what happens to them.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._last = time.monotonic()

    def __call__(self, done: int, num_layers: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == num_layers else ""
            print(
                f"\r{self._what} layer {done} of {num_layers}", end=end, file=sys.stderr, flush=True
            )
        elif time.monotonic() - self._last > _SILENCE_S:
            self._last = time.monotonic()
            print(f"{self._what} layer {done} of {num_layers}", file=sys.stderr, flush=True)
