"""Kernels of several ranks at once, emulated: exchanged rows, and barriers."""

import dataclasses
from types import SimpleNamespace

import emulator
import numpy as np
import oracle
import plans
import pytest
import tallied
import torch
from emulator import ORDERS, EmulationError

from lplb_ep import Placement, Problem
from lplb_ep.comm.copies import barrier_program
from lplb_ep.planning import reference as cpu
from lplb_ep.planning import structs
from lplb_ep.planning.reuse import reuse
from lplb_ep.planning.stay import count_by_rank, stays
from lplb_ep.planning.structs import HEAD, MAX_TOTAL, ErrorFlag, Status

SEEDS = (*ORDERS, 3, 4, 5, 7, 9)


class Group:
    """Ranks with windows of each other's on their node, and relays between nodes.

    `ones`: the ranks that plan in one launch.
    """

    def __init__(self, memory, placement, library, ones=(), **arguments):
        self.ones = ones
        R = placement.num_ranks
        self.memory, self.placement, self.node_size = (
            memory,
            placement,
            placement.num_ranks_per_node,
        )
        self.num_nodes = R // self.node_size
        self.ranks = [plans.Rank(memory, placement, r, library, **arguments) for r in range(R)]
        for rank in self.ranks:
            node = rank.rank // self.node_size
            for other in self.ranks[node * self.node_size : (node + 1) * self.node_size]:
                rank.peers[other.rank] = other.window.ctypes.data
        zeros, size = memory.zeros, self.ranks[0].num_words
        self.sent = [zeros((2, self.node_size, size), np.uint64) for _ in range(self.num_nodes)]
        self.received = [
            zeros((self.num_nodes, 2, self.node_size, size), np.uint64) for _ in self.sent
        ]
        self.signals = [zeros(self.num_nodes, np.uint64) for _ in self.sent]

    def relays(self, rank):
        return self.num_nodes > 1 and rank.rank % self.node_size == 0

    def count(self, rank, picks, plan, *, waits=True, limit_ns=plans.FOREVER, **arguments):
        """The operations that exchange a batch's rows."""
        window = rank.window_struct(plan, waits=waits and not self.relays(rank), limit_ns=limit_ns)
        counted = rank.count(picks, window=window, **arguments)
        return [counted, *(self._relay(rank, window) if self.relays(rank) else [])]

    def _relay(self, rank, window):
        node = rank.rank // self.node_size
        relay = structs.RELAY.pack(
            sent=self.sent[node].ctypes.data,
            received=self.received[node].ctypes.data,
            signals=self.signals[node].ctypes.data,
            node=node,
            node_size=self.node_size,
        )
        arguments = {"window": window, "relay": relay, "num_batches": rank.head[-1:]}
        gather, broadcast = (
            rank.route_library.kernel(name)((1, 1), 1024, 0, **arguments)
            for name in ("gather", "broadcast")
        )
        puts = []
        for other in set(range(self.num_nodes)) - {node}:
            puts.append(emulator.copy(self.received[other][node], self.sent[node]))
            puts.append(emulator.add(self.signals[other][node : node + 1], 1))
        return [gather, *puts, broadcast]

    def batch(self, topks, limit_ns=plans.FOREVER):
        """The operations of each rank for a batch, and its plans."""
        streams, made = [], []
        for rank, topk in zip(self.ranks, topks, strict=True):
            plan = rank.plan(topk)
            picks = rank.picks(topk, plan)
            if rank.rank in self.ones:
                window = rank.window_struct(plan, limit_ns=limit_ns)
                stream = [rank.whole(picks, plan, plan.rows, window=window)]
            else:
                stream = self.count(rank, picks, plan, limit_ns=limit_ns)
                stream += [rank.solve(picks, plan, plan.rows), rank.route(picks, plan)]
            streams.append(stream)
            made.append(plan)
        return streams, made


