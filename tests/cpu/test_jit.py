"""From source to cubin: the cache, its errors, cuSolverDx. No GPU; a missing wheel fails here."""

import ctypes
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from lplb_ep import CompileError, MissingPackageError
from lplb_ep.gpu import cache, jit, launch
from lplb_ep.gpu.toolchain import CuSolverDx
from lplb_ep.settings import cache_directory

DOUBLE = """\
#include "scale.cuh"
extern "C" __global__ void scale(float* values) { values[threadIdx.x] *= SCALE + OFFSET; }
"""

# Solves A X = B for a symmetric positive definite A, in one block.
SOLVE = """\
extern "C" __device__ void potrf(double* A, int* info);
extern "C" __device__ void potrs(double* A, double* B);

extern "C" __global__ void __launch_bounds__(THREADS)
solve(const double* A, double* B, int* info) {
    __shared__ double a[N * N], b[2 * N];
    for (int i = threadIdx.x; i < N * N; i += THREADS) a[i] = A[i];
    for (int i = threadIdx.x; i < 2 * N; i += THREADS) b[i] = B[i];
    __syncthreads();
    potrf(a, info);
    __syncthreads();
    potrs(a, b);
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * N; i += THREADS) B[i] = b[i];
}
"""


CHOLESKY = (CuSolverDx("potrf", 8, 32), CuSolverDx("potrs", 8, 32, num_right_hand_sides=2))


@pytest.fixture
def scale(tmp_path, monkeypatch):
    """A program of a source and a header, before an empty cache."""
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "scale.cu").write_text(DOUBLE)
    (tmp_path / "scale.cuh").write_text("#define SCALE 2\n")
    return jit.Program(tmp_path / "scale.cu", {"OFFSET": 0})


@pytest.fixture(scope="module")
def solve(tmp_path_factory):
    """A program that needs cuSolverDx, whose cubins take seconds, and its tests' cache."""
    directory = tmp_path_factory.mktemp("solve")
    (directory / "solve.cu").write_text(SOLVE)
    return jit.Program(directory / "solve.cu", {"N": 8, "THREADS": 32}, CHOLESKY)


def elf(image):
    """(SM number, {symbol: (is it global, type, section)}) of a 64-bit little-endian ELF image."""
    assert image[:6] == b"\x7fELF\x02\x01"
    (offset,) = struct.unpack_from("<Q", image, 0x28)
    flags, _, _, _, size, count = struct.unpack_from("<IHHHHH", image, 0x30)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, offset + i * size) for i in range(count)]
    (table,) = (h for h in headers if h[1] == 2)
    names = headers[table[6]][4]
    found = {}
    for at in range(table[4], table[4] + table[5], 24):
        name, info, _, section = struct.unpack_from("<IBBH", image, at)
        start = names + name
        found[image[start : image.index(0, start)].decode()] = (info >> 4 == 1, info & 15, section)
    return flags >> 8 & 0xFF, found


def is_kernel(symbol):
    is_global, kind, section = symbol
    return is_global and kind == 2 and section != 0


# --- the tool chain -------------------------------------------------------------------------------


RACER = """
import hashlib, sys
from lplb_ep.gpu import jit
from lplb_ep.gpu.toolchain import CuSolverDx
cholesky = (CuSolverDx("potrf", 8, 32), CuSolverDx("potrs", 8, 32, num_right_hand_sides=2))
program = jit.Program(sys.argv[1], {"N": 8, "THREADS": 32}, cholesky)
print("ready", flush=True)
sys.stdin.readline()
cubin = jit.compile_cubin(program, "sm_90")
print(cubin.cached, hashlib.sha256(cubin.data).hexdigest())
"""


