"""A sequence of workloads, replayed with a `Refresher`: imbalance over time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..placement.table import Placement
from ..planning.solve import solve
from ..settings import Settings
from ..weights.proposals import Choose, Int64, Job, num_moved, propose, widened
from .recordings import Recording
from .replay import with_gaps
from .tables import text_table


def draw_batches(recording: Recording, num_batches: int, seed: int = 0) -> Recording:
    """Batches drawn at random from a recording that is a total: each pick is any batch's alike.

    Args:
        recording: whose batches are added up.
        num_batches: N, how many to draw; each has an N-th of a layer's picks.
        seed: of the random numbers.

    Raises:
        ValueError: there are fewer picks in a layer than batches.
    """
    rng = np.random.default_rng(seed)
    total = recording.load.sum(1)
    if not 1 <= num_batches <= int(total.min()):
        raise ValueError(
            f"{recording.source}: num_batches must be in [1, {int(total.min())}], the picks of a "
            f"layer; got {num_batches}"
        )
    drawn = [
        rng.multinomial(int(picks) // num_batches, load / load.sum(), size=num_batches)
        for picks, load in zip(total, recording.load.double().numpy(), strict=True)
    ]
    counts = torch.from_numpy(np.stack(drawn, 1))
    return Recording.of(counts, recording.source, layers=recording.layers)


@dataclass(frozen=True)
class Move:
    """A layer whose replicas were moved."""

    batch: int
    """The first batch on the new placement."""
    layer: int
    """Its number in the model."""
    num_copies: int
    """Replicas that were moved."""
    num_anew: int
    """Copies, homes among them, that EPLB would have moved, placing the layer anew for the same
    loads."""


@dataclass(frozen=True)
class Timeline:
    """N batches, one after another, and L layers."""

    kept: torch.Tensor
    """[N, L, R] int64 rank loads by the linear program, on the placements of the beginning."""
    refreshed: torch.Tensor
    """[N, L, R] int64, on placements that are kept fresh."""
    home: torch.Tensor
    """[N, L, R] int64, with every token at its home slot."""
    guests_kept: torch.Tensor
    """[N, L] int64: copies of experts that guests move, on the placements of the beginning."""
    guests: torch.Tensor
    """[N, L] int64, on placements that are kept fresh."""
    moves: tuple[Move, ...]
    """By batch, then layer."""
    workloads: tuple[tuple[str, int], ...]
    """The name of each workload, and its first batch."""
    layers: tuple[int, ...]
    """The L layers' numbers."""
    interval: int
    """Batches between two looks of the refresher."""
    num_active_ranks: torch.Tensor
    """[L] int64: the ranks of each layer that take part, by whose mean imbalance is measured."""

    def imbalance(self) -> dict[str, torch.Tensor]:
        """[N, L] float64 max / mean rank load, NaN where a layer is idle, by column."""
        total = self.kept.sum(2).double()
        mean = torch.where(total > 0, total / self.num_active_ranks, torch.nan)
        return {name: getattr(self, name).amax(2) / mean for name in ("home", "kept", "refreshed")}

    def phases(self) -> Iterator[tuple[str, slice]]:
        """The name of each workload and its batches."""
        starts = [start for _, start in self.workloads] + [len(self.kept)]
        for (name, start), end in zip(self.workloads, starts[1:], strict=True):
            yield name, slice(start, end)

    def table(self) -> str:
        """A line for each workload: median / worst over its batches and layers."""
        columns = self.imbalance()

        def cell(values: torch.Tensor) -> str:
            busy = values[~values.isnan()].numpy()
            return f"{np.median(busy):.3f} / {busy.max():.3f}" if busy.size else "-"

        rows = []
        for name, batches in self.phases():
            last = slice(max(batches.start, batches.stop - self.interval), batches.stop)
            values = [columns[c][batches] for c in columns]
            values += [columns[c][last] for c in ("kept", "refreshed")]
            rows.append([name, str(batches.stop - batches.start), *map(cell, values)])
        header = ["workload", "batches", "home slots", "LP, kept", "LP, refreshed"]
        ends = [f"the last {self.interval}: kept", "refreshed"]
        return text_table([*header, *ends], rows)

    def rows(self) -> Iterator[list[Any]]:
        """A table with a head and a row for each batch and layer, as CSV has it: empty where a
        layer is idle."""
        columns = {**self.imbalance(), "guests_kept": self.guests_kept, "guests": self.guests}
        yield ["batch", "layer", *columns]
        for batch, layer in np.ndindex(*self.guests.shape):
            values = [column[batch, layer].item() for column in columns.values()]
            yield [batch, self.layers[layer], *with_gaps(values)]

    def to_json(self) -> dict[str, Any]:
        """All numbers, as plain lists with None where a layer is idle."""
        return {
            "layers": list(self.layers),
            "interval": self.interval,
            "workloads": [{"name": name, "first_batch": start} for name, start in self.workloads],
            "imbalance": {
                name: with_gaps(values.tolist()) for name, values in self.imbalance().items()
            },
            "moves": [vars(move) for move in self.moves],
            "guests": {"kept": self.guests_kept.tolist(), "refreshed": self.guests.tolist()},
        }


