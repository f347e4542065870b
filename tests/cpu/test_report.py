"""`lplb-ep report`: what its page holds, and what a real browser makes of it where there is one."""

import base64
import csv
import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import numpy as np
import pytest

from lplb_ep import Placement
from lplb_ep.tools import cli, report
from lplb_ep.tools.recordings import Recording, save_recording
from lplb_ep.tools.replay import replay
from lplb_ep.tools.report import page_of
from lplb_ep.tools.sample import sample

pytestmark = pytest.mark.usefixtures("clean_environment")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def content_of(page):
    """What the scripts of a page draw."""
    (text,) = re.findall(
        r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL
    )
    return json.loads(text)


def data_of(page):
    """The numbers of a recording's page, as its script reads them."""
    data = content_of(page)
    for part in ("imbalance", "rank_loads"):
        for name, packed in data[part].items():
            words = np.frombuffer(base64.b64decode(packed), "<u2")
            data[part][name] = words.reshape(len(data["starts"]), len(data["layers"]), -1) / 1000
    return data


@pytest.fixture(scope="module")
def shown():
    """A recording of layers 3 to 5, what it comes to with guests, and its page."""
    drawn = sample(3, 16, 6, 500, 2)
    recording = Recording.of(drawn.counts, "</script><b>x & y", layers=[3, 4, 5])
    placements = [
        Placement.from_history(load, num_ranks=4, num_redundant_per_rank=1, num_guests_per_rank=1)
        for load in recording.load
    ]
    result = replay(recording, placements, guest_min_tokens=1)
    page = page_of(
        recording, result, placements, title=recording.source, about="a test", notes=["A <note>."]
    )
    return recording, placements, result, page


def test_a_page_has_the_numbers_of_the_replay(shown):
    recording, placements, result, page = shown
    data = data_of(page)
    assert (data["title"], data["layers"]) == (recording.source, [3, 4, 5])
    assert data["starts"] == list(range(6))
    for name in ("home", "even", "residents", "lp", "bound"):
        expected = getattr(result, name).numpy()[..., None]
        assert np.abs(data["imbalance"][name] - expected).max() <= 0.0005
    for name in ("home", "lp"):
        assert np.abs(data["rank_loads"][name] - result.rank_loads[name].numpy()).max() <= 0.0005
        of_ranks = data["rank_loads"][name].max(2)
        assert np.abs(of_ranks - data["imbalance"][name][..., 0]).max() <= 0.0011
    assert data["guests"] == result.guests.double().ravel().tolist()
    for layer, placement in enumerate(placements):
        load = recording.load[layer].double().numpy()
        expert, share, copies, rank = data["experts"][layer][0]
        assert load[expert] == load.max()
        assert abs(share - load.max() / load.mean()) < 0.001
        assert copies == (placement.copy_rank[expert] >= 0).sum()
        assert rank == placement.home_rank[expert]


def test_a_page_stands_alone_and_takes_no_text_for_code(shown):
    page = shown[3]
    assert not re.findall(
        r"<(?:link|img|iframe|base)\b|\bsrc\s*=\s*[\"']", page.split("<script>")[0]
    )
    assert page.count("</script>") == page.count("<script") == 3
    assert "<b>x" not in page
    assert "Licensed to the Apache Software Foundation" in page


def test_many_batches_are_put_together(monkeypatch):
    monkeypatch.setattr(report, "_MOST_WINDOWS", 4)
    recording = sample(2, 8, 10, 40, 1)
    placements = [Placement.homes_only(8, 2)] * 2
    result = replay(recording, placements)
    data = data_of(page_of(recording, result, placements, title="a", about="b"))
    assert data["starts"] == [0, 3, 6, 9]
    assert "Each point in time is the mean of 3 batches." in data["notes"]
    expected = result.home[:3].numpy().mean(0)
    assert np.abs(data["imbalance"]["home"][0, :, 0] - expected).max() <= 0.0005
    assert data["num_batches"] == 10
    assert set(data["imbalance"]) == {"home", "lp", "bound"}, "no replicas: no split over them"
    assert data["guests"] is None


def test_layers_without_tokens_are_left_out(monkeypatch):
    loads = np.zeros((4, 2, 4), int)
    loads[0, 0] = loads[3, 1] = [9, 1, 1, 1]
    loads[1, 0] = [5, 5, 5, 5]
    loads[2, 1] = [0, 0, 2, 2]
    recording, placements = Recording.of(loads, "a"), [Placement.homes_only(4, 2, 1)] * 2
    result = replay(recording, placements)
    data = data_of(page_of(recording, result, placements, title="a", about="b"))
    nothing = 65.535
    home = data["imbalance"]["home"][..., 0]
    assert home.tolist() == [[1.667, nothing], [1, nothing], [nothing, 2], [nothing, 1.667]]
    assert (data["rank_loads"]["lp"][2, 0] == nothing).all()
    assert data["guests"][1] is None
    monkeypatch.setattr(report, "_MOST_WINDOWS", 2)
    data = data_of(page_of(recording, result, placements, title="a", about="b"))
    means = data["imbalance"]["home"][..., 0]
    assert means.tolist() == [[1.333, nothing], [nothing, 1.833]], "of the batches with tokens"


