"""What of the GPU path needs no GPU: its tables, its limits, and that its kernels compile."""

import contextlib
import dataclasses
import importlib.util
import struct
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch

from lplb_ep import Layer, MissingPackageError, Placement, Planner, Problem
from lplb_ep.comm.copies import BARRIER
from lplb_ep.gpu import jit
from lplb_ep.gpu.launch import Kernel
from lplb_ep.planning import device_tables, layout, solvers, structs
from lplb_ep.planning.kernels import programs
from lplb_ep.planning.solvers import DEVICE_SOLVERS, check_fit, choose_solver, num_static_bytes
from lplb_ep.settings import SOLVERS
from lplb_ep.weights import structs as weights_structs


def tables_of(placement):
    return layout.tables(placement, layout.capacity_for(placement))


@pytest.mark.parametrize("R", [1, 5, 16, 33, 64])
def test_tables_hold_every_copy_once(R):
    rng = np.random.default_rng(R)
    for _ in range(5):
        placement = oracle.random_placement(rng, R, int(rng.integers(R, 200)), 2)
        tables = tables_of(placement)
        C = placement.max_replicas
        copies, experts = [], []
        for g, (num_ranks, num_arcs, most_edges, most_nth) in enumerate(tables.shape.tolist()):
            ranks = tables.ranks[g, :num_ranks]
            assert (placement.component[ranks] == placement.component[ranks[0]]).all()
            arcs = tables.arcs[g, :num_arcs]
            e, c = arcs["quota"] // C, arcs["quota"] % C
            copies += zip(e.tolist(), c.tolist(), strict=True)
            assert (ranks[arcs["rank"]] == placement.copy_rank[e, c]).all()
            for a, arc in enumerate(arcs):
                assert tables.first_arc[g, arc["rank"]] <= a < tables.first_arc[g, arc["rank"] + 1]
                holders = [r for r in range(num_ranks) if int(arc["ranks"]) >> r & 1]
                place = int(arc["place"])
                same = tables.copies[g, place : place + len(holders)]
                assert (arcs["quota"][same] // C == e[a]).all()
                assert arcs["rank"][same].tolist() == holders
            edges = tables.edges[g]
            for r, of_rank in enumerate(edges):
                of_rank = of_rank[: np.count_nonzero(of_rank["arc"] >= 0)]
                assert (of_rank["arc"] >= 0).all()
                wanted = [
                    (a, arcs["rank"][other], other)
                    for a in range(num_arcs)
                    for other in range(num_arcs)
                    if arcs["rank"][a] == r and e[other] == e[a] and other != a
                ]
                found = of_rank[["arc", "target", "to"]].tolist()
                assert sorted(found) == sorted(wanted)
                for i, (a, nth, number) in enumerate(of_rank[["arc", "nth", "number"]].tolist()):
                    assert nth == (of_rank["arc"][:i] == a).sum()
                    assert number == (of_rank["arc"] == a).sum()
                    assert nth == 0 or of_rank["arc"][i - 1] == a
            assert most_edges == (edges["arc"] >= 0).sum(1).max()
            assert most_nth == edges["nth"][edges["arc"] >= 0].max(initial=0)
            packed = tables.experts[g][tables.experts[g] >= 0]
            several = packed[packed >> 16 >= tables.ranks.shape[1]]
            places = dict(zip((arcs["quota"] // C).tolist(), arcs["place"].tolist(), strict=True))
            assert {
                e & 0xFFFF: (e >> 16) - tables.ranks.shape[1] for e in several.tolist()
            } == places
            experts += (packed & 0xFFFF).tolist()
            single = packed >> 16 < tables.ranks.shape[1]
            homes = placement.home_rank[packed[single] & 0xFFFF]
            assert (ranks[packed[single] >> 16] == homes).all()
        several = (placement.copy_rank >= 0).sum(1) > 1
        assert sorted(experts) == list(range(placement.num_experts))
        expert, column = np.nonzero((placement.copy_rank >= 0) & several[:, None])
        assert sorted(copies) == list(zip(expert.tolist(), column.tolist(), strict=True))


def test_tables_of_any_placement_can_be_sent_to_a_device():
    for table in ([0, 1, 2, 3], [0, 1, 1, 0], [0, 1, 2, 0, 1, 2]):
        placement = Placement(table, 2)
        for built in (
            tables_of(placement),
            layout.routes(placement, layout.capacity_for(placement)),
        ):
            sent = device_tables._upload(built, torch.device("cpu"))
            assert {name: table.numel() for name, table in sent.items()} == {
                field.name: getattr(built, field.name).nbytes for field in dataclasses.fields(built)
            }


def test_routes_hold_every_useful_copy_once():
    rng = np.random.default_rng(0)
    for _ in range(20):
        placement = oracle.random_placement(rng, 8, 40, 2, num_ranks_per_node=4)
        routes, found = layout.routes(placement, layout.capacity_for(placement)), set()
        for e, slot in enumerate(routes.lookup):
            if slot >= 0:
                assert slot == placement.home[e]
                assert (placement.copy_rank[e] >= 0).sum() == 1
                continue
            assert routes.experts[~slot] == e
            for copy in routes.copies[routes.first[~slot] : routes.first[~slot + 1]]:
                rank, node, slot, expert, quota = copy.tolist()
                assert placement.physical_to_logical[slot] == expert == e
                assert (slot // placement.num_local_slots, rank // 4) == (rank, node)
                assert placement.logical_to_physical[e, quota - e * placement.max_replicas] == slot
                found.add(slot)
        several = (placement.copy_rank >= 0).sum(1) > 1
        useful = placement.logical_to_physical[(placement.copy_rank >= 0) & several[:, None]]
        assert found == set(useful.tolist())


def random_layer(rng, R):
    placement = oracle.random_placement(rng, R, int(rng.integers(R, max(60, R + 20))), 2)
    return placement.with_copies(placement.physical_to_logical, 9)


@pytest.mark.parametrize("R", [2, 8, 40, 100])
def test_tables_of_a_refreshed_layer_have_room_for_any_other_replicas(R):
    rng = np.random.default_rng(R)
    for _ in range(4):
        first, fitted = random_layer(rng, R), 0
        capacity = layout.capacity_for(first, refreshable=True)
        variant = DEVICE_SOLVERS["flow"].variant(capacity)
        assert variant.size == next(size for size in layout.SIZES if size >= R)
        assert variant.more or variant.parts * variant.turns >= capacity.max_edges
        for _ in range(10):
            other = oracle.random_copies(rng, first)
            tight = dataclasses.replace(layout.own_capacity(other), size=capacity.size)
            if tight.num_components > capacity.num_components:
                with pytest.raises(ValueError, match="have space for num_components"):
                    layout.tables(other, capacity)
                continue
            fitted += 1
            # As laid out alone, and nothing beyond.
            for wide, exact in (
                (layout.tables(other, capacity), layout.tables(other, tight)),
                (layout.routes(other, capacity), layout.routes(other, tight)),
            ):
                for field in dataclasses.fields(exact):
                    padded, own = getattr(wide, field.name), getattr(exact, field.name)
                    inside = tuple(slice(n) for n in own.shape)
                    assert (padded[inside] == own).all(), field.name
                    beyond = padded.copy()
                    beyond[inside] = empty = {
                        "edges": layout.NO_EDGE,
                        "experts": -1 if own.ndim == 2 else 0,
                        "first": tight.num_copies,
                    }.get(field.name, np.zeros((), own.dtype))
                    assert (beyond == empty).all(), field.name
        assert fitted


@pytest.mark.parametrize("R", [2, 8, 40])
def test_tables_of_an_engine_have_room_for_any_experts_in_any_slots(R):
    rng = np.random.default_rng(R)
    num_slots = R * 3
    E = num_slots - R  # one slot a rank for copies

    def deal():
        copies = rng.choice(rng.integers(0, E, rng.integers(1, R + 1)), R)
        table = rng.permutation(np.append(np.arange(E), copies))
        return Placement(table, R, num_experts=E, max_replicas=R + 1)

    first = Placement([*range(E), *[0] * R], R, num_experts=E, max_replicas=R + 1)
    capacity = layout.capacity_for(first, refreshable=True, moves_homes=True)
    for other in (first, *(deal() for _ in range(20))):
        layout.tables(other, capacity)
        layout.routes(other, capacity)


def test_components_beyond_one_block_are_refused_by_size():
    ring = Placement.from_topology("ring", num_experts=257, num_ranks=257)
    with pytest.raises(ValueError, match=r"components of at most 256 ranks; the largest has 257"):
        layout.capacity_for(ring)
    with pytest.raises(ValueError, match=r"at most 32767 experts; got 32768"):
        layout.capacity_for(Placement(np.arange(2**15), 1))
    # Many independent groups are no matter.
    many = Placement(np.arange(600), 100)
    assert len(tables_of(many).shape) == 100


SM_80, SM_86, SM_90 = 163 * 1024, 99 * 1024, 227 * 1024  # shared memory of a block
TWICE = np.append(np.arange(512), np.arange(512))


def test_placements_must_fit_a_block_of_the_device():
    everywhere = Placement(np.tile(np.arange(70), 64), 64)
    with pytest.raises(ValueError, match=r"flow takes 1\d{5} for 70 experts, 4480 copies of"):
        check_fit(everywhere, "flow", SM_86)
    check_fit(everywhere, "flow", SM_80)
    half = Placement(np.tile(np.arange(40), 32), 32)  # the interior-point method keeps more
    check_fit(half, "flow", SM_86)
    with pytest.raises(ValueError, match=r"cusolverdx takes 1\d{5} for .* 1280 copies"):
        check_fit(half, "cusolverdx", SM_86)
    nodes = Placement(TWICE, 64, num_ranks_per_node=1)
    with pytest.raises(ValueError, match=r"rewriting takes 1\d{5} for .* and 64 nodes"):
        check_fit(nodes, "flow", SM_86)


def test_only_tokens_without_guests_take_more_ranks_or_experts_than_a_word_and_a_block():
    ring = Placement.from_topology("ring", num_experts=65, num_ranks=65)
    many = Placement(np.tile(np.arange(513), 2), 2)
    large = Placement(np.append(np.arange(1024), np.roll(np.arange(1024), 8)), 128)
    guests = [Placement.homes_only(E, R, 1, num_ranks_per_node=R) for E, R in ((65, 65), (513, 27))]
    for placement in (ring, many, large):
        check_fit(placement, "flow", SM_86)
        for solver, objective in (("cusolverdx", "tokens"), ("flow", "cost"), ("flow", "experts")):
            with pytest.raises(ValueError, match=rf"{solver}.* at most 64 ranks and 512 experts"):
                check_fit(placement, solver, SM_90, objective=objective)
    for placement in guests:
        with pytest.raises(ValueError, match=r"guest slots .* at most 64 ranks and 512 experts"):
            check_fit(placement, "flow", SM_90)
    with pytest.raises(ValueError, match=r"cost, .* the largest has 65 ranks, 65 experts"):
        check_fit(ring, "flow", SM_90, objective="cost")
    # Their sets of ranks take more of a block, too.
    everywhere = Placement(np.tile(np.arange(28), 128), 128)
    with pytest.raises(ValueError, match=r"flow takes \d+ for 28 experts, 3584 copies"):
        check_fit(everywhere, "flow", 26 * 3584 + 6 * 1024)
    check_fit(everywhere, "flow", SM_86)


def test_a_refreshed_layer_of_small_components_keeps_their_kernels():
    nodes = Placement(np.tile(np.arange(1024).reshape(16, 64), 2).ravel(), 128)
    assert nodes.component.max() == 63
    capacity = layout.capacity_for(nodes, refreshable=True)
    assert (capacity.size, capacity.max_experts) == (64, 512)
    capacity = layout.capacity_for(nodes, refreshable=True, moves_homes=True)
    assert (capacity.size, capacity.max_experts) == (128, 1024)


@pytest.mark.parametrize("solver", DEVICE_SOLVERS)
def test_64_ranks_and_512_experts_of_two_copies_fit_a_large_gpu(solver):
    check_fit(Placement(TWICE, 64), solver, SM_90)


def test_512_experts_of_eight_copies_fit_the_flow():
    check_fit(Placement(np.tile(np.arange(512), 8), 64), "flow", SM_90)


@pytest.fixture
def device(monkeypatch):
    """As if there were a CUDA device; returns what may be changed of it."""
    facts = {"capability": (9, 0), "bytes": SM_90}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: facts["capability"])
    monkeypatch.setattr(solvers, "max_shared_bytes", lambda _: facts["bytes"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return facts


def test_what_the_kernels_do_not_take_is_planned_on_the_cpu(device):
    small, nodes = Placement([0, 1, 2, 0], 2), Placement(TWICE, 64, num_ranks_per_node=1)
    assert choose_solver("auto", small)[0] == choose_solver("auto", nodes)[0] == "flow"
    device["bytes"] = SM_86
    assert choose_solver("auto", small)[0] == "flow"
    name, why = choose_solver("auto", nodes)
    assert name == "cpu"
    assert "rewriting takes" in why
    with pytest.raises(ValueError, match="rewriting takes"):
        choose_solver("flow", nodes)
    device["capability"] = (7, 5)
    assert choose_solver("auto") == (
        "cpu",
        "the kernels need sm_80 or newer, and the CUDA device is sm_75",
    )
    with pytest.raises(MissingPackageError, match="need sm_80 or newer"):
        choose_solver("flow")


def test_objectives_that_kernels_do_not_minimise_are_refused_by_name(device):
    placement = Placement([0, 1, 2, 0], 2)
    assert choose_solver("auto", placement, objective="tokens")[0] == "flow"
    assert choose_solver("auto", placement, objective="cost")[0] == "flow"
    layer = Layer(placement, Problem(objective="cost"))
    with pytest.raises(ValueError, match="the solver cusolverdx minimises tokens, not cost; flow"):
        Planner(layer, rank=0, counts="given", solver="cusolverdx")
    most = Placement(np.tile(np.arange(512), 8), 64)
    check_fit(most, "flow", SM_90, objective="auto")


def sections(image):
    """Of an ELF image: name, bytes in memory, and data."""
    (offset,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", image, offset + i * size) for i in range(count)]
    for name, _, _, _, begin, length in headers:
        start = headers[names][4] + name
        yield image[start : image.index(0, start)].decode(), length, image[begin : begin + length]


def parameter_sizes(info):
    """The sizes of a kernel's arguments in order, from its section .nv.info.

    An entry has a format, an attribute (0x17: a parameter's number, offset and size) and a size.
    In format 4 so many bytes follow.
    """
    found, at = {}, 0
    while at < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind == 4 and attribute == 0x17:
            _, number, _, flags = struct.unpack_from("<IHHI", info, at)
            found[number] = flags >> 18
        at += size if kind == 4 else 0
    return [found[number] for number in sorted(found)]


SIGNATURES = {**structs.SIGNATURES, **weights_structs.SIGNATURES, BARRIER.name: BARRIER}


def test_every_kernel_compiles(each_kernel, kernel_cache, monkeypatch):
    check_compiled(each_kernel, "sm_90", kernel_cache, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_every_variant_compiles(arch, kernel_cache, monkeypatch):
    check_compiled(programs(), arch, kernel_cache, monkeypatch)


def check_compiled(programs, arch, kernel_cache, monkeypatch):
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(kernel_cache))
    kernels = set()
    for program, cubin in zip(programs, jit.compile_all(programs, [arch]), strict=True):
        assert cubin.data[:4] == b"\x7fELF"
        assert cubin.path.parent == kernel_cache  # made in this session
        shared = [n for name, n, _ in sections(cubin.data) if name.startswith(".nv.shared.")]
        most = num_static_bytes(int(program.defines.get("SIZE", 0)))
        if cubin.name.startswith("weights.cu"):
            most = 16384
        assert max(shared, default=0) <= most
        assert max(shared, default=0) > 0 or cubin.name == "barrier.cu"
        for name, _, data in sections(cubin.data):
            if name.startswith(".nv.info."):
                kernel = name.removeprefix(".nv.info.")
                kernels.add(kernel)
                sizes = [argument.size for argument in SIGNATURES[kernel].arguments]
                assert parameter_sizes(data) == sizes, kernel
    assert kernels == SIGNATURES.keys()


def test_every_solver_that_can_be_asked_for_has_a_record():
    assert ("auto", "cpu", *DEVICE_SOLVERS) == SOLVERS
    assert all(record.name == name for name, record in DEVICE_SOLVERS.items())


def test_a_launch_goes_to_the_stream_and_device_of_its_memory(monkeypatch):
    current, launched = [0], []

    @contextlib.contextmanager
    def enter(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: SimpleNamespace(cuda_stream=100 + device.index),
    )
    driver = SimpleNamespace(launchKernel=lambda *call: launched.append((current[0], *call[:-2])))
    runtime = SimpleNamespace(getDevice=lambda: 0, setDevice=lambda device: None)
    kernel = Kernel(SimpleNamespace(ptr=7), driver, runtime, ("Q", "8s"))
    for index in (0, 1):
        kernel((2, 1), 64, 9, torch.device("cuda", index), (5, b"a struct"))
    assert launched == [(i, 7, 2, 1, 1, 64, 1, 1, 9, 100 + i) for i in (0, 1)]
