"""Statistics of a planner's batches: sums, and sampled loads. Replays of graphs are included.

`add_batch` is the definition, by which the host sums up; kernels do the same on a GPU.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..gpu.beside import copy_beside
from ..placement.table import Placement
from ..problem import MAX_TOTAL
from . import structs
from .structs import NUM_TALLIES, NUM_TOTALS, NUM_WORDS, Status
from .tallies import Tally

MAX_SAMPLES = 64
"""Loads of sampled batches that a planner keeps until they are read."""
_MAX_TRIES = 100
_reading = threading.Lock()
"""Held while copies of a GPU's words are made and read: threads share the memory that has them."""

Totals = npt.NDArray[np.int64]
"""[NUM_TOTALS]: each `Tally`, then how many batches ended with each `Status`."""
Samples = dict[int, npt.NDArray[np.int32]]
"""[E] loads of batches, by the number of batches before. Batches that a backward pass planned again
or that were not exchanged are not counted."""


class Statistics(Protocol):
    """Those of one planner. Nothing of it waits for a batch; `read_totals` reads the totals."""

    def begin_window(self) -> None:
        """Has the worst batches looked for anew."""

    def take_samples(self, *, all_done: bool = False) -> Samples:
        """Samples that were not taken before, of batches that are done.

        Those that newer ones overwrote are lost.

        Args:
            all_done: whether all batches are known to be done; else the last ones may be left.
        """


