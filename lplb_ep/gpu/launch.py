"""Kernels that are loaded on a device, and launches whose arguments lie ready."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import MissingPackageError
from .jit import Cubin, Program, compile_cubin
from .toolchain import INSTALL

# Of CUDA's `cuda.h`: attributes of a kernel, and of a device.
_STATIC_BYTES, _MAX_DYNAMIC_BYTES, _MAX_BYTES_OF_BLOCK = 1, 8, 97
_ALIGNMENT = 16  # of the arguments, more than any type asks for

_thread = threading.local()


def max_shared_bytes(device: int) -> int:
    """The shared memory of a block on a device, static and dynamic.

    Raises:
        MissingPackageError: CuPy is not installed.
    """
    return int(_cupy().cuda.runtime.deviceGetAttribute(_MAX_BYTES_OF_BLOCK, device))


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


class Kernels:
    """The kernels of a cubin, loaded on the current CUDA device.

    Raises:
        MissingPackageError: CuPy is not installed.
    """

    def __init__(self, cubin: Cubin) -> None:
        cupy = _cupy()
        self._driver, self._runtime = cupy.cuda.driver, cupy.cuda.runtime
        self._max_shared_bytes = max_shared_bytes(self._runtime.getDevice())
        self._module = cupy.cuda.Module()
        self._module.load(cubin.data)

    def kernel(self, name: str, arguments: Sequence[str]) -> Kernel:
        """A kernel, ready to be launched on the device.

        It may be launched with all the shared memory that a block can have. All users of a kernel
        share that limit, so the need of one launch would be the wrong limit.

        Args:
            name: its name in the source, where it is `extern "C"`.
            arguments: the format of each of its arguments, as of module `struct`: "Q" is a pointer,
                "i" an int, "40s" a struct of 40 bytes.
        """
        function = self._module.get_function(name)
        static = self._driver.funcGetAttribute(_STATIC_BYTES, function.ptr)
        self._driver.funcSetAttribute(
            function.ptr, _MAX_DYNAMIC_BYTES, self._max_shared_bytes - static
        )
        return Kernel(function, self._driver, self._runtime, arguments)


class Kernel:
    """A loaded kernel and the formats of its arguments.

    Launches go by CuPy's driver interface (`cupy.cuda.driver`, which is not among its documents).
    A call of a `cupy.cuda.Function` keeps the CPU twice as long.
    """

    def __init__(self, function: Any, driver: Any, runtime: Any, arguments: Sequence[str]) -> None:
        self.function = function  # which keeps its module loaded
        self.driver, self.runtime = driver, runtime
        sizes = [struct.calcsize(f"={argument}") for argument in arguments]
        self.layout = struct.Struct(
            "="
            + "".join(
                f"{argument}{-size % _ALIGNMENT}x"
                for argument, size in zip(arguments, sizes, strict=True)
            )
        )
        padded = (size + -size % _ALIGNMENT for size in sizes[:-1])
        self.offsets = list(itertools.accumulate(padded, initial=0))
        """Where each argument begins in the memory of a launch."""

    def prepare(
        self, arguments: Sequence[int | bytes], num_threads: int, num_shared_bytes: int = 0
    ) -> Launch:
        """Lays out arguments for launches that differ in a few of them.

        Args:
            arguments: by their formats.
            num_threads: of a block.
            num_shared_bytes: dynamic shared memory of a block.

        Raises:
            struct.error: an argument is not of its format.
        """
        return Launch(self, arguments, num_threads, num_shared_bytes)

    def __call__(
        self,
        grid: tuple[int, int],
        num_threads: int,
        num_shared_bytes: int,
        device: torch.device,
        arguments: Sequence[int | bytes],
    ) -> None:
        """Launches the kernel once, on torch's current stream of a device.

        Raises:
            struct.error: an argument is not of its format.
        """
        with on_device(device.index):
            stream = torch.cuda.current_stream(device).cuda_stream
            self.prepare(arguments, num_threads, num_shared_bytes)(grid, stream)


class Launch:
    """A launch of a kernel, its arguments in memory of its own.

    Few things change from one launch to the next, and packing all arguments anew keeps the CPU
    longer than the launch. So what changes is written in place, by `writer`. The driver copies the
    arguments while it launches. One thread at a time may write and launch.
    """

    def __init__(
        self,
        kernel: Kernel,
        arguments: Sequence[int | bytes],
        num_threads: int,
        num_shared_bytes: int,
    ) -> None:
        self._kernel = kernel
        self._memory = ctypes.create_string_buffer(kernel.layout.size)
        kernel.layout.pack_into(self._memory, 0, *arguments)
        start = ctypes.addressof(self._memory)
        self._pointers = (ctypes.c_void_p * len(kernel.offsets))(
            *(start + offset for offset in kernel.offsets)
        )
        self.words = memoryview(self._memory).cast("B").cast("Q")
        """The arguments as words of 8 bytes, to overwrite pointers at the places of `word`."""
        self._launch, self._function = kernel.driver.launchKernel, kernel.function.ptr
        self._rest = (1, num_threads, 1, 1, num_shared_bytes)
        self._address = ctypes.addressof(self._pointers)

    def writer(self, argument: int, offset: int, format: str) -> Callable[..., None]:
        """A function that overwrites neighbouring fields of an argument.

        Args:
            argument: its place among the kernel's.
            offset: of the first field in the argument, in bytes.
            format: of the fields, as of module `struct`.
        """
        fields, memory = struct.Struct(f"={format}"), self._memory
        at = self._kernel.offsets[argument] + offset

        def write(*values: int) -> None:
            fields.pack_into(memory, at, *values)

        return write

    def word(self, argument: int, offset: int, format: str = "Q") -> int:
        """The place of a pointer in `words`; arguments as for `writer`.

        Raises:
            ValueError: it is no pointer, or several.
        """
        at = self._kernel.offsets[argument] + offset
        if format != "Q" or at % 8:
            raise ValueError(f"a field of format {format!r} at byte {at} is no pointer")
        return at // 8

    def __call__(self, grid: tuple[int, int], stream: int) -> None:
        """Launches on a stream of the current device, given by its pointer."""
        if not getattr(_thread, "has_context", False):
            # The driver wants a context, which only the runtime gives to a new thread.
            runtime = self._kernel.runtime
            runtime.setDevice(runtime.getDevice())
            _thread.has_context = True
        self._launch(self._function, *grid, *self._rest, stream, self._address, 0)


def on_device(device: int) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one. Most often it is, and entering it is left out."""
    if torch.cuda.current_device() == device:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise MissingPackageError(f"CuPy launches kernels: {INSTALL}") from error
    return cupy
