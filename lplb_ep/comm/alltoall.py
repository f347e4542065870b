"""Bytes from every rank to every rank: by copies between GPUs, or by a collective.

It knows nothing of what the bytes are. The collective is `torch.distributed`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ..errors import ContractError, MissingPackageError, RankError
from ..gpu.device import check_device
from ..logs import is_first, logger
from ..settings import Settings
from .collectives import everyone, together
from .copies import PeerCopies
from .exchange import Limit
from .peers import peer_memory
from .reachability import reachability
from .torch_exchange import check_unbroken, wait_on_host
from .watchdog import newly_missing, watch

log = logger(__name__)

TRANSPORTS = ("auto", "peers", "torch")
BUFFER_BYTES = 64 << 20
"""Size of a receive buffer, of which a rank's window has two."""

Peers = TypeVar("Peers")
"""What moves bytes between GPUs."""

Table = Sequence[Sequence[int]]
"""[R][R] bytes from each rank to each, the same on every rank."""


class Transport(Protocol):
    """Moves bytes between ranks. Its calls are collective, on the current stream."""

    device: torch.device
    """Where tensors that are sent and received must lie."""
    stream: torch.cuda.Stream | None
    """For calls that are to overlap with other work; None on the CPU."""

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, table: Table) -> None:
        """Sends bytes to every rank, as `torch.distributed.all_to_all_single`.

        Args:
            received: uint8 on `device`, of this rank's column of the table: from each rank in turn.
            sent: uint8 on `device`, of this rank's row of the table: to each rank in turn.
            table: how many bytes go from each rank to each.
        """


class TorchTransport:
    """A collective of `torch.distributed`; gloo moves host memory only.

    Args:
        group: the ranks; None for a single one.
        device: where this rank's tensors lie.
        limit: how long gloo waits for the other ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, limit: Limit) -> None:
        self._group, self._limit = group, limit
        self._by_host = group is not None and dist.get_backend(group) == "gloo"
        self.device = torch.device("cpu") if self._by_host else device
        self.stream = _side_stream(group, self.device)

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, table: Table) -> None:
        """As `Transport.all_to_all`.

        Raises:
            RankError: with gloo, a rank did not come in time, now or before; names it.
        """
        group = self._group
        rank = dist.get_rank(group)
        sizes, split = [row[rank] for row in table], list(table[rank])
        if group is None or not self._by_host:
            dist.all_to_all_single(received, sent, sizes, split, group=group)
            return
        check_unbroken(group)
        work = dist.all_to_all_single(received, sent, sizes, split, group=group, async_op=True)
        wait_on_host(group, work, self._limit, "weights or gradients")


class Copies(Protocol):
    """`copies.PeerCopies`; a test has others."""

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copies bytes from an address to another, on the current stream."""

    def barrier(self, number: int) -> None:
        """Waits, on the current stream, until all ranks have reached barrier `number`: 1, 2, …"""


class PeerTransport:
    """Copies into windows of the other ranks' memory.

    Copy engines make them, so no SM is taken but for a block that waits.

    What a rank receives is cut into rounds. In a round every rank copies its part into the others'
    windows, waits until all have done so, and takes its own out. A window has two buffers, for even
    and odd rounds. That suffices: a rank writes in round n + 2 behind the barrier of round n + 1.
    Each rank reaches that barrier when it has copied round n out.

    Args:
        rank: this rank.
        device: this rank's GPU.
        windows: [R] addresses here of each rank's window, of two buffers.
        buffer_bytes: the size of a buffer.
        copies: moves bytes, and makes ranks wait for one another.
        stream: for calls that are to overlap with other work.
    """

    def __init__(
        self,
        rank: int,
        device: torch.device,
        windows: Sequence[int],
        buffer_bytes: int,
        copies: Copies,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.device, self._rank, self._windows = device, rank, windows
        self._buffer_bytes, self._copies = buffer_bytes, copies
        self.stream = stream
        self._num_rounds = 0

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, table: Table) -> None:
        """As `Transport.all_to_all`.

        Raises:
            ContractError: a CUDA graph is being captured.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Its replays would not wait: rounds are numbered by the CPU.
            raise ContractError("replica weights and gradients cannot be sent from a CUDA graph")
        own = self._windows[self._rank]
        for first, parts in _rounds(table, self._rank, self._buffer_bytes):
            self._num_rounds += 1
            buffer = self._num_rounds % 2 * self._buffer_bytes
            for part in parts:
                target = self._windows[part.target] + buffer + part.place
                self._copies.copy(target, sent.data_ptr() + part.source, part.num_bytes)
            self._copies.barrier(self._num_rounds)
            size = min(self._buffer_bytes, received.numel() - first)
            if size > 0:
                self._copies.copy(received.data_ptr() + first, own + buffer, size)


class _Part(NamedTuple):
    """Bytes that a rank sends another in a round."""

    target: int
    source: int  # its first byte in the sender's tensor
    place: int  # in the target's buffer
    num_bytes: int


def _rounds(table: Table, rank: int, buffer_bytes: int) -> Iterator[tuple[int, list[_Part]]]:
    """For each round: its first byte in what a rank receives, and what this rank sends.

    There are as many rounds as the rank needs that receives most.
    """
    num_ranks = len(table)
    most = max(sum(row[target] for row in table) for target in range(num_ranks))
    for first in range(0, most, buffer_bytes):
        parts = []
        for step in range(1, num_ranks + 1):
            target = (rank + step) % num_ranks  # not all to the same one at once
            begin = sum(row[target] for row in table[:rank])
            low = max(begin, first)
            high = min(begin + table[rank][target], first + buffer_bytes)
            if low < high:
                source = sum(table[rank][:target]) + low - begin
                parts.append(_Part(target, source, low - first, high - low))
        yield first, parts


_streams: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, torch.cuda.Stream]] = (
    WeakKeyDictionary()
)


def _side_stream(group: dist.ProcessGroup | None, device: torch.device) -> torch.cuda.Stream | None:
    """One for all that a group sends.

    Each stream has memory of its own from torch's allocator. Groups have streams of their own, for
    on one they would wait for one another.
    """
    if group is None or device.type != "cuda":
        return None
    of_group = _streams.setdefault(group, {})
    if device not in of_group:
        # Its few blocks go before those of the work beside it, which would keep them waiting.
        of_group[device] = torch.cuda.Stream(device, priority=-1)
    return of_group[device]


def make_transport(
    group: dist.ProcessGroup | None, device: torch.device, transport: str = "auto"
) -> Transport:
    """Makes the transport from each rank to each. Collective.

    Args:
        group: the ranks; None for a single one, which has nothing to send.
        device: where this rank's tensors lie.
        transport: "peers", "torch", or "auto": the first of them that is possible.

    Raises:
        ValueError: "peers" is asked for and not possible; says why.
    """
    found = make_peers(
        group,
        transport,
        "replica weights",
        "copies into the other GPUs' memory",
        lambda: peers_obstacle(device),
        lambda of: _peer_transport(of, device),
    )
    return TorchTransport(group, device, limit_of_experts()) if found is None else found


def limit_of_experts() -> Limit:
    """How long ranks wait for one another's weights and gradients, by the settings."""
    settings = Settings.from_env()
    return Limit("experts", settings.timeout_s, settings.on_timeout == "abort")


