"""Replica weights between GPUs: the same bits as on the CPU, whatever the GPUs do meanwhile."""

from __future__ import annotations

import time

import numpy as np
import oracle
import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn

from lplb_ep import ContractError, Placement, Replicas
from lplb_ep.comm import alltoall

pytestmark = pytest.mark.gpu

SHAPES = {"down": (48, 33), "gain": (7,), "up": (33, 48)}
DEVICES = ("cuda", "cpu")
LATE = 200_000_000  # cycles: a tenth of a second


class Experts(nn.Module):
    """This rank's slots; those of one rank are alike in both places."""

    def __init__(self, num_slots: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.empty(num_slots, *shape).to(device, dtype)))


class Layer:
    """The same replicas on the GPU, and on the CPU by `torch.distributed`."""

    def __init__(self, group, placement, transport, dtype, accumulate=None):
        self.group, self.placement = group, placement
        self.experts, self.replicas = {}, {}
        for device in DEVICES:
            by = transport if device == "cuda" else "auto"
            self.experts[device] = Experts(placement.num_local_slots, device, dtype)
            for parameter in self.experts[device].parameters():
                if accumulate is not None:
                    parameter.main_grad = torch.zeros_like(parameter, dtype=accumulate)
            self.replicas[device] = Replicas(self.experts[device], placement, group, by)

    def draw(self, seed):
        """[3] of slots' tensors, other ones on each rank."""
        generator = torch.Generator().manual_seed(1000 * seed + self.group.rank())
        shapes = [p.shape for p in self.experts["cpu"].parameters()]
        return [torch.randn(shape, generator=generator) for shape in shapes]

    @torch.no_grad()
    def write(self, device, values, what):
        """What an optimizer's step or a backward pass would leave."""
        for parameter, value in zip(self.experts[device].parameters(), values, strict=True):
            if what == "weight":
                parameter.copy_(value.to(device, non_blocking=True))
            elif hasattr(parameter, "main_grad"):
                parameter.main_grad.add_(value.to(device, non_blocking=True))
            else:
                parameter.grad = value.to(device, parameter.dtype, non_blocking=True)

    def read(self, device, what):
        parameters = self.experts[device].parameters()
        if what == "weight":
            return [p.detach().cpu() for p in parameters]
        return [getattr(p, "main_grad", p.grad).cpu() for p in parameters]

    def check(self, what, seen):
        for name, got, expected in zip(SHAPES, seen, self.read("cpu", what), strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected), (what, name)


def place(num_ranks, seed):
    return oracle.random_placement(np.random.default_rng(seed), num_ranks, 3 * num_ranks, 2)


def start(group, buffer_bytes):
    torch.cuda.set_device(group.rank() % torch.cuda.device_count())
    alltoall.BUFFER_BYTES = buffer_bytes  # of a transport that is made for the first time


def be_late(stream):
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LATE)


def both(group, transport, buffer_bytes, num_steps):
    """Steps on the GPU and on the CPU. On the GPU the program's stream and the one beside it are
    late by turns. So work that does not wait for the other stream reads old values. Sent and
    received memory is written over at once."""
    start(group, buffer_bytes)
    for number, (dtype, accumulate) in enumerate(
        [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.bfloat16, None)]
    ):
        layer = Layer(group, place(group.size(), number), transport, dtype, accumulate)
        side = layer.replicas["cuda"]._mover.stream
        assert (side is None) == (transport == "torch")  # gloo's, by the CPU
        for step in range(num_steps):
            weights, gradients = layer.draw(2 * step), layer.draw(2 * step + 1)
            async_op = step % 2 == 1
            copied = {}
            for device in DEVICES:
                replicas = layer.replicas[device]
                if device == "cuda" and (step + group.rank()) % 3 == 0:
                    be_late(torch.cuda.current_stream())
                if device == "cuda" and side is not None and step % 4 == 3:
                    be_late(side)
                layer.write(device, weights, "weight")
                transfer = replicas.copy_weights(async_op=async_op)
                assert replicas.is_valid != async_op
                if async_op:
                    transfer.wait()
                assert replicas.is_valid
                copied[device] = [p.detach().clone() for p in layer.experts[device].parameters()]
                layer.write(device, gradients, "gradient")
                transfer = replicas.reduce_gradients(async_op=async_op)
                if async_op:
                    transfer.wait()
                layer.write(device, [torch.full_like(w, torch.nan) for w in weights], "weight")
            layer.check("gradient", layer.read("cuda", "gradient"))
            for got, expected in zip(copied["cuda"], copied["cpu"], strict=True):
                assert torch.equal(got.cpu(), expected), step
        assert layer.replicas["cuda"].num_bytes_sent == layer.replicas["cpu"].num_bytes_sent
    dist.barrier(group)
    return layer.replicas["cuda"].num_bytes_sent


