"""Damaged files of every format: one clear line and status 2, or what an independent reader finds.

`make test-long` tries ten thousand of them.
"""

import contextlib
import csv
import io
import itertools
import json

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_files import PLACEMENTS, READERS

from lplb_ep import Placement, PlacementError, load_placements, save_placements
from lplb_ep.tools import cli
from lplb_ep.tools.recordings import Recording, load_recording, save_recording

pytestmark = pytest.mark.usefixtures("clean_environment")

COUNTS = np.random.default_rng(0).integers(1, 99, (2, 6))
WORDS = [
    b"-1",
    b"0",
    b"1.5",
    b"null",
    b"true",
    b'"x"',
    b"9" * 25,
    b"NaN",
    b"1e400",
    b"[]",
    b"{}",
    b"",
]


def write_recordings(folder):
    np.save(folder / "a.npy", COUNTS)
    np.savez(folder / "b.npz", counts=COUNTS)
    save_recording(folder / "c.npz", Recording.of(COUNTS, "a test", layers=[3, 4]))
    torch.save(torch.from_numpy(COUNTS), folder / "d.pt")
    save_recording(folder / "e.pt", Recording.of(COUNTS, "a test"))
    save_recording(folder / "f.json", Recording.of(COUNTS, "a test"))
    (folder / "g.json").write_text(json.dumps(COUNTS.tolist()))
    (folder / "h.json").write_text(json.dumps(dict(zip("34", COUNTS.tolist(), strict=True))))
    (folder / "i.csv").write_text("\n".join(",".join(map(str, row)) for row in COUNTS.tolist()))
    rows = [f"{layer},{expert},{n}" for (layer, expert), n in np.ndenumerate(COUNTS)]
    (folder / "j.csv").write_text("\n".join(["layer,expert,count", *rows]))


def write_placements(folder):
    for name, kind in (
        ("a.json", "lplb-ep"),
        ("b.json", "sglang"),
        ("c.pt", "sglang"),
        ("d.yaml", "tensorrt-llm"),
        ("e.json", "vllm-ascend"),
        ("f.npy", "vllm"),
        ("g.pt", "vllm"),
    ):
        save_placements(folder / name, PLACEMENTS, kind)
    PLACEMENTS[3].save(folder / "h.json")


@st.composite
def damaged(draw, contents):
    """A file's name and its bytes, changed in up to four places."""
    name = draw(st.sampled_from(sorted(contents)))
    data = bytearray(contents[name])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "byte", "cut", "end", "twice", "word"]))
        length = draw(st.integers(1, 12))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=3))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "end":
            del data[at:]
        elif kind == "twice":
            data[at:at] = data[at : at + 4 * length]
        elif kind == "word":  # in the place of a number
            numbers = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
            if numbers:
                start = draw(st.sampled_from(numbers))
                end = next((i for i in range(start, len(data)) if not chr(data[i]).isdigit()), None)
                data[start:end] = draw(st.sampled_from(WORDS))
    return name, bytes(data)


def said(*argv):
    """The exit status of the command, and what it writes to stderr."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = cli.main([str(a) for a in argv])
        except SystemExit as end:
            status = end.code
    return status, told.getvalue()


def check_said(status, told, path):
    if status:
        assert status == 2, told
        assert told.startswith("lplb-ep: error: "), told
        assert told.count("\n") == 1, told
        assert path.name in told, told
    else:
        assert told == ""


def read_independently(path):
    """[2, E] counts, or None where this reader takes the file for no recording."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        return np.load(path)["counts"]
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        return np.asarray(content["logical_count"] if isinstance(content, dict) else content)
    if path.suffix == ".json":
        content = json.loads(path.read_text("utf-8-sig"))
        if isinstance(content, dict):
            content = content.get("logical_count", list(content.values()))
        return np.asarray(content)
    rows = [row for row in csv.reader(io.StringIO(path.read_text("utf-8-sig"))) if row]
    head = [cell.strip().lower() for cell in rows[0]]
    if "expert" not in head:
        numbers = [[float(c) for c in row] for row in rows if not row[0].strip().isalpha()]
        return np.asarray(numbers)[:, int(head[0] == "layer") :]
    cells = [dict(zip(head, map(float, row), strict=True)) for row in rows[1:]]
    table = np.zeros([1 + int(max(cell[n] for cell in cells)) for n in ("layer", "expert")])
    for cell in cells:
        table[int(cell["layer"]), int(cell["expert"])] = cell["count"]
    return table


def tables_independently(kind, path):
    """The tables of an engine's file, without its other parts."""
    if path.suffix == ".npy":
        return dict(enumerate(np.load(path).tolist()))
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        content = content["physical_to_logical_map"] if kind == "sglang" else content
        return dict(enumerate(content.tolist()))
    if kind == "tensorrt-llm":
        content = yaml.safe_load(path.read_text())["initial_global_assignments"]
        return {int(layer): row for layer, row in content.items()}
    content = json.loads(path.read_text("utf-8-sig"))
    if kind == "sglang":
        return dict(enumerate(content["physical_to_logical_map"]))
    layers = [[d["device_expert"] for d in layer["device_list"]] for layer in content["layer_list"]]
    return {n: list(itertools.chain(*devices)) for n, devices in enumerate(layers)}


