"""The host's side of a GPU's plans: `DeviceBackend` as it is, whose launches the emulator runs."""

import contextlib
import ctypes
import functools
import gc
import logging
from types import SimpleNamespace

import emulator
import numpy as np
import oracle
import pytest
import tallied
import torch

from lplb_ep import (
    ContractError,
    CostModel,
    Layer,
    Placement,
    Planner,
    Problem,
    RankError,
    check_plan,
)
from lplb_ep.comm.exchange import LocalExchange, WindowExchange, Windows
from lplb_ep.gpu import launch
from lplb_ep.planning import (
    device,
    device_tables,
    kernels,
    planner,
    reference,
    statistics,
)
from lplb_ep.planning.plan import Status
from lplb_ep.planning.reuse import reuse
from lplb_ep.planning.solve import judge
from lplb_ep.planning.solvers import log_in_steps
from lplb_ep.planning.stay import count_by_rank
from lplb_ep.planning.structs import HEAD, Head
from lplb_ep.settings import MAX_ONE_LAUNCH

E, R = 4, 2
TWO = Placement([0, 1, 2, 3, 2, 0], R, home=[0, 1, 4, 3])  # slots 2 and 5 are replicas
PLAIN = Layer(TWO)  # the layer that TWO stands for, whichever test is the first
RANK = 1
FIELDS = ("topk_idx", "counts", "quota", "rank_load", "status", "split")


class Driver:
    """As much of CuPy's driver as launches need. A kernel is done when its launch returns.

    It may access the tensors that live then: on a stream, a tensor that was dropped before is
    another's memory.
    """

    def __init__(self, library):
        self._library, self._kernels = library, []
        # A walk over all objects takes long, and most of them are older than the test.
        gc.collect()
        self._older = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        gc.freeze()
        self.layouts = {}  # of the arguments, by function

    def load(self, program, index):
        """As `launch.load`."""
        return SimpleNamespace(kernel=functools.partial(self._kernel, self._library(program)))

    def _kernel(self, library, name, formats):
        self._kernels.append(library.kernel(name))
        function = SimpleNamespace(ptr=len(self._kernels))
        runtime = SimpleNamespace(getDevice=lambda: 0, setDevice=lambda index: None)
        made = launch.Kernel(function, self, runtime, formats)
        layout = SimpleNamespace(size=made.layout.size, offsets=made.offsets)
        self.layouts[function.ptr] = layout
        return made

    def launchKernel(self, function, x, y, _z, threads, *rest):  # noqa: N802, CUDA's name
        """Runs a kernel."""
        *_, num_shared_bytes, stream, arguments, _extra = rest
        assert stream == Torch.STREAM
        kernel, memory = self._kernels[function - 1], emulator.Memory()
        emulator.register_tensors((*self._older, *gc.get_objects()))
        module = ctypes.pointer(kernel.library.module)
        made = emulator._Operation(kernel.entry, module, arguments, (x, y), threads)
        made.num_shared_bytes, made.cluster = num_shared_bytes, kernel.cluster
        memory.run([emulator.Operation(made, (kernel.library,))])


class Graphs:
    """As much of CUDA's driver as graphs of launches need: a graph is done when its launch returns.

    Its arguments are those that were set last, and not what the launches hold by now.
    """

    def __init__(self, driver):
        self._driver, self._nodes = driver, []
        self.num_set = 0

    def cuGraphCreate(self, made, flags):  # noqa: N802, CUDA's names here and below
        made._obj.value, self._nodes = 1 + len(self._nodes), [*self._nodes, []]
        return 0

    def cuGraphAddKernelNode_v2(self, made, graph, before, num_before, node):  # noqa: N802
        nodes = self._nodes[graph.value - 1]
        assert num_before == min(1, len(nodes))
        assert not nodes or before[0] == 100 * graph.value + len(nodes) - 1
        made._obj.value = 100 * graph.value + len(nodes)
        nodes.append(self._copy(node._obj))
        return 0

    def cuGraphInstantiateWithFlags(self, made, graph, flags):  # noqa: N802
        made._obj.value = graph.value
        return 0

    def cuGraphExecKernelNodeSetParams_v2(self, graph, handle, address):  # noqa: N802
        node = launch._Node.from_address(address)
        self._nodes[graph - 1][handle - 100 * graph] = self._copy(node)
        self.num_set += 1
        return 0

    def cuGraphLaunch(self, graph, stream):  # noqa: N802
        for function, grid, block, num_shared_bytes, arguments, _ in self._nodes[graph - 1]:
            address = ctypes.addressof(arguments)
            form = function, *grid, *block, num_shared_bytes
            self._driver.launchKernel(*form, stream, address, 0)
        return 0

    def cuGraphExecDestroy(self, graph):  # noqa: N802
        self._nodes[graph - 1].clear()
        return 0

    def cuGraphDestroy(self, graph):  # noqa: N802
        return 0

    def _copy(self, node):
        layout = self._driver.layouts[node.function]
        memory = ctypes.create_string_buffer(layout.size)
        start = (ctypes.c_void_p * len(layout.offsets)).from_address(node.arguments)[0]
        ctypes.memmove(memory, start, layout.size)
        at = (ctypes.addressof(memory) + offset for offset in layout.offsets)
        arguments = (ctypes.c_void_p * len(layout.offsets))(*at)
        form = node.function or 0, tuple(node.grid), tuple(node.block), node.num_shared_bytes
        return *form, arguments, memory


