"""What both embedded buffers stand on: events, checks, and rows moved and summed.

R, E, L     ranks; experts, as DeepEP numbers them: E / R on each rank; L = E / R
T, K, H, S  tokens of this rank, picks of a token, elements of a row, scales of a row
N           tokens received by this rank
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ContractError

OptionalTensor = torch.Tensor | None
Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Data, or data and scales."""
Bias = torch.Tensor | tuple[OptionalTensor, OptionalTensor] | None
Handle = tuple[torch.Tensor, ...]
LowLatencyHandle = tuple[torch.Tensor, torch.Tensor, int, int, int]
Hook = Callable[[], None]

INT32 = (torch.int32,)
INDICES = (torch.int32, torch.int64)
WEIGHTS = (torch.float32, torch.float64)
FLOATS = (*WEIGHTS, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


class EventHandle:
    """Stands for a recorded CUDA event. The embedded buffers finish every call before they return,
    so there is never anything to wait for."""

    def current_stream_wait(self) -> None:
        """Returns at once."""


class EventOverlap:
    """DeepEP's wrapper of an event, for both versions.

    Attributes:
        event: the `EventHandle`, or None for a call that was not asynchronous.
        extra_tensors: kept alive with the event, as in DeepEP.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._release_handle = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Waits for the event; with `release_handle` drops it afterwards.

        Raises:
            ContractError: there is no event: the call that returned this was synchronous.
        """
        if self.event is None:
            raise ContractError(
                "there is no event to wait for; the call that returned it was not asynchronous"
            )
        self.event.current_stream_wait()
        if release_handle:
            self.event = None

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        self._release_handle = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release_handle)
        self._release_handle = False


def finished_event(asynchronous: bool) -> EventOverlap:
    """What a call returns: an event only if it was asked to be asynchronous."""
    return EventOverlap(EventHandle() if asynchronous else None)


def align(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return (count + multiple - 1) // multiple * multiple


def check_tensor(
    name: str,
    tensor: Any,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] = (),
    contiguous: bool = True,
) -> None:
    """Refuses what DeepEP's host code asserts against.

    Args:
        name: the argument, for the message.
        tensor: what the caller passed.
        shape: the expected sizes, None = any.
        dtypes: the accepted ones; none named: any.
        contiguous: whether it must be.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor; got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or (dtypes and tensor.dtype not in dtypes):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        kind = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must have shape [{sizes}]{f' and dtype {kind}' if kind else ''}; got shape "
            f"{list(tensor.shape)}, dtype {str(tensor.dtype).removeprefix('torch.')}"
        )
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; got strides {tensor.stride()}")


def check_rows(x: Any) -> tuple[torch.Tensor, OptionalTensor]:
    """`x` of a dispatch as (data [T, H], scales [T, S] or None)."""
    data, scales = x if isinstance(x, tuple) else (x, None)
    check_tensor("x", data, (None, None))
    if scales is not None:
        check_tensor("the scales of x", scales, (len(data), None), contiguous=False)
    return data, scales


def check_topk_idx(
    topk_idx: Any, num_tokens: int | None, num_experts: int | None, num_ranks: int
) -> tuple[torch.Tensor, int]:
    """The checked expert indices, and how many experts a rank has, E / R.

    Raises:
        ValueError: R does not divide E, or `topk_idx` is no [T, K] of integers in [-1, E).
    """
    if not num_experts or num_experts < 1 or num_experts % num_ranks:
        raise ValueError(
            f"num_experts must be a positive multiple of the {num_ranks} ranks; got {num_experts}"
        )
    check_tensor("topk_idx", topk_idx, (num_tokens, None), INDICES)
    wrong = ((topk_idx < -1) | (topk_idx >= num_experts)).nonzero()
    if len(wrong):
        token, pick = wrong[0].tolist()
        raise ValueError(
            f"topk_idx must be -1 or in [0, {num_experts}); got {int(topk_idx[token, pick])} for "
            f"token {token}, pick {pick}"
        )
    return topk_idx, num_experts // num_ranks


def check_alignment(expert_alignment: int) -> None:
    """Refuses an alignment that is not positive."""
    if expert_alignment < 1:
        raise ValueError(f"expert_alignment must be positive; got {expert_alignment}")


def check_limit(name: str, limit: int, num_tokens: int) -> None:
    """Refuses more tokens than the ranks agreed on."""
    if num_tokens > limit:
        raise ValueError(f"{name} must be at least the {num_tokens} tokens of x; got {limit}")


def check_statistics(
    name: str, statistics: Any, size: int, dtype: torch.dtype = torch.int32
) -> None:
    """Checks a tensor of counters that the caller may have passed."""
    if statistics is not None:
        check_tensor(name, statistics, (size,), (dtype,))


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
    """Memory that DeepEP leaves uninitialised: here every bit is set, which is NaN in any floating
    dtype and -1 in signed integers, so that code that reads such rows shows it."""
    fresh.untyped_storage().fill_(255)  # type: ignore[attr-defined]
    return fresh


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[N, bytes of a row]: bytes move where float8 cannot, over gloo as well as in indexing."""
    rows = tensor.detach().contiguous()
    return (rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)).view(torch.uint8)


def place_rows(
    rows: torch.Tensor, position: torch.Tensor, size: int, row: OptionalTensor = None
) -> torch.Tensor:
    """[size, ...]: `rows` (or, in this order, those named by `row`) at `position`; the others are
    unwritten. Any dtype."""
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


def unpack_bias(bias: Any, num_tokens: int, x: torch.Tensor) -> list[torch.Tensor]:
    """The bias tensors of a combine: none, one, or a tuple of two (either may be None).

    Raises:
        ValueError: a tuple of another length, or a bias whose shape or dtype is not the output's.
    """
    biases = bias if isinstance(bias, tuple) else (bias, None)
    if len(biases) != 2:
        raise ValueError(f"bias must be a tensor or a tuple of two; got a tuple of {len(biases)}")
    given = [b for b in biases if b is not None]
    for b in given:
        check_tensor("bias", b, (num_tokens, x.shape[1]), (x.dtype,))
    return given
