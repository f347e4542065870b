"""`solve`: the plan of a batch's load, by any solver, with checks of input and result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from ..cost import CostModel
from ..logs import logger
from ..placement.table import Placement, check_placement
from ..problem import MAX_TOTAL, Integers, Problem, as_integers
from ..settings import Settings
from . import reference
from .device_tables import solve_on_device
from .guests_by_cost import guests_of, plan_load, push_waits
from .solvers import choose_solver
from .values import Reached
from .values import reached as reached_by_objective

log = logger(__name__)


@dataclass(frozen=True, repr=False)
class Solution:
    """Quotas, and a bound that proves their quality. By `tokens` no plan on the placement is
    better, and by `experts` none has fewer active slots on its fullest rank."""

    quota: torch.Tensor
    """[.., E, C] int32: tokens of each copy; rows sum to the expert's load."""
    rank_load: torch.Tensor
    """[.., R] int32: tokens of each rank, base loads not included."""
    lower_bound: torch.Tensor
    """[..] float64: no plan on the placement has less on its largest rank, in the unit of the
    objective. By `tokens` it is T*, the optimum of the linear program. At unit speed the largest of
    `rank_load` + `base_load` is exactly ceil(T*), and so are active slots by `experts`."""
    tight_ranks: torch.Tensor
    """[.., R] bool: the certificate. The load that these ranks must keep in any plan (see
    `rank_set_bound`) is T* times the sum of their speeds."""
    reached: torch.Tensor
    """[..] float64: the value of the largest rank by these quotas, in the same unit: tokens over
    speed, active slots, or nanoseconds. Base loads are included."""
    objective: str
    """The objective by which the quotas were found."""
    guests: torch.Tensor
    """[.., R, G] int32: the expert that each guest slot holds, -1 = none. Quotas, T* and its
    certificate are those of `placement.with_guests(guests)`."""
    solver: str
    """The solver that ran."""
    num_unfinished: int
    """Loads on which the solver ran out of rounds, and which the CPU solved instead."""

    def __repr__(self) -> str:
        """What the largest rank has, beside the bound; of several loads the largest of each."""
        number = self.reached.numel()
        value, bound = (float(x.max()) if number else 0.0 for x in (self.reached, self.lower_bound))
        of = "" if not self.reached.ndim else f"{number} loads, "
        return (
            f"Solution({of}{self.objective} by {self.solver}, largest rank {value:g}, bound "
            f"{bound:g})"
        )