def random_group(rng, memory, library, R, node=None, **arguments):
    placement = oracle.random_placement(rng, R, 24, 2, num_ranks_per_node=node or R)
    return Group(memory, placement, library, **arguments)


def random_topks(rng, group):
    num_tokens = rng.integers(0, 60, len(group.ranks))
    weight = rng.lognormal(0, 1.2, 24)
    return [oracle.random_topk(rng, n, 3, weight) for n in num_tokens]


def check_batch(group, topks, made, number):
    """The plan of each rank, as the CPU's steps make it of the same quotas."""
    E = group.placement.num_experts
    counts = torch.stack([cpu.count(torch.from_numpy(t), E) for t in topks])
    quota = torch.from_numpy(made[0].quota.copy())
    shares = cpu.split(counts, quota, group.placement)
    for rank, topk, plan in zip(group.ranks, topks, made, strict=True):
        if rank.rank not in group.ones:
            assert (plan.rows[:, :HEAD] == [0, 77, 2, 3, number]).all()
            assert (plan.rows[:, HEAD:] == counts.numpy()).all()
        assert (plan.counts == counts.numpy()).all()
        assert plan.status.tolist() == [Status.OPTIMAL]
        assert (plan.quota == made[0].quota).all()
        expected = cpu.rewrite(torch.from_numpy(topk), shares[rank.rank], group.placement)
        assert (plan.physical == expected.numpy()).all()


def run_slots(group, many, base, order):
    """A batch of slots [T, K] of each rank; its plans."""
    logical = group.memory.array(group.placement.physical_to_logical, np.int32)
    streams, made = [], []
    for rank, slots in zip(group.ranks, many, strict=True):
        plan = rank.plan(slots)
        picks = rank.picks(slots, plan)
        if rank.rank in group.ones:
            window = rank.window_struct(plan)
            whole = rank.whole(picks, plan, plan.rows, window=window, logical=logical, base=base)
            stream = [whole]
        else:
            stream = group.count(rank, picks, plan, logical=logical)
            stream += [rank.solve(picks, plan, plan.rows, base=base)]
            stream += [rank.route(picks, plan, base=base)]
        streams.append(stream)
        made.append(plan)
    group.memory.run(*streams, order=order)
    return made


def run_batches(group, rng, order, number, first=1):
    """Batches one after the other on each rank, while other ranks are ahead or behind."""
    streams, kept = [[] for _ in group.ranks], []
    for _ in range(number):
        topks = random_topks(rng, group)
        added, made = group.batch(topks)
        for stream, more in zip(streams, added, strict=True):
            stream += more
        kept.append((topks, made))
    group.memory.run(*streams, order=order)
    for n, (topks, made) in enumerate(kept, first):
        check_batch(group, topks, made, n & MAX_TOTAL)
    for rank in group.ranks:
        assert rank.head[3] == (first + number - 1) & MAX_TOTAL
        assert not rank.row.any()
        assert not rank.missing.any()
        assert not rank.error_flags.any()


@pytest.mark.parametrize(
    ("R", "node", "E"), [(4, 2, 1024), pytest.param(66, 33, 96, marks=pytest.mark.long)]
)
def test_rows_longer_than_a_block_and_of_many_ranks(R, node, E, memory, library):
    rng = np.random.default_rng(R)
    placement = oracle.random_placement(rng, R, E, 2, num_ranks_per_node=node)
    group = Group(memory, placement, library)
    for number in (1, 2):
        topks = [oracle.random_topk(rng, n, 8, np.ones(E)) for n in rng.integers(0, 60, R)]
        streams, made = group.batch(topks)
        memory.run(*streams, order=number)
        check_batch(group, topks, made, number)


ONES = pytest.mark.parametrize("ones", [(), (0, 1, 2, 3, 4), (1, 3)], ids=("none", "all", "some"))
"""Ranks that plan in one launch; the others do in three."""


