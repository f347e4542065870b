"""Checkpoints of logical experts, which load into any placement."""

from __future__ import annotations

import pytest
import ranks
import torch
from experts import (
    SHAPES,
    local_slots,
    make_experts,
    random_placement,
    same_bits,
    valid_replicas,
    value,
)

from lplb_ep.placement.table import Placement
from lplb_ep.weights.replicas import Replicas
from lplb_ep.weights.slots import slot_parameters


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
