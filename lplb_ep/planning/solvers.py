"""The solvers: a record of each, and the choice of one for a request."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..cost import MAX_STEPS
from ..errors import MissingPackageError
from ..gpu.abi import Signature
from ..gpu.device import check_device
from ..gpu.jit import Program
from ..gpu.launch import max_shared_bytes
from ..gpu.toolchain import CuSolverDx
from ..logs import logger
from ..placement.table import Placement
from ..settings import MAX_ONE_LAUNCH, SOLVERS
from . import structs
from .fill_rules import NUM_CHOICES, RULES
from .layout import (
    SIZES,
    WORD_RANKS,
    Capacity,
    capacity_for,
    check_word,
    component_sizes,
)
from .stay import num_words
from .structs import ARC, COPY, EDGE, ENDING, REPLICA, RESIDENT

log = logger(__name__)

NUM_THREADS = 256
"""Threads of a block that solves; fewer would take long to add up the counts."""
NUM_PLAN_THREADS = 512
"""Threads of a block that makes a whole plan; more than push."""
MAX_PLAN_RANKS = 128
"""Ranks of such a plan: a block does not hold the rows of more."""
MAX_PUSHING_THREADS = 256
"""Threads that move tokens. Twice as many are slower: each warp finds the layers for itself."""
STATIC_SHARED_BYTES = 3584
"""The most shared memory that a kernel has beside its dynamic one, some of it CUDA's, where
components have at most `WORD_RANKS` ranks."""


class Variant(NamedTuple):
    """What a solver's kernel is compiled for."""

    size: int
    """The most ranks of a component."""
    parts: int
    """Threads that share the edges of a rank."""
    turns: int
    """Edges that each of them keeps in registers."""
    more: bool
    """Whether a rank may have still more."""


