"""Recordings of real routing, their replay on a placement, and the tables and pictures of it."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import MissingPackageError
from ..placement.table import Placement
from ..planning import reference as cpu
from ..planning.solve import MAX_TOTAL, rank_load, solve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYOUTS = {
    "counts": "[layers, experts] or [batches, layers, experts]",
    "layer-token": "[layers, tokens, k] expert ids",
    "token-layer": "[tokens, layers, k] expert ids (vLLM's routed_experts)",
}

# ------------------------------------------------------------------------------------ recordings


@dataclass(frozen=True)
class Recording:
    """How many tokens picked each expert, batch by batch."""

    counts: torch.Tensor
    """[N, L, E] int64: N batches, L layers, E logical experts."""
    layers: tuple[int, ...]
    """The L layers' numbers in the model. Layers that route nothing (dense ones) are left out."""
    source: str
    """Where the counts come from, in words."""

    @classmethod
    def of(
        cls, counts: torch.Tensor, source: str, *, layers: Sequence[int] | None = None
    ) -> Recording:
        """A recording of `counts` without its idle batches and layers.

        Args:
            counts: [L, E] or [N, L, E] whole numbers of at least 0, of any dtype.
            source: where they come from, in words.
            layers: the L layers' numbers; by default 0, 1, …

        Raises:
            ValueError: another shape, values that are not counts or too large for a solver, or
                nothing but zeros.
        """
        whole = counts.detach().cpu().long()
        if whole.ndim not in (2, 3) or not whole.numel():
            raise ValueError(
                f"{source}: counts must be {LAYOUTS['counts']}; got shape {list(counts.shape)}"
            )
        if (whole < 0).any() or (counts.is_floating_point() and not whole.equal(counts.cpu())):
            raise ValueError(f"{source}: counts must be whole numbers of at least 0")
        if (whole > MAX_TOTAL).any():  # sums could leave 64 bits
            raise ValueError(
                f"{source}: counts must be at most {MAX_TOTAL} each; got {int(whole.max())}"
            )
        whole = whole.reshape(-1, *whole.shape[-2:])
        numbers = torch.arange(whole.shape[1]) if layers is None else torch.tensor(layers)
        if numbers.shape != whole.shape[1:2]:
            raise ValueError(f"{source}: layers must have {whole.shape[1]} numbers")
        batch, layer = whole.sum((1, 2)) > 0, whole.sum((0, 2)) > 0
        if not batch.any():
            raise ValueError(f"{source}: all counts are 0")
        return cls(whole[batch][:, layer], tuple(numbers[layer].tolist()), source)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[2]

    @property
    def load(self) -> torch.Tensor:
        """[L, E] int64: each layer's load over all batches, what a placement can be learned on."""
        return self.counts.sum(0)


