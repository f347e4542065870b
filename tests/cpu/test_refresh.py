"""Replicas that move while a layer runs: same results, and homes stay."""

from __future__ import annotations

import gc
import unittest.mock
import weakref

import pytest
import ranks
import torch
import torch.distributed as dist
from refreshing import (
    EVERY,
    ON,
    P_LOCAL,
    SETTINGS,
    E,
    Model,
    Offered,
    R,
    finish,
    hot,
    moved,
    ring,
    traffic,
)

import lplb_ep
from lplb_ep import (
    ContractError,
    Layer,
    Placement,
    Planner,
    Problem,
    Refresher,
    Replicas,
    Settings,
)
from lplb_ep.layer import layer_of, mark_valid
from lplb_ep.planning import reference
from lplb_ep.weights import refresh
from lplb_ep.weights.background import Background


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
        for number in range(8):  # looks at the fourth boundary, and offers at the eighth
            imbalance.append(model.forward("new", number)[1])
            if number == 7:
                finish(model.refresher._background)
            done = model.refresher.step()
            assert bool(done) == (number == 7)
        after = [model.forward("new", number)[1] for number in range(16)]
    assert model.replicas.is_valid
    model.check_slots()
    assert all(map(torch.equal, held, model.homes()))
    return [r.num_copies for r in done], imbalance, after


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
    views.append(buffer.view(first.placement, slot=1))  # made after, by the placement in force
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
    limited = Layer(Placement([0, 1, 0], 1), Problem(max_quota=torch.full((2, 2), 9)))
    experts = torch.nn.Linear(1, 3, bias=False)
    with pytest.raises(ValueError, match="layer 0 has max_quota, which limits copies"):
        Refresher([Replicas(experts, limited)], settings=SETTINGS, choose=hot)


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
