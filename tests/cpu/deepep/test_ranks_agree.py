"""Ranks that bring different things are named on all ranks, as is a rank that fails."""

import pytest
import ranks
import torch
from recording_buffer import Layer, recorder

import lplb_ep
from lplb_ep import Placement
from lplb_ep.deepep import drop_in as buffer
from lplb_ep.layer import channels


def differing_modes(group):
    import os

    os.environ["LPLB_EP"] = "0" if group.rank() == 2 else "1"
    buffer.drop_in_of(recorder().Buffer)(group)


def test_ranks_with_different_modes_are_named():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(4, differing_modes)
    for kind, message in failure.value.errors:
        assert kind == "RankError"
        assert "ranks differ in LPLB_EP: 1 on ranks [0, 1, 3]; 0 on ranks [2]" in message


DIFFERENT = {
    "LPLB_EP": ("1", "home", "LPLB_EP: 1 on ranks [0]; home on ranks [1]"),
    "LPLB_EP_INDICES": ("logical", "physical", "indices: logical on ranks [0]; physical on"),
    "LPLB_EP_REPLICAS": ("tracked", "valid", "replicas: tracked on ranks [0]; valid on"),
    "LPLB_EP_COUNTS": ("auto", "torch", "counts: auto on ranks [0]; torch on"),
    "LPLB_EP_SOLVER": ("auto", "cpu", "LPLB_EP_SOLVER: auto on ranks [0]; cpu on"),
    "LPLB_EP_GUEST_TOLERANCE": ("0.01", "0.02", "LPLB_EP_GUEST_TOLERANCE: 0.01 on ranks [0]; 0.02"),
    "LPLB_EP_GUEST_MIN_TOKENS": ("8", "9", "LPLB_EP_GUEST_MIN_TOKENS: 8 on ranks [0]; 9 on"),
    "LPLB_EP_OBJECTIVE": (
        "cost",
        "auto",
        "LPLB_EP_OBJECTIVE: cost on ranks [0]; auto on ranks [1]",
    ),
    "LPLB_EP_MIN_GAIN": ("8", "9", "LPLB_EP_MIN_GAIN: 8 on ranks [0]; 9 on ranks [1]"),
    "LPLB_EP_EVERY": ("8", "9", "LPLB_EP_EVERY: 8 on ranks [0]; 9 on ranks [1]"),
}


def differing_setting(group, variable, values):
    import os

    os.environ[variable] = values[group.rank()]
    buffer.drop_in_of(recorder().Buffer)(group)


@pytest.mark.parametrize("variable", DIFFERENT)
def test_settings_are_compared(variable):
    *values, message = DIFFERENT[variable]
    environ = {"LPLB_EP_REPLICAS": "valid"} if variable == "LPLB_EP_EVERY" else {}
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, differing_setting, variable, values, environ=environ)
    for kind, text in failure.value.errors:
        assert kind == "RankError"
        assert message in text


def misspelt_setting(group, variable, value):
    import os

    if group.rank() == 1:
        os.environ[variable] = value
    lplb_ep.Buffer(group)


@pytest.mark.parametrize("variable", ["LPLB_EP", "LPLB_EP_BACKEND", "LPLB_EP_CHECKS"])
def test_an_impossible_setting_on_one_rank_is_named_on_all(variable):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, misspelt_setting, variable, "bogus")
    (peer, theirs), (own, its) = failure.value.errors
    assert (peer, own) == ("RankError", "ValueError")
    assert "ranks [1] refused" in theirs
    assert variable in theirs
    assert variable in its


def other_cost(group, paths):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_COST=paths[group.rank()])
    lplb_ep.Buffer(group)


def test_cost_models_are_compared_by_their_numbers(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b", "c")]
    for path, slope, about in zip(paths, (3, 3, 4), ("one GPU", "another", ""), strict=True):
        lplb_ep.CostModel("of a test", 64, (5, 9), slope, about=about).save(path)
    ranks.run(2, other_cost, paths[:2])
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, other_cost, paths[1:])
    assert all("ranks differ in LPLB_EP_COST" in text for _, text in failure.value.errors)


def test_a_cost_model_that_one_rank_lacks_is_named_on_all(tmp_path):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, other_cost, ["", str(tmp_path / "absent.json")])
    (peer, theirs), (own, its) = failure.value.errors
    assert (peer, own) == ("RankError", "ValueError")
    for text in (theirs, its):
        assert "LPLB_EP_COST: " in text
        assert "absent.json" in text


def solver_missing_on_one_rank(group):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_SOLVER="auto" if group.rank() == 0 else "flow")
    buffer.drop_in_of(recorder().Buffer)(group)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the solver is there")
def test_a_solver_that_one_rank_lacks_is_named_on_all():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, solver_missing_on_one_rank)
    (peer, theirs), (own, its) = failure.value.errors
    assert (peer, own) == ("RankError", "MissingPackageError")
    assert "rank 1: there is no CUDA device" in theirs
    assert its == "there is no CUDA device"