def replay_over_time(
    workloads: Sequence[Recording],
    placements: Sequence[Placement],
    settings: Settings,
    choose: Choose | None = None,
    num_groups: int | None = None,
    progress: Callable[[int, int], None] = lambda done, num_layers: None,
) -> Timeline:
    """Replays workloads one after another, with a refresher that looks after every so many batches.

    As in a run, what it finds is in force from its next look on: replicas are chosen meanwhile.

    Args:
        workloads: recordings of the same layers and experts, in the order in which they come.
        placements: one for each of the L layers, which the first batch meets.
        settings: whose `refresh…` and `guest…` count; `refresh` batches lie between two looks.
        choose: as for `Refresher`.
        num_groups: the router's, by which EPLB places anew; see `Placement.from_history`.
        progress: is called with the number of layers done, and of all layers.

    Raises:
        ValueError: recordings or placements that do not fit together, or no interval.
    """
    interval, first = settings.refresh, workloads[0]
    check_interval(interval)
    for other in workloads[1:]:
        other.check_like(first)
    fits = all(p.num_experts == first.num_experts for p in placements)
    if len(placements) != len(first.layers) or not fits:
        raise ValueError(
            f"placements must be one for each of {len(first.layers)} layers of "
            f"{first.num_experts} experts; got {len(placements)}, of "
            f"{sorted({p.num_experts for p in placements})} experts"
        )
    sizes = sorted({(p.num_ranks, p.num_physical_experts) for p in placements})
    if len(sizes) > 1:
        raise ValueError(f"placements differ in (ranks, slots): {sizes}")
    choose = choose or Placement.for_lp
    counts = torch.cat([w.counts for w in workloads])
    if len(counts) <= 2 * interval:
        raise ValueError(
            f"{len(counts)} batches are too few: replicas that a look at {interval} batches moves "
            f"are in force {interval} later"
        )
    names = ("kept", "refreshed", "home", "guests_kept", "guests")
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    moves: list[Move] = []
    for place, (number, placement) in enumerate(zip(first.layers, placements, strict=True)):
        loads = counts[:, place]
        kept = _solved(loads, placement, settings)
        for name, values in zip(("kept", "guests_kept"), kept, strict=True):
            columns[name].append(values)
        at_home = torch.zeros(len(loads), placement.num_ranks, dtype=torch.int64)
        columns["home"].append(at_home.index_add_(1, torch.tensor(placement.home_rank), loads))
        job = Job(number, loads.numpy(), widened(placement), choose, settings)
        refreshed, moved = _refresh(job, kept, num_groups)
        for name, values in zip(("refreshed", "guests"), refreshed, strict=True):
            columns[name].append(values)
        moves += moved
        progress(place + 1, len(placements))
    starts = np.cumsum([0, *(len(w.counts) for w in workloads)])[:-1].tolist()
    return Timeline(
        **{name: torch.stack(values, 1) for name, values in columns.items()},
        moves=tuple(sorted(moves, key=lambda move: (move.batch, move.layer))),
        workloads=tuple((w.source, start) for w, start in zip(workloads, starts, strict=True)),
        layers=first.layers,
        interval=interval,
        num_active_ranks=torch.tensor([p.active_ranks.size for p in placements]),
    )


def check_interval(refresh: int) -> None:
    """Refuses numbers of batches between two looks by which nothing could be refreshed.

    Raises:
        ValueError: it is less than 2.
    """
    if refresh < 2:
        raise ValueError(
            f"refresh must be the number of batches between two looks, at least 2; got {refresh}"
        )


def _solved(
    loads: torch.Tensor, placement: Placement, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, R] rank loads of loads [N, E], and [N] the copies that guests move; int64."""
    found = solve(
        loads,
        placement,
        "cpu",
        guest_tolerance=settings.guest_tolerance,
        guest_min_tokens=settings.guest_min_tokens,
    )
    return found.rank_load.long(), (found.guests >= 0).sum((1, 2))


def _refresh(
    job: Job, kept: tuple[torch.Tensor, torch.Tensor], num_groups: int | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[Move]]:
    """What `_solved` says of a layer that is kept fresh, and the layer's moves.

    Args:
        job: the layer, with all its loads.
        kept: what `_solved` says on the placement of the beginning.
        num_groups: the router's.
    """
    interval, placement = job.settings.refresh, job.placement
    rank_loads, guests = (values.clone() for values in kept)
    moves: list[Move] = []
    for start in range(interval, len(job.loads) - interval, interval):
        seen = job.loads[start - interval : start]
        proposal = propose(dataclasses.replace(job, loads=seen, placement=placement))
        # As in a run, what this look finds is in force from the next.
        batches = slice(start + interval, start + 2 * interval)
        if proposal is not None:
            new = placement.with_copies(proposal.physical_to_logical)
            moved, anew = (num_moved(placement, p) for p in (new, _anew(new, seen, num_groups)))
            moves.append(Move(batches.start, job.layer, moved, anew))
            placement = new
        if moves:
            loads = torch.from_numpy(job.loads[batches])
            rank_loads[batches], guests[batches] = _solved(loads, placement, job.settings)
    return (rank_loads, guests), moves


def _anew(placement: Placement, loads: Int64, num_groups: int | None) -> Placement:
    """EPLB's, of the same shape."""
    active = placement.active_ranks
    base = -(-placement.num_experts // active.size)
    return Placement.from_history(
        loads,
        num_ranks=placement.num_ranks,
        num_redundant_per_rank=placement.num_resident_slots - base,
        num_ranks_per_node=placement.num_ranks_per_node,
        num_groups=num_groups,
        active_ranks=active,
    )
