"""Exchanges by `torch.distributed`: ranks that do not come are named, whatever keeps them."""

import datetime
import logging
import os
import signal
import time

import pytest
import ranks
import torch
import torch.distributed as dist

from lplb_ep import Placement, Planner, RankError
from lplb_ep.comm import watchdog
from lplb_ep.comm.collectives import everyone
from lplb_ep.comm.stalls import Stall
from lplb_ep.comm.torch_exchange import GpuWatch

TOPK = torch.tensor([[0, 1], [1, -1]])


def planner_of(group, timeout_s, **kwargs):
    placement = Placement([0, 1] * group.size(), group.size())
    return Planner(placement, group, counts="torch", solver="cpu", timeout_s=timeout_s, **kwargs)


def over_tcp(group):
    """The same ranks in another world, whose first rank keeps the store."""
    rank, size = group.rank(), group.size()
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False)
    (port, *_) = everyone(group, store.port if rank == 0 else 0)
    if rank > 0:
        store = dist.TCPStore("127.0.0.1", port, size, False)
    # A rank that leaves the old group could take its last message along.
    store.set(f"rank {rank}", "")
    store.wait([f"rank {other}" for other in range(size)])
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return dist.group.WORLD


def raised(planner):
    with pytest.raises(RankError) as error:
        planner(TOPK)
    return str(error.value)


@pytest.fixture
def own_processes():
    """Other tests have other processes: the world that is left may have late messages of theirs."""
    ranks.close()
    yield
    ranks.close()


def first_plan(group):
    """The connections are there then, and the time limit of a test is for waiting alone."""
    planner_of(group, 40)(TOPK)


def killed(group, victim, tcp):
    group = over_tcp(group) if tcp else group
    planner = planner_of(group, 40)
    first_plan(group)
    if group.rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    message = raised(planner)
    assert raised(planner) == message
    raise RankError(message)


@pytest.mark.usefixtures("own_processes")
@pytest.mark.parametrize(("victim", "tcp"), [(2, False), (0, True)])
def test_a_killed_rank_is_named(victim, tcp):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(3, killed, victim, tcp)
    for rank, (kind, message) in enumerate(failure.value.errors):
        if rank == victim:
            assert kind == "EOFError"
        else:
            assert kind == "RankError"
            assert f"ranks [{victim}] ended before they sent their counts (layer " in message
            assert "The exchange is broken" in message


def hung(group, victim, tcp):
    """The victim plans when the others have given up, and then once more."""
    if tcp:
        over_tcp(group)
    group, aside = dist.new_group(), dist.new_group()
    first_plan(group)
    planner, another = planner_of(group, 1), planner_of(group, 1)
    if group.rank() == victim:
        dist.barrier(aside)
        planner(TOPK)  # the others' rows are there
        return raised(planner)
    try:
        message = raised(planner)
        assert raised(planner) == raised(another) == message
    finally:
        dist.barrier(aside)
    return message


@pytest.mark.parametrize(("victim", "tcp"), [(2, False), (0, True)])
def test_a_hung_rank_is_named_and_learns_that_it_came_late(victim, tcp, request):
    if tcp:
        request.getfixturevalue("own_processes")
    messages = ranks.run(3, hung, victim, tcp)
    others = [rank for rank in range(3) if rank != victim]
    for rank in others:
        assert f"ranks [{victim}] sent no counts within 1 s (layer " in messages[rank]
        assert "The exchange is broken" in messages[rank]
    assert f"this rank came late: ranks {others} had given up waiting" in messages[victim]


def stopped(group):
    """The first rank stands still, and with it the store that it keeps."""
    group = over_tcp(group)
    first, _ = everyone(group, os.getpid())
    first_plan(group)
    planner = planner_of(group, 1)
    if group.rank() == 0:
        os.kill(first, signal.SIGSTOP)
        return None
    try:
        return raised(planner)
    finally:
        os.kill(first, signal.SIGCONT)


@pytest.mark.usefixtures("own_processes")
def test_a_rank_that_stands_still_with_the_store_is_named():
    _, message = ranks.run(2, stopped)
    assert "ranks [0] sent no counts within 1 s" in message
    assert "The group's store does not answer either" in message


