"""The problem to solve: the loads of the experts, and the bounds of a plan for them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .cost import H200, CostModel
from .errors import InfeasibleError
from .placement.table import Placement
from .settings import OBJECTIVES, Settings

Integers = torch.Tensor | npt.ArrayLike
"""Whole numbers of any integer dtype: a tensor, an array, or nested lists."""
MAX_TOTAL = 2**31 - 1
"""Tokens of a batch on all ranks, base loads included."""
MAX_TOTAL_SPEED = 2**15 - 1
GUEST_PARTS = 10_000
"""The unit in which kernels and CPU count the tolerance: its parts of 1."""


class GuestRule(NamedTuple):
    """When a batch takes guests, in whole numbers."""

    tolerance: int
    """In `GUEST_PARTS` of the mean."""
    min_tokens: int
    """The least tokens that a guest is chosen for."""


@dataclass(frozen=True, eq=False)
class Problem:
    """The objective of a layer's plans and their bounds, without the placement.

    With the objective `tokens` it is a linear program.

    minimise T subject to sum_c quota[e, c] = load[e] and
    (sum of quotas on r + base_load[r]) / speed[r] <= T for each rank r.

    Quotas are whole, not negative, and at most `max_quota`.

    All numbers of tokens and speeds are integers of any dtype, tensors on any device, arrays or
    lists. `solve` checks them, and so does a `Planner` when it is made.
    """

    load: torch.Tensor | None = None
    """[E] or [B, E]: tokens of each logical expert; None where the counts of each batch give it."""
    base_load: torch.Tensor | None = None
    """[R]: tokens that stay on each rank, such as a shared expert's; default 0."""
    speed: torch.Tensor | None = None
    """[R]: positive relative speeds that sum to at most 32767; default 1."""
    max_quota: torch.Tensor | None = None
    """[E, C]: the most tokens of each copy; default: no limit."""
    objective: str | None = None
    """The quantity whose largest value over ranks plans minimise, one of `OBJECTIVES`. `tokens`:
    the linear program. `experts`: active slots, and then tokens. `cost`: nanoseconds by `cost`.
    `auto`: the same, without searches that take longer than they gain. None: the setting, or its
    default."""
    cost: CostModel | None = None
    """The cost of rows, and of pushes of guests; None: the setting's model, or an H200's."""
    guest_tolerance: float | None = None
    """A batch takes no guests where the residents' T* is at most 1 + this times the mean: the total
    load over the total speed. Of several nodes it is the largest mean of one. In [0, 1], counted
    in 1/10000; None: the setting, or its default."""
    guest_min_tokens: int | None = None
    """The least tokens that a guest is chosen for, from 1; None: the setting, or its default. It is
    no bound of quotas: the program that follows finds the least T*, and may leave a guest fewer."""
    min_gain: int | None = None
    """A `Planner`'s batch stays where no plan could take so many tokens off its fullest rank
    (`planning.stay`). Its slots are then its homes, or those that an engine gave. 0: no batch
    stays. None: the setting, or its default. It needs the objective `tokens`, and excludes speeds,
    limits of copies and guest slots."""

    @property
    def objective_name(self) -> str:
        """The objective, its default filled in."""
        return Settings.objective if self.objective is None else self.objective

    @property
    def cost_model(self) -> CostModel:
        """The cost of rows, its default filled in."""
        return H200 if self.cost is None else self.cost

    @property
    def bounds(self) -> dict[str, torch.Tensor | None]:
        """Those of the linear program, by name."""
        return {"base_load": self.base_load, "speed": self.speed, "max_quota": self.max_quota}

    @property
    def guest_rule(self) -> GuestRule:
        """When a batch takes guests, defaults filled in."""
        tolerance, tokens = self.guest_tolerance, self.guest_min_tokens
        return GuestRule(
            round(GUEST_PARTS * (Settings.guest_tolerance if tolerance is None else tolerance)),
            Settings.guest_min_tokens if tokens is None else tokens,
        )

    @property
    def least_gain(self) -> int:
        """`min_gain`, its default filled in."""
        return Settings.min_gain if self.min_gain is None else self.min_gain

    def with_defaults(self, **defaults: Any) -> Problem:
        """A copy, with these values of fields that are None here."""
        missing = {name: v for name, v in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)

    def checked(self, placement: Placement) -> Problem:
        """A copy, with int64 tensors on the CPU, and the load as [B, E].

        Raises:
            TypeError: a field is no tensor, array or list.
            ValueError: a field's shape, dtype or range, or the objective; the message names it. Or
                fields that do not go together: `min_gain` with fields that it excludes, or
                `max_quota` for a placement with guest slots. Or speeds or limits of copies with
                another objective than `tokens`. Or guest slots with `experts`, or with a cost model
                without the cost of a push.
            InfeasibleError: an expert whose copies' `max_quota` sum below its load.
        """
        self._check_objective(placement)
        self._check_guest_rule()
        self._check_min_gain(placement)
        if placement.num_guests_per_rank and self.max_quota is not None:
            raise ValueError(
                "max_quota limits copies by their columns, and a placement with guest slots has "
                "others there in each batch: leave one of the two"
            )
        R, E, C = placement.num_ranks, placement.num_experts, placement.max_replicas
        load = None
        if self.load is not None:
            given = as_integers("load", self.load)
            if given.ndim not in (1, 2) or given.shape[-1] != E:
                raise ValueError(f"load must have shape [{E}] or [B, {E}]; got {list(given.shape)}")
            load = _whole("load", given, given.shape).reshape(-1, E)
        out = replace(
            self,
            load=load,
            base_load=None if self.base_load is None else _whole("base_load", self.base_load, (R,)),
            speed=None if self.speed is None else _whole("speed", self.speed, (R,), at_least=1),
            max_quota=None
            if self.max_quota is None
            else _whole("max_quota", self.max_quota, (E, C)),
        )
        out._check_totals(placement)
        return out

    def is_feasible(self, load: torch.Tensor, placement: Placement) -> bool:
        """Whether the copies of every expert may take its load [E] int64, on the CPU."""
        return self.max_quota is None or bool((self._capacity(placement) >= load).all())

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the bounds of every batch's plan; ranks compare it."""
        state: list[Any] = [self.objective_name]
        if self.objective_name != "tokens":
            state.append(self.cost_model.fingerprint())
        if self.guest_rule != Problem().guest_rule:
            state.append(tuple(self.guest_rule))
        if self.least_gain:
            state.append(("min_gain", self.least_gain))
        for bound in self.bounds.values():
            state.append(None if bound is None else bound.tolist())
        return hashlib.sha256(repr(state).encode()).hexdigest()

    @property
    def is_plain(self) -> bool:
        """Whether placement and load alone decide a plan, with defaults for all other fields."""
        return (
            all(bound is None for bound in self.bounds.values())
            and self.guest_rule == Problem().guest_rule
            and self.objective_name == "tokens"
            and not self.least_gain
        )

    def _capacity(self, placement: Placement) -> torch.Tensor:
        """[E] the most tokens of each expert, by `max_quota`."""
        assert self.max_quota is not None, "there is no capacity without a limit"
        return (self.max_quota * torch.tensor(placement.copy_rank >= 0)).sum(1)

    def _check_objective(self, placement: Placement) -> None:
        name = self.objective_name
        if name not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {name!r}")
        if not isinstance(self.cost, (CostModel, type(None))):
            raise TypeError(f"cost must be a CostModel; got a {type(self.cost).__name__}")
        has_guests = bool(placement.num_guests_per_rank)
        given = self._bounded_by(has_guests and name == "experts")
        if name != "tokens" and given:
            raise ValueError(f"the objective {name!r} does not go with {given}: use 'tokens'")
        if name != "tokens" and has_guests and self.cost_model.push is None:
            raise ValueError(
                f"the objective {name!r} with guest slots needs the cost of a push, and the cost "
                f"model {self.cost_model.name!r} has no `push`: set it, in nanoseconds"
            )

    def _bounded_by(self, has_guests: bool) -> str:
        """What of this goes with plain tokens alone; empty: nothing."""
        others = {
            "speed": self.speed is not None,
            "max_quota": self.max_quota is not None,
            "guest slots": has_guests,
        }
        return " and ".join(other for other, is_given in others.items() if is_given)

    def _check_min_gain(self, placement: Placement) -> None:
        gain, given = self.least_gain, self._bounded_by(bool(placement.num_guests_per_rank))
        if not (isinstance(gain, int) and 0 <= gain <= MAX_TOTAL):
            raise ValueError(f"min_gain must be a whole number in [0, {MAX_TOTAL}]; got {gain!r}")
        if gain and self.objective_name != "tokens":
            given = " and ".join([f"the objective {self.objective_name!r}", *filter(None, [given])])
        if gain and given:
            raise ValueError(f"min_gain (LPLB_EP_MIN_GAIN) does not go with {given}: leave it 0")

    def _check_guest_rule(self) -> None:
        tolerance, tokens = self.guest_tolerance, self.guest_min_tokens
        if tolerance is not None and not (
            isinstance(tolerance, (int, float)) and 0 <= tolerance <= 1
        ):
            raise ValueError(f"guest_tolerance must be a number in [0, 1]; got {tolerance!r}")
        if tokens is not None and not (isinstance(tokens, int) and 1 <= tokens <= MAX_TOTAL):
            raise ValueError(
                f"guest_min_tokens must be a whole number in [1, {MAX_TOTAL}]; got {tokens!r}"
            )

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


