"""The problem to solve: the loads of the experts, and what bounds a plan for them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from .errors import InfeasibleError
from .placement.table import Placement

MAX_TOTAL = 2**31 - 1
"""Tokens of a batch on all ranks, base loads included."""
MAX_TOTAL_SPEED = 2**15 - 1
COSTS = ("tokens",)
"""What a rank's cost can be counted in."""


@dataclass(frozen=True, eq=False)
class Problem:
    """The linear program of a layer's batches, but for the placement.

    minimise T subject to sum_c quota[e, c] = load[e] and
    (sum of quotas on r + base_load[r]) / speed[r] <= T for each rank r.

    Quotas are whole, not negative, and at most `max_quota`.

    All tensors hold integers, int32 or int64, on any device. `solve` checks them, and so does a
    `Planner` when it is made.
    """

    load: torch.Tensor | None = None
    """[E] or [B, E]: tokens of each logical expert; None where the counts of each batch say it."""
    base_load: torch.Tensor | None = None
    """[R]: tokens that stay on each rank (a shared expert's, say); default 0."""
    speed: torch.Tensor | None = None
    """[R]: positive relative speeds that sum to at most 32767; default 1."""
    max_quota: torch.Tensor | None = None
    """[E, C]: the most tokens of each copy; default: no limit."""
    cost: str = "tokens"
    """One of `COSTS`: what the ranks' largest cost counts."""

    @property
    def bounds(self) -> dict[str, torch.Tensor | None]:
        """All but the load and the cost, by name."""
        return {"base_load": self.base_load, "speed": self.speed, "max_quota": self.max_quota}

    def checked(self, placement: Placement) -> Problem:
        """The same, with int64 tensors on the CPU, and the load as [B, E].

        Raises:
            TypeError: a field is no tensor.
            ValueError: a field's shape, dtype or range, or the cost; the message names it.
            InfeasibleError: an expert whose copies' `max_quota` sum below its load.
        """
        if self.cost not in COSTS:
            raise ValueError(f"cost must be one of {', '.join(COSTS)}; got {self.cost!r}")
        R, E, C = placement.num_ranks, placement.num_experts, placement.max_replicas
        load = None
        if self.load is not None:
            _check_tensor("load", self.load)
            if self.load.ndim not in (1, 2) or self.load.shape[-1] != E:
                raise ValueError(
                    f"load must have shape [{E}] or [B, {E}]; got {list(self.load.shape)}"
                )
            load = _whole("load", self.load, self.load.shape).reshape(-1, E)
        out = Problem(
            load,
            None if self.base_load is None else _whole("base_load", self.base_load, (R,)),
            None if self.speed is None else _whole("speed", self.speed, (R,), at_least=1),
            None if self.max_quota is None else _whole("max_quota", self.max_quota, (E, C)),
            self.cost,
        )
        out._check_totals(placement)
        return out

    def is_feasible(self, load: torch.Tensor, placement: Placement) -> bool:
        """Whether the copies of every expert may take its load [E] int64, on the CPU."""
        return self.max_quota is None or bool((self._capacity(placement) >= load).all())

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what bounds the plans of every batch; ranks compare it."""
        state: list[Any] = [self.cost]
        for bound in self.bounds.values():
            state.append(None if bound is None else bound.tolist())
        return hashlib.sha256(repr(state).encode()).hexdigest()

    @property
    def is_plain(self) -> bool:
        """Whether nothing bounds a plan beside the load."""
        return all(bound is None for bound in self.bounds.values())

    def _capacity(self, placement: Placement) -> torch.Tensor:
        """[E] the most tokens of each expert, by `max_quota`."""
        assert self.max_quota is not None, "there is no capacity without a limit"
        return (self.max_quota * torch.tensor(placement.copy_rank >= 0)).sum(1)

    def _check_totals(self, placement: Placement) -> None:
        total = 0 if self.load is None else max(self.load.sum(1).tolist(), default=0)
        total += 0 if self.base_load is None else int(self.base_load.sum())
        if total > MAX_TOTAL:
            raise ValueError(f"load must total at most {MAX_TOTAL} with base_load; got {total}")
        if self.speed is not None and int(self.speed.sum()) > MAX_TOTAL_SPEED:
            raise ValueError(
                f"speed must sum to at most {MAX_TOTAL_SPEED}; got {int(self.speed.sum())}"
            )
        if self.max_quota is not None and self.load is not None:
            capacity = self._capacity(placement)
            short = torch.nonzero(capacity < self.load)
            if len(short):
                b, e = short[0].tolist()
                raise InfeasibleError(
                    f"expert {e} has {self.load[b, e]} tokens, and its copies' max_quota sum to "
                    f"only {int(capacity[e])}"
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
