"""Statistics of each layer's batches, over a window. Reading them waits for no batch."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..layer import Layer, planned_layers
from ..planning.statistics import Statistics, Totals, batches_by_status, read_totals
from ..planning.structs import NUM_TOTALS, Status
from ..planning.tallies import Tally


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Statistics of one layer's batches, on all micro-batch slots, since `reset`.

    A batch is one plan: a forward pass of the layer, or a recompute of it. Rows are picks of
    experts: a token has K of them. Imbalances are the sum of the batches' largest rank loads over
    the sum of their mean loads. So 1.25 means that the slowest ranks had 25 % more work than the
    average. They are NaN where there was no work. Batches without counts, such as those that
    timed out, are in `by_status` alone.

    Fields are of the whole expert-parallel group, the same on each of its ranks, except those that
    begin with `rank` and `own`.
    """

    layer: str
    """The layer's name, or its number among those of the process."""
    rank: int
    """This rank in its group."""
    num_ranks: int
    """R"""
    batches: int
    """All planned batches."""
    by_status: dict[str, int]
    """How many ended with each `Status`, by its name."""
    recomputed: int
    """Those that a backward pass planned again, as activation checkpointing does."""
    sent_home: int
    """Batches that went home for another reason than too little gain: all that are neither OPTIMAL,
    REUSED nor STAYED."""
    rows: int
    """Picks of all ranks."""
    own_rows: int
    """Rows that this rank computed."""
    own_rows_at_home: int
    """Rows that it would have computed without balance."""
    home_imbalance: float
    """Largest / mean rank load, had every token gone home."""
    imbalance: float
    """Largest / mean rank load, as planned."""
    bound: float
    """T* / mean rank load: no plan on these copies and guests has less. It is of the batches with a
    known T*: those that did not go home, and were planned by tokens. NaN: there are none."""
    worst_home_imbalance: float
    """The largest / mean rank load of the worst batch, had every token gone home."""
    worst_imbalance: float
    """The largest / mean rank load of the worst batch, as planned."""
    guests: int
    """Experts that were copied to other ranks for a batch, in forward passes."""
    own_guests_sent: int
    """Guests that this rank sent."""
    own_guests_received: int
    """Guests that this rank received."""
    guest_bytes: int
    """Weights of all guests, in bytes, by the layer's last `Guests`. A backward pass may push them
    once more, which is not counted."""
    largest_home_load: int
    """Sum over batches of the largest rank load at home, in rows, base loads included."""
    largest_load: int
    """The same, as planned."""
    bound_load: int
    """The same, for T*, over the batches with a known T*."""
    bound_mean_load: float
    """Sum over these batches of the mean rank load, in rows, base loads included."""
    mean_load: float
    """Sum over all batches of the mean rank load, in rows, base loads included."""

    @property
    def stale(self) -> int:
        """Batches that were sent home since copies were not known to be valid."""
        return self.by_status.get("STALE", 0)

    @property
    def reused(self) -> int:
        """Batches by the quotas of an earlier one (`LPLB_EP_EVERY`). Their loads are not known, so
        rows, loads and imbalances are of the others."""
        return self.by_status.get("REUSED", 0)

    @property
    def stayed(self) -> int:
        """Batches that kept their slots, home or an engine's, as no plan could gain enough
        (`LPLB_EP_MIN_GAIN`)."""
        return self.by_status.get("STAYED", 0)

    @property
    def timed_out(self) -> int:
        """Batches in which a rank's counts did not arrive in time."""
        return self.by_status.get("TIMED_OUT", 0)

    def __str__(self) -> str:
        """In one line."""
        if not self.batches:
            return f"{self.layer}: no batches"
        found = "no rows"
        if self.mean_load:
            found = f"imbalance {self.home_imbalance:.3f} at home, {self.imbalance:.3f} as planned"
        if self.bound_mean_load:
            found += f", T* {self.bound:.3f}"
        said = [f"{self.layer}: {found}"]
        said.append(f"{self.batches} {'batch' if self.batches == 1 else 'batches'}")
        if self.reused:
            said.append(f"{self.reused} of them by earlier quotas, of unknown loads")
        if self.stayed:
            said.append(f"{self.stayed} of them stayed, for too little gain")
        if self.rows:
            said.append(f"{self.rows / max(1, self.batches - self.reused):.0f} rows a batch")
        if self.guests:
            moved = f" ({_size(self.guest_bytes / self.batches)})" if self.guest_bytes else ""
            said.append(f"{self.guests / self.batches:.1f} guests a batch{moved}")
        known = ("OPTIMAL", "REUSED", "STAYED")
        others = {name: n for name, n in self.by_status.items() if name not in known}
        if others:
            said.append("sent home: " + ", ".join(f"{n} {name}" for name, n in others.items()))
        return "; ".join(said)


