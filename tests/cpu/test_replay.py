import json
import sys

import matplotlib.figure
import numpy as np
import pytest
import torch

from lplb_ep import MissingPackageError, Placement, Settings, solve
from lplb_ep.cost import H200, CostModel
from lplb_ep.tools.plan_times import COST_LABELS
from lplb_ep.tools.plots import plot_placement, plot_replay, plot_training
from lplb_ep.tools.recordings import Recording
from lplb_ep.tools.replay import leaves_node, replay
from lplb_ep.tools.tables import text_table
from lplb_ep.tools.timeline import replay_over_time


def small_replay():
    # Two ranks; expert 0 at home on rank 0 with a replica on rank 1, 1 on rank 0, 2 and 3 on 1.
    placement = Placement([0, 1, -1, 2, 3, 0], 2)
    loads = torch.tensor([[[6, 2, 3, 1]], [[9, 4, 2, 0]], [[0, 0, 2, 2]]])
    return replay(Recording.of(loads, "a test", layers=[3]), [placement])


def test_replay_by_hand():
    result = small_replay()
    # Totals 12, 15, 4: means 6, 7.5, 2.
    assert result.in_order.flatten().tolist() == [8 / 6, 13 / 7.5, 2.0]
    assert result.home.flatten().tolist() == [8 / 6, 13 / 7.5, 2.0]
    assert result.even.flatten().tolist() == [7 / 6, 8.5 / 7.5, 2.0]
    assert result.lp.flatten().tolist() == [1.0, 8 / 7.5, 2.0]
    assert result.bound.flatten().tolist() == [1.0, 1.0, 2.0]
    assert result.layers == (3,)


def test_slots_on_one_rank_each_take_a_share():
    placement = Placement([0, 0, 1, 0, 2, 3], 2)
    result = replay(Recording.of(torch.tensor([[6, 0, 1, 1]]), "a test"), [placement])
    assert result.even.item() == pytest.approx(4 / 4)
    assert result.home.item() == pytest.approx(6 / 4)


def test_a_layer_without_tokens_in_a_batch_is_in_no_mean():
    counts = torch.tensor([[[9, 1, 1, 1], [0, 0, 0, 0]], [[0, 0, 0, 0], [9, 1, 1, 1]]])
    recording = Recording.of(counts, "a test")
    result = replay(recording, [Placement.homes_only(4, 2, 1)] * 2, guest_min_tokens=1)
    assert result.is_idle.tolist() == [[False, True], [True, False]]
    for column in (result.home, result.even, result.lp, result.residents, result.bound):
        assert column.isnan().equal(result.is_idle)
    assert result.rank_loads["home"].isnan().all(2).equal(result.is_idle)
    worst = result.home[0, 0].item()
    assert worst == pytest.approx(5 / 3)
    assert result.summary()["home"] == {"median": worst, "mean": worst, "worst": worst}
    for by_batch in (False, True):
        lines = [line.split() for line in result.table(by_batch=by_batch).splitlines()]
        assert [line[2] for line in lines if line[0] in ("0", "1", "median", "mean")] == [
            "1.667"
        ] * 4
        guests = {line[0]: line[-2] for line in lines}
        assert guests["0"] == guests["mean"] == f"{result.guests.max().item():.1f}" != "0.0"
    told = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert told["imbalance"]["lp"][0][1] is None
    assert told["num_idle"] == 2
    assert [row[2] for row in result.rows()][2:4] == [None, None]
    assert recording.notes() == [
        "2 of 4 cells (a layer in a batch) have no tokens: no mean or median has them"
    ]


def test_over_time_a_layer_without_tokens_is_in_no_mean():
    loads = torch.tensor([[[9, 1, 1, 1], [9, 1, 1, 1]]]).repeat(8, 1, 1)
    loads[4:, 1] = 0
    recording = Recording.of(loads, "a test")
    settings = Settings(refresh=2, refresh_seconds=float("inf"))
    timeline = replay_over_time([recording], [Placement([0, 1, 2, 3], 2)] * 2, settings)
    assert timeline.imbalance()["home"].isnan().equal(loads.sum(2) == 0)
    assert timeline.table().count("1.667 / 1.667") == 5
    told = json.loads(json.dumps(timeline.to_json(), allow_nan=False))
    assert told["imbalance"]["kept"][5][1] is None
    assert [row[2] for row in timeline.rows()][-1] is None


