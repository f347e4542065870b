"""Flags in the host's memory by which kernels report faults of a batch."""

from __future__ import annotations

import functools

import torch

from ..comm.watchdog import look, missing_ranks, newly_missing, watch
from ..errors import RankError
from ..logs import logger
from ..placement.table import Placement
from .backend import REASONS
from .home import out_of_range
from .host import log_home
from .structs import NUM_ERROR_FLAGS, ErrorFlag, Status

log = logger(__name__)


class ErrorFlags:
    """The flags of one planner. Kernels set them, and the CPU reads them without waiting.

    Args:
        placement: the copies.
        rank: this rank. What all ranks know the first one logs.
        layer: names the layer in messages.
        timeout_s: how long kernels wait for another rank's counts, in seconds.
        abort_on_timeout: whether the process ends when a rank is missing after that time.
    """

    def __init__(
        self, placement: Placement, rank: int, layer: str, timeout_s: float, abort_on_timeout: bool
    ) -> None:
        self._placement, self._rank, self._layer = placement, rank, layer
        self._timeout_s = timeout_s
        self._memory = torch.zeros(placement.num_ranks + NUM_ERROR_FLAGS, dtype=torch.int32)
        self._memory = self._memory.pin_memory()
        words = self._memory.numpy()
        self.missing, self.flags = words[: placement.num_ranks], words[placement.num_ranks :]
        """[R] 1 where a rank's row did not come in time; and [NUM_ERROR_FLAGS] 1 where a batch
        ended with that status, then for each `ErrorFlag`."""
        self.missing_address = self._memory.data_ptr()
        self.address = self.missing_address + 4 * placement.num_ranks
        self._clear = self.flags.tobytes()
        self._logged: set[Status] = set()
        say = functools.partial(missing_ranks, self.missing, layer, timeout_s)
        watch(self, newly_missing(self.missing, say), abort=abort_on_timeout)

    def raise_errors(self) -> None:
        """Raises or logs what was found wrong with earlier batches, and clears the flags.

        Raises:
            ValueError: a batch's `topk_idx` or given counts were wrong.
            RankError: another rank's fault, or a rank that is missing.
        """
        if self.flags.tobytes() == self._clear:
            return
        seen = self.flags.nonzero()[0].tolist()
        self.flags[seen] = 0
        for status in (REASONS.keys() & seen) - self._logged:
            self._logged.add(status)
            if self._rank == 0:
                log_home(self._layer, status)
        faults = {
            ErrorFlag.OUT_OF_RANGE: out_of_range(self._placement),
            ErrorFlag.REPEATED_PICK: ValueError(
                "a token of an earlier batch's topk_idx picked an expert twice; "
                "LPLB_EP_CHECK=1 names it at once"
            ),
            ErrorFlag.MISCOUNTED: ValueError(
                "an earlier batch's counts were not those of its topk_idx"
            ),
            Status.TIMED_OUT: RankError(missing_ranks(self.missing, self._layer, self._timeout_s)),
            Status.OUT_OF_STEP: RankError(
                "ranks planned different batches: another placement, another slot, or the same "
                "ones in another order"
            ),
            Status.REFUSED: RankError("a rank refused an earlier batch's topk_idx; see its error"),
        }
        if Status.TIMED_OUT in seen:
            look(self)  # so that it is logged
            self.missing[:] = 0
        errors = [error for index, error in faults.items() if index in seen]
        for error in errors[1:]:
            log.error("%s", error)
        if errors:
            raise errors[0]
