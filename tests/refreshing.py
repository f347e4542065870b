"""An MoE layer that is refreshed, traffic that shifts, and choices of replicas for it."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import unittest.mock
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import lplb_ep
from lplb_ep import (
    Placement,
    Refresher,
    Replicas,
    Settings,
)
from lplb_ep.weights import proposals, refresh
from lplb_ep.weights.background import Background

E, R, D, TOKENS, TOPK = 16, 4, 2, 48, 2
SETTINGS = Settings(refresh=4, refresh_changes=8)
EXAMPLES = str(Path(__file__).parents[1] / "examples")


def hot(samples, num_ranks, num_redundant_per_rank, *, start, max_changes, **options):
    """A stand-in for a real choice. Each replica in turn changes to the hottest expert that its
    rank does not hold, until `max_changes` have moved."""
    assert options.keys() == {"fixed_homes", "within_node", "max_copies", "seed", "time_budget_s"}
    assert start.num_local_slots == -(-start.num_experts // num_ranks) + num_redundant_per_rank
    load = samples.sum(0).astype(float)
    table = start.physical_to_logical.reshape(num_ranks, -1).copy()
    slots = [
        (r, s)
        for s in range(start.num_local_slots)
        for r in range(num_ranks)
        if start.home[table[r, s]] != r * start.num_local_slots + s
    ]
    copies = np.ones(start.num_experts)
    for r, s in slots:
        full = np.isin(np.arange(start.num_experts), table[r]) | (copies == start.max_replicas)
        share = np.where(full, -1, load / copies)
        best = share.argmax()
        if share[best] > 0 and max_changes > 0 and best != table[r, s]:
            table[r, s] = best
            max_changes -= 1
        copies[table[r, s]] += 1
    return Placement(table.ravel(), num_ranks, num_experts=start.num_experts, home=start.home)


class Inline(Background):
    """Looks at once, in this process."""

    def start(self, jobs):
        for job in jobs:
            if (proposal := proposals.propose(job)) is not None:
                self.offer(proposal)

    def offer(self, proposal):
        self._proposals.put(proposal)


class Offered(Inline):
    """Does not look: a test offers."""

    def start(self, jobs):
        pass


def ring():
    """E experts in order, replicas of the first two of each rank on the next."""
    return Placement.from_topology("ring", num_experts=E, num_ranks=R, num_redundant_per_rank=D)


def moved():
    """The same homes, with replicas of the last two of each rank instead."""
    table = ring().physical_to_logical.reshape(R, -1).copy()
    table[:, -D:] += D
    return table.ravel()


def traffic(kind, rank, step):
    """[TOKENS, TOPK] picks, most of them of experts of two ranks: those that `ring` replicates, or
    those that it does not."""
    rng = np.random.default_rng([rank, step])
    weight = np.ones(E)
    weight[{"old": [0, 1, 8, 9], "new": [2, 3, 6, 7]}[kind]] = 12
    rows = [rng.choice(E, TOPK, replace=False, p=weight / weight.sum()) for _ in range(TOKENS)]
    return torch.tensor(np.array(rows))


class Model:
    """The example's MoE layer in double precision, with picks in the place of a router."""

    def __init__(self, group, choose=hot, settings=SETTINGS, background=Inline):
        sys.path.insert(0, EXAMPLES)
        import moe_layer

        sys.path.remove(EXAMPLES)
        self.group, self.rank = group, group.rank()
        self.placement = ring()
        torch.manual_seed(0)
        self.layer = moe_layer.MoE(64, E, P_LOCAL, TOPK, torch.float64).double()
        experts = self.layer.experts
        self.weights = experts.w1, experts.w2
        for parameter in self.weights:  # of homes; replicas are copied
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(self.rank))
        self.replicas = Replicas(experts, self.placement, group)
        with unittest.mock.patch.object(refresh, "Background", background):
            self.refresher = Refresher([self.replicas], settings=settings, choose=choose)
        self.layer.buffer = lplb_ep.Buffer(group).view(self.placement)
        self.layer.choose = lambda scores: self.picks
        self.replicas.copy_weights()
        parameters = [*self.layer.router.parameters(), *self.replicas.optimizer_parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.01)

    def forward(self, kind, number):
        """The layer's output for this rank's tokens of a batch, and the batch's imbalance."""
        self.picks = traffic(kind, self.rank, number)
        generator = torch.Generator().manual_seed(number * R + self.rank)
        out = self.layer(torch.randn(TOKENS, 64, dtype=torch.float64, generator=generator))
        received = [None] * R
        dist.all_gather_object(received, self.layer.received, group=self.group)
        return out, max(received) / (sum(received) / R)

    def gradients(self, kind, number):
        """The layer's output, the gradients of the homes here, and the imbalance."""
        self.layer.zero_grad()
        out, imbalance = self.forward(kind, number)
        out.square().mean().backward()
        self.replicas.reduce_gradients()
        return out.detach(), [p.grad[: E // R].clone() for p in self.weights], imbalance

    def homes(self):
        """Weights and optimizer state of the homes here, which are the first slots of a rank."""
        state = [self.optimizer.state[p] for p in self.weights if p in self.optimizer.state]
        kept = [p.detach() for p in self.weights] + [s[k] for s in state for k in sorted(s)]
        return [tensor[: E // R].clone() if tensor.ndim else tensor.clone() for tensor in kept]

    def check_slots(self):
        """Every slot has the weights of the expert that the placement in force names."""
        placement, every = self.replicas.placement, [None] * R
        dist.all_gather_object(every, self.weights[0].detach().clone(), group=self.group)
        slots = torch.cat(every)
        home = placement.home[placement.physical_to_logical].tolist()
        assert torch.equal(slots, slots[home])

    def step(self, kind, number, *, copy_first):
        """A training step: its imbalance, and what was refreshed at its end."""
        *_, imbalance = self.gradients(kind, number)
        self.optimizer.step()
        if copy_first:
            self.replicas.copy_weights()
        before = self.homes()
        done = self.refresher.step()
        assert all(map(torch.equal, before, self.homes()))
        if not copy_first:
            self.replicas.copy_weights()
        assert self.replicas.is_valid
        self.check_slots()
        return imbalance, [(r.layer, r.step, r.num_copies, r.placement) for r in done]

    def offer(self, table):
        """Ends steps with EVERY, at one of whose boundaries these replicas are offered; what was
        refreshed."""
        if self.rank == 0:
            self.refresher._background.offer(proposals.Proposal(0, table, 2.0, 1.0))
        return self.refresher.step() + self.refresher.step()


P_LOCAL = E // R + D
ON = {"LPLB_EP": "1", "LPLB_EP_BACKEND": "embedded", "LPLB_EP_CHECK": "1"}
EVERY = Settings(refresh=2)  # the least


@contextlib.contextmanager
def logs():
    """What `lplb_ep.weights.refresh` logs."""
    out, logger = io.StringIO(), logging.getLogger("lplb_ep.weights.refresh")
    handler = logging.StreamHandler(out)
    logger.addHandler(handler)
    try:
        yield out
    finally:
        logger.removeHandler(handler)


def finish(background):
    """Waits until the process has answered all jobs."""
    if background._thread is not None:
        background._thread.join()
    assert not background.is_busy
