"""DeepEP 1.2.1's `Buffer` on `torch.distributed`; shape letters as in rows.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..comm.collectives import gather_rows
from ..errors import ContractError
from .checks import (
    FLOATS,
    INT32,
    WEIGHTS,
    check_alignment,
    check_rows,
    check_tensor,
    check_topk_idx,
    unpack_bias,
)
from .config import Config
from .events import EventHandle, EventOverlap, finished_event
from .low_latency import LowLatencyCalls
from .rows import (
    Bias,
    Handle,
    OptionalTensor,
    Rows,
    align,
    check_agreement,
    differences,
    exchange_rows,
    exchange_tokens,
    local_experts,
    pad_rows,
    reduce_rows,
    send_positions,
    token_indices,
    tokens_in_ranks,
)


class Buffer(LowLatencyCalls):
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
        super().__init__(group, num_rdma_bytes, low_latency_mode)
        self.num_nvl_bytes = num_nvl_bytes
        self.explicitly_destroy = explicitly_destroy

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
            handle: six tensors.
                - `rank_prefix_matrix` [R, R] int32: tokens sent to each rank by ranks up to this.
                - `channel_prefix_matrix`, `recv_channel_prefix_matrix` [R, 1] int32: there is one
                  channel, whatever `config` says.
                - `recv_src_idx` [N] int32: a token's index in its source rank.
                - `is_token_in_rank` [T, R] bool.
                - `send_head` [T, R] int32: a token's place among those for a rank, -1 = not sent.
            event: holds an event if `async_finish`.
            With `handle` the middle four are None. Rows after the N received ones are -1 in
            recv_topk_idx and `unwritten` elsewhere.

        Raises:
            ValueError: an argument does not fit; names it, the expected and the given value.
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
        sizes = {"x": data.shape[1], "num_experts": num_local_experts * self.group_size}
        check_agreement(self.group, data.device, **sizes)
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
            recv_topk_idx[len(local) :] = -1  # as DeepEP's kernel does
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

    def _check_call(
        self, previous_event: EventOverlap | None, async_finish: bool, on_comm_stream: bool
    ) -> None:
        self._check_open()
        if on_comm_stream and (getattr(previous_event, "event", None) is None or not async_finish):
            raise ValueError(
                "allocate_on_comm_stream=True needs a previous_event that holds an event, and "
                f"async_finish=True; got {previous_event} and {async_finish}"
            )

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
        """L, after comparing the picks with the layout."""
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
