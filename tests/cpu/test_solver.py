import ast
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

import lplb_ep
from lplb_ep import InfeasibleError, Placement
from lplb_ep.planning import reference as cpu
from lplb_ep.planning import solve as solver
from lplb_ep.planning.solve import rank_set_bound
from lplb_ep.settings import SOLVERS


def tensor(values):
    return None if values is None else torch.from_numpy(np.asarray(values, np.int64))


def solve_and_check(placement, load, base_load=None, speed=None, max_quota=None):
    """Solves, and holds the result against what needs no other solver."""
    options = {
        "base_load": tensor(base_load),
        "speed": tensor(speed),
        "max_quota": tensor(max_quota),
    }
    solution = lplb_ep.solve(tensor(load), placement, **options)
    quota = solution.quota.numpy()
    assert solution.quota.dtype == solution.rank_load.dtype == torch.int32
    assert (quota >= 0).all()
    assert (quota[placement.copy_rank < 0] == 0).all()
    assert (quota.sum(1) == load).all()
    if max_quota is not None:
        assert (quota <= max_quota).all()
    held = np.zeros(placement.num_ranks, np.int64)
    expert, column = np.nonzero(placement.copy_rank >= 0)
    np.add.at(held, placement.copy_rank[expert, column], quota[expert, column])
    assert (solution.rank_load.numpy() == held).all()
    bound = rank_set_bound(solution.tight_ranks, tensor(load), placement, **options)
    assert float(bound) == float(solution.lower_bound)  # the certificate attains it
    total = held + (0 if base_load is None else base_load)
    if speed is None:
        assert total.max() == math.ceil(bound)
        return bound, Fraction(int(total.max()))
    return bound, max(Fraction(int(t), int(s)) for t, s in zip(total, speed, strict=True))


SHAPES = [
    (R, redundant, copies)
    for R in (1, 2, 3, 4, 8, 16, 32, 64)
    for redundant in (0, 1, 2, 4)
    for copies in (1, 2, 8)
]


@pytest.mark.parametrize(("R", "redundant", "copies"), SHAPES)
def test_optimum_equals_an_independent_linear_program(R, redundant, copies):
    rng = np.random.default_rng([R, redundant, copies])
    for _ in range(16):
        E = int(rng.integers(1, 129))
        placement = oracle.random_placement(rng, R, E, redundant, copies)
        load = oracle.random_load(rng, E, float(rng.choice([3, 100, 3000])))
        base = rng.integers(0, 200, R) if rng.random() < 0.25 else None
        bound, _ = solve_and_check(placement, load, base)
        reference = oracle.linear_program(placement, load, base)
        # Fractions over at most 64 ranks: what HiGHS leaves open is far below their spacing.
        assert abs(float(bound) - reference) < 1e-3
        assert math.ceil(bound) == math.ceil(reference - 1e-3)


def test_speeds_and_limits_equal_an_independent_maximum_flow():
    rng = np.random.default_rng(7)
    for _ in range(120):
        R, E = int(rng.integers(1, 7)), int(rng.integers(1, 13))
        placement = oracle.random_placement(rng, R, E, int(rng.integers(0, 4)))
        load = oracle.random_load(rng, E, float(rng.choice([1, 4, 30])))
        base = rng.integers(0, 40, R) if rng.random() < 0.5 else None
        speed = rng.integers(1, 8, R) if rng.random() < 0.7 else None
        limit = None
        if rng.random() < 0.5:
            limit = rng.integers(0, 40, placement.copy_rank.shape) * (placement.copy_rank >= 0)
            limit[:, 0] += np.maximum(0, load - limit.sum(1))
        problem = (placement, load, base, speed, limit)
        bound, time = solve_and_check(*problem)
        assert abs(float(bound) - oracle.linear_program(*problem)) < 1e-6 * max(1, float(bound))
        assert oracle.fits(time, *problem)
        shorter = [
            Fraction(math.ceil(time * int(s)) - 1, int(s))
            for s in (speed if speed is not None else [1])
        ]
        assert not oracle.fits(max(shorter), *problem)


@pytest.mark.parametrize("R", [1, 5, 64])
def test_a_batch_of_two_to_the_31_tokens_is_exact(R):
    rng = np.random.default_rng(R)
    for _ in range(4):
        E = 96
        placement = oracle.random_placement(rng, R, E, 2)
        share = rng.lognormal(0, 2, E)
        load = np.floor(share / share.sum() * (2**31 - 1)).astype(np.int64)
        load[0] += 2**31 - 1 - load.sum()
        base = None
        if rng.random() < 0.5:
            base = np.zeros(R, np.int64)
            base[-1], load[load.argmax()] = 10**8, load.max() - 10**8
        _, time = solve_and_check(placement, load, base)
        assert oracle.fits(time, placement, load, base)
        assert not oracle.fits(time - 1, placement, load, base)


