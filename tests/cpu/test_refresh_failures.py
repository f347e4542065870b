"""A refresh is in force on all ranks or on none, and only at a boundary between batches."""

from __future__ import annotations

import contextlib
import unittest.mock

import pytest
import ranks
import torch
from refreshing import (
    EVERY,
    ON,
    P_LOCAL,
    TOKENS,
    E,
    Model,
    Offered,
    R,
    hot,
    logs,
    moved,
    ring,
    traffic,
)
from torch.utils.checkpoint import checkpoint

import lplb_ep
from lplb_ep import (
    ContractError,
    Placement,
    Refresher,
    Replicas,
    Settings,
)
from lplb_ep.layer import layer_of
from lplb_ep.weights import proposals, refresh
from lplb_ep.weights.background import Background
from lplb_ep.weights.replicas import Change


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


@pytest.mark.parametrize("where", FAILURES)
def test_a_rank_that_fails_leaves_the_old_placement_in_force_everywhere(where):
    said = ranks.run(R, fails_on_one, where, environ=ON)
    why = "ranks differ in placement" if where == "table" else "rank 2: injected"
    assert why in said[0]  # the first rank speaks for all
    if where == "table":  # which all ranks find
        assert not any(said[1:])
    else:
        assert why in said[2]
        assert not any([said[1], *said[3:]])
    assert ("Traceback" in said[2]) == (where != "table")


def out_of_memory(group):
    """Weights of two dtypes travel one after the other, and a rank has no memory for them."""
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
        speaks = group.rank() in (0, 2)  # the first, and the one that failed
        assert ("rank 2: injected" in said.getvalue()) == (broken and speaks)
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
    assert ("is not reduced" in said.getvalue()) == (group.rank() != 2)  # which has no such slot
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
