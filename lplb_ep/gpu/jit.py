"""Programs and their machine code: compiled once, then from a cache on disk.

Compiling needs neither a GPU nor a driver, so any machine compiles for any architecture. Sources
lie in `kernels/`. A source sees the headers (`*.cuh`) beside it and nothing else, neither the
toolkit's nor the standard library's. So the cache's key, which has their text in it, is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CompileError
from ..logs import logger
from ..settings import cache_directory
from . import cache
from .toolchain import LINK_OPTIONS, CuSolverDx, build, versions

log = logger(__name__)
progress = logging.getLogger(__name__)
"""Lines for whoever waits, and not for a job's log: nothing stands before them."""

KERNELS = Path(__file__).parents[1] / "kernels"
MAX_THREADS = 8
"""That compile at a time, at most."""

# Part of every key; raised when a change here would make old entries wrong.
_SCHEMA = 1
_COMPILE_OPTIONS = ("-std=c++17", "-lineinfo", "-no-source-include")


@dataclass(frozen=True)
class Program:
    """A source and what it is compiled with; with an architecture it makes a `Cubin`.

    Args:
        source: a file in `kernels/`, such as "count.cu", or a path.
        defines: macros, name to value.
        solvers: device functions of cuSolverDx that the source calls.
    """

    source: str | Path
    defines: Mapping[str, int | str] = field(default_factory=dict)
    solvers: Sequence[CuSolverDx] = ()

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.defines.items())
        return f"{Path(self.source).name}{f' ({values})' if values else ''}"


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture.

    Attributes:
        name: the program, for messages.
        arch: "sm_90", ...
        data: an ELF image.
        path: its entry in the cache, which cuobjdump and nvdisasm read as it is.
        cached: whether it came from there.
    """

    name: str
    arch: str
    data: bytes = field(repr=False)
    path: Path
    cached: bool


def compile_all(programs: Iterable[Program], archs: Sequence[str]) -> list[Cubin]:
    """Compiles every program for every architecture, several at a time, logging each at INFO.

    Raises:
        CompileError, MissingPackageError, ValueError: as `compile_cubin`, at the first that fails.
    """
    pairs = [(program, arch) for program in programs for arch in archs]
    cubins = []
    # The compilers run outside of Python's lock, and with cuSolverDx take half a gigabyte each.
    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads) as threads:
        under_way = [threads.submit(compile_cubin, *pair) for pair in pairs]
        try:
            for number, (pair, future) in enumerate(zip(pairs, under_way, strict=True), 1):
                cubin = future.result()
                cubins.append(cubin)
                origin = "in the cache" if cubin.cached else "compiled"
                done = f"[{number}/{len(pairs)}] {pair[0]} for {pair[1]}"
                progress.info("%s: %s, %d bytes", done, origin, len(cubin.data))
        finally:
            threads.shutdown(cancel_futures=True)
    return cubins


def compile_cubin(program: Program, arch: str = "sm_90") -> Cubin:
    """The machine code of a program, from the cache or compiled now.

    Of several processes that miss the same entry one compiles and the others wait for it. An entry
    that is cut short, damaged or another program's is compiled anew. So is one that another user
    can have written. Where the cache cannot be written, that is logged as a warning, and the cubin
    is good for this process only.

    Args:
        program: what to compile.
        arch: "sm_90", "sm_100", ...; also with the suffix a (its architecture alone) or f (its
            family).

    Raises:
        CompileError: the source, or a cuSolverDx shape, does not compile for `arch`. Holds the
            log, the options, and where the source was saved.
        MissingPackageError: NVRTC, nvJitLink or libmathdx is not installed.
        OSError: the source cannot be read.
        ValueError: `arch` is not of that form.
    """
    if not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
        raise ValueError(f"arch must be sm_90, sm_100, ...; got {arch!r}")
    source = KERNELS / program.source
    texts = {p.name: p.read_text("utf-8") for p in (source, *sorted(source.parent.glob("*.cuh")))}
    options = [f"-arch={arch}", *_COMPILE_OPTIONS]
    for name, value in program.defines.items():
        options.append(f"-D{name}={value if isinstance(value, str) else int(value)}")
    solvers = tuple(program.solvers)
    recipe = (_SCHEMA, texts, options, LINK_OPTIONS, solvers, versions(solvers))
    key = hashlib.sha256(repr(recipe).encode()).hexdigest()
    path = cache_directory() / f"{source.stem}-{arch}-{key}.cubin"

    with cache.lock(path.with_suffix(".lock")):
        data = cache.read(path, key)
        if data is not None:
            return Cubin(str(program), arch, data, path, cached=True)
        # A warning, not to leave a user waiting for seconds without a word.
        log.warning("compiling %s for %s, once ...", program, arch)
        start = time.perf_counter()
        try:
            data = build(source.name, texts, options, solvers, arch)
        except CompileError as error:
            error.source = _save(path.parent / "failed" / path.stem, texts) / source.name
            raise
        log.info("compiled %s for %s in %.1f s", program, arch, time.perf_counter() - start)
        cache.write(path, key, data)
    return Cubin(str(program), arch, data, path, cached=False)


def _save(directory: Path, texts: Mapping[str, str]) -> Path:
    """Keeps the sources that did not compile; the log matters more than the copy."""
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in texts.items():
            (directory / name).write_text(text, "utf-8")
    return directory
