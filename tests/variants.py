"""A case for every variant of every kernel: plans that run it, held against what plans must be.

    python tests/variants.py CASE ...

runs cases on the GPU; `tests/sanitize.py` does so under the tools of compute-sanitizer.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
import unittest.mock
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's folder alone is there

import guest_ranks  # noqa: E402
import numpy as np  # noqa: E402
import oracle  # noqa: E402
import torch  # noqa: E402
from builders import circulant  # noqa: E402

import lplb_ep  # noqa: E402
from lplb_ep import Layer, Placement, Planner, Problem, check_plan  # noqa: E402
from lplb_ep.comm import copies  # noqa: E402
from lplb_ep.comm.exchange import Relay, WindowExchange, Windows  # noqa: E402
from lplb_ep.cost import H200  # noqa: E402
from lplb_ep.gpu.jit import Program  # noqa: E402
from lplb_ep.planning import kernels, reference  # noqa: E402
from lplb_ep.planning import planner as planner_module  # noqa: E402
from lplb_ep.planning.device import DeviceBackend  # noqa: E402
from lplb_ep.planning.layout import capacity_for  # noqa: E402
from lplb_ep.planning.plan import Plan  # noqa: E402
from lplb_ep.planning.solvers import (  # noqa: E402
    DEVICE_SOLVERS,
    GUEST_OBJECTIVE_SOLVERS,
    GUEST_SOLVERS,
    OBJECTIVE_SOLVERS,
    DeviceSolver,
    Variant,
)
from lplb_ep.planning.structs import HEAD, Status  # noqa: E402
from lplb_ep.settings import MAX_ONE_LAUNCH  # noqa: E402
from lplb_ep.weights.guest_launches import (  # noqa: E402
    Batch,
    GuestLaunches,
    Traveller,
    memory_at,
    rows_of,
)
from lplb_ep.weights.proposals import widened  # noqa: E402
from lplb_ep.weights.structs import Sum  # noqa: E402


@dataclass(frozen=True)
class Case:
    """Plans that run a program's kernels, or several programs' in a special way."""

    name: str
    run: Callable[[], None]
    program: Program | None = None
    """The program that must have been loaded when the case is done."""


def cases() -> list[Case]:
    """All cases; among their programs is each of `kernels.programs()`."""
    out = [
        Case(
            f"{name}-{v.size}-{v.parts}x{v.turns}{'+' * v.more}",
            functools.partial(run_solver, name, v),
            solver.program(v),
        )
        for name, solver in DEVICE_SOLVERS.items()
        for v in solver.variants()
    ]
    out += [
        Case(
            f"plan-{v.size}-{v.parts}x{v.turns}{'+' * v.more}",
            functools.partial(run_solver, "flow", v, MAX_ONE_LAUNCH),
            DEVICE_SOLVERS["flow"].plan_program(v),
        )
        for v in DEVICE_SOLVERS["flow"].plan_variants()
    ]
    out.append(Case("plan-windows", functools.partial(run_windows, torch.int64, True)))
    out.append(Case("guests", run_guests, kernels.weights_program()))
    out += [
        Case(
            f"{kind}-{v.size}-{v.parts}x{v.turns}{'+' * v.more}",
            functools.partial(run, v),
            solver.program(v),
        )
        for kind, run, solver in (
            ("choice", run_choice, GUEST_SOLVERS["flow"]),
            ("choice-by-cost", run_choice_by_cost, GUEST_OBJECTIVE_SOLVERS["flow"]),
        )
        for v in solver.variants()
    ]
    out += [
        Case(
            f"{kind}-{v.size}-{v.parts}x{v.turns}{'+' * v.more}",
            functools.partial(run_objective, v, most),
            program(v),
        )
        for kind, most, program in (
            ("objective", 0, OBJECTIVE_SOLVERS["flow"].program),
            ("plan-objective", MAX_ONE_LAUNCH, OBJECTIVE_SOLVERS["flow"].plan_program),
        )
        for v in OBJECTIVE_SOLVERS["flow"].variants()
    ]
    others = [p for p in kernels.programs() if p.source in ("route.cu", "barrier.cu")]
    for program in others:
        index = program.defines.get("INDEX")
        if index is None:
            out.append(Case("barrier", run_barrier, program))
            continue
        dtype = torch.int32 if index == "int" else torch.int64
        kind = "int32" if index == "int" else "int64"
        for name, run in (
            ("route", run_route),
            ("faults", run_faults),
            ("windows", run_windows),
            ("relay", run_relay),
        ):
            out.append(Case(f"{name}-{kind}", functools.partial(run, dtype), program))
    for name in DEVICE_SOLVERS:
        out.append(Case(f"loads-{name}", functools.partial(run_loads, name)))
        out.append(Case(f"refresh-{name}", functools.partial(run_refresh, name)))
    return out


def placement_of(variant: Variant, *, few: bool = False) -> Placement:
    """A placement whose capacity picks a variant; of some, with a rank less than its size.

    Of sizes above 64, or with `few`, with the fewest ranks: one block holds a whole plan of these.
    """
    fewest = variant.size // 2 + 1
    num_ranks = fewest if few or variant.size > 64 else variant.size - variant.turns % 2
    rng = np.random.default_rng(variant.size)
    num_edges = variant.parts * variant.turns + 2 * variant.more
    while True:
        placement = circulant(rng, num_ranks, num_edges)
        if capacity_for(placement).num_components == 1:
            return placement


def make_batch(
    rng: np.random.Generator, placement: Placement, rank: int, num_tokens: int = 300
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's picks [T, K] int64 and the counts [R, E] int32 of all ranks, on the CPU."""
    R, E = placement.num_ranks, placement.num_experts
    weights = rng.lognormal(0, 1.5, E)
    topk = torch.from_numpy(oracle.random_topk(rng, num_tokens, min(4, E), weights))
    counts = torch.from_numpy(rng.poisson(20 * weights, (R, E)).astype(np.int32))
    counts[rank] = reference.count(topk, E)
    return topk, counts


