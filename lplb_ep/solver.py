"""`solve`: the exact linear program of a batch, by whichever solver; input and result checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch

from . import cpu, cuda
from .placement import Placement, check_placement
from .settings import InfeasibleError, MissingPackageError

SOLVERS = ("auto", "cpu", "flow", "cusolverdx")
MAX_TOTAL = 2**31 - 1
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


def choose_solver(solver: str, placement: Placement | None = None) -> tuple[str, str]:
    """The solver that runs for a request, and why.

    A function of the request, the placement and what is installed, never of a measurement: ranks
    that chose differently would plan differently.

    Args:
        solver: one of `SOLVERS`.
        placement: the copies; None: any that fits.

    Raises:
        ValueError: `solver` is not one of `SOLVERS`, or the placement is too large for it.
        MissingPackageError: `solver` needs a device or a package that is not there.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    if solver == "cpu":
        return solver, "asked for"
    try:
        cuda.check(placement, "flow" if solver == "auto" else solver)
    except (MissingPackageError, ValueError) as error:
        if solver != "auto":
            raise
        return "cpu", str(error)
    return ("flow", "a CUDA device is there") if solver == "auto" else (solver, "asked for")


def solver_fact(solver: str, placement: Placement | None = None) -> str:
    """What ranks must agree on: the solver of a request, and the GPU that it runs on.

    Raises:
        ValueError, MissingPackageError: as `choose_solver`.
    """
    name, _ = choose_solver(solver, placement)
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

    The bound and its certificate are always found, and the result held against them, on the CPU;
    a planner on the GPU (`Planner`) does without.

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
    """
    check_placement(placement)
    name, _ = choose_solver(solver, placement)
    R, E = placement.num_ranks, placement.num_experts
    C = placement.max_replicas
    _check_tensor("load", load)
    if load.ndim not in (1, 2) or load.shape[-1] != E:
        raise ValueError(f"load must have shape [{E}] or [B, {E}]; got {list(load.shape)}")
    loads = _whole("load", load, load.shape).reshape(-1, E)
    base = None if base_load is None else _whole("base_load", base_load, (R,))
    speeds = None if speed is None else _whole("speed", speed, (R,), at_least=1)
    most = None if max_quota is None else _whole("max_quota", max_quota, (E, C))
    total = max(loads.sum(1).tolist(), default=0) + (0 if base is None else int(base.sum()))
    if total > MAX_TOTAL:
        raise ValueError(f"load must total at most {MAX_TOTAL} with base_load; got {total}")
    if speeds is not None and int(speeds.sum()) > MAX_TOTAL_SPEED:
        raise ValueError(f"speed must sum to at most {MAX_TOTAL_SPEED}; got {int(speeds.sum())}")
    if most is not None:
        present = torch.tensor(placement.copy_rank >= 0)
        short = torch.nonzero((most * present).sum(1) < loads)
        if len(short):
            b, e = short[0].tolist()
            raise InfeasibleError(
                f"expert {e} has {loads[b, e]} tokens, and its copies' max_quota sum to only "
                f"{int((most * present)[e].sum())}"
            )

    if solver == "auto" and load.device.type == "cpu":
        name = "cpu"
    options = {"base_load": base, "speed": speeds, "max_quota": most}
    starts: list[torch.Tensor | None] = [None] * len(loads)
    if name != "cpu" and len(loads):
        starts = _solve_on_gpu(loads, placement, name, options)
    # From the GPU's optimum the CPU finds the proof only; what the GPU did not end, it does.
    optima = [
        cpu.solve(row, placement, start=start, **options)
        for row, start in zip(loads, starts, strict=True)
    ]
    quotas = [o.quota if q is None else q for o, q in zip(optima, starts, strict=True)]
    quota = torch.stack(quotas) if quotas else torch.zeros(0, E, C).int()
    bounds = torch.tensor([float(o.bound) for o in optima], dtype=torch.float64)
    tight = torch.stack([o.tight_ranks for o in optima]) if optima else torch.zeros(0, R).bool()
    held = rank_load(quota, placement)
    if speeds is None:
        reached = (held + (0 if base is None else base)).amax(1)
        assert reached.tolist() == [math.ceil(o.bound) for o in optima], (
            f"the {name} solver reached {reached.tolist()}, the bounds are {bounds.tolist()}"
        )
    shape, device = load.shape[:-1], load.device
    return Solution(
        quota.reshape(*shape, E, C).to(device),
        held.reshape(*shape, R).int().to(device),
        bounds.reshape(shape).to(device),
        tight.reshape(*shape, R).to(device),
        name,
    )


def _solve_on_gpu(
    loads: torch.Tensor,
    placement: Placement,
    solver: str,
    options: Mapping[str, torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """[B] of [E, C] int32 on the CPU, None where the solver ran out of rounds."""
    device = torch.device("cuda", torch.cuda.current_device())
    quota, _, status = cuda.Solver(placement, device, solver)(
        loads.to(device, torch.int32), **options
    )
    return [q if ok else None for q, ok in zip(quota.cpu(), (status == 0).all(1), strict=True)]


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