def solve(
    load: Integers,
    placement: Placement,
    solver: str = "auto",
    *,
    base_load: Integers | None = None,
    speed: Integers | None = None,
    max_quota: Integers | None = None,
    guest_tolerance: float | None = None,
    guest_min_tokens: int | None = None,
    objective: str | None = None,
    cost: CostModel | None = None,
) -> Solution:
    """Splits each expert's load over its copies so that the slowest rank is as fast as possible.

    Where the placement has guest slots, they are filled for each load first (`choose_guests`; by
    cost `plan_by_cost`).

    minimise T subject to sum_c quota[e, c] = load[e] and
    (sum of quotas on r + base_load[r]) / speed[r] <= T for each rank r.

    Quotas are whole, not negative, and at most `max_quota`. This is a flow problem, so at unit
    speed the whole-numbered optimum is T* rounded up, exactly. With another objective than
    `tokens`, quotas are those of `quotas_by_objective`.

    The CPU always finds the bound and its certificate, and proves a GPU's quotas by them. A
    `Planner` on a GPU skips the proof. A load on which the GPU's solver runs out of rounds is
    logged, counted and solved on the CPU.

    Args:
        load: [E] or [B, E] integers, tokens of each logical expert: a tensor on any device, an
            array or lists. A batch's total, base loads included, is at most 2**31 - 1.
        placement: the copies.
        solver: one of `SOLVERS`. "auto" is the CPU for a load on the CPU.
        base_load: [R] integers, tokens that stay on each rank, such as a shared expert's; default
            0.
        speed: [R] positive integers, relative speeds that sum to at most 32767; default 1.
        max_quota: [E, C] integers, the most tokens for each copy; default: no limit. It excludes
            guest slots.
        guest_tolerance, guest_min_tokens: when guests are taken, as in `Problem`.
        objective, cost: as in `Problem`.

    Returns:
        A `Solution` on the device of `load`, with a leading B where `load` has one.

    Raises:
        TypeError: an argument is no tensor, array or list, or `placement` is not one.
        ValueError: an argument's shape, dtype or range; the message names it.
        MissingPackageError: the solver needs a GPU or a package that is not there.
        InfeasibleError: an expert whose copies' `max_quota` sum below its load.
        AssertionError: the solver's quotas are not those of an optimum.
    """
    check_placement(placement)
    load = as_integers("load", load)
    bounds = {"base_load": base_load, "speed": speed, "max_quota": max_quota}
    if solver == "auto" and load.device.type == "cpu":
        solver = "cpu"
    name, _ = choose_solver(solver, placement, objective=objective or Settings.objective)
    R, E, C = placement.num_ranks, placement.num_experts, placement.max_replicas
    G = placement.num_guests_per_rank
    problem = Problem(
        load,
        **{name: None if v is None else as_integers(name, v) for name, v in bounds.items()},
        guest_tolerance=guest_tolerance,
        guest_min_tokens=guest_min_tokens,
        objective=objective,
        cost=cost,
        min_gain=0,
    ).checked(placement)
    loads = problem.load
    assert loads is not None, "a load that is None is refused"
    quotas, guests, num_unfinished = _made_by(name, loads, placement, problem)
    filled = [placement.with_guests(chosen) if chosen.size else placement for chosen in guests]
    reached = [
        _prove(name, row, quota, one, problem, push_waits(chosen, placement, problem))
        for row, quota, one, chosen in zip(loads, quotas, filled, guests, strict=True)
    ]
    loaded = [rank_load(quota, one) for quota, one in zip(quotas, filled, strict=True)]
    shape, device = load.shape[:-1], load.device

    def stacked(rows: list[torch.Tensor], *of_load: int) -> torch.Tensor:
        whole = torch.stack(rows) if rows else torch.zeros(0, *of_load)
        return whole.reshape(*shape, *of_load).to(device)

    def numbers(values: list[Fraction | int]) -> torch.Tensor:
        as_floats = torch.tensor([float(value) for value in values], dtype=torch.float64)
        return as_floats.reshape(shape).to(device)

    return Solution(
        stacked(quotas, E, C).int(),
        stacked(loaded, R).int(),
        numbers([how.bound for how in reached]),
        stacked([how.tight_ranks for how in reached], R).bool(),
        numbers([how.value for how in reached]),
        problem.objective_name,
        stacked([torch.from_numpy(chosen) for chosen in guests], R, G).int(),
        name,
        num_unfinished,
    )


def _made_by(
    solver: str, loads: torch.Tensor, placement: Placement, problem: Problem
) -> tuple[list[torch.Tensor], list[npt.NDArray[np.int32]], int]:
    """The quotas of each load and its guests; and for how many loads the CPU made them instead."""
    rows = loads.numpy()
    if solver == "cpu" or not len(rows):
        planned = [plan_load(row, placement, problem) for row in rows]
        return [_as_tensor(one.quota) for one in planned], [one.guests for one in planned], 0
    quotas, chosen = solve_on_device(loads, placement, solver, problem)
    guests = [guests_of(row, placement, problem) for row in rows]
    wrong = np.flatnonzero((chosen.numpy() != np.array(guests)).any(axis=(1, 2)))
    assert not wrong.size, f"the {solver} solver chose other guests than the CPU for load {wrong}"
    num_unfinished = sum(quota is None for quota in quotas)
    if num_unfinished:
        log.warning(
            "the solver %s ran out of rounds on %d of %d loads, which the CPU solves: please "
            "report them",
            solver,
            num_unfinished,
            len(loads),
        )
    made = [
        _as_tensor(plan_load(row, placement, problem).quota) if quota is None else quota
        for row, quota in zip(rows, quotas, strict=True)
    ]
    return made, guests, num_unfinished