@pytest.mark.parametrize("order", SEEDS)
@pytest.mark.parametrize("R", [1, 2, 5])
@ONES
def test_ranks_of_a_node_exchange_their_rows(ones, R, order, memory, library):
    rng = np.random.default_rng(R)
    group = random_group(rng, memory, library, R, ones=ones, chunk=64)
    run_batches(group, rng, order, 5)
    for rank in group.ranks:
        assert rank.state.tolist()[:2] == [0, 0]


@pytest.mark.parametrize("order", SEEDS)
@pytest.mark.parametrize(("R", "node"), [(4, 2), (3, 1), (6, 3)])
def test_first_ranks_relay_the_rows_of_their_nodes(R, node, order, memory, library):
    rng = np.random.default_rng(R)
    group = random_group(rng, memory, library, R, node)
    run_batches(group, rng, order, 4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("R", "node", "ones"),
    [
        *[(1, 1, ()), (1, 1, (0,)), (5, 5, ()), (5, 5, (0, 1, 2, 3, 4)), (4, 4, (1, 3))],
        *[(4, 2, ()), (16, 16, ()), (16, 16, (0, 2))],
    ],
)
def test_batches_that_stay_keep_the_slots_that_they_came_with(
    R, node, ones, order, memory, library
):
    """By the slots of all ranks, whose loads come with the rows, and by all components."""
    rng = np.random.default_rng(R)
    placement = oracle.random_placement(rng, R, 24, 2, num_ranks_per_node=node)
    if R == 16:  # two components
        placement = Placement.from_topology(
            "cube", num_experts=32, num_ranks=16, num_redundant_per_rank=2
        )
    E = placement.num_experts
    arguments = {"ones": ones, "chunk": 64, "keeps": True, "least_gain": 1}
    group = Group(memory, placement, library, **arguments)
    base_load = torch.from_numpy(rng.integers(0, 9, R))
    base = memory.array(base_load.numpy(), np.int32)
    expected = [tallied.Tallied(r, base_load=base_load) for r in range(R)]
    for _ in range(3):
        weight = rng.lognormal(0, 0.5, E)
        topks = [oracle.random_topk(rng, n, 3, weight) for n in rng.integers(0, 60, R)]
        many = [oracle.slots_of(rng, topk, placement) for topk in topks]
        of_rank = torch.stack([count_by_rank(torch.from_numpy(one), placement) for one in many])
        counts = torch.stack([cpu.count(torch.from_numpy(topk), E) for topk in topks])
        load, given_load = counts.long().sum(0).numpy(), of_rank.long().sum(0).numpy()

        def must_stay(least, load=load, given_load=given_load):
            problem = Problem(base_load=base_load, min_gain=least).checked(placement)
            return stays(load, placement, problem, given_load)

        most = next(n for n in range(2 * load.sum() + 99) if must_stay(n + 1))
        for least in {max(1, most), most + 1}:
            for rank in group.ranks:
                rank.least_gain = least
            made = run_slots(group, many, base, order)
            quota = torch.from_numpy(made[0].quota.copy())
            for rank, topk, slots, plan in zip(group.ranks, topks, many, made, strict=True):
                if rank.rank not in ones:
                    words = torch.cat([counts, of_rank], 1).numpy()
                    assert (plan.rows[:, HEAD:] == words).all()
                assert (plan.counts == counts.numpy()).all()
                if least > most:
                    assert plan.status.tolist() == [Status.STAYED]
                    assert (plan.physical == slots).all()
                    assert not plan.quota.any()
                    assert plan.rank_load.tolist() == given_load.tolist()
                else:
                    assert plan.status.tolist() == [Status.OPTIMAL]
                    shares = cpu.split(counts, quota, placement)[rank.rank]
                    planned = cpu.rewrite(torch.from_numpy(topk), shares, placement)
                    assert (plan.physical == planned.numpy()).all()
                assert not rank.row.any()
                assert not rank.error_flags.any()
                tensors = {name: torch.from_numpy(v) for name, v in vars(plan).items()}
                expected[rank.rank].add(SimpleNamespace(**tensors), placement)
                totals = rank.totals[: structs.NUM_TOTALS].tolist()
                assert totals == expected[rank.rank].totals


