"""`solve`: the exact linear program of a batch, by whichever solver; input and result checked."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from ..errors import InfeasibleError, MissingPackageError
from ..placement.table import Placement, check_placement
from . import device as cuda
from . import reference as cpu
from .structs import MAX_TOTAL

log = logging.getLogger(__name__)

SOLVERS = ("auto", "cpu", "flow", "cusolverdx")
MAX_TOTAL_SPEED = 2**15 - 1


@dataclass(frozen=True)
class Solution:
    """Quotas that no plan on the placement can better, and the proof."""

    quota: torch.Tensor
    """[.., E, C] int32: tokens of each copy; rows sum to the expert's load."""
    rank_load: torch.Tensor
    """[.., R] int32: tokens of each rank, base loads not included."""
    lower_bound: torch.Tensor
    """[..] float64: T*, the optimum of the linear program. At unit speed the largest of
    `rank_load` + `base_load` is exactly ceil(T*)."""
    tight_ranks: torch.Tensor
    """[.., R] bool: the certificate. What these ranks must keep between them, whatever the plan
    (see `must_keep`), is T* times the sum of their speeds."""
    solver: str
    """The solver that ran."""
    num_unfinished: int
    """Loads that it ran out of rounds on, and that the CPU solved in its place."""


def choose_solver(
    solver: str, placement: Placement | None = None, refreshable: bool = False
) -> tuple[str, str]:
    """The solver that runs for a request, and why.

    A function of the request, the placement and what is installed, never of a measurement: ranks
    that chose differently would plan differently.

    Args:
        solver: one of `SOLVERS`.
        placement: the copies; None: any that fits.
        refreshable: whether other replicas will replace these.

    Raises:
        ValueError: `solver` is not one of `SOLVERS`, or the placement is too large for it.
        MissingPackageError: `solver` needs a device or a package that is not there.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    if solver == "cpu":
        return solver, "asked for"
    try:
        cuda.check(placement, "flow" if solver == "auto" else solver, refreshable)
    except (MissingPackageError, ValueError) as error:
        if solver != "auto":
            raise
        return "cpu", str(error)
    return ("flow", "a CUDA device is there") if solver == "auto" else (solver, "asked for")


def solver_fact(solver: str, placement: Placement | None = None, refreshable: bool = False) -> str:
    """What ranks must agree on: the solver of a request, and the GPU that it runs on.

    Raises:
        ValueError, MissingPackageError: as `choose_solver`.
    """
    name, _ = choose_solver(solver, placement, refreshable)
    if name == "cpu":
        return name
    major, minor = torch.cuda.get_device_capability()
    return f"{name} on sm_{major}{minor}"


def solve(
    load: torch.Tensor,
    placement: Placement,
    solver: str = "auto",
    *,
    base_load: torch.Tensor | None = None,
    speed: torch.Tensor | None = None,
    max_quota: torch.Tensor | None = None,
) -> Solution:
    """Spreads each expert's load over its copies so that the slowest rank is as fast as can be.

    minimise T subject to sum_c quota[e, c] = load[e] and, for each rank r,
    (sum of quotas on r + base_load[r]) / speed[r] <= T, over whole non-negative quotas. The
    problem is a flow's, so at unit speed the whole-numbered optimum is T* rounded up, exactly.

    The bound and its certificate are always found on the CPU, and quotas of the GPU held against
    what the CPU makes of them; a planner on the GPU (`Planner`) does without. A load that the GPU's
    solver runs out of rounds on is logged, counted and solved on the CPU.

    Args:
        load: [E] or [B, E] int32 or int64, tokens of each logical expert; any device. A batch's
            total, base loads included, is at most 2**31 - 1.
        placement: the copies.
        solver: who makes the quotas, one of `SOLVERS`. "auto" is the CPU for a load on the CPU.
        base_load: [R] integers, tokens that stay on each rank (a shared expert's, say); default 0.
        speed: [R] positive integers, relative speeds that sum to at most 32767; default 1.
        max_quota: [E, C] integers, the most tokens for each copy; default: no limit.

    Returns:
        A `Solution` on the device of `load`, with a leading B where `load` has one.

    Raises:
        TypeError: an argument is no tensor, or `placement` is not one.
        ValueError: an argument's shape, dtype or range; the message names it.
        MissingPackageError: the solver needs a GPU or a package that is not there.
        InfeasibleError: an expert whose copies' `max_quota` sum below its load.
        AssertionError: the solver's quotas are not those of an optimum.
    """
    check_placement(placement)
    name, _ = choose_solver(solver, placement)
    R, E = placement.num_ranks, placement.num_experts
    C = placement.max_replicas
    _check_tensor("load", load)
    if load.ndim not in (1, 2) or load.shape[-1] != E:
        raise ValueError(f"load must have shape [{E}] or [B, {E}]; got {list(load.shape)}")
    loads = _whole("load", load, load.shape).reshape(-1, E)
    options = {
        "base_load": None if base_load is None else _whole("base_load", base_load, (R,)),
        "speed": None if speed is None else _whole("speed", speed, (R,), at_least=1),
        "max_quota": None if max_quota is None else _whole("max_quota", max_quota, (E, C)),
    }
    _check_totals(loads, placement, **options)
    if solver == "auto" and load.device.type == "cpu":
        name = "cpu"
    quotas: list[torch.Tensor | None] = [None] * len(loads)
    if name != "cpu" and len(loads):
        quotas = _solve_on_gpu(loads, placement, name, options)
    num_unfinished = 0 if name == "cpu" else sum(quota is None for quota in quotas)
    if num_unfinished:
        log.warning(
            "the solver %s ran out of rounds on %d of %d loads, which the CPU solves: please "
            "report them",
            name,
            num_unfinished,
            len(loads),
        )
    optima = [
        _prove(name, row, quota, placement, options)
        for row, quota in zip(loads, quotas, strict=True)
    ]
    all_quotas = torch.stack([o.quota for o in optima]) if optima else torch.zeros(0, E, C).int()
    bounds = torch.tensor([float(o.bound) for o in optima], dtype=torch.float64)
    tight = torch.stack([o.tight_ranks for o in optima]) if optima else torch.zeros(0, R).bool()
    shape, device = load.shape[:-1], load.device
    return Solution(
        all_quotas.reshape(*shape, E, C).to(device),
        rank_load(all_quotas, placement).reshape(*shape, R).int().to(device),
        bounds.reshape(shape).to(device),
        tight.reshape(*shape, R).to(device),
        name,
        num_unfinished,
    )


def _solve_on_gpu(
    loads: torch.Tensor,
    placement: Placement,
    solver: str,
    options: Mapping[str, torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """[B] of [E, C] int32 on the CPU, None where the solver ran out of rounds."""
    device = torch.device("cuda", torch.cuda.current_device())
    solve_batch = cuda.Solver(placement, device, solver)
    quotas: list[torch.Tensor | None] = []
    for part in loads.split(cuda.MAX_BATCH):
        quota, _, status = solve_batch(part.to(device, torch.int32), **options)
        ended = (status == 0).all(1).tolist()
        quotas += [q if ok else None for q, ok in zip(quota.cpu(), ended, strict=True)]
    return quotas


def _prove(
    solver: str,
    load: torch.Tensor,
    quota: torch.Tensor | None,
    placement: Placement,
    options: Mapping[str, torch.Tensor | None],
) -> cpu.Optimum:
    """The proof of a solver's quotas, with these quotas; None: with those that the CPU finds.

    Raises:
        AssertionError: they are no optimum.
    """
    if quota is not None:
        most = options["max_quota"]
        room = torch.tensor(placement.copy_rank >= 0) * (MAX_TOTAL if most is None else most)
        legal = ((quota >= 0) & (quota <= room)).all() and (quota.sum(1) == load).all()
        assert legal, f"the {solver} solver made quotas beyond their limits, or of another load"
    optimum = cpu.solve(load, placement, start=quota, **options)
    best: Fraction | int = math.ceil(optimum.bound)
    if options["speed"] is not None:
        best = _slowest(optimum.quota, placement, options)
    if quota is not None:
        optimum = replace(optimum, quota=quota)
    reached = _slowest(optimum.quota, placement, options)
    assert reached == best, f"the {solver} solver reached {reached}; the optimum is {best}"
    return optimum


def _slowest(
    quota: torch.Tensor, placement: Placement, options: Mapping[str, torch.Tensor | None]
) -> Fraction:
    """The time of the slowest rank."""
    base, speed = options["base_load"], options["speed"]
    load = rank_load(quota, placement) + (0 if base is None else base)
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
    """The lower bound that a set of ranks proves: what they must keep over what they can do.

    An expert's tokens must stay within the set as far as its copies outside cannot take them. The
    maximum over all sets is T*: this is the linear program's dual, and `Solution.tight_ranks`
    attains it.

    Args:
        ranks: [R] bool, the set; not empty.
        load: [E] integers, and the rest as for `solve`; on the CPU.
    """
    inside = ranks.numpy()
    outside = torch.tensor((placement.copy_rank >= 0) & ~inside[placement.copy_rank])
    room = outside.long() * (MAX_TOTAL if max_quota is None else max_quota.long())
    kept = int((load.long() - room.sum(1)).clamp(min=0).sum())
    kept += 0 if base_load is None else int(base_load[ranks].sum())
    return Fraction(kept, int(ranks.sum()) if speed is None else int(speed[ranks].sum()))


def _check_totals(
    loads: torch.Tensor,
    placement: Placement,
    base_load: torch.Tensor | None,
    speed: torch.Tensor | None,
    max_quota: torch.Tensor | None,
) -> None:
    total = max(loads.sum(1).tolist(), default=0)
    total += 0 if base_load is None else int(base_load.sum())
    if total > MAX_TOTAL:
        raise ValueError(f"load must total at most {MAX_TOTAL} with base_load; got {total}")
    if speed is not None and int(speed.sum()) > MAX_TOTAL_SPEED:
        raise ValueError(f"speed must sum to at most {MAX_TOTAL_SPEED}; got {int(speed.sum())}")
    if max_quota is not None:
        room = (max_quota * torch.tensor(placement.copy_rank >= 0)).sum(1)
        short = torch.nonzero(room < loads)
        if len(short):
            b, e = short[0].tolist()
            raise InfeasibleError(
                f"expert {e} has {loads[b, e]} tokens, and its copies' max_quota sum to only "
                f"{int(room[e])}"
            )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got a {type(value).__name__}")


def _whole(
    name: str, value: torch.Tensor, shape: tuple[int, ...], at_least: int = 0
) -> torch.Tensor:
    """`value` as int64 on the CPU, checked."""
    _check_tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64; got {value.dtype}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(value.shape)}")
    out = value.detach().cpu().long()
    wrong = out[(out < at_least) | (out > MAX_TOTAL)]
    if len(wrong):
        raise ValueError(f"{name} must be in [{at_least}, {MAX_TOTAL}]; got {int(wrong[0])}")
    return out
