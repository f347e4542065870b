"""Replay over time: what a refresher would have made of a sequence of workloads."""

import json

import numpy as np
import oracle
import pytest
import torch
from test_refresh import E, R, hot, ring, traffic

from lplb_ep import Placement, Settings
from lplb_ep.planning import reference as cpu
from lplb_ep.tools import cli
from lplb_ep.tools.plots import plot_timeline
from lplb_ep.tools.recordings import Recording
from lplb_ep.tools.timeline import draw_batches, replay_over_time

SETTINGS = Settings(refresh=4, refresh_changes=8)


def workload(kind, num_batches, second="old"):
    """Batches of two layers, of which the second stays with its traffic."""
    counts = [
        [
            sum(cpu.count(traffic(k, r, 10 * layer + step), E).long() for r in range(R))
            for layer, k in enumerate((kind, second))
        ]
        for step in range(num_batches)
    ]
    return Recording.of(torch.stack([torch.stack(c) for c in counts]), kind, layers=(3, 5))


@pytest.fixture(scope="module")
def result():
    workloads = [workload("old", 9), workload("new", 12)]
    return workloads, replay_over_time(workloads, [ring(), ring()], SETTINGS, hot)


def test_replicas_follow_from_the_look_after(result):
    workloads, timeline = result
    # The shift is at 9: of the batches 8 to 11 three show it, and their replicas are in force from
    # the next look on.
    (move,) = timeline.moves
    assert (move.batch, move.layer) == (16, 3)
    assert 1 <= move.num_copies <= 8 < move.num_anew
    assert move.num_anew == anew(workloads, slice(8, 12))
    imbalance = timeline.imbalance()
    assert torch.equal(imbalance["kept"][:16], imbalance["refreshed"][:16])
    assert torch.equal(imbalance["kept"][:, 1], imbalance["refreshed"][:, 1])
    assert imbalance["kept"][9:, 0].min() > 1.1
    assert imbalance["refreshed"][16:, 0].max() < 1.02
    counts = torch.cat([w.counts for w in workloads])
    for batch in (0, 15, 20):
        load = counts[batch, 0]
        best = oracle.linear_program(ring(), load.numpy())
        assert timeline.kept[batch, 0].max() == np.ceil(best - 1e-6)
        assert timeline.home[batch, 0].tolist() == load.view(R, -1).sum(1).tolist()
        assert timeline.refreshed[batch, 0].sum() == load.sum()


