"""DeepEP 1.2.1's `Buffer` on `torch.distributed`; shape letters as in rows.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..comm.collectives import gather_rows
from ..errors import ContractError
from .rows import (
    FLOATS,
    INT32,
    WEIGHTS,
    Bias,
    EventHandle,
    EventOverlap,
    Handle,
    Hook,
    LowLatencyHandle,
    OptionalTensor,
    Rows,
    align,
    check_alignment,
    check_limit,
    check_rows,
    check_statistics,
    check_tensor,
    check_topk_idx,
    differences,
    exchange_rows,
    exchange_tokens,
    finished_event,
    local_experts,
    pad_rows,
    place_rows,
    reduce_rows,
    send_positions,
    token_indices,
    tokens_in_ranks,
    unpack_bias,
    unwritten,
)

# Of each row in DeepEP's queues: its source (8 bytes), 128 picks with weights, 128 scales.
_META_BYTES = 8 + 128 * (8 + 4) + 128 * 4


@dataclass(frozen=True)
class Config:
    """DeepEP's tuning of its kernels: recorded and used for size hints only.

    Raises:
        ValueError: values that DeepEP refuses.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        rdma_send = self.num_max_rdma_chunked_send_tokens
        if self.num_sms < 0 or rdma_send <= 0:
            raise ValueError(f"num_sms must not be negative, chunks must be positive; got {self}")
        rdma_recv = align(self.num_max_rdma_chunked_recv_tokens, rdma_send)
        object.__setattr__(self, "num_max_rdma_chunked_recv_tokens", rdma_recv)
        nvl = (self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens)
        if not 0 < nvl[0] < nvl[1] or 2 * rdma_send > rdma_recv:
            raise ValueError(
                "chunks sent over NVLink must be smaller than those received, over RDMA at most "
                f"half; got {self}"
            )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """`num_nvl_bytes` that DeepEP needs for rows of `hidden_bytes` bytes."""
        num_rdma_ranks, num_nvl_ranks = max(num_ranks // 8, 1), min(num_ranks, 8)
        queue = (2 * num_rdma_ranks + 3) * 4
        row = hidden_bytes + _META_BYTES
        num_bytes = queue + self.num_max_nvl_chunked_recv_tokens * row
        return align(self.num_sms // 2 * num_nvl_ranks * num_bytes, 128)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """`num_rdma_bytes` that DeepEP needs; 0 up to 8 ranks, which are one node there."""
        if num_ranks <= 8:
            return 0
        queue = (8 * 2 + 2) * 2 * 4
        row = (hidden_bytes + _META_BYTES + 16) * 2
        num_bytes = queue + self.num_max_rdma_chunked_recv_tokens * row
        return align(self.num_sms // 2 * (num_ranks // 8) * num_bytes, 128)


class Buffer:
    """DeepEP 1.2.1's `deep_ep.Buffer` on a `torch.distributed` group taken as one node.

    Left out: `internode_dispatch` and `internode_combine` (there is one node) and
    `get_local_buffer_tensor` (there is no registered memory).

    Args: as DeepEP's. `group` and `low_latency_mode` matter; `num_rdma_bytes` must suffice for the
        low-latency calls, as there; no memory is reserved and the others are recorded.

    Attributes:
        num_sms: of the class; set by `set_num_sms`, no meaning here.
        rank, group, group_size: the rank's place.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode, explicitly_destroy: as given.

    Raises:
        ValueError: no group, sizes that are not multiples of 128, or RDMA memory without use.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        comm: Any = None,
    ) -> None:
        if group is None:
            raise ValueError(
                "group must be a torch.distributed group; got None (comm is not supported here)"
            )
        for name, size in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            if size < 0 or size % 128:
                raise ValueError(f"{name} must be a multiple of 128; got {size}")
        if num_rdma_bytes and not low_latency_mode and group.size() <= 8:
            raise ValueError(
                "num_rdma_bytes must be 0 without low_latency_mode for up to 8 ranks; got "
                f"{num_rdma_bytes}"
            )
        self.rank = group.rank()
        self.group = group
        self.group_size = group.size()
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self._destroyed = False
        self._pending: Hook | None = None
        self._combine_dtype = torch.bfloat16
        self._combine_buffer: OptionalTensor = None

    def destroy(self) -> None:
        """Ends the buffer, once.

        Raises:
            ContractError: made without `explicitly_destroy=True`, or already destroyed.
        """
        if not self.explicitly_destroy:
            raise ContractError("destroy() needs a buffer made with explicitly_destroy=True")
        self._check_open()
        self._destroyed = True

    @staticmethod
    def is_sm90_compiled() -> bool:
        """False: there are no SM90 kernels here."""
        return False

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets `Buffer.num_sms`.

        Raises:
            ValueError: an odd number.
        """
        if new_num_sms % 2:
            raise ValueError(f"new_num_sms must be even; got {new_num_sms}")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event of the present."""
        return EventOverlap(EventHandle())

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
        num_bytes = _low_latency_bytes(num_max_dispatch_tokens_per_rank, hidden, num_experts)
        return (num_bytes + 128) // 128 * 128

    def get_comm_stream(self) -> Any:
        """PyTorch's stand-in for a stream of the CPU."""
        return torch.cpu.current_stream()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A config that DeepEP takes, for any number of ranks: its own one for eight."""
        return Config(Buffer.num_sms, 6, 256, 6, 128)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """A config that DeepEP takes, for any number of ranks: its own one for eight."""
        return Config(Buffer.num_sms, 4, 256, 6, 128)

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, EventOverlap]:
        """What `dispatch` has to know of the picks. Local.

        Args:
            topk_idx: [T, K] int32 or int64, experts in [0, E), -1 = none.
            num_experts: E, a multiple of R.
            previous_event, async_finish, allocate_on_comm_stream: as in `dispatch`.

        Returns:
            num_tokens_per_rank: [R] int32.
            num_tokens_per_rdma_rank: None: one node.
            num_tokens_per_expert: [E] int32.
            is_token_in_rank: [T, R] bool.
            event: holds an event if `async_finish`.

        Raises:
            ValueError: an argument does not fit.
            ContractError: the buffer was destroyed.
        """
        self._check_call(previous_event, async_finish, allocate_on_comm_stream)
        _, num_local_experts = check_topk_idx(topk_idx, None, num_experts, self.group_size)
        in_rank = tokens_in_ranks(topk_idx, num_local_experts, self.group_size)
        per_rank = in_rank.sum(0, dtype=torch.int32)
        per_expert = _tokens_per_expert(topk_idx, num_experts)
        return per_rank, None, per_expert, in_rank, finished_event(async_finish)

    def dispatch(
        self,
        x: Rows,
        handle: Handle | None = None,
        num_tokens_per_rank: OptionalTensor = None,
        num_tokens_per_rdma_rank: OptionalTensor = None,
        is_token_in_rank: OptionalTensor = None,
        num_tokens_per_expert: OptionalTensor = None,
        topk_idx: OptionalTensor = None,
        topk_weights: OptionalTensor = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, OptionalTensor, OptionalTensor, list[int] | None, Handle | None, EventOverlap]:
        """Sends every token once to each rank that has one of its experts. Collective.

        Args:
            x: [T, H], any dtype; or (data [T, H], scales [T, S]).
            handle: of an earlier dispatch: the same tokens go the same ways; no layout, no picks.
            num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: the layout, needed
                without `handle`.
            num_tokens_per_rdma_rank: no meaning on one node.
            topk_idx: [T, K] int32 or int64, experts in [0, E), -1 = none; or None.
            topk_weights: [T, K] float32 or float64; with `topk_idx` only.
            expert_alignment: received counts are rounded up to a multiple.
            num_worst_tokens: rows of the outputs, at least N; needs `topk_idx`. 0: N rows.
            config: no meaning here.
            previous_event, async_finish, allocate_on_comm_stream: checked as DeepEP does; the call
                is always complete.

        Returns:
            recv_x: like `x`, [N, H] by source rank, then token.
            recv_topk_idx: [N, K], local experts in [0, L), -1 = another rank's or none; None
                without `topk_idx`.
            recv_topk_weights: [N, K], 0 where the index is -1; None without `topk_weights`.
            num_recv_tokens_per_expert_list: L aligned counts; empty with `num_worst_tokens`.
            handle: rank_prefix_matrix [R, R] int32 (tokens sent to each rank by ranks up to this
                one), channel_prefix_matrix and recv_channel_prefix_matrix [R, 1] int32,
                recv_src_idx [N] int32 (index in the source rank), is_token_in_rank, send_head
                [T, R] int32 (a token's place among those for a rank; -1 = not sent). The embedded
                buffer sends over one channel, whatever `config` says.
            event: holds an event if `async_finish`.
            With `handle` the middle four are None. Rows after the N received ones are -1 in
            recv_topk_idx and `unwritten` elsewhere.

        Raises:
            ValueError: an argument does not fit (its name, what was expected, what came).
            ContractError: the buffer was destroyed.
        """
        self._check_call(previous_event, async_finish, allocate_on_comm_stream)
        data, scales = check_rows(x)
        tensors = [data] if scales is None else [data, scales]
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("topk_idx and topk_weights must be None with a handle")
            prefix, _, _, source, in_rank, _ = self._check_handle(handle)
            check_tensor("is_token_in_rank of handle", in_rank, (len(data), self.group_size))
            received = differences(prefix[:, self.rank])
            rows, _ = exchange_tokens(self.group, tensors, in_rank, received)
            return _padded(rows, len(source)), None, None, None, None, finished_event(async_finish)

        in_rank, counts = self._check_layout(
            len(data), num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert
        )
        num_local_experts = self._check_picks(topk_idx, topk_weights, in_rank, counts)
        check_alignment(expert_alignment)
        # Row s: how many tokens rank s sends to each rank, then how many for each expert.
        table = gather_rows(counts, self.group)
        received = table[:, self.rank].tolist()
        per_expert = table[:, self.group_size :].sum(0).view(self.group_size, -1)[self.rank]
        expert_list = [align(int(n), expert_alignment) for n in per_expert if not num_worst_tokens]

        picks = [t for t in (topk_idx, topk_weights) if t is not None]
        tensors = [token_indices(data), *picks, *tensors]
        rows, _ = exchange_tokens(self.group, tensors, in_rank, received)
        size = num_worst_tokens or sum(received)
        if num_worst_tokens and (topk_idx is None or size < sum(received)):
            raise ValueError(
                f"num_worst_tokens must be 0, or with topk_idx at least the {sum(received)} tokens "
                f"received; got {num_worst_tokens}"
            )
        recv_topk_idx = recv_topk_weights = None
        if picks:
            local = local_experts(rows[1], self.rank, num_local_experts)
            recv_topk_idx = pad_rows(local, size)
            recv_topk_weights = pad_rows(rows[2].masked_fill(local < 0, 0), size)
        new_handle = (
            table[:, : self.group_size].cumsum(0, dtype=torch.int32),
            counts[: self.group_size].unsqueeze(1).clone(),
            counts.new_zeros(self.group_size, 1),
            pad_rows(rows[0], size),
            in_rank,
            send_positions(in_rank).to(torch.int32),
        )
        recv_x = _padded(rows[1 + len(picks) :], size)
        event = finished_event(async_finish)
        return recv_x, recv_topk_idx, recv_topk_weights, expert_list, new_handle, event

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: OptionalTensor = None,
        bias: Bias = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, OptionalTensor, EventOverlap]:
        """Sends received rows back and sums those of each token. Collective.

        Args:
            x: [N, H], any floating dtype, in the order of `dispatch`; rows after the N-th, of a
                handle with `num_worst_tokens`, are not read.
            handle: of the dispatch.
            topk_weights: [N, K] float32 or float64, summed in the same way; or None.
            bias: one or two [T, H] of the dtype of `x`, added first; or None.
            config: no meaning here.
            previous_event, async_finish, allocate_on_comm_stream: as in `dispatch`.

        Returns:
            recv_x: [T, H], dtype of `x`, summed as `reduce_rows` does by ascending rank; zeros
                (or the bias) for a token that went nowhere.
            recv_topk_weights: [T, K]; None without `topk_weights`.
            event: holds an event if `async_finish`.

        Raises:
            ValueError: an argument does not fit.
            ContractError: the buffer was destroyed.
        """
        self._check_call(previous_event, async_finish, allocate_on_comm_stream)
        prefix, _, _, source, _, send_head = self._check_handle(handle)
        check_tensor("x", x, (len(source), None), FLOATS)
        tensors = [x]
        if topk_weights is not None:
            check_tensor("topk_weights", topk_weights, (len(source), None), WEIGHTS)
            tensors.append(topk_weights)
        biases = unpack_bias(bias, len(send_head), x)
        returned = differences(prefix[:, self.rank])
        sent = (send_head >= 0).sum(0)
        every_row = torch.arange(sum(returned), device=x.device)
        rows, _ = exchange_rows(self.group, tensors, every_row, returned, sent.tolist())
        index = torch.where(send_head >= 0, send_head + sent.cumsum(0) - sent, -1)
        recv_topk_weights = None if topk_weights is None else reduce_rows(rows[1], index)
        return reduce_rows(rows[0], index, biases), recv_topk_weights, finished_event(async_finish)

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
        if use_ue8m0 and not round_scale:
            raise ValueError("use_ue8m0 must be False without round_scale; got True")
        hidden = x.shape[1]
        block = 512 if use_ue8m0 else 128
        if use_fp8 and hidden % block:
            raise ValueError(f"x must have rows of a multiple of {block} with FP8; got {hidden}")
        statistics = cumulative_local_expert_recv_stats
        check_statistics("cumulative_local_expert_recv_stats", statistics, num_local_experts)
        waits = dispatch_wait_recv_cost_stats
        check_statistics("dispatch_wait_recv_cost_stats", waits, self.group_size, torch.int64)
        self._start_low_latency(slots, hidden, num_experts, async_finish, return_recv_hook)
        self._combine_dtype = x.dtype

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
        if (layout_range < 0).any():
            raise ContractError("call the dispatch's hook before combining")
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

    def _check_open(self) -> None:
        if self._destroyed:
            raise ContractError("the buffer was destroyed")

    def _check_call(
        self, previous_event: EventOverlap | None, async_finish: bool, on_comm_stream: bool
    ) -> None:
        self._check_open()
        if on_comm_stream and (getattr(previous_event, "event", None) is None or not async_finish):
            raise ValueError(
                "allocate_on_comm_stream=True needs a previous_event that holds an event, and "
                f"async_finish=True; got {previous_event} and {async_finish}"
            )

    def _check_low_latency(self, slots: int, hidden: int, num_experts: int) -> None:
        self._check_open()
        if not self.low_latency_mode:
            raise ContractError("low-latency calls need a buffer made with low_latency_mode=True")
        needed = _low_latency_bytes(slots, hidden, num_experts)
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

    def _check_handle(self, handle: Any) -> Handle:
        if not isinstance(handle, tuple) or len(handle) != 6:
            raise ValueError(f"handle must be the tuple of six that dispatch returns; got {handle}")
        prefix, _, _, source, _, send_head = handle
        check_tensor("rank_prefix_matrix of handle", prefix, (self.group_size,) * 2, INT32)
        check_tensor("recv_src_idx of handle", source, (None,), INT32)
        check_tensor("send_head of handle", send_head, (None, self.group_size), INT32)
        return handle

    def _check_layout(
        self, num_tokens: int, per_rank: Any, in_rank: Any, per_expert: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, R] where tokens go, and [R + E] how many for each rank and each expert."""
        check_tensor("is_token_in_rank", in_rank, (num_tokens, self.group_size), (torch.bool,))
        check_tensor("num_tokens_per_rank", per_rank, (self.group_size,), INT32)
        check_tensor("num_tokens_per_expert", per_expert, (None,), INT32)
        if not len(per_expert) or len(per_expert) % self.group_size:
            raise ValueError(
                "num_tokens_per_expert must be for a positive multiple of the "
                f"{self.group_size} ranks; got {len(per_expert)} experts"
            )
        expected = in_rank.sum(0, dtype=torch.int32)
        if not torch.equal(per_rank, expected):
            raise ValueError(
                f"num_tokens_per_rank must agree with is_token_in_rank, {expected.tolist()}; got "
                f"{per_rank.tolist()}"
            )
        return in_rank, torch.cat([per_rank, per_expert])

    def _check_picks(
        self,
        topk_idx: OptionalTensor,
        topk_weights: OptionalTensor,
        in_rank: torch.Tensor,
        counts: torch.Tensor,
    ) -> int:
        """L, with the picks held against the layout."""
        per_expert = counts[self.group_size :]
        if topk_idx is None and topk_weights is None:
            return len(per_expert) // self.group_size
        picks, num_local_experts = check_topk_idx(
            topk_idx, len(in_rank), len(per_expert), self.group_size
        )
        check_tensor("topk_weights", topk_weights, picks.shape, WEIGHTS)
        if not torch.equal(in_rank, tokens_in_ranks(picks, num_local_experts, self.group_size)):
            raise ValueError("is_token_in_rank must be the layout of topk_idx; got another one")
        if not torch.equal(per_expert, _tokens_per_expert(picks, len(per_expert))):
            raise ValueError("num_tokens_per_expert must count topk_idx; got other counts")
        return num_local_experts


def _tokens_per_expert(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).to(torch.int32)


def _padded(rows: Sequence[torch.Tensor], size: int) -> Rows:
    """Received data, or data and scales, with unwritten rows up to `size`."""
    padded = [pad_rows(r, size) for r in rows]
    return padded[0] if len(padded) == 1 else (padded[0], padded[1])


def _ranges(first: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """first, first + 1, ... (`count` of them), one range after another."""
    first, count = first.flatten(), count.flatten()
    before = count.cumsum(0) - count
    return torch.repeat_interleave(first - before, count) + torch.arange(
        int(count.sum()), device=count.device
    )


def _low_latency_bytes(slots: int, hidden: int, num_experts: int) -> int:
    scales = hidden // 128
    dispatched = 16 + max(2 * hidden, hidden + 4 * scales)
    combined = 4 * scales + 2 * hidden
    send = max(slots * dispatched, num_experts * slots * combined)
    receive = num_experts * slots * max(dispatched, combined)
    return 2 * (send + receive + align(num_experts * 4, 128))


def cast_to_fp8(
    x: torch.Tensor, round_scale: bool, use_ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepEP's cast of a token to FP8 with a scale for 128 channels (csrc/kernels/utils.cuh).

    Args:
        x: [T, H], any floating dtype, H a multiple of 128.
        round_scale: powers of two for scales.
        use_ue8m0: four scales' exponents in one int32; needs `round_scale` and H a multiple of 512.

    Returns:
        [T, H] float8_e4m3fn, and the factors to multiply it by: [T, H / 128] float32 or
        [T, H / 512] int32.
    """
    blocks = x.detach().float().unflatten(1, (x.shape[1] // 128, 128))
    largest = blocks.abs().amax(2).clamp(min=1e-4)
    if round_scale:
        mantissa, exponent = torch.frexp(largest * (1 / 448))
        inverse = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())
        scale = 1 / inverse
    else:
        # Not `448 / largest`, which PyTorch rounds twice.
        inverse, scale = largest * (1 / 448), largest.new_tensor(448.0) / largest
    values = (blocks * scale.unsqueeze(2)).to(torch.float8_e4m3fn)
    if use_ue8m0:
        inverse = (inverse.view(torch.int32) >> 23).to(torch.uint8).view(torch.int32)
    return values.flatten(1), inverse
