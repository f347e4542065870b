import os
import sys
from pathlib import Path

import pytest

# Parts of the tests run at the same time. Threads of NumPy's BLAS on every core would spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The ranks' processes import by name: `ranks` and `oracle` from here, the test files from cpu/.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "cpu")]


def pytest_collection_modifyitems(items):
    """GPU tests are skipped without a GPU; LPLB_TEST_REQUIRE_GPU=1 runs them to fail there."""
    import torch

    if torch.cuda.is_available() or os.environ.get("LPLB_TEST_REQUIRE_GPU") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory):
    """Empty at first, for tests that compile the kernels, which takes seconds for each."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session")
def each_kernel():
    """Of the programs that `lplb-ep compile` builds a few, and every kernel source among them.

    Both solvers, the flow for one and for more arcs a thread, and both index types are among them.
    """
    from lplb_ep.planning.kernels import programs

    kinds = {}
    for program in programs():
        more = program.defines["MORE"] if program.source == "flow.cu" else None
        kinds.setdefault((program.source, program.defines.get("INDEX"), more), program)
    return list(kinds.values())


@pytest.fixture
def clean_environment(monkeypatch):
    """For commands in this process: none of the settings set, and all put back at the end."""
    for variable in [v for v in os.environ if v.startswith("LPLB_EP")]:
        monkeypatch.delenv(variable)
    for variable in ("LPLB_EP", "LPLB_EP_BACKEND", "LPLB_EP_PLACEMENT"):
        monkeypatch.setenv(variable, "")  # commands set them: put back at the end


@pytest.fixture
def fails(capsys):
    """The one line on stderr of a command that ends with status 2."""
    from lplb_ep.tools import cli

    def call(*argv):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(a) for a in argv])
        assert exit_.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("lplb-ep: error: ")
        return line

    return call
