"""What a layer's experts take on one GPU, by objective and by size, on recorded loads.

    python benchmarks/layer.py FILE --key LIVE --learn-from LEARNED [--ranks 8 32]
        [--tokens 8 32 128 512 1024 4096] [--cost FILE] [--json FILE] [--markdown FILE]

Experts of DeepSeek-V3's size (7168 and 2048 wide, bfloat16, two grouped GEMMs), two redundant slots
a rank. A batch's picks are drawn with the live load as weights. Each rank's computation runs alone
on the whole GPU, with the rows that its plan gives it. A layer takes as long as its slowest rank.
Tokens do not move here; `benchmarks/whole_layer.py` moves them.

- plain: no copies, experts in order, as DeepEP alone has them
- even: EPLB's copies, each with an equal part of its expert's tokens
- tokens, experts, cost, auto: `Placement.for_lp`'s copies, by that objective
- ideal: every rank has the mean number of tokens, and equal experts

Each figure is the mean over batches of milliseconds of a layer. The last column says how far `auto`
is above the fastest column but the ideal. The ranks timed are those that cost at least three
quarters of the dearest by the cost model. `lplb-ep calibrate` has made the model, or it is made at
the start.

A second table has the plans: microseconds of one without its exchange, as a CUDA graph of batches
with the same live load. Its last column has `auto` with its plan above the fastest of the others
with theirs. Experts are timed with the CPU's quotas, and plans are the GPU's. Near a limit of
`auto` one may be searched where the other is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lplb_ep import Placement, Planner, Problem
from lplb_ep.cost import CostModel
from lplb_ep.planning import reference
from lplb_ep.planning.objectives import quotas_by_objective
from lplb_ep.settings import MAX_ONE_LAUNCH, OBJECTIVES
from lplb_ep.tools import bench
from lplb_ep.tools.calibrate import calibrate
from lplb_ep.tools.grouped_gemms import Experts
from lplb_ep.tools.plan_times import even_quotas
from lplb_ep.tools.recordings import load_recording
from lplb_ep.tools.tables import markdown_table, text_table

Int64 = npt.NDArray[np.int64]

NUM_REDUNDANT, HIDDEN, WIDTH = 2, 7168, 2048
COLUMNS = ("plain", "even", *OBJECTIVES, "ideal")
PLANS = {objective: f"plan by {objective}" for objective in OBJECTIVES}
MODEL_ROWS = 2048  # of a slot, in the mean of the largest batches that a cost model is made from
NEAR = 0.75  # of the dearest rank by the model: those are timed


class Clock:
    """Times ranks by their rows; the same rows are timed once."""

    def __init__(self, num_slots: int, max_rows: int) -> None:
        self._experts = Experts(num_slots, HIDDEN, WIDTH, "bfloat16", "torch", max_rows)
        self._num_slots = num_slots
        self._known: dict[tuple[int, ...], float] = {}

    def rank(self, rows: Sequence[int]) -> float:
        """Nanoseconds of a rank; slots that it lacks have no rows."""
        key = (*sorted(rows, reverse=True), *[0] * (self._num_slots - len(rows)))
        if key not in self._known:
            self._known[key] = self._experts.nanoseconds(key)
        return self._known[key]

    def layer(self, rows: Int64, cost: CostModel) -> float:
        """Nanoseconds of the slowest rank of [R, slots]."""
        costs = cost.of_slots(rows).sum(1)
        return max(
            self.rank(rows[rank].tolist()) for rank in np.flatnonzero(costs >= NEAR * costs.max())
        )


def slots_of(quota: Int64, placement: Placement) -> Int64:
    """[R, P / R] rows of each slot, from the quotas [E, C]."""
    slot = placement.logical_to_physical
    rows = np.zeros(placement.num_physical_experts, np.int64)
    rows[slot[slot >= 0]] = quota[slot >= 0]
    return rows.reshape(placement.num_ranks, -1)


def rows_of(
    load: Int64, placement: Placement, eplb: Placement, cost: CostModel
) -> dict[str, Int64]:
    """[R, slots] rows by every way of dividing a load."""
    size, number = placement.num_ranks, placement.num_experts // placement.num_ranks
    found = {"plain": load.reshape(size, -1), "even": slots_of(even_quotas(load, eplb), eplb)}
    for objective in OBJECTIVES:
        problem = Problem(objective=objective, cost=cost)
        quota = quotas_by_objective(load, placement, problem)
        found[objective] = slots_of(quota, placement)
    mean = np.full((1, number), load.sum() // (size * number))
    mean[0, : load.sum() // size - mean.sum()] += 1
    return {**found, "ideal": mean}


def drawn(weights: Int64, num_tokens: int, num_topk: int, seed: int) -> torch.Tensor:
    """[T, K] a batch's picks: for each token so many different experts."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.from_numpy(weights).double().clamp(min=1e-9).expand(num_tokens, -1)
    return torch.multinomial(chances, num_topk, generator=generator)


