"""Weights and gradients moved from slots to slots: packed by rank and dtype, sent, unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..comm.alltoall import Table, Transport
from .slots import Slot

What = Literal["weight", "gradient"]


class Movable(Protocol):
    """One parameter of a slot, and its gradient. Moves of a payload are between such."""

    @property
    def weight(self) -> Tensor:
        """The slot's weight."""

    @property
    def gradient(self) -> Tensor | None:
        """The slot's gradient, of the weight's shape."""


class Move(NamedTuple):
    """One parameter's weight or gradient, from one slot to another that holds the same expert."""

    source: int
    """Slot among all ranks'."""
    target: int
    """Slot among all ranks'."""
    slots: Sequence[Movable]
    """This rank's slots of that parameter."""
    dtype: torch.dtype
    """Of the tensor that is moved."""


class Message(NamedTuple):
    """One all-to-all, as bytes."""

    received: Tensor
    sent: Tensor
    table: Table
    indices: list[int]
    """The moves that arrive, in order."""


class Payload(NamedTuple):
    """Moves, and the tensors that they need."""

    moves: Sequence[Move]
    local: dict[int, Tensor]
    """By the index of a move: the tensor that is on this rank already."""
    messages: list[Message]


class Transfer:
    """A copy of weights or a reduction of gradients that is pending on a stream of its own."""

    def __init__(self, mover: Mover, done: torch.cuda.Event | None) -> None:
        self._mover, self._done = mover, done

    def wait(self) -> None:
        """Has the current stream wait for it. The CPU does not wait."""
        if self._done is not None:
            torch.cuda.current_stream(self._mover.device).wait_event(self._done)
        if self._mover.pending is self:
            self._mover.pending = None


class Mover:
    """Moves weights and gradients between the slots of a layer.

    Args:
        transport: sends bytes between ranks.
        rank: this rank.
        num_ranks: R.
        num_local_slots: P / R.
    """

    pending: Transfer | None
    """The transfer that nobody has waited for yet."""
    num_bytes_sent: int
    """Bytes of weights and gradients from this rank to others so far."""

    def __init__(
        self, transport: Transport, rank: int, num_ranks: int, num_local_slots: int
    ) -> None:
        self._transport, self._rank = transport, rank
        self._num_ranks, self._num_local_slots = num_ranks, num_local_slots
        self.pending = None
        self.num_bytes_sent = 0

    @property
    def device(self) -> torch.device:
        """Where bytes lie that are sent or received."""
        return self._transport.device

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream of asynchronous transfers; None where they are done when they return."""
        return self._transport.stream

    def rank_of(self, slot: int) -> int:
        """The rank that has a slot."""
        return slot // self._num_local_slots

    def is_here(self, slot: int) -> bool:
        """Whether this rank has a slot."""
        return self.rank_of(slot) == self._rank

    def local(self, slot: int) -> int:
        """The number of a slot on its rank."""
        return slot % self._num_local_slots

    def finish(self) -> None:
        """Has the current stream wait for the pending transfer."""
        if self.pending is not None:
            self.pending.wait()

    @torch.no_grad()
    def run(
        self, work: Callable[[], None], touched: Callable[[], Iterable[Slot]], async_op: bool
    ) -> Transfer | None:
        """Does `work` on the current stream, or asynchronously on a side stream.

        Args:
            work: reads and writes weights and gradients.
            touched: the slots that it reads and writes.
            async_op: whether the side stream takes it, behind all that the current stream has.
        """
        if not async_op:
            work()
            return None
        side, done = self.stream, None
        if side is None:
            work()
        else:
            side.wait_stream(torch.cuda.current_stream(side.device))
            for slot in touched():
                for tensor in (slot.weight, slot.gradient):
                    if tensor is not None and tensor.is_cuda:
                        # The allocator reuses the memory of a dropped tensor after the side stream.
                        tensor.record_stream(side)
            with torch.cuda.stream(side):
                work()
                done = side.record_event()
        self.pending = Transfer(self, done)
        return self.pending

    def pack(self, what: What, moves: Sequence[Move]) -> Payload:
        """Packs what this rank sends, and makes buffers for what it receives. Local.

        Args:
            what: the kind of tensor.
            moves: those of all ranks, the same on every rank.
        """
        payload = Payload(moves, {}, [])
        remote: dict[torch.dtype, list[int]] = {}
        for index, move in enumerate(moves):
            if self.rank_of(move.source) != self.rank_of(move.target):
                remote.setdefault(move.dtype, []).append(index)
            elif self.is_here(move.target):
                payload.local[index] = getattr(move.slots[self.local(move.source)], what)
        for dtype in sorted(remote, key=str):
            payload.messages.append(self._message(what, moves, remote[dtype], dtype))
        return payload

    def _message(
        self, what: What, moves: Sequence[Move], indices: list[int], dtype: torch.dtype
    ) -> Message:
        """Packs moves of one dtype, for each rank in the order of the moves.

        They are sent as bytes, because back ends lack some dtypes: gloo bfloat16, all float8.
        """
        outgoing: list[list[Tensor]] = [[] for _ in range(self._num_ranks)]
        incoming: list[list[int]] = [[] for _ in range(self._num_ranks)]
        table = [[0] * self._num_ranks for _ in range(self._num_ranks)]
        for index in indices:
            source, target, slots, _ = moves[index]
            sender, receiver = self.rank_of(source), self.rank_of(target)
            table[sender][receiver] += slots[0].weight.numel() * dtype.itemsize
            if sender == self._rank:
                tensor = getattr(slots[self.local(source)], what).contiguous()
                outgoing[receiver].append(tensor.reshape(-1).view(torch.uint8))
            elif receiver == self._rank:
                incoming[sender].append(index)
        flat = [tensor for of_rank in outgoing for tensor in of_rank]
        size = sum(row[self._rank] for row in table)
        received = torch.empty(size, dtype=torch.uint8, device=self.device)
        sent = torch.cat(flat).to(received.device) if flat else received.new_empty(0)
        return Message(received, sent, table, [index for of_rank in incoming for index in of_rank])

    def send(self, payload: Payload) -> list[tuple[Movable, Tensor]]:
        """Sends and receives, with one all-to-all per dtype, on the current stream. Collective.

        Returns:
            Slot and tensor of each move to this rank, in order. A tensor from a slot of this rank
            is no copy: later writes to that slot show in it.
        """
        for received, sent, table, _ in payload.messages:
            self._transport.all_to_all(received, sent, table)
            self.num_bytes_sent += sent.numel()
        # Memory is asked for after the collectives: a rank that fails here leaves no other waiting.
        tensors = dict(payload.local)
        for received, _, _, indices in payload.messages:
            like = [payload.moves[index].slots[0].weight for index in indices]
            dtypes = [payload.moves[index].dtype for index in indices]
            lengths = [w.numel() * d.itemsize for w, d in zip(like, dtypes, strict=True)]
            for part, index, weight, dtype in zip(
                received.split(lengths), indices, like, dtypes, strict=True
            ):
                tensors[index] = part.view(dtype).view(weight.shape).to(weight.device)
        return [
            (payload.moves[index].slots[self.local(payload.moves[index].target)], tensors[index])
            for index in sorted(tensors)
        ]
