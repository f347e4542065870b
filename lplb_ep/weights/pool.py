"""Memory for guests: G expert slots on each rank, shared by all layers of a model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..comm.alltoall import TRANSPORTS
from ..comm.collectives import together
from ..errors import ContractError
from ..layer import check_slot
from ..planning.inputs import graph_task
from .guest_transport import BatchNumber, GuestLayout, GuestTransport
from .guest_transports import make_guest_transport
from .slots import local_part


@dataclass(eq=False)
class Stay:
    """The use of a pool by one batch of a layer.

    The batch's plan refers to it, and the pool does so weakly until the batch's experts run. So a
    batch that was given up before then is not in flight.
    """

    owner: object
    """The layer's `Guests`."""
    guests: Tensor
    """[R, G] int32: the expert in each guest slot, -1 for none."""
    generation: int
    """Of the home weights that were pushed."""
    graph_task: int
    """The backward pass that it was made in, -1 outside of any."""
    number: BatchNumber | None = None
    """Of the batch, by which ranks know what belongs to it."""
    is_awaited: bool = True
    """Whether its experts have still to run, forward or backward."""
    awaited_in: int = -1
    """The backward pass in which they have to run, -1: outside of any."""


class GuestPool:
    """Memory for the guests of every layer whose batches run one after the other.

    A batch's guests are in the pool from its dispatch until its experts have run. They are there
    again from the backward pass of its combine until that of its experts. In between other layers
    use the memory. Micro-batches that are in flight together need a pool each.

    Construction is collective. Guests are no parameters: a pool is in no `state_dict`.

    Args:
        group: the expert-parallel group. None stands for a single rank.
        num_guests_per_rank: G, as in the placements.
        experts: the experts of a layer, or of several layers in a list, as `Guests` take them. The
            pool is large enough for each.
        slot: the micro-batch slot that the pool is for.
        transport: how weights and gradients travel. "peers": a kernel writes to the other GPUs'
            memory. "torch": collectives of `torch.distributed`, for which the CPU waits for the
            plan. "auto": the first of them that is available.

    Raises:
        TypeError: `experts` are no modules, or `group` is no group.
        ValueError: G or `slot` is out of range, the experts have no parameters or are on several
            devices, or the transport is not available.
        RankError: ranks differ in one of these, or in the size of the pool; names the ranks.
    """

    num_bytes: int
    """Of the memory on each rank."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_guests_per_rank: int,
        experts: nn.Module | Sequence[nn.Module],
        *,
        slot: int = 0,
        transport: str = "auto",
    ) -> None:
        with together(group, "GuestPool") as facts:
            check_slot(slot)
            if type(num_guests_per_rank) is not int or num_guests_per_rank < 1:  # nor a bool
                raise ValueError(
                    "num_guests_per_rank must be a whole number from 1; got "
                    f"{num_guests_per_rank!r}"
                )
            if transport not in TRANSPORTS:
                raise ValueError(
                    f"transport must be one of {', '.join(TRANSPORTS)}; got {transport!r}"
                )
            layers = [*experts] if isinstance(experts, Sequence) else [experts]
            if not layers:
                raise ValueError("experts must be those of a layer, or of several; got none")
            devices = {p.device for layer in layers for p in _parameters(layer)}
            if len(devices) != 1:
                raise ValueError(
                    f"the experts must be on one device; got {sorted(map(str, devices))}"
                )
            self.num_bytes = max(
                GuestLayout.of(shapes_of(layer), num_guests_per_rank, 0, ()).num_bytes
                for layer in layers
            )
            trained = any(p.requires_grad for layer in layers for p in _parameters(layer))
            facts["trained experts"] = trained
            facts.update(num_guests_per_rank=num_guests_per_rank, slot=slot, transport=transport)
            facts["bytes of the pool"] = self.num_bytes
        self.group, self.slot = group, slot
        self.num_guests_per_rank = num_guests_per_rank
        self.device = devices.pop()
        self.transport: GuestTransport = make_guest_transport(
            group, self.device, self.num_bytes, transport, None if trained else 0
        )
        self._stay: weakref.ref[Stay] | None = None
        self._planned_again: Stay | None = None
        """The batch, if a recompute planned it, which may end early and drop all that it made."""
        self._used: Stay | None = None
        self._goes_home = False
        self._streams: set[torch.cuda.Stream] = set()

    def __repr__(self) -> str:
        return f"GuestPool({self.num_guests_per_rank} guests a rank, slot {self.slot})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a GuestPool is memory that ranks share, and is neither copied nor pickled: make "
            "another one for the copied model"
        )

    @property
    def stay(self) -> Stay | None:
        """The batch whose guests are in the pool, unless it was given up."""
        return None if self._stay is None else self._stay()

    @property
    def is_awaited(self) -> bool:
        """Whether the experts of the batch in the pool have still to run, forward or backward."""
        stay = self.stay
        return stay is not None and stay.is_awaited

    def stay_of(self, owner: object) -> Stay | None:
        """The batch at hand of a layer; None where it goes home.

        Raises:
            ContractError: the pool holds the batch of another layer, or one that was given up. Or
                the batch at hand goes home, and the experts of an earlier one have still to run.
        """
        stay = self.stay
        if self._goes_home:
            # Whose weights are asked for is not known while a batch is in flight.
            who = str(stay.owner) if stay is not None and stay.is_awaited else ""
            has_failed = stay is not None and stay.awaited_in >= 0 and graph_task() < 0
            del stay  # the traceback must not refer to it
            if who and not has_failed:
                self._refuse(who)
            return None
        if stay is not None and stay.owner is owner:
            return stay
        holder = "no batch, or one whose handle was dropped" if stay is None else str(stay.owner)
        raise ContractError(
            f"the pool of guests (slot {self.slot}) holds guests of {holder}. Take a layer's "
            "weights behind its own dispatch, before the next one, and keep the handle so long"
        )

    def join(self) -> None:
        """Makes the current stream wait for all work on the pool on this rank."""
        self.transport.join()
        if self.device.type != "cuda":
            return
        current = torch.cuda.current_stream(self.device)
        for stream in self._streams:
            if stream != current:
                current.wait_stream(stream)
        self._streams = {current}

    def use(self, stay: Stay | None) -> None:
        """Notes that a batch's experts read the pool on the current stream from now on."""
        self._used = stay
        if stay is not None:
            stay.is_awaited = False
        if self.device.type == "cuda":
            self._streams.add(torch.cuda.current_stream(self.device))

    def await_guests(self, stay: Stay | None) -> None:
        """Makes the current stream wait for a batch's guests, before its experts read them.

        Raises:
            ContractError: the pool holds another batch by now.
        """
        if stay is not None:
            if self.stay is not stay:
                raise ContractError(
                    f"the pool of guests (slot {self.slot}) was given to another batch before this "
                    "one's layer had waited for its guests"
                )
            self.transport.wait()
        self.use(stay)

    def check_free(self, owner: object, *, plans: bool) -> None:
        """Refuses a batch while experts of another batch have still to run.

        A recompute is part of its batch. So in a backward pass the same layer may plan again. One
        of several layers plans all of them again, behind the push for the last one's backward pass.

        Args:
            owner: the `Guests` of the batch's layer.
            plans: whether the batch is planned, and not pushed again.

        Raises:
            ContractError: the batch of another layer, or another batch of this one, is in flight.
        """
        # The traceback must not refer to the batch, or it could not be given up.
        if who := self._in_flight(owner, plans):
            self._refuse(who)

    def _refuse(self, who: str) -> NoReturn:
        raise ContractError(
            f"the pool of guests (slot {self.slot}) is shared by batches in flight: the "
            f"experts of {who} have still to run on theirs. Give each micro-batch in flight a "
            "slot= and a GuestPool of its own, or drop the handle of a batch that was given up"
        )

    def _in_flight(self, owner: object, plans: bool) -> str:
        """Whose batch is in the way of another one; empty: none."""
        stay, now = self.stay, graph_task()
        if stay is None or not stay.is_awaited:
            return ""
        if stay.awaited_in >= 0 and now < 0:  # that backward pass has failed
            return ""
        if now >= 0 and (stay.owner is owner or (plans and stay.awaited_in == now)):
            return ""  # a recompute, which brings the guests of what runs backward next, or raises
        return str(stay.owner)

    def put(self, stay: Stay | None) -> None:
        """Sets the batch whose guests are in the pool from now on; None: it goes home.

        A batch that goes home leaves the guests of a batch in flight where they are.
        """
        self._goes_home = stay is None
        if stay is None and (held := self.stay) is not None and held.is_awaited:
            return
        self._stay, self._used = None if stay is None else weakref.ref(stay), None
        self._planned_again = None if stay is None or stay.graph_task < 0 else stay

    def clear(self) -> None:
        """Marks the pool as without guests, since some transports put gradients there."""
        self._stay = self._used = self._planned_again = None


