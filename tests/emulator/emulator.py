"""Kernels on the host: unmodified sources, built as C++, with every access to memory checked.

`cuda.h` is the language, and `ptx.cuh` stands in for the kernels' own. `threads.cpp` runs threads,
blocks and ranks. `device.cpp` is what they call, `copies.cpp` has their bulk copies, and
`memory.cpp` judges their accesses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lplb_ep.comm.copies import BARRIER
from lplb_ep.gpu.jit import KERNELS, Program
from lplb_ep.planning.structs import SIGNATURES
from lplb_ep.weights import structs as weights_structs

HERE = Path(__file__).parent
ORDERS = (0, 1, 2)
"""Of threads, blocks and ranks: as they are numbered, backwards, and by a random seed."""
MAX_SHARED_BYTES = 227 * 1024
ALIGNMENT = 256  # of an array, as of an allocation on a GPU

_SIGNATURES = {**SIGNATURES, **weights_structs.SIGNATURES, BARRIER.name: BARRIER}
# No symbols that libraries of other variants share.
_OPTIONS = ("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique")
_CHECKED = ("-fsanitize=thread", "--param=tsan-distinguish-volatile=1", "-fno-extern-tls-init")
_WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-sign-compare")
_KERNEL = (
    r'extern "C" __global__[^(]*?(?:__cluster_dims__\((\w+), 1, 1\)\s*)?'
    r"(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\("
)
_DYNAMIC = r"extern __shared__ [^;]*?(\w+)\[\]"


class EmulationError(Exception):
    """What a kernel does wrong, and in which line."""


class _Module(ctypes.Structure):
    _fields_ = (
        ("tls", ctypes.c_void_p),
        ("image", ctypes.c_void_p),
        ("image_end", ctypes.c_void_p),
        ("tls_size", ctypes.c_size_t),
        ("dynamic", ctypes.c_void_p * 2),
        ("dynamic_size", ctypes.c_size_t),
    )


class _Operation(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("module", ctypes.POINTER(_Module)),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_int * 2),
        ("num_threads", ctypes.c_int),
        ("num_shared_bytes", ctypes.c_int),
        ("cluster", ctypes.c_int),
        ("target", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("number", ctypes.c_size_t),
    )


class _Stream(ctypes.Structure):
    _fields_ = (("operations", ctypes.POINTER(_Operation)), ("num_operations", ctypes.c_int))


def _compile(*arguments: str | Path, cwd: Path) -> None:
    # Without a compiler this raises: the tests are not skipped, or no one would notice.
    command = ["g++", *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EmulationError(f"{' '.join(command)}:\n{result.stderr[-4000:]}")


@functools.cache
def runtime() -> ctypes.CDLL:
    """What runs the threads, built once in a session."""
    path = Path(tempfile.mkdtemp(prefix="lplb_emulator_")) / "runtime.so"
    sources = [HERE / f"{name}.cpp" for name in ("threads", "device", "memory", "copies")]
    options = (*_OPTIONS, "-O2", *_WARNINGS, "-fvisibility=default", "-shared")
    _compile(*options, *sources, "-o", path, cwd=path.parent)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # the kernels find it
    library.emulator_run.restype = ctypes.c_char_p
    return library


def _calls(
    program: Program,
    kernels: Sequence[tuple[str, str]],
    dynamic: Sequence[str],
    declarations: Sequence[str],
) -> str:
    """C++: for each kernel a function that takes its arguments as a launch does."""
    headers = ("cuda.h", *declarations, "module.h")
    lines = [f'#include "{name}"' for name in headers]
    if "INDEX" in program.defines:
        lines.append("typedef INDEX Index;")
    lines += [f"alignas(16) thread_local char {name}[{MAX_SHARED_BYTES}];" for name in dynamic]
    addresses = "".join(
        f"    if (number == {i}) return {name};\n" for i, name in enumerate(dynamic)
    )
    lines.append(f"char* dynamic_shared(int number) {{\n{addresses}    return nullptr;\n}}")
    for cluster, kernel in kernels:
        types = [argument.type_name for argument in _SIGNATURES[kernel].arguments]
        lines += [f"typedef {name} {kernel}_{i};" for i, name in enumerate(types)]
        names = [f"{kernel}_{i}" for i in range(len(types))]
        values = [f"*static_cast<{name}*>(arguments[{i}])" for i, name in enumerate(names)]
        lines.append(f'extern "C" void {kernel}({", ".join(names)});')
        lines.append('extern "C" __attribute__((visibility("default")))')
        lines.append(f"void call_{kernel}(void** arguments) {{ {kernel}({', '.join(values)}); }}")
        lines.append('extern "C" __attribute__((visibility("default")))')
        lines.append(f"int cluster_{kernel}() {{ return {cluster or 1}; }}")
    return "\n".join(lines) + "\n"


def _texts(source: str, directory: Path) -> dict[str, str]:
    """A source and the headers that it includes, by name; without ptx.cuh, which is replaced."""
    texts, names = {}, [source]
    for name in names:
        own = HERE / name  # a source for tests alone
        texts[name] = (own if own.exists() else directory / name).read_text("utf-8")
        names += sorted({*re.findall(r'#include "(\w+\.cuh)"', texts[name])} - {*names, "ptx.cuh"})
    return texts


def build(
    program: Program, directory: Path, kernels: Path = KERNELS, *, warns: bool = True
) -> Path:
    """Compiles a program for the host.

    Args:
        program: as for the GPU, with the same macros.
        directory: where the library goes, or lies since an earlier call.
        kernels: the sources.
        warns: whether a warning is an error.

    Returns:
        The library.
    """
    own = {
        name: (HERE / name).read_text() for name in ("cuda.h", "module.h", "ptx.cuh", "solvers.cpp")
    }
    texts = _texts(str(program.source), kernels)
    work = directory / hashlib.sha256(repr((str(program), texts, own)).encode()).hexdigest()[:16]
    if (work / "kernels.so").exists():
        return work / "kernels.so"
    work.mkdir(parents=True, exist_ok=True)
    for name, text in {**texts, **own}.items():
        (work / name).write_text(text)
    text = "".join(texts.values())
    names, dynamic = (sorted({*re.findall(pattern, text)}) for pattern in (_KERNEL, _DYNAMIC))
    declarations = [name for name in ("abi.cuh", "travel.cuh") if name in texts]
    (work / "calls.cpp").write_text(_calls(program, names, dynamic, declarations))
    defines = [
        f"-D{key}={value if isinstance(value, str) else int(value)}"
        for key, value in program.defines.items()
    ]
    language = ("-include", "cuda.h", "-x", "c++")
    parts = {
        str(program.source): (*_CHECKED, *(_WARNINGS if warns else ()), *language),
        "calls.cpp": (),
    }
    if program.solvers:
        parts["solvers.cpp"] = _CHECKED
        defines.append(f"-DNUM_RIGHT_HAND_SIDES={program.solvers[-1].num_right_hand_sides}")
    for part, options in parts.items():
        flags = (*_OPTIONS, "-O1", "-fno-exceptions", *options)
        _compile(*flags, *defines, "-c", part, "-o", f"{part}.o", cwd=work)
    _compile("-shared", *(f"{part}.o" for part in parts), "-o", "kernels.so", cwd=work)
    return work / "kernels.so"


class Library:
    """A program's kernels, loaded."""

    def __init__(self, path: Path) -> None:
        runtime()
        self.path, self._library = path, ctypes.CDLL(str(path))
        self.module = _Module()
        self._library.describe(ctypes.byref(self.module), ctypes.c_size_t(MAX_SHARED_BYTES))

    def kernel(self, name: str) -> Kernel:
        """A kernel by its name."""
        entry = ctypes.cast(getattr(self._library, f"call_{name}"), ctypes.c_void_p).value
        return Kernel(self, name, entry, getattr(self._library, f"cluster_{name}")())


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be launched."""

    library: Library
    name: str
    entry: int | None
    cluster: int
    """Blocks of one."""

    def __call__(
        self, grid: tuple[int, int], num_threads: int, num_shared_bytes: int, **arguments: Any
    ) -> Operation:
        """A launch, for a stream of `Memory.run`; arguments by their names, arrays as they are."""
        signature = _SIGNATURES[self.name]
        values = {
            name: value.ctypes.data if isinstance(value, np.ndarray) else value
            for name, value in arguments.items()
        }
        packed = [
            ctypes.create_string_buffer(
                struct.pack(f"={one}", value), max(16, struct.calcsize(one))
            )
            for one, value in zip(signature.formats, signature.arrange(**values), strict=True)
        ]
        pointers = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, packed))
        made = _Operation(
            self.entry,
            ctypes.pointer(self.library.module),
            ctypes.addressof(pointers),
            grid,
            num_threads,
            num_shared_bytes,
            self.cluster,
        )
        return Operation(made, (self.library, packed, pointers))


@dataclass(frozen=True)
class Operation:
    """What a stream does next."""

    made: _Operation
    keeps: Any
    """What must live until it is done."""


def copy(target: np.ndarray, source: np.ndarray) -> Operation:
    """A copy, on a stream."""
    assert target.nbytes == source.nbytes, "a copy between arrays of two sizes"
    made = _Operation(target=target.ctypes.data, source=source.ctypes.data, number=target.nbytes)
    return Operation(made, (target, source))


def add(target: np.ndarray, number: int) -> Operation:
    """An addition to a word of 8 bytes, on a stream."""
    assert target.nbytes == 8, "a signal is a word"
    return Operation(_Operation(target=target.ctypes.data, number=number), target)


class Memory:
    """What kernels may access, and the streams of ranks that launch them."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        runtime().emulator_forget_all()

    def array(self, values: Any, dtype: Any = None) -> np.ndarray:
        """A copy of the values in an allocation of its own."""
        values = np.ascontiguousarray(values, dtype)
        out = self._allocate(values.shape, values.dtype, initialised=True)
        out[...] = values
        return out

    def empty(self, shape: Any, dtype: Any = np.int32) -> np.ndarray:
        """An array that must be written before it is read; its values are arbitrary."""
        return self._allocate(shape, np.dtype(dtype), initialised=False)

    def zeros(self, shape: Any, dtype: Any = np.int32) -> np.ndarray:
        """An array of zeros."""
        return self.array(np.zeros(shape, dtype))

    def _allocate(self, shape: Any, dtype: np.dtype, initialised: bool) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # One that is empty has an address of its own, too.
        raw = np.full(size + 2 * ALIGNMENT, 0xA5, np.uint8)
        begin = -raw.ctypes.data % ALIGNMENT
        self._arrays.append(raw)
        address = ctypes.c_void_p(raw.ctypes.data + begin)
        runtime().emulator_register(address, ctypes.c_size_t(size), int(initialised))
        return raw[begin : begin + size].view(dtype).reshape(shape)

    def run(self, *streams: Sequence[Operation], order: int = 0) -> None:
        """Runs the streams of several ranks to their ends.

        Args:
            streams: each rank's operations.
            order: one of `ORDERS`, or another number from 2 on, which is a seed.

        Raises:
            EmulationError: an access or a barrier is wrong.
        """
        made = [(_Operation * len(stream))(*(one.made for one in stream)) for stream in streams]
        all_ = (_Stream * len(made))(*(_Stream(one, len(one)) for one in made))
        at = ctypes.c_void_p()
        message = runtime().emulator_run(all_, len(made), order, ctypes.byref(at))
        if message is not None:
            libraries = {one.keeps[0] for stream in streams for one in stream if one.made.entry}
            raise EmulationError(_with_lines(message.decode(), at.value, libraries))


