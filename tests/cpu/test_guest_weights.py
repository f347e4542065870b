"""Weights and gradients of guests on gloo ranks, moved by hand: nothing is planned."""

from __future__ import annotations

import copy
import pickle
import re
from unittest.mock import Mock, patch

import numpy as np
import pytest
import ranks
import torch
from experts import FORMS, SHAPES, make_experts, same_bits, value
from torch import nn
from torch.utils.checkpoint import checkpoint

from lplb_ep import ContractError, GuestPool, Guests, Layer, Placement, RankError
from lplb_ep.weights import guest_gradients

E_PER_RANK, G = 2, 2


def placed(num_ranks: int) -> Layer:
    """E / R homes and two guest slots a rank."""
    num_experts = E_PER_RANK * num_ranks
    return Layer(Placement.homes_only(num_experts, num_ranks, num_guests_per_rank=G))


def table(num_ranks: int, seed: int) -> torch.Tensor:
    """[R, G] guests of other ranks, some slots empty."""
    rng, guests = np.random.default_rng(seed), np.full((num_ranks, G), -1)
    for rank in range(num_ranks):
        others = [e for e in range(E_PER_RANK * num_ranks) if e // E_PER_RANK != rank]
        guests[rank] = rng.choice(others, G, replace=False)
    guests[rng.random(guests.shape) < 0.2] = -1
    return torch.tensor(guests, dtype=torch.int32)


def slots_of_rank(rank: int, guests: torch.Tensor) -> list[int]:
    """The expert in each local slot."""
    return [*range(rank * E_PER_RANK, (rank + 1) * E_PER_RANK), *guests[rank].tolist()]


def rows_of(expert: int, rank: int, batch: int, guests: torch.Tensor) -> torch.Tensor:
    """The rows of an expert that a rank gets: its copies take turns, an odd expert's home none."""
    home = expert // E_PER_RANK
    copies = [r for r in range(len(guests)) if expert in guests[r]]
    if expert % 2 == 0 or not copies:
        copies = [home, *copies]
    rows = value("tokens", 100 * batch + expert, "")
    return rows[copies.index(rank) :: len(copies)] if rank in copies else rows[:0]


def run_expert(weights: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    return torch.tanh(rows @ weights["up"]) @ weights["down.weight"] * weights["gain"]


class Batch:
    """What a rank computes of a batch."""

    def __init__(self, layer_guests: Guests, number: int, seed: int, dtype=torch.float64):
        self.of, self.number, self.rank = layer_guests, number, layer_guests.group.rank()
        self.table = table(layer_guests.group.size(), seed)
        experts = slots_of_rank(self.rank, self.table)
        rows = [
            rows_of(e, self.rank, number, self.table) if e >= 0 else torch.zeros(0, 3).double()
            for e in experts
        ]
        self.sizes = [len(r) for r in rows]
        self.x = torch.cat(rows).to(dtype).requires_grad_()

    def dispatch(self, slot: int = 0) -> None:
        """As the hooks do it."""
        self.slot = slot
        self.of.prepare(slot)
        self.stay = self.of.push(self.table, slot)
        self.of.wait(slot)

    def dispatch_again(self) -> None:
        self.of.push_again(self.stay, self.slot)
        self.of.wait(self.slot)

    def experts(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(*self.of.weights(x, self.slot))

    def compute(self, x: torch.Tensor, weights: dict) -> torch.Tensor:
        """Slots without rows are skipped, as many programs do."""
        out = [x * 0]
        for slot, rows in enumerate(x.split(self.sizes)):
            if len(rows):
                guest = slot - E_PER_RANK
                own = {
                    name: guests[guest] if guest >= 0 else residents[slot]
                    for name, (residents, guests) in weights.items()
                }
                out.append(run_expert(own, rows))
        return torch.cat(out).sum()


def expected(expert: int, batches: list[int]) -> dict[str, torch.Tensor]:
    """The gradients of an expert that has all of its rows."""
    weights = {n: value("weight", expert, n).requires_grad_() for n in SHAPES}
    for batch in batches:
        run_expert(weights, value("tokens", 100 * batch + expert, "")).sum().backward()
    return {name: weight.grad for name, weight in weights.items()}


def gradients(experts: nn.Module, slot: int, name: str) -> torch.Tensor:
    parameters, is_list = dict(experts.named_parameters()), isinstance(experts, nn.ModuleList)
    parameter = parameters[f"{slot}.{name}" if is_list else name]
    gradient = getattr(parameter, "main_grad", parameter.grad)
    return gradient if is_list else gradient[slot]


def check_gradients(guests: Guests, batches: list[int], tolerance: float = 1e-9) -> None:
    rank = guests.group.rank()
    for slot in range(E_PER_RANK):
        for name, want in expected(rank * E_PER_RANK + slot, batches).items():
            got = gradients(guests.experts, slot, name)
            error = (got - want).abs().max() / want.abs().max()
            assert error <= tolerance, (slot, name, error)


def made(group, form, dtype=torch.float64, **kwargs) -> Guests:
    layer = placed(group.size())
    experts = make_experts(form, layer.placement.with_guest_slots(0), group.rank(), dtype)
    return Guests(experts, layer, group, **kwargs)


# --- weights --------------------------------------------------------------------------------------


def push_everything(group):
    pools = {}
    for form in FORMS:
        for dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn):
            layer = placed(group.size())
            experts = make_experts(form, layer.placement.with_guest_slots(0), group.rank(), dtype)
            if not pools:  # the largest first: all others share it
                pools[0] = GuestPool(group, G, experts)
            guests = Guests(experts, layer, group, pools[0])
            for seed in range(3):
                batch = Batch(guests, 0, seed, torch.float32)
                batch.dispatch()
                _, weights = guests.weights(batch.x.detach())
                for name, (residents, arrived) in weights.items():
                    assert [len(residents), len(arrived)] == [E_PER_RANK, G]
                    here = slots_of_rank(group.rank(), batch.table)
                    for expert, tensor in zip(here, [*residents, *arrived], strict=True):
                        if expert >= 0:
                            assert same_bits(tensor, value("weight", expert, name, dtype))
            assert not any(key.startswith("guest") for key in experts.state_dict())
            count = E_PER_RANK * len(SHAPES) if form == "list" else len(SHAPES)
            assert len([*experts.parameters()]) == count


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_guests_equal_their_homes_bit_for_bit(num_ranks):
    ranks.run(num_ranks, push_everything)


def call_modules(group):
    guests = made(group, "list")
    batch = Batch(guests, 0, 1)
    batch.dispatch()
    first = guests.experts[0]
    first.forward = lambda rows: run_expert(
        {"up": first.up, "down.weight": first.down.weight, "gain": first.gain}, rows
    )
    _, modules = guests.modules(batch.x)
    assert len(modules) == E_PER_RANK + G
    here = slots_of_rank(group.rank(), batch.table)
    rows = value("tokens", 7, "")
    for expert, module in zip(here[E_PER_RANK:], modules[E_PER_RANK:], strict=True):
        if expert >= 0:
            own = {name: value("weight", expert, name) for name in SHAPES}
            assert torch.equal(module(rows), run_expert(own, rows))


def test_a_guest_of_a_list_is_a_module_with_other_weights():
    ranks.run(2, call_modules)


# --- gradients ------------------------------------------------------------------------------------


def train_once(group, form):
    for seed in range(3):
        guests = made(group, form)
        batch = Batch(guests, seed, seed)
        batch.dispatch()
        batch.experts(batch.x).backward()
        check_gradients(guests, [seed])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gradients_are_those_of_a_run_at_home(num_ranks, form):
    ranks.run(num_ranks, train_once, form)


def train_late(group, form):
    guests, seen = made(group, form), []
    for parameter in guests.experts.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
    for seed in range(2):
        batch = Batch(guests, seed, seed)
        batch.dispatch()
        weights, send = guests.late_weights()
        batch.compute(batch.x, weights).backward()
        assert len(seen) == seed * len([*guests.experts.parameters()])
        send()
        check_gradients(guests, [*range(seed + 1)])
    batch.dispatch()
    weights, send = guests.late_weights()
    batch.compute(batch.x, weights).backward()
    guests.skip()
    Batch(guests, 2, 2).dispatch()
    raises("the pool of guests holds another batch", send)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_may_come_behind_the_backward_pass(form):
    ranks.run(2, train_late, form)


def accumulate_interleaved(group, form):
    """As a pipeline does: two batches forward, the first one's backward, the next one forward."""
    guests, order = made(group, form), []
    outs = {}

    def forward(number):
        batch = Batch(guests, number, number)
        batch.dispatch()
        outs[number] = batch, batch.experts(batch.x)

    def backward(number):
        batch, out = outs.pop(number)
        batch.dispatch_again()
        out.backward()
        order.append(number)

    forward(0), forward(1), backward(0), forward(2), backward(1), backward(2)
    check_gradients(guests, order)


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_may_be_interleaved(form):
    ranks.run(2, accumulate_interleaved, form)


def layers_share(group):
    """Backward in reverse order: only the last layer's guests are still there."""
    layers = [placed(2) for _ in range(3)]
    experts = [
        make_experts("stacked", layer.placement.with_guest_slots(0), group.rank())
        for layer in layers
    ]
    pool = GuestPool(group, G, experts)
    stack = [Guests(e, layer, group, pool) for e, layer in zip(experts, layers, strict=True)]
    batches = [Batch(guests, number, number) for number, guests in enumerate(stack)]
    outs = []
    for batch in batches:
        batch.dispatch()
        outs.append(batch.experts(batch.x))
    calls, push = [], pool.transport.push
    pool.transport.push = lambda *args: (calls.append("push"), push(*args))
    # No plan has shown that slots are free.
    pool.transport.barrier = lambda *given: calls.append("barrier")
    for batch, out in reversed([*zip(batches, outs, strict=True)]):
        batch.dispatch_again()
        out.backward()
    for number, guests in enumerate(stack):
        check_gradients(guests, [number])
    return calls


def test_layers_share_a_pool_and_push_again_where_it_was_used_since():
    assert ranks.run(2, layers_share) == [["barrier", "push"] * 2] * 2


def recompute(group, form, reentrant, where):
    guests = made(group, form)
    batch = Batch(guests, 0, 0)

    def whole(x):
        batch.dispatch()
        return batch.experts(x)

    if where == "outside":
        out = checkpoint(whole, batch.x, use_reentrant=reentrant)
    else:
        batch.dispatch()
        out = checkpoint(batch.experts, batch.x, use_reentrant=reentrant)
    other = Batch(guests, 1, 1)
    other.dispatch()
    other_out = other.experts(other.x)
    batch.dispatch_again()
    out.backward()
    other.dispatch_again()
    other_out.backward()
    check_gradients(guests, [0, 1])


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_activations_may_be_recomputed(form, reentrant, where):
    ranks.run(2, recompute, form, reentrant, where)


def main_gradients(group, form):
    """As Megatron-Core: bfloat16 weights, a hook adds gradients to float32 `main_grad`."""
    guests = made(group, form, torch.bfloat16)
    hooked = []
    for parameter in guests.experts.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)

        def hook(p):
            hooked.append(p)
            p.main_grad.add_(p.grad)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(hook)
    batches = [0, 1]
    for number in batches:
        batch = Batch(guests, number, number, torch.bfloat16)
        batch.dispatch()
        batch.experts(batch.x).backward()
    # Each product is rounded to 8 bits, and so are the parts; no sum of parts is.
    check_gradients(guests, batches, 2**-4)
    return len(hooked)


@pytest.mark.parametrize(("form", "parameters"), [("list", 6), ("stacked", 3)])
def test_parts_are_added_to_the_main_gradient(form, parameters):
    assert ranks.run(2, main_gradients, form) == [2 * parameters, 2 * parameters]


def order_of_sums(group):
    """Parts of bfloat16 that sum up otherwise in any other order."""
    layer = placed(4)
    experts = make_experts(
        "stacked", layer.placement.with_guest_slots(0), group.rank(), torch.bfloat16
    )
    guests = Guests(experts, layer, group)
    guests.prepare()
    stay = guests.push(torch.tensor([[-1, -1], [0, -1], [-1, 0], [0, -1]], dtype=torch.int32))
    assert stay is not None
    _, weights = guests.weights(torch.ones(1, 3).bfloat16())
    own, others = weights["up"]
    terms = [1.0, 256.0, 1.0, -256.0]
    term = terms[group.rank()]
    tensor = own[0] if group.rank() == 0 else others[0] if group.rank() != 2 else others[1]
    (tensor * term).sum().backward() if group.rank() else (own[0] * term).sum().backward()
    total = torch.tensor(terms[0], dtype=torch.bfloat16)
    for term in terms[1:]:
        total = total + torch.tensor(term, dtype=torch.bfloat16)
    if group.rank() == 0:
        assert torch.equal(experts.up.grad[0], total.expand(3, 5)), experts.up.grad[0]
    return float(total)


def test_parts_are_added_in_the_order_of_ranks():
    assert ranks.run(4, order_of_sums)[0] != 2.0


def one_gradient_of_two(group):
    """Autograd gives both terms of a sum the same tensor, to which parts are not added twice."""
    layer = placed(2)
    experts = nn.ParameterDict({n: nn.Parameter(torch.ones(E_PER_RANK, 3)) for n in "ab"})
    guests = Guests(experts, layer, group)
    guests.prepare()
    stay = guests.push(torch.tensor([[2, -1], [0, -1]], dtype=torch.int32))
    _, weights = guests.weights(torch.ones(1, 3))
    (weights["a"][0] + weights["b"][0] + weights["a"][1] + weights["b"][1]).sum().backward()
    assert stay.guests.shape == (2, G)
    for parameter in experts.values():
        assert parameter.grad[:, 0].tolist() == [2.0, 1.0]


def test_gradients_that_autograd_shares_are_not_written_to():
    ranks.run(2, one_gradient_of_two)


class Keeper(torch.autograd.Function):
    """A sum whose gradient is a tensor that the node keeps, as an attribute or a saved tensor."""

    @staticmethod
    def forward(ctx, weight, kept, as_attribute):
        ctx.kept = kept if as_attribute else None
        ctx.save_for_backward(kept)
        return weight.sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] if ctx.kept is None else ctx.kept, None, None