def test_the_columns_keep_their_order_on_random_loads():
    rng = np.random.default_rng(1)
    R, E = 4, 16
    table = np.concatenate(
        [np.arange(E).reshape(R, -1), rng.permutation(E)[: 2 * R].reshape(R, -1)], axis=1
    )
    counts = torch.from_numpy(rng.lognormal(5, 1, (6, 3, E)).astype(np.int64))
    result = replay(Recording.of(counts, "a test"), [Placement(table.ravel(), R)] * 3)
    mean = counts.sum(2) / R
    assert (result.lp * mean).round().equal((result.bound * mean - 1e-6).ceil())
    assert (result.bound <= result.even + 1e-12).all()
    assert (result.bound >= 1 - 1e-12).all()
    assert (result.lp < result.home).any()
    # Homes stand where they stand without a placement.
    assert result.in_order.equal(result.home)


def test_table_and_json_agree_with_the_values():
    result = small_replay()
    lines = [line.split() for line in result.table().splitlines()]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["3"] == [
        f"{c.mean():.3f}"
        for c in (result.in_order, result.home, result.even, result.lp, result.bound)
    ]
    assert cells["worst"] == ["2.000"] * 5
    assert cells["median"][3] == f"{8 / 7.5:.3f}"
    told = result.to_json()
    assert told["layers"] == [3]
    assert told["imbalance"]["lp"] == result.lp.tolist()
    assert told["summary"]["lp"]["mean"] == pytest.approx((1 + 8 / 7.5 + 2) / 3)


def test_replay_refuses_other_placements():
    recording = Recording.of(torch.ones(2, 4), "a test")
    with pytest.raises(ValueError, match="one for each of 2 layers; got 1"):
        replay(recording, [Placement([0, 1, 2, 3], 2)])
    with pytest.raises(ValueError, match="recording's 4 experts; got 2"):
        replay(recording, [Placement([0, 1], 2)] * 2)


# --- tables, pictures -----------------------------------------------------------------------------


