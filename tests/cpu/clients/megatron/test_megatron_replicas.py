"""What changes under Megatron-Core's experts: steps that are given up, experts that are frozen."""

import contextlib
import dataclasses
import gc
import os
import weakref
from unittest import mock

import pytest
import ranks
import torch
from gpt import Run, Training, chunks_of, config_of, megatron
from gpt_checks import CLOSE, OFF, ON

from lplb_ep import ContractError, RankError

pytest.importorskip("megatron")

REPLICAS = Run(balance={"replicas": 2}, micro_batches=3)
SHARDED = dict(overlap_grad_reduce=True, use_distributed_optimizer=True, bucket_size=4000)


class GivenUpError(Exception):
    """Ends a step."""


def repeated(group, run, number):
    """Gradients of a step that was given up in a micro-batch before, and of the next one."""
    with megatron(run):
        training = Training(run)
        with contextlib.closing(training):
            forward, numbers = training.forward, iter(range(run.micro_batches))

            def give_up(*args, **kwargs):
                if next(numbers) == number:
                    raise GivenUpError
                return forward(*args, **kwargs)

            training.forward = give_up
            with pytest.raises(GivenUpError):
                training.gradients(training.batches())
            training.forward, batches = forward, training.batches()
            found = []
            for _ in range(2):
                training.gradients(batches)
                named = training.named_parameters()
                found.append({n: p.main_grad.clone() for n, p in named if p.requires_grad})
            return found


@pytest.mark.parametrize("run", [REPLICAS, Run(**{**vars(REPLICAS), "ddp": SHARDED})])
def test_a_step_that_was_given_up_leaves_no_gradients(run):
    plain, balanced = (ranks.run(2, repeated, run, 2, environ=environ) for environ in (OFF, ON))
    torch.testing.assert_close(balanced, plain, **CLOSE)


def retrained(group, run, before_ddp, changed, is_trained):
    """Gradients of two steps; between them, or before DDP, experts are frozen or trained."""
    from lplb_ep.clients import megatron as client

    balance = client.balance

    def change(chunks):
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if changed in name:
                    parameter.requires_grad = is_trained

    def balance_and_change(chunks, **options):
        made = balance(chunks, **options)
        if before_ddp:
            change(chunks)
        return made

    with megatron(run), mock.patch.object(client, "balance", balance_and_change):
        training = Training(run)
        with contextlib.closing(training):
            batches, found = training.batches(), []
            for step in range(2):
                if step and not before_ddp:
                    change(training.chunks)
                training.gradients(batches)
                named = training.named_parameters()
                found.append({n: p.main_grad.clone() for n, p in named if hasattr(p, "main_grad")})
            reports = training.balance.report()
            return found, [set(row.by_status) for row in reports]


@pytest.mark.parametrize("options", [{"guests": 2}, {"replicas": 2}])
@pytest.mark.parametrize(
    ("frozen", "change", "statuses"),
    [
        ("local_experts", (True, "local_experts", True), {"STALE"}),
        ("linear_fc1", (True, "local_experts.1.linear_fc1", True), {"STALE"}),
        ("", (False, "local_experts.0.", False), {"OPTIMAL", "STALE"}),
    ],
)
def test_with_experts_that_are_frozen_or_trained_since_batches_go_home(
    options, frozen, change, statuses
):
    run = Run(balance=options, frozen=frozen)
    plain, balanced = (
        ranks.run(2, retrained, run, *change, environ=environ) for environ in (OFF, ON)
    )
    for (want, _), (got, seen) in zip(plain, balanced, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
        assert seen == [statuses] * 2


@pytest.mark.parametrize("options", [{"guests": 2}, {"replicas": 2}])
@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ({0: "0.", 1: "0."}, "linear_fc1.weight is frozen (requires_grad=False) for some experts"),
        ({0: ""}, "False on ranks [0]; True on ranks [1]"),
    ],
)
def test_experts_of_which_some_are_frozen_are_refused(options, frozen, message):
    for said in ranks.run(2, refused, Run(balance=options), frozen, environ=ON):
        assert message in said


def refused(group, run, frozen):
    """The error of a model some of whose experts are frozen."""
    from lplb_ep.clients.megatron import balance

    with megatron(run):
        chunks = chunks_of(run, config_of(run))
        part = frozen.get(group.rank())
        for name, parameter in chunks[0].named_parameters():
            if part is not None and f"local_experts.{part}" in name:
                parameter.requires_grad = False
        try:
            balance(chunks, **run.balance)
        except (RankError, ValueError) as error:
            return str(error)
    return ""


