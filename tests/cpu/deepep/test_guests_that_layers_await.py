"""Layers that wait for their guests themselves, and compute with their residents meanwhile."""

from __future__ import annotations

import os
import unittest.mock

import pytest
import ranks
import torch
from test_guest_layers import (
    RULE,
    E,
    G,
    MoE,
    T,
    assert_close,
    batch_of,
    run_steps,
    set_mode,
)
from torch import nn

import lplb_ep
from lplb_ep import GuestPool, Guests, Layer, Placement


class LateGuests:
    """Stands before a pool's transport: weights come when they are waited for, no sooner."""

    def __init__(self, pool):
        self.transport, self.pushed = pool.transport, []
        self.push, self.wait = self.transport.push, self.transport.wait
        self.transport.push, self.transport.wait = self.push_later, self.wait_now

    def push_later(self, *args):
        self.transport.memory.fill_(255)  # NaN
        self.pushed.append(args)

    def wait_now(self):
        for args in self.pushed:
            self.push(*args)
        self.pushed.clear()
        self.wait()


class InTwoSteps(MoE):
    """Computes with its residents before it waits for its guests; or asks for all at once."""

    at_once = False

    def compute(self, x, picks, weights):
        if self.at_once:
            assert self.mode == "home" or self.late.pushed
            return super().compute(x, picks, weights)
        x, own, arrive = self.guests.split_weights(x)
        is_late = bool(self.late.pushed)
        out = self.add(x * 0, x, picks, weights, own, 0)
        assert bool(self.late.pushed) == is_late
        self.num_overlaps += is_late
        return self.add(out, x, picks, weights, arrive(), self.layer.placement.num_resident_slots)

    def add(self, out, x, picks, weights, stacks, first):
        for number in range(len(stacks["w1"])):
            row, column = torch.nonzero(picks == first + number, as_tuple=True)
            w1, b1, w2 = (stacks[name][number] for name in ("w1", "b1", "w2"))
            y = torch.tanh(x[row] @ w1 + b1) @ w2
            out = out.index_add(0, row, y * weights[row, column, None])
        return out


def wait_in_layers(group, kind, checkpointing, at_once):
    first = InTwoSteps(group, Placement.homes_only(E, group.size(), G), kind)
    pool = GuestPool(group, G, first.experts)
    late = LateGuests(pool)
    layers = [
        InTwoSteps(group, Placement.homes_only(E, group.size(), G), kind, s, pool, layer_waits=True)
        for s in (1, 2)
    ]
    for layer in layers:
        layer.late, layer.num_overlaps, layer.at_once = late, 0, at_once
        layer.inside = {"inside": "plain", "inside, reentrant": "reentrant"}.get(checkpointing)
    set_mode(layers, "home")
    want = run_steps(layers, group, range(3))
    set_mode(layers, "1")
    got = run_steps(layers, group, range(3), outside=checkpointing == "outside")
    assert_close(got, want)
    return sum(layer.num_overlaps for layer in layers)


@pytest.mark.parametrize("checkpointing", ["", "inside", "inside, reentrant", "outside"])
@pytest.mark.parametrize("kind", ["legacy", "elastic"])
def test_a_layer_may_compute_with_its_residents_while_guests_are_on_their_way(kind, checkpointing):
    # Three batches of two layers; a checkpoint around the layer dispatches twice.
    expected = 12 if checkpointing == "outside" else 6
    assert ranks.run(2, wait_in_layers, kind, checkpointing, False) == [expected] * 2


def low_latency(group, hook, at_once):
    """Weights scale rows. No hook waits for them, and experts that are asked for do."""
    rank, R, width = group.rank(), group.size(), 128
    layer = Layer(Placement.homes_only(E, R, G), RULE)
    experts = nn.ParameterDict({"scale": nn.Parameter(torch.arange(E).view(R, -1)[rank] + 1.0)})
    guests = Guests(experts, layer, group, layer_waits=True)
    late = LateGuests(guests._pools[0])
    _, weights, topk_idx = batch_of(rank, 0)
    x, weights = torch.randn(T, width), weights.detach().float()
    L = layer.placement.num_local_slots
    with unittest.mock.patch.dict(os.environ, LPLB_EP="1"):
        size = lplb_ep.Buffer.get_low_latency_rdma_size_hint(T, width, R, L * R)
        buffer = lplb_ep.Buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=L)
        buffer = buffer.view(layer)
    for _ in range(3):
        rows, _, handle, _, wait = buffer.low_latency_dispatch(
            x, topk_idx, T, E, use_fp8=False, return_recv_hook=hook
        )
        if hook:
            wait()
        assert late.pushed
        if at_once:
            _, by_name = guests.weights(rows)
            scales = [*by_name["scale"]]
        else:
            _, own, arrive = guests.split_weights(rows)
            assert late.pushed
            scales = [own["scale"], arrive()["scale"]]
        assert not late.pushed
        scaled = torch.nan_to_num(rows * torch.cat(scales)[:, None, None])
        out, *_ = buffer.low_latency_combine(scaled, topk_idx, weights, handle)
        want = (x[:, None] * (topk_idx + 1)[..., None] * weights[..., None]).sum(1)
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_neither_low_latency_calls_nor_their_hooks_wait_for_guests(hook, at_once):
    ranks.run(2, low_latency, hook, at_once)


def test_weights_taken_at_once_have_arrived():
    ranks.run(2, wait_in_layers, "legacy", "", True)
