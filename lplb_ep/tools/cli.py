"""The command `lplb-ep`: `doctor`, `replay`, `place`, `report`, `sample`, `demo`, `bench`,
`calibrate`, `compile` and `run`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from .. import __version__
from .commands import bench, calibrate, compile, doctor, place, replay, report, run, sample

_INTERRUPTED = "\nlplb-ep: interrupted"
_STATUS_OF_INTERRUPTED = 130


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
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    try:
        args, rest = _parsed(argv)
        status = int(args.command(args, rest))
        sys.stdout.flush()
    except BrokenPipeError:
        # The rest of the buffer goes nowhere, for Python flushes stdout once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        return _STATUS_OF_INTERRUPTED
    return status


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    """Ends the process on Ctrl-C, at once.

    In a library's C++ a KeyboardInterrupt may be lost, or end in an abort: when torch is imported,
    say.
    """
    os.write(2, f"{_INTERRUPTED}\n".encode())
    os._exit(_STATUS_OF_INTERRUPTED)


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
