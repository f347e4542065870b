"""Options of `replay` and `report` that choose the placements."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...settings import Settings
from .inputs import (
    Progress,
    add_active_ranks,
    add_guests,
    check_guests,
    check_shape,
    learn_for_lp,
    notes_on_layers,
    read_another,
    read_placements,
    read_recording,
)
from .options import OPTIONS, as_typed

if TYPE_CHECKING:
    from ...placement.table import Placement
    from ..recordings import Recording

_TOPOLOGIES = ("cube", "hypercube", "torus", "ring")
_KINDS = (
    f"{', '.join(_TOPOLOGIES)} (or ring:SIZE, torus:ROWSxCOLUMNS), eplb, lp, homes (experts in "
    "order), or a file of place, Placement.save, SGLang, TensorRT-LLM, vllm-ascend or vLLM"
)


def add_placement(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the placement, its shape, and when guests are taken; `default` says what holds else."""
    parser.add_argument("--placement", metavar="KIND", help=f"{_KINDS}; {default}")
    parser.add_argument(
        "--ranks", type=int, metavar="R", help="ranks; of a placement file where it has none"
    )
    parser.add_argument(
        "--redundant",
        type=int,
        metavar="D",
        help="redundant experts on each rank; a topology has a default",
    )
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="default: all ranks")
    parser.add_argument(
        "--groups", type=int, metavar="G", help="eplb and lp: the router's expert groups"
    )
    parser.add_argument(
        "--learn-from",
        metavar="FILE[:KEY]|KEY",
        help="learn the placement on another recording, or on another array of this one",
    )
    parser.add_argument(
        "--learn-layout", metavar="LAYOUT", help="of --learn-from; default: as --layout"
    )
    add_active_ranks(parser)
    add_guests(parser, "those of a placement file")
    parser.add_argument(
        "--guest-tolerance",
        type=float,
        metavar="X",
        help="no guests where T* is within this part of the mean; default: the setting",
    )
    parser.add_argument(
        "--guest-min-tokens",
        type=int,
        metavar="N",
        help="the least tokens that a guest is chosen for; default: the setting",
    )
    parser.add_argument(
        "--expert-bytes",
        type=int,
        metavar="B",
        help="weights of an expert, to tell bytes moved by guests or refreshes",
    )


def recordings_of(args: argparse.Namespace) -> tuple[Recording, Recording]:
    """The recording to replay, and the recording to learn the placement on."""
    recording = read_recording(args)
    if args.learn_from is None:
        if args.learn_layout is not None:
            raise ValueError("--learn-layout needs --learn-from")
        return recording, recording
    layout = args.layout if args.learn_layout is None else args.learn_layout
    # A placement is learned on all batches together, so ids need not be cut into batches.
    return recording, read_another(args, "--learn-from", args.learn_from, layout)


def placements_of(
    args: argparse.Namespace, recording: Recording, learned: Recording
) -> list[Placement]:
    """One for each layer, made from the learned load or read from the file."""
    from ...placement.table import Placement

    check_guests(args)
    if args.placement is None:
        if args.guests is None:
            raise ValueError(f"replay needs --placement or --guests; a placement is {_KINDS}")
        args.placement = "homes"
    kind, num_layers = args.placement, len(recording.layers)
    guests = 0 if args.guests is None else args.guests
    topology = kind.split(":")[0] in _TOPOLOGIES
    if kind == "homes":
        return [_homes_in_order(args, recording.num_experts, guests)] * num_layers
    if _is_file(kind):
        return _of_file(args, recording)
    if args.ranks is None or (args.redundant is None and not topology):
        raise ValueError(
            f"--placement {kind} needs --ranks{'' if topology else ' and --redundant'}"
        )
    if args.groups is not None and topology:
        raise ValueError(f"--groups is for --placement eplb and lp; got {kind}")
    learned.check_like(recording)
    shape = {
        "num_ranks": args.ranks,
        "num_redundant_per_rank": args.redundant,
        "num_ranks_per_node": args.ranks_per_node,
        "num_guests_per_rank": guests,
        "active_ranks": args.active_ranks,
    }
    if kind == "lp":
        return learn_for_lp(learned, num_groups=args.groups, **shape)
    names = dict(OPTIONS)
    if args.experts is None:
        names["num_experts"] = "the number of experts"
    made, progress = [], Progress("placing")
    for load in learned.load:
        with as_typed(names):
            if topology:
                experts = learned.num_experts
                placement = Placement.from_topology(kind, num_experts=experts, load=load, **shape)
            else:
                placement = Placement.from_history(load, num_groups=args.groups, **shape)
        made.append(placement)
        progress(len(made), num_layers)
    return made


