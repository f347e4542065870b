"""Experts that tests give to `Replicas`: what every slot holds can be computed on every rank.

Weights are seeded by expert and gradients by slot. So the expected values need no communication,
and the code under test is not its own oracle.
"""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from lplb_ep.placement.table import Placement
from lplb_ep.weights.replicas import Replicas
from lplb_ep.weights.slots import slot_parameters

SHAPES = {"down.weight": (5, 3), "gain": (), "up": (3, 5)}
FORMS = ("list", "stacked")


def random_placement(num_ranks: int, seed: int = 0) -> Placement:
    """Four slots per rank, R + 1 experts; copies on one rank, unused slots, homes anywhere."""
    rng = np.random.default_rng(seed)
    num_slots, num_experts = 4 * num_ranks, num_ranks + 1
    table = rng.integers(-1, num_experts, num_slots)
    slots = rng.permutation(num_slots)
    table[slots[:num_experts]] = np.arange(num_experts)
    table[slots[num_experts]] = -1
    table[slots[num_experts + 1]] = table[slots[num_experts + 1] // 4 * 4 + (slots[0] + 1) % 4]
    home = [rng.choice(np.flatnonzero(table == expert)) for expert in range(num_experts)]
    return Placement(table, num_ranks, num_experts=num_experts, home=home)


def value(kind: str, number: int, name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The tensor of one kind (weight, gradient, tokens), expert or slot, and parameter."""
    seed = hash_of(kind, number, name)
    return torch.randn(
        SHAPES.get(name, (6, 3)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def hash_of(kind: str, number: int, name: str) -> int:
    return zlib.crc32(f"{kind} {number} {name}".encode())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Down(nn.Module):
    def __init__(self, *lead: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((*lead, *SHAPES["down.weight"])))


class Expert(nn.Module):
    """One expert, or with a leading dimension a stack of them."""

    def __init__(self, *lead: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty((*lead, *SHAPES["up"])))
        self.down = Down(*lead)
        self.gain = nn.Parameter(torch.empty(lead))


def make_experts(
    form: str, placement: Placement, rank: int, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """This rank's slots: homes hold their expert's weights, all else holds nonsense (-7)."""
    count = placement.num_local_slots
    experts = nn.ModuleList(Expert() for _ in range(count)) if form == "list" else Expert(count)
    experts.to(dtype)
    for name, slots in slot_parameters(experts, count).items():
        for local, tensor in enumerate(slots):
            slot = rank * count + local
            expert = placement.physical_to_logical[slot]
            is_home = expert >= 0 and placement.home[expert] == slot
            with torch.no_grad():
                tensor.fill_(-7.0)
                if is_home:
                    tensor.copy_(value("weight", expert, name, dtype))
    return experts


def local_slots(placement: Placement, rank: int) -> list[tuple[int, int, int]]:
    """(slot, local slot, expert or -1) of a rank."""
    count = placement.num_local_slots
    table = placement.physical_to_logical[rank * count : (rank + 1) * count]
    return [(rank * count + i, i, int(expert)) for i, expert in enumerate(table)]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
}


def valid_replicas(form: str) -> SimpleNamespace:
    placement = Placement([0, 1, 0], num_ranks=1)
    experts = make_experts(form, placement, 0)
    replicas = Replicas(experts, placement)
    replicas.copy_weights()
    first = next(experts.parameters())
    return SimpleNamespace(placement=placement, experts=experts, replicas=replicas, first=first)


def in_place(made):
    with torch.no_grad():
        made.first.mul_(2.0)


def step_with(optimizer_name):
    def step(made):
        for parameter in made.experts.parameters():
            parameter.grad = torch.ones_like(parameter)
        OPTIMIZERS[optimizer_name](made.replicas.optimizer_parameters()).step()

    return step


def new_storage(made):
    made.first.data = made.first.data.clone()


def new_storage_beside_the_old(made):
    made.kept = made.first.data
    made.first.data = made.kept.clone()


def other_contents_at_the_same_address(made):
    memory = made.first.detach().numpy().copy()
    made.first.data = torch.from_numpy(memory)
    made.replicas.mark_valid()
    made.first.data = torch.zeros_like(made.first)  # frees the tensor, not its memory
    memory += 1
    made.first.data = torch.from_numpy(memory)


def registered_by_hand(made):
    for module in made.experts.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = nn.Parameter(parameter.detach().clone())


def fresh(made):
    return {name: tensor.clone() for name, tensor in made.experts.state_dict().items()}


# What takes the place of a weight, if it is no DTensor.
REPLACED = {
    "new storage": new_storage,
    "new storage beside the old": new_storage_beside_the_old,
    "same address": other_contents_at_the_same_address,
    "registered by hand": registered_by_hand,
}
WRITES = REPLACED | {
    "in place": in_place,
    "sgd": step_with("sgd"),
    "adamw": step_with("adamw"),
    "fused": step_with("fused"),
    "load": lambda made: made.experts.load_state_dict(fresh(made)),
    "assign": lambda made: made.experts.load_state_dict(fresh(made), assign=True),
    "own load": lambda made: made.replicas.load_state_dict(made.replicas.state_dict()),
    "marked": lambda made: made.replicas.mark_stale(),
}
