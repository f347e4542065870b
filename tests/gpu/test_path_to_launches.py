"""From a planner to the launches: few modules, as on the CPU (`tests/cpu/deepep`)."""

import pytest
import torch
from path import modules_on_stack
from written import ARCHITECTURE

from lplb_ep import Placement, Planner
from lplb_ep.gpu.launch import Launch

pytestmark = pytest.mark.gpu


def test_picks_pass_few_modules(monkeypatch):
    planner = Planner(Placement([0, 1, 2, 0], 1), solver="flow")
    launch, paths = Launch.__call__, set()

    def traced(self, *args):
        paths.add((*modules_on_stack(), "gpu.launch"))
        launch(self, *args)

    monkeypatch.setattr(Launch, "__call__", traced)
    planner.route(torch.tensor([[0, 1], [2, -1]], device="cuda"))
    (path,) = paths
    shown = " → ".join(f"`{module}`" for module in ("deepep.hooks", "deepep.plans", *path))
    assert shown in ARCHITECTURE.read_text()
    assert len(path) + 2 <= 8
