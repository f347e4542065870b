"""What several tests build: loads, placements, small problems, and where copies are."""

import numpy as np
import oracle

from lplb_ep import CostModel, Placement
from lplb_ep.cost import H200


def history(seed, num_experts, power=1):
    """Loads below 2**20 from raw bits, which NumPy keeps the same in every version."""
    bits = np.random.PCG64(seed).random_raw(num_experts) >> np.uint64(44)
    return (bits if power == 1 else bits**3 >> np.uint64(40)).astype(np.int64)


def ranks_of(placement, expert):
    return np.flatnonzero(placement.physical_to_logical == expert) // placement.num_local_slots


def circulant(rng, R, num_edges):
    """Each rank has a home, and the next ranks at some distances have its copies. One expert has
    three copies, if a rank can have its six edges. The others have two copies, and two edges."""
    distances = rng.permutation(np.arange(1, R))[: num_edges // 2 - (num_edges >= 6)].tolist()
    groups = [distances[:2], *([d] for d in distances[2:])]
    if num_edges < 6:
        groups = [[d] for d in distances]
    ranks = np.arange(R)
    table = [np.arange(g * R, (g + 1) * R) for g in range(len(groups))]
    for g, group in enumerate(groups):
        table += [g * R + (ranks - d) % R for d in group]
    return Placement(np.stack(table, 1).ravel(), R)


def cost_instance(seed, most=1500):
    """A small placement, a load of at most so many rows an expert, base loads and a cost model."""
    rng = np.random.default_rng(seed)
    R = int(rng.integers(2, 6))
    E = int(rng.integers(R, 4 * R))
    placement = oracle.random_placement(rng, R, E, int(rng.integers(1, 3)))
    load = oracle.random_load(rng, E, scale=float(rng.choice([3, 30, 100, 200])))
    base = rng.integers(0, 300, R) if rng.random() < 0.3 else np.zeros(R, np.int64)
    cost = CostModel("scaled", int(rng.choice([32, 64, 128])), H200.steps, H200.slope, 700)
    return placement, np.minimum(load, most), base, cost
