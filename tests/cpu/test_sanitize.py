import re

import pytest
import sanitize
import variants

from lplb_ep.planning.kernels import programs
from lplb_ep.planning.layout import capacity_for
from lplb_ep.planning.solvers import (
    DEVICE_SOLVERS,
    GUEST_OBJECTIVE_SOLVERS,
    GUEST_SOLVERS,
    OBJECTIVE_SOLVERS,
    check_fit,
    num_plan_bytes,
    num_static_bytes,
)
from lplb_ep.settings import MAX_ONE_LAUNCH

CLEAN = "========= ERROR SUMMARY: 0 errors"
RAN = 'while [ "$1" != --port ]; do shift; done; for name; do echo "ran $name in 0.0 s"; done; '


def test_every_program_has_a_case():
    cases = variants.cases()
    assert len({case.name for case in cases}) == len(cases)
    of_cases = {str(case.program) for case in cases if case.program is not None}
    assert of_cases == {str(program) for program in programs()}


@pytest.mark.parametrize(
    ("solver", "variant"),
    [(name, v) for name, solver in DEVICE_SOLVERS.items() for v in solver.variants()],
    ids=str,
)
def test_the_placement_of_a_variant_picks_it(solver, variant):
    placement = variants.placement_of(variant)
    capacity = capacity_for(placement)
    assert DEVICE_SOLVERS[solver].variant(capacity) == variant
    if variant in DEVICE_SOLVERS[solver].plan_variants():
        of_plan = num_plan_bytes(placement, capacity, MAX_ONE_LAUNCH)
        assert of_plan + num_static_bytes(variant.size) <= 227 * 1024


@pytest.mark.parametrize("variant", OBJECTIVE_SOLVERS["flow"].variants(), ids=str)
def test_one_block_holds_the_plan_of_an_objective(variant):
    placement = variants.placement_of(variant, few=variant.size == 64)
    capacity = capacity_for(placement)
    assert OBJECTIVE_SOLVERS["flow"].variant(capacity) == variant
    of_plan = num_plan_bytes(placement, capacity, MAX_ONE_LAUNCH, "cost")
    assert of_plan + num_static_bytes(variant.size) <= 227 * 1024


@pytest.mark.parametrize("variant", GUEST_SOLVERS["flow"].variants(), ids=str)
def test_the_placement_with_guests_of_a_variant_picks_it(variant):
    capacity = capacity_for(variants.guest_placement_of(variant))
    assert GUEST_SOLVERS["flow"].variant(capacity) == variant


@pytest.mark.parametrize("variant", GUEST_OBJECTIVE_SOLVERS["flow"].variants(), ids=str)
def test_the_placement_with_guests_by_cost_of_a_variant_picks_it(variant):
    placement = variants.guest_placement_of(variant)
    assert GUEST_OBJECTIVE_SOLVERS["flow"].variant(capacity_for(placement)) == variant
    check_fit(placement, "flow", 227 * 1024, objective="cost")


def test_cases_are_listed_with_their_programs(capsys):
    assert sanitize.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [case.name for case in variants.cases()]
    assert all(any(str(program) in line for line in lines) for program in programs())


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the tools given, of a compute-sanitizer that is a shell script; status and lines."""
    monkeypatch.setattr(sanitize, "compile_kernels", lambda: None)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def call(script, *options):
        (tmp_path / "bin").mkdir()
        tool = tmp_path / "bin" / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        status = sanitize.main(["--out", str(tmp_path / "logs"), *options])
        return status, capsys.readouterr().out.splitlines()

    return call


def test_nothing_found_is_status_0(run, tmp_path):
    status, lines = run(RAN + f"echo '{CLEAN}'", "--jobs", "3")
    assert status == 0
    assert lines[-1] == "16 processes, 0 errors, 0 hazards"
    of_tool = [line.partition(": ") for line in lines[:-1]]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        ran = " ".join(names for head, _, names in of_tool if head.split()[0] == tool)
        assert sorted(ran.split()) == sorted(case.name for case in variants.cases())
    assert len([*(tmp_path / "logs").iterdir()]) == 16


def test_what_a_tool_finds_is_counted(run):
    status, lines = run(
        RAN + 'echo "========= ERROR SUMMARY: 3 errors"; exit 99', "--tools", "memcheck"
    )
    assert status == 1
    assert lines[-1] == "4 processes, 12 errors, 0 hazards"
    assert sum("see " in line for line in lines) == 4


def test_hazards_count_where_the_tool_calls_them_warnings_alone(run):
    summary = "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)"
    status, lines = run(RAN + f"echo '{summary}'", "--tools", "racecheck")
    assert (status, lines[-1]) == (1, "4 processes, 0 errors, 8 hazards")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (f"echo '{CLEAN}'", "did not come to their end: barrier"),
        (RAN, "the tool did not sum up"),
        (RAN + f"echo '{CLEAN}'; exit 7", "ended with status 7"),
    ],
)
def test_a_run_that_says_nothing_is_no_success(run, script, says, monkeypatch):
    monkeypatch.setattr(sanitize, "NUM_PROCESSES", 1)
    status, lines = run(script, "--tools", "synccheck")
    assert status == 1
    assert any(says in line for line in lines)
    assert lines[-1] == "1 processes, 0 errors, 0 hazards"


def test_a_process_that_does_not_end_is_killed(run, monkeypatch):
    monkeypatch.setattr(sanitize, "TIMEOUT_S", 0.1)
    status, lines = run("sleep 600", "--tools", "initcheck")
    assert status == 1
    assert sum("did not end within 0.1 s" in line for line in lines) == 4


def test_without_the_tool_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main([]) == 2
    assert re.fullmatch(r"compute-sanitizer is not on PATH.*\n", capsys.readouterr().err)


def test_the_commands_check_own_kernels(tmp_path):
    memcheck, initcheck = (
        sanitize.command("compute-sanitizer", tool, 0, ["barrier"])
        for tool in ("memcheck", "initcheck")
    )
    for name in ("count", "solve", "solve_general", "route", "split", "mask", "barrier"):
        assert f"kernel_name={name}" in memcheck
    assert not any(word.startswith("kernel_name=") for word in initcheck)
    assert memcheck[-1] == "barrier"
