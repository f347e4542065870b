"""Replicas that move while a layer runs: same results, on every rank or on none, and homes stay."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import logging
import os
import pickle
import signal
import sys
import time
import unittest.mock
import weakref
from pathlib import Path

import numpy as np
import oracle
import pytest
import ranks
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import lplb_ep
from lplb_ep import (
    ContractError,
    Placement,
    PlacementError,
    Planner,
    Refresher,
    Replicas,
    Settings,
    check_plan,
)
from lplb_ep.layer import layer_of, mark_valid
from lplb_ep.planning import reference
from lplb_ep.weights import proposals, refresh
from lplb_ep.weights.background import Background
from lplb_ep.weights.replicas import Change

E, R, D, TOKENS, TOPK = 16, 4, 2, 48, 2
SETTINGS = Settings(refresh=4, refresh_changes=8)
EXAMPLES = str(Path(__file__).parents[2] / "examples")


def hot(samples, num_ranks, num_redundant_per_rank, *, start, max_changes, **options):
    """A stand-in for a real choice: each replica in turn goes to the hottest expert that its rank
    does not hold, where that is another one, until `max_changes` have moved."""
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


def broken(*_, **__):
    raise RuntimeError("no idea")


def deadly(*_, **__):
    os._exit(3)


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
    """The example's MoE layer in double precision, with a router that does as it is told."""

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


# --- a layer that is refreshed ----------------------------------------------------------------


def train(group, copy_first):
    model = Model(group)
    kinds = ["old"] * 4 + ["new"] * 10
    steps = [model.step(kind, i, copy_first=copy_first) for i, kind in enumerate(kinds)]
    assert layer_of(model.placement).current_planners()[0].placement is model.replicas.placement
    assert (model.replicas.placement.home == ring().home).all()
    return steps


@pytest.mark.parametrize("copy_first", [True, False])
def test_balance_returns_after_a_shift_on_all_ranks_at_once(copy_first):
    steps, *others = ranks.run(R, train, copy_first, environ=ON)
    assert all(other == steps for other in others)
    imbalance = [x for x, _ in steps]
    refreshed = [r for _, done in steps for r in done]
    assert all(1 <= copies <= SETTINGS.refresh_changes for _, _, copies, _ in refreshed)
    # After the shift at 4, a window is full of such steps at 8, and what that brings comes at 12.
    assert [step for _, step, _, _ in refreshed] == [12]
    assert min(imbalance[4:12]) > 1.1
    assert max(imbalance[12:]) < 1.02


def serve(group):
    """Weights stand still; replicas are chosen by a process, as they are in use."""
    model = Model(group, background=Background)
    held, imbalance, done = model.homes(), [], []
    with torch.no_grad():
        while not done:  # else `ranks.run` ends it
            imbalance.append(model.forward("new", len(imbalance) % 16)[1])
            done = model.refresher.step()
            time.sleep(0.05)  # leaves the processor to the process
        after = [model.forward("new", number)[1] for number in range(16)]
    assert model.replicas.is_valid
    model.check_slots()
    assert all(map(torch.equal, held, model.homes()))
    return [r.num_copies for r in done], imbalance[:16], after


def test_serving_engines_get_replicas_between_their_steps():
    (moved, before, after), *others = ranks.run(R, serve, environ=ON)
    assert all(other == (moved, before, after) for other in others)
    assert len(moved) == 1
    assert min(before) > 1.1
    assert max(after) < 1.02


def same_batch(group):
    model = Model(group, settings=EVERY, background=Offered)
    model.step("old", 0, copy_first=True)  # gives the optimizer its state
    model.layer.zero_grad()
    before, sent = model.gradients("new", 1), []
    model.replicas.copy_weights()
    held, homes = model.weights[0].detach().clone(), model.homes()

    def record(received, message, *args, **kwargs):
        sent.append(message.numel())
        return all_to_all(received, message, *args, **kwargs)

    all_to_all = dist.all_to_all_single
    table = ring().physical_to_logical.copy()
    changed = [P_LOCAL - 1, 2 * P_LOCAL - 2]  # a replica on each of two ranks
    table[changed] = moved()[changed]
    with unittest.mock.patch("torch.distributed.all_to_all_single", record):
        (done,) = model.offer(table)
    assert done.num_copies == 2
    assert model.replicas.is_valid
    model.check_slots()
    kept = [s for s in range(P_LOCAL) if model.rank * P_LOCAL + s not in changed]
    assert torch.equal(model.weights[0][kept], held[kept])
    assert all(map(torch.equal, homes, model.homes()))

    after = model.gradients("new", 1)
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=1e-10, atol=1e-12)
    return sum(sent)