class Torch:
    """Module torch for a backend whose GPU is the host."""

    STREAM = 7

    def __init__(self):
        stream = SimpleNamespace(cuda_stream=self.STREAM, synchronize=lambda: None)
        self.cuda = SimpleNamespace(
            current_device=lambda: -1,  # as tensors of the host say
            current_stream=lambda device: stream,
            is_current_stream_capturing=lambda: False,
            synchronize=lambda device: None,
        )
        self._C = SimpleNamespace(
            _cuda_getCurrentRawStream=lambda index: self.STREAM, _cuda_getDevice=lambda: -1
        )
        self.device = lambda kind, index: torch.device("cpu")

    def __getattr__(self, name):
        return getattr(torch, name)


def copy_at_once(index, pairs):
    for to, source in pairs:
        to.copy_(source)


@pytest.fixture(params=["one launch", "three launches"])
def make(request, library, monkeypatch):
    """Makes the planner of a layer and exchange on such a GPU, where that may be one launch."""
    driver, fake = Driver(library), Torch()
    graphs = Graphs(driver)
    monkeypatch.setattr(kernels, "load", driver.load)
    monkeypatch.setattr(launch, "_cuda_driver", lambda: graphs)
    monkeypatch.setattr(device, "torch", fake)
    for module in (device, launch):
        monkeypatch.setattr(module, "on_device", lambda index: contextlib.nullcontext())
    for name in ("current_stream", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake.cuda, name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(device_tables, "max_shared_bytes", lambda index: emulator.MAX_SHARED_BYTES)
    monkeypatch.setattr(planner, "choose_solver", lambda solver, *asked: (solver, ""))
    monkeypatch.setattr(planner, "solver_fact", lambda *asked: "flow")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(statistics, "copy_beside", copy_at_once)

    def make(target, exchange=None, **arguments):
        arguments = {"one_launch": make.one_launch, **arguments}
        made = Planner(target, rank=RANK, counts="given", solver="flow", **arguments)
        made._backend._index = -1
        made.exchange = exchange
        return made

    caches = (kernels.route_kernel, kernels._route_kernels, kernels._solver_kernels)
    caches = (*caches, kernels._plan_kernels)
    for cache in caches:
        cache.cache_clear()
    make.graphs, make.is_one = graphs, request.param == "one launch"
    make.one_launch = MAX_ONE_LAUNCH if make.is_one else 0
    yield make
    gc.unfreeze()
    for cache in caches:
        cache.cache_clear()


class Rows(LocalExchange):
    """Adds rows of ranks in step with this one."""

    counts, status = torch.zeros(R, E), Status.OPTIMAL
    given_load = torch.zeros(R, 0)  # of each rank's picks, where they are slots
    sent = None

    def gather(self, row):
        self.sent = Status(int(row[Head.STATUS]))
        rows = row.expand(R, -1).clone()
        rows[:, Head.STATUS] = self.status
        words = torch.cat([self.counts, self.given_load], 1)
        rows[:, HEAD : HEAD + words.shape[1]] = words
        rows[RANK] = row
        return rows


def batch(rng, num_tokens, dtype=torch.int64):
    """[T, K] of each rank and their counts."""
    topks = [torch.from_numpy(oracle.random_topk(rng, T, 2, np.ones(E))) for T in num_tokens]
    counts = torch.stack([reference.count(topk, E) for topk in topks])
    return topks[RANK].to(dtype), counts


def values(plan):
    return [getattr(plan, field).clone() for field in FIELDS]


def same(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_batches_of_every_kind_by_turns(make):
    rng, rows = np.random.default_rng(1), Rows()
    given, exchanging = make(TWO), make(TWO, rows)
    slots = torch.tensor(TWO.logical_to_physical)
    last = torch.where(slots[:, -1] < 0, slots[:, 0], slots[:, -1])
    plans = []
    for _ in range(10):
        T, dtype = int(rng.choice([0, 1, 5, 64, 200])), rng.choice([torch.int32, torch.int64])
        topk, rows.counts = batch(rng, [40, T], dtype)
        physical = torch.where(topk < 0, -1, last[topk.long()].to(dtype))
        calls = [
            functools.partial(given, topk, counts=rows.counts.long()),
            functools.partial(exchanging, topk, distinct=bool(rng.integers(2))),
            functools.partial(exchanging, physical, indices="physical"),
            functools.partial(exchanging.route, topk),
        ]
        made = {int(call): calls[call]() for call in rng.permutation(4)}
        slots_alone = made.pop(3)
        for plan in made.values():
            check_plan(plan, topk, TWO, RANK)
            assert same(values(plan), values(made[0]))
            assert torch.equal(plan.topk_idx, slots_alone)
            plans.append((plan, values(plan)))
    assert all(same(values(plan), expected) for plan, expected in plans)
    masked = exchanging.mask(torch.tensor([[-1, 5]]), torch.tensor([[3, 4]]))
    assert masked.tolist() == [[-1, 4]]
    for one in (given, exchanging):
        one.raise_errors()


def random_problem(rng):
    """Bounds of which some leave few tokens below 2**31, and some do not suffice."""
    bounds = {}
    if rng.random() < 0.6:
        most = rng.choice([100, 2**30])
        bounds["base_load"] = torch.from_numpy(rng.integers(0, most, R))
        if most > 100:
            bounds["base_load"][0] = 2**31 - 1 - bounds["base_load"][1] - rng.integers(0, 200)
    if rng.random() < 0.4:
        bounds["speed"] = torch.from_numpy(rng.integers(1, 10, R))
    if rng.random() < 0.5:
        bounds["max_quota"] = torch.from_numpy(rng.integers(20, 120, (E, 2)))
    if not {"speed", "max_quota"} & bounds.keys():
        bounds["min_gain"] = int(rng.integers(0, 60))
    return Problem(**bounds)


def test_batches_end_as_on_the_cpu(make):
    rng, seen = np.random.default_rng(3), set()
    for _ in range(40):
        layer, stale = Layer(TWO, random_problem(rng)), bool(rng.random() < 0.2)
        topk, counts = batch(rng, rng.integers(0, 100, R))
        counts = counts.long()
        if rng.random() < 0.2:
            counts[0, rng.integers(E)] = int(rng.choice([2**30, 2**31 - 1]))
        plan = make(layer)(topk, counts=counts, stale=stale)
        host = Planner(layer, rank=RANK, counts="given", solver="cpu")
        expected = host(topk, counts=counts, stale=stale)
        check_plan(plan, topk, TWO, RANK, layer.problem)
        assert int(plan.status) == int(expected.status)
        assert torch.equal(plan.counts, expected.counts)
        if int(plan.status) != Status.OPTIMAL:  # else several are the best
            assert same(values(plan), values(expected))
        seen.add(Status(int(plan.status)))
    faults = {Status.STALE, Status.INFEASIBLE, Status.BAD_COUNTS}
    assert seen == {Status.OPTIMAL, Status.STAYED, *faults}


def test_batches_of_slots_stay_as_on_the_cpu(make):
    """By turns with batches of experts and given counts, which are compared with homes."""
    rng, rows, on_host, seen = np.random.default_rng(4), Rows(), Rows(), set()
    layer = Layer(TWO, Problem(min_gain=12, base_load=torch.tensor([3, 0])))
    exchanging, given = make(layer, rows), make(layer)
    host = Planner(layer, rank=RANK, counts="given", solver="cpu")
    host.exchange = on_host
    expected, kept = tallied.Tallied(RANK, base_load=layer.problem.base_load), []
    for _ in range(40):
        dtype = rng.choice([torch.int32, torch.int64])
        weight, numbers = rng.dirichlet(np.ones(E)), rng.integers(0, 60, R)
        topks = [oracle.random_topk(rng, int(n), 2, weight) for n in numbers]
        slots = [torch.from_numpy(oracle.slots_of(rng, one, TWO)).to(dtype) for one in topks]
        topk = torch.from_numpy(topks[RANK]).to(dtype)
        counts = torch.stack([reference.count(torch.from_numpy(one), E) for one in topks])
        of_rank = torch.stack([count_by_rank(one, TWO) for one in slots])
        for ids, indices in ((slots[RANK], "physical"), (topk, "logical")):
            given_load = of_rank if indices == "physical" else of_rank * 0
            for one in (rows, on_host):
                one.counts, one.given_load = counts, given_load
            stale = bool(rng.random() < 0.1)
            plan = exchanging(ids, indices=indices, stale=stale)
            other = host(ids, indices=indices, stale=stale)
            keeps = ids if indices == "physical" else None
            check_plan(plan, topk, TWO, RANK, layer.problem, keeps)
            assert int(plan.status) == int(other.status)
            assert plan.reached.value == other.reached.value
            assert plan.reached.bound == other.reached.bound
            if int(plan.status) != Status.OPTIMAL:  # else several are the best
                assert same(values(plan), values(other))
            expected.add(plan, TWO)
            kept.append((plan, values(plan)))
            seen.add((indices, Status(int(plan.status))))
            slots_alone = exchanging.route(ids, indices=indices, stale=stale)
            assert slots_alone.equal(plan.topk_idx)
            expected.add(plan, TWO)
        by_homes = given(slots[RANK], counts=counts, indices="physical")
        check_plan(by_homes, topk, TWO, RANK, layer.problem)
        assert tallied.read(exchanging) == expected.totals
    assert len(seen) == 6
    assert all(same(values(plan), earlier) for plan, earlier in kept)
    for one in (exchanging, given):
        one.raise_errors()


@pytest.mark.parametrize("objective", ["experts", "cost", "auto"])
def test_other_objectives_than_tokens(make, objective):
    """Of every kind of call, and behind a refresh."""
    rng, rows = np.random.default_rng(4), Rows()
    cost, base = CostModel("tiles", 10, (100, 180), 70, 5), torch.tensor([3, 0])
    layer = Layer(TWO, Problem(objective=objective, cost=cost, base_load=base))
    layer.is_refreshable = True
    exchanging, given = make(layer, rows), make(layer)
    tokens = make(Layer(TWO, Problem(base_load=base)))
    for new in (None, TWO.with_copies([0, 1, 3, 3, 2, 1])):
        if new is not None:
            exchanging.prepare(new)()
            given.prepare(new)()
            layer.replace(new)
        for num_tokens in ([0, 0], [3, 2], [40, 20], [200, 90]):
            topk, rows.counts = batch(rng, num_tokens)
            plan, load = exchanging(topk), rows.counts.sum(0)
            assert int(plan.status) == Status.OPTIMAL
            check_plan(plan, topk, layer.placement, RANK, layer.problem)
            assert same(values(plan), values(given(topk, counts=rows.counts.long())))
            host = Planner(layer, rank=RANK, counts="given", solver="cpu")
            expected = host(topk, counts=rows.counts.long()).reached
            assert plan.reached.bound == expected.bound
            if objective == "experts" or new is not None:
                continue
            by_tokens = tokens(topk, counts=rows.counts.long()).quota
            assert plan.reached.value <= judge(by_tokens, load, TWO, layer.problem).value
    stale = given(topk, counts=rows.counts.long(), stale=True)
    assert (int(stale.status), int(stale.quota[:, 1:].sum())) == (Status.STALE, 0)


def test_replaced_copies_are_planned_with_in_every_kind_of_call(make):
    rng, rows, layer = np.random.default_rng(2), Rows(), Layer(TWO)
    layer.is_refreshable = True
    exchanging = make(layer, rows)
    topk, rows.counts = batch(rng, [40, 30])
    physical = exchanging(topk).topk_idx
    assert same(values(exchanging(physical, indices="physical")), values(exchanging(topk)))
    before = exchanging(topk)
    split = before.split.clone()
    new = TWO.with_copies([0, 1, 3, 3, 2, 1])
    exchanging.prepare(new)()
    layer.replace(new)
    after = exchanging(topk)
    check_plan(after, topk, new, RANK)
    assert not torch.equal(after.topk_idx, physical)
    assert same(values(exchanging(after.topk_idx, indices="physical")), values(after))
    assert torch.equal(before.split, split)  # by the placement that it was made on


def test_all_experts_of_an_engine_move_to_other_slots(make):
    rng, rows = np.random.default_rng(7), Rows()
    layer = Layer(TWO.with_copies(TWO.physical_to_logical, 3))
    layer.is_refreshable = layer.moves_homes = True
    exchanging = make(layer, rows)
    # Homes elsewhere, then two components where there was one, then three copies of an expert.
    for table in (None, [3, 2, 1, 0, 3, 2], [0, 0, 1, 2, 3, 3], [3, 3, 2, 0, 1, 3]):
        if table is not None:
            new = Placement(table, R, num_experts=E, max_replicas=3)
            exchanging.prepare(new)()
            layer.replace(new)
        topk, rows.counts = batch(rng, [90, 20])
        plan = exchanging(topk)
        check_plan(plan, topk, layer.placement, RANK)
        assert int(plan.status) == Status.OPTIMAL
        slots = plan.topk_idx
        assert same(values(exchanging(slots, indices="physical")), values(exchanging(topk)))
    assert layer.placement.home.tolist() == [3, 4, 2, 0]


WITH_SLOTS = Placement([0, 1, 2, -1, 3, 0, -1, -1], R, num_experts=E, num_guests_per_rank=1)


BY_COST = Problem(
    objective="cost", cost=CostModel("tiles", 4, (100, 160), 60, 5, push=90), guest_min_tokens=1
)


@pytest.mark.parametrize("problem", [Problem(guest_min_tokens=1), BY_COST], ids=["tokens", "cost"])
def test_guests_are_those_of_the_cpu_in_every_kind_of_call(problem, make):
    rng, rows, seen = np.random.default_rng(5), Rows(), set()
    layer = Layer(WITH_SLOTS, problem)
    given, exchanging = make(layer), make(layer, rows)
    host = Planner(layer, rank=RANK, counts="given", solver="cpu")
    homes, plans = torch.arange(E), []  # slots of engines that know of no guests
    for _ in range(8):
        weight = rng.dirichlet(np.ones(E))
        topks = [torch.from_numpy(rng.choice(E, (T, 2), p=weight)) for T in (40, 30)]
        rows.counts = torch.stack([reference.count(topk, E) for topk in topks])
        topk, stale = topks[RANK], bool(rng.random() < 0.2)
        expected = host(topk, counts=rows.counts, stale=stale)
        for plan in (
            given(topk, counts=rows.counts, stale=stale),
            exchanging(topk, stale=stale),
            exchanging(homes[topk].long(), indices="physical", stale=stale),
        ):
            check_plan(plan, topk, WITH_SLOTS, RANK, layer.problem)
            assert torch.equal(plan.guests, expected.guests)
            if problem is BY_COST:
                assert same(values(plan), values(expected))
                assert plan.reached.value == expected.reached.value
            assert int(plan.status) == (Status.STALE if stale else Status.OPTIMAL)
            plans.append((plan, values(plan), plan.guests.clone()))
        seen.add(tuple(expected.guests.flatten().tolist()))
    assert len(seen) > 2
    numbers = [plan.number for plan, *_ in plans]
    assert [n is None for n in numbers] == [True, False, False] * 8
    assert [int(n) >> 32 for n in numbers if n is not None] == [*range(1, 17)]
    for plan, expected, guests in plans:
        assert same(values(plan), expected)
        assert torch.equal(plan.guests, guests)


@pytest.mark.parametrize("problem", [Problem(guest_min_tokens=1), BY_COST], ids=["tokens", "cost"])
def test_residents_beside_guest_slots_are_replaced(problem, make):
    rng, rows = np.random.default_rng(6), Rows()
    layer = Layer(WITH_SLOTS, problem)
    layer.is_refreshable = True
    exchanging = make(layer, rows)
    for table in (None, [0, 1, 2, -1, 3, 1, 2, -1], [0, 1, 2, -1, 3, -1, 0, -1]):
        if table is not None:
            new = layer.placement.with_copies(table)
            exchanging.prepare(new)()
            layer.replace(new)
        topk, rows.counts = batch(rng, [90, 20])
        rows.counts[0, 1] += 100
        check_plan(exchanging(topk), topk, layer.placement, RANK, layer.problem)


def test_refusals_and_faults_leave_nothing_behind(make):
    rng, rows = np.random.default_rng(2), Rows()
    exchanging = make(TWO, rows)
    topk, rows.counts = batch(rng, [40, 30])
    expected = values(exchanging(topk))

    def goes_on():
        return same(values(exchanging(topk)), expected)

    with pytest.raises(ValueError, match="must be"):
        exchanging(torch.zeros(3))
    assert goes_on()
    rows.status = Status.REFUSED
    exchanging(topk)
    rows.status = Status.OPTIMAL
    with pytest.raises(RankError, match="refused"):
        exchanging(topk)
    assert goes_on()
    for wrong, distinct, message in (([[E, 0]], False, "neither -1"), ([[2, 2]], True, "twice")):
        plan = exchanging(torch.tensor(wrong), distinct=distinct)
        assert int(plan.status) == Status.REFUSED
        assert int(plan.quota.sum()) == 0
        with pytest.raises((RankError, ValueError), match=message):
            exchanging(topk)
        assert goes_on()
    assert int(exchanging(topk, stale=True).status) == Status.STALE
    assert goes_on()
    rows.counts[RANK] = torch.tensor([0, 0, 2, 0])
    assert int(exchanging(torch.tensor([[2, 2]])).status) == Status.OPTIMAL
    given = make(TWO)
    given(topk, counts=rows.counts * 2)
    with pytest.raises(ValueError, match="counts were not those"):
        given(topk, counts=rows.counts)


@pytest.mark.parametrize("step", ["_on_device", "_make_launches", "_arrange"])
def test_what_fails_before_a_batch_is_sent_is_told(step, make, monkeypatch):
    rows = Rows()
    exchanging = make(TWO, rows)
    topk, rows.counts = batch(np.random.default_rng(2), [40, 30])
    expected = values(exchanging(topk))
    assert rows.sent == Status.OPTIMAL
    backend, original = exchanging._backend, getattr(exchanging._backend, step)

    def fail(*arguments):
        monkeypatch.setattr(backend, step, original)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(backend, step, fail)
    backend._launches.clear()  # they are made again
    with pytest.raises(RuntimeError, match="out of memory"):
        exchanging(topk)
    assert rows.sent == Status.REFUSED
    assert same(values(exchanging(topk)), expected)


def test_a_batch_sets_what_changed_in_its_graph(make, monkeypatch):
    window = torch.zeros(Windows.num_bytes(1, HEAD + E), dtype=torch.uint8)
    exchange = WindowExchange("ipc", Windows([window.data_ptr()]))
    monkeypatch.setattr(planner, "connect", lambda *_, **__: exchange)
    alone = Placement([0, 1, 2, 3, 0], 1)
    windowed = Planner(alone, counts="ipc", solver="flow", one_launch=make.one_launch)
    windowed._backend._index = -1
    topk, counts = torch.tensor([[0, 1], [2, -1]]), torch.tensor([[1, 1, 1, 0]])
    kept, num_set = [windowed.route(topk)], make.graphs.num_set
    for _ in range(3):
        kept.append(windowed.route(topk))  # slots have an address of their own
    assert make.graphs.num_set - num_set == (0 if make.is_one else 3)
    assert all(torch.equal(slots, kept[0]) for slots in kept)
    for stale, T in ((True, 2), (False, 1), (False, 2)):
        plan = windowed(topk[:T], stale=stale)
        assert int(plan.status) == (Status.STALE if stale else Status.OPTIMAL)
        check_plan(plan, topk[:T], alone, 0)
    assert torch.equal(plan.counts, counts)
    with pytest.raises(ValueError, match="must be"):
        windowed(torch.zeros(3))
    assert torch.equal(windowed.route(topk), kept[0])


class Others:
    """The window of this rank, in which the other one's rows lie before they are waited for."""

    def __init__(self):
        self.window = torch.zeros(2, R, HEAD + E, dtype=torch.int64)
        addresses = [0, self.window.data_ptr()]
        self.exchange = WindowExchange("ipc", Windows(addresses))
        self.num_sent = 0

    def send(self, planner, counts, status=Status.OPTIMAL):
        """The row of the batch that `planner` exchanges next."""
        self.num_sent += 1
        head = planner._backend.workspace.head[:-1].tolist()
        row = torch.tensor([int(status), *head, self.num_sent, *counts.tolist()])
        self.window[self.num_sent % 2, 0] = self.num_sent << 32 | row


@torch.no_grad()
@pytest.mark.parametrize("wants_plan", [True, False])
def test_batches_between_exchanges_go_by_earlier_quotas(make, monkeypatch, wants_plan):
    """As on the CPU, of the same quotas; and behind a refresh they are exchanged first."""
    if make.is_one:
        pytest.skip("it takes three launches")
    rng, others, layer, every = np.random.default_rng(11), Others(), Layer(TWO), 3
    layer.is_refreshable = True
    monkeypatch.setattr(planner, "connect", lambda *_, **__: others.exchange)
    options = {"every": every, "sample_every": 2}
    reusing = Planner(layer, rank=RANK, counts="ipc", solver="flow", **options)
    reusing._backend._index = -1
    num_exchanged, turn, kept, ends, loads = 0, 0, [], [], []
    for n in range(14):
        if n == 8:  # in the middle of a turn
            new = TWO.with_copies([0, 1, 3, 3, 2, 1])
            reusing.prepare(new)()
            layer.replace(new)
            turn = 0
        dtype = rng.choice([torch.int32, torch.int64])
        topk, counts = batch(rng, rng.integers(0, 200, R), dtype)
        stays = n == 3  # a batch that the other rank's stale replicas send home
        if turn == 0:
            others.send(reusing, counts[0], Status.STALE if stays else Status.OPTIMAL)
            num_exchanged += 1
            loads.append(counts.sum(0).tolist())
        if not wants_plan and turn:
            slots = reusing.route(topk)
            shares = reference.count(topk, E), kept[-1].quota
            shares = reuse(*shares, RANK, R)
            assert slots.equal(reference.rewrite(topk, shares, layer.placement))
            ends.append(Status.REUSED)
        else:
            plan = reusing(topk)
            check_plan(plan, topk, layer.placement, RANK)
            ends.append(Status(int(plan.status)))
            if turn:
                assert same(values(plan)[1:4], values(kept[-1])[1:4])
            else:
                assert plan.counts.equal(counts)
            kept.append(plan)
        assert ends[-1] == (Status.REUSED if turn else Status.STALE if stays else Status.OPTIMAL)
        turn = (turn + 1) % every
    assert kept[0].quota.sum(1).equal(kept[0].counts.sum(0))  # what came later left it alone
    assert int(reusing._backend.workspace.head[3]) == num_exchanged
    samples = reusing.statistics.take_samples(all_done=True)
    assert {n: load.tolist() for n, load in samples.items()} == {
        n: loads[n] for n in range(0, num_exchanged, 2)
    }
    assert reusing.num_batches[Status.REUSED] == ends.count(Status.REUSED)
    reusing.raise_errors()


def test_quotas_are_reused_with_windows_of_one_node_alone(make, monkeypatch):
    for exchange in (Rows(), WindowExchange("nvshmem", Windows([0, 0], object()))):
        monkeypatch.setattr(planner, "connect", lambda *_, one=exchange, **__: one)
        with pytest.raises(ValueError, match=r"LPLB_EP_EVERY.* kernels exchange within a node"):
            Planner(TWO, rank=RANK, counts="torch", solver="flow", every=2)


def test_a_captured_batch_is_no_graph_in_a_graph(make, monkeypatch):
    given, counts = make(TWO), torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]])
    topk = torch.tensor([[0, 1]])
    expected = values(given(topk, counts=counts))

    def refuse(*_):
        raise AssertionError("a stream that is being captured takes no graph")

    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(given, "_check_capturable", lambda **_: None)
    monkeypatch.setattr(make.graphs, "cuGraphLaunch", refuse)
    assert same(values(given(topk, counts=counts)), expected)


