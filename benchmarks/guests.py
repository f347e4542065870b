"""The choice of guests: how good, how many, beside a MILP and beside UltraEP's rule.

    python benchmarks/guests.py --milp 2000                # small instances against HiGHS
    python benchmarks/guests.py --pair FILE KEY FILE KEY   # earlier and live loads, layer by layer
    python benchmarks/guests.py --pair FILE KEY FILE KEY --by-cost   # what plans by cost gain
    python benchmarks/guests.py --simulate                 # EP128 to EP2048 by domains

A key names an array of a .npz file: counts [layers, E], or picks [layers, T, K] of 128 experts.
Live picks are cut into batches of `--batch` tokens. `KEY/first` is the first half of them, and
`KEY/second` the second.
Homes are in order, or placed on the earlier load by `Placement.from_history`.

T / mean is the exact optimum over residents and guests, over the mean of all ranks. "Fewer" are the
guests that end with fewer tokens than `--least`, by the CPU's quotas. UltraEP's rule
is a few lines here: quotas by a search for a threshold that a greedy fill reaches, within 1 %.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lplb_ep import Placement
from lplb_ep.planning import reference
from lplb_ep.planning.guests import choose_guests
from lplb_ep.planning.guests_by_cost import plan_by_cost, push_waits
from lplb_ep.planning.values import rank_costs
from lplb_ep.problem import Problem
from lplb_ep.tools.tables import text_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from guest_optimum import best_guests, guest_tokens, small_instance

SHAPES = [
    *((ranks, 0, guests) for ranks in (8, 16, 32, 64) for guests in (1, 2, 4, 6)),
    *((ranks, 1, 1) for ranks in (8, 16, 32, 64)),
]
"""Ranks, static replicas a rank, guests a rank."""


COST_SHAPES = ((8, 6, False), (8, 1, True), (32, 2, False), (64, 1, False))
"""Ranks, guests a rank, and whether homes are placed."""
COST_TOKENS = (512, 1024, 4096, 8192)
"""Of a rank, with eight picks each."""


def optimum(load: np.ndarray, placement: Placement, guests: np.ndarray) -> float:
    """T* over residents and guests."""
    filled = placement.with_guests(guests)
    return float(reference.solve(torch.from_numpy(load), filled).bound)


def small(seed: int) -> dict[str, float] | None:
    """An instance against HiGHS; None where it runs out of time."""
    torch.set_num_threads(1)
    load, placement = small_instance(seed)
    best = best_guests(load, placement)
    fewest = None if best is None else best_guests(load, placement, most=1.01 * best + 1e-6)
    if best is None or fewest is None:
        return None
    problem = Problem(guest_min_tokens=1).checked(placement)
    guests = choose_guests(load, placement, problem)
    return {
        "replicas": float((placement.copy_rank >= 0).sum() > placement.num_experts),
        "excess": optimum(load, placement, guests) / best - 1,
        # Tokens are whole here: the mean, and 1 % of it, may be off by one.
        "is_off": float(optimum(load, placement, guests) > 1.01 * best + 1),
        "guests": int((guests >= 0).sum()),
        "fewest": fewest,
    }


def against_milp(number: int, processes: int) -> None:
    """Prints how near the choice comes to the best there is."""
    with multiprocessing.get_context("forkserver").Pool(processes) as pool:
        found = pool.map(small, range(number), chunksize=10)
    solved = [one for one in found if one is not None]
    rows = []
    for name, of_kind in (
        ("homes alone", [one for one in solved if not one["replicas"]]),
        ("one replica a rank", [one for one in solved if one["replicas"]]),
        ("all", solved),
    ):
        ratios = [one["guests"] / one["fewest"] for one in of_kind if one["fewest"]]
        rows.append(
            [
                name,
                str(len(of_kind)),
                f"{sum(one['is_off'] for one in of_kind):.0f}",
                f"{100 * max(one['excess'] for one in of_kind):.2f} %",
                str(len(ratios)),
                f"{statistics.mean(ratios):.3f}",
                f"{sum(o['guests'] for o in of_kind) / sum(o['fewest'] for o in of_kind):.3f}",
            ]
        )
    header = ["small instances", "number", "T over 1 %", "worst", "need guests", "copies, mean"]
    print(text_table([*header, "of all"], rows))
    print(f"\nHiGHS ran out of time on {len(found) - len(solved)} of {len(found)}")


def ultraep(load: np.ndarray, num_ranks: int, num_guests: int, home: np.ndarray, node_size: int):
    """UltraEP's quota search (github.com/Dots-Infra/UltraEP, csrc/kernels/placement.cu), no floor.

    Returns:
        The largest load that its quotas reach, and its guests.
    """
    largest, total = 0, 0
    for node in range(num_ranks // node_size):
        experts = np.flatnonzero(home // node_size == node)
        local, tokens = home[experts] - node * node_size, load[experts]
        before = np.bincount(local, tokens, node_size).astype(np.int64)
        low = -(-int(tokens.sum()) // node_size)
        high = max(int(before.max()), low)
        fill = partial(ultraep_fill, before, local, tokens, num_guests)
        tries = [-(-low * 101 // 100) + i * max(1, (high + 99) // 100) for i in range(3)]
        plan, threshold = None, high
        for threshold in tries:
            plan = fill(min(threshold, high))
            if plan is not None:
                break
        if plan is None:
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if fill(middle) is not None else (middle + 1, high)
            plan = fill(high)
        largest, total = max(largest, plan[0]), total + plan[1]
    return largest, total


def ultraep_fill(before, home, tokens, num_guests, threshold):
    """The largest load and the guests of a fill; None where it does not reach the threshold."""
    load, used, number = before.copy(), np.zeros(len(before), int), 0
    for source in np.argsort(-before, kind="stable"):
        mine = np.flatnonzero(home == source)
        for e in mine[np.argsort(-tokens[mine], kind="stable")]:
            left = max(int(tokens[e]) - 1, 0)
            taken = np.zeros(len(load), bool)
            while left > 0 and load[source] > threshold:
                may = (used < num_guests) & (load < threshold) & ~taken
                may[source] = False
                if not may.any():
                    break
                to = int(np.where(may, threshold - load, -1).argmax())
                moved = min(left, int(load[source] - threshold), int(threshold - load[to]))
                load[source] -= moved
                load[to] += moved
                left -= moved
                used[to] += 1
                taken[to] = True
                number += 1
        if load[source] > threshold:
            return None
    return int(load.max()), number


def read(path: str, key: str, batch: int | None) -> list[np.ndarray]:
    """Counts [layers, E]: one array, or of picks one for each batch of tokens."""
    name, _, half = key.partition("/")
    array = np.load(path)[name]
    if array.ndim == 2:
        return [array.astype(np.int64)]
    middle = array.shape[1] // 2
    array = {"": array, "first": array[:, :middle], "second": array[:, middle:]}[half]
    starts = range(0, array.shape[1], batch) if batch else [0]
    parts = [array[:, first : first + (batch or array.shape[1])] for first in starts]
    return [
        np.stack([np.bincount(layer.ravel(), minlength=128) for layer in part])
        for part in parts
        if part.shape[1] == (batch or part.shape[1])
    ]


def layer(
    pair,
    num_ranks,
    replicas,
    num_guests,
    node_size,
    is_placed,
    least=1,
    with_lp=False,
    with_peer=True,
):
    """Numbers of one layer's batch: T / mean at home, with guests and by UltraEP, and guests."""
    torch.set_num_threads(1)
    earlier, load = pair
    shape = {"num_ranks": num_ranks, "num_ranks_per_node": node_size}
    if is_placed:
        placement = Placement.from_history(
            earlier + 1e-3,
            num_redundant_per_rank=replicas,
            num_guests_per_rank=num_guests,
            # Each expert a group of its own: they are packed over nodes first, then over ranks.
            num_groups=len(load) if is_placed == "over nodes" else None,
            **shape,
        )
    else:
        placement = Placement.homes_only(len(load), num_guests_per_rank=num_guests, **shape)
    mean = load.sum() / num_ranks
    problem = Problem(guest_min_tokens=least).checked(placement)
    start = time.process_time()
    guests = choose_guests(load, placement, problem)
    seconds = time.process_time() - start
    solved = reference.solve(torch.from_numpy(load), placement.with_guests(guests))
    node_load = np.bincount(placement.home_rank // node_size, load) / node_size
    sent = np.bincount(placement.home_rank[guests[guests >= 0]], minlength=1)
    out = {
        "before": optimum(load, placement, np.full_like(guests, -1)) / mean,
        "T": float(solved.bound) / mean,
        "fewer": int((guest_tokens(solved.quota, placement, guests) < least).sum()),
        "nodes": node_load.max() / mean,
        "copies": int((guests >= 0).sum()),
        "sent": int(sent.max()),
        "seconds": seconds,
    }
    if with_peer and not replicas:
        level, number = ultraep(load, num_ranks, num_guests, placement.home_rank, node_size)
        out |= {"ultraep": level / mean, "ultraep_copies": number}
    if with_lp:
        fixed = Placement.for_lp(earlier + 1e-3, num_redundant_per_rank=2, **shape)
        bound = float(reference.solve(torch.from_numpy(load), fixed).bound)
        out["for_lp"] = bound / mean
    return out


def cells(name: str, found: list[dict[str, float]], size: float) -> list[str]:
    """A row of the table."""

    def both(key: str, form: str = ".3f") -> str:
        values = [one[key] for one in found if key in one]
        return f"{statistics.median(values):{form}} / {max(values):{form}}" if values else ""

    copies = statistics.median(one["copies"] for one in found)
    return [
        name,
        both("before"),
        both("T"),
        both("nodes"),
        both("copies", ".0f"),
        f"{sum(one['fewer'] for one in found)} of {sum(one['copies'] for one in found)}",
        both("sent", ".0f"),
        f"{copies * size / 1000:.1f}",
        both("ultraep"),
        both("ultraep_copies", ".0f"),
        both("for_lp"),
    ]


HEADER = ["median / worst", "residents", "guests: T", "nodes", "copies", "fewer", "of a rank", "GB"]
HEADER += ["UltraEP: T", "copies", "for_lp, D = 2"]


def on_recordings(args: argparse.Namespace) -> None:
    """Prints a table for each pair of loads."""
    with multiprocessing.get_context("forkserver").Pool(args.processes) as pool:
        for earlier_path, earlier_key, live_path, live_key in args.pair:
            (earlier,) = read(earlier_path, earlier_key, None)
            batches = read(live_path, live_key, args.batch)
            pairs = [p for live in batches for p in zip(earlier, live, strict=True)][:: args.every]
            rows = []
            for (ranks, replicas, guests), nodes in itertools.product(SHAPES, (None, 8)):
                node = nodes or ranks
                if pairs[0][1].size < 2 * ranks or (nodes and ranks <= nodes):
                    continue
                for is_placed in (True,) if replicas else (False, True):
                    call = partial(
                        layer,
                        num_ranks=ranks,
                        replicas=replicas,
                        num_guests=guests,
                        node_size=node,
                        is_placed=is_placed,
                        least=args.least,
                        with_lp=args.for_lp and replicas == 1 and not nodes,
                    )
                    where = "placed" if is_placed else "in order"
                    name = f"EP{ranks}, D {replicas}, G {guests}, {where}"
                    name += f", nodes of {nodes}" if nodes else ""
                    rows.append(cells(name, pool.map(call, pairs, chunksize=4), args.megabytes))
            title = f"{Path(earlier_path).name} {earlier_key} → {Path(live_path).name} {live_key}"
            print(f"{title}: {len(pairs)} loads\n{text_table(HEADER, rows)}\n", flush=True)


def by_cost(
    pair: tuple[np.ndarray, np.ndarray],
    num_ranks: int,
    num_guests: int,
    is_placed: bool,
    tokens: int,
) -> tuple[float, int, float]:
    """Of a batch drawn from a layer's load: the largest rank's cost with guests, and their number.

    The cost is over that at home, and so is the third value, of a plan by `tokens`.
    """
    torch.set_num_threads(1)
    earlier, live = pair
    shape = {"num_ranks": num_ranks, "num_guests_per_rank": num_guests}
    if is_placed:
        placement = Placement.from_history(earlier + 1e-3, num_redundant_per_rank=0, **shape)
    else:
        placement = Placement.homes_only(len(live), **shape)
    rng = np.random.default_rng(int(live.sum()))
    load = rng.multinomial(8 * tokens * num_ranks, live / live.sum()).astype(np.int64)
    problem = Problem(objective="cost").checked(placement)
    plan = plan_by_cost(load, placement, problem)

    def cost(guests: np.ndarray, quota: np.ndarray) -> int:
        waits = push_waits(guests, placement, problem)
        return int(rank_costs(quota, placement.with_guests(guests), problem, waits).max())

    home = np.zeros_like(plan.quota)
    home[:, 0] = load
    none = cost(np.full_like(plan.guests, -1), home)
    usual = choose_guests(load, placement, problem)
    optimum = reference.solve(torch.from_numpy(load), placement.with_guests(usual)).quota.numpy()
    number = int((plan.guests >= 0).sum())
    return cost(*plan) / none, number, cost(usual, optimum) / none


def costs_on_recordings(args: argparse.Namespace) -> None:
    """Prints what plans by cost reach with guests, and plans by tokens; means over layers."""
    with multiprocessing.get_context("forkserver").Pool(args.processes) as pool:
        for earlier_path, earlier_key, live_path, live_key in args.pair:
            (earlier,), (live,) = (
                read(earlier_path, earlier_key, None),
                read(live_path, live_key, None),
            )
            pairs = [*zip(earlier, live, strict=True)][:: args.every]
            rows = []
            for ranks, guests, is_placed in COST_SHAPES:
                row = [f"EP{ranks}, {'placed' if is_placed else 'in order'}, G {guests}"]
                for tokens in COST_TOKENS:
                    of = {"num_ranks": ranks, "num_guests": guests, "is_placed": is_placed}
                    found = np.array(pool.map(partial(by_cost, tokens=tokens, **of), pairs))
                    mean = found.mean(axis=0)
                    row.append(f"{mean[0]:.3f} ({mean[1]:.1f}) {mean[2]:.3f}")
                rows.append(row)
            print(f"{len(pairs)} layers: by cost (guests), by tokens; without guests = 1")
            print(text_table(["tokens a rank", *map(str, COST_TOKENS)], rows), flush=True)


def drifted(seed: int, num_experts: int, correlation: float) -> tuple[np.ndarray, np.ndarray]:
    """An earlier and a live load [E] as uneven as DeepSeek-V3's."""
    rng = np.random.default_rng([13, seed])
    first, change = (
        rng.normal(0, 0.6, num_experts) + np.repeat(rng.normal(0, 0.33, num_experts // 32), 32)
        for _ in range(2)
    )
    now = np.exp(correlation * first + np.sqrt(1 - correlation**2) * change)
    return np.exp(first), rng.multinomial(2**24, now / now.sum())


def simulate(processes: int) -> None:
    """Prints EP128 to EP2048 by domains: what guests reach in each, and between domains."""
    rows = []
    with multiprocessing.get_context("forkserver").Pool(processes) as pool:
        for ranks, node, (where, correlation) in itertools.product(
            (128, 512, 2048),
            (8, 64),
            (("in order", 0.94), ("placed", 0.94), ("over nodes", 0.94), ("over nodes", 0.8)),
        ):
            experts = max(256, 2 * ranks)
            call = partial(
                layer,
                num_ranks=ranks,
                replicas=0,
                num_guests=1,
                node_size=node,
                is_placed=where != "in order" and where,
                with_peer=False,
            )
            pairs = [drifted(seed, experts, correlation) for seed in range(2 if ranks > 512 else 6)]
            name = f"EP{ranks}, E {experts}, in {node}, {where}, {correlation:g}"
            rows.append(cells(name, pool.map(call, pairs, chunksize=1), 88)[:8])
    print(text_table(HEADER[:8], rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--milp", type=int, metavar="N", help="small instances against HiGHS")
    parser.add_argument("--pair", nargs=4, action="append", default=[], help="earlier, live")
    parser.add_argument("--batch", type=int, help="tokens of a live batch, for picks")
    parser.add_argument("--least", type=int, default=1, help="tokens that a guest is chosen for")
    parser.add_argument("--every", type=int, default=1, help="take every n-th load")
    parser.add_argument("--for-lp", action="store_true", help="static copies, too; slow")
    parser.add_argument("--by-cost", action="store_true", help="plans by cost of pairs of counts")
    parser.add_argument("--simulate", action="store_true", help="many ranks by domains")
    parser.add_argument("--megabytes", type=float, default=88, help="of an expert")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.milp:
        against_milp(args.milp, args.processes)
    if args.pair:
        (costs_on_recordings if args.by_cost else on_recordings)(args)
    if args.simulate:
        simulate(args.processes)


if __name__ == "__main__":
    main()
