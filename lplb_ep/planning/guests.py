"""Guests of a batch: which experts of other ranks the guest slots hold, by the batch's loads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..placement.table import Placement
from ..problem import GUEST_PARTS, Problem
from . import reference
from .structs import Status

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


def guests_of(status: Status, load: Int64, placement: Placement, problem: Problem) -> Int32:
    """[R, G] int32: the guests of a batch that ends with a status; arguments as `choose_guests`."""
    if status is not Status.OPTIMAL or not placement.num_guests_per_rank:
        return np.full((placement.num_ranks, placement.num_guests_per_rank), -1, np.int32)
    return choose_guests(load, placement, problem)


def choose_guests(load: Int64, placement: Placement, problem: Problem) -> Int32:
    """Fills the guest slots for a batch; pure, deterministic, in whole numbers.

    A greedy choice from the optimum of the residents. In each step the slowest rank gives tokens of
    one expert until another rank takes as long. That is the fastest of its node with a free guest
    slot. The expert is the one with most tokens there, among those that the other rank does not
    hold. A rank is passed over where fewer than `guest_min_tokens` would move. The choice ends
    where the slowest rank is within the tolerance of the mean.

    Args:
        load: [E] whole numbers, tokens of each expert in the batch.
        placement: the residents and the guest slots.
        problem: base loads, speeds and the rule, checked. Its load does not count.

    Returns:
        [R, G] int32: the expert of each guest slot, -1 = empty; empty ones come last.
    """
    guests = np.full((placement.num_ranks, placement.num_guests_per_rank), -1, np.int32)
    R, E = placement.num_ranks, placement.num_experts
    base = np.zeros(R, np.int64) if problem.base_load is None else problem.base_load.numpy()
    speed = np.ones(R, np.int64) if problem.speed is None else problem.speed.numpy()
    total = int(load.sum() + base.sum())
    rule = problem.guest_rule
    residents = reference.solve(torch.from_numpy(load), placement, **problem.bounds).quota.numpy()
    tokens = np.zeros((R, E), np.int64)
    expert, column = np.nonzero(placement.copy_rank >= 0)
    rank = placement.copy_rank[expert, column]
    np.add.at(tokens, (rank, expert), residents[expert, column])
    holds = np.zeros((R, E), bool)
    holds[rank, expert] = True
    free = np.full(R, placement.num_guests_per_rank)
    home_node = placement.node[placement.home_rank]
    rank_load = tokens.sum(axis=1) + base
    is_open = np.ones(R, bool)
    limit = (GUEST_PARTS + rule.tolerance) * total  # over the sum of speeds, in parts
    while is_open.any():
        giver = _extreme(rank_load, speed, is_open, slowest=True)
        if GUEST_PARTS * int(rank_load[giver]) * int(speed.sum()) <= limit * int(speed[giver]):
            break
        able = (placement.node == placement.node[giver]) & (free > 0)
        able[giver] = False
        is_open[giver] = False
        if not able.any():
            continue
        taker = _extreme(rank_load, speed, able, slowest=False)
        gap = int(rank_load[giver] * speed[taker] - rank_load[taker] * speed[giver])
        may = np.where(holds[taker] | (home_node != placement.node[giver]), 0, tokens[giver])
        e = int(may.argmax())
        moved = min(int(may[e]), gap // int(speed[giver] + speed[taker]))
        if moved < rule.min_tokens:
            continue
        is_open[giver] = True
        guests[taker, placement.num_guests_per_rank - free[taker]] = e
        free[taker] -= 1
        holds[taker, e] = True
        tokens[giver, e] -= moved
        tokens[taker, e] += moved
        rank_load[giver] -= moved
        rank_load[taker] += moved
    return guests


def _extreme(rank_load: Int64, speed: Int64, among: npt.NDArray[np.bool_], slowest: bool) -> int:
    """The slowest or the fastest of some ranks, the lowest of several."""
    sign = 1 if slowest else -1
    best = -1
    for rank in np.flatnonzero(among).tolist():
        if best < 0 or sign * int(rank_load[rank] * speed[best]) > sign * int(
            rank_load[best] * speed[rank]
        ):
            best = rank
    return best
