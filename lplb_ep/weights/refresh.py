"""Placements kept up to date: all ranks move replicas at once when loads have changed.

The first rank of a group watches the loads, and a separate process chooses replicas. At a boundary
between steps the first rank offers them, and every rank prepares. Ranks switch only when all are
ready. A failure before that leaves the old placement in force everywhere.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..comm.collectives import everyone, together
from ..errors import RankError
from ..logs import is_first, logger
from ..placement.table import Placement
from ..settings import Settings
from .background import Background
from .proposals import Choose, Job, Proposal, num_moved, widened
from .replicas import Replicas

log = logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Refreshed:
    """A layer whose replicas were moved."""

    layer: int
    """Its number in the `Refresher`'s list."""
    step: int
    """How many steps had ended."""
    placement: Placement
    """The placement that is now in force."""
    num_copies: int
    """Replicas that were moved."""
    imbalance_before: float
    """Mean T* / mean rank load, in steps by which the replicas were not chosen."""
    imbalance_after: float
    """The same with the new replicas, in the same steps."""


class Refresher:
    """Moves replicas of layers whose loads have changed.

    It is off unless `LPLB_EP_REFRESH` (or `settings`) gives the number of steps between looks.
    While it is off, `step` does nothing. Homes, and with them the optimizer's state, stay where
    they are. The number of slots stays, and tables on the GPU are rewritten in place: captured CUDA
    graphs stay valid.

    Make it after the layers' `Replicas`, and before their planners, views and attachments, so that
    these reserve capacity for other replicas. A channel that was made before is made anew.

    Args:
        layers: the replicas of each layer, all on one group, each with a placement object of its
            own. Placements are chosen and judged by counts of tokens alone, without the base loads
            and speeds of a layer's problem.
        settings: of which those named `refresh…` apply; by default the environment's.
        choose: chooses replicas, see `Choose`; by default `Placement.for_lp`. Another process calls
            it, so it must be a function that can be imported there.

    Raises:
        ValueError: no layers, a layer twice or in another `Refresher` too, or layers on several
            groups. Or a placement object that serves several layers, or a problem with `max_quota`.
            Or more slots on a rank than experts, or a `choose` that another process cannot import.
        RankError: ranks differ in settings or placements.
    """

    def __init__(
        self,
        layers: Sequence[Replicas],
        *,
        settings: Settings | None = None,
        choose: Choose | None = None,
    ) -> None:
        group = layers[0].group if layers else None
        with together(group, "Refresher") as facts:
            self._settings = Settings.from_env() if settings is None else settings
            _check(layers, choose)
            for f in ("refresh", "refresh_threshold", "refresh_changes", "refresh_seconds"):
                facts[f] = str(getattr(self._settings, f))
            facts["placements"] = str([r.placement.fingerprint() for r in layers])
        self._layers, self._group, self._num_steps = list(layers), group, 0
        self._interval = self._settings.refresh
        if not self._interval:
            return
        self._choose: Choose = choose or Placement.for_lp
        self._chooses = group is None or group.rank() == 0
        self._background = Background()
        self._device = next(layers[0].experts.parameters()).device
        shape = (len(layers), layers[0].placement.num_experts)
        zeros = functools.partial(torch.zeros, dtype=torch.int64, device=self._device)
        self._now = zeros(*shape) if self._chooses else None
        """[L, E] load of the current step."""
        self._window = zeros(self._interval, *shape) if self._chooses else None
        """[interval, L, E] loads of the last steps."""
        for number, replicas in enumerate(layers):
            replicas.layer.replace(widened(replicas.placement))
            replicas.layer.is_refreshable = True
            if self._now is not None:
                replicas.layer.observers.append(functools.partial(_add, self._now[number]))

    def step(self) -> list[Refreshed]:
        """Ends a step, and moves replicas on every rank where a better choice is ready. Collective.

        Every rank must call it after the same batches, where nothing is in flight. In training that
        is between optimizer steps, after `reduce_gradients` and with no micro-batch or recompute
        pending. In serving it is between the engine's steps.

        Before `copy_weights` it moves no weights, since that call moves all of them. Otherwise it
        moves those of the new replicas only. Only every `LPLB_EP_REFRESH`-th call exchanges or
        waits.

        Returns:
            The layers whose replicas were moved, the same on every rank; most often none.
        """
        if not self._interval:
            return []
        if self._now is not None and self._window is not None:
            self._window[self._num_steps % self._interval] = self._now
            self._now.zero_()
        self._num_steps += 1
        if self._num_steps % self._interval:
            return []
        busy = self._background.is_busy  # asked first: what it ends meanwhile is offered next time
        offered = self._broadcast(self._background.take() if self._chooses else [])
        moved = [done for proposal in offered if (done := self._switch(proposal)) is not None]
        if self._window is not None and not busy:
            self._look(self._window)
        return moved

    def _look(self, window: torch.Tensor) -> None:
        """Has other replicas chosen, by loads [interval, L, E], on the first rank.

        It raises nothing, since the other ranks would not notice.
        """
        try:
            loads = window.to("cpu", copy=True).numpy()
            self._background.start(
                [
                    Job(number, loads[:, number], r.placement, self._choose, self._settings)
                    for number, r in enumerate(self._layers)
                ]
            )
        except Exception:
            log.exception("no replicas are looked for; placements stay as they are")

    def _broadcast(self, proposals: list[Proposal]) -> list[Proposal]:
        """The first rank's proposals, on every rank."""
        offer = [proposals]
        if self._group is not None and self._group.size() > 1:
            first = dist.get_global_rank(self._group, 0)
            dist.broadcast_object_list(offer, src=first, group=self._group)
        return offer[0]

    def _switch(self, proposal: Proposal) -> Refreshed | None:
        """Puts other replicas of a layer in force on every rank, or on none."""
        replicas = self._layers[proposal.layer]
        old, what = replicas.placement, f"the refresh of layer {proposal.layer}"
        try:
            with together(self._group, what) as facts:
                placement = old.with_copies(proposal.physical_to_logical)
                facts["placement"] = placement.fingerprint()
                planners = replicas.layer.current_planners()
                commits = [planner.prepare(placement) for planner in planners]
                change = replicas.prepare(placement)
            # Where some are stale, the next `copy_weights` brings all of them.
            if all(self._gather(change.is_valid)):
                with together(self._group, what):
                    change.fetch()  # its collectives come before all that may fail on a rank
        except RankError as error:
            if is_first(self._group):
                log.warning("layer %d keeps its placement: %s", proposal.layer, error)
            return None
        except Exception as error:
            rank = 0 if self._group is None else self._group.rank()
            log.exception("layer %d keeps its placement: rank %d: %s", proposal.layer, rank, error)
            return None
        self._wait_for_gpu()
        for commit in commits:
            commit()
        change.commit()
        self._wait_for_gpu()
        return self._report(proposal, old, placement)

    def _gather(self, value: T) -> list[T]:
        return [value] if self._group is None else everyone(self._group, value)

    def _wait_for_gpu(self) -> None:
        """Tables and weights are written on this stream, and read on any."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _report(self, proposal: Proposal, old: Placement, new: Placement) -> Refreshed:
        moved = num_moved(old, new)
        before, after = proposal.imbalance_before, proposal.imbalance_after
        if is_first(self._group):
            log.info(
                "layer %d refreshed after step %d: %d replicas moved, imbalance %.3f -> %.3f",
                *(proposal.layer, self._num_steps, moved, before, after),
            )
        return Refreshed(proposal.layer, self._num_steps, new, moved, before, after)


def _add(load: torch.Tensor, counts: torch.Tensor) -> None:
    """Adds the counts [R, E] of a batch to a load [E], in place as captured graphs need it.

    It is no method: caches keep placements, which must not keep a model. Micro-batches on streams
    of their own may overwrite one another's sum, and losing a batch does not matter.
    """
    load += counts.sum(0).to(load.device)


def _check(layers: Sequence[Replicas], choose: Any) -> None:
    if not layers:
        raise ValueError("layers must have the replicas of at least one layer")
    for number, replicas in enumerate(layers):
        if any(replicas is other for other in layers[:number]):
            raise ValueError(f"layer {number} is in layers twice")
        if replicas.layer.is_refreshable:
            raise ValueError(f"layer {number} has a Refresher already")
        if replicas.group is not layers[0].group:
            raise ValueError(f"layer {number} is on another group than layer 0")
        if replicas.placement.num_experts != layers[0].placement.num_experts:
            raise ValueError(f"layer {number} has another number of experts than layer 0")
        if len(replicas.layer.replicas) > 1:
            raise ValueError(
                f"the placement object of layer {number} serves several layers: give each its own"
            )
        if replicas.layer.problem.max_quota is not None:
            raise ValueError(
                f"the problem of layer {number} has max_quota, which limits copies where they are: "
                "a Refresher would move them"
            )
        slots, ranks = replicas.placement.num_resident_slots, replicas.placement.num_ranks
        if choose is None and slots > replicas.placement.num_experts and ranks > 1:
            raise ValueError(
                f"layer {number} has {slots} slots on a rank, more than there are experts: "
                f"{replicas.placement.num_experts}, and for_lp cannot fill them"
            )
    function = choose
    while isinstance(function, functools.partial):
        function = function.func
    # The second is what spawned processes call the program's own file.
    if getattr(function, "__module__", None) in ("__main__", "__mp_main__"):
        raise ValueError(
            "choose must be a function that can be imported elsewhere, "
            "which those of the program's own file cannot"
        )
    try:
        pickle.dumps(choose)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise ValueError(f"choose must be a function that can be imported: {error}") from error
