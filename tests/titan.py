"""A small DeepSeek-V3 of torchtitan's, unmodified, on gloo ranks: plain, at home and balanced.

torchtitan's own code builds it, distributes its experts, shards it by FSDP2 and checkpoints its
activations. Of its trainer, which imports much more, only the few lines are here that it needs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import types
import unittest.mock
import warnings

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

E, DIM, LAYERS, VOCABULARY, SEQUENCE, SEQUENCES = 8, 32, 2, 64, 16, 2


@contextlib.contextmanager
def torchtitan(mode: str):
    """Within it torchtitan may be used on this rank; LPLB_EP is `mode`, and "plain" is 0."""
    from lplb_ep.deepep.patch import patch, unpatch

    environ = {
        "LPLB_EP": "0" if mode == "plain" else mode,
        "LPLB_EP_BACKEND": "embedded",
        "LPLB_EP_GUEST_MIN_TOKENS": "1",
        "LPLB_EP_GUEST_TOLERANCE": "0",
    }
    with unittest.mock.patch.dict(os.environ, environ), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchtitan's and FSDP2's own
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        patch()
        try:
            import torchtitan.tools.utils as utils

            utils.device_type, utils.device_module = "cpu", torch.cpu
            from torchtitan.distributed.deepep import deepep

            import lplb_ep.clients.torchtitan as client

            client._prepare()
            deepep._buffer = None
            deepep._handle_cache.clear()
            yield client
        finally:
            unpatch()  # other tests on these ranks have the embedded buffers as they are


def model_config(comm_backend: str = "deepep"):
    """The config of a model of `LAYERS` MoE layers with `E` experts each."""
    from torchtitan.models import deepseek_v3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention

    layers = deepseek_v3._build_dsv3_layers(
        n_layers=LAYERS,
        n_dense_layers=0,
        dim=DIM,
        n_heads=2,
        q_lora_rank=0,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        mscale=1.0,
        dense_hidden_dim=DIM,
        moe_hidden_dim=DIM,
        num_experts=E,
        num_shared_experts=1,
        router_top_k=2,
        router_score_func="softmax",
        attn_backend="flex",
        moe_comm_backend=comm_backend,
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=16, max_seq_len=64, theta=10000.0, scaling="none"),
    )
    for layer in layers:  # the one kind of attention that needs no mask and no compiler
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return deepseek_v3.DeepSeekV3Model.Config(
        vocab_size=VOCABULARY,
        dim=DIM,
        tok_embeddings=Embedding.Config(
            num_embeddings=VOCABULARY,
            embedding_dim=DIM,
            param_init=deepseek_v3._EMBEDDING_INIT,
        ),
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=deepseek_v3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=DIM,
            out_features=VOCABULARY,
            param_init=deepseek_v3._output_linear_init(DIM),
        ),
        layers=layers,
    )


def make_model(
    ep: int,
    convert=lambda config: config,
    *,
    checkpointing: str = "none",
    param_dtype: str = "float32",
    reshard: str = "default",
    compiles: bool = False,
) -> nn.Module:
    """As torchtitan's trainer makes it, from a config that `convert` may change.

    A bias of the routers makes the first expert the hottest, without leaving others idle.
    """
    from torchtitan.config.configs import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims, activation_checkpoint
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.models.common.token_dispatcher import update_ep_token_dispatcher_config
    from torchtitan.models.deepseek_v3 import parallelize_deepseekv3
    from torchtitan.models.deepseek_v3.sharding import set_deepseek_v3_sharding_config

    backend = "partial_dtensor"
    dist_utils.set_spmd_backend(backend)
    parallelism = ParallelismConfig(
        expert_parallel_degree=ep, spmd_backend=backend, fsdp_reshard_after_forward=reshard
    )
    training = TrainingConfig(
        local_batch_size=SEQUENCES, seq_len=SEQUENCE, mixed_precision_param=param_dtype
    )
    dims = ParallelDims.from_config(parallelism, torch.distributed.get_world_size())
    dims.build_mesh()
    config = model_config()
    update_ep_token_dispatcher_config(
        config, types.SimpleNamespace(parallelism=parallelism, training=training)
    )
    set_deepseek_v3_sharding_config(config, enable_sp=True, enable_ep=ep > 1)
    config = convert(config)
    with torch.device("meta"):
        model = config.build()
    model.verify_module_protocol()
    ac = {
        "none": None,
        "full": activation_checkpoint.FullAC.Config(),
        "selective": activation_checkpoint.SelectiveAC.Config(),
    }[checkpointing]
    model = parallelize_deepseekv3(
        model,
        parallel_dims=dims,
        training=training,
        parallelism=parallelism,
        compile_config=CompileConfig(enable=compiles, backend="eager"),
        ac_config=ac,
        dump_folder="",
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other one
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
        for layer in model.layers.values():
            bias = torch.zeros(E)
            bias[:4] = torch.tensor([0.2, 0.02, 0.02, 0.01])
            local_part(layer.moe.expert_bias_E).copy_(bias)
            # On the CPU each rank has drawn the same for its part.
            generator = torch.Generator().manual_seed(1 + torch.distributed.get_rank())
            for weight in layer.moe.routed_experts.inner_experts.parameters():
                part = local_part(weight)
                part.copy_(torch.randn(part.shape, generator=generator) * DIM**-0.5)
    return model.train()


def batch_of(rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randint(VOCABULARY, (SEQUENCES, SEQUENCE), generator=generator)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of a next token that can be learned: the present one."""
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole ones, of every parameter that has some."""
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole, of everything that a checkpoint of the model has."""
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
