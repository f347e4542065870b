"""Weights of replicas kept equal to their home's, gradients of replicas summed into the home's.

A replica is a second place to compute the same expert, so a run with replicas is the run with
everything at home, up to the order of summation, as long as two things hold: whenever tokens go
to a replica its weights equal the home's, and before the optimizer steps the home's gradient holds
what every copy contributed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..comm.alltoall import TRANSPORTS, Table, connect
from ..comm.collectives import gather_rows, memory_of, together
from ..errors import ContractError, RankError
from ..layer import Layer, layer_of
from ..placement.table import Placement

# How ranks tell one another what they will send: 0 is "no gradient", i + 1 this list's entry i.
_GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REFUSED = 255

_live: weakref.WeakSet[Replicas] = weakref.WeakSet()  # for the hooks on optimizers
_watchers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # Module -> WeakSet of Replicas of its own


def slot_parameters(experts: nn.Module, num_local_slots: int) -> dict[str, list[Tensor]]:
    """The parameters of a rank's slots, by name and slot.

    Args:
        experts: an `nn.ModuleList` of P / R expert modules whose parameters have the same names,
            shapes and dtypes, or any other module whose every parameter is stacked: leading
            dimension P / R, row i belonging to local slot i. A `DTensor` counts by its local part.
        num_local_slots: P / R.

    Returns:
        For each parameter name, in alphabetical order, P / R tensors that share the parameters'
        memory: the parameters themselves for a list of modules, detached rows of them for a
        stacked module.

    Raises:
        ValueError: the module does not have these slots; names the parameter, what was expected
            and what it has.
    """
    return {
        name: [slot.weight for slot in slots]
        for name, slots in _slots(experts, num_local_slots).items()
    }


class Replicas:
    """The replicas of one layer's experts: their weights, gradients, version and checkpoints.

    A training step is: forward and backward of every micro-batch, `reduce_gradients()`, the
    data-parallel reduction and clipping, `optimizer.step()`, `copy_weights()`. The optimizer gets
    `optimizer_parameters()`, a checkpoint `state_dict()`.

    Construction, `copy_weights` and `reduce_gradients` are collective: every rank of the group
    calls them, in the same order. Everything else is local. Replicas start out stale.

    Slots that hold no expert (-1) are left alone. The module must keep its submodules; parameters
    may be replaced (`.to()`, `load_state_dict(assign=True)`), which makes the replicas stale.

    Args:
        experts: this rank's P / R slots, in one of the two forms that `slot_parameters` takes.
            Persistent buffers are refused: what a forward pass may change (running statistics of
            BatchNorm) cannot be kept equal by copying after the optimizer's step. A constant is
            a buffer with `persistent=False`, which is neither copied nor checkpointed; a weight
            that is not trained is a parameter with `requires_grad=False`.
        target: the layer, or the placement object that stands for one; its placement in force
            counts.
        group: the expert-parallel group, of `placement.num_ranks` ranks, whose rank r holds the
            placement's rank r. None only where the placement has one rank.
        transport: how weights and gradients travel: "peers", by copies into the other GPUs' memory
            (one node, CuPy); "torch", by collectives of `torch.distributed`, with gloo through the
            CPU; or "auto": the first of them that can be.

    Attributes:
        num_bytes_sent: of weights and gradients, from this rank to others so far.

    Raises:
        ValueError: the module does not fit the placement (see `slot_parameters`), has persistent
            buffers or parameters made under `torch.inference_mode`, or the group has not the
            placement's number of ranks, or the transport cannot be.
        RankError: ranks differ in placement or in parameter names, shapes or dtypes, or some
            refused their module; the message names the ranks.
    """

    def __init__(
        self,
        experts: nn.Module,
        target: Layer | Placement,
        group: dist.ProcessGroup | None = None,
        transport: str = "auto",
    ) -> None:
        self.layer = layer_of(target)
        placement = self.layer.placement
        _agree(experts, placement, group, transport)
        self.experts = experts
        self.placement = placement
        self.group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        self._wire = connect(group, next(experts.parameters()).device, transport)
        self.num_bytes_sent = 0
        self._under_way: Transfer | None = None
        self._homes = [  # (expert, local slot) of the homes on this rank
            (expert, self._local(slot))
            for expert, slot in enumerate(placement.home.tolist())
            if self._rank_of(slot) == self._rank
        ]
        self._replicas, self._sources = _pairs(placement)

        # Where each parameter hangs, so that `is_valid` sees a parameter that was replaced.
        self._owners: list[tuple[Mapping[str, Any], str]] = []
        for module in experts.modules():
            for name, _ in module.named_parameters(recurse=False):
                self._owners.append((module._parameters, name))
                _watchers.setdefault(module, weakref.WeakSet()).add(self)
        # What they were when the replicas were last valid: parameter, its local part (held, so
        # that no other gets its memory), its version.
        self._seen: list[tuple[Tensor, Tensor, tuple[int, int, int]]] | None = None
        _live.add(self)
        self.layer.watch(self)
        _watch()

    def copy_weights(self, *, async_op: bool = False) -> Transfer | None:
        """Copies the home weights to all replicas, which are then valid. Collective.

        Call it after `optimizer.step()` and after loading, not between a forward pass and its
        backward: writing a weight that autograd has saved is an error there.

        Args:
            async_op: overlap it with what the current stream does next, which must neither write
                nor use these experts before it has waited for what is returned; until then tokens
                go home.

        Returns:
            What is to be waited for; None without `async_op`.
        """
        self._finish()
        self._seen = None

        def copy() -> None:
            moves = self._weights_of(self._sources)
            for replica, weight in self._send(self._pack("weight", moves)):
                replica.weight.copy_(weight)

        transfer = self._run(copy, async_op)
        self.mark_valid()
        return transfer

    @torch.no_grad()
    def prepare(self, placement: Placement) -> Change:
        """Makes ready for other replicas of this layer (`Placement.with_copies`). Local.

        Raises:
            ValueError: the placement is not of this layer.
            ContractError: a slot that would change has a gradient that is not reduced.
        """
        if not placement.may_replace(self.placement):
            raise ValueError(f"{placement} is not one of these replicas' layer: use with_copies")
        self._finish()
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
        moves = [pair for pair in _pairs(placement)[1] if changed[pair[1]]]
        return Change(self, placement, self._pack("weight", self._weights_of(moves)))

    @torch.no_grad()
    def reduce_gradients(self, *, async_op: bool = False) -> Transfer | None:
        """Adds the replicas' gradients to their home's and zeroes them. Collective.

        Call it once per step, after the last micro-batch's backward and before the data-parallel
        reduction, unscaling and clipping. An optimizer's step is next, and not all of them can be
        seen, so the replicas are stale from here until `copy_weights`.

        The gradient is `parameter.main_grad` where that is set (Megatron-Core), else
        `parameter.grad`. A replica's gradient travels in its own dtype; the home's keeps its dtype
        and adds the replicas one by one, by column of `logical_to_physical`, so the result is the
        same bits in every run. None counts as zero,
        and the home's gradient stays None where that of every copy is. (Whose is None the ranks
        tell one another in a small message that the CPU waits for.)

        Args:
            async_op: overlap it with what the current stream does next, which must leave these
                experts' gradients alone before it has waited for what is returned.

        Returns:
            What is to be waited for; None without `async_op`.

        Raises:
            ValueError: a gradient is of a dtype other than float32, bfloat16, float16, float64, or
                not of its weight's shape.
            RankError: that is so on another rank.
        """
        self._finish()
        slots = self._slots()
        dtypes = self._gradient_dtypes(slots)
        moves = [
            _Move(replica, home, copies, dtype)
            for home, replica in self._replicas
            for copies, dtype in zip(slots.values(), dtypes[replica], strict=True)
            if dtype is not None
        ]
        for move in moves:
            if self._rank_of(move.target) == self._rank:
                move.slots[self._local(move.target)].start_gradient()

        def reduce() -> None:
            for home, gradient in self._send(self._pack("gradient", moves)):
                total = home.gradient
                assert total is not None, "a home's gradient that was started is gone"
                total.add_(gradient)
            for move in moves:
                if self._rank_of(move.source) == self._rank:
                    spent = move.slots[self._local(move.source)].gradient
                    assert spent is not None, "a gradient announced to its home is gone"
                    spent.zero_()

        transfer = self._run(reduce, async_op)
        self.mark_stale()
        return transfer

    @property
    def is_valid(self) -> bool:
        """Whether the replicas' weights are known to equal the home's; local, no communication.

        True from `copy_weights` (with `async_op`, from when it is waited for) or `mark_valid` until
        `reduce_gradients`, or until a parameter of
        this rank changes: by an in-place operation that autograd counts (`load_state_dict`, most
        optimizers), by the step of any `torch.optim.Optimizer` that holds it, or by being
        replaced. What none of these shows must be followed by `mark_stale` or `copy_weights`:
        collectives of `torch.distributed` on a weight, writes through `.data` or through a buffer
        that the parameter is a view of, and replays of a CUDA graph.

        While FSDP2 has gathered the parameters for a forward pass, the sharded ones count.

        Always True for a placement of one copy per expert.
        """
        if not self._replicas:
            return True
        return (
            self._under_way is None
            and self._seen is not None
            and all(
                _stands_for(parameters.get(name), parameter) and _version(parameter) == version
                for (parameters, name), (parameter, _, version) in zip(
                    self._owners, self._seen, strict=True
                )
            )
        )

    def mark_valid(self) -> None:
        """Says that the replicas equal the home weights as they are now (an engine fills them).

        Not within a forward pass under FSDP2.
        """
        self._reshard()
        current = [parameters[name] for parameters, name in self._owners]
        self._seen = [(parameter, _local(parameter), _version(parameter)) for parameter in current]

    def mark_stale(self) -> None:
        """Declares that home weights changed; `is_valid` is False until the next copy."""
        self._seen = None

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """The parameters to give to an optimizer, so that it sees each logical expert once.

        Of a list of modules these are the parameters of home slots only; none on a rank without
        a home. Of a stacked module they are the stacked parameters, rows of replicas included.
        The gradient of those rows is zero after `reduce_gradients`, but weight decay still
        shrinks them and momentum of a weight decay still moves them, each as its own row of the
        optimizer's state, without touching a home's row. That is harmless: `copy_weights` writes
        the home's values over whatever a replica's row became, and nothing reads it in between.
        It holds for optimizers that treat elements one by one (SGD, Adam, AdamW); one that takes
        a norm over a whole tensor (LAMB, Adafactor, Muon) mixes the rows of a stack, replicas'
        among them: give it a list of modules.
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
            name slots, so `torch.distributed.checkpoint` stores them, and loads them into any
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
        """Loads the experts whose home is here and leaves the replicas stale. Local.

        Call `copy_weights()`, which is collective, once every rank has loaded.

        Args:
            state: what `state_dict` gave on the ranks of any placement of the same experts,
                merged; at least the experts whose home is here, the others are not read. Values
                are converted to the parameters' dtype and device.

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
        self._finish()
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

    def _slots(self) -> dict[str, list[_Slot]]:
        self._reshard()
        return _slots(self.experts, self.placement.num_local_slots)

    def _weights_of(self, pairs: Sequence[tuple[int, int]]) -> list[_Move]:
        slots = self._slots().values()
        return [_Move(*pair, copies, copies[0].weight.dtype) for pair in pairs for copies in slots]

    def _rank_of(self, slot: int) -> int:
        return slot // self.placement.num_local_slots

    def _local(self, slot: int) -> int:
        return slot % self.placement.num_local_slots

    def _finish(self) -> None:
        """Has the current stream wait for what is under way."""
        if self._under_way is not None:
            self._under_way.wait()

    @torch.no_grad()
    def _run(self, work: Callable[[], None], async_op: bool) -> Transfer | None:
        """Does `work` on the current stream; or on one beside it, behind what it has to do now."""
        if not async_op:
            work()
            return None
        side, done = self._wire.stream, None
        if side is None:
            work()
        else:
            side.wait_stream(torch.cuda.current_stream(side.device))
            for copy in (copy for copies in self._slots().values() for copy in copies):
                for tensor in (copy.weight, copy.gradient):
                    if tensor is not None and tensor.is_cuda:
                        tensor.record_stream(side)  # its memory stays its own, if it is dropped
            with torch.cuda.stream(side):
                work()
                done = side.record_event()
        self._under_way = Transfer(self, done)
        return self._under_way

    def _gradient_dtypes(self, slots: dict[str, list[_Slot]]) -> list[list[torch.dtype | None]]:
        """[P][number of parameters]: the dtype of each slot's gradients, None where it has none.

        What no replica on another rank needs may be missing: without any, nothing is gathered.
        """
        P = self.placement.num_physical_experts
        own = torch.zeros(self.placement.num_local_slots, len(slots), dtype=torch.uint8)
        refusal = None
        for index, (name, copies) in enumerate(slots.items()):
            for slot, copy in enumerate(copies):
                gradient = copy.gradient
                if gradient is None:
                    continue
                if gradient.dtype not in _GRADIENT_DTYPES or gradient.shape != copy.weight.shape:
                    refusal = ValueError(
                        f"the gradient of parameter {name} is {_describe(gradient)}, expected "
                        f"{list(copy.weight.shape)} of one of "
                        f"{', '.join(str(d).removeprefix('torch.') for d in _GRADIENT_DTYPES)}"
                    )
                    continue
                own[slot, index] = 1 + _GRADIENT_DTYPES.index(gradient.dtype)
        if refusal is not None:  # told to the others, which would wait
            own.fill_(_REFUSED)
        codes = torch.zeros(self.placement.num_ranks, *own.shape, dtype=torch.uint8)
        codes[self._rank] = own
        if self.group is not None and any(
            self._rank_of(home) != self._rank_of(replica) for home, replica in self._replicas
        ):
            codes = gather_rows(own.to(memory_of(self.group)), self.group).cpu()
        if refusal is not None:
            raise refusal
        refused = torch.nonzero((codes == _REFUSED).flatten(1).any(1)).flatten().tolist()
        if refused:
            raise RankError(f"ranks {refused} refused their gradients; see their errors")
        return [
            [_GRADIENT_DTYPES[code - 1] if code else None for code in slot]
            for slot in codes.view(P, len(slots)).tolist()
        ]

    def _pack(self, what: str, moves: Sequence[_Move]) -> _Cargo:
        """What `_send` needs to bring the weights or gradients of slots to other slots. Local.

        Args:
            what: "weight" or "gradient".
            moves: those of all ranks, the same on every rank.
        """
        here, num_ranks = self._rank, self.placement.num_ranks
        cargo = _Cargo(moves, {}, [])
        crossing: dict[torch.dtype, list[int]] = {}
        for index, move in enumerate(moves):
            if self._rank_of(move.source) != self._rank_of(move.target):
                crossing.setdefault(move.dtype, []).append(index)
            elif self._rank_of(move.target) == here:
                cargo.here[index] = getattr(move.slots[self._local(move.source)], what)

        for dtype in sorted(crossing, key=str):
            # For each rank in the order of the moves; as bytes, because back ends lack some
            # dtypes: gloo bfloat16, all of them float8.
            leaving: list[list[Tensor]] = [[] for _ in range(num_ranks)]
            arriving: list[list[int]] = [[] for _ in range(num_ranks)]
            table = [[0] * num_ranks for _ in range(num_ranks)]
            for index in crossing[dtype]:
                source, target, slots, _ = moves[index]
                sender, receiver = self._rank_of(source), self._rank_of(target)
                table[sender][receiver] += slots[0].weight.numel() * dtype.itemsize
                if sender == here:
                    tensor = getattr(slots[self._local(source)], what).contiguous()
                    leaving[receiver].append(tensor.reshape(-1).view(torch.uint8))
                elif receiver == here:
                    arriving[sender].append(index)
            flat = [tensor for of_rank in leaving for tensor in of_rank]
            size = sum(row[here] for row in table)
            received = torch.empty(size, dtype=torch.uint8, device=self._wire.device)
            sent = torch.cat(flat).to(received.device) if flat else received.new_empty(0)
            indices = [index for of_rank in arriving for index in of_rank]
            cargo.messages.append(_Message(received, sent, table, indices))
        return cargo

    def _send(self, cargo: _Cargo) -> list[tuple[_Slot, Tensor]]:
        """Sends and receives, with one all-to-all per dtype, on the current stream. Collective.

        Returns:
            For each move to this rank, in order: where it goes, and the tensor. One that was here
            all along is not a copy and shows what is written to its slot meanwhile.
        """
        for received, sent, table, _ in cargo.messages:
            self._wire.all_to_all(received, sent, table)
            self.num_bytes_sent += sent.numel()
        # Only now what needs memory: a rank that has none would leave the others in a transfer.
        tensors = dict(cargo.here)
        for received, _, _, indices in cargo.messages:
            like = [cargo.moves[index].slots[0].weight for index in indices]
            dtypes = [cargo.moves[index].dtype for index in indices]
            lengths = [w.numel() * d.itemsize for w, d in zip(like, dtypes, strict=True)]
            for part, index, weight, dtype in zip(
                received.split(lengths), indices, like, dtypes, strict=True
            ):
                tensors[index] = part.view(dtype).view(weight.shape).to(weight.device)
        return [
            (cargo.moves[index].slots[self._local(cargo.moves[index].target)], tensors[index])
            for index in sorted(tensors)
        ]


class Transfer:
    """Weights or gradients that are under way on a stream of their own."""

    def __init__(self, replicas: Replicas, done: torch.cuda.Event | None) -> None:
        self._replicas, self._done = replicas, done

    def wait(self) -> None:
        """Has the current stream wait for them. The CPU does not wait."""
        if self._done is not None:
            torch.cuda.current_stream(self._replicas._wire.device).wait_event(self._done)
        if self._replicas._under_way is self:
            self._replicas._under_way = None


class Change:
    """Other replicas of a layer, of which nothing is in force yet: made by `Replicas.prepare`.

    Homes stay, and with them the optimizer's state. `fetch` writes no weight, and `commit` cannot
    fail, so ranks may agree in between that all of them have what they need.
    """

    def __init__(self, replicas: Replicas, placement: Placement, cargo: _Cargo) -> None:
        self._replicas, self._placement, self._cargo = replicas, placement, cargo
        self._fetched: list[tuple[_Slot, Tensor]] | None = None
        self.is_valid = replicas.is_valid
        """Whether the weights of all other replicas here equal their homes'."""

    def fetch(self) -> None:
        """Brings the weights of the replicas that are new. Collective."""
        self._fetched = self._replicas._send(self._cargo)

    @torch.no_grad()
    def commit(self) -> None:
        """Puts the placement in force here. Local. The replicas are valid if they all were and
        the weights were fetched, else stale."""
        replicas = self._replicas
        for slot, weight in self._fetched or ():
            slot.weight.copy_(weight)
        replicas.placement = self._placement
        replicas._replicas, replicas._sources = _pairs(self._placement)
        if self._fetched is not None and self.is_valid:
            replicas.mark_valid()
        else:
            replicas.mark_stale()


