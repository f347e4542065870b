"""Replicas of experts that are sharded: `DTensor` parameters, and FSDP2."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import ranks
import torch
from experts import OPTIMIZERS, REPLACED, WRITES, value
from torch import nn

from lplb_ep.placement.table import Placement
from lplb_ep.weights.replicas import Replicas
from lplb_ep.weights.slots import slot_parameters

FULLY_SHARDED = ("list", "stacked", "distributed")


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
    replicas.copy_weights()
    held = experts._parameters["weight"]
    experts._parameters["weight"] = held.detach()  # no parameter: a stand-in, as of functional_call
    assert not replicas.is_valid
    experts._parameters["weight"] = held
    assert replicas.is_valid


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

    FSDP2 wraps the layer together with the experts. It keeps them gathered after a forward pass, as
    it does with its root.
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


FULLY_SHARDED_WRITES = {
    # `.data = ...` does not reach the local part of a DTensor, and FSDP2 registers its own again.
    **{name: write for name, write in WRITES.items() if name not in REPLACED},
    "converted": lambda made: made.layer.float().double(),
    "replaced": replace_parameter,
}


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
