"""A user's program for type checkers: `make lint` has mypy find each mistake in it, and no other.

A mistake that mypy no longer finds leaves a comment that it then calls unused.
`tests/cpu/test_package.py` has pyright do the same. It is never run.
"""

import torch
import torch.distributed as dist

from lplb_ep import Buffer, ElasticBuffer, Placement, Planner, solve


def good(group: dist.ProcessGroup, x: torch.Tensor, placement: Placement) -> None:
    buffer = Buffer(group, 1 << 20, placement=placement, num_local_slots=3, indices="logical")
    _, _, _, _, handle, event = buffer.view(placement).dispatch(x, topk_idx=x)
    event.current_stream_wait()
    if handle is not None:
        buffer.combine(x, handle)
    buffer.internode_dispatch(x)
    for layer in buffer.stats():
        print(layer)
    print(solve([1, 2], placement, base_load=[0, 1]).quota)
    print(Planner(placement, rank=0, counts="given")([[0]], [[1, 0]]).rank_load)
    ElasticBuffer(group, hidden=3).pp_send(x, 1)


def wrong(group: dist.ProcessGroup, x: torch.Tensor, placement: Placement) -> None:
    Buffer(group, placment=placement)  # type: ignore[call-arg]
    Buffer(group).dispach(x)  # type: ignore[attr-defined]
    Buffer(group).dispatch(x, topk_id=x)  # type: ignore[call-arg]
    Buffer(group).view(placement).combin(x)  # type: ignore[attr-defined]
    Buffer(group).view(3)  # type: ignore[arg-type]
    ElasticBuffer(group, indices="both")  # type: ignore[arg-type]
    ElasticBuffer(group).dispatch(x, num_expert=3)  # type: ignore[call-arg]
    solve(x, placement, objectiv="tokens")  # type: ignore[call-arg]
    Placement([0, 1], 2, num_rank=3)  # type: ignore[call-arg]
