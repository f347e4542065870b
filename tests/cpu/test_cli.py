import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lplb_ep import Placement
from lplb_ep.placement.table import load_placements
from lplb_ep.planning import device as cuda
from lplb_ep.tools import cli
from lplb_ep.tools.report import load_recording, replay


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """The command's process: a clean environment, put back at the end."""
    for variable in [v for v in os.environ if v.startswith("LPLB_EP")]:
        monkeypatch.delenv(variable)
    for variable in ("LPLB_EP", "LPLB_EP_PLACEMENT"):
        monkeypatch.setenv(variable, "")  # `run` sets them: put back at the end


def fails(capsys, *argv):
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(a) for a in argv])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("lplb-ep: error: ")
    return line


# --- doctor ---------------------------------------------------------------------------------------


def sections(text):
    """{heading: {first word of a line: the rest}}"""
    found, lines = {}, {}
    for line in text.splitlines():
        if line.startswith("  "):
            name, _, rest = line.strip().partition(" ")
            lines[name] = rest.strip()
        elif line:
            lines = found.setdefault(line, {})
    return found


def test_doctor_tells_choices_and_reasons(capsys, monkeypatch):
    monkeypatch.setenv("LPLB_EP_BACKEND", "embedded")
    assert cli.main(["doctor"]) == 0
    told = sections(capsys.readouterr().out)
    assert told["Packages"]["torch"].startswith(importlib.metadata.version("torch"))
    assert told["Settings"]["LPLB_EP_BACKEND"].split() == ["embedded", "set"]
    assert told["Settings"]["LPLB_EP_SOLVER"].split() == ["auto", "default"]
    assert told["Used"]["buffer"].split(maxsplit=1) == ["lplb_ep.embedded", "asked for"]
    assert told["Used"]["counts"].startswith("torch")
    assert told["Used"]["solver"].startswith("cpu")
    assert "cuda" in told["Devices"] or "cuda:0" in told["Devices"]


def test_doctor_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_version", lambda distribution: None)
    assert cli.main(["doctor"]) == 0
    told = sections(capsys.readouterr().out)
    assert "pip install '.[plot]' in a checkout" in told["Packages"]["matplotlib"]
    assert told["Packages"]["deep_ep"].startswith("missing")


def test_doctor_without_torch():
    done = subprocess.run(
        [sys.executable, "-S", "-m", "lplb_ep.tools.cli", "doctor"],  # -S: no installed packages
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "")
    told = sections(done.stdout)
    assert re.fullmatch("missing .*: pip install torch", told["Packages"]["torch"])
    assert told["Devices"] == {"error:": "No module named 'torch'"}
    assert told["Settings"]["LPLB_EP_SOLVER"].split() == ["auto", "default"]
    assert told["Used"]["error:"].startswith("No module named ")


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("LPLB_EP", "2", "LPLB_EP must be one of 0, home, 1; got '2'"),
        ("LPLB_EP_MODE", "1", "unknown setting LPLB_EP_MODE"),
        ("LPLB_EP_PLACEMENT", "none.json", "No such file"),
    ],
)
def test_doctor_shows_bad_settings(capsys, monkeypatch, variable, value, says):
    monkeypatch.setenv(variable, value)
    assert cli.main(["doctor"]) == 2
    assert says in capsys.readouterr().out


# --- replay ---------------------------------------------------------------------------------------


