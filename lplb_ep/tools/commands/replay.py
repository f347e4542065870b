"""`lplb-ep replay`: the imbalance of recorded routing on a placement, at once or over time."""

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
    add_recording,
    learn_for_lp,
    print_notes,
    read_another,
    read_placements,
    read_recording,
)
from .options import OPTIONS, as_typed, check_least, check_outputs, one_line_errors, write_json

if TYPE_CHECKING:
    from ...placement.table import Placement
    from ..recordings import Recording

_TOPOLOGIES = ("cube", "hypercube", "torus", "ring")
_KINDS = (
    f"{', '.join(_TOPOLOGIES)} (or ring:SIZE, torus:ROWSxCOLUMNS), eplb, lp, homes (experts in "
    "order), or a file of place, Placement.save, SGLang, TensorRT-LLM, vllm-ascend or vLLM"
)


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    replay = commands.add_parser(
        "replay",
        help="recorded routing on a placement: imbalance at home slots, with an even split, by LP",
        description="Replays recorded routing on a placement and shows each layer's imbalance.",
    )
    replay.set_defaults(command=_run)
    add_recording(replay)
    replay.add_argument(
        "--placement", metavar="KIND", help=f"{_KINDS}; default with --guests: homes"
    )
    replay.add_argument(
        "--ranks", type=int, metavar="R", help="ranks; of a placement file where it has none"
    )
    replay.add_argument(
        "--redundant",
        type=int,
        metavar="D",
        help="redundant experts on each rank; a topology has a default",
    )
    replay.add_argument("--ranks-per-node", type=int, metavar="N", help="default: all ranks")
    replay.add_argument(
        "--groups", type=int, metavar="G", help="eplb and lp: the router's expert groups"
    )
    replay.add_argument(
        "--learn-from",
        metavar="FILE[:KEY]|KEY",
        help="learn the placement on another recording, or on another array of this one",
    )
    replay.add_argument(
        "--learn-layout", metavar="LAYOUT", help="of --learn-from; default: as --layout"
    )
    add_active_ranks(replay)
    add_guests(replay, "those of a placement file")
    replay.add_argument(
        "--guest-tolerance",
        type=float,
        metavar="X",
        help="no guests where T* is within this part of the mean; default: the setting",
    )
    replay.add_argument(
        "--guest-min-tokens",
        type=int,
        metavar="N",
        help="the least tokens that a guest must take; default: the setting",
    )
    replay.add_argument(
        "--expert-bytes",
        type=int,
        metavar="B",
        help="weights of an expert, to tell bytes moved by guests or refreshes",
    )
    replay.add_argument(
        "--by-batch", action="store_true", help="a line for each batch, not for each layer"
    )
    replay.add_argument("--json", metavar="PATH", help="write all numbers")
    replay.add_argument("--png", metavar="PATH", help="draw the layers' imbalance")
    _add_over_time(replay)


def _add_over_time(replay: argparse.ArgumentParser) -> None:
    over_time = replay.add_argument_group(
        "over time", "with --refresh: one workload after another, and replicas that follow them"
    )
    over_time.add_argument(
        "--refresh", type=int, metavar="N", help="look every N batches whether to move replicas"
    )
    over_time.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="FILE[:KEY]|KEY",
        help="what comes next: another recording, or another array of this one; may be repeated",
    )
    over_time.add_argument(
        "--draw", type=int, metavar="N", help="draw N batches at random from each workload's total"
    )
    for name, kind, metavar, text in (
        ("threshold", float, "X", "T* / mean to exceed before replicas move"),
        ("changes", int, "M", "replicas of a layer that a refresh moves at most"),
        ("seconds", float, "S", "to choose the replicas of a layer; inf: no limit of time"),
    ):
        text += f"; {getattr(Settings(), f'refresh_{name}')}"
        over_time.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    with one_line_errors():
        check_outputs(args)
        _check_over_time(args)
        check_least(args, "expert_bytes")
        rule = _guest_rule(args)
        from ..replay import replay

        recording, learned = _recordings(args)
        placements = _placements(args, recording, learned)
        _check_guest_options(args, placements)
        if args.refresh is not None:
            return _replay_over_time(args, recording, learned, placements)
        result = replay(recording, placements, progress=Progress("replaying"), **rule)

        num_batches, num_layers, _ = recording.counts.shape
        about = _about(args, learned, placements)
        where = _where(args, about, recording)
        if args.learn_from is not None:
            where += f", learned from {learned.source}"
        told = {"recording": recording.source, **about, **result.to_json(args.expert_bytes)}
        write_json(args.json, told)
        if args.png:
            from ..plots import plot_replay

            about_picture = {"title": recording.source, "footnote": where}
            plot_replay(args.png, result, by_batch=args.by_batch, **about_picture)
        print(f"recording  {recording.source}: {num_batches} batch(es), {num_layers} layers")
        print_notes(recording)
        print(f"placement  {where}")
        print("imbalance  max rank load / mean rank load; 1.000 is ideal")
        if result.guests is not None:
            print("moved      copies of experts that a batch moves in a layer, over all ranks")
        print()
        print(result.table(args.expert_bytes, by_batch=args.by_batch))
    return 0


