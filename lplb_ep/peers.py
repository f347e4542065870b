"""Memory that every rank of a group writes directly, on the GPUs: NVSHMEM's symmetric heap, or an
allocation of our own that CUDA IPC opens on the other ranks of a node.

It knows nothing of what is written there; torch's group is used to set it up only.
"""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .exchange import Reach, agree, everyone
from .settings import ContractError, MissingPackageError, has_part_of_gpu

_CHUNK_BYTES = 2 << 20  # what the driver allocates at least
_ALIGNMENT = 256


class PeerMemory:
    """Windows: memory of the same size on every rank, which every rank may write.

    Args:
        group: the ranks, each with a GPU that is current; held weakly.
        kind: "nvshmem" or "ipc".

    Raises:
        MissingPackageError: a rank lacks a package.
        ContractError: NVSHMEM runs already, with other ranks than the group's.
        RankError: some rank cannot reach another; names it and why.
    """

    def __init__(self, group: dist.ProcessGroup, kind: str) -> None:
        self._group = weakref.ref(group)
        self._allocate: Callable[[dist.ProcessGroup, int], list[int]]
        self._allocate = {"nvshmem": _allocate_nvshmem, "ipc": _allocate_ipc}[kind]
        if kind == "nvshmem":
            _join_nvshmem(group)
        self._chunk: list[int] = []
        self._left = 0

    def window(self, num_bytes: int) -> list[int]:
        """Collective: every rank asks for the same sizes in the same order.

        Returns:
            [R] of every rank's window the address here; they are zeroed. They live as long as the
            process: a peer may be about to write.
        """
        group = self._group()
        if group is None:
            raise ContractError("the group that this memory was made for is destroyed")
        num_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if num_bytes > self._left:
            self._left = -(-num_bytes // _CHUNK_BYTES) * _CHUNK_BYTES
            self._chunk = self._allocate(group, self._left)
        window = list(self._chunk)
        self._chunk = [address + num_bytes for address in self._chunk]
        self._left -= num_bytes
        return window


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
        return _find_reach([_Fact.of_this_rank(None)])
    if group not in _reaches:
        _reaches[group] = _find_reach(everyone(group, _Fact.of_this_rank(group)))
    return _reaches[group]


_reaches: WeakKeyDictionary[dist.ProcessGroup, Reach] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Fact:
    """What a rank tells the others of itself."""

    node: str
    device: str
    nvshmem: str
    """Why it has no NVSHMEM; empty: it has."""
    has_part_of_gpu: bool

    @staticmethod
    def of_this_rank(group: dist.ProcessGroup | None) -> _Fact:
        boot = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a host
        node = boot.read_text().strip() if boot.exists() else os.uname().nodename
        device = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return _Fact(node, device, _nvshmem_reason(group), has_part_of_gpu())


def _find_reach(facts: list[_Fact]) -> Reach:
    nodes = {fact.node for fact in facts}
    apart = f"the ranks are on {len(nodes)} nodes" if len(nodes) > 1 else ""
    lacking = [rank for rank, fact in enumerate(facts) if fact.nvshmem]
    nvshmem = apart
    if lacking:
        nvshmem = f"rank {lacking[0]}: {facts[lacking[0]].nvshmem}"
    elif len({fact.device for fact in facts}) < len(facts) and not all(
        fact.has_part_of_gpu for fact in facts
    ):
        # NVSHMEM would end the process.
        nvshmem = "ranks share a GPU, without MPS and CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    return Reach(nvshmem, apart)


def _nvshmem_reason(group: dist.ProcessGroup | None) -> str:
    if importlib.util.find_spec("nvshmem") is None:
        return "nvshmem4py is not installed: pip install nvshmem4py-cu13"
    try:
        return _world_reason(group)
    except (ImportError, OSError, RuntimeError) as error:
        return f"nvshmem4py does not load: {error}"


def _world_reason(group: dist.ProcessGroup | None) -> str:
    """Why the world that NVSHMEM runs in here cannot be used; empty: it can, or none runs yet."""
    from nvshmem import bindings, core

    core.get_unique_id(empty=True)  # loads the library
    if group is None or not _nvshmem_runs():
        return ""
    world, group_size = bindings.n_pes(), group.size()
    if (world, bindings.my_pe()) == (group_size, group.rank()):
        return ""
    return (
        f"NVSHMEM runs already with {world} PEs, of which this is {bindings.my_pe()}; this is rank "
        f"{group.rank()} of {group_size} (DeepEP's world across nodes has one PE for each node)"
    )


def _nvshmem_runs() -> bool:
    from nvshmem import bindings

    status = bindings.Init_status
    running = (status.STATUS_IS_INITIALIZED, status.STATUS_LIMITED_MPG, status.STATUS_FULL_MPG)
    return bindings.init_status() in running


def _join_nvshmem(group: dist.ProcessGroup) -> None:
    """Starts NVSHMEM with the ranks of the group as its PEs, or joins the world that runs."""
    refusal = None
    reason = _nvshmem_reason(group)
    if reason:
        refusal = MissingPackageError(reason)
    agree(group, "NVSHMEM", {"runs": "" if reason else str(_nvshmem_runs())}, refusal)
    if _nvshmem_runs():
        return
    import numpy as np
    from cuda.core import Device
    from nvshmem import core

    device = Device(torch.cuda.current_device())
    device.set_current()
    unique = core.get_unique_id(empty=group.rank() != 0)
    unique._data.view(np.uint8)[...] = np.frombuffer(
        everyone(group, unique._data.tobytes())[0], np.uint8
    ).reshape(unique._data.view(np.uint8).shape)
    core.init(
        device=device,
        uid=unique,
        rank=group.rank(),
        nranks=group.size(),
        initializer_method="uid",
    )


def _allocate_nvshmem(group: dist.ProcessGroup, num_bytes: int) -> list[int]:
    from nvshmem import bindings

    address = bindings.malloc(num_bytes)
    addresses = [address and bindings.ptr(address, pe) for pe in range(group.size())]
    refusal: Exception | None = None
    if not address:
        refusal = MemoryError(
            f"NVSHMEM's heap has no {num_bytes} bytes: set NVSHMEM_SYMMETRIC_SIZE"
        )
    elif not all(addresses):
        refusal = ContractError(f"PE {addresses.index(0)} cannot be reached by loads and stores")
    else:
        _zero(address, num_bytes)
    agree(group, "NVSHMEM memory", {"bytes": num_bytes}, refusal)
    return addresses


def _allocate_ipc(group: dist.ProcessGroup, num_bytes: int) -> list[int]:
    from cupy.cuda import runtime

    address, handle = 0, b""
    refusal: Exception | None = None
    try:
        address = runtime.malloc(num_bytes)
        _zero(address, num_bytes)
        handle = runtime.ipcGetMemHandle(address)
    except runtime.CUDARuntimeError as error:
        refusal = ContractError(f"CUDA IPC gives no memory away: {error}")
    agree(group, "CUDA IPC memory", {"bytes": num_bytes}, refusal)
    addresses = []
    for rank, theirs in enumerate(everyone(group, handle)):
        try:
            own = rank == group.rank()
            addresses.append(address if own else runtime.ipcOpenMemHandle(theirs))
        except runtime.CUDARuntimeError as error:
            refusal = ContractError(f"CUDA IPC does not reach rank {rank}'s memory: {error}")
            break
    agree(group, "CUDA IPC memory", {}, refusal)
    return addresses


def _zero(address: int, num_bytes: int) -> None:
    from cupy.cuda import runtime

    runtime.memset(address, 0, num_bytes)
    runtime.deviceSynchronize()