def test_of_two_processes_on_a_cold_cache_one_compiles(solve):
    cache = solve.source.parent / "cache"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(solve.source)],
            env={**os.environ, "LPLB_EP_CACHE_DIR": str(cache)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    told = [racer.communicate(timeout=120)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(cached for cached, _ in told) == ["False", "True"]
    assert told[0][1] == told[1][1]
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


@pytest.mark.parametrize(
    ("arch", "number"), [("sm_90", 90), pytest.param("sm_100", 100, marks=pytest.mark.long)]
)
def test_cusolverdx_is_linked_in(solve, monkeypatch, arch, number):
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(solve.source.parent / "cache"))
    cubin = jit.compile_cubin(solve, arch)
    sm, symbols = elf(cubin.data)
    assert sm == number
    assert is_kernel(symbols["solve"])
    # Nothing is left to be found when it is loaded, and the templates' constants are gone.
    assert [
        name for name, (is_global, _, section) in symbols.items() if is_global and not section
    ] == []
    assert len(cubin.data) < 200_000


def test_a_shape_that_cusolverdx_refuses(solve, monkeypatch, tmp_path):
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(tmp_path))
    potrf = CuSolverDx("potrf", size=8, num_threads=5000)
    with pytest.raises(CompileError, match="libmathdx: ") as error:
        jit.compile_cubin(jit.Program(solve.source, solve.defines, [potrf]))
    assert error.value.log  # its words differ between releases
    assert error.value.options == ("-arch=sm_90", repr(potrf))


def test_sources_see_the_headers_beside_them_only(scale, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "stray.cuh").write_text("")
    monkeypatch.chdir(elsewhere)
    scale.source.write_text('#include "stray.cuh"\n' + DOUBLE)
    with pytest.raises(CompileError, match=r'could not open source file "stray.cuh"'):
        jit.compile_cubin(scale)


def test_a_broken_kernel_says_all_there_is_to_know(scale, tmp_path):
    broken = DOUBLE.replace("values[", "valeus[")
    scale.source.write_text(broken)
    with pytest.raises(CompileError) as caught:
        jit.compile_cubin(scale)
    error = caught.value
    assert 'scale.cu(2): error: identifier "valeus" is undefined' in error.log
    assert {"-arch=sm_90", "-DOFFSET=0"} <= set(error.options)
    assert error.source.read_text() == broken
    assert (error.source.parent / "scale.cuh").read_text() == "#define SCALE 2\n"
    assert tmp_path / "cache" in error.source.parents
    for part in ("NVRTC, scale.cu", error.log, "-DOFFSET=0", str(error.source)):
        assert part in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_function_that_nothing_brings(solve, monkeypatch, tmp_path):
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(tmp_path))
    with pytest.raises(CompileError, match="potrf"):
        jit.compile_cubin(jit.Program(solve.source, solve.defines))


# --- the cache ------------------------------------------------------------------------------------


def test_the_second_time_comes_from_the_cache(scale, caplog):
    caplog.set_level("INFO", "lplb_ep.gpu.jit")
    first, second = jit.compile_cubin(scale), jit.compile_cubin(scale)
    assert (first.cached, second.cached) == (False, True)
    assert first.data == second.data
    assert is_kernel(elf(first.data)[1]["scale"])
    assert is_kernel(elf(first.path.read_bytes())[1]["scale"])
    begin, end = (record.getMessage() for record in caplog.records)
    assert begin == "lplb_ep: compiling scale.cu (OFFSET=0) for sm_90, once ..."
    assert end.startswith("lplb_ep: compiled scale.cu (OFFSET=0) for sm_90 in ")


def test_every_change_has_its_own_entry(scale):
    header = scale.source.with_name("scale.cuh")
    seen = [jit.compile_cubin(scale)]
    scale.source.write_text(DOUBLE.replace("*=", "-="))
    seen.append(jit.compile_cubin(scale))
    header.write_text("#define SCALE 3\n")
    seen.append(jit.compile_cubin(scale))
    seen.append(jit.compile_cubin(scale, "sm_100"))
    seen.append(jit.compile_cubin(jit.Program(scale.source, {"OFFSET": 1})))
    assert len({cubin.path for cubin in seen}) == len({cubin.data for cubin in seen}) == len(seen)

    header.write_text("#define SCALE 2\n")
    scale.source.write_text(DOUBLE)
    assert jit.compile_cubin(scale).cached


