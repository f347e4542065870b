"""Statistics of a run as lines of a file, and the page that `lplb-ep report` makes of them."""

import csv
import dataclasses
import errno
import functools
import io
import itertools
import json
import logging
import os
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from hypothesis import given
from test_damaged_files import COUNT, check_said, damaged, examples, said
from test_report import CHROMIUM, body_of, browse, content_of

from lplb_ep import Layer, Placement, Planner, Settings, metrics
from lplb_ep.metrics import LineFile, line_file, rank_files, reporter
from lplb_ep.metrics.layers import stats_of
from lplb_ep.tools import cli, report_metrics
from lplb_ep.tools.metric_lines import read_metrics
from lplb_ep.tools.report_metrics import page_of_metrics

pytestmark = pytest.mark.usefixtures("clean_environment")

E, R, EXPERT_BYTES = 16, 4, 3_000_000
NAMES = ["layers.3.<b>mlp</b>", "layers.12.<b>mlp</b>"]
IDLE, STALE = 3, 2
"""Windows in which the second layer has no batch, and a stale one."""
SUMS = ("batches", "rows", "guests", "guest_bytes", "largest_home_load", "largest_load")


def planner_of(name, guests=1):
    layer = Layer(Placement.homes_only(E, R, guests), name=name)
    layer.guest_bytes = EXPERT_BYTES
    return layer, Planner(layer, rank=0, counts="given", guest_min_tokens=1)


def plan(planner, rng, number, **kinds):
    for _ in range(number):
        counts = torch.from_numpy(rng.poisson(rng.lognormal(3, 1, E), (R, E)))
        planner(torch.arange(E).repeat_interleave(counts[0])[:, None], counts=counts, **kinds)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The file of a run of two layers in six windows, and what the layers' statistics are."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("run") / "run.jsonl"
    first, second = (planner_of(name) for name in NAMES)
    lines = LineFile(path)
    for window in range(6):
        plan(first[1], rng, 4)
        if window == 1:
            metrics.reset()  # which begins no window of the file
        if window != IDLE:
            plan(second[1], rng, 3 if window == STALE else 4)
        if window == STALE:
            plan(second[1], rng, 1, stale=True)
        # Layers of other tests may be alive.
        lines.add(s for s in lines._window.stats([first[0], second[0]], renew_at=1))
    whole = [line_file.Window().stats([layer])[0] for layer, _ in (first, second)]
    return path, whole


def test_times_of_lines_do_not_go_back_with_the_clock(tmp_path, monkeypatch):
    clock = itertools.count(2e9, -60)
    monkeypatch.setattr(line_file.time, "time", lambda: next(clock))
    layer, planner = planner_of("layer")
    lines = LineFile(tmp_path / "run.jsonl")
    for _ in range(3):
        plan(planner, np.random.default_rng(0), 1)
        lines.add(lines._window.stats([layer], renew_at=1))
    times = [line.time for line in read_metrics(lines.path).lines]
    assert len(times) == 3
    assert times == sorted(times)


def test_times_of_a_page_do_not_go_back_where_a_layer_lags(run, tmp_path):
    """The second layer's last batches come behind further ones of the first."""
    lines = [json.loads(line) for line in run[0].read_text().splitlines()]
    spread = [json.dumps({**line, "time": 10.0 * (i + 1)}) for i, line in enumerate(lines)]
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(spread) + "\n")
    times = content_of(page_of_metrics(read_metrics(path)))["times"]
    assert len(lines) == 11
    assert times[-2:] == [110.0, 110.0]  # lines 11, of the second layer, and 10
    assert times == sorted(times)


def test_lines_are_windows_that_add_up_to_the_run(run):
    path, whole = run
    lines = read_metrics(path).lines
    assert [line.stats.layer for line in lines[:4]] == [*NAMES, *NAMES]
    for stats in whole:
        own = [line for line in lines if line.stats.layer == stats.layer]
        for name in SUMS:
            assert sum(getattr(line.stats, name) for line in own) == getattr(stats, name), name
        ends = [line.before + line.stats.batches for line in own]
        assert [line.before for line in own] == [0, *ends[:-1]]
        assert sum(line.stats.stale for line in own) == stats.stale
    assert whole[1].stale == 1
    assert whole[0].guests
    assert whole[0].guest_bytes == whole[0].guests * EXPERT_BYTES
    values = [json.loads(text) for text in path.read_text().splitlines()]
    assert {value["run"] for value in values} == {values[0]["run"]}
    assert not any(name.startswith("worst") for name in values[0])


