"""Wrong input is found before ranks exchange counts, and named on all of them."""

import pytest
import ranks
import torch
from recording_buffer import PLACEMENT, TOPK, E, P, recorder, targets

import lplb_ep
from lplb_ep import ContractError, Placement, Planner
from lplb_ep.deepep import drop_in
from lplb_ep.deepep.channels import BufferState
from lplb_ep.layer import channels

# Three copies of expert 0, on ranks 0 to 2.
FOUR = Placement([0, 1, 2, 0, 3, 0, 4, 5], 4)
ENVIRON = {"LPLB_EP": "1", "LPLB_EP_REPLICAS": "valid"}


# --- a token that picks an expert twice -----------------------------------------------------------


def twice(group, picks, indices):
    channels.clear()
    buffer = lplb_ep.ElasticBuffer(
        group, num_bytes=1 << 21, num_max_tokens_per_rank=4, indices=indices
    )
    topk_idx = torch.tensor(picks[group.rank()])
    num_experts = 6 if indices == "logical" else 8
    buffer.view(FOUR).dispatch(torch.zeros(len(topk_idx), 8), topk_idx, num_experts=num_experts)


@pytest.mark.parametrize("mode", ["1", "home"])
@pytest.mark.parametrize(("indices", "picks"), [("logical", [0, 0]), ("physical", [0, 3])])
def test_a_token_that_picks_an_expert_twice_is_refused_on_every_rank(mode, indices, picks):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(4, twice, [[picks]] * 4, indices, environ={**ENVIRON, "LPLB_EP": mode})
    assert failure.value.errors == [("ValueError", "topk_idx[0] picks expert 0 twice")] * 4


def test_the_other_ranks_name_the_one_whose_token_picks_an_expert_twice():
    picks = [[[0, 1]], [[2, -1], [-1, -1], [-1, -1], [4, 4]], [[1, 0]], [[5, 2]]]
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(4, twice, picks, "logical", environ=ENVIRON)
    own = failure.value.errors.pop(1)
    assert own == ("ValueError", "topk_idx[3] picks expert 4 twice")
    for kind, message in failure.value.errors:
        assert kind == "RankError"
        assert "ranks [1] refused their topk_idx" in message


def twice_in_the_legacy_class(group):
    """DeepEP's `Buffer` takes them: a token's weights for the expert add up."""
    channels.clear()
    buffer = lplb_ep.Buffer(group, 1 << 20).view(FOUR)
    x, topk_idx = torch.ones(1, 8), torch.tensor([[0, 0]])
    weights = torch.tensor([[0.25, 0.5]])
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 6)
    received, slots, received_weights, _, handle, _ = buffer.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
    )
    factors = torch.where(slots >= 0, received_weights, 0).sum(1, keepdim=True)
    return buffer.combine(received * factors, handle)[0]


def test_the_legacy_class_takes_an_expert_twice():
    for combined in ranks.run(4, twice_in_the_legacy_class, environ=ENVIRON):
        assert torch.equal(combined, torch.full((1, 8), 0.75))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [("home", "1"), ("1", "home", "1")])
def test_buffers_of_other_settings_have_other_planners(make, mode, modes):
    buffers = []
    for value in modes:
        mode(value)
        buffers.append(make(placement=PLACEMENT, num_local_slots=P))
    for buffer in buffers * 2:
        buffer.get_dispatch_layout(TOPK, E)
    found = [next(iter(buffer._lplb_state.planners.values())) for buffer in buffers]
    assert [planner.counts for planner in found] == [
        "given" if value == "home" else "local" for value in modes
    ]
    assert len(set(found)) == 2  # buffers of the same settings share one


def test_a_planner_that_checks_is_not_shared_with_buffers_that_do_not(make, mode):
    for value in ("0", "1", "0"):
        mode("1", LPLB_EP_CHECK=value)
        make(placement=PLACEMENT, num_local_slots=P)
    assert sorted(key.check for _, _, key in channels[make().group]) == [False, True]


# --- calls that fail on one rank ------------------------------------------------------------------


