"""Checks of calls that plan, made before ranks exchange counts.

They compare arguments with each other, with the placement and with DeepEP's limits. Each raises
ContractError, and TypeError or ValueError where arguments are wrong by themselves. Calls that
differ from one that was checked in nothing but values are known by their form.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from ..errors import ContractError
from ..placement.table import Placement
from ..planning.inputs import check_topk_idx, num_ids
from .calls import Call
from .channels import BufferState

Form = tuple[Hashable, ...] | None


class Check(NamedTuple):
    """The checks of one method."""

    form: Callable[[Call], Form]
    """All that the checks look at in a call. None: such a call is checked each time."""
    arguments: Callable[[Any, BufferState, Placement, Call], None]
    """Of a buffer, its state, the placement in force and a call."""

    def __call__(self, buffer: Any, state: BufferState, placement: Placement, call: Call) -> None:
        """Checks a call.

        Raises:
            ContractError, TypeError, ValueError: as above.
        """
        call.check()
        check_num_experts(call["num_experts"], placement, state.settings.indices)
        self.arguments(buffer, state, placement, call)


def check_num_experts(num_experts: Any, placement: Placement, indices: str) -> None:
    """Checks by which number a caller means the experts of a placement.

    Raises:
        ContractError: it is another number, or none.
    """
    expected = num_ids(placement, indices)
    # A tensor would compare, and a CUDA tensor synchronise.
    is_whole = isinstance(num_experts, numbers.Integral)
    if is_whole and num_experts == expected:
        return
    E, P = num_ids(placement, "logical"), num_ids(placement, "physical")
    shown = num_experts if is_whole or num_experts is None else type(num_experts).__name__
    guests = placement.num_physical_experts - P
    beside = f", beside {guests} guest slots, which callers do not count" if guests else ""
    hint = ""
    if is_whole and num_experts in (E, P):
        hint = " (LPLB_EP_INDICES says which of the two callers use)"
    raise ContractError(
        f"num_experts must be {expected} with {indices} indices on this placement "
        f"({E} experts in {P} slots{beside}); got {shown}{hint}"
    )


def _layout_form(call: Call) -> Form:
    topk_idx, num_experts = call.get("topk_idx"), call.get("num_experts")
    if not isinstance(topk_idx, torch.Tensor) or type(num_experts) is not int:
        return None
    return ("layout", *call, topk_idx.shape, topk_idx.dtype, num_experts)


def _check_layout(buffer: Any, state: BufferState, placement: Placement, call: Call) -> None:
    limits, topk_idx = state.contract.limits, call["topk_idx"]
    check_topk_idx(topk_idx)
    limits.check_picks(topk_idx, limits.topk)
    if state.low_latency_mode:  # else this was checked with the placement
        state.check_slots(placement)


def _low_latency_form(call: Call) -> Form:
    x, topk_idx, num_experts = call.get("x"), call.get("topk_idx"), call.get("num_experts")
    tokens = call.get("num_max_dispatch_tokens_per_rank")
    if not (isinstance(x, torch.Tensor) and isinstance(topk_idx, torch.Tensor)):
        return None
    if type(tokens) is not int or type(num_experts) is not int:
        return None
    kinds = x.shape, x.dtype, topk_idx.shape, topk_idx.dtype
    return ("low latency", *call, *kinds, tokens, num_experts)


def _check_low_latency(buffer: Any, state: BufferState, placement: Placement, call: Call) -> None:
    """It must fit into the buffer, too."""
    x, tokens = call["x"], call["num_max_dispatch_tokens_per_rank"]
    topk_idx = call["topk_idx"]
    E, P = placement.num_experts, placement.num_physical_experts
    check_topk_idx(topk_idx)
    _check_rows(x, topk_idx)
    _check_whole("num_max_dispatch_tokens_per_rank", tokens)
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


def _elastic_form(call: Call) -> Form:
    x, topk_idx, num_experts = call.get("x"), call.get("topk_idx"), call.get("num_experts")
    scales = None
    if isinstance(x, tuple) and len(x) == 2:
        x, scales = x
        if not isinstance(scales, torch.Tensor):
            return None
    if not (isinstance(x, torch.Tensor) and isinstance(topk_idx, torch.Tensor)):
        return None
    weights = call.get("topk_weights")
    if type(num_experts) is not int or not (weights is None or isinstance(weights, torch.Tensor)):
        return None
    kinds = x.shape, x.dtype, topk_idx.shape, topk_idx.dtype, scales is None or scales.shape
    of_weights = None if weights is None else (weights.shape, weights.dtype)
    most = call.get("num_max_tokens_per_rank")
    return ("elastic", *call, *kinds, of_weights, most, num_experts)


def _check_elastic(buffer: Any, state: BufferState, placement: Placement, call: Call) -> None:
    x, most, weights = call["x"], call.get("num_max_tokens_per_rank"), call.get("topk_weights")
    rows, topk_idx = x, call["topk_idx"]
    check_topk_idx(topk_idx)
    if isinstance(x, tuple):
        if len(x) != 2:
            raise ContractError(f"x must be a tensor, or rows and scales; got {len(x)} values")
        rows, scales = x
        _check_rows(scales, topk_idx, "the scales of x")
    _check_rows(rows, topk_idx)
    if most is None:
        most = getattr(buffer, "num_max_tokens_per_rank", None)
    if most is not None:
        _check_whole("num_max_tokens_per_rank", most)
    if most is not None and topk_idx.shape[0] > most:
        raise ContractError(
            f"x must have at most num_max_tokens_per_rank={most} tokens; got {topk_idx.shape[0]}"
        )
    if weights is not None:
        are_floats = isinstance(weights, torch.Tensor) and weights.is_floating_point()
        if not are_floats or weights.shape != topk_idx.shape:
            shown = type(weights).__name__
            if isinstance(weights, torch.Tensor):
                shown = f"{list(weights.shape)} of {weights.dtype}"
            raise ContractError(
                f"topk_weights must be as topk_idx, {list(topk_idx.shape)}, of floats; got {shown}"
            )
    limits = state.contract.limits
    limits.check_rows(rows)
    limits.check_picks(topk_idx, limits.topk)


LAYOUT = Check(_layout_form, _check_layout)
"""Of `get_dispatch_layout`."""
LOW_LATENCY = Check(_low_latency_form, _check_low_latency)
"""Of `low_latency_dispatch`."""
ELASTIC = Check(_elastic_form, _check_elastic)
"""Of `ElasticBuffer.dispatch`."""


def _check_rows(x: Any, topk_idx: torch.Tensor, name: str = "x") -> None:
    """Raises ContractError unless there is a row for the picks of each token."""
    if not isinstance(x, torch.Tensor) or x.ndim != 2:
        shown = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ContractError(f"{name} must be a tensor [tokens, hidden]; got {shown}")
    if x.shape[0] != topk_idx.shape[0]:
        raise ContractError(
            f"{name} must have a row for each token of topk_idx, {topk_idx.shape[0]}; "
            f"got {x.shape[0]}"
        )


def _check_whole(name: str, number: Any) -> None:
    """Raises ContractError unless an argument is a whole number."""
    if not isinstance(number, numbers.Integral):
        shown = repr(number) if isinstance(number, (str, float)) else type(number).__name__
        raise ContractError(f"{name} must be a whole number; got {shown}")


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