def pools_by_slot(
    given: GuestPool | Sequence[GuestPool] | None,
    group: dist.ProcessGroup | None,
    layout: GuestLayout,
) -> dict[int, GuestPool]:
    """The pools that a layer is given, by micro-batch slot.

    Raises:
        TypeError: one is no pool.
        ValueError: one is on another group than the layer, does not fit its guests, or is for the
            same micro-batch slot as another.
    """
    pools: dict[int, GuestPool] = {}
    for pool in given if isinstance(given, Sequence) else [given] if given is not None else []:
        if not isinstance(pool, GuestPool):
            raise TypeError(f"pool must be a GuestPool, or several; got a {type(pool).__name__}")
        if pool.group is not group:
            raise ValueError("the pool is on another group than the layer")
        if pool.slot in pools:
            raise ValueError(f"two pools are for micro-batch slot {pool.slot}")
        if pool.num_guests_per_rank != layout.num_guests:
            raise ValueError(
                f"the pool has {pool.num_guests_per_rank} guests a rank, and the placement "
                f"{layout.num_guests}"
            )
        if pool.num_bytes < layout.num_bytes:
            raise ValueError(
                f"the pool has {pool.num_bytes} bytes, and {layout.num_guests} guests of this "
                f"layer take {layout.num_bytes}: give GuestPool the experts of every layer"
            )
        pools[pool.slot] = pool
    return pools


