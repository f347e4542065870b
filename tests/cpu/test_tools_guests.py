"""Guests in `lplb-ep replay`, `place` and `doctor`: balance, copies moved and bytes."""

import json

import matplotlib.figure
import numpy as np
import pytest
import torch

from lplb_ep import Placement, solve
from lplb_ep.placement.layer_files import load_placements
from lplb_ep.settings import Settings
from lplb_ep.tools import cli
from lplb_ep.tools.plots import plot_replay
from lplb_ep.tools.recordings import Recording, load_recording
from lplb_ep.tools.replay import describe, leaves_node, replay
from lplb_ep.tools.timeline import replay_over_time

pytestmark = pytest.mark.usefixtures("clean_environment")

# Two ranks with experts 0, 1 and 2, 3: balanced, balanced by one guest, one that takes too little.
COUNTS = torch.tensor([[[50, 50, 60, 40]], [[90, 70, 30, 10]], [[52, 50, 50, 48]]])


def test_replay_by_hand():
    recording = Recording.of(COUNTS, "a test", layers=[7])
    result = replay(recording, [Placement.homes_only(4, 2, 1)], guest_min_tokens=5)
    assert result.residents.flatten().tolist() == pytest.approx([1, 1.6, 1.02])
    assert result.home.equal(result.residents)
    assert result.lp.flatten().tolist() == pytest.approx([1, 1, 1.02])
    assert result.guests.flatten().tolist() == [0, 1, 0]
    assert result.most_sent.flatten().tolist() == [0, 1, 0]
    told = result.to_json(expert_bytes=1000)
    assert told["guests"] == {
        "copies": [[0], [1], [0]],
        "most_sent": [[0], [1], [0]],
        "bytes": [[0], [1000], [0]],
    }
    assert told["imbalance"]["residents"] == result.residents.tolist()
    assert result.to_json()["guests"]["bytes"] is None
    assert told["summary"]["lp"]["worst"] == pytest.approx(1.02)


def test_tables_by_layer_and_by_batch():
    recording = Recording.of(COUNTS, "a test", layers=[7])
    result = replay(recording, [Placement.homes_only(4, 2, 1)], guest_min_tokens=5)
    by_layer = [line.split() for line in result.table(3 * 10**9).splitlines()]
    assert by_layer[2][0] == "7"
    assert by_layer[2][-3:] == ["0.3", "0.3", "1.00"]
    assert [line[-1] for line in by_layer[-3:]] == ["0.00", "1.00", "3.00"]
    by_batch = [line.split() for line in result.table(by_batch=True).splitlines()]
    assert [line[0] for line in by_batch[2:5]] == ["0", "1", "2"]
    assert [line[-2:] for line in by_batch[2:5]] == [["0.0", "0.0"], ["1.0", "1.0"], ["0.0", "0.0"]]
    assert by_batch[3][4:6] == ["1.600", "1.000"]
    plain = replay(recording, [Placement.homes_only(4, 2)])
    assert plain.guests is plain.residents is None
    assert "guests" not in plain.to_json()
    assert "moved" not in plain.table()


def test_copies_are_counted_as_the_solutions_have_them():
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.lognormal(5, 1, (4, 3, 16)).astype(np.int64))
    loads = counts.sum((0, 1)).numpy()
    placements = [
        Placement.homes_only(16, 4, 2, num_ranks_per_node=2),
        Placement.from_history(
            loads,
            num_ranks=4,
            num_redundant_per_rank=1,
            num_ranks_per_node=2,
            num_guests_per_rank=1,
        ),
        Placement.homes_only(16, 4, num_ranks_per_node=2),  # layers may differ
    ]
    result = replay(Recording.of(counts, "a test"), placements)
    assert int(result.guests[:, :2].sum()) > 8
    assert (result.guests[:, 2] == 0).all()
    for layer, placement in enumerate(placements):
        leave = total = 0
        for batch in range(4):
            solution = solve(counts[batch, layer], placement)
            guests = solution.guests[solution.guests >= 0]
            assert int(result.guests[batch, layer]) == len(guests)
            sent = np.bincount(placement.home_rank[guests.numpy()], minlength=4)
            assert int(result.most_sent[batch, layer]) == sent.max()
            filled = placement.with_guests(solution.guests)
            picks = int(solution.quota.sum())
            leave += leaves_node(solution.quota, filled) * picks
            total += picks
        # Without guests the split of all batches together is what counts; it rounds otherwise.
        assert float(result.leaves_node[1, layer]) == pytest.approx(leave / total, abs=2e-3)
    assert (result.lp <= result.residents + 1e-12).all()


