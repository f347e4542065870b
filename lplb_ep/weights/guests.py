"""Guests: copies of experts on other ranks, for one batch. Weights come, gradients go home.

A guest is a second place to compute the same expert, for one batch only. A run with guests equals
the run with everything at home, up to the order of summation, on two conditions. When the experts
of a batch run, forward or backward, its guests' weights are in the pool. And the gradients of
guests are added to their homes' before these are used.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from ..comm.collectives import together
from ..errors import ContractError
from ..layer import Layer, layer_of
from ..logs import logger
from ..placement.table import Placement
from ..planning.inputs import graph_task
from .guest_gradients import Homeward, TrainedBatch, counts_if_alone, send_late
from .guest_transport import BatchNumber, GuestLayout
from .pool import GuestPool, Stay, outside_of_checkpoints, pools_by_slot, shapes_of
from .slots import (
    describe,
    has_whole_rows,
    local_part,
    refuse_state_outside_parameters,
    retrained,
    slots_of,
    trained_of,
    trained_part,
)
from .validity import Watch, last_step

log = logger(__name__)

Weights = dict[str, tuple[Any, Any]]

_requires_grad = attrgetter("requires_grad")


class Guests:
    """The guests of one layer's experts: their weights and gradients.

    The layer's forward pass takes its experts' weights from `weights` or `modules`, between
    dispatch and combine. The rest is automatic: the drop-in's calls push weights, and gradients go
    home within the backward pass. Guests are not in the optimizer, in `state_dict` or in a
    checkpoint: the experts hold logical experts as before.

    Construction is collective. The layer refers to its `Guests` weakly. Without them, or while they
    are not valid on some rank, a batch has no guests and goes home.

    Args:
        experts: this rank's resident slots, which are all but the guest slots, in one of the two
            forms that `slot_parameters` takes. Persistent buffers are refused, as by `Replicas`.
        placement: the layer, or the placement object that stands for one. It has guest slots.
        group: the expert-parallel group, whose rank r is the placement's rank r. None only where
            the placement has one rank.
        pool: the memory that the layer shares with other layers. Or several pools with a `slot`
            each, for micro-batches in flight together. By default one pool of its own.
        layer_waits: whether the layer waits for guests, not the dispatch. It may compute with its
            residents meanwhile (`split_weights`). The backward pass does not overlap.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the experts do not fit the placement, or the pool. Or they have persistent
            buffers, parameters made under `torch.inference_mode`, or a parameter that only some
            experts train (`requires_grad`). The message says by what.
        RankError: ranks differ in placement, pool or parameters, or some refused theirs; names
            the ranks.
    """

    def __init__(
        self,
        experts: nn.Module,
        placement: Layer | Placement,
        group: dist.ProcessGroup | None = None,
        pool: GuestPool | Sequence[GuestPool] | None = None,
        layer_waits: bool = False,
    ) -> None:
        with together(group, "Guests") as facts:
            self.layer = layer_of(placement)
            self.experts, self.group, self.layer_waits = experts, group, layer_waits
            self._layout = _layout(experts, self.layer.placement, group)
            self._placement = self.layer.placement
            self._pools = pools_by_slot(pool, group, self._layout)
            facts["placement"] = self._placement.fingerprint()
            facts["pools"] = str([(slot, one.num_bytes) for slot, one in self._pools.items()])
            self._slots = slots_of(experts, self._layout.num_residents)
            self._trained = trained_of(self._slots)
            for name, slots in self._slots.items():
                facts[f"parameter {name}"] = describe(slots[0].weight)
                facts[f"parameter {name} is trained"] = self._trained[name]
            refuse_state_outside_parameters(experts)
            self._watch = Watch([experts])
        if not self._pools:
            self._pools = {0: GuestPool(group, self._layout.num_guests, experts)}
        self._blocks = {
            slot: self._layout.blocks(given.transport.memory) for slot, given in self._pools.items()
        }
        self._rank = 0 if group is None else group.rank()
        self._generation = 0
        self._state: tuple[tuple[int, int], list[tuple[int, int]]] = (0, 0), []
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []
        self._said = ""
        self._scan()
        self._flags = [*map(_requires_grad, self._parameters)]
        counts_if_alone()
        self.layer.take_guests(self)

    def __repr__(self) -> str:
        return f"Guests({self.layer.label}, {self.layer.placement!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Guests are neither copied nor pickled, since ranks share their memory. Take them off "
            "the module before, and make others for its copy; or save the state_dict"
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights, as they travel."""
        return sum(self._layout.slot_bytes)

    # --- what a plan asks -------------------------------------------------------------------------

    @property
    def is_valid(self) -> bool:
        """Whether guests can be pushed: the weights are as they were at construction. Local.

        Where they are not, that is logged once, and the batch goes home on all ranks.
        """
        obstacle = self._obstacle()
        if obstacle and obstacle != self._said:
            log.warning("batches of %s have no guests: %s", self.layer.label, obstacle)
        self._said = obstacle
        return not obstacle

    def prepare(self, slot: int = 0) -> None:
        """Makes the current stream wait, before a plan, for all work on the pool. Local.

        Args:
            slot: which of the micro-batches in flight.

        Raises:
            ContractError: no pool is for this micro-batch, or its pool is in use by another one.
            RankError: a rank's guests did not arrive in time for an earlier batch.
        """
        pool = self._pool(slot)
        pool.check_free(self, plans=True)
        pool.transport.raise_errors()
        pool.join()

    def push(
        self,
        guests: Tensor,
        slot: int = 0,
        status: Tensor | None = None,
        number: Tensor | None = None,
    ) -> Stay:
        """Begins to write this batch's guests into the pools of all ranks, which are free.

        Args:
            guests: [R, G] int32, of the plan: the expert in each guest slot, -1 for none.
            slot: which of the micro-batches in flight.
            status: [] int32, of the plan.
            number: [1] int64, of the plan. Without it a rank that misses a batch, for instance
                after a time-out, gets no guests in later batches either.

        Returns:
            An object for the batch, for `wait` and `push_again`.
        """
        pool = self._pool(slot)
        counted = None if number is None else BatchNumber(number.to(pool.device))
        stay = Stay(self, guests, self.current_generation(), graph_task(), counted)
        self._push(stay, pool, status)
        return stay

    def push_again(self, stay: Stay, slot: int = 0) -> None:
        """Pushes a batch's guests again where its pool was used since. Collective.

        Raises:
            ContractError: the home weights have changed since the batch was dispatched, or the pool
                is in use by another batch.
            RankError: the same on another rank. Over peers the GPU finds it, and a later call
                raises. Or a rank's guests did not arrive in time for an earlier batch.
        """
        pool = self._pool(slot)
        if pool.stay is stay:
            stay.is_awaited, stay.awaited_in = True, graph_task()
            pool.put(stay)
            return
        given = self._layout, stay.guests, stay.number
        try:
            self._check_pushed(stay)
            pool.check_free(self, plans=False)
            pool.transport.raise_errors()
        except Exception:  # whatever it is, the other ranks wait for this one
            pool.transport.barrier(*given, refuses=True)
            raise
        pool.join()
        pool.transport.barrier(*given)
        self._push(stay, pool)

    def wait(self, slot: int = 0) -> None:
        """Makes the current stream wait until the guests pushed last have arrived."""
        self._pool(slot).transport.wait()

    def skip(self, slot: int = 0) -> None:
        """Says that the batch at hand has no guests: its tokens go home."""
        pool = self._pools.get(slot)
        if pool is not None:
            pool.put(None)

    # --- what a layer asks ------------------------------------------------------------------------

    def weights(self, x: Tensor, slot: int = 0) -> tuple[Tensor, Weights]:
        """The weights of all local slots, for the batch that was dispatched last. Once a batch.

        The layer must compute with these weights, not with the parameters: through them gradients
        of guests go home. The autograd node that sends gradients runs when `x` has its gradient,
        even on a rank without rows. So the layer's output must depend on the returned `x`.

        Args:
            x: the received rows, of a floating dtype.
            slot: which of the micro-batches in flight.

        Returns:
            `x` for the further computation, and by parameter name the weights of resident slots and
            of guest slots. For stacked experts these are tensors [L, ...] and [G, ...], else lists
            of L and G tensors. A guest slot without a guest has undefined values, and gets no rows.

        Raises:
            ContractError: the pool holds another layer's batch, or one whose handle was dropped.
        """
        x, own, arrive = self.split_weights(x, slot)
        arrived = arrive()
        return x, {name: (tensors, arrived[name]) for name, tensors in own.items()}

    def split_weights(
        self, x: Tensor, slot: int = 0
    ) -> tuple[Tensor, dict[str, Any], Callable[[], dict[str, Any]]]:
        """As `weights`, in two steps: a layer computes with residents while guests arrive.

        With `layer_waits` no other call has waited for guests.

        Returns:
            `x` for the further computation. By name the weights of resident slots. And a function
            that makes the current stream wait for guests, and returns their weights by name. It
            raises ContractError once another batch uses the pool.

        Raises:
            ContractError: as `weights`.
        """
        batch, own, parts = self._batch(slot)
        batch.pool.use(batch.stay)
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in own)):
            x, *tensors = Homeward.apply(batch, len(own), x, *own, *parts)
        else:
            tensors = [*own, *parts]

        def arrive() -> dict[str, Any]:
            with outside_of_checkpoints():
                batch.pool.await_guests(batch.stay)
            return self._named(tensors[len(own) :])

        return x, self._named(tensors[: len(own)]), arrive

    def late_weights(self, slot: int = 0) -> tuple[Weights, Callable[[], None]]:
        """As `weights`, where weights' gradients are computed after the experts' backward pass.

        The weights are leaves of their own, whose `grad` is set once it is computed.

        Returns:
            By name the weights. And a function that sends guests' gradients home and passes the
            others on to the parameters. Every rank calls it once `grad` is set, before another
            batch uses the pool.

        Raises:
            ContractError: as `weights`.
        """
        batch, own, parts = self._batch(slot)
        with outside_of_checkpoints():
            batch.pool.await_guests(batch.stay)
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in own]
        per_name = len(parts) // len(batch.is_trained)
        leaves += [
            part.detach().requires_grad_(batch.is_trained[index // per_name])
            for index, part in enumerate(parts)
        ]
        residents, guests = self._named(leaves[: len(own)]), self._named(leaves[len(own) :])
        weights = {name: (tensors, guests[name]) for name, tensors in residents.items()}
        return weights, functools.partial(send_late, batch, own, leaves)

    def modules(self, x: Tensor, slot: int = 0) -> tuple[Tensor, list[Callable[..., Any]]]:
        """As `weights`, for a list of modules: a callable for each of the L + G local slots.

        Returns:
            `x` for the further computation, and a callable for each local slot. That of a guest
            slot is the first module with the guest's weights instead of its own.

        Raises:
            TypeError: the experts are stacked.
            ContractError: as `weights`.
        """
        if not self._is_list:
            raise TypeError("the experts are stacked and no list of modules: take their weights")
        x, weights = self.weights(x, slot)
        layout = self._layout
        slots: list[Callable[..., Any]] = []
        for number in range(layout.num_residents + layout.num_guests):
            is_guest = number >= layout.num_residents
            index = number - layout.num_residents if is_guest else number
            module = self.experts[0 if is_guest else number]  # type: ignore[index]
            own = {name: pair[is_guest][index] for name, pair in weights.items()}
            slots.append(functools.partial(_run, module, own))
        return x, slots

    # --- inner ------------------------------------------------------------------------------------

    @property
    def _is_list(self) -> bool:
        return isinstance(self.experts, nn.ModuleList)

    def _batch(self, slot: int) -> tuple[TrainedBatch, list[Tensor], list[Tensor]]:
        """The batch at hand, and the weights of resident slots and of guest slots."""
        pool = self._pool(slot)
        self._rescan()
        try:
            stay = pool.stay_of(self)
        except ContractError as error:
            if self.layer.guests is self:
                raise
            raise ContractError(
                f"other Guests were made for {self.layer.label} since, and its batches get those. "
                "Give each layer a Layer, or a placement object, of its own"
            ) from error
        # Tensors of their own versions: autograd must not notice later pushes.
        parts = [part for block in self._blocks[slot] for part in self._split(block.data)]
        slots = [*self._slots.values()]
        own = [
            trained_part(copy.parameter)
            for copies in slots
            for copy in (copies if self._is_list else copies[:1])
        ]
        trained = [*self._trained.values()]
        return (
            TrainedBatch(self, self._layout, slots, trained, self._is_list, pool, stay),
            own,
            parts,
        )

    def _pool(self, slot: int) -> GuestPool:
        pool = self._pools.get(slot)
        if pool is None:
            raise ContractError(
                f"there is no GuestPool for micro-batch slot {slot}; these Guests have pools for "
                f"{[*self._pools]}"
            )
        return pool

    def _check_pushed(self, stay: Stay) -> None:
        """Raises ContractError where the weights are not those that a batch was dispatched with."""
        obstacle = self._obstacle()
        if obstacle or self.current_generation() != stay.generation:
            raise ContractError(
                "the home weights changed between a batch's dispatch and its backward pass, which "
                f"would get other guests: {obstacle or 'they were written to (optimizer step?)'}"
            )

    def _push(self, stay: Stay, pool: GuestPool, status: Tensor | None = None) -> None:
        stay.is_awaited, stay.awaited_in = True, graph_task()
        pool.put(stay)
        self._rescan()
        weights: list[Sequence[Tensor]] = []
        for slots in self._slots.values():
            if self._is_list:
                weights.append([slot.weight.detach() for slot in slots])
            else:  # a tensor with a row for each
                weights.append(local_part(slots[0].parameter).detach())  # type: ignore[arg-type]
        pool.transport.push(self._layout, weights, stay.guests, status, stay.number)

    def _scan(self) -> None:
        """Finds the parameters that the experts have now."""
        self._slots = slots_of(self.experts, self._layout.num_residents)
        found: list[tuple[dict[str, Any], str]] = [
            (module._parameters, name)
            for module in self.experts.modules()
            for name, _ in module.named_parameters(recurse=False)
        ]
        self._tables = [table for table, _ in found]
        self._keys = [name for _, name in found]
        self._parameters = [table[name] for table, name in found]

    def _rescan(self) -> None:
        if not all(map(is_, map(dict.get, self._tables, self._keys), self._parameters)):
            with outside_of_checkpoints():
                self._scan()

    def _obstacle(self) -> str:
        """Why the weights cannot be pushed as they are; empty: they can."""
        placement = self.layer.placement
        if placement is not self._placement:
            if not placement.may_replace(self._placement):
                return "its placement has other homes or slots by now: make Guests again"
            self._placement = placement
        if not self._watch.is_intact and (misfit := self._misfit()):
            return misfit
        if [*map(_requires_grad, self._parameters)] == self._flags:
            return ""
        return retrained(self._slots, self._trained)

    def _misfit(self) -> str:
        try:
            self._rescan()
        except ValueError as error:
            return str(error)
        device = next(iter(self._pools.values())).device
        for number, (name, slots) in enumerate(self._slots.items()):
            want = f"{list(self._layout.shapes[number])} {self._layout.dtypes[number]} on {device}"
            for slot in {id(slot.parameter): slot for slot in slots}.values():
                if not has_whole_rows(slot.parameter):
                    return f"parameter {name} is sharded, and guests need it whole"
                whole = local_part(slot.parameter)
                if whole.untyped_storage().nbytes() < whole.numel() * whole.itemsize:
                    return f"the memory of parameter {name} is freed"
                weight = slot.weight
                got = f"{list(weight.shape)} {weight.dtype} on {weight.device}"
                if got != want:
                    return f"parameter {name} is {got} now, and was {want} when Guests were made"
        return ""

    def current_generation(self) -> int:
        """A number that grows where home weights may have changed. Local.

        FSDP2 frees a gathered parameter's memory in its storage, and gathers it there again. That
        is no change, unless some optimizer has stepped meanwhile. An optimizer holds the sharded
        parameter, and the gathered one may not show its step.
        """
        steps = self._watch.num_steps
        step = steps, 0 if steps else last_step()
        if self._state[0] != step or not self._watch.is_intact:
            self._rescan()
            state = step, [(id(p), local_part(p)._version) for p in self._parameters]
            storages = [local_part(p).untyped_storage() for p in self._parameters]
            same = state == self._state and all(
                ref() is storage for ref, storage in zip(self._storages, storages, strict=True)
            )
            self._generation += not same
            self._state, self._storages = state, [*map(weakref.ref, storages)]
            self._watch.mark()
        return self._generation

    def _split(self, block: Tensor) -> list[Tensor]:
        """A parameter of all guest slots, in the form of the experts."""
        return [*block] if self._is_list else [block]

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """By name, from a flat list: a stack for each parameter, or a list of its slots."""
        names = self._layout.names
        size = len(tensors) // len(names)
        return {
            name: [*tensors[i * size : (i + 1) * size]] if self._is_list else tensors[i]
            for i, name in enumerate(names)
        }


def _layout(
    experts: nn.Module, placement: Placement, group: dist.ProcessGroup | None
) -> GuestLayout:
    if not placement.num_guests_per_rank:
        raise ValueError(f"the placement has no guest slots: num_guests_per_rank=0 in {placement}")
    size = 1 if group is None else group.size()
    if size != placement.num_ranks:
        raise ValueError(f"group must have the placement's {placement.num_ranks} ranks, got {size}")
    num_slots = placement.num_local_slots
    homes = [divmod(slot, num_slots) for slot in placement.home.tolist()]
    return GuestLayout.of(
        shapes_of(experts),
        placement.num_guests_per_rank,
        placement.num_resident_slots,
        homes,
    )


def _run(module: nn.Module, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Calls a module with other weights than its own."""
    return functional_call(module, weights, args, kwargs, tie_weights=False)