@pytest.mark.parametrize("damage", ["empty", "short", "long", "byte", "header", "other"])
def test_damaged_and_foreign_entries_are_built_anew(scale, caplog, damage):
    cubin = jit.compile_cubin(scale)
    whole = cubin.path.read_bytes()
    middle = len(whole) // 2
    cubin.path.write_bytes(
        {
            "empty": b"",
            "short": whole[:middle],
            "long": whole + b"\n",
            "byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "header": cubin.data,
            "other": jit.compile_cubin(scale, "sm_100").path.read_bytes(),
        }[damage]
    )
    again = jit.compile_cubin(scale)
    assert (again.cached, again.data) == (False, cubin.data)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [text for text in warnings if "compiling scale.cu" not in text] == [
        f"lplb_ep: {cubin.path} is damaged or not ours: compiling it anew"
    ]
    assert cubin.path.read_bytes() == whole
    assert jit.compile_cubin(scale).cached


def test_a_cache_that_cannot_be_written(scale, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    cubin = jit.compile_cubin(scale)
    assert is_kernel(elf(cubin.data)[1]["scale"])
    assert "LPLB_EP_CACHE_DIR" in caplog.text


def test_the_cache_is_for_its_owner_alone(scale, monkeypatch, tmp_path):
    old = os.umask(0)
    try:
        monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(tmp_path / "deep" / "cache"))
        path = jit.compile_cubin(scale).path
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("what", ["entry", "directory"])
@pytest.mark.parametrize("how", ["others may write it", "another owns it", "it is a link"])
def test_what_others_can_have_written_is_not_run(scale, caplog, monkeypatch, tmp_path, what, how):
    """A planted cubin, whole and with the right key. A directory may be a link to one's own."""
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(tmp_path / "cache"))
    cubin = jit.compile_cubin(scale)
    planted = b"\x7fELF planted" + cubin.data
    cache.write(cubin.path, cubin.path.stem.split("-")[-1], planted)
    assert jit.compile_cubin(scale).data == planted, "nothing else than the owner tells"
    place = cubin.path if what == "entry" else cubin.path.parent
    if how == "others may write it":
        place.chmod(place.stat().st_mode | 0o020)
    elif how == "another owns it":
        if os.getuid() == 0:
            os.chown(place, 12345, -1)
        else:
            monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    else:
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    own = what == "directory" and how == "it is a link"
    assert jit.compile_cubin(scale).data == (planted if own else cubin.data)
    if how != "it is a link":
        assert "it is not used, and kernels are compiled anew" in caplog.text


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "lplb_ep"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "lplb_ep"
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_compile_all_shows_its_progress(scale, caplog):
    caplog.set_level("INFO", "lplb_ep.gpu.jit")
    archs = ["sm_90", "sm_100"]
    cubins = jit.compile_all([scale], archs)
    assert [(c.arch, c.cached) for c in cubins] == [("sm_90", False), ("sm_100", False)]
    cubins = jit.compile_all([scale], archs)
    assert [(c.arch, c.cached) for c in cubins] == [("sm_90", True), ("sm_100", True)]
    told = [message for message in caplog.messages if message.startswith("[")]
    size = len(cubins[0].data)
    assert told[0] == f"[1/2] scale.cu (OFFSET=0) for sm_90: compiled, {size} bytes"
    assert told[2] == f"[1/2] scale.cu (OFFSET=0) for sm_90: in the cache, {size} bytes"


def test_compile_all_ends_at_the_first_that_fails(scale, tmp_path):
    broken = jit.Program(tmp_path / "broken.cu")
    broken.source.write_text("this is no C++")
    with pytest.raises(CompileError, match=r"broken\.cu"):
        jit.compile_all([scale, broken, scale], ["sm_90"])


