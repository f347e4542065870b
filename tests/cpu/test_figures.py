"""`benchmarks/figures.py` runs what RESULTS.md has, and keeps what each command printed."""

import importlib.util
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def figures():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(figures, tmp_path, monkeypatch, capsys):
    """Runs commands of Python as figures; returns the status, what was said, and the folder."""

    def run_figures(programs, *options, num_gpus=1, seconds=60, arguments=""):
        commands = {
            name: figures.Figure(
                1 + (name == "two"), seconds, f"python -c {shlex.quote(program)} {arguments}"
            )
            for name, program in programs.items()
        }
        monkeypatch.setattr(figures, "FIGURES", commands)
        monkeypatch.setattr(figures, "_num_gpus", lambda: num_gpus)
        failed = figures.main(["--out", str(tmp_path / "found"), *options])
        return failed, capsys.readouterr().out, tmp_path / "found"

    return run_figures


def test_each_figure_leaves_what_it_printed(run):
    failed, said, folder = run({"one": "print(5 + 6)", "bad": "print(7); 1 / 0", "two": ""})
    assert failed == 1
    assert (folder / "one.txt").read_text().endswith("\n\n11\n")
    assert "ZeroDivisionError" in (folder / "bad.txt").read_text()
    assert re.search(r"^one: exit status 0, \d+ s, .*one.txt$", said, re.M)
    assert "bad: exit status 1, " in said
    assert "two: left out, for it wants GPUs: 2" in said


def test_a_figure_that_takes_too_long_ends_with_its_processes(figures, run, tmp_path, monkeypatch):
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    program = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); print('first'); p.wait()"
    )
    monkeypatch.setattr(figures, "PATIENCE_S", 0.1)
    failed, said, folder = run({"slow": program, "next": ""}, seconds=2)
    assert failed == 1
    assert "slow: ended at its limit of 2 s" in said
    assert "next: exit status 0" in said
    assert (folder / "slow.txt").read_text().endswith("first\n")
    time.sleep(3)
    assert not (tmp_path / "late").exists()
    failed, said, _ = run({"one": ""}, "--limit", "0.5")
    assert (failed, said) == (0, "one: left out, for no time is left\n")


def test_a_figure_ends_what_left_its_group(run, tmp_path):
    """As torchrun's ranks do, and the daemon of MPS."""
    program = (
        "import subprocess, time\n"
        "p = subprocess.Popen(['sleep', '99'], start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
        "try: time.sleep(99)\n"
        "finally: p.kill(); p.wait()"
    )
    failed, said, _ = run({"slow": program}, seconds=2)
    assert failed == 1
    assert "slow: ended at its limit of 2 s" in said
    child = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def test_folders_may_have_any_name(run, tmp_path):
    program = "import sys; print(sys.argv[1:])"
    folder = tmp_path / "o'ne {two}"
    options = "--recordings", str(folder), "--out", str(folder)
    failed, _, _ = run({"one": program}, *options, arguments="{recordings}/x.npz {out}.png")
    assert failed == 0
    told = (folder / "one.txt").read_text()
    assert told.endswith(f"\n\n{[f'{folder}/x.npz', f'{folder}/one.png']}\n")


def test_the_commands_are_those_of_the_scripts(figures, capsys):
    """A script or option that is renamed is renamed here, too."""
    assert figures.main(["--list", "--ranks", "4"]) == 0
    said = capsys.readouterr().out
    assert not re.search(r"[{}]", said)
    assert "--nproc-per-node 4 benchmarks/megatron_training.py" in said
    assert all("{ranks}" in of.command for of in figures.FIGURES.values() if of.gpus > 1)
    options = {
        "benchmarks/megatron_training.py": ["examples/megatron_gpt.py"],
        "lplb_ep.tools.cli": ["lplb_ep/tools/commands/bench.py"],
    }
    for name, figure in figures.FIGURES.items():
        words = shlex.split(figure.command)
        script = next(word for word in words[1:] if word.endswith((".py", "tools.cli")))
        sources = [script] if script.endswith(".py") else []
        text = "".join((ROOT / p).read_text() for p in [*sources, *options.get(script, [])])
        given = [w[2:] for w in words[words.index(script) :] if w.startswith("--")]
        known = set(re.findall(r'"(?:--)?([a-z-]+)"', text))
        assert not {*given} - known, name


def test_an_unknown_figure_is_named(figures, capsys):
    with pytest.raises(SystemExit):
        figures.main(["none"])
    assert "no figure 'none': plan, " in capsys.readouterr().err