def save_recording(path: str | os.PathLike[str], recording: Recording) -> None:
    """Writes a recording for `load_recording`.

    Args:
        path: the file, its name ending in `.npz`.
        recording: what to write.

    Raises:
        ValueError: the name ends in something else.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"path must end in .npz; got {os.fspath(path)}")
    np.savez_compressed(
        path,
        lplb_ep_recording=1,
        counts=recording.counts.numpy(),
        layers=np.array(recording.layers),
        source=recording.source,
    )


def load_recording(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    layout: str | None = None,
    num_experts: int | None = None,
    tokens_per_batch: int | None = None,
) -> Recording:
    """Reads recorded routing.

    What can be read: files of `save_recording`; an array or tensor in `.npy`, `.npz` or `.pt`, of
    counts or of expert ids; SGLang's expert-distribution dumps, one file or a directory with one
    for each rank (`stat`, `stat_approx`: one `logical_count`; `per_pass`, `per_token`: records of
    physical counts, added up over the ranks). vLLM writes no file of loads; the `routed_experts`
    of its completions, which its server sends as base64 of a `.npy`, are ids in the layout
    `token-layer`.

    Args:
        path: the file or directory.
        key: which array of an `.npz` that holds several.
        layout: one of `LAYOUTS`. Two dimensions are counts; three need it, for they do not tell.
        num_experts: E, to check counts against; for ids the default is one more than the largest.
        tokens_per_batch: cuts ids into batches of so many tokens, in their order, and drops what
            is left over; by default all tokens are one batch.

    Returns:
        The recording, without idle batches and layers. In ids, a layer whose picks are all the
        same expert is idle too: vLLM fills the dense layers with zeros.

    Raises:
        ValueError: what the file holds is none of this; the message names the file, what it holds
            and what was expected.
        OSError: the file cannot be read.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    file = Path(path)
    if file.is_dir() or file.suffix in (".pt", ".pth"):
        content = _load_torch(file)
        if not isinstance(content, torch.Tensor):
            if layout not in (None, "counts") or tokens_per_batch is not None:
                raise ValueError(f"{file}: holds counts; layout and tokens_per_batch are for ids")
            return _checked(Recording.of(*content), num_experts, key)
        arrays = {"": (content.double() if content.is_floating_point() else content).numpy()}
    elif file.suffix in (".npy", ".npz"):
        arrays = _load_numpy(file)
    else:
        raise ValueError(
            f"{file}: a recording is a .npy, .npz or .pt file, or a directory of .pt files"
        )
    if "lplb_ep_recording" in arrays:
        saved = torch.from_numpy(arrays["counts"])
        recording = Recording.of(saved, str(arrays["source"]), layers=arrays["layers"].tolist())
        return _checked(recording, num_experts, key)

    name, array = _pick(file, arrays, key)
    source = f"{file.name}: {name}" if name else file.name
    held = f"got {array.dtype} {list(array.shape)}"
    if array.dtype.kind not in "iuf" or array.ndim not in (2, 3):
        raise ValueError(f"{source}: expected numbers in 2 or 3 dimensions; {held}")
    if layout is None and array.ndim == 3:
        choices = "; ".join(f"{name} = {meaning}" for name, meaning in LAYOUTS.items())
        raise ValueError(f"{source}: layout must say what its 3 dimensions are: {choices}; {held}")
    if layout in (None, "counts"):
        if tokens_per_batch is not None:
            raise ValueError(f"{source}: tokens_per_batch is for ids; these are counts")
        return _checked(Recording.of(torch.from_numpy(array), source), num_experts)
    if array.ndim != 3 or array.dtype.kind == "f":
        raise ValueError(f"{source}: layout {layout} is {LAYOUTS[layout]}, integers; {held}")
    ids = array if layout == "layer-token" else array.transpose(1, 0, 2)
    return _count_ids(ids, source, num_experts, tokens_per_batch)


def _checked(recording: Recording, num_experts: int | None, key: str | None = None) -> Recording:
    if key is not None:
        raise ValueError(f"{recording.source}: no array {key!r}; the file is one recording")
    if num_experts not in (None, recording.num_experts):
        raise ValueError(
            f"{recording.source}: num_experts is {num_experts}, but counts are of "
            f"{recording.num_experts} experts"
        )
    return recording


