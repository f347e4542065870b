"""Tokens, experts that multiply them, and the results that must come back from DeepEP's buffers."""

import importlib
import importlib.util
import warnings

import numpy as np
import oracle
import torch

NUM_EXPERTS, NUM_TOPK = 64, 4
MOST_TOKENS = 400  # of a rank in a batch
# A sum over ranks of products rounded to bfloat16, of 8 bits. Each of at most 8 terms is off by
# `2**-9` of itself, and each sum of two by as much again.
TOLERANCE = 2**-6
FP8_TOLERANCE = 2**-3  # e4m3 has 3 bits, and fewer below 2**-6 of a scale


def place(num_ranks, seed=0):
    """Another one for each seed: a channel lives as long as its group."""
    rng = np.random.default_rng((num_ranks, seed))
    return oracle.random_placement(rng, num_ranks, NUM_EXPERTS, 2)


def deep_ep():
    """DeepEP, or None. V2 imports parts of torch that warn, and here warnings are errors."""
    if importlib.util.find_spec("deep_ep") is None or not torch.cuda.is_available():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("deep_ep")


def use_gpu(group):
    assert deep_ep() is not None
    torch.cuda.set_device(group.rank() % torch.cuda.device_count())
    torch.manual_seed(group.rank())


def draw(rng, hidden, num_tokens):
    """This rank's tokens, which its peers cannot know."""
    weights = rng.lognormal(0, 1.2, NUM_EXPERTS)
    topk_idx = torch.from_numpy(oracle.random_topk(rng, num_tokens, NUM_TOPK, weights)).long()
    x = torch.randn(num_tokens, hidden, device="cuda").bfloat16()
    return x, topk_idx.cuda(), torch.rand(num_tokens, NUM_TOPK, device="cuda")


def scale(expert):
    """The factor by which expert e multiplies its tokens."""
    return torch.where(expert < 0, 0.0, 1 + expert / NUM_EXPERTS)


def experts_of(placement, rank):
    """[P / R] the expert in each of a rank's slots."""
    table = torch.tensor(placement.physical_to_logical.tolist(), device="cuda")
    return table.view(placement.num_ranks, -1)[rank]


def compute(x, slots, weights, placement, rank):
    """The experts of this rank's slots, on received tokens."""
    expert = torch.where(slots < 0, -1, experts_of(placement, rank)[slots.clamp(min=0)])
    return (x.float() * (scale(expert) * weights.masked_fill(slots < 0, 0)).sum(1, True)).bfloat16()


def widen(received):
    """The float32 rows of (values in FP8, a scale for each 128 of them)."""
    values, scales = received
    blocks = values.float().unflatten(-1, (-1, 128))
    return (blocks * scales.unsqueeze(-1)).flatten(-2)


def subnormal(x):
    """The size below which a value's bits in FP8 are fewer than `FP8_TOLERANCE` counts on."""
    return 2**-6 * float(x.abs().max()) / 448


def quotas(plan, placement, rank):
    """[P / R] the rows that a plan gives each of a rank's slots."""
    quota = torch.zeros(placement.num_physical_experts, dtype=torch.int64)
    column = torch.tensor(placement.logical_to_physical.tolist())
    quota[column[column >= 0]] = plan.quota.cpu().long()[column >= 0]
    return quota.view(placement.num_ranks, -1)[rank].tolist()


def close(out, x, topk_idx, weights, tolerance=TOLERANCE, smallest=1e-6):
    """Within `tolerance` of each value; those below `smallest` are as good as 0."""
    factor = (scale(topk_idx) * weights).sum(1, keepdim=True)
    size = x.float().abs().clamp(min=smallest) * factor
    assert ((out.float() - x.float() * factor).abs() <= tolerance * size + 1e-6).all()