def check(
    plan: Plan,
    topk: torch.Tensor,
    layer: Layer,
    rank: int,
    status: Status = Status.OPTIMAL,
) -> None:
    """Holds a plan of picks on the CPU against what plans must be."""
    assert int(plan.status) == status, Status(int(plan.status))
    check_plan(plan, topk.to(plan.topk_idx), layer.placement, rank, layer.problem)


def plan_once(
    layer: Layer,
    solver: str,
    topk: torch.Tensor,
    counts: torch.Tensor,
    exchanged: bool,
    most: int = 0,
) -> None:
    """One plan of the rank in the middle, whose picks these are. `most`: of one launch."""
    from test_plan import Rows

    rank = layer.placement.num_ranks // 2
    planner = Planner(layer, rank=rank, counts="given", solver=solver, one_launch=most)
    if exchanged:
        planner.exchange = Rows(counts.cuda(), rank)
    plan = planner(topk.cuda(), counts=None if exchanged else counts.cuda())
    planner.raise_errors()
    check(plan, topk, layer, rank)


def check_picks(record: DeviceSolver, placement: Placement, variant: Variant) -> None:
    """Whether a solver takes this variant for a placement."""
    picked = record.variant(capacity_for(placement))
    assert picked == variant, f"the capacity picks {picked}, not {variant}"


