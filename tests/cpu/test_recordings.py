import json
from collections import Counter

import numpy as np
import pytest
import torch

from lplb_ep.tools.recordings import Recording, load_recording, save_recording
from lplb_ep.tools.routed_ids import count_ids


def random_ids(layers, tokens, k, experts, seed=0):
    """[layers, tokens, k] distinct ids a token."""
    keys = np.random.default_rng(seed).random((layers, tokens, experts))
    return keys.argsort(axis=2)[:, :, :k]


def counted(ids, num_experts):
    """[layers, experts], counted one by one."""
    found = [Counter(layer.ravel().tolist()) for layer in ids]
    return torch.tensor([[c[e] for e in range(num_experts)] for c in found])


def test_a_saved_recording_comes_back(tmp_path):
    counts = torch.randint(1, 9, (3, 2, 5))
    recording = Recording.of(counts, "a test", layers=[4, 9])
    save_recording(tmp_path / "a.npz", recording)
    read = load_recording(tmp_path / "a.npz", num_experts=5)
    assert read.counts.equal(counts)
    assert (read.layers, read.source) == ((4, 9), "a.npz: a test")
    assert read.load.equal(counts.sum(0))


def test_a_wrong_count_is_named_by_its_layers_own_number():
    counts = torch.ones(3, 2, 5, dtype=torch.int64)
    counts[2, 1, 4] = -5
    with pytest.raises(ValueError, match="got -5 for batch 2, layer 9, expert 4"):
        Recording.of(counts, "a test", layers=[4, 9])


def test_counts_of_two_and_three_dimensions(tmp_path):
    counts = np.random.default_rng(0).integers(1, 99, (4, 3, 6))
    np.save(tmp_path / "two.npy", counts[0].astype(np.float32))
    np.savez(tmp_path / "three.npz", steps=counts, other=counts)
    two = load_recording(tmp_path / "two.npy")
    three = load_recording(tmp_path / "three.npz", key="steps", layout="counts")
    assert two.counts.equal(torch.from_numpy(counts[:1]))
    assert three.counts.equal(torch.from_numpy(counts))
    assert three.source == "three.npz: steps"


def test_idle_layers_and_batches_are_left_out():
    counts = torch.zeros(3, 4, 2, dtype=torch.int64)
    counts[0, 1:3], counts[2, 1:3] = 1, 2
    recording = Recording.of(counts, "a test")
    assert recording.counts.equal(torch.tensor([1, 2])[:, None, None].expand(2, 2, 2))
    assert recording.layers == (1, 2)


