"""A node for the tests: as many ranks as asked for, on the GPUs there are. Ranks that share one do
so under CUDA's multi-process service, each with a part of it."""

import os
import subprocess

import pytest
import ranks


@pytest.fixture(scope="session")
def mps(tmp_path_factory):
    """The environment of a daemon of our own."""
    folder = str(tmp_path_factory.mktemp("mps"))
    environ = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
    control = ["nvidia-cuda-mps-control"]
    subprocess.run([*control, "-d"], env={**os.environ, **environ}, check=True, timeout=30)
    yield environ
    ranks.close()
    subprocess.run(
        control, input="quit\n", text=True, env={**os.environ, **environ}, check=True, timeout=60
    )


@pytest.fixture
def node(mps):
    """`ranks.run` with GPUs."""

    def run(num_ranks, function, *args, environ=None, **kwargs):
        part = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // num_ranks)}
        environ = {**mps, **part, **(environ or {})}
        try:
            return ranks.run(num_ranks, function, *args, environ=environ, **kwargs)
        except ranks.RanksFailedError:
            ranks.close()  # some may wait for others still
            raise

    return run
