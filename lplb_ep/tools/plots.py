"""Pictures of replays, timelines, training runs and placements, as PNG, SVG or PDF."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import MissingPackageError
from ..placement.table import Placement
from ..planning.solve import solve
from .replay import LABELS, Replay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .timeline import Timeline

# Okabe and Ito's colours: distinct with every common colour blindness and in grey.
_COLOURS = {
    "in_order": "#999999",
    "home": "#D55E00",
    "even": "#56B4E9",
    "residents": "#E69F00",
    "lp": "#0072B2",
    "reused": "#CC79A7",
}
_LEGEND = {"frameon": False, "fontsize": 9, "columnspacing": 1.3, "handlelength": 1.5}


def plot_replay(
    path: str | os.PathLike[str],
    result: Replay,
    *,
    by_batch: bool = False,
    title: str = "",
    footnote: str = "",
) -> None:
    """Draws the imbalance of each layer: experts in order, home slots, even split, LP, ideal.

    With guests, the LP without them as well, and the copies that they move. Where quotas are
    reused, that too.

    Args:
        path: the picture to write: .png, .svg or .pdf.
        result: what to draw; means over batches as lines, their range as a shade.
        by_batch: whether to draw each batch instead; means and ranges are over the layers.
        title: headline.
        footnote: a small line at the foot: where the numbers come from.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OSError: the file cannot be written.
    """

    def draw(figure: Figure) -> None:
        has_guests = result.guests is not None
        rows = figure.subplots(2 if has_guests else 1, sharex=True, squeeze=False)[:, 0]
        axes, last = rows[0], rows[-1]
        numbers = range(len(result.home)) if by_batch else result.layers
        place = np.arange(len(numbers))

        idle = result.is_idle.numpy()

        def values_of(column: torch.Tensor) -> npt.NDArray[Any]:
            values = np.ma.array(column.numpy(), mask=idle)
            return values.T if by_batch else values

        names = {"in_order": "", "home": "o", "even": "s", "residents": "^", "lp": "o"}
        names["reused"] = "v"
        drawn = []
        for name, marker in names.items():
            if getattr(result, name) is not None:
                values = values_of(getattr(result, name))
                label = f"{LABELS[name]} (median {np.ma.median(values):.2f})"
                look = {"color": _COLOURS[name], "marker": marker, "label": label}
                drawn += _draw_range(axes, place, values, look)
        if result.guests is not None:
            _draw_range(last, place, values_of(result.guests), {"color": _COLOURS["lp"]})
            last.set_ylabel("copies moved in a layer")
            last.set_ylim(bottom=0)
            _finish(last)
        axes.axhline(1, color="0.35", lw=1, ls=(0, (4, 3)), zorder=1)
        axes.text(
            1.005, 1, "ideal", transform=axes.get_yaxis_transform(), va="center", color="0.35"
        )
        shown = place[:: max(1, len(place) // 16)]
        last.set_xticks(shown, [str(numbers[i]) for i in shown])
        last.set_xlim(-0.8, len(place) - 0.2)
        what, others = ("batch", "layers") if by_batch else ("MoE layer", "batches")
        note = f"   (mean and range of {len(values)} {others})" if len(values) > 1 else ""
        last.set_xlabel(f"{what}{note}")
        axes.set_ylabel("imbalance: max / mean rank load")
        _finish(axes)
        # Above the axes, clear of the data.
        axes.legend(
            handles=drawn,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3 if has_guests else 4,
            **_LEGEND,
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(footnote, x=0.01, ha="left", fontsize=7.5, color="0.45")

    _save_picture(path, (9, 4.2 if result.guests is None else 6.4), draw)


def _draw_range(
    axes: Axes, place: npt.NDArray[Any], values: npt.NDArray[Any], look: Mapping[str, Any]
) -> list[Any]:
    """Draws means over the first dimension as a line, and the range as a shade."""
    drawn = axes.plot(place, values.mean(0), ms=4, lw=1.4, **look)
    if len(values) > 1:
        low, high = values.min(0), values.max(0)
        axes.fill_between(place, low, high, color=look["color"], alpha=0.15, lw=0)
    return drawn


def plot_training(
    path: str | os.PathLike[str],
    *,
    rank_load_before: torch.Tensor,
    rank_load_after: torch.Tensor,
    lower_bound: torch.Tensor,
    step: int | None = None,
    title: str = "",
    step_label: str = "training step",
    marks: Mapping[int, str] | None = None,
    plan_label: str = "LP (tokens split over replicas)",
    others: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Draws a training run: the ranks' loads at one step, and the imbalance over all steps.

    Args:
        path: the picture to write: .png, .svg or .pdf.
        rank_load_before: [S, R] numbers, tokens of each rank with every token at its home slot.
        rank_load_after: [S, R] numbers, tokens of each rank by the plan.
        lower_bound: [S] numbers, T* in tokens.
        step: the step whose loads are drawn, in [0, S); by default the most unbalanced one.
        title: headline.
        step_label: what a step is.
        marks: what happened before a step, by its number; drawn as a line with a text.
        plan_label: what the plan split tokens over.
        others: [S] numbers by label, T* in tokens of the same steps with other copies.

    Raises:
        ValueError: shapes that do not fit, or no such step.
        MissingPackageError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    before, after = rank_load_before.double().numpy(), rank_load_after.double().numpy()
    bound = lower_bound.double().numpy()
    if before.ndim != 2 or after.shape != before.shape or bound.shape != before.shape[:1]:
        raise ValueError(
            "rank_load_before, rank_load_after and lower_bound must have shapes [S, R], [S, R], "
            f"[S]; got {list(before.shape)}, {list(after.shape)}, {list(bound.shape)}"
        )
    num_steps, num_ranks = before.shape
    mean = before.mean(1)
    ratio = {"home": before.max(1) / mean, "lp": after.max(1) / mean, "bound": bound / mean}
    chosen = int(np.argmax(ratio["home"])) if step is None else step
    if not 0 <= chosen < num_steps:
        raise ValueError(f"step must be in [0, {num_steps}); got {step}")

    def draw(figure: Figure) -> None:
        bars, lines = figure.subplots(1, 2, width_ratios=(1, 1.25))
        ranks = np.arange(num_ranks)
        bars.bar(ranks - 0.2, before[chosen], 0.4, color=_COLOURS["home"])
        bars.bar(ranks + 0.2, after[chosen], 0.4, color=_COLOURS["lp"])
        bars.axhline(mean[chosen], color="0.35", lw=1, ls=(0, (4, 3)))
        bars.axhline(bound[chosen], color="black", lw=1, ls=":")
        which = ", the most unbalanced at home" if step is None else ""
        bars.set_title(f"Rank loads at {step_label} {chosen}{which}", loc="left", fontsize=10)
        bars.set_xticks(ranks[:: max(1, num_ranks // 16)])
        bars.set_xlabel("rank")
        bars.set_ylabel("rank load: tokens")
        bars.yaxis.set_major_formatter("{x:,.0f}")

        ratios = {label: loads.double().numpy() / mean for label, loads in (others or {}).items()}
        drawn = _draw_steps(lines, ratio, plan_label, ratios)
        drawn.append(
            lines.axhline(
                1, color="0.35", lw=1, ls=(0, (4, 3)), zorder=1, label="mean (perfect balance)"
            )
        )
        lines.axvline(chosen, color="0.87", lw=5, zorder=0)
        _mark(lines, marks or {})
        lines.set_title(f"Imbalance at every {step_label}", loc="left", fontsize=10)
        lines.xaxis.get_major_locator().set_params(integer=True)
        lines.set_xlabel(step_label)
        lines.set_ylabel("imbalance: max / mean rank load")
        for axes in (bars, lines):
            _finish(axes)
        figure.legend(handles=drawn, loc="outside lower left", ncols=4, **_LEGEND)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")

    _save_picture(path, (10.5, 4.4), draw)


def _draw_steps(
    axes: Axes,
    ratio: Mapping[str, npt.NDArray[Any]],
    plan_label: str,
    others: Mapping[str, npt.NDArray[Any]],
) -> list[Any]:
    """Draws the imbalance of each step: at home, with other copies, by the plan, and its bound."""
    steps = np.arange(len(ratio["home"]))
    marker: dict[str, Any] = {"marker": "o", "ms": 3.5} if len(steps) <= 60 else {}
    thin, thick = {**marker, "lw": 1.5}, {**marker, "lw": 2.5}
    found = [("home", "home slots (all tokens at home)", ratio["home"], thin)]
    found += [("residents", label, values, thin) for label, values in others.items()]
    found.append(("lp", plan_label, ratio["lp"], thick))
    bound: dict[str, Any] = {"lw": 1, "ls": ":"}
    found.append(("bound", "lower bound T* (no plan is below)", ratio["bound"], bound))
    drawn = []
    for name, label, values, look in found:
        drawn += axes.plot(steps, values, color=_COLOURS.get(name, "black"), label=label, **look)
    return drawn


def plot_runs(
    path: str | os.PathLike[str],
    *,
    losses: Mapping[str, torch.Tensor],
    imbalances: Mapping[str, torch.Tensor],
    tokens_a_second: Mapping[str, float],
    title: str = "",
) -> None:
    """Draws training runs beside one another: losses, imbalance at every step, and speed.

    Args:
        path: the picture to write: .png, .svg or .pdf.
        losses: [S] by the runs' names, at most ten.
        imbalances: [S] by the same names: largest / mean rank load.
        tokens_a_second: by the same names.
        title: headline.

    Raises:
        ValueError: the names differ.
        MissingPackageError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    names = [*losses]
    if names != [*imbalances] or names != [*tokens_a_second]:
        raise ValueError(
            f"losses, imbalances and tokens_a_second must have the same names; got {names}, "
            f"{[*imbalances]}, {[*tokens_a_second]}"
        )

    def draw(figure: Figure) -> None:
        parts = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 0.9))
        colours = [f"C{number}" for number in range(len(names))]
        drawn = []
        for axes, values, what in (
            (parts[0], losses, "loss"),
            (parts[1], imbalances, "imbalance: max / mean rank load"),
        ):
            drawn = [
                axes.plot(values[name].double().numpy(), color=colour, lw=1.1, label=name)[0]
                for name, colour in zip(names, colours, strict=True)
            ]
            axes.set_xlabel("training step")
            axes.set_ylabel(what)
        parts[1].axhline(1, color="0.35", lw=1, ls=(0, (4, 3)), zorder=1)
        speeds = [tokens_a_second[name] for name in names]
        parts[2].bar(range(len(names)), speeds, color=colours)
        parts[2].set_xticks([])
        parts[2].set_ylabel("tokens a second")
        parts[2].yaxis.set_major_formatter("{x:,.0f}")
        for axes in parts:
            _finish(axes)
        figure.legend(handles=drawn, loc="outside lower left", ncols=5, **_LEGEND)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")

    _save_picture(path, (12, 4.2), draw)