def mark_valid(target: Layer | Placement) -> None:
    """Declares that a layer's replicas equal their homes: `Layer.mark_valid`."""
    layer_of(target).mark_valid()


def mark_stale(target: Layer | Placement) -> None:
    """Takes `mark_valid` back: `Layer.mark_stale`."""
    layer_of(target).mark_stale()


@dataclass(frozen=True)
class _Slot:
    """One parameter of one local slot: a parameter of its own, or a row of a stacked one."""

    parameter: nn.Parameter
    row: int | None

    def _part(self, tensor: Tensor) -> Tensor:
        tensor = _local(tensor)
        return tensor if self.row is None else tensor[self.row]

    @property
    def weight(self) -> Tensor:
        return self._part(self.parameter if self.row is None else self.parameter.detach())

    @property
    def gradient(self) -> Tensor | None:
        main_grad = getattr(self.parameter, "main_grad", None)
        gradient = self.parameter.grad if main_grad is None else main_grad
        return None if gradient is None else self._part(gradient)

    def start_gradient(self) -> None:
        """Makes one of zeros where there is none."""
        if self.gradient is None:
            dtype = getattr(self.parameter, "grad_dtype", None)  # where it differs from its own
            self.parameter.grad = torch.zeros_like(self.parameter, dtype=dtype)


