"""`lplb-ep doctor`: the packages installed, the settings, and the choices they lead to."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...errors import MissingPackageError
from ...settings import Settings, cache_directory
from .options import in_one_line

if TYPE_CHECKING:
    from ...placement.table import Placement

# name, distributions that bring it, what it is for, how to get it
_PACKAGES = (
    ("torch", ("torch",), "tensors and groups", "pip install torch"),
    ("numpy", ("numpy",), "plans on the CPU", "pip install numpy"),
    ("scipy", ("scipy",), "maximum flows", "pip install scipy"),
    (
        "deep_ep",
        ("deep_ep", "deep-ep"),
        "moves tokens between GPUs",
        "https://github.com/deepseek-ai/DeepEP",
    ),
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


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser = commands.add_parser(
        "doctor", help="packages, settings, and the choices they lead to, with reasons"
    )
    parser.set_defaults(command=_run)


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    print(f"lplb-ep {__version__}, Python {sys.version.split()[0]}")
    for heading, packages in (
        ("Packages", _PACKAGES),
        ("Packages for plans on the GPU", _GPU_PACKAGES),
    ):
        print(f"\n{heading}")
        for name, distributions, purpose, install in packages:
            found = next(filter(None, map(_version, distributions)), None) or _importable(name)
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
            _line(name, "error", in_one_line(error))
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
    from ...deepep.drop_in import choose_backend
    from ...planning.solvers import choose_solver

    choices: dict[str, Callable[[], tuple[str, str]]] = {
        "kernels": _kernel_cache,
        "buffer": lambda: choose_backend(settings.backend),
        "counts": lambda: _choose_counts(settings),
        "solver": lambda: choose_solver(settings.solver, objective=settings.objective),
        "cost": lambda: _describe_cost(settings),
        "batches": lambda: _describe_batches(settings),
    }
    if settings.placement:
        choices["placement"] = lambda: _describe_placement(settings)
        choices["guests"] = lambda: _describe_guests(settings)
    if settings.one_launch:
        choices["launches"] = lambda: _describe_launches(settings)
    if settings.metrics:
        choices["metrics"] = lambda: _describe_metrics(settings)
    if settings.record:
        choices["record"] = lambda: _describe_record(settings)
    return choices


def _describe_launches(settings: Settings) -> tuple[str, str]:
    """Launches of a small batch's plan, and why."""
    from ...gpu.launch import max_shared_bytes
    from ...placement.layer_files import placements_of_modules
    from ...planning.solvers import choose_solver, in_steps, why_in_steps

    objective = settings.objective
    named = placements_of_modules(settings.placement) if settings.placement else {}
    for name, placement in {**named, "": named.get("")}.items():
        solver, _ = choose_solver(settings.solver, placement, objective=objective)
        if solver == "cpu":
            return "none", "plans are made on the CPU"
        if placement is not None:
            most = max_shared_bytes(0)
            asked = placement, solver, most
            why = why_in_steps(*asked, objective=objective, least_gain=settings.min_gain)
            if why:
                return "three", f"{name}: {why}" if name else why
    why = in_steps(_choose_counts(settings)[0])
    return ("three", why) if why else ("one", f"of at most {settings.one_launch} picks of a rank")


def _describe_metrics(settings: Settings) -> tuple[str, str]:
    """The file of statistics, and what becomes of one that is there.

    Raises:
        OSError: it cannot be written.
    """
    from ...metrics.line_file import MAX_BYTES, check_writable
    from ..metric_lines import read_metrics

    path = _writable(settings.metrics, check_writable)
    if settings.mode != "1":
        return str(path), f"nothing is written where LPLB_EP is {settings.mode}, but where it is 1"
    said = f"every {settings.log_every} batches of a layer, two files of {MAX_BYTES >> 20} MiB"
    if path.exists():
        try:
            read_metrics(path)
            said += "; replaces those of another run"
        except ValueError:
            said += "; replaces a file that has no metrics"
    return str(path), said + _beside(path)


def _describe_record(settings: Settings) -> tuple[str, str]:
    """The recording, and what becomes of a file that is there.

    Raises:
        OSError: it cannot be written.
    """
    from ...metrics.recorder import MAX_BYTES, check_writable
    from ..recordings import load_recording

    path = _writable(settings.record, check_writable)
    if settings.mode != "1":
        return str(path), f"nothing is recorded where LPLB_EP is {settings.mode}, but where it is 1"
    free = shutil.disk_usage(path.parent).free
    if free < 2 * MAX_BYTES:  # the old file stays until the new one is whole
        most = 2 * MAX_BYTES >> 20
        raise OSError(f"{path}: {free >> 20} MiB are free there, and it may take {most}")
    said = f"every {settings.record_every} batches, at most {MAX_BYTES >> 20} MiB"
    if path.exists():
        try:
            said += f"; replaces {load_recording(path).source}"
        except ValueError:
            said += "; replaces a file that is no recording"
    return str(path), said + _beside(path)


