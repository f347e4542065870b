"""Finds out which ranks a collective of `torch.distributed` waits for.

A rank that has waited for a while says so in the group's store. Who does not say so when the time
is over is missing. Nothing of this happens while all ranks come soon.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ..logs import logger
from .watchdog import late

log = logger(__name__)

_INTERVAL_S = 0.1  # between two looks at the store
_LEAVE_S = 1.0  # for the last write to the store
_PROBE_TAG = 0x6C706C62  # of a message that no one receives

# The last stall's thread, which may not be done with the store.
_last: WeakKeyDictionary[dist.ProcessGroup, threading.Thread] = WeakKeyDictionary()


def patience_s(timeout_s: float) -> float:
    """How many seconds a rank waits before it says that it does."""
    return min(1.0, timeout_s / 4)


def grace_s(timeout_s: float) -> float:
    """How many seconds a rank looks for others that wait, when its own time is over.

    A rank that came just before the limit says only `patience_s` later that it waits.
    """
    return patience_s(timeout_s) + 1.0


class Stall:
    """A wait that this rank makes known to the others, while it looks for theirs.

    A thread of its own talks with the store, which may hang with the rank that keeps it.

    Args:
        group: the ranks.
        what: what they send, for messages.
    """

    def __init__(self, group: dist.ProcessGroup, what: str = "counts") -> None:
        self._what = what
        self._store = dist.PrefixStore("lplb_ep", _store_of(group))
        self._rank, self._keeper = group.rank(), _keeper(group)
        self._others = set(range(group.size())) - {self._rank}
        self._waiting: set[int] = set()
        self._gone: set[int] = set()  # those that have given up
        self._answers, self._fails = False, False
        self._asked, self._over = threading.Event(), threading.Event()
        self._gives_up = False
        self._before = _last.get(group)
        self._thread = threading.Thread(target=self._talk, name="lplb_ep stall", daemon=True)
        _last[group] = self._thread
        self._thread.start()

    def ask(self) -> None:
        """Starts to look which other ranks wait."""
        self._asked.set()

    def end(self, *, gives_up: bool = False) -> None:
        """Ends the wait.

        Args:
            gives_up: whether this rank will never take the rows for which it waited. Ranks that
                come late read that in the store.
        """
        self._gives_up = gives_up
        self._over.set()
        self._asked.set()
        if gives_up:
            self._thread.join(_LEAVE_S)

    def is_settled(self, closed: set[int]) -> bool:
        """Whether looking longer would tell no more.

        Args:
            closed: ranks whose connections are closed.
        """
        unheard = self._unheard() - closed
        ended = closed - self._waiting - self._gone
        return self._fails or (self._answers and (bool(ended) or not unheard))

    def explain(self, name: str, waited_s: float) -> str:
        """Says which ranks did not come in time.

        Args:
            name: what the rows are for.
            waited_s: how many seconds this rank waited.
        """
        if not self._answers:
            if self._keeper not in self._others:
                return (
                    f"{self._what} did not arrive within {waited_s:g} s ({name}), and the group's "
                    "store does not answer, so the missing ranks are unknown"
                )
            late_keeper = late([self._keeper], name, waited_s, self._what)
            return f"{late_keeper}. The group's store does not answer either"
        if unheard := self._unheard():
            return late(sorted(unheard), name, waited_s, self._what)
        if self._gone:
            return self._came_late(name)
        return (
            f"{self._what} did not arrive within {waited_s:g} s ({name}), though all ranks wait "
            "for them: a GPU or the network hangs, or is slow"
        )

    def explain_failure(self, name: str, closed: set[int], *, has_waited: bool) -> str:
        """Says which ranks made a collective fail.

        Args:
            name: what the rows are for.
            closed: ranks whose connections are closed.
            has_waited: whether this rank had waited for a while before.
        """
        ended = closed - self._waiting - self._gone
        if not ended and self._gone and not has_waited:
            return self._came_late(name)
        ended = ended or self._unheard() or closed
        return f"ranks {sorted(ended)} ended before they sent their {self._what} ({name})"

    def _unheard(self) -> set[int]:
        return self._others - self._waiting - self._gone

    def _came_late(self, name: str) -> str:
        return (
            f"this rank came late: ranks {sorted(self._gone)} had given up waiting for its "
            f"{self._what} ({name})"
        )

    def _talk(self) -> None:
        if self._before is not None:
            self._before.join()
            self._before = None
        try:
            self._store.set(f"waits/{self._rank}", "1")
            self._asked.wait()
            while not self._over.is_set():
                for rank in sorted(self._unheard()):
                    if self._is_set("waits", rank):
                        self._waiting.add(rank)
                    elif self._is_set("left", rank):
                        self._gone.add(rank)
                self._answers = True
                self._over.wait(_INTERVAL_S)
            if self._gives_up:
                self._store.set(f"left/{self._rank}", "1")
            self._store.set(f"waits/{self._rank}", "0")
        except RuntimeError as error:
            log.debug("the group's store fails: %s", error)
            self._fails = True

    def _is_set(self, what: str, rank: int) -> bool:
        # Adding 0 reads a key without waiting for one that is absent, in every kind of store.
        return self._store.add(f"{what}/{rank}", 0) != 0


def closed_connections(group: dist.ProcessGroup) -> set[int]:
    """The ranks of a gloo group whose connections to this one are closed."""
    closed = set()
    for rank in set(range(group.size())) - {group.rank()}:
        try:
            target = dist.get_global_rank(group, rank)
            dist.isend(torch.zeros(1), dst=target, group=group, tag=_PROBE_TAG)
        except RuntimeError:
            closed.add(rank)
    return closed


def _store_of(group: dist.ProcessGroup) -> dist.Store:
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return dist.distributed_c10d._world.pg_map[group][1]  # before torch 2.7


def _keeper(group: dist.ProcessGroup) -> int:
    """The rank in the group of the process that keeps its store, as a rule; -1: none of them."""
    ranks = dist.get_process_group_ranks(group)
    return ranks.index(0) if 0 in ranks else -1