class _Move(NamedTuple):
    """One parameter's weight or gradient, from one slot to another copy's."""

    source: int
    target: int
    slots: list[_Slot]  # of this rank, for this parameter
    dtype: torch.dtype  # of what is moved


class _Message(NamedTuple):
    """One all-to-all, as bytes."""

    received: Tensor
    sent: Tensor
    table: Table
    indices: list[int]  # of the moves that arrive, in order


class _Cargo(NamedTuple):
    """Moves, and what they need."""

    moves: Sequence[_Move]
    here: dict[int, Tensor]  # by the index of the move: on this rank already
    messages: list[_Message]


def _pairs(placement: Placement) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of slots of all ranks, by expert and column of logical_to_physical: (home, replica),
    and (where its weights come from, replica). Weights come to a rank once: further copies there
    take them from the first."""
    replicas, sources = [], []
    for slots_of_expert in placement.logical_to_physical.tolist():
        home, *copies = (slot for slot in slots_of_expert if slot >= 0)
        first = {home // placement.num_local_slots: home}
        for slot in copies:
            source = first.setdefault(slot // placement.num_local_slots, slot)
            sources.append((home if source == slot else source, slot))
            replicas.append((home, slot))
    return replicas, sources


def _slots(experts: nn.Module, num_local_slots: int) -> dict[str, list[_Slot]]:
    """`slot_parameters`, with the parameters behind the views."""
    if not isinstance(experts, nn.Module):
        raise TypeError(f"experts must be a module; got a {type(experts).__name__}")
    if not isinstance(experts, nn.ModuleList):
        stacked = dict(sorted(experts.named_parameters()))
        if not stacked:
            raise ValueError("experts must have parameters, got none")
        for name, parameter in stacked.items():
            shape = list(_local(parameter).shape)
            if shape[:1] != [num_local_slots]:
                hint = (
                    "; let FSDP2 shard another dimension" if hasattr(parameter, "to_local") else ""
                )
                raise ValueError(
                    f"parameter {name} must have leading dimension {num_local_slots}, one row per "
                    f"slot of this rank, got shape {shape}{hint}"
                )
        return {
            name: [_Slot(parameter, row) for row in range(num_local_slots)]
            for name, parameter in stacked.items()
        }

    if len(experts) != num_local_slots:
        raise ValueError(
            f"experts must be {num_local_slots} modules, one per slot of this rank, got "
            f"{len(experts)}"
        )
    slots = [dict(sorted(expert.named_parameters())) for expert in experts]
    if not slots[0]:
        raise ValueError("experts must have parameters, got none")
    seen: set[int] = set()
    for number, parameters in enumerate(slots):
        for name in sorted({*slots[0], *parameters}):
            want, got = (
                _describe(of[name]) if name in of else "absent" for of in (slots[0], parameters)
            )
            if want != got:
                raise ValueError(
                    f"parameter {name} of slot {number} is {got}, expected {want} as in slot 0"
                )
            if id(parameters[name]) in seen:
                raise ValueError(
                    f"parameter {name} of slot {number} is shared with another slot, expected "
                    "each slot to have its own"
                )
        seen.update(map(id, parameters.values()))
    return {name: [_Slot(parameters[name], None) for parameters in slots] for name in slots[0]}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a `DTensor`, which shares its memory; any other tensor itself."""
    if hasattr(tensor, "to_local"):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def _stands_for(registered: Tensor | None, parameter: Tensor) -> bool:
    """Whether a module in which `registered` is found has `parameter` as its weight.

    For forward and backward FSDP2 takes its sharded parameter out of the module and puts the
    gathered one in, past registration. What replaces a `DTensor` for good registers another,
    which `_registered` sees, or gives it other contents (`.to()`), which `_version` sees.
    """
    return registered is parameter or (
        hasattr(parameter, "to_local") and isinstance(registered, nn.Parameter)
    )


