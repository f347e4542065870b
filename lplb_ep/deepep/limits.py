"""The limits of DeepEP's kernels: slots, rows and picks.

Read from the sources of DeepEP 1.2.1 and 2.1.0. A later version asserts for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import ContractError
from ..placement.table import Placement


@dataclass(frozen=True)
class Limits:
    """The limits of one of DeepEP's classes; None where there is none."""

    owner: str = ""
    """The class and its version, for messages."""
    slots_per_rank: int | None = None
    """Of a rank whose peers all share its node."""
    slots_per_node: int | None = None
    """Of the ranks of one node, where there are several nodes."""
    slots: int | None = None
    """Of all ranks."""
    notify_threads: int | None = None
    """A thread for each slot of a rank and each rank of a node, where there are several nodes."""
    topk: int | None = None
    """Picks of a token."""
    pick_dtype: torch.dtype | None = None
    """Of `topk_idx`."""
    row_bytes: int | None = None
    """The bytes of a dispatched row are a multiple of it."""
    low_latency_topk: int | None = None
    low_latency_hidden: tuple[int, ...] | None = None
    """Elements of a row, one of these."""
    low_latency_slots_per_sm: int | None = None
    """Slots of all ranks for each multiprocessor of the GPU."""
    low_latency_slots_per_qp: int | None = None
    """Slots of a rank for each queue pair."""

    def check_slots(self, placement: Placement, num_ranks_per_node: int | None) -> None:
        """Compares a placement with the limits of `dispatch`.

        Args:
            placement: the copies.
            num_ranks_per_node: where there are several nodes; None: a single one.

        Raises:
            ContractError: it has too many slots.
        """
        most, where = self.slots_per_rank, ""
        if num_ranks_per_node is not None:
            where = f" with nodes of {num_ranks_per_node} ranks"
            if self.slots_per_node is not None:
                most = self.slots_per_node // num_ranks_per_node
            if self.notify_threads is not None:
                most = self.notify_threads - num_ranks_per_node
        if most is not None and placement.num_local_slots > most:
            raise self._too_many_slots(placement, f"{most} slots a rank{where}")
        if self.slots is not None and placement.num_physical_experts > self.slots:
            raise self._too_many_slots(placement, f"{self.slots} slots in all")

    def check_low_latency(self, placement: Placement, num_qps: int | None) -> None:
        """Compares a placement with the limits of the low-latency kernels.

        Args:
            placement: the copies.
            num_qps: queue pairs of a rank, `num_qps_per_rank` of the buffer; None: not known.

        Raises:
            ContractError: it has too many slots.
        """
        local, per_qp = placement.num_local_slots, self.low_latency_slots_per_qp
        if per_qp is not None and num_qps is not None and local > per_qp * num_qps:
            raise ContractError(
                f"{self.owner} takes one low-latency slot a rank for each queue pair. This buffer "
                f"has num_qps_per_rank={num_qps}, and the placement has {local} slots a rank: make "
                f"the buffer with num_qps_per_rank={local}"
            )
        if self.low_latency_slots_per_sm is not None and torch.cuda.is_available():
            num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
            most = self.low_latency_slots_per_sm * num_sms
            if placement.num_physical_experts > most:
                raise self._too_many_slots(placement, f"{most} low-latency slots in all")

    def check_picks(self, topk_idx: torch.Tensor, most: int | None) -> None:
        """Compares the picks of a call with their limit and dtype.

        Raises:
            ContractError: a token has too many, or they have another dtype.
        """
        if self.pick_dtype not in (None, topk_idx.dtype):
            raise ContractError(
                f"{self.owner} takes topk_idx of {self.pick_dtype}; got {topk_idx.dtype}"
            )
        if most is not None and topk_idx.shape[-1] > most:
            raise ContractError(
                f"{self.owner} takes at most {most} picks of a token in this call; topk_idx has "
                f"{topk_idx.shape[-1]}"
            )

    def check_low_latency_rows(self, x: torch.Tensor) -> None:
        """Compares the rows of a low-latency call with the sizes that have kernels.

        Raises:
            ContractError: there is no kernel for rows of that size.
        """
        sizes = self.low_latency_hidden
        if sizes is not None and x.shape[-1] not in sizes:
            raise ContractError(
                f"{self.owner} has low-latency kernels for rows of {', '.join(map(str, sizes))} "
                f"elements; x has rows of {x.shape[-1]}: use its other calls for them"
            )

    def check_rows(self, x: torch.Tensor) -> None:
        """Compares the rows of `ElasticBuffer.dispatch` with their alignment.

        Raises:
            ContractError: rows have another number of bytes.
        """
        num_bytes = x.shape[-1] * x.element_size()
        if self.row_bytes is not None and num_bytes % self.row_bytes:
            raise ContractError(
                f"{self.owner} takes rows of a multiple of {self.row_bytes} bytes; x has rows of "
                f"{num_bytes} bytes: pad them"
            )

    def _too_many_slots(self, placement: Placement, most: str) -> ContractError:
        guests, fewer = placement.num_guests_per_rank, "fewer replicas"
        if guests:
            fewer += " or guests"
        return ContractError(
            f"{self.owner} takes at most {most}. The placement of {placement.num_experts} experts "
            f"has {placement.num_local_slots} slots on each of {placement.num_ranks} ranks"
            f"{f', {guests} of them for guests' if guests else ''}: take {fewer} a rank, or more "
            "ranks"
        )


LEGACY_1_2_1 = Limits(
    slots_per_rank=128,  # kernels/intranode.cu, threads of `notify_dispatch`
    slots_per_node=512,  # kernels/internode.cu, threads of `notify_dispatch`
    topk=32,  # both, lanes of a warp
    low_latency_topk=11,  # kernels/internode_ll.cu, kNumMaxTopK
    low_latency_hidden=(2048, 2560, 4096, 5120, 6144, 7168, 8192),  # kernels/launch.cuh
    low_latency_slots_per_sm=14,  # kernels/internode_ll.cu, `num_warp_groups < 15`
    low_latency_slots_per_qp=1,  # kernels/internode_ll.cu, `num_rc_per_pe`
)
LEGACY_2 = replace(
    LEGACY_1_2_1, low_latency_hidden=(2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
)
ELASTIC = Limits(
    slots_per_rank=256,  # common/layout.cuh, kNumMaxExpertsPerRank
    slots=2048,  # common/layout.cuh, kNumMaxExperts
    notify_threads=128,  # impls/hybrid_dispatch.cuh, kNumNotifyWarps
    topk=32,  # impls/dispatch.cuh, lanes of a warp
    row_bytes=32,  # common/ptx.cuh, kNumTMAAlignBytes
)
NONE = Limits()