def _about(
    args: argparse.Namespace, learned: Recording, placements: Sequence[Placement]
) -> dict[str, Any]:
    """What was replayed, for JSON."""
    return {
        "learned_from": learned.source,
        "placement": args.placement,
        "num_ranks": placements[0].num_ranks,
        "num_physical_experts": placements[0].num_physical_experts,
        "num_guests_per_rank": placements[0].num_guests_per_rank,
    }


def _where(args: argparse.Namespace, about: dict[str, Any], recording: Recording) -> str:
    """The same in words."""
    guests = about["num_guests_per_rank"]
    return (
        f"{args.placement}, {about['num_ranks']} ranks, {about['num_physical_experts']} slots for "
        f"{recording.num_experts} experts{f', {guests} a rank for guests' if guests else ''}"
    )


def _guest_rule(args: argparse.Namespace) -> dict[str, Any]:
    """The rule that the options say, else the settings."""
    options = {name: getattr(args, name) for name in ("guest_tolerance", "guest_min_tokens")}
    given = {name: value for name, value in options.items() if value is not None}
    settings = Settings.from_env()
    with as_typed(OPTIONS):
        settings = dataclasses.replace(settings, **given)
    return {name: getattr(settings, name) for name in options}


def _check_guest_options(args: argparse.Namespace, placements: Sequence[Placement]) -> None:
    """Refuses options that say something of guests where there are none."""
    if any(placement.num_guests_per_rank for placement in placements):
        return
    for name in ("guest_tolerance", "guest_min_tokens"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs --guests")
    if args.expert_bytes is not None and args.refresh is None:
        raise ValueError("--expert-bytes needs --guests or --refresh")


def _check_over_time(args: argparse.Namespace) -> None:
    """Refuses what could not be replayed over time, before the work is done."""
    if args.refresh is None:
        for name in ("then", "draw", "threshold", "changes", "seconds"):
            if getattr(args, name) not in (None, []):
                raise ValueError(f"--{name.replace('_', '-')} needs --refresh")
        return
    from ..timeline import check_interval

    with as_typed(OPTIONS):
        check_interval(args.refresh)
    _refresh_settings(args)
    if args.by_batch:
        raise ValueError("--by-batch does not go with --refresh")


def _refresh_settings(args: argparse.Namespace) -> Settings:
    """Those of the options that were given."""
    options = {f"refresh_{n}": getattr(args, n) for n in ("threshold", "changes", "seconds")}
    given = {name: value for name, value in options.items() if value is not None}
    with as_typed(OPTIONS):
        return Settings(refresh=args.refresh, **given, **_guest_rule(args))


def _replay_over_time(
    args: argparse.Namespace,
    recording: Recording,
    learned: Recording,
    placements: Sequence[Placement],
) -> int:
    from ..timeline import draw_batches, replay_over_time

    size = args.tokens_per_batch
    then = [read_another(args, "--then", said, args.layout, size) for said in args.then]
    workloads = [recording, *then]
    if args.draw is not None:
        workloads = [draw_batches(w, args.draw) for w in workloads]
    settings = _refresh_settings(args)

    with as_typed(OPTIONS):
        result = replay_over_time(
            workloads, placements, settings, num_groups=args.groups, progress=Progress("replaying")
        )
    moved = sum(move.num_copies for move in result.moves)
    about: dict[str, Any] = {
        **_about(args, learned, placements),
        "num_moved": moved,
        "num_anew": sum(move.num_anew for move in result.moves),
        "bytes_moved": None if args.expert_bytes is None else moved * args.expert_bytes,
    }
    where = f"{_where(args, about, recording)}, learned from {learned.source}"
    write_json(args.json, {**about, **result.to_json()})
    if args.png:
        from ..plots import plot_timeline

        title = f"{recording.source}, and replicas that follow"
        plot_timeline(args.png, result, title=title, footnote=where)
    for workload in workloads:
        print_notes(workload)
    print(f"placement  {where}")
    print("imbalance  max rank load / mean rank load, median / worst over batches and layers\n")
    print(result.table())
    layers = len({move.layer for move in result.moves})
    print(
        f"\nrefreshes  {len(result.moves)}, in {layers} of {len(result.layers)} layers: {moved} "
        f"replicas moved "
        f"(EPLB anew each time: {about['num_anew']} copies)"
        + (f", {about['bytes_moved'] / 1e9:.2f} GB out" if args.expert_bytes is not None else "")
    )
    if about["num_guests_per_rank"]:
        kept, fresh = (int(copies.sum()) for copies in (result.guests_kept, result.guests))
        print(f"guests     {kept} copies moved on placements kept, {fresh} on refreshed ones")
    return 0


def _recordings(args: argparse.Namespace) -> tuple[Recording, Recording]:
    """The recording to replay, and the recording to learn the placement on."""
    recording = read_recording(args)
    if args.learn_from is None:
        if args.learn_layout is not None:
            raise ValueError("--learn-layout needs --learn-from")
        return recording, recording
    layout = args.layout if args.learn_layout is None else args.learn_layout
    # A placement is learned on all batches together, so ids need not be cut into batches.
    return recording, read_another(args, "--learn-from", args.learn_from, layout)


def _placements(
    args: argparse.Namespace, recording: Recording, learned: Recording
) -> list[Placement]:
    """One for each layer, made from the learned load or read from the file."""
    from ...placement.layer_files import engine_of
    from ...placement.table import Placement

    if args.placement is None:
        if args.guests is None:
            raise ValueError(f"replay needs --placement or --guests; a placement is {_KINDS}")
        args.placement = "homes"
    kind, num_layers = args.placement, len(recording.layers)
    guests = 0 if args.guests is None else args.guests
    topology = kind.split(":")[0] in _TOPOLOGIES
    if kind == "homes":
        return [_homes_in_order(args, recording.num_experts, guests)] * num_layers
    if not topology and kind not in ("eplb", "lp"):
        if not Path(kind).exists():
            raise ValueError(f"--placement must be {_KINDS}; got {kind!r}")
        # With a refresher groups are those by which it is compared with EPLB.
        unfit = ["redundant", "active_ranks", "learn_from"]
        unfit += ["ranks", "ranks_per_node"] if engine_of(kind) is None else []
        unfit += [] if getattr(args, "refresh", None) else ["groups"]
        given = [f"--{name.replace('_', '-')}" for name in unfit if getattr(args, name) is not None]
        if given:
            raise ValueError(f"{given[0]} does not go with a placement file ({kind})")
        return _with_guests(read_placements(kind, args, recording), args.guests)
    if args.ranks is None or (args.redundant is None and not topology):
        raise ValueError(
            f"--placement {kind} needs --ranks{'' if topology else ' and --redundant'}"
        )
    if args.groups is not None and topology:
        raise ValueError(f"--groups is for --placement eplb and lp; got {kind}")
    if (learned.layers, learned.num_experts) != (recording.layers, recording.num_experts):
        raise ValueError(
            f"{learned.source} has {len(learned.layers)} layers of {learned.num_experts} experts; "
            f"{recording.source} has {num_layers} of {recording.num_experts}"
        )
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