def notes_of(args: argparse.Namespace, recording: Recording) -> list[str]:
    """What a reader of the numbers must know, each in a sentence."""
    notes = recording.notes()
    if _is_file(args.placement):
        notes += notes_on_layers(args.placement, recording)
    return notes


def _is_file(kind: str) -> bool:
    return kind.split(":")[0] not in _TOPOLOGIES and kind not in ("eplb", "lp", "homes")


def _of_file(args: argparse.Namespace, recording: Recording) -> list[Placement]:
    """The placements of a file, which fit what the options say."""
    path = args.placement
    if not Path(path).exists():
        raise ValueError(f"--placement must be {_KINDS}; got {path!r}")
    # With a refresher groups are those by which it is compared with EPLB.
    unfit = ["learn_from", *([] if getattr(args, "refresh", None) else ["groups"])]
    given = [f"--{name.replace('_', '-')}" for name in unfit if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{given[0]} does not go with a placement file ({path})")
    placements = read_placements(path, args, recording)
    check_shape(path, placements, args)
    return _with_guests(placements, args.guests)


def guest_rule(args: argparse.Namespace) -> dict[str, Any]:
    """The rule that the options say, else the settings."""
    options = {name: getattr(args, name) for name in ("guest_tolerance", "guest_min_tokens")}
    given = {name: value for name, value in options.items() if value is not None}
    settings = Settings.from_env()
    with as_typed(OPTIONS):
        settings = dataclasses.replace(settings, **given)
    return {name: getattr(settings, name) for name in options}


def check_guest_options(args: argparse.Namespace, placements: Sequence[Placement]) -> None:
    """Refuses options that say something of guests where there are none."""
    if any(placement.num_guests_per_rank for placement in placements):
        return
    for name in ("guest_tolerance", "guest_min_tokens"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs --guests")
    if args.expert_bytes is not None and args.refresh is None:
        raise ValueError("--expert-bytes needs --guests or --refresh")


def about_placements(
    args: argparse.Namespace, learned: Recording, placements: Sequence[Placement]
) -> dict[str, Any]:
    """What was replayed, for JSON."""
    return {
        "learned_from": learned.source,
        "placement": args.placement,
        "num_ranks": placements[0].num_ranks,
        "num_active_ranks": len(placements[0].active_ranks),
        "num_physical_experts": placements[0].num_physical_experts,
        "num_guests_per_rank": placements[0].num_guests_per_rank,
    }


def in_words(args: argparse.Namespace, about: dict[str, Any], recording: Recording) -> str:
    """The same in words."""
    guests, active = about["num_guests_per_rank"], about["num_active_ranks"]
    away = f" ({active} take part)" if active < about["num_ranks"] else ""
    return (
        f"{args.placement}, {about['num_ranks']} ranks{away}, "
        f"{about['num_physical_experts']} slots for {recording.num_experts} experts"
        f"{f', {guests} a rank for guests' if guests else ''}"
    )


def _homes_in_order(args: argparse.Namespace, num_experts: int, guests: int) -> Placement:
    from ...placement.table import Placement

    for name in ("redundant", "groups", "learn_from"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not go with --placement homes")
    if args.ranks is None:
        raise ValueError("--placement homes needs --ranks")
    with as_typed({**OPTIONS, "num_experts": "the number of experts"}):
        return Placement.homes_only(
            num_experts,
            args.ranks,
            guests,
            num_ranks_per_node=args.ranks_per_node,
            active_ranks=args.active_ranks,
        )


def _with_guests(placements: Sequence[Placement], guests: int | None) -> list[Placement]:
    """Those of a file, with as many guest slots as are asked for, else with their own."""
    if guests is None:
        return list(placements)
    with as_typed(OPTIONS):
        return [placement.with_guest_slots(guests) for placement in placements]