def test_no_graph_captures_what_lies_on_the_cpu(make, monkeypatch):
    given, on_gpu = make(TWO), SimpleNamespace(is_cuda=True)
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    counts = torch.zeros(R, E).int()
    with pytest.raises(ContractError, match="counts lies on the CPU"):
        given(on_gpu, counts=counts)
    with pytest.raises(ContractError, match="topk_idx lies on the CPU"):
        given(counts, counts=on_gpu)


def test_tensors_without_a_storage_are_no_memory_of_kernels(make):
    sparse = torch.eye(2).to_sparse()
    with pytest.raises(NotImplementedError):
        sparse.untyped_storage()
    given = make(TWO)
    given(torch.tensor([[0, 1]]), counts=torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]]))
    assert given.num_batches == {Status.OPTIMAL: 1}
    emulator.register_tensors([torch.empty(2**50, device="meta")])  # more than any memory


def test_batches_that_grow_leave_little_behind(make):
    given = make(TWO)
    for T in range(1, 41):
        given(torch.zeros(T, 1, dtype=torch.int32), counts=torch.tensor([[0] * E, [T, 0, 0, 0]]))
        if T == 1:
            at_first = given._backend.workspace.num_bytes
    assert given._backend.workspace.num_bytes - at_first <= 4 * 6 * 40


