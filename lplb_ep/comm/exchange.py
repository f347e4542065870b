"""Local counts → everybody's counts: what crosses between ranks, and nothing else does.

An exchange gathers one row of integers from every rank. It knows neither experts nor DeepEP.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from ..errors import ContractError
from .collectives import gather_rows, memory_of

COUNTS = ("auto", "nvshmem", "ipc", "torch", "given")


@dataclass(frozen=True)
class Reach:
    """Why the ranks of a group cannot write each other's memory; empty: they can."""

    nvshmem: str = ""
    """In NVSHMEM's symmetric memory."""
    ipc: str = ""
    """In memory that CUDA IPC shares."""
    num_ranks_per_node: int = 0
    """How many ranks share a node; 0: all, or the nodes are uneven."""


class Exchange(Protocol):
    """Collective: each rank brings a row, and each gets all of them."""

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """[W] int32 from each rank → [R, W] int32, the same on every rank, in rank order."""


@dataclass(frozen=True)
class Relay:
    """How the first rank of a node sends its node's rows to the first ranks of the others, in
    memory that it has for that."""

    sent: int
    """Address of [2, ranks of a node] rows of 8-byte words: for even and odd batches."""
    received: int
    """Address of [nodes, 2, ranks of a node] such rows."""
    signals: int
    """Address of [nodes] 8-byte counts of the batches that each node has sent."""
    node: int
    num_ranks_per_node: int
    put: Callable[[int], None]
    """On a CUDA stream: writes `sent` into the others' `received`, then adds 1 to their signals."""


@dataclass(frozen=True)
class Windows:
    """An exchange by the kernels themselves, which write rows to the other ranks' memory and wait
    for theirs; `kernels/exchange.cuh` says how."""

    addresses: list[int]
    """[R] of the memory in which each rank receives rows, as seen from this one; 0: on another
    node."""
    relay: Relay | None = None
    """Of the first rank of a node, where there are several."""

    @staticmethod
    def num_bytes(num_ranks: int, row_size: int) -> int:
        """Of a rank's memory: for two batches a word of 8 bytes for each integer of each row."""
        return 2 * num_ranks * row_size * 8


class LocalExchange:
    """The exchange of a single rank."""

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """As `Exchange.gather`."""
        return row[None]


class TorchExchange:
    """A gather on a `torch.distributed` group; NCCL's moves device memory only.

    The group is held weakly: one that is still held when the interpreter ends can abort it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.device = memory_of(group)

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """As `Exchange.gather`.

        Raises:
            ContractError: the group is destroyed.
        """
        group = self._group()
        if group is None:
            raise ContractError("the group that this exchange was made for is destroyed")
        return gather_rows(row.to(self.device), group).to(row.device)


def choose_counts(
    counts: str, num_ranks: int, has_group: bool, on_gpu: bool, reach: Reach
) -> tuple[str, str]:
    """The exchange for a request, and why.

    Args:
        counts: one of `COUNTS`.
        num_ranks: R.
        has_group: whether there is a group to exchange them on.
        on_gpu: whether plans are made there.
        reach: whether the ranks' GPUs reach each other's memory.

    Returns:
        ("local" | "given" | one of COUNTS but "auto", the reason in words).

    Raises:
        ValueError: an unknown name, or one that cannot be; says why.
    """
    if counts not in COUNTS:
        raise ValueError(f"counts must be one of {', '.join(COUNTS)}; got {counts!r}")
    if counts == "given":
        return "given", "asked for: the caller brings the counts of all ranks"
    if num_ranks == 1:
        return "local", "a single rank has nothing to exchange"
    if not has_group:
        raise ValueError(
            f"counts={counts!r} needs a group to exchange the counts of {num_ranks} ranks; "
            'pass group=, or counts="given" and the counts with each batch'
        )
    obstacles = {kind: getattr(reach, kind) for kind in ("nvshmem", "ipc")}
    if not on_gpu:
        obstacles = dict.fromkeys(obstacles, "plans are made on the CPU")
    if obstacles.get(counts):
        raise ValueError(f"counts={counts!r} cannot be: {obstacles[counts]}")
    if counts != "auto":
        return counts, "asked for"
    if 0 < reach.num_ranks_per_node < num_ranks and not obstacles["nvshmem"]:
        obstacles["nvshmem"] = "between nodes only where asked for: no network has tried it"
    able = [kind for kind, obstacle in obstacles.items() if not obstacle]
    because = "; ".join(f"not {kind}: {why}" for kind, why in obstacles.items() if why)
    return (able or ["torch"])[0], because or "the kernels reach every rank's memory"