def test_the_number_of_a_batch_may_wrap_around(memory, library):
    rng = np.random.default_rng(0)
    group = random_group(rng, memory, library, 4, 2)
    for rank in group.ranks:
        rank.head[3] = MAX_TOTAL - 2
    for signals in group.signals:
        signals[:] = MAX_TOTAL - 2
    run_batches(group, rng, 2, 4, first=MAX_TOTAL - 1)


@pytest.mark.parametrize("order", SEEDS)
@pytest.mark.parametrize(("node", "ones"), [(4, ()), (2, ()), (4, (0, 1, 2, 3)), (4, (1,))])
def test_a_rank_that_refuses_waits_for_no_one(node, ones, order, memory, library):
    """Its next batch first reads the rows that it did not wait for."""
    rng = np.random.default_rng(1)
    group = random_group(rng, memory, library, 4, node, ones=ones)
    refusing, nothing = group.ranks[1], np.zeros((0, 1), np.int64)
    streams, kept = [[], [], [], []], []
    for number in range(1, 7):
        topks = random_topks(rng, group)
        added, made = group.batch(topks)
        if number in (2, 5):
            plan = refusing.plan(nothing)
            picks = refusing.picks(nothing, plan)
            added[1] = group.count(refusing, picks, plan, waits=False, status=Status.REFUSED)
            made[1] = None
        streams = [[*stream, *more] for stream, more in zip(streams, added, strict=True)]
        kept.append((number, topks, made))
    memory.run(*streams, order=order)
    for number, topks, made in kept:
        if made[1] is not None:
            check_batch(group, topks, made, number)
            continue
        for plan in (made[0], made[2], made[3]):
            assert plan.status.tolist() == [Status.REFUSED]
        for plan in made[:1] * (not ones):
            assert plan.rows[:, 0].tolist() == [0, Status.REFUSED, 0, 0]


LIMIT_NS = 60_000_000  # of the emulator's clock, which each look at it advances