def test_a_batch_has_the_same_result_and_gradients_before_and_after():
    sent = ranks.run(R, same_batch, environ=ON)
    # Of each of the two new replicas, both weights, from its home's rank, and nothing else.
    sources = [int(ring().home_rank[moved()[slot]]) for slot in (P_LOCAL - 1, 2 * P_LOCAL - 2)]
    assert sent == [8 * 2 * 64**2 * sources.count(rank) for rank in range(R)]


def equal_placements(group):
    """Two layers of equal tables, of which one is refreshed; and micro-batches of that one."""
    first, second = Model(group, settings=EVERY, background=Offered), ring()
    buffer = lplb_ep.Buffer(group)
    views = [buffer.view(p, slot) for p, slot in ((first.placement, 0), (second, 0))]
    mark_valid(second)
    (done,) = first.offer(moved())
    views.append(buffer.view(first.placement, slot=1))  # made after, by what is in force
    views.append(buffer.view(done.placement, slot=2))  # which is another name of the layer
    picks = traffic("new", group.rank(), 0)
    seen = [view.get_dispatch_layout(picks, E)[2].tolist() for view in views]
    counts = torch.stack([reference.count(traffic("new", r, 0), E) for r in range(R)])
    for placement, slots in zip(
        (done.placement, ring(), done.placement, done.placement), seen, strict=True
    ):
        plan = Planner(placement, rank=group.rank(), counts="given")(picks, counts=counts)
        assert slots == reference.count(plan.topk_idx, R * P_LOCAL).tolist()
    assert layer_of(second).placement is second


def test_a_layer_is_refreshed_in_all_its_channels_and_no_other_layer_is():
    ranks.run(R, equal_placements, environ=ON)


# --- all ranks or none --------------------------------------------------------------------------


def fail(*_, **__):
    raise ValueError("injected")


def another_table(self, table, max_replicas=None):
    """What a rank would have that does not hold what the others do."""
    table = table.copy()
    table[-1] = self.physical_to_logical[-1]
    return with_copies(self, table, max_replicas)


with_copies = Placement.with_copies


FAILURES = {
    "planner": ("lplb_ep.planning.planner.Planner.prepare", fail),
    "replicas": ("lplb_ep.weights.replicas.Replicas.prepare", fail),
    "copy": ("lplb_ep.weights.replicas.Change.fetch", None),
    "table": ("lplb_ep.placement.table.Placement.with_copies", another_table),
}


def fails_on_one(group, where):
    model = Model(group, settings=EVERY, background=Offered)
    before = model.gradients("new", 0)[0]
    model.replicas.copy_weights()
    held, old = model.weights[0].detach().clone(), model.replicas.placement
    name, broken = FAILURES[where]
    fetch = Change.fetch

    def fetch_and_fail(self):
        fetch(self)
        raise ValueError("injected")

    with contextlib.ExitStack() as stack:
        said = stack.enter_context(logs())
        if group.rank() == 2:
            stack.enter_context(unittest.mock.patch(name, broken or fetch_and_fail))
        assert model.offer(moved()) == []
    assert model.replicas.placement is old is layer_of(model.placement).placement
    assert [p.placement for p in layer_of(old).current_planners()] == [old]
    assert torch.equal(model.weights[0], held)
    assert model.replicas.is_valid
    assert torch.equal(model.gradients("new", 0)[0], before)
    (done,) = model.offer(moved())  # the next one is put in force
    model.replicas.copy_weights()
    model.check_slots()
    assert done.placement is model.replicas.placement
    return said.getvalue()


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


