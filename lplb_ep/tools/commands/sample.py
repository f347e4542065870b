"""`lplb-ep sample`: a small synthetic recording, to try the other commands with."""

from __future__ import annotations

import argparse
from typing import Any

from .options import as_typed, check_outputs, one_line_errors

_OPTIONS = {
    "num_layers": "--layers",
    "num_experts": "--experts",
    "num_batches": "--batches",
    "num_tokens": "--tokens",
    "num_topk": "--topk",
    "workload": "--workload",
    "seed": "--seed",
    "path": "-o",
}


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser = commands.add_parser(
        "sample",
        help="a small synthetic recording, to try the other commands with",
        description="Writes a recording whose loads are as uneven as those of real routers.",
    )
    parser.set_defaults(command=_run)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="PATH",
        help="the file to write: .npz, or SGLang's logical_count as .json or .pt",
    )
    for option, default, text in (
        ("--layers", 8, "MoE layers"),
        ("--experts", 64, "logical experts"),
        ("--batches", 16, "batches"),
        ("--tokens", 4096, "tokens of a batch, over all ranks"),
        ("--topk", 8, "experts that a token picks"),
        ("--workload", 0, "another number is another use of the same model"),
        ("--seed", 0, "another number is another model"),
    ):
        parser.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text}; {default}"
        )


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    with one_line_errors(), as_typed(_OPTIONS, args.output):
        check_outputs(args)
        from ..recordings import check_name, save_recording
        from ..sample import sample

        check_name(args.output)
        if args.seed < 0 or args.workload < 0:
            raise ValueError("seed and workload must be at least 0")
        recording = sample(
            args.layers,
            args.experts,
            args.batches,
            args.tokens,
            args.topk,
            workload=args.workload,
            seed=args.seed,
        )
        save_recording(args.output, recording)
        batches, layers, experts = recording.counts.shape
        print(f"{args.output}: {batches} batches, {layers} layers, {experts} experts")
    return 0
