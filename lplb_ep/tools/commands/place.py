"""`lplb-ep place`: a placement for every layer of a recording, made for the linear program."""

from __future__ import annotations

import argparse
import re
from typing import Any

from .inputs import (
    add_active_ranks,
    add_guests,
    add_recording,
    learn_for_lp,
    print_notes,
    read_placements,
    read_recording,
)
from .options import OPTIONS, as_typed, check_least, check_outputs, one_line_errors


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    place = commands.add_parser(
        "place",
        help="a placement for every layer of a recording, made for the linear program",
        description="Learns a placement of each layer on recorded routing (Placement.for_lp). "
        "Writes them to a file for replay, and shows the imbalance on the same load. "
        "Without a recording: experts in order and guest slots, one placement for all layers.",
    )
    place.set_defaults(command=_run)
    add_recording(place, required=False)
    place.add_argument("-o", "--output", required=True, metavar="PATH", help="the JSON to write")
    place.add_argument("--ranks", type=int, metavar="R", help="with --start its own")
    place.add_argument(
        "--redundant", type=int, metavar="D", help="on each rank; with --start its own"
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
    place.add_argument("--start", metavar="FILE", help="improve the placements of this file")
    place.add_argument("--fixed-homes", action="store_true", help="move replicas of --start only")
    place.add_argument("--max-changes", type=int, metavar="M", help="slots of --start to change")
    place.add_argument(
        "--names",
        metavar="PATTERN",
        help="name layers for `lplb-ep run`: 'layers.{}.mlp', {} = the number, {+3} = 3 more",
    )
    place.add_argument("--png", metavar="PATH", help="draw the replica graph of the worst layer")


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    with one_line_errors():
        check_outputs(args)
        check_least(args, "seed", "seconds")
        if args.file is None:
            return _place_homes(args)
        if args.names is not None:
            _name(args.names, 0)  # raised before the search
        from ...placement.layer_files import save_placements
        from ..replay import describe

        recording = read_recording(args)
        start = None if args.start is None else read_placements(args.start, recording.layers)
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
        if args.names is None:
            save_placements(args.output, dict(zip(recording.layers, placements, strict=True)))
        else:
            names = [_name(args.names, layer) for layer in recording.layers]
            save_placements(args.output, dict(zip(names, placements, strict=True)))
        print(f"recording  {recording.source}: {len(recording.counts)} batch(es)")
        print_notes(recording)
        print("imbalance  max rank load / mean rank load on all of it; 1.000 is ideal\n")
        lines, worst = describe(recording, placements, start)
        print(lines)
        if args.png:
            from ..plots import plot_placement

            layer = recording.layers[worst]
            title = f"{recording.source}, layer {layer}"
            plot_placement(args.png, placements[worst], recording.load[worst], title=title)
    return 0


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

    learning = ("key", "layout", "tokens_per_batch", "redundant", "groups", "percentile", "seconds")
    for name in (*learning, "names", "start", "fixed_homes", "max_changes", "png"):
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} needs a recording")
    if None in (args.experts, args.ranks, args.guests):
        raise ValueError("place needs a recording, or --experts, --ranks and --guests")
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
    return 0
