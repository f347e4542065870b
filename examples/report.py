"""What the example measures, checks and shows. Nothing of it is needed to integrate lplb_ep."""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
import torch.distributed as dist

import lplb_ep
from lplb_ep.layer import layer_of
from lplb_ep.settings import has_part_of_gpu

if TYPE_CHECKING:
    from moe_layer import MoE, Trainer


STATIC = 2  # static copies a rank that guests are compared with

# How far a balanced step may be from the same step at home, relative to the loss and to the largest
# gradient. In bfloat16 each combine rounds a rank's result for a token to 8 bits, and again the sum
# over ranks. A balanced step groups the terms otherwise, so the two differ by up to `2**-7` of
# their terms. After two layers, forward and back, they differ by `2**-5` at worst. Errors of many
# tokens cancel, so the bound is lower. (Seen: 5e-4. Replicas with wrong weights: 0.1 to 0.3.)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 2**-8}


class Observer:
    """Watches one rank's training, step by step."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer) -> None:
        self.args, self.trainer, self.layers = args, trainer, trainer.layers
        self.placements = []  # [steps][layers]
        self.picks = []  # [steps] of [layers, E]: this rank's
        self.received = []  # [steps] of [layers]: this rank's
        self.checks = []  # (step, loss, loss at home, difference of gradients)
        self.compared, self.buffers = set(), []
        self.routing = contextlib.ExitStack()
        if args.balance == "both":
            self.compared = {0, args.steps // 2, args.steps - 1}
            with mock.patch.dict(os.environ, LPLB_EP="home"):
                self.buffers.append(trainer.make_buffer())
        self.draws = torch.Generator()
        taken = []
        if args.recorded is not None:
            taken = choose_as_recorded(args.recorded, self.layers, self.draws)
        if trainer.rank == 0:
            print(
                f"{trainer.num_ranks} ranks, {args.experts} experts, top-{args.topk}, "
                f"{args.guests} guest slots and {args.redundant} static copies a rank\n"
                f"{self.equipment()}",
                flush=True,
            )
            if taken:
                rows = ", ".join(map(str, taken))
                print(f"routing: loads {rows} of the recording's {len(args.recorded)} layers")
        self.start = time.perf_counter()

    def equipment(self) -> str:
        """What it runs on and with."""
        args, device = self.args, "CPU"
        if args.device.type == "cuda":
            device = torch.cuda.get_device_name(args.device)
            if args.shared:
                slow = "" if has_part_of_gpu() else ", slowly but for CUDA's multi-process service"
                device += f" (shared by ranks{slow})"
        channel = next(iter(layer_of(self.layers[0].placement).planners))
        plan = f"counts: {channel.counts}; solver: {channel.solver}"
        return (
            f"device: {device}; tokens: {str(args.dtype).removeprefix('torch.')}; "
            f"buffers: {args.library} ({args.because}); "
            f"{'nothing to plan' if args.balance == 'home' else plan}"
        )

    def before(self, step: int, tokens: torch.Tensor) -> None:
        """Collective, like the others."""
        seed = step * self.trainer.num_ranks + self.trainer.rank
        self.draws.manual_seed(seed)
        if step in self.compared:
            self.home_loss, self.home_gradients = self.at_home(tokens)
            self.draws.manual_seed(seed)  # both passes are routed alike
            if self.args.dtype == torch.bfloat16:
                # By their sums alone they are not: rounding tips near ties of a later router.
                for layer in self.layers:
                    routed = mock.patch.object(
                        layer, "choose", lambda _, picks=layer.topk_idx: picks
                    )
                    self.routing.enter_context(routed)

    def after(self, step: int, loss: float) -> None:
        self.routing.close()
        if step in self.compared:
            self.checks.append((step, loss, self.home_loss, self.difference()))
        self.placements.append([layer.placement for layer in self.layers])
        self.picks.append(torch.stack([layer.picks() for layer in self.layers]))
        self.received.append(torch.tensor([layer.received for layer in self.layers]))
        if self.trainer.rank == 0:
            progress(step + 1, self.args.steps, f"loss {loss:.3f}")

    # --- the check: the same step with every token at its home -----------------------------------

    def at_home(self, tokens: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        """The loss, and all gradients."""
        views = [layer.buffer for layer in self.layers]
        for layer in self.layers:
            layer.buffer = self.buffers[0].view(layer.placement)
        loss, gradients = self.trainer.gradients(tokens), self.logical_gradients()
        for layer, view in zip(self.layers, views, strict=True):
            layer.buffer = view
            layer.replicas.copy_weights()  # stale after reduce_gradients: a step should follow
        return loss, gradients

    def logical_gradients(self) -> list[torch.Tensor]:
        """Of every weight the model is made of: dense ones, and the experts whose home is here."""
        gradients = [p.grad.clone() for p in self.trainer.dense]
        for layer in self.layers:
            home = torch.tensor(layer.placement.home)
            here = home[home // layer.placement.num_local_slots == self.trainer.rank]
            local = here.long() % layer.placement.num_local_slots
            gradients += [p.grad[local].clone() for p in layer.experts.parameters()]
        return gradients

    def difference(self) -> float:
        """The largest difference from the gradients at home, over the largest gradient."""
        # A rank may be home to no expert, and then has no gradients of any.
        pairs = zip(self.logical_gradients(), self.home_gradients, strict=True)
        pairs = [(a, b) for a, b in pairs if len(b)]
        out = torch.tensor(
            [
                max(float((a - b).abs().max()) for a, b in pairs),
                max(float(b.abs().max()) for _, b in pairs),
            ],
            dtype=torch.float64,
        )
        dist.all_reduce(out, op=dist.ReduceOp.MAX, group=self.trainer.group)
        return float(out[0] / out[1])

    # --- the report ------------------------------------------------------------------------------

    def report(self) -> None:
        """Prints the tables and draws the picture, on rank 0; fails where the check does."""
        seconds = time.perf_counter() - self.start
        before, after, bound = self.loads()
        static = self.with_static_copies()
        alone_ms, exchanged_ms = plan_times(self.trainer)
        if self.trainer.rank:
            return
        self.print_imbalance(before, after, bound, static)
        times = [
            ["count, solve, split, rewrite", f"{alone_ms:.2f}"],
            [f"with the exchange, {self.trainer.num_ranks} ranks at once", f"{exchanged_ms:.2f}"],
        ]
        print_table("Plan of a batch on this machine, median", ["", "ms"], times)
        if self.checks:
            print_table(
                "Balanced against every token at home: the same step, twice",
                ["step", "loss, balanced", "loss, home", "gradients differ by"],
                [[str(s), f"{a:.9f}", f"{b:.9f}", f"{d:.1e}"] for s, a, b, d in self.checks],
            )
        tolerance = TOLERANCE[self.args.dtype]
        for step, balanced, home, difference in self.checks:
            if not (abs(balanced - home) <= tolerance * home and difference <= tolerance):
                sys.exit(f"step {step}: balanced and home differ by more than {tolerance}")
        self.draw(before, after, bound, static)
        print(f"\n{self.args.steps} steps in {seconds:.0f} s; picture: {self.args.out}")

    def loads(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rank loads at home and as they were [steps, layers, R], and T* [steps, layers]."""
        group = self.trainer.group
        picks, received = torch.stack(self.picks), torch.stack(self.received)
        dist.all_reduce(picks, group=group)  # [steps, layers, E]
        everyone = [torch.empty_like(received) for _ in range(group.size())]
        dist.all_gather(everyone, received, group=group)
        after = torch.stack(everyone, dim=-1)
        before, bound = torch.zeros_like(after), torch.zeros(after.shape[:2], dtype=torch.float64)
        for step, placements in enumerate(self.placements):
            for layer, placement in enumerate(placements):
                home_rank = torch.tensor(placement.home_rank).long()
                before[step, layer].index_add_(0, home_rank, picks[step, layer])
                if self.trainer.rank == 0:
                    bound[step, layer] = lplb_ep.solve(picks[step, layer], placement).lower_bound
        return before, after, bound

    def with_static_copies(self) -> torch.Tensor:
        """T* [steps, layers] of the same loads with static copies, placed once by load."""
        picks = torch.stack(self.picks)
        dist.all_reduce(picks, group=self.trainer.group)
        bound = torch.zeros(picks.shape[:2], dtype=torch.float64)
        if self.trainer.rank or not self.args.guests:
            return bound
        place_at, num_ranks = self.args.place_at, self.trainer.num_ranks
        shape = {"num_ranks": num_ranks, "num_redundant_per_rank": STATIC}
        for layer in range(len(self.layers)):
            seen = picks[:place_at, layer]
            even = lplb_ep.Placement.from_history(torch.ones_like(seen[0]), **shape)
            placed = lplb_ep.Placement.for_lp(seen, **shape, time_budget_s=2)
            for step, load in enumerate(picks[:, layer]):
                placement = even if step < place_at else placed
                bound[step, layer] = lplb_ep.solve(load, placement).lower_bound
        return bound

    def print_imbalance(self, before, after, bound, static) -> None:
        mean = after.double().mean(-1)
        columns = [before.amax(-1) / mean, after.amax(-1) / mean, bound / mean]
        header = ["home", "plan", "bound"]
        if self.args.guests:
            columns.append(static / mean)
            header.append(f"{STATIC} static")
        columns = torch.stack(columns, -1)
        place_at, shift_at = self.args.place_at, self.args.shift_at
        phases = {
            "at first": slice(0, place_at),
            "static copies placed": slice(place_at, shift_at),
            "another text": slice(max(place_at, shift_at), None),
        }
        rows = []
        for name, steps in phases.items():
            for layer in range(len(self.layers) if len(columns[steps]) else 0):
                numbers = [*columns[steps, layer].mean(0), *columns[steps, layer].amax(0)]
                rows.append([f"layer {layer}, {name}", *(f"{n:.3f}" for n in numbers)])
        print_table(
            f"Imbalance: max / mean rank load, mean and worst of the steps "
            f"(mode {self.args.balance})",
            ["", *header, *(f"worst {name}" for name in header)],
            rows,
        )
        print(
            "\nhome: every token at its expert's home slot; plan: what the ranks got; "
            "bound: no plan can have less\n"
            + (
                f"{STATIC} static: what {STATIC} static copies a rank instead of guests would have "
                f"at best, placed at step {place_at}"
                if self.args.guests
                else f"at first: before step {place_at} no load is known, and which experts have "
                "copies is arbitrary"
            )
        )

    def draw(self, before, after, bound, static) -> None:
        from lplb_ep.tools.plots import plot_training

        beside = {}
        if self.args.guests:
            label = f"at best with {STATIC} static copies a rank"
            beside = {
                "plan_label": "with guests (fetched for each batch)",
                "others": {label: static[:, -1]},
            }
        plot_training(
            self.args.out,
            rank_load_before=before[:, -1],
            rank_load_after=after[:, -1],
            lower_bound=bound[:, -1],
            title=f"The last of {len(self.layers)} MoE layers: {self.args.experts} experts on "
            f"{self.trainer.num_ranks} ranks, {self.args.guests} guest slots and "
            f"{self.args.redundant} static copies each",
            marks={
                self.args.place_at: "static copies placed",
                self.args.shift_at: "another text",
            },
            **beside,
        )


