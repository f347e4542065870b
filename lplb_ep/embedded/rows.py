"""Rows of tokens: the ranks they go to, their exchange, placement and sums.

R   ranks
E   experts
L   experts of a rank: E / R
T   tokens of this rank
K   picks of a token
H   elements of a row
S   scales of a row
N   tokens received by this rank
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ..comm.collectives import gather_rows

OptionalTensor = torch.Tensor | None
Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Data, or data and scales."""
Bias = torch.Tensor | tuple[OptionalTensor, OptionalTensor] | None
Handle = tuple[torch.Tensor, ...]
LowLatencyHandle = tuple[torch.Tensor, torch.Tensor, int, int, int]
Hook = Callable[[], None]


def align(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return (count + multiple - 1) // multiple * multiple


def token_indices(x: torch.Tensor) -> torch.Tensor:
    """[T] int32: 0, 1, ..."""
    return torch.arange(len(x), dtype=torch.int32, device=x.device)


def local_experts(topk_idx: torch.Tensor, rank: int, num_local_experts: int) -> torch.Tensor:
    """[N, K]: global expert indices as the rank's own, -1 for those of other ranks."""
    local = topk_idx - rank * num_local_experts
    return local.masked_fill((local < 0) | (local >= num_local_experts), -1)


def tokens_in_ranks(topk_idx: torch.Tensor, num_local_experts: int, num_ranks: int) -> torch.Tensor:
    """[T, R] bool: which ranks a token goes to."""
    rank = topk_idx.long().div(num_local_experts, rounding_mode="floor") + 1
    in_rank = torch.zeros(len(topk_idx), num_ranks + 1, dtype=torch.bool, device=topk_idx.device)
    return in_rank.scatter_(1, rank, True)[:, 1:].contiguous()


def send_positions(in_rank: torch.Tensor) -> torch.Tensor:
    """[T, R] int64: a token's place among those sent to a rank, in token order; -1: not sent."""
    return torch.where(in_rank, in_rank.cumsum(0) - 1, -1)


def unwritten(fresh: torch.Tensor) -> torch.Tensor:
    """Memory that DeepEP leaves uninitialised, filled so that code which reads it shows it.

    Floating dtypes get NaN. Integers get 0, which looks like an expert or a row, and a number far
    beyond all of them, in turns. Never -1, which code takes for none.
    """
    storage = fresh.untyped_storage()
    storage.fill_(255)  # type: ignore[attr-defined]
    if not fresh.is_floating_point() and fresh.dtype != torch.bool:
        values = torch.empty(0, dtype=fresh.dtype, device=fresh.device).set_(storage)
        values[0::2] = 0
        values[1::2] = torch.iinfo(fresh.dtype).max // 3 * 2
    return fresh


def check_agreement(group: dist.ProcessGroup, device: torch.device, **sizes: int) -> None:
    """Compares sizes that a call brings with the other ranks'. Collective.

    Kernels do not compare them: rows would land in each other's place, or never arrive.

    Raises:
        ValueError: they differ, on all ranks alike; names the argument and the values.
    """
    own = torch.tensor(list(sizes.values()), dtype=torch.int64, device=device)
    every = gather_rows(own, group)
    for name, values in zip(sizes, every.t().tolist(), strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"{name} must be the same on all ranks; got {values}")


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[N, bytes of a row]: bytes move where float8 cannot, over gloo as well as in indexing."""
    rows = tensor.detach().contiguous()
    return (rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)).view(torch.uint8)


def place_rows(
    rows: torch.Tensor, position: torch.Tensor, size: int, row: OptionalTensor = None
) -> torch.Tensor:
    """Rows of any dtype at other positions; the others are unwritten.

    Args:
        rows: [N, ...].
        position: [M] int64, where to put each row.
        size: of the result.
        row: [M] int64, which rows to put; None = all, in order.

    Returns:
        [size, ...].
    """
    placed = unwritten(rows.new_empty(size, *rows.shape[1:]))
    source = _as_bytes(rows)
    _as_bytes(placed)[position] = source if row is None else source[row]
    return placed


def pad_rows(rows: torch.Tensor, size: int) -> torch.Tensor:
    """`rows` and then unwritten ones, `size` in all."""
    return place_rows(rows, torch.arange(len(rows), device=rows.device), size)


def differences(prefix: torch.Tensor) -> list[int]:
    """The counts whose inclusive prefix sum `prefix` is."""
    return prefix.diff(prepend=prefix.new_zeros(1)).tolist()


def exchange_rows(
    group: dist.ProcessGroup,
    tensors: Sequence[torch.Tensor],
    row: torch.Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int] | None = None,
) -> tuple[list[torch.Tensor], list[int]]:
    """Sends rows of several tensors to every rank, in one `all_to_all_single`. Collective.

    Args:
        group: the ranks.
        tensors: each [N, ...], any dtypes, on every rank the same row shapes.
        row: [M] int64, which rows to send: first those for rank 0, and so on.
        send_counts: R counts with sum M.
        receive_counts: how many rows come from each rank; None = not known, exchanged first.

    Returns:
        The received rows of each tensor, by source rank and there in the sender's order, and how
        many came from each rank.
    """
    if receive_counts is None:
        sent = torch.tensor(send_counts, dtype=torch.int64, device=row.device)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        receive_counts = received.tolist()
    packed = torch.cat([_as_bytes(t) for t in tensors], dim=1)[row]
    arrived = packed.new_empty(sum(receive_counts), packed.shape[1])
    dist.all_to_all_single(arrived, packed, list(receive_counts), list(send_counts), group=group)
    rows, begin = [], 0
    for tensor in tensors:
        rows.append(tensor.new_empty(len(arrived), *tensor.shape[1:]))
        target = _as_bytes(rows[-1])
        target.copy_(arrived[:, begin : begin + target.shape[1]])
        begin += target.shape[1]
    return rows, list(receive_counts)


def exchange_tokens(
    group: dist.ProcessGroup,
    tensors: Sequence[torch.Tensor],
    in_rank: torch.Tensor,
    receive_counts: Sequence[int] | None = None,
) -> tuple[list[torch.Tensor], list[int]]:
    """`exchange_rows` of tokens [T, ...] that go where `in_rank` [T, R] says."""
    token = in_rank.t().nonzero()[:, 1]
    return exchange_rows(group, tensors, token, in_rank.sum(0).tolist(), receive_counts)


@torch.no_grad()
def reduce_rows(
    rows: torch.Tensor,
    index: torch.Tensor,
    bias: Sequence[torch.Tensor] = (),
    weights: OptionalTensor = None,
) -> torch.Tensor:
    """For each token the sum of its rows: biases first, then columns of `index` from left to right.

    The sum is made in float32 (float64 for float64 rows) and cast once, as DeepEP's kernels do.

    Args:
        rows: [N, H], any floating dtype.
        index: [T, J] int64, the rows to add to each token, -1 = none.
        bias: tensors [T, H].
        weights: [T, J], a factor for each row; None = 1.

    Returns:
        [T, H], the dtype of `rows`.
    """
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    values = rows.to(dtype)
    total = values.new_zeros(len(index), rows.shape[1])
    for term in bias:
        total += term.to(dtype)
    for column in range(index.shape[1]):
        token = (index[:, column] >= 0).nonzero().squeeze(1)
        term = values[index[token, column]]
        if weights is not None:
            term = term * weights[token, column].to(dtype).unsqueeze(1)
        total[token] += term
    return total.to(rows.dtype)
