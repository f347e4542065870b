"""Collective calls: what one rank raises, all ranks raise, at once."""

import datetime
import unittest.mock

import pytest
import ranks
import torch
import torch.distributed as dist

import lplb_ep
from lplb_ep import Placement, Planner, RankError, Replicas
from lplb_ep.comm import alltoall
from lplb_ep.comm.collectives import everyone, gather_rows, memory_of, together
from lplb_ep.planning import planner

PLACEMENT = Placement([0, 1, 1, 0], 2)


def by_rank(group, facts, errors):
    """What a block with these facts and errors, of each rank, raised; and what came after."""
    raised = None
    try:
        with together(group, "a test") as brought:
            brought.update(facts[group.rank()])
            if (error := errors[group.rank()]) is not None:
                raise error
    except Exception as error:  # noqa: BLE001  (looked at below)
        raised = (type(error).__name__, str(error))
    return raised, everyone(group, group.rank())


class OddError(Exception):
    """Of no kind that the package knows."""


@pytest.mark.parametrize("error", [OddError("odd"), RuntimeError("odd"), KeyError("odd")])
def test_whatever_one_rank_raises_all_raise(error):
    own, peer, other = ranks.run(3, by_rank, [{}] * 3, [error, None, None])
    assert own == ((type(error).__name__, str(error)), [0, 1, 2])
    assert (
        peer == other == (("RankError", f"a test: ranks [0] refused; rank 0: {error}"), [0, 1, 2])
    )


def test_an_error_without_a_message_is_told_by_its_name():
    got, _ = ranks.run(2, by_rank, [{}] * 2, [None, AssertionError()])
    assert got[0] == ("RankError", "a test: ranks [1] refused; rank 1: AssertionError")


def test_each_rank_keeps_its_own_error():
    got = ranks.run(3, by_rank, [{}] * 3, [OddError("one"), None, ValueError("two")])
    assert [raised for raised, _ in got] == [
        ("OddError", "one"),
        ("RankError", "a test: ranks [0, 2] refused; rank 0: one"),
        ("ValueError", "two"),
    ]


def test_ranks_that_differ_in_a_fact_are_named():
    facts = [{"a": 1}, {"a": 1}, {"a": 2}]
    message = "a test: ranks differ in a: 1 on ranks [0, 1]; 2 on ranks [2]"
    assert ranks.run(3, by_rank, facts, [None] * 3) == [(("RankError", message), [0, 1, 2])] * 3
    facts = [{"a": 1}, {}, {"a": 1}]
    message = "a test: ranks differ in a: 1 on ranks [0, 2]; absent on ranks [1]"
    assert ranks.run(3, by_rank, facts, [None] * 3) == [(("RankError", message), [0, 1, 2])] * 3
    assert ranks.run(3, by_rank, [{"a": 1}] * 3, [None] * 3) == [(None, [0, 1, 2])] * 3


def test_a_single_rank_asks_no_one():
    with pytest.raises(OddError), together(None, "a test"):
        raise OddError
    with together(None, "a test") as facts:
        facts["a"] = 1


def gathered(group):
    row = torch.full((2, 3), group.rank(), dtype=torch.uint8, device=memory_of(group))
    return gather_rows(row, group).tolist()


def test_rows_come_in_rank_order():
    assert ranks.run(3, gathered) == [[[[r] * 3] * 2 for r in range(3)]] * 3


def failing(name):
    return unittest.mock.Mock(side_effect=RuntimeError(f"{name} failed"))


def makes(group, what):
    """Makes one thing of many ranks, of which something fails on rank 1 only."""
    # A rank that waits for rank 1 fails by this limit.
    short = dist.new_group(timeout=datetime.timedelta(seconds=60))
    broken = group.rank() == 1
    module, name, make = {
        "solver": (planner, "choose_solver", lambda: Planner(PLACEMENT, short)),
        "tag": (planner, "solver_fact", lambda: Planner(PLACEMENT, short)),
        "steps": (planner.Planner, "_make_backend", lambda: Planner(PLACEMENT, short)),
        "channel": (planner, "choose_solver", lambda: lplb_ep.Buffer(short).view(PLACEMENT)),
        "channel's steps": (
            planner.Planner,
            "_make_backend",
            lambda: lplb_ep.Buffer(short).view(PLACEMENT),
        ),
        "transport": (
            alltoall,
            "peers_obstacle",
            lambda: Replicas(torch.nn.Linear(3, 2, bias=False), PLACEMENT, short),
        ),
    }[what]
    with unittest.mock.patch.object(
        module, name, failing(name) if broken else getattr(module, name)
    ):
        try:
            make()
        except RuntimeError as error:
            return type(error).__name__, str(error), name, everyone(short, group.rank())
        finally:
            dist.destroy_process_group(short)


@pytest.mark.parametrize(
    "what", ["solver", "tag", "steps", "channel", "channel's steps", "transport"]
)
def test_an_unforeseen_error_on_one_rank_raises_on_all(what):
    """As CuPy raises where a GPU is out of memory."""
    peer, own = ranks.run(2, makes, what, environ={"LPLB_EP": "1"})
    kind, message, name, after = peer
    assert (kind, after) == (RankError.__name__, [0, 1])
    assert f"ranks [1] refused; rank 1: {name} failed" in message
    assert own == ("RuntimeError", f"{name} failed", name, [0, 1])
