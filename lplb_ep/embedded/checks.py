"""Checks that DeepEP's host code asserts, as errors by name; shape letters as in rows.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .rows import OptionalTensor

INT32 = (torch.int32,)
INDICES = (torch.int32, torch.int64)
WEIGHTS = (torch.float32, torch.float64)
FLOATS = (*WEIGHTS, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


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
        ValueError: names the argument, the expected and the given value.
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
