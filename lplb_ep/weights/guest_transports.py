"""The choice of a transport of guests, by the request and the machine."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..comm.alltoall import make_peers, peers_obstacle
from ..comm.collectives import together
from ..comm.peers import peer_memory
from ..comm.reachability import reachability
from ..errors import ContractError, RankError
from ..settings import Settings
from .guest_launches import PeerAddresses
from .guest_transport import CollectiveGuests, GuestTransport
from .peer_guests import PeerGuests

_MIN_CAPABILITY = (9, 0)  # which has bulk copies


def make_guest_transport(
    group: dist.ProcessGroup | None,
    device: torch.device,
    num_bytes: int,
    transport: str = "auto",
    num_gradient_bytes: int | None = None,
) -> GuestTransport:
    """Makes the transport of a pool, and the pool's memory. Collective.

    Args:
        group: the ranks; None for a single one.
        device: where the weights lie.
        num_bytes: of the pool on each rank, the same on all.
        transport: "peers", "torch", or "auto": the first of them that is possible.
        num_gradient_bytes: the most that gradients of a layer's guests take, which lie in the
            pool's memory, too. Without it twice as many as weights: those of bfloat16 in float32.

    Raises:
        ValueError: "peers" is asked for and not possible; says why.
        RuntimeError: there is no memory for it; RankError on the other ranks.
    """
    most = max(num_bytes, 2 * num_bytes if num_gradient_bytes is None else num_gradient_bytes)
    found = make_peers(
        group,
        transport,
        "guests",
        "kernels that write the other GPUs' memory",
        lambda: _obstacle(device),
        lambda of: _make_peer_guests(of, device, num_bytes, most),
    )
    if found is not None:
        return found
    with together(group, "GuestPool"):  # the memory may not suffice on one rank alone
        memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return CollectiveGuests(group, memory)


def _obstacle(device: torch.device) -> str:
    """Why this rank cannot take part; empty: it can."""
    if obstacle := peers_obstacle(device):
        return obstacle
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _MIN_CAPABILITY:
        return f"bulk copies need sm_90 or newer, and its GPU is sm_{major}{minor}"
    return ""


def _make_peer_guests(
    group: dist.ProcessGroup, device: torch.device, num_bytes: int, num_memory_bytes: int
) -> PeerGuests | str:
    """The transport, or why there is none: the same on all ranks."""
    with torch.cuda.device(device):
        found = reachability(group)
        if found.ipc:
            return found.ipc
        try:
            memory = peer_memory(group, "ipc")
            sizes = PeerAddresses.sizes(group.size(), num_memory_bytes)
            addresses = PeerAddresses(*(memory.window(size) for size in sizes))
        except (ContractError, RankError) as error:  # on all ranks
            return str(error)
        with together(group, "guests"):
            settings = Settings.from_env()
            return PeerGuests(
                group.rank(),
                device,
                addresses,
                num_bytes,
                num_memory_bytes,
                found.num_ranks_per_node or group.size(),
                num_blocks=settings.push_sms,
                timeout_s=settings.timeout_s,
                abort_on_timeout=settings.on_timeout == "abort",
            )
