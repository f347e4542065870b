import os
import sys
from pathlib import Path

import pytest

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
    """Empty at first, for tests that compile every kernel: that takes a minute."""
    return tmp_path_factory.mktemp("kernels")
