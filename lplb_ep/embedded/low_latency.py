"""The low-latency calls of DeepEP 1.2.1's `Buffer`; shape letters as in rows.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..errors import ContractError
from .checks import (
    FLOATS,
    INT32,
    WEIGHTS,
    check_limit,
    check_statistics,
    check_tensor,
    check_topk_idx,
)
from .config import low_latency_bytes
from .events import EventOverlap, finished_event
from .fp8 import cast_to_fp8
from .rows import (
    Hook,
    LowLatencyHandle,
    OptionalTensor,
    Rows,
    check_agreement,
    exchange_rows,
    place_rows,
    reduce_rows,
    token_indices,
    unwritten,
)


class LowLatencyCalls:
    """The calls of a `Buffer` for few tokens: picks go to their experts, in buffers of fixed size.

    Args:
        group: the ranks.
        num_rdma_bytes: must suffice for the calls' sizes, as in DeepEP; no memory is reserved.
        low_latency_mode: whether these calls are allowed.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_rdma_bytes: int, low_latency_mode: bool
    ) -> None:
        self.rank = group.rank()
        self.group = group
        self.group_size = group.size()
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self._destroyed = False
        self._pending: Hook | None = None
        self._combine_dtype = torch.bfloat16
        self._combine_buffer: OptionalTensor = None
        self._held: list[Sequence[torch.Tensor]] = []

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """`num_rdma_bytes` that DeepEP needs for low latency: csrc/config.hpp, `LowLatencyLayout`.

        Args:
            num_max_dispatch_tokens_per_rank: most tokens of a rank, the same on all.
            hidden: elements of a row, counted as bfloat16.
            num_ranks: R.
            num_experts: E.
        """
        num_bytes = low_latency_bytes(num_max_dispatch_tokens_per_rank, hidden, num_experts)
        return (num_bytes + 128) // 128 * 128

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Checks its arguments; there is no memory to clean.

        Raises:
            ValueError: `num_rdma_bytes` does not suffice for these sizes.
            ContractError: not in low-latency mode, or destroyed.
        """
        self._check_low_latency(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: OptionalTensor = None,
        dispatch_wait_recv_cost_stats: OptionalTensor = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, torch.Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Sends every pick to its expert's rank, into buffers of fixed size. Collective.

        Args:
            x: [T, H], any floating dtype.
            topk_idx: [T, K] int32 or int64, experts in [0, E), -1 = none.
            num_max_dispatch_tokens_per_rank: M, at least T of every rank, the same on all.
            num_experts: E, a multiple of R.
            cumulative_local_expert_recv_stats: [L] int32, increased by `recv_count`.
            dispatch_wait_recv_cost_stats: [R] int64, left as it is: nothing is waited for.
            use_fp8: cast to float8_e4m3fn with a scale for 128 channels; H is a multiple of 128.
            round_scale: scales are powers of two.
            use_ue8m0: scales as four exponents in an int32; with `round_scale`, H a multiple of
                512.
            async_finish: return an event; not with `return_recv_hook`.
            return_recv_hook: the results (but for the handle's sizes) are there only after the
                hook was called, which must be before the buffer's next low-latency call.

        Returns:
            recv_x: [L, M * R, H] in the dtype of `x`; by source rank, then token. With `use_fp8`
                (float8_e4m3fn, scales [L, M * R, H / 128] float32, or H / 512 int32), the scales
                column-major.
            recv_count: [L] int32, rows of each expert. Further ones are `unwritten`.
            handle: (src_info [L, M * R] int32, index in the source rank; layout_range [L, R]
                int64, first row from a rank << 32 | number of rows; M; H; E).
            event: holds an event if `async_finish`.
            hook: or None.

        Raises:
            ValueError: an argument does not fit.
            ContractError: not in low-latency mode, destroyed, or a hook was not called.
        """
        slots = num_max_dispatch_tokens_per_rank
        check_tensor("x", x, (None, None), FLOATS)
        _, num_local_experts = check_topk_idx(topk_idx, len(x), num_experts, self.group_size)
        check_limit("num_max_dispatch_tokens_per_rank", slots, len(x))
        hidden = x.shape[1]
        _check_cast(hidden, use_fp8, round_scale, use_ue8m0)
        statistics = cumulative_local_expert_recv_stats
        check_statistics("cumulative_local_expert_recv_stats", statistics, num_local_experts)
        waits = dispatch_wait_recv_cost_stats
        check_statistics("dispatch_wait_recv_cost_stats", waits, self.group_size, torch.int64)
        self._start_low_latency(slots, hidden, num_experts, async_finish, return_recv_hook)
        self._combine_dtype = x.dtype
        sizes = {"num_max_dispatch_tokens_per_rank": slots, "num_experts": num_experts}
        check_agreement(self.group, x.device, **sizes, x=hidden)

        token, pick = (topk_idx >= 0).nonzero(as_tuple=True)
        expert, order = topk_idx[token, pick].sort(stable=True)
        counts = torch.bincount(expert, minlength=num_experts).view(self.group_size, -1)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        tensors = cast_to_fp8(x, round_scale, use_ue8m0) if use_fp8 else (x,)
        rows, _ = exchange_rows(
            self.group,
            [*tensors, token_indices(x)],
            token[order],
            counts.sum(1).tolist(),
            received.sum(1).tolist(),
        )
        begin = received.cumsum(0) - received
        size = self.group_size * slots
        first = begin + torch.arange(num_local_experts, device=x.device) * size
        position = _ranges(first, received)
        results = [
            place_rows(r, position, num_local_experts * size).unflatten(0, (-1, size)) for r in rows
        ]
        if use_fp8:
            results[1] = results[1].transpose(1, 2).contiguous().transpose(1, 2)
        results += [(begin << 32 | received).t().contiguous(), received.sum(0, dtype=torch.int32)]
        outputs = [unwritten(torch.empty_like(result)) for result in results]
        hook = self._arrive(results, outputs, return_recv_hook, statistics)
        *recv_x, source, layout_range, recv_count = outputs
        self._hold(recv_x)
        handle = (source, layout_range, slots, hidden, num_experts)
        event = finished_event(async_finish)
        return (recv_x[0], recv_x[1]) if use_fp8 else recv_x[0], recv_count, handle, event, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: OptionalTensor = None,
        combine_wait_recv_cost_stats: OptionalTensor = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Sends rows back to their tokens and sums them with weights. Collective.

        Args:
            x: [L, M * R, H], any floating dtype, in the layout of the dispatch.
            topk_idx: [T, K], the picks that were dispatched; some may have become -1.
            topk_weights: [T, K] float32 or float64.
            handle: of the dispatch, its hook called.
            use_logfmt: accepted and without effect: rows are sent as they are, where DeepEP rounds
                them to ten bits.
            zero_copy: take the rows from `get_next_low_latency_combine_buffer`, not from `x`; not
                with `use_logfmt`.
            async_finish: return an event; not with `return_recv_hook`.
            return_recv_hook: the result is there only after the hook was called, which must be
                before the buffer's next low-latency call.
            out: [T, H], dtype of `x`, to receive the result.
            combine_wait_recv_cost_stats: [R] int64, left as it is.

        Returns:
            combined_x: [T, H], dtype of `x`: the sum over picks, from left to right, of weight *
                row, made as `reduce_rows` does; `out` if given.
            event: holds an event if `async_finish`.
            hook: or None.

        Raises:
            ValueError: an argument does not fit, or a pick was not dispatched.
            ContractError: not in low-latency mode, destroyed, or a hook was not called.
        """
        source, layout_range, slots, hidden, num_experts = handle
        _, num_local_experts = check_topk_idx(topk_idx, None, num_experts, self.group_size)
        shape = (num_local_experts, self.group_size * slots)
        check_tensor("x", x, (*shape, hidden), FLOATS)
        check_tensor("topk_weights", topk_weights, topk_idx.shape, WEIGHTS)
        check_tensor("src_info of handle", source, shape, INT32)
        check_tensor("layout_range of handle", layout_range, (shape[0], self.group_size))
        waits = combine_wait_recv_cost_stats
        check_statistics("combine_wait_recv_cost_stats", waits, self.group_size, torch.int64)
        if out is None:
            out = unwritten(x.new_empty(len(topk_idx), hidden))
        check_tensor("out", out, (len(topk_idx), hidden), (x.dtype,))
        if zero_copy:
            x = self._take_combine_buffer(x, use_logfmt)
        self._start_low_latency(slots, hidden, num_experts, async_finish, return_recv_hook)

        returned = (layout_range & 0xFFFFFFFF).t()
        expert = torch.arange(num_local_experts, device=x.device)
        first = (layout_range >> 32).t() + expert * shape[1]
        # A row's key is its expert and token. Rows arrive with ascending keys.
        key = (expert + self.rank * num_local_experts).unsqueeze(1) * slots + source
        (rows, keys), _ = exchange_rows(
            self.group,
            [x.flatten(0, 1), key.flatten()],
            _ranges(first, returned),
            returned.sum(1).tolist(),
        )
        token = torch.arange(len(topk_idx), device=x.device).unsqueeze(1)
        wanted = topk_idx.long() * slots + token
        index = torch.searchsorted(keys, wanted)
        known = torch.cat([keys, keys.new_full((1,), -1)])[index] == wanted
        missing = ((topk_idx >= 0) & ~known).nonzero()
        if len(missing):
            raise ValueError(
                "topk_idx must hold the picks that were dispatched; got expert "
                f"{int(topk_idx[tuple(missing[0])])} for token {int(missing[0, 0])}"
            )
        index.masked_fill_(topk_idx < 0, -1)
        combined = reduce_rows(rows, index, weights=topk_weights)
        hook = self._arrive([combined], [out], return_recv_hook)
        self._hold([out])
        return out, finished_event(async_finish), hook

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """Where to put the rows of the next `low_latency_combine` with `zero_copy=True`.

        Args:
            handle: of a low-latency dispatch.

        Returns:
            [L, M * R, H] in the dtype of the latest `low_latency_dispatch`; the same memory until
            the buffer's next low-latency call.
        """
        source, _, _, hidden, _ = handle
        shape, dtype = (*source.shape, hidden), self._combine_dtype
        kept = self._combine_buffer
        if kept is None or (kept.shape, kept.dtype) != (shape, dtype):
            kept = unwritten(torch.empty(shape, dtype=dtype, device=source.device))
        self._combine_buffer = kept
        return kept

    def _take_combine_buffer(self, x: torch.Tensor, use_logfmt: bool) -> torch.Tensor:
        if use_logfmt:
            raise ValueError("zero_copy must be False with use_logfmt=True; got True")
        if self._combine_buffer is None:
            raise ContractError("zero_copy needs get_next_low_latency_combine_buffer() first")
        check_tensor("the combine buffer", self._combine_buffer, x.shape, (x.dtype,))
        return self._combine_buffer

    def _arrive(
        self,
        results: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        return_recv_hook: bool,
        statistics: OptionalTensor = None,
    ) -> Hook | None:
        """Puts results where the caller sees them: now, or when the hook is called."""

        def arrive() -> None:
            for result, output in zip(results, outputs, strict=True):
                output.detach().copy_(result)
            if statistics is not None:
                statistics.add_(results[-1])

        def hook() -> None:
            if self._pending is not arrive:
                raise ContractError("this hook was called before")
            self._pending = None
            arrive()

        if return_recv_hook:
            self._pending = arrive
            return hook
        arrive()
        return None

    def _hold(self, results: Sequence[torch.Tensor]) -> None:
        """Ends the life of the results of the call before the last: DeepEP has two buffers."""
        if len(self._held) == 2:
            for result in self._held.pop(0):
                unwritten(result.detach())
        self._held.append(results)

    def _check_open(self) -> None:
        if self._destroyed:
            raise ContractError("the buffer was destroyed")

    def _check_low_latency(self, slots: int, hidden: int, num_experts: int) -> None:
        self._check_open()
        if not self.low_latency_mode:
            raise ContractError("low-latency calls need a buffer made with low_latency_mode=True")
        needed = low_latency_bytes(slots, hidden, num_experts)
        if self.num_rdma_bytes < needed:
            raise ValueError(
                f"num_rdma_bytes must be at least {needed} for {slots} tokens of {hidden} elements "
                f"and {num_experts} experts; got {self.num_rdma_bytes}"
            )

    def _start_low_latency(
        self, slots: int, hidden: int, num_experts: int, async_finish: bool, return_recv_hook: bool
    ) -> None:
        self._check_low_latency(slots, hidden, num_experts)
        if async_finish and return_recv_hook:
            raise ValueError("async_finish must be False with return_recv_hook=True; got True")
        if self._pending is not None:
            raise ContractError("call the hook of the previous low-latency call first")
        self._combine_buffer = None


def _check_cast(hidden: int, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> None:
    if use_ue8m0 and not round_scale:
        raise ValueError("use_ue8m0 must be False without round_scale; got True")
    block = 512 if use_ue8m0 else 128
    if use_fp8 and hidden % block:
        raise ValueError(f"x must have rows of a multiple of {block} with FP8; got {hidden}")


def _ranges(first: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """first, first + 1, ... (`count` of them), one range after another."""
    first, count = first.flatten(), count.flatten()
    before = count.cumsum(0) - count
    return torch.repeat_interleave(first - before, count) + torch.arange(
        int(count.sum()), device=count.device
    )