def run_solver(solver: str, variant: Variant, most: int = 0) -> None:
    """Both kernels of a variant. `most`: picks of a plan in one launch."""
    placement, rng = placement_of(variant), np.random.default_rng(variant.size)
    check_picks(DEVICE_SOLVERS[solver], placement, variant)
    R = placement.num_ranks
    topk, counts = make_batch(rng, placement, R // 2)
    load = counts.sum(0)
    base = torch.from_numpy(rng.integers(0, 800, R))
    speed = torch.from_numpy(rng.integers(1, 6, R))
    limit = load[:, None].expand(-1, placement.max_replicas) * 3 // 4 + 1
    bounded = Problem(base_load=base, speed=speed, max_quota=limit)
    plan_once(Layer(placement), solver, topk, counts, False, most)
    exchanged = not most  # between the launches
    plan_once(
        Layer(placement, Problem(base_load=base)), solver, topk.int(), counts, exchanged, most
    )
    plan_once(Layer(placement, bounded), solver, topk, counts, False, most)


def run_objective(variant: Variant, most: int) -> None:
    """The kernel of a variant, for every objective but tokens. `most`: as of `run_solver`."""
    rng = np.random.default_rng(variant.size)
    placement = placement_of(variant, few=most > 0 and variant.size == 64)
    check_picks(OBJECTIVE_SOLVERS["flow"], placement, variant)
    topk, counts = make_batch(rng, placement, placement.num_ranks // 2)
    base = torch.from_numpy(rng.integers(0, 300, placement.num_ranks))
    bounded = Layer(placement, Problem(objective="cost", base_load=base))
    for objective in ("experts", "cost", "auto"):
        layer = Layer(placement, Problem(objective=objective))
        plan_once(layer, "flow", topk, counts, False, most)
    plan_once(bounded, "flow", topk, counts, not most, most)


def guest_placement_of(variant: Variant) -> Placement:
    """A placement with guest slots whose capacity picks a variant."""
    rng, R = np.random.default_rng(variant.size), variant.size - 1
    if variant.size > 16 and variant.turns == 1:  # for homes alone
        return Placement.homes_only(3 * R, R, num_guests_per_rank=2)
    residents = oracle.random_placement(rng, R, 3 * R, 1)
    rows = residents.physical_to_logical.reshape(R, -1)
    rows = np.concatenate([rows, np.full((R, 2), -1)], axis=1)
    return Placement(rows.ravel(), R, num_experts=3 * R, num_guests_per_rank=2)


def run_choice(variant: Variant) -> None:
    """Both kernels of a variant, with guests that are chosen, and where residents suffice."""
    placement, rng = guest_placement_of(variant), np.random.default_rng(variant.size)
    check_picks(GUEST_SOLVERS["flow"], placement, variant)
    topk, counts = make_batch(rng, placement, placement.num_ranks // 2)
    base = torch.from_numpy(rng.integers(0, 800, placement.num_ranks))
    speed = torch.from_numpy(rng.integers(1, 6, placement.num_ranks))
    for bounds in ({}, {"base_load": base}, {"speed": speed}, {"guest_tolerance": 1.0}):
        layer = Layer(placement, Problem(**bounds))
        plan_once(layer, "flow", topk, counts, "base_load" in bounds)


def run_choice_by_cost(variant: Variant) -> None:
    """The kernel of a variant, with guests that are worth their pushes."""
    placement, rng = guest_placement_of(variant), np.random.default_rng(variant.size)
    check_picks(GUEST_OBJECTIVE_SOLVERS["flow"], placement, variant)
    topk, counts = make_batch(rng, placement, placement.num_ranks // 2)
    base = torch.from_numpy(rng.integers(0, 300, placement.num_ranks))
    cost = replace(H200, tile=16, push=20_000)
    for bounds in ({}, {"base_load": base}):
        layer = Layer(placement, Problem(objective="cost", cost=cost, **bounds))
        plan_once(layer, "flow", topk, counts, "base_load" in bounds)


def run_loads(solver: str) -> None:
    """Several loads in a launch, without a plan."""
    rng = np.random.default_rng(1)
    placement = oracle.random_placement(rng, 8, 60, 2)
    loads = torch.from_numpy(np.stack([oracle.random_load(rng, 60, 300.0) for _ in range(3)]))
    bounds: list[dict[str, Any]] = [{}, {"speed": torch.from_numpy(rng.integers(1, 6, 8))}]
    for options in bounds:
        got = lplb_ep.solve(loads.cuda(), placement, solver, **options)
        assert got.num_unfinished == 0
        expected = lplb_ep.solve(loads, placement, "cpu", **options)
        assert torch.equal(got.lower_bound.cpu(), expected.lower_bound)
        assert torch.equal(got.quota.cpu().sum(2), loads)


def run_route(dtype: torch.dtype) -> None:
    """Counting and rewriting in every way, on two nodes, and in several components."""
    from test_plan import Rows

    rng, rank = np.random.default_rng(2), 5
    cube = Placement.from_topology("cube", num_experts=64, num_ranks=16)
    for placement in (oracle.random_placement(rng, 8, 60, 2, num_ranks_per_node=4), cube):
        layer = Layer(placement)
        topk, counts = make_batch(rng, placement, rank)
        homes = reference.rewrite_home(topk, placement).to("cuda", dtype)
        picks = topk.to("cuda", dtype)
        planner = Planner(layer, rank=rank, counts="given", solver="flow")
        planner.exchange = Rows(counts.cuda(), rank)
        plan = planner(picks)
        check(plan, topk, layer, rank)
        check(planner(picks, distinct=True), topk, layer, rank)
        check(planner(homes, indices="physical"), topk, layer, rank)
        check(planner(homes, indices="physical", distinct=True), topk, layer, rank)
        assert torch.equal(planner.route(picks).cpu(), plan.topk_idx.cpu())
        masked = planner.mask(picks, plan.topk_idx)
        assert torch.equal(masked.cpu(), plan.topk_idx.cpu())
        given = Planner(layer, rank=rank, counts="given", solver="flow")
        check(given(picks, counts=counts.cuda()), topk, layer, rank)
        for min_gain, status in ((1, Status.OPTIMAL), (10**6, Status.STAYED)):
            gaining = Layer(placement, Problem(min_gain=min_gain))
            some = Planner(gaining, rank=rank, counts="given", solver="flow")
            check(some(picks, counts=counts.cuda()), topk, gaining, rank, status)
        counts[rank] = 0
        check(given(picks[:0], counts=counts.cuda()), topk[:0], layer, rank)


def run_faults(dtype: torch.dtype) -> None:
    """Batches that go home, and picks that are refused."""
    from test_plan import Rows

    rng, rank = np.random.default_rng(3), 5
    layer = Layer(oracle.random_placement(rng, 8, 60, 2, num_ranks_per_node=4))
    topk, counts = make_batch(rng, layer.placement, rank)
    picks = topk.to("cuda", dtype)
    planner = Planner(layer, rank=rank, counts="given", solver="flow")
    planner.exchange = Rows(counts.cuda(), rank)
    check(planner(picks, stale=True), topk, layer, rank, Status.STALE)
    for wrong, options in ((60, {}), (60_000, {"indices": "physical"}), (-2, {"distinct": True})):
        bad = topk.clone()
        bad[7, 1] = wrong
        plan = planner(bad.to("cuda", dtype), **options)
        assert int(plan.status) == Status.REFUSED
        raises(ValueError, planner.raise_errors)
    bad = topk[:, :1].clamp(min=0).expand(-1, 4).contiguous()
    planner(bad.to("cuda", dtype), distinct=True)
    raises(ValueError, planner.raise_errors)
    given = Planner(layer, rank=rank, counts="given", solver="flow")
    counts[0, 0] = -1
    check(given(picks, counts=counts.cuda()), topk, layer, rank, Status.BAD_COUNTS)


def raises(error: type[Exception], call: Callable[[], object]) -> None:
    """Checks that a call raises."""
    try:
        call()
    except error:
        return
    raise AssertionError(f"{call} raised no {error.__name__}")


class OtherRanks:
    """The other ranks of an exchange by windows: their rows come before this rank's batch.

    Kernels that wait for rows find them. So the ranks need not run at the same time, which tools
    that serialise kernels do not allow.

    Args:
        placement: of all ranks.
        rank: this rank; the first of its node with `relayed`.
        relayed: whether rows of other nodes come by a relay.
    """

    def __init__(self, placement: Placement, rank: int, relayed: bool) -> None:
        R, size = placement.num_ranks, HEAD + placement.num_experts
        self.rank, self.num_ranks = rank, R
        self.node_size = placement.num_ranks_per_node if relayed else R
        self.node, num_nodes = rank // self.node_size, R // self.node_size
        zeros = functools.partial(torch.zeros, dtype=torch.int64, device="cuda")
        self.memory = zeros(R, 2, R, size)
        self.sent = zeros(2, self.node_size, size)
        self.received = zeros(num_nodes, 2, self.node_size, size)
        self.signals = zeros(num_nodes)
        near = [r // self.node_size == self.node for r in range(R)]
        self.windows = Windows(
            [self.memory[r].data_ptr() if near[r] else 0 for r in range(R)],
            Relay(
                self.sent.data_ptr(),
                self.received.data_ptr(),
                self.signals.data_ptr(),
                self.node,
                self.node_size,
                put=lambda stream: None,
            )
            if relayed
            else None,
        )

    def planner(self, layer: Layer, **options: Any) -> Planner:
        """This rank's planner."""
        exchange = WindowExchange("ipc", self.windows)
        with unittest.mock.patch.object(planner_module, "connect", return_value=exchange):
            return Planner(layer, rank=self.rank, counts="ipc", solver="flow", **options)

    def send(
        self, planner: Planner, counts: torch.Tensor, ahead: int = 1, absent: int | None = None
    ) -> None:
        """Writes the rows of a batch to come, of all ranks but `absent`."""
        backend = planner._backend
        assert isinstance(backend, DeviceBackend)
        *head, last = backend.workspace.head.tolist()
        number = last + ahead
        heads = np.tile([Status.OPTIMAL, *head, number], (self.num_ranks, 1))
        rows = np.concatenate([heads, counts.numpy()], 1).astype(np.int64)
        words = torch.from_numpy(number << 32 | rows)
        for source in range(self.num_ranks):
            node, local = divmod(source, self.node_size)
            if source in (self.rank, absent):
                continue
            if node == self.node:
                self.memory[self.rank, number & 1, source].copy_(words[source])
            else:
                self.received[node, number & 1, local].copy_(words[source])
        self.signals.copy_(torch.full((len(self.signals),), number))


def run_windows(dtype: torch.dtype, one: bool = False) -> None:
    """Rows in windows: plans, a batch that this rank refuses, and one whose rows come late."""
    rng, rank = np.random.default_rng(4), 5
    layer = Layer(oracle.random_placement(rng, 8, 60, 2))
    others = OtherRanks(layer.placement, rank, relayed=False)
    planner = others.planner(layer, timeout_s=0.2, one_launch=MAX_ONE_LAUNCH if one else 0)
    for _ in range(3):
        topk, counts = make_batch(rng, layer.placement, rank)
        others.send(planner, counts)
        check(planner(topk.to("cuda", dtype)), topk, layer, rank)
    others.send(planner, counts)
    others.send(planner, counts, ahead=2)
    raises(ValueError, lambda: planner(topk.float().cuda()))
    check(planner(topk.to("cuda", dtype)), topk, layer, rank)
    planner.raise_errors()
    others.send(planner, counts, absent=3)
    assert int(planner(topk.to("cuda", dtype)).status) == Status.TIMED_OUT
    raises(lplb_ep.RankError, planner.raise_errors)


def run_relay(dtype: torch.dtype) -> None:
    """Rows between two nodes, of whose ranks the others' kernels do not run."""
    rng, rank = np.random.default_rng(5), 4
    layer = Layer(oracle.random_placement(rng, 8, 60, 2, num_ranks_per_node=4))
    others = OtherRanks(layer.placement, rank, relayed=True)
    planner = others.planner(layer)
    for number in range(1, 4):
        topk, counts = make_batch(rng, layer.placement, rank)
        others.send(planner, counts)
        check(planner(topk.to("cuda", dtype)), topk, layer, rank)
        planner.raise_errors()
        of_node = others.sent[number & 1, :, HEAD:].cpu() & 0xFFFFFFFF
        assert torch.equal(of_node, counts[rank : rank + 4].long()), "rows to other nodes"


def run_refresh(solver: str) -> None:
    """Tables that are rewritten in place."""
    from test_plan import Rows

    rng, rank = np.random.default_rng(6), 3
    first = widened(oracle.random_placement(rng, 8, 60, 2, num_ranks_per_node=4))
    layer = Layer(first)
    layer.is_refreshable = True
    planner = Planner(layer, rank=rank, counts="given", solver=solver)
    for number in range(3):
        if number:
            new = oracle.random_copies(rng, first)
            while new.component.max() > first.component.max():
                new = oracle.random_copies(rng, first)
            planner.prepare(new)()
            layer.replace(new)
        topk, counts = make_batch(rng, layer.placement, rank)
        planner.exchange = Rows(counts.cuda(), rank)
        check(planner(topk.cuda()), topk, layer, rank)
        planner.raise_errors()


def run_barrier() -> None:
    """A barrier of ranks that have all come before."""
    R, rank, device = 4, 1, torch.device("cuda", torch.cuda.current_device())
    flags = torch.full((R, R), 3).cuda()
    flags[:, rank] = 0
    peers = copies.PeerCopies(rank, device, [row.data_ptr() for row in flags], timeout_s=60)
    for number in (1, 2, 3):
        peers.barrier(number)
        torch.cuda.synchronize()
        assert flags[:, rank].tolist() == [number] * R
    assert not peers.missing.any()


def run_guests() -> None:
    """Weights of guests and their gradients between ranks of this process, one after the other.

    No kernel waits for one that is launched behind it, as the tools may let them run one by one.
    """
    R, rng = 3, np.random.default_rng(7)
    device = torch.device("cuda", torch.cuda.current_device())
    layout = guest_ranks.layout_of(R, 3, 2)
    num_bytes = 2 * layout.num_bytes
    addresses, held = guest_ranks.local_addresses(R, num_bytes, device)
    missing = torch.zeros(R, dtype=torch.int32).pin_memory()
    limit_ns = 10**11
    made = [
        GuestLaunches(rank, device, addresses, node, missing.data_ptr(), limit_ns)
        for rank in range(R)
        for node in (R, 1)  # the second kind meets none but itself
    ]
    calls, stream = [one.of_layer(layout) for one in made], torch.cuda.current_stream().cuda_stream
    experts = guest_ranks.draw_experts(layout, 0, device)
    grads = [torch.randn(9, *shape, device=device) for shape in layout.shapes]
    guests = torch.from_numpy(guest_ranks.draw_table(rng, layout, 0.8)).to(device)
    batch, tables = Batch(guests.data_ptr(), 0, 0), []
    for rank in range(R):
        own = slice(3 * rank, 3 * rank + 3)
        weights = [
            Traveller(offset, size, tensor[own])
            for offset, size, tensor in zip(layout.offsets, layout.slot_bytes, experts, strict=True)
        ]
        sums, end = [], 0
        for tensor, kind in zip(grads, 2 * [Sum.FLOATS, Sum.BFLOATS, Sum.FLOATS], strict=True):
            homes = tensor[own].bfloat16() if kind == Sum.BFLOATS else tensor[own]
            held.append(homes)
            sums.append(Traveller(end, homes[0].numel() * homes.element_size(), homes, kind))
            end += 2 * sums[-1].num_bytes + 256 & -256
        tables.append(
            [made[0].make_table(of, [rows_of(one, 3) for one in of]) for of in (weights, sums)]
        )
    for rank in range(R):
        calls[2 * rank].push(stream, batch, 0, tables[rank][0], num_blocks=4)
    for rank, addressed in enumerate(addresses.memory):
        calls[2 * rank].wait(stream, batch, 0, tables[rank][0])
        memory = memory_at(addressed, num_bytes, device)
        assert not guest_ranks.num_wrong(layout, memory, experts, guests[rank])
        memory.zero_()
    for rank in range(R):
        calls[2 * rank + 1].meet(stream, batch, 0, tables[rank][1])
        calls[2 * rank].add(stream, batch, 0, tables[rank][1], num_blocks=4)
    torch.cuda.synchronize()
    assert not missing.any()


def run_cases(names: Sequence[str]) -> int:
    """Runs cases in this process, saying which came to their end. Returns the exit status."""
    sys.path.append(str(ROOT / "tests" / "gpu"))
    loaded: set[str] = set()
    load = kernels.load

    def loading(program: Program, device: int) -> Any:
        loaded.add(str(program))
        return load(program, device)

    kernels.load = copies.load = loading
    by_name, status = {case.name: case for case in cases()}, 0
    for name in names:
        case, start = by_name[name], time.monotonic()
        try:
            case.run()
            torch.cuda.synchronize()
            assert case.program is None or str(case.program) in loaded, (
                f"{case.program} did not run"
            )
        except Exception:
            logging.exception("%s failed", name)
            status = 1
        else:
            print(f"ran {name} in {time.monotonic() - start:.1f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(run_cases(sys.argv[1:]))
