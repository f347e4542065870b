"""Weights of guests and their gradients, emulated: pushes, waits, meetings and sums."""

import itertools

import numpy as np
import pytest
import torch
from emulator import ORDERS, EmulationError
from plans import FOREVER

from lplb_ep.gpu.jit import Program
from lplb_ep.planning.structs import Status
from lplb_ep.weights import structs
from lplb_ep.weights.structs import Sum

SEEDS = (*ORDERS, 3, 4, 5)
THREADS, CHUNK, NUM_STAGES = 64, 1024, 4
PROGRAM = Program("weights.cu", {"THREADS": THREADS, "CHUNK": CHUNK, "STAGES": NUM_STAGES})
NUM_SHARED = CHUNK * NUM_STAGES
GUARD = 64
SIZES = (5000, 64, 16 * 97, 30, 7, 2, 1024)  # bytes of each parameter of an expert


class Ranks:
    """Ranks with experts, and memory for guests that all of a node write."""

    def __init__(self, memory, library, rng, num_ranks, num_guests, sizes=SIZES, **options):
        self.memory, self.rng, self.R, self.G = memory, rng, num_ranks, num_guests
        self.node = options.get("node", num_ranks)
        self.sums = options.get("sums", [Sum.FLOATS] * len(sizes))
        self.limit_ns = options.get("limit_ns", FOREVER)
        self.num_homes = options.get("num_homes", 3)
        self.kernels = {
            name: library(PROGRAM).kernel(name)
            for name in ("push_guests", "await_guests", "meet", "lay_gradients", "add_gradients")
        }
        self.L = self.num_homes + num_guests
        self.E, self.sizes = self.num_homes * num_ranks, sizes
        self.homes = memory.array(
            [self.L * (e // self.num_homes) + e % self.num_homes for e in range(self.E)], np.int32
        )
        self._lay_out(options.get("alignment", 16))
        self.state = [self._state() for _ in range(num_ranks)]
        self.number = memory.array([[1]] * num_ranks, np.uint64)
        self.guests = [memory.zeros((num_ranks, num_guests)) for _ in range(num_ranks)]

    def _lay_out(self, alignment):
        """Each parameter has a block of all guest slots, with a guard before and behind."""
        memory, self.offsets, end = self.memory, [], GUARD
        for size, kind in zip(self.sizes, self.sums, strict=True):
            self.offsets.append(end)
            guest_size = size // 2 if kind == Sum.BFLOATS_TO_FLOATS else size
            end += self.G * guest_size + GUARD
            end += -end % alignment
        self.guest_memory = [memory.array(np.full(end, 77, np.uint8)) for _ in range(self.R)]
        self.home_memory = [
            [
                memory.array(self.rng.integers(0, 256, self.num_homes * size + 2, np.uint8))
                for size in self.sizes
            ]
            for _ in range(self.R)
        ]
        self.num_chunks = sum(-(-size // CHUNK) for size in self.sizes)

    def _state(self):
        zeros, R = self.memory.zeros, self.R
        return {
            "arrived": zeros(R, np.uint64),
            "present": zeros(2 * R, np.uint64),
            "last": zeros(R, np.uint64),
            "num_used": zeros(1, np.uint64),
            "met": zeros(1),
            "num_done": zeros(1),
            "refused": zeros(1, np.uint64),
            "missing": zeros(R),
            "status": zeros(1),
        }

    def home(self, expert, p):
        """The bytes of an expert's parameter at home."""
        at, size = expert % self.num_homes, self.sizes[p]
        return self.home_memory[expert // self.num_homes][p][at * size : (at + 1) * size]

    def slot(self, rank, slot, p):
        """The bytes that a guest slot has of a parameter."""
        size = self.sizes[p]
        if self.sums[p] == Sum.BFLOATS_TO_FLOATS:
            size //= 2
        begin = self.offsets[p] + slot * size
        return self.guest_memory[rank][begin : begin + size]

    def draw(self, share=0.7):
        """A table [R, G] of guests within their nodes, each slot filled with a probability."""
        table = np.full((self.R, self.G), -1)
        for rank in range(self.R):
            node = rank // self.node
            able = [
                e
                for e in range(self.E)
                if e // self.num_homes != rank and e // self.num_homes // self.node == node
            ]
            chosen = self.rng.permutation(able)[: self.G]
            filled = self.rng.random(len(chosen)) < share
            table[rank, : len(chosen)] = np.where(filled, chosen, -1)
        return table

    def travel(self, rank, *, counts=False, use=0, has_met=0, refuses=0, parts=None):
        """`parts`: by parameter and guest slot, what goes there, or None."""
        memory, first = self.memory, rank // self.node * self.node
        parameters, chunk = b"", 0
        for p, size in enumerate(self.sizes):
            own = [self.home_memory[rank][p].ctypes.data + i * size for i in range(self.num_homes)]
            if parts is not None:
                own = [0 if part is None else part.ctypes.data for part in parts[p]]
            parameters += structs.PARAMETER.pack(
                homes=memory.array([*own, *[0] * self.G], np.int64).ctypes.data,
                offset=self.offsets[p],
                bytes=size,
                first_chunk=chunk,
                sum=self.sums[p],
            )
            chunk += -(-size // CHUNK)
        packed = memory.array(np.frombuffer(parameters, np.int64))

        def of_node(arrays):
            near = range(first, first + self.node)
            return memory.array(
                [a.ctypes.data if r in near else 0 for r, a in enumerate(arrays)], np.int64
            ).ctypes.data

        own = self.state[rank]
        plain = ("num_used", "met", "num_done", "refused", "missing", "last", "status")
        return structs.TRAVEL.pack(
            guests=self.guests[rank].ctypes.data,
            batch=0 if counts else self.number[rank].ctypes.data,
            homes=self.homes.ctypes.data,
            parameters=packed.ctypes.data,
            memory=of_node(self.guest_memory),
            arrived=of_node([state["arrived"] for state in self.state]),
            present=of_node([state["present"] for state in self.state]),
            limit_ns=self.limit_ns,
            use=use,
            has_met=has_met,
            refuses=refuses,
            num_parameters=len(self.sizes),
            num_chunks=self.num_chunks,
            num_guests=self.G,
            num_local_slots=self.L,
            num_ranks=self.R,
            first_rank=first,
            node_size=self.node,
            rank=rank,
            **{name: own[name].ctypes.data for name in plain},
        )

    def launch(self, name, rank, num_blocks=1, **how):
        shared = 0 if name in ("await_guests", "meet") else NUM_SHARED
        return self.kernels[name]((num_blocks, 1), THREADS, shared, travel=self.travel(rank, **how))

    def set(self, table, number=None):
        for rank in range(self.R):
            self.guests[rank][...] = table
            self.number[rank] = self.number[rank] + np.uint64(1) if number is None else number

    def check(self, table):
        """Guest slots hold their experts, and nothing else was written."""
        for rank in range(self.R):
            expected = np.full_like(self.guest_memory[rank], 77)
            for slot, p in itertools.product(range(self.G), range(len(self.sizes))):
                if (expert := table[rank, slot]) >= 0:
                    begin = self.offsets[p] + slot * self.sizes[p]
                    expected[begin : begin + self.sizes[p]] = self.home(expert, p)
            assert (self.guest_memory[rank] == expected).all(), rank
            self.guest_memory[rank][...] = 77
            assert not self.state[rank]["missing"].any()
            assert not self.state[rank]["num_done"].any()


@pytest.mark.parametrize("order", SEEDS)
@pytest.mark.parametrize(
    ("R", "G", "node", "blocks", "alignment"),
    [(2, 1, 2, 3, 16), (4, 2, 4, 5, 1), (6, 3, 3, 2, 2), (3, 8, 3, 1, 4), (2, 2, 2, 40, 16)],
)
def test_guests_come_whole(R, G, node, blocks, alignment, order, memory, library):
    """Sizes of one chunk, many and parts of one; every alignment of a guest slot."""
    rng = np.random.default_rng(R)
    group = Ranks(memory, library, rng, R, G, node=node, alignment=alignment)
    for share in (0.7, 0, 1):
        table = group.draw(share)
        group.set(table)
        memory.run(
            *(
                [group.launch("push_guests", r, blocks), group.launch("await_guests", r)]
                for r in range(R)
            ),
            order=order,
        )
        group.check(table)


@pytest.mark.parametrize("order", SEEDS)
@pytest.mark.parametrize("counts", [False, True])
def test_batches_that_follow_one_another_meet(counts, order, memory, library):
    """Without rows ranks meet before each push. Tables without guests count for no one."""
    rng = np.random.default_rng(9)
    group = Ranks(memory, library, rng, 3, 2, sizes=(40, 3000))
    seen = [[memory.empty(m.shape, np.uint8) for m in group.guest_memory] for _ in range(4)]
    tables = [group.draw(share) for share in (0.8, 0.8, 0, 1)]
    streams = [[] for _ in range(3)]
    from emulator import copy

    for n, table in enumerate(tables):
        at = memory.array(table, np.int32)
        number = memory.array([n + 1], np.uint64)
        for r in range(3):
            how = {"counts": counts}
            streams[r] += [copy(group.guests[r], at), copy(group.number[r], number)]
            streams[r].append(group.launch("meet", r, **how))
            streams[r].append(group.launch("push_guests", r, 2, **how, use=1, has_met=1))
            streams[r].append(group.launch("await_guests", r, **how, use=1, has_met=1))
            streams[r].append(copy(seen[n][r], group.guest_memory[r]))
    memory.run(*streams, order=order)
    for n, table in enumerate(tables):
        for r, slot in itertools.product(range(3), range(2)):
            for p, size in enumerate(group.sizes):
                begin = group.offsets[p] + slot * size
                if table[r, slot] >= 0:
                    assert (seen[n][r][begin:][:size] == group.home(table[r, slot], p)).all()
    used = {int(state["num_used"][0]) for state in group.state}
    assert used == {6 if counts else 0}


@pytest.mark.parametrize("order", SEEDS)
def test_meetings_of_ranks_that_stand_still(order, memory, library):
    """A rank may be one meeting ahead, and not two."""
    group = Ranks(memory, library, np.random.default_rng(1), 5, 1)
    group.set(0)  # guests, so that all come
    streams = [[group.launch("meet", r, counts=True) for _ in range(7)] for r in range(5)]
    memory.run(*streams, order=order)
    for state in group.state:
        assert (state["num_used"][0], state["met"][0]) == (7, 1)
        assert not state["missing"].any()


LIMIT_NS = 3_000_000


@pytest.mark.parametrize("order", ORDERS)
def test_guests_that_do_not_come_are_nan_and_their_homes_named(order, memory, library):
    rng = np.random.default_rng(4)
    group = Ranks(memory, library, rng, 3, 2, limit_ns=LIMIT_NS)
    table = np.array([[3, 6], [0, -1], [1, 4]])  # homes of rank 1: 3 to 5
    group.set(table)
    push = [group.launch("push_guests", r, 2) for r in range(3)]
    wait = [group.launch("await_guests", r) for r in range(3)]
    memory.run([push[0], wait[0]], [wait[1]], [push[2], wait[2]], order=order)
    for rank, slot, p in itertools.product(range(3), range(2), range(len(SIZES))):
        expected = {-1: 77, 3: 255, 4: 255}.get(table[rank, slot])
        if expected is None:
            expected = group.home(table[rank, slot], p)
        assert (group.slot(rank, slot, p) == expected).all()
    assert [state["missing"].tolist() for state in group.state] == [[0, 1, 0], [0] * 3, [0, 1, 0]]
    # It pushes when the others have given up, and all come to the next batch.
    memory.run([], [push[1]], [], order=order)
    for state in group.state:
        state["missing"][...] = 0
    for m in group.guest_memory:
        m[...] = 77
    table = group.draw(1)
    group.set(table)
    memory.run([push[0], wait[0]], [push[1], wait[1]], [push[2], wait[2]], order=order)
    group.check(table)


def test_a_late_push_is_not_taken_for_a_later_one(memory, library):
    group = Ranks(memory, library, np.random.default_rng(4), 2, 1, limit_ns=LIMIT_NS)
    table = np.array([[3], [-1]])
    group.set(table, 7)
    late = group.launch("push_guests", 1)
    wait = group.launch("await_guests", 0)
    memory.run([late], order=0)
    group.number[0] = 8
    memory.run([wait], order=0)
    assert group.state[0]["missing"].tolist() == [0, 1]
    assert (group.slot(0, 0, 0) == 255).all()


def test_a_batch_that_is_pushed_again_waits_again(memory, library):
    """In a backward pass, say: what came in the forward pass is overwritten by then."""
    group = Ranks(memory, library, np.random.default_rng(4), 2, 1, limit_ns=LIMIT_NS)
    group.set(np.array([[3], [-1]]))
    memory.run([group.launch("push_guests", 1)], [group.launch("await_guests", 0)], order=0)
    assert not group.state[0]["missing"].any()
    memory.run([group.launch("await_guests", 0, use=1)], order=0)
    assert group.state[0]["missing"].tolist() == [0, 1]
    assert (group.slot(0, 0, 0) == 255).all()


@pytest.mark.parametrize("status", [s for s in Status if s != Status.OPTIMAL])
def test_a_rank_that_plans_without_guests(status, memory, library):
    """It pushes none, and where the others may plan with them its slots are NaN."""
    group = Ranks(memory, library, np.random.default_rng(4), 2, 1)
    group.set(np.array([[3], [0]]))
    group.state[0]["status"][0] = status
    memory.run([group.launch("push_guests", 0), group.launch("await_guests", 0)], order=0)
    alone = status == Status.TIMED_OUT
    memory.run([group.launch("await_guests", 0, counts=True)], order=0)
    assert group.state[0]["num_used"][0] == (1 << 32 if alone else 0)
    assert (group.slot(0, 0, 0) == (255 if alone else 77)).all()
    assert not group.state[1]["arrived"].any()


@pytest.mark.parametrize("order", ORDERS)
def test_ranks_that_did_not_meet_push_nothing(order, memory, library):
    group = Ranks(memory, library, np.random.default_rng(4), 2, 1, limit_ns=LIMIT_NS)
    group.set(np.array([[3], [0]]))
    stream = [group.launch("meet", 0), group.launch("push_guests", 0, 2, use=1, has_met=1)]
    stream.append(group.launch("await_guests", 0, use=1, has_met=1))
    before = [m.copy() for m in group.home_memory[0]]
    stream.append(group.launch("add_gradients", 0, 2, use=1, has_met=1))
    memory.run(stream, [], order=order)
    assert group.state[0]["met"][0] == 0
    assert group.state[0]["missing"].tolist() == [0, 1]
    assert not group.state[1]["arrived"].any()
    assert (group.guest_memory[1] == 77).all()
    assert all((group.slot(0, 0, p) == 255).all() for p in range(len(SIZES)))
    for p, size in enumerate(SIZES):  # of expert 0, whose gradient would lack a part
        assert (group.home_memory[0][p][:size] == 255).all()
        assert (group.home_memory[0][p][size:] == before[p][size:]).all()


@pytest.mark.parametrize("order", SEEDS)
@pytest.mark.parametrize(("G", "blocks"), [(1, 1), (3, 4), (40, 9)])
@pytest.mark.parametrize("alignment", [16, 2])
def test_gradients_are_laid_where_guests_are(G, blocks, alignment, order, memory, library):
    """Or zeros, where there are none. Empty slots keep what they have."""
    rng = np.random.default_rng(G)
    group = Ranks(memory, library, rng, 2, G, alignment=alignment, num_homes=G)
    table = group.draw(0.7)
    table[1, 0] = 0
    group.set(table)
    parts = [
        [
            None if rng.random() < 0.3 else memory.array(rng.integers(0, 256, size, np.uint8))
            for _ in range(G)
        ]
        for size in SIZES
    ]
    memory.run([], [group.launch("lay_gradients", 1, blocks, parts=parts)], order=order)
    expected = np.full_like(group.guest_memory[1], 77)
    for (p, size), slot in itertools.product(enumerate(SIZES), range(G)):
        if table[1, slot] >= 0:
            begin, part = group.offsets[p] + slot * size, parts[p][slot]
            expected[begin : begin + size] = 0 if part is None else part
    assert (group.guest_memory[1] == expected).all()
    assert (group.guest_memory[0] == 77).all()


@pytest.mark.parametrize("order", SEEDS)
@pytest.mark.parametrize("counts", [False, True])
def test_a_rank_that_refuses_keeps_nobody_waiting(counts, order, memory, library):
    """Nor does it in later meetings of the batch. At the next batch all are in step."""
    group = Ranks(memory, library, np.random.default_rng(4), 3, 1)
    table = np.array([[3], [6], [0]])
    group.set(table)
    streams = []
    for r in range(3):
        how = {"counts": counts, "has_met": 1}
        streams.append([group.launch("meet", r, counts=counts, refuses=r == 1)])
        if r != 1:
            streams[r] += [group.launch(n, r, **how) for n in ("push_guests", "await_guests")]
            if not counts:
                streams[r] += [group.launch("meet", r, use=n) for n in (2, 3)]
    memory.run(*streams, order=order)
    assert [state["met"][0] for state in group.state] == [0, 0, 0]
    assert [state["missing"].tolist() for state in group.state] == [[0, 2, 0], [0] * 3, [0, 2, 0]]
    assert [(m == 77).all() for m in group.guest_memory] == [False, True, False]
    assert all((group.slot(r, 0, p) == 255).all() for r in (0, 2) for p in range(len(SIZES)))
    if counts:
        return
    for r, state in enumerate(group.state):
        state["missing"][...] = 0
        group.guest_memory[r][...] = 77
    group.set(table)
    names = ("meet", "push_guests", "await_guests")
    memory.run(*([group.launch(n, r, has_met=1) for n in names] for r in range(3)), order=order)
    group.check(table)


BFLOAT = torch.bfloat16


def as_tensor(values, dtype):
    return torch.from_numpy(values.copy()).view(dtype)


@pytest.mark.parametrize("order", SEEDS)
@pytest.mark.parametrize(("R", "G", "node", "blocks"), [(2, 1, 2, 2), (4, 3, 4, 5), (6, 2, 3, 1)])
@pytest.mark.parametrize("alignment", [16, 4])
def test_gradients_are_added_in_order(R, G, node, blocks, alignment, order, memory, library):
    """By rank, then slot; sums of bfloat16 are rounded after each."""
    rng = np.random.default_rng(R + alignment)
    kinds = [Sum.FLOATS, Sum.BFLOATS, Sum.BFLOATS_TO_FLOATS, Sum.FLOATS, Sum.BFLOATS, Sum.BFLOATS]
    sums = [*kinds, Sum.BFLOATS_TO_FLOATS]
    sizes = (5000, 3000, 4096, 12, 14, 2, 2028)
    group = Ranks(memory, library, rng, R, G, sizes, node=node, sums=sums, alignment=alignment)
    wide = {Sum.FLOATS: torch.float32, Sum.BFLOATS: BFLOAT, Sum.BFLOATS_TO_FLOATS: torch.float32}
    narrow = {**wide, Sum.BFLOATS_TO_FLOATS: BFLOAT}

    def numbers(count, dtype):
        drawn = torch.from_numpy(rng.standard_normal(count)).to(dtype)
        return drawn.view(torch.uint8).numpy()

    for rank, (p, kind) in itertools.product(range(R), enumerate(sums)):
        total = group.home_memory[rank][p]
        number = group.num_homes * sizes[p] // wide[kind].itemsize
        total[: number * wide[kind].itemsize] = numbers(number, wide[kind])
        for slot in range(G):
            part = group.slot(rank, slot, p)
            part[...] = numbers(len(part) // narrow[kind].itemsize, narrow[kind])
    table = group.draw(0.9)
    table[1] = table[0] if R > 2 else table[1]  # an expert with several guests
    own = {e for e in table[1] if e // group.num_homes == 1}
    table[1] = [-1 if e in own else e for e in table[1]]
    group.set(table)
    expected = {}
    for expert, (p, kind) in itertools.product(range(group.E), enumerate(sums)):
        total = as_tensor(group.home(expert, p), wide[kind])
        for rank, slot in zip(*np.nonzero(table == expert), strict=True):
            total += as_tensor(group.slot(rank, slot, p), narrow[kind])
        expected[expert, p] = total.view(torch.uint8).numpy()
    streams = [
        [group.launch("meet", r), group.launch("add_gradients", r, blocks, use=1, has_met=1)]
        for r in range(R)
    ]
    memory.run(*streams, order=order)
    for (expert, p), values in expected.items():
        assert (group.home(expert, p) == values).all(), (expert, p)


def test_the_emulator_finds_a_copy_that_is_not_announced(memory, library, tmp_path):
    import shutil

    import emulator

    from lplb_ep.gpu.jit import KERNELS

    kernels = tmp_path / "kernels"
    shutil.copytree(KERNELS, kernels)
    source = (kernels / "weights.cu").read_text()
    old = "arrivals_expect(arrivals + stage, part.bytes);"
    assert source.count(old) == 1
    (kernels / "weights.cu").write_text(source.replace(old, ""))
    broken = emulator.Library(emulator.build(PROGRAM, tmp_path, kernels))
    group = Ranks(memory, lambda _: broken, np.random.default_rng(0), 2, 1)
    group.set(np.array([[3], [0]]))
    with pytest.raises(EmulationError, match="a load that was not announced"):
        memory.run([group.launch("push_guests", 0)], order=0)