@contextlib.contextmanager
def outside_of_checkpoints() -> Iterator[None]:
    """A context for work that only a forward pass does, or only its recompute: nothing trained.

    Selective checkpointing numbers the operations of both, and finds saved results by the number.
    """
    with _disable_current_modes(), torch.no_grad():
        yield


def shapes_of(experts: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each parameter of one slot, in alphabetical order.

    Raises:
        TypeError: `experts` is no module.
        ValueError: it has no parameters, or one without slots.
    """
    stacked = not isinstance(experts, nn.ModuleList)
    parameters = {}
    for name, parameter in sorted(_named(experts)):
        shape = local_part(parameter).shape
        if stacked and not (shape and shape[0]):
            raise ValueError(
                f"parameter {name} must have a row for each slot of this rank; got shape "
                f"{list(shape)}"
            )
        parameters[name] = shape[1:] if stacked else shape, parameter.dtype
    return parameters


def _parameters(experts: nn.Module) -> Iterable[Tensor]:
    return (parameter for _, parameter in _named(experts))


def _named(experts: Any) -> Iterable[tuple[str, nn.Parameter]]:
    """The parameters of a slot of a list of modules, or of a stacked module."""
    if not isinstance(experts, nn.Module):
        raise TypeError(f"experts must be a module; got a {type(experts).__name__}")
    first = experts[0] if isinstance(experts, nn.ModuleList) and len(experts) else experts
    named = [*first.named_parameters()]
    if not named:
        raise ValueError("experts must have parameters, got none")
    return named
