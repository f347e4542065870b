"""Several ranks on one GPU, each with a part of it: CUDA's multi-process service."""

import contextlib
import os
import subprocess
import tempfile

import ranks

_CONTROL = "nvidia-cuda-mps-control"


@contextlib.contextmanager
def service():
    """Starts a daemon of our own, and ends it and all ranks.

    Yields a function: number of ranks → the environment for `ranks.run`.
    """
    with tempfile.TemporaryDirectory(prefix="lplb_ep_mps_") as folder:
        ours = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environ = {**os.environ, **ours}
        subprocess.run([_CONTROL, "-d"], env=environ, check=True, timeout=30)
        try:
            yield lambda n: {**ours, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // n)}
        finally:
            ranks.close()
            subprocess.run([_CONTROL], input="quit\n", text=True, env=environ, timeout=60)
