"""The modules that `Replicas` take: their parameters by slot, and modules that are refused."""

from __future__ import annotations

import re

import pytest
import ranks
import torch
from torch import nn

from lplb_ep.placement.table import Placement
from lplb_ep.weights.replicas import Replicas
from lplb_ep.weights.slots import slot_parameters


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
