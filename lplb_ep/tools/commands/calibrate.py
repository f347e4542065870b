"""`lplb-ep calibrate`: the cost of rows on this GPU, measured and written to a file."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from .options import as_typed, check_outputs, one_line_errors


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser = commands.add_parser(
        "calibrate",
        help="what rows of experts cost on this GPU, for LPLB_EP_COST",
        description="Times a rank's experts on the current GPU, by their rows and by how many are "
        "active. Writes a cost model that LPLB_EP_COST may name.",
    )
    parser.set_defaults(command=_run)
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="the file to write")
    parser.add_argument(
        "--slots", type=int, default=34, metavar="S", help="of a rank, at least 2; 34"
    )
    parser.add_argument("--hidden", type=int, default=7168, metavar="H", help="of a token; 7168")
    parser.add_argument("--width", type=int, default=2048, metavar="W", help="of an expert; 2048")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="TYPE",
        help="bfloat16 or float16; deep_gemm takes bfloat16 alone",
    )
    parser.add_argument(
        "--gemm",
        default="torch",
        metavar="NAME",
        help="torch, deep_gemm or transformer_engine; torch",
    )
    parser.add_argument(
        "--max-rows", type=int, default=2048, metavar="N", help="of a slot in the mean; 2048"
    )
    parser.add_argument(
        "--push-gbps",
        type=float,
        default=314.0,
        metavar="B",
        help="GB/s at which a guest's weights travel, not measured here; 314, as between two H200s",
    )


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    with one_line_errors():
        check_outputs(args)
        from ..calibrate import calibrate, check_sizes
        from ..grouped_gemms import DTYPES, GEMMS, Experts, check_gemm

        for option, value, choices in (
            ("--gemm", args.gemm, GEMMS),
            ("--dtype", args.dtype, DTYPES),
        ):
            if value not in choices:
                raise ValueError(f"{option} must be one of {', '.join(choices)}; got {value!r}")
        for option in ("slots", "hidden", "width", "max_rows"):
            if getattr(args, option) < 1:
                name = option.replace("_", "-")
                raise ValueError(f"--{name} must be at least 1; got {getattr(args, option)}")
        if not args.push_gbps > 0:
            raise ValueError(f"--push-gbps must be above 0; got {args.push_gbps:g}")
        # Three matrices of an expert, two bytes an element.
        push = 6 * args.hidden * args.width / args.push_gbps
        if push >= 2**31 - 1:
            raise ValueError(
                f"--push-gbps {args.push_gbps:g} is too slow: a push takes {push / 1e9:.3g} s, "
                "and a cost model has 2.1 s at most"
            )
        with as_typed({"num_slots": "--slots", "max_rows": "--max-rows"}):
            check_sizes(args.slots, args.max_rows)
        check_gemm(args.gemm, args.dtype)
        import torch

        device = torch.cuda.get_device_name()
        sizes = args.slots, args.hidden, args.width, args.dtype, args.gemm
        experts = Experts(*sizes, max_rows=args.slots * (args.max_rows + 1))
        about = (
            f"{device}, {args.slots} slots, experts {args.hidden} x {args.width}, {args.dtype}, "
            f"{args.gemm} {torch.__version__ if args.gemm == 'torch' else ''}".rstrip()
        )
        done = calibrate(experts.nanoseconds, args.slots, args.max_rows, device, about)
        model = dataclasses.replace(done.model, push=round(push))
        model.save(args.output)
    print(f"{about}\n{done.num_timed} batches timed; of 200 that were not fitted, the model is off")
    print(f"by {100 * done.error:.1f} % in the median, by {100 * done.worst:.1f} % at worst")
    print(
        f"an active slot {model.steps[0] / 1e3:.1f} us, a tile of {model.tile} rows "
        f"{model.slope / 1e3:.1f} us, a rank {model.fixed / 1e3:.1f} us, "
        f"a guest's push {push / 1e3:.1f} us: {args.output}"
    )
    return 0
