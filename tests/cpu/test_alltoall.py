"""Bytes between ranks: the rounds of copies into windows, with threads in the place of GPUs."""

import ctypes
import threading
import time

import numpy as np
import pytest
import ranks
import torch

from lplb_ep import Placement, RankError, Replicas
from lplb_ep.comm.alltoall import PeerTransport, TorchTransport, make_transport

BUFFER_BYTES = 64
UNWRITTEN = 255


class Slow:
    """`PeerCopies` of a thread, which dawdles; flags as the kernel has them."""

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


def run_rank(rank, transport, tables, wrong):
    for call, table in enumerate(tables):
        R = len(table)
        sent = np.concatenate([value(rank, t, table[rank][t], call) for t in range(R)])
        expected = np.concatenate([value(s, rank, table[s][rank], call) for s in range(R)])
        received = torch.full((len(expected),), UNWRITTEN, dtype=torch.uint8)
        transport.all_to_all(received, torch.from_numpy(sent), table)
        wrong[rank] += int((received.numpy() != expected).any())


def send_all(tables, copies=Slow):
    """How often each rank received something else; and the flags."""
    R = len(tables[0])
    memory = np.full((R, 2 * BUFFER_BYTES), UNWRITTEN, np.uint8)
    windows = [row.ctypes.data for row in memory]
    flags, wrong, cpu = np.zeros((R, R), np.int64), [0] * R, torch.device("cpu")
    transports = [
        PeerTransport(r, cpu, windows, BUFFER_BYTES, copies(r, flags, memory)) for r in range(R)
    ]
    threads = [
        threading.Thread(target=run_rank, args=(rank, transport, tables, wrong))
        for rank, transport in enumerate(transports)
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


class OneBuffer(Slow):
    """As if windows had a single buffer, which one rank is slow to empty."""

    has_waited = False

    def copy(self, target, source, num_bytes):
        target, source = self._fold(target), self._fold(source)
        own = self.memory[self.rank, :BUFFER_BYTES]
        if self.rank == 2 and source == own.ctypes.data and not self.has_waited:
            self.has_waited, first_round = True, value(0, 2, 150, 0)[:BUFFER_BYTES]
            while (own == first_round).all():  # until the next round's bytes are there
                time.sleep(0)
        super().copy(target, source, num_bytes)

    def _fold(self, address):
        row, place = divmod(address - self.memory.ctypes.data, 2 * BUFFER_BYTES)
        inside = 0 <= row < len(self.memory)
        return address - (BUFFER_BYTES if inside and place >= BUFFER_BYTES else 0)


def test_a_window_that_is_written_too_early_would_show():
    wrong, _ = send_all([[[150] * 3] * 3], OneBuffer)
    assert wrong[2] == 1


def connected(group):
    device = torch.device("cpu")
    assert isinstance(make_transport(None, device), TorchTransport)
    assert isinstance(make_transport(group, device), TorchTransport)
    with pytest.raises(
        ValueError, match="'peers' is not possible: rank 0: its weights are on the CPU"
    ):
        make_transport(group, device, "peers")
    experts, placement = torch.nn.Linear(3, 2, bias=False), Placement([0, 1, 1, 0], 2)
    if group.rank() == 0:
        with pytest.raises(ValueError, match="transport must be one of auto, peers, torch; got 'x"):
            Replicas(experts, placement, group, transport="x")
    else:
        with pytest.raises(RankError, match=r"ranks \[0\] refused"):
            Replicas(experts, placement, group)


def test_a_transport_that_is_not_possible_is_named():
    ranks.run(2, connected)
