"""The command `lplb-ep`, and what `doctor`, `run`, `demo` and `compile` do."""

import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lplb_ep import CostModel, Placement, save_placements
from lplb_ep.planning import kernels
from lplb_ep.tools import cli
from lplb_ep.tools.commands import doctor, run

pytestmark = pytest.mark.usefixtures("clean_environment")


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


def test_doctor_says_what_rows_cost(capsys, monkeypatch, tmp_path):
    assert cli.main(["doctor"]) == 0
    said = sections(capsys.readouterr().out)["Used"]["cost"]
    assert said.startswith("h200")
    assert said.endswith("; the objective tokens takes no costs")
    path = tmp_path / "cost.json"
    CostModel("mine", 64, (10,), 10, about="my GPU").save(path)
    monkeypatch.setenv("LPLB_EP_COST", str(path))
    monkeypatch.setenv("LPLB_EP_OBJECTIVE", "auto")
    assert cli.main(["doctor"]) == 0
    said = sections(capsys.readouterr().out)["Used"]["cost"]
    assert said.split(maxsplit=1) == ["mine", "asked for (my GPU)"]
    path.write_text("{}")
    assert cli.main(["doctor"]) == 2
    said = sections(capsys.readouterr().out)["Used"]["cost"]
    assert "is not a cost model saved by this version" in said


def test_doctor_says_which_batches_are_solved(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    assert sections(capsys.readouterr().out)["Used"]["batches"].startswith("all ")
    monkeypatch.setenv("LPLB_EP", "1")
    monkeypatch.setenv("LPLB_EP_EVERY", "8")
    assert cli.main(["doctor"]) == 2
    assert "LPLB_EP_EVERY=8 needs LPLB_EP_REPLICAS=valid" in capsys.readouterr().out
    monkeypatch.setenv("LPLB_EP_REPLICAS", "valid")
    assert cli.main(["doctor"]) == 0
    said = sections(capsys.readouterr().out)["Used"]["batches"]
    assert said.startswith("1 in 8 ")
    assert said.endswith("not the optimum: lplb-ep replay --every 8 has the cost")


def test_doctor_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda distribution: None)
    monkeypatch.setattr(doctor, "_importable", lambda module: None)
    assert cli.main(["doctor"]) == 0
    told = sections(capsys.readouterr().out)
    assert "pip install '.[plot]' in a checkout" in told["Packages"]["matplotlib"]
    assert told["Packages"]["deep_ep"].startswith("missing")


def test_doctor_knows_a_deep_ep_without_metadata(tmp_path, capsys, monkeypatch):
    """As it is where it was built in place."""
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["doctor"]) == 0
    told = sections(capsys.readouterr().out)
    assert told["Packages"]["deep_ep"].startswith("no metadata ")
    assert "github.com" not in told["Packages"]["deep_ep"]


@pytest.mark.parametrize("fault", ["a file", "not writable", "open to others"])
def test_a_cache_that_cannot_be_kept_is_found_before_the_work(
    tmp_path, capsys, monkeypatch, fails, fault
):
    cache = tmp_path / "cache"
    if fault == "a file":
        cache.write_text("")
    elif fault == "open to others":
        cache.mkdir()
        cache.chmod(0o770)
    else:
        cache = Path("/proc/lplb_ep")
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(cache))
    monkeypatch.setattr("lplb_ep.gpu.jit.compile_all", None)  # it is not come to
    says = {"a file": "is no directory", "not writable": "cannot be written"}
    says = says.get(fault, "chmod go-w it, or set LPLB_EP_CACHE_DIR")
    assert says in fails("compile")
    assert cli.main(["doctor"]) == 2
    assert says in sections(capsys.readouterr().out)["Used"]["kernels"]


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
        (["--client", "megatron", "--placement", "a.json", "x.py"], "--client balances by guests"),
    ],
)
def test_run_says_what_is_wrong_in_one_line(fails, argv, says):
    assert says in fails("run", *argv)


def test_run_refuses_bad_settings(fails, monkeypatch):
    monkeypatch.setenv("LPLB_EP_SOLVER", "none")
    assert "LPLB_EP_SOLVER must be" in fails("run", __file__)


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


