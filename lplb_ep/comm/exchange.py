"""An exchange gives every rank one row of integers from each rank.

A rank must have the counts of all ranks before it plans a batch, and nothing else crosses between
ranks for a plan. `connect.py` makes the exchange that a request and the machine allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import ContractError


class Exchange(Protocol):
    """How rows travel. Planners ask these attributes and nothing else of an exchange."""

    @property
    def kind(self) -> str:
        """One of "local", "torch", "ipc" and "nvshmem"."""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can capture an exchange."""

    @property
    def waits_on_host(self) -> bool:
        """Whether the CPU waits for the other ranks' rows."""

    @property
    def windows(self) -> Windows | None:
        """Memory in which kernels exchange rows themselves. `gather` is never called then."""

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """Exchanges rows. Collective.

        Args:
            row: [W] int32 of this rank.

        Returns:
            [R, W] int32 on the device of `row`, in rank order, the same on every rank.
        """


@dataclass(frozen=True)
class Limit:
    """How long ranks wait for one another's rows, and what happens then."""

    name: str
    """What the rows are for, in messages."""
    timeout_s: float = 60
    abort: bool = False
    """End the process then, instead of raising."""


@dataclass(frozen=True)
class Relay:
    """Memory and transport by which the first rank of a node relays its node's rows.

    It sends them to the first ranks of the other nodes.
    """

    sent: int
    """Address of [2, ranks of a node] rows of 8-byte words, for even and odd batches."""
    received: int
    """Address of [nodes, 2, ranks of a node] such rows."""
    signals: int
    """Address of [nodes] 8-byte counts of the batches that each node has sent."""
    node: int
    """Index of this rank's node."""
    num_ranks_per_node: int
    put: Callable[[int], None]
    """Takes a CUDA stream. Writes `sent` into the other nodes' `received`, then adds 1 to their
    signals."""


@dataclass(frozen=True)
class Windows:
    """Memory by which kernels exchange rows, as `kernels/exchange.cuh` says.

    They write their row to the other ranks' memory and wait for the others' rows in their own.
    """

    addresses: list[int]
    """[R] addresses here of the memory in which each rank receives rows; 0 on another node."""
    relay: Relay | None = None
    """Of the first rank of a node, where there are several nodes."""

    @staticmethod
    def num_bytes(num_ranks: int, row_size: int) -> int:
        """Size of a rank's window: two batches, and a word of 8 bytes for each integer of a row."""
        return 2 * num_ranks * row_size * 8


@dataclass(frozen=True)
class WindowExchange:
    """The exchange that kernels make themselves, in windows of the other ranks' memory."""

    kind: str
    windows: Windows
    capturable = True
    waits_on_host = False

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """Is never called.

        Raises:
            ContractError: always.
        """
        raise ContractError("rows in windows are exchanged by kernels only")


class LocalExchange:
    """The exchange of a single rank."""

    kind = "local"
    capturable = True
    waits_on_host = False
    windows = None

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """As `Exchange.gather`."""
        return row[None]
