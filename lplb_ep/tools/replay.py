"""Recorded batches on given placements: the imbalance of each layer, and times by a cost model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..cost import CostModel
from ..placement.table import Placement
from ..planning import reference as cpu
from ..planning.reuse import check_every, reuse
from ..planning.solve import Solution, rank_load, solve
from ..problem import Problem
from .plan_times import COST_LABELS, milliseconds
from .recordings import Recording
from .tables import text_table


@dataclass(frozen=True)
class Replay:
    """Imbalance (max rank load / mean rank load) of N batches and L layers, each [N, L] float64.

    The mean is that of the ranks that take part (`Placement.active_ranks`). A cell is a layer in a
    batch. Where it is idle there is nothing to balance: it is NaN, and in no mean or median.
    """

    in_order: torch.Tensor
    """Without a placement: as many consecutive experts on each active rank, no replicas."""
    home: torch.Tensor
    """Every token at its expert's home slot."""
    even: torch.Tensor
    """Each slot of an expert gets the same share, as serving engines with EPLB aim for."""
    lp: torch.Tensor
    """The integer plan of `solve`, guests included."""
    bound: torch.Tensor
    """The lower bound T*, which no plan on these placements can beat."""
    layers: tuple[int, ...]
    """The L layers' numbers."""
    leaves_node: torch.Tensor | None = None
    """[2, L] float64: the share of picks that are computed on another node than their token's.

    The first row is at home, the second by the plan. None: there is one node."""
    residents: torch.Tensor | None = None
    """The integer plan without guests; None: no placement has guest slots, and `lp` is that."""
    reused: torch.Tensor | None = None
    """The plan where one in so many batches is solved, and the others use its quotas.

    They are those of `LPLB_EP_EVERY`. None: not requested."""
    guests: torch.Tensor | None = None
    """[N, L] int64: copies of experts that a batch moves, over all ranks."""
    most_sent: torch.Tensor | None = None
    """[N, L] int64: the most of these copies that one rank sends."""
    rank_loads: dict[str, torch.Tensor] = field(default_factory=dict)
    """[N, L, R] float64 by "home" and "lp": rank load / mean rank load, NaN where idle."""
    costs: dict[str, torch.Tensor] = field(default_factory=dict)
    """[N, L] float64 by the names in `COST_LABELS`: milliseconds of the slowest rank by a cost
    model, NaN where idle. Empty: there was no cost model."""

    @property
    def is_idle(self) -> torch.Tensor:
        """[N, L] bool: cells without tokens."""
        return self.home.isnan()

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, mean and maximum over all cells with tokens, by column."""
        return self._summary(self._columns())

    def rows(self) -> Iterator[list[Any]]:
        """A table with a head and a row for each cell, as CSV has it: empty where it is idle."""
        columns: dict[str, torch.Tensor] = dict(self._columns())
        if self.guests is not None and self.most_sent is not None:
            columns |= {"guests": self.guests, "most_sent": self.most_sent}
        columns |= {f"{name}_ms": column for name, column in self.costs.items()}
        yield ["batch", "layer", *columns]
        for batch, layer in np.ndindex(*self.home.shape):
            values = [column[batch, layer].item() for column in columns.values()]
            yield [batch, self.layers[layer], *with_gaps(values)]

    def to_json(self, expert_bytes: int | None = None) -> dict[str, Any]:
        """All numbers, as plain lists [N][L] with None where a cell is idle, and the summary.

        Args:
            expert_bytes: weights of an expert, to tell the bytes that guests move.
        """
        values = {name: with_gaps(column.tolist()) for name, column in self._columns().items()}
        found: dict[str, Any] = {"layers": list(self.layers), "imbalance": values}
        found["num_idle"] = int(self.is_idle.sum())
        found["summary"] = self.summary()
        if self.costs:
            times = {name: with_gaps(column.tolist()) for name, column in self.costs.items()}
            found["cost_ms"] = {**times, "summary": self._summary(self.costs)}
        if self.leaves_node is not None:
            found["leaves_node"] = dict(zip(("home", "lp"), self.leaves_node.tolist(), strict=True))
        if self.guests is not None and self.most_sent is not None:
            found["guests"] = {
                "copies": self.guests.tolist(),
                "most_sent": self.most_sent.tolist(),
                "bytes": None if expert_bytes is None else (self.guests * expert_bytes).tolist(),
            }
        return found

    def table(self, expert_bytes: int | None = None, *, by_batch: bool = False) -> str:
        """A line for each layer (means over the batches), then the summary.

        Args:
            expert_bytes: weights of an expert, to tell the bytes that guests move.
            by_batch: a line for each batch instead (means over the layers).
        """
        columns = [(LABELS[name], "{:.3f}", values) for name, values in self._columns().items()]
        if self.guests is not None and self.most_sent is not None:
            columns += [("copies moved", "{:.1f}", self.guests)]
            columns += [("most by a rank", "{:.1f}", self.most_sent)]
            if expert_bytes is not None:
                columns += [("GB moved", "{:.2f}", self.guests * (expert_bytes / 1e9))]
        header, rows = self._lines(columns, by_batch)
        if self.leaves_node is not None and not by_batch:
            header += _LEAVES
            away = self.leaves_node.numpy()
            ends = [np.median(away, 1), away.mean(1), away.max(1)]
            for row, shares in zip([*rows[:-4], *rows[-3:]], [*away.T, *ends], strict=True):
                row += [f"{share:.1%}" for share in shares]
        return text_table(header, rows)

    def cost_table(self, *, by_batch: bool = False) -> str:
        """The costs in the same lines, and the time of all layers one after another.

        Args:
            by_batch: a line for each batch instead (means over the layers).
        """
        columns = [(COST_LABELS[name], "{:.3f}", values) for name, values in self.costs.items()]
        header, rows = self._lines(columns, by_batch)
        of_batches = (values.nansum(1).mean() for values in self.costs.values())
        rows.append(["all layers", *(f"{float(total):.3f}" for total in of_batches)])
        return text_table(header, rows)

    def _lines(
        self, columns: Sequence[tuple[str, str, torch.Tensor]], by_batch: bool
    ) -> tuple[list[str], list[list[str]]]:
        """A head, and a row for each layer or batch and for each summary.

        Args:
            columns: their labels, formats, and values [N, L].
            by_batch: whether rows are batches, and not layers.
        """
        names = range(len(self.home)) if by_batch else self.layers
        idle = self.is_idle.numpy()
        cells = [np.ma.array(column.double().numpy(), mask=idle) for _, _, column in columns]
        of_names = [c.mean(int(by_batch)).filled(np.nan) for c in cells]
        lines = [(str(n), [values[i] for values in of_names]) for i, n in enumerate(names)]
        lines += [
            ("median", [np.median(c.compressed()) for c in cells]),
            ("mean", [c.mean() for c in cells]),
            ("worst", [c.max() for c in cells]),
        ]
        forms = [form for _, form, _ in columns]
        rows = [
            [name, *("-" if x != x else f.format(x) for f, x in zip(forms, line, strict=True))]
            for name, line in lines
        ]
        rows.insert(-3, [])
        return ["batch" if by_batch else "layer", *(label for label, _, _ in columns)], rows

    def _summary(self, columns: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
        return {
            name: {
                "median": float(np.median(values)),
                "mean": float(values.mean()),
                "worst": float(values.max()),
            }
            for name, column in columns.items()
            for values in [column[~self.is_idle].numpy()]
        }

    def _columns(self) -> dict[str, torch.Tensor]:
        every = {name: getattr(self, name) for name in LABELS}
        return {name: column for name, column in every.items() if column is not None}


def with_gaps(values: Any) -> Any:
    """Nested lists of numbers, with None instead of NaN, as in JSON and CSV."""
    if isinstance(values, list):
        return [with_gaps(value) for value in values]
    return None if values != values else values


LABELS = {
    "in_order": "in order",
    "home": "home slots",
    "even": "even split",
    "residents": "LP, no guests",
    "lp": "LP",
    "reused": "quotas reused",
    "bound": "lower bound",
}
_LEAVES = ["leave their node: at home", "LP"]


def replay(
    recording: Recording,
    placements: Sequence[Placement],
    *,
    solver: str = "auto",
    guest_tolerance: float | None = None,
    guest_min_tokens: int | None = None,
    every: int = 1,
    cost: CostModel | None = None,
    progress: Callable[[int, int], None] = lambda done, num_layers: None,
) -> Replay:
    """What a recording's batches would have been on these placements.

    Args:
        recording: the batches.
        placements: one for each of the L layers; E experts each.
        solver, guest_tolerance, guest_min_tokens: as for `solve`.
        every: batches from one whose quotas are reused by those behind it to the next; 1: none are.
        cost: the cost of rows, for the times of these plans and for plans by it; None: no times.
        progress: is called with the number of layers done, and of all layers.

    Returns:
        The imbalances; and what guests move, where a placement has guest slots.

    Raises:
        ValueError: the number of placements or of their experts is not the recording's. Or quotas
            are to be reused on a placement with guest slots. Or there is a cost model, and counts
            are scaled, or there are guest slots and it has no cost of a push.
    """
    _check(recording, placements, every, cost)
    names = [name for name in LABELS if name != "reused" or every > 1]
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    by_rank: dict[str, list[torch.Tensor]] = {"home": [], "lp": []}
    costs: list[dict[str, torch.Tensor]] = []
    moved: list[torch.Tensor] = []
    leaves: list[list[float]] = []
    rule: dict[str, Any] = {
        "guest_tolerance": guest_tolerance,
        "guest_min_tokens": guest_min_tokens,
    }
    for layer, placement in enumerate(placements):
        load = recording.counts[:, layer]
        total = load.sum(1).double()
        # Of idle cells there is no mean.
        mean = torch.where(total > 0, total / placement.active_ranks.size, torch.nan)
        solution = solve(load, placement, solver, **rule)
        residents = solution
        if placement.num_guests_per_rank:
            residents = solve(load, placement.with_guest_slots(0), solver)
        rank_loads = {
            **_without_plan(load, placement),
            "residents": residents.rank_load,
            "lp": solution.rank_load,
            "bound": solution.lower_bound[:, None],
        }
        if every > 1:
            rank_loads["reused"] = _reused_rank_load(load, solution.quota, placement, every)
        for name in by_rank:
            by_rank[name].append(rank_loads[name] / mean[:, None])
        for name, column in columns.items():
            column.append(rank_loads[name].amax(1) / mean)
        if cost is not None:
            by_cost = solve(load, placement, solver, objective="cost", cost=cost, **rule)
            costs.append(milliseconds(load, placement, solution, by_cost, cost))
        moved.append(_copies_moved(solution.guests, placement))
        if placement.num_ranks_per_node < placement.num_ranks:
            leaves.append(_leave_node(solution, placement))
        progress(layer + 1, len(placements))
    stacked: dict[str, Any] = {name: torch.stack(values, 1) for name, values in columns.items()}
    away = torch.tensor(leaves, dtype=torch.float64).T if leaves else None
    found: dict[str, Any] = {"layers": recording.layers, "leaves_node": away}
    if costs:
        found["costs"] = {n: torch.stack([of[n] for of in costs], 1) for n in COST_LABELS}
    if len({placement.num_ranks for placement in placements}) == 1:
        found["rank_loads"] = {name: torch.stack(loads, 1) for name, loads in by_rank.items()}
    if not any(placement.num_guests_per_rank for placement in placements):
        del stacked["residents"]
        return Replay(**stacked, **found)
    guests, most_sent = torch.stack(moved, 2)
    return Replay(**stacked, **found, guests=guests, most_sent=most_sent)


def _reused_rank_load(
    load: torch.Tensor, quota: torch.Tensor, placement: Placement, every: int
) -> torch.Tensor:
    """[N, R] int64: rank loads where one in so many batches is solved, and its quotas are reused.

    Each pick's source rank is drawn at random, all as likely, for recordings rarely say it.

    Args:
        load: [N, E].
        quota: [N, E, C] of each batch's own solution.
        placement: the copies.
        every: batches from one that is solved to the next.
    """
    rng, R = np.random.default_rng(0), placement.num_ranks
    found = []
    for batch, of_batch in enumerate(load.numpy()):
        got = quota[batch]
        if batch % every:
            own = torch.from_numpy(rng.multinomial(of_batch, np.full(R, 1 / R)))  # [E, R]
            earlier = quota[batch - batch % every]
            got = sum((reuse(own[:, r], earlier, r, R) for r in range(R)), torch.zeros_like(got))
        found.append(rank_load(got, placement))
    return torch.stack(found)


def _copies_moved(guests: torch.Tensor, placement: Placement) -> torch.Tensor:
    """[2, N] int64: the copies that each batch moves, and the most of them that one rank sends.

    Args:
        guests: [N, R, G] integers, as `Solution.guests`.
        placement: with these guest slots.
    """
    experts = guests.flatten(1).long()
    sent = torch.zeros(len(guests), placement.num_ranks + 1, dtype=torch.int64)
    homes = torch.tensor([*placement.home_rank.tolist(), placement.num_ranks])
    sent.scatter_add_(1, homes[experts], torch.ones_like(experts))  # the last: of no expert
    return torch.stack([sent[:, :-1].sum(1), sent[:, :-1].amax(1)])


def _leave_node(solution: Solution, placement: Placement) -> list[float]:
    """The shares of picks of all batches that leave their node: at home, and by the solution."""
    picks = solution.quota.sum((1, 2)).double()
    if not placement.num_guests_per_rank:  # all batches have the same copies
        quota = solution.quota.sum(0)
        return [leaves_node(q, placement) for q in (_at_home(quota), quota)]
    at_home = leaves_node(_at_home(solution.quota.sum(0)), placement)
    shares = [
        leaves_node(quota, placement.with_guests(guests))
        for quota, guests in zip(solution.quota, solution.guests, strict=True)
    ]
    return [at_home, float(torch.tensor(shares).double() @ picks / picks.sum())]


def _check(
    recording: Recording, placements: Sequence[Placement], every: int, cost: CostModel | None
) -> None:
    """Raises the errors of `replay`, before the work is done."""
    if cost is not None and recording.scale != 1:
        raise ValueError(
            f"counts are scaled by {recording.scale:.6g}, so their times say nothing; draw batches "
            "of a size with Recording.drawn"
        )
    if len(placements) != len(recording.layers):
        raise ValueError(
            f"placements must be one for each of {len(recording.layers)} layers; "
            f"got {len(placements)}"
        )
    for placement in placements:
        check_every(every, placement, Problem())
        if cost is not None:
            Problem(objective="cost", cost=cost).checked(placement)
        if recording.num_experts != placement.num_experts:
            raise ValueError(
                f"placements must have the recording's {recording.num_experts} experts; got "
                f"{placement.num_experts}"
            )


def _without_plan(load: torch.Tensor, placement: Placement) -> dict[str, torch.Tensor]:
    """[N, R] float64 rank loads: experts in order, at home, and split evenly."""
    E, R, active = placement.num_experts, placement.num_ranks, placement.active_ranks
    slots = np.flatnonzero(placement.physical_to_logical >= 0)
    in_slots, ranks = placement.physical_to_logical[slots], slots // placement.num_local_slots
    return {
        "in_order": _even_rank_load(load, np.arange(E), active[np.arange(E) * active.size // E], R),
        "home": _even_rank_load(load, np.arange(E), placement.home_rank, R),
        "even": _even_rank_load(load, in_slots, ranks, R),
    }


def _even_rank_load(
    load: torch.Tensor, expert: npt.NDArray[Any], rank: npt.NDArray[Any], num_ranks: int
) -> torch.Tensor:
    """[N, R] float64: rank loads where each of an expert's slots gets the same share.

    Args:
        load: [N, E].
        expert, rank: of each slot.
        num_ranks: R.
    """
    shares = np.zeros((load.shape[1], num_ranks))
    np.add.at(shares, (expert, rank), 1 / np.bincount(expert)[expert])
    return load.double() @ torch.from_numpy(shares)


def describe(
    recording: Recording,
    placements: Sequence[Placement],
    start: Sequence[Placement] | None = None,
) -> tuple[str, int]:
    """The imbalance of each layer's placement on the load it was learned on.

    Args:
        recording: the load.
        placements: one for each of the L layers.
        start: what they were before, to count the slots that changed.

    Returns:
        A table, and the index of the layer with the highest imbalance at home slots.
    """
    header = ["layer", "home slots", "LP", "most copies"]
    guests = any(placement.num_guests_per_rank for placement in placements)
    header += ["with guests", "copies moved"] if guests else []
    nodes = placements[0].num_ranks > placements[0].num_ranks_per_node
    header += _LEAVES if nodes else []
    header += [] if start is None else ["slots changed"]
    rows, at_home = [], []
    for i, (layer, load, placement) in enumerate(
        zip(recording.layers, recording.load, placements, strict=True)
    ):
        mean = float(load.sum()) / placement.active_ranks.size
        filled, placement = placement, placement.with_guest_slots(0)
        solution = solve(load, placement)
        home = _at_home(solution.quota)
        at_home.append(float(rank_load(home, placement).max()) / mean)
        rows.append(
            [str(layer), f"{at_home[-1]:.3f}", f"{int(solution.rank_load.max()) / mean:.3f}"]
        )
        rows[-1].append(str(int((placement.copy_rank >= 0).sum(1).max())))
        if guests:
            with_guests = solve(load, filled)
            rows[-1].append(f"{int(with_guests.rank_load.max()) / mean:.3f}")
            rows[-1].append(str(int((with_guests.guests >= 0).sum())))
        if nodes:
            rows[-1] += [f"{leaves_node(q, placement):.1%}" for q in (home, solution.quota)]
        if start is not None:
            before = start[i].with_guest_slots(0)
            changed = placement.physical_to_logical != before.physical_to_logical
            rows[-1].append(str(int(changed.sum())))
    return text_table(header, rows), int(np.argmax(at_home))


def leaves_node(quota: torch.Tensor, placement: Placement) -> float:
    """The share of picks that are computed on another node than their token's.

    Tokens are taken to come evenly from all ranks, for recordings rarely say their ranks.

    Args:
        quota: [E, C] integers, tokens of each copy.
        placement: the copies.
    """
    load, ranks = quota.sum(1), torch.arange(placement.num_ranks)[:, None]
    counts = load // placement.num_ranks + (ranks < load % placement.num_ranks)
    split = cpu.split(counts, quota, placement).numpy()
    node = np.where(placement.copy_rank >= 0, placement.node[placement.copy_rank], -1)
    away = split[placement.node[:, None, None] != node].sum()
    return float(away / max(int(load.sum()), 1))


def _at_home(quota: torch.Tensor) -> torch.Tensor:
    """The quotas [E, C] of the same tokens at home."""
    home = torch.zeros_like(quota)
    home[:, 0] = quota.sum(1)
    return home