def try_recordings(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    status, told = said("replay", path, "--placement", "homes", "--ranks", 1, "--layout", "counts")
    check_said(status, told, path)
    if status:
        return False
    recording = load_recording(path, layout="counts")
    counts = np.asarray(read_independently(path), float).reshape(-1, recording.num_experts)
    assert np.isfinite(counts).all()
    assert (counts >= 0).all()
    # Shares of the rows that have any, whatever batch or layer they are.
    counts = counts[counts.any(axis=1)]
    found = recording.counts.double().numpy().reshape(-1, recording.num_experts)
    found = found[found.any(axis=1)] / recording.scale
    assert found.shape == counts.shape
    assert np.allclose(found, counts, rtol=1e-3, atol=1e-6 * counts.max())
    return True


def try_placements(folder, counts, name, data):
    path = folder / name
    path.write_bytes(data)
    status, told = said("place", "--start", path, "--ranks", 3, "-o", folder / "out.json")
    if "has layers by name" not in told:
        check_said(status, told, path)
    if status:
        return False
    kind = {"b": "sglang", "c": "sglang", "d": "tensorrt-llm", "e": "vllm-ascend"}.get(name[0])
    kind = kind or {"f": "vllm", "g": "vllm"}.get(name[0], "own")
    found = load_placements(path, 3)
    if kind == "own":
        content = json.loads(path.read_text("utf-8-sig"))
        expected = {int(k): v["physical_to_logical"] for k, v in content["layers"].items()}
    else:
        expected = tables_independently(kind, path)
    assert {k: p.physical_to_logical.tolist() for k, p in found.items()} == expected
    for placement in found.values():
        held = set(placement.physical_to_logical.tolist()) - {-1}
        assert held == set(range(placement.num_experts))
    return True


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    recordings, placements = (
        tmp_path_factory.mktemp(name) for name in ("recordings", "placements")
    )
    write_recordings(recordings)
    write_placements(placements)
    return recordings, placements


def run(folder, attempt, num_examples):
    """Tries as many damaged files; returns how many of them were read all the same."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, data in contents.items():
        assert attempt(name, data) or name == "h.json", name
    read = itertools.count()

    @examples(num_examples)
    @given(damaged(contents))
    def one(case):
        if attempt(*case):
            next(read)

    one()
    return next(read)


def examples(number):
    """The same ones in every run, however long they take."""
    return settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


COUNT = [120, pytest.param(5000, marks=pytest.mark.long)]


@pytest.mark.parametrize("num_examples", COUNT)
def test_damaged_recordings(folders, tmp_path, num_examples):
    read = run(folders[0], lambda name, data: try_recordings(tmp_path, name, data), num_examples)
    assert 0 < read < num_examples, "some damage changes a number into another"


@pytest.mark.parametrize("num_examples", COUNT)
def test_damaged_placements(folders, tmp_path, num_examples):
    def attempt(name, data):
        return try_placements(tmp_path, folders[0] / "a.npy", name, data)

    read = run(folders[1], attempt, num_examples)
    assert read < num_examples


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_every_table_comes_back_from_every_format(tmp_path_factory, data):
    """Round trips of random placements: the engine's reader, and ours, find the table."""
    ranks, slots = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    experts = data.draw(st.integers(1, ranks * slots))
    layers = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True))
    tables = {}
    for layer in sorted(layers):
        more = st.lists(
            st.integers(0, experts - 1),
            min_size=ranks * slots - experts,
            max_size=ranks * slots - experts,
        )
        tables[layer] = data.draw(st.permutations([*range(experts), *data.draw(more)]))
    placements = {k: Placement(table, ranks, num_experts=experts) for k, table in tables.items()}
    folder = tmp_path_factory.mktemp("round")
    ends = {"sglang": [".json", ".pt"], "tensorrt-llm": [".yaml"], "vllm-ascend": [".json"]}
    for kind, end in [(k, e) for k, v in {**ends, "vllm": [".npy", ".pt"]}.items() for e in v]:
        path = folder / f"a{end}"
        in_model = kind in ("sglang", "tensorrt-llm")
        if not in_model and max(layers) - min(layers) >= len(layers):  # it only counts layers
            with pytest.raises(PlacementError, match=rf"a file of {kind} counts layers, and layer"):
                save_placements(path, placements, kind)
            continue
        save_placements(path, placements, kind)
        expected = tables if in_model else dict(enumerate(tables.values()))
        found, ours = (
            READERS[kind](path, experts) if experts <= ranks * slots else {},
            load_placements(path, ranks, num_experts=experts),
        )
        assert {k: found[k] for k in expected} == expected
        assert {k: ours[k].physical_to_logical.tolist() for k in expected} == expected
    own = folder / "own.json"
    save_placements(own, placements)
    assert load_placements(own) == placements
    assert yaml.safe_load((folder / "a.yaml").read_text())["num_slots"] == ranks * slots