class Window:
    """Statistics since a moment, for each layer its own; at first since the beginning.

    Sums on a device never decrease. So windows are differences, and do not disturb each other.
    """

    def __init__(self) -> None:
        self._since: WeakKeyDictionary[Statistics, Totals] = WeakKeyDictionary()

    def stats(
        self, layers: Iterable[Layer], renew_at: int | None = None, *, marked: bool = False
    ) -> list[LayerStats]:
        """The statistics of some layers.

        Args:
            layers: these.
            renew_at: a layer's window begins anew behind the result where it has so many batches;
                None: it goes on.
            marked: whether windows end with the last batches that were marked
                (`Planner(mark_every=)`), and not with the last ones that are done.

        Raises:
            RuntimeError: batches come faster than they can be read.
        """
        chosen = [(layer, [*layer.planners]) for layer in layers]
        return self.stats_of_planners(chosen, renew_at, marked=marked)

    def stats_of_planners(
        self,
        chosen: Sequence[tuple[Layer, Sequence[Any]]],
        renew_at: int | None = None,
        *,
        marked: bool = False,
    ) -> list[LayerStats]:
        """As `stats`, of some planners of each layer, or of what has remained of them (`Ended`)."""
        planners = [planner for _, several in chosen for planner in several]
        totals = read_totals((p.statistics for p in planners), marked=marked)
        read = {p.statistics: found for p, found in zip(planners, totals, strict=True)}
        found = []
        for layer, several in chosen:
            kept = [planner.statistics for planner in several]
            sums = [(read[one], self._since.get(one)) for one in kept]
            found.append(_stats(layer, several[0].rank if several else 0, sums))
            if renew_at is not None and found[-1].batches >= renew_at:
                self._since.update({one: read[one] for one in kept})
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Ended:
    """What has remained of a planner, until its last batches are reported."""

    layer: Layer
    """Of which it was."""
    rank: int
    """As the planner had it, like the others."""
    slot: int
    generation: int
    statistics: Statistics


_window = Window()


def snapshot() -> list[LayerStats]:
    """The statistics of all layers that this process has planned with, in that order.

    They include all batches that are done by now, replays of CUDA graphs too. The call waits for no
    other batch. Any thread may make it, at any time.

    Raises:
        RuntimeError: batches come faster than they can be read.
    """
    return stats_of(all_layers())


def stats_of(layers: Iterable[Layer]) -> list[LayerStats]:
    """As `snapshot`, of some layers."""
    return _window.stats(layers)


def reset() -> None:
    """Begins a new window on all layers of this process."""
    layers = all_layers()
    _window.stats(layers, renew_at=0)
    for layer in layers:
        for planner in layer.planners:
            planner.statistics.begin_window()


