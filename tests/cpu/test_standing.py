"""Replicas beside parameters that have no rows for them, on gloo ranks."""

from __future__ import annotations

import pytest
import ranks
import torch
from experts import FORMS, SHAPES, make_experts, same_bits, value

from lplb_ep import ContractError, Layer, Placement, Planner
from lplb_ep.planning.backend import Status
from lplb_ep.weights.standing import StandingReplicas

TABLE = [0, 1, 2, -1, 2, 3, 0, 1]  # experts 0 and 1 are home on rank 0, and have copies on rank 1


def rows_of(slot, batch):
    """The rows of a slot; each copy of an expert has other ones."""
    return value("tokens", 10 * batch + slot, "")


def run_expert(weights, rows):
    return torch.tanh(rows @ weights["up"]) @ weights["down.weight"] * weights["gain"]


def forward(replicas, rank, batch):
    replicas.prepare()
    x = torch.cat([rows_of(4 * rank + n, batch) for n in range(4)]).requires_grad_()
    x, own, arrive = replicas.split_weights(x)
    copies = arrive()
    out = x.sum() * 0
    for number, rows in enumerate(x.split(6)):
        if TABLE[4 * rank + number] >= 0:
            of = own if number < 2 else copies
            out = out + run_expert({n: w[number % 2] for n, w in of.items()}, rows).sum()
    return out


def expected(expert, batches):
    weights = {name: value("weight", expert, name).requires_grad_() for name in SHAPES}
    for batch in batches:
        for slot, of_slot in enumerate(TABLE):
            if of_slot == expert:
                run_expert(weights, rows_of(slot, batch)).sum().backward()
    return {name: weight.grad for name, weight in weights.items()}


def train(group, form):
    rank, placement = group.rank(), Placement(TABLE, 2, home=[0, 1, 4, 5])
    homes = Placement.homes_only(4, 2)
    experts, layer = make_experts(form, homes, rank), Layer(placement)
    replicas = StandingReplicas(experts, layer, group)
    assert not layer.is_valid
    # Two micro-batches in flight, as a pipeline has them, and one behind.
    first, second = forward(replicas, rank, 0), forward(replicas, rank, 1)
    assert layer.is_valid
    sent = replicas._stay
    second.backward()
    first.backward()
    forward(replicas, rank, 2).backward()
    assert replicas._stay is sent
    parameters = dict(experts.named_parameters())
    for slot in range(2):
        for name, want in expected(2 * rank + slot, range(3)).items():
            got = (
                parameters[f"{slot}.{name}"].grad if form == "list" else parameters[name].grad[slot]
            )
            torch.testing.assert_close(got, want)
    late = forward(replicas, rank, 0)
    replicas.mark_stale()
    replicas.prepare()
    with pytest.raises(ContractError, match="holds another batch"):
        late.backward()
    torch.optim.SGD(experts.parameters(), lr=0.5).step()
    assert not layer.is_valid
    replicas.prepare()
    assert layer.is_valid
    _, own, arrive = replicas.split_weights(torch.ones(1, 3).double())
    return {n: [t.detach().clone() for t in w] for n, w in own.items()}, {
        n: [t.detach().clone() for t in w] for n, w in arrive().items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_weights_come_once_a_step_and_gradients_go_home(form):
    found = ranks.run(2, train, form)
    for name in SHAPES:
        for slot, expert in enumerate(TABLE):
            rank, local = divmod(slot, 4)
            if local >= 2 and expert >= 0:
                home = found[expert // 2][0][name][expert % 2]
                assert same_bits(found[rank][1][name][local - 2], home)


def changed_alone(group):
    """What a rank alone does to its weights: by batch the status, and weights of copies."""
    rank, placement = group.rank(), Placement(TABLE, 2, home=[0, 1, 4, 5])
    experts, layer = make_experts("list", Placement.homes_only(4, 2), rank), Layer(placement)
    replicas = StandingReplicas(experts, layer, group)
    planner, found = Planner(layer, group, solver="cpu"), []

    def batch():
        with torch.no_grad():
            replicas.prepare()
            plan = planner(torch.tensor([[0, 1], [2, 3]]), stale=not layer.is_valid)
            _, _, arrive = replicas.split_weights(torch.ones(1, 3).double())
            weights = {n: [t.clone() for t in w] for n, w in arrive().items()}
        found.append((Status(int(plan.status)).name, weights))

    batch()
    first = experts[0].up.detach().clone()
    if rank == 0:
        with torch.no_grad():
            experts[0].up.mul_(1.5)
    batch()
    if rank == 0:
        experts[0].up.requires_grad_(False)
        with torch.no_grad():
            experts[0].up.mul_(2.0)
    batch()
    experts[0].up.requires_grad_(True)
    batch()
    return first, found


def test_what_a_rank_alone_does_to_its_weights_is_known_to_all():
    (first, on_home), (_, found) = ranks.run(2, changed_alone)
    for statuses in (on_home, found):
        assert [status == "STALE" for status, _ in statuses] == [False, False, True, False]
    for (status, weights), scale in zip(found, (1.0, 1.5, 1.5, 3.0), strict=True):
        assert status == "STALE" or same_bits(weights["up"][0], first * scale)


def test_homes_elsewhere_are_refused():
    placement = Placement([0, 2, 1, 3, 3, 0], 2, home=[0, 2, 1, 3])
    with pytest.raises(ranks.RanksFailedError, match="homes must be the first slots of each rank"):
        ranks.run(2, elsewhere, placement)


def elsewhere(group, placement):
    StandingReplicas(make_experts("list", Placement.homes_only(4, 2), 0), Layer(placement), group)