# --- what is missing or wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "wheel"),
    [
        ("nvrtc", "nvidia-cuda-nvrtc"),
        ("mathdx", "nvidia-libmathdx-cu13"),
        ("nvJitLink", "nvidia-nvjitlink"),
    ],
)
def test_a_missing_library_says_what_to_install(solve, tmp_path, refused, wheel):
    code = f"""
import ctypes, sys
load = ctypes.CDLL
def refuse(name, *args):
    if "lib{refused}.so" in name:
        raise OSError(name + ": no such file")
    return load(name, *args)
ctypes.CDLL = refuse
from lplb_ep import MissingPackageError
from lplb_ep.gpu import jit
from lplb_ep.gpu.toolchain import CuSolverDx
try:
    jit.compile_cubin(jit.Program(sys.argv[1], solvers=[CuSolverDx("potrf", 8, 32)]))
except MissingPackageError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(solve.source)],
        env={**os.environ, "LPLB_EP_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith(f"{wheel} compiles kernels: pip install '.[cuda]' in a chec")


def test_loading_needs_cupy(scale, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingPackageError, match=r"CuPy launches kernels: pip install '\.\[cuda"):
        launch.Kernels(jit.compile_cubin(scale))


def test_kernels_may_have_all_of_a_blocks_shared_memory(scale, monkeypatch):
    """Whoever asks for one: the limit is the kernel's, not the caller's."""
    allowed = {}
    driver = SimpleNamespace(
        funcGetAttribute=lambda attribute, function: {1: 16}[attribute],
        funcSetAttribute=lambda function, *attribute: allowed.update({function: attribute}),
        launchKernel=None,
    )
    module = SimpleNamespace(
        load=lambda data: None, get_function=lambda name: SimpleNamespace(ptr=name)
    )
    runtime = SimpleNamespace(
        getDevice=lambda: 3,
        deviceGetAttribute=lambda attribute, device: {(97, 3): 1000}[attribute, device],
    )
    fake = SimpleNamespace(
        cuda=SimpleNamespace(driver=driver, Module=lambda: module, runtime=runtime)
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    launch.Kernels(jit.compile_cubin(scale)).kernel("scale", "Qi")
    assert allowed == {"scale": (8, 1000 - 16)}
    assert launch.max_shared_bytes(3) == 1000


def test_a_launch_has_its_arguments_where_the_driver_looks():
    launched = []

    def record(function, *rest):
        launched.append((function, *rest[:-2]))
        *_, pointers, extra = rest
        assert extra == 0
        at = (ctypes.c_void_p * 4).from_address(pointers)
        seen.extend(
            (
                ctypes.c_uint64.from_address(at[0]).value,
                ctypes.string_at(at[1], 12),
                ctypes.c_int32.from_address(at[2]).value,
                ctypes.c_int64.from_address(at[3]).value,
            )
        )

    driver, context = SimpleNamespace(launchKernel=record), []
    runtime = SimpleNamespace(getDevice=lambda: 5, setDevice=context.append)
    kernel = launch.Kernel(SimpleNamespace(ptr=7), driver, runtime, ("Q", "12s", "i", "q"))
    for arguments in ((2**63, b"twelve bytes", -1, 5), (1, b"and another.", 2, -(2**40))):
        seen = []
        prepared = kernel.prepare(arguments, 128, 1000)
        prepared.resize(3, 4)
        prepared(99)
        assert tuple(seen) == arguments
    assert launched == 2 * [(7, 3, 4, 1, 128, 1, 1, 1000, 99)]
    # Arguments written later are launched, and the others as before.
    seen = []
    prepared.writer(1, 4, "4s")(b"new.")
    prepared.writer(3, 0, "q")(7)
    prepared.point(prepared.word(0, 0), 2**62)
    prepared(99)
    assert tuple(seen) == (2**62, b"and new.her.", 2, 7)
    # A thread's first launch makes sure that it has a context.
    context.clear()
    for _ in range(2):
        thread = threading.Thread(target=lambda: [prepared(0) for _ in range(2)])
        thread.start()
        thread.join()
    assert context == [5, 5]
    with pytest.raises(struct.error):
        kernel.prepare((2**64, b"", 0, 0), 1)


def test_a_graph_says_what_the_driver_refuses(monkeypatch):
    refused = set()

    def answer(name):
        def function(*arguments):
            if name in refused:
                return 700
            if name in ("cuGraphCreate", "cuGraphAddKernelNode_v2", "cuGraphInstantiateWithFlags"):
                arguments[0]._obj.value = 5
            return 0

        return function

    names = ("Create", "AddKernelNode_v2", "InstantiateWithFlags", "ExecKernelNodeSetParams_v2")
    names += ("Launch", "ExecDestroy", "Destroy")
    driver = SimpleNamespace(**{f"cuGraph{name}": answer(f"cuGraph{name}") for name in names})
    monkeypatch.setattr(launch, "_cuda_driver", lambda: driver)
    runtime = SimpleNamespace(getDevice=lambda: 0, setDevice=lambda device: None)
    of_driver = SimpleNamespace(launchKernel=None)
    kernel = launch.Kernel(SimpleNamespace(ptr=1), of_driver, runtime, ("Q",))
    launches = [kernel.prepare((0,), 32) for _ in range(2)]
    for name in ("cuGraphCreate", "cuGraphAddKernelNode", "cuGraphInstantiate"):
        refused = {one for one in vars(driver) if one.startswith(name)}
        with pytest.raises(RuntimeError, match=f"{name}: CUDA error 700"):
            launch.LaunchGraph(launches)
    refused = set()
    made = launch.LaunchGraph(launches)
    for name in ("cuGraphExecKernelNodeSetParams", "cuGraphLaunch"):
        refused = {one for one in vars(driver) if one.startswith(name)}
        launches[1].point(0, 8)
        with pytest.raises(RuntimeError, match=f"{name}: CUDA error 700"):
            made(0)
        assert launches[1].is_changed == (name != "cuGraphLaunch")


def test_launches_from_several_threads_do_not_mix_their_arguments():
    seen = []

    def record(function, *rest):
        at = (ctypes.c_void_p * 2).from_address(rest[-2])
        first = ctypes.c_int32.from_address(at[0]).value
        time.sleep(1e-4)
        seen.append((first, ctypes.c_int32.from_address(at[1]).value))

    runtime = SimpleNamespace(getDevice=lambda: 0, setDevice=lambda device: None)
    driver = SimpleNamespace(launchKernel=record)
    kernel = launch.Kernel(SimpleNamespace(ptr=0), driver, runtime, ("i", "i"))

    def many(number):
        for i in range(50):
            kernel.prepare((number, number + i), 1)(0)

    threads = [threading.Thread(target=many, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(1000 * n, 1000 * n + i) for n in range(4) for i in range(50)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": "gesv"}, "function must be one of potrf, potrs; got 'gesv'"),
        ({"size": 0}, "size must be at least 1; got 0"),
        ({"num_threads": 0}, "num_threads must be at least 1; got 0"),
        ({"num_right_hand_sides": -1}, "num_right_hand_sides must be at least 1; got -1"),
    ],
)
def test_wrong_solvers_name_themselves(change, message):
    with pytest.raises(ValueError, match=message):
        CuSolverDx(**{"function": "potrf", "size": 8, "num_threads": 32, **change})


@pytest.mark.parametrize("arch", ["90", "sm90", "compute_90", "sm_9.0", "sm_90 "])
def test_wrong_architectures_name_themselves(scale, arch):
    with pytest.raises(ValueError, match="arch must be sm_90, sm_100, "):
        jit.compile_cubin(scale, arch)
