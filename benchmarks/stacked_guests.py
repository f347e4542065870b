"""Where the weights of guests lie for a grouped GEMM: behind the layer's own, or in the pool.

    python benchmarks/stacked_guests.py [--guests 1 4 6] [--tokens 512 4096] [--json FILE]

A rank has 32 experts of DeepSeek-V3's size (hidden 7168, width 2048, bfloat16) and guests. Its rows
are `tokens` times 8, equal in all slots. One GPU, gated experts, torch's grouped GEMMs.

- own: the rank's experts with all of the rows, and no guests, for comparison.
- copied: one stack of own experts and guests in usual memory. Guests have no pool for all layers.
- mapped: the same stack by CUDA's virtual memory: pages of the pool behind the layer's own pages.
- second: one pass over own experts and one over the pool, and the rows of both are concatenated.
- joined: the same without that copy (`Share` and `Join` of `whole_layer.py`). Own experts run over
  all rows, and the rows of guests are written over the rest.

"late" has guests arrive 0.25 ms after the start. One stack waits for them first. With two, own
experts compute meanwhile. A figure is the median of milliseconds by the GPU's clock; ways run by
turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from whole_layer import Join, Share

from lplb_ep.tools import bench
from lplb_ep.tools.tables import markdown_table

HIDDEN, WIDTH, NUM_OWN, NUM_TOPK = 7168, 2048, 32, 8
SHAPES = ((HIDDEN, 2 * WIDTH), (WIDTH, HIDDEN))
LATE_CYCLES = 500_000  # 0.25 ms at 1.98 GHz: about what a push of one expert takes
NUM_WARM, NUM_RUNS = 3, 15
WAYS = ("own", "copied", "mapped", "second", "joined")
PASSES = ("forward", "late", "forward and backward")


class MappedStack:
    """[slots, ...] bfloat16 in one range of addresses: own pages, and pages of a pool behind them.

    Source: the CUDA driver API's virtual memory management, `cuMemCreate` and `cuMemMap`.

    Args:
        shape: of one expert; its bytes are a multiple of the allocation granularity (2 MiB).
        num_guests: slots in the pool's pages.
    """

    def __init__(self, shape: tuple[int, int], num_guests: int) -> None:
        from cuda.bindings import driver

        place = driver.CUmemAllocationProp()
        place.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        place.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        place.location.id = torch.cuda.current_device()
        access = driver.CUmemAccessDesc()
        access.location = place.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        pages = checked(driver.cuMemGetAllocationGranularity(place, minimum))
        num_bytes = 2 * math.prod(shape)
        assert num_bytes % pages == 0, f"an expert ends within a page of {pages} bytes"
        whole = (NUM_OWN + num_guests) * num_bytes
        begin = int(checked(driver.cuMemAddressReserve(whole, 0, 0, 0)))
        for at, slots in ((0, NUM_OWN), (NUM_OWN, num_guests)):
            handle = checked(driver.cuMemCreate(slots * num_bytes, place, 0))
            checked(driver.cuMemMap(begin + at * num_bytes, slots * num_bytes, 0, handle, 0))
        checked(driver.cuMemSetAccess(begin, whole, [access], 1))
        self.__cuda_array_interface__ = {
            "shape": (whole,),
            "typestr": "|u1",
            "data": (begin, False),
            "version": 3,
        }
        self.tensor = torch.as_tensor(self, device="cuda").view(torch.bfloat16).view(-1, *shape)


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver returned, or its error."""
    status, *rest = result
    if int(status) != 0:
        raise RuntimeError(f"the CUDA driver returned {status}")
    return rest[0] if rest else None


def experts(x: Tensor, stacks: list[Tensor], ends: Tensor) -> Tensor:
    """Gated experts over rows in the order of their slots."""
    enter, leave = stacks
    gate, up = torch._grouped_mm(x, enter, offs=ends).chunk(2, -1)
    return torch._grouped_mm(F.silu(gate) * up, leave, offs=ends)


def ends_of(rows: list[int]) -> Tensor:
    return torch.tensor(rows).cumsum(0).int().cuda()


