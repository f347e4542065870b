"""Placements of a file, each in force while the module of its name runs."""

import gc
import weakref

import pytest
import torch
from recording_buffer import OTHER, PLACEMENT, TOPK, E, planned, recorder, slots_seen
from torch.utils.checkpoint import checkpoint

from lplb_ep import ContractError, Placement, PlacementError, save_placements
from lplb_ep.deepep import context, modules
from lplb_ep.deepep import drop_in as buffer

THIRD = Placement([2, 2, 3, 1, 0, 0], 1)
PLACEMENTS = {"layers.0.mlp": PLACEMENT, "layers.1.mlp": OTHER, "layers.2.mlp": THIRD}


class MoE(torch.nn.Module):
    """An MoE layer that names no placement. It may checkpoint its body."""

    def __init__(self, drop_in, inside=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.drop_in, self.inside, self.seen = drop_in, inside, []

    def compute(self, x):
        self.drop_in.get_dispatch_layout(TOPK, E)
        self.seen.append(slots_seen(self.drop_in).clone())
        return x * self.weight

    def forward(self, x):
        if self.inside is None:
            return self.compute(x)

        def custom(x):  # as Megatron-Core's `custom_forward`
            return self.compute(x)

        return checkpoint(custom, x, use_reentrant=self.inside == "reentrant")


class Block(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(x)


class Model(torch.nn.Module):
    def __init__(self, layers, outside=False):
        super().__init__()
        self.layers, self.outside = torch.nn.ModuleList(layers), outside

    def forward(self, x, order=(0, 1, 2)):
        for number in order:
            layer = self.layers[number]
            x = checkpoint(layer, x, use_reentrant=False) if self.outside else layer(x)
        return x


@pytest.fixture(autouse=True)
def forget():
    yield
    for of_file in modules._of_files.values():
        if isinstance(of_file, modules.NamedLayers):
            of_file.remove()
    modules._of_files.clear()


@pytest.fixture
def made(group, mode, tmp_path):
    """A drop-in, and with it the placements of a file."""

    def make_drop_in(placements=PLACEMENTS, **environ):
        save_placements(tmp_path / "layers.json", placements)
        mode("1", LPLB_EP_PLACEMENT=str(tmp_path / "layers.json"), **environ)
        return buffer.drop_in_of(recorder().Buffer)(group)

    return make_drop_in


def right(model):
    """Each layer has seen its own placement's slots, and nothing is left in force."""
    for layer, placement in zip(model.layers, PLACEMENTS.values(), strict=True):
        assert layer.mlp.seen
        assert all(torch.equal(slots, planned(placement)) for slots in layer.mlp.seen)
    assert context.used() is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_module_has_its_own_whatever_ran_before(made, wrapped):
    drop_in = made()
    model = Model([Block(MoE(drop_in)) for _ in range(3)])
    root = model
    if wrapped:
        root = torch.nn.Module()  # as DDP, whose part of the name does not count
        root.module = model
        root.forward = model.forward
    for order in ((2, 0, 1), (1, 1, 0), (0, 2, 2)):
        root(torch.ones(()), order)
    right(model)


@pytest.mark.parametrize("how", ["outside", "reentrant", "plain"])
def test_a_recompute_finds_its_module(made, how):
    drop_in = made()
    inside = None if how == "outside" else how
    model = Model([Block(MoE(drop_in, inside)) for _ in range(3)], outside=how == "outside")
    out = [model(torch.ones((), requires_grad=True), order) for order in ((0, 1, 2), (2, 0, 1))]
    for one in out[::-1]:
        one.backward()
    right(model)
    assert [len(layer.mlp.seen) for layer in model.layers] == [4, 4, 4]


def test_a_recompute_finds_the_self_that_is_no_parameter(made):
    """As in a method that takes any arguments, and that a function within it needs, too."""

    class Packed(MoE):
        def compute(*args):
            self, x = args

            def slots():
                return slots_seen(self.drop_in).clone()

            self.drop_in.get_dispatch_layout(TOPK, E)
            self.seen.append(slots())
            return x * self.weight

        def forward(self, x):
            return checkpoint(Packed.compute, self, x, use_reentrant=False)

    model = Model([Block(Packed(made())) for _ in range(3)])
    model(torch.ones((), requires_grad=True)).backward()
    right(model)
    assert [len(layer.mlp.seen) for layer in model.layers] == [2, 2, 2]


def test_a_recompute_leaves_nothing_to_the_garbage_collector(made):
    """What its functions held would stay in memory until a collection."""
    held = []

    class Holds(MoE):
        def compute(self, x):
            activation = x + 1
            held.append(weakref.ref(activation))
            return super().compute(activation)

    model = Model([Block(Holds(made(), "plain")) for _ in range(3)])
    gc.collect()
    gc.disable()
    try:
        model(torch.ones((), requires_grad=True)).backward()
        assert [activation() for activation in held] == [None] * 6
    finally:
        gc.enable()
    right(model)


def test_a_backward_pass_is_no_part_of_the_module_that_began_it(made):
    """The recompute's code has no module, and below it in the stack another layer's has."""
    drop_in = made()
    model = Model([Block(MoE(drop_in)) for _ in range(3)])
    model(torch.ones(()))

    def no_module(x):
        drop_in.get_dispatch_layout(TOPK, E)
        return x * x

    out = checkpoint_without_layer(model.layers[1].mlp, no_module)

    class Begins(MoE):
        def forward(self, x):
            out.backward()

    model.layers[0].mlp.__class__ = Begins
    with pytest.raises(ContractError, match=r"no placement is in force .*layers.json"):
        Begins.forward(model.layers[0].mlp, None)


def checkpoint_without_layer(module, function):
    """As if a layer had checkpointed a function that does not know the layer."""
    module.register_forward_hook(
        lambda *_: checkpoint(function, torch.ones((), requires_grad=True), use_reentrant=False)
    )
    return module(torch.ones(()))


def test_the_module_is_found_where_the_buffer_is_made_while_it_runs(made):
    """As in a framework that imports DeepEP, or makes its buffer, in the first forward."""

    class Late(MoE):
        def compute(self, x):
            if self.drop_in is None:
                self.drop_in = made()
            return super().compute(x)

    model = Model([Block(Late(None)) for _ in range(3)])
    model(torch.ones(()), (1,))
    drop_in = model.layers[1].mlp.drop_in
    for layer in model.layers:
        layer.mlp.drop_in = drop_in
    model(torch.ones(()))
    right(model)


def test_a_module_that_has_no_placement_is_named(made):
    drop_in = made()
    model = Model([Block(MoE(drop_in)) for _ in range(4)])
    with pytest.raises(ContractError, match=r"layers.json.* innermost first: MoE, Block, Model"):
        model(torch.ones(()), (3,))
    model(torch.ones(()))
    model.layers = model.layers[:3]
    right(model)


def test_a_pattern_serves_layers_with_weights_of_their_own(made):
    drop_in = made({"layers.*.mlp": PLACEMENT})
    model = Model([Block(MoE(drop_in)) for _ in range(3)])
    model(torch.ones(()))
    assert all(torch.equal(layer.mlp.seen[0], planned()) for layer in model.layers)
    assert len({id(planner.layer) for planner in drop_in._lplb_state.planners.values()}) == 3


def test_names_that_are_not_plain_are_refused(made):
    drop_in = made({"mlp": PLACEMENT})
    model = Model([Block(MoE(drop_in)) for _ in range(2)])
    with pytest.raises(ContractError, match=r"'mlp' .* layers.0.mlp, layers.1.mlp"):
        model(torch.ones(()))


def test_two_placements_of_a_module_are_refused(made):
    drop_in = made({"layers.0.mlp": PLACEMENT, "layers.*.mlp": OTHER})
    model = Model([Block(MoE(drop_in)) for _ in range(2)])
    with pytest.raises(ContractError, match=r"several placements .* layers.\*.mlp, layers.0.mlp"):
        model(torch.ones(()))


def test_slots_that_a_list_of_experts_lacks_are_noticed(made):
    drop_in = made()
    model = Model([Block(MoE(drop_in)) for _ in range(3)])
    model.layers[1].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(6))
    with pytest.raises(ValueError, match="experts must be 4 modules"):
        model(torch.ones(()))


def test_placements_by_number_are_refused(made):
    with pytest.raises(PlacementError, match="by layer number"):
        made({0: PLACEMENT, 1: OTHER})


def test_off_a_file_of_modules_is_refused(made, mode):
    with pytest.raises(ContractError, match="LPLB_EP is 0"):
        made(LPLB_EP="0")
