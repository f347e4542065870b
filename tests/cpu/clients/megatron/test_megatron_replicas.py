"""Static copies of Megatron-Core's experts: steps that are given up, models that are dropped."""

import contextlib
import gc
import weakref

import pytest
import ranks
import torch
from gpt import Run, Training, chunks_of, config_of, megatron
from gpt_checks import CLOSE, OFF, ON

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


def test_replicas_live_no_longer_than_their_model():
    for before, after in ranks.run(2, dropped, REPLICAS, environ=ON):
        assert before == [True, True]
        assert after == [False, False]
