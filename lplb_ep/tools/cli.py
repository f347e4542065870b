"""The command `lplb-ep`: `doctor`, `replay`, `place`, `report`, `sample`, `demo`, `bench`,
`calibrate`, `compile` and `run`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .commands import bench, calibrate, compile, doctor, place, replay, report, run, sample


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; by default the process's.

    Returns:
        The exit status. 0: done. 1: the reader of the output left, as `head` does. 2: `doctor`
        finds packages missing or settings invalid. 130: interrupted, by Ctrl-C.

    Raises:
        SystemExit: 2 for a mistake of the caller, reported in one line on stderr.
    """
    try:
        args, rest = _parsed(argv)
        status = int(args.command(args, rest))
        sys.stdout.flush()
    except BrokenPipeError:
        # The rest of the buffer goes nowhere, for Python flushes stdout once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nlplb-ep: interrupted", file=sys.stderr)
        return 130
    return status


def _parsed(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those that a command passes on."""
    parser = argparse.ArgumentParser(
        prog="lplb-ep", description="Exact load balance for DeepEP expert parallelism."
    )
    parser.add_argument("--version", action="version", version=f"lplb-ep {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for module in (doctor, replay, place, report, sample, bench, calibrate, compile, run):
        module.add(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "takes_rest"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, rest


if __name__ == "__main__":
    sys.exit(main())
