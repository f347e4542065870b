"""Modules that put their layer in force while they run."""

import threading

import pytest
import torch
from recording_buffer import OTHER, PLACEMENT, TOPK, E, Layer, P, planned, slots_seen, targets

import lplb_ep
from lplb_ep import ContractError, Placement, Planner
from lplb_ep.deepep import context as layers
from lplb_ep.layer import layer_of


def test_attached_layers_run_with_their_placement(make, mode):
    mode("1")
    drop_in = make()
    attached = [Layer(drop_in), Layer(drop_in, 4)]
    handles = [
        lplb_ep.attach(layer, placement, num_local_slots=len(layer.experts), buffer=drop_in)
        for layer, placement in zip(attached, (PLACEMENT, OTHER), strict=True)
    ]
    assert len(targets()) == 2
    for layer, placement in zip(attached, (PLACEMENT, OTHER), strict=True):
        layer(TOPK)
        assert torch.equal(slots_seen(drop_in), planned(placement))
    # A forward that raises leaves nothing in force behind it.
    with pytest.raises(ValueError, match="topk_idx"):
        attached[0](torch.tensor([[9]]))
    with pytest.raises(ContractError, match="no placement is in force"):
        drop_in.get_dispatch_layout(TOPK, E)
    handles[0].remove()
    with pytest.raises(ContractError, match="no placement is in force"):
        attached[0](TOPK)


def test_attach_checks_the_model(make, mode):
    mode("1")
    layer = Layer(make())
    with pytest.raises(ContractError, match=r"num_local_slots must be .* 6; got 4"):
        lplb_ep.attach(layer, PLACEMENT, num_local_slots=4)
    with pytest.raises(ValueError, match="6"):
        lplb_ep.attach(Layer(None, 5), PLACEMENT, num_local_slots=P)
    stacked = torch.nn.Module()
    stacked.w1 = torch.nn.Parameter(torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match="w1"):
        lplb_ep.attach(layer, PLACEMENT, num_local_slots=P, experts=stacked)
    with pytest.raises(ContractError, match=r"num_local_slots must be .* 6; got None"):
        layer.drop_in.__class__(layer.drop_in.group, placement=PLACEMENT)


def test_an_attached_layer_keeps_the_micro_batch_around_it(make, mode):
    mode("1")
    drop_in = make()
    layer = Layer(drop_in)
    lplb_ep.attach(layer, PLACEMENT, num_local_slots=P, buffer=drop_in)
    with lplb_ep.use(PLACEMENT, slot=1):
        layer(TOPK)
    assert {slot for _, slot in targets()} == {0, 1}


def test_of_two_attachments_the_last_one_holds_and_nothing_stays(make, mode):
    mode("1")
    layer = Layer(make())
    first = lplb_ep.attach(layer, PLACEMENT, num_local_slots=P)
    second = lplb_ep.attach(layer, OTHER, num_local_slots=4, experts=False)
    layer(TOPK)
    assert torch.equal(slots_seen(layer.drop_in), planned(OTHER))
    assert layers.used() is None
    second.remove()
    layer(TOPK)
    assert torch.equal(slots_seen(layer.drop_in), planned())
    first.remove()
    assert layers.used() is None


def test_a_hook_that_fails_before_ours_takes_nothing_from_the_placement_around_it(make, mode):
    mode("1")
    layer = Layer(make())

    def fail(*_):
        raise RuntimeError("not today")

    layer.register_forward_pre_hook(fail)
    lplb_ep.attach(layer, PLACEMENT, num_local_slots=P)
    with lplb_ep.use(OTHER):
        with pytest.raises(RuntimeError, match="not today"):
            layer(TOPK)
        assert layers.used() == (layer_of(OTHER), 0)


def test_threads_in_one_attached_module_do_not_mix(make, mode):
    mode("1")
    inside, seen = threading.Barrier(2), []

    class Slow(torch.nn.Module):
        def forward(self, slot):
            inside.wait(10)
            seen.append((slot, layers.used()))
            inside.wait(10)

    module = Slow()
    lplb_ep.attach(module, PLACEMENT, num_local_slots=P)

    def run(slot):
        with lplb_ep.use(PLACEMENT, slot=slot):
            module(slot)
        seen.append((slot, layers.used()))

    workers = [threading.Thread(target=run, args=(slot,)) for slot in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(seen[:2]) == [(s, (layer_of(PLACEMENT), s)) for s in (1, 2)]
    assert sorted(seen[2:]) == [(1, None), (2, None)]


def test_weights_laid_out_otherwise_need_no_check(make, mode):
    mode("1")
    layer = Layer(make(), num_slots=3)  # Megatron-Core's experts are one module with all weights
    with pytest.raises(ValueError, match="experts must be 6 modules"):
        lplb_ep.attach(layer, PLACEMENT, num_local_slots=P)
    lplb_ep.attach(layer, PLACEMENT, num_local_slots=P, experts=False)
    layer(TOPK)
    assert torch.equal(slots_seen(layer.drop_in), planned())


def test_only_use_says_which_micro_batch_an_attached_layer_is_in(make, mode):
    mode("1")
    seen = []

    class Watch(torch.nn.Module):
        def __init__(self, inner=None):
            super().__init__()
            self.inner = inner

        def forward(self):
            seen.append(layers.used())
            if self.inner is not None:
                self.inner()

    inner = Watch()
    outer = Watch(inner)
    lplb_ep.attach(outer, PLACEMENT, num_local_slots=P)
    lplb_ep.attach(inner, PLACEMENT, num_local_slots=P, slot=1)
    outer()
    with lplb_ep.use(PLACEMENT, slot=2):
        outer()
    assert [slot for _, slot in seen] == [0, 1, 2, 2]
    # Equal placements of two layers are two: their replicas are valid or not each for themselves.
    equal = Placement(PLACEMENT.physical_to_logical, 1)
    with lplb_ep.use(equal, slot=3):
        inner()
    assert seen[-1][0] is layer_of(PLACEMENT)
    assert seen[-1][1] == 1


def test_experts_that_are_no_module_are_named(make, mode):
    mode("1")
    layer = Layer(make())
    for experts, error, message in (
        (torch.nn.ModuleList(), ValueError, "experts must be 6 modules"),
        (6, TypeError, "experts must be a module; got a int"),
    ):
        with pytest.raises(error, match=message):
            lplb_ep.attach(layer, PLACEMENT, num_local_slots=P, experts=experts)
    for slot in (-1, 2**40, "x"):
        with pytest.raises(ValueError, match=r"slot must be a whole number in \[0, 2\*\*31\); got"):
            Planner(PLACEMENT, rank=0, counts="given", slot=slot)
