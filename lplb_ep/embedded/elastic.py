"""DeepEP V2's `ElasticBuffer` on `torch.distributed`; shape letters as in rows.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ContractError
from .rows import (
    FLOATS,
    WEIGHTS,
    Bias,
    EventHandle,
    EventOverlap,
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

_BUFFER_ALIGNMENT = 2 << 20
_NUM_SMS = 4


@dataclass(eq=False)
class EPHandle:
    """What `ElasticBuffer.dispatch` did; for `combine`, and for dispatching along the same routes.

    Attributes:
        do_expand: one row per (token, local expert) instead of one per token.
        num_experts: E.
        expert_alignment: received tokens of each local expert are counted up to a multiple of it.
        num_max_tokens_per_rank: at least T of every rank, the same on all ranks.
        num_sms: recorded, no meaning here.
        topk_idx: [T, K], the dispatch's.
        num_recv_tokens: N, or the worst case R * num_max_tokens_per_rank without CPU sync.
        num_expanded_tokens: rows of the expanded layout, alignment included; or the worst case.
        num_recv_tokens_per_expert_list: E / R aligned counts; empty without CPU sync.
        psum_num_recv_tokens_per_scaleup_rank: [R] int32, inclusive prefix sum over source ranks
            of received tokens, each counted once; its last entry is N.
        psum_num_recv_tokens_per_expert: [E / R] int32. Without expand the inclusive prefix sum of
            the aligned counts; with expand the aligned counts of the experts before, plus the
            expert's own unaligned count: where its rows end.
        num_unaligned_recv_tokens_per_expert: [E / R] int32, tokens of each local expert.
        recv_src_metadata: [num_recv_tokens, 2 + K] int32 for each received token: source rank *
            num_max_tokens_per_rank + its index there; source rank * K + its last pick on this
            rank; with expand, the row of each pick, -1 = not on this rank. Unwritten after N.
        dst_buffer_slot_idx: [T, K] int32 on a token's last pick for each rank: own rank *
            num_max_tokens_per_rank + its place among the tokens for that rank; else -1.
        token_metadata_at_forward: None: there is no forwarding between nodes.
        channel_linked_list: None, likewise.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: torch.Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    psum_num_recv_tokens_per_expert: torch.Tensor
    num_unaligned_recv_tokens_per_expert: torch.Tensor
    recv_src_metadata: torch.Tensor
    dst_buffer_slot_idx: torch.Tensor
    token_metadata_at_forward: OptionalTensor
    channel_linked_list: OptionalTensor


class ElasticBuffer:
    """DeepEP V2's `deep_ep.ElasticBuffer` on a `torch.distributed` group taken as one node.

    Engram, pipeline-parallel send/receive and all-gather sessions of DeepEP's class are left out:
    they do not move tokens to experts.

    Args: as DeepEP's. `group` and `num_max_tokens_per_rank` (a default for `dispatch`) matter;
        `allow_multiple_reduction` chooses where expanded rows are rounded, as in DeepEP; results
        are always deterministic; the others are recorded. No memory is reserved.

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
        """Ends the buffer; again is no error.

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
            ValueError: an argument does not fit (its name, what was expected, what came).
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
        check_alignment(alignment)
        if do_zero_padding and not do_expand:
            raise ValueError("do_zero_padding must be False without do_expand; got True")

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
            handle = self._new_handle(
                topk_idx.clone() if do_handle_copy else topk_idx,
                local,
                rows[0],
                received,
                num_experts=num_local_experts * self.num_ranks,
                num_max_tokens_per_rank=limit,
                expert_alignment=alignment,
                num_sms=num_sms or _NUM_SMS,
                do_expand=do_expand,
            )
            if do_cpu_sync is False:
                _assume_worst(handle, self.num_ranks)
            if statistics is not None:
                statistics.add_(handle.num_unaligned_recv_tokens_per_expert)
        recv_scales = None if scales is None else rows[3]
        recv_weights = None if topk_weights is None else rows[-1]
        received_rows = (local, rows[2], recv_scales, recv_weights)
        outputs = _lay_out(handle, *received_rows, do_zero_padding, use_tma_aligned_col_major_sf)
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
            index = index.masked_fill(~_last_pick_of_rank(rank), -1)
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

    def _new_handle(
        self,
        topk_idx: torch.Tensor,
        local: torch.Tensor,
        source: torch.Tensor,
        received: list[int],
        *,
        num_experts: int,
        num_max_tokens_per_rank: int,
        expert_alignment: int,
        num_sms: int,
        do_expand: bool,
    ) -> EPHandle:
        """Of picks [T, K] here, and of received tokens: their local experts [N, K], their origin
        (rank * num_max_tokens_per_rank + index) [N], and how many came from each rank."""
        device, num_picks = local.device, local.shape[1]
        num_local_experts = num_experts // self.num_ranks
        # What was sent: by its last pick for a rank.
        rank = topk_idx.long().div(num_local_experts, rounding_mode="floor")
        sent = send_positions(tokens_in_ranks(topk_idx, num_local_experts, self.num_ranks))
        slot = sent.gather(1, rank.clamp(min=0)) + self.rank_idx * num_max_tokens_per_rank

        # What arrived, by expert.
        token, pick = (local >= 0).nonzero(as_tuple=True)
        expert, order = local[token, pick].sort(stable=True)
        counts = torch.bincount(expert, minlength=num_local_experts)
        aligned = (counts + expert_alignment - 1).div(expert_alignment, rounding_mode="floor")
        aligned *= expert_alignment
        first = aligned.cumsum(0) - aligned
        per_rank = torch.tensor(received, device=device)
        lane = torch.arange(num_picks, device=device).where(local >= 0, -1)
        metadata = torch.full((len(local), 2 + num_picks), -1, dtype=torch.int32, device=device)
        metadata[:, 0] = source
        metadata[:, 1] = source // num_max_tokens_per_rank * num_picks + lane.amax(1)
        if do_expand:
            place = torch.arange(len(expert), device=device) - (counts.cumsum(0) - counts)[expert]
            metadata[token[order], 2 + pick[order]] = (first[expert] + place).int()
        return EPHandle(
            do_expand=do_expand,
            num_experts=num_experts,
            expert_alignment=expert_alignment,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            num_sms=num_sms,
            topk_idx=topk_idx,
            num_recv_tokens=len(local),
            num_expanded_tokens=int(aligned.sum()),
            num_recv_tokens_per_expert_list=aligned.tolist(),
            psum_num_recv_tokens_per_scaleup_rank=per_rank.cumsum(0).int(),
            psum_num_recv_tokens_per_expert=(first + (counts if do_expand else aligned)).int(),
            num_unaligned_recv_tokens_per_expert=counts.int(),
            recv_src_metadata=metadata,
            dst_buffer_slot_idx=slot.masked_fill(~_last_pick_of_rank(rank), -1).int(),
            token_metadata_at_forward=None,
            channel_linked_list=None,
        )


