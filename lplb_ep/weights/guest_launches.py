"""The launches of the kernels that move guests, and their tables of addresses."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..gpu.abi import Signature
from ..gpu.device import captures_go_on
from ..gpu.launch import Launch
from ..planning.kernels import CHUNK, NUM_COPY_THREADS, NUM_STAGES, weights_kernel
from . import structs
from .guest_transport import GuestLayout
from .structs import Sum

_NO_TIMING = 2  # of an event, of CUDA's `driver_types.h`


class PeerAddresses(NamedTuple):
    """Addresses here of each rank's memory, 0 on other nodes; all of it zeroed at first."""

    memory: Sequence[int]
    """[R] of the pools."""
    arrived: Sequence[int]
    """[R] of words [R]."""
    present: Sequence[int]
    """[R] of words [2, R]."""

    @staticmethod
    def sizes(num_ranks: int, num_bytes: int) -> tuple[int, int, int]:
        """Bytes of a rank's, for each kind."""
        return num_bytes, 8 * num_ranks, 16 * num_ranks


class Traveller(NamedTuple):
    """A parameter that travels, or its gradient."""

    offset: int
    """Where guest slots have it in the pool, in bytes."""
    num_bytes: int
    """Of one home."""
    homes: Sequence[Tensor | None]
    """Of this rank's resident slots, each in one piece: a list, or rows of one tensor. Or what lies
    in its guest slots soon, None: zeros."""
    sum: Sum = Sum.FLOATS
    """How it is added."""

    @property
    def key(self) -> tuple[object, ...]:
        """What a table has of it."""
        homes = self.homes
        if isinstance(homes, Tensor):
            return self.offset, self.num_bytes, self.sum, homes.data_ptr(), homes.stride(0)
        return self.offset, self.num_bytes, self.sum, *map(_address, homes)


def _address(home: Tensor | None) -> int:
    return 0 if home is None else home.data_ptr()


class Table(NamedTuple):
    """Where the parameters of a layer, or their gradients, lie on this rank."""

    memory: Tensor
    """On the GPU."""
    source: Tensor
    """Pinned; a graph copies it at each replay."""
    address: int
    """Of the memory."""
    num_parameters: int
    num_chunks: int


NO_TABLE = Table(torch.empty(0), torch.empty(0), 0, 0, 0)
"""Of meetings, where nothing travels."""


class Batch(NamedTuple):
    """What the launches of a batch have in common."""

    guests: int
    """Address of the table of guests, on the device."""
    status: int
    """Address of the plan's status, or 0."""
    number: int
    """Address of the batch's number, or 0."""