def test_ranks_that_take_no_part_are_left_out(tmp_path, capsys):
    path, output = tmp_path / "a.npz", tmp_path / "a.html"
    save_recording(path, sample(2, 16, 4, 300, 2))
    argv = ["report", path, "--placement", "eplb", "--ranks", 5, "--redundant", 1, "-o", output]
    assert cli.main([*map(str, argv), "--active-ranks", "0-2,4"]) == 0
    assert "eplb, 5 ranks (4 take part), 25 slots" in capsys.readouterr().out
    loads = data_of(output.read_text())["rank_loads"]
    for name in ("home", "lp"):
        is_nothing = loads[name] == 65.535
        assert is_nothing[..., 3].all()
        assert is_nothing.sum() == is_nothing[..., 3].sum()


def test_the_command_needs_nothing_but_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_recording("a.npz", sample(2, 16, 4, 300, 2))
    assert cli.main(["report", "a.npz", "--csv", "a.csv"]) == 0
    data = data_of((tmp_path / "report.html").read_text())
    assert data["num_ranks"] == 8
    assert data["guests"] is not None
    told = capsys.readouterr().out
    assert "homes, 8 ranks, 24 slots for 16 experts, 1 a rank for guests" in told
    head, *rows = csv.reader((tmp_path / "a.csv").read_text().splitlines())
    assert head[:4] == ["batch", "layer", "in_order", "home"]
    assert len(rows) == 8


def test_the_command_takes_the_options_of_replay(tmp_path, capsys):
    one, two = str(tmp_path / "one.npz"), str(tmp_path / "two.npz")
    for path, workload in ((one, 0), (two, 1)):
        save_recording(path, sample(2, 16, 4, 300, 2, workload=workload))
    options = ["--placement", "eplb", "--ranks", "4", "--redundant", "1", "--learn-from", two]
    output = str(tmp_path / "page.html")
    assert cli.main(["report", one, *options, "-o", output]) == 0
    data = data_of((tmp_path / "page.html").read_text())
    assert data["num_ranks"] == 4
    assert data["notes"] == ["Placements were learned from two.npz: sample, seed 0, workload 1."]


def test_replicas_that_follow_are_shown_with_their_moves(tmp_path):
    loads = np.ones((12, 3, 4), int) * 100
    loads[:, 1] = [900, 500, 50, 50]
    np.save(tmp_path / "a.npy", loads)
    Placement([0, 1, 2, 2, 3, 3], 2).save(tmp_path / "p.json")
    argv = ["report", str(tmp_path / "a.npy"), "--layout", "counts", "--first-layer", "7"]
    argv += ["--placement", str(tmp_path / "p.json"), "--refresh", "2", "--seconds", "inf"]
    assert cli.main([*argv, "-o", str(tmp_path / "a.html")]) == 0
    data = data_of((tmp_path / "a.html").read_text())
    assert [move[:2] for move in data["moves"]] == [[4, 1]], "of layer 8, in force at batch 4"
    refreshed, kept = (data["imbalance"][name][:, 1, 0] for name in ("refreshed", "lp"))
    assert (refreshed[:4] == kept[:4]).all()
    assert (refreshed[4:] < kept[4:]).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seconds", "1"], "--seconds needs --refresh"),
        (["--refresh", "1"], "--refresh must be the number of batches between two looks"),
        (["-o", "a.txt"], "-o must end in .html; got a.txt"),
        (["-o", "none/a.html"], "there is no directory none"),
        (["--csv", "none/a.csv"], "there is no directory none"),
        (["--guest-min-tokens", "1", "--guests", "0"], "--guest-min-tokens needs --guests"),
        (["--placement", "kube"], "--placement must be cube"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fails, tmp_path, options, says):
    save_recording(tmp_path / "a.npz", sample(1, 8, 2, 50, 1))
    assert says in fails("report", tmp_path / "a.npz", *options)


# --- in a browser ---------------------------------------------------------------------------------


def browse(tmp_path, page, *options, place="", script=""):
    """Opens a page in a headless Chromium, after it a script; what the browser prints."""
    before, after = page.rsplit("</body>", 1)  # the library has one in a text
    whole = f"{before}<script>{script}</script></body>{after}"
    (tmp_path / "page.html").write_text(whole)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--window-size=1300,2600", "--virtual-time-budget=5000", *options]
    address = f"file://{tmp_path / 'page.html'}{place}"
    return subprocess.run([*command, address], capture_output=True, text=True, timeout=300).stdout