def test_text_table_aligns():
    assert text_table(["layer", "x"], [["1", "12.5"], [], ["all", "3"]]).splitlines() == [
        "layer     x",
        "─────  ────",
        "1      12.5",
        "─────  ────",
        "all       3",
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved; they are written all the same."""
    saved = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(self, *args, **kwargs):
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return saved


def lines_of(axes):
    return {line.get_label().split(" (")[0]: line.get_ydata() for line in axes.get_lines()}


def test_the_picture_of_a_replay(tmp_path, figures):
    result = small_replay()
    plot_replay(tmp_path / "a.png", result, title="a title", footnote="a note")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = lines_of(figures[0].axes[0])
    for label, column in (
        ("in order", result.in_order),
        ("home slots", result.home),
        ("even split", result.even),
        ("LP", result.lp),
    ):
        np.testing.assert_allclose(lines[label], column.mean(0))


def test_the_picture_of_a_training_run(tmp_path, figures):
    before = torch.tensor([[3, 5], [8, 0], [4, 4]])
    after = torch.tensor([[4, 4], [5, 3], [4, 4]])
    bound = torch.tensor([4.0, 5.0, 4.0])
    plot_training(
        tmp_path / "a.png", rank_load_before=before, rank_load_after=after, lower_bound=bound
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    bars, lines = figures[0].axes
    assert [[bar.get_height() for bar in group] for group in bars.containers] == [[8, 0], [5, 3]]
    assert bars.get_title("left") == "Rank loads at training step 1, the most unbalanced at home"
    np.testing.assert_allclose(lines_of(lines)["home slots"], [1.25, 2, 1])
    np.testing.assert_allclose(lines_of(lines)["LP"], [1, 1.25, 1])
    np.testing.assert_allclose(lines_of(lines)["lower bound T*"], [1, 1.25, 1])
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "home slots (all tokens at home)",
        "LP (tokens split over replicas)",
        "lower bound T* (no plan is below)",
        "mean (perfect balance)",
    ]
    shown = legend.get_window_extent()
    plot_training(
        tmp_path / "b.png",
        rank_load_before=before,
        rank_load_after=after,
        lower_bound=bound,
        plan_label="guests",
        others={"static copies": torch.tensor([6, 7, 4])},
    )
    by_label = {line.get_label(): line.get_ydata() for line in figures[1].axes[1].lines}
    np.testing.assert_allclose(by_label["guests"], [1, 1.25, 1])
    np.testing.assert_allclose(by_label["static copies"], [1.5, 1.75, 1])
    assert shown.x0 >= 0
    assert shown.x1 <= figures[0].bbox.width


def test_training_pictures_refuse_what_does_not_fit(tmp_path):
    loads = {"rank_load_before": torch.ones(3, 2), "rank_load_after": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=r"got \[3, 2\], \[3, 2\], \[2\]"):
        plot_training(tmp_path / "a.png", **loads, lower_bound=torch.ones(2))
    with pytest.raises(ValueError, match=r"step must be in \[0, 3\); got 3"):
        plot_training(tmp_path / "a.png", **loads, lower_bound=torch.ones(3), step=3)


def test_pictures_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"pip install '\.\[plot\]'"):
        plot_replay(tmp_path / "a.png", small_replay())


# --- placements -----------------------------------------------------------------------------------


def test_what_leaves_a_node_is_counted():
    """Two nodes of one rank, tokens from both alike: half of what has one copy leaves."""
    apart = Placement([0, 1, 2, 3], 2, num_ranks_per_node=1)
    assert leaves_node(torch.tensor([[4], [2], [6], [0]], dtype=torch.int32), apart) == 0.5
    both = Placement([0, 1, 1, 0], 2, num_ranks_per_node=1)
    split = torch.tensor([[2, 2], [3, 3]], dtype=torch.int32)
    assert leaves_node(split, both) == 0
    assert leaves_node(torch.tensor([[4, 0], [3, 3]], dtype=torch.int32), both) == 0.2


def test_a_replay_over_nodes_tells_what_leaves_them():
    counts = torch.tensor([[[4, 6]], [[0, 8]]])
    both = Placement([0, 1, 1, 0], 2, num_ranks_per_node=1)
    replayed = replay(Recording.of(counts, "two nodes"), [both])
    away = leaves_node(solve(counts[:, 0], both).quota.sum(0), both)
    assert replayed.leaves_node.tolist() == [[0.5], [away]]
    header, _, line, _, *ends = replayed.table().splitlines()
    assert header.split()[-6:] == ["leave", "their", "node:", "at", "home", "LP"]
    assert all(row.split()[-2:] == ["50.0%", f"{away:.1%}"] for row in (line, *ends))
    assert replayed.to_json()["leaves_node"] == {"home": [0.5], "lp": [away]}
    one = replay(Recording.of(counts, "one node"), [Placement([0, 1, 1, 0], 2)])
    assert one.leaves_node is None
    assert "leaves_node" not in one.to_json()


def test_the_replica_graph_joins_ranks_that_share_experts(tmp_path, monkeypatch):
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1],
    )
    placement = Placement([0, 1, 1, 2, 3, 0], 3, num_ranks_per_node=1)
    plot_placement(tmp_path / "graph.png", placement, torch.tensor([9, 4, 1, 1]), title="graph")
    (figure,) = figures
    circle, bars = figure.axes
    assert len(circle.lines) == 2  # ranks 0 and 1 share expert 1, ranks 0 and 2 expert 0
    assert circle.lines[1].get_linewidth() > circle.lines[0].get_linewidth()
    heights = [bar.get_height() for bar in bars.patches]
    assert heights[:3] == [9, 5, 1]
    assert sum(heights[3:]) == 15
    assert max(heights[3:]) == 5


def test_quotas_that_are_reused_cost_balance():
    placement = Placement([0, 1, 2, 3, 2, 0], 2, home=[0, 1, 4, 3])
    hot, cold = [400, 0, 0, 200], [400, 200, 0, 0]
    recording = Recording.of(torch.tensor([[hot], [hot], [cold], [cold]]), "a test")
    plain, result = (replay(recording, [placement], every=n) for n in (1, 2))
    assert plain.reused is None
    assert "quotas reused" not in plain.table()
    assert "quotas reused" in result.table()
    assert next(result.rows())[-2:] == ["reused", "bound"]
    # The same loads again: within what ranks round alike.
    assert result.reused[0::2].equal(result.lp[0::2])
    assert (abs(result.reused - result.lp) < 0.02).all()
    late = replay(recording, [placement], every=4)
    # Expert 0 goes on with three quarters to rank 0, where expert 1 now is.
    assert result.lp.flatten().tolist() == [1, 1, 1, 1]
    assert (abs(late.reused[2:] - 500 / 300) < 0.02).all()
    assert late.reused[:2].equal(result.reused[:2])
    with pytest.raises(ValueError, match=r"every .* does not go with guest slots"):
        replay(recording, [Placement.homes_only(4, 2, 1)], every=2)


def test_costs_by_hand():
    """A slot costs 5 us, and 1 more for each further row; a rank 2, and a guest's push 3."""
    cost = CostModel("a test", 1, (5_000,), 1_000, 2_000, push=3_000)
    loads = Recording.of(torch.tensor([[[6, 2, 3, 1]], [[2, 0, 0, 2]]]), "a test")
    found = replay(loads, [Placement([0, 1, -1, 2, 3, 0], 2)], cost=cost).costs
    microseconds = {name: (1e3 * of).flatten().round().tolist() for name, of in found.items()}
    # At home 10 + 6 and 7 + 5. Evenly expert 0 has 3 on each rank: 7 + 6, and 7 + 7 + 5.
    assert microseconds["home"] == [18, 8]
    assert microseconds["even"] == [21, 13]
    assert microseconds["lp"] == [20, 8]  # 4 and 2 of expert 0: 8 + 6, and 6 + 7 + 5
    assert microseconds["by_cost"] == [18, 8]
    # One guest on rank 1 takes half of expert 0 off rank 0, and both wait for its push.
    with_guest = Placement([0, 1, -1, 2, 3, -1], 2, num_guests_per_rank=1)
    found = replay(loads, [with_guest], cost=cost, guest_min_tokens=1).costs
    assert (1e3 * found["home"][0]).round().item() == 18
    assert (1e3 * found["lp"][0]).round().item() == 23


def test_the_even_split_has_a_part_for_each_slot_in_tokens_and_in_time():
    """Expert 0 has two slots on rank 0 and one on rank 1, with 3 rows each."""
    cost = CostModel("a test", 1, (5_000,), 1_000, 2_000)
    loads = Recording.of(torch.tensor([[[9, 1, 1, 1]]]), "a test")
    result = replay(loads, [Placement([0, 1, 0, 0, 2, 3], 2)], cost=cost)
    assert result.even.item() == pytest.approx(7 / 6)
    assert result.costs["even"].item() == pytest.approx(0.021)  # 2, and 7 + 5 + 7


def test_scaled_counts_have_no_times():
    means = Recording.of(torch.tensor([[[0.5, 0.25]]]), "means")
    placements = [Placement([0, 1], 2)]
    with pytest.raises(ValueError, match=r"counts are scaled by .* Recording\.drawn"):
        replay(means, placements, cost=H200)
    assert replay(means.drawn(9), placements, cost=H200).costs["home"].item() > 0


def test_a_model_without_pushes_is_refused_before_any_layer_is_replayed():
    placements = [Placement.homes_only(4, 2), Placement.homes_only(4, 2, 1)]
    done = []
    with pytest.raises(ValueError, match="has no `push`"):
        replay(
            Recording.of(torch.ones(2, 4), "a test"),
            placements,
            cost=CostModel("a test", 1, (5,), 1),
            progress=lambda *numbers: done.append(numbers),
        )
    assert not done


def test_costs_keep_their_order_and_idle_cells_have_none():
    rng = np.random.default_rng(2)
    counts = torch.from_numpy(rng.lognormal(5, 1, (3, 2, 16)).astype(np.int64))
    counts[1, 0] = 0
    placement = Placement.from_history(counts.sum((0, 1)), num_ranks=4, num_redundant_per_rank=1)
    result = replay(Recording.of(counts, "a test"), [placement] * 2, cost=H200)
    assert [*result.costs] == [*COST_LABELS]
    at = {name: of[~result.is_idle] for name, of in result.costs.items()}
    assert (at["by_cost"] <= torch.minimum(at["home"], at["lp"])).all()
    assert (at["bound"] <= at["by_cost"]).all()
    assert all(of.isnan().equal(result.is_idle) for of in result.costs.values())
    told = json.loads(json.dumps(result.to_json(), allow_nan=False))["cost_ms"]
    assert told["home"][1][0] is None
    assert told["summary"]["home"]["worst"] == at["home"].max()
    *_, worst, total = result.cost_table().splitlines()
    assert worst.split()[1] == f"{at['home'].max():.3f}"
    assert total.split()[2] == f"{at['home'].sum() / 3:.3f}"
    head, *rows = result.rows()
    assert head[-5:] == ["home_ms", "even_ms", "lp_ms", "by_cost_ms", "bound_ms"]
    assert rows[2][-5:] == [None] * 5


def test_batches_of_another_size_are_drawn():
    counts = torch.tensor([[[900, 100, 0], [0, 0, 0]], [[10, 10, 20], [1, 0, 0]]])
    recording = Recording.of(counts, "a test")
    drawn = recording.drawn(5000)
    assert drawn.counts.sum(2).tolist() == [[5000, 0], [5000, 5000]]
    assert drawn.counts[0, 0, 0].item() == pytest.approx(4500, rel=0.02)
    assert drawn.counts[0, 0, 2] == 0
    assert drawn.counts.equal(recording.drawn(5000).counts)
    assert not drawn.counts.equal(recording.drawn(5000, seed=1).counts)
    with pytest.raises(ValueError, match=r"num_rows must be in \[1, "):
        recording.drawn(0)