def _last_pick_of_rank(rank: torch.Tensor) -> torch.Tensor:
    """[T, K] bool: the picks by which DeepEP sends a token, for each of its ranks the last one."""
    again = (rank.unsqueeze(2) == rank.unsqueeze(1)).triu(1).any(2)
    return (rank >= 0) & ~again


def _check_free(topk_idx: Any, statistics: Any, do_cpu_sync: bool | None) -> None:
    if topk_idx is not None or statistics is not None or do_cpu_sync:
        raise ValueError(
            "topk_idx, cumulative_local_expert_recv_stats and do_cpu_sync must not be given with "
            "a handle"
        )


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


def _assume_worst(handle: EPHandle, num_ranks: int) -> None:
    """Sizes known without hearing from other ranks: DeepEP's without CPU sync."""
    num_local_experts = handle.num_experts // num_ranks
    alignment = handle.expert_alignment
    handle.num_recv_tokens = handle.num_max_tokens_per_rank * num_ranks
    picks = handle.num_recv_tokens * min(handle.topk_idx.shape[1], num_local_experts)
    handle.num_expanded_tokens = align(picks + (alignment - 1) * num_local_experts, alignment)
    handle.num_recv_tokens_per_expert_list = []
    handle.recv_src_metadata = pad_rows(handle.recv_src_metadata, handle.num_recv_tokens)


def _lay_out(
    handle: EPHandle,
    local: torch.Tensor,
    data: torch.Tensor,
    scales: OptionalTensor,
    weights: OptionalTensor,
    do_zero_padding: bool,
    column_major: bool,
) -> tuple[Rows, OptionalTensor, OptionalTensor]:
    """What a dispatch returns first: received rows in the layout of the handle."""
    if handle.do_expand:
        slots = handle.recv_src_metadata[: len(local), 2:].long()
        row, pick = (slots >= 0).nonzero(as_tuple=True)
        position, size = slots[row, pick], handle.num_expanded_tokens
        weights = None if weights is None else weights[row, pick]
    else:
        row = position = torch.arange(len(local), device=local.device)
        size = handle.num_recv_tokens
    recv_x = place_rows(data, position, size, row)
    recv_scales = None if scales is None else place_rows(scales, position, size, row)
    recv_topk_idx = None if handle.do_expand else place_rows(local, position, size)
    recv_topk_weights = None if weights is None else place_rows(weights, position, size)
    if do_zero_padding:
        for end in handle.psum_num_recv_tokens_per_expert.tolist():
            for rows in (recv_x, recv_scales, recv_topk_weights):
                if rows is not None:
                    rows[end : align(end, handle.expert_alignment)].zero_()
    if recv_scales is None:
        return recv_x, recv_topk_idx, recv_topk_weights
    if column_major:  # columns start at multiples of four elements, for TMA
        columns = unwritten(recv_scales.new_empty(recv_scales.shape[1], align(size, 4)))
        recv_scales = columns[:, :size].t().copy_(recv_scales)
    return (recv_x, recv_scales), recv_topk_idx, recv_topk_weights
