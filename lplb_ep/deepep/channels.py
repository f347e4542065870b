"""The drop-in's state of a buffer, and the channels by which its calls plan.

A channel is the planner of a layer and micro-batch slot in a group, with the buffer's settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..comm.collectives import everyone, together
from ..comm.exchange import Limit
from ..cost import CostModel, choose_cost
from ..errors import ContractError
from ..layer import Layer, channels, check_slot, layer_of
from ..metrics.reporter import is_logged, report
from ..placement.table import Placement
from ..planning.host import refuse_first
from ..planning.planner import Planner
from ..planning.reuse import check_every
from ..problem import Problem
from ..settings import Settings
from .contract import Contract

_MAX_FORMS = 4096


class LayerUse(NamedTuple):
    """A layer, and which of the micro-batches in flight."""

    layer: Layer
    slot: int


def layer_use(target: Layer | Placement, slot: int) -> LayerUse:
    """A checked `LayerUse`.

    Raises:
        TypeError: `target` is neither a layer nor a placement.
        ValueError: `slot` is not a whole number in [0, 2**31).
    """
    check_slot(slot)
    return LayerUse(layer_of(target), slot)


class PlannerSettings(NamedTuple):
    """The settings of a planner. Buffers with other settings have other planners."""

    counts: str
    solver: str
    check: bool
    timeout_s: int
    abort_on_timeout: bool
    guest_tolerance: float
    guest_min_tokens: int
    objective: str
    cost: CostModel | None
    min_gain: int
    one_launch: int
    every: int
    sample_every: int
    mark_every: int

    @classmethod
    def of(cls, settings: Settings) -> PlannerSettings:
        """Those that a buffer's settings ask for.

        Raises:
            ValueError: LPLB_EP_COST names no cost model.
        """
        balances = settings.mode == "1"
        try:
            cost = choose_cost(settings.cost)[0] if balances else None
        except (OSError, ValueError) as error:
            raise ValueError(f"LPLB_EP_COST: {error}") from error
        return cls(
            # At home nothing is exchanged or solved, and no kernel need be compiled.
            counts=settings.counts if balances else "given",
            solver=settings.solver if balances else "cpu",
            check=settings.check,
            timeout_s=settings.timeout_s,
            abort_on_timeout=settings.on_timeout == "abort",
            guest_tolerance=settings.guest_tolerance,
            guest_min_tokens=settings.guest_min_tokens,
            # At home no objective decides, and a layer's placement may not go with it.
            objective=settings.objective if balances else "tokens",
            cost=cost,
            min_gain=settings.min_gain if balances else 0,
            one_launch=settings.one_launch,
            every=settings.every if balances else 1,
            # At home nothing is planned, and so nothing is recorded or written.
            sample_every=settings.record_every if settings.record and balances else 0,
            mark_every=settings.log_every if balances else 0,
        )

    def check_placement(self, placement: Placement) -> None:
        """Holds a placement against the settings, as a planner of it will.

        Raises:
            ValueError: they do not go together; names the setting.
        """
        problem = Problem().with_defaults(
            guest_tolerance=self.guest_tolerance,
            guest_min_tokens=self.guest_min_tokens,
            objective=self.objective,
            cost=self.cost,
            min_gain=self.min_gain,
        )
        given = placement, problem.checked(placement), self.counts, self.one_launch
        check_every(self.every, *given)


@dataclass(eq=False)
class BufferState:
    """The drop-in's state of a buffer and its views."""

    settings: Settings
    planner_settings: PlannerSettings
    group: Any
    contract: Contract
    low_latency_mode: bool
    has_nvlink_memory: bool
    num_qps: int | None
    """Queue pairs of a rank, where the buffer was made with a number of them."""
    num_ranks_per_node: int | None
    """Where there are several nodes."""
    size_hint: Callable[..., int] | None = None
    """DeepEP's own `get_low_latency_rdma_size_hint`, which counts the slots it is given."""
    default: LayerUse | None = None
    """The layer that the buffer was made with, while no other has been in force on it.

    A call that strayed out of its layer (a recompute) must not plan with another layer's copies.
    """
    find_modules: Callable[[], LayerUse | None] | None = None
    """Finds the layer by the module that runs, where placements are by modules' names."""
    is_shared: bool = False
    """Whether models that are not balanced call it, too. A client says in each of its own calls
    which layer is in force; calls without one pass."""
    warned: bool = False
    destroyed: bool = False
    low_latency_slots: int | None = None
    """P of the low-latency calls, which lay the buffer out by it."""
    checked: set[tuple[LayerUse, tuple[Any, ...]]] = field(default_factory=set)
    """Layers with forms of calls, as `checks` has them, in which nothing is wrong."""
    planners: dict[LayerUse, Planner] = field(default_factory=dict)
    """Those that its calls have used. Their placements fit into DeepEP's limits."""

    def __post_init__(self) -> None:
        self.is_off = self.settings.mode == "0"
        self._keys: dict[str, Callable[[Any], Any]] = {}

    @property
    def is_registered(self) -> bool:
        """Whether the ranks have planned, so that a model with replica slots calls."""
        return isinstance(self.group, dist.ProcessGroup) and self.group in channels

    @property
    def must_plan(self) -> bool:
        """Whether a call with no placement is an error, on a buffer that replaces another too.

        The slots that an engine has picked are right as they are, if less balanced.
        """
        has_placements = self.is_registered or self.find_modules is not None
        return has_placements and self.settings.indices == "logical" and not self.is_shared

    def key_of(self, method: str, result: Any) -> Any:
        """As `Contract.key_of`, for a method whose results are alike: the first one is checked."""
        get = self._keys.get(method)
        if get is None:
            self.contract.key_of(method, result)
            get = self._keys[method] = self.contract.methods[method].get_key
        return get(result)

    def know(self, use: LayerUse, form: tuple[Any, ...] | None) -> None:
        """Remembers the form of a call that was checked."""
        if form is not None:
            if len(self.checked) >= _MAX_FORMS:  # numbers of tokens may differ without end
                self.checked.clear()
            self.checked.add((use, form))

    def check_limits(self, placement: Placement) -> None:
        """Compares a placement with the limits of the kernels that this buffer was made for.

        Raises:
            ContractError: names the limit and what to do.
        """
        if self.low_latency_mode:
            self.contract.limits.check_low_latency(placement, self.num_qps)
        elif self.has_nvlink_memory:
            self.check_slots(placement)

    def check_slots(self, placement: Placement) -> None:
        """Compares a placement with the limits of `dispatch`.

        Raises:
            ContractError: names the limit and what to do.
        """
        self.contract.limits.check_slots(placement, self.num_ranks_per_node)


