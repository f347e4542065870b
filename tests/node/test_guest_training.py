"""Training with guests between GPUs, moved by hand: weights pushed, gradients home in autograd."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lplb_ep import Guests, Layer, Placement
from lplb_ep.weights.peer_guests import PeerGuests

pytestmark = pytest.mark.gpu

E, G, SHAPE = 4, 2, (256, 384)
TABLES = [[[2, 3], [1, -1]], [[-1, -1], [-1, -1]], [[3, -1], [0, 1]]]


def weight_of(expert: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(expert))


def rows_of(expert: int, number: int) -> torch.Tensor:
    return torch.randn(
        4, SHAPE[0], generator=torch.Generator().manual_seed(10 + E * number + expert)
    )


def expected(expert: int, number: int) -> torch.Tensor:
    weight = weight_of(expert).requires_grad_()
    torch.tanh(rows_of(expert, number) @ weight).sum().backward()
    return weight.grad


def train(group, device, transport):
    """An expert and its guests take turns with its rows. Each batch comes twice, and adds up."""
    rank = group.rank()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    experts = nn.ParameterDict(
        {"w": nn.Parameter(torch.stack([weight_of(2 * rank + i) for i in (0, 1)]).to(device))}
    )
    guests = Guests(experts, Layer(Placement.homes_only(E, 2, G)), group)
    assert isinstance(guests._pools[0].transport, transport)
    for number, table in enumerate(TABLES):
        guests.prepare()
        stay = guests.push(torch.tensor(table, dtype=torch.int32, device=device))
        for step in range(2):
            if step:
                guests.push_again(stay)
            guests.wait()
            local, rows = [2 * rank, 2 * rank + 1, *table[rank]], []
            for expert in local:
                holders = [expert // 2, *(r for r in (0, 1) if expert in table[r])]
                turn = holders.index(rank) if expert >= 0 else 0
                of_expert = rows_of(max(expert, 0), number).to(device)
                rows.append(of_expert[turn :: len(holders)] if expert >= 0 else of_expert[:0])
            x = torch.cat(rows).requires_grad_()
            x, own, arrive = guests.split_weights(x)
            addresses = []
            own["w"].register_hook(lambda grad, to=addresses: to.append(grad.data_ptr()))
            parts = x.split([*map(len, rows)])
            weights = [*own["w"], *arrive()["w"]]
            out = [torch.tanh(part @ one) for part, one in zip(parts, weights, strict=True)]
            torch.cat(out).sum().backward()
            gradient = experts.w.grad
            if step == 0:  # autograd's own, to which guests' was added
                assert addresses == [gradient.data_ptr()]
        for slot in (0, 1):
            want = 2 * expected(2 * rank + slot, number)
            torch.testing.assert_close(gradient[slot].cpu(), want, rtol=1e-3, atol=1e-3)
        experts.zero_grad()
    guests._pools[0].transport.raise_errors()
    dist.barrier(group)


def test_gradients_come_home_and_are_not_copied(node):
    node(2, train, "cuda", PeerGuests)