def make_peers(
    group: dist.ProcessGroup | None,
    transport: str,
    what: str,
    how: str,
    obstacle: Callable[[], str],
    make: Callable[[dist.ProcessGroup], Peers | str],
) -> Peers | None:
    """Makes what moves bytes between the GPUs of a node, if all ranks can take part. Collective.

    Args:
        group: the ranks; None for a single one, which has nothing to send.
        transport: "peers", "torch", or "auto": the first of them that is possible.
        what: the bytes' name in messages.
        how: the way between GPUs, for the log.
        obstacle: why this rank cannot take part; empty: it can.
        make: makes it, or says why not, the same on all ranks.

    Returns:
        None where `torch.distributed` is to move it.

    Raises:
        ValueError: "peers" is asked for and not possible; says why.
    """
    if group is None or group.size() == 1:
        return None
    found: Peers | str = "not asked for"
    if transport != "torch":
        with together(group, what):
            own = obstacle()
        of_ranks = everyone(group, own)
        found = next((f"rank {r}: {why}" for r, why in enumerate(of_ranks) if why), "")
        found = found or make(group)
    if not isinstance(found, str):
        if is_first(group):
            log.info("%s travel by %s", what, how)
        return found
    if transport == "peers":
        raise ValueError(f"transport='peers' is not possible: {found}")
    if is_first(group):
        log.info("%s travel by torch.distributed (%s)", what, found)
    return None


def peers_obstacle(device: torch.device) -> str:
    """Why this rank cannot take part in copies between GPUs; empty: it can."""
    if device.type != "cuda":
        return f"its weights are on the {device.type.upper()}"
    try:
        with torch.cuda.device(device):
            check_device()
    except MissingPackageError as error:
        return str(error)
    return ""


# Or why there is none.
_peer_transports: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, PeerTransport | str]] = (
    WeakKeyDictionary()
)


def _peer_transport(group: dist.ProcessGroup, device: torch.device) -> PeerTransport | str:
    """The group's, or why it has none; what was found once holds."""
    of_group = _peer_transports.setdefault(group, {})
    if device not in of_group:
        with torch.cuda.device(device):
            of_group[device] = reachability(group).ipc or _make_peer_transport(group, device)
    return of_group[device]


def _make_peer_transport(group: dist.ProcessGroup, device: torch.device) -> PeerTransport | str:
    try:
        memory = peer_memory(group, "ipc")
        flags, windows = memory.window(8 * group.size()), memory.window(2 * BUFFER_BYTES)
    except (ContractError, RankError) as error:  # on all ranks
        return str(error)
    with together(group, "replica weights"):
        settings = Settings.from_env()
        copies = PeerCopies(group.rank(), device, flags, settings.timeout_s)
    stream = _side_stream(group, device)
    transport = PeerTransport(group.rank(), device, windows, BUFFER_BYTES, copies, stream)
    say = functools.partial(_missing_ranks, copies.missing, settings.timeout_s)
    watch(transport, newly_missing(copies.missing, say), abort=settings.on_timeout == "abort")
    return transport


def _missing_ranks(missing: npt.NDArray[np.int32], timeout_s: float) -> str:
    return (
        f"ranks {np.flatnonzero(missing).tolist()} did not come to a copy of replica weights or "
        f"gradients within {timeout_s:g} s: ended, hung or slow. The GPU goes on waiting for them"
    )