def state_of(buffer: Any) -> BufferState:
    """The drop-in's state of a buffer.

    Raises:
        ContractError: the buffer was made before `patch`, and has none.
    """
    state: BufferState | None = getattr(buffer, "_lplb_state", None)
    if state is None:
        raise ContractError(
            "this buffer was made before lplb_ep was patched in, and plans nothing: make it after"
        )
    return state


def register(
    state: BufferState,
    target: Layer | Placement,
    slot: int,
    check: Callable[[Layer], None] = lambda layer: None,
) -> LayerUse:
    """Makes the channel of a layer and slot.

    Collective, also where it exists already: ranks that bring different placements must meet here,
    not in their exchanges.

    Args:
        state: of the buffer.
        target: the layer, or the placement object that stands for one.
        slot: which of the micro-batches in flight.
        check: raises where this rank cannot use the layer; the other ranks then raise, too.

    Raises:
        RankError: names the ranks that bring another placement or slot, or failed.
        Exception: this rank failed.
    """
    group = state.group if isinstance(state.group, dist.ProcessGroup) else None
    with together(group, "placement") as facts:
        use = layer_use(target, slot)
        check(use.layer)
        state.check_limits(use.layer.placement)
        facts.update(placement=use.layer.placement.fingerprint(), slot=slot)
    if group is not None and not all(everyone(group, _existing(state, use) is not None)):
        _make(state, use, compare=True)
    channel(state, use)
    return use


def channel(state: BufferState, use: LayerUse) -> Planner:
    """The planner of a layer and slot.

    Local where it exists, or where counts travel by torch's collectives: every batch compares its
    placement anyway. Else the ranks share memory for it.

    Raises:
        ContractError: the buffer has no group of torch, or DeepEP's limits are too small.
    """
    planner = state.planners.get(use)
    if planner is None or planner.is_outdated:
        if not isinstance(state.group, dist.ProcessGroup):
            raise ContractError(
                "balancing needs a buffer on a torch.distributed group; "
                f"this one is on {type(state.group).__name__}"
            )
        try:
            state.check_limits(use.layer.placement)
            planner = _existing(state, use) or _make(state, use, compare=False)
        except Exception:  # whatever it is, the others must not wait for this rank's counts
            _refuse_first(state, use)
            raise
        state.planners[use] = planner
    if state.default is not None and use.layer is not state.default.layer:
        state.default = None
    return planner


def _refuse_first(state: BufferState, use: LayerUse) -> None:
    """Refuses a first batch, where plans are surely made on the CPU.

    On a GPU the ranks first agree on the memory that they reach.
    """
    settings = state.planner_settings
    if settings.solver != "cpu" and torch.cuda.is_available():
        return
    if settings.counts in ("auto", "torch") and state.group.size() > 1:
        limit = Limit("a first batch", settings.timeout_s, settings.abort_on_timeout)
        refuse_first(use.layer.placement, state.group, limit)


def _existing(state: BufferState, use: LayerUse) -> Planner | None:
    of_group = channels.get(state.group, {})
    planner = of_group.get((use.layer, use.slot, state.planner_settings))
    return None if planner is None or planner.is_outdated else planner


def _make(state: BufferState, use: LayerUse, *, compare: bool) -> Planner:
    settings = state.planner_settings._asdict()
    # All know the loads, and one records and logs them.
    if state.group.rank() != 0:
        settings["sample_every"] = 0
    if state.group.rank() != 0 or not (is_logged() or state.settings.metrics):
        settings["mark_every"] = 0
    planner = Planner(use.layer, state.group, slot=use.slot, compare=compare, **settings)
    of_group = channels.setdefault(state.group, {})
    of_group[use.layer, use.slot, state.planner_settings] = planner
    if state.settings.mode == "1":
        report(state.settings, planner)
    return planner
