"""The transport of weights to guest slots, and of guests' gradients home.

A transport serves one pool and owns its memory, since other ranks write there. Which rank waits for
which follows from a batch's table of guests alone. So a table without guests exchanges nothing and
waits for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.alltoall import make_transport
from ..errors import RankError
from .transfers import Move, Mover

_ALIGNMENT = 256
"""Bytes. Blocks of parameters begin at multiples, as GEMMs and bulk copies like them."""


@dataclass(frozen=True, eq=False)
class GuestLayout:
    """Where a layer's guests lie in the memory of a pool, and where their homes are.

    It is the same on every rank. A transport may keep what it derives from it, by its identity.
    """

    names: tuple[str, ...]
    """Of the parameters."""
    shapes: tuple[torch.Size, ...]
    """Of each parameter of one slot."""
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]
    """Bytes, where the block [G, ...] of each parameter begins."""
    slot_bytes: tuple[int, ...]
    """Of each parameter of one slot; a block's slots lie one behind the other."""
    num_bytes: int
    """Of all blocks."""
    num_guests: int
    """G, the guest slots of a rank."""
    num_residents: int
    """L, the other slots of a rank."""
    home_rank: tuple[int, ...]
    """[E] the rank of each expert's home. Homes never move."""
    home_slot: tuple[int, ...]
    """[E] its local slot there, in [0, L)."""

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, tuple[torch.Size, torch.dtype]],
        num_guests: int,
        num_residents: int,
        homes: Sequence[tuple[int, int]],
    ) -> GuestLayout:
        """Lays parameters out, in the order that they are given.

        Args:
            parameters: shape and dtype of each, of one slot.
            num_guests: G.
            num_residents: L.
            homes: [E] rank and local slot of each expert's home.
        """
        offsets, sizes, end = [], [], 0
        for shape, dtype in parameters.values():
            size = shape.numel() * dtype.itemsize
            offsets.append(end)
            sizes.append(size)
            end += -(-num_guests * size // _ALIGNMENT) * _ALIGNMENT
        return cls(
            tuple(parameters),
            tuple(shape for shape, _ in parameters.values()),
            tuple(dtype for _, dtype in parameters.values()),
            tuple(offsets),
            tuple(sizes),
            end,
            num_guests,
            num_residents,
            tuple(rank for rank, _ in homes),
            tuple(slot for _, slot in homes),
        )

    def blocks(self, memory: Tensor) -> list[Tensor]:
        """The block [G, ...] of each parameter, in the memory [num_bytes] uint8 of a pool."""
        return [
            memory[offset : offset + self.num_guests * size].view(dtype).view(-1, *shape)
            if size
            else memory.new_empty((self.num_guests, *shape), dtype=dtype)
            for shape, dtype, offset, size in zip(
                self.shapes, self.dtypes, self.offsets, self.slot_bytes, strict=True
            )
        ]


class BatchNumber:
    """A number of a batch on the device, the same on all ranks and of no other batch.

    Args:
        tensor: 8 bytes, aligned; their bits 24 to 31 are 0. Replays of a graph may change it.
    """

    MOST_USES = 256  # with the same bits again; what stands where ranks wait is the last one's

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._num_uses = 0

    def use(self) -> int:
        """Counts a use. Ranks use a number for the same things, in the same order."""
        self._num_uses += 1
        return (self._num_uses - 1) % self.MOST_USES


class GuestTransport(Protocol):
    """Moves weights to guest slots and their gradients home. Its calls are made on all ranks.

    They come in the same order everywhere. Only where a table names no guest a rank may leave its
    calls out.
    """

    @property
    def memory(self) -> Tensor:
        """[num_bytes] uint8: this rank's pool, on the device of the weights."""

    def push(
        self,
        layout: GuestLayout,
        weights: Sequence[Sequence[Tensor]],
        guests: Tensor,
        status: Tensor | None = None,
        number: BatchNumber | None = None,
    ) -> None:
        """Begins to write home weights to guest slots, behind what the current stream has.

        All ranks' slots are free. The weights stay as they are until `join`.

        Args:
            layout: of the layer.
            weights: by parameter and local slot, of this rank's L resident slots.
            guests: [R, G] int32: the expert in each guest slot, -1 for none. On the device of the
                plan: the CPU must not wait for it where plans are made on a GPU.
            status: [] int32, of the plan. With it a rank that alone plans without guests has NaN in
                its slots, and not the weights of an earlier batch.
            number: of the batch, for transports that use it.
        """

    def wait(self) -> None:
        """Has the current stream wait until the last push has arrived here."""

    def reduce(
        self,
        layout: GuestLayout,
        parts: Sequence[Sequence[Tensor | None] | None],
        totals: Sequence[Sequence[Tensor | None]],
        guests: Tensor,
        number: BatchNumber | None = None,
    ) -> None:
        """Adds gradients of guests to those of their homes, in the order of ranks, then slots.

        The current stream waits for it.

        Args:
            layout: of the layer.
            parts: by parameter, of this rank's G guest slots; None for a parameter without, and for
                a slot whose gradient is zero.
            totals: by parameter and resident slot. Each sum is rounded to a total's dtype. None
                where nothing arrives.
            guests: [R, G] int32, as in the push.
            number: of the batch, as in the push.
        """

    def join(self) -> None:
        """Has the current stream wait until this rank's pushes and reductions are done."""

    def raise_errors(self) -> None:
        """Raises what was found wrong with earlier batches; waits for nothing.

        Raises:
            RankError: a rank did not come in time; names it.
        """

    def barrier(
        self,
        layout: GuestLayout,
        guests: Tensor,
        number: BatchNumber | None = None,
        refuses: bool = False,
    ) -> None:
        """Has the ranks' current streams wait for one another, before a push without a plan.

        Args:
            layout: of the layer.
            guests: [R, G] int32, as in the push. Where it names no guest nobody waits.
            number: of the batch, as in the push.
            refuses: that this rank will not push, nor take part in any more of the batch.

        Raises:
            RankError: another rank refuses. Where the CPU does not wait it is raised later, by
                `raise_errors`, and what the batch would bring is NaN.
        """


def refusal(ranks: Sequence[int]) -> str:
    """Says which ranks refuse a batch."""
    return f"ranks {[*ranks]} refused to push a batch's guests again; see their errors"


class _Row(NamedTuple):
    """One parameter of a slot, as a `Mover` takes it."""

    weight: Tensor
    gradient: Tensor | None = None


class CollectiveGuests:
    """A `GuestTransport` by all-to-alls, whose sizes the CPU reads from the table of guests.

    Args:
        group: the ranks; None for a single one.
        memory: [num_bytes] uint8, the pool, on the device of the weights.
    """

    def __init__(self, group: dist.ProcessGroup | None, memory: Tensor) -> None:
        self.memory = memory
        self._group = group
        self._rank = 0 if group is None else group.rank()
        self._num_ranks = 1 if group is None else group.size()
        self._transport = make_transport(group, memory.device, "torch")

    @torch.no_grad()
    def push(
        self,
        layout: GuestLayout,
        weights: Sequence[Sequence[Tensor]],
        guests: Tensor,
        status: Tensor | None = None,
        number: BatchNumber | None = None,
    ) -> None:
        """As `GuestTransport.push`; it is done on return."""
        moved = [
            [_Row(tensor) for tensor in (*of_slots, *block)]
            for of_slots, block in zip(weights, layout.blocks(self.memory), strict=True)
        ]
        moves = [
            Move(home, guest, rows, dtype)
            for guest, home in self._pairs(layout, guests)
            for rows, dtype in zip(moved, layout.dtypes, strict=True)
        ]
        mover = self._mover(layout)
        for row, weight in mover.send(mover.pack("weight", moves)):
            row.weight.copy_(weight)

    def wait(self) -> None:
        """Nothing is pending."""

    @torch.no_grad()
    def reduce(
        self,
        layout: GuestLayout,
        parts: Sequence[Sequence[Tensor | None] | None],
        totals: Sequence[Sequence[Tensor | None]],
        guests: Tensor,
        number: BatchNumber | None = None,
    ) -> None:
        """As `GuestTransport.reduce`; it is done on return."""
        moved, blocks = {}, layout.blocks(self.memory)
        for p, part in enumerate(parts):
            if part is not None:
                like, dtypes = blocks[p][0], {t.dtype for t in part if t is not None}
                dtype = dtypes.pop() if dtypes else layout.dtypes[p]
                found = [torch.zeros_like(like, dtype=dtype) if t is None else t for t in part]
                moved[p] = [_Row(like, gradient) for gradient in (*totals[p], *found)]
        moves = [
            Move(guest, home, rows, layout.dtypes[p])
            for guest, home in self._pairs(layout, guests)
            for p, rows in moved.items()
        ]
        mover = self._mover(layout)
        for row, gradient in mover.send(mover.pack("gradient", moves)):
            assert row.gradient is not None, "a gradient arrives where no total was given"
            row.gradient.add_(gradient)

    def join(self) -> None:
        """Nothing is pending."""

    def raise_errors(self) -> None:
        """Collectives raise at once."""

    def barrier(
        self,
        layout: GuestLayout,
        guests: Tensor,
        number: BatchNumber | None = None,
        refuses: bool = False,
    ) -> None:
        """As `GuestTransport.barrier`: a rank writes its slots itself, so only refusals matter."""
        if self._group is None or not bool((guests >= 0).any()):
            return
        R = self._num_ranks
        own = torch.full((R,), refuses, dtype=torch.uint8, device=self._transport.device)
        of_ranks = torch.empty_like(own)
        self._transport.all_to_all(of_ranks, own, [[1] * R for _ in range(R)])
        ranks = torch.nonzero(of_ranks).flatten().tolist()
        if ranks and not refuses:
            raise RankError(refusal(ranks))

    def _mover(self, layout: GuestLayout) -> Mover:
        num_slots = layout.num_residents + layout.num_guests
        return Mover(self._transport, self._rank, self._num_ranks, num_slots)

    def _pairs(self, layout: GuestLayout, guests: Tensor) -> list[tuple[int, int]]:
        """(guest, home) among all ranks' slots, in order of ranks and guest slots."""
        num_slots = layout.num_residents + layout.num_guests
        return [
            (
                rank * num_slots + layout.num_residents + slot,
                layout.home_rank[expert] * num_slots + layout.home_slot[expert],
            )
            for rank, of_rank in enumerate(guests.tolist())
            for slot, expert in enumerate(of_rank)
            if expert >= 0
        ]
