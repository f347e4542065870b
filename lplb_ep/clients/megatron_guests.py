"""Guests of Megatron-Core's experts, with a pool for each micro-batch in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..weights.guests import Guests
from ..weights.pool import GuestPool


class GuestsInTurn:
    """The guests of one layer, in a pool that no other micro-batch uses.

    Several are in flight where one's backward pass runs beside another's forward pass. A layer has
    one batch at a time between dispatch and experts.

    Args:
        guests: of the layer.
        pools: its pools, by slot: as many as micro-batches in flight.
    """

    def __init__(self, guests: Guests, pools: Sequence[GuestPool]) -> None:
        self._guests, self._pools, self._slot = guests, pools, 0

    @property
    def own(self) -> range:
        """As `Slots.own`: residents, which are the first."""
        return range(self._guests.layer.placement.num_resident_slots)

    def prepare(self) -> int:
        """Chooses a pool: a batch is to be dispatched. The same on all ranks.

        Returns:
            Its slot.
        """
        behind = self._slot + 1
        turns = [*self._pools[behind:], *self._pools[:behind]]
        self._slot = next((pool for pool in turns if not pool.is_awaited), turns[0]).slot
        return self._slot

    def modules(self, x: Tensor) -> tuple[Tensor, list[Callable[..., Any]]]:
        """As `Guests.modules`, for the batch that was dispatched last."""
        return self._guests.modules(x, self._slot)

    def weights(self, x: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        """As `Guests.weights`, for the batch that was dispatched last."""
        return self._guests.weights(x, self._slot)

    def late_weights(self) -> tuple[Mapping[str, Any], Callable[[], None]]:
        """As `Guests.late_weights`, for the batch that was dispatched last."""
        return self._guests.late_weights(self._slot)
