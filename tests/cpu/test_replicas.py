"""Replica weights and gradients, on gloo ranks."""

from __future__ import annotations

import contextlib
import re
import unittest.mock

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from experts import (
    FORMS,
    OPTIMIZERS,
    SHAPES,
    bytes_of,
    hash_of,
    local_slots,
    make_experts,
    random_placement,
    same_bits,
    value,
)
from torch import nn

from lplb_ep import ContractError, Layer, RankError
from lplb_ep.placement.table import Placement
from lplb_ep.weights.replicas import Replicas
from lplb_ep.weights.slots import slot_parameters
from lplb_ep.weights.standing import StandingReplicas


def run_expert(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(tokens @ weights["up"]) @ weights["down.weight"] * weights["gain"]).sum()


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

    def record(output, message, output_sizes, input_sizes, **kwargs):
        sent.append(list(input_sizes))
        return all_to_all(output, message, output_sizes, input_sizes, **kwargs)

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


def reduce_alike(group):
    """Gradients that no rank asks for, and the bits of those that are asked for."""
    sums = []
    for are_alike in (False, True):
        placement, rank = Placement([0, 1, 1, 0], num_ranks=2, home=[0, 1]), group.rank()
        experts = make_experts("stacked", placement, rank)
        for name, parameter in experts.named_parameters():
            parameter.grad = torch.stack([value("gradient", 2 * rank + i, name) for i in range(2)])
        replicas = Replicas(experts, placement, group)
        gathered = unittest.mock.patch.object(
            replicas._exchange, "gather", wraps=replicas._exchange.gather
        )
        with gathered as gather:
            replicas.reduce_gradients(are_alike=are_alike)
        assert gather.call_count == (not are_alike)
        sums.append([bytes_of(p.grad) for p in experts.parameters()])
    assert sums[0] == sums[1]


def test_ranks_that_know_of_each_other_s_gradients_do_not_ask():
    ranks.run(2, reduce_alike)


def late_to(group, what):
    """The last rank comes when the others have given up, and then once more."""
    group, aside, rank = dist.new_group(), dist.new_group(), group.rank()
    if what == "gradients":
        placement = Placement([0, 1, 1, 0, 2, -1], 3)
        experts = make_experts("stacked", placement, rank)
        meet = Replicas(experts, placement, group).reduce_gradients
    else:
        experts = make_experts("stacked", Placement.homes_only(3, 3), rank)
        layer = Layer(Placement([0, 1, 1, 0, 2, -1], 3, home=[0, 2, 4]))
        meet = StandingReplicas(experts, layer, group).prepare
    if rank == 2:
        dist.barrier(aside)
        with contextlib.suppress(RankError):  # what the others have sent before is there
            meet()
    try:
        with pytest.raises(RankError) as error:
            meet()
        return str(error.value)
    finally:
        if rank != 2:
            dist.barrier(aside)


@pytest.mark.parametrize("what", ["gradients", "weights"])
def test_a_rank_that_is_late_to_a_small_exchange_is_named_within_the_limit(what):
    first, second, late = ranks.run(3, late_to, what, environ={"LPLB_EP_TIMEOUT_S": "1"})
    for message in (first, second):
        assert f"ranks [2] sent no {what} within 1 s (experts): ended, hung or slow" in message
    assert "this rank came late: ranks [0, 1] had given up waiting for its" in late


def partly_frozen(group):
    """Copies of an expert that are trained in one slot alone, when replicas are made and later."""
    placement, rank = Placement([0, 1, -1, 1, 0, -1], num_ranks=2, home=[0, 1]), group.rank()
    experts = make_experts("list", placement, rank)
    experts[2].requires_grad_(False)  # holds no expert
    experts[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"down.weight is frozen \(requires_grad=False\) for some"):
        Replicas(experts, placement, group)
    experts[:2].requires_grad_(rank == 0)
    with pytest.raises(RankError, match=r"differ in parameter .* is trained: True on ranks \[0\]"):
        Replicas(experts, placement, group)
    experts[:2].requires_grad_(True)
    replicas = Replicas(experts, placement, group)
    # Expert 0, everywhere; then on the second rank alone.
    experts[rank].requires_grad_(False)
    replicas.reduce_gradients()
    experts[0].requires_grad_(True)
    with pytest.raises(ContractError, match="requires_grad=True in slot 0, and False in slot 4"):
        replicas.reduce_gradients()


def test_copies_that_are_trained_in_one_slot_alone_are_refused_on_all_ranks():
    ranks.run(2, partly_frozen)


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
    assert replicas.num_bytes == (2 * one_copy if rank == 1 else 0)

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
