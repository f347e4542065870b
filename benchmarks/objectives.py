"""How close plans by active slots and by cost are to the best there are, on the CPU.

    python benchmarks/objectives.py [--costs 1000] [--whole 1000] [--slots 100000] [--seed 0]

Small random placements, loads and base loads, judged by other libraries (`tests/oracle.py`):

- `cost` against a mixed-integer program by HiGHS, and against the cost of `tokens`
- the active slots of `experts` against a bipartite matching by networkx
- its tokens on the fullest rank, experts whole, against a mixed-integer program

Then it has what each objective costs on placements of DeepSeek-V3's size, with loads as skewed as
recorded ones, by an H200's table.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from lplb_ep import Placement, Problem
from lplb_ep.planning import objectives, values
from lplb_ep.settings import OBJECTIVES
from lplb_ep.tools.tables import text_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle
from builders import cost_instance

NUM_EXPERTS, NUM_TOPK = 256, 8
PLACEMENTS = (("eplb", 8, 2), ("cube", 8, 2), ("eplb", 32, 2), ("ring", 32, 1), ("eplb", 64, 2))
TOKENS = (8, 32, 128, 512, 1024, 4096)


def judge_costs(number: int, seed: int) -> None:
    """Costs above the best of a mixed-integer program, and above the bound that plans have."""
    gaps, bounds, unknown, worse, above_experts = [], [], 0, 0, 0
    for i in range(number):
        placement, load, base, cost = cost_instance(seed + i)
        problem = Problem(base_load=torch.from_numpy(base), objective="cost", cost=cost)
        tokens = objectives.exact_solution(load, placement, problem)
        quota = objectives.quotas_by_objective(load, placement, problem, tokens)
        found = int(values.rank_costs(quota, placement, problem).max())
        worse += found > values.rank_costs(tokens, placement, problem).max()
        by_slots = problem.with_defaults(objective="experts")
        whole = objectives.quotas_by_objective(load, placement, by_slots)
        above_experts += found > values.rank_costs(whole, placement, problem).max()
        shape = cost.steps, cost.tile, cost.slope
        best, bound = oracle.least_cost(placement, load, *shape, base)
        if best is None or best > bound * 1.0001 + 1:  # HiGHS ran out of time
            unknown += 1
            continue
        best += cost.fixed
        gaps.append(found / best - 1)
        said = float(values.reached(quota, load, placement, problem).bound)
        assert said <= best + 1e-6 * best, f"instance {seed + i}: the bound {said} is above {best}"
        bounds.append(best / said - 1)
    show("cost", gaps, 0.01)
    print(
        f"  {unknown} not solved by HiGHS in time; {worse} cost more than `tokens`, "
        f"{above_experts} more than `experts`"
    )
    print(
        f"  best above the bound that plans have: mean {np.mean(bounds):.4f}, within 1 % in "
        f"{np.mean(np.array(bounds) <= 0.01):.3f}"
    )


def judge_whole(number: int, seed: int) -> None:
    """Tokens of whole experts on the fullest rank, above the best."""
    gaps = []
    for i in range(number):
        placement, load, base, cost = cost_instance(seed + i, most=30)
        problem = Problem(base_load=torch.from_numpy(base), objective="experts", cost=cost)
        quota = objectives.quotas_by_objective(load, placement, problem)
        most = int(values.reached(quota, load, placement, problem).value)
        best, _ = oracle.least_tokens_of_whole(placement, load, most, base)
        found = base.copy()
        expert, column = np.nonzero(placement.copy_rank >= 0)
        np.add.at(found, placement.copy_rank[expert, column], quota[expert, column])
        if best:
            gaps.append(found.max() / best - 1)
    show("tokens of whole experts", gaps, 0.05)


def judge_slots(number: int, seed: int) -> None:
    """Active slots, which a matching must find to be the fewest."""
    wrong = 0
    for i in range(number):
        placement, load, base, _ = cost_instance(seed + i)
        problem = Problem(base_load=torch.from_numpy(base), objective="experts")
        quota = objectives.quotas_by_objective(load, placement, problem)
        found = values.reached(quota, load, placement, problem).value
        wrong += found != oracle.least_active(placement, load, base)
    print(f"active slots: {wrong} of {number} differ from a matching's")


def show(name: str, gaps: list[float], within: float) -> None:
    """The gaps of one kind of instance."""
    found = np.array(gaps)
    print(
        f"{name}: {len(gaps)} instances, within {within:.0%} of the best in "
        f"{np.mean(found <= within + 1e-9):.4f}, equal in {np.mean(found <= 1e-9):.4f}, "
        f"mean {found.mean():.5f}, worst {found.max():.4f}"
    )


def show_sizes() -> None:
    """Milliseconds of the slowest rank by each objective, and of the bound."""
    rows = []
    for kind, num_ranks, redundant in PLACEMENTS:
        rng = np.random.default_rng(num_ranks)
        popularity = rng.lognormal(0, 0.6, NUM_EXPERTS)
        popularity *= np.repeat(rng.lognormal(0, 0.33, NUM_EXPERTS // 32), 32)
        history, shape = torch.from_numpy(popularity), (num_ranks, redundant)
        sizes = {"num_ranks": shape[0], "num_redundant_per_rank": shape[1]}
        if kind == "eplb":
            placement = Placement.from_history(history, **sizes)
        else:
            placement = Placement.from_topology(
                kind, num_experts=NUM_EXPERTS, load=history, **sizes
            )
        for tokens in TOKENS:
            drifted = popularity * rng.lognormal(0, 0.25, NUM_EXPERTS)
            picks = num_ranks * tokens * NUM_TOPK
            load = rng.multinomial(picks, drifted / drifted.sum()).astype(np.int64)
            rows.append([f"{kind} EP{num_ranks}", str(tokens), *columns(load, placement)])
    header = ["placement", "tokens a rank", "home", *OBJECTIVES, "bound", "ms on the CPU"]
    print(text_table(header, rows))


def columns(load: np.ndarray, placement: Placement) -> list[str]:
    """Of one load: the largest rank cost of every plan in ms."""
    home = np.zeros(placement.copy_rank.shape, np.int64)
    home[:, 0] = load
    cells, start = [values.rank_costs(home, placement, Problem()).max()], time.perf_counter()
    for objective in OBJECTIVES:
        problem = Problem(objective=objective)
        quota = objectives.quotas_by_objective(load, placement, problem)
        cells.append(values.rank_costs(quota, placement, problem).max())
    cells.append(float(values.reached(quota, load, placement, problem).bound))
    took = 1e3 * (time.perf_counter() - start)
    return [*(f"{float(cell) / 1e6:.3f}" for cell in cells), f"{took:.0f}"]


def main() -> None:
    """Runs what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, usual in (("costs", 1000), ("whole", 1000), ("slots", 100_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=usual, metavar="N")
    args = parser.parse_args()
    show_sizes()
    judge_costs(args.costs, args.seed)
    judge_whole(args.whole, args.seed)
    judge_slots(args.slots, args.seed)


if __name__ == "__main__":
    main()