def test_each_component_reaches_its_own_optimum():
    rng = np.random.default_rng(3)
    parts = [oracle.random_placement(rng, 4, 12, 1) for _ in range(3)]
    table = np.concatenate(
        [np.where(p.physical_to_logical < 0, -1, p.physical_to_logical + 12 * i)
         for i, p in enumerate(parts)]
    )  # fmt: skip
    whole = Placement(table, 12, num_experts=36)
    assert whole.component.max() >= 2
    for _ in range(50):
        load = oracle.random_load(rng, 36, 50.0)
        solution = lplb_ep.solve(tensor(load), whole)
        bounds = []
        for i, part in enumerate(parts):
            alone = lplb_ep.solve(tensor(load[12 * i : 12 * i + 12]), part)
            bounds.append(float(alone.lower_bound))
            assert solution.rank_load[4 * i : 4 * i + 4].max() == alone.rank_load.max()
        assert float(solution.lower_bound) == max(bounds)


def test_a_batch_is_its_rows_and_keeps_dtype_shapes():
    rng = np.random.default_rng(5)
    placement = oracle.random_placement(rng, 8, 40, 2)
    loads = torch.stack([tensor(oracle.random_load(rng, 40)) for _ in range(6)]).int()
    together = lplb_ep.solve(loads, placement)
    for b, load in enumerate(loads):
        alone = lplb_ep.solve(load, placement)
        for field in ("quota", "rank_load", "lower_bound", "tight_ranks"):
            assert torch.equal(getattr(together, field)[b], getattr(alone, field))
    none = lplb_ep.solve(loads[:0], placement)
    assert none.quota.shape == (0, 40, placement.max_replicas)
    assert none.lower_bound.shape == (0,)


def test_known_optima():
    def best(table, R, load):
        return lplb_ep.solve(tensor(load), Placement(table, R)).rank_load.tolist()

    assert max(best([0, 1, 1, 0], 2, [7, 4])) == 6  # everything on every rank: the mean, rounded up
    assert best([0, 1, 2, 3], 2, [9, 1, 2, 3]) == [10, 5]  # nothing can move
    assert max(best([0, 1, 0, 2, 0, 3], 3, [90, 0, 0, 0])) == 30  # one hot expert, three copies
    # A chain: rank 0 is relieved through rank 1, which has no slack of its own, by rank 2.
    assert best([0, 1, 0, 2, 2, 3], 3, [10, 2, 6, 0]) == [6, 6, 6]
    # The second copy on a rank counts for nothing.
    assert best([0, 0, 1, 2], 2, [8, 1, 1]) == [8, 2]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("load", torch.tensor([1.0, 2.0, 3.0, 4.0]), "load must be integers; got torch.float32"),
        ("load", torch.tensor([1, 2, 3]), r"load must have shape \[4\] or \[B, 4\]; got \[3\]"),
        ("load", torch.tensor([1, 2, 3, -4]), r"load must be in \[0, 2147483647\]; got -4"),
        ("load", torch.tensor([2**62, 2**62, 0, 0]), "load must be in"),
        ("load", torch.tensor([2**31 - 1, 1, 0, 0]), "load must total at most 2147483647"),
        ("base_load", torch.tensor([1]), r"base_load must have shape \[2\]"),
        ("base_load", torch.tensor([2**31 - 1, 0]), "load must total at most"),
        ("speed", torch.tensor([1, 0]), r"speed must be in \[1, "),
        ("speed", torch.tensor([1, 40000]), "speed must sum to at most 32767"),
        ("max_quota", torch.tensor([[1, 2]]), r"max_quota must have shape \[4, 2\]"),
        ("solver", "gpu", f"solver must be one of {', '.join(SOLVERS)}; got 'gpu'"),
    ],
)
def test_bad_input_is_named(name, value, message):
    placement = Placement([0, 1, 2, 3, 0, -1], 2)
    arguments = {"load": torch.tensor([1, 2, 3, 4]), name: value}
    with pytest.raises(ValueError, match=message):
        lplb_ep.solve(placement=placement, **arguments)


def test_limits_below_the_load_are_refused_by_expert():
    placement = Placement([0, 1, 2, 3, 0, -1], 2)
    limit = torch.full((4, 2), 3)
    with pytest.raises(InfeasibleError, match=r"expert 0 has 7 tokens.* sum to only 6"):
        lplb_ep.solve(torch.tensor([7, 1, 1, 1]), placement, max_quota=limit)
    with pytest.raises(InfeasibleError, match=r"expert 1 has 4 tokens.* sum to only 3"):
        lplb_ep.solve(torch.tensor([1, 4, 1, 1]), placement, max_quota=limit)


