"""`lplb-ep report`: a page with charts of recorded routing, or of a run's metrics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...settings import Settings
from .inputs import Progress, add_recording, print_notes
from .options import OPTIONS, as_typed, check_outputs, one_line_errors, write_csv
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


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser = commands.add_parser(
        "report",
        help="a page with charts of recorded routing, or of a run's metrics",
        description="Replays recorded routing on a placement and writes one HTML file: loads by "
        "rank and layer, imbalance over time, the hottest experts. It needs no network. Of a run's "
        "metrics, a FILE that ends in .jsonl (LPLB_EP_METRICS), it draws what its batches were.",
    )
    parser.set_defaults(command=_run)
    add_recording(parser)
    parser.add_argument(
        "-o", "--output", metavar="PATH", default="report.html", help="the page; report.html"
    )
    parser.add_argument("--csv", metavar="PATH", help="write a row for each batch and layer")
    parser.add_argument(
        "--refresh", type=int, metavar="N", help="replicas that follow, looked at every N batches"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="to choose the replicas of a layer at a refresh; inf: no limit of time",
    )
    add_placement(
        parser, "default: homes, with guests on as many as 8 ranks unless --ranks says another"
    )


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    with one_line_errors():
        check_outputs(args)
        if Path(args.output).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"-o must end in .html; got {args.output}")
        if args.file.lower().endswith(".jsonl"):
            _report_metrics(args)
            return 0
        rule = guest_rule(args)
        settings = _refresh_settings(args, rule)
        from ..replay import replay
        from ..report import page_of
        from ..timeline import replay_over_time

        recording, learned = recordings_of(args)
        _fill_in(args, recording.num_experts)
        placements = placements_of(args, recording, learned)
        check_guest_options(args, placements)
        if len({placement.num_ranks for placement in placements}) > 1:
            raise ValueError(f"--placement {args.placement}: layers differ in their ranks")
        result = replay(recording, placements, progress=Progress("replaying"), **rule)
        timeline = None
        if settings is not None:
            with as_typed(OPTIONS, recording.source):
                progress = Progress("refreshing")
                timeline = replay_over_time(
                    [recording], placements, settings, num_groups=args.groups, progress=progress
                )
        where = in_words(args, about_placements(args, learned, placements), recording)
        found_notes = notes_of(args, recording)
        notes = [f"{note[0].upper()}{note[1:]}." for note in found_notes]
        if args.learn_from is not None:
            notes.append(f"Placements were learned from {learned.source}.")
        if timeline is not None:
            notes.append(f"Replicas were refreshed every {args.refresh} batches where it paid.")
            notes.append("The lower bound is that of the placements of the beginning.")
        page = page_of(
            recording,
            result,
            placements,
            title=recording.source,
            about=where,
            notes=notes,
            timeline=timeline,
        )
        Path(args.output).write_text(page, "utf-8")
        write_csv(args.csv, result.rows())
        summary = result.summary()
        print(f"{args.output}: {recording.source}; {where}")
        print_notes(found_notes)
        for name, said in (("home", "home slots"), ("lp", "balanced"), ("bound", "lower bound")):
            found = summary[name]
            print(f"{said:<12} median {found['median']:.3f}, worst {found['worst']:.3f}")
    return 0


def _report_metrics(args: argparse.Namespace) -> None:
    """The page of a run's metrics."""
    for name, value in vars(args).items():
        if value not in (None, 0) and name not in ("command", "file", "output", "csv"):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for recordings; {args.file} has metrics of a run")
    import numpy as np

    from ..metric_lines import read_metrics
    from ..report_metrics import about_metrics, imbalance_by_layer, page_of_metrics

    metrics = read_metrics(args.file)
    notes = ["the last line is left out: only a part of it is there"] if metrics.is_cut else []
    page = page_of_metrics(metrics, [f"{note[0].upper()}{note[1:]}." for note in notes])
    Path(args.output).write_text(page, "utf-8")
    write_csv(args.csv, metrics.rows())
    print(f"{args.output}: {metrics.source}; {about_metrics(metrics)}")
    print_notes(notes)
    found = imbalance_by_layer(metrics)
    for name, said in (("home", "at home"), ("lp", "as planned"), ("bound", "lower bound")):
        known = found[name][~np.isnan(found[name])]
        if known.size:
            middle, most = np.median(known), known.max()
            print(f"{said:<12} median layer {middle:.3f}, worst layer {most:.3f}")


def _refresh_settings(args: argparse.Namespace, rule: dict[str, Any]) -> Settings | None:
    """Those of --refresh, checked; None without it."""
    if args.refresh is None:
        if args.seconds is not None:
            raise ValueError("--seconds needs --refresh")
        return None
    from ..timeline import check_interval

    with as_typed(OPTIONS):
        check_interval(args.refresh)
        seconds = {} if args.seconds is None else {"refresh_seconds": args.seconds}
        return Settings(refresh=args.refresh, **rule, **seconds)


def _fill_in(args: argparse.Namespace, num_experts: int) -> None:
    """Without a placement it shows what a job gains that has no history and no replicas."""
    if args.placement is not None:
        return
    if args.ranks is None:
        args.ranks = next(ranks for ranks in (8, 4, 2, 1) if num_experts % ranks == 0)
    if args.guests is None:
        args.guests = min(4, -(-num_experts // args.ranks // 8)) if args.ranks > 1 else 0
