"""`lplb-ep bench`: what a plan on the GPU costs."""

from __future__ import annotations

import argparse
from typing import Any

from .options import OPTIONS, as_typed, check_outputs, one_line_errors, write_json


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    bench = commands.add_parser(
        "bench",
        help="what a plan on the GPU costs, by step, and how far it is from the optimum",
        description="Times plans on the current GPU, on the same skewed loads at every run. "
        "Without --ranks, for all of the usual sizes.",
    )
    bench.set_defaults(command=_run)
    bench.add_argument("--ranks", type=int, metavar="R")
    bench.add_argument("--redundant", type=int, metavar="D", help="on each rank; 2")
    bench.add_argument("--experts", type=int, default=256, metavar="E", help="256")
    bench.add_argument("--tokens", type=int, default=8192, metavar="T", help="of a rank; 8192")
    bench.add_argument("--topk", type=int, default=8, metavar="K", help="8")
    bench.add_argument("--placement", metavar="KIND", help="a topology or eplb, the default")
    bench.add_argument("--solver", choices=("flow", "cusolverdx"), default="flow")
    bench.add_argument("--json", metavar="PATH", help="write all numbers")


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    with one_line_errors():
        check_outputs(args)
        if args.ranks is None and (args.placement, args.redundant) != (None, None):
            raise ValueError("--placement and --redundant need --ranks")
        from ...planning import device as cuda
        from .. import bench

        cuda.check(solver=args.solver)
        rows, used = [], []
        chosen = (
            args.placement or "eplb",
            args.ranks,
            2 if args.redundant is None else args.redundant,
        )
        for kind, num_ranks, redundant in bench.USUAL if args.ranks is None else [chosen]:
            with as_typed({**OPTIONS, "num_tokens": "--tokens", "num_topk": "--topk"}):
                batches = bench.make_batches(num_ranks, args.experts, args.tokens, args.topk)
                placement = bench.make_placement(kind, num_ranks, redundant, batches.history)
            name = f"EP{num_ranks}, {redundant} redundant, {kind}"
            rows.append((name, bench.measure(placement, batches, args.solver)))
            used.append((placement, batches))
        for (_, measured), plan in zip(rows, used, strict=True):
            measured["launches"] = bench.count_launches(*plan, args.solver)
        about = bench.conditions()
        about |= {"solver": args.solver, "experts": args.experts}
        about |= {"tokens": args.tokens, "topk": args.topk}
        write_json(args.json, {**about, "rows": dict(rows)})
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        print(f"\n{bench.table(rows)}")
    return 0
