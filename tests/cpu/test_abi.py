"""What host and device share is declared once, and laid out as C++ does."""

import ctypes
import enum
import re
import struct
import subprocess

import numpy as np
import pytest

from lplb_ep.comm.copies import BARRIER
from lplb_ep.gpu.abi import Signature, Struct, constant_text, enum_text, header
from lplb_ep.gpu.jit import KERNELS
from lplb_ep.planning import structs
from lplb_ep.weights import structs as weights_structs

INNER = Struct("Inner", "Inside.", ("short", "a", "one"), ("long long", "b", "two"))
OUTER = Struct(
    "Outer",
    "Outside.",
    ("unsigned char", "first", "one byte"),
    (INNER, "inner", "by value"),
    ("const int* const*", "pointer", "to pointers"),
    ("int", "last", "with a gap behind it"),
    align=32,
)


def test_structs_are_laid_out_as_c_does():
    class CInner(ctypes.Structure):
        _fields_ = (("a", ctypes.c_short), ("b", ctypes.c_longlong))

    class COuter(ctypes.Structure):
        _fields_ = (
            ("first", ctypes.c_ubyte),
            ("inner", CInner),
            ("pointer", ctypes.c_void_p),
            ("last", ctypes.c_int),
        )

    assert (INNER.size, INNER.alignment) == (ctypes.sizeof(CInner), ctypes.alignment(CInner))
    assert (OUTER.size, OUTER.alignment) == (64, 32)  # 40 bytes, but for the alignment asked for
    for name, _ in COuter._fields_:
        assert OUTER.offsets[name] == getattr(COuter, name).offset
    for name, _ in CInner._fields_:
        at = COuter.inner.offset + getattr(CInner, name).offset
        assert OUTER.offsets[f"inner.{name}"] == at
    packed = OUTER.pack(first=7, last=-5, pointer=2**63, inner=INNER.pack(b=-(2**40), a=-3))
    back = COuter.from_buffer_copy(packed)
    assert (back.first, back.inner.a, back.inner.b, back.pointer, back.last) == (
        7,
        -3,
        -(2**40),
        2**63,
        -5,
    )


def test_values_are_named():
    with pytest.raises(TypeError, match=r"Inner lacks values of \['b'\] and has no \['c'\]"):
        INNER.pack(a=1, c=2)
    with pytest.raises(TypeError, match=r"Inner lacks values of \[\] and has no \['c'\]"):
        INNER.pack(a=1, b=2, c=2)
    with pytest.raises(struct.error):
        INNER.pack(a=2**15, b=0)
    call = Signature("call", ("int", "a", "one"), (INNER, "b", "two"), ("int*", "c", "three"))
    assert call.formats == ("i", "16s", "Q")
    assert call.arrange(c=3, a=1, b=b"two") == (1, b"two", 3)
    with pytest.raises(TypeError, match="call lacks"):
        call.arrange(a=1, b=b"two")


def test_arrays_of_structs_have_their_layout():
    assert structs.EDGE.dtype.itemsize == structs.EDGE.size == 8
    edge = np.zeros(2, structs.EDGE.dtype)
    edge[1] = (-1, 300, 250, 1, 2)
    values = dict(zip(edge.dtype.names, edge[1].tolist(), strict=True))
    assert edge[1:].tobytes() == structs.EDGE.pack(**values)


def test_the_headers_are_those_that_are_declared():
    headers = {"abi.cuh": structs.abi_header(), "travel.cuh": weights_structs.travel_header()}
    for name, text in headers.items():
        assert (KERNELS / name).read_text("utf-8") == text, "run `make abi`"


@pytest.mark.parametrize("fault", [None, "size", "place"])
def test_the_text_is_held_against_the_compilers_layout(fault, tmp_path):
    """The host's C++ compiler accepts the declared layout, and no other."""

    class Color(enum.IntEnum):
        """Of a test."""

        RED = 3

    parts = [enum_text(Color, "COLOR_"), constant_text("int", "SEVEN", 7, "seven")]
    text = header("no one", [*parts, INNER.text, OUTER.text])
    text += 'static_assert(COLOR_RED == 3 && SEVEN == 7, "constants");\n'
    if fault == "size":
        text = text.replace("LPLB_SIZE(Outer, 64)", "LPLB_SIZE(Outer, 96)")
    if fault == "place":
        first, second = "    short a;      // one\n", "    long long b;  // two\n"
        assert first + second in text
        text = text.replace(first + second, second + first)
    source = tmp_path / "abi.cpp"
    source.write_text("#define __align__(n) __attribute__((aligned(n)))\n" + text)
    compiled = subprocess.run(
        ["g++", "-fsyntax-only", str(source)], capture_output=True, text=True, check=False
    )
    messages = {
        None: "",
        "size": "Outer has another size than the host gives it",
        "place": "Inner::a is not where the host puts it",
    }
    assert messages[fault] in compiled.stderr
    assert (compiled.returncode == 0) == (fault is None)


def parameters(text):
    """{kernel: [(type, name)]} of a source; types without qualifiers of a parameter's own."""
    found = {}
    for name, inside in re.findall(
        r'extern "C" __global__[^(]*?(?:__cluster_dims__\([^)]*\) )?'
        r"(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(([^)]*)\)",
        re.sub(r"//[^\n]*", "", text),
    ):
        found[name] = []
        for one in inside.split(","):
            words = re.sub(r"__restrict__", "", one).split()
            kind, argument = " ".join(words[:-1]), words[-1]
            found[name].append((kind if "*" in kind else kind.removeprefix("const "), argument))
    return found


def test_kernels_take_the_arguments_that_are_declared():
    found = {}
    for path in sorted(KERNELS.iterdir()):
        found.update(parameters(path.read_text("utf-8")))
    declared = {
        name: [(argument.type_name, argument.name) for argument in one.arguments]
        for name, one in {
            **structs.SIGNATURES,
            **weights_structs.SIGNATURES,
            BARRIER.name: BARRIER,
        }.items()
    }
    assert found == declared
