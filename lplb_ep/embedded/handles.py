"""The handle of a dispatch of DeepEP V2, and rows in its layout; shape letters as in rows.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rows import (
    OptionalTensor,
    Rows,
    align,
    pad_rows,
    place_rows,
    send_positions,
    tokens_in_ranks,
    unwritten,
)


@dataclass(eq=False)
class EPHandle:
    """Routes and sizes of an `ElasticBuffer.dispatch`, for `combine` and for another dispatch.

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
            the aligned counts. With expand the end of the expert's rows: aligned counts of the
            experts before, plus its own unaligned count.
        num_unaligned_recv_tokens_per_expert: [E / R] int32, tokens of each local expert.
        recv_src_metadata: [num_recv_tokens, 2 + K] int32 for each received token. Column 0:
            `source rank * num_max_tokens_per_rank + its index there`. Column 1:
            `source rank * K + its last pick on this rank`. With expand, the others: the row of
            each pick, -1 = not on this rank. Unwritten after N.
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


def new_handle(
    topk_idx: torch.Tensor,
    local: torch.Tensor,
    source: torch.Tensor,
    received: list[int],
    *,
    rank: int,
    num_experts: int,
    num_max_tokens_per_rank: int,
    expert_alignment: int,
    num_sms: int,
    do_expand: bool,
) -> EPHandle:
    """The handle of a dispatch, with sizes as received.

    Args:
        topk_idx: [T, K] picks of this rank's tokens.
        local: [N, K] local experts of the received tokens, -1 = another rank's.
        source: [N] source rank * num_max_tokens_per_rank + the token's index there.
        received: [R] how many tokens came from each rank.
        rank: this rank.
        num_experts, num_max_tokens_per_rank, expert_alignment, num_sms, do_expand: as the fields.
    """
    device, num_picks, num_ranks = local.device, local.shape[1], len(received)
    num_local_experts = num_experts // num_ranks
    # Sent tokens, each by its last pick for a rank.
    ranks = topk_idx.long().div(num_local_experts, rounding_mode="floor")
    sent = send_positions(tokens_in_ranks(topk_idx, num_local_experts, num_ranks))
    slot = sent.gather(1, ranks.clamp(min=0)) + rank * num_max_tokens_per_rank

    # Received picks, by expert.
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
        dst_buffer_slot_idx=slot.masked_fill(~last_pick_of_rank(ranks), -1).int(),
        token_metadata_at_forward=None,
        channel_linked_list=None,
    )


def last_pick_of_rank(rank: torch.Tensor) -> torch.Tensor:
    """[T, K] bool: the picks by which DeepEP sends a token, the last one for each of its ranks.

    Args:
        rank: [T, K] the rank of each pick, negative for none.
    """
    again = (rank.unsqueeze(2) == rank.unsqueeze(1)).triu(1).any(2)
    return (rank >= 0) & ~again


def assume_worst(handle: EPHandle, num_ranks: int) -> None:
    """Gives a handle the sizes that need no other rank's answer: DeepEP's without CPU sync."""
    num_local_experts = handle.num_experts // num_ranks
    alignment = handle.expert_alignment
    handle.num_recv_tokens = handle.num_max_tokens_per_rank * num_ranks
    picks = handle.num_recv_tokens * min(handle.topk_idx.shape[1], num_local_experts)
    handle.num_expanded_tokens = align(picks + (alignment - 1) * num_local_experts, alignment)
    handle.num_recv_tokens_per_expert_list = []
    handle.recv_src_metadata = pad_rows(handle.recv_src_metadata, handle.num_recv_tokens)


def lay_out(
    handle: EPHandle,
    local: torch.Tensor,
    data: torch.Tensor,
    scales: OptionalTensor,
    weights: OptionalTensor,
    do_zero_padding: bool,
    column_major: bool,
) -> tuple[Rows, OptionalTensor, OptionalTensor]:
    """Received rows in the layout of a handle.

    Args:
        handle: of this dispatch, or of an earlier one along the same routes.
        local: [N, K] local experts of the received tokens, -1 = another rank's.
        data: [N, H] received rows.
        scales: [N, S], or None.
        weights: [N, K], or None.
        do_zero_padding: clear the rows between experts.
        column_major: columns of scales start at multiples of four elements, as TMA needs.

    Returns:
        recv_x, recv_topk_idx and recv_topk_weights of `ElasticBuffer.dispatch`.
    """
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
    if column_major:
        columns = unwritten(recv_scales.new_empty(recv_scales.shape[1], align(size, 4)))
        recv_scales = columns[:, :size].t().copy_(recv_scales)
    return (recv_x, recv_scales), recv_topk_idx, recv_topk_weights
