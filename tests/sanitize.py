"""Runs the tools of compute-sanitizer over every variant of every kernel, on one GPU.

    python tests/sanitize.py [--tools memcheck ...] [--jobs N] [--out FOLDER] [--list]

Importing torch takes longer than the kernels of a case, so each process runs a share of the cases
(`tests/variants.py`) under one tool. A log begins with the command of its process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import variants

from lplb_ep.comm.copies import BARRIER
from lplb_ep.errors import CompileError, MissingPackageError
from lplb_ep.gpu.device import check_device
from lplb_ep.gpu.jit import compile_all
from lplb_ep.planning import structs
from lplb_ep.planning.kernels import programs
from lplb_ep.weights import structs as weights_structs

FOUND = 99
"""The exit status of compute-sanitizer where it found something."""
TIMEOUT_S = 300
"""Of a process."""
NUM_PROCESSES = 4
"""Of a tool."""
MAX_JOBS = 12
"""Processes on the GPU at a time: each takes half a gigabyte beside what the tool takes."""

OWN_KERNELS = [
    option
    for signature in (*structs.SIGNATURES.values(), BARRIER, *weights_structs.SIGNATURES.values())
    for option in ("--kernel-name", f"kernel_name={signature.name}")
]
"""The options that leave torch's kernels at full speed."""
TOOLS = {
    # The slowest first: they run while the others take turns.
    "racecheck": ["--racecheck-report", "all", *OWN_KERNELS],
    # What kernels that are left out write would count as never written.
    "initcheck": [],
    # Launches that fail raise in Python. Libraries try calls that fail, and those are no faults.
    "memcheck": ["--report-api-errors", "no", *OWN_KERNELS],
    "synccheck": OWN_KERNELS,
}
"""The tools, and the options of each."""


@dataclass(frozen=True)
class Outcome:
    """What became of a process."""

    tool: str
    names: tuple[str, ...]
    log: Path
    seconds: float
    errors: int
    hazards: int
    fault: str
    """Why the run says nothing; empty: every case came to its end, and the tool summed up."""

    def __str__(self) -> str:
        found = f"{self.errors} errors, {self.hazards} hazards"
        out = f"{self.tool:9} {found}, {self.seconds:.0f} s: {' '.join(self.names)}"
        if self.fault:
            out += f"\n{'':9} {self.fault}"
        return out + (f"\n{'':9} see {self.log}" if self.fault or self.found else "")

    @property
    def found(self) -> int:
        """Errors and hazards."""
        return self.errors + self.hazards


def command(sanitizer: str, tool: str, number: int, names: Sequence[str]) -> list[str]:
    """The command of a process; `number` keeps its ports apart from other processes'."""
    return [
        *(sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)),
        *("--target-processes", "application-only", "--port", str(49152 + 20 * number)),
        # Importing torch takes longer than it waits by default. The Python stack says nothing.
        *("--launch-timeout", "0", "--show-backtrace", "device"),
        *("--destroy-on-device-error", "kernel"),  # the next cases have something to say, too
        *TOOLS[tool],
        *(sys.executable, variants.__file__, *names),
    ]


def run_process(sanitizer: str, tool: str, number: int, names: Sequence[str], out: Path) -> Outcome:
    """Runs a share of the cases under a tool, and reads its log."""
    log, start = out / f"{tool}-{number}.log", time.monotonic()
    arguments = command(sanitizer, tool, number, names)
    # Else tensors share allocations, which hides reads beyond one, and of what was never written.
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OPENBLAS_NUM_THREADS": "1"}
    with log.open("w") as file:
        settings = [f"{name}={value}" for name, value in own.items()]
        print(shlex.join([*settings, *arguments]), file=file, flush=True)
        process = subprocess.Popen(
            arguments,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own},
            start_new_session=True,
        )
        status: int | None
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    text = log.read_text(errors="replace")
    errors, hazards, fault = read_log(text, status, names)
    return Outcome(tool, tuple(names), log, time.monotonic() - start, errors, hazards, fault)


def read_log(text: str, status: int | None, names: Sequence[str]) -> tuple[int, int, str]:
    """Errors, hazards, and why a run says nothing, from its log and exit status (None: killed)."""
    errors = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    hazards = [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
    missing = sorted(set(names) - set(re.findall(r"^ran (\S+) in ", text, re.MULTILINE)))
    faults = []
    if status is None:
        faults.append(f"did not end within {TIMEOUT_S} s")
    elif status and not sum(errors + hazards):
        faults.append(f"ended with status {status}")
    if not errors + hazards:
        faults.append("the tool did not sum up")
    if missing:
        faults.append(f"did not come to their end: {' '.join(missing)}")
    return sum(errors), sum(hazards), "; ".join(faults)


def run_all(sanitizer: str, tools: Sequence[str], jobs: int, out: Path) -> list[Outcome]:
    """Runs all cases under the tools, several processes at a time, and prints what each found."""
    out.mkdir(parents=True, exist_ok=True)
    names = [case.name for case in variants.cases()]
    shares = [names[i::NUM_PROCESSES] for i in range(NUM_PROCESSES)]
    work = [(tool, share) for tool in tools for share in shares]
    outcomes = []
    with ThreadPoolExecutor(jobs) as threads:
        under_way = [
            threads.submit(run_process, sanitizer, tool, number, share, out)
            for number, (tool, share) in enumerate(work)
        ]
        for future in under_way:
            outcomes.append(future.result())
            print(outcomes[-1], flush=True)
    return outcomes


def compile_kernels() -> None:
    """Fills the cache, so that the processes load kernels and compile none."""
    check_device("mathdx", "nvJitLink")
    major, minor = torch.cuda.get_device_capability()
    compile_all(programs(), [f"sm_{major}{minor}"])


def default_jobs() -> int:
    """Half the CPUs: compute-sanitizer has threads of its own beside Python's."""
    return max(1, min(MAX_JOBS, len(os.sched_getaffinity(0)) // 2))


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 1: something was found or did not run; 2: no tool."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes at a time")
    parser.add_argument(
        "--out", type=Path, default=variants.ROOT / "out" / "sanitize", help="for the logs"
    )
    parser.add_argument("--list", action="store_true", help="name the cases, and their programs")
    options = parser.parse_args(argv)
    if options.list:
        for case in variants.cases():
            print(f"{case.name:20} {case.program or ''}".rstrip())
        return 0
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print(
            "compute-sanitizer is not on PATH; the CUDA toolkit has it, in its folder bin",
            file=sys.stderr,
        )
        return 2
    try:
        compile_kernels()
    except (MissingPackageError, CompileError) as error:
        print(error, file=sys.stderr)
        return 2
    outcomes = run_all(sanitizer, options.tools, max(1, options.jobs), options.out)
    errors, hazards = sum(o.errors for o in outcomes), sum(o.hazards for o in outcomes)
    print(f"{len(outcomes)} processes, {errors} errors, {hazards} hazards")
    return int(any(o.found or o.fault for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
