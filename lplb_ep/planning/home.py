"""Every token at its expert's home: nothing is exchanged, solved or compiled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..placement.table import Placement
from .inputs import INDICES, logical_table, num_ids


class HomeRoutes:
    """Home slots of tensors on one GPU, by operations of torch; the CPU waits for nothing.

    Args:
        placement: the copies.
        device: of the tensors.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._placement, self.device = placement, device
        self._tables = _home_tables(placement, device)
        self._wrong = torch.zeros((), dtype=torch.bool, device=device)
        self._seen = torch.zeros((), dtype=torch.bool).pin_memory()

    def prepare(self, placement: Placement) -> Callable[[], None]:
        """Makes ready for other replicas, for captured graphs, too.

        Returns:
            A function that puts them in force.
        """
        tables = _home_tables(placement, self.device)

        def commit() -> None:
            # In place: kernels that a graph has captured read them where they are.
            for indices, table in self._tables.items():
                table.copy_(tables[indices])
            self._placement = placement

        return commit

    def raise_errors(self) -> None:
        """Raises what was found wrong with earlier batches, without waiting.

        Raises:
            ValueError: an entry of `topk_idx` was out of range, or named an empty slot.
        """
        if self._seen:
            self._wrong.zero_()
            self._seen.zero_()
            raise out_of_range(self._placement)

    def __call__(self, topk_idx: torch.Tensor, indices: str = "logical") -> torch.Tensor:
        """[T, K] ids on this GPU → [T, K] slots of the same dtype, -1 where the input is wrong."""
        count = num_ids(self._placement, indices)
        known = (topk_idx >= -1) & (topk_idx < count)
        slots = self._tables[indices][torch.where(known, topk_idx, -1).long()]
        self._wrong.logical_or_(((slots < 0) & (topk_idx != -1)).any())
        self._seen.copy_(self._wrong, non_blocking=True)
        return slots.to(topk_idx.dtype)


def _home_tables(placement: Placement, device: torch.device) -> dict[str, torch.Tensor]:
    """[E + 1] and [P - R G + 1] int32, by `INDICES`: the home slot of each id.

    It is -1 for an empty slot, and at the end.
    """
    homes = np.append(placement.home, np.int32(-1))
    of_slots = homes[logical_table(placement, torch.device("cpu")).numpy()]
    both = zip(INDICES, (homes, of_slots), strict=True)
    return {indices: torch.from_numpy(table).to(device) for indices, table in both}


def out_of_range(placement: Placement) -> ValueError:
    """The error of a batch whose `topk_idx` a GPU found wrong."""
    return ValueError(
        "an earlier batch's topk_idx had an entry that is neither -1 nor an expert in "
        f"[0, {placement.num_experts}) or its slot; "
        "LPLB_EP_CHECK=1 names it at once"
    )