@pytest.mark.parametrize("where", FAILURES)
def test_a_rank_that_fails_leaves_the_old_placement_in_force_everywhere(where):
    said = ranks.run(R, fails_on_one, where, environ=ON)
    why = "ranks differ in placement" if where == "table" else "rank 2: injected"
    assert all(why in text for text in said)
    assert ("Traceback" in said[2]) == (where != "table")


def out_of_memory(group):
    """Weights of two dtypes travel one after the other; a rank has no room for what arrives."""
    experts = torch.nn.ParameterDict(
        {
            "a": torch.full((P_LOCAL, 3), float(group.rank())),
            "b": torch.full((P_LOCAL, 5), float(group.rank()), dtype=torch.bfloat16),
        }
    )
    replicas = Replicas(experts, ring(), group)
    replicas.copy_weights()
    with unittest.mock.patch.object(refresh, "Background", Offered):
        refresher = Refresher([replicas], settings=EVERY, choose=hot)
    fetch = Change.fetch

    def fetch_without_memory(self):
        error = torch.OutOfMemoryError("injected")
        with unittest.mock.patch("torch.Tensor.to", side_effect=error):
            fetch(self)

    held = experts["a"].detach().clone()
    for broken in (True, False):
        with contextlib.ExitStack() as stack:
            said = stack.enter_context(logs())
            if broken and group.rank() == 2:
                patch = unittest.mock.patch.object(Change, "fetch", fetch_without_memory)
                stack.enter_context(patch)
            if group.rank() == 0:
                refresher._background.offer(proposals.Proposal(0, moved(), 2.0, 1.0))
            done = refresher.step() + refresher.step()
        assert bool(done) != broken
        assert ("rank 2: injected" in said.getvalue()) == broken
        if broken:
            assert torch.equal(experts["a"], held)
    home = replicas.placement.home_rank[moved().reshape(R, -1)[group.rank()]]
    assert experts["a"][:, 0].tolist() == experts["b"][:, 0].tolist() == home.tolist()


def test_a_rank_without_memory_leaves_no_other_in_a_transfer():
    ranks.run(R, out_of_memory, environ=ON)


def cannot_look(group):
    """The first rank cannot start a process."""
    model = Model(group, settings=EVERY, background=Background)
    model.forward("new", 0)
    before = model.replicas.placement
    with logs() as said, unittest.mock.patch("subprocess.Popen", side_effect=OSError("no memory")):
        assert [model.refresher.step() for _ in range(4)] == [[]] * 4
    assert model.replicas.placement is before
    model.forward("new", 1)  # all ranks are there for it
    return said.getvalue()


def test_a_process_that_cannot_be_started_leaves_all_ranks_at_work():
    first, *others = ranks.run(R, cannot_look, environ=ON)
    assert first.count("no replicas are looked for; placements stay") == 2
    assert "OSError: no memory" in first
    assert others == [""] * (R - 1)


def unreduced(group):
    model = Model(group, settings=EVERY, background=Offered)
    out, _ = model.forward("old", 0)
    out.square().mean().backward()
    with logs() as said:
        assert model.offer(moved()) == []
    assert "is not reduced" in said.getvalue()
    model.replicas.reduce_gradients()
    model.replicas.copy_weights()
    forward = model.layer.experts.forward
    model.layer.experts.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)
    out, _ = model.forward("old", 0)
    assert len(model.offer(moved())) == 1
    with pytest.raises(ContractError, match="refreshed between this batch's dispatch and its"):
        out.square().mean().backward()


