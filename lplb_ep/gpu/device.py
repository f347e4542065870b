"""Whether the kernels run on the current CUDA device; queries that are valid during captures."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator

import torch

from ..errors import MissingPackageError
from .toolchain import require

MIN_CAPABILITY = (8, 0)
"""Of a device: warps add up in one instruction from sm_80 on."""

_CAPTURE_MODE_RELAXED = 2  # of CUDA's `cuda.h`


def check_device(*tools: str) -> None:
    """Checks whether kernels can be compiled for the current device and run on it.

    Args:
        tools: NVIDIA libraries that are needed beside NVRTC: "mathdx", "nvJitLink".

    Raises:
        MissingPackageError: there is no CUDA device that the kernels run on, or a package is
            missing; says which.
    """
    if not torch.cuda.is_available():
        raise MissingPackageError("there is no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < MIN_CAPABILITY:
        raise MissingPackageError(
            f"the kernels need sm_80 or newer, and the CUDA device is sm_{major}{minor}"
        )
    if importlib.util.find_spec("cupy") is None:
        raise MissingPackageError("cupy is not installed: pip install '.[cuda]' in a checkout")
    require("nvrtc", *tools)


@contextlib.contextmanager
def captures_go_on() -> Iterator[None]:
    """Lets this thread ask a GPU inside, while another thread captures a CUDA graph.

    Without it the question may end the capture in an error.
    """
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))
