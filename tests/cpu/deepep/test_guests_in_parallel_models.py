"""Guests under DDP and FSDP2: gradients are whole before they are reduced over data parallelism."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist
from test_guest_layers import E, G, MoE, assert_close, batch_of, set_mode
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from lplb_ep import GuestPool, Guests, Placement


def groups(world):
    """Expert parallelism within pairs of ranks, data parallelism across."""
    pairs = [dist.new_group(ranks=pair) for pair in ([0, 1], [2, 3])]
    across = [dist.new_group(ranks=pair) for pair in ([0, 2], [1, 3])]
    return pairs[world.rank() // 2], across[world.rank() % 2]


class Model(nn.Module):
    """Two layers that share a pool: the first one's guests are pushed again for its backward."""

    def __init__(self, group):
        super().__init__()
        pool = GuestPool(group, G, MoE(group, Placement.homes_only(E, 2, G), "legacy").experts)
        self.layers = nn.ModuleList(
            MoE(group, Placement.homes_only(E, 2, G), "legacy", seed, pool) for seed in (1, 2)
        )

    def forward(self, x, weights, topk_idx):
        for layer in self.layers:
            x = x + layer(x, weights, topk_idx)
        return x


def step(model, layers, world, mode):
    set_mode(layers, mode)
    model.zero_grad()
    for number in (0, 1):
        x, weights, topk_idx = batch_of(world.rank(), number)
        model(x, weights, topk_idx).pow(2).sum().backward()
    grads = [p.grad for layer in layers for p in layer.experts.parameters()]
    return [(g.full_tensor() if isinstance(g, DTensor) else g).clone() for g in grads]


def compare(model, layers, world):
    """Against a step at home, before and behind a step of the optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        want = step(model, layers, world, "home")
        assert_close(step(model, layers, world, "1"), want)
        optimizer.step()
    found = []
    for layer in layers:
        (planner,) = (p for p in layer.layer.planners if p.counts != "given")
        found.append({s.name: n for s, n in planner.num_batches.items()})
    return found


def data_parallel(world):
    ep, dp = groups(world)
    inner = Model(ep)
    model = DistributedDataParallel(inner, process_group=dp, bucket_cap_mb=1)
    return compare(model, inner.layers, world)


def test_ddp_reduces_gradients_with_those_of_guests():
    assert ranks.run(4, data_parallel) == [[{"OPTIMAL": 4}] * 2] * 4


def sharded(world, reshards):
    ep, dp = groups(world)
    model = Model(ep)
    for layer in model.layers:
        fully_shard(
            layer,
            mesh=DeviceMesh.from_group(dp, "cpu"),
            shard_placement_fn=lambda p: Shard(1),
            reshard_after_forward=reshards,
        )
    return compare(model, model.layers, world)


@pytest.mark.parametrize("reshards", [False, True])
def test_fsdp2_reduces_gradients_with_those_of_guests(reshards):
    assert ranks.run(4, sharded, reshards) == [[{"OPTIMAL": 4}] * 2] * 4


def distributed(world):
    """Experts are `DTensor`s over the expert-parallel ranks, as torchtitan has them."""
    model = Model(world)
    mesh = DeviceMesh.from_group(world, "cpu")
    (pool,) = model.layers[0].guests._pools.values()
    for layer in model.layers:
        for name, parameter in [*layer.experts.named_parameters()]:
            whole = DTensor.from_local(parameter.data, mesh, [Shard(0)])
            setattr(layer.experts, name, nn.Parameter(whole))
        layer.guests = Guests(layer.experts, layer.layer, world, pool)
    return compare(model, model.layers, world)


def test_experts_may_be_distributed_over_the_expert_parallel_ranks():
    assert ranks.run(2, distributed) == [[{"OPTIMAL": 4}] * 2] * 2


def sharded_apart(world):
    """The experts alone are sharded: they are gathered too late to be pushed."""
    ep, dp = groups(world)
    said = ranks.Said()
    layer = MoE(ep, Placement.homes_only(E, 2, G), "legacy")
    fully_shard(
        layer.experts, mesh=DeviceMesh.from_group(dp, "cpu"), shard_placement_fn=lambda p: Shard(1)
    )
    _, _, topk_idx = batch_of(world.rank(), 0)
    layer.by_mode["1"].get_dispatch_layout(topk_idx, E)
    assert any("is sharded, and guests need it whole" in line for line in said.lines), said.lines
    (planner,) = (p for p in layer.layer.planners if p.counts != "given")
    return [s.name for s in planner.num_batches]


def test_experts_that_are_sharded_apart_go_home():
    assert ranks.run(4, sharded_apart) == [["STALE"]] * 4
