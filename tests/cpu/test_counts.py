"""Which way counts travel, and how ranks that do not come are named."""

import dataclasses
import logging
import subprocess
import sys
import threading
import types
import unittest.mock
from functools import partial

import numpy as np
import pytest
import ranks
import torch

from lplb_ep import Placement, Planner, RankError
from lplb_ep.comm import nvshmem, peers, reachability, watchdog
from lplb_ep.comm.connect import choose_counts, connect
from lplb_ep.comm.exchange import Limit, Windows
from lplb_ep.comm.reachability import Reachability

FACT = reachability._Fact(node="a", device="0", nvshmem="", world=None, has_part_of_gpu=False)


def fact(**changes):
    return dataclasses.replace(FACT, **changes)


@pytest.mark.parametrize(
    ("asked", "reach", "chosen", "because"),
    [
        ("auto", Reachability(), "nvshmem", "the kernels reach"),
        ("auto", Reachability(nvshmem="no package"), "ipc", "not nvshmem: no package"),
        (
            "auto",
            Reachability("no package", "2 nodes"),
            "torch",
            "not nvshmem: no package; not ipc: 2 no",
        ),
        (
            "auto",
            Reachability("", "2 nodes", 4),
            "torch",
            "not nvshmem: between nodes only where asked",
        ),
        ("nvshmem", Reachability("", "2 nodes", 4), "nvshmem", "asked for"),
        ("ipc", Reachability(), "ipc", "asked for"),
        ("torch", Reachability(), "torch", "asked for"),
    ],
)
def test_the_choice_comes_with_its_reason(asked, reach, chosen, because):
    got, reason = choose_counts(asked, 8, True, True, reach)
    assert got == chosen
    assert because in reason


def test_what_is_not_possible_is_refused_and_not_replaced():
    with pytest.raises(ValueError, match="counts='nvshmem' is not possible: no package"):
        choose_counts("nvshmem", 8, True, True, Reachability(nvshmem="no package"))
    with pytest.raises(ValueError, match="counts='ipc' is not possible: plans are made on the CPU"):
        choose_counts("ipc", 8, True, False, Reachability())
    assert choose_counts("auto", 8, True, False, Reachability())[0] == "torch"
    with pytest.raises(ValueError, match="needs a group"):
        choose_counts("nvshmem", 8, False, True, Reachability())
    with pytest.raises(ValueError, match="counts must be one of auto, nvshmem, ipc, torch, given"):
        choose_counts("mpi", 8, True, True, Reachability())
    assert choose_counts("nvshmem", 1, True, True, Reachability())[0] == "local"
    with pytest.raises(ValueError, match=r"plans are made on the CPU|needs a group"):
        Planner(Placement([0, 1, 0, 1], 2), rank=0, counts="nvshmem", solver="cpu")


def test_reach_is_what_all_ranks_have():
    two = [fact(), fact(device="1")]
    assert reachability._find(two) == Reachability("", "", 2)
    lacking = [*two, fact(device="2", nvshmem="nvshmem4py is not installed")]
    assert reachability._find(lacking) == Reachability("rank 2: nvshmem4py is not installed", "", 3)
    shared = reachability._find([fact(), fact()])
    assert shared.nvshmem.startswith("ranks share a GPU")
    assert shared.ipc == ""
    parts = [fact(has_part_of_gpu=True), fact(has_part_of_gpu=True)]
    assert reachability._find(parts) == Reachability("", "", 2)


def on_nodes(names):
    return reachability._find([fact(node=n, device=str(i)) for i, n in enumerate(names)])


def test_nodes_are_ranks_in_a_row_and_as_many():
    assert on_nodes("aabb") == Reachability("", "the ranks are on 2 nodes", 2)
    for names in ("abab", "aab", "aaab"):
        found = on_nodes(names)
        assert found.nvshmem.startswith("the ranks are on 2 nodes, and a node's are not"), names
        assert (found.ipc, found.num_ranks_per_node) == ("the ranks are on 2 nodes", 0)


@pytest.mark.parametrize(
    ("worlds", "num_nodes", "obstacle"),
    [
        ([None] * 4, 1, ""),
        ([(4, 0), (4, 1), (4, 2), (4, 3)], 1, ""),
        ([(4, 0), (4, 1), (4, 2), (4, 3)], 2, ""),
        ([(2, 0), (2, 0), (2, 1), (2, 1)], 2, ""),  # DeepEP's across nodes
        ([(2, 0), (2, 0), (2, 1), (2, 1)], 1, "with 2 PEs, of which rank 0 of 4 is 0"),
        ([(4, 0), (4, 1), (4, 3), (4, 2)], 1, "with 4 PEs, of which rank 2 of 4 is 3"),
        ([(4, 0), None, (4, 2), (4, 3)], 1, "on some ranks only: not on [1]"),
    ],
)
def test_a_world_that_runs_is_joined_if_it_is_the_groups(worlds, num_nodes, obstacle):
    found = nvshmem.world_obstacle(worlds, num_nodes)
    assert obstacle in found
    assert bool(obstacle) == bool(found)


