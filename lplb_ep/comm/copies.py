"""Copies into the memory of other GPUs, and a barrier of all ranks on the GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ..gpu.abi import Signature
from ..gpu.jit import Program
from ..gpu.launch import Kernel, load

BARRIER = Signature(
    "barrier",
    ("unsigned long long* const*", "flags", "[R] of each rank [R]: where each rank came to last"),
    ("int", "num_ranks", "R"),
    ("int", "rank", "this rank"),
    ("unsigned long long", "number", "of this barrier, from 1"),
    ("long long", "limit_ns", "how long to wait before a rank is missing"),
    ("volatile int*", "missing", "[R] in the host's memory: 1 where a rank has not come in time"),
)
"""The arguments of its kernel."""

_MEMCPY_DEFAULT = 4  # of driver_types.h: addresses tell whose memory they are in


def barrier_program() -> Program:
    """The kernel of the barrier."""
    return Program("barrier.cu")


@functools.cache
def _barrier(device: int) -> Kernel:
    return load(barrier_program(), device).kernel(BARRIER.name, BARRIER.formats)


class PeerCopies:
    """Copies between GPUs, and a barrier of all ranks, both on the current stream.

    Calls on another stream than the last one's run after it. The CPU waits for nothing.

    Args:
        rank: this rank.
        device: this rank's GPU.
        flags: [R] addresses here of each rank's [R] words of 8 bytes, zeroed.
        timeout_s: seconds after which a rank that others wait for is `missing`.

    Raises:
        MissingPackageError: a package that compiles or loads kernels is missing.
        CompileError: the kernel does not compile.
    """

    def __init__(
        self, rank: int, device: torch.device, flags: Sequence[int], timeout_s: float
    ) -> None:
        self._rank, self._device, self._limit_ns = rank, device, int(1e9 * timeout_s)
        self._flags = torch.tensor([*flags], dtype=torch.int64).to(device)
        self._missing = torch.zeros(len(flags), dtype=torch.int32).pin_memory()
        self.missing = self._missing.numpy()
        """[R] 1 where a rank did not reach a barrier in time."""
        self._kernel = _barrier(device.index)
        self._last = torch.cuda.current_stream(device)

    def _stream(self) -> torch.cuda.Stream:
        stream = torch.cuda.current_stream(self._device)
        if stream != self._last:
            stream.wait_stream(self._last)
            self._last = stream
        return stream

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copies between addresses of any GPU's memory."""
        from cupy.cuda import runtime

        with torch.cuda.device(self._device):
            runtime.memcpyAsync(
                target, source, num_bytes, _MEMCPY_DEFAULT, self._stream().cuda_stream
            )

    def barrier(self, number: int) -> None:
        """Waits, on the GPU, until every rank has reached its barrier of that number.

        A rank reaches it when all earlier work of its GPU is done. Numbers rise from 1.
        """
        self._stream()
        num_ranks = len(self.missing)
        arguments = BARRIER.arrange(
            flags=self._flags.data_ptr(),
            num_ranks=num_ranks,
            rank=self._rank,
            number=number,
            limit_ns=self._limit_ns,
            missing=self._missing.data_ptr(),
        )
        self._kernel((1, 1), -(-num_ranks // 32) * 32, 0, self._device, arguments)
