"""What `lplb-ep doctor` says of a recording and of plans in one launch, and what a planner logs."""

import logging
from collections import namedtuple

import numpy as np
import pytest

from lplb_ep import CostModel, Layer, Placement, Planner
from lplb_ep.metrics import LineFile
from lplb_ep.metrics.layers import stats_of
from lplb_ep.planning import solvers
from lplb_ep.planning.solvers import MAX_PLAN_RANKS, in_steps, log_in_steps, why_in_steps
from lplb_ep.tools import cli
from lplb_ep.tools.commands import doctor
from lplb_ep.tools.recordings import save_recording
from lplb_ep.tools.sample import sample

pytestmark = pytest.mark.usefixtures("clean_environment")

SHARED_BYTES = 227 << 10


@pytest.fixture
def told(capsys, monkeypatch):
    """What doctor says of a part, with its status."""

    def call(part, **environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, str(value))
        status = cli.main(["doctor"])
        (line,) = (
            line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [part]
        )
        return status, " ".join(line.split()[1:])

    return call


# --- the recording --------------------------------------------------------------------------------


def test_a_recording_that_will_be_written(told, tmp_path):
    path = tmp_path / "run.npz"
    said = f"{path} every 5 batches, at most 64 MiB"
    asked = {"LPLB_EP": 1, "LPLB_EP_RECORD": path, "LPLB_EP_RECORD_EVERY": 5}
    assert told("record", **asked) == (0, said)
    save_recording(path, sample(1, 4, 2, 10, 1))
    kept = path.read_bytes()
    assert told("record") == (0, f"{said}; replaces run.npz: sample, seed 0, workload 0")
    assert path.read_bytes() == kept
    np.savez(path, weights=np.ones(3))
    assert told("record") == (0, f"{said}; replaces a file that is no recording")
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]
    _, said = told("record", LPLB_EP="home")
    assert said == f"{path} nothing is recorded where LPLB_EP is home, but where it is 1"


def test_metrics_that_will_be_written(told, tmp_path):
    path = tmp_path / "run.jsonl"
    asked = {"LPLB_EP": 1, "LPLB_EP_METRICS": path, "LPLB_EP_LOG_EVERY": 5}
    said = f"{path} every 5 batches of a layer, two files of 64 MiB"
    assert told("metrics", **asked) == (0, said)
    path.write_text("of something else")
    assert told("metrics") == (0, f"{said}; replaces a file that has no metrics")
    layer = Layer(Placement([0, 1, 2, 0], 2))
    planner = Planner(layer, rank=0, counts="given")
    planner([[0]], [[1, 0, 0], [0, 0, 0]])
    LineFile(path).add(stats_of([layer]))
    assert told("metrics") == (0, f"{said}; replaces those of another run")
    for name in ("run.rank8.jsonl", "run.rank16.before.jsonl", "run.rank8.npz", "rank8.jsonl"):
        (tmp_path / name).write_text("")
    beside = "replaces or removes run.rank16.before.jsonl, run.rank8.jsonl"
    assert told("metrics") == (0, f"{said}; replaces those of another run; {beside}")
    assert told("metrics", LPLB_EP="home")[1].startswith(f"{path} nothing is written where")
    at = tmp_path / "none" / "run.jsonl"
    assert told("metrics", LPLB_EP_METRICS=at)[0] == 2


