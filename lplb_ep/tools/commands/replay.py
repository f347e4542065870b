"""`lplb-ep replay`: the imbalance of recorded routing on a placement, at once or over time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...settings import Settings
from .inputs import Progress, add_recording, print_notes, read_another
from .options import (
    OPTIONS,
    add_outputs,
    as_typed,
    check_least,
    check_outputs,
    one_line_errors,
    write_csv,
    write_json,
)
from .placed import (
    about_placements,
    add_placement,
    check_guest_options,
    guest_rule,
    in_words,
    notes_of,
    placements_of,
    recordings_of,
)

if TYPE_CHECKING:
    from ...cost import CostModel
    from ...placement.table import Placement
    from ..recordings import Recording


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    replay = commands.add_parser(
        "replay",
        help="recorded routing on a placement: imbalance at home slots, with an even split, by LP",
        description="Replays recorded routing on a placement and shows each layer's imbalance.",
    )
    replay.set_defaults(command=_run)
    add_recording(replay)
    add_placement(replay, "default with --guests: homes")
    replay.add_argument(
        "--by-batch", action="store_true", help="a line for each batch, not for each layer"
    )
    replay.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="also with quotas that N batches share, as LPLB_EP_EVERY=N has them; 1: without",
    )
    replay.add_argument(
        "--cost",
        metavar="FILE",
        help="also the time of the slowest rank, and plans by cost: a file of calibrate, or h200",
    )
    replay.add_argument(
        "--rows-per-rank",
        type=int,
        metavar="N",
        help="draw each batch anew, with N rows a rank in the mean; default: as recorded",
    )
    add_outputs(replay, "the layers' imbalance, or with --refresh that over time")
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
        rule, cost = guest_rule(args), _cost_model(args.cost)
        from ..replay import replay

        recording, learned = recordings_of(args)
        placements = placements_of(args, recording, learned)
        check_guest_options(args, placements)
        if args.refresh is not None:
            return _replay_over_time(args, recording, learned, placements)
        if args.rows_per_rank is not None:
            recording = _drawn(recording, placements, args.rows_per_rank)
        with as_typed({"every": "--every", "Recording.drawn": "--rows-per-rank"}):
            progress = Progress("replaying")
            result = replay(
                recording, placements, every=args.every, cost=cost, progress=progress, **rule
            )

        num_batches, num_layers, _ = recording.counts.shape
        about = about_placements(args, learned, placements)
        where = in_words(args, about, recording)
        if args.learn_from is not None:
            where += f", learned from {learned.source}"
        if args.rows_per_rank is not None:
            where += f", batches of {args.rows_per_rank} rows a rank"
        about |= {"rows_per_rank": args.rows_per_rank, "cost_model": cost and cost.name}
        told = {"recording": recording.source, **about, **result.to_json(args.expert_bytes)}
        write_json(args.json, told)
        write_csv(args.csv, result.rows())
        if args.picture:
            from ..plots import plot_replay

            about_picture = {"title": recording.source, "footnote": where}
            plot_replay(args.picture, result, by_batch=args.by_batch, **about_picture)
        print(f"recording  {recording.source}: {num_batches} batch(es), {num_layers} layers")
        print_notes(notes_of(args, recording))
        print(f"placement  {where}")
        print("imbalance  max rank load / mean rank load; 1.000 is ideal")
        if result.guests is not None:
            print("moved      copies of experts that a batch moves in a layer, over all ranks")
        if args.every > 1:
            print(f"reused     one in {args.every} batches is solved, the others reuse its quotas")
        print()
        print(result.table(args.expert_bytes, by_batch=args.by_batch))
        if cost is not None:
            waits = ", its wait for guests included" if result.guests is not None else ""
            print(f"\ntime       ms of the slowest rank's experts{waits}")
            print(f"model      {cost.name}{f': {cost.about}' if cost.about else ''}\n")
            print(result.cost_table(by_batch=args.by_batch))
    return 0


def _drawn(recording: Recording, placements: Sequence[Placement], num_rows: int) -> Recording:
    """Batches of the size that `--rows-per-rank` says."""
    sizes = {placement.active_ranks.size for placement in placements}
    if len(sizes) > 1:
        raise ValueError("--rows-per-rank needs placements of equally many ranks")
    with as_typed({"num_rows": "--rows-per-rank times the ranks that take part"}):
        return recording.drawn(num_rows * sizes.pop())


def _cost_model(request: str | None) -> CostModel | None:
    """That of `--cost`: the built-in one by its name, or a file."""
    from ...cost import H200, CostModel

    if request is None:
        return None
    if not request:
        raise ValueError(f"--cost must be a file of calibrate, or {H200.name}; got ''")
    return H200 if request == H200.name else CostModel.load(request)


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
    for name, usual in (("every", 1), ("cost", None), ("rows_per_rank", None)):
        if getattr(args, name) != usual:
            raise ValueError(f"--{name.replace('_', '-')} does not go with --refresh")


def _refresh_settings(args: argparse.Namespace) -> Settings:
    """Those of the options that were given."""
    options = {f"refresh_{n}": getattr(args, n) for n in ("threshold", "changes", "seconds")}
    given = {name: value for name, value in options.items() if value is not None}
    with as_typed(OPTIONS):
        return Settings(refresh=args.refresh, **given, **guest_rule(args))


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
        with as_typed({"num_batches": "--draw"}, *(w.source for w in workloads)):
            workloads = [draw_batches(w, args.draw) for w in workloads]
    settings = _refresh_settings(args)

    with as_typed(OPTIONS, *(workload.source for workload in workloads)):
        result = replay_over_time(
            workloads, placements, settings, num_groups=args.groups, progress=Progress("replaying")
        )
    moved = sum(move.num_copies for move in result.moves)
    about: dict[str, Any] = {
        **about_placements(args, learned, placements),
        "num_moved": moved,
        "num_anew": sum(move.num_anew for move in result.moves),
        "bytes_moved": None if args.expert_bytes is None else moved * args.expert_bytes,
    }
    where = f"{in_words(args, about, recording)}, learned from {learned.source}"
    write_json(args.json, {**about, **result.to_json()})
    write_csv(args.csv, result.rows())
    if args.picture:
        from ..plots import plot_timeline

        title = f"{recording.source}, and replicas that follow"
        plot_timeline(args.picture, result, title=title, footnote=where)
    for workload in workloads:
        print_notes(notes_of(args, workload) if workload is workloads[0] else workload.notes())
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
