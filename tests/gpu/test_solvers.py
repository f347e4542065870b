"""The GPU's solvers against the CPU's, which has judges of its own."""

import math
import threading
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from builders import circulant

import lplb_ep
from lplb_ep import Placement
from lplb_ep.planning import device_tables
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.device_tables import LoadSolver
from lplb_ep.planning.layout import capacity_for
from lplb_ep.planning.plan import Status
from lplb_ep.planning.solve import rank_load
from lplb_ep.planning.solvers import DEVICE_SOLVERS

pytestmark = pytest.mark.gpu


def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=DEVICE_SOLVERS)
def solver(request):
    return request.param


def check(placement, loads, solver):
    """Every row: legal quotas, and each component's largest load its own optimum."""
    load = torch.tensor(np.stack(loads), dtype=torch.int32, device=device())
    quota, held, status, _ = LoadSolver(placement, device(), solver)(load)
    assert not status.any()
    expert, column = np.nonzero(placement.copy_rank >= 0)
    rank = placement.copy_rank[expert, column]
    for row, given, loaded in zip(loads, quota.cpu().numpy(), held.cpu().numpy(), strict=True):
        assert (given >= 0).all()
        assert (given[placement.copy_rank < 0] == 0).all()
        assert (given.sum(1) == row).all()
        assert (np.bincount(rank, given[expert, column], placement.num_ranks) == loaded).all()
        assert loaded.max() == math.ceil(cpu.solve(torch.from_numpy(row), placement).bound)
    return quota


@pytest.mark.parametrize("R", [1, 2, 3, 8, 16, 31, 32, 33, 48, 64])
def test_optima_are_exact(R, solver):
    rng = np.random.default_rng(R)
    for _ in range(20):
        E = int(rng.integers(1, 257))
        placement = oracle.random_placement(
            rng, R, E, int(rng.integers(0, 5)), int(rng.integers(1, 9))
        )
        scale = float(rng.choice([3, 100, 3000]))
        check(placement, [oracle.random_load(rng, E, scale) for _ in range(8)], solver)


@pytest.mark.parametrize("R", [8, 33, 64])
def test_experts_with_a_copy_on_every_rank_are_exact(R, solver):
    """Far more edges a rank than its threads take at once, and than a word has bits."""
    rng = np.random.default_rng(R)
    for num_everywhere, num_redundant in ((1, 0), (1, 2), (5, 1)):
        E = 3 * R
        everywhere = np.repeat(rng.permutation(E)[:num_everywhere], R)
        once = rng.permutation(np.setdiff1d(np.arange(E), everywhere))
        more = rng.choice(once, num_redundant * R + (-once.size) % R)
        table = np.concatenate([x.reshape(-1, R) for x in (everywhere, np.append(once, more))])
        placement = Placement(table.T.ravel(), R)
        assert capacity_for(placement).max_edges >= num_everywhere * (R - 1)
        loads = [oracle.random_load(rng, E, scale) for scale in (3.0, 100.0, 3000.0) * 3]
        for load in loads:
            load[everywhere[0]] += int(rng.integers(0, 1 + load.sum()))
        check(placement, loads, solver)


@pytest.mark.parametrize("variant", DEVICE_SOLVERS["flow"].variants(), ids=str)
def test_every_variant_is_exact(variant):
    rng = np.random.default_rng(variant.size)
    num_edges = variant.parts * variant.turns + 2 * variant.more
    for _ in range(6):
        R = variant.size - int(rng.integers(2))
        placement = circulant(rng, R, num_edges)
        capacity = capacity_for(placement)
        if capacity.num_components > 1:  # of fewer ranks each
            continue
        assert capacity.max_edges == num_edges
        assert DEVICE_SOLVERS["flow"].variant(capacity) == variant
        loads = [oracle.random_load(rng, placement.num_experts, 300.0) for _ in range(16)]
        check(placement, loads, "flow")


def test_a_new_thread_can_launch():
    placement = Placement([0, 1, 2, 0], 2)
    solve = LoadSolver(placement, device())
    load = torch.tensor([[10, 1, 2]], dtype=torch.int32, device=device())
    expected, found = solve(load)[0], []
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: found.append(solve(load)[0]))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert (found[0] == expected).all()


def test_a_batch_of_two_to_the_31_tokens_is_exact(solver):
    rng = np.random.default_rng(0)
    for R in (1, 8, 64):
        placement = oracle.random_placement(rng, R, 96, 2)
        share = rng.lognormal(0, 2, 96)
        load = np.floor(share / share.sum() * (2**31 - 1)).astype(np.int64)
        load[0] += 2**31 - 1 - load.sum()
        check(placement, [load], solver)


def test_each_component_reaches_its_own_optimum(solver):
    rng = np.random.default_rng(1)
    placement = Placement.from_topology(
        "cube", num_experts=64, num_ranks=16, num_redundant_per_rank=2
    )
    loads = [oracle.random_load(rng, 64, 90.0) for _ in range(8)]
    load = torch.tensor(np.stack(loads), dtype=torch.int32, device=device())
    _, held, _, _ = LoadSolver(placement, device(), solver)(load)
    part = Placement.from_topology("cube", num_experts=32, num_ranks=8, num_redundant_per_rank=2)
    for row, loaded in zip(loads, held.cpu().numpy(), strict=True):
        for g in range(2):
            alone = cpu.solve(torch.from_numpy(row[32 * g : 32 * g + 32]), part)
            assert loaded[8 * g : 8 * g + 8].max() == math.ceil(alone.bound)


