"""From `get_dispatch_layout` to the rewritten picks: few modules, and none calls back up."""

import torch
from layers import LAYERS
from path import crossings, modules_on_stack
from recording_buffer import PLACEMENT, TOPK, E, P
from written import ARCHITECTURE

from lplb_ep.planning import reference


def test_picks_pass_few_modules(make, mode, monkeypatch):
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    rewrite, paths = reference.rewrite, []

    def traced(*args):
        paths.append([*modules_on_stack(), "planning.reference"])
        return rewrite(*args)

    monkeypatch.setattr(reference, "rewrite", traced)
    drop_in.get_dispatch_layout(TOPK, E)
    (path,) = paths
    assert len(path) <= 8
    assert " → ".join(f"`{module}`" for module in path) in ARCHITECTURE.read_text()


def test_no_module_calls_one_below_it(make, mode):
    """As no module imports one below it; here with the calls that objects bring along."""
    mode("1")
    drop_in = make(placement=PLACEMENT, num_local_slots=P)
    found = crossings(lambda: drop_in.get_dispatch_layout(torch.clone(TOPK), E))
    assert ("deepep.plans", "planning.planner") in found
    assert ("planning.host", "planning.reference") in found
    for caller, into in found:
        assert LAYERS.index(into) < LAYERS.index(caller), f"{caller} calls {into}"
