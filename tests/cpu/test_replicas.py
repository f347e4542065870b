"""Replica weights, gradients, versions and checkpoints, on gloo ranks.

Every rank can compute what any slot holds: weights are seeded by expert, gradients by slot. So the
expected values need no communication, and the code under test is not its own oracle.
"""

from __future__ import annotations

import functools
import gc
import re
import unittest.mock
import weakref
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from torch import nn

from lplb_ep.layer import layer_of, mark_stale, mark_valid
from lplb_ep.placement.table import Placement
from lplb_ep.weights import validity
from lplb_ep.weights.replicas import Replicas
from lplb_ep.weights.slots import slot_parameters

SHAPES = {"down.weight": (5, 3), "gain": (), "up": (3, 5)}
FORMS = ("list", "stacked")
FULLY_SHARDED = ("list", "stacked", "distributed")


def random_placement(num_ranks: int, seed: int = 0) -> Placement:
    """Four slots per rank, R + 1 experts; copies on one rank, unused slots, homes anywhere."""
    rng = np.random.default_rng(seed)
    num_slots, num_experts = 4 * num_ranks, num_ranks + 1
    table = rng.integers(-1, num_experts, num_slots)
    slots = rng.permutation(num_slots)
    table[slots[:num_experts]] = np.arange(num_experts)
    table[slots[num_experts]] = -1
    table[slots[num_experts + 1]] = table[slots[num_experts + 1] // 4 * 4 + (slots[0] + 1) % 4]
    home = [rng.choice(np.flatnonzero(table == expert)) for expert in range(num_experts)]
    return Placement(table, num_ranks, num_experts=num_experts, home=home)


def value(kind: str, number: int, name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The tensor of one kind (weight, gradient, tokens), expert or slot, and parameter."""
    seed = hash_of(kind, number, name)
    return torch.randn(
        SHAPES.get(name, (6, 3)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def hash_of(kind: str, number: int, name: str) -> int:
    return zlib.crc32(f"{kind} {number} {name}".encode())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Down(nn.Module):
    def __init__(self, *lead: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((*lead, *SHAPES["down.weight"])))


class Expert(nn.Module):
    """One expert, or with a leading dimension a stack of them."""

    def __init__(self, *lead: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty((*lead, *SHAPES["up"])))
        self.down = Down(*lead)
        self.gain = nn.Parameter(torch.empty(lead))


def make_experts(
    form: str, placement: Placement, rank: int, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """This rank's slots: homes hold their expert's weights, all else holds nonsense (-7)."""
    count = placement.num_local_slots
    experts = nn.ModuleList(Expert() for _ in range(count)) if form == "list" else Expert(count)
    experts.to(dtype)
    for name, slots in slot_parameters(experts, count).items():
        for local, tensor in enumerate(slots):
            slot = rank * count + local
            expert = placement.physical_to_logical[slot]
            is_home = expert >= 0 and placement.home[expert] == slot
            with torch.no_grad():
                tensor.fill_(-7.0)
                if is_home:
                    tensor.copy_(value("weight", expert, name, dtype))
    return experts


def run_expert(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(tokens @ weights["up"]) @ weights["down.weight"] * weights["gain"]).sum()


def local_slots(placement: Placement, rank: int) -> list[tuple[int, int, int]]:
    """(slot, local slot, expert or -1) of a rank."""
    count = placement.num_local_slots
    table = placement.physical_to_logical[rank * count : (rank + 1) * count]
    return [(rank * count + i, i, int(expert)) for i, expert in enumerate(table)]


def test_the_random_placements_cover_the_cases():
    for num_ranks in (1, 2, 4, 8):
        placement = random_placement(num_ranks)
        copies = placement.logical_to_physical >= 0
        assert (placement.physical_to_logical == -1).any()
        assert (copies & (placement.copy_rank < 0)).any()
        assert num_ranks < 4 or placement.max_replicas >= 4
        assert num_ranks < 2 or (np.diff(placement.home) < 0).any()


def copy_everywhere(group, num_ranks):
    placement, rank = random_placement(num_ranks), group.rank()
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    for form in FORMS:
        for dtype in dtypes:
            experts = make_experts(form, placement, rank, dtype)
            replicas = Replicas(experts, placement, None if num_ranks == 1 else group)
            assert not replicas.is_valid
            replicas.copy_weights()
            assert replicas.is_valid
            for name, tensors in slot_parameters(experts, placement.num_local_slots).items():
                for _, local, expert in local_slots(placement, rank):
                    nonsense = torch.full(SHAPES[name], -7.0).to(dtype)
                    expected = value("weight", expert, name, dtype) if expert >= 0 else nonsense
                    assert same_bits(tensors[local], expected), (form, dtype, name, expert)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_copies_equal_their_home_bit_for_bit_and_unused_slots_are_left_alone(num_ranks):
    ranks.run(num_ranks, copy_everywhere, num_ranks)


def count_messages(group):
    """Expert 0 has its home on rank 0 and two replicas on rank 1; one parameter is of bfloat16."""
    placement, rank = Placement([0, 1, 0, 0], num_ranks=2), group.rank()
    experts = make_experts("stacked", placement, rank, torch.float32)
    experts.gain = nn.Parameter(experts.gain.detach().bfloat16())
    replicas = Replicas(experts, placement, group)
    sent = []

    def record(output, message, output_sizes, input_sizes, group):
        sent.append(list(input_sizes))
        return all_to_all(output, message, output_sizes, input_sizes, group=group)

    all_to_all = torch.distributed.all_to_all_single
    with unittest.mock.patch("torch.distributed.all_to_all_single", record):
        replicas.copy_weights()
    return sent


def test_a_rank_is_sent_an_expert_once_in_one_message_per_dtype():
    bfloat16, float32 = [0, 2], [0, 4 * (3 * 5 + 5 * 3)]
    assert ranks.run(2, count_messages) == [[bfloat16, float32], [[0, 0], [0, 0]]]


def step_without_home(group, form):
    """All homes are on rank 0."""
    placement, rank = Placement([0, 1, 1, 0], num_ranks=2, home=[0, 1]), group.rank()
    experts = make_experts(form, placement, rank)
    replicas = Replicas(experts, placement, group)
    replicas.copy_weights()
    state = replicas.state_dict()
    assert len(state) == (6 if rank == 0 else 0)
    replicas.load_state_dict(state)
    assert not replicas.is_valid  # on both ranks, though only one wrote
    return len(replicas.optimizer_parameters())


@pytest.mark.parametrize(("form", "parameters"), [("list", 6), ("stacked", 3)])
def test_a_rank_without_a_home_holds_no_logical_expert(form, parameters):
    assert ranks.run(2, step_without_home, form) == [parameters, 0]


def gradient_of(slot: int, name: str, form: str, dtype: torch.dtype) -> torch.Tensor | None:
    """The gradient a slot has after the backward pass; None for a third of the parameters."""
    owner = slot if form == "list" else slot // 4
    if hash_of("none", owner, name) % 3 == 0:
        return None
    return value("gradient", slot, name, dtype)


def expected_gradient(placement, expert, name, form, sent, kept):
    """Home first, then the replicas by column, each addition rounded to the home's dtype."""
    home, *copies = (s for s in placement.logical_to_physical[expert].tolist() if s >= 0)
    total = gradient_of(home, name, form, kept)
    for slot in copies:
        term = gradient_of(slot, name, form, sent)
        if term is not None:
            total = (torch.zeros(SHAPES[name], dtype=kept) if total is None else total) + term
            total = total.to(kept)
    return total


def reduce_everywhere(group, num_ranks, seed):
    placement, rank = random_placement(num_ranks, seed), group.rank()
    count = placement.num_local_slots
    seen = set()
    for form in FORMS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            experts = make_experts(form, placement, rank, dtype)
            replicas = Replicas(experts, placement, None if num_ranks == 1 else group)
            replicas.copy_weights()
            parameters = dict(experts.named_parameters())
            for name in SHAPES:
                grads = [gradient_of(rank * count + i, name, form, dtype) for i in range(count)]
                if form == "list":
                    for i, grad in enumerate(grads):
                        parameters[f"{i}.{name}"].grad = grad
                elif grads[0] is not None:
                    parameters[name].grad = torch.stack(grads)
            replicas.reduce_gradients()
            assert not replicas.is_valid  # a step follows

            for name in SHAPES:
                for slot, local, expert in local_slots(placement, rank):
                    key = f"{local}.{name}" if form == "list" else name
                    got = parameters[key].grad
                    if got is not None and form == "stacked":
                        got = got[local]
                    if expert < 0:
                        expected = gradient_of(slot, name, form, dtype)
                    elif placement.home[expert] == slot:
                        expected = expected_gradient(placement, expert, name, form, dtype, dtype)
                    else:
                        expected = gradient_of(slot, name, form, dtype)
                        expected = None if expected is None else torch.zeros_like(expected)
                    seen.add((form, expert < 0, expected is None))
                    if form == "stacked" and expected is None and got is not None:
                        # A row beside a home's that had to be made; its other rows are zero.
                        expected = torch.zeros(SHAPES[name], dtype=dtype)
                    assert (got is None) == (expected is None), (form, dtype, name, slot)
                    assert got is None or same_bits(got, expected), (form, dtype, name, slot)
    return seen


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_gradients_are_summed_by_column_into_the_home_and_none_is_ordinary(num_ranks):
    seen = set().union(*ranks.run(num_ranks, reduce_everywhere, num_ranks, 0))
    assert ("list", False, True) in seen
    assert ("list", False, False) in seen


def reduce_without_any_gradient(group, form):
    placement = random_placement(2)
    experts = make_experts(form, placement, group.rank())
    Replicas(experts, placement, group).reduce_gradients()
    return [p.grad is None for p in experts.parameters()]


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_no_copy_has_stays_none(form):
    for none in ranks.run(2, reduce_without_any_gradient, form):
        assert all(none)


def reduce_main_grad(group, form):
    """bf16 weights; homes accumulate in a float32 main_grad, rank 1 sends bf16 gradients."""
    placement = Placement([0, 1, 1, 0], num_ranks=2, home=[0, 1])
    rank, count = group.rank(), 2
    experts = make_experts(form, placement, rank, torch.bfloat16)
    for name, parameter in experts.named_parameters():
        short = name if form == "stacked" else name[2:]
        slots = range(count) if form == "stacked" else [int(name[0])]
        of = {
            dtype: torch.stack([value("gradient", rank * count + s, short, dtype) for s in slots])
            for dtype in (torch.float32, torch.bfloat16)
        }
        of = {dtype: v.view(parameter.shape) for dtype, v in of.items()}
        parameter.grad = of[torch.bfloat16]
        if rank == 0:
            parameter.main_grad = of[torch.float32]
    replicas = Replicas(experts, placement, group)
    replicas.reduce_gradients()
    for name, parameter in experts.named_parameters():
        if rank == 1:
            assert not parameter.grad.any()
            continue
        short = name if form == "stacked" else name[2:]
        for slot in range(count) if form == "stacked" else [int(name[0])]:
            part = (lambda t, s=slot: t[s]) if form == "stacked" else (lambda t: t)
            expected = value("gradient", slot, short, torch.float32) + value(
                "gradient", 3 - slot, short, torch.bfloat16
            )
            assert same_bits(part(parameter.main_grad), expected)
            # The bf16 gradient beside a main_grad is not a gradient: left as it was.
            assert same_bits(part(parameter.grad), value("gradient", slot, short, torch.bfloat16))


@pytest.mark.parametrize("form", FORMS)
def test_main_grad_is_the_gradient_where_a_parameter_has_one(form):
    ranks.run(2, reduce_main_grad, form)


def asynchronous(group):
    """Valid and done from when it is waited for, or from what comes next."""
    placement, rank = Placement([0, 1, 1, 0], num_ranks=2, home=[0, 1]), group.rank()
    experts = make_experts("stacked", placement, rank)
    replicas = Replicas(experts, placement, group)
    transfer = replicas.copy_weights(async_op=True)
    assert not replicas.is_valid
    transfer.wait()
    assert replicas.is_valid
    transfer.wait()
    one_copy = sum(value("weight", 0, name).numel() for name in SHAPES) * 8
    assert replicas.num_bytes_sent == (2 * one_copy if rank == 0 else 0)

    transfer = replicas.copy_weights(async_op=True)
    with torch.no_grad():
        experts.gain.add_(0)  # too early: nobody knows what the replicas hold
    transfer.wait()
    assert not replicas.is_valid

    for name, parameter in experts.named_parameters():
        parameter.grad = torch.stack([value("gradient", 2 * rank + i, name) for i in range(2)])
    transfer = replicas.reduce_gradients(async_op=True)
    replicas.copy_weights()  # waits for it
    assert replicas.is_valid
    transfer.wait()
    assert replicas.is_valid
    for name, parameter in experts.named_parameters():
        for i, (home, replica) in enumerate([(0, 3), (1, 2)]):
            total = value("gradient", home, name) + value("gradient", replica, name)
            expected = torch.zeros_like(total) if rank else total
            assert same_bits(parameter.grad[1 - i if rank else i], expected)


def test_what_is_under_way_is_valid_from_when_it_is_waited_for():
    ranks.run(2, asynchronous)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
}


def train(group, num_ranks, form, optimizer_name):
    placement, rank = random_placement(num_ranks, 1), group.rank()
    experts = make_experts(form, placement, rank)
    replicas = Replicas(experts, placement, None if num_ranks == 1 else group)
    replicas.copy_weights()
    optimizer = OPTIMIZERS[optimizer_name](replicas.optimizer_parameters())
    logical = [
        {name: nn.Parameter(value("weight", expert, name)) for name in SHAPES}
        for expert in range(placement.num_experts)
    ]
    reference = OPTIMIZERS[optimizer_name]([p for expert in logical for p in expert.values()])
    for step in range(3):
        for micro in range(2):
            stage = f"tokens {step} {micro}"
            slots = slot_parameters(experts, placement.num_local_slots)
            tied = dict(experts.named_parameters())
            losses = []
            for slot, local, expert in local_slots(placement, rank):
                if expert >= 0:
                    key = "{}" if form == "stacked" else f"{local}.{{}}"
                    weights = {name: tied[key.format(name)] for name in slots}
                    if form == "stacked":
                        weights = {name: weight[local] for name, weight in weights.items()}
                    losses.append(run_expert(weights, value(stage, slot, "x")))
            if losses:
                sum(losses).backward()
            for slot, expert in enumerate(placement.physical_to_logical.tolist()):
                if expert >= 0:
                    run_expert(logical[expert], value(stage, slot, "x")).backward()
        replicas.reduce_gradients()
        if optimizer.param_groups[0]["params"]:
            replicas.mark_valid()
            optimizer.step()
            assert not replicas.is_valid
            optimizer.zero_grad()
        reference.step()
        reference.zero_grad()
        for name, tensors in slot_parameters(experts, placement.num_local_slots).items():
            for slot, local, expert in local_slots(placement, rank):
                if expert >= 0 and placement.home[expert] == slot:
                    torch.testing.assert_close(tensors[local], logical[expert][name])
        replicas.copy_weights()
        assert replicas.is_valid
    return {
        (expert, slot): [bytes_of(t[local]) for t in slots.values()]
        for slot, local, expert in local_slots(placement, rank)
        if expert >= 0
        for slots in [slot_parameters(experts, placement.num_local_slots)]
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_training_with_replicas_is_training_without(form, optimizer):
    held = {}
    for of_rank in ranks.run(2, train, 2, form, optimizer):
        held |= of_rank
    of_expert = {}
    for (expert, _), weights in held.items():
        assert of_expert.setdefault(expert, weights) == weights


def test_optimizer_parameters_are_each_logical_expert_once():
    placement = Placement([0, 1, 0, -1], num_ranks=1)
    experts = make_experts("list", placement, 0)
    got = Replicas(experts, placement).optimizer_parameters()
    expected = [p for local in (0, 1) for p in experts[local].parameters()]
    assert {id(p) for p in got} == {id(p) for p in expected}
    assert len(got) == len(expected)
    stacked = make_experts("stacked", placement, 0)
    got = Replicas(stacked, placement).optimizer_parameters()
    assert sorted(map(id, got)) == sorted(map(id, stacked.parameters()))


def valid_replicas(form: str) -> SimpleNamespace:
    placement = Placement([0, 1, 0], num_ranks=1)
    experts = make_experts(form, placement, 0)
    replicas = Replicas(experts, placement)
    replicas.copy_weights()
    first = next(experts.parameters())
    return SimpleNamespace(placement=placement, experts=experts, replicas=replicas, first=first)


def in_place(made):
    with torch.no_grad():
        made.first.mul_(2.0)


def step_with(optimizer_name):
    def step(made):
        for parameter in made.experts.parameters():
            parameter.grad = torch.ones_like(parameter)
        OPTIMIZERS[optimizer_name](made.replicas.optimizer_parameters()).step()

    return step


def new_storage(made):
    made.first.data = made.first.data.clone()


def fresh(made):
    return {name: tensor.clone() for name, tensor in made.experts.state_dict().items()}


WRITES = {
    "in place": in_place,
    "sgd": step_with("sgd"),
    "adamw": step_with("adamw"),
    "fused": step_with("fused"),
    "new storage": new_storage,
    "load": lambda made: made.experts.load_state_dict(fresh(made)),
    "assign": lambda made: made.experts.load_state_dict(fresh(made), assign=True),
    "own load": lambda made: made.replicas.load_state_dict(made.replicas.state_dict()),
    "marked": lambda made: made.replicas.mark_stale(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("form", FORMS)
def test_a_write_to_the_weights_makes_the_replicas_stale_until_the_next_copy(form, write):
    made = valid_replicas(form)
    assert made.replicas.is_valid
    WRITES[write](made)
    assert not made.replicas.is_valid
    made.replicas.copy_weights()
    assert made.replicas.is_valid
    for tensors in slot_parameters(made.experts, 3).values():
        assert same_bits(tensors[0], tensors[2])


@pytest.mark.parametrize("form", FORMS)
def test_reading_and_writing_gradients_leaves_the_replicas_valid(form):
    made = valid_replicas(form)
    slots = slot_parameters(made.experts, 3)
    sum(tensor.sum() for tensor in made.experts.parameters()).backward()
    torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1).step()  # another module's optimizer
    made.replicas.state_dict()
    assert made.replicas.is_valid
    assert slots.keys() == SHAPES.keys()


@pytest.mark.parametrize("form", FORMS)
def test_reduced_gradients_announce_a_step_that_may_leave_no_trace(form):
    made = valid_replicas(form)
    sum(tensor.sum() for tensor in made.experts.parameters()).backward()
    made.replicas.reduce_gradients()
    assert not made.replicas.is_valid
    made.replicas.copy_weights()
    assert made.replicas.is_valid


def test_marking_valid_records_the_weights_as_they_are():
    made = valid_replicas("stacked")
    in_place(made)
    made.replicas.mark_valid()
    assert made.replicas.is_valid
    in_place(made)
    assert not made.replicas.is_valid


def test_one_copy_per_expert_is_always_valid():
    placement = Placement([1, 0, -1], num_ranks=1)
    replicas = Replicas(make_experts("stacked", placement, 0), placement)
    assert replicas.is_valid
    replicas.mark_stale()
    assert replicas.is_valid
    assert layer_of(placement).is_valid
    assert layer_of(Placement([1, 0], num_ranks=2)).is_valid


def test_are_valid_asks_the_replicas_of_the_very_object():
    made = valid_replicas("list")
    equal = Placement([0, 1, 0], num_ranks=1)
    assert equal == made.placement
    assert layer_of(made.placement).is_valid
    assert not layer_of(equal).is_valid

    other = Replicas(make_experts("stacked", made.placement, 0), made.placement)
    assert not layer_of(made.placement).is_valid  # one of two is stale
    other.copy_weights()
    assert layer_of(made.placement).is_valid
    in_place(made)
    assert not layer_of(made.placement).is_valid

    made.replicas = None
    gc.collect()
    assert layer_of(made.placement).is_valid  # the stale one is gone
    del other
    gc.collect()
    assert not layer_of(made.placement).is_valid  # nobody looks after the weights


def test_an_engine_marks_a_placement_object_valid():
    placement, equal = (Placement([0, 1, 0], num_ranks=1) for _ in range(2))
    mark_valid(placement)
    assert layer_of(placement).is_valid
    assert not layer_of(equal).is_valid
    mark_stale(placement)
    assert not layer_of(placement).is_valid

    mark_valid(placement)
    replicas = Replicas(make_experts("list", placement, 0), placement)
    assert not layer_of(placement).is_valid  # from here on the weights are watched, not trusted
    mark_valid(placement)
    assert layer_of(placement).is_valid
    assert replicas.is_valid
    mark_stale(placement)
    assert not layer_of(placement).is_valid
    assert not replicas.is_valid

    unseen = Placement([0, 1, 0], num_ranks=1)
    mark_valid(unseen)
    Replicas(make_experts("list", unseen, 0), unseen)
    gc.collect()
    assert not layer_of(unseen).is_valid  # the word given before is not taken up again


def test_the_registry_keeps_nothing_alive():
    gc.collect()
    registries = validity._live, validity._watches
    before = [len(registry) for registry in registries]
    made = valid_replicas("list")
    trusted = Placement([0, 0], num_ranks=1)
    mark_valid(trusted)
    layer = weakref.ref(layer_of(trusted))
    assert all(len(now) > then for now, then in zip(registries, before, strict=True))
    del made, trusted
    gc.collect()
    assert [len(registry) for registry in registries] == before
    assert layer() is None


def save_checkpoint(group, form, folder):
    import torch.distributed.checkpoint as dcp

    placement, rank = random_placement(4), group.rank()
    replicas = Replicas(make_experts(form, placement, rank), placement, group)
    state = replicas.state_dict()
    torch.save({key: tensor.clone() for key, tensor in state.items()}, f"{folder}/{rank}.pt")
    dcp.save(state, checkpoint_id=f"{folder}/dcp", process_group=group)
    return list(state)


def load_checkpoint(group, form, folder):
    import torch.distributed.checkpoint as dcp

    table = [4, 3, 2, 1, 0, 0, -1, 2, 0, 4]
    placement, rank = Placement(table, num_ranks=2), group.rank()
    merged = {}
    for saved in range(4):
        merged |= torch.load(f"{folder}/{saved}.pt")
    for source in ("merged", "dcp"):
        experts = make_experts(form, placement, rank)
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.fill_(-7.0)
        replicas = Replicas(experts, placement, group)
        replicas.copy_weights()
        state = merged
        if source == "dcp":
            state = replicas.state_dict()
            dcp.load(state, checkpoint_id=f"{folder}/dcp", process_group=group)
        replicas.load_state_dict(state)
        assert not replicas.is_valid
        replicas.copy_weights()
        for name, tensors in slot_parameters(experts, 5).items():
            for _, local, expert in local_slots(placement, rank):
                if expert >= 0:
                    assert same_bits(tensors[local], value("weight", expert, name)), (source, name)


@pytest.mark.parametrize(("saved", "loaded"), [("list", "stacked"), ("stacked", "list")])
def test_a_checkpoint_holds_logical_experts_and_loads_into_another_placement(
    saved, loaded, tmp_path
):
    of_rank = ranks.run(4, save_checkpoint, saved, str(tmp_path))
    keys = [key for keys in of_rank for key in keys]
    assert sorted(keys) == sorted(f"{expert}.{name}" for expert in range(5) for name in SHAPES)
    ranks.run(2, load_checkpoint, loaded, str(tmp_path))


def test_a_state_that_does_not_fit_is_refused_by_key_and_nothing_is_loaded():
    made = valid_replicas("list")
    good = {key: tensor.clone() for key, tensor in made.replicas.state_dict().items()}
    bad = {key: tensor + 1 for key, tensor in good.items()}
    del bad["1.up"]
    bad["0.gain"] = torch.zeros(2)
    bad["2.up"] = bad["0.bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match="does not fit") as error:
        made.replicas.load_state_dict(bad)
    assert "lacks 1.up;" in str(error.value)
    assert "has 0.gain [2] instead of []" in str(error.value)
    assert "has unknown 2.up, 0.bias" in str(error.value)
    assert made.replicas.is_valid
    for key, tensor in made.replicas.state_dict().items():
        assert same_bits(tensor, good[key])


def linear_list(*shapes):
    return nn.ModuleList(nn.Linear(*shape) for shape in shapes)


def shared():
    return nn.ModuleList([nn.Linear(2, 2)] * 2)


MISFITS = {
    "parameter weight must have leading dimension 2, one row per slot of this rank, got shape "
    "[5, 2]": lambda: nn.Linear(2, 5, bias=False),
    "experts must be 2 modules, one per slot of this rank, got 3": lambda: linear_list(
        (2, 2), (2, 2), (2, 2)
    ),
    "parameter weight of slot 1 is [2, 3] float32, expected [2, 2] float32": lambda: linear_list(
        (2, 2), (3, 2)
    ),
    "parameter bias of slot 1 is absent, expected [2] float32": lambda: nn.ModuleList(
        [nn.Linear(2, 2), nn.Linear(2, 2, bias=False)]
    ),
    "parameter bias of slot 1 is [2] float32, expected absent": lambda: nn.ModuleList(
        [nn.Linear(2, 2, bias=False), nn.Linear(2, 2)]
    ),
    "parameter bias of slot 1 is shared with another slot": shared,
    "experts must have parameters, got none": nn.Identity,
}


@pytest.mark.parametrize("message", MISFITS)
def test_slot_parameters_names_what_does_not_fit(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        slot_parameters(MISFITS[message](), 2)


def test_slot_parameters_share_the_modules_memory():
    linear = nn.Linear(3, 2)
    slots = slot_parameters(linear, 2)
    assert list(slots) == ["bias", "weight"]
    with torch.no_grad():
        slots["weight"][1].fill_(5.0)
    assert linear.weight[1].tolist() == [5.0] * 3
    experts = linear_list((2, 2), (2, 2))
    assert slot_parameters(experts, 2)["bias"][1] is experts[1].bias


def test_single_parameters_of_a_grouped_linear_make_a_list():
    """Transformer Engine's grouped linear names them weight0, weight1, …"""
    grouped = nn.ParameterDict({f"weight{i}": torch.full((2, 2), float(i)) for i in range(3)})
    experts = nn.ModuleList(nn.ParameterDict({"fc1": grouped[f"weight{i}"]}) for i in range(3))
    replicas = Replicas(experts, Placement([0, 1, 0], num_ranks=1))
    replicas.copy_weights()
    assert not grouped["weight2"].any()
    assert replicas.state_dict()["1.fc1"].data_ptr() == grouped["weight1"].data_ptr()
    with torch.no_grad():
        grouped["weight1"].zero_()
    assert replicas.is_valid  # its expert has one copy
    with torch.no_grad():
        grouped["weight0"].zero_()
    assert not replicas.is_valid


def test_a_module_whose_state_is_not_in_parameters_is_refused():
    placement = Placement([0, 0], num_ranks=1)
    norms = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(2))
    with pytest.raises(ValueError, match=r"no persistent buffers, got 0\.running_mean"):
        Replicas(norms, placement)
    experts = linear_list((2, 2), (2, 2))
    experts[0].register_buffer("constant", torch.ones(1), persistent=False)
    Replicas(experts, placement)
    with torch.inference_mode():
        experts = linear_list((2, 2), (2, 2))
    with pytest.raises(ValueError, match="inference_mode"):
        Replicas(experts, placement)


def refused_gradients(group, what):
    placement = Placement([0, 1, 1, 0], 2)
    made = nn.ModuleList(nn.Linear(2, 3, bias=False) for _ in range(2))
    replicas = Replicas(made, placement, group)
    for expert in made:
        weight = expert.weight
        if group.rank() == 0:
            weight.main_grad = torch.zeros_like(weight)
        elif what == "dtype":
            weight.main_grad = torch.zeros(3, 2, dtype=torch.int32)
        else:
            weight.main_grad = torch.zeros(1)
    replicas.reduce_gradients()


@pytest.mark.parametrize(
    ("what", "message"), [("dtype", r"is \[3, 2\] int32, expected"), ("shape", r"is \[1\] float32")]
)
def test_gradients_that_one_rank_refuses_raise_on_all(what, message):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, refused_gradients, what)
    (peer, theirs), (own, its) = failure.value.errors
    assert (peer, own) == ("RankError", "ValueError")
    assert "ranks [1] refused their gradients" in theirs
    assert re.search(message, its)


def collective_on_a_weight(group):
    placement = Placement([0, 1, 1, 0], 2)
    made = nn.ModuleList(nn.Linear(2, 3, bias=False) for _ in range(2))
    replicas = Replicas(made, placement, group)
    replicas.copy_weights()
    torch.distributed.broadcast(made[0].weight.detach(), 0, group=group)
    unseen = replicas.is_valid
    replicas.copy_weights()
    return unseen, replicas.is_valid


def test_collectives_on_a_weight_are_not_seen_as_the_documents_say():
    assert ranks.run(2, collective_on_a_weight) == [(True, True)] * 2


def test_a_group_is_needed_for_several_ranks():
    with pytest.raises(ValueError, match="the placement has 2 ranks"):
        Replicas(nn.Linear(2, 2), Placement([0, 1, 0, 1], num_ranks=2))


def construct(group, case):
    """Rank 2 of 4 does something else than the others."""
    odd = group.rank() == 2
    table = [0, 1, 2, 0, 1, 3, 3, 2]
    if case == "placement" and odd:
        table[:2] = [1, 0]
    num_ranks = 2 if case == "size" else 4
    placement = Placement(table, num_ranks=num_ranks)
    count = placement.num_local_slots
    if case == "misfit" and odd:
        count += 1
    experts = nn.ModuleList(
        nn.Linear(3, 5 if case == "shape" and odd else 4, bias=not (case == "name" and odd))
        for _ in range(count)
    )
    if case == "dtype" and odd:
        experts.bfloat16()
    Replicas(experts, placement, group)


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("placement", ["differ in placement: ", " on ranks [2]"]),
        (
            "shape",
            [
                "differ in parameter bias: [4] float32 on ranks [0, 1",
                "[5] float32 on ranks [2]",
            ],
        ),
        (
            "dtype",
            ["differ in parameter bias: [4] float32 on ranks [0, 1", "[4] bfloat16 on ranks [2]"],
        ),
        ("name", ["differ in parameter bias: [4] float32 on ranks [0, 1", "absent on ranks [2]"]),
        ("misfit", ["ranks [2] refused", "experts must be 2 modules"]),
    ],
)
def test_ranks_that_differ_are_named_on_every_rank(case, messages):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(4, construct, case)
    for rank, (kind, text) in enumerate(failure.value.errors):
        if case == "misfit" and rank == 2:
            assert kind == "ValueError"
            assert text.startswith(messages[1])
        else:
            assert kind == "RankError"
            assert all(message in text for message in messages)


def test_a_group_of_another_size_is_refused():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(4, construct, "size")
    assert (
        failure.value.errors
        == [("ValueError", "group must have the placement's 2 ranks, got 4")] * 4
    )


def train_distributed_tensor(group):
    """torchtitan's form: the stacked weight of all ranks' slots is one DTensor."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    placement, rank = Placement([0, 1, 1, 0], num_ranks=2, home=[0, 1]), group.rank()
    mesh = DeviceMesh.from_group(group, "cpu")
    experts = nn.Linear(3, 4, bias=False)
    whole = torch.arange(12.0).view(4, 3)
    experts.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    replicas = Replicas(experts, placement, group)
    replicas.copy_weights()
    assert replicas.is_valid
    local = experts.weight.to_local().detach()
    assert torch.equal(local, whole[[0, 1]] if rank == 0 else whole[[1, 0]])

    (experts.weight.to_local() * (rank + 1.0)).sum().backward()
    replicas.reduce_gradients()
    assert torch.equal(
        experts.weight.grad.to_local(), torch.full((2, 3), 3.0 if rank == 0 else 0.0)
    )
    torch.optim.SGD(replicas.optimizer_parameters() or [experts.weight], lr=1.0).step()
    assert not replicas.is_valid
    replicas.copy_weights()
    assert torch.equal(local, (whole - 3.0)[[0, 1] if rank == 0 else [1, 0]])
    for write in (experts.weight, experts.weight.to_local()):
        replicas.copy_weights()
        assert replicas.is_valid
        with torch.no_grad():
            write.mul_(2.0)
        assert not replicas.is_valid


def test_distributed_tensors_count_by_their_local_part():
    ranks.run(2, train_distributed_tensor)


class AskingExperts(nn.Module):
    """Two slots of one 4 x 3 weight, which ask in every forward pass whether they are valid."""

    def __init__(self, form: str, weights: list[torch.Tensor], mesh) -> None:
        from torch.distributed.tensor import DTensor, Shard

        super().__init__()
        if form == "list":
            self.slots = nn.ModuleList(nn.ParameterDict({"weight": w.clone()}) for w in weights)
        else:
            whole = torch.stack(weights)
            if form == "distributed":
                whole = DTensor.from_local(whole, mesh["ep"], [Shard(0)])
            self.slots = nn.ParameterDict({"weight": whole})
        self.answers: list[bool] = []

    def forward(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        self.answers.append(self.replicas.is_valid)
        if isinstance(self.slots, nn.ModuleList):
            weights = [slot["weight"] for slot in self.slots]
        else:
            weights = self.slots["weight"]
            weights = weights.to_local() if hasattr(weights, "to_local") else weights
        return sum((x @ w).square().mean() for x, w in zip(tokens, weights, strict=True))


@functools.cache
def expert_and_data_parallel_mesh():
    return torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))


def fully_sharded(form: str, dim: int | None = None) -> SimpleNamespace:
    """Experts 0 and 1, at home in slots 0 and 2, on two expert-parallel x two data-parallel ranks.

    FSDP2 has the layer in one piece with the experts, so that it keeps them gathered after a
    forward pass: it does that with its root.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh = expert_and_data_parallel_mesh()
    placement = Placement([0, 1, 1, 0], num_ranks=2, home=[0, 2])
    home = value("weight", mesh.get_local_rank("ep"), "x")[:4]
    experts = AskingExperts(form, [home, torch.full_like(home, -7.0)], mesh)
    layer = nn.Sequential(experts)
    dim = (0 if form == "list" else 1) if dim is None else dim
    fully_shard(layer, mesh=mesh["dp"], shard_placement_fn=lambda _: Shard(dim))
    replicas = experts.replicas = Replicas(experts.slots, placement, mesh["ep"].get_group())
    return SimpleNamespace(
        mesh=mesh,
        placement=placement,
        layer=layer,
        experts=experts.slots,
        replicas=replicas,
        answers=experts.answers,
        first=next(experts.parameters()),
    )


def tokens_of(step: int, dp: int, slot: int) -> torch.Tensor:
    return value(f"tokens {step} {dp}", slot, "x")[:5].repeat(1, 2)[:, :4]


def train_fully_sharded(group, form):
    made = fully_sharded(form)
    dp, ep = made.mesh.get_local_rank("dp"), made.mesh.get_local_rank("ep")
    slots = made.placement.physical_to_logical.tolist()
    logical = [nn.Parameter(value("weight", expert, "x")[:4]) for expert in range(2)]
    made.replicas.copy_weights()
    optimizer, reference = (
        torch.optim.SGD(p, lr=0.1, momentum=0.9)
        for p in (made.replicas.optimizer_parameters(), logical)
    )
    for step in range(3):
        made.layer([tokens_of(step, dp, 2 * ep + local) for local in range(2)]).backward()
        for of_dp in range(2):  # FSDP2 averages over the data-parallel ranks
            for slot, expert in enumerate(slots):
                loss = (tokens_of(step, of_dp, slot) @ logical[expert]).square().mean() / 2
                loss.backward()
        made.replicas.reduce_gradients()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
        with torch.no_grad():  # leaves the parameters gathered
            made.layer([torch.zeros(1, 4, dtype=torch.float64)] * 2)
        made.replicas.copy_weights()
        (tensors,) = slot_parameters(made.experts, 2).values()
        for tensor, expert in zip(tensors, slots[2 * ep :][:2], strict=True):
            torch.testing.assert_close(tensor, logical[expert].chunk(2)[dp])
    return made.answers


@pytest.mark.parametrize("form", FULLY_SHARDED)
def test_fully_sharded_experts_are_valid_in_forward_and_train_as_without_replicas(form):
    assert ranks.run(4, train_fully_sharded, form) == [[True, False] * 3] * 4


def replace_parameter(made):
    for owner in made.experts.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(parameter.detach().clone()))


