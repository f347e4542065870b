"""Batches of tokens that tests of the embedded buffers send, and where their rows belong."""

import torch

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FP8 = torch.float8_e4m3fn
H = 8


class Batch:
    """A rank's tokens. Made the same way by every rank, so that each can know all of them."""

    def __init__(self, rank, T, K, E, dtype, hidden, idx_dtype, masked):
        g = torch.Generator().manual_seed(1000 * rank + 10 * K + E)
        self.T = T
        self.x = torch.randn(T, hidden, generator=g).to(dtype)
        self.scales = torch.rand(T, 2, generator=g)
        self.w = torch.rand(T, K, generator=g)
        self.idx = torch.rand(T, E, generator=g).argsort(1)[:, :K].to(idx_dtype).contiguous()
        self.idx[torch.rand(T, K, generator=g) < masked] = -1
        self.bias = [torch.randn(T, hidden, generator=g).to(dtype) for _ in range(2)]


def make_batches(R, sizes, K=3, E=16, dtype=F32, hidden=H, idx_dtype=torch.int64, masked=0.2):
    """One batch for each rank; their sizes go round `sizes`."""
    return [
        Batch(r, sizes[r % len(sizes)], K, E, dtype, hidden, idx_dtype, masked) for r in range(R)
    ]


def same(got, expected):
    """Bit for bit: NaN equals NaN, and float8 can be compared."""
    assert got.dtype == expected.dtype, (got.dtype, expected.dtype)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    bits = [t.contiguous().flatten().view(torch.uint8) for t in (got, expected)]
    assert torch.equal(*bits), f"\n{got}\n{expected}"


def stack(rows, like):
    return torch.stack(rows) if rows else like.new_empty(0, *like.shape[1:])


def nothing(t):
    """Whether memory is as DeepEP would leave it: NaN here, or numbers that are no result."""
    if t.is_floating_point():
        return bool((t.contiguous().flatten().view(torch.uint8) == 255).all())
    return bool(((t == 0) | (t > torch.iinfo(t.dtype).max // 2)).all())


def ranks_of(batch, t, L):
    return sorted({e // L for e in batch.idx[t].tolist() if e >= 0})


def origins(batches, rank, L):
    """The (source rank, token) that a rank receives, in DeepEP's order."""
    return [(s, t) for s, b in enumerate(batches) for t in range(b.T) if rank in ranks_of(b, t, L)]


def local_picks(batch, t, rank, L):
    return [e - rank * L if e >= 0 and e // L == rank else -1 for e in batch.idx[t].tolist()]


def add(terms, dtype):
    """The sum in the given order in float32 (float64 for float64), rounded once."""
    acc = torch.zeros(1, dtype=F64 if dtype == F64 else F32)
    for term in terms:
        acc = acc + term.to(acc.dtype)
    return acc.to(dtype)


def computed(row, rank, expert=0):
    """What an expert of a rank makes of a row: nothing that sums to the same by accident."""
    out = row.dtype if row.dtype != FP8 else BF16
    return (row.double() * (rank + 1) / 3 + expert).to(out)


SIZES = {
    "different": (5, 3, 0, 4, 6, 1, 2, 5),
    "none": (0,),
    "one token on one rank": (0, 1),
}
