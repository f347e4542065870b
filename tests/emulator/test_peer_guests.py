"""The host's side of guests: `PeerGuests` of several ranks, whose launches the emulator runs."""

import contextlib
import ctypes
import functools
import gc
import time
from types import SimpleNamespace

import emulator
import guest_ranks
import numpy as np
import pytest
import torch

from lplb_ep import RankError
from lplb_ep.gpu import launch
from lplb_ep.planning import kernels
from lplb_ep.planning.structs import Status
from lplb_ep.weights import guest_launches, peer_guests
from lplb_ep.weights.guest_transport import BatchNumber
from lplb_ep.weights.peer_guests import PeerGuests

PARAMETERS = {
    "bias": ((33,), torch.bfloat16),
    "down": ((6, 300), torch.bfloat16),
    "gain": ((3,), torch.float32),
    "packed": ((7, 31), torch.uint8),
    "up": ((50, 31), torch.float32),
}
CHUNK, NUM_STAGES = 4096, 3
CPU = torch.device("cpu")


class Driver:
    """Keeps the launches of each rank, and runs those of all ranks together."""

    def __init__(self, library):
        self._library, self._kernels, self.rank = library, [], 0
        self.operations = {}

    def load(self, program, index):
        """As `launch.load`."""
        return SimpleNamespace(kernel=functools.partial(self._kernel, self._library(program)))

    def _kernel(self, library, name, formats):
        self._kernels.append(library.kernel(name))
        function = SimpleNamespace(ptr=len(self._kernels))
        runtime = SimpleNamespace(
            getDevice=lambda: 0,
            setDevice=lambda index: None,
            eventCreateWithFlags=lambda flags: 1,
            eventDestroy=lambda event: None,
            eventRecord=lambda event, stream: None,
            streamWaitEvent=lambda stream, event, flags: None,
        )
        self._size = launch.Kernel(function, self, runtime, formats).layout.size
        return launch.Kernel(function, self, runtime, formats)

    def launchKernel(self, function, x, y, _z, threads, *rest):  # noqa: N802, CUDA's name
        """Keeps a launch, with its one argument as it is now."""
        *_, num_shared_bytes, _stream, arguments, _extra = rest
        kernel = self._kernels[function - 1]
        start = ctypes.c_void_p.from_address(arguments).value
        values = ctypes.create_string_buffer(ctypes.string_at(start, self._size))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(values))
        module = ctypes.pointer(kernel.library.module)
        at = ctypes.addressof(pointers)
        made = emulator._Operation(kernel.entry, module, at, (x, y), threads, num_shared_bytes, 1)
        operation = emulator.Operation(made, (kernel.library, values, pointers))
        self.operations.setdefault(self.rank, []).append(operation)

    def run(self, order):
        """Runs what was kept. Kernels may access the tensors that live now."""
        memory = emulator.Memory()
        emulator.register_tensors(gc.get_objects())
        streams, self.operations = self.operations, {}
        memory.run(*streams.values(), order=order)


class Stream:
    """A stream on which all is done in the order of its calls."""

    cuda_stream = 7

    def __init__(self, *args, **options):
        pass


