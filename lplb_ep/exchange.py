"""Local counts → everybody's counts: what crosses between ranks, and nothing else does.

An exchange gathers one row of integers from every rank. It knows neither experts nor DeepEP.
"""

from __future__ import annotations

import weakref
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from .settings import ContractError, RankError

COUNTS = ("auto", "torch", "given")
T = TypeVar("T")


class Exchange(Protocol):
    """Collective: each rank brings a row, and each gets all of them."""

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """[W] int32 from each rank → [R, W] int32, the same on every rank, in rank order."""


class LocalExchange:
    """The exchange of a single rank."""

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        return row[None]


class TorchExchange:
    """A gather on a `torch.distributed` group; NCCL's moves device memory only.

    The group is held weakly: one that is still held when the interpreter ends can abort it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        group = self._group()
        if group is None:
            raise ContractError("the group that this exchange was made for is destroyed")
        return gather_rows(row.to(self.device), group).to(row.device)


def gather_rows(row: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A tensor from each rank → [R, ...], the same on every rank. Collective.

    By an all-to-all, whose messages are all under way at once: gloo's all-gather passes them round
    a ring, R - 1 steps that wait for one another (three times slower with 8 ranks on 2 cores).
    """
    copies = row.expand(group.size(), *row.shape).contiguous()
    rows = torch.empty_like(copies)
    dist.all_to_all_single(rows, copies, group=group)
    return rows


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Plain values of all ranks, in rank order. Collective; None stands for a single rank."""
    everyone = [value] * (1 if group is None else group.size())
    if len(everyone) > 1:
        dist.all_gather_object(everyone, value, group=group)
    return everyone


def choose_counts(counts: str, has_group: bool, num_ranks: int) -> tuple[str, str]:
    """The exchange for a request, and why.

    Args:
        counts: one of `COUNTS`.
        has_group: whether there is a group to exchange them on.
        num_ranks: R.

    Returns:
        ("local" | "torch" | "given", the reason in words).

    Raises:
        ValueError: an unknown name, or one that needs a group where there is none.
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
    return "torch", "asked for" if counts == "torch" else "the only exchange of this version"


def agree(
    group: dist.ProcessGroup | None,
    what: str,
    facts: dict[str, object],
    refusal: Exception | None = None,
) -> None:
    """Collective: checks that every rank brings the same facts.

    Args:
        group: the ranks; None for a single one.
        what: whose facts, for the message.
        facts: name → plain value.
        refusal: why this rank has no facts to bring. The others are told before it is raised
            here: they would wait for this rank for ever.

    Raises:
        Exception: `refusal`, on its own rank.
        RankError: another rank refused, or ranks differ; names who, and in what.
    """
    everyone = gather_objects((facts, str(refusal or "")), group)
    if refusal is None:
        _compare(what, everyone)
    if refusal is not None:
        raise refusal


def _compare(what: str, everyone: list[tuple[dict[str, object], str]]) -> None:
    refused = [rank for rank, (_, refusal) in enumerate(everyone) if refusal]
    if refused:
        raise RankError(
            f"{what}: ranks {refused} refused; rank {refused[0]}: {everyone[refused[0]][1]}"
        )
    for name in sorted(set().union(*(facts for facts, _ in everyone))):
        holders: dict[object, list[int]] = {}
        for rank, (facts, _) in enumerate(everyone):
            holders.setdefault(facts.get(name, "absent"), []).append(rank)
        if len(holders) > 1:
            shown = "; ".join(f"{value} on ranks {ranks}" for value, ranks in holders.items())
            raise RankError(f"{what}: ranks differ in {name}: {shown}")
