"""Weights of replicas kept equal to their home's, gradients of replicas summed into the home's.

A replica is a second place to compute the same expert. A run with replicas equals the run with
everything at home, up to the order of summation, on two conditions. Whenever tokens go to a
replica, its weights equal the home's. Before the optimizer's step, the home's gradient is the sum
over all copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.alltoall import TRANSPORTS, limit_of_experts, make_transport
from ..comm.collectives import together
from ..comm.torch_exchange import TorchExchange
from ..errors import ContractError
from ..layer import Layer, layer_of
from ..placement.table import Placement
from .gradients import slot_gradients
from .slots import (
    Slot,
    describe,
    modules_of,
    refuse_state_outside_parameters,
    slots_of,
    trained_of,
)
from .transfers import Movable, Move, Mover, Payload, Transfer
from .validity import Watch


class Replicas:
    """The replicas of one layer's experts: their weights, gradients, version and checkpoints.

    A training step is: forward and backward of every micro-batch, `reduce_gradients()`, the
    data-parallel reduction and clipping, `optimizer.step()`, `copy_weights()`. The optimizer gets
    `optimizer_parameters()`, a checkpoint `state_dict()`.

    Construction, `copy_weights` and `reduce_gradients` are collective: every rank of the group
    calls them, in the same order. Everything else is local. Replicas start out stale.

    Slots that hold no expert (-1) are left alone. The module must keep its submodules. Parameters
    may be replaced (`.to()`, `load_state_dict(assign=True)`), which makes the replicas stale.

    Args:
        experts: this rank's P / R slots, in one of the two forms that `slot_parameters` takes.
            Guest slots do not count: their weights are no parameters.
            Persistent buffers are refused. A forward pass may change them (running statistics of
            BatchNorm), and a copy after the optimizer's step does not keep them equal. A constant
            is a buffer with `persistent=False`, which is neither copied nor checkpointed. A weight
            that is not trained is a parameter with `requires_grad=False`.
        placement: the layer, or the placement object that stands for one.
        group: the expert-parallel group, of `placement.num_ranks` ranks, whose rank r is the
            placement's rank r. None only where the placement has one rank.
        transport: moves weights and gradients. "peers": copies into the other GPUs' memory (one
            node, CuPy). "torch": collectives of `torch.distributed`, with gloo through the CPU.
            "auto": the first of them that is available.

    Raises:
        ValueError: the module does not fit the placement (see `slot_parameters`), has persistent
            buffers or parameters made under `torch.inference_mode`. Or only some slots train a
            parameter (`requires_grad`), the group has not the placement's number of ranks, or the
            transport is not available.
        RankError: ranks differ in placement or in parameters' names, shapes, dtypes or
            `requires_grad`, or some refused their module. The message names the ranks.
    """

    def __init__(
        self,
        experts: nn.Module,
        placement: Layer | Placement,
        group: dist.ProcessGroup | None = None,
        transport: str = "auto",
    ) -> None:
        self.layer = _agree(experts, placement, group, transport)
        placement = self.placement
        self.experts = experts
        self.group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        self._exchange = (
            None if group is None else TorchExchange(group, limit_of_experts(), "gradients")
        )
        self._mover = Mover(
            make_transport(group, next(experts.parameters()).device, transport),
            self._rank,
            placement.num_ranks,
            placement.num_local_slots,
        )
        self._homes = [  # (expert, local slot) of the homes on this rank
            (expert, self._mover.local(slot))
            for expert, slot in enumerate(placement.home.tolist())
            if self._mover.is_here(slot)
        ]
        self._set_copies(placement)
        self.layer.watch(self)

    @property
    def placement(self) -> Placement:
        """The placement in force in the layer."""
        return self.layer.placement

    @property
    def num_bytes(self) -> int:
        """Of the weights of this rank's replicas."""
        here = [slot for _, slot in self._replicas if self._mover.is_here(slot)]
        slots = self._slots().values()
        return sum(
            copies[self._mover.local(slot)].weight.nbytes for slot in here for copies in slots
        )

    @property
    def num_bytes_sent(self) -> int:
        """Bytes of weights and gradients from this rank to others so far."""
        return self._mover.num_bytes_sent

    def _set_copies(self, placement: Placement) -> None:
        self._replicas, self._sources = _pairs(placement)
        here = {slot for pair in self._replicas for slot in pair if self._mover.is_here(slot)}
        self._watch = Watch(modules_of(self.experts, set(map(self._mover.local, here))))

    def copy_weights(self, *, async_op: bool = False) -> Transfer | None:
        """Copies the home weights to all replicas, which are then valid. Collective.

        Call it after `optimizer.step()` and after loading, not between a forward pass and its
        backward: writing a weight that autograd has saved is an error there.

        Args:
            async_op: overlap it with the next work of the current stream. That work must neither
                write nor use these experts before it has waited for the returned transfer. Until
                then tokens go home.

        Returns:
            The transfer to wait for; None without `async_op`.
        """
        self._mover.finish()
        self._watch.clear()

        def copy() -> None:
            moves = self._weight_moves(self._sources)
            for replica, weight in self._mover.send(self._mover.pack("weight", moves)):
                replica.weight.copy_(weight)

        transfer = self._mover.run(copy, self._all_slots, async_op)
        self.mark_valid()
        return transfer

    @torch.no_grad()
    def prepare(self, placement: Placement) -> Change:
        """Prepares other replicas of this layer (`Placement.with_copies`). Local.

        Raises:
            ValueError: the placement is not of this layer.
            ContractError: a slot that would change has a gradient that is not reduced.
        """
        if not placement.may_replace(self.placement):
            raise ValueError(f"{placement} is not one of these replicas' layer: use with_copies")
        self._mover.finish()
        changed = self.placement.physical_to_logical != placement.physical_to_logical
        for name, copies in self._slots().items():
            for local, copy in enumerate(copies):
                gradient = copy.gradient
                slot = self._rank * placement.num_local_slots + local
                if changed[slot] and gradient is not None and gradient.any():
                    raise ContractError(
                        f"the gradient of parameter {name} in slot {slot} is not reduced, and "
                        "belongs to the expert that is there: call reduce_gradients() first"
                    )
        pairs = [pair for pair in _pairs(placement)[1] if changed[pair[1]]]
        payload = self._mover.pack("weight", self._weight_moves(pairs))
        return Change(self, placement, payload)

    @torch.no_grad()
    def reduce_gradients(
        self, *, async_op: bool = False, are_alike: bool = False
    ) -> Transfer | None:
        """Adds the replicas' gradients to their home's and zeroes them. Collective.

        Call it once per step, after the last micro-batch's backward and before the data-parallel
        reduction, unscaling and clipping. An optimizer's step is next, and not all optimizers can
        be watched. So the replicas are stale from this call until `copy_weights`.

        The gradient is `parameter.main_grad` where that is set (Megatron-Core), else
        `parameter.grad`. A replica's gradient travels in its own dtype, and the home's keeps its
        own. Replicas are added one by one, by column of `logical_to_physical`: the result is the
        same bits in every run. None counts as zero, and the home's gradient stays None where that
        of every copy is None. The ranks exchange which gradients are None in a small message that
        the CPU waits for, at most `LPLB_EP_TIMEOUT_S` with gloo.

        Args:
            async_op: overlap it with the next work of the current stream. That work must not use
                these experts' gradients before it has waited for the returned transfer.
            are_alike: the caller's word that all ranks' slots have gradients of the same dtypes.
                Then the ranks do not exchange which are None, and `requires_grad` is not compared.

        Returns:
            The transfer to wait for; None without `async_op`.

        Raises:
            ValueError: a gradient is of a dtype other than float32, bfloat16, float16, float64, or
                not of its weight's shape.
            RankError: the same on another rank. Or, with gloo, a rank that did not come in time; it
                is named. With NCCL it is named in the log, and the GPU goes on waiting.
            ContractError: an expert's parameter has `requires_grad` in one slot and not in another.
        """
        mover = self._mover
        mover.finish()
        slots = self._slots()
        is_remote = any(mover.rank_of(home) != mover.rank_of(copy) for home, copy in self._replicas)
        gradients = slot_gradients(
            slots,
            self._rank,
            self.placement.num_ranks,
            self._exchange if is_remote else None,
            are_alike,
        )
        moves, residents = [], self.placement.num_resident_slots
        for home, replica in self._replicas:
            row = mover.rank_of(replica) * residents + mover.local(replica)
            at_home = mover.rank_of(home) * residents + mover.local(home)
            of_both = zip(slots.items(), gradients[row], gradients[at_home], strict=True)
            for (name, copies), (dtype, is_trained), (_, is_trained_at_home) in of_both:
                if is_trained != is_trained_at_home and not are_alike:
                    raise ContractError(
                        f"parameter {name} has requires_grad={is_trained_at_home} in slot {home}, "
                        f"and {is_trained} in slot {replica}, which holds the same expert"
                    )
                if dtype is not None:
                    moves.append(Move(replica, home, copies, dtype))
                    if mover.is_here(home):
                        copies[mover.local(home)].start_gradient()

        def reduce() -> None:
            for home, gradient in mover.send(mover.pack("gradient", moves)):
                total = home.gradient
                assert total is not None, "a home's gradient that was started is gone"
                total.add_(gradient)
            for move in moves:
                if mover.is_here(move.source):
                    spent = move.slots[mover.local(move.source)].gradient
                    assert spent is not None, "a gradient announced to its home is gone"
                    spent.zero_()

        transfer = mover.run(reduce, self._all_slots, async_op)
        self.mark_stale()
        return transfer

    @property
    def is_valid(self) -> bool:
        """Whether the replicas' weights are known to equal the home's; local, no communication.

        True from `copy_weights` or `mark_valid` until `reduce_gradients`, or until a change on
        this rank of an expert that has several copies. With `async_op`, true from when the
        transfer is waited for.

        These changes are noticed: in-place operations that autograd counts (`load_state_dict`, most
        optimizers), a step of any `torch.optim.Optimizer` that holds the parameter, and replaced
        parameters.

        Call `mark_stale` or `copy_weights` after other changes. These are collectives of
        `torch.distributed` on a weight, replays of a CUDA graph, and writes through `.data` or a
        flat buffer behind the parameter.

        While FSDP2 has gathered the parameters for a forward pass, the sharded ones count.

        Always True for a placement of one copy per expert.
        """
        return not self._replicas or (self._mover.pending is None and self._watch.is_intact)

    def mark_valid(self) -> None:
        """Declares that the replicas equal the home weights now, as an engine has filled them.

        Not within a forward pass under FSDP2.
        """
        self._reshard()
        self._watch.mark()

    def mark_stale(self) -> None:
        """Declares that home weights changed; `is_valid` is False until the next copy."""
        self._watch.clear()

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """The parameters to give to an optimizer, so that it sees each logical expert once.

        Of a list of modules these are the parameters of home slots only; none on a rank without
        a home. Of a stacked module they are the stacked parameters, rows of replicas included.

        The gradient of those rows is zero after `reduce_gradients`, but weight decay still
        shrinks them, and momentum of a weight decay still moves them. Each moves as its own row of
        the optimizer's state, without touching a home's row. That is harmless: nothing reads a
        replica's row before `copy_weights` writes the home's values over it.

        This is true of optimizers that treat elements one by one (SGD, Adam, AdamW). Others take a
        norm over a whole tensor (LAMB, Adafactor, Muon), which mixes the rows of a stack, replicas'
        among them. Give those a list of modules.
        """
        slots = self._slots()
        parameters = (
            copies[slot].parameter for _, slot in self._homes for copies in slots.values()
        )
        return list(dict.fromkeys(parameters))

    def state_dict(self) -> dict[str, Tensor]:
        """The logical experts whose home is on this rank.

        Returns:
            `{"{expert}.{parameter name}": tensor}`. Keys are unique over the ranks and do not
            name slots. So `torch.distributed.checkpoint` stores them, and loads them into any
            other placement, by name; so does merging the dicts of all ranks. The tensors share
            the parameters' memory, as PyTorch's do. `torch.save` writes the whole storage of a
            tensor, for a stacked module all of its rows: clone the values first.
        """
        slots = self._slots()
        return {
            f"{expert}.{name}": copies[slot].weight.detach()
            for expert, slot in self._homes
            for name, copies in slots.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the experts whose home is on this rank and leaves the replicas stale. Local.

        Call `copy_weights()`, which is collective, once every rank has loaded.

        Args:
            state: the merged `state_dict` of the ranks of any placement of the same experts. It has
                at least the experts whose home is on this rank; others are not read. Values are
                converted to the parameters' dtype and device.

        Raises:
            ValueError: names the keys that are missing, of another shape, or not a parameter of
                any expert; nothing is loaded then.
        """
        own = self.state_dict()
        missing = [key for key in own if key not in state]
        misshapen = [
            f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ]
        names = self._slots()
        known = {f"{e}.{name}" for e in range(self.placement.num_experts) for name in names}
        unknown = [key for key in state if key not in known]
        problems = [
            f"{what} {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
            for what, keys in (("lacks", missing), ("has", misshapen), ("has unknown", unknown))
            if keys
        ]
        if problems:
            raise ValueError(f"state does not fit these experts: it {'; it '.join(problems)}")
        self._mover.finish()
        self.mark_stale()
        for key, value in own.items():
            value.copy_(state[key])

    def _reshard(self) -> None:
        """Has FSDP2 put its sharded parameters back where a forward pass left gathered ones.

        It does so before it gives a module's state. Modules without such a hook are not asked:
        making their state may take long.
        """
        for module in self.experts.modules():
            if module._state_dict_pre_hooks:
                module.state_dict(keep_vars=True)

    def _slots(self) -> dict[str, list[Slot]]:
        self._reshard()
        return slots_of(self.experts, self.placement.num_resident_slots)

    def _all_slots(self) -> Iterable[Slot]:
        return (copy for copies in self._slots().values() for copy in copies)

    def _weight_moves(self, pairs: Sequence[tuple[int, int]]) -> list[Move]:
        slots = self._slots().values()
        return [Move(*pair, copies, copies[0].weight.dtype) for pair in pairs for copies in slots]


class Change:
    """Other replicas of a layer, which are not in force yet: made by `Replicas.prepare`.

    Homes stay, and with them the optimizer's state. `fetch` writes no weight, and `commit` never
    fails. So ranks may agree in between that all of them are ready.
    """

    def __init__(self, replicas: Replicas, placement: Placement, payload: Payload) -> None:
        self._replicas, self._placement, self._payload = replicas, placement, payload
        self._fetched: list[tuple[Movable, Tensor]] | None = None
        self.is_valid = replicas.is_valid
        """Whether the weights of all other replicas here equal their homes'."""

    def fetch(self) -> None:
        """Fetches the weights of new replicas. Collective."""
        self._fetched = self._replicas._mover.send(self._payload)

    @torch.no_grad()
    def commit(self) -> None:
        """Puts the placement in force in the layer. Local.

        The replicas are valid if they all were and the weights were fetched, else stale.
        """
        replicas = self._replicas
        for slot, weight in self._fetched or ():
            slot.weight.copy_(weight)
        replicas.layer.replace(self._placement)
        replicas._set_copies(self._placement)
        if self._fetched is not None and self.is_valid:
            replicas.mark_valid()


def _pairs(placement: Placement) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of slots of all ranks, by expert and column of logical_to_physical.

    A rank receives weights once: further copies there take them from the first.

    Returns:
        (home, replica) of each replica, and (where its weights come from, replica).
    """
    replicas, sources = [], []
    for slots_of_expert in placement.logical_to_physical.tolist():
        home, *copies = (slot for slot in slots_of_expert if slot >= 0)
        first = {home // placement.num_local_slots: home}
        for slot in copies:
            source = first.setdefault(slot // placement.num_local_slots, slot)
            sources.append((home if source == slot else source, slot))
            replicas.append((home, slot))
    return replicas, sources


def _agree(
    experts: nn.Module,
    target: Layer | Placement,
    group: dist.ProcessGroup | None,
    transport: str,
) -> Layer:
    """Checks the arguments of `Replicas`, on this rank and between ranks. Collective.

    Returns:
        The layer.
    """
    size = 1 if group is None else group.size()
    with together(group, "Replicas") as facts:
        layer = layer_of(target)
        placement = layer.placement
        if group is None and placement.num_ranks > 1:
            raise ValueError(
                f"group must be given: the placement has {placement.num_ranks} ranks, and None "
                "stands for a single one"
            )
        facts.update(placement=placement.fingerprint(), transport=transport)
        if transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}; got {transport!r}")
        if size != placement.num_ranks:
            raise ValueError(
                f"group must have the placement's {placement.num_ranks} ranks, got {size}"
            )
        slots = slots_of(experts, placement.num_resident_slots)
        own = placement.physical_to_logical.reshape(size, -1)[0 if group is None else group.rank()]
        held = [n for n, expert in enumerate(own) if expert >= 0] or [0]
        trained = trained_of({name: [of_name[n] for n in held] for name, of_name in slots.items()})
        for name, of_name in slots.items():
            facts[f"parameter {name}"] = describe(of_name[0].weight)
            facts[f"parameter {name} is trained"] = trained[name]
        refuse_state_outside_parameters(experts)
    return layer