FULLY_SHARDED_WRITES = WRITES | {
    "converted": lambda made: made.layer.float().double(),
    "replaced": replace_parameter,
}
del FULLY_SHARDED_WRITES["new storage"]  # `.data = ...` does not reach the local part of a DTensor


def write_fully_sharded(group, form, write):
    made = fully_sharded(form)
    zeros = [torch.zeros(1, 4, dtype=torch.float64)] * 2
    made.replicas.copy_weights()
    for _ in range(2):  # the first forward pass sets FSDP2 up
        made.layer(zeros).backward()
    FULLY_SHARDED_WRITES[write](made)
    made.layer(zeros).backward()  # nobody asked before FSDP2 gathered the parameters again
    assert not made.replicas.is_valid
    made.replicas.copy_weights()
    made.layer(zeros).backward()
    return made.answers


@pytest.mark.parametrize("write", FULLY_SHARDED_WRITES)
@pytest.mark.parametrize("form", FULLY_SHARDED)
def test_a_write_to_fully_sharded_experts_makes_them_stale_in_forward(form, write):
    assert ranks.run(4, write_fully_sharded, form, write) == [[True, True, False, True]] * 4


def gather_fully_sharded(group, form):
    made = fully_sharded(form)
    sharded = list(made.experts.parameters())
    for mark in (made.replicas.copy_weights, made.replicas.mark_valid):
        made.layer.unshard()
        assert next(made.experts.parameters()) is not sharded[0]
        mark()
        assert made.replicas.is_valid
        assert all(p is s for p, s in zip(made.experts.parameters(), sharded, strict=True))
        made.layer.unshard()
        assert made.replicas.is_valid
        made.first.grad = torch.ones_like(made.first)
        OPTIMIZERS["fused"]([made.first]).step()
        assert not made.replicas.is_valid
    got = made.replicas.optimizer_parameters()
    assert {id(parameter) for parameter in got} <= {id(parameter) for parameter in sharded}


@pytest.mark.parametrize("form", FULLY_SHARDED)
def test_gathered_parameters_give_way_to_the_sharded_ones(form):
    ranks.run(4, gather_fully_sharded, form)


def test_stacked_experts_must_not_be_sharded_by_slot():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(4, shard_by_slot)
    for kind, message in failure.value.errors:
        assert kind == "ValueError"
        assert "leading dimension 2" in message
        assert message.endswith("got shape [1, 4, 3]; let FSDP2 shard another dimension")


def shard_by_slot(group):
    fully_sharded("stacked", dim=0)
