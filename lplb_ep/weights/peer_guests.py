"""Guests' weights written by their homes into the memory of other GPUs, and gradients fetched back.

Kernels do it, by the table of guests on the device: the CPU neither knows the guests nor waits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..comm.watchdog import look, newly_missing, watch
from ..errors import RankError
from ..gpu.launch import on_device
from ..planning.kernels import CHUNK, NUM_STAGES
from .guest_launches import (
    NO_TABLE,
    Batch,
    GuestLaunches,
    LayerCalls,
    Mark,
    PeerAddresses,
    Table,
    Traveller,
    memory_at,
    rows_of,
)
from .guest_transport import BatchNumber, GuestLayout, refusal
from .structs import Missing, Sum

_ALIGNMENT = 256  # bytes, of blocks of gradients
_MAX_TABLES = 64  # of addresses; beyond it they are made anew
_LAY_BLOCKS = 128  # nothing else runs beside it, and a block takes an SM
_SUMS_FACTOR = 4  # how many more blocks than a push has a sum for which the current stream waits

_SUMS = {
    (torch.float32, torch.float32): Sum.FLOATS,
    (torch.bfloat16, torch.bfloat16): Sum.BFLOATS,
    (torch.float32, torch.bfloat16): Sum.BFLOATS_TO_FLOATS,
}
"""By the dtypes of a home's gradient and a guest's."""


class PeerGuests:
    """A `GuestTransport` by kernels that write and read the memory of other ranks of a node.

    Pushes run on a stream of their own. Behind each push a block waits there until this rank's
    guests have arrived. The slot of a late guest holds NaN, and the rank at fault is named.

    Args:
        rank: this rank.
        device: its GPU.
        addresses: of the ranks' memory.
        num_bytes: of a pool's weights.
        num_memory_bytes: of a pool's memory, in which gradients take the place of the weights.
        node_size: ranks of a node.
        num_blocks: of a push, and of a sum of gradients; each takes an SM's shared memory for half.
        timeout_s: how long ranks wait for one another, in seconds.
        abort_on_timeout: whether the process ends when a rank is missing after that time.
        chunk: bytes that one bulk copy takes.
        num_stages: chunks in a block's shared memory.

    Raises:
        MissingPackageError, CompileError: as `gpu.launch.load`.
    """

    num_blocks: int

    def __init__(
        self,
        rank: int,
        device: torch.device,
        addresses: PeerAddresses,
        num_bytes: int,
        num_memory_bytes: int,
        node_size: int,
        *,
        num_blocks: int = 16,
        timeout_s: float = 60,
        abort_on_timeout: bool = False,
        chunk: int = CHUNK,
        num_stages: int = NUM_STAGES,
    ) -> None:
        self._device, self._timeout_s, self.num_blocks = device, timeout_s, num_blocks
        self._memory = memory_at(addresses.memory[rank], num_memory_bytes, device)
        self._num_bytes = num_bytes
        self._missing = torch.zeros(len(addresses.memory), dtype=torch.int32).pin_memory()
        self.missing = self._missing.numpy()
        """[R] a `Missing` where a rank did not come in time, or refused a batch; else 0."""
        with torch.cuda.device(device):
            self._launches = GuestLaunches(
                rank,
                device,
                addresses,
                node_size,
                self._missing.data_ptr(),
                round(1e9 * timeout_s),
                chunk,
                num_stages,
            )
            self._begun, self._done = (Mark(self._launches.runtime) for _ in range(2))
            # Its few blocks go before those of the work beside it.
            self.stream = torch.cuda.Stream(device, priority=-1)
            torch.cuda.synchronize()
        self._side: int = self.stream.cuda_stream
        self._current_stream = torch._C._cuda_getCurrentRawStream  # makes no object of it
        self._layers: WeakKeyDictionary[GuestLayout, LayerCalls] = WeakKeyDictionary()
        self._tables: dict[tuple[object, ...], Table] = {}
        self._is_pending = self._is_captured = self._has_met = False
        self._keeps: tuple[object, ...] = ()
        self._gradients_lent: tuple[object, ...] = ()
        self._captured: list[object] = []  # what graphs use
        say = functools.partial(_missing_ranks, self.missing, timeout_s)
        watch(self, newly_missing(self.missing, say), abort=abort_on_timeout)

    @property
    def memory(self) -> Tensor:
        """As `GuestTransport.memory`."""
        return self._memory[: self._num_bytes]

    def raise_errors(self) -> None:
        """Raises what kernels found wrong with earlier batches; waits for nothing.

        Raises:
            RankError: a rank did not come in time; names it.
        """
        if self.missing.any():
            look(self)  # so that it is logged
            message = _missing_ranks(self.missing, self._timeout_s)
            self.missing[:] = 0
            raise RankError(message)

    def push(
        self,
        layout: GuestLayout,
        weights: Sequence[Sequence[Tensor]],
        guests: Tensor,
        status: Tensor | None = None,
        number: BatchNumber | None = None,
    ) -> None:
        """As `GuestTransport.push`. The first of a layer is not captured.

        Args:
            layout: of the layer.
            weights: by parameter and local slot, of this rank's L resident slots.
            guests: [R, G] int32 on the GPU.
            status: [1] int32 on the GPU, of the plan. With it a rank whose plan alone has no guests
                has NaN in its slots, and not the weights of an earlier batch.
            number: of the batch. Without it, the tables with guests are counted. Then a rank that
                missed one is out of step, and all later batches fail.

        Raises:
            ValueError: the layout does not fit the pool or the kernels, or a weight is not in one
                piece.
        """
        calls = self._calls_for(layout)
        with on_device(self._device.index):
            table = self._weights(layout, weights)
            stream, batch = self._enter(), _batch(guests, status, number)
            use, met = 0 if number is None else number.use(), self._has_met
            calls.push(stream, batch, use, table, has_met=met, num_blocks=self.num_blocks)
            calls.wait(stream, batch, use, table, has_met=met)
            self._leave(guests, status, number, table, weights)
        self._has_met = False

    def wait(self) -> None:
        """As `GuestTransport.wait`."""
        if self._is_pending and self._is_captured == _is_capturing():
            self._done.wait(self._current_stream(self._device.index))

    def join(self) -> None:
        """As `GuestTransport.join`."""
        self.wait()

    def barrier(
        self,
        layout: GuestLayout,
        guests: Tensor,
        number: BatchNumber | None = None,
        refuses: bool = False,
    ) -> None:
        """As `GuestTransport.barrier`."""
        self.join()
        calls = self._calls_for(layout)
        with on_device(self._device.index):
            stream = self._current_stream(self._device.index)
            batch, use = _batch(guests, None, number), 0 if number is None else number.use()
            calls.meet(stream, batch, use, NO_TABLE, refuses=refuses)
        self._has_met = not refuses  # no push follows then

    def reduce(
        self,
        layout: GuestLayout,
        parts: Sequence[Sequence[Tensor | None] | None],
        totals: Sequence[Sequence[Tensor | None]],
        guests: Tensor,
        number: BatchNumber | None = None,
    ) -> None:
        """As `GuestTransport.reduce`: `begin_reduce` with more SMs, which idle, then `wait`."""
        blocks = _SUMS_FACTOR * self.num_blocks
        self.begin_reduce(layout, parts, totals, guests, number, num_blocks=blocks)
        self.wait()
        # Autograd copies a gradient that someone else has, too, even if only views of it.
        self._gradients_lent = ()

    @torch.no_grad()
    def begin_reduce(
        self,
        layout: GuestLayout,
        parts: Sequence[Sequence[Tensor | None] | None],
        totals: Sequence[Sequence[Tensor | None]],
        guests: Tensor,
        number: BatchNumber | None = None,
        num_blocks: int = 0,
    ) -> None:
        """Begins to add gradients of guests to those of their homes, beside the current stream.

        Homes fetch the gradients out of the pools, where they take the place of weights. Where the
        ranks do not meet in time, gradients of experts with guests become NaN. Parts and totals
        stay as they are until `wait`.

        Args:
            layout: of the layer.
            parts: by parameter, of this rank's G guest slots; None for a parameter without, and for
                a slot whose gradient is zero. Float32 or bfloat16.
            totals: by parameter and resident slot, of the same dtype or float32.
            guests: [R, G] int32 on the GPU.
            number: of the batch, as in the push.
            num_blocks: of the sum; 0: those of a push.

        Raises:
            TypeError: gradients are of other dtypes.
            ValueError: they do not fit the pool, or one is not in one piece.
        """
        calls = self._calls_for(layout)
        dtypes = [
            None if part is None else next((t.dtype for t in part if t is not None), dtype)
            for part, dtype in zip(parts, layout.dtypes, strict=True)
        ]
        blocks = self.gradient_blocks(layout, dtypes)
        travellers = self._gradients(layout, blocks, totals)
        if not travellers:
            return
        lying = self._parts(blocks, parts)
        with on_device(self._device.index):
            table = self._table_of(travellers, layout.num_residents)
            own = self._table_of(lying, layout.num_guests)
            stream, batch = self._enter(), _batch(guests, None, number)

            def meet() -> None:
                calls.meet(stream, batch, 0 if number is None else number.use(), NO_TABLE)

            if lying:
                calls.lay(stream, batch, 0, own, num_blocks=_LAY_BLOCKS)
            meet()
            blocks_of_sum = num_blocks or self.num_blocks
            calls.add(stream, batch, 0, table, has_met=True, num_blocks=blocks_of_sum)
            # Others have read this pool before anything overwrites it. The next table may be empty.
            meet()
            self._leave(guests, number, table, own)
        self._gradients_lent = lying, totals
        self._has_met = False

    def gradient_blocks(
        self, layout: GuestLayout, dtypes: Sequence[torch.dtype | None]
    ) -> list[list[Tensor] | None]:
        """Where `reduce` takes gradients from, in the pool's memory.

        Gradients that lie there already are not copied. They overwrite the pool's weights.

        Args:
            layout: of the layer.
            dtypes: of the gradients, by parameter; None for a parameter without.

        Returns:
            G tensors for each parameter.

        Raises:
            ValueError: they do not fit the pool.
        """
        blocks: list[list[Tensor] | None] = []
        end = 0
        for shape, dtype in zip(layout.shapes, dtypes, strict=True):
            if dtype is None:
                blocks.append(None)
                continue
            size = layout.num_guests * shape.numel() * dtype.itemsize
            if end + size > self._memory.numel():
                raise ValueError(
                    f"gradients of guests take more than the {self._memory.numel()} bytes of the "
                    "pool, which holds twice its weights: keep gradients in float32 or narrower"
                )
            blocks.append([*self._memory[end : end + size].view(dtype).view(-1, *shape)])
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return blocks

    def _gradients(
        self,
        layout: GuestLayout,
        blocks: Sequence[Sequence[Tensor] | None],
        totals: Sequence[Sequence[Tensor | None]],
    ) -> list[Traveller]:
        travellers = []
        for name, block, of_slots in zip(layout.names, blocks, totals, strict=True):
            if block is None:
                continue
            homes: Sequence[Tensor] = (
                of_slots
                if isinstance(of_slots, Tensor)
                else [total for total in of_slots if total is not None]
            )
            dtypes = {(total.dtype, block[0].dtype) for total in homes}
            kinds = {_SUMS.get(pair) for pair in dtypes}
            if len(kinds) != 1 or (kind := kinds.pop()) is None:
                raise TypeError(
                    f"gradients of {name} are of (home, guest) {sorted(map(str, dtypes))}; float32 "
                    "and bfloat16 can be added, at home not the narrower"
                )
            offset = block[0].data_ptr() - self._memory.data_ptr()
            num_bytes = block[0].numel() * homes[0].element_size()
            travellers.append(Traveller(offset, num_bytes, homes, kind))
        return travellers

    def _parts(
        self,
        blocks: Sequence[Sequence[Tensor] | None],
        parts: Sequence[Sequence[Tensor | None] | None],
    ) -> list[Traveller]:
        """What has to be brought to the blocks; None, which is zeros, too."""
        lying = []
        for block, part in zip(blocks, parts, strict=True):
            if block is None or part is None:
                continue
            places = [None if t is None else t.to(block[0].dtype).contiguous() for t in part]
            pairs = zip(places, block, strict=True)
            if any(place is None or place.data_ptr() != own.data_ptr() for place, own in pairs):
                offset = block[0].data_ptr() - self._memory.data_ptr()
                lying.append(Traveller(offset, block[0].nbytes, places))
        return lying

    def _weights(self, layout: GuestLayout, weights: Sequence[Sequence[Tensor]]) -> Table:
        """The device's table of a layer's weights."""
        key: list[object] = [layout]
        for of_slots in weights:
            if isinstance(of_slots, Tensor):
                key += (of_slots.data_ptr(), of_slots.stride(0))
            else:
                key += [weight.data_ptr() for weight in of_slots]

        def travellers() -> list[Traveller]:
            of_layer = zip(layout.offsets, layout.slot_bytes, weights, strict=True)
            return [Traveller(*one) for one in of_layer]

        return self._table(tuple(key), travellers, layout.num_residents)

    def _table_of(self, travellers: Sequence[Traveller], num_rows: int) -> Table:
        key = tuple([one.key for one in travellers])
        return self._table(key, lambda: travellers, num_rows) if travellers else NO_TABLE

    def _table(
        self, key: tuple[object, ...], make: Callable[[], Sequence[Traveller]], num_rows: int
    ) -> Table:
        """The device's table, as it was made for the same addresses before."""
        table = self._tables.get(key)
        if table is None:
            travellers = make()
            rows = [rows_of(one, num_rows) for one in travellers]
            table = self._launches.make_table(travellers, rows)
            if not _is_capturing():  # a graph's own is there at its replays only
                if len(self._tables) >= _MAX_TABLES:
                    for other in self._tables.values():
                        other.memory.record_stream(self.stream)
                    self._tables.clear()
                self._tables[key] = table
        return table

    def _calls_for(self, layout: GuestLayout) -> LayerCalls:
        found = self._layers.get(layout)
        if found is None:
            if layout.num_bytes > self._num_bytes:
                raise ValueError(
                    f"guests of this layer take {layout.num_bytes} bytes, and the pool has "
                    f"{self._num_bytes}"
                )
            with torch.cuda.device(self._device):
                found = self._layers[layout] = self._launches.of_layer(layout)
        return found

    def _enter(self) -> int:
        """The side stream's address, behind what the current stream has."""
        self._begun.set(self._current_stream(self._device.index))
        self._begun.wait(self._side)
        return self._side

    def _leave(self, *keeps: object) -> None:
        """Marks the end of what the side stream has, and keeps alive what it uses."""
        self._done.set(self._side)
        self._is_pending, self._is_captured = True, _is_capturing()
        self._keeps = keeps
        if self._is_captured:
            self._captured.append(keeps)


def _batch(guests: Tensor, status: Tensor | None, number: BatchNumber | None) -> Batch:
    return Batch(
        guests.data_ptr(),
        0 if status is None else status.data_ptr(),
        0 if number is None else number.tensor.data_ptr(),
    )


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _missing_ranks(missing: npt.NDArray[np.int32], timeout_s: float) -> str:
    late, refuse = (np.flatnonzero(missing == why).tolist() for why in Missing)
    if refuse and not late:
        return f"{refusal(refuse)}. Guests of that batch, and their gradients, are NaN"
    return (
        f"ranks {late} did not come to a push of guests or a sum of their gradients within "
        f"{timeout_s:g} s: ended, hung or slow. What should have come from them is NaN"
    )
