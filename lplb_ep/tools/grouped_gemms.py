"""The time of a rank's experts on the current GPU, by one of the grouped GEMMs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import MissingPackageError

GEMMS = ("torch", "deep_gemm", "transformer_engine")
"""Who multiplies: torch's `_grouped_mm`, DeepGEMM's contiguous kernel, or TE's `GroupedLinear`."""
DTYPES = ("bfloat16", "float16")
_NUM_WARM, _NUM_RUNS = 2, 5
_AHEAD_CYCLES = 10_000_000  # GPU cycles: the CPU queues all runs before the first begins


def check_gemm(gemm: str, dtype: str) -> None:
    """Checks whether the current machine has a grouped GEMM.

    Args:
        gemm: one of `GEMMS`.
        dtype: one of `DTYPES`.

    Raises:
        ValueError: the GEMM does not take the dtype.
        MissingPackageError: there is no CUDA device, or the package is not installed.
    """
    if gemm == "deep_gemm" and dtype != "bfloat16":
        raise ValueError(f"deep_gemm takes bfloat16 alone here; got {dtype}")
    if not torch.cuda.is_available():
        raise MissingPackageError("experts are timed on a CUDA device, and there is none")
    if importlib.util.find_spec(gemm) is None:
        raise MissingPackageError(f"{gemm} is not installed")


class Experts:
    """Gated feed-forward networks, one a slot, with random weights.

    Args:
        num_slots: of the rank.
        hidden, width: of a token, and of an expert.
        dtype: one of `DTYPES`.
        gemm: one of `GEMMS`.
        max_rows: the most rows of all slots.

    Raises:
        ValueError, MissingPackageError: as `check_gemm`.
    """

    def __init__(
        self, num_slots: int, hidden: int, width: int, dtype: str, gemm: str, max_rows: int
    ) -> None:
        check_gemm(gemm, dtype)
        options: dict[str, Any] = {"device": "cuda", "dtype": getattr(torch, dtype)}
        make = {
            "torch": _with_torch,
            "deep_gemm": _with_deep_gemm,
            "transformer_engine": _with_transformer_engine,
        }
        self._prepare = make[gemm](num_slots, hidden, width, options)
        self._tokens = torch.randn(max_rows, hidden, **options)

    def nanoseconds(self, rows: Sequence[int]) -> float:
        """The nanoseconds of a pass with these rows of each slot, on the GPU alone."""
        run = self._prepare(self._tokens, list(rows))
        for _ in range(_NUM_WARM):
            run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD_CYCLES)
        start.record()
        for _ in range(_NUM_RUNS):
            run()
        end.record()
        end.synchronize()
        return 1e6 * start.elapsed_time(end) / _NUM_RUNS


_Prepare = Callable[[torch.Tensor, list[int]], Callable[[], Any]]


def _gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _with_torch(num_slots: int, hidden: int, width: int, options: dict[str, Any]) -> _Prepare:
    enter = torch.randn(num_slots, hidden, 2 * width, **options)
    leave = torch.randn(num_slots, width, hidden, **options)

    def prepare(tokens: torch.Tensor, rows: list[int]) -> Callable[[], Any]:
        x = tokens[: sum(rows)]
        ends = torch.tensor(rows).cumsum(0).int().cuda()

        def run() -> torch.Tensor:
            inner = _gated(torch._grouped_mm(x, enter, offs=ends))
            return torch._grouped_mm(inner, leave, offs=ends)

        return run

    return prepare


def _with_deep_gemm(num_slots: int, hidden: int, width: int, options: dict[str, Any]) -> _Prepare:
    import deep_gemm

    multiply = deep_gemm.m_grouped_bf16_gemm_nt_contiguous
    alignment = deep_gemm.get_m_alignment_for_contiguous_layout()
    enter = torch.randn(num_slots, 2 * width, hidden, **options)
    leave = torch.randn(num_slots, hidden, width, **options)

    def prepare(tokens: torch.Tensor, rows: list[int]) -> Callable[[], Any]:
        # Rows of a slot are padded to whole blocks, which all name it.
        padded = [-(-number // alignment) * alignment for number in rows]
        slots = torch.arange(num_slots).repeat_interleave(torch.tensor(padded)).int()
        slots = slots.to(options["device"])
        x = torch.randn(sum(padded), hidden, **options)  # a GPU multiplies zeros in less time
        first, inside = torch.empty(len(x), 2 * width, **options), torch.empty_like(x)

        def run() -> torch.Tensor:
            multiply(x, enter, first, slots)
            multiply(_gated(first), leave, inside, slots)
            return inside

        return run

    return prepare


def _with_transformer_engine(
    num_slots: int, hidden: int, width: int, options: dict[str, Any]
) -> _Prepare:
    import transformer_engine.pytorch as te

    dtype = options["dtype"]
    enter = te.GroupedLinear(num_slots, hidden, 2 * width, bias=False, params_dtype=dtype)
    leave = te.GroupedLinear(num_slots, width, hidden, bias=False, params_dtype=dtype)

    def prepare(tokens: torch.Tensor, rows: list[int]) -> Callable[[], Any]:
        x = tokens[: sum(rows)]

        def run() -> torch.Tensor:
            with torch.no_grad():
                return leave(_gated(enter(x, rows)), rows)

        return run

    return prepare