def not_in_ddp(group, run, missing, are_frozen):
    """The error of a first step, where DDP does not have some experts that replicas train."""
    from lplb_ep.clients.megatron import balance

    with megatron(run):
        training = Training(dataclasses.replace(run, balance={"off": True}))
        with contextlib.closing(training):
            part = missing.get(group.rank())
            named = training.named_parameters()
            gone = [p for n, p in named if part is not None and f"local_experts.{part}" in n]
            balance(training.chunks, **run.balance)
            for parameter in gone:
                del parameter.main_grad  # as if it had been frozen when DDP was made
                parameter.requires_grad = not are_frozen
            with pytest.raises((ContractError, RankError)) as error:
                training.gradients(training.batches())
            return type(error.value).__name__, str(error.value)


@pytest.mark.parametrize(
    ("missing", "are_frozen", "message", "of_rank_0"),
    [
        ({1: "0."}, True, "layers.0.mlp were frozen (requires_grad) between", "RankError"),
        ({0: "", 1: ""}, False, "hands them on, and the model is in none", "ContractError"),
    ],
)
def test_replicas_that_ddp_does_not_have_are_refused_on_all_ranks(
    missing, are_frozen, message, of_rank_0
):
    results = ranks.run(2, not_in_ddp, REPLICAS, missing, are_frozen, environ=ON)
    assert [name for name, _ in results] == [of_rank_0, "ContractError"]
    assert all(message in said for _, said in results)


def inferred(group, run, alone):
    """Losses and statuses of inference behind writes of weights, on a rank alone or on all."""
    with megatron(run):
        training = Training(run)
        with contextlib.closing(training):
            chunk, losses = training.chunks[0].module, []
            tokens = next(training.batches())
            for scale in (1.0, 1.5, 1.0):
                state = {n: t * scale for n, t in chunk.state_dict().items() if t is not None}
                if scale != 1.0 and not (alone and group.rank()):
                    chunk.load_state_dict(state, strict=False)
                with torch.inference_mode():
                    out, loss_of = training.forward(iter([tokens]), training.chunks[0])
                    losses.append(float(loss_of(out)[0]))
            losses += training.gradients(training.batches())
            return losses, [dict(row.by_status) for row in training.balance.report()]


@pytest.mark.parametrize(
    ("options", "alone"),
    [({"replicas": 2}, False), ({"replicas": 2}, True), ({"guests": 2}, True)],
)
def test_copies_have_weights_that_were_loaded_for_inference(options, alone):
    run = Run(balance=options, micro_batches=3)
    plain, balanced = (ranks.run(2, inferred, run, alone, environ=environ) for environ in (OFF, ON))
    for (want, _), (got, seen) in zip(plain, balanced, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
        assert [set(statuses) for statuses in seen] == [{"OPTIMAL"}] * 2


def dropped(group, run):
    """Whether a balanced model's layers are alive once nobody refers to it."""
    from lplb_ep.clients.megatron import balance

    with megatron(run):
        chunks = chunks_of(run, config_of(run))
        layers = [weakref.ref(one.replicas) for one in balance(chunks, **run.balance).layers]
        before = [layer() is not None for layer in layers]
        del chunks
        gc.collect()
        return before, [layer() is not None for layer in layers]


def beside(group, run):
    """By turns: losses of a plain model, of one that is dropped afterwards, and of plain ones."""
    plain = dataclasses.replace(run, balance={"off": True})

    def losses(of, mode):
        with mock.patch.dict(os.environ, LPLB_EP=mode):
            training = Training(of)
            return training.gradients(training.batches())

    with megatron(run):
        turns = [(plain, "0"), (run, "1"), (plain, "0"), (run, "1"), (plain, "1"), (plain, "home")]
        return [losses(*turn) for turn in turns]


@pytest.mark.parametrize("options", [{"guests": 2}, {"replicas": 2}])
def test_a_balanced_model_that_is_dropped_harms_no_other(options):
    for plain, *others in ranks.run(2, beside, Run(balance=options), environ=ON):
        for losses in others:
            assert losses == pytest.approx(plain, rel=1e-5)


def test_replicas_live_no_longer_than_their_model():
    for before, after in ranks.run(2, dropped, REPLICAS, environ=ON):
        assert before == [True, True]
        assert after == [False, False]