MODEL = """
import gc, json, os, sys, torch, weakref, torch.distributed as dist
gc.disable()  # it would hide that something else holds the group
import torch._dynamo  # as checkpoint does; if it is behind a group, the group outlives its end
from torch.utils.checkpoint import checkpoint
from deep_ep import Buffer
E, R, T = 6, 2, 40
class MoE(torch.nn.Module):
    def __init__(self, buffer, table, inside):
        super().__init__()
        held = torch.tensor(table).view(R, -1)[dist.get_rank()]  # the program fills its slots
        self.scale, self.buffer, self.inside = 1.0 + held, buffer, inside
        self.router = torch.nn.Linear(8, E)
    def compute(self, x):
        weights, picks = self.router(x).softmax(-1).topk(2)
        layout = self.buffer.get_dispatch_layout(picks, E)
        rows, slots, came, counts, handle, _ = self.buffer.dispatch(
            x.detach().bfloat16(), topk_idx=picks, topk_weights=weights.detach(),
            num_tokens_per_rank=layout[0], num_tokens_per_expert=layout[2],
            is_token_in_rank=layout[3])
        scale = (self.scale[slots.clamp(min=0)] * came * (slots >= 0)).sum(1, keepdim=True)
        out, _, _ = self.buffer.combine((rows.float() * scale).bfloat16(), handle)
        expected = x * ((1 + picks) * weights).sum(1, keepdim=True)
        assert ((out - expected).abs() <= 0.03 * expected.abs() + 1e-3).all()
        rows_of.setdefault(id(self), []).append(len(rows))
        return out.float() + x * weights.sum()
    def forward(self, x):
        if not self.inside:
            return self.compute(x)
        return checkpoint(lambda x: self.compute(x), x, use_reentrant=self.inside == "reentrant")
rows_of = {}
class Model(torch.nn.Module):
    def __init__(self, buffer):
        super().__init__()
        layers = json.load(open(os.environ["LPLB_EP_PLACEMENT"]))["layers"]
        tables = [layers[f"blocks.{n}.moe"]["physical_to_logical"] for n in range(3)]
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"moe": MoE(buffer, table, inside)})
            for table, inside in zip(tables, ("", "reentrant", "plain")))
    def forward(self, x, order):
        for n in order:
            x = self.blocks[n]["moe"](x / x.abs().max().detach())
        return x
dist.init_process_group("gloo")
torch.manual_seed(0)
def train():  # its buffer, which holds the group, ends before the group does
    model = Model(Buffer(dist.group.WORLD, 1 << 22))
    for order in ((0, 1, 2), (2, 0, 1), (1, 1)):
        torch.manual_seed(dist.get_rank())
        model(torch.randn(T, 8, requires_grad=True), order).sum().backward()
    return [len(rows_of[id(block["moe"])]) for block in model.blocks]
sys.stdout.write(f"{train()}\\n")
group = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
assert group() is None  # a thread of a group that is alive may abort the process as it ends
"""


@pytest.mark.parametrize("mode", ["home", "1"])
def test_run_gives_each_module_its_placement_in_recompute_too(tmp_path, mode):
    """Every token meets its experts, in layers whose slots hold different ones."""
    rng = np.random.default_rng(3)
    tables = [rng.permutation([0, 1, 2, 3, 4, 5, *rng.integers(0, 6, 2)]) for _ in range(3)]
    placements = {f"blocks.{n}.moe": Placement(table, 2) for n, table in enumerate(tables)}
    save_placements(tmp_path / "layers.json", placements)
    script = tmp_path / "script.py"
    script.write_text(MODEL)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    settings = {"LPLB_EP_BACKEND": "embedded", "LPLB_EP_REPLICAS": "valid"}
    options = ["--mode", mode, "--placement", tmp_path / "layers.json"]
    # A checkpoint inside a layer runs it twice.
    assert lplb_ep_run(*options, *launcher, script, **settings) == "[2, 8, 4]\n" * 2


@pytest.mark.parametrize("first", ["deep_ep", "lplb_ep.deepep.drop_in", "lplb_ep.deepep.patch"])
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
    monkeypatch.setattr(run, "__file__", str(tmp_path / "lplb_ep/tools/commands/run.py"))
    executed = []
    monkeypatch.setattr(os, "execv", lambda *call: executed.append(call) or sys.exit())
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help", "--steps", "3"])
    arguments = [sys.executable, str(script), "--help", "--steps", "3"]
    assert executed == [(sys.executable, arguments)]


def test_demo_without_the_example(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(run, "__file__", str(tmp_path / "lplb_ep/tools/commands/run.py"))
    assert "examples/moe_layer.py of the source tree" in fails("demo")


# --- the command itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["none"], ["doctor", "--json"], ["replay"]])
def test_unknown_arguments_are_refused(capsys, argv):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "usage: lplb-ep" in capsys.readouterr().err


def test_documents_name_all_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    commands = re.findall(r"^    (\w+)(?: |$)", capsys.readouterr().out, re.MULTILINE)
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


def test_compile_builds_every_kernel_and_says_so(
    each_kernel, kernel_cache, monkeypatch, caplog, fails
):
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(kernel_cache))
    asked = []

    def programs(*, one_launch):
        asked.append(one_launch)
        return each_kernel

    monkeypatch.setattr(kernels, "programs", programs)
    with caplog.at_level(logging.INFO):
        assert cli.main(["compile", "--arch", "sm_90"]) == 0
    number = len(each_kernel)
    said = [message for message in caplog.messages if message.startswith("[")]
    assert len(said) == number
    for i, (message, program) in enumerate(zip(said, each_kernel, strict=True), 1):
        assert message.startswith(f"[{i}/{number}] {program} for sm_90: ")
    monkeypatch.setenv("LPLB_EP_ONE_LAUNCH", "8")
    assert "arch must be" in fails("compile", "--arch", "sm_1")
    assert asked == [False, True]  # kernels that are off are not compiled


@pytest.mark.long
def test_compile_builds_every_variant(kernel_cache):
    def compile_for(arch):
        return subprocess.run(
            [sys.executable, "-m", "lplb_ep.tools.cli", "compile", "--arch", arch],
            env={
                **os.environ,
                "LPLB_EP_CACHE_DIR": str(kernel_cache),
                "LPLB_EP_ONE_LAUNCH": "2048",
            },
            capture_output=True,
            text=True,
        )

    built = compile_for("sm_90")
    assert built.returncode == 0
    number = len(kernels.programs())
    assert f"[1/{number}] flow.cu (SIZE=8, PARTS=4, TURNS=1, " in built.stderr
    assert f"[{number}/{number}] barrier.cu" in built.stderr
    refused = compile_for("sm_1")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("lplb-ep: error: ")
    assert "Traceback" not in refused.stderr
