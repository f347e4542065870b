"""Guests on one GPU, whose process plays all ranks: weights, gradients, and who does not come.

No stream waits for another rank's kernels that are launched later: they may share a queue.
"""

import guest_ranks
import numpy as np
import pytest
import torch

from lplb_ep import RankError
from lplb_ep.planning.structs import Status
from lplb_ep.weights.peer_guests import PeerGuests

pytestmark = pytest.mark.gpu

DTYPES = [  # of gradients at home, and of guests
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]


class Ranks:
    """Ranks of one process; each has a stream of its own for what a program does."""

    def __init__(self, num_ranks, num_residents, num_guests, **options):
        self.device = torch.device("cuda", torch.cuda.current_device())
        options = {"timeout_s": 5, **options}
        self.layout = guest_ranks.layout_of(num_ranks, num_residents, num_guests)
        num_bytes = 2 * self.layout.num_bytes
        addresses, self.held = guest_ranks.local_addresses(num_ranks, num_bytes, self.device)
        self.all = [
            PeerGuests(
                r, self.device, addresses, self.layout.num_bytes, num_bytes, num_ranks, **options
            )
            for r in range(num_ranks)
        ]
        self.streams = [torch.cuda.Stream() for _ in self.all]
        torch.cuda.synchronize()

    def own(self, experts, rank):
        L = self.layout.num_residents
        return [tensor[rank * L : (rank + 1) * L] for tensor in experts]

    def each(self, call):
        for rank, (one, stream) in enumerate(zip(self.all, self.streams, strict=True)):
            with torch.cuda.stream(stream):
                call(rank, one)
        torch.cuda.synchronize()


def on_gpu(table):
    return torch.from_numpy(table).cuda()


@pytest.mark.parametrize(
    ("R", "G", "num_blocks", "chunk", "num_stages"),
    [(2, 1, 16, 32768, 4), (3, 3, 1, 32768, 4), (4, 2, 7, 16384, 8), (2, 4, 100, 4096, 3)],
)
def test_guests_come_whole(R, G, num_blocks, chunk, num_stages):
    group = Ranks(R, 3, G, num_blocks=num_blocks, chunk=chunk, num_stages=num_stages)
    rng = np.random.default_rng(R)
    for step, share in enumerate((1, 0.6, 0, 0.8)):
        experts = guest_ranks.draw_experts(group.layout, step, "cuda")
        table = guest_ranks.draw_table(rng, group.layout, share)
        guests = on_gpu(table)
        group.each(lambda r, one, guests=guests: one.barrier(group.layout, guests))

        def push(rank, one, experts=experts, guests=guests):
            one.push(group.layout, group.own(experts, rank), guests)

        group.each(push)
        for rank, one in enumerate(group.all):
            one.raise_errors()
            wrong = guest_ranks.num_wrong(group.layout, one.memory, experts, guests[rank])
            assert int(wrong) == 0, (step, rank)


def gradients(group, dtypes, seed):
    """Totals [E, ...] and, of each rank, parts [G, ...] of each parameter, on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def draw(number, shape, dtype):
        return torch.randn((number, *shape), generator=generator).to(dtype)

    layout, totals, parts = group.layout, [], []
    for p, shape in enumerate(layout.shapes):
        totals.append(draw(len(layout.home_rank), shape, dtypes[p % len(dtypes)][0]))
    for _ in group.all:
        parts.append(
            [
                draw(layout.num_guests, shape, dtypes[p % len(dtypes)][1])
                for p, shape in enumerate(layout.shapes)
            ]
        )
    return totals, parts


@pytest.mark.parametrize(("R", "G", "num_blocks"), [(2, 1, 16), (3, 3, 5), (4, 2, 40)])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_are_added_in_order(R, G, num_blocks, in_place):
    group, rng = Ranks(R, 3, G, num_blocks=num_blocks), np.random.default_rng(R)
    for step in range(3):
        totals, parts = gradients(group, DTYPES[step:] + DTYPES[:step], step)
        table = guest_ranks.draw_table(rng, group.layout, 0.9)
        table[R - 1] = table[0] if R > 2 else table[R - 1]
        table[R - 1][table[R - 1] // 3 == R - 1] = -1
        guests, at_home = on_gpu(table), [t.cuda() for t in totals]
        group.each(lambda r, one, guests=guests: one.barrier(group.layout, guests))

        def reduce(rank, one, guests=guests, at_home=at_home, parts=parts):
            own = [part.cuda() for part in parts[rank]]
            if in_place:
                blocks = one.gradient_blocks(group.layout, [part.dtype for part in own])
                for block, part in zip(blocks, own, strict=True):
                    for to, of_slot in zip(block, part, strict=True):
                        to.copy_(of_slot)
                own = blocks
            one.begin_reduce(group.layout, own, group.own(at_home, rank), guests)

        group.each(reduce)
        for rank, slot in np.argwhere(table >= 0):  # by rank, then slot
            for p, total in enumerate(totals):
                total[table[rank, slot]] += parts[rank][p][slot]
        for p, total in enumerate(totals):
            assert torch.equal(at_home[p].cpu(), total), (step, p)
        for one in group.all:
            one.raise_errors()


def test_an_absent_rank_is_named_and_its_guests_are_nan():
    group = Ranks(2, 2, 1, timeout_s=0.2)
    experts = guest_ranks.draw_experts(group.layout, 0, "cuda")
    guests = on_gpu(np.array([[2], [1]], np.int32))
    group.each(lambda r, one: one.barrier(group.layout, guests))
    first = group.all[0]
    first.push(group.layout, group.own(experts, 0), guests)
    first.wait()
    torch.cuda.synchronize()
    assert all((b.view(torch.uint8) == 255).all() for b in group.layout.blocks(first.memory))
    with pytest.raises(RankError, match=r"ranks \[1\] did not come to a push of guests"):
        first.raise_errors()


def test_a_rank_that_timed_out_has_no_old_weights():
    group = Ranks(2, 2, 1)
    experts = guest_ranks.draw_experts(group.layout, 0, "cuda")
    guests = on_gpu(np.full((2, 1), -1, np.int32))
    status = torch.tensor([Status.TIMED_OUT], dtype=torch.int32).cuda()
    first = group.all[0]
    first.push(group.layout, group.own(experts, 0), guests, status)
    torch.cuda.synchronize()
    assert all((b.view(torch.uint8) == 255).all() for b in group.layout.blocks(first.memory))