def other_buffer_on_one_rank(group):
    module = recorder()
    cls = module.Buffer
    if group.rank() == 1:
        cls.__module__ = "elsewhere"
    buffer.drop_in_of(cls)(group)


def test_ranks_with_buffers_of_different_libraries_are_named():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, other_buffer_on_one_rank)
    for kind, text in failure.value.errors:
        assert kind == "RankError"
        assert "ranks differ in buffer: " in text
        assert "elsewhere.Buffer on ranks [1]" in text


def differing_placements(group, where):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_REPLICAS="valid")
    first, second = Placement([0, 1, 2, 0], 2), Placement([0, 1, 2, 3, 0, 1], 2)
    drop_in = buffer.drop_in_of(recorder().Buffer)(group)
    drop_in.view(first)
    drop_in.view(second)
    mine = first if group.rank() == 0 else second
    if where == "view":
        drop_in.view(mine)
    else:
        with lplb_ep.use(mine):
            drop_in.get_dispatch_layout(torch.tensor([[0, 2]]), mine.num_experts)


@pytest.mark.parametrize(
    ("where", "message"),
    [("view", "ranks differ in placement"), ("batch", "plan another batch than this rank")],
)
def test_ranks_that_bring_different_known_placements_are_named(where, message):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, differing_placements, where)
    for kind, text in failure.value.errors:
        assert kind == "RankError"
        assert message in text


def refused_by_one(group):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_REPLICAS="valid", LPLB_EP_INDICES="physical")
    drop_in = buffer.drop_in_of(recorder().Buffer)(group)
    view = drop_in.view(Placement([0, 1, -1, 0], 2))
    view.get_dispatch_layout(torch.tensor([[0, 2 if group.rank() else 1]]), 4)


def test_slots_that_one_rank_may_not_name_raise_on_all():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, refused_by_one)
    (peer, its), (own, mine) = failure.value.errors
    assert (peer, own) == ("RankError", "ValueError")
    assert "ranks [1] refused" in its
    assert "slot 2, which holds no expert" in mine


def wrong_on_one_rank(group, what):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_REPLICAS="valid")
    odd = group.rank() == 1
    placement = Placement([0, 1, 2, 0], 2)
    cls = buffer.drop_in_of(recorder().Buffer)
    if what == "placement on one rank only":
        cls(group, **({"placement": placement, "num_local_slots": 2} if odd else {}))
    elif what == "slots":
        cls(group, placement=placement, num_local_slots=3 if odd else 2)
    elif what == "setting":
        os.environ["LPLB_EP_CHECK"] = "maybe" if odd else "1"
        cls(group)
    elif what == "attach":
        layer = Layer(cls(group), 2)
        lplb_ep.attach(layer, placement, num_local_slots=3 if odd else 2, buffer=layer.drop_in)
    else:
        drop_in = cls(group)
        slots = [drop_in.view(placement, slot) for slot in range(2)]
        slots[odd].get_dispatch_layout(torch.tensor([[0, 2]]), 3)


@pytest.mark.parametrize(
    ("what", "peer", "own"),
    [
        ("placement on one rank only", "differ in placement: none on ranks [0]", "differ in plac"),
        ("slots", "ranks [1] refused; rank 1: num_local_slots", "num_local_slots must be"),
        ("setting", "ranks [1] refused; rank 1: LPLB_EP_CHECK", "LPLB_EP_CHECK must be one of"),
        ("attach", "ranks [1] refused; rank 1: num_local_slots", "num_local_slots must be"),
        ("micro-batches", "ranks [1] plan another batch", "ranks [0] plan another batch"),
    ],
)
def test_what_is_wrong_on_one_rank_is_named_on_all(what, peer, own):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, wrong_on_one_rank, what)
    (_, theirs), (_, its) = failure.value.errors
    assert peer in theirs
    assert own in its


def low_latency_wrong_on_one_rank(group, what):
    import os

    os.environ.update(LPLB_EP="1", LPLB_EP_REPLICAS="valid")
    channels.clear()  # other tests left theirs out of step
    drop_in = buffer.drop_in_of(recorder().Buffer)(group, num_rdma_bytes=1 << 20)
    view = drop_in.view(Placement([0, 1, 2, 0], 2))
    x, tokens = torch.zeros(1, 8), 4
    if group.rank() == 1:
        x, tokens = (None, 4) if what == "x" else (x, None)
    view.low_latency_dispatch(x, torch.tensor([[0, 2]]), tokens, 3)


@pytest.mark.parametrize(
    ("what", "own"),
    [("x", "x must be a tensor"), ("tokens", "num_max_dispatch_tokens_per_rank must be a whole")],
)
def test_a_bad_low_latency_call_on_one_rank_raises_on_all(what, own):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, low_latency_wrong_on_one_rank, what)
    (peer, theirs), (kind, its) = failure.value.errors
    assert (peer, kind) == ("RankError", "ContractError")
    assert "ranks [1] refused" in theirs
    assert own in its
