"""What guests cost: weights pushed to another GPU, gradients fetched home, both beside GEMMs too.

    python benchmarks/push.py [--ranks 2] [--quick] [--json FILE]

Experts of DeepSeek-V3's size (hidden 7168, width 2048, three matrices, bfloat16: 88 MB). Every rank
pushes to the next, all at once. A time is the slowest rank's median by the GPU's clock, from when
all ranks have met until the guests have come. Copies by the copy engines stand beside them, in the
same run. Ranks that share a GPU show nothing of NVLink.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from lplb_ep.comm.peers import peer_memory
from lplb_ep.tools import bench
from lplb_ep.weights.guest_launches import PeerAddresses
from lplb_ep.weights.guest_transport import GuestLayout
from lplb_ep.weights.peer_guests import PeerGuests

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import mps
import ranks

HIDDEN, WIDTH, NUM_HOMES, NUM_GUESTS = 7168, 2048, 2, 2
SHAPES = {"down": (WIDTH, HIDDEN), "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH)}
NUM_WARM, NUM_RUNS = 2, 9
SLEEP_CYCLES = 4_000_000  # 2 ms
GEMM = (4096, HIDDEN, 2 * WIDTH)
FORMS = ((32768, 4), (16384, 4), (16384, 8), (32768, 6), (49152, 4))
"""Bytes of a chunk, and chunks in a block's shared memory."""
BLOCKS = (2, 4, 8, 12, 16, 24, 32)


class Bench:
    """A rank's experts, the memory of its guests, and transports of several forms."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank = group, group.rank()
        self.device = torch.device("cuda", torch.cuda.current_device())
        num_ranks = group.size()
        homes = [(rank, slot) for rank in range(num_ranks) for slot in range(NUM_HOMES)]
        parameters = {n: (torch.Size(shape), torch.bfloat16) for n, shape in SHAPES.items()}
        self.layout = GuestLayout.of(parameters, NUM_GUESTS, NUM_HOMES, homes)
        self.windows = peer_memory(group, "ipc")
        self.pool = self.windows.window(2 * self.layout.num_bytes)
        self.weights = [
            torch.full((NUM_HOMES, *shape), self.rank + 1.0, device="cuda").bfloat16()
            for shape in SHAPES.values()
        ]
        before = (self.rank - 1) % num_ranks
        self.tables = {}
        for number in (0, 1, 2):  # guests of a rank: experts of the rank before it
            table = torch.full((num_ranks, NUM_GUESTS), -1, dtype=torch.int32)
            for rank, slot in [(r, s) for r in range(num_ranks) for s in range(number)]:
                table[rank, slot] = NUM_HOMES * ((rank - 1) % num_ranks) + slot
            self.tables[number] = table.cuda()
        one_way = torch.full((num_ranks, NUM_GUESTS), -1, dtype=torch.int32)
        one_way[1, 0] = 0
        self.tables["one way"] = one_way.cuda()
        self.expected = float(before + 1)

    def transport(self, form: tuple[int, int] = FORMS[0], num_blocks: int = 16) -> PeerGuests:
        """With flags of its own, and the one pool."""
        R, size = self.group.size(), 2 * self.layout.num_bytes
        _, *sizes = PeerAddresses.sizes(R, size)
        addresses = PeerAddresses(self.pool, *(self.windows.window(n) for n in sizes))
        options = {"chunk": form[0], "num_stages": form[1], "num_blocks": num_blocks}
        sizes = (self.layout.num_bytes, size, R)
        return PeerGuests(self.rank, self.device, addresses, *sizes, timeout_s=20, **options)

    def milliseconds(self, one: PeerGuests, call: Callable[[], object]) -> float:
        """The slowest rank's median."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(NUM_WARM + NUM_RUNS):
            dist.barrier(self.group)
            torch.cuda._sleep(SLEEP_CYCLES)
            one.barrier(self.layout, self.tables[1])
            start.record()
            call()
            end.record()
            end.synchronize()
            one.raise_errors()
            times.append(start.elapsed_time(end))
        found: list[float] = [0.0] * self.group.size()
        dist.all_gather_object(found, statistics.median(times[NUM_WARM:]), group=self.group)
        return max(found)

    def push(self, one: PeerGuests, number: int | str) -> Callable[[], None]:
        def call() -> None:
            one.push(self.layout, self.weights, self.tables[number])
            one.wait()

        return call

    def check(self, one: PeerGuests, number: int) -> None:
        """What the last push left."""
        for block in self.layout.blocks(one.memory):
            assert (block[:number] == self.expected).all(), "guests are not their homes"


def gigabytes(num_bytes: int, milliseconds: float) -> str:
    return f"{num_bytes / milliseconds / 1e6:.0f}"


def pushes(b: Bench, quick: bool) -> dict[str, float]:
    """Of one expert in every form, and of two."""
    found = {}
    for form in FORMS[:1] if quick else FORMS:
        for num_blocks in (8, 16) if quick else BLOCKS:
            one = b.transport(form, num_blocks)
            one.memory.zero_()
            name = f"push, {form[0] >> 10} KiB x {form[1]}, {num_blocks} SMs"
            found[name] = b.milliseconds(one, b.push(one, 1))
            b.check(one, 1)
    one = b.transport()
    found["push of two, 16 SMs"] = b.milliseconds(one, b.push(one, 2))
    b.check(one, 2)
    found["push one way, 16 SMs"] = b.milliseconds(one, b.push(one, "one way"))
    found["push of none"] = b.milliseconds(one, b.push(one, 0))
    found["barrier"] = b.milliseconds(one, one.barrier)
    start = time.perf_counter()
    for _ in range(50):
        b.push(one, 0)()
    found["CPU of a push"] = (time.perf_counter() - start) * 1e3 / 50
    return found


