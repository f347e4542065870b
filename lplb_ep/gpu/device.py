"""A CUDA device: whether the kernels run on it, and how they are loaded and launched there."""

from __future__ import annotations

import contextlib
import importlib.util

import torch

from ..errors import MissingPackageError
from .jit import Kernel, Kernels, Program, compile_cubin, require

MIN_CAPABILITY = (8, 0)
"""Of a device: warps add up in one instruction from sm_80 on."""


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


def load(program: Program, device: int) -> Kernels:
    """Compiles a program, or finds it in the cache, and loads it on a device.

    Args:
        program: what to load.
        device: the index of a CUDA device.

    Raises:
        MissingPackageError: a package that compiles or loads kernels is missing.
        CompileError: the program does not compile.
    """
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        return Kernels(compile_cubin(program, f"sm_{major}{minor}"))


def launch(
    kernel: Kernel,
    grid: tuple[int, int],
    num_threads: int,
    num_shared_bytes: int,
    device: torch.device,
    *arguments: int | bytes,
) -> None:
    """Launches a kernel on torch's current stream of a device.

    Args:
        kernel: of that device.
        grid: blocks in x and y.
        num_threads: of a block.
        num_shared_bytes: dynamic shared memory of a block.
        device: which need not be the current one.
        arguments: of the kernel, by their formats.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    # Most often the device is the current one, and entering it is left out.
    elsewhere = torch.cuda.current_device() != device.index
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel(grid, num_threads, num_shared_bytes, stream, arguments)