@pytest.mark.parametrize("kind", ["plain", "bounded", "guests", "experts"])
def test_statistics_are_those_of_the_plans(kind, make):
    """A thousand of them, by every kind of problem and of launch."""
    rng, rows = np.random.default_rng(8), Rows()
    problem, bounds = Problem(guest_min_tokens=1), {}
    if kind == "experts":
        problem, bounds = Problem(objective="experts"), {"by_tokens": False}
    if kind == "bounded":
        bounds = {"base_load": torch.tensor([9, 30]), "speed": torch.tensor([2, 5])}
        problem = Problem(**bounds)
    placement = WITH_SLOTS if kind == "guests" else TWO
    marks = {"mark_every": 9}
    given, exchanging = (
        make(Layer(placement, problem), **marks),
        make(Layer(placement, problem), rows, **marks),
    )
    expected = {one: tallied.Tallied(RANK, **bounds, **marks) for one in (given, exchanging)}
    for i in range(125):
        weight = rng.dirichlet(np.ones(E))
        topks = [torch.from_numpy(rng.choice(E, (T, 2), p=weight)) for T in rng.integers(0, 50, R)]
        rows.counts = torch.stack([reference.count(topk, E) for topk in topks])
        topk, stale = topks[RANK], bool(rng.random() < 0.1)
        if rng.random() < 0.5:
            counts = rows.counts.long()
            if rng.random() < 0.05:
                counts[0, 1] = 2**31 - 1
            one, plan = given, given(topk, counts=counts, stale=stale)
        else:
            one, plan = exchanging, exchanging(topk, stale=stale)
        expected[one].add(plan, placement)
        if rng.random() < 0.05:
            one.statistics.begin_window()
            expected[one].begin_window(expected[one].window + 1)
        else:
            assert tallied.read(one) == expected[one].totals, i
            assert tallied.read(one, marked=True) == expected[one].marked, i
        if i % 50 == 0:
            plan = exchanging(topk)
            exchanging.route(topk)  # whose plan nobody asks for
            for _ in range(2):
                expected[exchanging].add(plan, placement)
    for one, its in expected.items():
        assert one.num_batches == its.batches


