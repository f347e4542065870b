"""The pair of functions in docs/drop_in.md, as it stands there: a layer's results and gradients."""

import re
from pathlib import Path

import ranks
import torch

import lplb_ep
from lplb_ep import Placement

PAGE = Path(__file__).parents[3] / "docs" / "drop_in.md"
E, K, H, T = 6, 2, 64, 50
ENVIRON = {"LPLB_EP": "1", "LPLB_EP_BACKEND": "embedded", "LPLB_EP_REPLICAS": "valid"}


def pair():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "class Dispatch" in block]
    names = {}
    exec(block, names)
    return names["Dispatch"], names["Combine"]


def layer_of_own(group):
    dispatch, combine = pair()
    placement = Placement([0, 1, 2, 5, 3, 4, 5, 0], 2)
    buffer = lplb_ep.Buffer(group, 1 << 22)
    view = buffer.view(placement)
    torch.manual_seed(group.rank())
    held = torch.tensor(placement.physical_to_logical.tolist()).view(2, -1)[group.rank()]
    topk_idx = torch.rand(T, E).topk(K).indices
    grad = torch.randn(T, H)
    results = []
    for is_plain in (False, True):
        x = torch.randn(T, H, generator=torch.Generator().manual_seed(group.rank()))
        x = x.bfloat16().requires_grad_()
        weights = torch.full((T, K), 0.5, requires_grad=True)
        if is_plain:
            factor = ((1 + topk_idx) * weights).sum(1, keepdim=True)
            out = x.float() * factor
        else:
            rows, sent, slots, counts, handle = dispatch.apply(x, weights, topk_idx, E, view)
            assert sum(counts) == int((slots >= 0).sum())
            scale = torch.where(slots < 0, 0, 1 + held[slots.clamp(min=0)])
            out = combine.apply(
                (rows * (scale * sent).sum(1, keepdim=True)).bfloat16(), handle, view
            )
        out.float().backward(grad)
        results.append((out.detach().float(), x.grad.float(), weights.grad))
    for got, expected in zip(*results, strict=True):
        size = expected.abs().max()
        assert (got - expected).abs().max() <= 0.02 * size


def test_it_computes_and_trains_as_the_plain_layer():
    ranks.run(2, layer_of_own, environ=ENVIRON)
