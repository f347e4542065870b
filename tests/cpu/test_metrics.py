"""What a running program sees of its layers: statistics, log lines, exporters, recordings."""

import gc
import logging
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from tallied import in_backward

import lplb_ep
from lplb_ep import GuestPool, Guests, Layer, Placement, Planner, Settings, logs, metrics
from lplb_ep.errors import MissingPackageError
from lplb_ep.metrics import rank_files, recorder, reporter
from lplb_ep.metrics.layers import stats_of
from lplb_ep.tools.cli import main
from lplb_ep.tools.metric_lines import read_metrics
from lplb_ep.tools.recordings import load_recording

E, R, K = 8, 2, 2
# Expert 0 is on both ranks.
PLACEMENT = Placement([0, 1, 2, 3, -1, 4, 5, 6, 7, 0], R, num_experts=E)


def planner_of(placement=PLACEMENT, name="", **arguments):
    layer = Layer(placement, name=name)
    return layer, Planner(layer, rank=0, counts="given", solver="cpu", **arguments)


def plan(planner, rng, number=1):
    """Plans batches; their loads [number, E]."""
    loads = []
    for _ in range(number):
        counts = torch.from_numpy(rng.integers(0, 9, (planner.placement.num_ranks, E)))
        topk = torch.arange(E).repeat_interleave(counts[0])[:, None]
        planner(topk, counts=counts)
        loads.append(counts.sum(0).numpy())
    return np.array(loads)


