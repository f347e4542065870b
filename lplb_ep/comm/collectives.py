"""Collective calls of a group: plain values, rows of tensors, and errors that all ranks raise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import ContractError, RankError

_T = TypeVar("_T")


def everyone(group: dist.ProcessGroup, value: _T) -> list[_T]:
    """Gathers plain values. Collective.

    Args:
        group: the ranks.
        value: of this rank; anything that pickles.

    Returns:
        [R] values in rank order, the same on every rank.
    """
    values = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_rows(
    row: torch.Tensor, group: dist.ProcessGroup, wait: Callable[[dist.Work], None] | None = None
) -> torch.Tensor:
    """Gathers a tensor from each rank. Collective.

    One all-to-all has all messages under way at once. All-gather of gloo passes them round a ring.
    Its R - 1 steps wait for one another: three times slower with 8 ranks on 2 cores.

    Args:
        row: of this rank, where the group can send from (`memory_of`). All ranks bring the same
            shape and dtype.
        group: the ranks.
        wait: waits for the collective, in another way than `torch.distributed` does.

    Returns:
        [R, ...] on the device of `row`, in rank order, the same on every rank.
    """
    copies = row.expand(group.size(), *row.shape).contiguous()
    rows = torch.empty_like(copies)
    work = dist.all_to_all_single(rows, copies, group=group, async_op=wait is not None)
    if wait is not None:
        wait(work)
    return rows


def memory_of(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must lie for a group: NCCL moves device memory only, gloo the host's."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


@contextlib.contextmanager
def together(group: dist.ProcessGroup | None, what: str) -> Iterator[dict[str, object]]:
    """Runs a block on every rank, which then ends on all ranks or raises on all. Collective.

    The block itself must not be collective on the group. A rank that fails in it would leave the
    others in that inner call.

    Args:
        group: the ranks; None for a single one.
        what: names the block in messages.

    Yields:
        A record for the block to fill, name → plain value. Ranks compare it at the end.

    Raises:
        Exception: what the block raised, on its own rank.
        RankError: the block raised on another rank, or records differ; names the ranks and why.
        TypeError: `group` is no process group, or one that this rank does not belong to.
    """
    if not isinstance(group, (dist.ProcessGroup, type(None))):
        raise TypeError(
            f"{what}: group must be a torch.distributed process group that this rank belongs to, "
            f"or None for a single rank; got a {type(group).__name__}"
        )
    facts: dict[str, object] = {}
    error: Exception | None = None
    try:
        yield facts
    except Exception as raised:  # noqa: BLE001  (raised below, when the other ranks know)
        error = raised
    if group is not None and group.size() > 1:
        failure = "" if error is None else str(error) or type(error).__name__
        brought = everyone(group, (facts, failure))
        if error is None:
            _compare(what, brought)
    if error is not None:
        raise error


@contextlib.contextmanager
def attempt(group: dist.ProcessGroup, what: str) -> Iterator[dict[str, object]]:
    """As `together`, for a block that may fail because another way can be taken. Collective.

    Args:
        group: the ranks.
        what: names the block in messages.

    Yields:
        A record, as `together`.

    Raises:
        ContractError: whatever the block raised on this rank; the cause is chained.
        RankError: as `together`.
    """
    with together(group, what) as facts:
        try:
            yield facts
        except Exception as error:
            raise ContractError(f"{what}: {type(error).__name__}: {error}") from error


def _compare(what: str, brought: list[tuple[dict[str, object], str]]) -> None:
    refused = {rank: failure for rank, (_, failure) in enumerate(brought) if failure}
    if refused:
        first, failure = next(iter(refused.items()))
        raise RankError(f"{what}: ranks {[*refused]} refused; rank {first}: {failure}")
    for name in sorted(set().union(*(facts for facts, _ in brought))):
        holders: dict[object, list[int]] = {}
        for rank, (facts, _) in enumerate(brought):
            holders.setdefault(facts.get(name, "absent"), []).append(rank)
        if len(holders) > 1:
            shown = "; ".join(f"{value} on ranks {ranks}" for value, ranks in holders.items())
            raise RankError(f"{what}: ranks differ in {name}: {shown}")
