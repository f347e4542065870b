"""The best guests of small instances, by HiGHS as an integer program; and random instances."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from lplb_ep.placement.table import Placement


def best_guests(load, placement, most=None, time_limit=60.0) -> float | None:
    """The smallest T over all choices of guests, with fractional tokens; or the fewest guests.

    Args:
        load: [E] whole numbers.
        placement: one node's residents and guest slots.
        most: the most tokens of a rank: then the fewest guests that reach it are found.
        time_limit: of HiGHS, in seconds.

    Returns:
        T, at least the mean, to a part of 1e-4; or the number of guests. None: not within the time.
    """
    R, E, G = placement.num_ranks, placement.num_experts, placement.num_guests_per_rank
    unit = max(load.sum() / R, 1.0)
    shares = load / unit
    resident = np.zeros((E, R), bool)
    expert, column = np.nonzero(placement.copy_rank >= 0)
    resident[expert, placement.copy_rank[expert, column]] = True
    # Variables: tokens [E, R], then guests [E, R] of 0 or 1, then T.
    n = E * R
    pair = np.arange(n)
    e, r = pair // R, pair % R
    ones, zeros = np.ones(n), np.zeros(n)
    highest = np.inf if most is None else most / unit
    use = np.where(resident.ravel(), 0, np.minimum(shares[e], highest))

    def rows(number, entries):
        row, col, value = (np.concatenate(part) for part in zip(*entries, strict=True))
        return scipy.sparse.coo_array((value, (row, col)), shape=(number, 2 * n + 1)).tocsr()

    whole = rows(E, [(e, pair, ones)])
    used = rows(n, [(pair, pair, ones), (pair, n + pair, -use)])
    slots = rows(R, [(r, n + pair, ones)])
    times = rows(R, [(r, pair, ones), (np.arange(R), np.full(R, 2 * n), -np.ones(R))])
    may_take = ~resident.ravel() & (load[e] > 0)
    cost = np.zeros(2 * n + 1)
    cost[2 * n if most is None else slice(n, 2 * n)] = 1
    result = milp(
        cost,
        constraints=[
            LinearConstraint(whole, shares, shares),
            LinearConstraint(used, -np.inf, np.where(resident.ravel(), np.inf, 0)),
            LinearConstraint(slots, 0, G),
            LinearConstraint(times, -np.inf, 0),
        ],
        bounds=Bounds(
            np.concatenate([zeros, zeros, [1.0 if load.any() else 0.0]]),
            np.concatenate([shares[e], may_take.astype(float), [highest]]),
        ),
        integrality=np.concatenate([zeros, ones, [0]]),
        options={"time_limit": time_limit, "mip_rel_gap": 1e-4 if most is None else 0.0},
    )
    if result.status != 0:
        return None
    return float(result.fun) * unit if most is None else round(result.fun)


def guest_tokens(quota, placement, guests):
    """[number of guests] the tokens of each, by rank and slot.

    Args:
        quota: [E, C] tokens of each copy.
        placement: the residents and the guest slots.
        guests: [R, G] the expert in each guest slot, -1 = empty.
    """
    rank, slot = np.nonzero(guests >= 0)
    expert, physical = guests[rank, slot], placement.guest_slots[rank, slot]
    slots_of_copies = placement.with_guests(guests).logical_to_physical
    is_guest = slots_of_copies[expert] == physical[:, None]
    assert (is_guest.sum(axis=1) == 1).all(), "a guest has one column"
    return np.asarray(quota)[expert][is_guest]


def small_instance(seed):
    """A load [E] and a placement of 2 to 8 ranks with 1 to 3 guest slots, in some of them replicas.

    Homes are in order, or packed by an earlier load that is more or less like this one.
    """
    rng = np.random.default_rng([13, seed])
    R = int(rng.choice([2, 3, 4, 4, 5, 6, 6, 8]))
    per_rank = int(rng.integers(1, 9 if R <= 4 else 5))
    E, num_guests = R * per_rank, int(rng.choice([1, 1, 1, 2, 2, 3]))
    replicas = int(rng.choice([0, 0, 0, 1]))
    popularity = rng.normal(0, rng.choice([0.3, 0.6, 0.6, 1.0, 1.5]), E)
    popularity += np.repeat(rng.normal(0, rng.choice([0, 0.3, 0.6]), R), per_rank)
    total = int(rng.choice([1000, 5000, 30_000, 200_000]))
    share = np.exp(popularity)
    load = rng.multinomial(total, share / share.sum())
    if not replicas and rng.random() < 0.5:
        return load, Placement.homes_only(E, R, num_guests)
    earlier = np.exp(popularity + rng.normal(0, rng.choice([0.1, 0.3, 0.6]), E))
    return load, Placement.from_history(
        earlier,
        num_ranks=R,
        num_redundant_per_rank=replicas,
        num_guests_per_rank=num_guests,
    )
