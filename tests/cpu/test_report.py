import sys
from collections import Counter

import matplotlib.figure
import numpy as np
import pytest
import torch

from lplb_ep import MissingPackageError, Placement, solve
from lplb_ep.tools.report import (
    Recording,
    leaves_node,
    load_recording,
    plot_placement,
    plot_replay,
    plot_training,
    replay,
    save_recording,
    text_table,
)


def random_ids(layers, tokens, k, experts, seed=0):
    """[layers, tokens, k] distinct ids a token."""
    keys = np.random.default_rng(seed).random((layers, tokens, experts))
    return keys.argsort(axis=2)[:, :, :k]


def counted(ids, num_experts):
    """[layers, experts], counted one by one."""
    found = [Counter(layer.ravel().tolist()) for layer in ids]
    return torch.tensor([[c[e] for e in range(num_experts)] for c in found])


# --- recordings -----------------------------------------------------------------------------------


def test_a_saved_recording_comes_back(tmp_path):
    counts = torch.randint(1, 9, (3, 2, 5))
    recording = Recording.of(counts, "a test", layers=[4, 9])
    save_recording(tmp_path / "a.npz", recording)
    read = load_recording(tmp_path / "a.npz", num_experts=5)
    assert read.counts.equal(counts)
    assert (read.layers, read.source) == ((4, 9), "a test")
    assert read.load.equal(counts.sum(0))


def test_counts_of_two_and_three_dimensions(tmp_path):
    counts = np.random.default_rng(0).integers(1, 99, (4, 3, 6))
    np.save(tmp_path / "two.npy", counts[0].astype(np.float32))
    np.savez(tmp_path / "three.npz", steps=counts, other=counts)
    two = load_recording(tmp_path / "two.npy")
    three = load_recording(tmp_path / "three.npz", key="steps", layout="counts")
    assert two.counts.equal(torch.from_numpy(counts[:1]))
    assert three.counts.equal(torch.from_numpy(counts))
    assert three.source == "three.npz: steps"


def test_idle_layers_and_batches_are_left_out():
    counts = torch.zeros(3, 4, 2, dtype=torch.int64)
    counts[0, 1:3], counts[2, 1:3] = 1, 2
    recording = Recording.of(counts, "a test")
    assert recording.counts.equal(torch.tensor([1, 2])[:, None, None].expand(2, 2, 2))
    assert recording.layers == (1, 2)


