"""Placements learned on one load, live load another: T* over the mean on three kinds of copies.

    python benchmarks/placements.py                       # generated loads, some layers: minutes
    python benchmarks/placements.py --full \\
        --mmlu deepseek_v3_0324_mmlu_counts.npz \\
        --qwen qwen3_30b_a3b_prefill_topk.npz --gptoss gptoss_20b_decode_topk.npz

Every row is a pair of loads; every layer is placed by EPLB's copies, by the better of LPLB's
topologies (by median), and by `Placement.for_lp`, with the same slots, on the first load, and
judged by the linear program's exact optimum on the second. The seconds are of one `for_lp`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lplb_ep import Placement, PlacementError, solve
from lplb_ep.report import text_table

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of one layer: samples to learn on [N, E], the load that they are of [E], the live load [E]."""

# LPLB's graphs for each number of ranks, by replicas on a rank; a cube in groups of 8 ranks.
TOPOLOGIES = {
    8: ("cube", "ring"),
    16: ("hypercube", "cube", "torus", "ring"),
    32: ("torus", "hypercube", "cube", "ring"),
    64: ("torus", "hypercube", "cube", "ring"),
}


def generated(correlation: float, layers: int, num_experts: int = 256) -> Iterator[Pair]:
    """DeepSeek-V3's spread of popularity, of experts and of groups of 32, at two moments."""
    for layer in range(layers):
        rng = np.random.default_rng([2026, layer])
        # Late layers are worse.
        place = layer / max(layers - 1, 1)
        expert_sigma, group_sigma = 0.46 + 0.28 * place, 0.26 + 0.14 * place
        first, change = (
            rng.normal(0, expert_sigma, num_experts)
            + np.repeat(rng.normal(0, group_sigma, num_experts // 32), 32)
            for _ in range(2)
        )
        later = correlation * first + np.sqrt(1 - correlation**2) * change
        before, after = (
            rng.multinomial(2**20, np.exp(log) / np.exp(log).sum()) for log in (first, later)
        )
        yield before[None], before, after


def mmlu(path: str) -> dict[str, list[Pair]]:
    with np.load(path) as file:
        short, long = file["mmlu_seqlen_4k"], file["mmlu_seqlen_8k"]
    return {
        "MMLU 4k → 4k": [(a[None], a, a) for a in short],
        "MMLU 4k → 8k": [(a[None], a, b) for a, b in zip(short, long, strict=True)],
    }


def qwen(path: str) -> dict[str, list[Pair]]:
    """The first half of the prompts' tokens, in four batches, and the second."""
    topk = np.load(path)["topk"]
    half = topk.shape[1] // 2

    def counts(ids: np.ndarray) -> np.ndarray:
        return np.bincount(ids.ravel(), minlength=128)

    pairs = []
    for layer in topk:
        samples = np.stack([counts(part) for part in np.array_split(layer[:half], 4)])
        pairs.append((samples, samples.sum(0), counts(layer[half:])))
    return {"Qwen3 prefill, first half → second": pairs}


def gptoss(path: str) -> dict[str, list[Pair]]:
    """Even-numbered sequences, in four batches, and odd ones; template tokens left out."""
    with np.load(path) as file:
        topk, seq, pos = file["topk"], file["seq"], file["pos"]
    topk, seq = topk[pos >= 8], seq[pos >= 8]

    def counts(chosen: np.ndarray, layer: int) -> np.ndarray:
        return np.bincount(topk[chosen, layer].ravel(), minlength=32)

    pairs = []
    for layer in range(topk.shape[1]):
        samples = np.stack([counts(seq % 8 == 2 * i, layer) for i in range(4)])
        pairs.append((samples, samples.sum(0), counts(seq % 2 == 1, layer)))
    return {"GPT-OSS decode, even → odd sequences": pairs}


def imbalance(placement: Placement, load: np.ndarray) -> float:
    bound = float(solve(torch.from_numpy(load.astype(np.int64)), placement).lower_bound)
    return bound * placement.num_ranks / float(load.sum())


def measure(pair: Pair, num_ranks: int, redundant: int, groups: int | None) -> dict[str, float]:
    """T* / mean by kind of placement, and the seconds that `for_lp` takes."""
    torch.set_num_threads(1)
    samples, learned, live = pair
    shape = {"num_ranks": num_ranks, "num_redundant_per_rank": redundant}
    out = {"eplb": imbalance(Placement.from_history(learned, **shape), live)}
    for topology in TOPOLOGIES[num_ranks]:
        try:
            placement = Placement.from_topology(
                topology, num_experts=learned.size, load=learned, **shape
            )
        except PlacementError:  # the topology has other replicas, or the experts do not divide
            continue
        out[topology] = imbalance(placement, live)
    start = time.perf_counter()
    placement = Placement.for_lp(samples, num_groups=groups, **shape)
    out["seconds"] = time.perf_counter() - start
    out["for_lp"] = imbalance(placement, live)
    return out


def row(layers: list[dict[str, float]]) -> tuple[list[str], bool]:
    """The cells of a row, and whether `for_lp` is no worse than both in median and worst."""

    def both(kind: str) -> tuple[float, float]:
        values = [layer[kind] for layer in layers]
        return statistics.median(values), max(values)

    pairs = {kind: both(kind) for kind in layers[0] if kind not in ("eplb", "for_lp", "seconds")}
    cells = ["{:.3f} / {:.3f}".format(*both("eplb"))]
    others = [both("eplb")]
    if pairs:
        best = min(pairs, key=lambda kind: pairs[kind])
        others.append(pairs[best])
        cells.append("{:.3f} / {:.3f}".format(*pairs[best]) + f" {best}")
    else:
        cells.append("")
    ours = both("for_lp")
    cells.append("{:.3f} / {:.3f}".format(*ours))
    # Excess over 1, relative to the better of the two; 0.5 is the goal.
    for i in range(2):
        least = min(other[i] for other in others) - 1
        cells.append(f"{(ours[i] - 1) / least:.2f}" if least > 5e-4 else "–")
    cells.append(f"{max(layer['seconds'] for layer in layers):.1f}")
    return cells, all(ours[i] <= min(o[i] for o in others) + 5e-4 for i in range(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="24 generated layers, not 6")
    for name in ("mmlu", "qwen", "gptoss"):
        parser.add_argument(f"--{name}", metavar="FILE", help="the recording")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--redundant", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", metavar="PATH", help="write every layer's numbers")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()

    loads: dict[str, tuple[list[Pair], int | None]] = {}
    for correlation in (1.0, 0.94, 0.8, 0.34):
        pairs = list(generated(correlation, 24 if args.full else 6))
        loads[f"generated, correlation {correlation:g}"] = pairs, 8
    for name, read, groups in (("mmlu", mmlu, 8), ("qwen", qwen, None), ("gptoss", gptoss, None)):
        if path := getattr(args, name):
            loads |= {title: (pairs, groups) for title, pairs in read(path).items()}

    rows, everything, won = [], {}, 0
    with multiprocessing.get_context("forkserver").Pool(args.processes) as pool:
        for title, (pairs, groups) in loads.items():
            for num_ranks in args.ranks:
                if pairs[0][1].size < 2 * num_ranks:
                    continue
                for redundant in args.redundant:
                    call = partial(measure, num_ranks=num_ranks, redundant=redundant, groups=groups)
                    layers = pool.map(call, pairs, chunksize=1)
                    name = f"{title}, EP{num_ranks}, {redundant}"
                    everything[name] = layers
                    cells, best = row(layers)
                    won += best
                    rows.append([name, *cells])
                    print(rows[-1], flush=True)
            rows.append([])
    header = ["median / worst layer", "EPLB's copies", "LPLB's pairs", "for_lp"]
    print(text_table([*header, "excess, median", "worst", "seconds"], rows[:-1]))
    print(f"\nno worse than both in median and worst: {won} of {len(everything)}")
    if args.json:
        Path(args.json).write_text(json.dumps(everything))


if __name__ == "__main__":
    main()
