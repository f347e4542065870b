"""`lplb-ep replay`: the imbalance of recorded routing on a placement, at once or over time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...settings import Settings
from .inputs import (
    add_recording,
    learn_for_lp,
    read_another,
    read_placements,
    read_recording,
    show_progress,
)
from .options import OPTIONS, as_typed, check_least, check_outputs, one_line_errors, write_json

if TYPE_CHECKING:
    from ...placement.table import Placement
    from ..recordings import Recording

_TOPOLOGIES = ("cube", "hypercube", "torus", "ring")
_KINDS = (
    f"{', '.join(_TOPOLOGIES)} (or ring:SIZE, torus:ROWSxCOLUMNS), eplb, lp, or a file "
    "written by place or Placement.save"
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
    replay.add_argument("--placement", required=True, metavar="KIND", help=_KINDS)
    replay.add_argument("--ranks", type=int, metavar="R", help="ranks; not with a placement file")
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
    replay.add_argument("--json", metavar="PATH", help="write all numbers")
    replay.add_argument("--png", metavar="PATH", help="draw the layers' imbalance")
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
    over_time.add_argument(
        "--expert-bytes", type=int, metavar="B", help="weights of an expert, to tell bytes moved"
    )


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    with one_line_errors():
        check_outputs(args)
        _check_over_time(args)
        from ..replay import replay

        recording, learned = _recordings(args)
        placements = _placements(args, recording, learned)
        if args.refresh is not None:
            return _replay_over_time(args, recording, learned, placements)
        result = replay(recording, placements)

        num_batches, num_layers, num_experts = recording.counts.shape
        num_ranks, num_slots = placements[0].num_ranks, placements[0].num_physical_experts
        where = f"{args.placement}, {num_ranks} ranks, {num_slots} slots for {num_experts} experts"
        if args.learn_from is not None:
            where += f", learned from {learned.source}"
        about = {
            "recording": recording.source,
            "learned_from": learned.source,
            "placement": args.placement,
            "num_ranks": num_ranks,
            "num_physical_experts": num_slots,
        }
        write_json(args.json, {**about, **result.to_json()})
        if args.png:
            from ..plots import plot_replay

            plot_replay(args.png, result, title=recording.source, footnote=where)
        print(f"recording  {recording.source}: {num_batches} batch(es), {num_layers} layers")
        print(f"placement  {where}")
        print("imbalance  max rank load / mean rank load; 1.000 is ideal\n")
        print(result.table())
    return 0


def _check_over_time(args: argparse.Namespace) -> None:
    """Refuses what could not be replayed over time, before the work is done."""
    if args.refresh is None:
        for name in ("then", "draw", "threshold", "changes", "seconds", "expert_bytes"):
            if getattr(args, name) not in (None, []):
                raise ValueError(f"--{name.replace('_', '-')} needs --refresh")
        return
    from ..timeline import check_interval

    with as_typed(OPTIONS):
        check_interval(args.refresh)
    _refresh_settings(args)
    check_least(args, "expert_bytes")


def _refresh_settings(args: argparse.Namespace) -> Settings:
    """Those of the options that were given."""
    options = {f"refresh_{n}": getattr(args, n) for n in ("threshold", "changes", "seconds")}
    given = {name: value for name, value in options.items() if value is not None}
    with as_typed(OPTIONS):
        return Settings(refresh=args.refresh, **given)


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
            workloads, placements, settings, num_groups=args.groups, progress=show_progress
        )
    moved = sum(move.num_copies for move in result.moves)
    about: dict[str, Any] = {
        "placement": args.placement,
        "learned_from": learned.source,
        "num_ranks": placements[0].num_ranks,
        "num_physical_experts": placements[0].num_physical_experts,
        "num_moved": moved,
        "num_anew": sum(move.num_anew for move in result.moves),
        "bytes_moved": None if args.expert_bytes is None else moved * args.expert_bytes,
    }
    where = (
        f"{args.placement}, {about['num_ranks']} ranks, {about['num_physical_experts']} slots for "
        f"{recording.num_experts} experts, learned from {learned.source}"
    )
    write_json(args.json, {**about, **result.to_json()})
    if args.png:
        from ..plots import plot_timeline

        title = f"{recording.source}, and replicas that follow"
        plot_timeline(args.png, result, title=title, footnote=where)
    print(f"placement  {where}")
    print("imbalance  max rank load / mean rank load, median / worst over batches and layers\n")
    print(result.table())
    layers = len({move.layer for move in result.moves})
    print(
        f"\nrefreshes  {len(result.moves)} of {layers} layers: {moved} replicas moved "
        f"(EPLB anew each time: {about['num_anew']} copies)"
        + (f", {about['bytes_moved'] / 1e9:.2f} GB out" if args.expert_bytes is not None else "")
    )
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
    from ...placement.table import Placement

    kind, num_layers = args.placement, len(recording.layers)
    topology = kind.split(":")[0] in _TOPOLOGIES
    if not topology and kind not in ("eplb", "lp"):
        if not Path(kind).exists():
            raise ValueError(f"--placement must be {_KINDS}; got {kind!r}")
        # With a refresher groups are those by which it is compared with EPLB.
        unfit = ["ranks", "redundant", "ranks_per_node", "learn_from"]
        unfit += [] if getattr(args, "refresh", None) else ["groups"]
        given = [f"--{name.replace('_', '-')}" for name in unfit if getattr(args, name) is not None]
        if given:
            raise ValueError(f"{given[0]} does not go with a placement file ({kind})")
        return read_placements(kind, recording.layers)
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
    }
    if kind == "lp":
        return learn_for_lp(learned, num_groups=args.groups, **shape)
    names = dict(OPTIONS)
    if args.experts is None:
        names["num_experts"] = "the number of experts"
    with as_typed(names):
        if topology:
            return [
                Placement.from_topology(kind, num_experts=learned.num_experts, load=load, **shape)
                for load in learned.load
            ]
        return [
            Placement.from_history(load, num_groups=args.groups, **shape) for load in learned.load
        ]