@pytest.fixture
def driver(library, monkeypatch):
    made, memories = Driver(library), {}
    monkeypatch.setattr(kernels, "load", made.load)
    kernels._weights_kernels.cache_clear()
    for name, value in {
        "current_device": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda: None,
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": Stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    current = "_cuda_getCurrentRawStream"  # which a torch without CUDA has not
    monkeypatch.setattr(torch._C, current, lambda index: Stream.cuda_stream, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(guest_launches, "captures_go_on", contextlib.nullcontext)
    made.memories = memories
    monkeypatch.setattr(
        peer_guests, "memory_at", lambda address, size, device: memories[address][:size]
    )
    yield made
    kernels._weights_kernels.cache_clear()


class Ranks:
    def __init__(self, driver, num_ranks, num_guests, **options):
        self.driver = driver
        self.layout = guest_ranks.layout_of(num_ranks, 3, num_guests, PARAMETERS)
        num_bytes = 2 * self.layout.num_bytes
        addresses, held = guest_ranks.local_addresses(num_ranks, num_bytes, CPU)
        driver.memories.update({tensor.data_ptr(): tensor for tensor in held})
        self.all = []
        for rank in range(num_ranks):
            options = {"chunk": CHUNK, "num_stages": NUM_STAGES, "num_blocks": 3, **options}
            sizes = (self.layout.num_bytes, num_bytes, num_ranks)
            self.all.append(PeerGuests(rank, CPU, addresses, *sizes, **options))

    def own(self, experts, rank, stacked=True):
        rows = [tensor[3 * rank : 3 * rank + 3] for tensor in experts]
        return rows if stacked else [list(of_slots) for of_slots in rows]

    def each(self, call):
        for rank, one in enumerate(self.all):
            self.driver.rank = rank
            call(rank, one)


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("numbered", [False, True])
def test_guests_come_whole(numbered, order, driver):
    """Homes are rows of a stack or tensors of their own, and change their places."""
    group, rng = Ranks(driver, 3, 2), np.random.default_rng(0)
    for step, share in enumerate((1, 0.6, 0, 0.8)):
        experts = guest_ranks.draw_experts(group.layout, step, CPU)
        guests = torch.from_numpy(guest_ranks.draw_table(rng, group.layout, share))
        number = torch.tensor([step + 1 << 32])

        def push(rank, one, step=step, experts=experts, guests=guests, number=number):
            if not numbered or step % 2:
                one.barrier(group.layout, guests)
            own = group.own(experts, rank, step < 2)
            one.push(group.layout, own, guests, None, BatchNumber(number) if numbered else None)
            one.wait()

        group.each(push)
        driver.run(order)
        for rank, one in enumerate(group.all):
            one.raise_errors()
            assert int(guest_ranks.num_wrong(group.layout, one.memory, experts, guests[rank])) == 0


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_gradients_are_added_in_order(order, driver):
    group, rng = Ranks(driver, 3, 2), np.random.default_rng(1)
    pairs = [(torch.float32, torch.float32), (torch.bfloat16,) * 2, None]
    pairs += [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)]
    missing = {(0, 1, 0), (1, 0, 4), (2, 0, 4), (2, 1, 4)}  # rank, slot and parameter
    for step in range(3):
        table = guest_ranks.draw_table(rng, group.layout, 0.9)
        totals, parts = [], [[] for _ in group.all]
        for shape, pair in zip(group.layout.shapes, pairs, strict=True):
            totals.append(None if pair is None else torch.randn(9, *shape).to(pair[0]))
            for of_rank in parts:
                of_rank.append(None if pair is None else torch.randn(2, *shape).to(pair[1]))
        found = [None if total is None else total.clone() for total in totals]
        for rank, slot in np.argwhere(table >= 0):
            for p, (total, part) in enumerate(zip(totals, parts[rank], strict=True)):
                if total is not None and (rank, slot, p) not in missing:
                    total[table[rank, slot]] += part[slot]
        guests = torch.from_numpy(table)

        def reduce(rank, one, step=step, found=found, parts=parts, guests=guests):
            homes = [
                [None] * 3 if total is None else total[3 * rank : 3 * rank + 3] for total in found
            ]
            if step == 1:
                homes = [[*of_slots] for of_slots in homes]
            own = [
                part
                if part is None
                else [None if (rank, n, p) in missing else rows for n, rows in enumerate(part)]
                for p, part in enumerate(parts[rank])
            ]
            if step == 2:  # other strides, whose copies live until the wait
                own[-1] = [rows if rows is None else rows.t().clone().t() for rows in own[-1]]
                one.begin_reduce(group.layout, own, homes, guests)
            else:
                one.reduce(group.layout, own, homes, guests)

        group.each(reduce)
        # A sum that is waited for at once takes more of the SMs, which idle.
        blocks = {operation.made.grid[0] for operation in driver.operations[0]}
        assert blocks & {3, 12} == {3 if step == 2 else 12}
        driver.run(order)
        for got, total in zip(found, totals, strict=True):
            assert total is None or torch.equal(got, total)
        for one in group.all:
            one.raise_errors()


class Reduced(torch.autograd.Function):
    """Weights of resident slots, to whose gradient parts of guests are added, as `Guests` do."""

    @staticmethod
    def forward(ctx, weight, reduce):
        ctx.reduce = reduce
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        ctx.reduce(gradient)
        return gradient, None


@pytest.mark.parametrize("form", ["stacked", "list"])
@pytest.mark.parametrize("main", [False, True])
def test_a_reduced_gradient_is_handed_on_and_not_copied(form, main, driver):
    """Autograd copies what someone else has: the transport keeps none of it, not even views."""
    group = Ranks(driver, 2, 1)
    first, shape = group.all[0], group.layout.shapes[-1]
    shapes = [shape] * 3 if form == "list" else [(3, *shape)]
    weights = [torch.randn(*one, requires_grad=True) for one in shapes]
    addresses = []

    def reduce(number, gradient):
        addresses.append(gradient.data_ptr())
        total = torch.zeros(shapes[number]) if main else gradient
        rows = [total if n == number else torch.zeros(shape) for n in range(3)]
        totals = rows if form == "list" else [*total]
        parts = [torch.ones(1, *shape)]
        first.reduce(
            group.layout, [None] * 4 + parts, [[None] * 3] * 4 + [totals], torch.tensor([[3], [0]])
        )

    taken = [Reduced.apply(w, functools.partial(reduce, n)) for n, w in enumerate(weights)]
    sum((own * own.detach()).sum() for own in taken).backward()
    found = [weight.grad.data_ptr() for weight in weights]
    assert sorted(found) == sorted(addresses)


def test_an_absent_rank_is_named(driver):
    group = Ranks(driver, 2, 1, timeout_s=0.003)
    experts = guest_ranks.draw_experts(group.layout, 0, CPU)
    guests = torch.tensor([[3], [0]], dtype=torch.int32)
    group.all[0].push(group.layout, group.own(experts, 0), guests)
    driver.run(0)
    assert all((b.view(torch.uint8) == 255).all() for b in group.layout.blocks(group.all[0].memory))
    with pytest.raises(RankError, match=r"ranks \[1\] did not come to a push of guests or a sum"):
        group.all[0].raise_errors()
    group.all[0].raise_errors()


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_a_rank_that_refuses_to_push_again_is_named_at_once(order, driver):
    """The other goes on through its backward pass, and waits for nothing: it has a minute."""
    group = Ranks(driver, 2, 1, timeout_s=60)
    layout, experts = group.layout, guest_ranks.draw_experts(group.layout, 0, CPU)
    guests = torch.tensor([[3], [0]]).int()
    totals = [torch.zeros(3, *shape) for shape in layout.shapes]
    parts = [torch.ones(1, *shape) for shape in layout.shapes]
    words = [torch.tensor([step + 1 << 32]) for step in range(2)]
    numbers = [[BatchNumber(word) for word in words] for _ in group.all]

    def refuse(rank, one):
        one.barrier(layout, guests, numbers[rank][0], rank == 0)
        if rank == 1:
            one.push(layout, group.own(experts, rank), guests, None, numbers[rank][0])
            one.reduce(layout, parts, totals, guests, numbers[rank][0])

    def push(rank, one):
        one.push(layout, group.own(experts, rank), guests, None, numbers[rank][1])

    began = time.monotonic()
    group.each(refuse)
    driver.run(order)
    assert time.monotonic() - began < 30
    with pytest.raises(RankError, match=r"ranks \[0\] refused to push a batch's guests again"):
        group.all[1].raise_errors()
    assert all((total[0].view(torch.uint8) == 255).all() for total in totals)
    group.each(push)
    driver.run(order)
    for rank, one in enumerate(group.all):
        one.raise_errors()
        assert int(guest_ranks.num_wrong(layout, one.memory, experts, guests[rank])) == 0


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("numbered", [True, False])
def test_a_rank_whose_plan_timed_out_is_in_step_at_the_next(numbered, order, driver):
    """It alone plans without guests, and the other waits for it. Without numbers, ever after."""
    group = Ranks(driver, 2, 1, timeout_s=0.003)
    layout, experts = group.layout, guest_ranks.draw_experts(group.layout, 0, CPU)
    guests, none = torch.tensor([[3], [0]]).int(), torch.full((2, 1), -1).int()
    optimal, timed_out = (
        torch.tensor([Status.OPTIMAL]).int(),
        torch.tensor([Status.TIMED_OUT]).int(),
    )
    totals = [torch.zeros(6, *shape) for shape in layout.shapes]
    parts = [torch.ones(1, *shape) for shape in layout.shapes]
    words = [torch.tensor([step + 1 << 32]) for step in range(3)]
    numbers = [[BatchNumber(word) if numbered else None for word in words] for _ in group.all]

    def run(call):
        group.each(call)
        driver.run(order)
        missing = [one.missing.tolist() for one in group.all]
        for one in group.all:
            one.missing[:] = 0
        return missing

    def push(rank, one, step, late=False):
        plan = (none, timed_out) if late and rank == 1 else (guests, optimal)
        one.push(layout, group.own(experts, rank), *plan, numbers[rank][step])

    def push_again(rank, one):
        one.barrier(layout, guests, numbers[rank][2])
        one.push(layout, group.own(experts, rank), guests, None, numbers[rank][2])

    def reduce(rank, one):
        homes = [total[3 * rank : 3 * rank + 3] for total in totals]
        one.reduce(layout, parts, homes, guests, numbers[rank][2])

    in_step = [[0, 0], [0, 0]]
    assert run(functools.partial(push, step=0)) == in_step
    assert run(functools.partial(push, step=1, late=True)) == [[0, 1], [0, 0]]
    assert (run(functools.partial(push, step=2)) == in_step) is numbered
    if numbered:
        assert run(push_again) == in_step
        for rank, one in enumerate(group.all):
            assert int(guest_ranks.num_wrong(layout, one.memory, experts, guests[rank])) == 0
        assert run(reduce) == in_step
        assert all((total[[0, 3]] == 1).all() for total in totals)


def test_what_the_kernels_do_not_take_is_refused(driver):
    group = Ranks(driver, 2, 1)
    first, layout = group.all[0], group.layout
    guests = torch.full((2, 1), -1, dtype=torch.int32)
    experts = guest_ranks.draw_experts(layout, 0, CPU)
    own = group.own(experts, 0)
    with pytest.raises(ValueError, match="3 resident slots with 66 bytes each, in one piece"):
        first.push(layout, [tensor[:2] for tensor in own], guests)
    with pytest.raises(ValueError, match="in one piece"):
        first.push(layout, [tensor.flip(-1).transpose(1, -1) for tensor in own], guests)
    large = guest_ranks.layout_of(2, 3, 1, {"w": ((100, 100), torch.float32)})
    with pytest.raises(ValueError, match="take 40192 bytes, and the pool has"):
        first.push(large, own, guests)
    many = guest_ranks.layout_of(2, 3, 300, {"w": ((1,), torch.uint8)})
    with pytest.raises(ValueError, match="more than the 512 slots"):
        first.push(many, own, guests)
    empty = guest_ranks.layout_of(2, 3, 1, {"w": ((0,), torch.uint8)})
    with pytest.raises(ValueError, match="none of them is empty"):
        first.push(empty, own, guests)
    wide = [torch.zeros(1, *shape, dtype=torch.float64) for shape in layout.shapes]
    homes = [torch.zeros(3, *shape, dtype=torch.float64) for shape in layout.shapes]
    with pytest.raises(ValueError, match=r"more than the .* bytes of the pool"):
        first.reduce(layout, wide, homes, guests)
    halves = [tensor.half() for tensor in wide]
    with pytest.raises(TypeError, match=r"gradients of bias are of .*float16.*can be added"):
        first.reduce(layout, halves, homes, guests)
    assert not driver.operations


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_a_rank_may_stay_away_from_an_empty_batch(order, driver):
    """As one does whose weights are invalid; a reduction before and one behind are whole."""
    group = Ranks(driver, 2, 1, timeout_s=0.1)
    layout, second = group.layout, group.all[1]
    experts = guest_ranks.draw_experts(layout, 0, CPU)
    none = torch.full((2, 1), -1, dtype=torch.int32)
    guests = torch.tensor([[3], [0]], dtype=torch.int32)
    totals = [torch.zeros(6, *shape) for shape in layout.shapes]
    parts = [[torch.full((1, *shape), v) for shape in layout.shapes] for v in (1.0, 2.0, 4.0)]

    def reduce(rank, one, table, part):
        own = [total[3 * rank : 3 * rank + 3] for total in totals]
        one.reduce(layout, part, own, table)

    group.each(lambda rank, one: reduce(rank, one, guests, parts[0]))
    driver.run(order)
    driver.rank = 1
    second.barrier(layout, none)
    second.push(layout, group.own(experts, 1), none)
    reduce(1, second, none, parts[1])
    driver.run(order)
    group.each(lambda rank, one: reduce(rank, one, guests, parts[2]))
    driver.run(order)

    def push(rank, one):
        one.barrier(layout, guests)
        one.push(layout, group.own(experts, rank), guests)

    group.each(push)
    driver.run(order)
    for rank, one in enumerate(group.all):
        one.raise_errors()
        assert int(guest_ranks.num_wrong(layout, one.memory, experts, guests[rank])) == 0
    for total in totals:
        assert (total[[0, 3]] == 5).all()
        assert (total[[1, 2, 4, 5]] == 0).all()


def test_a_reduction_ends_when_all_have_read(driver):
    """An empty batch meets nobody, and its copies come behind it."""
    group = Ranks(driver, 2, 1)
    first, layout = group.all[0], group.layout
    guests = torch.tensor([[3], [0]], dtype=torch.int32)
    totals = [torch.zeros(3, *shape) for shape in layout.shapes]
    part = [torch.ones(1, *shape) for shape in layout.shapes]
    first.reduce(layout, part, totals, guests)
    assert len(driver.operations[0]) == 4  # they are laid out, meet, add and meet
