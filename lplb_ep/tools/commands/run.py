"""`lplb-ep run` and `lplb-ep demo`: replace this process by another Python program."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...settings import Settings, put_first_on_python_path, put_in_environment
from .options import one_line_errors


def add(commands: Any) -> None:
    """Adds the commands to the parser's."""
    demo = commands.add_parser(
        "demo", add_help=False, help="train the example MoE layer; arguments are the example's"
    )
    demo.set_defaults(command=_demo, takes_rest=True)

    run = commands.add_parser(
        "run",
        help="run a script with the drop-ins in place of DeepEP's buffers",
        usage="lplb-ep run [--placement FILE] [--client megatron] [--mode 0|home|1] "
        "(SCRIPT | -m MODULE) [ARG ...]",
    )
    run.set_defaults(command=_run)
    run.add_argument(
        "--placement",
        metavar="FILE",
        help="sets LPLB_EP_PLACEMENT: one placement for all MoE layers, or by names of modules",
    )
    run.add_argument(
        "--client",
        choices=("megatron",),
        help="balance this framework's MoE layers by guests: no placement is needed",
    )
    run.add_argument("--mode", choices=("0", "home", "1"), help="sets LPLB_EP")
    run.add_argument("-m", dest="module", action="store_true", help="run a module, not a script")
    run.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _demo(args: argparse.Namespace, rest: list[str]) -> NoReturn:
    script = Path(__file__).resolve().parents[3] / "examples" / "moe_layer.py"
    with one_line_errors():
        if not script.exists():
            raise ValueError(
                "the demo is examples/moe_layer.py of the source tree, and this is an installed "
                "package without it: run it from a checkout"
            )
    _become_python([str(script), *rest])


def _run(args: argparse.Namespace, rest: list[str]) -> NoReturn:
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    with one_line_errors():
        if not program:
            raise ValueError("run needs a script, or -m and a module")
        # Set, not passed on: the program's own buffers read them, in its child processes too.
        if args.placement is not None:
            put_in_environment("placement", str(Path(args.placement).resolve()))
        if args.mode is not None:
            put_in_environment("mode", args.mode)
        settings = Settings.from_env()
        if args.client is not None and settings.placement:
            raise ValueError(
                "--client balances by guests and reads no file: leave it out, or --placement "
                "(LPLB_EP_PLACEMENT)"
            )
        if settings.placement:
            from ...placement.layer_files import placements_of_modules

            placements_of_modules(settings.placement)
        if settings.mode == "0" and args.mode is None and (args.client or args.placement):
            print(
                "lplb-ep: LPLB_EP is 0 or unset, so nothing is balanced: add --mode 1",
                file=sys.stderr,
            )
    package = Path(__file__).resolve().parents[2]
    put_first_on_python_path(package / "deepep" / "startup")
    if args.client is not None:
        put_first_on_python_path(package / "clients" / "startup")
    _become_python(["-m", *program] if args.module else program)


def _become_python(arguments: Sequence[str]) -> NoReturn:
    """Goes on as the interpreter of this process, started again, so the program finds all as
    usual."""
    os.execv(sys.executable, [sys.executable, *arguments])
