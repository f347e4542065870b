"""`lplb-ep place`: a placement for every layer of a recording, made for the linear program."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .inputs import (
    add_active_ranks,
    add_guests,
    add_recording,
    check_guests,
    check_shape,
    learn_for_lp,
    notes_on_layers,
    print_notes,
    read_placements,
    read_recording,
)
from .options import (
    OPTIONS,
    add_picture,
    as_typed,
    check_least,
    check_outputs,
    one_line_errors,
)

if TYPE_CHECKING:
    from ...placement.table import Placement


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    place = commands.add_parser(
        "place",
        help="a placement for every layer of a recording, made for the linear program",
        description="Learns a placement of each layer on recorded routing (Placement.for_lp). "
        "Writes them to a file for replay, and shows the imbalance on the same load. "
        "Without a recording: those of --start in another format, or experts in order and guest "
        "slots, one placement for all layers.",
    )
    place.set_defaults(command=_run)
    add_recording(place, required=False)
    place.add_argument("-o", "--output", required=True, metavar="PATH", help="the file to write")
    place.add_argument(
        "--format",
        help="lplb-ep (.json), sglang (.json, .pt), tensorrt-llm (.yaml), vllm-ascend (.json) or "
        "vllm (.npy, .pt); default: by the end of PATH",
    )
    place.add_argument("--ranks", type=int, metavar="R", help="with --start its own")
    place.add_argument(
        "--redundant",
        type=int,
        metavar="D",
        help="on each rank; with --start its own, with --guests 0 by default",
    )
    place.add_argument("--ranks-per-node", type=int, metavar="N", help="default: all ranks")
    add_active_ranks(place)
    add_guests(place, "none; with --start its own")
    place.add_argument("--groups", type=int, metavar="G", help="the router's expert groups")
    place.add_argument(
        "--drift", type=float, default=0.8, metavar="X", help="how far loads may move away; 0.8"
    )
    place.add_argument(
        "--percentile", type=float, metavar="P", help="of the optima to minimise; default: mean"
    )
    place.add_argument("--seed", type=int, default=0, help="0")
    place.add_argument("--seconds", type=float, metavar="S", help="end a layer's search after S")
    place.add_argument(
        "--start",
        metavar="FILE",
        help="improve the placements of this file, of ours or of an engine",
    )
    place.add_argument("--fixed-homes", action="store_true", help="move replicas of --start only")
    place.add_argument("--max-changes", type=int, metavar="M", help="slots of --start to change")
    place.add_argument(
        "--names",
        metavar="PATTERN",
        help="name layers for `lplb-ep run`: 'layers.{}.mlp', {} = the number, {+3} = 3 more",
    )
    add_picture(place, "the replica graph of the worst layer")


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    with one_line_errors():
        check_outputs(args)
        check_least(args, "seed", "seconds")
        check_guests(args)
        kind = _check_format(args)
        if args.file is None:
            return _place_homes(args) if args.start is None else _convert(args, kind)
        from ...placement.engine_files import check_layers
        from ..replay import describe

        recording = read_recording(args)
        check_layers(kind, sorted(recording.layers))
        start = None if args.start is None else read_placements(args.start, args, recording)
        if start is None and args.redundant is None and args.guests:
            args.redundant = 0
        if start is None and (args.ranks is None or args.redundant is None):
            raise ValueError("place needs --ranks and --redundant, or --start")
        placements = learn_for_lp(
            recording,
            start,
            num_ranks=args.ranks,
            num_redundant_per_rank=args.redundant,
            num_ranks_per_node=args.ranks_per_node,
            num_groups=args.groups,
            fixed_homes=args.fixed_homes,
            max_changes=args.max_changes,
            percentile=args.percentile,
            drift=args.drift,
            seed=args.seed,
            time_budget_s=args.seconds,
            num_guests_per_rank=args.guests,
            active_ranks=args.active_ranks,
        )
        _save(args, dict(zip(recording.layers, placements, strict=True)))
        print(f"recording  {recording.source}: {len(recording.counts)} batch(es)")
        _say_written(args, kind)
        print_notes(recording.notes())
        if args.start is not None:
            print_notes(notes_on_layers(args.start, recording))
        print("imbalance  max rank load / mean rank load on all of it; 1.000 is ideal\n")
        lines, worst = describe(recording, placements, start)
        print(lines)
        if args.picture:
            from ..plots import plot_placement

            layer = recording.layers[worst]
            title = f"{recording.source}, layer {layer}"
            plot_placement(args.picture, placements[worst], recording.load[worst], title=title)
    return 0


def _check_format(args: argparse.Namespace) -> str:
    """Refuses a file that could not be written, before the search; returns its format."""
    from ...placement.engine_files import format_of

    with as_typed({"format": "--format"}, args.output):
        kind = format_of(args.output, args.format)
    if kind != "lplb-ep" and args.file is None and args.start is None:
        raise ValueError(f"a file of {kind} has a row for each layer: place needs a recording")
    if args.names is not None:
        _name(args.names, 0)
        if kind != "lplb-ep":
            raise ValueError(f"--names does not go with a file of {kind}")
    for name in ("guests", "active_ranks"):
        if getattr(args, name) and kind != "lplb-ep":
            raise ValueError(f"--{name.replace('_', '-')} does not go with a file of {kind}")
    return kind


def _save(args: argparse.Namespace, placements: Mapping[int, Placement]) -> None:
    from ...placement.layer_files import save_placements

    if args.names is None:
        save_placements(args.output, placements, args.format)
    else:
        named = {_name(args.names, layer): one for layer, one in placements.items()}
        save_placements(args.output, named)


def _convert(args: argparse.Namespace, kind: str) -> int:
    """Writes the placements of --start in another format, or with names."""
    from ...placement.layer_files import engine_of, load_placements

    _refuse_learning(args, but="names")
    shape = {}
    if engine_of(args.start) is not None:  # ours have a shape of their own
        shape = {"num_ranks": args.ranks, "num_ranks_per_node": args.ranks_per_node}
        shape["num_experts"] = args.experts
    # A wrong field of our own file is no option's fault.
    with as_typed(OPTIONS if shape else {}, args.start):
        placements = load_placements(args.start, **shape)
    check_shape(args.start, placements.values(), args)
    with as_typed(OPTIONS, args.start):
        if args.guests is not None:
            placements = {k: p.with_guest_slots(args.guests) for k, p in placements.items()}
    numbered = {layer: p for layer, p in placements.items() if isinstance(layer, int)}
    if len(numbered) < len(placements):
        raise ValueError(f"--start {args.start} has layers by name, and needs a recording")
    _save(args, numbered)
    print(f"{len(numbered)} layer(s): {next(iter(numbered.values()))}")
    _say_written(args, kind)
    return 0


def _say_written(args: argparse.Namespace, kind: str) -> None:
    print(f"written    {args.output}, in the format {kind}")


def _refuse_learning(args: argparse.Namespace, but: str = "") -> None:
    """Refuses options that nothing asks for without a recording."""
    learning = ("key", "layout", "tokens_per_batch", "redundant", "groups", "percentile", "seconds")
    for name in (*learning, "names", "fixed_homes", "max_changes", "picture"):
        if getattr(args, name) not in (None, False) and name != but:
            raise ValueError(f"--{name.replace('_', '-')} needs a recording")


def _name(pattern: str, layer: int) -> str:
    """The module of a layer, by its number.

    Raises:
        ValueError: the pattern does not say where the number goes.
    """
    name, number = re.subn(
        r"\{(?:\+(\d+))?\}", lambda match: str(layer + int(match[1] or 0)), pattern
    )
    if number != 1:
        raise ValueError(f"--names must have {{}} once, for the layer's number; got {pattern!r}")
    return name


def _place_homes(args: argparse.Namespace) -> int:
    """Writes the placement of a model whose loads are not known yet."""
    from ...placement.table import Placement
    from ..recording_files import MAX_EXPERTS

    _refuse_learning(args)
    if None in (args.experts, args.ranks, args.guests):
        raise ValueError("place needs a recording, or --start, or --experts, --ranks and --guests")
    if not 1 <= args.experts <= MAX_EXPERTS:
        raise ValueError(f"--experts must be in [1, {MAX_EXPERTS}]; got {args.experts}")
    with as_typed(OPTIONS):
        placement = Placement.homes_only(
            args.experts,
            args.ranks,
            args.guests,
            num_ranks_per_node=args.ranks_per_node,
            active_ranks=args.active_ranks,
        )
    placement.save(args.output)
    print(placement)
    _say_written(args, "lplb-ep")
    return 0
