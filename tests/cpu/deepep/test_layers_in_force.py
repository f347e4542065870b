"""Which layer a call goes by: views, contexts, attached modules and the buffer's own."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from recording_buffer import (
    OTHER,
    PLACEMENT,
    TOPK,
    E,
    Layer,
    P,
    X,
    arrived,
    planned,
    recorder,
    slots_seen,
    targets,
)

import lplb_ep
from lplb_ep import ContractError, Placement, Planner
from lplb_ep.deepep import drop_in as buffer
from lplb_ep.layer import channels, layer_of
from lplb_ep.planning.plan import Status


def test_views_share_the_buffer_and_have_their_own_placement(make, mode):
    mode("1")
    drop_in = make()
    one, two = drop_in.view(PLACEMENT), drop_in.view(OTHER)
    assert isinstance(one, type(drop_in))
    assert one.log is drop_in.log
    for _ in range(2):
        one.get_dispatch_layout(TOPK, E)
        assert torch.equal(slots_seen(drop_in), planned())
        layout = two.get_dispatch_layout(TOPK, E)
        assert torch.equal(slots_seen(drop_in), planned(OTHER))
    with lplb_ep.use(PLACEMENT):  # the view knows better
        two.get_dispatch_layout(TOPK, E)
    assert torch.equal(slots_seen(drop_in), planned(OTHER))
    again = two.view(PLACEMENT)
    again.get_dispatch_layout(TOPK, E)
    assert torch.equal(slots_seen(drop_in), planned())
    # A layout made through one view is known to all.
    drop_in.dispatch(X, topk_idx=TOPK, is_token_in_rank=layout[3])
    assert torch.equal(arrived(drop_in, "dispatch")["topk_idx"], planned(OTHER))
    one.destroy()
    assert drop_in.runtime is None
    assert two.runtime is None


def test_micro_batch_slots_have_channels_of_their_own(make, mode):
    mode("1")
    drop_in = make()
    drop_in.view(PLACEMENT)
    drop_in.view(PLACEMENT)
    assert len(targets()) == 1
    drop_in.view(PLACEMENT, slot=1)
    assert len(targets()) == 2
    make().view(PLACEMENT)  # a buffer that replaces another finds the channels there
    assert len(targets()) == 2


def test_channels_end_with_their_group(tmp_path, mode):
    """A group that outlives destroy_process_group can abort the interpreter at its end."""
    mode("1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    drop_in = buffer.drop_in_of(recorder().Buffer)(group(), placement=PLACEMENT, num_local_slots=P)
    drop_in.get_dispatch_layout(TOPK, E)
    del drop_in
    dist.destroy_process_group()
    gc.collect()
    assert group() is None
    assert len(channels) == 0


def test_of_two_equal_placements_only_the_stale_layer_plans_stale(make, mode, monkeypatch):
    mode("1")
    monkeypatch.setenv("LPLB_EP_REPLICAS", "tracked")
    first, second = lplb_ep.Layer(PLACEMENT), lplb_ep.Layer(PLACEMENT)
    copy = pickle.loads(pickle.dumps(PLACEMENT))
    assert copy == PLACEMENT
    assert layer_of(copy) is not layer_of(PLACEMENT)
    drop_in = make()
    first.mark_valid()
    for target in (first, second, copy):
        drop_in.view(target).get_dispatch_layout(TOPK, E)
    with lplb_ep.use(second, slot=1):
        drop_in.get_dispatch_layout(TOPK, E)
    fared = {target: next(iter(planner.num_batches)) for target, planner in targets().items()}
    stale = dict.fromkeys([(second, 0), (layer_of(copy), 0), (second, 1)], Status.STALE)
    assert fared == {(first, 0): Status.OPTIMAL, **stale}


def test_a_placement_from_the_environment_is_one_layer_for_all_buffers(
    make, mode, monkeypatch, tmp_path
):
    mode("1")
    PLACEMENT.save(tmp_path / "p.json")
    monkeypatch.setenv("LPLB_EP_PLACEMENT", str(tmp_path / "p.json"))
    monkeypatch.setenv("LPLB_EP_REPLICAS", "tracked")
    buffers = [make() for _ in range(3)]
    ((layer, _),) = targets()
    layer.mark_valid()
    for drop_in in buffers:
        drop_in.get_dispatch_layout(TOPK, E)
    assert targets()[layer, 0].num_batches == {Status.OPTIMAL: 3}


def test_use_is_in_force_inside_only(make, mode):
    mode("1")
    drop_in = make()
    with lplb_ep.use(PLACEMENT):
        drop_in.get_dispatch_layout(TOPK, E)
        assert torch.equal(slots_seen(drop_in), planned())
        with lplb_ep.use(OTHER):
            drop_in.get_dispatch_layout(TOPK, E)
            assert torch.equal(slots_seen(drop_in), planned(OTHER))
        drop_in.get_dispatch_layout(TOPK, E)
        assert torch.equal(slots_seen(drop_in), planned())
    with pytest.raises(ContractError, match="no placement is in force"):
        drop_in.get_dispatch_layout(TOPK, E)


def test_use_goes_before_the_buffers_own_placement(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    with lplb_ep.use(OTHER):
        drop_in.get_dispatch_layout(TOPK, E)
    assert torch.equal(slots_seen(drop_in), planned(OTHER))


@pytest.mark.parametrize("how", ["attach", "use", "view"])
def test_a_default_does_not_stand_in_for_other_layers(make, mode, how):
    """A recompute inside of a layer runs outside of its hooks: it must not get the default."""
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    layer = Layer(drop_in)
    with lplb_ep.use(PLACEMENT, slot=1):  # its own, in another micro-batch
        layer(TOPK)
    drop_in.get_dispatch_layout(TOPK, E)
    if how == "attach":
        lplb_ep.attach(layer, OTHER, num_local_slots=4, experts=False, buffer=drop_in)
        layer(TOPK)
    elif how == "use":
        with lplb_ep.use(OTHER):
            layer(TOPK)
    else:
        drop_in.view(OTHER).get_dispatch_layout(TOPK, E)
    assert torch.equal(slots_seen(drop_in), planned(OTHER))
    with pytest.raises(ContractError, match="no placement is in force"):
        drop_in.get_dispatch_layout(TOPK, E)


def test_a_default_does_not_stand_in_for_an_equal_placement_of_another_layer(make, mode):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    with lplb_ep.use(Placement(PLACEMENT.physical_to_logical, 1)):
        drop_in.get_dispatch_layout(TOPK, E)
    with pytest.raises(ContractError, match="no placement is in force"):
        drop_in.get_dispatch_layout(TOPK, E)


def test_a_buffer_that_replaces_another_knows_that_placements_exist(make, mode):
    mode("1")
    make().view(PLACEMENT)
    larger = make()
    with pytest.raises(ContractError, match="no placement is in force"):
        larger.get_dispatch_layout(TOPK, E)


def test_stale_replicas_send_tokens_home_until_valid(make, mode, caplog):
    mode("1", LPLB_EP_REPLICAS="tracked")
    placement = Placement([0, 1, 2, 3, 0, 2], 1)
    # On one rank a second copy never has a quota, so look at the status that planners count.
    drop_in = make(placement=placement, num_local_slots=P)
    planner = next(iter(targets().values()))
    drop_in.get_dispatch_layout(TOPK, E)
    assert {s.name: n for s, n in planner.num_batches.items()} == {"STALE": 1}
    assert "STALE, some rank's replicas are not known" in caplog.text
    lplb_ep.mark_valid(placement)
    drop_in.get_dispatch_layout(TOPK, E)
    assert {s.name: n for s, n in planner.num_batches.items()} == {"STALE": 1, "OPTIMAL": 1}


def test_what_is_no_placement_is_named(make, mode):
    mode("1")
    table = [0, 1, 2, 3, 0, 2]
    drop_in = make()
    for wrong in (
        lambda: make(placement=table, num_local_slots=P),
        lambda: drop_in.view(table),
        lambda: lplb_ep.attach(torch.nn.Linear(1, 1), table, num_local_slots=P),
        lambda: lplb_ep.use(table).__enter__(),
        lambda: Planner(table, rank=0),
        lambda: lplb_ep.solve(torch.ones(4).int(), table),
    ):
        with pytest.raises(TypeError, match=r"placement must be an lplb_ep.Placement; got a list"):
            wrong()
    with pytest.raises(ContractError, match="num_local_slots goes with placement="):
        make(num_local_slots=P)
    with pytest.raises(ValueError, match=r"LPLB_EP_INDICES must be one of .*; got .bogus."):
        make(indices="bogus")


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_of_a_layer_are_layers_of_their_own(again):
    layer = lplb_ep.Layer(PLACEMENT, lplb_ep.Problem(base_load=torch.tensor([1])))
    layer.observers.append(print)
    layer.mark_valid()
    other = again(layer)
    assert other.placement == PLACEMENT
    assert other.problem.fingerprint() == layer.problem.fingerprint()
    assert (other.is_valid, other.observers) == (False, [])
    other.mark_valid()
    layer.mark_stale()
    assert other.is_valid
