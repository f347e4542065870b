"""What the plans of a planner's batches come to, added up from the plans themselves."""

import collections
import math
from fractions import Fraction

import torch

from lplb_ep.planning.structs import NUM_TALLIES, NUM_TOTALS, Status
from lplb_ep.planning.tallies import Tally


class Tallied:
    """The totals that a planner must have, and its samples."""

    def __init__(self, rank, base_load=None, speed=None, every=0, by_tokens=True, mark_every=0):
        self.rank, self.base_load, self.speed, self.every = rank, base_load, speed, every
        self.by_tokens, self.mark_every = by_tokens, mark_every
        self.marked = [0] * NUM_TOTALS
        self.sums, self.batches, self.samples = collections.Counter(), collections.Counter(), {}
        self.window = 0
        self.begin_window()

    def begin_window(self, number=None):
        """The worst batches are those of the window; it begins with the next batch."""
        self.worst = {Tally.WORST_HOME: (0, 0), Tally.WORST: (0, 0)}
        self.window = self.window if number is None else number

    def add(self, plan, placement, again=False):
        """A plan, of a batch on a placement; again: in a backward pass."""
        self._add(plan, placement, again)
        if self.mark_every and sum(self.batches.values()) % self.mark_every == 0:
            self.marked = self.totals

    def _add(self, plan, placement, again):
        status, R = Status(int(plan.status)), placement.num_ranks
        before = sum(self.batches.values()) - self.sums[Tally.RECOMPUTED]
        self.batches[status] += 1
        self.sums[Tally.RECOMPUTED] += again
        if status >= Status.BAD_COUNTS:
            return
        load = plan.counts.long().sum(0).tolist()
        if self.every and before % self.every == 0 and not again:
            self.samples[before] = load
        home_rank = placement.home_rank.tolist()
        at_home = [0] * R
        for expert, tokens in enumerate(load):
            at_home[home_rank[expert]] += tokens
        planned, base = plan.rank_load.tolist(), [0] * R
        if self.base_load is not None:
            base = self.base_load.tolist()
        total = sum(load) + sum(base)
        most = {}
        for first, loads in ((Tally.WORST_HOME, at_home), (Tally.WORST, planned)):
            times = [Fraction(a + b) for a, b in zip(loads, base, strict=True)]
            if self.speed is not None:
                mean = Fraction(int(self.speed.sum()), R)
                times = [t * mean / s for t, s in zip(times, self.speed.tolist(), strict=True)]
            most[first] = min(2**31 - 1, math.ceil(max(times)))
            largest, of = self.worst[first]
            if total and (not of or Fraction(most[first], total) > Fraction(largest, of)):
                self.worst[first] = most[first], total
        guests = [(r, e) for r, row in enumerate(plan.guests.tolist()) for e in row if e >= 0]
        is_known = status is Status.OPTIMAL and self.by_tokens
        self.sums.update(
            {
                Tally.ROWS: sum(load),
                Tally.LOAD: total,
                Tally.HOME: most[Tally.WORST_HOME],
                Tally.GOT: most[Tally.WORST],
                Tally.BOUND: most[Tally.WORST] if is_known else 0,
                Tally.BOUND_LOAD: total if is_known else 0,
                Tally.OWN_HOME: at_home[self.rank],
                Tally.OWN: planned[self.rank],
                Tally.GUESTS: len(guests),
                Tally.SENT: sum(home_rank[e] == self.rank for _, e in guests),
                Tally.RECEIVED: sum(r == self.rank for r, _ in guests),
            }
        )

    @property
    def totals(self):
        """[NUM_TOTALS] as a list."""
        out = [0] * NUM_TOTALS
        for tally, number in self.sums.items():
            out[tally] = number
        for first, pair in self.worst.items():
            out[first : first + 2] = pair
        out[Tally.WINDOW] = self.window
        for status, number in self.batches.items():
            out[NUM_TALLIES + status] = number
        return out


def read(planner, marked=False):
    """A planner's totals, as a list."""
    from lplb_ep.planning.statistics import read_totals

    return read_totals([planner.statistics], marked=marked)[0].tolist()


def in_backward(function):
    """Calls a function as activation checkpointing does: within a backward pass."""

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            function()
            return gradient

    Recompute.apply(torch.ones(1, requires_grad=True)).backward()