def _version(parameter: Tensor) -> tuple[int, int, int]:
    """Changes with every write that autograd counts, and with the memory (`.data = ...`).

    A `DTensor` counts its own operations, and its local part those on it.
    """
    local = _local(parameter)
    return parameter._version, local._version, local.data_ptr()


def _describe(tensor: Tensor) -> str:
    return f"{list(_local(tensor).shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _refuse_state_outside_parameters(experts: nn.Module) -> None:
    persistent = experts.state_dict(keep_vars=True)
    for name, _ in experts.named_buffers():
        if name in persistent:
            raise ValueError(
                f"experts must have no persistent buffers, got {name}: make it a parameter with "
                "requires_grad=False if it is a weight, or non-persistent if it is a constant"
            )
    for name, parameter in experts.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"parameter {name} was made under torch.inference_mode and has no version to "
                "watch; make the module outside of it"
            )


def _agree(
    experts: nn.Module, placement: Placement, group: dist.ProcessGroup | None, transport: str
) -> None:
    """Checks what `Replicas` is given, on this rank and between ranks."""
    if group is None and placement.num_ranks > 1:
        raise ValueError(
            f"group must be given: the placement has {placement.num_ranks} ranks, and None stands "
            "for a single one"
        )
    size = 1 if group is None else group.size()
    with together(group, "Replicas") as facts:
        facts.update(placement=placement.fingerprint(), transport=transport)
        if transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}; got {transport!r}")
        if size != placement.num_ranks:
            raise ValueError(
                f"group must have the placement's {placement.num_ranks} ranks, got {size}"
            )
        _refuse_state_outside_parameters(experts)
        for name, copies in _slots(experts, placement.num_local_slots).items():
            facts[f"parameter {name}"] = _describe(copies[0].weight)


@functools.cache
def _watch() -> None:
    """Sees what may leave no trace: steps of fused optimizers, replaced parameters of FSDP2."""
    register_optimizer_step_post_hook(_stepped)
    register_module_parameter_registration_hook(_registered)


def _stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for replicas in list(_live):
        if any(id(parameter) in stepped for parameter, _, _ in replicas._seen or ()):
            replicas.mark_stale()


def _registered(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    for replicas in list(_watchers.get(module, ())):
        replicas.mark_stale()