def recompute(group):
    model = Model(group, settings=EVERY, background=Offered)
    expected = model.gradients("new", 0)[1]
    model.replicas.copy_weights()
    model.layer.zero_grad()
    forward = model.layer.forward
    model.layer.forward = lambda x: checkpoint(forward, x.requires_grad_(), use_reentrant=True)
    out, _ = model.forward("new", 0)
    assert len(model.offer(moved())) == 1
    out.square().mean().backward()
    model.replicas.reduce_gradients()
    gradients = [p.grad[: E // R] for p in model.weights]
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


def test_a_whole_layer_may_be_recomputed_after_a_refresh():
    ranks.run(R, recompute, environ=ON)


def low_latency(group):
    """A batch that was dispatched before a refresh, and is combined after it."""
    model = Model(group, settings=EVERY, background=Offered)
    options = {"low_latency_mode": True, "num_rdma_bytes": 1 << 30}
    view = lplb_ep.Buffer(group, **options).view(model.placement)
    x, picks = torch.zeros(TOKENS, 128, dtype=torch.bfloat16), traffic("new", group.rank(), 0)
    weights = torch.ones(picks.shape)
    received, _, handle, _, _ = view.low_latency_dispatch(x, picks, 64, E, use_fp8=False)
    assert len(model.offer(moved())) == 1
    with pytest.raises(ContractError, match="refreshed between this batch's dispatch and its end"):
        view.low_latency_combine(received, picks, weights, handle)
    view = lplb_ep.ElasticBuffer(group, num_bytes=1 << 21).view(model.placement)
    *_, handle, _ = view.dispatch(x, picks, weights, num_experts=E, num_max_tokens_per_rank=64)
    assert len(model.offer(ring().physical_to_logical)) == 1
    with pytest.raises(ContractError, match="refreshed between this batch's dispatch and its end"):
        view.dispatch(x, handle=handle)


def test_a_boundary_within_a_batch_is_refused():
    """Between backward and reduction by the replicas, between forward and backward by the buffer,
    which autograd cannot do where activations are recomputed."""
    ranks.run(R, unreduced, environ=ON)
    ranks.run(R, low_latency, environ=ON)


def differ(group, what):
    placement = ring()
    replicas = Replicas(torch.nn.Linear(1, P_LOCAL, bias=False), placement, group)
    settings = Settings(refresh=4 + (what == "settings" and group.rank() == 1))
    choose = (lambda: None) if what == "choose" and group.rank() == 1 else hot
    Refresher([replicas], settings=settings, choose=choose)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("settings", "Refresher: ranks differ in refresh: 4 on ranks [0, 2, 3]; 5 on ranks [1]"),
        ("choose", "choose must be a function that can be imported"),
    ],
)
def test_ranks_must_be_set_alike(what, says):
    with pytest.raises(ranks.RanksFailedError) as failed:
        ranks.run(R, differ, what)
    assert all(says in message for _, message in failed.value.errors)


# --- when, and where to ---------------------------------------------------------------------------


def single(placement, settings=SETTINGS):
    """A refresher of one process, for placements of one rank."""
    experts = torch.nn.Linear(1, placement.num_local_slots, bias=False)
    replicas = Replicas(experts, placement)
    return replicas, Refresher([replicas], settings=settings, choose=hot)


def test_off_by_default():
    assert Settings.from_env({}).refresh == 0
    placement = Placement([0, 1, 0], 1)
    planner = Planner(placement)
    replicas, refresher = single(placement, Settings())
    planner(torch.tensor([[0]]))
    assert [refresher.step() for _ in range(100)] == [[]] * 100
    assert replicas.placement is placement is layer_of(placement).placement
    assert not layer_of(placement).is_refreshable
    assert layer_of(placement).observers == []


def test_a_planner_that_was_made_before_is_not_called_on():
    placement = Placement([0, 1, 0], 1)
    planner = Planner(placement)
    replicas, _ = single(placement)
    with pytest.raises(ContractError, match="make the Refresher first"):
        planner(torch.tensor([[0]]))
    anew = Planner(placement)
    anew(torch.tensor([[0]]))
    assert layer_of(placement).current_planners() == [anew]
    assert anew.placement is replicas.placement


def test_a_placement_object_serves_one_layer():
    placement = Placement([0, 1, 0], 1)
    experts = [torch.nn.Linear(1, 3, bias=False) for _ in range(2)]
    layers = [Replicas(e, placement) for e in experts]
    with pytest.raises(ValueError, match="layer 0 serves several layers: give each its own"):
        Refresher(layers, settings=SETTINGS, choose=hot)
    with pytest.raises(ValueError, match="at least one layer"):
        Refresher([], settings=SETTINGS, choose=hot)
    layers[1] = Replicas(torch.nn.Linear(1, 2, bias=False), Placement([0, 1], 1, num_experts=2))
    layers[1] = Replicas(torch.nn.Linear(1, 3, bias=False), Placement([0, 1, 2], 1))
    with pytest.raises(ValueError, match="layer 1 has another number of experts"):
        Refresher(layers, settings=SETTINGS, choose=hot)