def test_the_judge_does_not_know_the_accused():
    tree = ast.parse((Path(__file__).parents[1] / "oracle.py").read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {"lplb_ep.placement.table"} == {m for m in modules if m.startswith("lplb_ep")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_a_solver_on_the_gpu_says_what_is_missing():
    load, placement = torch.ones(3).int(), Placement([0, 1, 2, 0], 2)
    with pytest.raises(lplb_ep.MissingPackageError, match="there is no CUDA device"):
        lplb_ep.solve(load, placement, "flow")
    assert lplb_ep.solve(load, placement).solver == "cpu"


def test_a_proof_starts_from_any_quotas():
    rng = np.random.default_rng(9)
    for _ in range(50):
        placement = oracle.random_placement(rng, int(rng.integers(1, 20)), 40, 2)
        load = torch.from_numpy(oracle.random_load(rng, 40, 300.0))
        best = cpu.solve(load, placement)
        for start in (
            best.quota,
            torch.nn.functional.pad(load[:, None], (0, best.quota.shape[1] - 1)),
        ):
            again = cpu.solve(load, placement, start=start)
            assert again.bound == best.bound
            assert torch.equal(again.quota.sum(1), load.int())


def answering(monkeypatch, quotas):
    """As if a GPU's solver answered with `quotas`."""
    monkeypatch.setattr(solver, "choose_solver", lambda *_, **__: ("flow", "asked for"))
    no_guests = torch.zeros(len(quotas), PAIR.num_ranks, 0, dtype=torch.int32)
    monkeypatch.setattr(solver, "solve_on_device", lambda *_: (quotas, no_guests))


PAIR = Placement([0, 1, 2, 0], 2)


def test_loads_that_the_gpu_does_not_finish_are_said_and_counted(monkeypatch, caplog):
    loads = torch.tensor([[4, 1, 1], [5, 0, 3]])
    right = lplb_ep.solve(loads, PAIR, "cpu")
    assert right.num_unfinished == 0
    answering(monkeypatch, [None, right.quota[1]])
    solution = lplb_ep.solve(loads, PAIR, "flow")
    assert torch.equal(solution.quota, right.quota)
    assert (solution.solver, solution.num_unfinished) == ("flow", 1)
    assert "the solver flow ran out of rounds on 1 of 2 loads" in caplog.text


@pytest.mark.parametrize(
    ("quota", "options", "message"),
    [
        ([[4, 0], [1, 0], [1, 0]], {}, "reached 5; the optimum is 3"),
        (
            [[4, 0], [1, 0], [1, 0]],
            {"base_load": torch.tensor([2, 0])},
            "reached 7; the opt.* is 4",
        ),
        ([[2, 2], [1, 0], [1, 0]], {"speed": torch.tensor([1, 5])}, "reached 3; the optimum is 1"),
        (
            [[2, 2], [1, 0], [1, 0]],
            {"max_quota": torch.tensor([[4, 1]] * 3)},
            "beyond their limits",
        ),
        ([[2, 1], [1, 0], [1, 0]], {}, "of another load"),
        ([[5, -1], [1, 0], [1, 0]], {}, "beyond their limits"),
        ([[2, 2], [0, 1], [1, 0]], {}, "beyond their limits"),
    ],
)
def test_quotas_of_the_gpu_are_held_against_the_optimum(monkeypatch, quota, options, message):
    answering(monkeypatch, [torch.tensor(quota).int()])
    with pytest.raises(AssertionError, match=message):
        lplb_ep.solve(torch.tensor([4, 1, 1]), PAIR, "flow", **options)


INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_arrays_tensors_and_lists_of_any_integers_are_alike(dtype):
    placement = Placement([0, 1, 2, 3, 0, 2], 2)
    given = {"load": [90, 20, 7, 3], "base_load": [5, 0], "speed": [1, 2]}
    expected = lplb_ep.solve(**{k: torch.tensor(v) for k, v in given.items()}, placement=placement)
    for make in (np.asarray, lambda v, dtype: torch.from_numpy(np.asarray(v, dtype)), list_of):
        found = lplb_ep.solve(**{k: make(v, dtype) for k, v in given.items()}, placement=placement)
        assert found.quota.equal(expected.quota)
        assert found.lower_bound == expected.lower_bound


def list_of(values, dtype):
    return [dtype(value) for value in values]


@pytest.mark.parametrize(
    ("load", "error", "says"),
    [
        ([[1, 2], [3]], ValueError, "load must be rows of equal length"),
        ([1.5, 2.0, 3.0, 4.0], ValueError, "load must be integers; got float64"),
        (np.ones(4, bool), ValueError, "load must be integers; got bool"),
        (np.array([2**63, 0, 0, 0], np.uint64), ValueError, r"load must be in \[0, 2147483647\]"),
        (["a"] * 4, ValueError, "load must be integers"),
        ("1234", TypeError, "load must be a tensor, an array or lists of integers; got a str"),
        (None, TypeError, "load must be a tensor, an array or lists of integers; got a None"),
        (7, TypeError, "load must be a tensor, an array or lists of integers; got a int"),
    ],
)
def test_what_is_no_load_is_named(load, error, says):
    with pytest.raises(error, match=says):
        lplb_ep.solve(load, Placement([0, 1, 2, 3], 2))


def test_a_solution_says_what_it_comes_to():
    placement = Placement([0, 1, 2, 0], 2)
    one = lplb_ep.solve([9, 1, 2], placement)
    assert repr(one) == "Solution(tokens by cpu, largest rank 6, bound 6)"
    assert repr(lplb_ep.solve([[9, 1, 2], [3, 0, 0]], placement)).startswith(
        "Solution(2 loads, tokens by"
    )
    assert "0 loads" in repr(lplb_ep.solve(np.zeros((0, 3), int), placement))