def copy_engines(b: Bench) -> dict[str, float]:
    """The same bytes, by addresses that the CPU knows."""
    from cupy.cuda import runtime

    one, target = b.transport(), b.pool[(b.rank + 1) % b.group.size()]

    def call() -> None:
        stream, at = torch.cuda.current_stream().cuda_stream, target
        for weight in b.weights:
            size = weight[0].numel() * 2
            runtime.memcpyAsync(at, weight.data_ptr(), size, 4, stream)
            at += size

    return {"copy engines": b.milliseconds(one, call)}


def gradients(b: Bench, dtype: torch.dtype) -> dict[str, float]:
    """Of two experts a rank, from torch's memory and from the pool's."""
    name = str(dtype).removeprefix("torch.")
    parts = [torch.ones(NUM_GUESTS, *s, device="cuda", dtype=dtype) for s in SHAPES.values()]
    totals = [torch.ones(NUM_HOMES, *s, device="cuda", dtype=dtype) for s in SHAPES.values()]
    found = {}
    for num_blocks in (8, 16, 24, 32):
        one = b.transport(num_blocks=num_blocks)
        blocks = one.gradient_blocks(b.layout, [dtype] * 3)
        for form, given in (("copied", parts), ("in place", blocks)):

            def call(one: PeerGuests = one, given: list = given) -> None:
                one.reduce(b.layout, given, totals, b.tables[2])

            for total in totals:
                total.fill_(1)
            found[f"gradients {name} {form}, {num_blocks} SMs"] = b.milliseconds(one, call)
            for total in totals:
                assert (total == 1 + NUM_WARM + NUM_RUNS).all(), "sums are wrong"
            dist.barrier(b.group)
    return found


def beside(b: Bench, num_gemms: int) -> dict[str, float]:
    """Work on the current stream meanwhile: exposed is what both take beyond the work alone."""
    rows, inner, columns = GEMM
    x = torch.randn(rows, inner, device="cuda").bfloat16()
    y = torch.randn(inner, columns, device="cuda").bfloat16()
    out = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    float32 = {"device": "cuda", "dtype": torch.float32}
    parts = [torch.ones(NUM_GUESTS, *shape, **float32) for shape in SHAPES.values()]
    totals = [torch.ones(NUM_HOMES, *shape, **float32) for shape in SHAPES.values()]

    def gemms() -> None:
        for _ in range(num_gemms):
            torch.mm(x, y, out=out)

    def with_gemms(one: PeerGuests, begin: Callable[[PeerGuests], None]) -> Callable[[], None]:
        def call() -> None:
            begin(one)
            gemms()
            one.wait()

        return call

    def push(one: PeerGuests) -> None:
        one.push(b.layout, b.weights, b.tables[1])

    def gradients_home(one: PeerGuests) -> None:
        one.begin_reduce(b.layout, parts, totals, b.tables[2])

    alone = b.milliseconds(b.transport(), gemms)
    found = {f"{num_gemms} GEMMs alone": alone}
    for num_blocks in (8, 16):
        one = b.transport(num_blocks=num_blocks)
        for total in totals:
            total.fill_(1)
        for name, begin in (("push", push), ("gradients", gradients_home)):
            took = b.milliseconds(one, with_gemms(one, begin))
            what = f"{num_gemms} GEMMs and {name}, {num_blocks} SMs"
            found |= {what: took, f"exposed, {what}": took - alone}
            if name == "push":
                b.check(one, 1)
        for total in totals:
            assert (total == 1 + NUM_WARM + NUM_RUNS).all(), "sums are wrong"
        dist.barrier(b.group)
    return found


def measure(group: dist.ProcessGroup, quick: bool) -> dict[str, float]:
    """Of one rank."""
    torch.cuda.set_device(group.rank() % torch.cuda.device_count())
    b = Bench(group)
    found = {**copy_engines(b), **pushes(b, quick), **gradients(b, torch.float32)}
    for num_gemms in (2, 8):
        found |= beside(b, num_gemms)
    if not quick:
        found |= gradients(b, torch.bfloat16)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one form, in half a minute")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    size = 2 * sum(rows * columns for rows, columns in SHAPES.values())
    with mps.service() as environ_of:
        (found, *_) = ranks.run(
            args.ranks, measure, args.quick, environ=environ_of(args.ranks), timeout=400
        )
    print(f"{args.ranks} ranks, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}\n")
    print("| what | ms | GB/s each way |\n| --- | --- | --- |")
    for name, took in found.items():
        num_bytes = {"push": 1, "copy": 1, "grad": 4 if "float32" in name else 2}.get(name[:4], 0)
        num_bytes = 2 if "of two" in name else 0 if "of none" in name else num_bytes
        shown = gigabytes(size * num_bytes, took) if num_bytes else ""
        print(f"| {name} | {took:.3f} | {shown} |")
    if args.json:
        Path(args.json).write_text(json.dumps({**bench.conditions(), "ms": found}, indent=1))


if __name__ == "__main__":
    main()