def test_a_layer_has_one_refresher():
    """Of two, the first would get no loads."""
    placement = Placement([0, 1, 0], 1)
    replicas = Replicas(torch.nn.Linear(1, 3, bias=False), placement)
    with pytest.raises(ValueError, match="layer 1 is in layers twice"):
        Refresher([replicas, replicas], settings=SETTINGS, choose=hot)
    Refresher([replicas], settings=Settings())  # is off
    Refresher([replicas], settings=SETTINGS, choose=hot)
    with pytest.raises(ValueError, match="layer 0 has a Refresher already"):
        Refresher([replicas], settings=SETTINGS, choose=hot)


@pytest.mark.parametrize("module", ["__main__", "__mp_main__"])
def test_a_choice_of_the_programs_own_file_is_refused(module, monkeypatch):
    """Also in a spawned rank, which has that file by another name."""
    monkeypatch.setattr(hot, "__module__", module)
    placement = Placement([0, 1, 0], 1)
    with pytest.raises(ValueError, match="which those of the program's own file cannot"):
        single(placement)


def test_more_slots_than_experts_are_refused_at_once():
    """`for_lp` would, at each look."""
    replicas = Replicas(torch.nn.Linear(1, 3, bias=False), Placement([0, 1, 0], 1))
    refresh._check([replicas], None)  # one rank is never unbalanced
    replicas.layer.replace(Placement([0, 1, 0, 1, 0, 1], 2))
    refresh._check([replicas], hot)
    with pytest.raises(
        ValueError, match="layer 0 has 3 slots on a rank, more than there are exper"
    ):
        refresh._check([replicas], None)


def test_a_layer_that_is_refreshed_ends_with_its_model():
    """What plans keep of a placement must not keep its weights."""
    placement = Placement([0, 1, 0], 1)
    replicas, refresher = single(placement)
    planner = Planner(placement, check=True)
    planner(torch.tensor([[0, 1]]))
    assert refresher._now.tolist() == [[1, 1]]
    experts, background = weakref.ref(replicas.experts), weakref.ref(refresher._background)
    del replicas, refresher
    gc.collect()
    assert experts() is background() is None
    planner(torch.tensor([[0, 1]]))


def job(kinds, choose=hot, **settings):
    loads = [
        sum(reference.count(traffic(kind, r, step), E).long() for r in range(R)).numpy()
        for step, kind in enumerate(kinds)
    ]
    chosen = dataclasses.replace(SETTINGS, **settings)
    placement = ring().with_copies(ring().physical_to_logical, R)
    return proposals.Job(3, np.stack(loads), placement, choose, chosen)


def test_what_is_proposed_is_judged_on_other_steps():
    proposal = proposals.propose(job(["new"] * 8))
    placement = ring().with_copies(proposal.physical_to_logical, 8)
    between = job(["new"] * 8).loads[1::2]
    for which, told in ((ring(), proposal.imbalance_before), (placement, proposal.imbalance_after)):
        ratio = [oracle.linear_program(which, load) / (load.sum() / R) for load in between]
        assert told == pytest.approx(np.mean(ratio), rel=1e-6)
    assert proposal.layer == 3
    assert proposal.imbalance_after < 1.01 < 1.1 < proposal.imbalance_before


@pytest.mark.parametrize(
    ("kinds", "worth"),
    [
        (["old"] * 8, False),
        (["new"] * 6 + ["old"] * 2, True),
        (["old"] * 3 + ["new"] * 5, False),  # not in three of four
        (["new"], False),  # one step says nothing
    ],
)
def test_a_layer_that_is_unbalanced_most_of_the_time_is_mended(kinds, worth):
    assert (proposals.propose(job(kinds)) is not None) == worth


