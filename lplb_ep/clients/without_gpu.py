"""Megatron-Core on a machine without a GPU, for tests and first steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Stream:
    """Stands for a CUDA stream: all work has been done when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what `torch.cuda.Stream` does."""

    def wait_event(self, event: object) -> None:
        """Waits for nothing."""

    def wait_stream(self, stream: object) -> None:
        """Waits for nothing."""


class _Event:
    """Stands for a CUDA event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what `torch.cuda.Event` does."""

    def record(self, stream: object = None) -> None:
        """Nothing is pending."""

    def wait(self, stream: object = None) -> None:
        """Waits for nothing."""


class _OnCpu(TorchFunctionMode):
    """Puts tensors on the CPU that are asked for on a GPU, and shows them as if they were there."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _states(*args: Any, **kwargs: Any) -> Tensor:
    return torch.get_rng_state()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Has Megatron-Core's calls of `torch.cuda` do on the CPU what they can.

    Its collectives go over gloo. Its parallel random states are the CPU's, so dropout must be 0.
    Nothing is changed where there is a GPU.
    """
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.tensor_parallel import random

    stand_ins: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "current_device": lambda: "cpu",
            "current_stream": lambda *args: _Stream(),
            "Stream": _Stream,
            "Event": _Event,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": _nothing,
        },
        Tensor: {"record_stream": _nothing},
        random: {"_get_cuda_rng_state": _states, "_set_cuda_rng_state": _nothing},
    }
    random.get_cuda_rng_tracker(inference_rng_tracker=True)  # its forks do nothing
    # What Megatron-Core compiles would be compiled for the CPU, in every process.
    with _OnCpu(), torch.compiler.set_stance("force_eager"), contextlib.ExitStack() as stack:
        for module, values in stand_ins.items():
            for name, value in values.items():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield
