"""Chooses how rows of counts travel between ranks, and makes that exchange."""

from __future__ import annotations

import torch.distributed as dist

from .. import settings
from ..errors import ContractError, MissingPackageError, RankError
from ..logs import is_first, logger
from .exchange import Exchange, Limit, LocalExchange, WindowExchange
from .peers import peer_memory
from .reachability import Reachability, reachability, rule_out
from .torch_exchange import TorchExchange

log = logger(__name__)

COUNTS = (*settings.COUNTS, "given")


def connect(
    counts: str,
    group: dist.ProcessGroup | None,
    num_ranks: int,
    row_size: int,
    limit: Limit,
    *,
    on_gpu: bool,
) -> Exchange | None:
    """Makes an exchange; with "auto", the first that works on all ranks. Collective.

    Args:
        counts: one of `COUNTS`, the same on every rank.
        group: the ranks; None for a single one, or where counts are given.
        num_ranks: R.
        row_size: integers of a row that kernels exchange.
        limit: how long a collective of `torch.distributed` may take. Kernels that exchange rows
            themselves have a limit of their own.
        on_gpu: whether plans are made there, on the current device.

    Returns:
        The exchange; None where the caller brings the counts of all ranks.

    Raises:
        ValueError: `counts` is unknown, or not possible here; says why.
        ContractError: the exchange that is asked for does not work on this rank.
        MissingPackageError: a rank lacks a package that it needs.
        RankError: it does not work on another rank; names it and why.
    """
    asks = on_gpu and group is not None and counts != "given"
    while True:
        found = reachability(group) if asks else Reachability()
        kind, reason = choose_counts(counts, num_ranks, group is not None, on_gpu, found)
        try:
            exchange = _make(kind, group, row_size, limit)
        except (ContractError, MissingPackageError, RankError) as error:  # on every rank
            if counts != "auto" or group is None:
                raise
            rule_out(group, kind, str(error))
            continue
        if is_first(group):
            log.info("counts: %s (%s)", kind, reason)
        return exchange


def _make(
    kind: str, group: dist.ProcessGroup | None, row_size: int, limit: Limit
) -> Exchange | None:
    if kind == "given":
        return None
    if kind == "local":
        return LocalExchange()
    assert group is not None, "choose_counts takes the others only with a group"
    if kind == "torch":
        return TorchExchange(group, limit)
    return WindowExchange(kind, peer_memory(group, kind).windows(row_size))


def choose_counts(
    counts: str, num_ranks: int, has_group: bool, on_gpu: bool, found: Reachability
) -> tuple[str, str]:
    """Chooses the exchange for a request, and says why.

    Args:
        counts: one of `COUNTS`.
        num_ranks: R.
        has_group: whether there is a group to exchange them on.
        on_gpu: whether plans are made there.
        found: which memory the ranks can write.

    Returns:
        ("local" | "given" | one of `COUNTS` but "auto", the reason in words).

    Raises:
        ValueError: `counts` is unknown, or not possible here; says why.
    """
    if counts not in COUNTS:
        raise ValueError(f"counts must be one of {', '.join(COUNTS)}; got {counts!r}")
    if counts == "given":
        return "given", "asked for: the caller brings the counts of all ranks"
    if num_ranks == 1:
        return "local", "a single rank has nothing to exchange"
    if not has_group:
        raise ValueError(
            f"counts={counts!r} needs a group to exchange the counts of {num_ranks} ranks; "
            'pass group=, or counts="given" and the counts with each batch'
        )
    obstacles = {"nvshmem": found.nvshmem, "ipc": found.ipc}
    if not on_gpu:
        obstacles = dict.fromkeys(obstacles, "plans are made on the CPU")
    if obstacles.get(counts):
        raise ValueError(f"counts={counts!r} is not possible: {obstacles[counts]}")
    if counts != "auto":
        return counts, "asked for"
    if 0 < found.num_ranks_per_node < num_ranks and not obstacles["nvshmem"]:
        obstacles["nvshmem"] = "between nodes only where asked for: no network has tried it"
    able = [kind for kind, obstacle in obstacles.items() if not obstacle]
    because = "; ".join(f"not {kind}: {why}" for kind, why in obstacles.items() if why)
    return (able or ["torch"])[0], because or "the kernels reach every rank's memory"
