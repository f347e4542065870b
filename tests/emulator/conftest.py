import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

import emulator
import plans


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Gives the library of a program; those of `plans.PROGRAMS` are built at once, two at a time."""
    directory = tmp_path_factory.mktemp("emulated")
    with ThreadPoolExecutor(2) as threads:
        paths = threads.map(lambda program: emulator.build(program, directory), plans.PROGRAMS)
        built = {str(p): emulator.Library(q) for p, q in zip(plans.PROGRAMS, paths, strict=True)}

    def get(program):
        if str(program) not in built:
            built[str(program)] = emulator.Library(emulator.build(program, directory))
        return built[str(program)]

    return get


@pytest.fixture
def memory():
    """Empty at first."""
    return emulator.Memory()