def wrong_call(group, what):
    channels.clear()
    buffer = drop_in.drop_in_of(recorder().ElasticBuffer)(group)
    view = buffer.view(Placement([0, 1, 2, 0], 2))
    good = {"x": torch.zeros(1, 8), "topk_idx": torch.tensor([[0, 2]]), "num_experts": 3}
    bad = {
        "unknown argument": {**good, "topk_indices": None},
        "x of other rows": {**good, "x": torch.zeros(2, 8)},
        "no rows": {**good, "x": None},
        "too many tokens": {**good, "num_max_tokens_per_rank": 0},
        "weights of another shape": {**good, "topk_weights": torch.zeros(1, 3)},
        "weights of integers": {**good, "topk_weights": torch.ones(1, 2, dtype=torch.int32)},
        "weights of lists": {**good, "topk_weights": [[0.5, 0.5]]},
        "no scales": {**good, "x": (good["x"],)},
        "scales of other rows": {**good, "x": (good["x"], torch.ones(2, 1))},
        "a limit in words": {**good, "num_max_tokens_per_rank": "8"},
        "number of experts": {**good, "num_experts": torch.tensor(3)},
        "event": {**good, "previous_event": 5},
        "picks": {**good, "topk_idx": torch.zeros(1, 2)},
        "no picks": {"x": good["x"], "num_experts": 3},
    }[what]
    raised = None
    try:
        view.dispatch(**(bad if group.rank() == 1 else good))
    except Exception as error:  # noqa: BLE001  (the test compares it)
        raised = type(error).__name__, str(error)
    # The ranks are in step: the next batch is planned.
    view.dispatch(**good)
    return raised, len(buffer.log)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("unknown argument", "TypeError", "unexpected keyword argument 'topk_indices'"),
        ("x of other rows", "ContractError", "x must have a row for each token of topk_idx, 1; go"),
        ("no rows", "ContractError", "x must be a tensor [tokens, hidden]; got NoneType"),
        ("too many tokens", "ContractError", "at most num_max_tokens_per_rank=0 tokens; got 1"),
        ("weights of another shape", "ContractError", "topk_weights must be as topk_idx, [1, 2]"),
        ("weights of integers", "ContractError", "of floats; got [1, 2] of torch.int32"),
        ("weights of lists", "ContractError", "of floats; got list"),
        ("no scales", "ContractError", "x must be a tensor, or rows and scales; got 1 values"),
        ("scales of other rows", "ContractError", "the scales of x must have a row for each token"),
        ("a limit in words", "ContractError", "num_max_tokens_per_rank must be a whole number; go"),
        ("number of experts", "ContractError", "num_experts must be 3 with .*; got Tensor"),
        ("event", "AttributeError", "current_stream_wait"),
        ("picks", "ValueError", "topk_idx must be [T, K] of int32 or int64"),
        ("no picks", "TypeError", "topk_idx must be a tensor [T, K]; got a NoneType"),
    ],
)
def test_a_call_that_fails_on_one_rank_is_named_on_the_others(what, kind, message):
    theirs, own = ranks.run(2, wrong_call, what, environ=ENVIRON)
    assert theirs[0] == ("RankError", "ranks [1] refused their topk_idx; see their errors")
    assert own[0][0] == kind
    assert all(part in own[0][1] for part in message.split(".*"))
    assert theirs[1] == own[1] == 1  # only the good batch came to DeepEP


class Failing:
    """Weights or guests of a layer that raise where a call asks for them."""

    expert_bytes = 0  # the layer itself asks

    def __init__(self, name):
        self.name = name

    def __getattr__(self, _):
        raise RuntimeError(f"{self.name} failed")


def failing_before_the_counts(group, what):
    channels.clear()
    odd = group.rank() == 1
    placement, num_experts = Placement([0, 1, 2, 0], 2), 3
    if what == "guests":
        placement, num_experts = Placement.homes_only(4, 2, num_guests_per_rank=1), 4
    layer, failing = lplb_ep.Layer(placement), Failing(what)
    buffer = drop_in.drop_in_of(recorder().ElasticBuffer)(group)
    call = {"x": torch.zeros(1, 8), "topk_idx": torch.tensor([[0, 2]]), "num_experts": num_experts}
    raised = None
    with pytest.MonkeyPatch.context() as patch:
        if odd and what == "weights":
            layer.watch(failing)
        elif odd and what == "guests":
            layer.take_guests(failing)
        elif odd and what == "a planner":
            patch.setattr(Planner, "_make_backend", lambda *_: failing.anything)
        elif odd and what == "limits":
            patch.setattr(BufferState, "check_limits", lambda *_: failing.anything)
        try:
            with lplb_ep.use(layer):
                buffer.dispatch(**call)
        except Exception as error:  # noqa: BLE001  (the test compares it)
            raised = type(error).__name__, str(error)
    other = Placement([0, 1, 2, 0], 2)
    buffer.view(other).dispatch(**{**call, "num_experts": 3})  # the ranks are in step
    return raised


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("weights", "ranks [1] refused their topk_idx"),
        ("guests", "ranks [1] refused their topk_idx"),
        ("a planner", "ranks [1] could not make their planner"),
        ("limits", "ranks [1] could not make their planner"),
    ],
)
def test_whatever_fails_before_the_counts_is_named_on_all(what, named):
    """At the first call of a layer within `use`, too: each rank makes the planner alone."""
    theirs, own = ranks.run(
        2, failing_before_the_counts, what, environ={"LPLB_EP": "1"}, timeout=30
    )
    assert theirs == ("RankError", f"{named}; see their errors")
    assert own == ("RuntimeError", f"{what} failed")