def test_samples_are_taken_when_their_batches_are_done(make):
    rng = np.random.default_rng(9)
    given = make(TWO, sample_every=3)
    expected, taken = tallied.Tallied(RANK, every=3), {}

    def plan(number):
        for _ in range(number):
            topk, counts = batch(rng, rng.integers(0, 50, R))
            counts = counts.long()
            if rng.random() < 0.1:
                counts[0, 0] = 2**31 - 1
            expected.add(given(topk, counts=counts), TWO)

    def as_lists(samples):
        return {b: load.tolist() for b, load in samples.items()}

    for number in (1, 2, 1, 40):
        plan(number)
        taken |= given.statistics.take_samples()
    assert as_lists(taken) == {b: load for b, load in expected.samples.items() if b < 43}
    taken |= given.statistics.take_samples(all_done=True)
    assert as_lists(taken) == expected.samples
    assert not given.statistics.take_samples(all_done=True)
    plan(3 * statistics.MAX_SAMPLES + 30)
    last = as_lists(given.statistics.take_samples(all_done=True))
    assert last.items() <= expected.samples.items()
    assert max(last) == max(expected.samples)
    assert len(last) > statistics.MAX_SAMPLES * 0.7  # some batches had no counts


def test_copies_that_differ_are_made_again(make, monkeypatch):
    given, counts = make(TWO), torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]])
    topk, planned = torch.tensor([[0, 1]]), []

    def copy_while_batches_come(index, pairs):
        for to, source in pairs:
            to.copy_(source)
            if len(planned) < 5:
                planned.append(given(topk, counts=counts))

    monkeypatch.setattr(statistics, "copy_beside", copy_while_batches_come)
    assert given.num_batches == {Status.OPTIMAL: 5}
    monkeypatch.setattr(statistics, "copy_beside", lambda index, pairs: None)
    given.statistics._read[0] += 1
    with pytest.raises(RuntimeError, match="faster than"):
        given.num_batches  # noqa: B018


def test_why_no_batch_is_planned_in_one_launch_is_logged(make, caplog, monkeypatch):
    monkeypatch.setitem(globals(), "RANK", 0)
    caplog.set_level(logging.INFO, "lplb_ep")
    log_in_steps.cache_clear()
    make(TWO)
    assert not [m for m in caplog.messages if "LAUNCH" in m]
    for _ in range(2):
        made = make(Placement([0, 1, 1, 0, 2, 3, 3, 2], 4))
        assert made._backend.workspace.plan is None
    expected = "the placement has 2 components, and one block solves one"
    assert [m for m in caplog.messages if "LAUNCH" in m] == (
        [f"lplb_ep: LPLB_EP_ONE_LAUNCH: plans take three launches: {expected}"] * make.is_one
    )
