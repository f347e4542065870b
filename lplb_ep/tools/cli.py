"""The command `lplb-ep`: `doctor`, `replay`, `place`, `demo`, `bench`, `compile` and `run`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..errors import CompileError, MissingPackageError
from ..settings import Settings, put_first_on_python_path, put_in_environment

if TYPE_CHECKING:
    from ..placement.table import Placement
    from .report import Recording

TOPOLOGIES = ("cube", "hypercube", "torus", "ring")
_KINDS = (
    f"{', '.join(TOPOLOGIES)} (or ring:SIZE, torus:ROWSxCOLUMNS), eplb, lp, or a file "
    "written by place or Placement.save"
)
# The library's arguments and settings, and the options for them.
_OPTIONS = {
    "num_ranks": "--ranks",
    "num_redundant_per_rank": "--redundant",
    "num_ranks_per_node": "--ranks-per-node",
    "num_groups": "--groups",
    "num_experts": "--experts",
    "tokens_per_batch": "--tokens-per-batch",
    "key": "--key",
    "layout": "--layout",
    "max_changes": "--max-changes",
    "fixed_homes": "--fixed-homes",
    "start": "--start",
    "drift": "--drift",
    "percentile": "--percentile",
    "refresh": "--refresh",
    "seed": "--seed",
    "time_budget_s": "--seconds",
    "LPLB_EP_REFRESH": "--refresh",
    "LPLB_EP_REFRESH_THRESHOLD": "--threshold",
    "LPLB_EP_REFRESH_CHANGES": "--changes",
    "LPLB_EP_REFRESH_SECONDS": "--seconds",
}

# name, distributions that bring it, what it is for, how to get it
_PACKAGES = (
    ("torch", ("torch",), "tensors and groups", "pip install torch"),
    ("numpy", ("numpy",), "plans on the CPU", "pip install numpy"),
    ("scipy", ("scipy",), "maximum flows", "pip install scipy"),
    ("deep_ep", ("deep_ep",), "moves tokens between GPUs", "https://github.com/deepseek-ai/DeepEP"),
    ("matplotlib", ("matplotlib",), "pictures", "pip install '.[plot]' in a checkout"),
)
_CUDA = "pip install '.[cuda]' in a checkout"
_GPU_PACKAGES = (
    ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "launches kernels", _CUDA),
    ("libmathdx", ("nvidia-libmathdx-cu13", "nvidia-libmathdx-cu12"), "cuSolverDx", _CUDA),
    ("nvrtc", ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"), "compiles kernels", _CUDA),
    ("nvjitlink", ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12"), "links kernels", _CUDA),
    (
        "nvshmem4py",
        ("nvshmem4py-cu13", "nvshmem4py-cu12"),
        "exchanges counts",
        "pip install '.[nvshmem]' in a checkout",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; by default the process's.

    Returns:
        The exit status: 0; 2 where `doctor` finds packages missing or settings that cannot be; 1
        where the reader of the output left, as `head` does.

    Raises:
        SystemExit: 2 for a mistake of the caller, said in one line on stderr.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command is not _demo:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = int(args.command(args, rest))
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered goes nowhere, for Python flushes stdout once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lplb-ep", description="Exact load balance for DeepEP expert parallelism."
    )
    parser.add_argument("--version", action="version", version=f"lplb-ep {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    doctor = commands.add_parser("doctor", help="what is installed, set, and used, and why")
    doctor.set_defaults(command=_doctor)

    _add_replay(commands)
    _add_place(commands)

    bench = commands.add_parser(
        "bench",
        help="what a plan on the GPU costs, by step, and how far it is from the optimum",
        description="Times plans on the current GPU, on the same skewed loads at every run. "
        "Without --ranks, for all of the usual sizes.",
    )
    bench.set_defaults(command=_bench)
    bench.add_argument("--ranks", type=int, metavar="R")
    bench.add_argument("--redundant", type=int, metavar="D", help="on each rank; 2")
    bench.add_argument("--experts", type=int, default=256, metavar="E", help="256")
    bench.add_argument("--tokens", type=int, default=8192, metavar="T", help="of a rank; 8192")
    bench.add_argument("--topk", type=int, default=8, metavar="K", help="8")
    bench.add_argument("--placement", metavar="KIND", help="a topology or eplb, the default")
    bench.add_argument("--solver", choices=("flow", "cusolverdx"), default="flow")
    bench.add_argument("--json", metavar="PATH", help="write all numbers")

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
        usage="lplb-ep run [--placement FILE] [--mode 0|home|1] (SCRIPT | -m MODULE) [ARG ...]",
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
    _add_recording(replay)
    replay.add_argument("--placement", required=True, metavar="KIND", help=_KINDS)
    replay.add_argument("--ranks", type=int, metavar="R", help="ranks; not with a placement file")
    replay.add_argument(
        "--redundant",
        type=int,
        metavar="D",
        help="redundant experts on each rank; a topology has a default",
    )
    replay.add_argument("--ranks-per-node", type=int, metavar="N", help="default: all ranks")
    replay.add_argument(
        "--groups", type=int, metavar="G", help="eplb and lp: the router's expert groups"
    )
    replay.add_argument(
        "--learn-from",
        metavar="FILE[:KEY]|KEY",
        help="learn the placement on another recording, or on another array of this one",
    )
    replay.add_argument(
        "--learn-layout", metavar="LAYOUT", help="of --learn-from; default: as --layout"
    )
    replay.add_argument("--json", metavar="PATH", help="write all numbers")
    replay.add_argument("--png", metavar="PATH", help="draw the layers' imbalance")
    over_time = replay.add_argument_group(
        "over time", "with --refresh: one workload after another, and replicas that follow them"
    )
    over_time.add_argument(
        "--refresh", type=int, metavar="N", help="look every N batches whether to move replicas"
    )
    over_time.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="FILE[:KEY]|KEY",
        help="what comes next: another recording, or another array of this one; may be repeated",
    )
    over_time.add_argument(
        "--draw", type=int, metavar="N", help="draw N batches at random from each workload's total"
    )
    for name, kind, metavar, text in (
        ("threshold", float, "X", "T* / mean to exceed before replicas move"),
        ("changes", int, "M", "replicas of a layer that a refresh moves at most"),
        ("seconds", float, "S", "to choose the replicas of a layer; inf: no limit of time"),
    ):
        text += f"; {getattr(Settings(), f'refresh_{name}')}"
        over_time.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    over_time.add_argument(
        "--expert-bytes", type=int, metavar="B", help="weights of an expert, to tell bytes moved"
    )


def _add_recording(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a recording: .npy, .npz, .pt or a directory")
    parser.add_argument("--key", help="which array of an .npz that holds several")
    parser.add_argument(
        "--layout", help="what three dimensions are: counts, layer-token or token-layer"
    )
    parser.add_argument("--experts", type=int, metavar="E", help="the number of logical experts")
    parser.add_argument(
        "--tokens-per-batch", type=int, metavar="T", help="cut expert ids into batches of T tokens"
    )


def _add_place(commands: Any) -> None:
    place = commands.add_parser(
        "place",
        help="a placement for every layer of a recording, made for the linear program",
        description="Learns a placement of each layer on recorded routing (Placement.for_lp), "
        "writes them to a file for replay, and shows what they are worth on the same load.",
    )
    place.set_defaults(command=_place)
    _add_recording(place)
    place.add_argument("-o", "--output", required=True, metavar="PATH", help="the JSON to write")
    place.add_argument("--ranks", type=int, metavar="R", help="with --start its own")
    place.add_argument(
        "--redundant", type=int, metavar="D", help="on each rank; with --start its own"
    )
    place.add_argument("--ranks-per-node", type=int, metavar="N", help="default: all ranks")
    place.add_argument("--groups", type=int, metavar="G", help="the router's expert groups")
    place.add_argument(
        "--drift", type=float, default=0.8, metavar="X", help="how far loads may move away; 0.8"
    )
    place.add_argument(
        "--percentile", type=float, metavar="P", help="of the optima to minimise; default: mean"
    )
    place.add_argument("--seed", type=int, default=0, help="0")
    place.add_argument("--seconds", type=float, metavar="S", help="end a layer's search after S")
    place.add_argument("--start", metavar="FILE", help="improve the placements of this file")
    place.add_argument("--fixed-homes", action="store_true", help="move replicas of --start only")
    place.add_argument("--max-changes", type=int, metavar="M", help="slots of --start to change")
    place.add_argument("--png", metavar="PATH", help="draw the replica graph of the worst layer")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the process with status 2 and one line for a mistake of the caller."""
    try:
        yield
    except BrokenPipeError:  # not a mistake: `main` ends quietly
        raise
    except (OSError, ValueError, MissingPackageError, CompileError) as error:
        print(f"lplb-ep: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def _as_typed(options: Mapping[str, str]) -> Iterator[None]:
    """Puts the options that the caller typed in place of the library's arguments in an error."""
    try:
        yield
    except ValueError as error:
        arguments = rf"(?<![\w./'-])({'|'.join(options)})(?![\w./'-])"
        said = re.sub(arguments, lambda match: options[match[1]], str(error))
        raise ValueError(said) from None


def _doctor(args: argparse.Namespace, rest: list[str]) -> int:
    print(f"lplb-ep {__version__}, Python {sys.version.split()[0]}")
    for heading, packages in (
        ("Packages", _PACKAGES),
        ("Packages for plans on the GPU", _GPU_PACKAGES),
    ):
        print(f"\n{heading}")
        for name, distributions, purpose, install in packages:
            found = next(filter(None, map(_version, distributions)), None)
            _line(name, found or "missing", purpose if found else f"{purpose}: {install}")

    print("\nDevices")
    try:
        _print_devices()
    except ImportError as error:
        print(f"  error: {error}")

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
    try:
        choices = _choices(settings)
    except ImportError as error:
        print(f"  error: {error}")
        return 2
    status = 0
    for name, choose in choices.items():
        try:
            _line(name, *choose())
        except (OSError, ValueError, MissingPackageError) as error:
            _line(name, "error", str(error))
            status = 2
    return status


def _print_devices() -> None:
    import torch

    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        _line(f"cuda:{index}", f"sm_{major}{minor}", torch.cuda.get_device_name(index))
    if not torch.cuda.is_available():
        version = torch.version.cuda
        _line("cuda", "none", f"torch has CUDA {version}" if version else "torch has no CUDA")


def _choices(settings: Settings) -> dict[str, Callable[[], tuple[str, str]]]:
    """What the settings lead to on this machine: a choice and its reason, by part."""
    from ..deepep.drop_in import choose_backend
    from ..placement.table import Placement
    from ..planning.solve import choose_solver

    choices: dict[str, Callable[[], tuple[str, str]]] = {
        "buffer": lambda: choose_backend(settings.backend),
        "counts": lambda: _choose_counts(settings),
        "solver": lambda: choose_solver(settings.solver),
    }
    if settings.placement:
        choices["placement"] = lambda: (
            settings.placement,
            repr(Placement.load(settings.placement)),
        )
    return choices


def _choose_counts(settings: Settings) -> tuple[str, str]:
    """For ranks on machines like this one."""
    from ..comm.exchange import Reach, choose_counts
    from ..comm.peers import reach
    from ..planning.solve import choose_solver

    on_gpu = choose_solver(settings.solver)[0] != "cpu"
    return choose_counts(settings.counts, 2, True, on_gpu, reach(None) if on_gpu else Reach())


def _line(name: str, value: str, note: str, *, width: int = 12) -> None:
    print(f"  {name:<{width}} {value:<16} {note}".rstrip())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _replay(args: argparse.Namespace, rest: list[str]) -> int:
    with _one_line_errors():
        _check_outputs(args)
        _check_over_time(args)
        from . import report

        recording, learned = _recordings(args)
        placements = _placements(args, recording, learned)
        if args.refresh is not None:
            return _replay_over_time(args, recording, learned, placements)
        result = report.replay(recording, placements)

        num_batches, num_layers, num_experts = recording.counts.shape
        num_ranks, num_slots = placements[0].num_ranks, placements[0].num_physical_experts
        where = f"{args.placement}, {num_ranks} ranks, {num_slots} slots for {num_experts} experts"
        if args.learn_from is not None:
            where += f", learned from {learned.source}"
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
        print(f"recording  {recording.source}: {num_batches} batch(es), {num_layers} layers")
        print(f"placement  {where}")
        print("imbalance  max rank load / mean rank load; 1.000 is ideal\n")
        print(result.table())
    return 0


def _check_over_time(args: argparse.Namespace) -> None:
    """Refuses what could not be replayed over time, before the work is done."""
    if args.refresh is None:
        for name in ("then", "draw", "threshold", "changes", "seconds", "expert_bytes"):
            if getattr(args, name) not in (None, []):
                raise ValueError(f"--{name.replace('_', '-')} needs --refresh")
        return
    from .timeline import check_interval

    with _as_typed(_OPTIONS):
        check_interval(args.refresh)
    _refresh_settings(args)
    _check_least(args, "expert_bytes")


def _refresh_settings(args: argparse.Namespace) -> Settings:
    """Those of the options that were given."""
    options = {f"refresh_{n}": getattr(args, n) for n in ("threshold", "changes", "seconds")}
    given = {name: value for name, value in options.items() if value is not None}
    with _as_typed(_OPTIONS):
        return Settings(refresh=args.refresh, **given)


def _replay_over_time(
    args: argparse.Namespace,
    recording: Recording,
    learned: Recording,
    placements: Sequence[Placement],
) -> int:
    from . import timeline

    workloads = [recording, *(_another(args, "--then", then, args.layout) for then in args.then)]
    if args.draw is not None:
        workloads = [timeline.draw_batches(w, args.draw) for w in workloads]
    settings = _refresh_settings(args)

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == len(placements) else ""
            print(f"\rlayer {done} of {len(placements)}", end=end, file=sys.stderr, flush=True)

    with _as_typed(_OPTIONS):
        result = timeline.replay_over_time(
            workloads, placements, settings, num_groups=args.groups, progress=progress
        )
    moved = sum(move.num_copies for move in result.moves)
    about: dict[str, Any] = {
        "placement": args.placement,
        "learned_from": learned.source,
        "num_ranks": placements[0].num_ranks,
        "num_physical_experts": placements[0].num_physical_experts,
        "num_moved": moved,
        "num_anew": sum(move.num_anew for move in result.moves),
        "bytes_moved": None if args.expert_bytes is None else moved * args.expert_bytes,
    }
    where = (
        f"{args.placement}, {about['num_ranks']} ranks, {about['num_physical_experts']} slots for "
        f"{recording.num_experts} experts, learned from {learned.source}"
    )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({**about, **result.to_json()}, file)
    if args.png:
        title = f"{recording.source}, and replicas that follow"
        timeline.plot_timeline(args.png, result, title=title, footnote=where)
    print(f"placement  {where}")
    print("imbalance  max rank load / mean rank load, median / worst over batches and layers\n")
    print(result.table())
    layers = len({move.layer for move in result.moves})
    print(
        f"\nrefreshes  {len(result.moves)} of {layers} layers: {moved} replicas moved "
        f"(EPLB anew each time: {about['num_anew']} copies)"
        + (f", {about['bytes_moved'] / 1e9:.2f} GB out" if args.expert_bytes is not None else "")
    )
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuses what could not be written, before the work is done."""
    png = getattr(args, "png", None)
    paths = {"--json": getattr(args, "json", None), "--png": png}
    for option, path in {**paths, "-o": getattr(args, "output", None)}.items():
        if path and not Path(path).parent.is_dir():
            raise ValueError(f"{option} {path}: there is no directory {Path(path).parent}")
        if path and Path(path).is_dir():
            raise ValueError(f"{option} {path} is a directory, not a file to write")
    if png and Path(png).suffix != ".png":
        raise ValueError(f"--png must end in .png; got {png}")


def _check_least(args: argparse.Namespace, *names: str) -> None:
    """Refuses options below 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0; got {value}")


def _recording(args: argparse.Namespace) -> Recording:
    from .report import load_recording

    with _as_typed(_OPTIONS):
        return load_recording(
            args.file,
            key=args.key,
            layout=args.layout,
            num_experts=args.experts,
            tokens_per_batch=args.tokens_per_batch,
        )


def _recordings(args: argparse.Namespace) -> tuple[Recording, Recording]:
    """What is replayed, and what the placement is learned on."""
    recording = _recording(args)
    if args.learn_from is None:
        if args.learn_layout is not None:
            raise ValueError("--learn-layout needs --learn-from")
        return recording, recording
    layout = args.layout if args.learn_layout is None else args.learn_layout
    return recording, _another(args, "--learn-from", args.learn_from, layout)


def _another(args: argparse.Namespace, option: str, said: str, layout: str | None) -> Recording:
    """What an option names: a file, a file and its key, or a key of the replayed file."""
    from .report import load_recording

    path, _, key = said.rpartition(":")
    named: tuple[str, str | None] = (args.file, said)
    if Path(said).exists():
        named = (said, args.key if said.endswith(".npz") else None)
    elif path and Path(path).exists():
        named = (path, key)
    elif not args.file.endswith(".npz"):
        raise ValueError(f"{option}: there is no file {said}")
    options = {**_OPTIONS, "key": f"{option} FILE:KEY"}
    options["layout"] = "--learn-layout" if option == "--learn-from" else "--layout"
    # What a placement is learned on is added up anyway.
    size = args.tokens_per_batch if option == "--then" else None
    with _as_typed(options):
        return load_recording(
            named[0],
            key=named[1],
            layout=layout,
            num_experts=args.experts,
            tokens_per_batch=size,
        )


def _placements(
    args: argparse.Namespace, recording: Recording, learned: Recording
) -> list[Placement]:
    """One for each layer, made from the learned load or read from the file."""
    from ..placement.table import Placement

    kind, num_layers = args.placement, len(recording.layers)
    topology = kind.split(":")[0] in TOPOLOGIES
    if not topology and kind not in ("eplb", "lp"):
        if not Path(kind).exists():
            raise ValueError(f"--placement must be {_KINDS}; got {kind!r}")
        # With a refresher groups are those by which it is compared with EPLB.
        unfit = ["ranks", "redundant", "ranks_per_node", "learn_from"]
        unfit += [] if getattr(args, "refresh", None) else ["groups"]
        given = [f"--{name.replace('_', '-')}" for name in unfit if getattr(args, name) is not None]
        if given:
            raise ValueError(f"{given[0]} does not go with a placement file ({kind})")
        return _from_file(kind, recording.layers)
    if args.ranks is None or (args.redundant is None and not topology):
        raise ValueError(
            f"--placement {kind} needs --ranks{'' if topology else ' and --redundant'}"
        )
    if args.groups is not None and topology:
        raise ValueError(f"--groups is for --placement eplb and lp; got {kind}")
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
    if kind == "lp":
        return _for_lp(learned, num_groups=args.groups, **shape)
    names = dict(_OPTIONS)
    if args.experts is None:
        names["num_experts"] = "the number of experts"
    with _as_typed(names):
        if topology:
            return [
                Placement.from_topology(kind, num_experts=learned.num_experts, load=load, **shape)
                for load in learned.load
            ]
        return [
            Placement.from_history(load, num_groups=args.groups, **shape) for load in learned.load
        ]


def _from_file(path: str, layers: Sequence[int]) -> list[Placement]:
    """The layers' placements from a file with one for each of them, or one for all."""
    from ..placement.table import Placement, load_placements

    with open(path, "rb") as file:
        if b'"lplb_ep_placements"' not in file.read(64):
            return [Placement.load(path)] * len(layers)
    placements = load_placements(path)
    missing = [layer for layer in layers if layer not in placements]
    if missing:
        raise ValueError(f"{path} has no placement for layer {missing[0]}")
    return [placements[layer] for layer in layers]


def _for_lp(
    learned: Recording, start: Sequence[Placement] | None = None, **options: Any
) -> list[Placement]:
    """`Placement.for_lp` of each layer, the layers counted on a terminal."""
    from ..placement.table import Placement

    placements: list[Placement] = []
    names = dict(_OPTIONS)
    if options["num_redundant_per_rank"] is None:
        names["num_redundant_per_rank"] = "the number of redundant slots of --start"
    for layer in range(len(learned.layers)):
        if sys.stderr.isatty():
            print(f"\rlayer {layer + 1} of {len(learned.layers)}", end="", file=sys.stderr)
        with _as_typed(names):
            before = None if start is None else start[layer]
            placements.append(Placement.for_lp(learned.counts[:, layer], start=before, **options))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return placements


def _place(args: argparse.Namespace, rest: list[str]) -> int:
    with _one_line_errors():
        _check_outputs(args)
        _check_least(args, "seed", "seconds")
        from ..placement.table import save_placements
        from . import report

        recording = _recording(args)
        start = None if args.start is None else _from_file(args.start, recording.layers)
        if start is None and (args.ranks is None or args.redundant is None):
            raise ValueError("place needs --ranks and --redundant, or --start")
        placements = _for_lp(
            recording,
            start,
            num_ranks=args.ranks,
            num_redundant_per_rank=args.redundant,
            num_ranks_per_node=args.ranks_per_node,
            num_groups=args.groups,
            fixed_homes=args.fixed_homes,
            max_changes=args.max_changes,
            percentile=args.percentile,
            drift=args.drift,
            seed=args.seed,
            time_budget_s=args.seconds,
        )
        save_placements(args.output, dict(zip(recording.layers, placements, strict=True)))
        print(f"recording  {recording.source}: {len(recording.counts)} batch(es)")
        print("imbalance  max rank load / mean rank load on all of it; 1.000 is ideal\n")
        lines, worst = report.describe(recording, placements, start)
        print(lines)
        if args.png:
            layer = recording.layers[worst]
            title = f"{recording.source}, layer {layer}"
            report.plot_placement(args.png, placements[worst], recording.load[worst], title=title)
    return 0


def _bench(args: argparse.Namespace, rest: list[str]) -> int:
    with _one_line_errors():
        _check_outputs(args)
        if args.ranks is None and (args.placement, args.redundant) != (None, None):
            raise ValueError("--placement and --redundant need --ranks")
        from ..planning import device as cuda
        from . import bench

        cuda.check(solver=args.solver)
        rows, used = [], []
        chosen = (
            args.placement or "eplb",
            args.ranks,
            2 if args.redundant is None else args.redundant,
        )
        for kind, num_ranks, redundant in bench.USUAL if args.ranks is None else [chosen]:
            with _as_typed({**_OPTIONS, "num_tokens": "--tokens", "num_topk": "--topk"}):
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
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({**about, "rows": dict(rows)}, file)
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        print(f"\n{bench.table(rows)}")
    return 0


def _compile(args: argparse.Namespace, rest: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with _one_line_errors():
        from ..gpu.jit import compile_all
        from ..planning.device import programs

        compile_all(programs(), args.arch or ["sm_90", "sm_100"])
    return 0


def _demo(args: argparse.Namespace, rest: list[str]) -> NoReturn:
    script = Path(__file__).resolve().parents[2] / "examples" / "moe_layer.py"
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
            from ..placement.table import Placement

            Placement.load(settings.placement)
    put_first_on_python_path(Path(__file__).resolve().parents[1] / "deepep" / "startup")
    _become_python(["-m", *program] if args.module else program)


def _become_python(arguments: Sequence[str]) -> NoReturn:
    """Goes on as the interpreter of this process, run afresh: the program finds all as usual."""
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    sys.exit(main())
