"""Memory that every rank of a node writes directly, on the GPUs.

It lies in NVSHMEM's symmetric heap, or in allocations that CUDA IPC opens on the other ranks. The
group of `torch.distributed` is used to set it up only.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ..errors import ContractError, RankError
from . import nvshmem
from .collectives import attempt, everyone
from .exchange import Relay, Windows
from .reachability import reachability

_CHUNK_BYTES = 2 << 20  # what the driver allocates at least
_ALIGNMENT = 256


class PeerMemory:
    """Windows: memory of the same size on every rank, which every rank of its node may write.

    Args:
        group: the ranks, each with a GPU that is current; held weakly.
        kind: "nvshmem" or "ipc". With several nodes the first takes CUDA IPC within each, and
            NVSHMEM between the first ranks of all.

    Raises:
        MissingPackageError: a rank lacks a package.
        ContractError: NVSHMEM runs already, with other ranks than are needed.
        RankError: some rank cannot reach another; names it and why.
    """

    def __init__(self, group: dist.ProcessGroup, kind: str) -> None:
        self._group = weakref.ref(group)
        self._node_size = reachability(group).num_ranks_per_node or group.size()
        across = self._node_size < group.size()
        if kind == "nvshmem":
            nvshmem.join(group, group.size() // self._node_size)
        direct = _allocate_nvshmem if kind == "nvshmem" and not across else _allocate_ipc
        self._windows = _Chunks(functools.partial(direct, node_size=self._node_size))
        self._relayed = _Chunks(functools.partial(_allocate_nvshmem, node_size=1))

    def window(self, num_bytes: int) -> list[int]:
        """Gives each rank a window. Collective: ranks ask for the same sizes in the same order.

        Args:
            num_bytes: the size of each rank's window.

        Returns:
            [R] addresses here of every rank's window, 0 on another node. Windows are zeroed, and
            live as long as the process: a peer may be about to write.
        """
        return self._windows.cut(self._alive(), num_bytes)

    def windows(self, row_size: int) -> Windows:
        """Gives each rank a window for rows, and a relay between nodes. Collective, as `window`.

        Args:
            row_size: integers of a row.
        """
        group = self._alive()
        addresses = self.window(Windows.num_bytes(group.size(), row_size))
        across = self._node_size < group.size()
        return Windows(addresses, self._relay(group, 8 * row_size) if across else None)

    def _alive(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise ContractError("the group that this memory was made for is destroyed")
        return group

    def _relay(self, group: dist.ProcessGroup, row_bytes: int) -> Relay | None:
        """Every rank allocates, for the symmetric heap's sake; the first of a node uses it."""
        from nvshmem import bindings

        node, local = divmod(group.rank(), self._node_size)
        num_nodes, num_bytes = group.size() // self._node_size, 2 * self._node_size * row_bytes
        sizes = (num_bytes, num_nodes * num_bytes, 8 * num_nodes)
        sent, received, signals = (self._relayed.cut(group, n)[group.rank()] for n in sizes)
        # Of a world of all ranks, or of one with a PE for each node.
        pes = range(0, group.size(), self._node_size)
        if bindings.n_pes() < group.size():
            pes = range(num_nodes)

        def put(stream: int) -> None:
            for other, pe in enumerate(pes):
                if other != node:
                    bindings.putmem_signal_on_stream(
                        received + node * num_bytes,
                        sent,
                        num_bytes,
                        signals + 8 * node,
                        1,
                        int(bindings.Signal_op.SIGNAL_ADD),
                        pe,
                        stream,
                    )

        relay = Relay(sent, received, signals, node, self._node_size, put)
        return relay if local == 0 else None


_memories: WeakKeyDictionary[dist.ProcessGroup, dict[str, PeerMemory]] = WeakKeyDictionary()


def peer_memory(group: dist.ProcessGroup, kind: str) -> PeerMemory:
    """Finds the group's memory of a kind, or makes it. Collective where there is none yet."""
    of_group = _memories.setdefault(group, {})
    if kind not in of_group:
        of_group[kind] = PeerMemory(group, kind)
    return of_group[kind]


class _Chunks:
    """Pieces of a few large allocations."""

    def __init__(self, allocate: Callable[[dist.ProcessGroup, int], list[int]]) -> None:
        self._allocate, self._chunk, self._left = allocate, [0], 0

    def cut(self, group: dist.ProcessGroup, num_bytes: int) -> list[int]:
        """Collective. [R] addresses here of every rank's piece, 0 on another node."""
        num_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if num_bytes > self._left:
            size = -(-num_bytes // _CHUNK_BYTES) * _CHUNK_BYTES
            self._chunk = self._allocate(group, size)
            self._left = size
        piece = list(self._chunk)
        self._chunk = [address and address + num_bytes for address in self._chunk]
        self._left -= num_bytes
        return piece


def _allocate_nvshmem(group: dist.ProcessGroup, num_bytes: int, node_size: int) -> list[int]:
    addresses: dict[int, int] = {}
    with attempt(group, "NVSHMEM's memory"):
        from nvshmem import bindings

        address = bindings.malloc(num_bytes)
        if not address:
            raise MemoryError(f"its heap has no {num_bytes} bytes: set NVSHMEM_SYMMETRIC_SIZE")
        for rank in _node_of(group, node_size):
            addresses[rank] = address if rank == group.rank() else bindings.ptr(address, rank)
        if not all(addresses.values()):
            raise MemoryError("a PE of the node cannot be reached by loads and stores")
        _zero(address, num_bytes)
    return [addresses.get(rank, 0) for rank in range(group.size())]


def _allocate_ipc(group: dist.ProcessGroup, num_bytes: int, node_size: int) -> list[int]:
    own, handle = 0, b""
    opened: dict[int, int] = {}
    try:
        with attempt(group, "CUDA IPC, to share memory") as facts:
            from cupy.cuda import runtime

            facts["bytes"] = num_bytes
            own = runtime.malloc(num_bytes)
            _zero(own, num_bytes)
            handle = runtime.ipcGetMemHandle(own)
        handles = everyone(group, handle)
        with attempt(group, "CUDA IPC, to open the other ranks' memory"):
            for rank in _node_of(group, node_size):
                if rank != group.rank():
                    opened[rank] = runtime.ipcOpenMemHandle(handles[rank])
    except (ContractError, RankError):  # on every rank
        for address in opened.values():
            runtime.ipcCloseMemHandle(address)
        everyone(group, None)  # what others have open must not be freed
        if own:
            runtime.free(own)
        raise
    opened[group.rank()] = own
    return [opened.get(rank, 0) for rank in range(group.size())]


def _node_of(group: dist.ProcessGroup, node_size: int) -> range:
    """The ranks of this rank's node."""
    first = group.rank() // node_size * node_size
    return range(first, first + node_size)


def _zero(address: int, num_bytes: int) -> None:
    from cupy.cuda import runtime

    runtime.memset(address, 0, num_bytes)
    runtime.deviceSynchronize()