def test_the_same_bits_on_every_run_and_in_graphs_with_new_loads(solver):
    rng = np.random.default_rng(2)
    placement = oracle.random_placement(rng, 16, 128, 2)
    solve = LoadSolver(placement, device(), solver)
    loads = [oracle.random_load(rng, 128, 500.0) for _ in range(6)]
    load = torch.tensor(np.stack(loads), dtype=torch.int32, device=device())
    eager = [[t.clone() for t in solve(load[i : i + 1])] for i in range(6)]
    for _ in range(20):
        again = solve(load)
        assert torch.equal(again[0], torch.cat([quota for quota, *_ in eager]))
    static = load[:1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve(static)
    for i in range(6):
        static.copy_(load[i : i + 1])
        graph.replay()
        for got, expected in zip(captured, eager[i], strict=True):
            assert torch.equal(got, expected)


def test_two_streams_at_once():
    """Together: one does not wait for the other, which has stopped, and all come out right."""
    rng = np.random.default_rng(3)
    placements = [oracle.random_placement(rng, 8, 64, 2) for _ in range(2)]
    solvers = [LoadSolver(p, device()) for p in placements]
    loads = [
        torch.tensor(
            np.stack([oracle.random_load(rng, 64, 500.0) for _ in range(64)]),
            dtype=torch.int32,
            device=device(),
        )
        for _ in range(2)
    ]
    expected = [s(x)[0].clone() for s, x in zip(solvers, loads, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    got = [[], []]
    for round_ in range(21):  # the first has memory to allocate
        if round_ == 1:
            torch.cuda.synchronize()
            with torch.cuda.stream(streams[0]):
                torch.cuda._sleep(200_000_000)  # a tenth of a second
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(solvers[i](loads[i])[0])
    streams[1].synchronize()
    assert not streams[0].query()
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(quota, expected[i]) for quota in got[i])


def test_running_out_of_rounds_is_told_and_loses_no_token():
    rng = np.random.default_rng(4)
    placement = oracle.random_placement(rng, 16, 128, 2)
    load = torch.from_numpy(rng.integers(1, 900, (1, 128), np.int32)).to(device())
    solve = LoadSolver(placement, device())
    solve.max_rounds = 1
    quota, held, status, _ = solve(load)
    assert status.tolist() == [[Status.NOT_CONVERGED]]
    assert torch.equal(quota.sum(2), load)
    assert int(held.sum()) == int(load.sum())


def test_a_smaller_solver_of_the_same_kernel_leaves_the_larger_its_memory(solver):
    """Both take more shared memory than a kernel has unasked, 48 KiB."""
    rng = np.random.default_rng(6)
    large, small = (Placement(np.tile(np.arange(64), n), 64) for n in (40, 36))
    record, capacities = DEVICE_SOLVERS[solver], [capacity_for(p) for p in (large, small)]
    assert record.variant(capacities[0]) == record.variant(capacities[1])
    assert record.num_shared_bytes(capacities[1], 64, 1) > 48 * 1024
    first = LoadSolver(large, device(), solver)
    LoadSolver(small, device(), solver)
    load = torch.from_numpy(oracle.random_load(rng, 64, 300.0)[None]).int().to(device())
    assert not first(load)[2].any()


def test_loads_that_do_not_fit_are_named():
    solve = LoadSolver(Placement([0, 1, 2, 0], 2), device())
    for load, message in (
        (torch.ones(3).int().cuda(), r"load must be \[B, 3\] int32; got \[3\]"),
        (torch.ones(2, 4).int().cuda(), r"got \[2, 4\]"),
        (torch.ones(2, 3).long().cuda(), "of torch.int64"),
        (torch.ones(2, 3).int(), "on cuda:0; got 2 on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(load)
    spread = torch.arange(12, device=device()).int().reshape(2, 6)[:, ::2]
    assert torch.equal(solve(spread)[0].sum(2), spread)
    assert solve(torch.tensor([[1, -1, 0]], device=device()).int())[2].tolist() == [
        [Status.BAD_COUNTS]
    ]


def test_solve_takes_loads_on_the_gpu(solver):
    rng = np.random.default_rng(5)
    for R in (1, 8, 33):
        placement = oracle.random_placement(rng, R, 90, 2)
        loads = torch.from_numpy(np.stack([oracle.random_load(rng, 90, 300.0) for _ in range(4)]))
        base = torch.from_numpy(rng.integers(0, 20_000, R))
        for options in ({}, {"base_load": base}):
            expected = lplb_ep.solve(loads, placement, "cpu", **options)
            got = lplb_ep.solve(loads.to(device()), placement, solver, **options)
            assert (got.solver, got.num_unfinished) == (solver, 0)
            assert got.quota.device == device()
            assert torch.equal(got.lower_bound.cpu(), expected.lower_bound)
            held = expected.rank_load + options.get("base_load", 0)
            assert torch.equal(
                (got.rank_load.cpu() + options.get("base_load", 0)).amax(1), held.amax(1)
            )
    alone = placement.num_experts * [1]
    load = torch.tensor(alone, device=device())
    assert lplb_ep.solve(load, placement).solver == "flow"
    assert lplb_ep.solve(load.cpu(), placement).solver == "cpu"


def test_more_loads_than_a_launch_takes(monkeypatch):
    rng = np.random.default_rng(8)
    placement = oracle.random_placement(rng, 4, 20, 2)
    loads = torch.from_numpy(np.stack([oracle.random_load(rng, 20, 30.0) for _ in range(8)]))
    monkeypatch.setattr(device_tables, "MAX_BATCH", 3)
    got = lplb_ep.solve(loads.to(device()), placement, "flow")
    assert torch.equal(got.quota.cpu().sum(2), loads)
    assert got.num_unfinished == 0


def test_what_the_gpu_does_not_finish_the_cpu_does(monkeypatch, caplog):
    rng = np.random.default_rng(4)
    placement = oracle.random_placement(rng, 16, 128, 2)
    load = torch.from_numpy(rng.integers(1, 900, (2, 128), np.int32)).to(device())
    monkeypatch.setattr(device_tables, "MAX_ROUNDS", 1)
    assert lplb_ep.solve(load, placement, "flow").num_unfinished == 2
    assert "ran out of rounds on 2 of 2 loads" in caplog.text


def random_options(rng, placement, loads):
    """Base loads, speeds and capacities, in any combination."""
    R, E, C = placement.num_ranks, placement.num_experts, placement.max_replicas
    options = {}
    if rng.random() < 0.5:
        options["base_load"] = torch.from_numpy(rng.integers(0, 20_000, R))
    if rng.random() < 0.6:
        options["speed"] = torch.from_numpy(rng.integers(1, rng.choice([3, 9, 500]), R))
    if rng.random() < 0.6:
        present = placement.copy_rank >= 0
        share = loads.max(0) / np.maximum(1, present.sum(1))
        most = np.ceil(rng.uniform(0.3, 3, (E, C)) * share[:, None]).astype(np.int64)
        most[:, 0] += np.maximum(0, loads.max(0) - (most * present).sum(1))
        options["max_quota"] = torch.from_numpy(np.minimum(most, 2**31 - 1))
    return options


def times(rank_load, options):
    """The exact time of the slowest rank of each batch."""
    base, speed = options.get("base_load", 0), options.get("speed")
    load = (rank_load.cpu() + base).tolist()
    paces = speed.tolist() if speed is not None else [1] * len(load[0])
    return [max(Fraction(n, s) for n, s in zip(row, paces, strict=True)) for row in load]


def check_general(placement, loads, solver, options):
    """Every row by the kernel itself, in as little time as the CPU's."""
    load = torch.from_numpy(loads).to(device(), torch.int32)
    quota, held, status, _ = LoadSolver(placement, device(), solver)(load, **options)
    assert not status.any()
    expected = lplb_ep.solve(torch.from_numpy(loads), placement, "cpu", **options)
    assert times(held, options) == times(expected.rank_load, options)
    assert torch.equal(rank_load(quota.cpu(), placement), held.cpu().long())
    assert torch.equal(quota.sum(2), load)
    assert (quota >= 0).all()
    assert (quota.cpu()[:, torch.tensor(placement.copy_rank < 0)] == 0).all()
    if "max_quota" in options:
        assert (quota.cpu() <= options["max_quota"]).all()


@pytest.mark.parametrize("R", [1, 3, 8, 31, 64])
def test_speeds_and_capacities_are_as_on_the_cpu(R, solver):
    rng = np.random.default_rng(100 + R)
    for _ in range(30):
        E = int(rng.integers(1, 120))
        placement = oracle.random_placement(
            rng, R, E, int(rng.integers(0, 5)), int(rng.integers(1, 9))
        )
        loads = np.stack([oracle.random_load(rng, E, 300.0) for _ in range(4)])
        check_general(placement, loads, solver, random_options(rng, placement, loads))


@pytest.mark.parametrize("R", [1, 8, 64])
def test_speeds_and_capacities_of_two_to_the_31_tokens(R, solver):
    rng = np.random.default_rng(200 + R)
    for _ in range(8):
        placement = oracle.random_placement(rng, R, 96, 2)
        share = rng.lognormal(0, 2, 96)
        load = np.floor(share / share.sum() * (2**31 - 1)).astype(np.int64)
        options = random_options(rng, placement, load[None])
        load[load.argmax()] -= int(options.get("base_load", torch.zeros(1)).sum())
        check_general(placement, load[None], solver, options)


def test_no_loads_at_all():
    placement = Placement([0, 1, 2, 0], 2)
    quota, held, status, _ = LoadSolver(placement, device())(
        torch.empty(0, 3, dtype=torch.int32, device=device())
    )
    assert (len(quota), len(held), len(status)) == (0, 0, 0)
