"""Megatron-Core's schedule of two micro-batches: one's backward pass beside another's forward."""

import contextlib
from unittest import mock

import pytest
import ranks
import torch
from gpt import Run, Training, megatron
from gpt_checks import OFF, ON, check_run

pytest.importorskip("megatron")

# Megatron-Core asks for half precision. The tests compute in float32, which shows more.
IN_FLIGHT = dict(bf16=True, params_dtype=torch.float32, overlap_moe_expert_parallel_comm=True)
DELAYED = dict(delay_wgrad_compute=True)
OVERLAPPED = dict(
    overlap_grad_reduce=True,
    use_distributed_optimizer=True,
    overlap_param_gather=True,
    bucket_size=4000,
)


def of(*, config=None, **options):
    return Run(config={**IN_FLIGHT, **(config or {})}, **{"micro_batches": 3, **options})


LATE = dict(config=DELAYED, grouped="fused", ddp=dict(**OVERLAPPED, **DELAYED))
RUNS = {
    "modules, overlapped": (2, of(ddp=OVERLAPPED, steps=3)),
    "delayed, overlapped": (2, of(**LATE, steps=3)),
}
LONG = {
    "modules": (4, of()),
    "grouped": (2, of(grouped="grouped")),
    "delayed": (2, of(config=DELAYED, grouped="grouped", ddp=DELAYED)),
    "delayed, overlapped, four ranks": (4, of(**LATE, steps=3)),
    "delayed, overlapped, replicas": (2, of(**LATE, balance={"replicas": 2}, steps=3)),
    "interleaved pipeline": (
        4,
        of(pp=2, vpp=2, micro_batches=4, config=dict(num_layers=4)),
    ),
    "interleaved pipeline, replicas": (
        4,
        of(pp=2, vpp=2, micro_batches=4, config=dict(num_layers=4), balance={"replicas": 4}),
    ),
    "interleaved pipeline, delayed, overlapped": (
        4,
        of(
            pp=2,
            vpp=2,
            micro_batches=4,
            steps=3,
            grouped="fused",
            config=dict(**DELAYED, num_layers=4),
            ddp=dict(**OVERLAPPED, **DELAYED, align_param_gather=True),
        ),
    ),
}


@pytest.mark.parametrize(
    "name", [*RUNS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
)
def test_two_micro_batches_in_flight_train_as_plain_ones(name):
    check_run(*(RUNS | LONG)[name])


def unedited(group, run):
    """Losses of a step, and what was balanced when the first batch came."""
    with megatron(run):
        from megatron.core.transformer.moe.moe_layer import MoELayer

        from lplb_ep.clients import megatron as client

        with contextlib.ExitStack() as stack:
            for name in ("__init__", "forward", "route"):  # put back
                stack.enter_context(mock.patch.object(MoELayer, name, getattr(MoELayer, name)))
            client.balance_when_called(MoELayer)
            training = Training(run)
            losses = training.gradients(training.batches())
            report = [row for balance in client.kept for row in balance.report()]
            while client.kept:
                client.kept.pop().remove()
            training.close()
        return losses, [(row.layer, row.batches, set(row.by_status)) for row in report]


def test_a_model_that_the_program_balances_itself_is_left_alone():
    for _, report in ranks.run(2, unedited, of(), environ=ON):
        assert not report


def test_a_program_that_is_not_edited_is_balanced_when_its_layers_route():
    run = of(balance={"off": True})
    plain, balanced = (ranks.run(2, unedited, run, environ=environ) for environ in (OFF, ON))
    for (want, nothing), (losses, report) in zip(plain, balanced, strict=True):
        assert losses == pytest.approx(want, rel=1e-5)
        assert not nothing
        assert report == [(f"{n}: layer {n + 1}", 3, {"OPTIMAL"}) for n in range(2)]
