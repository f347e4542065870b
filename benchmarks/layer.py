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

Each figure is the mean over batches of milliseconds of a layer. `best` says how far `auto` is above
the fastest column but the ideal. The ranks timed are those that cost at least three quarters of the
dearest by the cost model. `lplb-ep calibrate` has made the model, or it is made at the start.
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

from lplb_ep import Placement, Problem
from lplb_ep.cost import CostModel
from lplb_ep.planning.objectives import quotas_by_objective
from lplb_ep.settings import OBJECTIVES
from lplb_ep.tools import bench
from lplb_ep.tools.calibrate import calibrate
from lplb_ep.tools.grouped_gemms import Experts
from lplb_ep.tools.plan_times import even_quotas
from lplb_ep.tools.recordings import load_recording
from lplb_ep.tools.tables import markdown_table, text_table

Int64 = npt.NDArray[np.int64]

NUM_REDUNDANT, HIDDEN, WIDTH = 2, 7168, 2048
COLUMNS = ("plain", "even", *OBJECTIVES, "ideal")
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


def drawn(weights: Int64, num_tokens: int, num_topk: int, seed: int) -> Int64:
    """[E] a batch's picks: for each token so many different experts."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.from_numpy(weights).double().clamp(min=1e-9).expand(num_tokens, -1)
    picks = torch.multinomial(chances, num_topk, generator=generator)
    return np.bincount(picks.flatten().numpy(), minlength=len(weights)).astype(np.int64)


def measure(args: argparse.Namespace, num_ranks: int, cost: CostModel | None) -> dict[str, Any]:
    """{tokens: {column: [milliseconds of each batch]}} of a number of ranks."""
    live, learned = (
        load_recording(args.recording, key=key, layout=args.layout).counts.sum(0)
        for key in (args.key, args.learn_from)
    )
    num_slots = live.shape[1] // num_ranks + NUM_REDUNDANT
    most = max(num_ranks * max(args.tokens) * args.topk // 2, num_slots * (MODEL_ROWS + 1))
    clock = Clock(num_slots, most)
    cost = cost or calibrate(clock.rank, num_slots, MODEL_ROWS, torch.cuda.get_device_name()).model
    found: dict[int, dict[str, list[float]]] = {
        tokens: {column: [] for column in COLUMNS} for tokens in args.tokens
    }
    for layer in np.linspace(0, len(live) - 1, args.layers).round().astype(int):
        sizes: dict[str, Any] = dict(num_ranks=num_ranks, num_redundant_per_rank=NUM_REDUNDANT)
        history = torch.as_tensor(np.asarray(learned[layer]))
        eplb = Placement.from_history(history, **sizes)
        placement = Placement.for_lp(history[None], time_budget_s=2, **sizes)
        for tokens, times in found.items():
            load = drawn(np.asarray(live[layer]), num_ranks * tokens, args.topk, int(layer))
            for column, rows in rows_of(load, placement, eplb, cost).items():
                times[column].append(clock.layer(rows, cost) / 1e6)
    return found


def table_of(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each number of ranks and tokens."""
    rows = []
    for name, times_of in found.items():
        for tokens, times in times_of.items():
            means = {column: statistics.mean(times[column]) for column in COLUMNS}
            best = min(means[c] for c in COLUMNS if c not in ("auto", "ideal"))
            rows.append(
                [
                    f"{name}, {tokens} tokens a rank",
                    *(f"{means[column]:.3f}" for column in COLUMNS),
                    f"{means['auto'] / best - 1:+.1%}",
                ]
            )
    return ["ms", *COLUMNS, "auto above the best"], rows


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
        head, rows = table_of(found)
        print(text_table(head, rows), flush=True)
        if args.markdown:
            Path(args.markdown).write_text(markdown_table(head, rows))
        if args.json:
            Path(args.json).write_text(json.dumps({**bench.conditions(), "ms": found}, indent=1))


if __name__ == "__main__":
    main()
