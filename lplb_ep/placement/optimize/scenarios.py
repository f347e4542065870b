"""Possible future loads: samples, and loads that have drifted away from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LEVELS = 8
"""Strengths of drift. It divides the numbers of scenarios."""

# The drift of a level grows with this power, so most levels are near.
_BEND = 3


def scenarios(
    samples: Array, num: int, drift: float, num_groups: int, rng: np.random.Generator
) -> Array:
    """Samples, from as they are to `drift` away from them.

    Logarithms of loads are taken to follow a stationary first-order autoregression. Popularities of
    an expert and of its group each vary as much as the samples show. With correlation rho,
    log p' = rho log p + sqrt(1 - rho^2) log q. Equal parts of the scenarios have
    rho = 1 - drift u^3 for u from 0 to 1. Most stay near, as loads mostly do, and the gain that
    remains is there.

    Args:
        samples: [N, E] float64, at least 0, each with a positive sum.
        num: K.
        drift: in [0, 1].
        num_groups: groups of consecutive experts that share a factor; 1: none.
        rng: the source of randomness.

    Returns:
        [K, E] float64; each scenario sums to 1. They are in order of drift, LEVELS equal parts.
    """
    experts = samples.shape[1]
    share = samples / samples.sum(axis=1, keepdims=True)
    base = share[np.arange(num) % len(samples)]
    size = experts // num_groups
    floor = 0.01 / experts  # a dead expert may come back
    group = np.log(np.maximum(base.reshape(num, num_groups, size).mean(axis=2), floor))
    group -= group.mean(axis=1, keepdims=True)
    own = np.log(np.maximum(base, floor)) - np.repeat(group, size, axis=1)
    # The lognormal distribution is fitted to the tokens and not to the experts. Cold experts say
    # little of hot ones, and dead experts say nothing.
    middle = (base * own).sum(axis=1, keepdims=True)
    variance = (base * (own - middle) ** 2).sum(axis=1, keepdims=True)
    log = own - (middle - variance) + np.repeat(group, size, axis=1)
    # Groups differ by chance, too, as far as their experts do.
    chance = np.expm1(variance) / size
    group_deviation = np.sqrt(np.maximum((group**2).mean(axis=1, keepdims=True) - chance, 0))
    step = np.repeat(group_deviation * rng.standard_normal(group.shape), size, axis=1)
    step += np.sqrt(variance) * rng.standard_normal(own.shape)
    away = drift * (np.arange(num)[:, None] * LEVELS // num / (LEVELS - 1)) ** _BEND
    load = np.exp((1 - away) * log + np.sqrt(1 - (1 - away) ** 2) * step)
    load = np.where(away > 0, load, base)
    return load / load.sum(axis=1, keepdims=True)