def test_pictures_of_guests(tmp_path, monkeypatch):
    saved = []
    savefig = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k)),
    )
    recording = Recording.of(COUNTS.repeat(1, 2, 1), "a test")
    result = replay(recording, [Placement.homes_only(4, 2, 1)] * 2, guest_min_tokens=5)
    for by_batch in (False, True):
        plot_replay(tmp_path / "a.png", result, by_batch=by_batch)
        above, below = saved[-1].axes
        lines = {line.get_label().split(" (")[0]: line.get_ydata() for line in above.get_lines()}
        for label, column in (("LP, no guests", result.residents), ("LP", result.lp)):
            np.testing.assert_allclose(lines[label], column.mean(int(by_batch)))
        np.testing.assert_allclose(
            below.get_lines()[0].get_ydata(), result.guests.double().mean(int(by_batch))
        )


@pytest.fixture
def recording(tmp_path):
    """A file of [5 batches, 2 layers, 16 experts]."""
    rng = np.random.default_rng(1)
    np.save(tmp_path / "counts.npy", rng.lognormal(6, 1, (5, 2, 16)).astype(np.int64))
    return tmp_path / "counts.npy"


def command(*argv):
    return cli.main([str(a) for a in argv])


def test_replay_takes_guests_beside_any_placement(recording, tmp_path, capsys):
    replayed = ["replay", recording, "--layout", "counts", "--json", tmp_path / "out.json"]
    loads = load_recording(recording, layout="counts").load
    homes = Placement.homes_only(16, 4, 2)
    homes.save(tmp_path / "homes.json")
    eplb = [
        Placement.from_history(load, num_ranks=4, num_redundant_per_rank=1, num_guests_per_rank=2)
        for load in loads
    ]
    for options, placements in (
        (["--ranks", 4, "--guests", 2], [homes] * 2),
        (["--placement", "homes", "--ranks", 4, "--guests", 2], [homes] * 2),
        (["--placement", tmp_path / "homes.json"], [homes] * 2),
        (["--placement", tmp_path / "homes.json", "--guests", 1], [homes.with_guest_slots(1)] * 2),
        (["--placement", tmp_path / "homes.json", "--guests", 0], [homes.with_guest_slots(0)] * 2),
        (["--placement", "eplb", "--ranks", 4, "--redundant", 1, "--guests", 2], eplb),
    ):
        assert command(*replayed, *options) == 0
        out = capsys.readouterr().out
        expected = replay(load_recording(recording, layout="counts"), placements)
        told = json.loads((tmp_path / "out.json").read_text())
        assert told["num_guests_per_rank"] == placements[0].num_guests_per_rank
        assert told["num_physical_experts"] == placements[0].num_physical_experts
        assert told["imbalance"] == expected.to_json()["imbalance"]
        assert told.get("guests") == expected.to_json().get("guests")
        assert out.endswith(expected.table() + "\n")
        assert ("a rank for guests" in out) == bool(placements[0].num_guests_per_rank)


def test_options_and_settings_say_the_rule(recording, tmp_path, monkeypatch, capsys):
    replayed = ["replay", recording, "--layout", "counts", "--ranks", 4, "--guests", 2]
    replayed += ["--json", tmp_path / "out.json", "--expert-bytes", 10, "--by-batch"]

    def copies(*options):
        assert command(*replayed, *options, "--png", tmp_path / "out.png") == 0
        told = json.loads((tmp_path / "out.json").read_text())["guests"]
        assert (10 * np.array(told["copies"]) == told["bytes"]).all()
        return np.sum(told["copies"])

    assert copies() > 10
    assert "batch" in capsys.readouterr().out
    assert copies("--guest-min-tokens", 10**6) == 0
    assert copies("--guest-tolerance", 1) < copies()
    monkeypatch.setenv("LPLB_EP_GUEST_MIN_TOKENS", "1000000")
    assert copies() == 0
    assert copies("--guest-min-tokens", 1) > 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "replay needs --placement or --guests"),
        (["--guests", 1], "--placement homes needs --ranks"),
        (["--guests", 1, "--ranks", 3], "--ranks must divide the number of experts: 3 does not"),
        (["--guests", -1, "--ranks", 4], "--guests must be a whole number of at least 0, got -1"),
        (["--guests", 1, "--ranks", 4, "--redundant", 1], "--redundant does not go with"),
        (["--guests", 1, "--ranks", 4, "--groups", 2], "--groups does not go with"),
        (["--guests", 1, "--ranks", 4, "--learn-from", "x.npy"], "--learn-from: there is no file"),
        (
            ["--guests", 1, "--ranks", 4, "--guest-tolerance", -1],
            "--guest-tolerance must be a number in [0, 1]; got -1",
        ),
        (
            ["--guests", 1, "--ranks", 4, "--guest-min-tokens", 0],
            "--guest-min-tokens must be a whole number of at least 1, below 2**31; got 0",
        ),
        (["--guests", 1, "--ranks", 4, "--expert-bytes", -1], "--expert-bytes must be at least 0"),
        (["--placement", "ring", "--ranks", 4, "--guest-min-tokens", 9], "needs --guests"),
        (["--placement", "ring", "--ranks", 4, "--expert-bytes", 9], "needs --guests or --refresh"),
        (
            ["--guests", 1, "--ranks", 4, "--refresh", 2, "--by-batch"],
            "--by-batch does not go with",
        ),
    ],
)
def test_replay_says_what_is_wrong_in_one_line(recording, fails, options, says):
    assert says in fails("replay", recording, "--layout", "counts", *options)


