"""The gradients of slots and their dtypes, agreed between ranks before they are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..comm.torch_exchange import TorchExchange
from ..errors import RankError
from .slots import Slot, describe

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Codes between ranks: 0 is "no gradient", i + 1 is DTYPES[i].
_TRAINED = 64  # is added where a parameter is trained
_REFUSED = 255


class SlotGradient(NamedTuple):
    """The gradient of a parameter of a slot, on this rank or another one."""

    dtype: torch.dtype | None
    """None: there is no gradient."""
    is_trained: bool
    """Whether it has `requires_grad`."""


def slot_gradients(
    slots: Mapping[str, Sequence[Slot]],
    rank: int,
    num_ranks: int,
    exchange: TorchExchange | None,
    are_alike: bool = False,
) -> list[list[SlotGradient]]:
    """The gradients that every slot has. Collective if there is an exchange.

    Args:
        slots: this rank's, by parameter name.
        rank: this rank.
        num_ranks: R.
        exchange: brings the other ranks' codes; None if no replica is on another rank than its
            home. Nothing reads other ranks' entries then.
        are_alike: whether the slots of other ranks have what those of this one have. Then nothing
            is exchanged.

    Returns:
        [R * slots of a rank][number of parameters]. Guest slots are none of them.

    Raises:
        ValueError: a gradient here has another dtype than `DTYPES`, or not its weight's shape.
        RankError: that is so on another rank, or a rank did not come in time.
    """
    own, refusal = _codes(slots)
    if refusal is not None:
        own.fill_(_REFUSED)  # the others wait for this rank's codes
    codes = torch.zeros(num_ranks, *own.shape, dtype=torch.uint8, device="cpu")
    codes[rank] = own
    if are_alike:
        codes[:] = own
    elif exchange is not None:
        codes = exchange.gather(own)
    if refusal is not None:
        raise refusal
    refused = torch.nonzero((codes == _REFUSED).flatten(1).any(1)).flatten().tolist()
    if refused:
        raise RankError(f"ranks {refused} refused their gradients; see their errors")
    return [[_slot_gradient(code) for code in slot] for slot in codes.flatten(0, 1).tolist()]


def _slot_gradient(code: int) -> SlotGradient:
    is_trained, number = divmod(code, _TRAINED)
    return SlotGradient(DTYPES[number - 1] if number else None, bool(is_trained))


def _codes(slots: Mapping[str, Sequence[Slot]]) -> tuple[torch.Tensor, ValueError | None]:
    """[P / R, number of parameters] uint8 codes of this rank, and why it refuses its gradients."""
    num_local_slots = len(next(iter(slots.values())))
    codes = torch.zeros(num_local_slots, len(slots), dtype=torch.uint8, device="cpu")
    refusal = None
    for index, (name, copies) in enumerate(slots.items()):
        for slot, copy in enumerate(copies):
            codes[slot, index] = _TRAINED * copy.parameter.requires_grad
            gradient = copy.gradient
            if gradient is None:
                continue
            if gradient.dtype in DTYPES and gradient.shape == copy.weight.shape:
                codes[slot, index] += 1 + DTYPES.index(gradient.dtype)
            else:
                refusal = ValueError(
                    f"the gradient of parameter {name} is {describe(gradient)}, expected "
                    f"{list(copy.weight.shape)} of one of "
                    f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
                )
    return codes, refusal