def _load_numpy(file: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        content = np.load(file, allow_pickle=False)
        return {"": content} if file.suffix == ".npy" else dict(content)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: not a NumPy file of plain arrays: {error}") from error


def _pick(
    file: Path, arrays: Mapping[str, npt.NDArray[Any]], key: str | None
) -> tuple[str, npt.NDArray[Any]]:
    named = ", ".join(f"{name} {list(a.shape)}" for name, a in arrays.items() if name)
    if key is not None:
        if key not in arrays:
            raise ValueError(f"{file}: no array {key!r}; it holds {named or 'one without a name'}")
        return key, arrays[key]
    if len(arrays) != 1:
        raise ValueError(f"{file}: key must name one of its arrays: {named or 'there are none'}")
    return next(iter(arrays.items()))


def _load_torch(file: Path) -> torch.Tensor | tuple[torch.Tensor, str]:
    """The tensor of a `.pt` file, or counts and source of SGLang's dumps (`file` a directory: all
    in it)."""
    paths = sorted(file.glob("*.pt")) if file.is_dir() else [file]
    if not paths:
        raise ValueError(f"{file}: no .pt file in this directory")
    contents = []
    for path in paths:
        try:
            contents.append(torch.load(path, map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: not a file of plain tensors: {reason}") from error
    first = contents[0]
    if isinstance(first, torch.Tensor) and len(contents) == 1:
        return first
    if all(isinstance(c, dict) and "records" in c for c in contents):
        return _sglang_records(file, contents)
    if isinstance(first, dict) and isinstance(first.get("logical_count"), torch.Tensor):
        if len(contents) > 1:
            raise ValueError(f"{file}: each of its {len(paths)} files is a recording; name one")
        return first["logical_count"], f"{file.name}: SGLang logical_count"
    keys = ", ".join(map(str, first)) if isinstance(first, dict) else type(first).__name__
    raise ValueError(
        f"{paths[0]}: expected a tensor, or SGLang's dump with logical_count or records; it holds "
        f"{keys}"
    )


def _sglang_records(file: Path, dumps: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, str]:
    """Adds up the ranks' physical counts of each forward pass, and maps them to logical experts."""
    passes: dict[int, torch.Tensor] = {}
    ranks = set()
    for dump in dumps:
        try:
            table = dump["last_physical_to_logical_map"].long()
            for record in dump["records"]:
                physical = record["global_physical_count"].long()
                logical = physical.new_zeros(physical.shape[0], int(table.max()) + 1)
                logical.scatter_add_(1, table, physical)
                number = record["forward_pass_id"]
                passes[number] = passes.get(number, 0) + logical
                ranks.add(record["rank"])
        except (KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{file}: not SGLang's records: {error!r}") from error
    if not passes:
        raise ValueError(f"{file}: no forward pass was recorded")
    counts = torch.stack([passes[number] for number in sorted(passes)])
    return counts, f"{file.name}: SGLang records of {len(ranks)} rank(s)"


def _count_ids(
    ids: npt.NDArray[Any], source: str, num_experts: int | None, tokens_per_batch: int | None
) -> Recording:
    """ids: [L, T, K] integers, -1 = no pick."""
    num_layers, num_tokens, _ = ids.shape
    size = num_tokens if tokens_per_batch is None else tokens_per_batch
    if not 1 <= size <= num_tokens:
        raise ValueError(f"{source}: tokens_per_batch must be in [1, {num_tokens}]; got {size}")
    ids = ids.astype(np.int64)
    largest = int(ids.max(initial=-1))
    experts = largest + 1 if num_experts is None else num_experts
    if largest >= experts or int(ids.min(initial=0)) < -1:
        raise ValueError(f"{source}: ids must be -1 or in [0, {experts}); got up to {largest}")
    num_batches = num_tokens // size
    counts = np.zeros((num_batches, num_layers, experts), np.int64)
    for layer, picks in enumerate(ids[:, : num_batches * size]):
        if (picks == picks.flat[0]).all():
            continue
        ordered = np.sort(picks, axis=1)
        twice = np.flatnonzero(
            ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)).any(1)
        )
        if twice.size:
            raise ValueError(
                f"{source}: token {twice[0]} of layer {layer} picks an expert twice: "
                f"{picks[twice[0]].tolist()}; are these ids, and is the layout right?"
            )
        batch = np.repeat(np.arange(num_batches), size)[:, None]
        cell = (batch * experts + picks)[picks != -1]
        counts[:, layer] = np.bincount(cell, minlength=num_batches * experts).reshape(-1, experts)
    return Recording.of(torch.from_numpy(counts), source)


# ---------------------------------------------------------------------------------------- replay


@dataclass(frozen=True)
class Replay:
    """Imbalance (max rank load / mean rank load) of N batches and L layers, each [N, L] float64.

    A layer that is idle in a batch counts as balanced: 1.
    """

    in_order: torch.Tensor
    """Without a placement: E / R consecutive experts on each rank, no replicas."""
    home: torch.Tensor
    """Every token at its expert's home slot."""
    even: torch.Tensor
    """Each slot of an expert gets the same share, as serving engines with EPLB aim for."""
    lp: torch.Tensor
    """The integer plan of `solve`."""
    bound: torch.Tensor
    """The lower bound T*, which no plan on these placements can beat."""
    layers: tuple[int, ...]
    """The L layers' numbers."""
    leaves_node: torch.Tensor | None = None
    """[2, L] float64: the share of picks that are computed on another node than their token's, at
    home and by the plan; None: there is one node."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, mean and maximum over all batches and layers, by column."""
        return {
            name: {
                "median": float(np.median(values.numpy())),
                "mean": float(values.mean()),
                "worst": float(values.max()),
            }
            for name, values in self._columns().items()
        }

    def to_json(self) -> dict[str, Any]:
        """All numbers, as plain lists [N][L] and the summary."""
        values = {name: column.tolist() for name, column in self._columns().items()}
        found: dict[str, Any] = {"layers": list(self.layers), "imbalance": values}
        found["summary"] = self.summary()
        if self.leaves_node is not None:
            found["leaves_node"] = dict(zip(("home", "lp"), self.leaves_node.tolist(), strict=True))
        return found

    def table(self) -> str:
        """A line for each layer (means over the batches), then the summary."""
        columns = self._columns()
        rows = [
            [str(layer), *(f"{c[:, i].mean():.3f}" for c in columns.values())]
            for i, layer in enumerate(self.layers)
        ]
        summary = self.summary()
        rows.append([])
        for line in ("median", "mean", "worst"):
            rows.append([line, *(f"{summary[name][line]:.3f}" for name in columns)])
        header = ["layer", *(_LABELS[name] for name in columns)]
        if self.leaves_node is not None:
            header += _LEAVES
            away = self.leaves_node.numpy()
            ends = [np.median(away, 1), away.mean(1), away.max(1)]
            for row, shares in zip([*rows[:-4], *rows[-3:]], [*away.T, *ends], strict=True):
                row += [f"{share:.1%}" for share in shares]
        return text_table(header, rows)

    def _columns(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in _LABELS}


_LABELS = {
    "in_order": "in order",
    "home": "home slots",
    "even": "even split",
    "lp": "LP",
    "bound": "lower bound",
}
_LEAVES = ["leave their node: at home", "LP"]


def replay(
    recording: Recording, placements: Sequence[Placement], *, solver: str = "auto"
) -> Replay:
    """What a recording's batches would have been on these placements.

    Args:
        recording: the batches.
        placements: one for each of the L layers; E experts each.
        solver: as for `solve`.

    Returns:
        The imbalances.

    Raises:
        ValueError: the number of placements or of their experts is not the recording's.
    """
    if len(placements) != len(recording.layers):
        raise ValueError(
            f"placements must be one for each of {len(recording.layers)} layers; "
            f"got {len(placements)}"
        )
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in _LABELS}
    leaves: list[list[float]] = []
    for layer, placement in enumerate(placements):
        R, E = placement.num_ranks, placement.num_experts
        if recording.num_experts != E:
            raise ValueError(
                f"placements must have the recording's {recording.num_experts} experts; got {E}"
            )
        load = recording.counts[:, layer]
        mean = (load.sum(1) / R).double()
        solution = solve(load, placement, solver)
        slots = np.flatnonzero(placement.physical_to_logical >= 0)
        rank_loads = {
            "in_order": _even_rank_load(load, np.arange(E), np.arange(E) * R // E, R),
            "home": _even_rank_load(load, np.arange(E), placement.home_rank, R),
            "even": _even_rank_load(
                load, placement.physical_to_logical[slots], slots // placement.num_local_slots, R
            ),
            "lp": solution.rank_load,
            "bound": solution.lower_bound[:, None],
        }
        for name, held in rank_loads.items():
            columns[name].append(torch.where(mean > 0, held.amax(1) / mean, 1.0))
        if placement.num_ranks_per_node < R:
            quota = solution.quota.sum(0)
            leaves.append([leaves_node(q, placement) for q in (_at_home(quota), quota)])
    stacked = {name: torch.stack(values, 1) for name, values in columns.items()}
    away = torch.tensor(leaves, dtype=torch.float64).T if leaves else None
    return Replay(**stacked, layers=recording.layers, leaves_node=away)


def _even_rank_load(
    load: torch.Tensor, expert: npt.NDArray[Any], rank: npt.NDArray[Any], num_ranks: int
) -> torch.Tensor:
    """[N, R] float64: rank loads where each of an expert's slots gets the same share.

    Args:
        load: [N, E].
        expert, rank: of each slot.
        num_ranks: R.
    """
    shares = np.zeros((load.shape[1], num_ranks))
    np.add.at(shares, (expert, rank), 1 / np.bincount(expert)[expert])
    return load.double() @ torch.from_numpy(shares)


def describe(
    recording: Recording,
    placements: Sequence[Placement],
    start: Sequence[Placement] | None = None,
) -> tuple[str, int]:
    """What each layer's placement is worth on the load it was learned on.

    Args:
        recording: the load.
        placements: one for each of the L layers.
        start: what they were before, to count the slots that changed.

    Returns:
        A table, and the index of the layer with the highest imbalance at home slots.
    """
    header = ["layer", "home slots", "LP", "most copies"]
    nodes = placements[0].num_ranks > placements[0].num_ranks_per_node
    header += _LEAVES if nodes else []
    header += [] if start is None else ["slots changed"]
    rows, at_home = [], []
    for i, (layer, load, placement) in enumerate(
        zip(recording.layers, recording.load, placements, strict=True)
    ):
        mean = float(load.sum()) / placement.num_ranks
        solution = solve(load, placement)
        home = _at_home(solution.quota)
        at_home.append(float(rank_load(home, placement).max()) / mean)
        rows.append(
            [str(layer), f"{at_home[-1]:.3f}", f"{int(solution.rank_load.max()) / mean:.3f}"]
        )
        rows[-1].append(str(placement.max_replicas))
        if nodes:
            rows[-1] += [f"{leaves_node(q, placement):.1%}" for q in (home, solution.quota)]
        if start is not None:
            changed = placement.physical_to_logical != start[i].physical_to_logical
            rows[-1].append(str(int(changed.sum())))
    return text_table(header, rows), int(np.argmax(at_home))


def leaves_node(quota: torch.Tensor, placement: Placement) -> float:
    """The share of picks that are computed on another node than their token's.

    Tokens are taken to be spread evenly over the ranks: recordings rarely tell their ranks.

    Args:
        quota: [E, C] integers, tokens of each copy.
        placement: the copies.
    """
    load, ranks = quota.sum(1), torch.arange(placement.num_ranks)[:, None]
    counts = load // placement.num_ranks + (ranks < load % placement.num_ranks)
    split = cpu.split(counts, quota, placement).numpy()
    node = np.where(placement.copy_rank >= 0, placement.node[placement.copy_rank], -1)
    away = split[placement.node[:, None, None] != node].sum()
    return float(away / max(int(load.sum()), 1))


def _at_home(quota: torch.Tensor) -> torch.Tensor:
    """The quotas [E, C] of the same tokens at home."""
    home = torch.zeros_like(quota)
    home[:, 0] = quota.sum(1)
    return home


# ------------------------------------------------------------------------------ tables, pictures


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the rest to the right; an empty row is a rule."""
    widths = [max(len(r[i]) for r in (header, *rows) if r) for i in range(len(header))]
    rule = "  ".join("─" * width for width in widths)

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(header), rule, *(line(row) if row else rule for row in rows)])


# Okabe and Ito's colours, told apart with every common colour blindness and in grey.
COLOURS = {"in_order": "#999999", "home": "#D55E00", "even": "#56B4E9", "lp": "#0072B2"}


def plot_replay(
    path: str | os.PathLike[str], result: Replay, *, title: str = "", footnote: str = ""
) -> None:
    """Draws the imbalance of each layer: experts in order, home slots, even split, LP, ideal.

    Args:
        path: the PNG to write.
        result: what to draw; means over batches as lines, their range as a shade.
        title: headline.
        footnote: a small line at the foot: where the numbers come from.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OSError: the file cannot be written.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        place = np.arange(len(result.layers))
        drawn = []
        for name, marker in (("in_order", ""), ("home", "o"), ("even", "s"), ("lp", "o")):
            values, colour = getattr(result, name).numpy(), COLOURS[name]
            label = f"{_LABELS[name]} (median {np.median(values):.2f})"
            drawn += axes.plot(
                place, values.mean(0), marker=marker, ms=4, lw=1.4, color=colour, label=label
            )
            if len(values) > 1:
                axes.fill_between(
                    place, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0
                )
        axes.axhline(1, color="0.35", lw=1, ls=(0, (4, 3)), zorder=1)
        axes.text(
            1.005, 1, "ideal", transform=axes.get_yaxis_transform(), va="center", color="0.35"
        )
        shown = place[:: max(1, len(place) // 16)]
        axes.set_xticks(shown, [str(result.layers[i]) for i in shown])
        axes.set_xlim(-0.8, len(place) - 0.2)
        batches = len(result.home)
        note = f"   (mean and range of {batches} batches)" if batches > 1 else ""
        axes.set_xlabel(f"MoE layer{note}")
        axes.set_ylabel("imbalance: max / mean rank load")
        finish(axes)
        # Above the axes, clear of the data.
        axes.legend(
            handles=drawn, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(drawn), **LEGEND
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(footnote, x=0.01, ha="left", fontsize=7.5, color="0.45")

    save_picture(path, (9, 4.2), draw)


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
) -> None:
    """Draws a training run: the ranks' loads at one step, and the imbalance over all steps.

    Args:
        path: the PNG to write.
        rank_load_before: [S, R] numbers, tokens of each rank with every token at its home slot.
        rank_load_after: [S, R] numbers, tokens of each rank by the plan.
        lower_bound: [S] numbers, T* in tokens.
        step: the step whose loads are drawn, in [0, S); by default the most unbalanced one.
        title: headline.
        step_label: what a step is.
        marks: what happened before a step, by its number; drawn as a line with a text.

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
        bars.bar(ranks - 0.2, before[chosen], 0.4, color=COLOURS["home"])
        bars.bar(ranks + 0.2, after[chosen], 0.4, color=COLOURS["lp"])
        bars.axhline(mean[chosen], color="0.35", lw=1, ls=(0, (4, 3)))
        bars.axhline(bound[chosen], color="black", lw=1, ls=":")
        which = ", the most unbalanced at home" if step is None else ""
        bars.set_title(f"Rank loads at {step_label} {chosen}{which}", loc="left", fontsize=10)
        bars.set_xticks(ranks[:: max(1, num_ranks // 16)])
        bars.set_xlabel("rank")
        bars.set_ylabel("rank load: tokens")
        bars.yaxis.set_major_formatter("{x:,.0f}")

        steps = np.arange(num_steps)
        marker = {"marker": "o", "ms": 3.5} if num_steps <= 60 else {}
        drawn = []
        for name, label, look in (
            ("home", "home slots (all tokens at home)", {"lw": 1.5, **marker}),
            ("lp", "LP (tokens spread over replicas)", {"lw": 2.5, **marker}),
            ("bound", "lower bound T* (no plan is below)", {"lw": 1, "ls": ":"}),
        ):
            colour = COLOURS.get(name, "black")
            drawn += lines.plot(steps, ratio[name], color=colour, label=label, **look)
        drawn.append(
            lines.axhline(
                1, color="0.35", lw=1, ls=(0, (4, 3)), zorder=1, label="mean (perfect balance)"
            )
        )
        lines.axvline(chosen, color="0.87", lw=5, zorder=0)
        mark(lines, marks or {})
        lines.set_title(f"Imbalance at every {step_label}", loc="left", fontsize=10)
        lines.xaxis.get_major_locator().set_params(integer=True)
        lines.set_xlabel(step_label)
        lines.set_ylabel("imbalance: max / mean rank load")
        for axes in (bars, lines):
            finish(axes)
        figure.legend(handles=drawn, loc="outside lower left", ncols=4, **LEGEND)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")

    save_picture(path, (10.5, 4.4), draw)


def plot_placement(
    path: str | os.PathLike[str], placement: Placement, load: torch.Tensor, *, title: str = ""
) -> None:
    """Draws the replica graph, and the ranks' loads at home slots and by the linear program.

    Ranks stand on a circle, joined where they hold copies of one expert: a thicker line is more
    load that may go either way; a larger and darker rank has more load at its home slots.

    Args:
        path: the PNG to write.
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
    mean = max(weight.sum() / R, 1e-9)
    shared = np.zeros((R, R))
    for expert, ranks in enumerate(placement.copy_rank):
        held = ranks[ranks >= 0]
        shared[np.ix_(held, held)] += weight[expert]

    def draw(figure: Figure) -> None:
        circle, bars = figure.subplots(1, 2, width_ratios=(1, 1.2))
        # Nodes stand apart by the room of a rank.
        place = np.arange(R) + (placement.node if placement.node.any() else 0)
        angle = np.pi / 2 - 2 * np.pi * place / (place[-1] + 1 + placement.node.any())
        x, y = np.cos(angle), np.sin(angle)
        for one, two in zip(*np.nonzero(np.triu(shared, 1)), strict=True):
            width = 0.3 + 3 * shared[one, two] / shared[np.triu_indices(R, 1)].max()
            across = placement.node[one] != placement.node[two]
            colour = COLOURS["home"] if across else COLOURS["lp"]
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
            label = f"{_LABELS[name]} (max / mean {values.max() / mean:.3f})"
            bars.bar(np.arange(R) + shift, values, 0.4, color=COLOURS[name], label=label)
        bars.axhline(mean, color="0.35", lw=1, ls=(0, (4, 3)), label="mean (perfect balance)")
        bars.set_xticks(np.arange(R)[:: max(1, R // 16)])
        bars.set_xlabel("rank")
        bars.set_ylabel("rank load: tokens")
        bars.yaxis.set_major_formatter("{x:,.0f}")
        finish(bars)
        figure.legend(loc="outside lower right", ncols=3, **LEGEND)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")

    save_picture(path, (10.5, 4.8), draw)


LEGEND = {"frameon": False, "fontsize": 9, "columnspacing": 1.3, "handlelength": 1.5}


def mark(axes: Axes, marks: Mapping[int, str]) -> None:
    """A line before each of these steps, with its text."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + (0.12 * (high - low) if marks else 0))  # room for the texts
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


def finish(axes: Axes) -> None:
    """The look that all pictures share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", lw=0.8)
    axes.set_axisbelow(True)


def save_picture(
    path: str | os.PathLike[str], inches: tuple[float, float], draw: Callable[[Figure], None]
) -> None:
    """Writes a figure as PNG.

    Args:
        path: the file.
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
    figure.savefig(path, format="png")
