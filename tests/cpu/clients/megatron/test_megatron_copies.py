"""The order in which Megatron-Core's experts and their copies compute."""

import functools
from types import SimpleNamespace

import pytest
import ranks
import torch
from gpt import Run, megatron, train
from gpt_checks import ON, compare

pytest.importorskip("megatron")

OWN, WIDTH = 3, 4


def experts_with(scales_input, forward):
    """A `SequentialMLP` without what a model has around it."""
    local = torch.nn.ModuleList(torch.nn.Identity() for _ in range(OWN))
    attributes = dict(
        forward=forward,
        dp_group=None,
        local_experts=local,
        num_local_experts=OWN,
        config=SimpleNamespace(
            moe_apply_probs_on_input=scales_input, moe_router_topk=1, fp8=None, fp4=None
        ),
    )
    return type("Own", (), attributes)()


def computed(group, counts, own, scales_input):
    """What Megatron-Core's loop over all slots gives, and the client's, with own experts in some.

    Returns:
        Outputs and gradients of rows, probabilities and weights, of both. And the slots that the
        client called, in order.
    """
    with megatron(Run()):
        return _computed(counts, own, scales_input)


def _computed(counts, own, scales_input):
    from megatron.core.transformer.moe.experts import SequentialMLP

    from lplb_ep.clients.megatron_experts import SequentialExperts

    counts, calls = torch.tensor(counts), []
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows, probs = drawn(int(counts.sum()), WIDTH), drawn(int(counts.sum()))
    weights = drawn(len(counts), WIDTH, WIDTH)

    def expert(slot, x, p):
        calls.append(slot)
        return (x @ weights[slot]).tanh() * p.unsqueeze(-1), None

    modules = [functools.partial(expert, slot) for slot in range(len(counts))]
    plain, balanced = (experts_with(scales_input, SequentialMLP.forward) for _ in range(2))
    plain.local_experts, plain.num_local_experts = modules, len(modules)
    slots = SimpleNamespace(own=own, modules=lambda x: (x, modules))
    forward = SequentialExperts(balanced).methods(slots)["forward"]
    results = []
    for call in (plain.forward, forward):
        calls.clear()
        output, bias = call(rows, counts, probs)
        assert bias is None
        grads = torch.autograd.grad(output.square().sum(), (rows, probs, weights))
        results.append([tensor.detach() for tensor in (output, *grads)])
    return *results, calls


@pytest.mark.parametrize("scales_input", [False, True])
@pytest.mark.parametrize(
    ("counts", "own", "order"),
    [
        ([2, 1, 3, 5, 4], (0, 1, 2), [3, 4, 2, 0, 1]),
        ([2, 0, 3, 0, 4], (0, 1, 2), [4, 2, 0, 1]),
        ([0, 0, 0, 7, 0], (0, 1, 2), [3, 0, 1, 2]),
        ([0, 9, 2, 0, 0], (0, 1, 2), [1, 2, 0]),
        ([2, 1, 3, 4], (0, 1, 2), [3, 2, 0, 1]),
        ([0, 0, 0, 0, 0], (0, 1, 2), [0, 1, 2]),
        ([0, 2, 0, 3, 0], (1, 2, 4), [3, 1, 2, 4]),  # a placement's homes are anywhere
        ([0, 0], (0,), [0]),
    ],
)
def test_the_most_rows_come_first_and_the_result_is_that_of_all_in_order(
    counts, own, order, scales_input
):
    for want, got, calls in ranks.run(2, computed, counts, own, scales_input):
        assert calls == order
        for wanted, given in zip(want, got, strict=True):
            torch.testing.assert_close(given, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("balance", [{"guests": 2}, {"replicas": 2}])
def test_a_run_is_the_same_bit_for_bit_each_time_and_with_recompute(balance):
    """The order of rows decides the order of experts, and not that of any sum."""
    recomputed = dict(recompute_granularity="selective", recompute_modules=["moe"])
    first, *others = (
        ranks.run(2, train, Run(balance=balance, config=config), environ=ON)
        for config in ({}, {}, recomputed)
    )
    for other in others:
        compare(first, other, rtol=0, atol=0)