def test_a_number_of_experts_that_is_no_whole_number_is_named(make, mode):
    mode("1")
    buffer = make(placement=PLACEMENT, num_local_slots=P)
    for wrong, shown in ((torch.tensor(E), "Tensor"), ("4", "str"), (4.0, "float"), (None, "None")):
        with pytest.raises(ContractError, match=rf"num_experts must be 4 with .*; got {shown}$"):
            buffer.get_dispatch_layout(TOPK, wrong)
    assert buffer.log == []


# --- micro-batch slots ----------------------------------------------------------------------------


@pytest.mark.parametrize("slot", [-1, 2**31, "1", 1.0, [1], None])
def test_a_slot_that_is_none_is_named_wherever_it_is_given(make, mode, slot):
    mode("1")
    buffer, module = make(), torch.nn.Linear(1, 1)
    for give in (
        lambda: buffer.view(PLACEMENT, slot),
        lambda: lplb_ep.use(PLACEMENT, slot=slot).__enter__(),
        lambda: lplb_ep.attach(module, PLACEMENT, num_local_slots=P, slot=slot),
        lambda: lplb_ep.attach(module, PLACEMENT, num_local_slots=P, slot=slot, buffer=buffer),
    ):
        with pytest.raises(ValueError, match=r"slot must be a whole number in \[0, 2\*\*31\); got"):
            give()
    assert targets() == {}


def wrong_slot(group):
    channels.clear()
    buffer = drop_in.drop_in_of(recorder().Buffer)(group)
    buffer.view(Placement([0, 1, 2, 0], 2), [] if group.rank() == 1 else 0)


def test_a_slot_that_is_none_on_one_rank_is_named_on_all():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, wrong_slot, environ=ENVIRON)
    (peer, theirs), (own, _) = failure.value.errors
    assert (peer, own) == ("RankError", "ValueError")
    assert "ranks [1] refused; rank 1: slot must be a whole number" in theirs


def wrong_constructor(group):
    cls = drop_in.drop_in_of(recorder().Buffer)
    if group.rank() == 1:
        cls(group, num_sm=3)
    cls(group)


def test_an_argument_that_deep_ep_does_not_take_is_named_on_all():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, wrong_constructor, environ=ENVIRON)
    (peer, theirs), (own, its) = failure.value.errors
    assert (peer, own) == ("RankError", "TypeError")
    assert "num_sm" in its
    assert "ranks [1] refused; rank 1: " + its in theirs


def with_what_only_one_rank_gets_wrong(group, what):
    channels.clear()
    odd, module = group.rank() == 1, torch.nn.Linear(3, 2, bias=False)
    placement = Placement([0, 1, 2, 0], 2)
    if what == "replicas":
        lplb_ep.Replicas(module, "a table" if odd else placement, group)
    elif what == "experts":
        lplb_ep.Replicas("experts" if odd else module, placement, group)
    elif what == "counts":
        planner = lplb_ep.Planner(placement, group)
        planner(TOPK % 3, torch.zeros(2, 3, dtype=torch.int64) if odd else None)
    else:
        buffer = drop_in.drop_in_of(recorder().Buffer)(group)
        lplb_ep.attach(
            None if odd else module, placement, num_local_slots=2, buffer=buffer, experts=False
        )


@pytest.mark.parametrize(
    ("what", "kind", "message", "named"),
    [
        ("replicas", "TypeError", "must be an lplb_ep.Placement", "must be an lplb_ep.Placement"),
        ("experts", "TypeError", "experts must be a module", "experts must be a module"),
        ("counts", "ValueError", "counts= must not be passed", "refused their topk_idx"),
        ("module", "TypeError", "module must be a module", "module must be a module"),
    ],
)
def test_what_only_one_rank_gets_wrong_is_named_on_all(what, kind, message, named):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, with_what_only_one_rank_gets_wrong, what, environ=ENVIRON, timeout=30)
    (peer, theirs), (own, said) = failure.value.errors
    assert (peer, own) == ("RankError", kind)
    assert message in said
    assert "ranks [1]" in theirs
    assert named in theirs
