"""Which memory of one another ranks can write, by NVSHMEM or by CUDA IPC."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ..settings import has_part_of_gpu
from . import nvshmem
from .collectives import everyone, together
from .nvshmem import World


@dataclass(frozen=True)
class Reachability:
    """Why the ranks of a group cannot write each other's memory; empty: they can."""

    nvshmem: str = ""
    """In NVSHMEM's symmetric memory."""
    ipc: str = ""
    """In memory that CUDA IPC shares."""
    num_ranks_per_node: int = 0
    """How many ranks share a node; 0: all, or the nodes are uneven."""


_of_group: WeakKeyDictionary[dist.ProcessGroup, Reachability] = WeakKeyDictionary()


def reachability(group: dist.ProcessGroup | None) -> Reachability:
    """Finds which memory all ranks of a group can write. Collective for the first time.

    Args:
        group: the ranks, each with a GPU that is current. None: what this process says for itself.

    Returns:
        The same on every rank.
    """
    if group is None:
        return replace(_find([_Fact.of_this_rank()]), num_ranks_per_node=0)
    if group not in _of_group:
        with together(group, "counts"):
            fact = _Fact.of_this_rank()
        _of_group[group] = _find(everyone(group, fact))
    return _of_group[group]


def rule_out(group: dist.ProcessGroup, kind: str, obstacle: str) -> None:
    """Remembers that a group could not get memory of a kind, on every rank alike.

    Args:
        group: the ranks.
        kind: "nvshmem" or "ipc".
        obstacle: why.
    """
    known = reachability(group)
    _of_group[group] = (
        replace(known, nvshmem=obstacle) if kind == "nvshmem" else replace(known, ipc=obstacle)
    )


@dataclass(frozen=True)
class _Fact:
    """What a rank says of itself."""

    node: str
    device: str
    nvshmem: str
    """Why it has no NVSHMEM; empty: it has."""
    world: World | None
    has_part_of_gpu: bool

    @staticmethod
    def of_this_rank() -> _Fact:
        device = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return _Fact(_node(), device, *nvshmem.state(), has_part_of_gpu())


def _node() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a host
    return boot.read_text().strip() if boot.exists() else os.uname().nodename


def _find(facts: list[_Fact]) -> Reachability:
    num_ranks, nodes = len(facts), [fact.node for fact in facts]
    num_nodes = len(set(nodes))
    size = num_ranks // num_nodes
    first = nodes[::size] if num_ranks % num_nodes == 0 else []
    even = nodes == [node for node in first for _ in range(size)]
    apart = f"the ranks are on {num_nodes} nodes" if num_nodes > 1 else ""
    lacking = [rank for rank, fact in enumerate(facts) if fact.nvshmem]
    obstacle = ""
    if lacking:
        obstacle = f"rank {lacking[0]}: {facts[lacking[0]].nvshmem}"
    elif not even:
        obstacle = f"{apart}, and a node's are not consecutive, or more than another's"
    elif len({fact.device for fact in facts}) < num_ranks and not all(
        fact.has_part_of_gpu for fact in facts
    ):
        # NVSHMEM would end the process.
        obstacle = "ranks share a GPU, without MPS and CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    else:
        obstacle = nvshmem.world_obstacle([fact.world for fact in facts], num_nodes)
    return Reachability(obstacle, apart, size if even else 0)