@pytest.mark.parametrize("layout", ["layer-token", "token-layer"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_ids_are_counted(tmp_path, layout, dtype):
    ids = random_ids(layers=3, tokens=20, k=4, experts=16)
    stored = ids if layout == "layer-token" else ids.transpose(1, 0, 2)
    np.save(tmp_path / "ids.npy", stored.astype(dtype))
    whole = load_recording(tmp_path / "ids.npy", layout=layout, num_experts=16)
    assert whole.counts.equal(counted(ids, 16)[None])
    batches = load_recording(
        tmp_path / "ids.npy", layout=layout, num_experts=16, tokens_per_batch=8
    )
    assert batches.counts.equal(
        torch.stack([counted(ids[:, :8], 16), counted(ids[:, 8:16], 16)])
    ), "two batches of eight, four tokens dropped"


def test_absent_picks_and_dense_layers(tmp_path):
    ids = random_ids(layers=3, tokens=10, k=2, experts=8)
    ids[0] = 0  # as vLLM fills a layer without a router
    ids[1, :5, 1] = -1
    np.save(tmp_path / "ids.npy", ids)
    recording = load_recording(tmp_path / "ids.npy", layout="layer-token", num_experts=8)
    assert recording.layers == (1, 2)
    assert recording.counts[0].equal(counted(ids, 8)[1:])
    assert recording.counts[0, 0].sum() == 15


def test_sglang_statistics(tmp_path):
    logical = torch.zeros(5, 3, 8, dtype=torch.int32)  # a ring buffer, partly empty; a dense layer
    logical[:2, 1:] = torch.randint(1, 99, (2, 2, 8), dtype=torch.int32)
    torch.save(
        {"rank": 0, "logical_count": logical, "average_utilization_rate_over_window": None},
        tmp_path / "expert_distribution_recorder_1.pt",
    )
    recording = load_recording(tmp_path / "expert_distribution_recorder_1.pt")
    assert recording.counts.equal(logical[:2, 1:].long())
    assert recording.layers == (1, 2)


def test_sglang_records_of_several_ranks(tmp_path):
    table = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    rng = np.random.default_rng(0)
    expected = np.zeros((2, 2, 3), int)
    for rank in range(2):
        records = []
        for step in (7, 3):
            physical = rng.integers(0, 9, (2, 4))
            records.append(
                {
                    "forward_pass_id": step,
                    "rank": rank,
                    "gatherer_key": "primary",
                    "global_physical_count": torch.from_numpy(physical).int(),
                    "extend_seq_lens": None,
                }
            )
            for layer, slot in np.ndindex(2, 4):
                expected[(3, 7).index(step), layer, table[layer, slot]] += physical[layer, slot]
        torch.save(
            {"records": records, "last_physical_to_logical_map": table}, tmp_path / f"{rank}.pt"
        )
    recording = load_recording(tmp_path, num_experts=3)
    assert recording.counts.equal(torch.from_numpy(expected))
    assert "2 rank(s)" in recording.source


def test_a_tensor_in_a_torch_file(tmp_path):
    counts = torch.randint(1, 9, (2, 4))
    torch.save(counts, tmp_path / "counts.pt")
    assert load_recording(tmp_path / "counts.pt").counts[0].equal(counts)
    torch.save(counts.bfloat16(), tmp_path / "counts.pt")
    assert load_recording(tmp_path / "counts.pt").counts[0].equal(counts)


@pytest.fixture
def files(tmp_path):
    ids = random_ids(layers=2, tokens=6, k=3, experts=8)
    np.savez(tmp_path / "two.npz", a=ids, b=ids[0])
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "twice.npy", np.array([[[1, 2, 3], [2, 2, 0]]]))
    np.save(tmp_path / "flat.npy", np.arange(3))
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.save(tmp_path / "nan.npy", np.array([[1, 2], [3, np.nan]]))
    np.save(tmp_path / "minus.npy", np.full((2, 2), -1))
    np.save(tmp_path / "zero.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "counts.npy", np.ones((2, 4), int))
    (tmp_path / "rubbish.npz").write_bytes(b"PK no archive")
    (tmp_path / "rubbish.pt").write_bytes(b"no archive")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    torch.save({"records": [{"rank": 0}]}, tmp_path / "records.pt")
    torch.save({"logical_count": torch.ones(1, 2, 4)}, tmp_path / "sglang.pt")
    torch.save(tmp_path, tmp_path / "object.pt")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "two.npz",
            {},
            r"two\.npz: key must name one of its arrays: 'a' \[2, 6, 3\], 'b' \[6, 3\]",
        ),
        ("two.npz", {"key": "c"}, r"no array 'c'; it holds 'a' \[2, 6, 3\], 'b' \[6, 3\]"),
        ("ids.npy", {}, r"layout must say .* counts = .* got int64 \[2, 6, 3\]"),
        ("ids.npy", {"layout": "rows"}, "layout must be one of counts, layer-token, token-layer"),
        ("ids.npy", {"key": "a"}, "no array 'a'; it holds one without a name"),
        (
            "ids.npy",
            {"layout": "layer-token", "num_experts": 4},
            r"in \[0, 4\); got [4-7] for token \d of l",
        ),
        ("ids.npy", {"layout": "layer-token", "tokens_per_batch": 7}, r"in \[1, 6\]; got 7"),
        ("twice.npy", {"layout": "layer-token"}, r"token 1 of layer 0 picks .* twice: \[2, 2, 0\]"),
        (
            "counts.npy",
            {"layout": "layer-token"},
            r"layout 'layer-token' is .*; got int64 \[2, 4\]",
        ),
        ("counts.npy", {"tokens_per_batch": 2}, "tokens_per_batch is for ids"),
        ("counts.npy", {"num_experts": 5}, "num_experts is 5, but counts are of 4 experts"),
        ("flat.npy", {}, r"in 2 or 3 dimensions; got int64 \[3\]"),
        ("words.npy", {}, "expected numbers"),
        ("nan.npy", {}, "at least 0; got nan for batch 0, layer 1, expert 1"),
        ("minus.npy", {}, "at least 0; got -1 for batch 0, layer 0, expert 0"),
        ("zero.npy", {}, "all counts are 0"),
        ("rubbish.npz", {}, r"rubbish\.npz is not a NumPy file of plain arrays: it is damaged"),
        ("rubbish.pt", {}, r"rubbish\.pt is not a file of plain tensors: it begins with 'no archi"),
        ("object.pt", {}, r"object\.pt is not a file of plain tensors: it is damaged, or has more"),
        ("other.pt", {}, r"other\.pt: .* logical_count or records; it holds 'weights'"),
        ("records.pt", {}, r"records\.pt: not SGLang's records: KeyError"),
        ("sglang.pt", {"layout": "token-layer"}, "holds counts; layout .* for ids"),
        (
            "sglang.pt",
            {"key": "a"},
            r"sglang\.pt: no array 'a'; the file is one recording",
        ),
        ("empty", {}, r"no \.pt, \.npy, \.csv or \.json file"),
        (
            "notes.txt",
            {},
            r"notes\.txt: a recording is a directory, or a file that ends in \.npz, ",
        ),
    ],
)
def test_what_is_no_recording_is_named(files, name, options, says):
    with pytest.raises(ValueError, match=says):
        load_recording(files / name, **options)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_recording(tmp_path / "none.npz")


