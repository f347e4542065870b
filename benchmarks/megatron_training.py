"""Training of Megatron-Core with guests, beside plain, replicas and routing that is forced even.

    torchrun --nproc-per-node 2 benchmarks/megatron_training.py
        [--json FILE] [--markdown FILE] [--picture FILE]
    python benchmarks/megatron_training.py --tiny    # small, on the CPU

Each run is `MODE:SEED` of `--runs`. All are of the model of `examples/megatron_gpt.py`, one after
another in the same processes, without a balancing loss. Runs with the same seed have the same
weights and data. The other seed of plain shows how far losses differ by chance.

- plain: Megatron-Core alone.
- guests: homes in the router's order, guest slots by the batch.
- replicas: static copies, placed by the loads of the first plain run with this seed.
- forced: routers that pick at random, evenly (`moe_router_force_load_balancing`).

Tokens a second are by the median step behind the first tenth, of the slowest rank. A run's share of
the gain is (its tokens a second - plain's) / (forced - plain). Losses of two runs are compared by
the mean of the absolute differences over all steps, and over the last half.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from megatron_gpt import MODES, Record, add_options, launch, prepared, run, tokens_a_second

from lplb_ep.tools.plots import plot_runs

# Of a GPU with 80 GB: the experts' GEMMs take most of a step.
SIZES = dict(
    layers=3,
    hidden=2048,
    ffn=6144,
    experts=8,
    sequence=512,
    sequences=16,
    steps=300,
    lr=3e-4,
    guests=2,
)
TINY = dict(ranks=2, layers=2, hidden=128, ffn=128, sequence=64, sequences=4, steps=12)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training of Megatron-Core, with guests and not.")
    add_options(parser)
    parser.add_argument(
        "--runs", nargs="+", default=["plain:0", "plain:1", "guests:0", "replicas:0", "forced:0"]
    )
    parser.add_argument("--tiny", action="store_true", help="sizes for the CPU")
    for name in ("json", "markdown", "picture"):
        parser.add_argument(f"--{name}", metavar="FILE")
    tiny = "--tiny" in sys.argv
    parser.set_defaults(**{**SIZES, **(TINY if tiny else {})})
    args = parser.parse_args()
    for spec in args.runs:
        mode, _, seed = spec.partition(":")
        if mode not in MODES or not seed.isdigit():
            parser.error(f"--runs takes MODE:SEED, modes {', '.join(MODES)}; got {spec}")
    return args


def measure(rank: int, args: argparse.Namespace, port: int | None) -> None:
    """One rank's program."""
    rendezvous = {}
    if port is not None:
        store = dist.TCPStore("127.0.0.1", port)
        rendezvous = {"store": store, "rank": rank, "world_size": args.ranks}
    with prepared(args, **rendezvous):
        records: dict[str, Record] = {}
        for spec in args.runs:
            mode, _, seed = spec.partition(":")
            plain = next((r for n, r in records.items() if n == f"plain:{seed}"), None)
            records[spec] = run(args, mode, int(seed), None if plain is None else plain.loads)
            if dist.get_rank() == 0:  # at once: a later run may fail
                report(args, records)


def report(args: argparse.Namespace, records: dict[str, Record]) -> None:
    """Prints the table so far, and writes the files."""
    table = table_of(args, records)
    print(table, flush=True)
    if args.markdown:
        Path(args.markdown).write_text(f"{conditions(args)}\n\n{table}\n")
    if args.json:
        Path(args.json).write_text(json.dumps(as_json(args, records)))
    if args.picture:
        plot_runs(
            args.picture,
            losses={name: record.losses for name, record in records.items()},
            imbalances={name: record.imbalance for name, record in records.items()},
            tokens_a_second={n: tokens_a_second(args, record) for n, record in records.items()},
            title=f"Megatron-Core, {args.experts} experts on {args.ranks} ranks",
        )


def conditions(args: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    version = importlib.metadata.version("megatron-core")
    return (
        f"{args.ranks} ranks on {device}, Megatron-Core {version}"
        f", torch {torch.__version__}. {args.layers} MoE layers of {args.experts} experts, top-"
        f"{args.topk}, width {args.hidden} and {args.ffn}, {args.dtype}. {args.micro_batches} x "
        f"{args.sequences} sequences of {args.sequence} a rank and step. Routers' skew "
        f"{args.skew}, {args.steps} steps"
    )


def table_of(args: argparse.Namespace, records: dict[str, Record]) -> str:
    rows = [
        "| run | tokens a second | of forced's gain | imbalance, mean (first / last tenth) | "
        "memory | last loss | difference from plain's losses, all / last half |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    tenth = max(1, args.steps // 10)
    for name, record in records.items():
        seed = name.partition(":")[2]
        base, even = (records.get(f"{mode}:{seed}") for mode in ("plain", "forced"))
        plain = records.get(f"plain:{seed}" if not name.startswith("plain") else "plain:0")
        speed, share, away = tokens_a_second(args, record), "", ""
        is_timed = args.device.type == "cuda"  # ranks share the CPU's cores: nobody waits for one
        if is_timed and base is not None and even is not None and record not in (base, even):
            slow, fast = tokens_a_second(args, base), tokens_a_second(args, even)
            share = f"{(speed - slow) / (fast - slow):.0%}" if fast > slow else "none to gain"
        if plain is not None and record is not plain:
            difference = (record.losses - plain.losses).abs()
            away = f"{difference.mean():.4f} / {difference[args.steps // 2 :].mean():.4f}"
        ratio = record.imbalance
        rows.append(
            f"| {name} | {speed:,.0f} | {share} | {ratio.mean():.3f} ({ratio[:tenth].mean():.3f} / "
            f"{ratio[-tenth:].mean():.3f}) | {record.memory_bytes / 2**30:.2f} GiB | "
            f"{record.losses[-tenth:].mean():.4f} | {away} |"
        )
    return "\n".join(rows)


def as_json(args: argparse.Namespace, records: dict[str, Record]) -> dict:
    return {
        "conditions": conditions(args),
        "command": sys.argv,
        "runs": {
            name: {
                "losses": record.losses.tolist(),
                "seconds": record.seconds.tolist(),
                "imbalance": record.imbalance.tolist(),
                "rows": record.rows.tolist(),
                "memory_bytes": record.memory_bytes,
                "tokens_a_second": tokens_a_second(args, record),
                "report": record.report,
            }
            for name, record in records.items()
        },
    }


if __name__ == "__main__":
    launch(measure, parse())