def plan_time(
    topk_idx: torch.Tensor, placement: Placement, objective: str, cost: CostModel
) -> float:
    """Microseconds of one rank's plan, for the picks [R, T, K] of all ranks."""
    rank, num_experts = placement.num_ranks // 2, placement.num_experts
    options: dict[str, Any] = dict(objective=objective, cost=cost, one_launch=MAX_ONE_LAUNCH)
    planner = Planner(placement, rank=rank, counts="given", solver="flow", **options)
    counts = torch.stack([reference.count(picks, num_experts) for picks in topk_idx])
    own, of_all = topk_idx[rank].cuda(), counts.cuda()
    taken = bench.time_graph(lambda _: planner(own, counts=of_all))
    planner.raise_errors()
    return taken


def measure(args: argparse.Namespace, num_ranks: int, cost: CostModel | None) -> dict[str, Any]:
    """{tokens: {column: [of each batch]}} of a number of ranks. Columns of experts are in
    milliseconds, and those of plans in microseconds."""
    live, learned = (
        load_recording(args.recording, key=key, layout=args.layout).counts.sum(0)
        for key in (args.key, args.learn_from)
    )
    num_slots = live.shape[1] // num_ranks + NUM_REDUNDANT
    most = max(num_ranks * max(args.tokens) * args.topk // 2, num_slots * (MODEL_ROWS + 1))
    clock = Clock(num_slots, most)
    cost = cost or calibrate(clock.rank, num_slots, MODEL_ROWS, torch.cuda.get_device_name()).model
    found: dict[int, dict[str, list[float]]] = {
        tokens: {column: [] for column in (*COLUMNS, *PLANS.values())} for tokens in args.tokens
    }
    for layer in np.linspace(0, len(live) - 1, args.layers).round().astype(int):
        sizes: dict[str, Any] = dict(num_ranks=num_ranks, num_redundant_per_rank=NUM_REDUNDANT)
        history = torch.as_tensor(np.asarray(learned[layer]))
        eplb = Placement.from_history(history, **sizes)
        placement = Placement.for_lp(history[None], time_budget_s=2, **sizes)
        for tokens, times in found.items():
            picks = drawn(np.asarray(live[layer]), num_ranks * tokens, args.topk, int(layer))
            load = reference.count(picks, live.shape[1]).numpy().astype(np.int64)
            for column, rows in rows_of(load, placement, eplb, cost).items():
                times[column].append(clock.layer(rows, cost) / 1e6)
            of_ranks = picks.view(num_ranks, tokens, args.topk)
            for objective, column in PLANS.items():
                times[column].append(plan_time(of_ranks, placement, objective, cost))
    return found


def tables_of(found: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Of experts and of plans: a row for each number of ranks and tokens."""
    experts, plans = [], []
    for name, times_of in found.items():
        for tokens, times in times_of.items():
            ms = {column: statistics.mean(of_batches) for column, of_batches in times.items()}
            whole = {
                column: ms[column] + ms.get(PLANS.get(column, ""), 0) / 1e3 for column in COLUMNS
            }
            row = f"{name}, {tokens} tokens a rank"
            experts.append([row, *(f"{ms[column]:.3f}" for column in COLUMNS), above_others(ms)])
            us = [f"{ms[column]:.1f}" for column in PLANS.values()]
            plans.append([row, *us, above_others(whole)])
    last = "auto above the best"
    return [(["ms", *COLUMNS, last], experts), (["us", *PLANS.values(), last], plans)]


def above_others(times: dict[str, float]) -> str:
    """How far `auto` is above the fastest other column but the ideal."""
    best = min(times[column] for column in COLUMNS if column not in ("auto", "ideal"))
    return f"{times['auto'] / best - 1:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording")
    parser.add_argument("--key")
    parser.add_argument("--learn-from", metavar="KEY")
    parser.add_argument("--layout", help="of ids, as load_recording takes it")
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 128, 512, 1024, 4096])
    parser.add_argument("--layers", type=int, default=5, help="of the recording, evenly chosen")
    parser.add_argument("--cost", metavar="FILE", help="of lplb-ep calibrate, for these experts")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    args = parser.parse_args()
    cost = CostModel.load(args.cost) if args.cost else None
    found = {}
    for num_ranks in args.ranks:
        found[f"EP{num_ranks}"] = measure(args, num_ranks, cost)
        tables = tables_of(found)
        print("\n\n".join(text_table(*table) for table in tables), flush=True)
        if args.markdown:
            Path(args.markdown).write_text("\n".join(markdown_table(*table) for table in tables))
        if args.json:
            Path(args.json).write_text(json.dumps({**bench.conditions(), "times": found}, indent=1))


if __name__ == "__main__":
    main()
