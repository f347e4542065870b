"""The command `lplb-ep`: `doctor`, `replay`, `demo`, `compile` and `run`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .settings import (
    CompileError,
    MissingPackageError,
    Settings,
    put_first_on_python_path,
    put_in_environment,
)

if TYPE_CHECKING:
    from .placement import Placement
    from .report import Recording

TOPOLOGIES = ("cube", "hypercube", "torus", "ring")

# name, distributions that bring it, what it is for, how to get it
_PACKAGES = (
    ("torch", ("torch",), "tensors and groups", "pip install torch"),
    ("numpy", ("numpy",), "plans on the CPU", "pip install numpy"),
    ("scipy", ("scipy",), "maximum flows", "pip install scipy"),
    ("deep_ep", ("deep_ep",), "moves tokens between GPUs", "https://github.com/deepseek-ai/DeepEP"),
    ("matplotlib", ("matplotlib",), "pictures", 'pip install "lplb-ep[plot]"'),
)
_CUDA = 'pip install "lplb-ep[cuda]"'
_LATER_PACKAGES = (
    ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "launches kernels", _CUDA),
    ("libmathdx", ("nvidia-libmathdx-cu13", "nvidia-libmathdx-cu12"), "cuSolverDx", _CUDA),
    ("nvrtc", ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"), "compiles kernels", _CUDA),
    ("nvjitlink", ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12"), "links kernels", _CUDA),
    (
        "nvshmem4py",
        ("nvshmem4py-cu13", "nvshmem4py-cu12"),
        "exchanges counts",
        'pip install "lplb-ep[nvshmem]"',
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; by default the process's.

    Returns:
        The exit status: 0, or 2 where `doctor` finds settings that cannot be.

    Raises:
        SystemExit: 2 for a mistake of the caller, said in one line on stderr; and what a script
            that is run raises.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command is not _demo:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return int(args.command(args, rest))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lplb-ep", description="Exact load balance for DeepEP expert parallelism."
    )
    parser.add_argument("--version", action="version", version=f"lplb-ep {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    doctor = commands.add_parser("doctor", help="what is installed, set, and used, and why")
    doctor.set_defaults(command=_doctor)

    _add_replay(commands)

    demo = commands.add_parser(
        "demo", add_help=False, help="train the example MoE layer; arguments are the example's"
    )
    demo.set_defaults(command=_demo)

    compile_ = commands.add_parser(
        "compile", help="compile every kernel beforehand, for any architecture, without a GPU"
    )
    compile_.set_defaults(command=_compile)
    compile_.add_argument(
        "--arch", action="append", metavar="sm_90", help="may be repeated; default: sm_90, sm_100"
    )

    run = commands.add_parser(
        "run",
        help="run a script with the drop-ins in place of DeepEP's buffers",
        usage="lplb-ep run [--placement FILE] [--mode home|1] (SCRIPT | -m MODULE) [ARGUMENT ...]",
    )
    run.set_defaults(command=_run)
    run.add_argument("--placement", metavar="FILE", help="sets LPLB_EP_PLACEMENT")
    run.add_argument("--mode", choices=("0", "home", "1"), help="sets LPLB_EP")
    run.add_argument("-m", dest="module", action="store_true", help="run a module, not a script")
    run.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser(
        "replay",
        help="recorded routing on a placement: imbalance at home slots, with an even split, by LP",
        description="Replays recorded routing on a placement and shows each layer's imbalance.",
    )
    replay.set_defaults(command=_replay)
    replay.add_argument("file", metavar="FILE", help="a recording: .npy, .npz, .pt or a directory")
    replay.add_argument("--key", help="which array of an .npz that holds several")
    replay.add_argument(
        "--layout", help="what three dimensions are: counts, layer-token or token-layer"
    )
    replay.add_argument("--experts", type=int, metavar="E", help="the number of logical experts")
    replay.add_argument(
        "--tokens-per-batch", type=int, metavar="T", help="cut expert ids into batches of T tokens"
    )
    replay.add_argument(
        "--placement",
        required=True,
        metavar="KIND",
        help=f"{', '.join(TOPOLOGIES)} (or ring:SIZE, torus:ROWSxCOLUMNS), eplb, or a file "
        "written by Placement.save",
    )
    replay.add_argument("--ranks", type=int, metavar="R", help="ranks; not with a placement file")
    replay.add_argument(
        "--redundant",
        type=int,
        metavar="D",
        help="redundant experts on each rank; a topology has a default",
    )
    replay.add_argument("--ranks-per-node", type=int, metavar="N", help="default: all ranks")
    replay.add_argument("--groups", type=int, metavar="G", help="eplb: the router's expert groups")
    replay.add_argument(
        "--learn-from",
        metavar="FILE|KEY",
        help="learn the placement on another recording, or another array of FILE",
    )
    replay.add_argument("--json", metavar="PATH", help="write all numbers")
    replay.add_argument("--png", metavar="PATH", help="draw the layers' imbalance")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the process with status 2 and one line for a mistake of the caller."""
    try:
        yield
    except (OSError, ValueError, MissingPackageError, CompileError) as error:
        print(f"lplb-ep: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _doctor(args: argparse.Namespace, rest: list[str]) -> int:
    print(f"lplb-ep {__version__}, Python {sys.version.split()[0]}")
    for heading, packages in (
        ("Packages", _PACKAGES),
        ("Packages for plans on the GPU, which this version does not make yet", _LATER_PACKAGES),
    ):
        print(f"\n{heading}")
        for name, distributions, purpose, install in packages:
            found = next(filter(None, map(_version, distributions)), None)
            _line(name, found or "missing", purpose if found else f"{purpose}: {install}")

    import torch

    print("\nDevices")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        _line(f"cuda:{index}", f"sm_{major}{minor}", torch.cuda.get_device_name(index))
    if not torch.cuda.is_available():
        version = torch.version.cuda
        _line("cuda", "none", f"torch has CUDA {version}" if version else "torch has no CUDA")

    print("\nSettings")
    try:
        settings = Settings.from_env()
    except ValueError as error:
        print(f"  error: {error}")
        return 2
    for setting in fields(Settings):
        value = getattr(settings, setting.name)
        shown = str(int(value)) if isinstance(value, bool) else str(value)
        changed = "" if value == setting.default else "set"
        _line(setting.metadata["variable"], shown or "none", changed or "default", width=28)

    print("\nUsed")
    status = 0
    for name, choose in _choices(settings).items():
        try:
            _line(name, *choose())
        except (OSError, ValueError, MissingPackageError) as error:
            _line(name, "error", str(error))
            status = 2
    return status


def _choices(settings: Settings) -> dict[str, Callable[[], tuple[str, str]]]:
    """What the settings lead to on this machine: a choice and its reason, by part."""
    from .buffer import choose_backend
    from .exchange import choose_counts
    from .placement import Placement
    from .solver import choose_solver

    choices: dict[str, Callable[[], tuple[str, str]]] = {
        "buffer": lambda: choose_backend(settings.backend),
        "counts": lambda: choose_counts(settings.counts, has_group=True, num_ranks=2),
        "solver": lambda: choose_solver(settings.solver),
    }
    if settings.placement:
        choices["placement"] = lambda: (
            settings.placement,
            repr(Placement.load(settings.placement)),
        )
    return choices


def _line(name: str, value: str, note: str, *, width: int = 12) -> None:
    print(f"  {name:<{width}} {value:<16} {note}".rstrip())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _replay(args: argparse.Namespace, rest: list[str]) -> int:
    with _one_line_errors():
        from . import report

        recording = _recording(args, args.file, args.key)
        learned = recording
        if args.learn_from is not None:
            if not Path(args.learn_from).exists():
                learned = _recording(args, args.file, args.learn_from)
            else:
                several = args.learn_from.endswith(".npz")
                learned = _recording(args, args.learn_from, args.key if several else None)
        placements = _placements(args, recording, learned)
        result = report.replay(recording, placements)

        num_batches, num_layers, num_experts = recording.counts.shape
        num_ranks, num_slots = placements[0].num_ranks, placements[0].num_physical_experts
        where = f"{args.placement}, {num_ranks} ranks, {num_slots} slots for {num_experts} experts"
        if args.learn_from is not None:
            where += f", learned from {learned.source}"
        print(f"recording  {recording.source}: {num_batches} batch(es), {num_layers} layers")
        print(f"placement  {where}")
        print("imbalance  max rank load / mean rank load; 1.000 is ideal\n")
        print(result.table())
        if args.json:
            about = {
                "recording": recording.source,
                "learned_from": learned.source,
                "placement": args.placement,
                "num_ranks": num_ranks,
                "num_physical_experts": num_slots,
            }
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({**about, **result.to_json()}, file)
        if args.png:
            report.plot_replay(args.png, result, title=recording.source, footnote=where)
    return 0


def _recording(args: argparse.Namespace, path: str, key: str | None) -> Recording:
    from .report import load_recording

    return load_recording(
        path,
        key=key,
        layout=args.layout,
        num_experts=args.experts,
        tokens_per_batch=args.tokens_per_batch,
    )


def _placements(
    args: argparse.Namespace, recording: Recording, learned: Recording
) -> list[Placement]:
    """One for each layer, made from the learned load or read from the file."""
    from .placement import Placement

    kind, num_layers = args.placement, len(recording.layers)
    topology = kind.split(":")[0] in TOPOLOGIES
    if not topology and kind != "eplb":
        unfit = ("ranks", "redundant", "ranks_per_node", "groups", "learn_from")
        given = [f"--{name.replace('_', '-')}" for name in unfit if getattr(args, name) is not None]
        if given:
            raise ValueError(f"{given[0]} does not go with a placement file ({kind})")
        if not Path(kind).exists():
            raise ValueError(
                f"--placement must be {', '.join(TOPOLOGIES)}, eplb or a file; got {kind!r}"
            )
        return [Placement.load(kind)] * num_layers
    if args.ranks is None or (args.redundant is None and not topology):
        raise ValueError(
            f"--placement {kind} needs --ranks{'' if topology else ' and --redundant'}"
        )
    if args.groups is not None and topology:
        raise ValueError(f"--groups is for --placement eplb; got {kind}")
    if (learned.layers, learned.num_experts) != (recording.layers, recording.num_experts):
        raise ValueError(
            f"{learned.source} has {len(learned.layers)} layers of {learned.num_experts} experts; "
            f"{recording.source} has {num_layers} of {recording.num_experts}"
        )
    shape = {
        "num_ranks": args.ranks,
        "num_redundant_per_rank": args.redundant,
        "num_ranks_per_node": args.ranks_per_node,
    }
    if topology:
        return [
            Placement.from_topology(kind, num_experts=learned.num_experts, load=load, **shape)
            for load in learned.load
        ]
    return [Placement.from_history(load, num_groups=args.groups, **shape) for load in learned.load]


def _compile(args: argparse.Namespace, rest: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with _one_line_errors():
        from .cuda import programs
        from .jit import compile_all

        compile_all(programs(), args.arch or ["sm_90", "sm_100"])
    return 0


def _demo(args: argparse.Namespace, rest: list[str]) -> NoReturn:
    script = Path(__file__).resolve().parent.parent / "examples" / "moe_layer.py"
    with _one_line_errors():
        if not script.exists():
            raise ValueError(
                "the demo is examples/moe_layer.py of the source tree, and this is an installed "
                "package without it: run it from a checkout"
            )
    _become_python([str(script), *rest])


def _run(args: argparse.Namespace, rest: list[str]) -> NoReturn:
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    with _one_line_errors():
        if not program:
            raise ValueError("run needs a script, or -m and a module")
        # Set, not passed on: the program's own buffers read them, in its child processes too.
        if args.placement is not None:
            put_in_environment("placement", str(Path(args.placement).resolve()))
        if args.mode is not None:
            put_in_environment("mode", args.mode)
        settings = Settings.from_env()
        if settings.placement:
            from .placement import Placement

            Placement.load(settings.placement)
    put_first_on_python_path(Path(__file__).resolve().parent / "startup")
    _become_python(["-m", *program] if args.module else program)


def _become_python(arguments: Sequence[str]) -> NoReturn:
    """Goes on as the interpreter of this process, run afresh: the program finds all as usual."""
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    sys.exit(main())
