"""Bytes from every rank to every rank: by copies into the other GPUs' memory, or by a collective of
`torch.distributed`.

It knows nothing of what the bytes are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ..errors import ContractError, MissingPackageError, RankError
from ..gpu.device import check_device
from ..settings import Settings
from .collectives import everyone, together
from .copies import Peers
from .peers import peer_memory
from .reachability import reachability
from .watchdog import newly_missing, watch

log = logging.getLogger(__name__)

TRANSPORTS = ("auto", "peers", "torch")
HALF_BYTES = 64 << 20
"""Of a rank's window for what others send it, of which there are two."""

Table = Sequence[Sequence[int]]
"""[R][R] bytes from each rank to each, the same on every rank."""


class Wire(Protocol):
    """Collective calls, on the current stream."""

    device: torch.device
    """Where what is sent and received must lie."""
    stream: torch.cuda.Stream | None
    """One for calls that are to overlap with other work; None on the CPU."""

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, table: Table) -> None:
        """As `torch.distributed.all_to_all_single`, of uint8."""


class TorchWire:
    """By a collective of `torch.distributed`; gloo moves host memory only."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        by_host = group is not None and dist.get_backend(group) == "gloo"
        self.device = torch.device("cpu") if by_host else device
        self.stream = _side_stream(group, self.device)

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, table: Table) -> None:
        """As `Wire.all_to_all`."""
        rank = dist.get_rank(self._group)
        sizes, split = [row[rank] for row in table], list(table[rank])
        dist.all_to_all_single(received, sent, sizes, split, group=self._group)


class Copies(Protocol):
    """`copies.Peers`; a test has others."""

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copies bytes from an address to another, on the current stream."""

    def barrier(self, number: int) -> None:
        """Waits, on the current stream, until all ranks have come to barrier `number`: 1, 2, …"""


class PeerWire:
    """By copies into windows of the other ranks' memory. Copy engines make them, so no SM is taken
    but for a block that waits.

    What a rank receives is cut into rounds. In a round every rank copies what belongs there into
    the others' windows, waits until all have done so, and takes its own out. Windows have two
    halves, for even and odd rounds, and that suffices: what a rank writes in round n + 2 comes
    behind the barrier of n + 1, to which each rank comes when it has taken out round n.

    Args:
        rank: this rank.
        device: this rank's GPU.
        windows: [R] addresses of each rank's window, of two halves.
        half_bytes: the size of a half.
        copies: what moves bytes, and makes ranks wait for one another.
        stream: one for calls that are to overlap with other work.
    """

    def __init__(
        self,
        rank: int,
        device: torch.device,
        windows: Sequence[int],
        half_bytes: int,
        copies: Copies,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.device, self._rank, self._windows = device, rank, windows
        self._half_bytes, self._copies = half_bytes, copies
        self.stream = stream
        self._num_rounds = 0

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, table: Table) -> None:
        """As `Wire.all_to_all`.

        Raises:
            ContractError: a CUDA graph is being captured.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Its replays would not wait: rounds are numbered by the CPU.
            raise ContractError("replica weights and gradients cannot be sent from a CUDA graph")
        own = self._windows[self._rank]
        for first, parts in _rounds(table, self._rank, self._half_bytes):
            self._num_rounds += 1
            half = self._num_rounds % 2 * self._half_bytes
            for part in parts:
                target = self._windows[part.target] + half + part.place
                self._copies.copy(target, sent.data_ptr() + part.source, part.num_bytes)
            self._copies.barrier(self._num_rounds)
            size = min(self._half_bytes, received.numel() - first)
            if size > 0:
                self._copies.copy(received.data_ptr() + first, own + half, size)


class _Part(NamedTuple):
    """What a rank sends another in a round."""

    target: int
    source: int  # its first byte in what is sent
    place: int  # in the half of the target's window
    num_bytes: int


def _rounds(table: Table, rank: int, half_bytes: int) -> Iterator[tuple[int, list[_Part]]]:
    """Of as many rounds as the rank that receives most needs: which byte of what a rank receives
    is the round's first, and what this rank sends."""
    num_ranks = len(table)
    most = max(sum(row[target] for row in table) for target in range(num_ranks))
    for first in range(0, most, half_bytes):
        parts = []
        for step in range(1, num_ranks + 1):
            target = (rank + step) % num_ranks  # not all to the same one at once
            begin = sum(row[target] for row in table[:rank])
            low = max(begin, first)
            high = min(begin + table[rank][target], first + half_bytes)
            if low < high:
                source = sum(table[rank][:target]) + low - begin
                parts.append(_Part(target, source, low - first, high - low))
        yield first, parts