def body_of(dom):
    """The attributes of the body and the texts of some elements."""
    assert "data-error" not in dom.split("<script", 1)[0], dom[:2000]
    data = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", dom)[0]))
    return data, re.search(r'<html[^>]*data-theme="(\w+)"', dom)[1]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_it_and_its_filters_work(tmp_path, shown):
    script = """
        const rows = () => [...document.querySelectorAll("#table tbody tr")];
        const said = () => [element("which").textContent, rows().length,
            element("tiles").children.length, Object.keys(charts).length];
        const steps = [said()];
        choose(1); steps.push(said());
        element("to").value = 2; element("to").dispatchEvent(new Event("change"));
        steps.push([state.from, state.to, drawn()]);
        element("theme").click(); steps.push(document.documentElement.dataset.theme);
        document.querySelector("#table th:nth-child(2)").click();
        steps.push(rows().map((row) => row.dataset.layer));
        element("all").click(); steps.push([state.layer, state.from, state.to]);
        function drawn() { return charts["time-home"].getOption().series[0].data.length; }
        document.body.dataset.steps = encodeURIComponent(JSON.stringify(steps));
    """
    dom = browse(tmp_path, shown[3], "--dump-dom", place="#theme=light", script=script)
    data, _ = body_of(dom)
    assert data["ready"] == "1"
    assert data["charts"] == "7"
    first, chosen, batches, theme, order, reset = json.loads(unquote(data["steps"]))
    assert first == ["all layers", 3, 6, 7]
    assert chosen[0] == "layer 4"
    assert batches == [0, 2, 3 * 4], "three batches of four ranks"
    assert theme == "dark"
    home = shown[2].home[:3].mean(0)
    assert [int(layer) for layer in order] == home.argsort(descending=True).tolist()
    assert reset == [-1, 0, 5]
    # What came from the recording's name is text.
    assert "&lt;/script&gt;&lt;b&gt;x &amp; y" in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_leaves_out_layers_without_tokens(tmp_path):
    loads = np.zeros((3, 2, 4), int)
    loads[:, 0] = loads[1, 1] = [9, 1, 1, 1]
    recording, placements = Recording.of(loads, "a"), [Placement.homes_only(4, 2)] * 2
    page = page_of(recording, replay(recording, placements), placements, title="a", about="b")
    script = """
        const drawn = () => charts["time-home"].getOption().series[0].data.length;
        const cells = () => [...document.querySelectorAll("#table td:nth-child(2)")];
        const table = () => cells().map((cell) => cell.textContent);
        const steps = [element("tiles").children[0].textContent, table()];
        choose(1); steps.push(drawn());
        state.from = state.to = 2; draw(); steps.push(drawn(), table());
        document.body.dataset.steps = encodeURIComponent(JSON.stringify(steps));
    """
    dom = browse(tmp_path, page, "--dump-dom", script=script)
    data, _ = body_of(dom)
    tile, means, cells, of_none, last = json.loads(unquote(data["steps"]))
    assert tile.startswith("1.667at home")
    assert means == ["1.667", "1.667"]
    assert (cells, of_none) == (2, 0), "one batch of two ranks; none"
    assert sorted(last) == ["1.667", "–"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_charts_stay_in_their_cards(tmp_path, shown):
    script = """
        const ends = (one) => one.getBoundingClientRect().right;
        const charts_ = [...document.querySelectorAll(".chart")];
        const rests = (width) => {
            document.body.style.width = `${width}px`;
            dispatchEvent(new Event("resize"));
            return charts_.map((one) => ends(one.closest(".card")) - ends(one));
        };
        const steps = [1300, 700, 360].map(rests);
        document.body.dataset.steps = encodeURIComponent(JSON.stringify(steps));
    """
    data, _ = body_of(browse(tmp_path, shown[3], "--dump-dom", script=script))
    for width, rests in zip((1300, 700, 360), json.loads(unquote(data["steps"])), strict=True):
        assert len(rests) == 7
        assert min(rests) >= 0, (width, rests)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize(("theme", "bright"), [("light", True), ("dark", False)])
def test_the_picture_is_that_of_the_theme(tmp_path, shown, theme, bright):
    from PIL import Image

    browse(tmp_path, shown[3], f"--screenshot={tmp_path / 'page.png'}", place=f"#theme={theme}")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert pixels.shape == (2600, 1300, 3)
    assert (pixels[5, 5].mean() > 200) == bright
    # The colours of home loads: orange lines, bars and cells.
    orange = (pixels[..., 0] > 180) & (pixels[..., 1] < 160) & (pixels[..., 2] < 90)
    assert orange.sum() > 5000
