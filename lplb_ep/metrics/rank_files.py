"""Which file each process of a job writes; those of an earlier job that none would replace."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch.distributed as dist

from ..logs import logger

log = logger(__name__)


def path_of_rank(path: Path) -> Path:
    """A file for each process that writes: the first rank of each group.

    It stays where it is if the program goes to another directory.
    """
    path, rank = path.absolute(), _rank_and_size()[0]
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def files_of_ranks(path: Path) -> dict[Path, int]:
    """The files of other ranks than the first beside a path, and the ranks."""
    name = re.escape(path.stem) + r"\.rank([1-9]\d*)(\.before)?" + re.escape(path.suffix)
    try:
        beside = sorted(path.absolute().parent.iterdir())
    except OSError:  # a wrong path is named where it is written
        return {}
    found = {file: re.fullmatch(name, file.name) for file in beside}
    return {file: int(match[1]) for file, match in found.items() if match and file.is_file()}


def remove_stale(path: Path, *, writes: bool) -> None:
    """Removes files of an earlier job that no process of this one replaces.

    These are files of ranks that this job has not, and of this rank where it writes none. No other
    process of the job writes them, so each may do it at any time.

    Args:
        path: the first rank's file.
        writes: whether this process has a file of its own.
    """
    own, size = _rank_and_size()
    for file, rank in files_of_ranks(path).items():
        if rank >= size or (rank == own and not writes):
            with contextlib.suppress(OSError):
                file.unlink()
                log.info("removed %s, which an earlier job left", file)


def _rank_and_size() -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
