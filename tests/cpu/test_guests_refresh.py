"""Replicas that are moved beside guest slots: these stay empty, and plans go on filling them."""

import dataclasses
import unittest.mock

import numpy as np
import oracle
import ranks
import torch
from refreshing import SETTINGS, E, Inline, R, hot, moved, ring, traffic

from lplb_ep import Planner, Refresher, Replicas, check_plan
from lplb_ep.planning import reference
from lplb_ep.planning.plan import Status
from lplb_ep.weights import proposals, refresh

G = 1


def test_a_proposal_is_the_one_without_guest_slots():
    loads = np.stack(
        [
            sum(reference.count(traffic("new", r, step), E).long() for r in range(R)).numpy()
            for step in range(8)
        ]
    )
    plain = ring().with_copies(ring().physical_to_logical, R)
    jobs = [
        proposals.Job(0, loads, placement, hot, SETTINGS)
        for placement in (plain, plain.with_guest_slots(G))
    ]
    expected, proposal = map(proposals.propose, jobs)
    assert proposal.imbalance_before == expected.imbalance_before
    assert proposal.imbalance_after == expected.imbalance_after
    new = jobs[1].placement.with_copies(proposal.physical_to_logical)
    assert new.num_guests_per_rank == G
    assert new.with_guest_slots(0).physical_to_logical.tolist() == (
        expected.physical_to_logical.tolist()
    )


def test_a_prepared_planner_fills_guest_slots_beside_the_new_replicas():
    placement = ring().with_guest_slots(G)
    planner = Planner(placement, rank=1, counts="given", check=True, guest_min_tokens=1)
    topk = traffic("new", 1, 0)
    counts = torch.stack([reference.count(traffic("new", r, 0), E) for r in range(R)])
    before = planner(topk, counts=counts)
    assert (before.guests >= 0).any()
    rows = np.full((R, placement.num_local_slots), -1)
    rows[:, :-G] = moved().reshape(R, -1)
    new = placement.with_copies(rows.ravel())
    planner.prepare(new)()
    planner.layer.replace(new)
    after = planner(topk, counts=counts)
    again = Planner(new, rank=1, counts="given", guest_min_tokens=1)(topk, counts=counts)
    assert torch.equal(after.topk_idx, again.topk_idx)
    assert torch.equal(after.guests, again.guests)
    check_plan(before, topk, placement, 1, planner._problem)  # its split is by the old copies
    judged = oracle.with_guests(new, after.guests.numpy())
    best = oracle.linear_program(judged, counts.sum(0).numpy())
    assert int(after.rank_load.max()) == np.ceil(best - 1e-6)


def refreshed(group):
    placement = ring().with_guest_slots(G)
    rank, residents = group.rank(), placement.num_resident_slots
    experts = torch.nn.ModuleList(torch.nn.Linear(3, 2) for _ in range(residents))
    replicas = Replicas(experts, placement, group)
    settings = dataclasses.replace(SETTINGS, refresh=2)
    with unittest.mock.patch.object(refresh, "Background", Inline):
        refresher = Refresher([replicas], settings=settings, choose=hot)
    replicas.copy_weights()
    planner = Planner(replicas.layer, group, solver="cpu", check=True, guest_min_tokens=1)
    moves, guests = [], []
    for step in range(8):
        plan = planner(traffic("new", rank, step))
        assert int(plan.status) == Status.OPTIMAL
        oracle.with_guests(replicas.placement, plan.guests.numpy())
        guests.append(int((plan.guests >= 0).sum()))
        moves += refresher.step()
    assert len(moves) == 1, moves
    new = replicas.placement
    assert new is planner.placement is not placement
    assert new.may_replace(placement)
    assert (new.physical_to_logical[new.guest_slots] == -1).all()
    # Weights of a replica are its home's: all ranks tell those of their slots.
    own = torch.stack([expert.weight.detach() for expert in experts])
    every = [torch.empty_like(own) for _ in range(R)]
    torch.distributed.all_gather(every, own, group=group)
    for expert, slots in enumerate(new.logical_to_physical.tolist()):
        values = [every[s // new.num_local_slots][s % new.num_local_slots] for s in slots if s >= 0]
        assert all(torch.equal(value, values[0]) for value in values), expert
    return guests


def test_a_refresher_moves_replicas_beside_guest_slots():
    (guests, *others) = ranks.run(R, refreshed)
    assert all(other == guests for other in others)
    assert guests[0] > guests[-1]  # better residents need fewer guests