def add_batch(
    totals: Totals,
    window: int,
    status: Status,
    load: torch.Tensor,
    rank_load: torch.Tensor,
    guests: npt.NDArray[np.int32],
    placement: Placement,
    rank: int,
    base_load: torch.Tensor | None = None,
    speed: torch.Tensor | None = None,
    *,
    by_tokens: bool = True,
    again: bool = False,
) -> None:
    """Adds a batch to the totals, in whole numbers.

    Args:
        totals: [NUM_TOTALS], changed in place.
        window: the number of the window, for the worst batches.
        status: how it ended.
        load: [E] int64: tokens of each expert; all further ones count below BAD_COUNTS only.
        rank_load: [R] tokens of each rank, base loads not included.
        guests: [R, G] the expert in each guest slot, -1 = none.
        placement: the copies.
        rank: this rank.
        base_load, speed: [R] of the problem.
        by_tokens: whether a planned batch has the least largest load.
        again: whether a backward pass plans a batch again.
    """
    totals[NUM_TALLIES + status] += 1
    totals[Tally.RECOMPUTED] += again
    if totals[Tally.WINDOW] != window:
        totals[Tally.WORST_HOME : Tally.WINDOW] = 0
        totals[Tally.WINDOW] = window
    if status >= Status.BAD_COUNTS:
        return
    R = placement.num_ranks
    own = rank_load.numpy().astype(np.int64)
    at_home = np.bincount(placement.home_rank, load.numpy(), R).astype(np.int64)
    base = 0 if base_load is None else base_load.numpy()

    def largest(loads: npt.NDArray[np.int64]) -> int:
        loads = loads + base
        if speed is not None:
            of_mean = speed.numpy() * R
            loads = np.minimum((loads * int(speed.sum()) + of_mean - 1) // of_mean, MAX_TOTAL)
        return int(loads.max())

    rows = int(load.sum())
    total, home, got = rows + int(np.sum(base)), largest(at_home), largest(own)
    taken = guests[guests >= 0]
    is_known = status is Status.OPTIMAL and by_tokens
    for tally, number in (
        (Tally.ROWS, rows),
        (Tally.LOAD, total),
        (Tally.HOME, home),
        (Tally.GOT, got),
        (Tally.BOUND, got if is_known else 0),
        (Tally.BOUND_LOAD, total if is_known else 0),
        (Tally.OWN_HOME, at_home[rank]),
        (Tally.OWN, own[rank]),
        (Tally.GUESTS, taken.size),
        (Tally.SENT, (placement.home_rank[taken] == rank).sum()),
        (Tally.RECEIVED, (guests[rank] >= 0).sum()),
    ):
        totals[tally] += number
    for first, number in ((Tally.WORST_HOME, home), (Tally.WORST, got)):
        before, load_before = map(int, totals[first : first + 2])
        if total and (not load_before or number * load_before > before * total):
            totals[first : first + 2] = number, total


def _num_to_sample(totals: Totals) -> int:
    """Batches that samples count: their counts were exchanged, and they were not planned again."""
    others = totals[Tally.RECOMPUTED] + totals[NUM_TALLIES + Status.REUSED]
    return int(totals[NUM_TALLIES:].sum() - others)


class HostStatistics:
    """Those of a planner on the CPU.

    Args:
        every: batches from one sample of loads to the next; 0: none is taken.
        mark_every: batches from one whose totals are marked to the next; 0: none are.
    """

    def __init__(self, every: int = 0, mark_every: int = 0) -> None:
        self.totals: Totals = np.zeros(NUM_TOTALS, np.int64)
        self.marked: Totals = np.zeros(NUM_TOTALS, np.int64)
        self._every, self._mark_every, self._window = every, mark_every, 0
        self._samples: collections.deque[tuple[int, npt.NDArray[np.int32]]] = collections.deque(
            maxlen=MAX_SAMPLES
        )

    def add(
        self, status: Status, load: torch.Tensor, *rest: Any, by_tokens: bool, again: bool
    ) -> None:
        """As `add_batch`."""
        totals = self.totals.copy()  # another thread may read the old ones
        before = _num_to_sample(totals)
        is_sampled = self._every and before % self._every == 0 and not again
        if is_sampled and status < Status.BAD_COUNTS:
            self._samples.append((before, load.numpy().astype(np.int32)))
        add_batch(totals, self._window, status, load, *rest, by_tokens=by_tokens, again=again)
        self.totals = totals
        if self._mark_every and int(totals[NUM_TALLIES:].sum()) % self._mark_every == 0:
            self.marked = totals

    def begin_window(self) -> None:
        """As `Statistics.begin_window`."""
        self._window += 1

    def take_samples(self, *, all_done: bool = False) -> Samples:
        """As `Statistics.take_samples`."""
        taken: Samples = {}
        while self._samples:
            taken.update([self._samples.popleft()])
        return taken


class DeviceStatistics:
    """Those of a planner on a GPU, where kernels keep them.

    Args:
        placement: the copies.
        device: the GPU.
        every: batches from one sample of loads to the next; 0: none is taken.
        by_tokens: as for `add_batch`.
        mark_every: batches from one whose totals are marked to the next; 0: none are.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        every: int = 0,
        by_tokens: bool = True,
        mark_every: int = 0,
    ) -> None:
        self.device, self._every, self._by_tokens, self._taken = device, every, by_tokens, -1
        self._mark_every = mark_every
        self.num_samples = MAX_SAMPLES if every else 0
        self.totals = torch.zeros(NUM_WORDS, dtype=torch.int64, device=device)
        """[NUM_WORDS]: the totals, the window, and the totals when they were marked last."""
        sizes = (self.num_samples, placement.num_experts), (self.num_samples,)
        self.samples, self.sampled = (
            torch.full(size, -1, dtype=torch.int32, device=device) for size in sizes
        )
        self._read = torch.zeros(2, NUM_WORDS, dtype=torch.int64).pin_memory()
        self._window = torch.zeros(1, dtype=torch.int64).pin_memory()
        self._read_samples, self._read_sampled = (
            torch.zeros(size, dtype=torch.int32).pin_memory() if every else torch.empty(0)
            for size in sizes
        )

    @property
    def num_bytes(self) -> int:
        """Device memory that they take."""
        held = self.totals, self.samples, self.sampled
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def pack(self, base: torch.Tensor | None, speed: torch.Tensor | None) -> bytes:
        """The struct `Statistics`.

        Args:
            base, speed: [R] int32 on the GPU, of the problem.
        """
        return structs.STATISTICS.pack(
            totals=self.totals.data_ptr(),
            samples=self.samples.data_ptr(),
            sampled=self.sampled.data_ptr(),
            base=0 if base is None else base.data_ptr(),
            speed=0 if speed is None else speed.data_ptr(),
            num_samples=self.num_samples,
            every=self._every,
            by_tokens=self._by_tokens,
            mark_every=self._mark_every,
        )

    def begin_window(self) -> None:
        """As `Statistics.begin_window`."""
        with _reading:
            self._window += 1
            window = self.totals[NUM_TOTALS : NUM_TOTALS + 1]
            copy_beside(self.device.index, [(window, self._window)])

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What `copy_beside` has to copy before `copied` is asked."""
        return [(half, self.totals) for half in self._read]

    def copied(self, marked: bool) -> Totals | None:
        """The totals that were copied, or those that were marked; None if a batch came meanwhile.

        A kernel writes all words at once, so two copies that agree are of one batch.
        """
        first, second = self._read.numpy()
        words = slice(NUM_TOTALS + 1, NUM_WORDS) if marked else slice(NUM_TOTALS)
        return first[words].copy() if (first == second).all() else None

    def take_samples(self, *, all_done: bool = False) -> Samples:
        """As `Statistics.take_samples`. A batch is known to be done when a later one is counted."""
        if not self.num_samples:
            return {}
        with _reading:
            return self._take_samples(all_done)

    def _take_samples(self, all_done: bool) -> Samples:
        pairs = [(self._read[0], self.totals), (self._read_sampled, self.sampled)]
        pairs += [(self._read_samples, self.samples), (self._read[1], self.totals)]
        copy_beside(self.device.index, pairs)
        num_done, num_later = (_num_to_sample(half[:NUM_TOTALS].numpy()) for half in self._read)
        round_trip = self._every * self.num_samples
        taken = {
            before: load.copy()
            for before, load in zip(
                self._read_sampled.tolist(), self._read_samples.numpy(), strict=True
            )
            # The batch behind those that were counted last may write meanwhile.
            if self._taken < before < num_done - (not all_done) and before + round_trip > num_later
        }
        self._taken = max(taken, default=self._taken)
        return dict(sorted(taken.items()))


def read_totals(many: Iterable[Statistics], *, marked: bool = False) -> list[Totals]:
    """The totals of several planners, as of the last batches that are done.

    It waits for no batch. A copy is made anew where a batch came meanwhile.

    Args:
        many: the planners' statistics.
        marked: whether to read those of the last batch that was marked.

    Raises:
        RuntimeError: batches come faster than they can be read.
    """
    given = list(many)
    found: dict[Statistics, Totals] = {}
    on_host = [one for one in given if isinstance(one, HostStatistics)]
    found.update({one: one.marked if marked else one.totals for one in on_host})
    on_gpu = [one for one in given if isinstance(one, DeviceStatistics)]
    for _ in range(_MAX_TRIES):
        left = [one for one in on_gpu if one not in found]
        if not left:
            return [found[one] for one in given]
        with _reading:
            for device in {one.device.index for one in left}:
                there = (one for one in left if one.device.index == device)
                copy_beside(device, [pair for one in there for pair in one.copies()])
            found.update(
                {one: totals for one in left if (totals := one.copied(marked)) is not None}
            )
    raise RuntimeError("batches come faster than their statistics can be read")


def batches_by_status(totals: Totals) -> collections.Counter[Status]:
    """How many batches ended with each status."""
    numbers = totals[NUM_TALLIES:].tolist()
    return collections.Counter({s: numbers[s] for s in Status if numbers[s]})
