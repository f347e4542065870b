"""When replicas are valid: no change that a replica may suffer from goes unnoticed."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import ranks
import torch
from experts import (
    FORMS,
    OPTIMIZERS,
    SHAPES,
    WRITES,
    fresh,
    in_place,
    make_experts,
    same_bits,
    valid_replicas,
)
from torch import nn

from lplb_ep.layer import layer_of, mark_stale, mark_valid
from lplb_ep.placement.table import Placement
from lplb_ep.weights import validity
from lplb_ep.weights.replicas import Replicas
from lplb_ep.weights.slots import slot_parameters


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


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("form", FORMS)
def test_valid_replicas_equal_their_homes_whatever_is_done_to_the_weights(form, seed):
    """Random changes, one after another, judged by what the slots hold."""
    rng = random.Random(seed)
    placement = Placement([2, 0, 1, 0, 2, -1, 0], num_ranks=1)
    replicas = Replicas(make_experts(form, placement, 0), placement)
    replicas.copy_weights()
    seen = set()
    for _ in range(30):
        name = rng.choice([*CHANGES, "copy", "copy"])
        CHANGES[name](replicas, rng)
        slots = slot_parameters(replicas.experts, 7).values()
        are_equal = all(
            same_bits(tensors[home], tensors[copy])
            for tensors in slots
            for home, copy in [(1, 3), (1, 6), (0, 4)]
        )
        assert are_equal or not replicas.is_valid, name
        seen.add((are_equal, replicas.is_valid))
    assert seen >= {(True, True), (False, False)}


def some_parameter(replicas, rng):
    """A module, and the name of a parameter of its own."""
    owners = [m for m in replicas.experts.modules() if m._parameters]
    module = rng.choice(owners)
    return module, rng.choice([*module._parameters])


def noise(tensor, rng):
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def different(parameter, rng):
    return nn.Parameter(parameter.detach() + noise(parameter, rng))


def write_in_place(replicas, rng):
    module, name = some_parameter(replicas, rng)
    with torch.no_grad():
        module._parameters[name].add_(noise(module._parameters[name], rng))


def replace_memory(replicas, rng):
    module, name = some_parameter(replicas, rng)
    parameter = module._parameters[name]
    parameter.data = different(parameter, rng).data


def replace_past_registration(replicas, rng):
    module, name = some_parameter(replicas, rng)
    module._parameters[name] = different(module._parameters[name], rng)


def register(replicas, rng):
    module, name = some_parameter(replicas, rng)
    setattr(module, name, different(module._parameters[name], rng))


def swap(replicas, rng):
    module, name = some_parameter(replicas, rng)
    torch.utils.swap_tensors(module._parameters[name], different(module._parameters[name], rng))


def step(replicas, rng):
    module, name = some_parameter(replicas, rng)
    parameter = module._parameters[name]
    parameter.grad = noise(parameter, rng)
    OPTIMIZERS[rng.choice([*OPTIMIZERS])]([parameter]).step()
    parameter.grad = None


def load(replicas, rng):
    state = {key: tensor.clone() for key, tensor in replicas.experts.state_dict().items()}
    for tensor in state.values():
        tensor.add_(noise(tensor, rng))
    replicas.experts.load_state_dict(state, assign=rng.random() < 0.5)


CHANGES = {
    "nothing": lambda *_: None,
    "copy": lambda replicas, _: replicas.copy_weights(),
    "in place": write_in_place,
    "memory": replace_memory,
    "past registration": replace_past_registration,
    "registered": register,
    "swapped": swap,
    "step": step,
    "load": load,
}


def test_an_expert_with_one_copy_may_change_until_it_has_another():
    made = valid_replicas("list")  # slots 0, 1, 2 hold experts 0, 1, 0
    for write in ("in place", "new storage", "same address"):
        made.first = made.experts[1].up
        WRITES[write](made)
        assert made.replicas.is_valid
    change = made.replicas.prepare(made.placement.with_copies([0, 1, 1]))
    change.fetch()
    change.commit()
    assert made.replicas.is_valid
    assert same_bits(made.experts[1].up, made.experts[2].up)
    made.first = made.experts[0].up
    in_place(made)
    assert made.replicas.is_valid
    made.first = made.experts[1].up
    in_place(made)
    assert not made.replicas.is_valid


@pytest.mark.parametrize("form", FORMS)
def test_parameters_that_stand_in_for_a_call_are_stale_for_that_call(form):
    made = valid_replicas(form)
    answers = []
    made.experts.forward = lambda: answers.append(made.replicas.is_valid)
    torch.func.functional_call(made.experts, fresh(made), ())
    made.experts()
    assert answers == [False, True]


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
