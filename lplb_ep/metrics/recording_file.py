"""The file of a recording, as `lplb_ep.tools.recordings` reads it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt


def write_recording(
    file: str | os.PathLike[str] | BinaryIO,
    counts: npt.NDArray[Any],
    layers: Sequence[int],
    source: str,
    scale: float = 1.0,
    **further: Any,
) -> None:
    """Writes a recording as `.npz`.

    Args:
        file: a path that ends so, or an open file.
        counts: [N, L, E] tokens of each expert.
        layers: the L layers' numbers.
        source: where the counts come from, in words.
        scale: as `Recording` has it.
        further: arrays that readers of the counts pass over.

    Raises:
        OSError: the file is not writable.
    """
    np.savez_compressed(
        file,
        lplb_ep_recording=1,
        counts=counts,
        layers=np.array(layers),
        source=source,
        scale=scale,
        **further,
    )