class Mark:
    """A place in a stream that other streams wait for; streams are given by their addresses.

    Args:
        runtime: `cupy.cuda.runtime`.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime, self._event = runtime, runtime.eventCreateWithFlags(_NO_TIMING)
        # Not when the process ends: the driver may be gone before.
        weakref.finalize(self, runtime.eventDestroy, self._event).atexit = False

    def set(self, stream: int) -> None:
        """Marks the end of what the stream has."""
        self._runtime.eventRecord(self._event, stream)

    def wait(self, stream: int) -> None:
        """Has the stream wait until what was marked last is done."""
        self._runtime.streamWaitEvent(stream, self._event, 0)


class Call:
    """A launch whose struct `Travel` changes in part."""

    def __init__(self, launch: Launch) -> None:
        span = structs.PUSH_GUESTS.span
        self._launch, self._last = launch, (Batch(-1, -1, -1), -1, False, False, -1)
        self._write_batch = launch.writer(*span(*(f"travel.{f}" for f in _OF_BATCH)))
        self._parameters = launch.word(*span("travel.parameters"))
        self._write_sizes = launch.writer(*span(*(f"travel.{f}" for f in _SIZES)))
        self._num_blocks = 1

    def __call__(
        self,
        stream: int,
        batch: Batch,
        use: int,
        table: Table,
        *,
        has_met: bool = False,
        refuses: bool = False,
        num_blocks: int = 1,
    ) -> None:
        """Launches on a stream of the current device, given by its address.

        Args:
            stream: where.
            batch: the batch.
            use: uses of its number that came before.
            table: of the parameters that travel.
            has_met: whether ranks met instead of exchanging rows.
            refuses: whether this rank meets to refuse the batch.
            num_blocks: of the launch.
        """
        given = (batch, use, has_met, refuses, table.address)
        if given != self._last:
            self._write_batch(*batch)
            self._write_sizes(use, has_met, refuses, table.num_parameters, table.num_chunks)
            self._launch.point(self._parameters, table.address)
            self._last = given
        if num_blocks != self._num_blocks:
            self._launch.resize(num_blocks)
            self._num_blocks = num_blocks
        self._launch(stream)


_OF_BATCH = ("guests", "status", "batch")
_SIZES = ("use", "has_met", "refuses", "num_parameters", "num_chunks")


@dataclass(frozen=True)
class LayerCalls:
    """The launches for the guests of a layer."""

    homes: Tensor
    """[E] slots, on the GPU."""
    push: Call
    wait: Call
    meet: Call
    lay: Call
    add: Call


class GuestLaunches:
    """Makes launches and tables for the guests of a group of ranks.

    Args:
        rank: this rank.
        device: its GPU, which is current.
        addresses: of the ranks' memory.
        node_size: ranks of a node.
        missing: address of [R] words of 4 bytes in the host's memory.
        limit_ns: how long ranks wait for one another.
        chunk: bytes that one bulk copy takes.
        num_stages: chunks in a block's shared memory.

    Raises:
        MissingPackageError, CompileError: as `gpu.launch.load`.
    """

    def __init__(
        self,
        rank: int,
        device: torch.device,
        addresses: PeerAddresses,
        node_size: int,
        missing: int,
        limit_ns: int,
        chunk: int = CHUNK,
        num_stages: int = NUM_STAGES,
    ) -> None:
        self._rank, self._device, self._num_ranks = rank, device, len(addresses.memory)
        self._node_size, self._missing, self._limit_ns = node_size, missing, limit_ns
        self._chunk, self._num_shared_bytes = chunk, chunk * num_stages
        self._kernel = functools.partial(weights_kernel, device.index, chunk, num_stages)
        words = [address for kind in addresses for address in kind]
        self._addresses = torch.tensor(words, dtype=torch.int64).to(device)
        # `num_used`, `met`, `num_done` and `refused` in a word each, then `last`.
        self._state = torch.zeros(4 + self._num_ranks, dtype=torch.int64, device=device)
        self.runtime: Any = self._kernel(structs.MEET).runtime

    def of_layer(self, layout: GuestLayout) -> LayerCalls:
        """The launches for a layer.

        Raises:
            ValueError: the kernels do not take it; says why.
        """
        if self._node_size * layout.num_guests > structs.MAX_GUESTS:
            raise ValueError(
                f"{self._node_size} ranks of a node with {layout.num_guests} guest slots each are "
                f"more than the {structs.MAX_GUESTS} slots that the kernels take"
            )
        if not layout.names or min(layout.slot_bytes) <= 0:
            raise ValueError("experts with guests have parameters, and none of them is empty")
        slots = layout.num_residents + layout.num_guests
        pairs = zip(layout.home_rank, layout.home_slot, strict=True)
        homes = torch.tensor([rank * slots + slot for rank, slot in pairs], dtype=torch.int32)
        homes = homes.to(self._device)
        made = (
            Call(self._prepare(one, homes.data_ptr(), layout.num_guests, slots))
            for one in (
                structs.PUSH_GUESTS,
                structs.AWAIT_GUESTS,
                structs.MEET,
                structs.LAY_GRADIENTS,
                structs.ADD_GRADIENTS,
            )
        )
        return LayerCalls(homes, *made)

    def make_table(self, travellers: Sequence[Traveller], rows: Sequence[Sequence[int]]) -> Table:
        """The table of what travels, copied to the GPU on the current stream.

        Args:
            travellers: the parameters.
            rows: by parameter, the addresses of its homes.
        """
        number, size = len(travellers), structs.PARAMETER.size
        num_bytes = number * size + 8 * sum(len(of_slots) for of_slots in rows)
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        packed, end, num_chunks = b"", memory.data_ptr() + number * size, 0
        for one, of_slots in zip(travellers, rows, strict=True):
            packed += structs.PARAMETER.pack(
                homes=end,
                offset=one.offset,
                bytes=one.num_bytes,
                first_chunk=num_chunks,
                sum=one.sum,
            )
            end += 8 * len(of_slots)
            num_chunks += -(-one.num_bytes // self._chunk)
        packed += b"".join(np.array(of_slots, np.uint64).tobytes() for of_slots in rows)
        with captures_go_on():  # memory of the host may be allocated
            source = torch.frombuffer(bytearray(packed), dtype=torch.uint8).pin_memory()
        memory.copy_(source, non_blocking=True)
        return Table(memory, source, memory.data_ptr(), number, num_chunks)

    def _prepare(self, signature: Signature, homes: int, num_guests: int, num_slots: int) -> Launch:
        state, words, R = self._state.data_ptr(), self._addresses.data_ptr(), self._num_ranks
        travel = structs.TRAVEL.pack(
            guests=0,
            status=0,
            batch=0,
            num_used=state,
            met=state + 8,
            homes=homes,
            parameters=0,
            memory=words,
            arrived=words + 8 * R,
            present=words + 16 * R,
            last=state + 32,
            num_done=state + 16,
            refused=state + 24,
            missing=self._missing,
            limit_ns=self._limit_ns,
            use=0,
            has_met=0,
            refuses=0,
            num_parameters=0,
            num_chunks=0,
            num_guests=num_guests,
            num_local_slots=num_slots,
            num_ranks=R,
            first_rank=self._rank // self._node_size * self._node_size,
            node_size=self._node_size,
            rank=self._rank,
        )
        copies = signature not in (structs.AWAIT_GUESTS, structs.MEET)
        return self._kernel(signature).prepare(
            [travel], NUM_COPY_THREADS, self._num_shared_bytes if copies else 0
        )


def rows_of(traveller: Traveller, number: int) -> Sequence[int]:
    """Addresses of the homes, each of which lies in one piece.

    Args:
        traveller: the parameter.
        number: how many there must be.

    Raises:
        ValueError: there are others.
    """
    homes, num_bytes = traveller.homes, traveller.num_bytes
    rows: Sequence[int]
    if isinstance(homes, Tensor):
        step = homes.stride(0) * homes.element_size()
        rows = range(homes.data_ptr(), homes.data_ptr() + number * step, step)
        shown, whole = homes[:1], len(homes) == number
    else:
        rows = [*map(_address, homes)]
        shown, whole = [home for home in homes if home is not None], len(homes) == number
    if not whole or any(
        not home.is_contiguous() or home.numel() * home.element_size() != num_bytes
        for home in shown
    ):
        raise ValueError(
            f"{number} resident slots with {num_bytes} bytes each, in one piece, are needed; got "
            f"{[list(home.shape) for home in shown]}"
        )
    return rows


def memory_at(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """The memory [num_bytes] uint8 of a GPU at an address; it must outlive the tensor."""
    interface = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}
    found = type("_Memory", (), {"__cuda_array_interface__": interface})()
    return torch.as_tensor(found, device=device)
