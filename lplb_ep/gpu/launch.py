"""Kernels loaded on a device, and launches with prepared arguments."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import MissingPackageError
from .device import captures_go_on
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
    # The first batch of a kind may be captured.
    with torch.cuda.device(device), captures_go_on():
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

    Launches use CuPy's driver interface (`cupy.cuda.driver`, which is not documented).
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
            launch = self.prepare(arguments, num_threads, num_shared_bytes)
            launch.resize(*grid)
            launch(torch.cuda.current_stream(device).cuda_stream)


class Launch:
    """A launch of a kernel, its arguments in memory of its own.

    Few things change from one launch to the next, and packing all arguments anew keeps the CPU
    longer than the launch. So what changes is written in place, by `writer` and `point`. The driver
    copies the arguments while it launches. One thread at a time may write and launch.
    """

    is_changed: bool
    """Whether something was written since a `LaunchGraph` last looked."""

    def __init__(
        self,
        kernel: Kernel,
        arguments: Sequence[int | bytes],
        num_threads: int,
        num_shared_bytes: int,
    ) -> None:
        self.kernel = kernel
        self._memory = ctypes.create_string_buffer(kernel.layout.size)
        kernel.layout.pack_into(self._memory, 0, *arguments)
        start = ctypes.addressof(self._memory)
        self._pointers = (ctypes.c_void_p * len(kernel.offsets))(
            *(start + offset for offset in kernel.offsets)
        )
        self._words = memoryview(self._memory).cast("B").cast("Q")
        self._launch = kernel.driver.launchKernel
        self.function: int = kernel.function.ptr
        self.num_threads, self.num_shared_bytes = num_threads, num_shared_bytes
        self.address = ctypes.addressof(self._pointers)
        """Of the pointers to the arguments, as the driver takes them."""
        self.resize(1)

    def resize(self, num_blocks: int, num_rows: int = 1) -> None:
        """Sets the grid of the launches that follow."""
        self.grid = (num_blocks, num_rows, 1)
        self._form = (self.function, *self.grid, self.num_threads, 1, 1, self.num_shared_bytes)
        self.is_changed = True

    def writer(self, argument: int, offset: int, format: str) -> Callable[..., None]:
        """A function that overwrites neighbouring fields of an argument.

        Args:
            argument: its place among the kernel's.
            offset: of the first field in the argument, in bytes.
            format: of the fields, as of module `struct`.
        """
        fields, memory = struct.Struct(f"={format}"), self._memory
        at = self.kernel.offsets[argument] + offset

        def write(*values: int) -> None:
            fields.pack_into(memory, at, *values)
            self.is_changed = True

        return write

    def word(self, argument: int, offset: int, format: str = "Q") -> int:
        """The place of a pointer, as `point` takes it; arguments as for `writer`.

        Raises:
            ValueError: it is no pointer, or several.
        """
        at = self.kernel.offsets[argument] + offset
        if format != "Q" or at % 8:
            raise ValueError(f"a field of format {format!r} at byte {at} is no pointer")
        return at // 8

    def point(self, word: int, address: int) -> None:
        """Overwrites a pointer, in half the time of a `writer`.

        Args:
            word: where it is, from `word`.
            address: what it points to.
        """
        if self._words[word] != address:
            self._words[word] = address
            self.is_changed = True

    def __call__(self, stream: int) -> None:
        """Launches on a stream of the current device, given by its pointer."""
        enter_context(self.kernel.runtime)
        self._launch(*self._form, stream, self.address, 0)


def enter_context(runtime: Any) -> None:
    """Gives this thread the current device's context, which the driver wants.

    Only the runtime does that for a new thread.

    Args:
        runtime: `cupy.cuda.runtime`.
    """
    if not getattr(_thread, "has_context", False):
        runtime.setDevice(runtime.getDevice())
        _thread.has_context = True


class _Node(ctypes.Structure):
    """`CUDA_KERNEL_NODE_PARAMS_v2` of CUDA's `cuda.h`."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("num_shared_bytes", ctypes.c_uint),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class LaunchGraph:
    """Launches in order, as one. A stream that is being captured does not take it.

    It keeps the CPU for a third of the time of three launches. What was written to a launch since
    the last time goes into the graph first; batches on the GPU keep what they were launched with.

    Args:
        launches: of kernels of the current device. Nobody else makes a graph of them.

    Raises:
        RuntimeError: the driver refuses; names its function and error.
    """

    def __init__(self, launches: Sequence[Launch]) -> None:
        self._driver = driver = _cuda_driver()
        self._runtime = launches[0].kernel.runtime
        enter_context(self._runtime)
        graph, graph_exec = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuGraphCreate(ctypes.byref(graph), 0), "cuGraphCreate")
        handles: list[ctypes.c_void_p] = []
        self._nodes: list[tuple[Launch, int | None, _Node, int]] = []
        for launch in launches:
            before = (ctypes.c_void_p * 1)(*(one.value for one in handles[-1:]))
            handle, node = ctypes.c_void_p(), _Node()
            _describe(node, launch)
            error = driver.cuGraphAddKernelNode_v2(
                ctypes.byref(handle), graph, before, min(1, len(handles)), ctypes.byref(node)
            )
            _check(error, "cuGraphAddKernelNode")
            handles.append(handle)
            self._nodes.append((launch, handle.value, node, ctypes.addressof(node)))
        error = driver.cuGraphInstantiateWithFlags(ctypes.byref(graph_exec), graph, 0)
        _check(error, "cuGraphInstantiate")
        self._exec = graph_exec.value or 0
        self._set, self._launch = driver.cuGraphExecKernelNodeSetParams_v2, driver.cuGraphLaunch
        # Not when the process ends: the driver may be gone before.
        weakref.finalize(self, _destroy, driver, graph.value or 0, self._exec).atexit = False

    def __call__(self, stream: int) -> None:
        """Launches all on a stream of the current device, given by its pointer.

        Raises:
            RuntimeError: as the constructor.
        """
        if not getattr(_thread, "has_context", False):
            enter_context(self._runtime)
        for launch, handle, node, address in self._nodes:
            if launch.is_changed:
                node.grid[:] = launch.grid
                if error := self._set(self._exec, handle, address):
                    _check(error, "cuGraphExecKernelNodeSetParams")
                launch.is_changed = False
        if error := self._launch(self._exec, stream):
            _check(error, "cuGraphLaunch")


