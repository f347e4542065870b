"""Guests between ranks that have a GPU each or share one: pushes, gradients, graphs, late ranks."""

from __future__ import annotations

import time

import guest_ranks
import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist

from lplb_ep import RankError
from lplb_ep.weights.guest_transport import BatchNumber
from lplb_ep.weights.guest_transports import make_guest_transport

pytestmark = pytest.mark.gpu

L = 3


def start(group, num_guests):
    torch.cuda.set_device(group.rank() % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device())
    layout = guest_ranks.layout_of(group.size(), L, num_guests)
    one = make_guest_transport(group, device, layout.num_bytes, "peers")
    return layout, one, device


def own(tensors, group):
    return [tensor[group.rank() * L : (group.rank() + 1) * L] for tensor in tensors]


def pushes(group, num_guests, num_steps):
    """Weights that change, late streams, and tables from empty to full."""
    layout, one, device = start(group, num_guests)
    rng = np.random.default_rng(0)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    experts = guest_ranks.draw_experts(layout, 0, device)
    for step in range(num_steps):
        table = torch.from_numpy(guest_ranks.draw_table(rng, layout, (1, 0.6, 0)[step % 3]))
        guests = table.to(device)
        if (step + group.rank()) % 4 == 0:
            torch.cuda._sleep(2_000_000)
        one.join()
        for tensor in experts:
            tensor.view(torch.uint8).add_(1)
        one.barrier(layout, guests)
        if (step + group.rank()) % 4 == 1:
            with torch.cuda.stream(one.stream):
                torch.cuda._sleep(2_000_000)
        number = BatchNumber(torch.full((1,), step + 1 << 32, device=device)) if step % 2 else None
        one.push(layout, own(experts, group), guests, None, number)
        one.wait()
        wrong += guest_ranks.num_wrong(layout, one.memory, experts, guests[group.rank()])
    one.raise_errors()
    assert int(wrong) == 0
    dist.barrier(group)


@pytest.mark.parametrize("connections", ["1", "8"])
@pytest.mark.parametrize(("num_ranks", "num_guests"), [(2, 1), (2, 4), (4, 2), (8, 1)])
def test_guests_come_whole(service, num_ranks, num_guests, connections):
    environ = {**service(num_ranks), "CUDA_DEVICE_MAX_CONNECTIONS": connections}
    ranks.close()  # a process has as many connections as it began with
    try:
        ranks.run(num_ranks, pushes, num_guests, 30, environ=environ, timeout=100)
    finally:
        ranks.close()


def replays(group, num_replays):
    layout, one, device = start(group, 2)
    rng, num_tables = np.random.default_rng(1), 101
    drawn = [guest_ranks.draw_table(rng, layout, 0.6) for _ in range(num_tables)]
    tables = torch.from_numpy(np.stack(drawn)).to(device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    experts = guest_ranks.draw_experts(layout, 0, device)
    guests, word = torch.empty_like(tables[0]), torch.zeros(1, dtype=torch.int64, device=device)
    grads = [torch.zeros(len(layout.home_rank), *s, device=device) for s in layout.shapes]
    parts = [torch.ones(layout.num_guests, *s, device=device) for s in layout.shapes]
    visits = torch.zeros(len(layout.home_rank), dtype=torch.int64, device=device)
    experts_ = torch.arange(len(layout.home_rank), device=device)
    number = BatchNumber(word)

    def batch():
        word.copy_(step + 1 << 32)
        for tensor in experts:
            tensor.view(torch.uint8).add_(1)
        guests.copy_(tables.index_select(0, step % num_tables)[0])
        visits.add_((guests.reshape(-1, 1) == experts_).sum(0))
        one.barrier(layout, guests)
        one.push(layout, own(experts, group), guests, None, number)
        one.wait()
        wrong.add_(guest_ranks.num_wrong(layout, one.memory, experts, guests[group.rank()]))
        one.reduce(layout, parts, own(grads, group), guests, number)
        step.add_(1)

    batch()
    torch.cuda.synchronize()
    dist.barrier(group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch()
    for _ in range(num_replays):
        graph.replay()
    torch.cuda.synchronize()
    one.raise_errors()
    assert int(wrong) == 0
    assert int(step) == num_replays + 1
    for of_rank in own(grads, group):
        counted = own([visits], group)[0].view(-1, *[1] * (of_rank.dim() - 1))
        assert (of_rank == counted).all()
    dist.barrier(group)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_graph_is_replayed_over_changing_guests(node, num_ranks):
    node(num_ranks, replays, 10_000, timeout=150)


def late(group, is_replayed):
    """The last rank comes after the limit: NaN and its name, then all is well again."""
    layout, one, device = start(group, 1)
    last = group.size() - 1
    table = torch.full((group.size(), 1), -1, dtype=torch.int32)
    table[0, 0], table[last, 0] = L * last, 0
    experts, guests = guest_ranks.draw_experts(layout, 0, device), table.to(device)
    raised, word = "", torch.zeros(1, dtype=torch.int64, device=device)
    number = BatchNumber(word)

    def push():
        one.push(layout, own(experts, group), guests, None, number)
        one.wait()

    if is_replayed:
        word.fill_(1 << 32)
        one.barrier(layout, guests)
        push()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            push()
        push = graph.replay
    dist.barrier(group)
    for step in range(2):
        one.barrier(layout, guests)
        torch.cuda.synchronize()
        dist.barrier(group)
        if step == 0 and group.rank() == last:
            time.sleep(3)
        word.fill_(step + 2 << 32)
        push()
        torch.cuda.synchronize()
        wrong = int(guest_ranks.num_wrong(layout, one.memory, experts, guests[group.rank()]))
        if step == 0 and group.rank() == 0:
            blocks = layout.blocks(one.memory)
            assert all((block.view(torch.uint8) == 255).all() for block in blocks)
            try:
                one.raise_errors()
            except RankError as error:
                raised = str(error)
        else:
            one.raise_errors()
            assert wrong == 0
        dist.barrier(group)
    return raised


@pytest.mark.parametrize("is_replayed", [False, True])
def test_a_rank_that_comes_late_is_named(service, is_replayed):
    ranks.close()  # a transport has its limit from when it was made
    try:
        environ = {**service(2), "LPLB_EP_TIMEOUT_S": "1"}
        found = ranks.run(2, late, is_replayed, environ=environ)
    finally:
        ranks.close()
    assert found[0].startswith("ranks [1] did not come to a push of guests")
    assert found[1] == ""
