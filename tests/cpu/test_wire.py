"""Bytes between ranks: the rounds of copies into windows, with threads in the place of GPUs."""

import ctypes
import threading
import time

import numpy as np
import pytest
import ranks
import torch

from lplb_ep import Placement, RankError, Replicas
from lplb_ep.comm.alltoall import PeerWire, TorchWire, connect

HALF_BYTES = 64
UNWRITTEN = 255


class Slow:
    """`cuda.Peers` of a thread, which dawdles; flags as the kernel has them."""

    def __init__(self, rank, flags, memory):
        self.rank, self.flags, self.memory = rank, flags, memory
        self.random = np.random.default_rng(rank)

    def _dawdle(self):
        if self.random.random() < 0.3:
            time.sleep(0.001 * self.random.random())

    def copy(self, target, source, num_bytes):
        self._dawdle()
        ctypes.memmove(target, source, num_bytes)

    def barrier(self, number):
        self._dawdle()
        self.flags[:, self.rank] = number
        deadline = time.monotonic() + 180
        while (self.flags[self.rank] < number).any():
            assert time.monotonic() < deadline
            time.sleep(0)


def value(source, target, size, call):
    return np.random.default_rng((source, target, call)).integers(0, 255, size, np.uint8)


def run_rank(rank, wire, tables, wrong):
    for call, table in enumerate(tables):
        R = len(table)
        sent = np.concatenate([value(rank, t, table[rank][t], call) for t in range(R)])
        expected = np.concatenate([value(s, rank, table[s][rank], call) for s in range(R)])
        received = torch.full((len(expected),), UNWRITTEN, dtype=torch.uint8)
        wire.all_to_all(received, torch.from_numpy(sent), table)
        wrong[rank] += int((received.numpy() != expected).any())


def send_all(tables, copies=Slow):
    """How often each rank received something else; and the flags."""
    R = len(tables[0])
    memory = np.full((R, 2 * HALF_BYTES), UNWRITTEN, np.uint8)
    windows = [row.ctypes.data for row in memory]
    flags, wrong, cpu = np.zeros((R, R), np.int64), [0] * R, torch.device("cpu")
    wires = [PeerWire(r, cpu, windows, HALF_BYTES, copies(r, flags, memory)) for r in range(R)]
    threads = [
        threading.Thread(target=run_rank, args=(rank, wire, tables, wrong))
        for rank, wire in enumerate(wires)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return wrong, flags


@pytest.mark.parametrize("R", [2, 3, 8])
def test_all_bytes_arrive_whatever_the_timing(R):
    rng = np.random.default_rng(R)
    tables = [rng.integers(0, 200, (R, R)) * rng.integers(0, 2, (R, R)) for _ in range(15)]
    tables[3][:] = 0
    wrong, flags = send_all([table.tolist() for table in tables])
    assert wrong == [0] * R
    assert len(set(flags.flatten())) == 1  # as many rounds on each rank


class OneHalf(Slow):
    """As if windows had a single half."""

    def copy(self, target, source, num_bytes):
        super().copy(self._fold(target), self._fold(source), num_bytes)

    def _fold(self, address):
        row, place = divmod(address - self.memory.ctypes.data, 2 * HALF_BYTES)
        inside = 0 <= row < len(self.memory)
        return address - (HALF_BYTES if inside and place >= HALF_BYTES else 0)


def test_a_window_that_is_written_too_early_would_show():
    wrong, _ = send_all([[[150] * 3] * 3] * 20, OneHalf)
    assert sum(wrong)


def connected(group):
    device = torch.device("cpu")
    assert isinstance(connect(None, device), TorchWire)
    assert isinstance(connect(group, device), TorchWire)
    with pytest.raises(ValueError, match="'peers' cannot be: rank 0: its weights are on the CPU"):
        connect(group, device, "peers")
    experts, placement = torch.nn.Linear(3, 2, bias=False), Placement([0, 1, 1, 0], 2)
    if group.rank() == 0:
        with pytest.raises(ValueError, match="transport must be one of auto, peers, torch; got 'x"):
            Replicas(experts, placement, group, transport="x")
    else:
        with pytest.raises(RankError, match=r"ranks \[0\] refused"):
            Replicas(experts, placement, group)


def test_a_transport_that_cannot_be_is_named():
    ranks.run(2, connected)