@pytest.mark.parametrize("layout", ["layer-token", "token-layer"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_ids_are_counted(tmp_path, layout, dtype):
    ids = random_ids(layers=3, tokens=20, k=4, experts=16)
    stored = ids if layout == "layer-token" else ids.transpose(1, 0, 2)
    np.save(tmp_path / "ids.npy", stored.astype(dtype))
    whole = load_recording(tmp_path / "ids.npy", layout=layout, num_experts=16)
    assert whole.counts.equal(counted(ids, 16)[None])
    batches = load_recording(
        tmp_path / "ids.npy", layout=layout, num_experts=16, tokens_per_batch=8
    )
    assert batches.counts.equal(
        torch.stack([counted(ids[:, :8], 16), counted(ids[:, 8:16], 16)])
    ), "two batches of eight, four tokens dropped"


def test_absent_picks_and_dense_layers(tmp_path):
    ids = random_ids(layers=3, tokens=10, k=2, experts=8)
    ids[0] = 0  # as vLLM fills a layer without a router
    ids[1, :5, 1] = -1
    np.save(tmp_path / "ids.npy", ids)
    recording = load_recording(tmp_path / "ids.npy", layout="layer-token", num_experts=8)
    assert recording.layers == (1, 2)
    assert recording.counts[0].equal(counted(ids, 8)[1:])
    assert recording.counts[0, 0].sum() == 15


def test_sglang_statistics(tmp_path):
    logical = torch.zeros(5, 3, 8, dtype=torch.int32)  # a ring buffer with room left, a dense layer
    logical[:2, 1:] = torch.randint(1, 99, (2, 2, 8), dtype=torch.int32)
    torch.save(
        {"rank": 0, "logical_count": logical, "average_utilization_rate_over_window": None},
        tmp_path / "expert_distribution_recorder_1.pt",
    )
    recording = load_recording(tmp_path / "expert_distribution_recorder_1.pt")
    assert recording.counts.equal(logical[:2, 1:].long())
    assert recording.layers == (1, 2)


def test_sglang_records_of_several_ranks(tmp_path):
    table = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    rng = np.random.default_rng(0)
    expected = np.zeros((2, 2, 3), int)
    for rank in range(2):
        records = []
        for step in (7, 3):
            physical = rng.integers(0, 9, (2, 4))
            records.append(
                {
                    "forward_pass_id": step,
                    "rank": rank,
                    "gatherer_key": "primary",
                    "global_physical_count": torch.from_numpy(physical).int(),
                    "extend_seq_lens": None,
                }
            )
            for layer, slot in np.ndindex(2, 4):
                expected[(3, 7).index(step), layer, table[layer, slot]] += physical[layer, slot]
        torch.save(
            {"records": records, "last_physical_to_logical_map": table}, tmp_path / f"{rank}.pt"
        )
    recording = load_recording(tmp_path, num_experts=3)
    assert recording.counts.equal(torch.from_numpy(expected))
    assert "2 rank(s)" in recording.source


def test_a_tensor_in_a_torch_file(tmp_path):
    counts = torch.randint(1, 9, (2, 4))
    torch.save(counts, tmp_path / "counts.pt")
    assert load_recording(tmp_path / "counts.pt").counts[0].equal(counts)
    torch.save(counts.bfloat16(), tmp_path / "counts.pt")
    assert load_recording(tmp_path / "counts.pt").counts[0].equal(counts)


@pytest.fixture
def files(tmp_path):
    ids = random_ids(layers=2, tokens=6, k=3, experts=8)
    np.savez(tmp_path / "two.npz", a=ids, b=ids[0])
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "twice.npy", np.array([[[1, 2], [2, 2]]]))
    np.save(tmp_path / "flat.npy", np.arange(3))
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.save(tmp_path / "half.npy", np.full((2, 2), 0.5))
    np.save(tmp_path / "minus.npy", np.full((2, 2), -1))
    np.save(tmp_path / "zero.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "huge.npy", np.full((1, 32), 2**62))
    np.save(tmp_path / "counts.npy", np.ones((2, 4), int))
    (tmp_path / "rubbish.npz").write_bytes(b"PK no archive")
    (tmp_path / "rubbish.pt").write_bytes(b"no archive")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    torch.save({"records": [{"rank": 0}]}, tmp_path / "records.pt")
    torch.save({"logical_count": torch.ones(1, 2, 4)}, tmp_path / "sglang.pt")
    torch.save(tmp_path, tmp_path / "object.pt")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("two.npz", {}, r"two\.npz: key must name one of its arrays: a \[2, 6, 3\], b \[6, 3\]"),
        ("two.npz", {"key": "c"}, r"no array 'c'; it holds a \[2, 6, 3\], b \[6, 3\]"),
        ("ids.npy", {}, r"layout must say .* counts = .* got int64 \[2, 6, 3\]"),
        ("ids.npy", {"layout": "rows"}, "layout must be one of counts, layer-token, token-layer"),
        ("ids.npy", {"key": "a"}, "no array 'a'; it holds one without a name"),
        ("ids.npy", {"layout": "layer-token", "num_experts": 4}, r"in \[0, 4\); got up to [567]"),
        ("ids.npy", {"layout": "layer-token", "tokens_per_batch": 7}, r"in \[1, 6\]; got 7"),
        ("twice.npy", {"layout": "layer-token"}, r"token 1 of layer 0 picks .* twice: \[2, 2\]"),
        ("counts.npy", {"layout": "layer-token"}, r"layout layer-token is .*; got int64 \[2, 4\]"),
        ("counts.npy", {"tokens_per_batch": 2}, "tokens_per_batch is for ids"),
        ("counts.npy", {"num_experts": 5}, "num_experts is 5, but counts are of 4 experts"),
        ("flat.npy", {}, r"in 2 or 3 dimensions; got int64 \[3\]"),
        ("words.npy", {}, "expected numbers"),
        ("half.npy", {}, "whole numbers"),
        ("minus.npy", {}, "at least 0"),
        ("zero.npy", {}, "all counts are 0"),
        ("huge.npy", {}, "counts must be at most 2147483647 each; got 4611686018427387904"),
        ("rubbish.npz", {}, r"rubbish\.npz: not a NumPy file"),
        ("rubbish.pt", {}, r"rubbish\.pt: not a file of plain tensors"),
        ("object.pt", {}, r"object\.pt: not a file of plain tensors"),
        ("other.pt", {}, r"other\.pt: .* logical_count or records; it holds weights"),
        ("records.pt", {}, r"records\.pt: not SGLang's records: KeyError"),
        ("sglang.pt", {"layout": "token-layer"}, "holds counts; layout .* for ids"),
        (
            "sglang.pt",
            {"key": "a"},
            r"sglang\.pt: SGLang .* no array 'a'; the file is one recording",
        ),
        ("empty", {}, "no .pt file"),
        ("notes.txt", {}, r"notes\.txt: a recording is a \.npy"),
    ],
)
def test_what_is_no_recording_is_named(files, name, options, says):
    with pytest.raises(ValueError, match=says):
        load_recording(files / name, **options)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_recording(tmp_path / "none.npz")


def test_recordings_are_saved_as_npz(tmp_path):
    with pytest.raises(ValueError, match=r"end in \.npz"):
        save_recording(tmp_path / "a.json", Recording.of(torch.ones(1, 1), "a test"))


# --- replay ---------------------------------------------------------------------------------------


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


def test_a_layer_idle_in_a_batch_is_balanced():
    counts = torch.tensor([[[4, 0], [0, 0]], [[0, 4], [2, 2]]])
    result = replay(Recording.of(counts, "a test"), [Placement([0, 1], 2)] * 2)
    for column in (result.home, result.even, result.lp, result.bound):
        assert column.tolist() == [[2, 1], [2, 1]]


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
        "LP (tokens spread over replicas)",
        "lower bound T* (no plan is below)",
        "mean (perfect balance)",
    ]
    shown = legend.get_window_extent()
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