def test_recordings_are_saved_as_npz(tmp_path):
    with pytest.raises(ValueError, match=r"end in \.npz, \.json, \.pt; got"):
        save_recording(tmp_path / "a.csv", Recording.of(torch.ones(1, 1), "a test"))


# --- padding, fractions, large totals -------------------------------------------------------------


def test_padding_and_dense_layers_are_left_out_and_it_is_said(tmp_path):
    ids = np.array([[[0, 0], [0, 0]], [[1, 3], [-1, -1]], [[2, 0], [-1, -1]]])
    np.save(tmp_path / "ids.npy", ids)
    recording = load_recording(tmp_path / "ids.npy", layout="layer-token", num_experts=4)
    assert recording.layers == (1, 2)
    assert recording.counts.tolist() == [[[0, 1, 0, 1], [1, 0, 1, 0]]]
    assert recording.num_dropped == 2
    assert recording.notes() == ["2 rows of tokens are padding and left out"]


@pytest.mark.parametrize("filler", [0, -1, 255, "largest", "range"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("layout", ["layer-token", "token-layer"])
def test_padding_of_every_kind(tmp_path, filler, dtype, layout):
    ids = random_ids(layers=3, tokens=12, k=4, experts=16)
    expected = counted(ids[:, :9], 16)
    ids = ids.astype(dtype)
    fillers = {"largest": np.iinfo(dtype).max, "range": np.arange(4)}
    ids[:, 9:] = np.array(fillers.get(filler, filler)).astype(dtype)
    stored = ids if layout == "layer-token" else ids.transpose(1, 0, 2)
    np.save(tmp_path / "ids.npy", stored)
    recording = load_recording(tmp_path / "ids.npy", layout=layout)
    assert recording.counts[0].equal(expected)
    assert recording.num_dropped == 9


def test_the_first_experts_in_order_are_a_choice_where_that_may_be():
    ids = np.array([[[0, 1], [1, 2], [0, 1]]])
    found = count_ids(ids, "a test", None, None)
    assert found.counts.tolist() == [[[2, 3, 1]]]
    assert found.num_dropped == 0


def test_ids_of_one_pick_are_kept_but_where_a_layer_has_one_number(tmp_path):
    ids = np.array([[[0], [0], [2]], [[3], [3], [3]], [[0], [-1], [1]]])
    np.save(tmp_path / "ids.npy", ids)
    recording = load_recording(tmp_path / "ids.npy", layout="layer-token")
    assert recording.layers == (0, 2)
    assert recording.counts.tolist() == [[[2, 0, 1], [1, 1, 0]]]


def test_totals_beyond_a_solver_keep_their_shares(tmp_path):
    np.save(tmp_path / "large.npy", np.array([[1500000000, 1500000000, 5, 5]]))
    recording = load_recording(tmp_path / "large.npy")
    total = int(recording.counts.sum())
    assert total <= 2**31 - 1
    assert recording.counts[0, 0, :2].double().div(total).sub(0.5).abs().max() < 1e-8
    assert recording.scale < 1
    assert "only shares matter" in recording.notes()[0]
    assert int(recording.load.sum()) <= 2**31 - 1


def test_totals_that_are_large_over_all_batches_keep_their_shares():
    counts = torch.tensor([3, 1]).mul(2**28).expand(9, 1, 2)
    recording = Recording.of(counts, "a test")
    assert recording.counts.equal(counts), "each batch alone is a solver's"
    assert int(recording.load.sum()) <= 2**31 - 1
    assert float(recording.load[0, 0] / recording.load[0, 1]) == pytest.approx(3, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", "longdouble"])
def test_means_keep_their_shares(dtype):
    means = np.array([[0.25, 0.5, 1.0], [0.0, 0.75, 1.0]]).astype(dtype)
    recording = Recording.of(means, "a test")
    found = recording.counts[0].double().numpy()
    assert (found / recording.scale == means).all()
    assert recording.scale > 1


def test_layers_that_vanish_beside_others_are_named():
    with pytest.raises(ValueError, match="the counts of layer 1 vanish beside those of others"):
        Recording.of(np.array([[1e25, 1.0], [3.0, 4.0]]), "a test")


@pytest.mark.parametrize("values", [[1e308, 1e308], [1e-300, 2e-300], [2**63, 2**63]])
def test_numbers_of_any_size(values):
    found = Recording.of(np.array([values], dtype=np.float64), "a test").counts[0, 0]
    assert found.sum() <= 2**31 - 1
    shares = np.array(values, float) / max(values)
    assert np.allclose(found.numpy() / int(found.max()), shares, atol=1e-6)


# --- JSON, CSV, directories -----------------------------------------------------------------------


def test_json_of_lists_of_layers_and_of_sglang(tmp_path):
    counts = [[1, 2, 3], [4, 5, 6]]
    (tmp_path / "lists.json").write_text(json.dumps(counts))
    (tmp_path / "layers.json").write_text(json.dumps({"3": counts[0], "10": counts[1]}))
    (tmp_path / "sglang.json").write_text(json.dumps({"logical_count": [counts, counts]}))
    lists, layers, sglang = (
        load_recording(tmp_path / name) for name in ("lists.json", "layers.json", "sglang.json")
    )
    assert lists.counts.tolist() == layers.counts.tolist() == [counts]
    assert (lists.layers, layers.layers) == ((0, 1), (3, 10))
    assert sglang.counts.tolist() == [counts, counts]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("1,2,3\n4,5,6\n", (0, 1)),
        ("e0, e1, e2\n1,2,3\n4,5,6\n", (0, 1)),
        ("layer,e0,e1,e2\n3,1,2,3\n7,4,5,6\n", (3, 7)),
        ("\ufeffLayer,Expert,Count\n3,2,3\n3,0,1\n3,1,2\n7,0,4\n7,1,5\n7,2,6\n", (3, 7)),
    ],
)
def test_csv(tmp_path, text, layers):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    recording = load_recording(tmp_path / "a.csv")
    assert recording.counts.tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert recording.layers == layers


def test_csv_of_batches(tmp_path):
    (tmp_path / "a.csv").write_text("batch,layer,expert,count\n9,0,1,5\n2,0,0,1\n2,0,1,2\n")
    assert load_recording(tmp_path / "a.csv").counts.tolist() == [[[1, 2]], [[0, 5]]]


@pytest.mark.parametrize("end", [".npz", ".json", ".pt"])
def test_a_recording_is_written_and_comes_back(tmp_path, end):
    counts = torch.randint(1, 9, (3, 2, 5))
    save_recording(tmp_path / f"a{end}", Recording.of(counts, "a test", layers=[4, 9]))
    read = load_recording(tmp_path / f"a{end}")
    assert read.counts.equal(counts)
    assert read.layers == (4, 9)


def test_a_directory_of_batches_in_the_order_of_their_numbers(tmp_path):
    for step in (10, 0, 20):
        np.save(tmp_path / f"step{step}.npy", np.full((2, 3), step + 1))
    recording = load_recording(tmp_path)
    assert recording.counts[:, 0, 0].tolist() == [1, 11, 21]


def test_a_directory_of_ranks_is_added_up(tmp_path):
    for step, rank in np.ndindex(3, 2):
        np.save(tmp_path / f"rank{rank}_step{step}.npy", np.full((1, 2), 10 * step + rank + 1))
    assert load_recording(tmp_path).counts[:, 0, 0].tolist() == [3, 23, 43]


def sglang_dump(path, rank, passes, value=1):
    records = [
        {
            "forward_pass_id": number,
            "rank": rank,
            "gatherer_key": "primary",
            "global_physical_count": torch.full((2, 4), value),
        }
        for number in passes
    ]
    table = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    torch.save({"records": records, "last_physical_to_logical_map": table}, path)


def write_parts(folder, kind):
    """A directory of which a part comes twice, or is missing."""
    if kind == "two runs":
        sglang_dump(folder / "run_1_0.pt", 0, [1, 2])
        sglang_dump(folder / "run_2_0.pt", 0, [2, 3])
    elif kind == "a rank lacks a pass":
        sglang_dump(folder / "run_0.pt", 0, [1, 2])
        sglang_dump(folder / "run_1.pt", 1, [1])
    elif kind == "no such rank":
        sglang_dump(folder / "run_0.pt", 0, [1])
        sglang_dump(folder / "run_2.pt", 2, [1])
    elif kind == "a step is missing":
        for step in (0, 10, 20, 40):
            np.save(folder / f"{step}.npy", np.ones((1, 2)))
    elif kind == "a step twice":
        for name in ("a_3", "b_3"):
            np.save(folder / f"{name}.npy", np.ones((1, 2)))
    elif kind == "a rank is missing":
        for name in ("rank0_1", "rank1_1", "rank0_2"):
            np.save(folder / f"{name}.npy", np.ones((1, 2)))
    elif kind == "two kinds":
        np.save(folder / "0.npy", np.ones((1, 2)))
        (folder / "1.csv").write_text("1,2\n")
    elif kind == "other shapes":
        np.save(folder / "0.npy", np.ones((1, 2)))
        np.save(folder / "1.npy", np.ones((1, 3)))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("two runs", r"pass 2 of rank 0 comes twice, in run_1_0\.pt and run_2_0\.pt"),
        ("a rank lacks a pass", "pass 2 of rank 1 is missing"),
        ("no such rank", "pass 1 of rank 1 is missing; each of the ranks 0 to 2"),
        ("a step is missing", "number 30 is missing between 20 and 40"),
        ("a step twice", r"a_3\.npy and b_3\.npy are the same part"),
        ("a rank is missing", r"rank 1 is missing beside rank0_2\.npy"),
        ("two kinds", r"has \.csv and \.npy files"),
        ("other shapes", r"1\.npy: parts of one recording must be alike"),
    ],
)
def test_parts_that_come_twice_or_are_missing(tmp_path, kind, says):
    write_parts(tmp_path, kind)
    with pytest.raises(ValueError, match=says):
        load_recording(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", '{"3": [1, 2], "3": [2, 1]}', "it names '3' twice"),
        ("a.json", '{"3": [1, 2], "03": [2, 1]}', "a layer comes twice"),
        ("a.json", '{"3": [1, 2], "4": [2]}', "numbers in lists of equal length"),
        ("a.json", '{"physical_to_logical_map": [[0, 1]]}', "it has 'physical_to_logical_map'"),
        ("a.json", "[[1, 2", "is not JSON: Expecting"),
        ("a.json", '[["a"]]', "expected numbers"),
        ("a.json", "{}", "it has nothing"),
        ("a.csv", "1,2\n3\n", "row 2 must be 2 numbers; got '3'"),
        ("a.csv", "layer,e0\n1,2\n1,3\n", "a layer comes twice"),
        ("a.csv", "layer,expert,count\n0,0,1\n0,0,2\n", "row 3: batch 0, layer 0, expert 0 comes"),
        (
            "a.csv",
            "layer,expert,count\n0,x,1\n",
            r"row 2: expert must be a whole number in \[0, 32768\); got 'x'",
        ),
        ("a.csv", "layer,expert,count,rank\n0,0,1,1\n", "columns must be layer, expert, count"),
        ("a.csv", "layer,expert,count\n0,0,many\n", "row 2: count must be a number; got 'many'"),
        ("a.csv", "laer,expert,count\n0,0,1\n", "columns must be layer, expert and count, or e0"),
        ("a.csv", "a,b\n0,0\n", "columns must be layer, expert and count, or e0, e1"),
        ("a.csv", "", "it has no rows"),
        ("a.csv", "layer,expert,count\n", "it has no rows"),
    ],
)
def test_text_files_that_are_no_recording(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        load_recording(tmp_path / name)