# What stands in the place of a part of a content that is whole otherwise.
ODD = [None, True, -1, 3, 2**31, 2**70, 1.5, float("nan"), "x", [], {}, [1], [[1, 2], [3, 4]]]
ODD_TENSORS = [
    lambda: torch.tensor([]),
    lambda: torch.tensor(3),
    lambda: torch.tensor([[-1, 2, 3, 4]] * 2),
    lambda: torch.tensor([[1, 2**40, 3, 4]] * 2),
    lambda: torch.ones(1, 2, 2, 4),
    lambda: torch.full((2, 4), float("nan")),
    lambda: torch.ones(2, 4, dtype=torch.bfloat16),
    lambda: torch.ones(2, 4, dtype=torch.complex64),
    lambda: torch.ones(2, 4, dtype=torch.bool),
    lambda: torch.ones(2, 4, requires_grad=True),
    lambda: torch.eye(2, 4).to_sparse(),
    lambda: torch.empty(2, 4, device="meta"),
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
]
ODD_ARRAYS = [
    np.array(3),
    np.zeros((0, 3)),
    np.array([[1, 2, 3]]),
    np.array([3, 3]),
    np.array([-1, 2]),
    np.array([np.inf, 1]),
    np.array(["a", "b"]),
    np.array([[2**64 - 1] * 3], np.uint64),
    np.ones((1, 1, 2, 3)),
]
SLOTS = torch.tensor([[0, 1, 2, 0], [1, 0, 2, 2]])


def a_record(number):
    counts = torch.tensor([[3, 1, 2, 0], [1, 1, 1, 5]])
    return {"forward_pass_id": number, "rank": 0, "global_physical_count": counts}


CONTENTS = {
    "records.pt": {
        "records": [a_record(0), a_record(1)],
        "last_physical_to_logical_map": SLOTS,
    },
    "counts.pt": {"logical_count": torch.ones(2, 2, 3)},
    "map.pt": {"physical_to_logical_map": SLOTS},
    "saved.npz": {
        "lplb_ep_recording": np.array(1),
        "counts": np.ones((1, 2, 3), int),
        "layers": np.array([3, 4]),
        "source": np.array("a test"),
        "scale": np.array(1.0),
    },
}


@st.composite
def of_odd_parts(draw):
    """A content with another thing in the place of one of its parts, and its file's name."""
    name = draw(st.sampled_from(sorted(CONTENTS)))
    odd = st.sampled_from(ODD_ARRAYS)
    if name.endswith(".pt"):
        odd = st.sampled_from(ODD) | st.sampled_from(ODD_TENSORS).map(lambda make: make())

    def changed(part):
        if not isinstance(part, (dict, list)) or draw(st.integers(0, 5)) == 0:
            return draw(odd)
        part = part.copy()
        at = draw(st.sampled_from([*part] if isinstance(part, dict) else range(len(part))))
        if draw(st.integers(0, 5)) == 0:
            del part[at]
        else:
            part[at] = changed(part[at])
        return part

    if not name.endswith(".pt"):  # a file of arrays has nothing else
        at = draw(st.sampled_from(sorted(CONTENTS[name])))
        return name, CONTENTS[name] | {at: draw(odd)}
    return name, changed(CONTENTS[name])


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:Sparse")
@pytest.mark.parametrize("num_examples", [150, pytest.param(3000, marks=pytest.mark.long)])
def test_whole_files_of_odd_parts(folders, tmp_path, num_examples):
    """Checksums hide from byte damage what a program may write: parts of another kind."""

    @examples(num_examples)
    @given(of_odd_parts())
    def one(case):
        name, content = case
        path = tmp_path / name
        if path.suffix == ".pt":
            torch.save(content, path)
        else:
            np.savez(path, **content)
        homes = ["--placement", "homes", "--ranks", 1, "--layout", "counts"]
        argvs = [["replay", path, *homes]]
        if path.suffix == ".pt":
            argvs.append(["place", "--start", path, "--ranks", 2, "-o", tmp_path / "out.json"])
        for argv in argvs:
            check_said(*said(*argv), path)

    one()


def test_a_list_that_holds_itself_is_read_once(tmp_path):
    content = [1]
    content.append(content)
    torch.save({"records": content}, tmp_path / "a.pt")
    status, told = said("replay", tmp_path / "a.pt", "--placement", "homes", "--ranks", 1)
    check_said(status, told, tmp_path / "a.pt")
    assert status == 2


def test_a_rank_of_an_absurd_number_takes_no_memory(tmp_path):
    torch.save(
        CONTENTS["records.pt"] | {"records": [a_record(0) | {"rank": 2**40}]}, tmp_path / "a.pt"
    )
    np.save(tmp_path / f"rank{2**40}.npy", COUNTS)
    for path in (tmp_path / "a.pt", tmp_path):
        status, told = said("replay", path, "--placement", "homes", "--ranks", 1)
        assert status == 2
        assert "rank 0 is missing" in told
        (tmp_path / "a.pt").unlink(missing_ok=True)