@pytest.fixture
def recording(tmp_path):
    """A file with two arrays of [3 layers, 16 experts], and what they hold."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.lognormal(6, 1, (3, 16)).astype(np.int64) for name in ("new", "old")}
    path = tmp_path / "counts.npz"
    np.savez(path, **arrays)
    return path, arrays


@pytest.mark.parametrize("kind", ["cube", "ring:4", "torus:2x4", "eplb"])
@pytest.mark.parametrize("learned", ["new", "old"])
def test_replay(recording, tmp_path, capsys, kind, learned):
    path, arrays = recording
    argv = ["replay", path, "--key", "new", "--placement", kind, "--ranks", 8, "--redundant", 2]
    argv += ["--json", tmp_path / "out.json"]
    if learned != "new":
        argv += ["--learn-from", learned]
    assert cli.main([str(a) for a in argv]) == 0
    shape = {"num_ranks": 8, "num_redundant_per_rank": 2}
    placements = [
        Placement.from_history(load, **shape)
        if kind == "eplb"
        else Placement.from_topology(kind, num_experts=16, load=load, **shape)
        for load in arrays[learned]
    ]
    expected = replay(load_recording(path, key="new"), placements)
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["imbalance"] == expected.to_json()["imbalance"]
    assert told["learned_from"] == f"counts.npz: {learned}"
    assert (told["num_ranks"], told["num_physical_experts"]) == (8, 32)
    out = capsys.readouterr().out
    assert out.endswith(expected.table() + "\n")
    assert ("learned from counts.npz: old" in out) == (learned == "old")


def test_replay_of_a_saved_placement_with_a_picture(recording, tmp_path):
    path, _ = recording
    placement = Placement([*range(16)], 4)
    placement.save(tmp_path / "placement.json")
    argv = ["replay", path, "--key", "old", "--placement", tmp_path / "placement.json"]
    argv += ["--png", tmp_path / "out.png", "--json", tmp_path / "out.json"]
    assert cli.main([str(a) for a in argv]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    imbalance = json.loads((tmp_path / "out.json").read_text())["imbalance"]
    assert imbalance["home"] == imbalance["in_order"]


def test_place_writes_what_replay_reads(recording, tmp_path, capsys):
    output, picture = tmp_path / "placements.json", tmp_path / "graph.png"
    shape = ["--ranks", "4", "--redundant", "1", "--ranks-per-node", "2", "--seconds", "1"]
    argv = [
        "place",
        str(recording[0]),
        "--key",
        "new",
        *shape,
        "-o",
        str(output),
        "--png",
        str(picture),
    ]
    assert cli.main(argv) == 0
    table = capsys.readouterr().out
    assert "leave their node" in table
    assert picture.read_bytes().startswith(b"\x89PNG")
    counts = load_recording(recording[0], key="new")
    placements = load_placements(output)
    assert list(placements) == list(counts.layers)
    written = tmp_path / "replay.json"
    argv = [
        "replay",
        str(recording[0]),
        "--key",
        "new",
        "--placement",
        str(output),
        "--json",
        str(written),
    ]
    assert cli.main(argv) == 0
    expected = replay(counts, list(placements.values())).to_json()
    assert json.loads(written.read_text())["imbalance"] == expected["imbalance"]

    capsys.readouterr()
    again = tmp_path / "again.json"
    refine = ["--start", str(output), "--fixed-homes", "--max-changes", "1", "--seconds", "1"]
    assert cli.main(["place", str(recording[0]), "--key", "new", *refine, "-o", str(again)]) == 0
    changed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[5:]]
    for layer, placement in load_placements(again).items():
        before = placements[layer]
        different = before.physical_to_logical != placement.physical_to_logical
        assert (before.home == placement.home).all()
        assert changed[list(placements).index(layer)] == str(different.sum()) in "01"


def test_replay_learns_a_placement_for_the_program(recording, tmp_path):
    written = tmp_path / "replay.json"
    argv = [
        "replay",
        str(recording[0]),
        "--key",
        "new",
        "--placement",
        "lp",
        "--ranks",
        "4",
        "--redundant",
        "1",
    ]
    assert cli.main([*argv, "--json", str(written)]) == 0
    summary = json.loads(written.read_text())["summary"]
    assert summary["lp"]["worst"] <= summary["even"]["worst"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "place needs --ranks and --redundant, or --start"),
        (
            ["--ranks", "4", "--redundant", "1", "--max-changes", "2"],
            "--max-changes need a --start",
        ),
        (["--ranks", "4", "--redundant", "1", "--drift", "2"], "--drift must be in [0, 1]; got 2"),
        (["--ranks", "4", "--redundant", "1", "-o", "none/p.json"], "-o none/p.json: there is no"),
        (["--ranks", "4", "--redundant", "1", "--seed", "-1"], "--seed must be at least 0; got -1"),
        (
            ["--ranks", "4", "--redundant", "1", "--seconds", "-1"],
            "--seconds must be at least 0; got -1",
        ),
        (["--ranks", "4", "--redundant", "1", "--seconds", "nan"], "--seconds must be at least 0"),
        (["--start", "{start}", "--ranks", "8"], "--ranks is given as 8, and --start has 4"),
        (
            ["--start", "{start}", "--redundant", "2"],
            "--redundant is given as 2, and --start has 0",
        ),
        (
            ["--start", "{start}", "--ranks-per-node", "2"],
            "--ranks-per-node is given as 2, and --start has 4",
        ),
        (["--start", "{other}"], "number of experts is given as 16, and --start has 8"),
        (
            ["--start", "{crowded}"],
            "the number of redundant slots of --start is too large: 17 slots on a rank, for 16 ex",
        ),
        (["-o", "{dir}"], "counts is a directory, not a file to write"),
        (["--png", "{dir}.png"], "counts.png is a directory, not a file to write"),
    ],
)
def test_place_says_what_is_wrong_in_one_line(recording, tmp_path, capsys, options, says):
    files = {"start": tmp_path / "start.json", "other": tmp_path / "other.json"}
    for path, num_experts in zip(files.values(), (16, 8), strict=True):
        Placement([*range(num_experts)], 4).save(path)
    files |= {"crowded": tmp_path / "crowded.json", "dir": tmp_path / "counts"}
    Placement([*range(16), 0] * 4, 4).save(files["crowded"])
    for directory in ("counts", "counts.png"):
        (tmp_path / directory).mkdir()
    options = [option.format(**files) for option in options]
    assert says in fails(
        capsys, "place", recording[0], "--key", "new", "-o", tmp_path / "p.json", *options
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bytes(range(256)), "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1, 2]", "is not a placement saved by this version"),
        (b'{"0": 5}', "is not a placement saved by this version"),
        (b'{"lplb_ep_placement": 1, "num_ranks": 4}', "physical_to_logical"),
        (
            b'{"lplb_ep_placement": 1, "num_ranks": 4, "physical_to_logical": 5}',
            "physical_to_logical must be integers with 1 dimensions",
        ),
        (b'{"lplb_ep_placements": 1}', "layers must be placements by layer number"),
        (b'{"lplb_ep_placements": 1, "layers": [5]}', "layers must be placements by layer number"),
        (b'{"lplb_ep_placements": 1, "layers": {"a": {}}}', "layers must be placements by layer"),
        (
            b'{"lplb_ep_placements": 1, "layers": {"0": 5}}',
            "start.json, layer 0: a placement must be an object; got 5",
        ),
    ],
)
def test_a_file_that_is_no_placement_is_said_in_one_line(
    recording, tmp_path, capsys, content, says
):
    path = tmp_path / "start.json"
    path.write_bytes(content)
    argv = [recording[0], "--key", "new"]
    for command in (
        ["place", *argv, "--start", path, "-o", "p.json"],
        ["replay", *argv, "--placement", path],
    ):
        line = fails(capsys, *command)
        assert says in line
        assert "start.json" in line


def test_replay_of_ids_learned_from_another_file(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", rng.random((64, 2, 8)).argsort(axis=2)[:, :, :3])
    argv = ["replay", tmp_path / "a.npy", "--layout", "token-layer", "--experts", 8]
    argv += ["--tokens-per-batch", 16, "--learn-from", tmp_path / "b.npy", "--placement", "eplb"]
    argv += ["--ranks", 4, "--redundant", 1, "--ranks-per-node", 2, "--groups", 2]
    argv += ["--json", tmp_path / "out.json"]
    assert cli.main([str(a) for a in argv]) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["learned_from"] == "b.npy"
    assert np.shape(told["imbalance"]["lp"]) == (4, 2)


def test_replay_learns_from_a_key_and_layout_of_another_file(recording, tmp_path):
    """Ids in batches, on a placement learned on counts: they share neither key nor layout."""
    ids = np.random.default_rng(0).random((64, 3, 16)).argsort(axis=2)[:, :, :2]
    np.save(tmp_path / "ids.npy", ids)
    argv = ["replay", tmp_path / "ids.npy", "--layout", "token-layer", "--tokens-per-batch", 32]
    argv += ["--experts", 16, "--placement", "cube", "--ranks", 8]
    argv += ["--learn-from", f"{recording[0]}:old", "--learn-layout", "counts"]
    argv += ["--json", tmp_path / "out.json"]
    assert cli.main([str(a) for a in argv]) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["learned_from"] == "counts.npz: old"
    assert np.shape(told["imbalance"]["lp"]) == (2, 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--key must name one of its arrays: new [3, 16], old [3, 16]"),
        (["--key", "new", "--experts", "8"], "--experts is 8, but counts"),
        (["--key", "new", "--layout", "count"], "--layout must be one of counts, "),
        (["--key", "new", "--learn-from", "gone"], "no array 'gone'"),
        (["--key", "new", "--learn-from", "{file}:gone"], "no array 'gone'; it holds new"),
        (
            ["--key", "new", "--learn-from", "old", "--learn-layout", "count"],
            "--learn-layout must be one of counts, ",
        ),
        (["--key", "new", "--learn-layout", "counts"], "--learn-layout needs --learn-from"),
        (["--key", "new", "--placement", "star"], "--placement must be cube, "),
        (
            ["--key", "new", "--placement", "kube", "--ranks", "8"],
            "--placement must be cube, hypercube, torus, ring (or ring:SIZE, torus:ROWSxCOLUMNS), "
            "eplb, lp, or a file written by place or Placement.save; got 'kube'",
        ),
        (
            ["--key", "new", "--placement", "cube", "--ranks", "8", "--groups", "2"],
            "--groups is for",
        ),
        (["--key", "new", "--placement", "eplb", "--ranks", "8"], "needs --ranks and --redundant"),
        (["--key", "new", "--placement", "ring"], "needs --ranks"),
        (["--key", "new", "--placement", "cube", "--ranks", "6"], "size must divide --ranks: "),
        (
            ["--key", "new", "--placement", "cube", "--ranks", "32"],
            "--ranks must divide the number of experts: 32 does not divide 16",
        ),
        (
            ["--key", "new", "--placement", "cube", "--ranks", "32", "--experts", "16"],
            "--ranks must divide --experts: 32 does not divide 16",
        ),
        (["--key", "new", "--placement", __file__, "--ranks", "8"], "--ranks does not go with"),
        (["--json", "none/out.json"], "--json none/out.json: there is no directory none"),
        (["--png", "none/out.png"], "--png none/out.png: there is no directory none"),
        (["--png", "out.jpg"], "--png must end in .png; got out.jpg"),
    ],
)
def test_replay_says_what_is_wrong_in_one_line(recording, capsys, options, says):
    if "--placement" not in options:
        options = [*options, "--placement", "cube", "--ranks", "8"]
    options = [option.format(file=recording[0]) for option in options]
    assert says in fails(capsys, "replay", recording[0], *options)


def test_replay_learns_from_the_same_model_only(recording, tmp_path, capsys):
    np.save(tmp_path / "other.npy", np.ones((2, 16), int))
    options = ["--placement", "cube", "--ranks", 8, "--learn-from", tmp_path / "other.npy"]
    np.save(tmp_path / "one.npy", recording[1]["new"])
    says = fails(capsys, "replay", tmp_path / "one.npy", *options)
    assert "other.npy has 2 layers of 16 experts; one.npy has 3 of 16" in says
    options[-1] = "gone.npy"
    says = fails(capsys, "replay", tmp_path / "one.npy", *options)
    assert "--learn-from: there is no file gone.npy" in says


@pytest.mark.parametrize("unbuffered", ["", "1"])  # noticed at the end, or at the first line
def test_a_reader_that_leaves_ends_the_command_quietly(recording, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    options = ["--key", "new", "--placement", "cube", "--ranks", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "lplb_ep.tools.cli", "replay", recording[0], *options],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# --- run and demo ---------------------------------------------------------------------------------


def lplb_ep_run(*argv, **environment):
    """What `lplb-ep run` printed, the command having ended well."""
    done = subprocess.run(
        [sys.executable, "-m", "lplb_ep.tools.cli", "run", *map(str, argv)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_path(*entries):
    return os.pathsep.join([*map(str, entries), os.environ.get("PYTHONPATH", "")])


SCRIPT = """
import json, os, sys
told = {"name": __name__, "argv": sys.argv, "path": sys.path[0]}
told |= {"mode": os.environ["LPLB_EP"], "placement": os.environ["LPLB_EP_PLACEMENT"]}
print(json.dumps(told))
"""


def test_run_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    Placement([0, 1], 2).save(tmp_path / "placement.json")
    options = ["--placement", tmp_path / "placement.json", "--mode", "home"]
    assert json.loads(lplb_ep_run(*options, script, "--placement", "its own", "-m", "--", "x")) == {
        "name": "__main__",
        "argv": [str(script), "--placement", "its own", "-m", "--", "x"],
        "path": str(tmp_path),
        "mode": "home",
        "placement": str(tmp_path / "placement.json"),
    }


def test_run_a_module(tmp_path, monkeypatch):
    package = tmp_path / "a_package_of_the_test"
    package.mkdir()
    (package / "part.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    told = json.loads(lplb_ep_run("-m", "a_package_of_the_test.part", "-x"))
    assert told["name"] == "__main__"
    assert told["argv"] == [str(package / "part.py"), "-x"]
    assert told["path"] == str(tmp_path)
    assert told["mode"] == "", "not set where not asked for"


def test_run_drops_a_leading_double_dash(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert json.loads(lplb_ep_run("--mode", "1", "--", script, "--"))["argv"] == [str(script), "--"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "a script, or -m and a module"),
        (["--"], "a script, or -m and a module"),
        (["--placement", "none.json", "x.py"], "No such file"),
    ],
)
def test_run_says_what_is_wrong_in_one_line(capsys, argv, says):
    assert says in fails(capsys, "run", *argv)


def test_run_refuses_bad_settings(capsys, monkeypatch):
    monkeypatch.setenv("LPLB_EP_SOLVER", "none")
    assert "LPLB_EP_SOLVER must be" in fails(capsys, "run", __file__)


# The import of frameworks such as Megatron-Core, and what they then have.
IMPORT = """
def check():
    import sys
    from deep_ep import Buffer
    from deep_ep.utils import EventHandle, EventOverlap
    import deep_ep, deep_ep.utils, lplb_ep
    assert hasattr(Buffer, "view") and deep_ep.Buffer is lplb_ep.Buffer
    assert deep_ep.utils.EventOverlap is deep_ep.EventOverlap is EventOverlap
    sys.stdout.write("patched\\n")
