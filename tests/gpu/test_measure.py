"""What `lplb-ep bench` measures is what it says it is."""

import math

import pytest

from lplb_ep.settings import GPU_SOLVERS
from lplb_ep.tools import bench

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("solver", GPU_SOLVERS)
def test_every_step_is_measured_on_its_own_batch(solver):
    """`measure` itself asserts that no batch ended badly, or was counted wrong."""
    batches = bench.make_batches(8, 64, 100, 8)
    placement = bench.make_placement("eplb", 8, 2, batches.history)
    measured = bench.measure(placement, batches, solver)
    assert measured["above"] == 0
    for name in bench.TIMES:
        if name == "in one" and solver != "flow":
            assert math.isnan(measured[name])
        else:
            assert 0 < measured[name] < 1e5, name
    assert bench.count_launches(placement, batches, solver) == 3
