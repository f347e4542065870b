"""What replica weights cost: bytes and milliseconds, alone and beside a GEMM.

    python benchmarks/replicas.py [--ranks 2 4 8] [--json FILE]

Experts have DeepSeek-V3's size (hidden 7168, width 2048, three matrices, bfloat16: 88 MB), and
gradients of float32. Each rank is the home of 2 experts, and has replicas of the next rank's 2. A
number is the slowest rank's median. Where there are fewer GPUs than ranks, ranks share them under
MPS. Such a figure measures one chip's memory, and says nothing of NVLink.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lplb_ep import Placement, Replicas
from lplb_ep.tools import bench
from lplb_ep.tools.tables import text_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import mps
import ranks

HIDDEN, WIDTH, NUM_HOMES, NUM_REPLICAS = 7168, 2048, 2, 2
NUM_WARM, NUM_RUNS = 2, 7
SLEEP_CYCLES = 20_000_000  # 10 ms
GEMM = (4096, HIDDEN, 2 * WIDTH)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (rows, columns) in {
            "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)
        }.items():  # fmt: skip
            shape = (NUM_HOMES + NUM_REPLICAS, rows, columns)
            weight = nn.Parameter(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
            weight.main_grad = torch.randn(shape, device="cuda")
            setattr(self, name, weight)


def place(num_ranks: int) -> Placement:
    """Replicas of the next rank's experts."""
    table = []
    for rank in range(num_ranks):
        beside = (rank + 1) % num_ranks
        table += [NUM_HOMES * rank + i for i in range(NUM_HOMES)]
        table += [NUM_HOMES * beside + i for i in range(NUM_REPLICAS)]
    return Placement(table, num_ranks)


def milliseconds(group: dist.ProcessGroup, call: Callable[[], object]) -> float:
    """The median by the GPU's clock. All ranks are there when it starts, and so is, where the CPU
    waits for nothing, all that they launch."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(NUM_WARM + NUM_RUNS):
        dist.barrier(group)
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[NUM_WARM:])


def measure(group: dist.ProcessGroup, transport: str, num_gemms: int) -> dict[str, float]:
    """Of one rank."""
    torch.cuda.set_device(group.rank() % torch.cuda.device_count())
    nccl = dist.new_group(backend="nccl") if transport == "nccl" else None
    experts = Experts()
    replicas = Replicas(
        experts, place(group.size()), nccl or group, "peers" if transport == "peers" else "torch"
    )
    rows, inner, columns = GEMM
    a = torch.randn(rows, inner, device="cuda").bfloat16()
    b = torch.randn(inner, columns, device="cuda").bfloat16()
    c = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)

    def gemms() -> None:
        for _ in range(num_gemms):
            torch.mm(a, b, out=c)

    def beside(start: Callable[..., object]) -> Callable[[], None]:
        def call() -> None:
            transfer = start(async_op=True)
            gemms()
            transfer.wait()

        return call

    found = {"gemms": milliseconds(group, gemms)}
    for name in ("copy_weights", "reduce_gradients"):
        call = getattr(replicas, name)
        before = replicas.num_bytes_sent
        found[name] = milliseconds(group, call)
        found[f"{name} MB"] = (replicas.num_bytes_sent - before) / (NUM_WARM + NUM_RUNS) / 1e6
        found[f"{name} beside"] = milliseconds(group, beside(call))
    if nccl is not None:
        dist.destroy_process_group(nccl)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--gemms", type=int, default=10, help="how many, one after the other")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    found: dict[str, dict[str, float]] = {}
    with mps.service() as environ_of:
        for num_ranks in args.ranks:
            shared = num_gpus < num_ranks
            for transport in ("peers", "gloo") if shared else ("peers", "nccl", "gloo"):
                of_ranks = ranks.run(
                    *(num_ranks, measure, transport, args.gemms),
                    environ=environ_of(num_ranks),
                    timeout=300,
                )
                name = f"{num_ranks} on {num_gpus if shared else num_ranks} GPU(s), {transport}"
                found[name] = {c: max(times[c] for times in of_ranks) for c in of_ranks[0]}
            ranks.close()  # with their memory
    columns = list(next(iter(found.values())))
    rows = [[name, *(f"{times[c]:.2f}" for c in columns)] for name, times in found.items()]
    print(text_table(["ranks; ms", *columns], rows))
    if args.json:
        Path(args.json).write_text(json.dumps({**bench.conditions(), "ms": found}, indent=1))


if __name__ == "__main__":
    main()