def test_place_makes_guest_slots(recording, tmp_path, capsys):
    made = ["place", recording, "--layout", "counts", "--seconds", 1]
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    assert command(*made, "--ranks", 4, "--redundant", 0, "--guests", 2, "-o", first) == 0
    out = capsys.readouterr().out
    placements = list(load_placements(first).values())
    assert [p.num_guests_per_rank for p in placements] == [2, 2]
    recorded = load_recording(recording, layout="counts")
    assert describe(recorded, placements)[0] in out
    assert "copies moved" in out
    assert command(*made, "--start", first, "--fixed-homes", "-o", again) == 0
    assert [p.num_guests_per_rank for p in load_placements(again).values()] == [2, 2]
    assert command(*made, "--start", first, "--guests", 1, "-o", again) == 0
    table = capsys.readouterr().out
    assert [p.num_guests_per_rank for p in load_placements(again).values()] == [1, 1]
    assert "slots changed" in table
    assert command(*made, "--ranks", 4, "--guests", 2, "-o", again) == 0  # no replicas
    assert [p.num_physical_experts for p in load_placements(again).values()] == [24, 24]


def test_place_needs_no_recording_for_homes(recording, tmp_path, capsys):
    shape = ["--experts", 16, "--ranks", 4, "--ranks-per-node", 2, "--guests", 2]
    assert command("place", *shape, "-o", tmp_path / "homes.json") == 0
    homes = Placement.load(tmp_path / "homes.json")
    assert homes == Placement.homes_only(16, 4, 2, num_ranks_per_node=2)
    assert repr(homes) in capsys.readouterr().out
    placement = ["--placement", tmp_path / "homes.json"]
    assert command("replay", recording, "--layout", "counts", *placement) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ranks", 4], "place needs a recording, or --start, or --experts, --ranks and"),
        (["--experts", 10, "--ranks", 4, "--guests", 1], "--ranks must divide --experts"),
        (["--experts", 8, "--ranks", 4, "--guests", -1], "--guests must be a whole number"),
        (
            ["--experts", 8, "--ranks", 4, "--guests", 1, "--redundant", 1],
            "--redundant needs a rec",
        ),
        (["--experts", 8, "--ranks", 4, "--guests", 1, "--fixed-homes"], "--fixed-homes needs a"),
    ],
)
def test_place_without_a_recording_says_what_is_wrong(tmp_path, fails, options, says):
    assert says in fails("place", *options, "-o", tmp_path / "out.json")


def test_doctor_tells_of_guests(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LPLB_EP_PLACEMENT", str(tmp_path / "homes.json"))
    Placement.homes_only(16, 4, 2).save(tmp_path / "homes.json")
    assert command("doctor") == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("  guests")]
    assert "2 a rank" in line
    assert "of 6 slots" in line
    assert "1.01 x the mean" in line
    assert "32 tokens" in line
    Placement.homes_only(16, 4).save(tmp_path / "homes.json")
    assert command("doctor") == 0
    assert "guests       none" in capsys.readouterr().out


def test_guests_beside_replicas_that_are_refreshed():
    rng = np.random.default_rng(2)
    weight = rng.lognormal(0, 1, (2, 16))
    counts = np.concatenate([rng.poisson(500 * w, (6, 1, 16)) for w in weight])
    recording = Recording.of(torch.from_numpy(counts), "a test")
    placement = Placement.for_lp(counts[:6, 0], 4, 1, max_steps=20, num_guests_per_rank=1)
    settings = Settings(refresh=2, refresh_seconds=30.0)
    timeline = replay_over_time([recording], [placement], settings)
    assert timeline.moves
    assert int(timeline.guests_kept.sum()) > int(timeline.guests.sum())
    assert timeline.to_json()["guests"]["kept"] == timeline.guests_kept.tolist()
    expected = solve(torch.from_numpy(counts[:, 0]), placement)
    assert (timeline.kept[:, 0] == expected.rank_load).all()
    assert (timeline.guests_kept[:, 0] == (expected.guests >= 0).sum((1, 2))).all()
    none = replay_over_time([recording], [placement], Settings(refresh=2, guest_min_tokens=10**6))
    assert int(none.guests_kept.sum()) == int(none.guests.sum()) == 0