def test_a_file_has_the_batches_since_its_last_line(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "run.jsonl"
    path.write_text("what was there")
    layer, planner = planner_of("of a file")
    lines = LineFile(path)
    assert path.read_text() == ""

    def written():
        lines.write()
        content = [json.loads(text) for text in path.read_text().splitlines()]
        return [line["batches"] for line in content if line["layer"] == "of a file"]

    assert written() == []
    plan(planner, rng, 3)
    assert written() == [3]
    assert written() == [3]
    planner(torch.empty(0, 1).long(), counts=torch.zeros(R, E).int())
    assert written() == [3, 1]
    (last,) = [line for line in read_metrics(path).lines if line.before == 3]
    assert np.isnan([last.stats.imbalance, last.stats.worst_imbalance]).all()
    assert stats_of([layer])[0].batches == 4, "no other window has changed"
    with pytest.raises(ValueError, match=r"path must end in \.jsonl; got run\.json$"):
        LineFile("run.json")
    with pytest.raises(OSError, match="No such file or directory"):
        LineFile(tmp_path / "nowhere" / "run.jsonl")


def test_a_full_file_stays_beside_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(line_file, "MAX_BYTES", 1500)  # two lines
    rng, path = np.random.default_rng(0), tmp_path / "run.jsonl"
    layer, planner = planner_of("long")
    lines = LineFile(path)
    for number in range(1, 9):
        plan(planner, rng, number)
        lines.add(lines._window.stats([layer], renew_at=1))
    files = [path.with_name("run.before.jsonl"), path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    kept = [line.stats.batches for file in files for line in read_metrics(file).lines]
    assert kept == [*range(9 - len(kept), 9)]
    assert 3 <= len(kept) <= 6


def test_what_cannot_be_written_is_in_the_next_line(tmp_path, monkeypatch):
    """Even where a part of a line was written, as on a full disk."""
    rng, path = np.random.default_rng(0), tmp_path / "run.jsonl"
    layer, planner = planner_of("patient")
    lines = LineFile(path)

    def write():
        plan(planner, rng, 3)
        lines.add(lines._window.stats([layer], renew_at=1))

    write()
    for size in (500, 1000):  # nothing of the next line has room, and a part of it
        full = functools.partial(Full, size)
        with monkeypatch.context() as changed:
            changed.setattr(line_file, "open", full, raising=False)
            with pytest.raises(OSError, match="No space left"):
                write()
        assert len(read_metrics(path).lines) == 1
        assert not read_metrics(path).is_cut
    write()
    first, second = (line.stats for line in read_metrics(path).lines)
    assert (first.batches, second.batches) == (3, 9)
    whole = stats_of([layer])[0]
    for name in (*SUMS, "own_rows", "mean_load", "bound_load"):
        assert getattr(first, name) + getattr(second, name) == getattr(whole, name), name
    assert second.home_imbalance == second.largest_home_load / second.mean_load
    assert second.by_status == {"OPTIMAL": 9}


class Full(io.FileIO):
    """A file on a disk that is full after so many bytes."""

    def __init__(self, size, path, mode, buffering=0):
        super().__init__(path, mode)
        self.room = size

    def write(self, content):
        room = self.room - self.tell()
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content[:room])


def test_layers_of_one_name_are_one_line(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "run.jsonl"
    (one, first), (other, second) = (planner_of("twin") for _ in range(2))
    lines = LineFile(path)
    for number in (2, 3):
        plan(first, rng, number)
        plan(second, rng, 4)
        lines.add(lines._window.stats([one, other], renew_at=1))
    read = read_metrics(path).lines
    assert [(line.before, line.stats.batches) for line in read] == [(0, 6), (6, 7)]


def test_a_file_stays_where_it_is(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    layer, planner = planner_of("moved")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    lines = LineFile("run.jsonl")
    monkeypatch.chdir("other")
    plan(planner, rng, 1)
    lines.add(lines._window.stats([layer], renew_at=1))
    assert len(read_metrics(tmp_path / "run.jsonl").lines) == 1
    assert not [*(tmp_path / "other").iterdir()]
    assert rank_files.path_of_rank(Path("loads.npz")) == tmp_path / "other" / "loads.npz"


def test_only_a_regular_file_is_written(tmp_path):
    pipe, link, aim = (tmp_path / f"{name}.jsonl" for name in ("pipe", "link", "aim"))
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        LineFile(pipe)
    with pytest.raises(IsADirectoryError):
        line_file.check_writable(tmp_path)
    link.symlink_to(aim)
    line_file.check_writable(link)
    assert link.is_symlink()
    assert not aim.exists()
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "aim.jsonl")
    with pytest.raises(OSError, match="No such file"):
        line_file.check_writable(link)
    aim.write_text("kept")
    line_file.check_writable(aim)
    assert aim.read_text() == "kept"


def test_the_reporter_writes_what_it_would_log(tmp_path, caplog):
    rng, path = np.random.default_rng(0), tmp_path / "run.jsonl"
    layer = Layer(Placement.homes_only(E, R), name="reported")
    planner = Planner(layer, rank=0, counts="given", mark_every=4)
    caplog.set_level(logging.WARNING, "lplb_ep")
    reports = reporter.Reporter(4, None, LineFile(path))
    assert reports.has_work
    for number in (3, 6, 4):
        plan(planner, rng, number)
        reports.look()
    reports.look(last=True)
    lines = [line.stats for line in read_metrics(path).lines if line.stats.layer == "reported"]
    assert [stats.batches for stats in lines] == [8, 4, 1], "at marks, and what is left"
    path.unlink()
    path.mkdir()
    for _ in range(2):
        plan(planner, rng, 4)
        reports.look()
    (message,) = caplog.messages
    assert message == f"lplb_ep: LPLB_EP_METRICS: {path} cannot be written: Is a directory"


def test_a_file_that_cannot_be_written_is_named_and_nothing_else_happens(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(reporter, "_reporters", [])
    reporter._start(Settings(metrics=str(tmp_path / "nowhere" / "run.jsonl")))
    assert reporter._reporters == []
    assert "LPLB_EP_METRICS: " in caplog.text
    assert "No such file or directory" in caplog.text
    with pytest.raises(ValueError, match="LPLB_EP_METRICS needs LPLB_EP_LOG_EVERY above 0"):
        Settings(metrics="run.jsonl", log_every=0)


# --- the page -------------------------------------------------------------------------------------


def test_a_page_has_the_numbers_of_the_lines(run):
    path, whole = run
    data = content_of(page_of_metrics(read_metrics(path), ["A note."]))
    assert (data["kind"], data["layers"], data["num_ranks"]) == ("metrics", NAMES, str(R))
    assert (data["starts"], data["num_batches"]) == ([0, 4, 8, 12, 16, 20], 24)
    sums = {name: np.array(v, float).reshape(6, 2) for name, v in data["sums"].items()}
    # The second layer has one window less, and so none in the last.
    assert np.isnan(sums["home"]).tolist() == [[False, False]] * 5 + [[False, True]]
    of_layers = {name: np.nansum(values, 0) for name, values in sums.items()}
    for number, stats in enumerate(whole):
        assert of_layers["home"][number] == stats.largest_home_load
        assert of_layers["guest_bytes"][number] == stats.guest_bytes
        got = of_layers["lp"][number] / of_layers["mean"][number]
        assert got == pytest.approx(stats.imbalance, abs=1e-4)
    assert data["ended"]["STALE"] == [int(i == 2 * STALE + 1) for i in range(12)]
    assert all(before <= after for before, after in itertools.pairwise(data["times"]))


def test_many_windows_are_put_together(run, monkeypatch):
    monkeypatch.setattr(report_metrics, "_MOST_WINDOWS", 2)
    data = content_of(page_of_metrics(read_metrics(run[0])))
    assert data["starts"] == [0, 12]
    assert data["sums"]["batches"] == [12, 12, 12, 8]


def written(path, windows):
    """A file of one layer's windows, of so many batches each."""
    layer, planner = planner_of("uneven")
    lines, rng = LineFile(path), np.random.default_rng(0)
    for number in windows:
        plan(planner, rng, number)
        lines.add(lines._window.stats([layer], renew_at=1))
    return read_metrics(path)


def test_windows_of_any_size_are_points(tmp_path):
    data = content_of(page_of_metrics(written(tmp_path / "run.jsonl", [4, 4, 20, 12, 4, 1])))
    assert data["starts"] == [0, 4, 8, 28, 40, 44]
    assert data["sums"]["batches"] == [4, 4, 20, 12, 4, 1]
    assert data["num_batches"] == 45
    data = content_of(page_of_metrics(written(tmp_path / "run.jsonl", [5])))
    assert data["starts"] == [0]
    assert "5 batches in 1 window, written" in data["about"]


def test_the_command_writes_a_page_and_a_table(run, tmp_path, capsys):
    page, table = tmp_path / "page.html", tmp_path / "table.csv"
    assert cli.main(["report", str(run[0]), "-o", str(page), "--csv", str(table)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"{page}: run.jsonl; 2 layers, 4 ranks, 44 batches in 11 windows, ")
    homes = sorted(stats.home_imbalance for stats in run[1])
    middle, worst = np.mean(homes), homes[1]
    assert told[1].endswith(f"median layer {middle:.3f}, worst layer {worst:.3f}")
    assert [line.split("  ")[0] for line in told[1:]] == ["at home", "as planned", "lower bound"]
    rows = [*csv.DictReader(table.read_text().splitlines())]
    assert len(rows) == 11
    assert sum(int(row["STALE"]) for row in rows) == 1
    assert sum(int(row["rows"]) for row in rows) == sum(stats.rows for stats in run[1])
    assert content_of(page.read_text())["kind"] == "metrics"


def test_a_file_that_grows_is_read_up_to_its_last_whole_line(run, tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    whole = run[0].read_text()
    path.write_text(whole[:-40])
    assert cli.main(["report", str(path), "-o", str(tmp_path / "page.html")]) == 0
    told = capsys.readouterr().out
    assert "in 10 windows" in told
    assert "the last line is left out: only a part of it is there" in told
    path.write_text(whole.rstrip("\n"))
    assert not read_metrics(path).is_cut


def changed(number, **values):
    """Makes a change of a line, where None takes a value away."""

    def change(lines):
        line = {**json.loads(lines[number]), **values}
        lines[number] = json.dumps({k: v for k, v in line.items() if v != "away"})
        return lines

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: [], "is empty: the run has no window of batches yet"),
        (lambda lines: ["[1]"], "is not a file of JSON lines: it begins with '[1]\\n'"),
        (lambda lines: ['{"a": 1}'], "line 1 is none of lplb_ep's metrics"),
        (lambda lines: [*lines[:2], "{"], "line 3: Expecting property name"),
        (lambda lines: [*lines, "{}", ""], "line 13: Expecting value, at character 1"),
        (lambda lines: ['{"a": ' + "1" * 5000 + "}"], "JSON lines: line 1: a number is too long"),
        (lambda lines: [*lines[:2], *lines[4:]], "line 3 'layers.3.<b>mlp</b>' goes on at batch 8"),
        (lambda lines: [*lines, lines[-1]], "lines are missing, or come twice"),
        (changed(1, lplb_ep_metrics=2), "line 2 is of version 2; only 1 can be read"),
        (changed(1, run="another"), "line 2 is of the run 'another', and the first of "),
        (changed(1, lplb_ep_metrics=[1] * 5000), "version [1, 1, 1, 1, 1, 1, ...]; only 1 can be"),
        (changed(1, layer="\ud800"), r"line 2 has a wrong layer: '\ud800'"),
        (changed(1, rows="away"), "line 2 lacks 'rows'"),
        (changed(1, colour=1), "line 2 has an unknown 'colour'"),
        (changed(0, rows=-1), "line 1 has a wrong rows: -1"),
        (changed(0, rows=True), "line 1 has a wrong rows: True"),
        (changed(0, rows=2**53), "line 1 has a wrong rows: 9007199254740992"),
        (changed(0, mean_load=None), "line 1 has a wrong mean_load: None"),
        (changed(0, mean_load=float("inf")), "line 1 has a wrong mean_load: inf"),
        (changed(0, by_status={"FINE": 4}), "line 1 has an unknown status: 'FINE'"),
        (changed(0, batches=5), "line 1 has 5 batches, and ends of {'OPTIMAL': 4}"),
        (changed(0, time=1e12), "line 1 has an impossible time"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(fails, run, tmp_path, change, says):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(f"{line}\n" for line in change(run[0].read_text().splitlines())))
    line = fails("report", path, "-o", tmp_path / "page.html")
    assert says in line
    assert line.startswith(f"lplb-ep: error: {path}")


def test_options_of_recordings_are_refused(fails, run, tmp_path):
    for options in (["--ranks", "8"], ["--placement", "lp"], ["--active-ranks", "0-3"]):
        said = f"{options[0]} is for recordings; {run[0]} has metrics of a run"
        assert said in fails("report", run[0], *options, "-o", tmp_path / "page.html")
    assert "No such file" in fails("report", tmp_path / "none.jsonl", "-o", tmp_path / "a.html")
    line = fails("replay", run[0], "--placement", "homes", "--ranks", 4)
    assert line.endswith("or .csv; metrics of a run are for lplb-ep report")


@pytest.mark.parametrize("num_examples", COUNT)
def test_damaged_metrics(run, tmp_path, num_examples):
    """Damage of any kind is one line; what is read all the same makes a page."""
    read, path = itertools.count(), tmp_path / "run.jsonl"

    @examples(num_examples)
    @given(damaged({"run.jsonl": b"".join(run[0].read_bytes().splitlines(True)[:3])}))
    def one(case):
        path.write_bytes(case[1])
        status, told = said("report", path, "-o", tmp_path / "page.html")
        check_said(status, told, path)
        if not status:
            next(read)
            content_of((tmp_path / "page.html").read_text())

    one()
    assert 0 < next(read) < num_examples, "some damage changes a number into another"


# --- in a browser ---------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_it_and_its_filters_work(tmp_path, run):
    script = """
        const tile = (n) => element("tiles").children[n].children[0].textContent;
        const column = (n) => [...document.querySelectorAll(`#table td:nth-child(${n})`)];
        const cells = (n) => column(n).map((one) => one.textContent);
        const shows = (id) => charts[id].getOption();
        const drawn = (id, n) => shows(id).series[n].data;
        const tip = (id, w) => shows(id).tooltip[0].formatter(shows(id).series.map((s, i) => (
            { seriesIndex: i, seriesName: s.name, marker: "", dataIndex: w, value: s.data[w] })));
        const set = (id, value) => {
            element(id).value = value;
            element(id).dispatchEvent(new Event("change"));
        };
        const steps = { tiles: [0, 1, 2, 3, 4, 5].map(tile), names: cells(1), homes: cells(4) };
        steps.axis = shows("over-home").yAxis[0].data;
        steps.cells = drawn("over-lp", 0).length;
        [steps.stale, steps.rows] = [drawn("ended", 0), drawn("rows", 0)];
        const over = shows("over-home").tooltip[0].formatter({ data: [0, 1, 1.5] });
        steps.tips = [tip("lines", 2), tip("ended", 2), tip("pushed", 0), over];
        choose(0);
        const hidden = [element("all-planned").hidden, element("ended").hidden];
        steps.which = [element("which").textContent, ...hidden, drawn("rows", 0)];
        set("from", 8);
        set("to", 15);
        steps.chosen = [state.from, state.to, drawn("over-lp", 0).length, cells(2)];
        element("theme").click(); steps.theme = document.documentElement.dataset.theme;
        document.querySelector("#table th:nth-child(4)").click(); steps.order = cells(4);
        element("all").click(); steps.reset = [state.layer, state.from, state.to];
        document.body.dataset.steps = encodeURIComponent(JSON.stringify(steps));
    """
    path, (first, second) = run
    page = page_of_metrics(read_metrics(path))
    dom = browse(tmp_path, page, "--dump-dom", place="#theme=light", script=script)
    data, _ = body_of(dom)
    assert (data["ready"], data["charts"]) == ("1", "6")
    steps = json.loads(unquote(data["steps"]))
    homes, got = ([getattr(s, n) for s in (first, second)] for n in ("home_imbalance", "imbalance"))
    saved = 1 - sum(s.largest_load for s in (first, second)) / sum(
        s.largest_home_load for s in (first, second)
    )
    guests = (first.guests + second.guests) / (first.batches + second.batches)
    expected = [np.mean(homes), np.mean(got), np.mean([first.bound, second.bound])]
    tiles = [f"{value:.3f}" for value in expected] + [f"{100 * saved:.1f} %", "1", f"{guests:.1f}"]
    assert steps["tiles"] == tiles
    assert steps["names"] == NAMES
    assert steps["homes"] == [f"{value:.3f}" for value in homes]
    assert steps["axis"] == ["3", "12"], "what tells the names apart"
    assert steps["cells"] == 11
    assert steps["stale"] == [0, 0, 1, 0, 0, 0]
    lines = read_metrics(path).lines
    of_first = [line.stats.rows / 4 for line in lines if line.stats.layer == NAMES[0]]
    assert steps["which"] == [NAMES[0], False, True, of_first]
    assert steps["rows"][0] == sum(line.stats.rows for line in lines[:2]) / 8
    over_lines, over_ended, over_pushed, over_cell = steps["tips"]
    assert over_lines.startswith("<b>batches 8 to 11, until 20")
    assert "at home, worst layer: <b>" in over_lines
    assert over_ended.endswith("STALE: <b>1</b><br>of 8 batches")
    assert "copies a batch: <b>" in over_pushed
    assert " MB</b>" in over_pushed
    assert over_cell.endswith("layers.12.&#60;b&#62;mlp&#60;/b&#62;, at home: <b>1.500</b>")
    assert steps["chosen"] == [2, 3, 4, ["8", "8"]]
    assert steps["theme"] == "dark"
    assert steps["order"] == sorted(steps["order"], reverse=True)
    assert steps["reset"] == [-1, 0, 5]
    assert "<b>mlp" not in dom.split("<script", 1)[0], "names are text"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_leaves_out_what_a_run_has_not(tmp_path):
    """No guests, no batch that went home, no batch with rows."""
    path = tmp_path / "run.jsonl"
    layer, planner = planner_of("idle", guests=0)
    lines = LineFile(path)
    planner(torch.empty(0, 1).long(), counts=torch.zeros(R, E).int())
    lines.add(lines._window.stats([layer], renew_at=1))
    script = """
        const cards = [...document.querySelectorAll("section.card")];
        const seen = cards.filter((card) => card.offsetHeight).length;
        document.body.dataset.steps = `${seen} ${element("tiles").children[0].textContent}`;
    """
    dom = browse(tmp_path, page_of_metrics(read_metrics(path)), "--dump-dom", script=script)
    data, _ = body_of(dom)
    assert data["steps"] == "5 –at home: median layerworst layer –"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_charts_stay_in_their_cards(tmp_path, run):
    script = """
        document.body.style.width = "360px";
        dispatchEvent(new Event("resize"));
        const ends = (one) => one.getBoundingClientRect().right;
        const drawn = [...document.querySelectorAll(".chart")];
        const steps = drawn.map((one) => ends(one.closest(".card")) - ends(one));
        document.body.dataset.steps = encodeURIComponent(JSON.stringify(steps));
    """
    page = page_of_metrics(read_metrics(run[0]))
    data, _ = body_of(browse(tmp_path, page, "--dump-dom", script=script))
    rests = json.loads(unquote(data["steps"]))
    assert len(rests) == 6
    assert min(rests) >= 0, rests


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_long_names_leave_room(tmp_path):
    names = [f"decoder.{'long_' * 20}{'x' * (5 * i)}.{i}.mlp" for i in range(200)]
    path = tmp_path / "run.jsonl"
    (line,) = written(path, [2]).lines
    lines = LineFile(path)
    lines.add(dataclasses.replace(line.stats, layer=name) for name in names)
    script = """
        document.body.style.width = "400px";
        dispatchEvent(new Event("resize"));
        const first = document.querySelector("#table td").getBoundingClientRect().width;
        const grid = charts["over-lp"].getModel().getComponent("grid").coordinateSystem.getRect();
        const labels = charts["over-lp"].getModel().getComponent("yAxis").axis.getViewLabels();
        const steps = [element("layer").offsetWidth, first, grid.width, labels.length];
        document.body.dataset.steps = encodeURIComponent(JSON.stringify(steps));
    """
    dom = browse(tmp_path, page_of_metrics(read_metrics(path)), "--dump-dom", script=script)
    chosen, cell, width, labels = json.loads(unquote(body_of(dom)[0]["steps"]))
    assert chosen <= 320
    assert cell < 500
    assert width > 150
    assert 10 < labels < 25, "of 352 pixels"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize(("theme", "bright"), [("light", True), ("dark", False)])
def test_the_picture_is_that_of_the_theme(tmp_path, run, theme, bright):
    from PIL import Image

    page = page_of_metrics(read_metrics(run[0]))
    browse(tmp_path, page, f"--screenshot={tmp_path / 'page.png'}", place=f"#theme={theme}")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert (pixels[5, 5].mean() > 200) == bright
    orange = (pixels[..., 0] > 180) & (pixels[..., 1] < 160) & (pixels[..., 2] < 90)
    blue = (pixels[..., 2] > 150) & (pixels[..., 0] < 100)
    assert orange.sum() > 5000
    assert blue.sum() > 20000