"""
PROGRAMS = {
    "itself": "check()",
    "subprocess": """
import subprocess, sys
subprocess.run([sys.executable, __file__, "child"], check=True) if not sys.argv[1:] else check()
""",
    "mp.spawn": """
import torch.multiprocessing as mp
def child(rank):
    check()
if __name__ == "__main__":
    mp.spawn(child, nprocs=1)
""",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_run_patches_every_process_of_a_program(tmp_path, program):
    script = tmp_path / "script.py"
    script.write_text(IMPORT + PROGRAMS[program])
    assert lplb_ep_run(script, LPLB_EP_BACKEND="embedded") == "patched\n"


def test_run_patches_the_workers_of_torchrun(tmp_path):
    """Every token picks expert 0, which has a copy on both ranks: all stay where they are."""
    script = tmp_path / "script.py"
    script.write_text(
        IMPORT
        + """
import torch, torch.distributed as dist
from lplb_ep import Placement
dist.init_process_group("gloo")
check()
from deep_ep import Buffer
def layout():  # its buffer, which holds the group, ends before the group does
    view = Buffer(dist.group.WORLD).view(Placement([0, 1, 2, 0], 2))
    return view.get_dispatch_layout(torch.zeros(4, 1, dtype=torch.int64), 3)[0]
tokens_per_rank = layout()
expected = torch.zeros(2, dtype=torch.int32)
expected[dist.get_rank()] = 4
assert torch.equal(tokens_per_rank, expected), tokens_per_rank
dist.destroy_process_group()
"""
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    settings = {"LPLB_EP_BACKEND": "embedded", "LPLB_EP_REPLICAS": "valid"}
    assert lplb_ep_run("--mode", "1", *launcher, script, **settings) == "patched\n" * 2


@pytest.mark.parametrize("first", ["deep_ep", "lplb_ep.deepep.drop_in"])
def test_run_patches_an_installed_deep_ep_however_it_is_imported(tmp_path, first):
    """Also when the first import fails, which programs catch to try again elsewhere."""
    (tmp_path / "deep_ep.py").write_text(
        "import sys\n"
        "sys.tries = getattr(sys, 'tries', 0) + 1\n"
        "if sys.tries == 1: raise ImportError('not yet')\n"
        "from lplb_ep.embedded import Buffer as base\n"
        "class Buffer(base): pass\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        f"try: import {first}\n"
        f"except ImportError: import {first}\n"
        "import deep_ep, lplb_ep\n"
        "assert lplb_ep.Buffer is deep_ep.Buffer\n"
        "print(deep_ep.__file__, 'view' in vars(deep_ep.Buffer))\n"
    )
    told = lplb_ep_run(script, LPLB_EP_BACKEND="deep_ep", PYTHONPATH=python_path(tmp_path))
    assert told == f"{tmp_path / 'deep_ep.py'} True\n"


def test_run_costs_other_processes_nothing(tmp_path):
    """Nor does asking whether deep_ep is there; and another sitecustomize runs as without it."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.of_the_test = 1\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, importlib.util, sitecustomize\n"
        "assert importlib.util.find_spec('deep_ep') is not None\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'lplb_ep')])\n"
        "print(sys.of_the_test, sitecustomize.__file__)\n"
    )
    told = lplb_ep_run(script, PYTHONPATH=python_path(tmp_path))
    assert told == f"[]\n1 {tmp_path / 'sitecustomize.py'}\n"