def all_layers() -> list[Layer]:
    """Those that this process has planned with, while another thread may add some."""
    return [layer for known in planned_layers.keyrefs() if (layer := known()) is not None]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def _stats(
    layer: Layer, rank: int, of_planners: Sequence[tuple[Totals, Totals | None]]
) -> LayerStats:
    sums, worst = np.zeros(NUM_TOTALS, np.int64), {Tally.WORST_HOME: 0.0, Tally.WORST: 0.0}
    num_ranks = len(layer.placement.active_ranks)
    for totals, before in of_planners:
        sums += totals if before is None else totals - before
        # With none in this window, the worst are those of an earlier one.
        is_new = before is None or totals[Tally.WINDOW] != before[Tally.WINDOW]
        for first in worst if is_new else ():
            largest, load = totals[first : first + 2].tolist()
            worst[first] = max(worst[first], largest * num_ranks / load if load else 0.0)
    by_status = batches_by_status(sums)
    mean, bound_mean = (int(sums[t]) / num_ranks for t in (Tally.LOAD, Tally.BOUND_LOAD))
    guests = int(sums[Tally.GUESTS])
    return LayerStats(
        layer=layer.label,
        rank=rank,
        num_ranks=layer.placement.num_ranks,
        batches=by_status.total(),
        by_status={Status(s).name: n for s, n in by_status.items()},
        recomputed=int(sums[Tally.RECOMPUTED]),
        sent_home=sum(
            n
            for status, n in by_status.items()
            if status not in (Status.OPTIMAL, Status.REUSED, Status.STAYED)
        ),
        rows=int(sums[Tally.ROWS]),
        own_rows=int(sums[Tally.OWN]),
        own_rows_at_home=int(sums[Tally.OWN_HOME]),
        home_imbalance=_quotient(int(sums[Tally.HOME]), mean),
        imbalance=_quotient(int(sums[Tally.GOT]), mean),
        bound=_quotient(int(sums[Tally.BOUND]), bound_mean),
        worst_home_imbalance=worst[Tally.WORST_HOME] or math.nan,
        worst_imbalance=worst[Tally.WORST] or math.nan,
        guests=guests,
        own_guests_sent=int(sums[Tally.SENT]),
        own_guests_received=int(sums[Tally.RECEIVED]),
        guest_bytes=guests * layer.guest_bytes,
        largest_home_load=int(sums[Tally.HOME]),
        largest_load=int(sums[Tally.GOT]),
        bound_load=int(sums[Tally.BOUND]),
        bound_mean_load=bound_mean,
        mean_load=mean,
    )


def by_name(several: Iterable[LayerStats]) -> dict[str, LayerStats]:
    """Statistics by the layer's name. Layers of one name, or windows of one layer, are added up."""
    found: dict[str, LayerStats] = {}
    for stats in several:
        before = found.get(stats.layer)
        found[stats.layer] = stats if before is None else _sum(before, stats)
    return found


def _sum(one: LayerStats, other: LayerStats) -> LayerStats:
    """Statistics of all batches of two layers, or of two windows that do not overlap."""
    values = {name: getattr(one, name) + getattr(other, name) for name in _SUMS}
    for name, (above, below) in _QUOTIENTS.items():
        values[name] = _quotient(values[above], values[below])
    for name in _WORST:
        values[name] = float(np.fmax(getattr(one, name), getattr(other, name)))  # NaN is none
    by_status = collections.Counter(one.by_status) + collections.Counter(other.by_status)
    return dataclasses.replace(other, by_status=dict(by_status), **values)


def _quotient(loads: int, mean: float) -> float:
    """A largest load over the mean, both summed over batches; NaN where there was none."""
    return loads / mean if mean else math.nan


_QUOTIENTS = {
    "home_imbalance": ("largest_home_load", "mean_load"),
    "imbalance": ("largest_load", "mean_load"),
    "bound": ("bound_load", "bound_mean_load"),
}
_WORST = ("worst_home_imbalance", "worst_imbalance")
_SUMS = {field.name for field in dataclasses.fields(LayerStats)} - {
    "layer",
    "rank",
    "num_ranks",
    "by_status",
    *_QUOTIENTS,
    *_WORST,
}
