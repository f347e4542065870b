"""Every token at its expert's home: nothing is exchanged, solved or compiled."""

from __future__ import annotations

import functools

import numpy as np
import torch

from ..placement.table import Placement
from .inputs import num_ids


class HomeRoutes:
    """Home slots of tensors on one GPU, by operations of torch; the CPU waits for nothing.

    Args:
        placement: the copies.
        device: of the tensors.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._placement, self.device = placement, device
        self._wrong = torch.zeros((), dtype=torch.bool, device=device)
        self._seen = torch.zeros((), dtype=torch.bool).pin_memory()

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
        slots = home_table(self._placement, indices, self.device)[
            torch.where(known, topk_idx, -1).long()
        ]
        self._wrong.logical_or_(((slots < 0) & (topk_idx != -1)).any())
        self._seen.copy_(self._wrong, non_blocking=True)
        return slots.to(topk_idx.dtype)


@functools.lru_cache(maxsize=1024)
def home_table(placement: Placement, indices: str, device: torch.device) -> torch.Tensor:
    """[E + 1] or [P + 1] int32: the home slot of each id, -1 for an empty slot and at the end."""
    homes = np.append(placement.home, np.int32(-1))
    if indices == "physical":
        homes = homes[np.append(placement.physical_to_logical, -1)]
    return torch.from_numpy(homes).to(device)


def out_of_range(placement: Placement) -> ValueError:
    """The error of a batch whose `topk_idx` a GPU found wrong."""
    return ValueError(
        "an earlier batch's topk_idx had an entry that is neither -1 nor an expert in "
        f"[0, {placement.num_experts}); LPLB_EP_CHECK=1 names it at once"
    )