_streams: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, torch.cuda.Stream]] = (
    WeakKeyDictionary()
)


def _side_stream(group: dist.ProcessGroup | None, device: torch.device) -> torch.cuda.Stream | None:
    """One for all that a group sends: each stream has memory of its own from torch's allocator, and
    on one of several groups they would wait for one another."""
    if group is None or device.type != "cuda":
        return None
    of_group = _streams.setdefault(group, {})
    if device not in of_group:
        # Its few blocks go before those of the work beside it, which would keep them waiting.
        of_group[device] = torch.cuda.Stream(device, priority=-1)
    return of_group[device]


# Or why there is none.
_peer_wires: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, PeerWire | str]] = (
    WeakKeyDictionary()
)


def connect(group: dist.ProcessGroup | None, device: torch.device, transport: str = "auto") -> Wire:
    """The way from each rank to each. Collective.

    Args:
        group: the ranks; None for a single one, which has nothing to send.
        device: where this rank's tensors lie.
        transport: "peers", "torch", or "auto": the first of them that can be.

    Raises:
        ValueError: "peers" is asked for and cannot be; says why.
    """
    if group is None or group.size() == 1:
        return TorchWire(group, device)
    found: PeerWire | str = "not asked for"
    if transport != "torch":
        with together(group, "replica weights"):
            obstacle = _obstacle(device)
        of_ranks = everyone(group, obstacle)
        obstacle = next((f"rank {r}: {why}" for r, why in enumerate(of_ranks) if why), "")
        found = obstacle or _connect_peers(group, device)
    if isinstance(found, PeerWire):
        log.info("replica weights travel by copies into the other GPUs' memory")
        return found
    if transport == "peers":
        raise ValueError(f"transport='peers' cannot be: {found}")
    log.info("replica weights travel by torch.distributed (%s)", found)
    return TorchWire(group, device)


def _obstacle(device: torch.device) -> str:
    """Why this rank cannot take part in copies between GPUs; empty: it can."""
    if device.type != "cuda":
        return f"its weights are on the {device.type.upper()}"
    try:
        with torch.cuda.device(device):
            check_device()
    except MissingPackageError as error:
        return str(error)
    return ""


def _connect_peers(group: dist.ProcessGroup, device: torch.device) -> PeerWire | str:
    """The group's, or why it has none; what was found once holds."""
    of_group = _peer_wires.setdefault(group, {})
    if device not in of_group:
        with torch.cuda.device(device):
            of_group[device] = reachability(group).ipc or _make_peers(group, device)
    return of_group[device]


def _make_peers(group: dist.ProcessGroup, device: torch.device) -> PeerWire | str:
    try:
        memory = peer_memory(group, "ipc")
        flags, windows = memory.window(8 * group.size()), memory.window(2 * HALF_BYTES)
    except (ContractError, RankError) as error:  # on all ranks
        return str(error)
    with together(group, "replica weights"):
        settings = Settings.from_env()
        peers = Peers(group.rank(), device, flags, settings.timeout_s)
    stream = _side_stream(group, device)
    wire = PeerWire(group.rank(), device, windows, HALF_BYTES, peers, stream)
    say = functools.partial(_missing_ranks, peers.missing, settings.timeout_s)
    watch(wire, newly_missing(peers.missing, say), abort=settings.on_timeout == "abort")
    return wire


def _missing_ranks(missing: npt.NDArray[np.int32], timeout_s: float) -> str:
    return (
        f"ranks {np.flatnonzero(missing).tolist()} did not come to a copy of replica weights or "
        f"gradients within {timeout_s:g} s: ended, hung or slow. The GPU goes on waiting for them"
    )
