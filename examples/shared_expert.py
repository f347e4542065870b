"""A shared expert as ballast: an expert with a copy on every rank, whose tokens may move.

    python examples/shared_expert.py [--recording FILE --key KEY] [--ranks 8 32] [--tokens 4096]

Models such as DeepSeek-V3 run one expert for every token beside those that the router picks. Each
rank has its weights, and runs it for its own tokens. So a rank with hot experts does that work on
top. Here it is one more expert, which every token picks, with a copy on every rank. Each copy takes
tokens of its own rank first, so only those move that balance the rest.

There are no other copies. One table has the rows of the fullest rank over the mean. The other has
what the slowest rank's experts take by the cost model of an H200. Both have the median and the
worst layer. Without a recording loads are as skewed as recorded ones. What the recipe is made of
are two functions, `with_shared_expert` and `with_shared_pick`.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from lplb_ep import Placement, Problem, solve
from lplb_ep.planning.values import rank_costs
from lplb_ep.tools.recordings import load_recording
from lplb_ep.tools.tables import text_table


def with_shared_expert(num_experts: int, num_ranks: int) -> Placement:
    """Experts in order, and behind those of each rank a copy of the shared one, expert E."""
    routed = np.arange(num_experts).reshape(num_ranks, -1)
    shared = np.full((num_ranks, 1), num_experts)
    return Placement(np.concatenate([routed, shared], axis=1).ravel(), num_ranks)


def with_shared_pick(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's picks [T, K] and their weights, and one more for the shared expert: [T, K + 1].

    Its weight is 1, for its output is added as it is.
    """
    shared = torch.full_like(topk_idx[:, :1], num_experts)
    one = torch.ones_like(topk_weights[:, :1])
    return torch.cat([topk_idx, shared], dim=1), torch.cat([topk_weights, one], dim=1)


def compare(load: np.ndarray, num_ranks: int, num_tokens: int) -> tuple[list[float], list[float]]:
    """A layer without the shared expert, where its tokens stay, and with it as ballast.

    Args:
        load: [E] tokens of each routed expert, of all ranks.
        num_ranks: R.
        num_tokens: of a rank, which all have.

    Returns:
        Of each way the fullest rank over the mean, and the milliseconds of the slowest rank.
    """
    num_experts, stays = len(load), torch.full((num_ranks,), num_tokens)
    homes = Placement.homes_only(num_experts, num_ranks)
    whole = np.append(load, num_ranks * num_tokens)
    ways = (
        (load, homes, None),
        (load, homes, stays),
        (whole, with_shared_expert(num_experts, num_ranks), None),
    )
    imbalances, times = [], []
    for tokens, placement, base in ways:
        solution = solve(torch.from_numpy(tokens), placement, base_load=base)
        total = tokens.sum() + (0 if base is None else base.sum().item())
        imbalances.append(float(solution.reached) * num_ranks / total)
        problem = Problem(objective="cost", base_load=base)
        times.append(1e-6 * float(rank_costs(solution.quota.numpy(), placement, problem).max()))
    return imbalances, times


def drawn_loads(rng: np.random.Generator, num_layers: int, num_experts: int) -> np.ndarray:
    """[L, E] loads as skewed as recorded ones, in order."""
    own = rng.lognormal(0, 0.6, (num_layers, num_experts))
    return own * np.repeat(rng.lognormal(0, 0.33, (num_layers, num_experts // 32)), 32, axis=1)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recording", metavar="FILE", help="of counts; else loads are drawn")
    parser.add_argument("--key", help="of an array of the recording")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank")
    parser.add_argument("--topk", type=int, default=8)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = drawn_loads(rng, 20, 256)
    if args.recording:
        weights = np.asarray(load_recording(args.recording, key=args.key).counts.sum(0))
    tables: tuple[list[list[str]], list[list[str]]] = [], []
    for num_ranks in args.ranks:
        picks = num_ranks * args.tokens * args.topk
        shares = weights / weights.sum(1, keepdims=True)
        layers = [compare(rng.multinomial(picks, one), num_ranks, args.tokens) for one in shares]
        for table, of_layers in zip(tables, zip(*layers, strict=True), strict=True):
            ways = zip(*of_layers, strict=True)
            cells = [f"{np.median(one):.3f} / {max(one):.3f}" for one in ways]
            table.append([f"EP{num_ranks}", *cells])
    for what, table in zip(("fullest rank / mean", "ms by the cost model"), tables, strict=True):
        print(text_table([what, "routed alone", "shared stays", "as ballast"], table) + "\n")


if __name__ == "__main__":
    main()