def test_demo_runs_the_example(tmp_path, monkeypatch):
    script = tmp_path / "examples" / "moe_layer.py"
    script.parent.mkdir()
    script.touch()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lplb_ep" / "tools" / "cli.py"))
    executed = []
    monkeypatch.setattr(os, "execv", lambda *call: executed.append(call) or sys.exit())
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help", "--steps", "3"])
    arguments = [sys.executable, str(script), "--help", "--steps", "3"]
    assert executed == [(sys.executable, arguments)]


def test_demo_without_the_example(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lplb_ep" / "tools" / "cli.py"))
    assert "examples/moe_layer.py of the source tree" in fails(capsys, "demo")


# --- the command itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["none"], ["doctor", "--json"], ["replay"]])
def test_unknown_arguments_are_refused(capsys, argv):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "usage: lplb-ep" in capsys.readouterr().err


def test_documents_name_all_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    architecture = Path(__file__).parents[2] / "docs" / "architecture.md"
    (row,) = re.findall(r"^\| `tools/cli\.py` \| (.*) \|$", architecture.read_text(), re.MULTILINE)
    assert len(commands) > 5
    for text in (row, cli.__doc__):
        assert set(commands) == set(re.findall(r"`(?:lplb-ep )?(\w+)`", text))


def test_the_command_starts_light():
    code = (
        "import sys, lplb_ep.tools.cli as cli\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, loaded = done.stdout.splitlines()
    assert version.startswith("lplb-ep ")
    assert loaded == "[]"


def test_compile_builds_every_kernel_and_says_so(kernel_cache):
    def compile_for(arch):
        return subprocess.run(
            [sys.executable, "-m", "lplb_ep.tools.cli", "compile", "--arch", arch],
            env={**os.environ, "LPLB_EP_CACHE_DIR": str(kernel_cache)},
            capture_output=True,
            text=True,
        )

    built = compile_for("sm_90")
    assert built.returncode == 0
    number = len(cuda.programs())
    assert f"[1/{number}] flow.cu (SIZE=8, PARTS=4, TURNS=1, " in built.stderr
    assert f"[{number}/{number}] barrier.cu" in built.stderr
    refused = compile_for("sm_1")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("lplb-ep: error: ")
    assert "Traceback" not in refused.stderr
