"""Synthetic recordings: what `lplb-ep sample` writes, and the commands that read it."""

import numpy as np
import pytest
import torch

from lplb_ep.tools import cli
from lplb_ep.tools.recordings import load_recording
from lplb_ep.tools.sample import sample

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_each_token_picks_k_different_experts():
    for num_topk in (1, 3, 8):
        counts = sample(3, 8, 4, 100, num_topk).counts
        assert counts.shape == (4, 3, 8)
        assert (counts.sum(2) == 100 * num_topk).all()
        assert int(counts.max()) <= 100


def test_a_seed_is_a_model_and_a_workload_its_use():
    """Loads of two uses of a model are alike, and those of two models are not."""

    def logs(**options):
        return np.log(sample(4, 256, 4, 60000, 8, **options).load.double().numpy().ravel())

    def correlation(one, two):
        return np.corrcoef(one, two)[0, 1]

    one = logs()
    assert (logs() == one).all()
    assert 0.5 < correlation(one, logs(workload=1)) < 0.9
    assert abs(correlation(one, logs(seed=1))) < 0.2


def test_it_is_as_uneven_as_real_routers():
    """DeepSeek-V3 on 8 ranks of experts in order: 1.2 to 2.7, and 1.5 in the median layer."""
    recording = sample(58, 256, 1, 200_000, 8)
    load = recording.counts[0].view(58, 8, 32).sum(2).double()
    imbalance = load.amax(1) / load.mean(1)
    assert 1.15 < imbalance.median() < 1.7
    assert 1.5 < imbalance.max() < 3.2
    assert imbalance[29:].mean() > imbalance[:29].mean(), "late layers are worse"


@pytest.mark.parametrize("end", [".npz", ".json", ".pt"])
def test_the_commands_read_what_it_writes(tmp_path, capsys, end):
    one, two = (str(tmp_path / f"{name}{end}") for name in ("one", "two"))
    shape = ["--layers", "2", "--experts", "16", "--batches", "3", "--tokens", "200", "--topk", "2"]
    assert cli.main(["sample", "-o", one, *shape]) == 0
    assert cli.main(["sample", "-o", two, *shape, "--workload", "1"]) == 0
    assert "3 batches, 2 layers, 16 experts" in capsys.readouterr().out
    assert load_recording(one).counts.equal(sample(2, 16, 3, 200, 2).counts)
    assert not load_recording(two).counts.equal(load_recording(one).counts)
    options = ["--ranks", "4", "--redundant", "1"]
    placed = str(tmp_path / "p.json")
    assert cli.main(["place", one, *options, "--seconds", "1", "-o", placed]) == 0
    assert cli.main(["replay", two, "--placement", placed]) == 0
    assert cli.main(["replay", two, "--placement", "eplb", *options, "--learn-from", one]) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--layers", "0"], "--layers must be at least 1; got 0"),
        (["--topk", "65"], "--topk must be at most --experts, 64; got 65"),
        (["--seed", "-1"], "--seed and --workload must be at least 0"),
        (["--tokens", "999999999"], "--tokens must be below 2**31 / 8; got 999999999"),
        (["-o", "a.npy"], "-o must end in .npz, .json, .pt; got a.npy"),
        (["-o", "none/a.npz"], "there is no directory none"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fails, tmp_path, options, says):
    assert says in fails("sample", "-o", tmp_path / "a.npz", *options)


def test_counts_are_tensors_of_whole_numbers():
    assert sample(1, 4, 1, 10, 2).counts.dtype == torch.int64
