import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

import emulator  # noqa: E402
import plans  # noqa: E402

from lplb_ep.gpu.jit import KERNELS  # noqa: E402


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Gives the library of a program; those of `plans.PROGRAMS` are built two at a time."""
    # faults.py changes the sources, and keeps the libraries of those that it leaves as they are.
    kernels = Path(os.environ.get("LPLB_TEST_KERNELS", KERNELS))
    kept = os.environ.get("LPLB_TEST_EMULATED")
    directory = Path(kept) if kept else tmp_path_factory.mktemp("emulated")

    def build(program):
        return emulator.build(program, directory, kernels, warns=kernels == KERNELS)

    with ThreadPoolExecutor(2) as threads:
        paths = [*threads.map(build, plans.PROGRAMS)]
    # Loaded by the thread that runs them, whose thread-local memory is shared memory.
    libraries = {str(p): emulator.Library(q) for p, q in zip(plans.PROGRAMS, paths, strict=True)}

    def get(program):
        if str(program) not in libraries:
            libraries[str(program)] = emulator.Library(build(program))
        return libraries[str(program)]

    return get


@pytest.fixture
def memory():
    """Empty at first."""
    return emulator.Memory()
