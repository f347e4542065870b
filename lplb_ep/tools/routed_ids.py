"""Expert ids of tokens, counted: padding and layers without a router are left out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .recording_files import MAX_EXPERTS, check_size

# One in so many tokens.
_NO_COINCIDENCE = 1000


class Counted(NamedTuple):
    """The counts of ids."""

    counts: npt.NDArray[np.int64]
    """[N, L, E]: tokens that picked each expert, by batch and layer."""
    num_dropped: int
    """Rows of layers with a router that are padding, and so are not counted."""


def count_ids(
    ids: npt.NDArray[Any], source: str, num_experts: int | None, tokens_per_batch: int | None
) -> Counted:
    """Counts the picks of each expert.

    A row that has one number K times is no choice of a router. It is padding where the number is 0,
    -1, 255 or the largest of the dtype. So are tokens at the end whose rows are 0, 1, … in every
    layer. A layer of padding alone has no router, as vLLM fills dense layers with zeros.

    Args:
        ids: [L, T, K] integers, -1 = no pick.
        source: where they come from, for messages.
        num_experts: E; by default one more than the largest id.
        tokens_per_batch: cuts the tokens into batches of so many, and drops the rest.

    Raises:
        ValueError: an id is out of range, a token picks an expert twice, or there are fewer tokens
            than a batch has.
    """
    num_layers, num_tokens, _ = ids.shape
    size = num_tokens if tokens_per_batch is None else tokens_per_batch
    if not 1 <= size <= num_tokens:
        raise ValueError(f"{source}: tokens_per_batch must be in [1, {num_tokens}]; got {size}")
    if num_experts is not None and not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{source}: num_experts must be in [1, {MAX_EXPERTS}]; got {num_experts}")
    padding = _padding(ids)
    routed = ~padding.all(axis=1)
    ids = np.where(padding[..., None], -1, ids.astype(np.int64))
    most = MAX_EXPERTS if num_experts is None else num_experts
    wrong = np.argwhere((ids < -1) | (ids >= most))
    if len(wrong):
        layer, token, pick = wrong[0].tolist()
        raise ValueError(
            f"{source}: ids must be -1 or in [0, {most}); got {ids[layer, token, pick]} for token "
            f"{token} of layer {layer}"
        )
    experts = int(ids.max(initial=-1)) + 1 if num_experts is None else num_experts
    num_batches = num_tokens // size
    check_size(source, num_batches, num_layers, experts)
    counts = np.zeros((num_batches, num_layers, experts), np.int64)
    batch = np.repeat(np.arange(num_batches), size)[:, None]
    for layer in np.flatnonzero(routed):
        picks = ids[layer, : num_batches * size]
        _check_distinct(picks, int(layer), source)
        cell = (batch * experts + picks)[picks != -1]
        counts[:, layer] = np.bincount(cell, minlength=num_batches * experts).reshape(-1, experts)
    return Counted(counts, int(padding[routed].sum()))


def _padding(ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """[L, T]: the rows that no router chose."""
    num_picks, first = ids.shape[2], ids[..., 0].astype(np.int64)
    if num_picks == 1:
        # Nothing tells one pick from padding, but a whole layer of one number.
        return (first == -1) | (first == first[:, :1]).all(axis=1, keepdims=True)
    largest = min(np.iinfo(ids.dtype).max, np.iinfo(np.int64).max)
    padding = (ids == ids[..., :1]).all(axis=2) & np.isin(first, [0, -1, 255, largest])
    routed = ids[~padding.all(axis=1)]
    ranges = (routed == np.arange(num_picks)).all(axis=2).all(axis=0)
    # Routers that choose these experts, in this order: is that more than a coincidence?
    experts = int(routed[:, ~ranges].max(initial=0)) + 1
    if math.comb(experts, num_picks) ** len(routed) > _NO_COINCIDENCE:
        padding |= np.logical_and.accumulate((ranges | padding.all(axis=0))[::-1])[::-1]
    return padding


def _check_distinct(picks: npt.NDArray[np.int64], layer: int, source: str) -> None:
    ordered = np.sort(picks, axis=1)
    twice = np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)).any(1))
    if twice.size:
        raise ValueError(
            f"{source}: token {twice[0]} of layer {layer} picks an expert twice: "
            f"{picks[twice[0]].tolist()}; are these ids, and is the layout right?"
        )
