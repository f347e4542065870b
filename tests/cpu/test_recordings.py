from collections import Counter

import numpy as np
import pytest
import torch

from lplb_ep.tools.recordings import Recording, load_recording, save_recording


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
    assert (read.layers, read.source) == ((4, 9), "a test")
    assert read.load.equal(counts.sum(0))


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
    logical = torch.zeros(5, 3, 8, dtype=torch.int32)  # a ring buffer with room left, a dense layer
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
    np.save(tmp_path / "twice.npy", np.array([[[1, 2], [2, 2]]]))
    np.save(tmp_path / "flat.npy", np.arange(3))
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.save(tmp_path / "half.npy", np.full((2, 2), 0.5))
    np.save(tmp_path / "minus.npy", np.full((2, 2), -1))
    np.save(tmp_path / "zero.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "huge.npy", np.full((1, 32), 2**62))
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
        ("two.npz", {}, r"two\.npz: key must name one of its arrays: a \[2, 6, 3\], b \[6, 3\]"),
        ("two.npz", {"key": "c"}, r"no array 'c'; it holds a \[2, 6, 3\], b \[6, 3\]"),
        ("ids.npy", {}, r"layout must say .* counts = .* got int64 \[2, 6, 3\]"),
        ("ids.npy", {"layout": "rows"}, "layout must be one of counts, layer-token, token-layer"),
        ("ids.npy", {"key": "a"}, "no array 'a'; it holds one without a name"),
        ("ids.npy", {"layout": "layer-token", "num_experts": 4}, r"in \[0, 4\); got up to [567]"),
        ("ids.npy", {"layout": "layer-token", "tokens_per_batch": 7}, r"in \[1, 6\]; got 7"),
        ("twice.npy", {"layout": "layer-token"}, r"token 1 of layer 0 picks .* twice: \[2, 2\]"),
        ("counts.npy", {"layout": "layer-token"}, r"layout layer-token is .*; got int64 \[2, 4\]"),
        ("counts.npy", {"tokens_per_batch": 2}, "tokens_per_batch is for ids"),
        ("counts.npy", {"num_experts": 5}, "num_experts is 5, but counts are of 4 experts"),
        ("flat.npy", {}, r"in 2 or 3 dimensions; got int64 \[3\]"),
        ("words.npy", {}, "expected numbers"),
        ("half.npy", {}, "whole numbers"),
        ("minus.npy", {}, "at least 0"),
        ("zero.npy", {}, "all counts are 0"),
        ("huge.npy", {}, "counts must be at most 2147483647 each; got 4611686018427387904"),
        ("rubbish.npz", {}, r"rubbish\.npz: not a NumPy file"),
        ("rubbish.pt", {}, r"rubbish\.pt: not a file of plain tensors"),
        ("object.pt", {}, r"object\.pt: not a file of plain tensors"),
        ("other.pt", {}, r"other\.pt: .* logical_count or records; it holds weights"),
        ("records.pt", {}, r"records\.pt: not SGLang's records: KeyError"),
        ("sglang.pt", {"layout": "token-layer"}, "holds counts; layout .* for ids"),
        (
            "sglang.pt",
            {"key": "a"},
            r"sglang\.pt: SGLang .* no array 'a'; the file is one recording",
        ),
        ("empty", {}, "no .pt file"),
        ("notes.txt", {}, r"notes\.txt: a recording is a \.npy"),
    ],
)
def test_what_is_no_recording_is_named(files, name, options, says):
    with pytest.raises(ValueError, match=says):
        load_recording(files / name, **options)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_recording(tmp_path / "none.npz")


def test_recordings_are_saved_as_npz(tmp_path):
    with pytest.raises(ValueError, match=r"end in \.npz"):
        save_recording(tmp_path / "a.json", Recording.of(torch.ones(1, 1), "a test"))
