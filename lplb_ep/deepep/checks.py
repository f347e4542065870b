"""Checks of calls that plan, made before ranks exchange counts.

They hold arguments against each other and against DeepEP's limits. Each raises ContractError, and
TypeError or ValueError where `topk_idx` is wrong by itself. Calls that differ from one that was
checked in nothing but values are known by their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..errors import ContractError
from ..placement.table import Placement
from ..planning.inputs import check_topk_idx
from .calls import Call
from .channels import BufferState

Check = Callable[[Any, BufferState, Placement, Call, torch.Tensor], None]
"""Of a buffer, its state, the placement in force, a call and its `topk_idx`."""


def check_layout(
    buffer: Any, state: BufferState, placement: Placement, call: Call, topk_idx: torch.Tensor
) -> None:
    """Checks `get_dispatch_layout`."""
    limits = state.contract.limits
    check_topk_idx(topk_idx)
    limits.check_picks(topk_idx, limits.topk)
    if state.low_latency_mode:  # else this was checked with the placement
        state.check_slots(placement)


def check_low_latency(
    buffer: Any, state: BufferState, placement: Placement, call: Call, topk_idx: torch.Tensor
) -> None:
    """Checks `low_latency_dispatch`: it must fit into the buffer, too."""
    x, tokens = call["x"], call["num_max_dispatch_tokens_per_rank"]
    E, P = placement.num_experts, placement.num_physical_experts
    form = _form(x, topk_idx, tokens, P)
    if type(tokens) is int and form in state.checked:
        return
    check_topk_idx(topk_idx)
    _check_rows(x, topk_idx)
    if not isinstance(tokens, int):
        raise ContractError(
            f"num_max_dispatch_tokens_per_rank must be a whole number; got {tokens!r}"
        )
    if topk_idx.shape[0] > tokens:
        raise ContractError(
            f"x must have at most num_max_dispatch_tokens_per_rank={tokens} tokens; "
            f"got {topk_idx.shape[0]}"
        )
    limits = state.contract.limits
    limits.check_low_latency_rows(x)
    limits.check_picks(topk_idx, limits.low_latency_topk)
    limits.check_low_latency(placement, state.num_qps)
    needed, of_experts = (
        _num_rdma_bytes(state, tokens, x.shape[1], placement, slots) for slots in (P, E)
    )
    if buffer.num_rdma_bytes < needed:
        raise ContractError(
            f"num_rdma_bytes is {buffer.num_rdma_bytes}, and {P} slots need {needed} "
            f"({E} experts: {of_experts}); make the placement, "
            "or set LPLB_EP_NUM_PHYSICAL_EXPERTS, before get_low_latency_rdma_size_hint"
        )
    if state.low_latency_slots not in (None, P):
        # DeepEP lays the buffer out by the number of experts, and cleans only what it knows of.
        raise ContractError(
            f"this buffer's low-latency calls have had placements of {state.low_latency_slots} "
            f"slots, and this one has {P}: make a buffer for each number of slots"
        )
    state.low_latency_slots = P
    state.checked.add(form)


def check_elastic(
    buffer: Any, state: BufferState, placement: Placement, call: Call, topk_idx: torch.Tensor
) -> None:
    """Checks `ElasticBuffer.dispatch`."""
    x, most, weights = call["x"], call.get("num_max_tokens_per_rank"), call.get("topk_weights")
    rows = x[0] if isinstance(x, tuple) and x else x
    form = _form(rows, topk_idx, most, weights is None, getattr(weights, "shape", None))
    if form in state.checked:
        return
    check_topk_idx(topk_idx)
    _check_rows(rows, topk_idx)
    if most is None:
        most = getattr(buffer, "num_max_tokens_per_rank", None)
    if most is not None and topk_idx.shape[0] > most:
        raise ContractError(
            f"x must have at most num_max_tokens_per_rank={most} tokens; got {topk_idx.shape[0]}"
        )
    if weights is not None and getattr(weights, "shape", None) != topk_idx.shape:
        shown = getattr(weights, "shape", type(weights).__name__)
        raise ContractError(
            f"topk_weights must be as topk_idx, {list(topk_idx.shape)}; got {shown}"
        )
    limits = state.contract.limits
    limits.check_rows(rows)
    limits.check_picks(topk_idx, limits.topk)
    state.checked.add(form)


def _form(x: Any, topk_idx: Any, *rest: Hashable) -> tuple[Hashable, ...] | None:
    """What the checks of a call depend on, beside the buffer; None: they will fail."""
    if isinstance(x, torch.Tensor) and isinstance(topk_idx, torch.Tensor):
        return x.shape, x.dtype, topk_idx.shape, topk_idx.dtype, *rest
    return None


def _check_rows(x: Any, topk_idx: torch.Tensor) -> None:
    """Raises ContractError unless there is a row for the picks of each token."""
    if not isinstance(x, torch.Tensor) or x.ndim != 2:
        raise ContractError(
            f"x must be a tensor [tokens, hidden]; got {getattr(x, 'shape', type(x).__name__)}"
        )
    if x.shape[0] != topk_idx.shape[0]:
        raise ContractError(
            f"x must have a row for each token of topk_idx, {topk_idx.shape[0]}; got {x.shape[0]}"
        )


def _num_rdma_bytes(
    state: BufferState, num_tokens: int, hidden: int, placement: Placement, num_slots: int
) -> int:
    assert state.size_hint is not None, "a buffer with low_latency_dispatch has a size hint"
    return state.size_hint(
        num_max_dispatch_tokens_per_rank=num_tokens,
        hidden=hidden,
        num_ranks=placement.num_ranks,
        num_experts=num_slots,
    )
