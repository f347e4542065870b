"""What it costs to reuse quotas (LPLB_EP_EVERY): imbalance by how many batches share them.

    python benchmarks/reuse.py --gptoss gptoss_20b_decode_topk.npz \\
        --qwen qwen3_30b_a3b_prefill_topk.npz

Decode batches have a token of each of B sequences. One that ends makes way for the next. EPLB's
copies are placed on the first half of the batches, and the second half is replayed. The columns
are largest / mean rank load, in the mean and at worst, over batches and layers. A line is printed
when it is done. For a recording of your own: `lplb-ep replay FILE --every N`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch

from lplb_ep import Placement
from lplb_ep.tools.recordings import Recording
from lplb_ep.tools.replay import replay

EVERY = (2, 4, 8, 16, 32)
NUM_TOPK = 4  # GPT-OSS
SHAPES = [(8, 1), (8, 2), (16, 1), (32, 1)]


def decode(path: str, num_sequences: int, num_batches: int) -> np.ndarray:
    """[N, layers, 32] tokens of each expert; template tokens left out."""
    with np.load(path) as file:
        topk, seq, pos = file["topk"], file["seq"], file["pos"]
    topk, seq = topk[pos >= 8], seq[pos >= 8]
    rng = np.random.default_rng(0)
    waiting = [np.flatnonzero(seq == s) for s in rng.permutation(np.unique(seq))]
    # Slots begin somewhere in their first sequence, so that not all end together.
    running = [waiting.pop()[rng.integers(0, 60) :].tolist() for _ in range(num_sequences)]
    counts = np.zeros((num_batches, topk.shape[1], 32), np.int64)
    for batch in counts:
        for slot in range(num_sequences):
            if not running[slot]:
                running[slot] = waiting.pop().tolist()
            np.add.at(batch, (np.arange(len(batch))[:, None], topk[running[slot].pop(0)]), 1)
    return counts


def prefill(path: str, num_tokens: int) -> np.ndarray:
    """[N, layers, 128] tokens of each expert, in batches of so many tokens."""
    with np.load(path) as file:
        topk = file["topk"]
    num_batches = topk.shape[1] // num_tokens
    batches = topk[:, : num_batches * num_tokens].reshape(len(topk), num_batches, -1)
    counts = [[np.bincount(ids, minlength=128) for ids in layer] for layer in batches]
    return np.array(counts).swapaxes(0, 1)


def drawn(counts: np.ndarray, num_tokens: int, num_batches: int = 128) -> np.ndarray:
    """[N, layers, E] batches whose loads differ by chance alone, which is the least they can."""
    total, rng = counts.sum(0), np.random.default_rng(0)
    shares = total / total.sum(1, keepdims=True)
    return rng.multinomial(num_tokens * NUM_TOPK, shares, (num_batches, len(total)))


def recordings(args: argparse.Namespace) -> Iterator[tuple[str, np.ndarray]]:
    if args.gptoss:
        for num_sequences, num_batches in ((32, 512), (64, 512), (128, 384)):
            counts = decode(args.gptoss, num_sequences, num_batches)
            yield f"GPT-OSS decode, {num_sequences} sequences", counts
        for num_tokens in (1024, 8192):
            yield f"GPT-OSS decode, {num_tokens} tokens at random", drawn(counts, num_tokens)
    if args.qwen:
        for num_tokens in (64, 256):
            yield f"Qwen3 prefill, {num_tokens} tokens", prefill(args.qwen, num_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("gptoss", "qwen"):
        parser.add_argument(f"--{name}", metavar="FILE", help="the recording")
    parser.add_argument("--layers", type=int, default=6, help="evenly apart; 6")
    args = parser.parse_args()

    def both(column: torch.Tensor) -> str:
        return f"{column.mean():.3f} / {column.max():.3f}"

    names = ["home", "even split", "every batch", *(f"1 in {every}" for every in EVERY)]
    print(f"| mean / worst | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for name, counts in recordings(args):
        chosen = np.linspace(0, counts.shape[1] - 1, args.layers).round().astype(int)
        first, second = np.array_split(counts[:, chosen], 2)
        for num_ranks, redundant in SHAPES:
            shape = {"num_ranks": num_ranks, "num_redundant_per_rank": redundant}
            placed = [Placement.from_history(torch.from_numpy(w), **shape) for w in first.sum(0)]
            cells = []
            for every in EVERY:
                if every < len(second):
                    result = replay(Recording.of(second, name), placed, solver="cpu", every=every)
                    assert result.reused is not None
                    cells.append(both(result.reused))
                else:
                    cells.append("")
            cells = [*map(both, (result.home, result.even, result.lp)), *cells]
            print(f"| {name}, EP{num_ranks}, {redundant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
