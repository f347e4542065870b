"""Functions that engines' clients share: layers whose slots the engine fills by a table."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..deepep.context import use
from ..deepep.drop_in import choose_backend
from ..deepep.patch import patch
from ..errors import ContractError, PlacementError
from ..layer import Layer
from ..logs import logger
from ..placement.table import Placement
from ..planning.structs import Status
from ..settings import Settings, put_in_environment

log = logger(__name__)
"""For SGLang's processes, too; vLLM shows the lines of its own loggers only."""

MAX_RANKS = 64
"""Ranks of an engine. It may join them all by copies. Tables for any components that copies make
grow with the square of the ranks: of 128 a layer's would be 33 MB."""


class EngineLayers:
    """The MoE layers of an engine that owns its weights, picks copies itself and moves experts.

    The layers are trusted: each slot has the weights of the expert that the table names. After the
    engine has moved experts the table is read again. Tables on the GPU are rewritten in place, and
    captured CUDA graphs plan with the new ones.

    Args:
        read: returns the engine's table, [layers, P] integers, on any device. It must be one tensor
            that the engine writes to, or another one each time.
        numbers: the rows of the layers.
        num_ranks: R.
        num_experts: E.
        num_ranks_per_node: as for `Placement`.

    Raises:
        PlacementError: as for `Placement`; the row is named. Or there are more than 64 ranks.
    """

    layers: dict[int, Layer]
    """By row of the table."""

    def __init__(
        self,
        read: Callable[[], torch.Tensor],
        numbers: Iterable[int],
        num_ranks: int,
        num_experts: int,
        num_ranks_per_node: int | None = None,
    ) -> None:
        if num_ranks > MAX_RANKS:
            raise PlacementError(
                f"an engine's layers are balanced on at most {MAX_RANKS} ranks; got {num_ranks}"
            )
        self._read = read
        self._shape = {
            "num_ranks": num_ranks,
            "num_experts": num_experts,
            "num_ranks_per_node": num_ranks_per_node,
        }
        self._seen, self._rows = self._look()
        self.layers = {}
        for number in numbers:
            self.layers[number] = layer = Layer(self._placement(number), name=f"layer {number}")
            layer.is_refreshable = layer.moves_homes = True
            layer.mark_valid()

    @property
    def num_batches(self) -> collections.Counter[Status]:
        """Batches of this rank that were planned so far, by status; waits for the GPU."""
        planners = [p for layer in self.layers.values() for p in layer.current_planners()]
        return sum((p.num_batches for p in planners), collections.Counter())

    @property
    def is_current(self) -> bool:
        """Whether the engine has not written to its table since it was read. Local, waits not."""
        table = self._read()
        return table is self._seen[0] and table._version == self._seen[1]

    def refresh(self) -> list[int]:
        """Plans by the engine's table as it is now. Local; waits for the GPU if it has changed.

        Every rank calls it between the same batches, with none in flight. Ranks whose tables
        differ are found by their next batch.

        Returns:
            The rows that have changed.

        Raises:
            PlacementError: as for `Placement`; the row is named.
            ValueError: the table has another number of slots; or its tables do not fit on the GPU.
        """
        if self.is_current:
            return []
        self._seen, rows = self._look()
        old, self._rows = self._rows, rows
        moved = [n for n in self.layers if not np.array_equal(old[n], rows[n])]
        commits: list[Callable[[], None]] = []
        for number in moved:
            placement, layer = self._placement(number), self.layers[number]
            commits += [planner.prepare(placement) for planner in layer.current_planners()]
            commits.append(functools.partial(layer.replace, placement))
        if moved:
            _wait_for_gpu()  # plans that are being made read the old tables
            for commit in commits:
                commit()
            _wait_for_gpu()  # tables are written on this stream, and read on any
        return moved

    def put_in_force(
        self, number: int, target: Any, method: str, slot: Callable[[], int] = lambda: 0
    ) -> None:
        """Has a layer be in force while a method of one object runs. Its class stays as it is.

        Args:
            number: the layer's row.
            target: the object that dispatches for this layer and no other.
            method: its method.
            slot: which of the micro-batches in flight a call is of.
        """
        call, layer = getattr(target, method), self.layers[number]

        @functools.wraps(call)
        def planned(*args: Any, **kwargs: Any) -> Any:
            if not self.is_current:
                self._catch_up()
            with use(layer, slot()):
                return call(*args, **kwargs)

        setattr(target, method, planned)

    def _catch_up(self) -> None:
        """Reads a table that was written to where no one said so: its slots hold other experts."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ContractError(
                "the engine has written to its table of experts while a CUDA graph is captured"
            )
        self.refresh()

    def _look(self) -> tuple[tuple[torch.Tensor, int], npt.NDArray[np.int64]]:
        table = self._read()
        return (table, table._version), table.cpu().numpy().astype(np.int64)

    def _placement(self, number: int) -> Placement:
        row, experts = self._rows[number], self._shape["num_experts"]
        try:
            # Columns for the copies that an expert has where all replicas are of it.
            most = max(1, row.size - int(experts or 0) + 1)
            return Placement(row, max_replicas=most, **self._shape)  # type: ignore[arg-type]
        except PlacementError as error:
            raise PlacementError(f"row {number} of the engine's table: {error}") from error


def describe(numbers: collections.Counter[Status]) -> str:
    """Batches by status, for a log."""
    return ", ".join(f"{number} {status.name}" for status, number in sorted(numbers.items()))


def switch_on(engine: str) -> bool:
    """Makes a process of an engine ready, where `LPLB_EP` asks for balance. Idempotent.

    DeepEP's classes get patched, and indices are the engine's slots.

    Args:
        engine: its name, for messages.

    Returns:
        Whether there is something to do.
    """
    settings = Settings.from_env()
    if settings.mode == "0":
        return False
    module, why = choose_backend(settings.backend)
    if module.startswith("lplb_ep.") and settings.backend == "auto":
        log.warning("%s is not balanced: DeepEP is not used, %s", engine, why)
        return False
    put_in_environment("indices", "physical")
    patch()
    return True


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
