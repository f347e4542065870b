"""`lplb-ep compile`: compiles the kernels that the settings may need, without a GPU."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from ...settings import Settings, cache_directory
from .options import one_line_errors


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser = commands.add_parser(
        "compile", help="compile every kernel beforehand, for any architecture, without a GPU"
    )
    parser.set_defaults(command=_run)
    parser.add_argument(
        "--arch", action="append", metavar="sm_90", help="may be repeated; default: sm_90, sm_100"
    )


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with one_line_errors():
        from ...gpu.cache import make_directory
        from ...gpu.jit import compile_all
        from ...planning.kernels import programs

        make_directory(cache_directory())  # what cannot be kept is not worth the time
        asked_for = programs(one_launch=bool(Settings.from_env().one_launch))
        compile_all(asked_for, args.arch or ["sm_90", "sm_100"])
    return 0
