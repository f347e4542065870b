"""One page that shows a replayed recording: charts, filters and data in a single HTML file."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..placement.table import Placement
from .recordings import Recording
from .replay import Replay, with_gaps
from .timeline import Timeline

# ECharts 6.1.0 lies beside the page, with its licence. Nothing is fetched when a page is opened.
_PAGE = Path(__file__).parent / "page"
# Windows of batches that a page shows at most, and numbers by rank: some megabytes in all.
_MOST_WINDOWS = 400
_MOST_NUMBERS = 400_000
_MOST_EXPERTS = 48
_UNIT = 1000
"""Numbers are thousandths, in 16 bits."""
_NOTHING = 2**16 - 1
"""In the place of a number: there were no tokens."""


def page_of(
    recording: Recording,
    result: Replay,
    placements: Sequence[Placement],
    *,
    title: str,
    about: str,
    notes: Sequence[str] = (),
    timeline: Timeline | None = None,
) -> str:
    """A page of HTML that needs nothing beside it.

    Many batches are put together to windows, whose values are means of those that have tokens. The
    notes say so.

    Args:
        recording: the batches.
        result: the replay of them, with rank loads: placements have equal numbers of ranks.
        placements: one for each layer.
        title: headline.
        about: what was replayed, in words.
        notes: what stands at the foot.
        timeline: the same batches with replicas that follow them; None: it is not shown.
    """
    num_batches, num_layers, _ = recording.counts.shape
    num_ranks = placements[0].num_ranks
    most = min(_MOST_WINDOWS, max(1, _MOST_NUMBERS // (num_layers * num_ranks)))
    size = -(-num_batches // most)
    starts = list(range(0, num_batches, size))
    if size > 1:
        notes = [*notes, f"Each point in time is the mean of {size} batches."]

    def means(values: torch.Tensor) -> npt.NDArray[np.float64]:
        idle = result.is_idle.view(num_batches, num_layers, *[1] * (values.ndim - 2)).numpy()
        busy = np.ma.array(values.double().numpy(), mask=np.broadcast_to(idle, values.shape))
        return np.stack([busy[at : at + size].mean(0).filled(np.nan) for at in starts])

    names = ("home", "even", "residents", "lp", "bound")
    columns = {name: getattr(result, name) for name in names}
    if torch.equal(result.home.nan_to_num(), result.even.nan_to_num()):  # there are no replicas
        columns |= {"even": None, "residents": None}
    takes_part = np.array([np.isin(np.arange(num_ranks), p.active_ranks) for p in placements])
    moves = []
    if timeline is not None:
        columns["refreshed"] = timeline.imbalance()["refreshed"]
        place = {number: layer for layer, number in enumerate(recording.layers)}
        moves = [[m.batch // size, place[m.layer], m.num_copies] for m in timeline.moves]
    data = {
        "kind": "recording",
        "moves": moves,
        "title": title,
        "about": about,
        "notes": list(notes),
        "layers": list(recording.layers),
        "num_ranks": num_ranks,
        "num_experts": recording.num_experts,
        "num_batches": num_batches,
        "starts": starts,
        "imbalance": {name: _packed(means(c)) for name, c in columns.items() if c is not None},
        "rank_loads": {
            name: _packed(np.where(takes_part, means(loads), np.nan))
            for name, loads in result.rank_loads.items()
        },
        "experts": [
            _hottest(load, placement)
            for load, placement in zip(recording.load.numpy(), placements, strict=True)
        ],
        "guests": None
        if result.guests is None
        else with_gaps(means(result.guests).round(2).ravel().tolist()),
    }
    return filled(data)


def _packed(values: npt.NDArray[np.float64]) -> str:
    """Numbers of at least 0, or NaN, as base64 of little-endian 16-bit words."""
    words = np.clip(np.rint(np.nan_to_num(values) * _UNIT), 0, _NOTHING - 1).astype("<u2")
    words[np.isnan(values)] = _NOTHING
    return base64.b64encode(words.tobytes()).decode()


def _hottest(load: npt.NDArray[Any], placement: Placement) -> list[list[float]]:
    """The experts of a layer with the most load: number, load / mean, copies, rank of the home."""
    share = load / max(load.mean(), 1e-9)
    copies = (placement.copy_rank >= 0).sum(axis=1)
    order = np.argsort(-load, kind="stable")[:_MOST_EXPERTS].tolist()
    return [
        [e, round(float(share[e]), 3), int(copies[e]), int(placement.home_rank[e])] for e in order
    ]


def filled(data: dict[str, Any]) -> str:
    """The page with its parts in the places of their names.

    Args:
        data: what its scripts draw. `kind` names the script of what only some pages have.
    """
    # In a script element only this could be taken for its end, or for a comment.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    scripts = [(_PAGE / f"{name}.js").read_text("utf-8") for name in ("page", data["kind"])]
    parts = {
        "style": (_PAGE / "page.css").read_text("utf-8"),
        "library": (_PAGE / "echarts.min.js").read_text("utf-8"),
        "script": "\n".join([*scripts, "start();"]),
        "data": text,
    }
    page = (_PAGE / "page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page)