@pytest.mark.parametrize("transport", ["peers", "torch"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_weights_and_gradients_are_those_of_the_cpu(node, num_ranks, transport):
    sent = node(num_ranks, both, transport, 1 << 14, 6, timeout=200)  # several rounds each
    assert sum(sent) > 0


def together(group, num_layers):
    """Layers under way together, and work that uses none of them meanwhile."""
    start(group, 1 << 16)
    layers = [
        Layer(group, place(group.size(), 10 + i), "auto", torch.float32) for i in range(num_layers)
    ]
    x = torch.randn(512, 512, device="cuda")
    for step in range(10):
        for number, layer in enumerate(layers):
            for device in DEVICES:
                layer.write(device, layer.draw(100 * number + step), "weight")
        transfers = [layer.replicas["cuda"].copy_weights(async_op=True) for layer in layers]
        for layer in layers:
            layer.replicas["cpu"].copy_weights()
        for _ in range(20):
            x = (x @ x).clamp(-1, 1)
        for layer, transfer in zip(layers, transfers, strict=True):
            transfer.wait()
            layer.check("weight", layer.read("cuda", "weight"))
    assert bool(x.isfinite().all())
    dist.barrier(group)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_layers_pending_together(node, num_ranks):
    node(num_ranks, together, 3, timeout=120)


def drop(group):
    """Rank 1 drops its gradients while they are under way, and uses the memory for others."""
    start(group, 1 << 16)
    placement = Placement([0, 1, 1, 0], num_ranks=2, home=[0, 1])
    layer = Layer(group, placement, "auto", torch.float32)
    for device in DEVICES:
        layer.write(device, layer.draw(0), "gradient")
    layer.replicas["cpu"].reduce_gradients()
    be_late(layer.replicas["cuda"]._mover.stream)
    transfer = layer.replicas["cuda"].reduce_gradients(async_op=True)
    if group.rank() == 1:
        for parameter in layer.experts["cuda"].parameters():
            parameter.grad = None
            torch.full_like(parameter, torch.nan)
    transfer.wait()
    if group.rank() == 0:
        layer.check("gradient", layer.read("cuda", "gradient"))
    dist.barrier(group)


def test_gradients_may_be_dropped_on_the_way(node):
    node(2, drop)


def capture(group, async_op):
    start(group, 1 << 16)
    layer = Layer(group, place(group.size(), 40), "peers", torch.float32)
    replicas = layer.replicas["cuda"]
    transfer = replicas.copy_weights(async_op=async_op)
    if async_op:
        transfer.wait()
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
        with pytest.raises(ContractError, match="cannot be sent from a CUDA graph"):
            replicas.copy_weights(async_op=async_op)
        if async_op:  # what has joined a capture must come back
            torch.cuda.current_stream().wait_stream(replicas._mover.stream)
    replicas.copy_weights()
    dist.barrier(group)


@pytest.mark.parametrize("async_op", [False, True])
def test_a_cuda_graph_cannot_hold_a_copy(node, async_op):
    """Its replays would wait for nobody."""
    node(2, capture, async_op)


def late(group):
    """A rank that does not come in time is named, and waited for."""
    start(group, 1 << 16)
    layer = Layer(group, place(group.size(), 30), "auto", torch.float32)
    for device in DEVICES:
        layer.write(device, layer.draw(0), "weight")
    said = ranks.Said()
    if group.rank() == 1:
        time.sleep(3)
    layer.replicas["cuda"].copy_weights()
    torch.cuda.synchronize()  # a copy between CPUs would raise, and not wait
    layer.replicas["cpu"].copy_weights()
    layer.check("weight", layer.read("cuda", "weight"))
    dist.barrier(group)
    return said.lines


def test_a_rank_that_comes_late_is_named(service):
    ranks.close()  # a transport has its limit from when it was made
    environ = {**service(2), "LPLB_EP_TIMEOUT_S": "1"}
    said, _ = ranks.run(2, late, environ=environ)
    ranks.close()
    assert any(
        line.startswith("lplb_ep rank 0: ranks [1] did not come to a copy of replica")
        for line in said
    )
