"""The solvers: is every optimum exact, and how long does one take on the CPU?

    python benchmarks/solver.py                        # 5,000 random instances, then the times
    python benchmarks/solver.py --recording FILE KEY   # recorded loads, too; may be repeated
    python benchmarks/solver.py --solver flow --instances 100000   # on the GPU; no times
    python benchmarks/solver.py --solver flow --guests             # with guest slots, too

Each instance is solved, its certificate evaluated, and some are solved by HiGHS (`linprog`), too:
all must agree. With guests the GPU's must be those that the CPU chooses. Times are of
`lplb_ep.solve` on one core, one load at a time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import torch

import lplb_ep
from lplb_ep import Placement
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.device_tables import LoadSolver
from lplb_ep.planning.guests_by_cost import guests_of
from lplb_ep.planning.solve import rank_load, rank_set_bound
from lplb_ep.problem import Problem
from lplb_ep.settings import GPU_SOLVERS
from lplb_ep.tools.recordings import load_recording
from lplb_ep.tools.tables import text_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle

Instance = tuple[Placement, list[np.ndarray], np.ndarray | None]
"""A placement, loads for it, and perhaps a base load."""


def check(
    solved: tuple[Placement, np.ndarray, np.ndarray | None, torch.Tensor, torch.Tensor, bool],
) -> int:
    """Tokens above the rounded-up optimum by the worst judge; 0 is exact."""
    torch.set_num_threads(1)
    placement, load, base, quota, guests, by_highs = solved
    options = {} if base is None else {"base_load": torch.from_numpy(base)}
    row = torch.from_numpy(load)
    chosen = guests_of(load, placement, Problem(**options))
    assert (guests.numpy() == chosen).all(), f"other guests than the CPU's on {placement}"
    placement = placement.with_guests(chosen)
    held = rank_load(quota, placement) + (0 if base is None else options["base_load"])
    assert (quota >= 0).all()
    assert torch.equal(quota.sum(1), row)
    proof = cpu.solve(row, placement, start=quota, **options)
    certified = math.ceil(rank_set_bound(proof.tight_ranks, row, placement, **options))
    wrong = abs(int(held.max()) - certified)
    if by_highs:
        # HiGHS is a floating-point solver; optima are fractions over at most 64 ranks.
        highs = math.ceil(oracle.linear_program(placement, load, base) - 1e-3)
        wrong = max(wrong, abs(int(held.max()) - highs))
    return wrong


def solve(instance: Instance, solver: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quotas [B, E, C] and guests [B, R, G] of the loads."""
    placement, loads, base = instance
    if solver == "cpu":
        options = {} if base is None else {"base_load": torch.from_numpy(base)}
        found = lplb_ep.solve(torch.from_numpy(np.stack(loads)), placement, "cpu", **options)
        return found.quota, found.guests
    device = torch.device("cuda", 0)
    load = torch.tensor(np.stack(loads), dtype=torch.int32, device=device)
    options = {} if base is None else {"base_load": torch.from_numpy(base)}
    quota, _, status, guests = LoadSolver(placement, device, solver)(load, **options)
    assert not status.any(), f"status {status.tolist()}"
    return quota.cpu(), guests.cpu()


def exact(
    instances: Iterable[Instance], solver: str, every: int, seconds: float, pool: Pool
) -> tuple[int, ...]:
    """How many, how many HiGHS judged (one of `every`), how many were not exact, and the worst."""
    end = time.monotonic() + seconds

    def solved():
        number = 0
        for instance in itertools.takewhile(lambda _: time.monotonic() < end, instances):
            placement, loads, base = instance
            for load, *found in zip(loads, *solve(instance, solver), strict=True):
                yield placement, load, base, *found, number % every == 0
                number += 1

    above = list(pool.imap_unordered(check, solved(), chunksize=16))
    return len(above), -(-len(above) // every), sum(a > 0 for a in above), max(above)


def random_instances(number: int, loads: int) -> Iterator[Instance]:
    rng = np.random.default_rng(2026)
    for _ in range(-(-number // loads)):
        R = int(rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]))
        E = int(rng.integers(1, 257))
        placement = oracle.random_placement(
            rng, R, E, int(rng.integers(0, 5)), int(rng.integers(1, 9))
        )
        scale = float(rng.choice([3, 100, 3000]))
        base = rng.integers(0, 500, R) if rng.random() < 0.25 else None
        yield placement, [oracle.random_load(rng, E, scale) for _ in range(loads)], base


def guest_instances(number: int, loads: int) -> Iterator[Instance]:
    """Placements with guest slots, on one node or several."""
    rng = np.random.default_rng(2027)
    for _ in range(-(-number // loads)):
        R = int(rng.choice([2, 3, 4, 6, 8, 8, 12, 16, 24, 32, 48, 64]))
        E, G = int(rng.integers(R, 257)), int(rng.integers(1, 4))
        node = int(rng.choice([n for n in range(1, R + 1) if R % n == 0 and (n > 1 or R < 4)]))
        residents = oracle.random_placement(rng, R, E, int(rng.integers(0, 3)), 8, node)
        rows = residents.physical_to_logical.reshape(R, -1).copy()
        rows = np.concatenate([rows, np.full((R, G), -1)], axis=1)
        shape = {"num_experts": E, "num_ranks_per_node": node, "num_guests_per_rank": G}
        scale = float(rng.choice([3, 100, 3000]))
        base = rng.integers(0, 500, R) if rng.random() < 0.25 else None
        all_loads = [oracle.random_load(rng, E, scale) for _ in range(loads)]
        yield Placement(rows.ravel(), R, **shape), all_loads, base


def recorded_instances(path: str, key: str) -> Iterator[Instance]:
    loads = load_recording(path, key=key).counts.flatten(0, 1)
    learned = loads.roll(1, 0)  # placed for another layer's load, so that the LP has work to do
    for load, history in zip(loads, learned, strict=True):
        for R in (8, 16, 32, 64):
            if len(load) % R:
                continue
            for redundant in (1, 2, 4):
                placement = Placement.from_history(
                    history, num_ranks=R, num_redundant_per_rank=redundant
                )
                yield placement, [load.numpy()], None


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
    parser.add_argument("--solver", choices=("cpu", *GPU_SOLVERS), default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="then no more instances")
    parser.add_argument("--highs-every", type=int, metavar="N", help="1 on the CPU, 50 on the GPU")
    parser.add_argument(
        "--recording", nargs=2, action="append", default=[], metavar=("FILE", "KEY")
    )
    parser.add_argument("--guests", action="store_true", help="with guest slots")
    args = parser.parse_args()
    on_gpu = args.solver != "cpu"
    every = args.highs_every or (50 if on_gpu else 1)
    # On the GPU many loads to a placement, which takes time to send there.
    make = guest_instances if args.guests else random_instances
    sources = {"random": make(args.instances, 64 if on_gpu else 1)}
    for path, key in args.recording:
        sources[f"{Path(path).name}: {key}"] = recorded_instances(path, key)
    rows = []
    with multiprocessing.get_context("forkserver").Pool() as pool:
        for name, instances in sources.items():
            numbers = exact(instances, args.solver, every, args.seconds, pool)
            rows.append([name, *map(str, numbers)])
    columns = [f"solver {args.solver}", "instances", "by HiGHS", "not exact", "tokens off, worst"]
    print(text_table(columns, rows))
    if not on_gpu:
        print(f"\n{times()}")


if __name__ == "__main__":
    main()
