"""DeepEP 1.2.1's `Config`, and the sizes of its buffers."""

from __future__ import annotations

from dataclasses import dataclass

from .rows import align

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


def low_latency_bytes(slots: int, hidden: int, num_experts: int) -> int:
    """Bytes that low latency needs for `slots` tokens of a rank: csrc/config.hpp."""
    scales = hidden // 128
    dispatched = 16 + max(2 * hidden, hidden + 4 * scales)
    combined = 4 * scales + 2 * hidden
    send = max(slots * dispatched, num_experts * slots * combined)
    receive = num_experts * slots * max(dispatched, combined)
    return 2 * (send + receive + align(num_experts * 4, 128))
