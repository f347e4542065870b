"""Recorded batches on given placements: the imbalance of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..placement.table import Placement
from ..planning import reference as cpu
from ..planning.solve import rank_load, solve
from .recordings import Recording
from .tables import text_table


@dataclass(frozen=True)
class Replay:
    """Imbalance (max rank load / mean rank load) of N batches and L layers, each [N, L] float64.

    A layer that is idle in a batch counts as balanced: 1.
    """

    in_order: torch.Tensor
    """Without a placement: E / R consecutive experts on each rank, no replicas."""
    home: torch.Tensor
    """Every token at its expert's home slot."""
    even: torch.Tensor
    """Each slot of an expert gets the same share, as serving engines with EPLB aim for."""
    lp: torch.Tensor
    """The integer plan of `solve`."""
    bound: torch.Tensor
    """The lower bound T*, which no plan on these placements can beat."""
    layers: tuple[int, ...]
    """The L layers' numbers."""
    leaves_node: torch.Tensor | None = None
    """[2, L] float64: the share of picks that are computed on another node than their token's.

    The first row is at home, the second by the plan. None: there is one node."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, mean and maximum over all batches and layers, by column."""
        return {
            name: {
                "median": float(np.median(values.numpy())),
                "mean": float(values.mean()),
                "worst": float(values.max()),
            }
            for name, values in self._columns().items()
        }

    def to_json(self) -> dict[str, Any]:
        """All numbers, as plain lists [N][L] and the summary."""
        values = {name: column.tolist() for name, column in self._columns().items()}
        found: dict[str, Any] = {"layers": list(self.layers), "imbalance": values}
        found["summary"] = self.summary()
        if self.leaves_node is not None:
            found["leaves_node"] = dict(zip(("home", "lp"), self.leaves_node.tolist(), strict=True))
        return found

    def table(self) -> str:
        """A line for each layer (means over the batches), then the summary."""
        columns = self._columns()
        rows = [
            [str(layer), *(f"{c[:, i].mean():.3f}" for c in columns.values())]
            for i, layer in enumerate(self.layers)
        ]
        summary = self.summary()
        rows.append([])
        for line in ("median", "mean", "worst"):
            rows.append([line, *(f"{summary[name][line]:.3f}" for name in columns)])
        header = ["layer", *(LABELS[name] for name in columns)]
        if self.leaves_node is not None:
            header += _LEAVES
            away = self.leaves_node.numpy()
            ends = [np.median(away, 1), away.mean(1), away.max(1)]
            for row, shares in zip([*rows[:-4], *rows[-3:]], [*away.T, *ends], strict=True):
                row += [f"{share:.1%}" for share in shares]
        return text_table(header, rows)

    def _columns(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in LABELS}


LABELS = {
    "in_order": "in order",
    "home": "home slots",
    "even": "even split",
    "lp": "LP",
    "bound": "lower bound",
}
_LEAVES = ["leave their node: at home", "LP"]


def replay(
    recording: Recording, placements: Sequence[Placement], *, solver: str = "auto"
) -> Replay:
    """What a recording's batches would have been on these placements.

    Args:
        recording: the batches.
        placements: one for each of the L layers; E experts each.
        solver: as for `solve`.

    Returns:
        The imbalances.

    Raises:
        ValueError: the number of placements or of their experts is not the recording's.
    """
    if len(placements) != len(recording.layers):
        raise ValueError(
            f"placements must be one for each of {len(recording.layers)} layers; "
            f"got {len(placements)}"
        )
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in LABELS}
    leaves: list[list[float]] = []
    for layer, placement in enumerate(placements):
        R, E = placement.num_ranks, placement.num_experts
        if recording.num_experts != E:
            raise ValueError(
                f"placements must have the recording's {recording.num_experts} experts; got {E}"
            )
        load = recording.counts[:, layer]
        mean = (load.sum(1) / R).double()
        solution = solve(load, placement, solver)
        slots = np.flatnonzero(placement.physical_to_logical >= 0)
        rank_loads = {
            "in_order": _even_rank_load(load, np.arange(E), np.arange(E) * R // E, R),
            "home": _even_rank_load(load, np.arange(E), placement.home_rank, R),
            "even": _even_rank_load(
                load, placement.physical_to_logical[slots], slots // placement.num_local_slots, R
            ),
            "lp": solution.rank_load,
            "bound": solution.lower_bound[:, None],
        }
        for name, held in rank_loads.items():
            columns[name].append(torch.where(mean > 0, held.amax(1) / mean, 1.0))
        if placement.num_ranks_per_node < R:
            quota = solution.quota.sum(0)
            leaves.append([leaves_node(q, placement) for q in (_at_home(quota), quota)])
    stacked = {name: torch.stack(values, 1) for name, values in columns.items()}
    away = torch.tensor(leaves, dtype=torch.float64).T if leaves else None
    return Replay(**stacked, layers=recording.layers, leaves_node=away)


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
    """What each layer's placement is worth on the load it was learned on.

    Args:
        recording: the load.
        placements: one for each of the L layers.
        start: what they were before, to count the slots that changed.

    Returns:
        A table, and the index of the layer with the highest imbalance at home slots.
    """
    header = ["layer", "home slots", "LP", "most copies"]
    nodes = placements[0].num_ranks > placements[0].num_ranks_per_node
    header += _LEAVES if nodes else []
    header += [] if start is None else ["slots changed"]
    rows, at_home = [], []
    for i, (layer, load, placement) in enumerate(
        zip(recording.layers, recording.load, placements, strict=True)
    ):
        mean = float(load.sum()) / placement.num_ranks
        solution = solve(load, placement)
        home = _at_home(solution.quota)
        at_home.append(float(rank_load(home, placement).max()) / mean)
        rows.append(
            [str(layer), f"{at_home[-1]:.3f}", f"{int(solution.rank_load.max()) / mean:.3f}"]
        )
        rows[-1].append(str(placement.max_replicas))
        if nodes:
            rows[-1] += [f"{leaves_node(q, placement):.1%}" for q in (home, solution.quota)]
        if start is not None:
            changed = placement.physical_to_logical != start[i].physical_to_logical
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
