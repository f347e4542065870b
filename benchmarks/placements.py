"""Placements learned on one load, live load another: T* over the mean on three kinds of copies.

    python benchmarks/placements.py                       # generated loads, some layers: minutes
    python benchmarks/placements.py --full \\
        --mmlu deepseek_v3_0324_mmlu_counts.npz \\
        --qwen qwen3_30b_a3b_prefill_topk.npz --gptoss gptoss_20b_decode_topk.npz

Every row is a pair of loads. Each layer is placed on the first load: by EPLB's copies, by LPLB's
pairs and by `Placement.for_lp`, with the same slots. The linear program's exact optimum on the
second load judges each placement. Of LPLB's topologies, the one with the lowest median on the
second load is shown. Seconds are processor time of the slowest layer.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lplb_ep import Placement, PlacementError, solve
from lplb_ep.tools.tables import text_table

Layer = tuple[np.ndarray, dict[str, np.ndarray]]
"""Samples to learn on [N, E], and live loads [E] by name."""

# LPLB's graphs for each number of ranks, by replicas on a rank; a cube in groups of 8 ranks.
TOPOLOGIES = {
    8: ("cube", "ring"),
    16: ("hypercube", "cube", "torus", "ring"),
    32: ("torus", "hypercube", "cube", "ring"),
    64: ("torus", "hypercube", "cube", "ring"),
}


CORRELATIONS = (1.0, 0.94, 0.8, 0.34)


def generated(num_layers: int, num_experts: int = 256) -> Iterator[Layer]:
    """Loads as uneven as DeepSeek-V3's, of experts and of groups of 32, at two moments."""
    for layer in range(num_layers):
        rng = np.random.default_rng([2026, layer])
        # Late layers are worse.
        place = layer / max(num_layers - 1, 1)
        expert_sigma, group_sigma = 0.46 + 0.28 * place, 0.26 + 0.14 * place
        first, change = (
            rng.normal(0, expert_sigma, num_experts)
            + np.repeat(rng.normal(0, group_sigma, num_experts // 32), 32)
            for _ in range(2)
        )
        live = {}
        for rho in CORRELATIONS:
            share = np.exp(rho * first + np.sqrt(1 - rho**2) * change)
            live[f"generated, correlation {rho:g}"] = rng.multinomial(2**20, share / share.sum())
        yield rng.multinomial(2**20, np.exp(first) / np.exp(first).sum())[None], live


def mmlu(path: str) -> Iterator[Layer]:
    with np.load(path) as file:
        short, long = file["mmlu_seqlen_4k"], file["mmlu_seqlen_8k"]
    for before, after in zip(short, long, strict=True):
        yield before[None], {"MMLU 4k → 4k": before, "MMLU 4k → 8k": after}


def qwen(path: str, by_blocks: bool) -> Iterator[Layer]:
    """The first half of the recording and the second are two kinds of text, with unrelated loads.
    Every other block of 64 tokens has some of each. Where a prompt ends is not marked. Placements
    are learned in four batches."""
    topk = np.load(path)["topk"]
    token = np.arange(topk.shape[1])
    later = token // 64 % 2 == 1 if by_blocks else token >= topk.shape[1] // 2
    name = "blocks" if by_blocks else "two kinds of text"
    counts = partial(np.bincount, minlength=128)
    for layer in topk:
        samples = [counts(part.ravel()) for part in np.array_split(layer[~later], 4)]
        yield np.stack(samples), {f"Qwen3 prefill, {name}": counts(layer[later].ravel())}


def gptoss(path: str) -> Iterator[Layer]:
    """Even-numbered sequences, in four batches, and odd ones; template tokens left out."""
    with np.load(path) as file:
        topk, seq, pos = file["topk"], file["seq"], file["pos"]
    topk, seq = topk[pos >= 8], seq[pos >= 8]
    counts = partial(np.bincount, minlength=32)
    for layer in range(topk.shape[1]):
        samples = [counts(topk[seq % 8 == 2 * i, layer].ravel()) for i in range(4)]
        live = counts(topk[seq % 2 == 1, layer].ravel())
        yield np.stack(samples), {"GPT-OSS decode, sequences": live}


def imbalance(placement: Placement, load: np.ndarray) -> float:
    bound = float(solve(torch.from_numpy(load.astype(np.int64)), placement).lower_bound)
    return bound * placement.num_ranks / float(load.sum())


def measure(
    layer: Layer, num_ranks: int, redundant: int, groups: int | None
) -> dict[str, dict[str, float]]:
    """Of each live load: T* / mean by kind of placement, and the seconds of processor time that
    `for_lp` took."""
    torch.set_num_threads(1)
    samples, live = layer
    learned = samples.sum(axis=0)
    shape = {"num_ranks": num_ranks, "num_redundant_per_rank": redundant}
    placements = {"eplb": Placement.from_history(learned, **shape)}
    for topology in TOPOLOGIES[num_ranks]:
        # Some topologies have other replicas, or the experts do not divide.
        with contextlib.suppress(PlacementError):
            placements[topology] = Placement.from_topology(
                topology, num_experts=learned.size, load=learned, **shape
            )
    start = time.process_time()
    placements["for_lp"] = Placement.for_lp(samples, num_groups=groups, **shape)
    seconds = time.process_time() - start
    return {
        name: {kind: imbalance(p, load) for kind, p in placements.items()} | {"seconds": seconds}
        for name, load in live.items()
    }


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
    parser.add_argument("--layers", type=int, default=6, help="generated layers; 6")
    parser.add_argument("--every", type=int, default=1, help="of recorded layers, one of so many")
    for name in ("mmlu", "qwen", "gptoss"):
        parser.add_argument(f"--{name}", metavar="FILE", help="the recording")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--redundant", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", metavar="PATH", help="write every layer's numbers")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()

    loads: list[tuple[list[Layer], int | None]] = [(list(generated(args.layers)), 8)]
    for name, read, groups in (
        ("mmlu", mmlu, 8),
        ("qwen", partial(qwen, by_blocks=False), None),
        ("qwen", partial(qwen, by_blocks=True), None),
        ("gptoss", gptoss, None),
    ):
        if path := getattr(args, name):
            loads.append((list(read(path))[:: args.every], groups))

    everything: dict[str, list[dict[str, float]]] = {}
    with multiprocessing.get_context("forkserver").Pool(args.processes) as pool:
        for layers, groups in loads:
            for num_ranks, redundant in itertools.product(args.ranks, args.redundant):
                if layers[0][0].shape[1] < 2 * num_ranks:
                    continue
                call = partial(measure, num_ranks=num_ranks, redundant=redundant, groups=groups)
                measured = pool.map(call, layers, chunksize=1)
                for name in layers[0][1]:
                    of_layers = [layer[name] for layer in measured]
                    everything[f"{name}, EP{num_ranks}, {redundant}"] = of_layers
                if sys.stderr.isatty():
                    print(f"\r{len(everything)} rows", end="", file=sys.stderr, flush=True)
                if args.json:
                    Path(args.json).write_text(json.dumps(everything))
    rows, won = [], 0
    for name, of_layers in sorted(everything.items(), key=lambda item: item[0].split(", EP")[0]):
        cells, best = row(of_layers)
        won += best
        rows.append([name, *cells])
    header = ["median / worst layer", "EPLB's copies", "LPLB's pairs", "for_lp"]
    print(text_table([*header, "excess, median", "worst", "seconds"], rows))
    print(f"\nno worse than both in median and worst: {won} of {len(everything)}")


if __name__ == "__main__":
    main()