def limited(group):
    """gloo's own limit ends the wait."""
    group, aside = dist.new_group(timeout=datetime.timedelta(seconds=4)), dist.new_group()
    planner = planner_of(group, 40)
    first_plan(group)
    said = "" if group.rank() == 1 else raised(planner)
    dist.barrier(aside)
    return said


def test_a_missing_rank_is_named_where_the_group_has_a_shorter_limit():
    first, _, last = ranks.run(3, limited)
    assert first.startswith("ranks [1] ")
    assert last.startswith("ranks [1] ")


def late(group):
    """One comes after the others have begun to say that they wait, and in time."""
    planner = planner_of(group, 40)
    if group.rank() == 1:
        time.sleep(1.2)
    planner(TOPK)
    return int(planner(TOPK).counts.sum())


def test_a_rank_that_comes_in_time_is_waited_for():
    assert ranks.run(3, late) == [9] * 3


def forgotten(group):
    """Who waited before, and does not now, is missing."""
    if group.rank() == 0:
        before = Stall(group)
        before.end()
        before._thread.join()
    dist.barrier(group)
    if group.rank() == 0:
        dist.barrier(group)
        return None
    stall = Stall(group)
    stall.ask()
    while not (stall._answers and stall._unheard() <= {0}):
        time.sleep(0.01)
    said = stall.explain("a test", 1)
    dist.barrier(group)
    stall.end()
    return said


def test_a_wait_that_is_over_is_forgotten():
    _, *said = ranks.run(3, forgotten)
    assert said == ["ranks [0] sent no counts within 1 s (a test): ended, hung or slow"] * 2


def aborting(group):
    planner = planner_of(group, 1, abort_on_timeout=True)
    if group.rank() == 0:
        planner(TOPK)


@pytest.mark.usefixtures("own_processes")
def test_a_process_ends_when_a_rank_is_missing_if_asked():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, aborting)
    assert [error and error[0] for error in failure.value.errors] == ["EOFError", None]


class Reached:
    """An event that the GPU reaches when the test says so."""

    def __init__(self):
        self.is_recorded = self.is_reached = False

    def record(self):
        self.is_recorded, self.is_reached = True, False

    def query(self):
        return self.is_reached


def scanned(said, until):
    """Looks as the watchdog does, until it has said something, or so long."""
    while time.monotonic() < until and not said:
        watchdog.scan()
        time.sleep(0.01)
    found = said.copy()
    said.clear()
    return found


def watched(group):
    events, said = [], []

    class Heard(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    def make_event():
        events.append(Reached())
        return events[-1]

    watchdog.log.logger.addHandler(handler := Heard())
    watch = GpuWatch(group, 1, make_event)
    watchdog.watch(watch, GpuWatch.find, abort=False)
    found = []
    dist.barrier(group)
    # The last rank does not come.
    if group.rank() != 2:
        watch.record("layer 1")
        found += scanned(said, time.monotonic() + 50)
        watch.record("layer 2")  # is behind it, and said with it
        found += scanned(said, time.monotonic() + 0.5)
    dist.barrier(group)
    # It comes, and soon to the next one.
    for event in events:
        event.is_reached = True
    found += scanned(said, time.monotonic() + 0.5)
    assert watch._stall is None
    dist.barrier(group)
    # All come, and their rows do not.
    watch.record("layer 3")
    found += scanned(said, time.monotonic() + 50)
    dist.barrier(group)
    watchdog.log.logger.removeHandler(handler)
    return found


def test_missing_ranks_are_logged_where_only_the_gpu_waits():
    *waiting, absent = ranks.run(3, watched)
    all_wait = "counts did not arrive within 1 s (layer 3), though all ranks wait for them: "
    assert len(absent) == 1
    assert absent[0].startswith(f"lplb_ep rank 2: {all_wait}")
    for rank, (first, second) in enumerate(waiting):
        assert first == (
            f"lplb_ep rank {rank}: ranks [2] sent no counts within 1 s (layer 1): "
            "ended, hung or slow. The GPU goes on waiting"
        )
        assert second.startswith(f"lplb_ep rank {rank}: {all_wait}")
