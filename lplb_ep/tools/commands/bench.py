"""`lplb-ep bench`: the cost of a plan on the GPU, and of the drop-in's calls on the CPU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...settings import GPU_SOLVERS, OBJECTIVES
from .options import OPTIONS, as_typed, check_outputs, one_line_errors, write_json

if TYPE_CHECKING:
    from ...placement.table import Placement
    from ..bench import Batches


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    bench = commands.add_parser(
        "bench",
        help="what a plan on the GPU costs, by step, and how far it is from the optimum",
        description="Times plans on the current GPU, on the same skewed loads at every run. "
        "Without --ranks, for all of the usual sizes. With --calls it times the calls of the "
        "drop-in and of a planner on the CPU instead.",
    )
    bench.set_defaults(command=_run)
    bench.add_argument("--calls", action="store_true", help="time calls on the CPU; needs no GPU")
    bench.add_argument("--ranks", type=int, metavar="R", help="with --calls the planner's; 8")
    bench.add_argument("--redundant", type=int, metavar="D", help="on each rank; 2, none of homes")
    bench.add_argument("--guests", type=int, default=0, metavar="G", help="slots of a rank; 0")
    bench.add_argument("--experts", type=int, default=256, metavar="E", help="256")
    bench.add_argument("--tokens", type=int, metavar="T", help="of a rank; 8192, with --calls 64")
    bench.add_argument("--topk", type=int, default=8, metavar="K", help="8")
    kinds = "a topology, homes, ballast (as of a shared expert), or eplb, the default"
    bench.add_argument("--placement", metavar="KIND", help=kinds)
    bench.add_argument("--solver", choices=GPU_SOLVERS, help="on the GPU; flow")
    bench.add_argument("--objective", choices=OBJECTIVES, default="tokens", help="tokens")
    bench.add_argument("--json", metavar="PATH", help="write all numbers")


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    with one_line_errors():
        check_outputs(args)
        if args.calls:
            return _measure_calls(args)
        if args.ranks is None and (args.placement, args.redundant) != (None, None):
            raise ValueError("--placement and --redundant need --ranks")
        return _measure_plans(args)


def _measure_calls(args: argparse.Namespace) -> int:
    from ...deepep.limits import LEGACY_1_2_1
    from .. import calls

    if args.solver is not None:
        raise ValueError("--solver is for plans on the GPU, and --calls is for the CPU")
    most = LEGACY_1_2_1.low_latency_topk
    if most is not None and args.topk > most:
        raise ValueError(
            f"--topk must be at most {most} with --calls, as for DeepEP's low-latency "
            f"calls; got {args.topk}"
        )
    args.tokens = 64 if args.tokens is None else args.tokens
    shape = _chosen(args, 8 if args.ranks is None else args.ranks)
    measured = calls.measure_calls(*_prepare(args, *shape))
    about = {**calls.conditions(), "planner": _name(args, *shape)}
    _show(args, about, {"calls": measured}, calls.table(measured))
    return 0


def _measure_plans(args: argparse.Namespace) -> int:
    from ...planning.solvers import choose_solver
    from .. import bench

    args.tokens = 8192 if args.tokens is None else args.tokens
    solver = args.solver or "flow"
    choose_solver(solver, objective=args.objective)
    rows, used = [], []
    usual = bench.USUAL_WITH_GUESTS if args.guests else bench.USUAL
    for shape in usual if args.ranks is None else [_chosen(args, args.ranks)]:
        plan = _prepare(args, *shape)
        rows.append((_name(args, *shape), bench.measure(*plan, solver, args.objective)))
        used.append(plan)
    # A profiler, which counts launches, slows all launches down from then on.
    for (_, measured), plan in zip(rows, used, strict=True):
        measured["launches"] = bench.count_launches(*plan, solver)
    about = {**bench.conditions(), "solver": solver, "objective": args.objective}
    _show(args, about, {"rows": dict(rows)}, bench.table(rows))
    return 0


def _chosen(args: argparse.Namespace, num_ranks: int) -> tuple[str, int, int]:
    """The placement's kind, ranks and redundant experts a rank."""
    kind = args.placement or "eplb"
    usual = {"homes": 0, "ballast": 1}.get(kind, 2)
    return kind, num_ranks, usual if args.redundant is None else args.redundant


def _prepare(
    args: argparse.Namespace, kind: str, num_ranks: int, redundant: int
) -> tuple[Placement, Batches]:
    from .. import bench

    with as_typed({**OPTIONS, "num_tokens": "--tokens", "num_topk": "--topk"}):
        batches = bench.make_batches(num_ranks, args.experts, args.tokens, args.topk)
        history, guests = batches.history, args.guests
        return bench.make_placement(kind, num_ranks, redundant, history, guests), batches


def _name(args: argparse.Namespace, kind: str, num_ranks: int, redundant: int) -> str:
    guests = f", {args.guests} guests" if args.guests else ""
    return f"EP{num_ranks}, {redundant} redundant, {kind}{guests}"


def _show(
    args: argparse.Namespace, about: dict[str, Any], measured: dict[str, Any], table: str
) -> None:
    """Prints the conditions and the table, and writes all numbers."""
    about = {**about, "experts": args.experts, "tokens": args.tokens, "topk": args.topk}
    write_json(args.json, {**about, **measured})
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"\n{table}")
