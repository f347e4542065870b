"""torchtitan, unmodified, over embedded buffers: what the client makes of its models."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import ranks
import titan
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lplb_ep import ContractError, Guests

pytest.importorskip("torchtitan")

G = 2
# Each rank imports torchtitan in its first call, which takes long where everything is busy.
run = functools.partial(ranks.run, timeout=600.0)


REPLICAS = dict(replicas=2, load=[[9.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]] * titan.LAYERS)


def made(client, mode, ep, copies=None, **options):
    """A model, balanced by the converter unless it is plain."""
    if mode == "plain":
        return titan.make_model(ep, **options)
    converter = client.BalanceConverter.Config(**(copies or {"guests": G})).build()
    return titan.make_model(ep, converter.convert, **options)


def received(model):
    """Rows of the experts in each of a rank's batches, forward passes alone."""
    found = []

    def note(module, args):
        if torch._C._current_graph_task_id() < 0:
            found.append(len(args[0]))

    for layer in model.layers.values():
        # Guests' rows come by a second call.
        layer.moe.routed_experts.inner_experts.register_forward_pre_hook(note)
    return found


def train(world, mode, ep, **options):
    """Two steps of two batches: losses, the first step's gradients, weights at the end."""
    pushes = mock.patch.object(Guests, "push", autospec=True, side_effect=Guests.push)
    with titan.torchtitan(mode) as client, pushes as push:
        model = made(client, mode, ep, **options)
        rows = received(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses, grads = [], None
        for step in range(2):
            for micro in range(2):  # gradients are accumulated
                loss = titan.loss_of(model, titan.batch_of(world.rank(), 2 * step + micro))
                loss.backward()
                losses.append(float(loss))
            if grads is None:
                grads = {name: grad.clone() for name, grad in titan.gradients(model).items()}
            optimizer.step()
            optimizer.zero_grad()
        balance = client.balance_of(model)
        batches = [layer.report().by_status for layer in balance.layers]
        guests = [layer.report().guests for layer in balance.layers]
        names = [f"layers.{n}.moe.routed_experts" for n in range(titan.LAYERS)]
        assert [layer.name for layer in balance.layers] == (names if balance.layers else [])
        if mode == "1" and "copies" in options:
            assert push.call_count == 2 * titan.LAYERS  # once a step
        return losses, grads, titan.weights(model), sum(rows), batches, guests


def largest_difference(got, want):
    """Relative to the largest value of a tensor."""
    assert got.keys() == want.keys()
    return max(
        float((got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1e-9)) for n in want
    )


@pytest.mark.parametrize(
    ("num_ranks", "ep", "options"),
    [
        (2, 2, {}),
        pytest.param(4, 4, {"param_dtype": "bfloat16"}, marks=pytest.mark.long),
        # Each expert's rows are on two ranks.
        (4, 2, {"reshard": "always"}),
        (2, 2, {"copies": REPLICAS}),
        pytest.param(4, 4, {"copies": REPLICAS, "param_dtype": "bfloat16"}, marks=pytest.mark.long),
        pytest.param(4, 2, {"copies": REPLICAS, "reshard": "always"}, marks=pytest.mark.long),
    ],
)
def test_a_balanced_model_trains_as_a_plain_one(num_ranks, ep, options):
    plain, home, balanced = (
        run(num_ranks, train, mode, ep, **options) for mode in ("plain", "home", "1")
    )
    has_guests = "copies" not in options
    for (losses, grads, weights, *_), at_home in zip(plain, home, strict=True):
        assert at_home[0] == losses
        assert largest_difference(at_home[1], grads) == 0
        assert largest_difference(at_home[2], weights) == 0
    for (losses, grads, weights, *_), of_rank in zip(plain, balanced, strict=True):
        # torchtitan's experts compute in bfloat16, and parts of a gradient are rounded to it.
        assert of_rank[0] == pytest.approx(losses, rel=1e-3)
        assert largest_difference(of_rank[1], grads) < 2**-5
        assert largest_difference(of_rank[2], weights) < 2**-5
        assert of_rank[4] == [{"OPTIMAL": 4}] * titan.LAYERS
        assert min(of_rank[5]) >= has_guests
    most, mean = max(r[3] for r in plain), sum(r[3] for r in plain) / num_ranks
    assert most > 1.2 * mean
    assert max(r[3] for r in balanced) < mean + 4 * titan.LAYERS + 1


@pytest.mark.long
@pytest.mark.parametrize("copies", [{}, {"copies": REPLICAS}])
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_activation_checkpoints_change_no_bit(checkpointing, copies):
    want = run(2, train, "1", 2, **copies)
    got = run(2, train, "1", 2, checkpointing=checkpointing, **copies)
    for one, other in zip(want, got, strict=True):
        unwrapped = [
            {name.replace("._checkpoint_wrapped_module", ""): t for name, t in tensors.items()}
            for tensors in other[1:3]
        ]
        assert other[0] == one[0]
        assert largest_difference(unwrapped[0], one[1]) == 0
        assert largest_difference(unwrapped[1], one[2]) == 0


def save_and_load(world, steps, folder, copies):
    """Each step: a mode, whether it trains, and from and to which of the checkpoints it goes."""
    found = []
    for mode, trains, source, target in steps:
        with titan.torchtitan(mode) as client:
            model = made(client, mode, world.size(), copies)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            if source:
                state = {
                    "model": model.state_dict(),
                    "optimizer": get_optimizer_state_dict(model, optimizer),
                }
                dcp.load(state, checkpoint_id=f"{folder}/{source}")
                model.load_state_dict(state["model"])
                set_optimizer_state_dict(model, optimizer, state["optimizer"])
            if trains:
                titan.loss_of(model, titan.batch_of(world.rank(), 0)).backward()
                optimizer.step()
                optimizer.zero_grad()
            state = {
                "model": model.state_dict(),
                "optimizer": get_optimizer_state_dict(model, optimizer),
            }
            dcp.save(state, checkpoint_id=f"{folder}/{target}")
            moments = {
                f"{name} {key}": titan.whole(value).clone()
                for name, of_name in state["optimizer"]["state"].items()
                for key, value in of_name.items()
            }
            found.append({**titan.weights(model), **moments})
    return found


@pytest.mark.parametrize("copies", [None, pytest.param(REPLICAS, marks=pytest.mark.long)])
def test_checkpoints_go_from_plain_to_balanced_and_back(tmp_path, copies):
    """Bit for bit, with the optimizer's moments, and on other numbers of ranks."""
    at = str(tmp_path), copies
    steps = [("plain", True, None, "a"), ("1", False, "a", "b"), ("plain", False, "b", "c")]
    found = run(2, save_and_load, steps, *at)
    found += run(4, save_and_load, [("1", False, "c", "d"), ("1", True, "d", "e")], *at)
    found += run(2, save_and_load, [("plain", False, "e", "f")], *at)
    first, moved, trained = found[0], [*found[0][1:], *found[1][1:], found[2][0]], found[-1][0]
    assert any("exp_avg" in name for name in first[0])
    for other in moved:
        assert other.keys() == first[0].keys()
        assert all(torch.equal(other[name], first[0][name]) for name in other)
    assert all(torch.equal(trained[name], found[2][1][name]) for name in trained)
    assert not all(torch.equal(trained[name], first[0][name]) for name in trained)


def evaluate(world, copies):
    """Batches without gradients between forward and backward passes of others."""
    with titan.torchtitan("1") as client:
        model = made(client, "1", world.size(), copies, checkpointing="selective")
        tokens = [titan.batch_of(world.rank(), number) for number in range(2)]
        with torch.no_grad():
            want = [float(titan.loss_of(model.eval(), t)) for t in tokens]
        loss = titan.loss_of(model.train(), tokens[0])
        with torch.no_grad():
            between = float(titan.loss_of(model, tokens[1]))
        loss.backward()
        assert [float(loss), between] == want
        return {name: float(grad.norm()) for name, grad in titan.gradients(model).items()}


@pytest.mark.long
@pytest.mark.parametrize("copies", [None, REPLICAS])
def test_a_batch_without_gradients_may_come_between(copies):
    first, second = run(2, evaluate, copies)
    assert first == second
    assert all(norm > 0 for norm in first.values())


def turned_off(world):
    with titan.torchtitan("0") as client:
        model = made(client, "1", world.size())
        assert client.balance_of(model).layers == []
        return float(titan.loss_of(model, titan.batch_of(world.rank(), 0)))


@pytest.mark.long
def test_with_lplb_ep_0_the_model_is_plain():
    plain = [of_rank[0][0] for of_rank in run(2, train, "plain", 2)]
    assert run(2, turned_off) == plain


def compiled(world, whole):
    with titan.torchtitan("1") as client:
        model = made(client, "1", world.size(), compiles=whole)
        eager = made(client, "1", world.size())
        tokens = titan.batch_of(world.rank(), 0)
        want = titan.loss_of(eager, tokens)
        for layer in [] if whole else model.layers.values():
            layer.compile(backend="eager")
        got = titan.loss_of(model, tokens)
        (got + want).backward()
        assert float(got) == float(want)
        assert largest_difference(titan.gradients(model), titan.gradients(eager)) == 0


def test_torchtitan_s_compiler_is_refused_by_name():
    """Over DeepEP V2 it does not run without lplb_ep either: its operations have no shapes."""
    ranks.close()  # tests of Megatron-Core have ranks compile nothing from then on
    with pytest.raises(ranks.RanksFailedError) as error:
        run(2, compiled, True)
    assert all("leave `model` out of compile.comp" in message for _, message in error.value.errors)


@pytest.mark.long
def test_a_graph_of_another_compiler_breaks_there():
    run(2, compiled, False)


def refuse(world):
    """What a config is refused for."""
    from torchtitan.config.override import OverrideConfig, apply_overrides

    with titan.torchtitan("1") as client:
        found = []
        for backend, change, asked in (
            ("standard", None, {}),
            ("hybridep", None, {}),
            ("deepep", "cudagraphable", {}),
            ("deepep", None, {"guests": 0}),
            ("deepep", None, {"guests": 1, "replicas": 1}),
            ("deepep", None, {"load": [1.0]}),
            ("deepep", None, {"replicas": 1, "load": [1.0]}),
        ):
            config = titan.model_config(backend)
            if change:
                setattr(config.layers[0].moe.routed_experts.token_dispatcher, change, True)
            imports = [("lplb_ep.clients.torchtitan.balance", asked)]
            of_layers = {"load": [asked["load"]] * titan.LAYERS} if "load" in asked else {}
            for attempt in (
                client.BalanceConverter.Config(**{**asked, **of_layers}).build().convert,
                lambda config, imports=imports: apply_overrides(
                    OverrideConfig(imports=imports), config
                ),
            ):
                with pytest.raises(ContractError) as error:
                    attempt(config)
                found.append(str(error.value))
        return found


def test_what_cannot_be_balanced_is_refused_by_name():
    (found,) = {tuple(said) for said in run(2, refuse)}
    names = (
        *("AllToAllTokenDispatcher", "HybridEPTokenDispatcher", "cudagraphable", "got 0"),
        *("say one of them", "say how many, too", "load has 1 experts, and a layer 8"),
    )
    assert len(found) == 2 * len(names)
    for number, message in enumerate(found):
        assert message.startswith("this model cannot be balanced: ")
        assert names[number // 2] in message


def pools_of_models(world):
    """Pools of one model after the other, where a rank still has the first one's."""
    with titan.torchtitan("1") as client:
        experts = torch.nn.Linear(3, 2)  # rows of two slots
        first = client._pool(world, 1, experts)
        assert client._pool(world, 1, experts) is first
        kept = [first] if world.rank() == 0 else []
        number = id(first)
        del first
        second = client._pool(world, 1, experts)
        return [id(pool) == number for pool in (*kept, second)]


def test_a_pool_that_only_some_ranks_still_have_is_made_anew():
    assert run(2, pools_of_models)[0] == [True, False]


def override(world, asked):
    """By the name that torchtitan's command line takes."""
    from torchtitan.config.override import OverrideConfig, apply_overrides, parse_cli_imports

    with titan.torchtitan("1") as client:
        imports = parse_cli_imports([f"lplb_ep.clients.torchtitan.balance={asked}"])

        def convert(config):
            assert len(apply_overrides(OverrideConfig(imports=imports), config)) == titan.LAYERS
            return config

        model = titan.make_model(world.size(), convert)
        titan.loss_of(model, titan.batch_of(world.rank(), 0)).backward()
        kinds = client.BalancedRoutedExperts
        balanced = [m.balanced for m in model.modules() if isinstance(m, kinds)]
        # Logs and recordings tell layers apart before they have names.
        assert len({of_layer.layer.label for of_layer in balanced}) == titan.LAYERS
        balance = client.balance_of(model)
        return len(balance.pools), str(balance)


@pytest.mark.parametrize(("copies", "num_pools"), [("guests", 1), ("replicas", 0)])
def test_an_override_of_the_command_line_balances_a_model(copies, num_pools):
    for pools, said in run(2, override, f'{{"{copies}": 1}}'):
        assert pools == num_pools  # for all layers
        assert said.startswith(f"{titan.LAYERS} MoE layers, 0.0 MiB for {copies}")
        assert "layers.1.moe.routed_experts: imbalance" in said
        assert "; 1 batch; " in said