@dataclass(frozen=True)
class DeviceSolver:
    """A solver on the GPU."""

    name: str
    source: str
    """Its file in `kernels/`."""
    kernels: tuple[Signature, Signature]
    """The one for loads alone, and the one for speeds and capacities, too."""
    shares: tuple[tuple[int, int, int], ...]
    """`parts`, `turns` and `more` of its variants. The first that take all edges of a rank run. Of
    several with guest slots, the last run where residents have replicas: then edges are many."""
    num_flow_bytes: Callable[[Capacity, int], int]
    """Shared memory of a block, in bytes, for the flow and what it is made of, by how many blocks
    share a component."""
    libraries: tuple[str, ...] = ()
    """NVIDIA libraries that its compilation needs beside NVRTC."""
    functions: Callable[[Variant], tuple[CuSolverDx, ...]] = lambda variant: ()
    """The functions of cuSolverDx that are linked to a variant."""
    num_own_bytes: Callable[[Capacity], int] = lambda capacity: 0
    """Shared memory of a block, in bytes, that the solver needs beside the flow's."""
    num_threads: int = NUM_THREADS
    """Of a block."""
    num_cluster_blocks: int = 1
    """Blocks that share a component, on GPUs that have clusters."""
    num_choices: int = 1
    """Blocks of a component that each plan another choice of guests."""
    by_size: Mapping[int, tuple[tuple[int, int, int], ...]] = field(
        default_factory=dict, hash=False
    )
    """`shares` of sizes that have others. Sizes above `WORD_RANKS` have none but these."""
    plans: str = ""
    """The file in `kernels/` of its whole plans in one launch; none: it has none."""

    def variants(self) -> list[Variant]:
        """All variants: whole warps of threads, and no more than hide each other's latencies."""
        out: list[Variant] = []
        for size in SIZES:
            most = 0
            usual = self.shares if size <= WORD_RANKS else ()
            for parts, turns, more in self.by_size.get(size, usual):
                fits = size * parts % 32 == 0 and size * parts <= MAX_PUSHING_THREADS
                if fits and (more or parts * turns > most):
                    out.append(Variant(size, parts, turns, bool(more)))
                    most = parts * turns
        return out

    def variant(self, capacity: Capacity) -> Variant:
        """The variant for tables of a capacity."""
        of_size = [variant for variant in self.variants() if variant.size == capacity.size]
        able = [v for v in of_size if v.more or v.parts * v.turns >= capacity.max_edges]
        return able[-1 if capacity.max_replicas else 0]

    def program(self, variant: Variant) -> Program:
        """The program of a variant."""
        own = {"THREADS": self.num_threads, "BLOCKS": self.num_cluster_blocks}
        return Program(self.source, {**self._sizes(variant), **own}, self.functions(variant))

    def _sizes(self, variant: Variant) -> dict[str, int]:
        return {name.upper(): value for name, value in variant._asdict().items()}

    def plan_variants(self) -> list[Variant]:
        """Those that make whole plans in one launch, too."""
        return [v for v in self.variants() if self.plans and v.size <= MAX_PLAN_RANKS]

    def plan_program(self, variant: Variant) -> Program:
        """The program of a variant that makes whole plans."""
        return Program(self.plans, {**self._sizes(variant), "THREADS": NUM_PLAN_THREADS})

    def num_blocks(self, capability: tuple[int, int]) -> int:
        """Blocks that share a component on a GPU: clusters come with sm_90."""
        return self.num_cluster_blocks if capability >= (9, 0) else 1

    def num_shared_bytes(self, capacity: Capacity, num_experts: int, num_blocks: int) -> int:
        """Dynamic shared memory of a block, in bytes; `num_blocks` share a component."""
        numbering = 4 * (1 + self.num_threads // 32) * num_experts  # by blocks that do not solve
        flow = self.num_flow_bytes(capacity, num_blocks)
        return max(flow, numbering) + self.num_own_bytes(capacity)


def _flow_bytes(capacity: Capacity, num_blocks: int) -> int:
    return capacity.max_arcs * (4 + ARC.size + 4 + 2)


def _guest_bytes(capacity: Capacity, num_blocks: int) -> int:
    return _domain_bytes(capacity, num_blocks, capacity.size * capacity.max_edges * EDGE.size)


def _guest_objective_bytes(capacity: Capacity, num_blocks: int) -> int:
    """As `kernels/guests_by_cost.cuh` lays out a component, without edges."""
    return _domain_bytes(capacity, num_blocks, _search_bytes(capacity))


def _domain_bytes(capacity: Capacity, num_blocks: int, beside_arcs: int) -> int:
    """As `kernels/guests.cuh` and `kernels/choose.cuh` lay out a component."""
    c, a_set = capacity, 8 if capacity.size > 32 else 4
    of_experts = c.max_experts * (RESIDENT.size + a_set + 8)
    of_ranks = 4 * c.size * (c.num_places + c.num_guests + 1) + 4 + REPLICA.size * c.max_replicas
    of_arcs = c.max_arcs * (ARC.size + 4 + 4)
    start = 8 * c.size * c.num_places
    of_fill = _multiple(8, start + c.max_experts * a_set + 4 * c.size)
    # The first of several blocks solves the residents instead.
    num_filling = num_blocks - (num_blocks > 1 and c.max_replicas > 0)
    choice = max(start + -(-len(RULES) // num_filling) * of_fill, 4 * c.num_components)
    return _multiple(16, of_experts + of_ranks) + max(of_arcs + beside_arcs, choice)


def _objective_bytes(capacity: Capacity, num_blocks: int) -> int:
    """As `kernels/objective.cuh` and `kernels/search.cuh` lay out a component behind the flow."""
    return _flow_bytes(capacity, num_blocks) + _search_bytes(capacity)


def _search_bytes(capacity: Capacity) -> int:
    of_reach = capacity.size * 48 + _multiple(8, 2 * capacity.max_arcs)  # of each warp
    own = capacity.size * 60 + 8 * (MAX_STEPS + 2) + 12 * capacity.max_arcs
    return own + NUM_PLAN_THREADS // 32 * of_reach


def _multiple(unit: int, number: int) -> int:
    return -(-number // unit) * unit


def _factorisation(variant: Variant) -> tuple[CuSolverDx, ...]:
    return (
        CuSolverDx("potrf", variant.size, NUM_THREADS),
        CuSolverDx("potrs", variant.size, NUM_THREADS, num_right_hand_sides=2),
    )


DEVICE_SOLVERS = {
    one.name: one
    for one in (
        DeviceSolver(
            "flow",
            "flow.cu",
            (structs.SOLVE, structs.SOLVE_GENERAL),
            ((2, 1, 0), (2, 2, 0), (4, 1, 0), (2, 3, 0), (4, 2, 0), (4, 3, 0), (4, 3, 1)),
            num_flow_bytes=_flow_bytes,
            by_size={128: ((2, 3, 0), (2, 6, 1)), 256: ((1, 6, 1),)},
            plans="plan.cu",
        ),
        DeviceSolver(
            "cusolverdx",
            "interior.cu",
            (structs.SOLVE, structs.SOLVE_GENERAL),
            ((4, 1, 1),),
            libraries=("mathdx", "nvJitLink"),
            functions=_factorisation,
            # A matrix, two right-hand sides, two words, and six numbers an arc.
            num_flow_bytes=_flow_bytes,
            num_own_bytes=lambda c: 8 * (c.size * (c.size + 2) + 2 + 6 * c.max_arcs),
        ),
    )
}
"""The solvers on the GPU, by name; the CPU's is `reference.solve`."""
GUEST_SOLVERS = {
    one.name: one
    for one in (
        DeviceSolver(
            "flow",
            "guests.cu",
            (structs.SOLVE_GUESTS, structs.SOLVE_GUESTS_GENERAL),
            ((4, 2, 1),),
            num_flow_bytes=_guest_bytes,
            num_threads=32 * len(RULES),
            num_cluster_blocks=4,
            by_size={32: ((4, 1, 1), (4, 3, 1)), 64: ((4, 1, 1), (4, 3, 1))},
        ),
    )
}
"""Those of them that take guest slots, with the kernels that do."""
OBJECTIVE_SOLVERS = {
    one.name: one
    for one in (
        DeviceSolver(
            "flow",
            "objective.cu",
            (structs.SOLVE_BY_OBJECTIVE, structs.SOLVE_BY_OBJECTIVE),
            ((4, 3, 1),),
            num_flow_bytes=_objective_bytes,
            num_threads=NUM_PLAN_THREADS,
            plans="plan_by_objective.cu",
        ),
    )
}
"""Those that minimise another objective than tokens, with the kernels that do."""


GUEST_OBJECTIVE_SOLVERS = {
    one.name: one
    for one in (
        DeviceSolver(
            "flow",
            "guests_by_cost.cu",
            (structs.SOLVE_GUESTS_BY_COST, structs.SOLVE_GUESTS_BY_COST),
            ((4, 3, 1),),
            num_flow_bytes=_guest_objective_bytes,
            num_threads=NUM_PLAN_THREADS,
            num_choices=NUM_CHOICES,
        ),
    )
}
"""Those that take guest slots and minimise cost."""


def solver_record(solver: str, placement: Placement, objective: str = "tokens") -> DeviceSolver:
    """The record of a solver's kernels for a placement and an objective.

    Raises:
        ValueError: they take no guest slots, and the placement has some. Or they minimise tokens
            alone, and the objective is another one.
    """
    if objective != "tokens":
        records = GUEST_OBJECTIVE_SOLVERS if placement.num_guests_per_rank else OBJECTIVE_SOLVERS
        if solver not in records:
            able = " or ".join(records)
            raise ValueError(f"the solver {solver} minimises tokens, not {objective}; {able} does")
        return records[solver]
    if not placement.num_guests_per_rank:
        return DEVICE_SOLVERS[solver]
    if solver not in GUEST_SOLVERS:
        raise ValueError(
            f"the solver {solver} takes no guest slots, and the placement has "
            f"{placement.num_guests_per_rank} a rank; {' or '.join(GUEST_SOLVERS)} does"
        )
    return GUEST_SOLVERS[solver]


def num_static_bytes(size: int) -> int:
    """The most static shared memory, in bytes, of a kernel for components of a size.

    Of each rank that is two sets and three numbers, as in `kernels/component.cuh`.
    """
    return STATIC_SHARED_BYTES + max(0, size * (size // 4 + 12) - WORD_RANKS * 28)


def num_route_bytes(placement: Placement, refreshable: bool = False) -> int:
    """Dynamic shared memory, in bytes, of a block that splits and rewrites."""
    return _route_bytes(placement, capacity_for(placement, refreshable))


def _route_bytes(placement: Placement, capacity: Capacity) -> int:
    num_nodes = placement.num_ranks // placement.num_ranks_per_node
    several, copies = capacity.num_several, capacity.num_copies
    integers = placement.num_experts + several + 1 + 6 * copies + several * (num_nodes + 2)
    of_statistics = placement.num_ranks * (2 + placement.num_guests_per_rank)
    return 4 * max(integers, of_statistics)


def num_plan_bytes(
    placement: Placement,
    capacity: Capacity,
    num_picks: int,
    objective: str = "tokens",
    least_gain: int = 0,
) -> int:
    """Dynamic shared memory, in bytes, of a block that makes a plan, as in `kernels/plan.cuh`."""
    p, c = placement, capacity
    row = num_words(p.num_experts, p.num_ranks, least_gain)
    of_components = _multiple(16, _flow_bytes(c, 1)) + ENDING.size * c.num_components
    of_components += 0 if objective == "tokens" else _search_bytes(c)
    of_table = COPY.size * c.num_copies + 4 * (p.num_experts + 2 * c.num_several + 1)
    of_rows = 16 * p.num_ranks + 4 * row * (p.num_ranks + 1)
    of_quotas = 4 * p.num_experts * p.max_replicas
    numbering = 4 * (1 + NUM_PLAN_THREADS // 32) * p.num_experts + 6 * num_picks
    return of_components + of_table + of_rows + of_quotas + numbering + _route_bytes(p, c)


def why_in_steps(
    placement: Placement,
    solver: str,
    max_bytes: int,
    *,
    refreshable: bool = False,
    moves_homes: bool = False,
    objective: str = "tokens",
    least_gain: int = 0,
) -> str:
    """Why plans take three launches and never one; empty: those of small batches take one.

    Args:
        placement: the copies.
        solver: one of `DEVICE_SOLVERS`.
        max_bytes: shared memory of a block.
        refreshable, moves_homes: as for `capacity_for`.
        objective: one of `settings.OBJECTIVES`.
        least_gain: of the problem.

    Raises:
        ValueError: as `solver_record`.
    """
    record = solver_record(solver, placement, objective)
    capacity = capacity_for(placement, refreshable, moves_homes)
    if not record.plans:
        guests = " with guest slots" if placement.num_guests_per_rank else ""
        return f"the solver {solver}{guests} has no kernel for it"
    if record.variant(capacity) not in record.plan_variants():
        return f"a component has more than {MAX_PLAN_RANKS} ranks"
    # Of several components one would wait for the other. Where homes move there is one as a rule,
    # and the tables hold more.
    if capacity.num_components > 1 and not moves_homes:
        return f"the placement has {capacity.num_components} components, and one block solves one"
    num_bytes = num_plan_bytes(placement, capacity, MAX_ONE_LAUNCH, objective, least_gain)
    num_bytes += num_static_bytes(capacity.size)
    if num_bytes > max_bytes:
        return f"a block has {max_bytes} bytes of shared memory, and such a plan takes {num_bytes}"
    return ""


def in_steps(counts: str, has_relay: bool = False) -> str:
    """As `why_in_steps`, by how counts travel.

    Args:
        counts: the kind of the exchange, or "given".
        has_relay: whether they travel to other nodes.
    """
    if has_relay:
        return "counts travel between nodes"
    return f"counts travel by {counts}, not by kernels" if counts == "torch" else ""


@functools.cache
def log_in_steps(why: str) -> None:
    """Says that no batch is planned in one launch: each reason once in a process."""
    log.info("LPLB_EP_ONE_LAUNCH: plans take three launches: %s", why)


@functools.cache
def log_on_cpu(why: str) -> None:
    """Warns that a program with a GPU plans on the CPU: each reason once in a process."""
    if torch.cuda.is_available():
        log.warning(
            "LPLB_EP_SOLVER=auto: plans are made on the CPU, and each batch waits for it: %s", why
        )


def check_fit(
    placement: Placement,
    solver: str,
    max_bytes: int,
    refreshable: bool = False,
    capability: tuple[int, int] = (9, 0),
    objective: str = "tokens",
) -> None:
    """Checks whether the kernels take a placement.

    Args:
        placement: the copies.
        solver: one of `DEVICE_SOLVERS`.
        max_bytes: shared memory of a block.
        refreshable: whether any other replicas must fit, too.
        capability: of the GPU.
        objective: one of `settings.OBJECTIVES`.

    Raises:
        ValueError: a component is too large for one block, or a block has not enough shared memory;
            names the sizes. Or the solver takes no guest slots, or not the objective.
    """
    record = solver_record(solver, placement, objective)
    if not placement.num_guests_per_rank and max(record.by_size, default=0) <= WORD_RANKS:
        num_ranks, num_experts = component_sizes(placement, placement.component)
        aims = "" if objective == "tokens" else f", where it minimises {objective},"
        check_word(num_ranks.max(), num_experts.max(), f"the solver {solver}{aims}")
    capacity = capacity_for(placement, refreshable)
    static = num_static_bytes(capacity.size)
    num_blocks = record.num_blocks(capability)
    of_solver = record.num_shared_bytes(capacity, placement.num_experts, num_blocks)
    copies, guests = (placement.copy_rank >= 0).sum(1), placement.num_guests_per_rank
    slots = f", with {guests} guest slots a rank" if guests else ""
    for what, num_bytes in (
        (f"the solver {solver}", of_solver),
        ("rewriting", num_route_bytes(placement, refreshable)),
    ):
        if num_bytes + static > max_bytes:
            raise ValueError(
                f"a block has {max_bytes} bytes of shared memory, and {what} takes "
                f"{num_bytes + static} for {placement.num_experts} experts, "
                f"{copies[copies > 1].sum()} copies of those with several, and "
                f"{placement.num_ranks // placement.num_ranks_per_node} nodes{slots}"
            )


def choose_solver(
    solver: str,
    placement: Placement | None = None,
    refreshable: bool = False,
    objective: str = "tokens",
) -> tuple[str, str]:
    """The solver that runs for a request, and why.

    A function of the request, the placement and the installed packages, never of a measurement:
    ranks that chose differently would plan differently.

    Args:
        solver: one of `SOLVERS`.
        placement: the copies; None: any that fits.
        refreshable: whether any other replicas must fit, too.
        objective: one of `settings.OBJECTIVES`.

    Raises:
        ValueError: `solver` is not one of `SOLVERS`, does not minimise that, or the placement
            is too large for it.
        MissingPackageError: `solver` needs a device or a package that is not there.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    if solver == "cpu":
        return solver, "asked for"
    name = "flow" if solver == "auto" else solver
    try:
        check_device(*DEVICE_SOLVERS[name].libraries)
        if placement is not None:
            most = max_shared_bytes(torch.cuda.current_device())
            capability = torch.cuda.get_device_capability()
            check_fit(placement, name, most, refreshable, capability, objective)
    except (MissingPackageError, ValueError) as error:
        if solver != "auto":
            raise
        return "cpu", str(error)
    return name, "a CUDA device is there" if solver == "auto" else "asked for"


def solver_fact(
    solver: str,
    placement: Placement | None = None,
    refreshable: bool = False,
    objective: str = "tokens",
) -> str:
    """What ranks must agree on: the solver of a request, and the GPU that it runs on.

    Raises:
        ValueError, MissingPackageError: as `choose_solver`.
    """
    name, _ = choose_solver(solver, placement, refreshable, objective)
    if name == "cpu":
        return name
    major, minor = torch.cuda.get_device_capability()
    return f"{name} on sm_{major}{minor}"
