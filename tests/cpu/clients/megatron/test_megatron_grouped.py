"""Megatron-Core's `TEGroupedMLP`, over what stands for Transformer Engine's grouped layer."""

import pytest
import ranks
import torch
import torch.nn.functional as F
from gpt import Run, Training, megatron, refusal
from gpt_checkpoints import FULLY, SHARDED, go, placed, same, whole
from gpt_checks import OFF, ON, check_run

from lplb_ep import ContractError

pytest.importorskip("megatron")

BFLOAT16 = dict(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
OVERLAPPED = dict(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=4000, **SHARDED)
DELAYED = dict(overlap_dispatch_backward_with_experts_wgrad=True)
RUNS = {
    "overlapped, fused": (4, Run(grouped="fused", ddp=OVERLAPPED, steps=3)),
    "gated, with biases": (
        2,
        Run(
            grouped="grouped",
            config=dict(gated_linear_unit=True, add_bias_linear=True, activation_func=F.silu),
            optimizer=dict(optimizer="sgd"),  # Adam makes noise of keys' biases, which do nothing
        ),
    ),
    "activations are recomputed": (
        2,
        Run(
            grouped="fused",
            config=dict(
                moe_grouped_gemm=True,
                recompute_granularity="selective",
                recompute_modules=["moe_act"],
            ),
        ),
    ),
    "layers are recomputed": (
        2,
        Run(
            grouped="fused",
            config=dict(recompute_granularity="selective", recompute_modules=["moe"]),
        ),
    ),
    "bfloat16": (2, Run(grouped="fused", config=BFLOAT16)),
    "replicas": (2, Run(grouped="fused", balance={"replicas": 2}, steps=3)),
    "delayed, layers are recomputed": (
        4,
        Run(
            grouped="fused",
            ddp=dict(**OVERLAPPED, delay_wgrad_compute=True),
            config=dict(**DELAYED, recompute_granularity="selective", recompute_modules=["moe"]),
            steps=3,
        ),
    ),
    "replicas, recomputed whole, overlapped": (
        2,
        Run(
            grouped="fused",
            balance={"replicas": 4},
            ddp=OVERLAPPED,
            config=dict(
                recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
            ),
            steps=3,
        ),
    ),
    "delayed, frozen first layers": (
        2,
        Run(
            grouped="fused",
            frozen="linear_fc1",
            ddp=dict(**OVERLAPPED, delay_wgrad_compute=True),
            config=DELAYED,
            steps=3,
        ),
    ),
    "delayed, DDP's hooks as usual": (2, Run(grouped="fused", config=DELAYED)),
    "delayed, gated, with biases": (
        2,
        Run(
            grouped="grouped",
            ddp=dict(delay_wgrad_compute=True),
            config=dict(
                **DELAYED, gated_linear_unit=True, add_bias_linear=True, activation_func=F.silu
            ),
            optimizer=dict(optimizer="sgd"),
        ),
    ),
}
SHORT = {
    "delayed, overlapped": (
        2,
        Run(
            grouped="grouped",
            ddp=dict(**OVERLAPPED, delay_wgrad_compute=True),
            config=DELAYED,
            steps=3,
        ),
    ),
    "delayed, overlapped, replicas": (
        2,
        Run(
            grouped="fused",
            balance={"replicas": 2},
            ddp=dict(**OVERLAPPED, delay_wgrad_compute=True),
            config=DELAYED,
            steps=3,
        ),
    ),
}


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.long) for name in RUNS), *SHORT]
)
def test_grouped_experts_train_as_plain_ones(name):
    check_run(*(RUNS | SHORT)[name])


def test_grouped_experts_are_saved_by_their_numbers_from_other_homes(tmp_path):
    """And loaded as a list of modules, plain."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [str(tmp_path / name) for name in "ab"]
    saved = ranks.run(
        2, go, placed(0, grouped="fused", ddp=SHARDED), None, paths[0], FULLY, environ=ON
    )
    plain = ranks.run(
        2, go, Run(grouped="fused", ddp=SHARDED), paths[0], paths[1], FULLY, environ=OFF
    )
    same([(result[1],) for result in saved], plain, 0, rtol=0, atol=0)
    others = ranks.run(2, go, placed(1, ddp=SHARDED), paths[1], None, FULLY, environ=ON)
    one, other = whole(plain, 1), whole(others, 0)
    for name, value in other.items():
        parts = name.split(".")
        if "local_experts" in parts:
            at = parts.index("local_experts")
            number = parts.pop(at + 1)
            parts.pop(at)
            parts[-1] += number
        torch.testing.assert_close(one[".".join(parts)], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("experts.config.use_transformer_engine_op_fuser", "op_fuser is True: turn it off"),
        (
            "experts.config.moe_single_grouped_weight",
            "moe_single_grouped_weight is True: turn it off",
        ),
        ("experts.config.quant_recipe", "quant_recipe is True: turn it off"),
        ("experts.config.fine_grained_activation_offloading", "offloading is True: turn it off"),
    ],
)
def test_what_transformer_engine_has_more_is_refused_by_name(change, message):
    run = Run(grouped="grouped")
    for said in ranks.run(2, refusal, run, {change: True}, environ=ON):
        assert said.startswith("decoder.layers.0.mlp cannot be balanced: ")
        assert message in said


def replaced(group, run):
    """The error of a batch whose experts have other parameters than when they were balanced."""
    with megatron(run):
        training = Training(run)
        experts = training.chunks[0].module.decoder.layers[0].mlp.experts
        old = experts.linear_fc1.weight1
        experts.linear_fc1.weight1 = torch.nn.Parameter(old.detach().clone())
        with pytest.raises(ContractError) as error:
            training.gradients(training.batches())
        training.close()
        return str(error.value)


def test_parameters_that_were_replaced_are_noticed():
    for said in ranks.run(2, replaced, Run(grouped="grouped"), environ=ON):
        assert said.startswith("the experts' parameter weight1 is another one than when they were")
