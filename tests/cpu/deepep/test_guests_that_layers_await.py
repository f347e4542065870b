"""Layers that wait for their guests themselves, and compute with their residents meanwhile."""

from __future__ import annotations

import pytest
import ranks
import torch
from test_guest_layers import E, G, MoE, assert_close, run_steps, set_mode

from lplb_ep import GuestPool, Placement


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


def test_weights_taken_at_once_have_arrived():
    ranks.run(2, wait_in_layers, "legacy", "", True)
