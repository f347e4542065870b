"""Memory that every rank of a node writes directly, on the GPUs: NVSHMEM's symmetric heap, or an
allocation of our own that CUDA IPC opens on the other ranks; and NVSHMEM's transport between nodes.

It knows nothing of what is written there; torch's group is used to set it up only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ..errors import ContractError, MissingPackageError, RankError
from ..settings import has_part_of_gpu, save_for_nvshmem
from .collectives import everyone, together
from .exchange import Reach, Relay, Windows

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
        self._node_size = reach(group).num_ranks_per_node or group.size()
        across = self._node_size < group.size()
        if kind == "nvshmem":
            _join_nvshmem(group)
        direct = _allocate_nvshmem if kind == "nvshmem" and not across else _allocate_ipc
        self._windows = _Chunks(functools.partial(direct, node_size=self._node_size))
        self._relayed = _Chunks(functools.partial(_allocate_nvshmem, node_size=1))

    def window(self, num_bytes: int) -> list[int]:
        """Collective: every rank asks for the same sizes in the same order.

        Returns:
            [R] of every rank's window the address here, 0 on another node. They are zeroed, and
            live as long as the process: a peer may be about to write.
        """
        return self._windows.cut(self._alive(), num_bytes)

    def windows(self, row_size: int) -> Windows:
        """Windows for rows of `row_size` integers, and what takes them between nodes. Collective,
        as `window`."""
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


class _Chunks:
    """Pieces of a few large allocations."""

    def __init__(self, allocate: Callable[[dist.ProcessGroup, int], list[int]]) -> None:
        self._allocate, self._chunk, self._left = allocate, [0], 0

    def cut(self, group: dist.ProcessGroup, num_bytes: int) -> list[int]:
        """Collective. [R] addresses here of every rank's piece, 0 where it is out of reach."""
        num_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if num_bytes > self._left:
            size = -(-num_bytes // _CHUNK_BYTES) * _CHUNK_BYTES
            self._chunk = self._allocate(group, size)
            self._left = size
        piece = list(self._chunk)
        self._chunk = [address and address + num_bytes for address in self._chunk]
        self._left -= num_bytes
        return piece


def peer_memory(group: dist.ProcessGroup, kind: str) -> PeerMemory:
    """The group's memory of that kind. Collective where there is none yet."""
    of_group = _memories.setdefault(group, {})
    if kind not in of_group:
        of_group[kind] = PeerMemory(group, kind)
    return of_group[kind]


_memories: WeakKeyDictionary[dist.ProcessGroup, dict[str, PeerMemory]] = WeakKeyDictionary()


def reach(group: dist.ProcessGroup | None) -> Reach:
    """Which memory all ranks reach; without a group, what this process says for itself. Collective
    for the first time, and the same on every rank."""
    if group is None:
        return replace(_find_reach([_Fact.of_this_rank()]), num_ranks_per_node=0)
    if group not in _reaches:
        with together(group, "counts"):
            fact = _Fact.of_this_rank()
        _reaches[group] = _find_reach(everyone(group, fact))
    return _reaches[group]


_reaches: WeakKeyDictionary[dist.ProcessGroup, Reach] = WeakKeyDictionary()


def rule_out(group: dist.ProcessGroup, kind: str, obstacle: str) -> None:
    """Remembers of memory "nvshmem" or "ipc" that it could not be had, on every rank alike."""
    known = reach(group)
    _reaches[group] = (
        replace(known, nvshmem=obstacle) if kind == "nvshmem" else replace(known, ipc=obstacle)
    )


@dataclass(frozen=True)
class _Fact:
    """What a rank tells the others of itself."""

    node: str
    device: str
    nvshmem: str
    """Why it has no NVSHMEM; empty: it has."""
    world: tuple[int, int] | None
    """How many PEs NVSHMEM runs with, and which this is; None: it does not run."""
    has_part_of_gpu: bool

    @staticmethod
    def of_this_rank() -> _Fact:
        device = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return _Fact(_node(), device, *_nvshmem_state(), has_part_of_gpu())


def _node() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a host
    return boot.read_text().strip() if boot.exists() else os.uname().nodename


def _find_reach(facts: list[_Fact]) -> Reach:
    num_ranks, nodes = len(facts), [fact.node for fact in facts]
    num_nodes = len(set(nodes))
    size = num_ranks // num_nodes
    first = nodes[::size] if num_ranks % num_nodes == 0 else []
    even = nodes == [node for node in first for _ in range(size)]
    apart = f"the ranks are on {num_nodes} nodes" if num_nodes > 1 else ""
    lacking = [rank for rank, fact in enumerate(facts) if fact.nvshmem]
    nvshmem = ""
    if lacking:
        nvshmem = f"rank {lacking[0]}: {facts[lacking[0]].nvshmem}"
    elif not even:
        nvshmem = f"{apart}, and a node's are not consecutive, or more than another's"
    elif len({fact.device for fact in facts}) < num_ranks and not all(
        fact.has_part_of_gpu for fact in facts
    ):
        # NVSHMEM would end the process.
        nvshmem = "ranks share a GPU, without MPS and CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    else:
        nvshmem = _world_obstacle([fact.world for fact in facts], num_nodes)
    return Reach(nvshmem, apart, size if even else 0)


def _world_obstacle(worlds: list[tuple[int, int] | None], num_nodes: int) -> str:
    """Why the worlds that NVSHMEM runs in cannot be used; empty: they can, or none runs yet."""
    num_ranks = len(worlds)
    usable: list[list[tuple[int, int] | None]] = [
        [None] * num_ranks,
        [(num_ranks, rank) for rank in range(num_ranks)],
        [(num_nodes, rank * num_nodes // num_ranks) for rank in range(num_ranks)],
    ]
    if worlds in usable[: 2 + (num_nodes > 1)]:
        return ""
    without = [rank for rank, world in enumerate(worlds) if world is None]
    if without:
        return f"NVSHMEM runs already on some ranks only: not on {without}"
    rank = next(r for r, world in enumerate(worlds) if world != (num_ranks, r))
    size, pe = worlds[rank] or (0, 0)
    return (
        f"NVSHMEM runs already with {size} PEs, of which rank {rank} of {num_ranks} is {pe}: "
        "neither one for each rank nor, across nodes, one for each node"
    )


def _nvshmem_state() -> tuple[str, tuple[int, int] | None]:
    """Why there is no NVSHMEM here, or else the world that it runs in."""
    if importlib.util.find_spec("nvshmem") is None:
        return "nvshmem4py is not installed: pip install nvshmem4py-cu13", None
    try:
        from nvshmem import bindings, core

        core.get_unique_id(empty=True)  # loads the library
        return "", (bindings.n_pes(), bindings.my_pe()) if _nvshmem_runs() else None
    except Exception as error:  # noqa: BLE001  (whatever it is, the others must not wait)
        return f"nvshmem4py does not load: {error}", None


def _nvshmem_runs() -> bool:
    from nvshmem import bindings

    status = bindings.Init_status
    running = (status.STATUS_IS_INITIALIZED, status.STATUS_LIMITED_MPG, status.STATUS_FULL_MPG)
    return bindings.init_status() in running


_started: list[bool] = []


def has_started_nvshmem() -> bool:
    """Whether NVSHMEM runs in this process because counts travel by it, with options for that."""
    return bool(_started)


def _join_nvshmem(group: dist.ProcessGroup) -> None:
    """Starts NVSHMEM with the ranks of the group as its PEs, or joins the world that runs, which
    does not end then when those who started it are done with it: NVSHMEM counts its users."""
    node_size = reach(group).num_ranks_per_node or group.size()
    states = everyone(group, _nvshmem_state())  # as it is now
    reasons = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(states) if reason]
    if reasons:
        raise MissingPackageError(reasons[0])
    obstacle = _world_obstacle([world for _, world in states], group.size() // node_size)
    if obstacle:
        raise ContractError(obstacle)
    runs = states[group.rank()][1]
    if runs is None and node_size == group.size():
        save_for_nvshmem()
    unique = b""
    with _attempt(group, "NVSHMEM's id"):
        from nvshmem import core

        if group.rank() == 0:
            unique = core.get_unique_id()._data.tobytes()
    unique = everyone(group, unique)[0]
    with _attempt(group, "NVSHMEM's start"):
        import numpy as np
        from cuda.core import Device
        from nvshmem import core

        uid = core.get_unique_id(empty=True)
        bits = uid._data.view(np.uint8)
        bits[...] = np.frombuffer(unique, np.uint8).reshape(bits.shape)
        device = Device(torch.cuda.current_device())
        device.set_current()
        num_pes, pe = runs or (group.size(), group.rank())
        core.init(device=device, uid=uid, rank=pe, nranks=num_pes, initializer_method="uid")
        if runs is None:
            _started.append(True)


@contextlib.contextmanager
def _attempt(group: dist.ProcessGroup, what: str) -> Iterator[dict[str, object]]:
    """As `together`, but whatever fails in the block is a ContractError on its own rank."""
    with together(group, what) as facts:
        try:
            yield facts
        except Exception as error:
            raise ContractError(f"{what}: {type(error).__name__}: {error}") from error


def _allocate_nvshmem(group: dist.ProcessGroup, num_bytes: int, node_size: int) -> list[int]:
    reached: dict[int, int] = {}
    with _attempt(group, "NVSHMEM's memory"):
        from nvshmem import bindings

        address = bindings.malloc(num_bytes)
        if not address:
            raise MemoryError(f"its heap has no {num_bytes} bytes: set NVSHMEM_SYMMETRIC_SIZE")
        for rank in _node_of(group, node_size):
            reached[rank] = address if rank == group.rank() else bindings.ptr(address, rank)
        if not all(reached.values()):
            raise MemoryError("a PE of the node cannot be reached by loads and stores")
        _zero(address, num_bytes)
    return [reached.get(rank, 0) for rank in range(group.size())]


def _allocate_ipc(group: dist.ProcessGroup, num_bytes: int, node_size: int) -> list[int]:
    own, handle = 0, b""
    opened: dict[int, int] = {}
    try:
        with _attempt(group, "CUDA IPC, to share memory") as facts:
            from cupy.cuda import runtime

            facts["bytes"] = num_bytes
            own = runtime.malloc(num_bytes)
            _zero(own, num_bytes)
            handle = runtime.ipcGetMemHandle(own)
        handles = everyone(group, handle)
        with _attempt(group, "CUDA IPC, to open the other ranks' memory"):
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
