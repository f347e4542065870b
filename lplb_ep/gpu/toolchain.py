"""The tool chain: NVRTC, libmathdx and nvJitLink turn CUDA C++ into machine code, through ctypes.

Facts about these libraries are in docs/kernels.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_longlong, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import CompileError, MissingPackageError
from ..logs import logger
from ..settings import cuda_home

log = logger(__name__)

INSTALL = "pip install '.[cuda]' in a checkout of lplb_ep"
LINK_OPTIONS = ("-lto", "-optimize-unused-variables")
"""Without the last one the cubin keeps thousands of constants of cuSolverDx's templates: 1.4 MB
instead of 0.2."""

# library: its wheel, its file, the function for its version and that function's results
_LIBRARIES = {
    "nvrtc": ("nvidia-cuda-nvrtc", "libnvrtc.so.13", "nvrtcVersion", 2),
    "nvJitLink": ("nvidia-nvjitlink", "libnvJitLink.so.13", "nvJitLinkVersion", 2),
    "mathdx": ("nvidia-libmathdx-cu13", "libmathdx.so.0", "mathdxGetVersionEx", 3),
}

# Values of libcusolverdx.h and libcommondx.h. They may change with each version, so the library's
# version is checked.
_MATHDX_VERSION = "0.4."
_SIZE, _TYPE, _PRECISION, _SM, _EXECUTION, _BLOCK_DIM, _API, _FUNCTION = range(8)
_ARRANGEMENT, _FILL_MODE = 8, 9
_SYMBOL_NAME, _TARGET_SM = 0, 1
_FUNCTIONS = {"potrf": 2, "potrs": 3}
_LTOIR, _FATBIN = 3, 4  # of nvJitLink.h


@dataclass(frozen=True)
class CuSolverDx:
    """A device function of cuSolverDx for one shape, run by all threads of a block together.

    A kernel declares it and calls it with pointers into shared memory, one of

        extern "C" __device__ void potrf(double* A, int* info);             // A = L Lᵀ, in place
        extern "C" __device__ void potrs(double* A, double* B);             // B = (L Lᵀ)⁻¹ B

    A is [size, size], of which only the lower triangle is read. B is [size, num_right_hand_sides].
    Both are by columns without gaps. One thread writes `*info`, which may be in global or shared
    memory: 0, or k where the leading minor of order k is not positive. There is no barrier at
    either end: the kernel has `__syncthreads()` before and after, and between two calls.

    Args:
        function: "potrf" or "potrs".
        size: the order of A, at least 1.
        num_threads: `blockDim.x` of the kernel, exactly; `blockDim.y` and `.z` are 1.
        num_right_hand_sides: columns of B.

    Raises:
        ValueError: an argument is not one of these; it is named.
    """

    function: str
    size: int
    num_threads: int
    num_right_hand_sides: int = 1

    def __post_init__(self) -> None:
        if self.function not in _FUNCTIONS:
            raise ValueError(
                f"function must be one of {', '.join(_FUNCTIONS)}; got {self.function!r}"
            )
        for name in ("size", "num_threads", "num_right_hand_sides"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


def require(*tools: str) -> None:
    """Raises MissingPackageError unless these of "nvrtc", "nvJitLink" and "mathdx" are there."""
    for tool in tools:
        _library(tool)


def versions(solvers: Sequence[CuSolverDx]) -> list[str]:
    """The versions of the libraries that `build` uses, with these device functions or without.

    Raises:
        MissingPackageError: a library is not installed.
    """
    tools = ("nvrtc", "mathdx", "nvJitLink") if solvers else ("nvrtc",)
    return [_library(tool)[1] for tool in tools]


def build(
    name: str,
    texts: Mapping[str, str],
    options: Sequence[str],
    solvers: Sequence[CuSolverDx],
    arch: str,
) -> bytes:
    """A source to a cubin.

    Args:
        name: the source, one of `texts`.
        texts: the source and its headers, by name.
        options: of NVRTC.
        solvers: device functions of cuSolverDx that the source calls.
        arch: "sm_90", ...

    Raises:
        CompileError: the source, or a shape of cuSolverDx, does not compile for `arch`.
        MissingPackageError: a library is not installed.
    """
    if not solvers:
        return _compile(name, texts, options, "CUBIN")
    inputs = [("source", _LTOIR, _compile(name, texts, (*options, "-dlto"), "LTOIR"))]
    for solver in solvers:
        function, fatbin = _cusolverdx(solver, arch)
        inputs += [(repr(solver), _LTOIR, function), ("cuSolverDx", _FATBIN, fatbin)]
    return _link(inputs, (f"-arch={arch}", *LINK_OPTIONS))


@functools.cache
def _library(name: str) -> tuple[ctypes.CDLL, str]:
    """A library of the tool chain and its version: from its wheel, CUDA_HOME, or the loader's path.

    Raises:
        MissingPackageError: it is in none of them, or of a version that this file does not fit.
    """
    wheel, soname, get_version, num_parts = _LIBRARIES[name]
    if name == "mathdx":
        _library("nvrtc")  # which libmathdx needs, and would not find by itself
    home, path, release = cuda_home(), Path(soname), ""
    if home and (home / "lib64" / soname).exists():
        path = home / "lib64" / soname
    with contextlib.suppress(metadata.PackageNotFoundError):
        distribution = metadata.distribution(wheel)
        for file in distribution.files or ():
            if file.name == soname:
                path, release = Path(file.locate()), distribution.version
    try:
        if name == "nvrtc" and path.is_absolute():
            # NVRTC opens it by name when it compiles, and no search path leads into a wheel.
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingPackageError(f"{wheel} compiles kernels: {INSTALL} ({error})") from error
    parts = [c_int() for _ in range(num_parts)]
    getattr(library, get_version)(*map(byref, parts))
    version = ".".join(str(part.value) for part in parts)
    if name == "mathdx" and not version.startswith(_MATHDX_VERSION):
        raise MissingPackageError(f"{path} is {version}, not {_MATHDX_VERSION}x: {INSTALL}")
    return library, f"{name} {version} {release}"


def _strings(texts: Iterable[str]) -> ctypes.Array[c_char_p]:
    encoded = [text.encode() for text in texts]
    return (c_char_p * len(encoded))(*encoded)


def _fetch(library: ctypes.CDLL, name: str, handle: Any, *, sized: bool = False) -> bytes:
    """What `name` gives of a handle, by the length that `nameSize` gives.

    Args:
        sized: whether `name` is passed the length too.
    """
    length = c_size_t()
    status = getattr(library, f"{name}Size")(handle, byref(length))
    buffer = ctypes.create_string_buffer(length.value)
    status = status or getattr(library, name)(handle, *([length] if sized else []), buffer)
    assert status == 0, f"{name} gave {status} for {length.value} bytes"
    return buffer.raw


def _fetch_text(library: ctypes.CDLL, name: str, handle: Any) -> str:
    return _fetch(library, name, handle).rstrip(b"\0").decode(errors="replace").strip()


def _compile(name: str, texts: Mapping[str, str], options: Sequence[str], result: str) -> bytes:
    """NVRTC: a source and its headers to a "CUBIN" or to "LTOIR"."""
    nvrtc, _ = _library("nvrtc")
    program = c_void_p()
    headers = {other: text for other, text in texts.items() if other != name}
    sources = (len(headers), _strings(headers.values()), _strings(headers))
    status = nvrtc.nvrtcCreateProgram(byref(program), texts[name].encode(), name.encode(), *sources)
    assert status == 0, f"nvrtcCreateProgram gave {status}"
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
        messages = _fetch_text(nvrtc, "nvrtcGetProgramLog", program)
        if status:
            raise CompileError(f"NVRTC, {name}", messages or f"status {status}", options)
        if messages:
            log.info("%s", messages)
        return _fetch(nvrtc, f"nvrtcGet{result}", program)
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _cusolverdx(solver: CuSolverDx, arch: str) -> tuple[bytes, bytes]:
    """libmathdx: the LTO-IR of a device function, and the fatbin that its calls lead to."""
    mathdx, _ = _library("mathdx")
    mathdx.commondxStatusToStr.restype = c_char_p

    def check(status: int) -> None:
        if status:
            reason, length = mathdx.commondxStatusToStr(status), c_size_t()
            if status == 3:  # the only one that leaves a message: its own compiler's log
                mathdx.commondxGetLastErrorStrSize(byref(length))
                buffer = ctypes.create_string_buffer(length.value + 1)
                mathdx.commondxGetLastErrorStr(byref(c_int()), length, buffer)
                reason = buffer.value
            raise CompileError("libmathdx", reason.decode(), (f"-arch={arch}", repr(solver)))

    def array(values: Sequence[int]) -> tuple[c_size_t, ctypes.Array[c_longlong]]:
        return c_size_t(len(values)), (c_longlong * len(values))(*values)

    sm = 10 * int(re.sub(r"\D", "", arch))
    operators: dict[int, int | Sequence[int]] = {
        _SIZE: (solver.size, solver.size, solver.num_right_hand_sides),
        _TYPE: 0,  # real
        _PRECISION: 6,  # double
        _SM: sm,
        _EXECUTION: 1,  # by a block
        _BLOCK_DIM: (solver.num_threads, 1, 1),
        _API: 0,  # matrices in shared memory, without gaps
        _FUNCTION: _FUNCTIONS[solver.function],
        _ARRANGEMENT: 0,  # by columns
        _FILL_MODE: 1,  # lower
    }
    handle, code = c_longlong(), c_longlong()
    with contextlib.ExitStack() as stack:
        check(mathdx.cusolverdxCreateDescriptor(byref(handle)))
        stack.callback(mathdx.cusolverdxDestroyDescriptor, handle)
        for operator, value in operators.items():
            if isinstance(value, int):
                check(mathdx.cusolverdxSetOperatorInt64(handle, operator, c_longlong(value)))
            else:
                check(mathdx.cusolverdxSetOperatorInt64s(handle, operator, *array(value)))
        symbol = solver.function.encode()
        check(mathdx.cusolverdxSetOptionStr(handle, _SYMBOL_NAME, symbol))
        check(mathdx.commondxCreateCode(byref(code)))
        stack.callback(mathdx.commondxDestroyCode, code)
        target = (sm, {"a": 1, "f": 2}.get(arch[-1], 0))
        check(mathdx.commondxSetCodeOptionInt64s(code, _TARGET_SM, *array(target)))
        check(mathdx.cusolverdxFinalizeCode(code, handle))
        return (
            _fetch(mathdx, "commondxGetCodeLTOIR", code, sized=True),
            _fetch(mathdx, "cusolverdxGetUniversalFATBIN", handle, sized=True),
        )


def _link(inputs: Sequence[tuple[str, int, bytes]], options: Sequence[str]) -> bytes:
    """nvJitLink: LTO-IR and fatbins, each with a name for messages, to a cubin."""
    linker, _ = _library("nvJitLink")
    handle = c_void_p()

    def check(status: int) -> None:
        if status:
            messages = _fetch_text(linker, "nvJitLinkGetErrorLog", handle) if handle else ""
            raise CompileError("nvJitLink", messages or f"status {status}", options)

    check(linker.nvJitLinkCreate(byref(handle), c_uint(len(options)), _strings(options)))
    try:
        for name, kind, data in inputs:
            check(linker.nvJitLinkAddData(handle, kind, data, c_size_t(len(data)), name.encode()))
        check(linker.nvJitLinkComplete(handle))
        return _fetch(linker, "nvJitLinkGetLinkedCubin", handle)
    finally:
        linker.nvJitLinkDestroy(byref(handle))
