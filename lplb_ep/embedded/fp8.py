"""DeepEP's cast of tokens to FP8."""

from __future__ import annotations

import torch


def cast_to_fp8(
    x: torch.Tensor, round_scale: bool, use_ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepEP's cast of a token to FP8 with a scale for 128 channels (csrc/kernels/utils.cuh).

    Args:
        x: [T, H], any floating dtype, H a multiple of 128.
        round_scale: powers of two for scales.
        use_ue8m0: four scales' exponents in one int32; needs `round_scale` and H a multiple of 512.

    Returns:
        [T, H] float8_e4m3fn, and the factors to multiply it by: [T, H / 128] float32 or
        [T, H / 512] int32.
    """
    blocks = x.detach().float().unflatten(1, (x.shape[1] // 128, 128))
    largest = blocks.abs().amax(2).clamp(min=1e-4)
    if round_scale:
        mantissa, exponent = torch.frexp(largest * (1 / 448))
        inverse = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())
        scale = 1 / inverse
    else:
        # Not `448 / largest`, which PyTorch rounds twice.
        inverse, scale = largest * (1 / 448), largest.new_tensor(448.0) / largest
    values = (blocks * scale.unsqueeze(2)).to(torch.float8_e4m3fn)
    if use_ue8m0:
        inverse = (inverse.view(torch.int32) >> 23).to(torch.uint8).view(torch.int32)
    return values.flatten(1), inverse