def watched_gradient(group, holder):
    """The gradient of homes is written to where autograd alone has it; else the holder's stays.

    Returns:
        Whether it was written to.
    """
    experts = nn.ParameterDict({"a": nn.Parameter(torch.full((E_PER_RANK, 3), 2.0))})
    guests = Guests(experts, placed(2), group)
    guests.prepare()
    stay = guests.push(torch.tensor([[2, -1], [0, -1]], dtype=torch.int32))
    other = torch.zeros(E_PER_RANK, 3, requires_grad=True)
    earlier = other.clone()  # its backward is after that of the weights
    _, weights = guests.weights(torch.ones(1, 3))
    own, arrived = weights["a"]
    addresses, held = [], []
    own.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    wide = torch.full((E_PER_RANK, 3), 5.0)
    out = (own * wide).sum()  # a gradient of its own, with the values of wide
    if holder == "hook":
        own.register_hook(held.append)
    elif holder == "view in a hook":
        own.register_hook(lambda grad: held.append(grad[0]))
    elif holder == "array in a hook":
        own.register_hook(lambda grad: held.append(torch.from_numpy(grad.numpy())))
    elif holder == "retain_grad":
        own.retain_grad()
        held.append(own)
    elif holder in ("leaf", "later node"):
        held.append(other)
        out = ((own + (other if holder == "leaf" else earlier)) * wide).sum()
    elif holder == "node":
        held.append(wide)
        out = Keeper.apply(own, wide, True)
    elif holder == "saved tensor":
        held.append(wide)
        out = Keeper.apply(own, wide, False)
    elif holder == "expanded":
        out = 5 * own.sum()
    elif holder == "no way to tell":
        guest_gradients.counts_if_alone.cache_clear()
        name, function = "_storage_Use_Count", torch._C._storage_Use_Count
        delattr(torch._C, name)
    (out + arrived[0].sum()).backward(retain_graph=holder == "saved tensor")
    if holder == "no way to tell":
        setattr(torch._C, name, function)
        guest_gradients.counts_if_alone.cache_clear()
        guest_gradients.counts_if_alone()  # before any other backward pass asks
    assert stay.guests.shape == (2, G)
    assert experts.a.grad.tolist() == [[6.0] * 3, [5.0] * 3], experts.a.grad
    for tensor in held:
        values = tensor.grad if tensor.requires_grad else tensor
        assert set(values.flatten().tolist()) == {5.0}, values
    return addresses[0] == experts.a.grad.data_ptr()


