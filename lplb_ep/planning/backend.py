"""The protocol of backends, which make a planner's plans: the host's, or a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from ..comm.exchange import Exchange
from ..placement.table import Placement
from .plan import Plan
from .statistics import Statistics
from .structs import HEAD, Status

_ROW_MULTIPLE = 1024

REASONS = {
    Status.STALE: "STALE, some rank's replicas are not known to equal their homes, or its layer "
    "has guest slots and no Guests that can fill them. Replicas.copy_weights() makes replicas "
    "equal; LPLB_EP_REPLICAS=valid says that the program does",
    Status.BAD_COUNTS: "BAD_COUNTS, the ranks' counts are negative or total more than 2**31 - 1",
    Status.NOT_CONVERGED: "NOT_CONVERGED, the solver ran out of rounds; please report the load",
    Status.INFEASIBLE: "INFEASIBLE, an expert's load is more than the max_quota of its copies",
}
"""Why a batch goes to the home slots, for the log."""


def row_size(placement: Placement) -> int:
    """Integers of an exchanged row, padded: ranks that plan with placements of different E meet.

    So do ranks of which some ask for a least gain.
    """
    size = HEAD + placement.num_experts + placement.num_ranks
    return -(-size // _ROW_MULTIPLE) * _ROW_MULTIPLE


class Batch(NamedTuple):
    """What a rank brings to a plan beside its counts."""

    topk_idx: torch.Tensor
    """[T, K] int32 or int64, on any device."""
    status: Status
    """Of this rank: OPTIMAL or STALE."""
    indices: str = "logical"
    """What `topk_idx` names: "logical" experts or "physical" ones; "logical" where the backend does
    not check late."""
    distinct: bool = False
    """Whether a backend that checks late refuses a token that picks one expert twice."""
    is_captured: bool = False
    """Whether a CUDA graph is being captured."""
    wants_plan: bool = True
    """Whether the caller may ask for the plan, and not for the slots alone."""
    is_again: bool = False
    """Whether a backward pass plans a batch again, as activation checkpointing does."""
    keeps: torch.Tensor | None = None
    """[T, K] slots that picks keep where the batch stays, and by which it is judged; None: homes. A
    backend that checks late has them in `topk_idx`."""


class Backend(Protocol):
    """Makes a planner's plans. The host's is the definition, and a GPU's equals it bit for bit."""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can capture a plan."""

    @property
    def checks_late(self) -> bool:
        """Whether entries of `topk_idx` are checked after the call has returned."""

    def route(self, batch: Batch, exchange: Exchange) -> Plan:
        """Plans a batch by counts that are exchanged. Collective.

        Raises:
            RankError: a rank refused its input, or ranks plan different batches; a GPU raises it
                from `raise_errors`.
        """

    def route_given(self, batch: Batch, counts: torch.Tensor) -> Plan:
        """Plans a batch by given counts [R, E] int32 or int64.

        Raises:
            ValueError: counts out of range, or not those of `topk_idx`; a GPU raises it from
                `raise_errors`.
        """

    def refuse(self, exchange: Exchange) -> None:
        """Sends a refusal of this rank's input to the other ranks, instead of a batch."""

    def mask(self, given: torch.Tensor, planned: torch.Tensor) -> torch.Tensor:
        """Slots [T, K] of `planned`, but -1 where `given` [T, K] is negative."""

    def prepare(self, placement: Placement, head: list[int]) -> Callable[[], None]:
        """Makes ready for other replicas, and for another head of the exchanged row.

        Returns:
            A function that puts them in force and cannot fail.

        Raises:
            ValueError: their tables do not fit where those of the first placement lie.
        """

    def synchronize(self) -> None:
        """Waits for all batches that were given to the backend."""

    def raise_errors(self) -> None:
        """Raises or logs what was found wrong with earlier batches, without waiting.

        Raises:
            ValueError: of a batch's `topk_idx` or given counts.
            RankError: another rank's fault, or a rank that is missing.
        """

    @property
    def statistics(self) -> Statistics:
        """Statistics of its batches."""
