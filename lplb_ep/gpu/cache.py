"""Entries of the kernel cache: read only where nobody else can write, and written as a whole.

A cubin runs with all that its reader may do. So a directory or an entry that another user owns or
may write is refused; root is trusted, who may do anything anyway.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..logs import logger

log = logger(__name__)

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def fault_of_directory(directory: Path) -> str | None:
    """Why a cache cannot be kept in a directory, which need not exist; None: it can.

    A file without a name is made and ended there, or in the directory that would hold it.
    """
    there = directory
    while not there.exists() and there.parent != there:
        there = there.parent
    if not there.is_dir():
        return f"{there} is no directory"
    if there == directory:
        fault = _fault(os.stat(directory), directory)
        if fault is not None:
            return fault
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return f"{there} cannot be written: {error.strerror}"
    return None


def make_directory(directory: Path) -> None:
    """Makes it for its owner alone, where it is not there.

    Raises:
        OSError: it cannot be made or written, or another user owns it or may write it.
    """
    fault = fault_of_directory(directory)
    if fault is not None:
        raise PermissionError(fault)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def read(path: Path, key: str) -> bytes | None:
    """The entry's cubin, or None where there is no whole one of this key that can be trusted."""
    try:
        entry = _read_own(path)
    except PermissionError as error:
        log.warning("%s: it is not used, and kernels are compiled anew", error)
        return None
    except OSError:
        return None
    data = entry[: -len(_footer(key, b""))]
    if entry != data + _footer(key, data):
        log.warning("%s is damaged or not ours: compiling it anew", path)
        return None
    return data


def write(path: Path, key: str, data: bytes) -> None:
    """Makes an entry, for its owner alone to write; a warning says where it cannot be kept."""
    private = path.with_suffix(f".{os.urandom(8).hex()}")
    try:
        make_directory(path.parent)
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            with open(os.open(private, flags, 0o600), "wb") as file:
                file.write(data + _footer(key, data))
                file.flush()
                os.fsync(file.fileno())
            os.replace(private, path)
        finally:
            private.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be kept, and LPLB_EP_CACHE_DIR may say where: %s", path, error)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Lets one process at a time in, where the file system has locks.

    It only spares work: without it several compile, and the last to rename leaves the same bytes.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            make_directory(path.parent)
            flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW
            file = stack.enter_context(open(os.open(path, flags, 0o600), "r+b"))
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Whoever still waits on this file looks for the entry next, and finds it.
            with contextlib.suppress(OSError):
                path.unlink()


def _read_own(path: Path) -> bytes:
    """The bytes of a file, which nobody else can have written.

    It reads the very file that it looked at, opened within the directory that it looked at.

    Raises:
        PermissionError: another user owns the file or its directory, or may write it.
        OSError: it cannot be read.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        number = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
        with open(number, "rb") as file:
            for of, what in ((directory, path.parent), (number, path)):
                fault = _fault(os.fstat(of), what)
                if fault is not None:
                    raise PermissionError(fault)
            return file.read()
    finally:
        os.close(directory)


def _fault(status: os.stat_result, path: Path) -> str | None:
    """Who else can have written a file or directory, and what to do."""
    if status.st_uid not in (0, os.geteuid()):
        owner = f"user {status.st_uid}, not you ({os.geteuid()}), owns {path}"
        return f"{owner}: set LPLB_EP_CACHE_DIR to a directory of your own"
    if status.st_mode & _OTHERS_WRITE:
        return f"others may write {path}: chmod go-w it, or set LPLB_EP_CACHE_DIR to another"
    return None


def _footer(key: str, data: bytes) -> bytes:
    """What ends an entry. ELF readers pass over bytes behind the image."""
    return f"\nlplb_ep {key} {len(data):016d} {hashlib.sha256(data).hexdigest()}\n".encode()
