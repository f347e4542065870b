"""Small copies from and to a GPU beside its work, without waiting for it."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from .device import captures_go_on


def copy_beside(device: int, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copies in order, and waits for that alone. Another thread may capture a graph.

    What the GPU writes meanwhile may be there in part: of a word of 8 bytes all or nothing.

    Args:
        device: the index of a CUDA device.
        pairs: each (to, from), of which one lies on the device and one in pinned memory.
    """
    with captures_go_on(), torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        for to, source in pairs:
            to.copy_(source, non_blocking=True)
        _stream(device).synchronize()


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
