"""Experts of ranks and tables of guests for tests: every rank knows the weights of all experts."""

from __future__ import annotations

import numpy as np
import torch

from lplb_ep.weights.guest_launches import PeerAddresses
from lplb_ep.weights.guest_transport import GuestLayout

PARAMETERS = {
    "bias": ((33,), torch.bfloat16),
    "down": ((64, 500), torch.bfloat16),
    "gain": ((3,), torch.float32),
    "packed": ((7, 301), torch.uint8),
    "scale": ((129,), torch.float32),
    "up": ((500, 131), torch.float32),
}
"""Sizes below and above a chunk, and some that leave slots at every alignment."""


def layout_of(
    num_ranks: int, num_residents: int, num_guests: int, parameters: dict | None = None
) -> GuestLayout:
    """Of homes in order, as many on each rank."""
    shaped = {
        name: (torch.Size(shape), dtype)
        for name, (shape, dtype) in (parameters or PARAMETERS).items()
    }
    homes = [(rank, slot) for rank in range(num_ranks) for slot in range(num_residents)]
    return GuestLayout.of(shaped, num_guests, num_residents, homes)


def draw_table(rng: np.random.Generator, layout: GuestLayout, share: float) -> np.ndarray:
    """A table [R, G] of guests, each slot filled with a probability.

    Args:
        rng: a generator.
        layout: of the layer.
        share: the probability.
    """
    num_ranks, L = max(layout.home_rank) + 1, layout.num_residents
    table = np.full((num_ranks, layout.num_guests), -1, np.int32)
    for rank in range(num_ranks):
        able = [e for e, home in enumerate(layout.home_rank) if home != rank]
        able = [*rng.permutation(able)][: layout.num_guests]
        table[rank, : len(able)] = np.where(rng.random(len(able)) < share, able, -1)
    assert all(e // L != r for r in range(num_ranks) for e in table[r] if e >= 0)
    return table


def draw_experts(layout: GuestLayout, seed: int, device: torch.device | str) -> list[torch.Tensor]:
    """[E, ...] of each parameter of all experts, the same on every rank."""
    generator, found = torch.Generator().manual_seed(seed), []
    for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True):
        size = (len(layout.home_rank), shape.numel() * dtype.itemsize)
        drawn = torch.randint(0, 255, size, generator=generator, dtype=torch.uint8)
        found.append(drawn.view(dtype).view(-1, *shape).to(device))
    return found


def num_wrong(
    layout: GuestLayout, memory: torch.Tensor, experts: list[torch.Tensor], guests: torch.Tensor
) -> torch.Tensor:
    """[] how many bytes of this rank's filled guest slots `guests` [G] are not the experts'."""
    wrong = torch.zeros((), dtype=torch.int64, device=memory.device)
    for block, all_ in zip(layout.blocks(memory), experts, strict=True):
        rows = all_.index_select(0, guests.clamp(min=0).long())
        differ = block.contiguous().view(torch.uint8) != rows.contiguous().view(torch.uint8)
        wrong += (differ.flatten(1) & (guests >= 0)[:, None]).sum()
    return wrong


def local_addresses(
    num_ranks: int, num_bytes: int, device: torch.device
) -> tuple[PeerAddresses, list[torch.Tensor]]:
    """Memory of several ranks that one process plays, and what keeps it alive."""
    held = [
        torch.zeros(size, dtype=torch.uint8, device=device)
        for size in PeerAddresses.sizes(num_ranks, num_bytes)
        for _ in range(num_ranks)
    ]
    words = [tensor.data_ptr() for tensor in held]
    split = (words[i * num_ranks : (i + 1) * num_ranks] for i in range(3))
    return PeerAddresses(*split), held
