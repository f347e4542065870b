"""DeepEP V2's `ElasticBuffer` on `torch.distributed`; shape letters as in rows.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..errors import ContractError
from .checks import (
    FLOATS,
    WEIGHTS,
    check_alignment,
    check_limit,
    check_rows,
    check_statistics,
    check_tensor,
    check_topk_idx,
    unpack_bias,
)
from .events import EventHandle, EventOverlap, finished_event
from .handles import EPHandle, assume_worst, last_pick_of_rank, lay_out, new_handle
from .rows import (
    Bias,
    OptionalTensor,
    Rows,
    align,
    check_agreement,
    differences,
    exchange_rows,
    exchange_tokens,
    local_experts,
    reduce_rows,
    send_positions,
    token_indices,
    tokens_in_ranks,
)

_BUFFER_ALIGNMENT = 2 << 20
_NUM_SMS = 4


class ElasticBuffer:
    """DeepEP V2's `deep_ep.ElasticBuffer` on a `torch.distributed` group taken as one node.

    Engram, pipeline-parallel send/receive and all-gather sessions of DeepEP's class are left out:
    they do not move tokens to experts.

    Args: as DeepEP's. `group` and `num_max_tokens_per_rank` (a default for `dispatch`) matter.
        `allow_multiple_reduction` chooses where expanded rows are rounded, as in DeepEP. Results
        are always deterministic. The others are recorded, and no memory is reserved.

    Raises:
        ValueError: neither `num_bytes` nor both `num_max_tokens_per_rank` and `hidden` are given,
            or `num_bytes` is not a multiple of 2 MiB.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        if num_bytes is None:
            num_bytes = self.get_buffer_size_hint(
                group,
                num_max_tokens_per_rank,
                hidden,
                num_topk,
                use_fp8_dispatch,
                allow_hybrid_mode,
                allow_multiple_reduction,
            )
        if num_bytes <= 0 or num_bytes % _BUFFER_ALIGNMENT:
            raise ValueError(
                f"num_bytes must be a positive multiple of {_BUFFER_ALIGNMENT}; got {num_bytes}"
            )
        self.group = group
        self.rank_idx = group.rank()
        self.num_ranks = group.size()
        self.num_bytes = num_bytes
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.explicitly_destroy = explicitly_destroy
        self.num_allocated_qps = num_allocated_qps or (129 if allow_hybrid_mode else 17)
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx
        self._destroyed = False

    def destroy(self) -> None:
        """Ends the buffer. A second call is no error.

        Raises:
            ContractError: the buffer was not made with `explicitly_destroy=True`.
        """
        if not self.explicitly_destroy:
            raise ContractError("destroy() needs a buffer made with explicitly_destroy=True")
        self._destroyed = True

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes that DeepEP would need for these settings on one node, a multiple of 2 MiB.

        Raises:
            ValueError: `num_max_tokens_per_rank` or `hidden` is not positive.
        """
        if num_max_tokens_per_rank <= 0 or hidden <= 0:
            raise ValueError(
                "num_max_tokens_per_rank and hidden must be positive; got "
                f"{num_max_tokens_per_rank} and {hidden}"
            )
        topk = num_topk or 32
        scales = 4 * align(hidden, 32) // 32 if use_fp8_dispatch else 0
        sent = (hidden * (1 if use_fp8_dispatch else 2), scales, (3 * topk + 1) * 4)
        returned = (hidden * 2, topk * 8)
        copies = min(group.size(), topk) if allow_multiple_reduction else topk
        num_bytes = num_max_tokens_per_rank * max(
            group.size() * sum(align(part, 32) for part in sent),
            copies * sum(align(part, 32) for part in returned),
        )
        return align(num_bytes, _BUFFER_ALIGNMENT)

    @staticmethod
    def capture() -> EventHandle:
        """An event of the present; DeepEP returns a bare `EventHandle` here, too."""
        return EventHandle()

    def get_comm_stream(self) -> Any:
        """PyTorch's stand-in for a stream of the CPU."""
        return torch.cpu.current_stream()

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Waits for all ranks. Collective; the arguments have no meaning here."""
        self._check_open()
        dist.barrier(group=self.group)

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(RDMA ranks, NVLink ranks): the group counts as one node."""
        return 1, self.num_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(scale-out ranks, scale-up ranks)."""
        return 1, self.num_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """The fewest SMs that DeepEP ever recommends; it models a GPU's bandwidth, of which there
        is none here.

        Raises:
            ValueError: R does not divide `num_experts`, or `num_scaleout_topk` is not 0.
        """
        if num_scaleout_topk:
            raise ValueError(f"num_scaleout_topk must be 0; got {num_scaleout_topk}")
        if num_experts % self.num_ranks:
            raise ValueError(
                f"num_experts must be a multiple of the {self.num_ranks} ranks; got {num_experts}"
            )
        return _NUM_SMS

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """DeepEP's rule for the number of RDMA queue pairs, at most `num_allocated_qps`."""
        num_qps = num_sms * 16 + 1 if self.allow_hybrid_mode else min(num_sms, 9)
        return min(num_qps, self.num_allocated_qps)

    def dispatch(
        self,
        x: Rows,
        topk_idx: OptionalTensor = None,
        topk_weights: OptionalTensor = None,
        cumulative_local_expert_recv_stats: OptionalTensor = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, OptionalTensor, OptionalTensor, EPHandle, EventOverlap]:
        """Sends every token once to each rank that has one of its experts. Collective.

        Args:
            x: [T, H], any dtype; or (data [T, H], scales [T, S]).
            topk_idx: [T, K] int32 or int64, experts in [0, E), none twice in a token, -1 = none.
                None with `handle`.
            topk_weights: [T, K] float32 or float64, or None.
            cumulative_local_expert_recv_stats: [E / R] int32, increased by the unaligned counts of
                received tokens. None with `handle`.
            num_experts: E, a multiple of R.
            num_max_tokens_per_rank: at least T of every rank, the same on all; by default the
                constructor's.
            expert_alignment: counts of each local expert are rounded up to a multiple; default 1.
            num_sms, num_qps: recorded, checked.
            previous_event, previous_event_before_epilogue, async_with_compute_stream,
                allocate_on_comm_stream: checked as DeepEP does; the call is always complete.
            handle: of an earlier dispatch whose routes, sizes and layout to use again.
            do_handle_copy: whether the handle holds a copy of `topk_idx`.
            do_cpu_sync: False: outputs have the worst-case size. Default: True without `handle`.
            do_expand: one row per (token, local expert), grouped by expert.
            do_zero_padding: with `do_expand`, clear the rows between experts.
            use_tma_aligned_col_major_sf: received scales are column-major, columns a multiple of 4
                elements apart.

        Returns:
            recv_x: like `x`, [N, H] by source rank, then token; with `do_expand` by local expert
                (each from a multiple of `expert_alignment`), then source rank and token.
            recv_topk_idx: [N, K], local experts in [0, E / R), -1 = another rank's; None with
                `do_expand`.
            recv_topk_weights: [N, K], the source's weights, of other ranks' picks too; [rows] with
                `do_expand`; None without `topk_weights`.
            handle: a new one, or the one given.
            event: holds an event if `async_with_compute_stream`.
            Rows that DeepEP leaves uninitialised (padding, worst-case tails) are `unwritten`.

        Raises:
            ValueError: an argument does not fit; names it, the expected and the given value.
            ContractError: the buffer was destroyed.
        """
        self._check_call(previous_event, allocate_on_comm_stream, num_qps)
        data, scales = check_rows(x)
        statistics = cumulative_local_expert_recv_stats
        if handle is not None:
            check_tensor("x", data, (len(handle.topk_idx), None))
            _check_free(topk_idx, statistics, do_cpu_sync)
        num_experts, limit, alignment = self._settings(
            handle, num_experts, num_max_tokens_per_rank, expert_alignment, do_expand
        )
        picks = topk_idx if handle is None else handle.topk_idx
        topk_idx, num_local_experts = check_topk_idx(picks, len(data), num_experts, self.num_ranks)
        _check_picks(topk_idx, topk_weights, limit)
        check_statistics("cumulative_local_expert_recv_stats", statistics, num_local_experts)
        _check_layout(alignment, do_zero_padding, do_expand)
        if handle is None:
            self._check_agreement(data, limit, num_local_experts)

        in_rank = tokens_in_ranks(topk_idx, num_local_experts, self.num_ranks)
        optional = [t for t in (scales, topk_weights) if t is not None]
        rows, received = exchange_tokens(
            self.group,
            [token_indices(data) + self.rank_idx * limit, topk_idx, data, *optional],
            in_rank,
            differences(handle.psum_num_recv_tokens_per_scaleup_rank) if handle else None,
        )
        local = local_experts(rows[1], self.rank_idx, num_local_experts)
        if handle is None:
            handle = new_handle(
                topk_idx.clone() if do_handle_copy else topk_idx,
                local,
                rows[0],
                received,
                rank=self.rank_idx,
                num_experts=num_local_experts * self.num_ranks,
                num_max_tokens_per_rank=limit,
                expert_alignment=alignment,
                num_sms=num_sms or _NUM_SMS,
                do_expand=do_expand,
            )
            if do_cpu_sync is False:
                assume_worst(handle, self.num_ranks)
            if statistics is not None:
                statistics.add_(handle.num_unaligned_recv_tokens_per_expert)
        recv_scales = None if scales is None else rows[3]
        recv_weights = None if topk_weights is None else rows[-1]
        received_rows = (local, rows[2], recv_scales, recv_weights)
        outputs = lay_out(handle, *received_rows, do_zero_padding, use_tma_aligned_col_major_sf)
        return *outputs, handle, finished_event(async_with_compute_stream)

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: OptionalTensor = None,
        bias: Bias = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, OptionalTensor, EventOverlap]:
        """Sends received rows back and sums those of each token. Collective.

        Args:
            x: any floating dtype, [num_recv_tokens, H] in the layout of the dispatch; or expanded,
                [num_expanded_tokens, H].
            handle: of the dispatch.
            topk_weights: float32 or float64, [num_recv_tokens, K], or expanded
                [num_expanded_tokens]; or None, as it must be for expanded rows with
                `allow_multiple_reduction=False`.
            bias: one or two [T, H] of the dtype of `x`, added first; or None.
            num_sms, num_qps, previous_event, previous_event_before_epilogue,
                async_with_compute_stream, allocate_on_comm_stream: as in `dispatch`.

        Returns:
            combined_x: [T, H], dtype of `x`. Expanded rows of a token are summed on their rank
                first, and rounded, unless `allow_multiple_reduction=False`. Sums are made as
                `reduce_rows` does, in the order of picks (for a rank, its last).
            combined_topk_weights: [T, K], the weight that came back for each pick, 0 for -1; None
                without `topk_weights`.
            event: holds an event if `async_with_compute_stream`.

        Raises:
            ValueError: an argument does not fit.
            ContractError: the buffer was destroyed.
        """
        self._check_call(previous_event, allocate_on_comm_stream, num_qps)
        size = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
        topk_idx = handle.topk_idx
        check_tensor("x", x, (size, None), FLOATS)
        biases = unpack_bias(bias, len(topk_idx), x)
        separately = handle.do_expand and not self.allow_multiple_reduction
        if topk_weights is not None:
            if separately:
                raise ValueError(
                    "topk_weights must be None for expanded rows with "
                    "allow_multiple_reduction=False; got a tensor"
                )
            shape = (size,) if handle.do_expand else (size, topk_idx.shape[1])
            check_tensor("topk_weights", topk_weights, shape, WEIGHTS)

        num_local_experts = handle.num_experts // self.num_ranks
        rank = topk_idx.long().div(num_local_experts, rounding_mode="floor")
        returned = differences(handle.psum_num_recv_tokens_per_scaleup_rank)
        row = torch.arange(sum(returned), device=x.device)
        tensors = [x]
        if handle.do_expand:
            slots = handle.recv_src_metadata[: len(row), 2:].long()
            if separately:
                row = slots[slots >= 0]
                returned = [int((part >= 0).sum()) for part in slots.split(returned)]
            else:
                tensors = [reduce_rows(x, slots)]
            if topk_weights is not None:
                # Picks of other ranks get any weight: the source does not read it.
                tensors.append(topk_weights[slots.clamp(min=0)])
        elif topk_weights is not None:
            tensors.append(topk_weights)

        # The row that comes back for each pick: one for each pick, or one for each rank.
        if separately:
            sent = torch.bincount(rank[rank >= 0], minlength=self.num_ranks)
            index = torch.full_like(rank, -1)
            order = rank.flatten().sort(stable=True).indices[int((rank < 0).sum()) :]
            index.view(-1)[order] = torch.arange(len(order), device=x.device)
        else:
            in_rank = tokens_in_ranks(topk_idx, num_local_experts, self.num_ranks)
            sent = in_rank.sum(0)
            index = (send_positions(in_rank) + sent.cumsum(0) - sent).gather(1, rank.clamp(min=0))
        rows, _ = exchange_rows(self.group, tensors, row, returned, sent.tolist())
        combined_topk_weights = None
        if topk_weights is not None:
            combined_topk_weights = torch.zeros_like(rank, dtype=topk_weights.dtype)
            token, pick = (rank >= 0).nonzero(as_tuple=True)
            combined_topk_weights[token, pick] = rows[1][index[token, pick], pick]
        if not separately:
            index = index.masked_fill(~last_pick_of_rank(rank), -1)
        combined_x = reduce_rows(rows[0], index, biases)
        return combined_x, combined_topk_weights, finished_event(async_with_compute_stream)

    def _check_open(self) -> None:
        if self._destroyed:
            raise ContractError("the buffer was destroyed")

    def _check_call(
        self, previous_event: EventHandle | None, on_comm_stream: bool, num_qps: int
    ) -> None:
        self._check_open()
        if previous_event is not None and not on_comm_stream:
            raise ValueError("allocate_on_comm_stream must be True with previous_event; got False")
        if num_qps > self.num_allocated_qps:
            raise ValueError(
                f"num_qps must be at most the {self.num_allocated_qps} allocated; got {num_qps}"
            )

    def _check_agreement(self, data: torch.Tensor, limit: int, num_local_experts: int) -> None:
        sizes = {"num_max_tokens_per_rank": limit, "x": data.shape[1]}
        sizes["num_experts"] = num_local_experts * self.num_ranks
        check_agreement(self.group, data.device, **sizes)

    def _settings(
        self,
        handle: EPHandle | None,
        num_experts: int | None,
        num_max_tokens_per_rank: int | None,
        expert_alignment: int | None,
        do_expand: bool,
    ) -> tuple[int | None, int, int]:
        """The first three, with defaults or the handle's, from which they must not differ."""
        if handle is None:
            limit = num_max_tokens_per_rank
            limit = self.num_max_tokens_per_rank if limit is None else limit
            return num_experts, limit, 1 if expert_alignment is None else expert_alignment
        given = {
            "num_experts": num_experts,
            "num_max_tokens_per_rank": num_max_tokens_per_rank,
            "expert_alignment": expert_alignment,
            "do_expand": do_expand,
        }
        for name, value in given.items():
            expected = getattr(handle, name)
            if value not in (None, expected):
                raise ValueError(f"{name} must be the handle's, {expected}; got {value}")
        return handle.num_experts, handle.num_max_tokens_per_rank, handle.expert_alignment


def _check_free(topk_idx: Any, statistics: Any, do_cpu_sync: bool | None) -> None:
    if topk_idx is not None or statistics is not None or do_cpu_sync:
        raise ValueError(
            "topk_idx, cumulative_local_expert_recv_stats and do_cpu_sync must not be given with "
            "a handle"
        )


def _check_layout(alignment: int, do_zero_padding: bool, do_expand: bool) -> None:
    check_alignment(alignment)
    if do_zero_padding and not do_expand:
        raise ValueError("do_zero_padding must be False without do_expand; got True")


def _check_picks(topk_idx: torch.Tensor, topk_weights: Any, limit: int) -> None:
    check_limit("num_max_tokens_per_rank", limit, len(topk_idx))
    if topk_weights is not None:
        check_tensor("topk_weights", topk_weights, topk_idx.shape, WEIGHTS)
    ordered = topk_idx.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    if len(twice):
        token, pick = twice[0].tolist()
        raise ValueError(
            f"topk_idx must not name an expert twice in a token; got {int(ordered[token, pick])} "
            f"twice for token {token}"
        )
