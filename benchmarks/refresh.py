"""A shift of the load, and replicas that follow it: imbalance before, after, and copies moved.

    python benchmarks/refresh.py                       # generated loads
    python benchmarks/refresh.py --mmlu deepseek_v3_0324_mmlu_counts.npz \\
        --qwen qwen3_30b_a3b_prefill_topk.npz --gptoss gptoss_20b_decode_topk.npz

Batches are drawn at random from each of two loads, first one, then the other. Layers begin with
EPLB's copies (or for_lp's), placed on the first load, and have a refresher that looks every 8
batches. "Anew" are EPLB's copies, placed on the first 8 batches after the shift. Imbalance is a
layer's mean over 8 batches: the last ones before the shift, the first after it, and the last. A
line is printed when it is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from placements import generated, mmlu, qwen

from lplb_ep import Placement, Settings
from lplb_ep.tools.recordings import Recording
from lplb_ep.tools.timeline import replay_over_time
from lplb_ep.weights.proposals import imbalance

INTERVAL, NUM_BATCHES, NUM_PICKS = 8, 32, 2**18
SHAPES = [(ranks, slots) for ranks in (8, 16, 32, 64) for slots in (1, 2, 4)]
# Of an expert's weights: DeepSeek-V3's in FP8, Qwen3-30B's in BF16, GPT-OSS-20B's in MXFP4.
MEGABYTES = {"generated": 44.04, "MMLU": 44.04, "Qwen3": 9.44, "GPT-OSS": 13.22}

Pair = tuple[np.ndarray, np.ndarray]
"""Loads [E] of a layer before and after."""


def gptoss(path: str) -> Iterator[Pair]:
    """Sequences in order of the first principal component of the experts that they use. The first
    half and the second are two kinds of text. Template tokens are left out."""
    with np.load(path) as file:
        topk, seq, pos = file["topk"], file["seq"], file["pos"]
    topk, seq = topk[pos >= 8], seq[pos >= 8]
    num_layers = topk.shape[1]
    ids = (seq[:, None, None] * num_layers + np.arange(num_layers)[:, None]) * 32 + topk
    used = np.bincount(ids.ravel(), minlength=(int(seq.max()) + 1) * num_layers * 32)
    used = used.reshape(-1, num_layers * 32)
    share = used / used.sum(1, keepdims=True).clip(min=1)
    _, _, axes = np.linalg.svd(share - share.mean(0), full_matrices=False)
    order = np.argsort(share @ axes[0], kind="stable")
    halves = [used[part].sum(0).reshape(num_layers, 32) for part in np.array_split(order, 2)]
    yield from zip(*halves, strict=True)


def workloads(args: argparse.Namespace) -> Iterator[tuple[str, list[Pair]]]:
    """Names, and `args.layers` layers, evenly apart."""

    def some(layers: Iterator[Pair]) -> list[Pair]:
        every = list(layers)
        return [every[i] for i in np.linspace(0, len(every) - 1, args.layers).round().astype(int)]

    for name in ("generated, correlation 0.34", "generated, correlation 0.8"):
        yield name, some((first.sum(0), live[name]) for first, live in generated(12))
    if args.mmlu:
        name = "MMLU 4k → 8k"
        yield name, some((first.sum(0), live[name]) for first, live in mmlu(args.mmlu))
    if args.qwen:
        name = "Qwen3 prefill, two kinds of text"
        yield name, some((first.sum(0), live[name]) for first, live in qwen(args.qwen, False))
    if args.gptoss:
        yield "GPT-OSS decode, two kinds of text", some(gptoss(args.gptoss))


def recording(loads: list[np.ndarray], seed: int) -> Recording:
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(NUM_PICKS, load / load.sum(), NUM_BATCHES) for load in loads]
    return Recording.of(torch.from_numpy(np.stack(drawn, 1)), f"load {seed}")


def measure(
    layers: list[Pair], ranks: int, slots: int, start: str, settings: Settings
) -> tuple[list[str], int, int]:
    """Cells of a row; the copies that were moved, and those that placing anew would have moved."""
    before, after = (recording([pair[i] for pair in layers], i) for i in (0, 1))
    shape = {"num_ranks": ranks, "num_redundant_per_rank": slots}
    place = Placement.from_history if start == "eplb" else Placement.for_lp
    placements = [place(load, **shape) for load, _ in layers]
    timeline = replay_over_time([before, after], placements, settings)
    by_batch = timeline.imbalance()["refreshed"].numpy()
    by_anew = []
    for counts in after.counts.unbind(1):
        anew = Placement.from_history(counts[:INTERVAL], **shape)
        by_anew.append(imbalance(counts[-INTERVAL:].numpy(), anew).mean())
    # Those found by batches after the shift. A layer is placed anew once.
    moves = [m for m in timeline.moves if m.batch >= NUM_BATCHES + 2 * INTERVAL]
    first = {move.layer: move for move in reversed(moves)}
    by_look = by_batch.reshape(-1, INTERVAL, len(layers)).mean(1)
    before_and_after = by_look[NUM_BATCHES // INTERVAL - 1 : NUM_BATCHES // INTERVAL + 1]
    cells = [cell(values) for values in (*before_and_after, by_look[-1], np.array(by_anew))]
    cells += [needed(by_look[NUM_BATCHES // INTERVAL :]), str(len(first))]
    return cells, sum(m.num_copies for m in moves), sum(m.num_anew for m in first.values())


def cell(values: np.ndarray) -> str:
    return f"{np.median(values):.3f} / {values.max():.3f}"


def needed(values: np.ndarray) -> str:
    """Batches until imbalance [looks, L] is at most 1.01 and stays: in the median, in the worst."""
    above = [np.flatnonzero(v > 1.01) for v in (np.median(values, 1), values.max(1))]
    looks = [int(a[-1]) + 1 if a.size else 0 for a in above]
    return " / ".join(str(n * INTERVAL) if n < len(values) else "–" for n in looks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("mmlu", "qwen", "gptoss"):
        parser.add_argument(f"--{name}", metavar="PATH")
    parser.add_argument("--layers", type=int, default=4, help="of each load; 4")
    parser.add_argument("--start", choices=("eplb", "lp"), default="eplb", help="eplb")
    for name, kind in (("seconds", float), ("changes", int)):
        default = getattr(Settings(), f"refresh_{name}")
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{default}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(
        refresh=INTERVAL, refresh_changes=args.changes, refresh_seconds=args.seconds
    )
    names = ["before", "after the shift", "refreshed", "anew", "batches", "layers moved"]
    names += ["copies", "anew", "GB"]
    widths = [44, 13, 15, 13, 13, 8, 12, 6, 5, 6]

    def line(cells: list[str]) -> None:
        padded = [c.rjust(width) for c, width in zip(cells[1:], widths[1:], strict=True)]
        print("  ".join([cells[0].ljust(widths[0]), *padded]), flush=True)

    line(["median / worst", *names])
    for name, layers in workloads(args):
        size = next(mb for kind, mb in MEGABYTES.items() if name.startswith(kind))
        for ranks, slots in SHAPES:
            if layers[0][0].size % ranks or layers[0][0].size // ranks + slots > layers[0][0].size:
                continue
            if ranks == 32 and layers[0][0].size == 32:
                continue
            cells, moved, anew = measure(layers, ranks, slots, args.start, settings)
            cells += [str(moved), str(anew), f"{moved * size / 1000:.2f}"]
            line([f"{name}, EP{ranks}, {slots}", *cells])


if __name__ == "__main__":
    main()
