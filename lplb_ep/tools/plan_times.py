"""Times of a load by a cost model: at home, evenly split, planned by tokens and by cost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..cost import CostModel
from ..placement.table import Placement
from ..planning.guests_by_cost import push_waits
from ..planning.solve import Solution
from ..planning.values import rank_costs
from ..problem import Problem

COST_LABELS = {
    "home": "home slots",
    "even": "even split",
    "lp": "LP",
    "by_cost": "plan by cost",
    "bound": "lower bound",
}
"""The columns of a table of times, and their labels."""


def even_quotas(load: npt.NDArray[np.int64], placement: Placement) -> npt.NDArray[np.int64]:
    """The quotas [E, C] of a load [E] where an expert's slots get equal parts, rounded."""
    here = placement.logical_to_physical >= 0
    number = here.sum(1, keepdims=True)
    parts = load[:, None] // number + (here.cumsum(1) <= load[:, None] % number)
    return np.where(here, parts, 0)


def milliseconds(
    load: torch.Tensor,
    placement: Placement,
    by_tokens: Solution,
    by_cost: Solution,
    model: CostModel,
) -> dict[str, torch.Tensor]:
    """Times of the slowest rank by a cost model, its wait for guests included.

    Args:
        load: [N, E] int64, tokens of each expert in each batch.
        placement: the copies, perhaps with guest slots.
        by_tokens, by_cost: the plans of these loads.
        model: of costs.

    Returns:
        [N] float64 milliseconds by the names in `COST_LABELS`; NaN where there are no tokens.
    """
    problem = Problem(objective="cost", cost=model).checked(placement)
    residents = placement.with_guest_slots(0)
    at = residents.logical_to_physical >= 0
    ranks = residents.logical_to_physical[at] // residents.num_local_slots
    found: dict[str, list[int]] = {"home": [], "even": [], "lp": []}
    for row, quota, guests in zip(load.numpy(), by_tokens.quota, by_tokens.guests, strict=True):
        filled = placement.with_guests(guests) if guests.numel() else placement
        waits = push_waits(guests, placement, problem)
        even = model.of_slots(even_quotas(row, residents)[at])
        for name, costs in (
            ("home", model.fixed + np.bincount(placement.home_rank, model.of_slots(row))),
            ("even", model.fixed + np.bincount(ranks, even)),
            ("lp", rank_costs(quota.long().numpy(), filled, problem, waits)),
        ):
            found[name].append(int(costs.max()))
    times = {name: torch.tensor(costs).double() for name, costs in found.items()}
    times |= {"by_cost": by_cost.reached, "bound": by_cost.lower_bound}
    return {n: torch.where(load.sum(1) > 0, of / 1e6, torch.nan) for n, of in times.items()}
