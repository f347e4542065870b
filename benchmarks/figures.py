"""The figures of README and RESULTS.md anew, on the GPUs of this machine: one command for all.

    python benchmarks/figures.py [NAME …] --recordings DIR [--out DIR] [--limit SECONDS]
    python benchmarks/figures.py --list

Each figure is a command that also runs by itself; `--list` prints them. They run one after another.
What one prints goes to OUT/NAME.txt while it runs, so a figure that meets its limit leaves what it
has. `--recordings` has the recorded loads that RESULTS.md names.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Figure(NamedTuple):
    """A command, how many GPUs it wants, and the seconds after which it is ended."""

    gpus: int
    seconds: int
    command: str
    """`{recordings}` is replaced by their folder, `{ranks}` by the number of ranks, and `{out}` by
    the path of results without its ending."""


PATIENCE_S = 60
"""For a figure at its limit to end its processes; torchrun kills its own after 30."""
BENCH = "python -m lplb_ep.tools.cli bench"
LOADS = (
    "{recordings}/deepseek_v3_0324_mmlu_counts.npz --key mmlu_seqlen_8k --learn-from mmlu_seqlen_4k"
)
LAYERS = f"python benchmarks/whole_layer.py {LOADS} --ranks {{ranks}}"
PAIRS = (
    f"python benchmarks/paired_layers.py {LOADS} --ranks {{ranks}} --tokens 8 128 4096 --rounds 15"
)
MEGATRON = (
    "python -m torch.distributed.run --nproc-per-node {ranks} benchmarks/megatron_training.py "
    "--hidden 2048 --ffn 6144 --experts 16 --skew 0.2 --sequence 512 --steps 300"
)
TITAN = (
    "python examples/torchtitan_moe.py --ranks {ranks} --layers 3 --dim 2048 --topk 1 "
    "--router-scale 4 --sequence 512 --steps 100 --width 8192 --experts 16 --sequences 64 "
    "--out {out}.png"
)
FIGURES = {
    name: Figure(gpus, seconds, command)
    for gpus, seconds, name, command in (
        (1, 60, "plan", BENCH),
        (1, 90, "plan-guests", f"{BENCH} --guests 1"),
        (1, 90, "plan-auto", f"{BENCH} --objective auto"),
        (1, 300, "exact", "python benchmarks/solver.py --solver flow --guests --seconds 240"),
        (1, 300, "experts", f"python benchmarks/layer.py {LOADS} --layers 3"),
        (1, 120, "stacked-guests", "python benchmarks/stacked_guests.py"),
        (1, 120, "statistics", "python benchmarks/statistics_cost.py"),
        (2, 120, "push", "python benchmarks/push.py --ranks {ranks} --quick"),
        (2, 120, "replicas", "python benchmarks/replicas.py --ranks {ranks}"),
        (2, 120, "exchange", "python benchmarks/exchange.py --ranks {ranks} --tokens 8 128 4096"),
        (2, 240, "calls", "python benchmarks/calls.py --ranks {ranks}"),
        (2, 240, "layers", LAYERS),
        (2, 240, "layers-shifted", f"{LAYERS} --shift"),
        (2, 240, "pairs-tokens", PAIRS),
        (2, 240, "pairs-auto", f"env LPLB_EP_OBJECTIVE=auto {PAIRS}"),
        (2, 600, "megatron", f"{MEGATRON} --layers 2 --sequences 60"),
        (2, 600, "megatron-one-layer", f"{MEGATRON} --layers 1 --sequences 120"),
        (2, 600, "torchtitan", f"{TITAN} --runs plain,balanced,forced,reseeded"),
        (2, 420, "torchtitan-replicas", f"{TITAN} --runs plain,balanced --replicas 2"),
    )
}


def main(argv: list[str] | None = None) -> int:
    """Runs the figures that are asked for; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--list", action="store_true", help="print the commands, and run none")
    parser.add_argument("--recordings", default="recordings", metavar="DIR")
    parser.add_argument("--out", default="out/figures", metavar="DIR")
    parser.add_argument("--ranks", type=int, metavar="R", help="default: one for each GPU")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), metavar="S", help="seconds for all of them"
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in FIGURES]
    if unknown:
        parser.error(f"no figure {unknown[0]!r}: {', '.join(FIGURES)}")
    chosen = {name: FIGURES[name] for name in args.names or FIGURES}
    # Shells make commands behind `&` ignore it, and figures would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(args.out).resolve()
    recordings = shlex.quote(str(Path(args.recordings).resolve()))
    num_gpus = 0 if args.list else _num_gpus()
    ranks = args.ranks or max(num_gpus, 2)
    until, failed = time.monotonic() + args.limit, 0
    for name, figure in chosen.items():
        out = shlex.quote(str(folder / name))
        command = figure.command.format(recordings=recordings, ranks=ranks, out=out)
        if args.list:
            print(f"{name}\n    {command}")
            continue
        if num_gpus < figure.gpus:
            print(f"{name}: left out, for it wants GPUs: {figure.gpus}", flush=True)
            continue
        left = min(figure.seconds, until - time.monotonic())
        if left < 1:
            print(f"{name}: left out, for no time is left", flush=True)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        failed += not _run(name, command, folder / f"{name}.txt", left)
    return failed


def _run(name: str, command: str, path: Path, seconds: float) -> bool:
    """Runs one figure, and ends all of its processes; returns whether it ended well."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    start = time.monotonic()
    with path.open("w", encoding="utf-8") as out:
        out.write(f"{command}\n\n")
        out.flush()
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            ended = f"exit status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"ended at its limit of {seconds:.0f} s"
        finally:
            # Launchers end what has left their group: torchrun its ranks, others the daemon of MPS.
            for number in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):  # all of them have ended
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE_S)
    print(f"{name}: {ended}, {time.monotonic() - start:.0f} s, {path}", flush=True)
    return process.returncode == 0


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main())