def as_integers(name: str, values: Integers) -> torch.Tensor:
    """Whole numbers as a tensor: it itself, or int64 on the CPU of an array or of nested lists.

    Args:
        name: the argument, for messages.
        values: of any integer dtype.

    Raises:
        TypeError: it is none of these.
        ValueError: they are no integers, or rows differ in length.
    """
    if isinstance(values, torch.Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"{name} must be integers; got {values.dtype}")
        return values
    if (
        values is None
        or isinstance(values, (str, bytes, dict, set))
        or not hasattr(values, "__len__")
    ):
        kind = type(values).__name__
        raise TypeError(f"{name} must be a tensor, an array or lists of integers; got a {kind}")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):
        array = np.asarray(None)
    if array.size and array.dtype.kind not in "iu":
        what = "rows of equal length" if array.dtype.kind == "O" else "integers"
        raise ValueError(f"{name} must be {what}; got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(np.int64))


def _whole(name: str, value: Integers, shape: tuple[int, ...], at_least: int = 0) -> torch.Tensor:
    """`value` as int64 on the CPU, checked."""
    value = as_integers(name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(value.shape)}")
    out = value.detach().cpu().long()
    wrong = out[(out < at_least) | (out > MAX_TOTAL)]
    if len(wrong):
        raise ValueError(f"{name} must be in [{at_least}, {MAX_TOTAL}]; got {int(wrong[0])}")
    return out