def _as_tensor(quota: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(quota.astype(np.int32))


def _prove(
    solver: str,
    load: torch.Tensor,
    quota: torch.Tensor,
    placement: Placement,
    problem: Problem,
    waits: npt.NDArray[np.int64],
) -> Reached:
    """The proof of a solver's quotas.

    Raises:
        AssertionError: they are not what the objective asks for.
    """
    most = MAX_TOTAL if problem.max_quota is None else problem.max_quota
    capacity = torch.tensor(placement.copy_rank >= 0) * most
    legal = ((quota >= 0) & (quota <= capacity)).all() and (quota.sum(1) == load).all()
    assert legal, f"the {solver} solver made quotas beyond their limits, or of another load"
    how = judge(quota, load, placement, problem, waits)
    best = least_value(how, quota, load, placement, problem)
    assert best is None or how.value == best, (
        f"the {solver} solver reached {how.value}; the optimum is {best}"
    )
    return how


def judge(
    quota: torch.Tensor,
    load: torch.Tensor,
    placement: Placement,
    problem: Problem,
    waits: npt.NDArray[np.int64] | int = 0,
    on_ranks: torch.Tensor | None = None,
) -> Reached:
    """The value of quotas [E, C] of a load [E] by the problem's objective, and the bound.

    `waits` [R] are those of `push_waits`. `on_ranks` [R] is the load of each rank; None: that of
    the quotas. Where it is given, quotas of tokens may be 0: they are not known.
    """
    if problem.objective_name != "tokens":
        arrays = quota.numpy().astype(np.int64), load.numpy().astype(np.int64)
        return reached_by_objective(*arrays, placement, problem, waits)
    start = quota if quota.sum(1).equal(load) else None
    optimum = reference.solve(load, placement, start=start, **problem.bounds)
    value = slowest_time(rank_load(quota, placement) if on_ranks is None else on_ranks, problem)
    return Reached(value, optimum.bound, optimum.tight_ranks)


def least_value(
    how: Reached,
    quota: torch.Tensor,
    load: torch.Tensor,
    placement: Placement,
    problem: Problem,
) -> Fraction | int | None:
    """The value that a plan must reach, by its judgement; None: any, since costs have no exact
    plan."""
    if problem.objective_name in ("cost", "auto"):
        return None
    if problem.speed is None:
        return math.ceil(how.bound)
    optimum = reference.solve(load, placement, start=quota, **problem.bounds)
    return slowest_time(rank_load(optimum.quota, placement), problem)


def slowest_time(on_ranks: torch.Tensor, problem: Problem) -> Fraction:
    """The time of the slowest rank, by loads [R] on the CPU, base loads not included."""
    base, speed = problem.base_load, problem.speed
    load = on_ranks.long() + (0 if base is None else base)
    paces = [1] * len(load) if speed is None else speed.tolist()
    return max(Fraction(n, s) for n, s in zip(load.tolist(), paces, strict=True))


def rank_load(quota: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Tokens of each rank.

    Args:
        quota: [.., E, C] integers on the CPU.
        placement: the copies.

    Returns:
        [.., R] int64.
    """
    rank = torch.tensor(placement.copy_rank).long().clamp(min=0).flatten()
    out = torch.zeros(*quota.shape[:-2], placement.num_ranks, dtype=torch.int64)
    return out.index_add_(-1, rank, quota.flatten(-2).long())


def rank_set_bound(
    ranks: torch.Tensor,
    load: torch.Tensor,
    placement: Placement,
    *,
    base_load: torch.Tensor | None = None,
    speed: torch.Tensor | None = None,
    max_quota: torch.Tensor | None = None,
) -> Fraction:
    """The lower bound that a set of ranks proves: the load that they must keep over their speed.

    An expert must keep the tokens in the set that its copies outside cannot take. The maximum over
    all sets is T*: this is the linear program's dual, and `Solution.tight_ranks` attains it.

    Args:
        ranks: [R] bool, the set; not empty.
        load: [E] integers, and the rest as for `solve`; on the CPU.
    """
    inside = ranks.numpy()
    outside = torch.tensor((placement.copy_rank >= 0) & ~inside[placement.copy_rank])
    capacity = outside.long() * (MAX_TOTAL if max_quota is None else max_quota.long())
    kept = int((load.long() - capacity.sum(1)).clamp(min=0).sum())
    kept += 0 if base_load is None else int(base_load[ranks].sum())
    return Fraction(kept, int(ranks.sum()) if speed is None else int(speed[ranks].sum()))