HOLDERS = {
    None: True,
    "retain_grad": True,  # it keeps a copy
    "hook": False,
    "view in a hook": False,
    "array in a hook": False,
    "leaf": True,  # it has made a copy by then
    "later node": False,
    "node": False,
    "saved tensor": False,
    "expanded": False,
    "no way to tell": False,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_gradient_is_written_to_where_nobody_else_has_it(holder):
    in_place = HOLDERS[holder]
    assert ranks.run(2, watched_gradient, holder) == [in_place] * 2


def two_products(group, form):
    """Two products a slot, residents and guests joined behind them, as a layer computes."""
    experts = make_experts(form, placed(2).placement.with_guest_slots(0), group.rank())
    guests, addresses = Guests(experts, placed(2), group, layer_waits=True), set()
    for number in range(2):
        guests.prepare()
        stay = guests.push(torch.tensor([[2, -1], [0, -1]], dtype=torch.int32))
        x = torch.ones(4, 3, dtype=torch.float64).requires_grad_()
        x, own, arrive = guests.split_weights(x)
        for stack in own.values() if number == 0 else ():
            for tensor in stack if form == "list" else [stack]:
                tensor.register_hook(lambda gradient: addresses.add(gradient.data_ptr()))
        outputs = []
        for rows, weights in zip(x.split(2), (own, arrive()), strict=True):
            up, down, gain = (weights[name] for name in ("up", "down.weight", "gain"))
            for slot in range(2):
                outputs.append(torch.tanh(rows[slot:][:1] @ up[slot]) @ down[slot] * gain[slot])
        torch.cat(outputs).sum().backward()
        assert stay.guests.shape == (2, G)
        # The second batch's gradients are added to the first one's, where these are.
        assert {p.grad.data_ptr() for p in experts.parameters()} == addresses
    return len(addresses)


@pytest.mark.parametrize(("form", "tensors"), [("list", 6), ("stacked", 3)])
def test_gradients_are_handed_on_and_not_copied(form, tensors):
    assert ranks.run(2, two_products, form) == [tensors] * 2


def frozen(group, form):
    guests = made(group, form)
    for name, parameter in guests.experts.named_parameters():
        parameter.requires_grad_("gain" not in name)
    guests = Guests(guests.experts, guests.layer, group)
    batch = Batch(guests, 0, 0)
    batch.dispatch()
    batch.experts(batch.x).backward()
    for name, parameter in guests.experts.named_parameters():
        if "gain" in name:
            assert parameter.grad is None
            parameter.grad = torch.zeros_like(parameter)
    rank = group.rank()
    for slot in range(E_PER_RANK):
        want = expected(rank * E_PER_RANK + slot, [0])
        for name in ("up", "down.weight"):
            assert (gradients(guests.experts, slot, name) - want[name]).abs().max() < 1e-9


def frozen_later(group):
    guests = made(group, "list")
    for parameter in guests.experts[0].parameters():
        parameter.requires_grad = False
        assert not guests.is_valid
    raises("is frozen (requires_grad=False) for some", Guests, guests.experts, guests.layer, group)
    guests.experts[0].requires_grad_(True)
    assert guests.is_valid


def test_experts_that_are_frozen_later_have_no_guests():
    ranks.run(2, frozen_later)


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_not_trained_are_pushed_alone(form):
    ranks.run(2, frozen, form)


# --- refused --------------------------------------------------------------------------------------


def raises(message, function, *args):
    kinds = (ContractError, RankError, TypeError, ValueError)
    with pytest.raises(kinds, match=re.escape(message)):
        function(*args)


def in_flight(group):
    guests = made(group, "stacked")
    first, second = Batch(guests, 0, 0), Batch(guests, 1, 1)
    first.dispatch()
    raises("is shared by batches in flight", second.dispatch)
    first.experts(first.x)
    second.dispatch()  # the first one's experts have run
    second.experts(second.x)
    third = Batch(guests, 2, 2)
    third.dispatch()
    del third  # given up
    second.dispatch_again()
    raises("there is no GuestPool for micro-batch slot 1", Batch(guests, 3, 3).dispatch, 1)
    pools = [GuestPool(group, G, guests.experts, slot=slot) for slot in (0, 1)]
    guests = Guests(guests.experts, guests.layer, group, pools)
    guests.experts.zero_grad()
    first, second = Batch(guests, 0, 0), Batch(guests, 1, 1)
    first.dispatch(0)
    second.dispatch(1)
    (first.experts(first.x) + second.experts(second.x)).backward()
    check_gradients(guests, [0, 1])


def test_batches_in_flight_need_a_pool_each():
    ranks.run(2, in_flight)


def waited_too_late(group):
    guests = made(group, "stacked")
    first, second = Batch(guests, 0, 0), Batch(guests, 1, 1)
    first.dispatch()
    _, own, arrive = guests.split_weights(first.x)
    assert [len(stack) for stack in own.values()] == [E_PER_RANK] * len(SHAPES)
    assert [len(stack) for stack in arrive().values()] == [G] * len(SHAPES)
    second.dispatch()
    raises("was given to another batch before this one's layer had waited", arrive)


def test_guests_that_were_replaced_do_not_arrive():
    ranks.run(2, waited_too_late)


def not_pushed_again(group):
    guests = made(group, "stacked")
    first, second = Batch(guests, 0, 0), Batch(guests, 1, 1)
    first.dispatch()
    out = first.experts(first.x)
    second.dispatch()
    second.experts(second.x)
    raises("holds another batch than the one whose backward pass runs", out.backward)
    third = Batch(guests, 2, 2)
    third.dispatch()
    out = third.experts(third.x) + third.experts(third.x)
    raises("And a layer takes the weights of a batch once", out.backward)


def test_a_backward_pass_with_other_guests_in_the_pool_is_refused():
    ranks.run(2, not_pushed_again)


def in_place(experts):
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.mul_(2.0)


def other_memory(experts):
    for parameter in experts.parameters():
        parameter.data = parameter.data.clone()


def fused_step(experts):
    for parameter in experts.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(experts.parameters(), fused=True).step()


CHANGES = {"in place": in_place, "other memory": other_memory, "fused": fused_step}


def stepped(group, form, change):
    guests = made(group, form)
    first = Batch(guests, 0, 0)
    first.dispatch()
    out = first.experts(first.x)
    assert out.requires_grad
    other = Batch(guests, 1, 1)
    other.dispatch()
    other.experts(other.x)
    CHANGES[change](guests.experts)
    raises("the home weights changed between a batch's dispatch and its", first.dispatch_again)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_between_forward_and_backward_is_refused(form, change):
    ranks.run(2, stepped, form, change)


def gather(parameter, sharded):
    """As FSDP2: into the storage that the parameter keeps, unseen by its version counter."""
    storage = parameter.untyped_storage()
    if storage.nbytes():  # other memory; the old is taken meanwhile
        size = storage.nbytes()
        storage.resize_(0)
        taken = torch.empty(size, dtype=torch.uint8)
        storage.resize_(size)
        del taken
    with torch.autograd._unsafe_preserve_version_counter(parameter), torch.no_grad():
        parameter.copy_(sharded)


def step_of_sharded(group):
    """Gathered weights are at the same address behind a step, and move before the backward pass."""
    guests = made(group, "stacked")
    sharded = [p.detach().clone().requires_grad_() for p in guests.experts.parameters()]
    optimizer = torch.optim.SGD(sharded, lr=0.1)
    moved = []
    for _ in range(2):
        first, second = Batch(guests, 0, 0), Batch(guests, 1, 1)
        first.dispatch()
        out = first.experts(first.x)
        second.dispatch()
        second.experts(second.x)
        for parameter, own in zip(guests.experts.parameters(), sharded, strict=True):
            before = parameter.data_ptr()
            gather(parameter, own)
            moved.append(before != parameter.data_ptr())
        first.dispatch_again()
        out.backward()
        for own in sharded:
            own.grad = torch.ones_like(own)
        optimizer.step()
        for parameter, own in zip(guests.experts.parameters(), sharded, strict=True):
            with torch.autograd._unsafe_preserve_version_counter(parameter), torch.no_grad():
                parameter.copy_(own)
    assert any(moved)


def test_a_step_of_sharded_weights_counts_from_the_next_batch_on():
    ranks.run(2, step_of_sharded)


def stepped_on_one(group, what):
    """The other rank waits for its weights: it raises at once, and both go on."""
    guests = made(group, "stacked")
    first, other = Batch(guests, 0, 0), Batch(guests, 1, 1)
    first.dispatch()
    out = first.experts(first.x)
    other.dispatch()
    other.experts(other.x)
    if group.rank() == 0 and what == "a step":
        in_place(guests.experts)
        raises("the home weights changed between a batch's dispatch and its", first.dispatch_again)
    elif group.rank() == 0:
        guests._check_pushed = Mock(side_effect=RuntimeError("no memory"))
        with pytest.raises(RuntimeError, match="no memory"):
            first.dispatch_again()
        del guests._check_pushed
    else:
        raises("ranks [0] refused to push a batch's guests again", first.dispatch_again)
    assert out.requires_grad
    again = Batch(guests, 2, 1)
    again.dispatch()
    again.experts(again.x).backward()


@pytest.mark.parametrize("what", ["a step", "an error of any kind"])
def test_a_rank_that_cannot_push_again_keeps_nobody_waiting(what):
    ranks.run(2, stepped_on_one, what, timeout=60)


def changed(group):
    said = ranks.Said()
    guests = made(group, "stacked")
    assert guests.is_valid
    batch = Batch(guests, 0, 0)
    batch.dispatch()
    guests.experts.half()
    assert not guests.is_valid
    assert not guests.layer.guests.is_valid
    assert "parameter down.weight is [5, 3] torch.float16 on cpu now" in said.lines[-1]
    guests.experts.double()
    assert guests.is_valid
    guests.experts.up.untyped_storage().resize_(0)
    assert not guests.is_valid
    assert "the memory of parameter up is freed" in said.lines[-1]
    layer = guests.layer
    del guests, batch
    assert layer.guests is None


def test_weights_that_were_cast_or_freed_are_not_pushed():
    ranks.run(2, changed)


def copied(group):
    guests = made(group, "list")
    guests.experts.guests = guests
    (pool,) = guests._pools.values()
    for copy_of in (copy.copy, copy.deepcopy, pickle.dumps):
        raises("Guests are neither copied nor pickled, since ranks share", copy_of, guests)
        raises("is neither copied nor pickled: make another one", copy_of, pool)
    raises("Take them off the module before", copy.deepcopy, guests.experts)
    del guests.experts.guests
    assert same_bits(copy.deepcopy(guests.experts)[0].up, guests.experts[0].up)


def test_guests_are_not_copied_with_a_module():
    ranks.run(2, copied)


def no_memory(group):
    """One rank alone has no memory for a pool."""
    experts, zeros = make_experts("stacked", placed(2).placement, 0), torch.zeros

    def allocate(*shape, **options):
        if group.rank() == 1 and options.get("dtype") is torch.uint8:
            raise RuntimeError("out of memory")
        return zeros(*shape, **options)

    with patch.object(torch, "zeros", allocate), pytest.raises(RuntimeError) as error:
        GuestPool(group, G, experts)
    assert "out of memory" in str(error.value)
    return type(error.value)


def test_a_rank_without_memory_for_a_pool_is_named_by_all():
    assert ranks.run(2, no_memory, timeout=60) == [RankError, RuntimeError]


def wrong_pools(group):
    guests = made(group, "stacked")
    small = nn.ParameterDict({"up": nn.Parameter(torch.zeros(E_PER_RANK, 3))})
    make = Guests, guests.experts, guests.layer, group
    raises("must be a whole number from 1; got True", GuestPool, group, True, guests.experts)
    raises("guests of this layer take 768: give GuestPool the", *make, GuestPool(group, G, small))
    raises("pool has 1 guests a rank, and the placement 2", *make, GuestPool(group, 1, small))
    raises("experts must be those of a layer, or of several; got none", GuestPool, group, G, [])
    raises("experts must be a module; got a int", GuestPool, group, G, 7)
    raises("pool must be a GuestPool, or several; got a str", *make, "pool")
    raises("pool must be a GuestPool, or several; got a Mock", *make, Mock())
    (pool,) = guests._pools.values()
    raises("that this rank belongs to, or None for a single rank; got a GuestPool", *make[:3], pool)
    pools = [GuestPool(group, G, guests.experts) for _ in range(2)]
    raises("two pools are for micro-batch slot 0", *make, pools)
    plain = Layer(Placement.homes_only(4, 2))
    raises("the placement has no guest slots", Guests, guests.experts, plain, group)
    experts = make_experts("stacked", guests.layer.placement.with_guest_slots(0), group.rank())
    experts.up = nn.Parameter(torch.zeros(E_PER_RANK, 3, 5 + group.rank()))
    raises("ranks differ in parameter up", Guests, experts, guests.layer, group)


def test_what_does_not_fit_is_refused_by_name():
    ranks.run(2, wrong_pools)
