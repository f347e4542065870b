"""Layers of serving engines: their tables, their slots, and their own dispatchers."""

import numpy as np
import pytest
import ranks
import serving
import torch

import lplb_ep
from lplb_ep import PlacementError
from lplb_ep.clients.engines import EngineLayers
from lplb_ep.layer import channels

BALANCED = {"LPLB_EP": "1", "LPLB_EP_BACKEND": "embedded", "LPLB_EP_INDICES": "physical"}
OFF = {**BALANCED, "LPLB_EP": "0"}


def served(group, kind, num_micro_batches, num_steps=6):
    tables = serving.table(np.random.default_rng(1), 2)
    engine = EngineLayers(lambda: tables, range(2), group.size(), serving.NUM_EXPERTS)
    buffer = serving.buffer_of(kind, lplb_ep, group)
    dispatchers = []
    for number in range(2):
        dispatchers.append(serving.STAND_INS[kind](buffer, group.size(), group.rank()))
        engine.put_in_force(number, dispatchers[-1], "prepare_async", serving.current)
    args = kind, dispatchers, tables, engine.refresh, num_micro_batches, num_steps
    seen = serving.serve(group, *args)
    planners = channels.get(group, {}).values()
    assert sum(engine.num_batches.values()) in (0, num_steps * 2 * num_micro_batches)
    own = [planner for planner in planners if planner.layer in engine.layers.values()]
    statuses = [dict(planner.num_batches) for planner in own]
    return seen, statuses


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("kind", serving.STAND_INS)
def test_every_step_is_balanced_and_every_token_meets_its_experts(
    kind, num_micro_batches, num_ranks
):
    out = ranks.run(num_ranks, served, kind, num_micro_batches, environ=BALANCED)
    serving.is_best([seen for seen, _ in out])
    for _, statuses in out:
        assert len(statuses) == 2 * num_micro_batches  # a channel of each layer and micro-batch
        assert all(status == {0: 6} for status in statuses)


@pytest.mark.parametrize("kind", serving.STAND_INS)
def test_off_the_engines_own_slots_pass(kind):
    out = ranks.run(2, served, kind, 2, environ=OFF)
    for _, statuses in out:
        assert statuses == []
    with pytest.raises(AssertionError):
        serving.is_best([seen for seen, _ in out])


def test_a_table_is_read_again_where_it_was_written_to():
    tables = torch.tensor([[0, 1, 0, 2], [2, 1, 0, 2]])
    engine = EngineLayers(lambda: tables, [0, 1], 2, 3)
    assert [layer.is_valid for layer in engine.layers.values()] == [True, True]
    assert [layer.placement.max_replicas for layer in engine.layers.values()] == [2, 2]
    assert engine.refresh() == []
    tables[1, 0] = 2  # the value that it had
    assert not engine.is_current
    assert engine.refresh() == []
    with torch.inference_mode():
        tables[1].copy_(torch.tensor([0, 1, 2, 2]))
    assert engine.refresh() == [1]
    layer = engine.layers[1]
    assert layer.placement.physical_to_logical.tolist() == [0, 1, 2, 2]
    assert layer.is_valid
    tables[0].copy_(torch.tensor([0, 1, 0, 0]))
    with pytest.raises(PlacementError, match="row 0 of the engine's table: no slot holds expert 2"):
        engine.refresh()


def test_an_engine_of_too_many_ranks_is_refused():
    tables = torch.arange(65).unsqueeze(0)
    with pytest.raises(PlacementError, match="at most 64 ranks; got 65"):
        EngineLayers(lambda: tables, [0], 65, 65)