def _describe(node: _Node, launch: Launch) -> None:
    node.function, node.arguments = launch.function, launch.address
    node.grid[:], node.block[:] = launch.grid, (launch.num_threads, 1, 1)
    node.num_shared_bytes = launch.num_shared_bytes
    launch.is_changed = False


def _check(error: int, function: str) -> None:
    if error:
        raise RuntimeError(f"{function}: CUDA error {error}")


def _destroy(driver: Any, graph: int, graph_exec: int) -> None:
    driver.cuGraphExecDestroy(graph_exec)
    driver.cuGraphDestroy(graph)


@functools.cache
def _cuda_driver() -> Any:
    """CUDA's driver, of whose functions CuPy has none that changes a node."""
    driver = ctypes.CDLL("libcuda.so.1")
    pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ulonglong
    driver.cuGraphCreate.argtypes = [pointer, ctypes.c_uint]
    driver.cuGraphAddKernelNode_v2.argtypes = [pointer, pointer, pointer, size, pointer]
    driver.cuGraphInstantiateWithFlags.argtypes = [pointer, pointer, flags]
    driver.cuGraphExecKernelNodeSetParams_v2.argtypes = [pointer, pointer, pointer]
    driver.cuGraphLaunch.argtypes = [pointer, pointer]
    driver.cuGraphExecDestroy.argtypes = driver.cuGraphDestroy.argtypes = [pointer]
    return driver


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
