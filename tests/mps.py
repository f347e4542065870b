"""Several ranks on one GPU, each with a part of it: CUDA's multi-process service. With a GPU for
each they need none."""

import contextlib
import os
import subprocess
import tempfile

import ranks
import torch

_CONTROL = "nvidia-cuda-mps-control"


def has_gpu_each(num_ranks: int = 2) -> bool:
    """Whether each rank has a GPU, or shares one as LPLB_TEST_SHARE_GPU=1 requests.

    Ranks that share a GPU want NCCL of 2.30 at least, with NCCL_MULTI_RANK_GPU_ENABLE=1.
    """
    return torch.cuda.device_count() >= num_ranks or os.environ.get("LPLB_TEST_SHARE_GPU") == "1"


@contextlib.contextmanager
def service():
    """Starts a daemon of our own, and ends it and all ranks.

    Yields a function: number of ranks → the environment for `ranks.run`.
    """
    num_gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory(prefix="lplb_ep_mps_") as folder:
        ours = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        # A daemon numbers the GPUs that it sees anew, and ranks would choose among these again.
        environ = {**os.environ, **ours}
        environ.pop("CUDA_VISIBLE_DEVICES", None)
        subprocess.run([_CONTROL, "-d"], env=environ, check=True, timeout=30)
        try:
            share = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
            yield lambda n: {} if n <= num_gpus else {**ours, share: str(100 * num_gpus // n)}
        finally:
            ranks.close()
            subprocess.run([_CONTROL], input="quit\n", text=True, env=environ, timeout=60)