def register_tensors(objects: Iterable[object]) -> None:
    """Lets kernels access the memory of the tensors among some objects.

    A tensor without a storage is left out: a sparse one, or one that was cleared as garbage while
    something still refers to it. So is one on the device `meta`, whose storage has no address.
    """
    storages = {}
    for one in objects:
        if type(one) is torch.Tensor:
            with contextlib.suppress(NotImplementedError):
                storage = one.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    for address, size in storages.items():
        if address and size:
            runtime().emulator_register(ctypes.c_void_p(address), ctypes.c_size_t(size), 1)


def _with_lines(message: str, at: int | None, libraries: set[Library]) -> str:
    """The message with lines of the source for addresses."""
    for library in libraries:
        image, end = library.module.image, library.module.image_end
        if at is None or not image <= at < end:
            continue
        offsets = re.findall(r"\+0x(\w+)", message)
        for offset in offsets:
            message = message.replace(f"+0x{offset}", _line(library.path, int(offset, 16)))
        return f"{_line(library.path, at - image)}: {message}"
    return message


def _line(path: Path, offset: int) -> str:
    """The lines of the kernels' sources, innermost first, that a call came from."""
    command = ["addr2line", "--inlines", "--exe", str(path), hex(offset - 1)]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    lines = [Path(line).name for line in found if ".cu" in line]
    return " in ".join(lines) or hex(offset)
