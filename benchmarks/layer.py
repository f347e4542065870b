"""What balancing saves of a layer's compute, on recorded loads, at the sizes of DeepSeek-V3.

    python benchmarks/layer.py FILE --key LIVE --learn-from LEARNED [--every 6] [--json FILE]

8 ranks of 32 experts and 2 redundant slots, hidden 7168, expert width 2048, top-8, 4096 tokens a
rank. The computation of each rank (a grouped GEMM in and one out, bfloat16) runs alone on the
whole GPU with the rows that its plan gives it; a layer takes what its slowest rank takes.
Compared: experts in order, as plain DeepEP has them; copies by EPLB and by `Placement.for_lp`, each
with an even split and balanced; and the ideal, every rank at the mean with equal experts, as a
router that is forced into balance makes them: 1024 rows, whole tiles of a GEMM; and "ragged", 1024
rows on average and as many odd ones as real experts have: what rows that fill no tile cost, no
balance brings back.

Where DeepEP is installed a second table has what its calls take on the same layers, by 8 ranks that
share the GPU under MPS, each with a part of it: no figures of NVLink. Picks are drawn with the
load as weights; with a plan the layout's call makes it, on EPLB's copies.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import lplb_ep
from lplb_ep import Placement
from lplb_ep.planning import reference as cpu
from lplb_ep.tools import bench
from lplb_ep.tools.recordings import load_recording
from lplb_ep.tools.tables import text_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import mps
import ranks

NUM_RANKS, NUM_REDUNDANT, HIDDEN, WIDTH = 8, 2, 7168, 2048
NUM_EXPERTS, NUM_TOKENS, NUM_TOPK = 256, 4096, 8
NUM_PICKS = NUM_RANKS * NUM_TOKENS * NUM_TOPK
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


def calls(group: dist.ProcessGroup, loads: list[torch.Tensor], learned: list[torch.Tensor]) -> Any:
    """Of one rank: by layer, {way: milliseconds of layout, dispatch and combine}."""
    import deep_ep

    torch.cuda.set_device(group.rank() % torch.cuda.device_count())
    # All of a kernel's blocks must run at once, on an eighth of a GPU.
    deep_ep.Buffer.set_num_sms(4)
    num_bytes = deep_ep.Buffer.get_dispatch_config(NUM_RANKS).get_nvl_buffer_size_hint(
        2 * HIDDEN, NUM_RANKS
    )
    plain = deep_ep.Buffer(group, num_bytes)
    balanced = lplb_ep.Buffer(group, num_bytes)
    torch.manual_seed(group.rank())
    x = torch.randn(NUM_TOKENS, HIDDEN, device="cuda").bfloat16()
    found = []
    for load, history in zip(loads, learned, strict=True):
        placement = Placement.from_history(
            history, num_ranks=NUM_RANKS, num_redundant_per_rank=NUM_REDUNDANT
        )
        topk_idx = torch.multinomial(load.double().expand(NUM_TOKENS, -1), NUM_TOPK).cuda()
        ways = {"in order": plain, "balanced": balanced.view(placement)}
        found.append({way: one_layer(group, b, x, topk_idx) for way, b in ways.items()})
    return found


def one_layer(
    group: dist.ProcessGroup, buffer: Any, x: torch.Tensor, topk_idx: torch.Tensor
) -> list[float]:
    weights = torch.ones(topk_idx.shape, device="cuda")
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    times = []
    for _ in range(NUM_WARM + NUM_RUNS):
        dist.barrier(group)
        marks[0].record()
        layout = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
        marks[1].record()
        received, *_, handle, _ = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=weights,
            num_tokens_per_rank=layout[0],
            is_token_in_rank=layout[3],
            num_tokens_per_expert=layout[2],
        )
        marks[2].record()
        buffer.combine(received, handle)
        marks[3].record()
        torch.cuda.synchronize()
        times.append([a.elapsed_time(b) for a, b in itertools.pairwise(marks)])
    return [statistics.median(column) for column in zip(*times[NUM_WARM:], strict=True)]


def call_table(loads: list[torch.Tensor], learned: list[torch.Tensor]) -> str:
    environ = {"LPLB_EP": "1", "LPLB_EP_REPLICAS": "valid"}
    with mps.service() as environ_of:
        of_ranks = ranks.run(
            NUM_RANKS,
            calls,
            loads,
            learned,
            environ={**environ_of(NUM_RANKS), **environ},
            timeout=300,
        )
    rows = []
    for way in ("in order", "balanced"):
        slowest = [
            [max(of_rank[layer][way][call] for of_rank in of_ranks) for layer in range(len(loads))]
            for call in range(3)
        ]
        rows.append([way, *(f"{statistics.median(times):.2f}" for times in slowest)])
    return text_table(["slowest rank, median layer; ms", "layout", "dispatch", "combine"], rows)


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
    if importlib.util.find_spec("deep_ep") is not None:
        layers = range(0, len(live), args.every)
        print()
        print(call_table([live[i] for i in layers], [learned[i] for i in layers]))
    if args.json:
        Path(args.json).write_text(json.dumps({**bench.conditions(), "ms": found}, indent=1))


if __name__ == "__main__":
    main()
