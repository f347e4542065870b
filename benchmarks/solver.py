"""The CPU solver: is every optimum exact, and how long does one take?

    python benchmarks/solver.py                        # 5,000 random instances, then the times
    python benchmarks/solver.py --recording FILE KEY   # recorded loads, too; may be repeated

Each instance is solved by `lplb_ep.solve` and by HiGHS (SciPy's `linprog`), and the certificate is
evaluated: the three must agree. Times are of `lplb_ep.solve` on one core, one load at a time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import lplb_ep
from lplb_ep import Placement
from lplb_ep.report import load_recording, text_table
from lplb_ep.solver import rank_set_bound

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle


def check(placement: Placement, load: np.ndarray, base: np.ndarray | None = None) -> int:
    """Tokens above the rounded-up optimum by the worst of the three judges; 0 is exact."""
    options = {} if base is None else {"base_load": torch.from_numpy(base)}
    load = torch.from_numpy(load)
    solution = lplb_ep.solve(load, placement, **options)
    reached = int((solution.rank_load + (0 if base is None else options["base_load"])).max())
    certified = math.ceil(rank_set_bound(solution.tight_ranks, load, placement, **options))
    highs = oracle.linear_program(placement, load.numpy(), base)
    # HiGHS is a floating-point solver; optima are fractions over at most 64 ranks.
    return max(abs(reached - certified), abs(reached - math.ceil(highs - 1e-3)))


def random_instances(number: int):
    rng = np.random.default_rng(2026)
    for _ in range(number):
        R = int(rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]))
        E = int(rng.integers(1, 257))
        placement = oracle.random_placement(
            rng, R, E, int(rng.integers(0, 5)), int(rng.integers(1, 9))
        )
        load = oracle.random_load(rng, E, float(rng.choice([3, 100, 3000])))
        yield placement, load, rng.integers(0, 500, R) if rng.random() < 0.25 else None


def recorded_instances(path: str, key: str):
    loads = load_recording(path, key=key).counts.flatten(0, 1)
    learned = loads.roll(1, 0)  # placed for another layer's load, so that the LP has work to do
    for load, history in zip(loads, learned, strict=True):
        for R in (8, 16, 32, 64):
            if len(load) % R:
                continue
            for redundant in (1, 2, 4):
                yield (
                    Placement.from_history(history, num_ranks=R, num_redundant_per_rank=redundant),
                    load.numpy(),
                )


def times() -> str:
    rng = np.random.default_rng(1)
    rows = []
    for R, redundant in ((8, 2), (16, 2), (32, 1), (64, 2), (64, 4)):
        history, *loads = (
            torch.from_numpy(rng.lognormal(0, 0.7, 256) * 2000).long() for _ in range(101)
        )
        placement = Placement.from_history(history, num_ranks=R, num_redundant_per_rank=redundant)
        lplb_ep.solve(loads[0], placement)
        taken = []
        for load in loads:
            start = time.perf_counter()
            lplb_ep.solve(load, placement)
            taken.append(1e3 * (time.perf_counter() - start))
        rows.append([f"EP{R}, {redundant} redundant, E 256"])
        rows[-1] += [f"{statistics.median(taken):.2f}", f"{max(taken):.2f}"]
    return text_table(["solve, ms", "median", "worst of 100"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=5000)
    parser.add_argument(
        "--recording", nargs=2, action="append", default=[], metavar=("FILE", "KEY")
    )
    args = parser.parse_args()
    sources = {"random": random_instances(args.instances)}
    for path, key in args.recording:
        sources[f"{Path(path).name}: {key}"] = recorded_instances(path, key)
    rows = []
    for name, instances in sources.items():
        above = [check(*instance) for instance in instances]
        rows.append([name, str(len(above)), str(sum(a > 0 for a in above)), str(max(above))])
    print(text_table(["instances", "number", "not exact", "tokens off, worst"], rows))
    print(f"\n{times()}")


if __name__ == "__main__":
    main()
