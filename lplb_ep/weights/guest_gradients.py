"""Gradients of guests, brought home within the backward pass of their layer's experts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ContractError
from ..planning.inputs import graph_task
from .guest_transport import GuestLayout
from .pool import GuestPool, Stay
from .slots import Slot, local_part

Gradients = list[Tensor | None]
_NOTHING = torch.empty(0, device="cpu")


class TrainedBatch(NamedTuple):
    """A batch whose experts run, and what its backward pass will need."""

    owner: object
    """The layer's `Guests`."""
    layout: GuestLayout
    slots: list[list[Slot]]
    """By parameter, the resident slots."""
    is_trained: Sequence[bool]
    """By parameter, whether guests have gradients."""
    is_list: bool
    """Whether each slot has tensors of its own; else a parameter's slots are rows of one."""
    pool: GuestPool
    stay: Stay | None
    """None where the batch goes home."""

    def check_held(self) -> Stay:
        """The batch that the pool holds, if it has the guests of this one.

        Raises:
            ContractError: the pool was used since, so that the experts had other weights.
        """
        held = self.pool.stay
        if held is not None and held.owner is self.owner:
            # A recompute within this very backward pass planned the same batch again.
            again = held.graph_task >= 0 and held.graph_task == graph_task()
            if held is self.stay or again:
                return held
        raise ContractError(
            "the pool of guests holds another batch than the one whose backward pass runs, so its "
            "gradients would be wrong. The backward pass of combine must dispatch by the handle, "
            "through the buffer that planned. And a layer takes the weights of a batch once"
        )

    def arrives(self) -> set[int]:
        """The local slots to whose gradients something is added; all, if only a GPU knows."""
        layout = self.layout
        assert self.stay is not None, "a batch that goes home has no guests"
        guests = self.stay.guests
        if guests.is_cuda:
            return set(range(layout.num_residents))
        group = self.pool.group
        rank = 0 if group is None else group.rank()
        return {
            layout.home_slot[expert]
            for expert in guests.flatten().tolist()
            if expert >= 0 and layout.home_rank[expert] == rank
        }

    def totals(
        self,
        number: int,
        own: Sequence[Tensor | None],
        alone: Sequence[bool],
        arrives: set[int],
    ) -> tuple[Gradients, Gradients]:
        """Where guests' gradients of a parameter are added.

        Args:
            number: of the parameter.
            own: what autograd has for the resident slots: a tensor for each, or one for all.
            alone: which of these nobody else has, so that they may be written to.
            arrives: as `arrives`.

        Returns:
            What autograd goes on with, in the form of `own`. And by resident slot the tensor that
            parts are added to, of `main_grad` where the parameter has one.
        """
        gradients: Gradients = [*own]
        totals: Gradients = [None] * self.layout.num_residents
        for index, gradient in enumerate(own):
            here = {index} & arrives if self.is_list else arrives
            if not here:
                continue
            parameter = self.slots[number][index].parameter
            main = getattr(parameter, "main_grad", None)
            dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
            if gradient is None:
                gradient = torch.zeros_like(local_part(parameter), dtype=dtype)
            elif main is None and not (
                alone[index] and gradient.dtype == dtype and gradient.is_contiguous()
            ):
                gradient = gradient.to(dtype, copy=True, memory_format=torch.contiguous_format)
            gradients[index] = gradient
            whole = gradient if main is None else local_part(main)
            for slot in here:
                totals[slot] = whole if self.is_list else whole[slot]
        return gradients, totals

    def parts(self, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients of a parameter's guest slots, None where autograd has none.

        Args:
            given: what autograd has: a tensor for each guest slot, or one for all.
        """
        if self.is_list:
            return given
        return [None] * self.layout.num_guests if given[0] is None else [*given[0]]


class Homeward(torch.autograd.Function):
    """Passes a layer's weights on. Once all of their gradients are there, guests' go home.

    The received rows pass through as well. So it runs on every rank, also where no row came. There
    experts may have saved nothing, and a checkpoint around the layer would not run it again, for
    which the other ranks wait. So this asks for a saved tensor.
    """

    @staticmethod
    def forward(ctx: Any, batch: TrainedBatch, num_own: int, x: Tensor, *tensors: Tensor) -> Any:
        """Returns what it is given: the rows, then `num_own` weights, then those of guests."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(_NOTHING)
        ctx.batch = batch
        _, per_guest = _sizes(batch)
        own, guests = tensors[:num_own], tensors[num_own:]
        ctx.mark_non_differentiable(
            *(tensor for tensor in own if not tensor.requires_grad),
            *(part for n, part in enumerate(guests) if not batch.is_trained[n // per_guest]),
        )
        return x, *tensors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, x: Tensor | None, *gradients: Tensor | None) -> Any:
        """Gradients of the rows and of the parameters, guests' parts added."""
        batch: TrainedBatch = ctx.batch
        _ = ctx.saved_tensors
        alone = [counts == counts_if_alone() for counts in _counts(gradients)]
        per_own, per_guest = _sizes(batch)
        names = range(len(batch.slots))
        own = [[*gradients[n * per_own : (n + 1) * per_own]] for n in names]
        guests = gradients[len(names) * per_own :]
        if batch.stay is not None:
            own = _send_home(
                batch,
                own,
                [alone[n * per_own : (n + 1) * per_own] for n in names],
                [guests[n * per_guest : (n + 1) * per_guest] for n in names],
            )
        return None, None, x, *(g for of_name in own for g in of_name), *(None for _ in guests)


class _Probe(torch.autograd.Function):
    """Counts as `Homeward` does, from the same place in a backward pass."""

    @staticmethod
    def forward(ctx: Any, seen: list[Any], x: Tensor, *tensors: Tensor) -> Any:
        ctx.seen = seen
        return x, *tensors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, x: Tensor | None, *gradients: Tensor | None) -> Any:
        ctx.seen += _counts(gradients)
        return None, x, *gradients


def _counts(gradients: Sequence[Tensor | None]) -> list[tuple[int, int, int] | None]:
    """How many refer to each tensor in Python and in C++, and to its memory."""
    use_count = getattr(Tensor, "_use_count", None)
    storage_use_count = getattr(torch._C, "_storage_Use_Count", None)
    if use_count is None or storage_use_count is None:  # they are not public
        return [None for _ in gradients]
    return [
        None
        if g is None
        else (sys.getrefcount(g), use_count(g), storage_use_count(g.untyped_storage()._cdata))
        for g in gradients
    ]


@functools.cache
def counts_if_alone() -> Any:
    """The counts of a gradient that autograd has made for `Homeward` and given to nobody else.

    Counts of the same tensor differ between versions of torch. So they are seen once, beside those
    of tensors that others have as well. Not within a backward pass, where it would be another one.

    Returns:
        What no other gradient's counts equal, if this torch does not tell.
    """
    seen: list[Any] = []
    with torch.enable_grad():
        leaves = [torch.ones(1, requires_grad=True, device="cpu") for _ in range(8)]
        a, b = leaves.pop().neg(), leaves.pop().neg()  # their backward is after the probe's
        x, alone, one, same, node, view = _Probe.apply(seen, *leaves)
        # Nothing is saved, which a checkpoint around this would count.
        of_node = (one + same).neg() + (node + a).neg() + (view.view(1, 1) + b).neg()
        (x.neg() + alone.neg() + of_node).sum().backward()
    expected, *shared = seen
    return () if expected is None or expected in shared else expected


def _sizes(batch: TrainedBatch) -> tuple[int, int]:
    """How many tensors a parameter has for resident slots, and for guest slots."""
    return (batch.layout.num_residents, batch.layout.num_guests) if batch.is_list else (1, 1)


def send_late(batch: TrainedBatch, own: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Sends guests' gradients home that come behind the backward pass, and hands the homes' on.

    Args:
        batch: whose experts have run backward.
        own: what the homes' gradients are handed on to: a layer's own weights.
        leaves: what the experts had in their place, then guests' weights. They have `grad` by now.
    """
    per_own, per_guest = _sizes(batch)
    gradients = [leaf.grad for leaf in leaves]
    names = range(len(batch.slots))
    homes: list[Gradients] = [gradients[n * per_own : (n + 1) * per_own] for n in names]
    guests = gradients[len(own) :]
    if batch.stay is not None:
        homes = _send_home(
            batch,
            homes,
            [[False] * per_own for _ in names],
            [guests[n * per_guest : (n + 1) * per_guest] for n in names],
        )
    hand_on(own, [gradient for of_name in homes for gradient in of_name])


def hand_on(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Accumulates gradients as a backward pass does, with the hooks of each parameter."""
    given = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
    if given:
        torch.autograd.backward([w for w, _ in given], [g for _, g in given])


@torch.no_grad()
def _send_home(
    batch: TrainedBatch,
    own: list[Gradients],
    alone: Sequence[Sequence[bool]],
    guests: Sequence[Sequence[Tensor | None]],
) -> list[Gradients]:
    """Adds guests' gradients to their homes'. On all ranks alike."""
    held = batch.check_held()
    assert batch.stay is not None, "a batch that goes home sends nothing"
    batch.pool.use(held)
    arrives = batch.arrives()
    returned: list[Gradients] = []
    totals: list[Gradients] = []
    parts: list[Sequence[Tensor | None] | None] = []
    for number, gradients in enumerate(own):
        if batch.is_trained[number]:
            gradients, total = batch.totals(number, gradients, alone[number], arrives)
            parts.append(batch.parts(guests[number]))
        else:
            total = [None] * batch.layout.num_residents
            parts.append(None)
        returned.append(gradients)
        totals.append(total)
    batch.pool.transport.reduce(batch.layout, parts, totals, batch.stay.guests, held.number)
    batch.pool.clear()
    return returned
