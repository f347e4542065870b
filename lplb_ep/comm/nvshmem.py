"""The world of NVSHMEM: whether one runs, with which ranks, and how a group joins it."""

from __future__ import annotations

import importlib.util

import torch
import torch.distributed as dist

from ..errors import ContractError, MissingPackageError
from ..settings import save_for_nvshmem
from .collectives import attempt, everyone

World = tuple[int, int]
"""How many PEs NVSHMEM runs with, and which of them this process is."""

_started: list[bool] = []


def has_started_nvshmem() -> bool:
    """Whether NVSHMEM runs in this process because of an exchange, with options for that."""
    return bool(_started)


def runs() -> bool:
    """Whether NVSHMEM runs in this process, whoever started it."""
    from nvshmem import bindings

    status = bindings.Init_status
    running = (status.STATUS_IS_INITIALIZED, status.STATUS_LIMITED_MPG, status.STATUS_FULL_MPG)
    return bindings.init_status() in running


def state() -> tuple[str, World | None]:
    """Says why there is no NVSHMEM here, or else in which world it runs.

    Returns:
        (the obstacle; empty: there is none, the world; None: it does not run).
    """
    if importlib.util.find_spec("nvshmem") is None:
        return "nvshmem4py is not installed: pip install nvshmem4py-cu13", None
    try:
        from nvshmem import bindings, core

        core.get_unique_id(empty=True)  # loads the library
        return "", (bindings.n_pes(), bindings.my_pe()) if runs() else None
    except Exception as error:  # noqa: BLE001  (a reason to take another way, whatever it is)
        return f"nvshmem4py does not load: {error}", None


def world_obstacle(worlds: list[World | None], num_nodes: int) -> str:
    """Says why the worlds that run cannot serve a group; empty: they can, or none runs yet.

    Args:
        worlds: [R] the world of each rank.
        num_nodes: the nodes that the ranks are on.
    """
    num_ranks = len(worlds)
    usable: list[list[World | None]] = [
        [None] * num_ranks,
        [(num_ranks, rank) for rank in range(num_ranks)],
        [(num_nodes, rank * num_nodes // num_ranks) for rank in range(num_ranks)],
    ]
    if worlds in usable[: 2 + (num_nodes > 1)]:
        return ""
    without = [rank for rank, world in enumerate(worlds) if world is None]
    if without:
        return f"NVSHMEM runs already on some ranks only: not on {without}"
    rank = next(r for r, world in enumerate(worlds) if world != (num_ranks, r))
    size, pe = worlds[rank] or (0, 0)
    return (
        f"NVSHMEM runs already with {size} PEs, of which rank {rank} of {num_ranks} is {pe}. "
        "It must have one for each rank or, across nodes, one for each node"
    )


def join(group: dist.ProcessGroup, num_nodes: int) -> None:
    """Starts NVSHMEM with the ranks as its PEs, or joins the world that runs. Collective.

    NVSHMEM counts its users, so a world does not end when those who started it are done with it.

    Args:
        group: the ranks.
        num_nodes: the nodes that they are on.

    Raises:
        MissingPackageError: a rank lacks the package; names it.
        ContractError: NVSHMEM runs already, with other ranks than are needed, or does not start.
        RankError: it does not start on another rank.
    """
    states = everyone(group, state())
    reasons = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(states) if reason]
    if reasons:
        raise MissingPackageError(reasons[0])
    obstacle = world_obstacle([world for _, world in states], num_nodes)
    if obstacle:
        raise ContractError(obstacle)
    world = states[group.rank()][1]
    if world is None and num_nodes == 1:
        save_for_nvshmem()
    unique = b""
    with attempt(group, "NVSHMEM's id"):
        from nvshmem import core

        if group.rank() == 0:
            unique = core.get_unique_id()._data.tobytes()
    unique = everyone(group, unique)[0]
    with attempt(group, "NVSHMEM's start"):
        import numpy as np
        from cuda.core import Device
        from nvshmem import core

        uid = core.get_unique_id(empty=True)
        bits = uid._data.view(np.uint8)
        bits[...] = np.frombuffer(unique, np.uint8).reshape(bits.shape)
        device = Device(torch.cuda.current_device())
        device.set_current()
        num_pes, pe = world or (group.size(), group.rank())
        core.init(device=device, uid=uid, rank=pe, nranks=num_pes, initializer_method="uid")
        if world is None:
            _started.append(True)
