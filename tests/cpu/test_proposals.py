"""Which replicas are moved, and the process that chooses them."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal

import numpy as np
import oracle
import pytest
from refreshing import (
    SETTINGS,
    D,
    E,
    R,
    finish,
    hot,
    moved,
    ring,
    traffic,
)

from lplb_ep import (
    Placement,
    PlacementError,
)
from lplb_ep.planning import reference
from lplb_ep.weights import proposals
from lplb_ep.weights.background import Background


def broken(*_, **__):
    raise RuntimeError("no idea")


def deadly(*_, **__):
    os._exit(3)


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
    for which, proposed in (
        (ring(), proposal.imbalance_before),
        (placement, proposal.imbalance_after),
    ):
        ratio = [oracle.linear_program(which, load) / (load.sum() / R) for load in between]
        assert proposed == pytest.approx(np.mean(ratio), rel=1e-6)
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
def test_the_background_takes_one_core_unless_it_is_set(set_by_user, monkeypatch, caplog):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    background = Background()
    background.start([job(["new"] * 8, says_threads)])
    finish(background)
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
    finish(background)
    assert background.take() == []
    assert "ended with status 3" in caplog.text
    jobs = [job(["old"] * 8), job(["new"] * 8, broken), job(["new"] * 8)]
    background.start(jobs)
    finish(background)
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