def _beside(path: Path) -> str:
    """What becomes of files of other ranks, which an earlier job left."""
    from ...metrics.rank_files import files_of_ranks

    names = [file.name for file in files_of_ranks(path)]
    return f"; replaces or removes {', '.join(names)}" if names else ""


def _writable(name: str, check: Callable[[Path], None]) -> Path:
    """The path of a file that jobs write.

    Raises:
        OSError: the check has found that it cannot be written; names the file.
    """
    path = Path(name)
    try:
        check(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _kernel_cache() -> tuple[str, str]:
    """Where compiled kernels are kept.

    Raises:
        OSError: they cannot be kept there, or would not be trusted.
    """
    from ...gpu.cache import fault_of_directory

    directory = cache_directory()
    fault = fault_of_directory(directory)
    if fault is not None:
        raise OSError(f"compiled kernels are not kept: {fault}")
    entries = len(list(directory.glob("*.cubin")))
    return str(directory), f"{entries} compiled kernel(s)"


def _describe_placement(settings: Settings) -> tuple[str, str]:
    """The placements of `LPLB_EP_PLACEMENT`.

    Raises:
        ValueError: the file has none, or one does not go with the settings; names both.
    """
    from ...placement.layer_files import placements_of_modules

    placements = placements_of_modules(settings.placement)
    for name, placement in placements.items():
        _check_planned(settings, placement, name)
    said = (
        f"{name}: {placement}" if name else repr(placement)
        for name, placement in placements.items()
    )
    return settings.placement, "; ".join(said)


def _check_planned(settings: Settings, placement: Placement, name: str = "") -> None:
    """Holds a placement, by its module's name, against the settings that it would be planned with.

    Raises:
        ValueError: they do not go together; names the setting.
    """
    from ...deepep.channels import PlannerSettings

    try:
        PlannerSettings.of(replace(settings, mode="1")).check_placement(placement)
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from None


def _describe_guests(settings: Settings) -> tuple[str, str]:
    """Most guest slots of a placement of `LPLB_EP_PLACEMENT`, and what they ask for."""
    from ...placement.layer_files import placements_of_modules
    from ...planning.solvers import choose_solver

    placements = placements_of_modules(settings.placement).values()
    placement = max(placements, key=lambda placement: placement.num_guests_per_rank)
    guests = placement.num_guests_per_rank
    if not guests:
        return "none", "the placement has no guest slots"
    solver, _ = choose_solver(settings.solver, placement)
    return (
        f"{guests} a rank",
        f"of {placement.num_local_slots} slots, which DeepEP counts; solver {solver}; taken where "
        f"T* exceeds {1 + settings.guest_tolerance:g} x the mean, "
        f"each for {settings.guest_min_tokens} tokens or more",
    )


def _describe_cost(settings: Settings) -> tuple[str, str]:
    """The cost model, the reason for it, the source of its numbers, and its users."""
    import torch

    from ...cost import choose_cost

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    model, why = choose_cost(settings.cost, device)
    used = {
        "tokens": "; the objective tokens takes no costs",
        "experts": f"; the objective experts splits only those above {model.free_rows} rows",
    }.get(settings.objective, "")
    return model.name, f"{why} ({model.about}){used}"


def _describe_batches(settings: Settings) -> tuple[str, str]:
    """Which batches are exchanged and solved.

    Raises:
        ValueError: settings do not go together; names them.
    """
    from ...placement.table import Placement

    _check_planned(replace(settings, cost=""), Placement([0], 1))
    if settings.every == 1:
        return "all", "exchanged and solved, each by its own counts"
    return (
        f"1 in {settings.every}",
        "exchanged and solved; the others split picks by its quotas, which is not the optimum: "
        f"lplb-ep replay --every {settings.every} has the cost",
    )


def _choose_counts(settings: Settings) -> tuple[str, str]:
    """For ranks on machines like this one."""
    from ...comm.connect import choose_counts
    from ...comm.reachability import Reachability, reachability
    from ...planning.solvers import choose_solver

    on_gpu = choose_solver(settings.solver)[0] != "cpu"
    found = reachability(None) if on_gpu else Reachability()
    return choose_counts(settings.counts, 2, True, on_gpu, found)


def _line(name: str, value: str, note: str, *, width: int = 12) -> None:
    print(f"  {name:<{width}} {value:<16} {note}".rstrip())


def _importable(module: str) -> str | None:
    """Says that a package without metadata is there: built in place, or on the path by itself."""
    try:
        there = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent that breaks, or a module without a spec
        there = module in sys.modules
    return "no metadata" if there else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