def test_a_recording_that_cannot_be_written(told, tmp_path, monkeypatch):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    for path, why in (
        (tmp_path / "none" / "run.npz", "No such file or directory"),
        (tmp_path / "folder.npz", "Is a directory"),
        (tmp_path / "file" / "run.npz", "Not a directory"),
    ):
        assert told("record", LPLB_EP=1, LPLB_EP_RECORD=path) == (
            2,
            f"error {path} cannot be written: {why}",
        )
    usage = namedtuple("usage", "free")(3 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    path = tmp_path / "run.npz"
    assert told("record", LPLB_EP_RECORD=path) == (
        2,
        f"error {path}: 3 MiB are free there, and it may take 128",
    )


def test_files_that_are_not_there_or_are_others(told, tmp_path):
    path = tmp_path / "none.json"
    _, said = told("placement", LPLB_EP_PLACEMENT=path)
    assert said == f"error {path}: No such file or directory"
    (tmp_path / "a.json").write_bytes(b"PK\xff")
    _, said = told("cost", LPLB_EP_COST=tmp_path / "a.json")
    assert (
        said
        == f"error {tmp_path}/a.json is not JSON: byte 2 is no UTF-8; so it is not a cost model"
    )


# --- settings that do not go together -------------------------------------------------------------


def test_settings_that_exclude_each_other_are_found(told):
    _, said = told("batches", LPLB_EP_MIN_GAIN=5)
    assert said == "all exchanged and solved, each by its own counts"
    status, said = told("batches", LPLB_EP_OBJECTIVE="auto")
    assert status == 2
    assert "min_gain (LPLB_EP_MIN_GAIN) does not go with the objective 'auto'" in said
    asked = {"LPLB_EP_MIN_GAIN": 0, "LPLB_EP_EVERY": 2, "LPLB_EP_ONE_LAUNCH": 64}
    status, said = told("batches", LPLB_EP_REPLICAS="valid", **asked)
    assert status == 2
    assert "LPLB_EP_EVERY) does not go with one_launch (LPLB_EP_ONE_LAUNCH)" in said


def test_placements_that_the_settings_exclude_are_found(told, tmp_path):
    path = tmp_path / "p.json"
    Placement.homes_only(8, 2, num_guests_per_rank=1).save(path)
    assert told("placement", LPLB_EP_PLACEMENT=path, LPLB_EP_OBJECTIVE="auto")[0] == 0
    CostModel("mine", 64, (10,), 10).save(tmp_path / "cost.json")
    status, said = told("placement", LPLB_EP_COST=tmp_path / "cost.json")
    assert status == 2
    assert "the cost model 'mine' has no `push`" in said
    assert "does not go with guest slots" in told("placement", LPLB_EP_OBJECTIVE="experts")[1]


def test_whole_experts_are_split_by_costs(told):
    """As `Problem.fingerprint` has it: the cost model is part of such plans."""
    _, said = told("cost", LPLB_EP_OBJECTIVE="experts")
    assert said.endswith("; the objective experts splits only those above 128 rows")


# --- plans in one launch --------------------------------------------------------------------------


def ring(num_ranks, **guests):
    """Ranks of which each has a copy of the next one's expert."""
    own = np.arange(num_ranks)
    table = np.stack([own, (own + 1) % num_ranks, *[own * 0 - 1] * len(guests)], 1)
    return Placement(table.ravel(), num_ranks, num_experts=num_ranks, **guests)


@pytest.mark.parametrize(
    ("placement", "solver", "objective", "says"),
    [
        (ring(8), "flow", "tokens", ""),
        (ring(8), "flow", "cost", ""),
        (ring(8), "cusolverdx", "tokens", "the solver cusolverdx has no kernel for it"),
        (
            ring(8, num_guests_per_rank=1),
            "flow",
            "tokens",
            "the solver flow with guest slots has no kernel for it",
        ),
        (ring(2 * MAX_PLAN_RANKS), "flow", "tokens", "a component has more than 128 ranks"),
    ],
)
def test_why_plans_take_three_launches(placement, solver, objective, says):
    assert why_in_steps(placement, solver, SHARED_BYTES, objective=objective) == says


def test_components_and_shared_memory_that_take_three_launches():
    several = Placement([0, 1, 1, 0, 2, 3, 3, 2], 4)
    assert why_in_steps(several, "flow", SHARED_BYTES) == (
        "the placement has 2 components, and one block solves one"
    )
    assert why_in_steps(several, "flow", SHARED_BYTES, refreshable=True, moves_homes=True) == ""
    why = why_in_steps(ring(64), "flow", 40_000)
    assert why.startswith("a block has 40000 bytes of shared memory, and such a plan takes ")


def test_counts_that_take_three_launches():
    assert [in_steps(kind) for kind in ("ipc", "nvshmem", "given")] == [""] * 3
    assert in_steps("torch") == "counts travel by torch, not by kernels"
    assert in_steps("nvshmem", has_relay=True) == "counts travel between nodes"


def test_each_reason_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "lplb_ep")
    log_in_steps.cache_clear()
    for why in ("a reason", "a reason", "another"):
        log_in_steps(why)
    assert caplog.messages == [
        f"lplb_ep: LPLB_EP_ONE_LAUNCH: plans take three launches: {why}"
        for why in ("a reason", "another")
    ]


def test_doctor_says_how_many_launches_a_plan_takes(told, tmp_path, monkeypatch):
    assert told("launches", LPLB_EP_ONE_LAUNCH=64) == (0, "none plans are made on the CPU")
    monkeypatch.setattr(solvers, "choose_solver", lambda *a, **b: ("flow", "a CUDA device"))
    monkeypatch.setattr(doctor, "_choose_counts", lambda settings: ("ipc", "in one node"))
    monkeypatch.setattr("lplb_ep.gpu.launch.max_shared_bytes", lambda device: SHARED_BYTES)
    assert told("launches") == (0, "one of at most 64 picks of a rank")
    Placement([0, 1, 1, 0, 2, 3, 3, 2], 4).save(tmp_path / "p.json")
    _, said = told("launches", LPLB_EP_PLACEMENT=tmp_path / "p.json")
    assert said == "three the placement has 2 components, and one block solves one"
    ring(4).save(tmp_path / "p.json")
    assert told("launches")[1] == "one of at most 64 picks of a rank"
    monkeypatch.setattr(doctor, "_choose_counts", lambda settings: ("torch", "several nodes"))
    assert told("launches")[1] == "three counts travel by torch, not by kernels"