def on_ranks(group):
    """Batches of two layers through a buffer: what its statistics say, and the loads."""
    rng, loads = np.random.default_rng(group.rank()), {}
    layers = {name: Layer(PLACEMENT, name=name) for name in ("moe.3", "moe.5")}
    buffer = lplb_ep.Buffer(group)
    views = {name: buffer.view(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.mark_valid()
        loads[name] = []
        layer.observers.append(lambda counts, name=name: loads[name].append(counts.tolist()))
    metrics.reset()
    for i in range(4):
        for view in views.values():
            topk = np.stack([rng.permutation(E)[:K] for _ in range(5 + 9 * i)])
            view.get_dispatch_layout(torch.from_numpy(topk), E)
    layers["moe.5"].mark_stale()
    views["moe.5"].get_dispatch_layout(torch.tensor([[0, 1]]), E)
    alone = views["moe.3"].stats()
    # Channels of a group outlive buffers, and so may those of other tests.
    found = [vars(s) for s in buffer.stats() if s.layer in layers]
    return found, [vars(s) for s in alone], loads


def test_a_buffer_has_the_statistics_of_its_layers():
    environ = {"LPLB_EP": "1", "LPLB_EP_REPLICAS": "tracked"}
    home_rank = PLACEMENT.home_rank
    results = ranks.run(R, on_ranks, environ=environ)
    for rank, (found, alone, loads) in enumerate(results):
        assert [s["layer"] for s in found] == ["moe.3", "moe.5"]
        assert alone == found[:1]
        for stats in found:
            counts = np.array(loads[stats["layer"]])
            at_home = np.array([np.bincount(home_rank, c.sum(0), R) for c in counts])
            mean = Fraction(int(counts.sum()), R)
            assert stats["home_imbalance"] == float(Fraction(int(at_home.max(1).sum())) / mean)
            assert stats["worst_home_imbalance"] == (at_home.max(1) / at_home.mean(1)).max()
            assert stats["bound"] <= stats["imbalance"] <= stats["home_imbalance"]
            assert stats["rank"] == rank
            assert stats["rows"] == counts.sum()
            assert stats["own_rows_at_home"] == at_home[:, rank].sum()
            assert stats["batches"] == len(counts)
        assert found[0]["by_status"] == {"OPTIMAL": 4}
        assert found[1]["by_status"] == {"OPTIMAL": 4, "STALE": 1}
        assert found[1]["sent_home"] == 1
    of_group = [{k: v for k, v in s.items() if not k.startswith(("own", "rank"))} for s in found]
    first = [{k: v for k, v in s.items() if k in of_group[0]} for s in results[0][0]]
    assert of_group == first
    for both in zip(*(found for found, *_ in results), strict=True):
        assert sum(stats["own_rows"] for stats in both) == both[0]["rows"]


def test_a_window_begins_with_reset():
    rng = np.random.default_rng(0)
    layer, planner = planner_of(name="a layer")
    (empty,) = stats_of([layer])
    assert str(empty) == "a layer: no batches"
    assert np.isnan([empty.imbalance, empty.worst_imbalance, empty.bound]).all()
    assert empty.batches == 0
    plan(planner, rng, 5)
    assert stats_of([layer])[0].batches == 5
    before = stats_of([layer])[0]
    metrics.reset()
    assert stats_of([layer])[0].batches == stats_of([layer])[0].rows == 0
    assert np.isnan(stats_of([layer])[0].worst_home_imbalance)
    skewed = torch.zeros(R, E).int()
    skewed[0, 1] = 10
    planner(torch.full((10, 1), 1), counts=skewed)
    (after,) = stats_of([layer])
    assert after.worst_home_imbalance == after.home_imbalance == after.bound == 2
    assert before.worst_home_imbalance < 2
    assert (after.rows, after.own_rows, after.batches) == (10, 10, 1)
    assert any(s == after for s in metrics.snapshot())


def test_layers_without_a_name_have_a_number():
    (first, _), (second, _) = planner_of(), planner_of()
    assert first.label != second.label
    assert all(layer.label.startswith("layer ") for layer in (first, second))
    assert Layer(PLACEMENT, name="moe.7").label == "moe.7"


def test_ranks_that_take_no_part_are_not_in_the_mean():
    layer, planner = planner_of(Placement([0, 1, 2, 3, -1, -1], 3, num_experts=4))
    counts = torch.tensor([[4, 4, 0, 0], [0, 0, 4, 4], [0, 0, 0, 0]])
    planner(torch.tensor([[0, 1]] * 4), counts=counts)
    (stats,) = stats_of([layer])
    assert stats.home_imbalance == stats.imbalance == stats.worst_imbalance == 1


def guests_on_ranks(group):
    placement = Placement.homes_only(E, R, 1)
    layer = Layer(placement, name="with guests")
    experts = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(E // R))
    pool = GuestPool(group, 1, experts)
    guests = Guests(experts, layer, group, pool)
    buffer = lplb_ep.Buffer(group, placement=layer, num_local_slots=placement.num_local_slots)
    topk = torch.tensor([[0, 1], [2, 3]] * 40)  # all on the first rank
    layout = buffer.get_dispatch_layout(topk, E)
    buffer.dispatch(
        torch.ones(80, 16),
        topk_idx=topk,
        topk_weights=torch.ones(80, 2),
        num_tokens_per_rank=layout[0],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
    )
    (stats,) = buffer.view(layer).stats()
    assert guests.expert_bytes == 64
    del guests, buffer, layout
    gc.collect()
    assert layer.guests is None
    assert stats_of([layer]) == [stats], "what they moved stays known"
    return vars(stats), str(stats)


def test_guests_are_counted_with_their_bytes():
    first, second = ranks.run(R, guests_on_ranks, environ={"LPLB_EP": "1"})
    for stats, _ in (first, second):
        assert (stats["guests"], stats["guest_bytes"], stats["home_imbalance"]) == (1, 64, 2)
        assert stats["imbalance"] < 1.6
    assert [s["own_guests_sent"] for s, _ in (first, second)] == [1, 0]
    assert [s["own_guests_received"] for s, _ in (first, second)] == [0, 1]
    assert "1.0 guests a batch (0.1 kB)" in first[1]


# --- the log --------------------------------------------------------------------------------------


def test_a_line_comes_every_so_many_batches(caplog):
    rng = np.random.default_rng(0)
    _, planner = planner_of(name="a layer that logs", mark_every=4)
    _, other = planner_of(name="one on another rank", mark_every=4)
    other.rank = 1
    reports = reporter.Reporter(4, None)
    assert not reports.has_work
    caplog.set_level(logging.INFO, "lplb_ep")
    assert reports.has_work

    def said(last=False):
        reports.look(last=last)
        lines = [m for m in caplog.messages if "a layer that logs: " in m]
        caplog.clear()
        return lines

    plan(planner, rng, 3)
    plan(other, rng, 9)
    assert said() == []
    plan(planner, rng, 2)
    (line,) = said()
    assert line.startswith("lplb_ep: a layer that logs: imbalance 1.")
    assert "; 4 batches; " in line, "of the five that there are"
    assert said() == []
    planner(torch.empty(0, 1).long(), counts=torch.zeros(R, E).int(), stale=True)
    plan(planner, rng, 8)
    (line,) = said()
    assert "; 8 batches; " in line, "up to the twelfth"
    assert line.endswith("sent home: 1 STALE")
    assert said() == []
    (line,) = said(last=True)
    assert "; 2 batches; " in line, "what is left at the end"
    assert said(last=True) == []
    assert not any("another rank" in message for message in caplog.messages)
    assert not reporter.Reporter(0, None).has_work


def test_a_planner_that_has_ended_leaves_its_last_batches(caplog, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "run.npz"
    layer, planner = planner_of(name="ended.moe", mark_every=4, sample_every=2)
    caplog.set_level(logging.INFO, "lplb_ep")
    reports = reporter.Reporter(4, recorder.Recorder(path, 2))
    reports.follow(planner)
    loads = plan(planner, rng, 5)
    reports.look()
    loads = np.concatenate([loads, plan(planner, rng, 2)])
    del layer, planner
    gc.collect()
    for last in (False, True):
        reports.look(last=last)
    said = [m.split("; ")[1] for m in caplog.messages if "ended.moe" in m]
    assert said == ["4 batches", "3 batches"]
    assert (load_recording(path).counts[:, 0].numpy() == loads[::2]).all()


def test_every_layer_logs_at_its_own_batches(caplog):
    """However far each is when the thread looks."""
    rng, (_, first), (_, second) = (
        np.random.default_rng(0),
        planner_of(name="first.moe", mark_every=20),
        planner_of(name="second.moe", mark_every=20),
    )
    caplog.set_level(logging.INFO, "lplb_ep")
    reports = reporter.Reporter(20, None)
    for first_batches, second_batches in ((22, 19), (10, 5), (9, 16), (0, 23)):
        plan(first, rng, first_batches)
        plan(second, rng, second_batches)
        reports.look()
    lines = [m for m in caplog.messages if "first.moe" in m or "second.moe" in m]
    said = [(line.split(": ")[1], line.split("; ")[1]) for line in lines]
    assert said == [
        ("first.moe", "20 batches"),
        ("second.moe", "20 batches"),
        ("first.moe", "20 batches"),
        ("second.moe", "20 batches"),
        ("second.moe", "20 batches"),
    ]


def test_t_star_is_told_where_it_is_known(caplog):
    rng = np.random.default_rng(0)
    layer, planner = planner_of(name="by slots", objective="experts")
    plan(planner, rng, 3)
    (stats,) = stats_of([layer])
    assert np.isnan(stats.bound)
    assert (stats.bound_load, stats.bound_mean_load) == (0, 0)
    assert "as planned; 3 batches" in str(stats)
    assert "lplb_ep/by slots/bound" not in metrics.scalars()
    assert "lplb_ep/by slots/imbalance" in metrics.scalars()
    layer, planner = planner_of(name="by tokens")
    skewed, even = torch.zeros(R, E).int(), torch.zeros(R, E).int()
    skewed[0, 1], even[0, :] = 10, 10
    planner(torch.full((10, 1), 1), counts=skewed)
    planner(torch.arange(E).repeat(10)[:, None], counts=even, stale=True)
    (stats,) = stats_of([layer])
    assert stats.bound == 2, "of the one batch that was planned, not of the one at home"
    assert stats.bound_mean_load == 5
    assert "T* 2.000" in str(stats)
    layer, planner = planner_of(name="nothing to do")
    planner(torch.empty(0, 1).long(), counts=torch.zeros(R, E).int())
    assert str(stats_of([layer])[0]) == "nothing to do: no rows; 1 batch"


def test_messages_are_shown_where_asked_for(capsys, monkeypatch):
    package = logging.getLogger("lplb_ep")
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "propagate", True)
    monkeypatch.setattr(package, "level", package.level)
    logs.show("program")
    assert not package.handlers
    for _ in range(2):
        logs.show("info")
    logs.logger("lplb_ep.somewhere").info("%d layers", 3)
    logs.logger("lplb_ep.somewhere").debug("nothing")
    assert capsys.readouterr().err == "lplb_ep: 3 layers\n"


def rank_said(group):
    said = ranks.Said()
    logs.logger("lplb_ep.somewhere").error("%s", "what")
    return said.lines, logs.is_first(group), logs.is_first(None)


def test_messages_name_the_rank():
    assert ranks.run(2, rank_said) == [
        (["lplb_ep rank 0: what"], True, True),
        (["lplb_ep rank 1: what"], False, False),
    ]
    assert logs.is_first(None)


# --- exporters ------------------------------------------------------------------------------------


def test_numbers_go_to_tensorboard_and_others():
    _, planner = planner_of(name="exported")
    plan(planner, np.random.default_rng(0), 3)
    (stats,) = (s for s in metrics.snapshot() if s.layer == "exported")
    numbers = metrics.scalars("moe")
    assert numbers["moe/exported/imbalance"] == stats.imbalance
    assert numbers["moe/exported/batches"] == 3.0
    assert all(type(value) is float for value in numbers.values())
    written = {}

    class Writer:
        def add_scalar(self, name, value, step):
            written[name] = value, step

    metrics.write_tensorboard(Writer(), 7)
    assert written["lplb_ep/exported/imbalance"] == (stats.imbalance, 7)


def test_layers_of_one_name_are_one_in_all_exporters(tmp_path):
    """As of two models of a process; the last one's numbers do not stand for both."""
    prometheus_client = pytest.importorskip("prometheus_client")
    rng, registry = np.random.default_rng(0), prometheus_client.CollectorRegistry()
    (first, busy), (_, idle), (_, rare) = (planner_of(name="twice.moe") for _ in range(3))
    lines = metrics.LineFile(tmp_path / "run.jsonl")
    plan(busy, rng, 5)
    idle(torch.empty(0, 1).long(), counts=torch.zeros(R, E).int())
    skewed = torch.zeros(R, E).int()
    skewed[0, 1] = 10
    rare(torch.full((10, 1), 1), counts=skewed)
    (alone,) = stats_of([first])
    numbers = metrics.scalars()
    metrics.register_prometheus(registry)
    text = prometheus_client.generate_latest(registry).decode()
    lines.write()
    (line,) = (x for x in read_metrics(lines.path).lines if x.stats.layer == "twice.moe")
    assert numbers["lplb_ep/twice.moe/batches"] == line.stats.batches == 7
    assert numbers["lplb_ep/twice.moe/rows"] == line.stats.rows == alone.rows + 10
    assert alone.worst_home_imbalance < numbers["lplb_ep/twice.moe/worst_home_imbalance"] == 2
    expected = (alone.largest_load + 10) / (alone.mean_load + 5)
    assert numbers["lplb_ep/twice.moe/imbalance"] == line.stats.imbalance == expected
    assert text.count('lplb_ep_rows_total{layer="twice.moe",rank="0"} ') == 1
    assert f'lplb_ep_rows_total{{layer="twice.moe",rank="0"}} {alone.rows + 10}.0' in text


def test_prometheus_scrapes_counters_that_never_go_back(monkeypatch):
    prometheus_client = pytest.importorskip("prometheus_client")
    rng, registry = np.random.default_rng(0), prometheus_client.CollectorRegistry()
    _, planner = planner_of(name="scraped")
    collector = metrics.register_prometheus(registry)
    of_layer = {"layer": "scraped", "rank": "0"}

    def value(name, **labels):
        return registry.get_sample_value(f"lplb_ep_{name}_total", of_layer | labels)

    loads = plan(planner, rng, 3)
    metrics.reset()
    assert value("batches", status="OPTIMAL") == 3
    assert value("rows") == loads.sum() == value("mean_load") * R
    loads = np.concatenate([loads, plan(planner, rng, 2)])
    assert value("rows") == loads.sum()
    assert value("largest_load") / value("mean_load") < value("largest_home_load")
    assert value("bound_mean_load") == value("mean_load")
    assert b'lplb_ep_rows_total{layer="scraped",rank="0"}' in prometheus_client.generate_latest(
        registry
    )
    registry.unregister(collector)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lplb-ep\[prometheus\]'"):
        metrics.register_prometheus()


# --- recordings -----------------------------------------------------------------------------------


def recorded(path, every=2, **arguments):
    """Two layers with samples, and a recorder of these."""
    made = [planner_of(name=f"layers.{i}.moe", sample_every=every) for i in (3, 7)]
    return made, recorder.Recorder(path, every, **arguments)


def test_a_recording_is_read_by_replay_and_place(tmp_path, capsys):
    rng, path = np.random.default_rng(0), tmp_path / "run.npz"
    made, records = recorded(path)
    assert records.is_writable()
    loads = [plan(planner, rng, 7)[::2] for _, planner in made]
    layers = [layer for layer, _ in made]
    records.take(layers)
    records.write()
    assert not path.exists()  # it is not yet time
    records.write(now=True)
    recording = load_recording(path)
    assert recording.layers == (3, 7)
    assert recording.source == "run.npz: a run, every 2 batches"
    assert (recording.counts.numpy() == np.stack(loads, 1)).all()
    assert np.load(path)["batches"].tolist() == [0, 2, 4, 6]
    assert np.load(path)["names"].tolist() == ["layers.3.moe", "layers.7.moe"]
    assert main(["replay", str(path), "--ranks", "2", "--redundant", "1", "--placement", "lp"]) == 0
    assert (
        main(
            ["place", str(path), "--ranks", "2", "--redundant", "1", "-o", str(tmp_path / "p.json")]
        )
        == 0
    )
    assert "2 layers" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    plan(made[0][1], rng, 2)  # a batch that the other layer does not come to
    records.take(layers)
    records.write(now=True)
    assert load_recording(path).counts[-1, 1].sum() == 0
    (tmp_path / "run.npz").write_bytes(b"damaged")
    plan(made[0][1], rng, 2)
    records.take(layers)
    records.write(now=True)
    assert len(load_recording(path).counts) == 6


def test_batches_of_micro_batch_slots_and_of_new_planners_are_all_recorded(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "run.npz"
    layers = [Layer(PLACEMENT, name=f"layers.{i}") for i in range(2)]
    records, loads, kept = recorder.Recorder(path, 1), [], []

    def of_slot(slot):
        arguments = dict(rank=0, counts="given", solver="cpu", slot=slot, sample_every=1)
        kept.append([Planner(layer, **arguments) for layer in layers])
        return kept[-1]

    first, second = of_slot(0), of_slot(1)
    for number in range(2):
        for planners in (first, second):
            loads.append([plan(planner, rng)[0] for planner in planners])
        records.take(layers)
        kept += [of_slot(5 + number)]  # which puts planners in another order
    later = of_slot(0)
    loads.append([plan(planner, rng)[0] for planner in later])
    records.take(layers)
    records.write(now=True)
    assert (load_recording(path).counts.numpy() == np.array(loads)).all()


def test_layers_of_one_batch_are_in_one_row(tmp_path):
    """However many other planners each of them has, and whichever are planned again."""
    rng, path = np.random.default_rng(0), tmp_path / "run.npz"
    layers = [Layer(PLACEMENT, name=f"one row.{i}") for i in range(6)]
    arguments = dict(rank=0, counts="given", solver="cpu")
    kept, planners, loads = [], [], []
    for number, layer in enumerate(layers):
        kept += [Planner(layer, **arguments) for _ in range(number % 3)]
        planners.append(Planner(layer, **arguments, sample_every=2))
        kept += [Planner(layer, **arguments) for _ in range(3)]
    records = recorder.Recorder(path, 2)
    for _ in range(5):
        row = []
        for planner in planners:
            row.append(plan(planner, rng)[0])
        in_backward(lambda: [plan(planner, rng) for planner in planners[:2]])
        loads.append(row)
        records.take(layers)
    records.write(now=True)
    recording = load_recording(path)
    assert (recording.counts.numpy() == np.array(loads)[::2]).all()
    assert np.load(path)["batches"].tolist() == [0, 2, 4]
    assert [s.recomputed for s in stats_of(layers)] == [5, 5, 0, 0, 0, 0]


def test_layers_that_are_made_anew_go_on_in_other_rows(tmp_path):
    rng, path, kept = np.random.default_rng(0), tmp_path / "run.npz", []
    records, loads = recorder.Recorder(path, 1), []
    for _ in range(2):
        layers = [Layer(PLACEMENT, name=f"anew.{i}") for i in range(2)]
        planners = [
            Planner(layer, rank=0, counts="given", solver="cpu", sample_every=1) for layer in layers
        ]
        for _ in range(2):
            loads.append([plan(planner, rng)[0] for planner in planners])
        kept += planners
        records.take(layers)
    records.write(now=True)
    assert (load_recording(path).counts.numpy() == np.array(loads)).all()


def test_a_recording_of_a_long_run_keeps_its_size(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "run.npz"
    made, records = recorded(path, every=1, max_bytes=10 * 2 * E * 4)
    for _ in range(4):
        for _, planner in made:
            plan(planner, rng, 10)
        records.take([layer for layer, _ in made])
    records.write(now=True)
    batches = np.load(path)["batches"].tolist()
    assert 5 <= len(batches) <= 10
    assert batches == [*range(0, 40, batches[1])]


def test_where_no_file_can_be_written_one_line_says_so(tmp_path, caplog):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "nowhere" / "run.npz", "No such file or directory"),
        (tmp_path / "folder.npz", "Is a directory"),
        (tmp_path / "file" / "run.npz", "Not a directory"),
    ):
        made, records = recorded(path)
        assert not records.is_writable()
        plan(made[0][1], np.random.default_rng(0), 3)
        records.take([layer for layer, _ in made])
        for _ in range(3):
            records.write(now=True)
        expected = f"lplb_ep: LPLB_EP_RECORD: {path} cannot be written: {reason}"
        assert caplog.messages == [expected]
        caplog.clear()


def test_layers_of_other_sizes_are_left_out(tmp_path, caplog):
    rng, path = np.random.default_rng(0), tmp_path / "run.npz"
    made, records = recorded(path)
    layer, planner = planner_of(Placement([0, 1, 2, 3], 2), name="small", sample_every=2)
    planner(torch.tensor([[0]]), counts=torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]))
    for _, one in made:
        plan(one, rng, 2)
    records.take([*(layer for layer, _ in made), layer])
    records.write(now=True)
    assert load_recording(path).layers == (3, 7)
    assert caplog.messages == [
        "lplb_ep: LPLB_EP_RECORD: small have other numbers of experts and are left out"
    ]


@pytest.fixture
def in_job(monkeypatch):
    """Says which rank of how many this process is."""

    def is_rank(rank, size):
        monkeypatch.setattr(rank_files.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(rank_files.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(rank_files.dist, "get_world_size", lambda: size)

    return is_rank


def test_each_group_writes_a_file_of_its_own(in_job):
    path = Path("out/run.npz").absolute()
    assert rank_files.path_of_rank(path) == path
    in_job(8, 16)
    assert rank_files.path_of_rank(path) == path.with_name("run.rank8.npz")


def test_files_that_an_earlier_job_left_are_removed(in_job, tmp_path, monkeypatch):
    """It had 32 ranks in groups of 8, and this one has 16 in one group."""
    left = [
        f"run{rank}{before}.jsonl"
        for rank in ("", ".rank8", ".rank24")
        for before in ("", ".before")
    ]
    left += ["run.rank24.npz"]
    others = ["run.rank.jsonl", "run.rank24.txt", "run.rank24.after.jsonl", "a.run.rank24.jsonl"]
    others += ["run.rank024.jsonl", "runs.rank24.jsonl"]
    settings = Settings(metrics=str(tmp_path / "run.jsonl"))
    monkeypatch.setattr(reporter, "_start", lambda settings: reporter._reporters.append(reports))
    reports = reporter.Reporter(0, None)

    def in_process(rank, planner_rank):
        """What is left when a process has made its first planner."""
        monkeypatch.setattr(reporter, "_reporters", [])
        monkeypatch.setattr(reporter, "_cleared", set())
        in_job(rank, 16)
        _, planner = planner_of()
        planner.rank = planner_rank
        reporter.report(settings, planner)
        assert bool(reporter._reporters) == (planner_rank == 0)
        return {file.name for file in tmp_path.iterdir()}

    for name in [*left, *others]:
        (tmp_path / name).write_text("")
    (tmp_path / "run.rank99.jsonl").mkdir()
    kept = {*left, *others, "run.rank99.jsonl"} - {"run.rank24.jsonl", "run.rank24.before.jsonl"}
    assert in_process(3, 3) == kept
    assert in_process(0, 0) == kept
    # The first rank of another group would write its file; as another rank it leaves none.
    assert in_process(8, 0) == kept
    assert in_process(8, 8) == kept - {"run.rank8.jsonl", "run.rank8.before.jsonl"}
    metrics.LineFile(tmp_path / "run.jsonl")
    assert not (tmp_path / "run.before.jsonl").exists()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LPLB_EP_RECORD", "run.pt", "LPLB_EP_RECORD must be a file that ends in .npz; got run.pt"),
        ("LPLB_EP_RECORD_EVERY", "0", "LPLB_EP_RECORD_EVERY must be a whole number of at least 1"),
        ("LPLB_EP_METRICS", "run.json", "LPLB_EP_METRICS must be a file that ends in .jsonl; got"),
        ("LPLB_EP_LOG", "warn", "LPLB_EP_LOG must be one of program, info, debug; got 'warn'"),
        ("LPLB_EP_LOG_EVERY", "often", "LPLB_EP_LOG_EVERY must be a whole number; got 'often'"),
    ],
)
def test_wrong_settings_are_named(variable, value, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Settings.from_env({variable: value})


PROGRAM = """
import multiprocessing
import sys
import torch
import torch.distributed as dist
import lplb_ep

def run():
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    layer = lplb_ep.Layer(lplb_ep.Placement([0, 1, 2, 0], 1), name="model.layers.4.moe")
    buffer = lplb_ep.Buffer(dist.group.WORLD, placement=layer, num_local_slots=4)
    for i in range(10):
        buffer.get_dispatch_layout(torch.arange(3)[:, None].repeat(1 + i, 1), 3)
    if sys.argv[3] == "leaves":
        dist.destroy_process_group()

if __name__ == "__main__":
    if sys.argv[2] == "itself":
        run()
    else:
        process = multiprocessing.get_context(sys.argv[2]).Process(target=run)
        process.start()
        process.join()
"""


@pytest.mark.parametrize(
    ("process", "group"), [("itself", "stays"), ("itself", "leaves"), ("fork", "leaves")]
)
def test_a_process_that_ends_leaves_its_recording_and_lines(process, group, tmp_path):
    environ = {
        "LPLB_EP": "1",
        "LPLB_EP_REPLICAS": "valid",
        "LPLB_EP_LOG": "info",
        "LPLB_EP_LOG_EVERY": "10",
        "LPLB_EP_RECORD": str(tmp_path / "run.npz"),
        "LPLB_EP_RECORD_EVERY": "3",
        "LPLB_EP_METRICS": str(tmp_path / "run.jsonl"),
        "PYTHONPATH": str(Path(lplb_ep.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store"), process, group],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    recording = load_recording(tmp_path / "run.npz")
    assert recording.counts[:, 0].tolist() == [[n] * 3 for n in (1, 4, 7, 10)]
    assert recording.layers == (4,)
    (line,) = read_metrics(tmp_path / "run.jsonl").lines
    assert (line.stats.layer, line.stats.batches) == ("model.layers.4.moe", 10)
    assert line.stats.rows == 3 * sum(range(1, 11))
    assert [s for s in done.stderr.splitlines() if " batches" in s and "10 batches" not in s] == []
    (line,) = (line for line in done.stderr.splitlines() if "10 batches" in line)
    assert line.startswith("lplb_ep rank 0: ")
    assert "model.layers.4.moe: imbalance 1.000 at home, 1.000 as planned, T* 1.000" in line