def late_batch(group, topks, absent):
    streams, made = group.batch(topks, LIMIT_NS)
    return [[] if r in absent else stream for r, stream in enumerate(streams)], made


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("node", "absent", "missing", "ones"),
    [
        (4, [2], [2], ()),
        (4, [2], [2], (0, 1, 3)),
        (4, [0, 3], [0, 3], ()),
        (4, [0, 3], [0, 3], (1,)),
        (2, [3], [3], ()),
        (2, [2], [2, 3], ()),
    ],
)
def test_ranks_that_do_not_come_are_named(node, absent, missing, ones, order, memory, library):
    """Where the first rank of a node does not come, all of its node are missed on the others."""
    rng = np.random.default_rng(2)
    group = random_group(rng, memory, library, 4, node, ones=ones)
    topks = random_topks(rng, group)
    streams, made = late_batch(group, topks, absent)
    memory.run(*streams, order=order)
    for rank, topk, plan in zip(group.ranks, topks, made, strict=True):
        if rank.rank in absent:
            continue
        missed = [r for r in missing if r // node != rank.rank // node or r in absent]
        if rank.rank in missing:  # without its first rank it hears of no other node
            missed = [r for r in range(4) if r // node != rank.rank // node or r in absent]
        assert plan.status.tolist() == [Status.TIMED_OUT]
        assert np.flatnonzero(rank.missing).tolist() == missed
        if rank.rank not in ones:
            own = cpu.count(torch.from_numpy(topk), 24).numpy()
            assert np.flatnonzero(plan.rows[:, 0]).tolist() == missed
            assert not plan.rows[missed, 1:].any()
            assert (plan.rows[rank.rank, HEAD:] == own).all()
        home = cpu.rewrite_home(torch.from_numpy(topk), group.placement)
        assert (plan.physical == home.numpy()).all()


@pytest.mark.parametrize("order", ORDERS)
@ONES
def test_a_late_rank_reads_what_it_missed(ones, order, memory, library):
    rng = np.random.default_rng(3)
    group = random_group(rng, memory, library, 3, ones=ones)
    topks = random_topks(rng, group)
    late, _ = late_batch(group, topks, [1])
    memory.run(*late, order=order)
    for rank in group.ranks:
        rank.missing[:] = rank.error_flags[:] = 0
    # It plans the batch that the others gave up, then all plan the next.
    (_, behind, _), (_, plan, _) = late_batch(group, topks, [])
    later = random_topks(rng, group)
    streams, made = group.batch(later)
    streams[1] = [*behind, *streams[1]]
    memory.run(*streams, order=order)
    assert plan.status.tolist() == [Status.OPTIMAL]
    check_batch(group, later, made, 2)


@pytest.mark.parametrize("order", SEEDS)
@ONES
def test_a_rank_that_refused_learns_later_who_is_missing(ones, order, memory, library):
    rng = np.random.default_rng(5)
    group = random_group(rng, memory, library, 3, ones=ones)
    refusing, nothing = group.ranks[1], np.zeros((0, 1), np.int64)
    first, _ = late_batch(group, random_topks(rng, group), [2])
    plan = refusing.plan(nothing)
    picks = refusing.picks(nothing, plan)
    first[1] = group.count(refusing, picks, plan, waits=False, status=Status.REFUSED)
    topks = random_topks(rng, group)
    second, made = late_batch(group, topks, [2])
    memory.run(*([*one, *two] for one, two in zip(first, second, strict=True)), order=order)
    for rank, plan in zip(group.ranks[:2], made, strict=False):
        assert rank.missing[2] == 1
        assert plan.status.tolist() == [Status.TIMED_OUT]
        if rank.rank not in ones:
            assert plan.rows[2].tolist() == [Status.TIMED_OUT, *[0] * (HEAD - 1 + 24)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_one_launch_refuses_what_it_may_not_take(dtype, order, memory, library):
    """As `count` does: ids out of range, and experts that a token picks twice."""
    rng = np.random.default_rng(6)
    group = random_group(rng, memory, library, 2, ones=(0, 1), dtype=dtype)
    good = np.stack([rng.permutation(24)[:3] for _ in range(50)])
    wrong, twice, slots = good.copy(), good.copy(), group.placement.home[good]
    wrong[33, 2], twice[21, 2] = (2**40 if dtype == np.int64 else 24), twice[21, 0]
    logical = memory.array(group.placement.physical_to_logical, np.int32)
    for topk, flags, arguments in (
        (good, [], {"num_topk": 3}),
        (wrong, [ErrorFlag.OUT_OF_RANGE], {}),
        (twice, [ErrorFlag.REPEATED_PICK], {"num_topk": 3}),
        (twice, [], {}),
        (slots, [], {"logical": logical, "num_topk": 3}),
        (
            np.where(slots == slots[7, 1], len(logical), slots),
            [ErrorFlag.OUT_OF_RANGE],
            {"logical": logical},
        ),
    ):
        streams, made = group.batch([topk, good])
        first = group.ranks[0]
        window = first.window_struct(made[0])
        picks = first.picks(topk, made[0])
        whole = first.whole(picks, made[0], made[0].rows, window=window, **arguments)
        memory.run([whole], streams[1], order=order)
        status = Status.REFUSED if flags else Status.OPTIMAL
        for rank, plan, own in zip(group.ranks, made, (flags, []), strict=True):
            assert plan.status.tolist() == [status]
            ends = [status] if flags else []
            assert np.flatnonzero(rank.error_flags).tolist() == [*ends, *own]
            rank.error_flags[:] = 0
        if not flags:
            given = topk if topk is twice else good
            assert (group.placement.physical_to_logical[made[0].physical] == given).all()


@ONES
def test_another_placement_is_out_of_step(ones, memory, library):
    rng = np.random.default_rng(4)
    group = random_group(rng, memory, library, 3, ones=ones)
    group.ranks[2].head[0] = 78
    topks = random_topks(rng, group)
    streams, made = group.batch(topks)
    memory.run(*streams)
    assert [plan.status.tolist() for plan in made] == [[Status.OUT_OF_STEP]] * 3


OF_EARLIER = ("rows", "counts", "quota", "rank_load", "endings", "guests")


def reusing_batch(group, kept, topks):
    """The operations of each rank for a batch whose results lie where the last ones do."""
    streams, made = [], []
    for rank, topk, earlier in zip(group.ranks, topks, kept, strict=True):
        where = {name: getattr(earlier, name) for name in OF_EARLIER}
        plan = dataclasses.replace(rank.plan(topk), **where)
        picks = rank.picks(topk, plan)
        stream = group.count(rank, picks, plan)
        stream += [rank.solve(picks, plan, plan.rows), rank.route(picks, plan)]
        left = {name: group.memory.empty(where[name].shape) for name in ("counts", "quota")}
        stream += [emulator.copy(left[name], where[name]) for name in left]
        streams.append(stream)
        made.append(dataclasses.replace(plan, **left))
    return streams, made


@pytest.mark.parametrize("order", SEEDS)
@pytest.mark.parametrize(("R", "every"), [(1, 2), (3, 2), (5, 3)])
def test_batches_between_exchanges_go_by_earlier_quotas(R, every, order, memory, library):
    rng = np.random.default_rng(R)
    group = random_group(rng, memory, library, R, chunk=64, exchanges_every=every)
    many = [random_topks(rng, group) for _ in range(7)]
    many[1] = [topk[:3] for topk in many[1]]  # of one block
    kept = [rank.plan(topk) for rank, topk in zip(group.ranks, many[0], strict=True)]
    streams, plans_of = [[] for _ in group.ranks], []
    for topks in many:
        added, made = reusing_batch(group, kept, topks)
        streams = [[*stream, *more] for stream, more in zip(streams, added, strict=True)]
        plans_of.append(made)
    memory.run(*streams, order=order)
    for n, (topks, made) in enumerate(zip(many, plans_of, strict=True)):
        before = many[n - n % every]
        counts = torch.stack([cpu.count(torch.from_numpy(topk), 24) for topk in before])
        quota = torch.from_numpy(plans_of[n - n % every][0].quota.copy())
        assert quota.sum(1).equal(counts.sum(0))
        split = cpu.split(counts, quota, group.placement)
        for rank, topk, plan in zip(group.ranks, topks, made, strict=True):
            assert (plan.counts == counts.numpy()).all()
            assert (plan.quota == quota.numpy()).all()
            own = cpu.count(torch.from_numpy(topk), 24)
            shares = reuse(own, quota, rank.rank, R) if n % every else split[rank.rank]
            expected = cpu.rewrite(torch.from_numpy(topk), shares, group.placement)
            assert (plan.physical == expected.numpy()).all()
            assert plan.status.tolist() == [Status.REUSED if n % every else Status.OPTIMAL]
    for rank in group.ranks:
        assert rank.head[3] == -(-7 // every)
        assert rank.num_by_status[[Status.OPTIMAL, Status.REUSED]].tolist() == [
            -(-7 // every),
            7 - -(-7 // every),
        ]
        assert rank.state.tolist()[:2] == [0, 0]
        assert not rank.row.any()
        assert not rank.missing.any()
        assert not rank.error_flags.any()


@pytest.mark.parametrize("order", ORDERS)
def test_a_rank_that_refuses_between_exchanges_stays_in_step(order, memory, library):
    """It tells no one. One that refuses an exchange is heard, and those behind go home."""
    rng = np.random.default_rng(8)
    group = random_group(rng, memory, library, 3, exchanges_every=2)
    refusing, nothing = group.ranks[1], np.zeros((0, 1), np.int64)
    many = [random_topks(rng, group) for _ in range(6)]
    kept = [rank.plan(topk) for rank, topk in zip(group.ranks, many[0], strict=True)]
    streams, plans_of = [[] for _ in group.ranks], []
    for n, topks in enumerate(many):
        added, made = reusing_batch(group, kept, topks)
        if n in (1, 2):
            plan = dataclasses.replace(refusing.plan(nothing), rows=kept[1].rows)
            picks = refusing.picks(nothing, plan)
            added[1] = group.count(refusing, picks, plan, waits=False, status=Status.REFUSED)
        streams = [[*stream, *more] for stream, more in zip(streams, added, strict=True)]
        plans_of.append(made)
    memory.run(*streams, order=order)
    ends = [Status.OPTIMAL, Status.REUSED, Status.REFUSED, Status.REUSED, 0, Status.REUSED]
    for r in (0, 2):
        assert [int(made[r].status[0]) for made in plans_of] == ends
        home = cpu.rewrite_home(torch.from_numpy(many[3][r]), group.placement)
        assert (plans_of[3][r].physical == home.numpy()).all()
    assert [int(made[1].status[0]) for made in plans_of[4:]] == ends[4:]
    assert (plans_of[4][1].quota == plans_of[4][0].quota).all()
    assert all(rank.head[3] == 3 for rank in group.ranks)


class Barrier:
    """Ranks that copy to each other around barriers."""

    def __init__(self, memory, library, num_ranks, limit_ns=plans.FOREVER):
        self.num_ranks, self.limit_ns = num_ranks, limit_ns
        self.kernel = library(barrier_program()).kernel("barrier")
        self.flags = [memory.zeros(num_ranks, np.uint64) for _ in range(num_ranks)]
        self.addresses = memory.array([f.ctypes.data for f in self.flags], np.int64)
        self.missing = [memory.zeros(num_ranks) for _ in range(num_ranks)]

    def __call__(self, rank, number):
        return self.kernel(
            (1, 1),
            -(-self.num_ranks // 32) * 32,
            0,
            flags=self.addresses,
            num_ranks=self.num_ranks,
            rank=rank,
            number=number,
            limit_ns=self.limit_ns,
            missing=self.missing[rank],
        )


@pytest.mark.parametrize("order", SEEDS)
@pytest.mark.parametrize("R", [1, 2, 3, 40])
def test_barriers_stand_between_copies(R, order, memory, library):
    barrier, rng = Barrier(memory, library, R), np.random.default_rng(R)
    values = memory.array(rng.integers(0, 99, (3, R)), np.int64)
    shared = memory.empty(R, np.int64)
    seen = memory.empty((3, R, R), np.int64)
    streams = []
    for r in range(R):
        stream = []
        for turn in range(3):
            stream.append(emulator.copy(shared[r : r + 1], values[turn, r : r + 1]))
            stream.append(barrier(r, 2 * turn + 1))
            stream.append(emulator.copy(seen[turn, r], shared))
            stream.append(barrier(r, 2 * turn + 2))
        streams.append(stream)
    memory.run(*streams, order=order)
    assert (seen == values[:, None]).all()
    assert not np.any(barrier.missing)


def test_a_barrier_names_who_has_not_come_and_goes_on_waiting(memory, library):
    barrier = Barrier(memory, library, 3, limit_ns=5_000_000)
    with pytest.raises(EmulationError, match="wait for each other for ever"):
        memory.run([barrier(0, 1)], [barrier(1, 1)], [], order=2)
    assert [m.tolist() for m in barrier.missing] == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