def test_a_gain_within_its_error_moves_nothing(monkeypatch):
    """On the steps between, of which one gains much and another loses."""
    asked = job(["new"] * 4)
    assert proposals.propose(asked) is not None
    measured = iter([np.full(4, 1.4), np.array([1.0, 1.4 + 0.1])])
    monkeypatch.setattr(proposals, "imbalance", lambda *_: next(measured))
    assert proposals.propose(asked) is None


def test_two_steps_are_enough():
    assert proposals.propose(job(["new"] * 2)) is not None


def says_threads(*_, **__):
    raise RuntimeError([os.environ.get(f"{of}_NUM_THREADS") for of in ("OMP", "OPENBLAS")])


@pytest.mark.parametrize("set_by_user", [False, True])
def test_the_background_takes_one_core_unless_it_is_told(set_by_user, monkeypatch, caplog):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    background = Background()
    background.start([job(["new"] * 8, says_threads)])
    wait_for(background)
    assert str(["1", "3" if set_by_user else "1"]) in caplog.text


def says_within_node(*_, within_node, **__):
    raise RuntimeError(within_node)


@pytest.mark.parametrize(
    ("table", "ranks_per_node", "stays"),
    [
        (ring().physical_to_logical, R, False),  # one node
        (ring().physical_to_logical, 2, False),  # rank 2 has copies of rank 1's
        (
            np.array([[*range(4 * r, 4 * r + 4), *(np.arange(2) + 4 * (r ^ 1))] for r in range(R)]),
            2,
            True,
        ),
        (
            np.array([[*range(4 * r, 4 * r + 4), *(np.arange(2) + 4 * r)] for r in range(R)]),
            1,
            False,
        ),
    ],
)
def test_copies_that_stay_within_nodes_go_on_doing_so(table, ranks_per_node, stays):
    """But not where a node's experts would not fill its slots."""
    placement = Placement(table.ravel(), R, num_ranks_per_node=ranks_per_node)
    asked = dataclasses.replace(job(["new"] * 8, says_within_node), placement=placement)
    with pytest.raises(RuntimeError, match=str(stays)):
        proposals.propose(asked)


def test_a_move_is_to_another_rank():
    table = ring().physical_to_logical.reshape(R, -1).copy()
    assert proposals.num_moved(ring(), Placement(np.roll(table, 1, axis=1).ravel(), R)) == 0
    assert proposals.num_moved(ring(), ring().with_copies(moved())) == R * D
    table[0, -1] = table[0, 0]  # a second copy there
    assert proposals.num_moved(ring(), Placement(table.ravel(), R)) == 0


def same(*_, start, **__):
    return start


def random(*_, start, **__):
    table = start.physical_to_logical.reshape(R, -1).copy()
    rng = np.random.default_rng(0)
    table[:, -D:] = rng.integers(12, E, (R, D))
    return Placement(table.ravel(), R, num_experts=E, home=start.home)


def other_homes(*_, start, **__):
    return Placement(np.roll(start.physical_to_logical, 1), R)


def crowd(*_, start, **__):
    table = start.physical_to_logical.reshape(R, -1).copy()
    table[:, -D:] = 3
    return Placement(table.ravel(), R, home=start.home)


@pytest.mark.parametrize("choose", [same, random])
def test_what_mends_nothing_is_not_proposed(choose):
    assert proposals.propose(job(["new"] * 8, choose)) is None


def test_a_choice_that_cannot_be_is_refused(caplog):
    with pytest.raises(PlacementError, match="home of expert 0 is slot 0, which holds"):
        proposals.propose(job(["new"] * 8, other_homes))
    assert proposals.propose(job(["new"] * 8, crowd)) is None
    assert "layer 3: 9 copies of an expert were chosen, and the capacity is 4" in caplog.text