def plot_placement(
    path: str | os.PathLike[str], placement: Placement, load: torch.Tensor, *, title: str = ""
) -> None:
    """Draws the replica graph, and the ranks' loads at home slots and by the linear program.

    Ranks stand on a circle, joined where they hold copies of one expert. A thicker line is more
    load that may go either way. A larger and darker rank has more load at its home slots.

    Args:
        path: the picture to write: .png, .svg or .pdf.
        placement: the copies.
        load: [E] integers, tokens of each expert.
        title: headline.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    R, weight = placement.num_ranks, load.double().numpy()
    home = np.bincount(placement.home_rank, weight, R)
    plan = solve(load, placement).rank_load.numpy()
    mean = max(weight.sum() / placement.active_ranks.size, 1e-9)
    shared = np.zeros((R, R))
    for expert, ranks in enumerate(placement.copy_rank):
        held = ranks[ranks >= 0]
        shared[np.ix_(held, held)] += weight[expert]

    def draw(figure: Figure) -> None:
        circle, bars = figure.subplots(1, 2, width_ratios=(1, 1.2))
        # Between two nodes the place of one rank stays empty.
        place = np.arange(R) + (placement.node if placement.node.any() else 0)
        angle = np.pi / 2 - 2 * np.pi * place / (place[-1] + 1 + placement.node.any())
        x, y = np.cos(angle), np.sin(angle)
        for one, two in zip(*np.nonzero(np.triu(shared, 1)), strict=True):
            width = 0.3 + 3 * shared[one, two] / shared[np.triu_indices(R, 1)].max()
            across = placement.node[one] != placement.node[two]
            colour = _COLOURS["home"] if across else _COLOURS["lp"]
            # Bent inwards: a chord between neighbours would hide behind those in between.
            t = np.linspace(0, 1, 24)
            bend = (1 - t) ** 2 + 0.8 * t * (1 - t), t**2 + 0.8 * t * (1 - t)
            line = [bend[0] * at[one] + bend[1] * at[two] for at in (x, y)]
            circle.plot(*line, lw=width, color=colour, alpha=0.5, zorder=1)
        size = (40 + 160 * np.minimum(home / mean, 2)) * min(1, 24 / R)
        circle.scatter(
            x, y, s=size, c=home / mean, cmap="Greys", vmin=0, vmax=2, ec="0.3", zorder=2
        )
        for rank in range(R):
            beside = (1.14 * x[rank], 1.14 * y[rank])
            circle.annotate(str(rank), beside, ha="center", va="center", fontsize=8, color="0.35")
        circle.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        circle.axis("off")
        across = ", orange: between nodes" if placement.node.any() else ""
        circle.set_title(
            f"Ranks that share experts{across}\nThe darker, the more load at home",
            loc="left",
            fontsize=10,
        )
        for shift, values, name in ((-0.2, home, "home"), (0.2, plan, "lp")):
            label = f"{LABELS[name]} (max / mean {values.max() / mean:.3f})"
            bars.bar(np.arange(R) + shift, values, 0.4, color=_COLOURS[name], label=label)
        bars.axhline(mean, color="0.35", lw=1, ls=(0, (4, 3)), label="mean (perfect balance)")
        bars.set_xticks(np.arange(R)[:: max(1, R // 16)])
        bars.set_xlabel("rank")
        bars.set_ylabel("rank load: tokens")
        bars.yaxis.set_major_formatter("{x:,.0f}")
        _finish(bars)
        figure.legend(loc="outside lower right", ncols=3, **_LEGEND)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")

    _save_picture(path, (10.5, 4.8), draw)


def plot_timeline(
    path: str | os.PathLike[str], timeline: Timeline, *, title: str = "", footnote: str = ""
) -> None:
    """Draws the imbalance over time, with the moments of refresh, and the ranks' loads at the end.

    Args:
        path: the picture to write: .png, .svg or .pdf.
        timeline: what to draw. The loads are of the last batch, in the layer that is the most
            unbalanced there on the placement that was kept.
        title: headline.
        footnote: a small line at the foot.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    imbalance = timeline.imbalance()
    chosen = int(imbalance["kept"][-1].nan_to_num().argmax())
    looks = {
        "kept": (_COLOURS["home"], "placements kept"),
        "refreshed": (_COLOURS["lp"], "refreshed"),
    }

    def draw(figure: Figure) -> None:
        bars, lines = figure.subplots(1, 2, width_ratios=(1, 1.9))
        ranks = np.arange(timeline.kept.shape[2])
        for shift, (name, (colour, _)) in zip((-0.2, 0.2), looks.items(), strict=True):
            load = getattr(timeline, name)[-1, chosen].numpy()
            bars.bar(ranks + shift, load, 0.4, color=colour)
        mean = load.sum() / timeline.num_active_ranks[chosen]
        bars.axhline(mean, color="0.35", lw=1, ls=(0, (4, 3)))
        layer = timeline.layers[chosen]
        bars.set_title(f"Rank loads of layer {layer}, last batch", loc="left", fontsize=10)
        bars.set_xticks(ranks[:: max(1, len(ranks) // 8)])
        bars.set_xlabel("rank")
        bars.set_ylabel("rank load: tokens")
        bars.yaxis.set_major_formatter("{x:,.0f}")

        steps, drawn = np.arange(len(timeline.kept)), []
        for name, (colour, label) in looks.items():
            values = np.ma.masked_invalid(imbalance[name].numpy())
            drawn += lines.plot(
                steps,
                np.ma.median(values, axis=1),
                color=colour,
                lw=2,
                label=f"LP, {label}: median layer",
            )
            drawn += lines.plot(
                steps, values.max(1), color=colour, lw=1, ls=":", label="its worst layer"
            )
        lines.axhline(1, color="0.35", lw=1, ls=(0, (4, 3)), zorder=1)
        for batch in sorted({move.batch for move in timeline.moves}):
            lines.axvline(batch - 0.5, color=_COLOURS["even"], lw=1, zorder=0)
        _mark(lines, {start: name.split(": ")[-1] for name, start in timeline.workloads})
        moved = sum(move.num_copies for move in timeline.moves)
        lines.set_title(
            f"Imbalance of every batch; refreshes (light blue) move {moved:,} replicas in all",
            loc="left",
            fontsize=10,
        )
        lines.xaxis.get_major_locator().set_params(integer=True)
        lines.set_xlabel("batch")
        lines.set_ylabel("imbalance: max / mean rank load")
        for axes in (bars, lines):
            _finish(axes)
        lines.legend(handles=drawn, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2, **_LEGEND)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(footnote, x=0.01, ha="left", fontsize=7.5, color="0.45")

    _save_picture(path, (11.5, 4.6), draw)


def _mark(axes: Axes, marks: Mapping[int, str]) -> None:
    """A line before each of these steps, with its text."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + (0.12 * (high - low) if marks else 0))  # space for the texts
    for number, text in marks.items():
        axes.axvline(number - 0.5, color="0.35", lw=1, zorder=0)
        axes.annotate(
            f" {text}",
            (number - 0.5, 0.98),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=9,
            color="0.35",
        )


def _finish(axes: Axes) -> None:
    """The look that all pictures share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", lw=0.8)
    axes.set_axisbelow(True)


def _save_picture(
    path: str | os.PathLike[str], inches: tuple[float, float], draw: Callable[[Figure], None]
) -> None:
    """Writes a figure.

    Args:
        path: the file, of the kind that the end of its name says; without one a PNG.
        inches: width and height.
        draw: is given the empty figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "pictures need matplotlib: pip install '.[plot]' in a checkout of lplb_ep"
        ) from error
    figure = Figure(figsize=inches, dpi=160, layout="constrained", facecolor="white")
    draw(figure)
    figure.savefig(path, format=Path(path).suffix[1:].lower() or "png")