def choose_as_recorded(loads: torch.Tensor, layers: list[MoE], draws: torch.Generator) -> list[int]:
    """Lets recorded loads [L, E] choose in the routers' place: they weigh a token's K draws.

    Layers take loads at even distances, which it returns, for there are seldom as many.
    """
    taken = [number * len(loads) // len(layers) for number in range(len(layers))]
    for layer, load in zip(layers, loads[taken], strict=True):
        log_load = load.double().clamp(min=1e-3).log()

        def choose(scores, num_topk=layer.num_topk, log_load=log_load):
            noise = torch.rand(scores.shape, generator=draws, dtype=torch.float64)
            picks = (log_load - (-noise.log()).log()).topk(num_topk, dim=-1).indices  # Gumbel top-k
            return picks.to(scores.device)

        layer.choose = choose
    return taken


def plan_times(trainer: Trainer) -> tuple[float, float]:
    """Milliseconds of a plan: with the counts of all ranks at hand, and with their exchange."""
    layer, group = trainer.layers[-1], trainer.group
    exchanging = lplb_ep.Planner(layer.placement, group)
    given = lplb_ep.Planner(layer.placement, rank=group.rank(), counts="given")
    counts, alone = exchanging(layer.topk_idx).counts, 0.0
    if group.rank() == 0:  # while the others wait
        alone = median_ms(lambda: given(layer.topk_idx, counts=counts))
    dist.barrier(group)
    return alone, median_ms(lambda: exchanging(layer.topk_idx))


def median_ms(function, times: int = 21) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    from lplb_ep.tools.tables import text_table

    print(f"\n{title}\n\n{text_table(header, rows)}")


def writable_picture(parser: argparse.ArgumentParser, path: str | os.PathLike[str]) -> None:
    """Makes the folder of `--out`, before training. An obstacle ends the program with its name."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error.strerror}: {error.filename}")
    if Path(path).is_dir():
        parser.error(f"--out must be a file; {path} is a directory")


def progress(done: int, total: int, note: str) -> None:
    if sys.stdout.isatty() or done == total or done % max(1, total // 10) == 0:
        bar = "█" * (30 * done // total)
        end = "\r" if sys.stdout.isatty() and done < total else "\n"
        print(f"  {bar:░<30} {done:>4}/{total} steps  {note}", end=end, flush=True)