def test_the_background_proposes_and_survives_a_choice_that_fails(caplog):
    background = Background()
    background.start([job(["new"] * 8, deadly)])
    wait_for(background)
    assert background.take() == []
    assert "ended with status 3" in caplog.text
    jobs = [job(["old"] * 8), job(["new"] * 8, broken), job(["new"] * 8)]
    background.start(jobs)
    wait_for(background)
    (proposal,) = background.take()
    expected = proposals.propose(jobs[2])
    assert proposal.physical_to_logical.tolist() == expected.physical_to_logical.tolist()
    assert "layer 3 failed: RuntimeError('no idea'); the layer keeps its" in caplog.text
    process = background._process
    background.start([job(["new"] * 8)] * 1000)
    del background
    gc.collect()
    assert process.poll() == -signal.SIGKILL
    assert caplog.text.count("ended with status") == 1


def wait_for(background):
    end = time.monotonic() + 180
    while background.is_busy:
        assert time.monotonic() < end
        time.sleep(0.01)


# --- the tables of a placement that replaces another --------------------------------------------


def test_copies_are_replaced_at_the_same_homes_and_width():
    old = Placement([3, 0, 1, 2, 0, -1], 2, home=[4, 2, 3, 0], num_ranks_per_node=1)
    new = old.with_copies([3, -1, 1, 2, 0, 1])
    assert new.home.tolist() == old.home.tolist()
    assert (new.num_ranks_per_node, new.max_replicas) == (1, 2)
    assert new != old
    assert new.may_replace(old)
    moved = Placement(new.physical_to_logical, 2, home=[4, 5, 3, 0], num_ranks_per_node=1)
    assert not moved.may_replace(old)
    with pytest.raises(PlacementError, match="home of expert 3 is slot 0, which holds expert 1"):
        old.with_copies([1, 0, 1, 2, 0, 3])
    with pytest.raises(PlacementError, match="expert 1 has 3 copies, more than max_replicas = 2"):
        old.with_copies([3, 1, 1, 2, 0, 1])
    with pytest.raises(PlacementError, match="must have the 6 slots"):
        old.with_copies([3, 0, 1, 2, 0, -1, -1, -1])


def test_room_for_copies_is_part_of_a_placement(tmp_path):
    old = Placement([0, 1, 0, 2], 2)
    wide = Placement([0, 1, 0, 2], 2, max_replicas=4)
    assert wide.logical_to_physical.tolist() == [[0, 2, -1, -1], [1, -1, -1, -1], [3, -1, -1, -1]]
    assert wide != old
    assert wide == old.with_copies(old.physical_to_logical, 4)
    wide.save(tmp_path / "wide.json")
    assert Placement.load(tmp_path / "wide.json") == wide == pickle.loads(pickle.dumps(wide))
    load = torch.tensor([7, 1, 2])
    solved = [lplb_ep.solve(load, p) for p in (old, wide)]
    assert torch.equal(solved[0].quota, solved[1].quota[:, :2])
    assert (solved[1].quota[:, 2:] == 0).all()


def test_a_prepared_planner_plans_as_one_that_is_made_anew():
    placement = ring()
    planner = Planner(placement, rank=1, counts="given", check=True)
    topk = traffic("new", 1, 0)
    counts = torch.stack([reference.count(traffic("new", r, 0), E) for r in range(R)])
    before = planner(topk, counts=counts)
    new = placement.with_copies(moved())
    planner.prepare(new)  # is not in force before the call
    assert torch.equal(planner(topk, counts=counts).topk_idx, before.topk_idx)
    planner.prepare(new)()
    planner.layer.replace(new)
    after = planner(topk, counts=counts)
    expected = Planner(Placement(moved(), R), rank=1, counts="given")(topk, counts=counts)
    assert torch.equal(after.topk_idx, expected.topk_idx)
    assert not torch.equal(after.topk_idx, before.topk_idx)
    check_plan(
        before, topk, placement, 1
    )  # its split is still by the placement that it was made on
    with pytest.raises(ValueError, match="not one of this planner's layer"):
        planner.prepare(Placement(ring().physical_to_logical[::-1], R))
    experts = torch.nn.Linear(1, 3, bias=False)
    with pytest.raises(ValueError, match="not one of these replicas' layer"):
        Replicas(experts, Placement([0, 1, 0], 1)).prepare(Placement([0, 1, 0], 1, home=[2, 1]))
