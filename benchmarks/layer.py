"""What balancing saves of a layer's compute, on recorded loads, at the sizes of DeepSeek-V3.

    python benchmarks/layer.py FILE --key LIVE --learn-from LEARNED [--every 6] [--json FILE]

8 ranks of 32 experts and 2 redundant slots, hidden 7168, expert width 2048, top-8, 4096 tokens a
rank. The computation of each rank (a grouped GEMM in and one out, bfloat16) runs alone on the
whole GPU with the rows that its plan gives it; a layer takes what its slowest rank takes.
Compared: experts in order, as plain DeepEP has them; copies by EPLB and by `Placement.for_lp`, each
with an even split and balanced; and the ideal, every rank at the mean with equal experts, as a
router that is forced into balance makes them: 1024 rows, whole tiles of a GEMM; and "ragged", 1024
rows on average and as many odd ones as real experts have: what rows that fill no tile cost, no
balance brings back. Plan, dispatch and combine are not in these figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lplb_ep import Placement, bench, cpu
from lplb_ep.report import load_recording, text_table

NUM_RANKS, NUM_REDUNDANT, HIDDEN, WIDTH = 8, 2, 7168, 2048
NUM_PICKS = NUM_RANKS * 4096 * 8
NUM_WARM, NUM_RUNS = 3, 10
COLUMNS = (
    "in order",
    "EPLB, even",
    "EPLB, balanced",
    "LP, even",
    "LP, balanced",
    "ideal, ragged",
    "ideal",
)


class Experts:
    """A rank's slots: a gated feed-forward network each."""

    def __init__(self, num_slots: int) -> None:
        self.enter = torch.randn(num_slots, HIDDEN, 2 * WIDTH, device="cuda").bfloat16()
        self.leave = torch.randn(num_slots, WIDTH, HIDDEN, device="cuda").bfloat16()

    def milliseconds(self, rows: torch.Tensor) -> float:
        """For [slots] rows of each slot: the median time of a pass."""
        ends = rows.cumsum(0).int().cuda()
        x = torch.randn(int(rows.sum()), HIDDEN, device="cuda").bfloat16()
        times = []
        for _ in range(NUM_WARM + NUM_RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            gate, up = torch._grouped_mm(x, self.enter[: len(rows)], offs=ends).chunk(2, 1)
            hidden = torch.nn.functional.silu(gate) * up
            torch._grouped_mm(hidden, self.leave[: len(rows)], offs=ends)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[NUM_WARM:])


def slots_of(quota: torch.Tensor, placement: Placement) -> torch.Tensor:
    """[R, P / R] rows of each slot, from the quotas [E, C]."""
    slot = torch.tensor(placement.logical_to_physical.tolist())
    rows = torch.zeros(placement.num_physical_experts, dtype=torch.int64)
    rows[slot[slot >= 0]] = quota.long()[slot >= 0]
    return rows.view(placement.num_ranks, -1)


def even(load: torch.Tensor, placement: Placement) -> torch.Tensor:
    """The quotas of an even split over an expert's copies."""
    here = torch.tensor((placement.logical_to_physical >= 0).tolist())
    number = here.sum(1, keepdim=True)
    first = load[:, None] // number + (here.cumsum(1) <= load[:, None] % number)
    return torch.where(here, first, 0)


def rows_of(load: torch.Tensor, learned: torch.Tensor) -> dict[str, torch.Tensor]:
    """[R, slots] rows by every way of dividing the load."""
    sizes: dict[str, Any] = dict(num_ranks=NUM_RANKS, num_redundant_per_rank=NUM_REDUNDANT)
    placements = {
        "EPLB": Placement.from_history(learned, **sizes),
        "LP": Placement.for_lp(learned[None], **sizes),
    }
    in_order = load.view(NUM_RANKS, -1)
    mean = int(load.sum()) // NUM_RANKS
    found = {
        "in order": in_order,
        "ideal": torch.full_like(in_order, mean // in_order.shape[1]),
    }
    odd = 2 * torch.arange(1 - in_order.shape[1], in_order.shape[1], 2)  # -62 to 62, in all 0
    found["ideal, ragged"] = found["ideal"] + odd
    for name, placement in placements.items():
        found[f"{name}, even"] = slots_of(even(load, placement), placement)
        found[f"{name}, balanced"] = slots_of(cpu.solve(load, placement).quota, placement)
    return found


def scaled(load: np.ndarray, total: int) -> torch.Tensor:
    """A load of so many picks in the same proportions."""
    exact = load * (total / load.sum())
    whole = np.floor(exact).astype(np.int64)
    largest = np.argsort(whole - exact, kind="stable")[: total - whole.sum()]
    whole[largest] += 1
    return torch.from_numpy(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording")
    parser.add_argument("--key")
    parser.add_argument("--learn-from", metavar="KEY", required=True)
    parser.add_argument("--every", type=int, default=6, help="of how many layers to take one")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    live, learned = (
        load_recording(args.recording, key=key).counts.sum(0) for key in (args.key, args.learn_from)
    )
    experts = Experts(live.shape[1] // NUM_RANKS + NUM_REDUNDANT)
    table, found = [], {}
    for layer in range(0, len(live), args.every):
        rows = rows_of(scaled(np.asarray(live[layer]), NUM_PICKS), torch.as_tensor(learned[layer]))
        times = {c: max(experts.milliseconds(of_rank) for of_rank in rows[c]) for c in COLUMNS}
        found[layer] = times
        table.append([str(layer), *(f"{times[c]:.2f}" for c in COLUMNS)])
    medians = {c: statistics.median(times[c] for times in found.values()) for c in COLUMNS}
    worst = {c: max(times[c] / times["ideal"] for times in found.values()) for c in COLUMNS}
    table += [
        [],
        ["median", *(f"{medians[c]:.2f}" for c in COLUMNS)],
        ["worst / ideal", *(f"{worst[c]:.3f}" for c in COLUMNS)],
    ]
    print(text_table(["layer; ms", *COLUMNS], table))
    if args.json:
        Path(args.json).write_text(json.dumps({**bench.conditions(), "ms": found}, indent=1))


if __name__ == "__main__":
    main()
