"""What host and device share, declared once: structs, enums, constants and kernels' arguments.

A declaration packs values for the device and writes the C++ text for the kernels. The text asserts
the size of each struct and the offset of each field, so a compiler with other rules refuses it.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_CODES = {
    "int": "i",
    "unsigned": "I",
    "short": "h",
    "unsigned char": "B",
    "long long": "q",
    "unsigned long long": "Q",
}
"""C types and their codes of module `struct`; every pointer is a "Q"."""


_ASSERTS = """\
#define LPLB_SIZE(type, bytes) \\
    static_assert(sizeof(type) == bytes, #type " has another size than the host gives it")
#if __has_builtin(__builtin_offsetof)
#define LPLB_PLACE(type, field, bytes) \\
    static_assert(__builtin_offsetof(type, field) == bytes, \\
                  #type "::" #field " is not where the host puts it")
#else  // in NVRTC 13.0; newer ones and host compilers check the places
#define LPLB_PLACE(type, field, bytes)
#endif"""


class Field(NamedTuple):
    """A field of a struct, or an argument of a kernel."""

    type: str | Struct
    """A C type as written, pointers included, or another struct, by value."""
    name: str
    meaning: str
    """One line for the reader of the C++ text."""

    @property
    def type_name(self) -> str:
        """The type as C++ has it."""
        return self.type.name if isinstance(self.type, Struct) else self.type

    @property
    def format(self) -> str:
        """The format of module `struct`; a nested struct is packed already, and so bytes."""
        if isinstance(self.type, Struct):
            return f"{self.type.size}s"
        return "Q" if "*" in self.type else _CODES[self.type]

    @property
    def size(self) -> int:
        """Bytes."""
        return struct.calcsize(f"={self.format}")

    @property
    def alignment(self) -> int:
        """Bytes."""
        return self.type.alignment if isinstance(self.type, Struct) else self.size


class Struct:
    """A struct in the layout that C++ compilers for GPUs and for x86-64 and AArch64 give it.

    Args:
        name: as in C++.
        meaning: one line for the reader of the C++ text.
        fields: in order, each (type, name, meaning).
        align: bytes that it is aligned to, where that is more than its fields need.
    """

    def __init__(
        self,
        name: str,
        meaning: str,
        *fields: tuple[str | Struct, str, str],
        align: int = 1,
    ) -> None:
        self.name, self.meaning, self._align = name, meaning, align
        self.fields = [Field(*field) for field in fields]
        self.alignment = max(align, *(field.alignment for field in self.fields))
        self.offsets: dict[str, int] = {}
        """Of each field in bytes; of a nested struct's fields, too, as "outer.inner"."""
        end, self.format = 0, "="
        for field in self.fields:
            offset = end + -end % field.alignment
            self.format += f"{offset - end}x{field.format}"
            self.offsets[field.name] = offset
            if isinstance(field.type, Struct):
                for inner, at in field.type.offsets.items():
                    self.offsets[f"{field.name}.{inner}"] = offset + at
            end = offset + field.size
        self.size = end + -end % self.alignment
        """Bytes."""
        self.format += f"{self.size - end}x"
        """The format of module `struct`, with a value for each field."""
        self._pack = struct.Struct(self.format).pack
        self._names = [field.name for field in self.fields]

    def pack(self, **values: int | bytes) -> bytes:
        """The struct as bytes.

        Args:
            values: of every field, by name: a number, an address, or a nested struct's bytes.

        Raises:
            TypeError: a field is missing or unknown.
            struct.error: a value is out of its type's range.
        """
        return self._pack(*_in_order(self.name, self._names, values))

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's type of an array of these; without pointers and nested structs only."""
        return np.dtype(
            {
                "names": self._names,
                "formats": [np.dtype(f"={field.format}") for field in self.fields],
                "offsets": [self.offsets[name] for name in self._names],
                "itemsize": self.size,
            }
        )

    @property
    def text(self) -> str:
        """C++: the struct, and asserts of its layout."""
        align = f"__align__({self._align}) " if self._align > 1 else ""
        declared = [f"{field.type_name} {field.name};" for field in self.fields]
        width = max(map(len, declared))
        lines = [f"// {self.meaning}", f"struct {align}{self.name} {{"]
        for left, field in zip(declared, self.fields, strict=True):
            lines.append(f"    {left:{width}}  // {field.meaning}")
        lines.append("};")
        lines.append(f"LPLB_SIZE({self.name}, {self.size});")
        lines += [f"LPLB_PLACE({self.name}, {name}, {self.offsets[name]});" for name in self._names]
        return "\n".join(lines)


class Signature:
    """The arguments of a kernel, in order.

    Args:
        name: of the kernel.
        arguments: each (type, name, meaning), with the type as in the kernel's source but for
            `const` before a struct and `__restrict__`.
    """

    def __init__(self, name: str, *arguments: tuple[str | Struct, str, str]) -> None:
        self.name, self.arguments = name, [Field(*argument) for argument in arguments]
        self.formats = tuple(argument.format for argument in self.arguments)
        """As `jit.Kernels.kernel` takes them."""
        self._names = [argument.name for argument in self.arguments]

    def arrange(self, **values: int | bytes) -> tuple[int | bytes, ...]:
        """The arguments in order.

        Args:
            values: of every argument, by name: a number, an address, or a struct's bytes.

        Raises:
            TypeError: an argument is missing or unknown.
        """
        return tuple(_in_order(self.name, self._names, values))

    def span(self, *paths: str) -> tuple[int, int, str]:
        """Where neighbouring fields lie, as `Launch.writer` takes it.

        Args:
            paths: an argument's name, or "argument.field.inner" for a field of a struct; each
                behind the one before, without a gap.

        Returns:
            The number of the argument, the offset of the first field in it, and the formats.

        Raises:
            ValueError: there is a gap, or an argument between two fields.
        """
        places = [self._place(path) for path in paths]
        argument, start, _, _ = places[0]
        end, formats = start, ""
        for path, (of, offset, format, size) in zip(paths, places, strict=True):
            if (of, offset) != (argument, end):
                raise ValueError(f"{path} is not behind the field before it")
            end, formats = offset + size, formats + format
        return argument, start, formats

    def _place(self, path: str) -> tuple[int, int, str, int]:
        """The number of the argument, and the offset, format and size of a field in it."""
        name, *inner = path.split(".")
        index = self._names.index(name)
        field, offset = self.arguments[index], 0
        for step in inner:
            assert isinstance(field.type, Struct), f"{path}: {field.name} is no struct"
            offset += field.type.offsets[step]
            field = next(one for one in field.type.fields if one.name == step)
        return index, offset, field.format, field.size


def _in_order(
    what: str, names: Sequence[str], values: Mapping[str, int | bytes]
) -> list[int | bytes]:
    if len(values) != len(names) or not values.keys() >= set(names):
        missing, unknown = sorted({*names} - values.keys()), sorted(values.keys() - {*names})
        raise TypeError(f"{what} lacks values of {missing} and has no {unknown}")
    return [values[name] for name in names]


def enum_text(values: type[enum.IntEnum], prefix: str = "") -> str:
    """C++: an enum with the names and numbers of Python's.

    Args:
        values: its docstring's first line becomes the comment.
        prefix: before each name, since C++ has the names of all enums in one scope.
    """
    lines = [f"// {(values.__doc__ or '').splitlines()[0]}", f"enum {values.__name__} {{"]
    lines += [f"    {prefix}{one.name} = {int(one)}," for one in values]
    return "\n".join([*lines, "};"])


def constant_text(type_name: str, name: str, value: int, meaning: str) -> str:
    """C++: a constant."""
    return f"constexpr {type_name} {name} = {value};  // {meaning}"


def table_text(name: str, values: Sequence[int], meaning: str) -> str:
    """C++: a function that reads a table of integers.

    A table outside a function would be in every kernel's constant memory, used or not.
    """
    numbers = ", ".join(map(str, values))
    return (
        f"// {meaning}\n__device__ inline int {name}(int i) {{\n"
        f"    constexpr int table[] = {{{numbers}}};\n    return table[i];\n}}"
    )


def header(command: str, parts: Iterable[str]) -> str:
    """C++: a header of these parts.

    Args:
        command: what writes the file, for its reader.
        parts: texts, in order.
    """
    first = f"// Written by `{command}`. Do not edit: change the declarations there.\n#pragma once"
    return "\n\n".join([first, _ASSERTS, *parts, "#undef LPLB_SIZE\n#undef LPLB_PLACE"]) + "\n"
