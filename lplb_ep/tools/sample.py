"""Synthetic recordings, similar to a real router's, for trying the commands."""

from __future__ import annotations

import numpy as np
import torch

from .recording_files import MAX_EXPERTS, check_size
from .recordings import Recording

# Fits of recorded routing of DeepSeek-V3: how much experts, and groups of 32, differ in load.
_SIGMA, _GROUP_SIGMA, _GROUP = 0.6, 0.33, 32
_LATE = 0.35  # how much more they do in the last layer than in the first
_WORKLOAD = 0.35  # of the variance of log loads that another workload draws anew
_BATCH = 0.25  # the same, of each batch


def sample(
    num_layers: int,
    num_experts: int,
    num_batches: int,
    num_tokens: int,
    num_topk: int,
    *,
    workload: int = 0,
    seed: int = 0,
) -> Recording:
    """A recording whose loads are lognormal over experts and over groups of 32 neighbours.

    The same arguments give the same recording, up to the machine's rounding. Workloads of a seed
    are of one model: hot experts of one are warm in another. Batches vary around their workload.

    Args:
        num_layers, num_experts, num_batches: L, E and N.
        num_tokens: of each batch.
        num_topk: experts that a token picks, at most E.
        workload: which of the model's workloads.
        seed: of the model.

    Raises:
        ValueError: a number is less than 1 or too large, `num_topk` is more than E, or a batch has
            more picks than counts can hold.
    """
    least = {"num_layers": num_layers, "num_experts": num_experts, "num_batches": num_batches}
    for name, value in {**least, "num_tokens": num_tokens, "num_topk": num_topk}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if num_topk > num_experts:
        raise ValueError(f"num_topk must be at most num_experts, {num_experts}; got {num_topk}")
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"num_experts must be at most {MAX_EXPERTS}; got {num_experts}")
    check_size("sample", num_batches, num_layers, num_experts)
    if num_tokens * num_topk >= 2**31:
        raise ValueError(f"num_tokens must be below 2**31 / {num_topk}; got {num_tokens}")
    model = np.random.default_rng([seed, 0])
    use = np.random.default_rng([seed, 1, workload])
    shape = (num_layers, num_experts)
    log = _log_load(model, *shape) * np.sqrt(1 - _WORKLOAD)
    log += _log_load(use, *shape) * np.sqrt(_WORKLOAD)
    log *= 1 + _LATE * np.linspace(-0.5, 0.5, num_layers)[:, None]
    counts = np.zeros((num_batches, *shape), np.int64)
    for batch in counts:
        moved = log * np.sqrt(1 - _BATCH) + _log_load(use, *shape) * np.sqrt(_BATCH)
        for layer, logits in enumerate(moved):
            batch[layer] = _picks(use, np.exp(logits), num_tokens, num_topk)
    return Recording.of(
        torch.from_numpy(counts),
        f"sample, seed {seed}, workload {workload}",
        layers=range(num_layers),
    )


def _log_load(rng: np.random.Generator, num_layers: int, num_experts: int) -> np.ndarray:
    groups = -(-num_experts // _GROUP)
    of_group = rng.normal(0, _GROUP_SIGMA, (num_layers, groups)).repeat(_GROUP, axis=1)
    own: np.ndarray = rng.normal(0, _SIGMA, (num_layers, num_experts))
    return own + of_group[:, :num_experts]


def _picks(
    rng: np.random.Generator, weight: np.ndarray, num_tokens: int, num_topk: int
) -> np.ndarray:
    """[E]: tokens that picked each expert, none of them twice."""
    # The share of tokens with each expert among their picks: none is above all of them.
    share = weight / weight.sum() * num_topk
    while (share > 1).any():
        full = share >= 1
        share = np.where(full, 1.0, share * (num_topk - full.sum()) / share[~full].sum())
    counts = rng.binomial(num_tokens, np.minimum(share, 1.0))
    # Their sum is that of all tokens' picks.
    short = num_tokens * num_topk - int(counts.sum())
    order = np.argsort(-weight, kind="stable")
    while short:
        for expert in order:
            step = int(np.clip(short, -counts[expert], num_tokens - counts[expert]))
            part = int(np.sign(step)) * min(abs(step), 1 + abs(short) // len(order))
            counts[expert] += part
            short -= part
    return counts