def connected(group, full_on, no_id_on):
    """`auto` where CUDA IPC is out of reach, and NVSHMEM fails in its own way on some ranks."""

    def get_unique_id(empty=False):
        if group.rank() in no_id_on:
            raise RuntimeError("no network interface")
        return types.SimpleNamespace(_data=np.zeros(128, np.uint8))

    fakes = {
        name: types.ModuleType(name)
        for name in ("nvshmem", "nvshmem.bindings", "nvshmem.core", "cuda", "cuda.core")
    }
    bindings, core = fakes["nvshmem.bindings"], fakes["nvshmem.core"]
    bindings.malloc = lambda num_bytes: 0 if group.rank() in full_on else 4096
    bindings.ptr = lambda address, pe: address
    core.get_unique_id, core.init = get_unique_id, lambda **_: None
    fakes["nvshmem"].bindings, fakes["nvshmem"].core = bindings, core
    fakes["cuda.core"].Device = lambda index: types.SimpleNamespace(set_current=lambda: None)
    fakes["cuda"].core = fakes["cuda.core"]
    reachability._of_group[group] = Reachability(ipc="no peer access")
    peers._memories.pop(group, None)
    patch = unittest.mock.patch
    with (
        patch.dict(sys.modules, fakes),
        patch.object(torch.cuda, "current_device", return_value=0),
        patch.object(nvshmem, "state", return_value=("", None)),
        patch.object(peers, "_zero"),
        patch.object(nvshmem, "_started", []),
        patch.dict("os.environ"),
    ):
        kind = connect("auto", group, 2, 8, Limit("a test"), on_gpu=True).kind
    return kind, reachability.reachability(group).nvshmem


@pytest.mark.parametrize(
    ("full_on", "no_id_on", "kind", "why"),
    [
        ((), (), "nvshmem", ""),
        ((0, 1), (), "torch", "has no"),
        ((1,), (), "torch", "has no"),
        ((), (0,), "torch", "no network interface"),
        ((), (1,), "torch", "no network interface"),
    ],
)
def test_auto_goes_on_where_nvshmem_fails_on_some_rank(full_on, no_id_on, kind, why):
    for found, obstacle in ranks.run(2, connected, full_on, no_id_on):
        assert found == kind
        assert why in obstacle


def test_a_window_has_two_batches_of_words_for_every_rank():
    assert Windows.num_bytes(8, 261) == 2 * 8 * 261 * 8


class Owner:
    pass


def chunks(sizes, *, fails=()):
    """What `_Chunks.cut` returns for each size, or what it raised; allocations are numbered."""
    number = iter(range(100))

    def allocate(group, num_bytes):
        n = next(number)
        if n in fails:
            raise RankError("no memory")
        return [1_000_000_000 * (n + 1), 0]

    pieces, found = peers._Chunks(allocate), []
    for size in sizes:
        try:
            found.append(pieces.cut(None, size)[0])
        except RankError as error:
            found.append(str(error))
    return found


def test_pieces_of_memory_do_not_overlap_where_an_allocation_fails():
    two = 2 << 20
    assert chunks([100, 100, two]) == [1_000_000_000, 1_000_000_256, 2_000_000_000]
    assert chunks([100, 64 * two, two - 512, 512], fails=[1]) == [
        *(1_000_000_000, "no memory", 1_000_000_256, 3_000_000_000)
    ]
    assert chunks([100, 100], fails=[0]) == ["no memory", 2_000_000_000]


def test_what_could_not_be_had_is_not_tried_again():
    group = type("Group", (), {})()
    reachability._of_group[group] = Reachability("", "", 4)
    reachability.rule_out(group, "ipc", "no peer access")
    assert reachability.reachability(group) == Reachability("", "no peer access", 4)
    assert choose_counts("auto", 4, True, True, reachability.reachability(group))[0] == "nvshmem"
    reachability.rule_out(group, "nvshmem", "no heap")
    kind, reason = choose_counts("auto", 4, True, True, reachability.reachability(group))
    assert (kind, reason) == ("torch", "not nvshmem: no heap; not ipc: no peer access")


def test_the_watchdog_names_missing_ranks_once(caplog):
    """Looked at by hand; the watchdog's own thread may look in between, and changes nothing."""
    owner, missing = Owner(), np.zeros(4, np.int32)
    say = partial(watchdog.missing_ranks, missing, "abc", 1.5)
    watchdog.watch(owner, watchdog.newly_missing(missing, say), abort=False)

    def named():
        watchdog.look(owner)
        return len(caplog.messages)

    with caplog.at_level(logging.ERROR, logger="lplb_ep.comm.watchdog"):
        assert named() == 0
        missing[[1, 3]] = 1
        assert named() == named() == 1
        missing[:] = 0
        assert named() == 1
        missing[1] = 1  # anew
        assert named() == 2
    assert caplog.messages == [
        f"lplb_ep: ranks {ranks} sent no counts within 1.5 s (abc): ended, hung or slow. "
        "That batch went to the home slots"
        for ranks in ([1, 3], [1])
    ]


def test_the_watchdog_looks_by_itself(caplog):
    owner, missing, said = Owner(), np.zeros(2, np.int32), threading.Event()

    def say():
        said.set()
        return "rank 1 is missing"

    with caplog.at_level(logging.ERROR, logger="lplb_ep.comm.watchdog"):
        watchdog.watch(owner, watchdog.newly_missing(missing, say), abort=False)
        missing[1] = 1
        assert said.wait(60)


def test_the_watchdog_ends_the_process_if_asked():
    program = """
import time
from lplb_ep.comm import watchdog
class Owner: pass
owner = Owner()
watchdog.watch(owner, lambda _: "ranks [0, 1] are not there", abort=True)
time.sleep(180)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=170
    )
    assert done.returncode == -6
    assert "ranks [0, 1] are not there" in done.stderr
    assert "this process ends" in done.stderr
