"""What tests of placement builders share: loads, and where copies are."""

import numpy as np


def history(seed, num_experts, power=1):
    """Loads below 2**20 from raw bits, which NumPy keeps the same in every version."""
    bits = np.random.PCG64(seed).random_raw(num_experts) >> np.uint64(44)
    return (bits if power == 1 else bits**3 >> np.uint64(40)).astype(np.int64)


def ranks_of(placement, expert):
    return np.flatnonzero(placement.physical_to_logical == expert) // placement.num_local_slots