def anew(workloads, window, **options):
    """(rank, expert) pairs that EPLB would have on these batches of the first layer, and `ring`
    has not."""
    loads = torch.cat([w.counts for w in workloads])[window, 0]
    shape = {"num_ranks": R, "num_redundant_per_rank": 2}
    new = Placement.from_history(loads, **shape, **options)
    ranks_of = [
        {(slot // p.num_local_slots, int(e)) for slot, e in enumerate(p.physical_to_logical)}
        for p in (new, ring())
    ]
    return len(ranks_of[0] - ranks_of[1])


def test_eplb_places_anew_by_groups_and_nodes():
    workloads = [workload("new", 12)]
    table, home = ring().physical_to_logical, ring().home
    placement = Placement(table, R, home=home, num_ranks_per_node=2)
    timeline = replay_over_time(workloads, [placement] * 2, SETTINGS, hot, num_groups=4)
    (move,) = timeline.moves
    options = {"num_ranks_per_node": 2, "num_groups": 4}
    assert move.num_anew == anew(workloads, slice(0, 4), **options)
    assert move.num_anew != anew(workloads, slice(0, 4))


def test_the_table_is_by_workload(result):
    _, timeline = result
    imbalance = timeline.imbalance()
    rows = [line.split("  ") for line in timeline.table().splitlines()[2:]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]

    def cell(values):
        return f"{np.median(values):.3f} / {values.max():.3f}"

    for row, batches in zip(rows, (slice(0, 9), slice(9, 21)), strict=True):
        columns = [imbalance[name][batches] for name in ("home", "kept", "refreshed")]
        last = slice(batches.stop - 4, batches.stop)
        columns += [imbalance[name][last] for name in ("kept", "refreshed")]
        assert row[1:] == [str(batches.stop - batches.start), *map(cell, columns)]
    assert [row[0] for row in rows] == ["old", "new"]


def test_a_picture(result, tmp_path):
    plot_timeline(tmp_path / "out.png", result[1], title="A title", footnote="where from")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_batches_are_drawn_from_a_total():
    total = Recording.of(torch.tensor([[[900, 0, 100]], [[900, 100, 1000]]]), "total")
    drawn = draw_batches(total, 30)
    assert torch.equal(drawn.counts, draw_batches(total, 30).counts)
    assert not torch.equal(drawn.counts, draw_batches(total, 30, seed=1).counts)
    assert drawn.counts.shape == (30, 1, 3)
    assert (drawn.counts.sum(2) == 100).all()
    share = drawn.load[0] / drawn.load.sum()
    torch.testing.assert_close(share, torch.tensor([0.6, 0.1 / 3, 1.1 / 3]), rtol=0, atol=0.03)
    with pytest.raises(
        ValueError, match=r"total: num_batches must be in \[1, 3000\], .*; got 3001"
    ):
        draw_batches(total, 3001)


@pytest.mark.parametrize(
    ("workloads", "placements", "interval", "says"),
    [
        (
            [(4, E)],
            1,
            0,
            "refresh must be the number of batches between two looks, at least 2; got",
        ),
        ([(4, E), (4, 8)], 1, 4, "second has 1 layers of 8 experts; first has 1 of 16"),
        ([(4, E)], 2, 4, "one for each of 1 layers of 16 experts; got 2"),
    ],
)
def test_what_does_not_fit_together(workloads, placements, interval, says):
    recordings = [
        Recording.of(torch.ones(n, 1, experts), name)
        for name, (n, experts) in zip(("first", "second"), workloads, strict=False)
    ]
    with pytest.raises(ValueError, match=says):
        replay_over_time(recordings, [ring()] * placements, Settings(refresh=interval), hot)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `lplb-ep replay` on a file with two workloads; its output, or its error."""
    monkeypatch.setattr(Placement, "for_lp", staticmethod(hot), raising=False)
    arrays = {kind: workload(kind, 1, kind).load.numpy() * 40 for kind in ("old", "new")}
    np.savez(tmp_path / "counts.npz", **arrays)
    ring().save(tmp_path / "ring.json")

    def run(*argv):
        words = ["replay", tmp_path / "counts.npz", "--key", "old"]
        words += ["--placement", tmp_path / "ring.json", *argv]
        try:
            assert cli.main([str(word) for word in words]) == 0
        except SystemExit:
            return capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_the_search_may_have_no_limit_of_time(command, tmp_path, monkeypatch):
    def choose(*args, time_budget_s, **options):
        asked.add(time_budget_s)
        return hot(*args, time_budget_s=time_budget_s, **options)

    asked = set()
    monkeypatch.setattr(Placement, "for_lp", staticmethod(choose))
    command("--then", "new", "--draw", 12, "--refresh", 4, "--seconds", "inf")
    assert asked == {np.inf}


def test_the_command(command, tmp_path):
    argv = ["--then", "new", "--then", f"{tmp_path}/counts.npz:old", "--draw", 12, "--refresh", 4]
    files = ["--json", tmp_path / "out.json", "--png", tmp_path / "out.png"]
    out = command(*argv, *files, "--expert-bytes", 10**9, "--changes", 8)
    told = json.loads((tmp_path / "out.json").read_text())
    assert [w["first_batch"] for w in told["workloads"]] == [0, 12, 24]
    assert np.shape(told["imbalance"]["refreshed"]) == (36, 2)
    moved = sum(move["num_copies"] for move in told["moves"])
    assert moved == told["num_moved"] > 0
    assert told["bytes_moved"] == moved * 10**9
    assert {move["batch"] % 4 for move in told["moves"]} == {0}
    assert f"{moved} replicas moved (EPLB anew each time: {told['num_anew']} copies)" in out
    assert f"{moved}.00 GB out" in out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--then", "new"], "--then needs --refresh"),
        (["--draw", 3], "--draw needs --refresh"),
        (["--expert-bytes", 3], "--expert-bytes needs --guests or --refresh"),
        (["--threshold", 1.01], "--threshold needs --refresh"),
        (["--changes", 16], "--changes needs --refresh"),
        (["--seconds", 2], "--seconds needs --refresh"),
        (["--refresh", 4, "--then", "later"], "no array 'later'"),
        *(
            (
                ["--refresh", n],
                f"--refresh must be the number of batches between two looks, at least 2; got {n}",
            )
            for n in (-1, 0, 1)
        ),
        (
            ["--refresh", 4, "--draw", 10**6],
            "--draw must be in [1, 15360], the picks of a layer; got 1000000",
        ),
        (
            ["--refresh", 4, "--threshold", 0.5],
            "--threshold must be a number of at least 1; got 0.5",
        ),
        (["--refresh", 4, "--seconds", 0], "--seconds must be a number more than 0; got 0.0"),
        (["--refresh", 4, "--changes", 0], "--changes must be a whole number of at least 1; got 0"),
        (["--refresh", 4, "--expert-bytes", -1], "--expert-bytes must be at least 0; got -1"),
    ],
)
def test_mistakes_of_the_command_are_one_line(command, argv, says):
    (line,) = command(*argv).splitlines()
    assert line.startswith("lplb-ep: error: ")
    assert says in line
