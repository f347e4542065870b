"""What is wrong with `balance` on one rank is raised, by name, on all, and nothing is changed."""

import os
from unittest import mock

import pytest
import ranks
import torch
from gpt import EXPERTS, Run, chunks_of, config_of, megatron, seams
from gpt_checks import ON

from lplb_ep import ContractError, RankError

pytest.importorskip("megatron")

UNLIKE = torch.arange(2.0 * EXPERTS).view(2, EXPERTS)


def disagreement(group, run, options, environ, change):
    """The error of a call that differs on rank 1, and whether the model is as before."""
    from lplb_ep.clients.megatron import balance

    with megatron(run):
        chunks = chunks_of(run, config_of(run))
        if group.rank() == 1 and change:
            chunks[0].decoder.layers[1].mlp.config.fp8 = "e4m3"
        before = seams(chunks[0])
        with (
            mock.patch.dict(os.environ, environ if group.rank() == 1 else {}),
            pytest.raises((ContractError, RankError, ValueError)) as error,
        ):
            balance(chunks, **options[group.rank()])
        return type(error.value).__name__, str(error.value), seams(chunks[0]) == before


@pytest.mark.parametrize(
    ("options", "environ", "change", "message"),
    [
        ([{}, {"guests": 0}], {}, False, "guests must be a whole number from 1; got 0"),
        ([{}, {"load": UNLIKE[:1]}], {}, False, "load must be [2, 8], layers and experts; got [1"),
        ([{}, {}], {}, True, "mlp cannot be balanced: fp8 is 'e4m3': turn it off"),
        ([{}, {}], {"LPLB_EP_PLACEMENT": "a.json"}, False, "LPLB_EP_PLACEMENT is set, which is"),
        ([{}, {}], {"LPLB_EP_OBJECTIVE": "experts"}, False, "'experts' does not go with guest slo"),
        ([{}, {}], {"LPLB_EP_MIN_GAIN": "9"}, False, "min_gain (LPLB_EP_MIN_GAIN) does not go wit"),
        (
            [{}, {}],
            {"LPLB_EP_EVERY": "2", "LPLB_EP_REPLICAS": "valid"},
            False,
            "every (LPLB_EP_EVERY) does not go with guest slots: leave it 1",
        ),
        ([{}, {}], {"LPLB_EP": "yes"}, False, "LPLB_EP must be one of 0, home, 1; got 'yes'"),
        ([{}, {}], {"LPLB_EP": "0"}, False, "differ in LPLB_EP: 1 on ranks [0]; 0 on ranks [1]"),
        ([{}, {"guests": 2}], {}, False, "differ in guests of a rank: 1 on ranks [0]; 2 on ran"),
        ([{}, {"replicas": 1}], {}, False, "differ in guests of a rank: 1 on ranks [0]; 0 on ra"),
        (
            [{"load": UNLIKE}, {"load": UNLIKE.flip(1)}],
            {},
            False,
            "balance(): ranks differ in placement of decoder.layers.0.mlp: ",
        ),
    ],
)
def test_what_is_wrong_on_one_rank_is_raised_on_all(options, environ, change, message):
    results = ranks.run(2, disagreement, Run(), options, environ, change, environ=ON)
    assert results[0][0] == "RankError"
    for _, said, is_as_before in results:
        assert message in said
        assert is_as_before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guests": "2"}, "guests must be a whole number from 1; got '2'"),
        ({"replicas": -1}, "replicas must be a whole number from 0; got -1"),
        ({"placement": "p.json"}, "as load_placements returns it; got a str"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(options, message):
    from types import SimpleNamespace

    from lplb_ep.clients.megatron_placements import placements_for

    manager = SimpleNamespace(num_experts=8, group=SimpleNamespace(size=lambda: 2))
    layer = SimpleNamespace(token_dispatcher=SimpleNamespace(_comm_manager=manager))
    given = {"guests": None, "replicas": 0, "load": None, "placement": None, **options}
    with pytest.raises((TypeError, ValueError)) as error:
        placements_for({"a": layer}, *given.values())
    assert message in str(error.value)


def test_layers_with_another_number_of_experts_are_refused_by_name():
    from types import SimpleNamespace

    from lplb_ep.clients.megatron_placements import placements_for

    def layer(num_experts):
        manager = SimpleNamespace(num_experts=num_experts, group=SimpleNamespace(size=lambda: 2))
        return SimpleNamespace(token_dispatcher=SimpleNamespace(_comm_manager=manager))

    with pytest.raises(ContractError, match="b cannot be balanced: it has 4 experts, and other la"):
        placements_for({"a": layer(8), "b": layer(4)}, None, 0, None, None)