class Layer:
    """A layer's own experts, its guests, and a batch of rows."""

    def __init__(self, num_guests: int, num_tokens: int) -> None:
        num_slots, num_rows = NUM_OWN + num_guests, NUM_TOPK * num_tokens
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        whole = [torch.randn(num_slots, *s, **options) / s[0] ** 0.5 for s in SHAPES]
        mapped = [MappedStack(shape, num_guests).tensor for shape in SHAPES]
        for there, values in zip(mapped, whole, strict=True):
            there.copy_(values)
        self.stacks = {
            "own": [stack[:NUM_OWN].clone() for stack in whole],
            "pool": [stack[NUM_OWN:].clone() for stack in whole],
            "copied": whole,
            "mapped": mapped,
        }
        for stacks in self.stacks.values():
            for stack in stacks:
                stack.requires_grad_()
        each = num_rows // num_slots
        self.rows = [each] * (num_slots - 1) + [num_rows - each * (num_slots - 1)]
        self.x = torch.randn(num_rows, HIDDEN, **options).requires_grad_()
        self.grad = torch.randn(num_rows, HIDDEN, **options)
        self.num_first = sum(self.rows[:NUM_OWN])
        first, behind = self.rows[:NUM_OWN], self.rows[NUM_OWN:]
        self.ends = {
            "own": ends_of([num_rows // NUM_OWN] * NUM_OWN),
            "whole": ends_of(self.rows),
            "first": ends_of(first),
            "behind": ends_of(behind),
        }
        self.side = torch.cuda.Stream()

    def forward(self, way: str, arrive: Callable[[], object] = lambda: None) -> Tensor:
        """[rows, hidden] outputs; `arrive` is called before guests' weights are read."""
        if way == "second":
            own, behind = self.x.split([self.num_first, len(self.x) - self.num_first])
            out = experts(own, self.stacks["own"], self.ends["first"])
            arrive()
            others = experts(behind, self.stacks["pool"], self.ends["behind"])
            return torch.cat([out, others])
        if way == "joined":
            rows, behind = Share.apply(self.x, self.num_first)
            out = experts(rows, self.stacks["own"], self.ends["first"])
            arrive()
            return Join.apply(out, experts(behind, self.stacks["pool"], self.ends["behind"]))
        if way != "own":
            arrive()
        return experts(self.x, self.stacks[way], self.ends["own" if way == "own" else "whole"])

    def late(self, way: str) -> Tensor:
        """Forward, where guests arrive after a time from its start."""
        current = torch.cuda.current_stream()
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            torch.cuda._sleep(LATE_CYCLES)
        return self.forward(way, lambda: current.wait_stream(self.side))

    def backward(self, way: str) -> None:
        """Forward, and gradients of the rows and of all weights."""
        names = ("own", "pool") if way in ("second", "joined") else (way,)
        inputs = [self.x, *(stack for name in names for stack in self.stacks[name])]
        torch.autograd.grad(self.forward(way), inputs, self.grad)

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Medians by pass and way."""
        runs: dict[str, Callable[[str], object]] = {
            "forward": torch.no_grad()(self.forward),
            "late": torch.no_grad()(self.late),
            "forward and backward": self.backward,
        }
        found = {}
        for name, run in runs.items():
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(NUM_WARM + NUM_RUNS):
                for way in WAYS:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    torch.cuda._sleep(4_000_000)  # the CPU has queued all when it begins
                    start.record()
                    run(way)
                    end.record()
                    end.synchronize()
                    if number >= NUM_WARM:
                        times[way].append(start.elapsed_time(end))
            found[name] = {way: statistics.median(of) for way, of in times.items()}
        return found

    def check(self) -> None:
        """All ways but `own` have the same outputs."""
        with torch.no_grad():
            expected = self.forward("copied")
            for way in ("mapped", "second", "joined"):
                torch.testing.assert_close(self.forward(way), expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guests", type=int, nargs="+", default=[1, 4, 6])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table, found = [], []
    for num_tokens in args.tokens:
        for num_guests in args.guests:
            layer = Layer(num_guests, num_tokens)
            layer.check()
            times = layer.milliseconds()
            for name in PASSES:
                head = f"{num_tokens} tokens, {num_guests} guests, {name}"
                table.append([head, *(f"{times[name][way]:.3f}" for way in WAYS)])
            found.append({"tokens": num_tokens, "guests": num_guests, **times})
            print(table[-3:], flush=True)
            del layer
            torch.cuda.empty_cache()
    print(markdown_table(("", *WAYS), table))
    if args.json:
        args.json.write_text(json.dumps({**bench.conditions(), "found": found}))


if __name__ == "__main__":
    main()
