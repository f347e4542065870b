"""Cost models: what rows cost, their file, and which one is in force."""

import itertools
import json

import numpy as np
import pytest

from lplb_ep import CostModel
from lplb_ep.cost import H200, MAX_STEPS, choose_cost

SMALL = CostModel("small", 4, (10, 12, 30), 9, 5)


def by_hand(model, rows):
    """Nanoseconds of a slot, by its definition."""
    tiles = -(-rows // model.tile)
    if tiles <= len(model.steps):
        return (0, *model.steps)[tiles]
    return model.steps[-1] + model.slope * (tiles - len(model.steps))


@pytest.mark.parametrize("model", [SMALL, H200, CostModel("flat", 3, (7,), 0)])
def test_rows_cost_their_tiles(model):
    rows = np.arange(20 * model.tile)
    assert model.of_slots(rows).tolist() == [by_hand(model, int(n)) for n in rows]
    assert (np.diff(model.of_slots(rows)) >= 0).all()


@pytest.mark.parametrize("model", [SMALL, H200, CostModel("flat", 3, (7, 7), 0)])
def test_most_rows_is_the_inverse(model):
    for cost in [-1, 0, *range(1, 80), 30_899, 30_900, 140_300, 10**7]:
        most = int(model.most_rows(cost))
        assert (most == -1) == (cost < 0)
        if cost >= 0:
            assert most == 2**31 - 1 or by_hand(model, most) <= cost < by_hand(model, most + 1)


def test_no_way_to_cut_a_load_is_cheaper_than_its_bound():
    for model in (SMALL, CostModel("dip", 1, (9, 10, 21, 22, 23), 3)):
        for load in range(1, 24):
            cuts = (c for n in (1, 2, 3) for c in itertools.product(range(load + 1), repeat=n))
            cheapest = min(sum(by_hand(model, x) for x in c) for c in cuts if sum(c) == load)
            assert model.least_of_experts(load) <= cheapest
    assert CostModel("dip", 1, (9, 10, 30), 3).least_of_experts([3, 4]).tolist() == [19, 19]


def test_over_few_copies_the_bound_is_the_cheapest_cut():
    for model in (SMALL, CostModel("dip", 1, (9, 10, 21, 22, 23), 3)):
        for copies, load in itertools.product((1, 2, 3), range(1, 24)):
            cuts = itertools.product(range(load + 1), repeat=copies)
            cheapest = min(sum(by_hand(model, x) for x in c) for c in cuts if sum(c) == load)
            assert model.least_of_experts([load], [copies]) == [cheapest]
    # Beyond what is looked at it is that of any number of copies, and never above that of few.
    load = np.array([100, 64 * 1024, 64 * 1024 + 1, 2**31 - 1])
    any_number = H200.least_of_experts(load)
    for copies in (2, 8, 9):
        least = H200.least_of_experts(load, np.full(4, copies))
        is_few = (load <= 64 * 1024) & (copies <= 8)
        assert (least[~is_few] == any_number[~is_few]).all()
        assert (least[is_few] >= any_number[is_few]).all()
    assert H200.least_of_experts(load[1], 2) > any_number[1]
    assert H200.least_of_experts(load, np.ones(4)).tolist() == H200.of_slots(load).tolist()


def test_the_built_in_table_is_near_what_another_h200_took():
    """34 slots of equal rows. The table is fitted to mixed batches of its own GPU."""
    for rows, ms, off in (
        (4, 1.04, 0.016),
        (128, 1.09, -0.031),
        (256, 1.28, 0.017),
        (257, 2.30, -0.049),
        (512, 2.63, -0.143),
        (1024, 4.81, -0.072),
        (1025, 5.88, -0.046),
    ):
        by_table = (H200.fixed + 34 * H200.of_slots(rows)) / 1e6
        assert by_table / ms - 1 == pytest.approx(off, abs=0.001)


def test_a_file_keeps_a_model(tmp_path):
    path = tmp_path / "cost.json"
    SMALL.save(path)
    assert CostModel.load(path) == SMALL
    assert choose_cost(str(path)) == (SMALL, "asked for")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a cost model"),
        ("[]", "is not a cost model saved by this version"),
        ('{"lplb_ep_cost": 2}', "is not a cost model saved by this version"),
        ({"tile": 0}, r"tile of a cost model must be whole numbers in \[1, 2147483647\]; got 0"),
        ({"steps": [2, 1]}, "steps of a cost model must not decrease"),
        ({"steps": []}, "must have 1 to 128 steps; got 0"),
        ({"steps": [1.5]}, "steps of a cost model must be whole numbers .* got 1.5"),
        ({"steps": 5}, "steps of a cost model must be a list; got 5"),
        ({"name": ["x"]}, r"name of a cost model must be a string; got \['x'\]"),
        ({"about": None}, "about of a cost model must be a string; got None"),
        ({"slope": -1}, "slope of a cost model must be whole numbers"),
        ({"fixed": None}, "fixed of a cost model must be whole numbers"),
        ({"speed": 1}, "a cost model has no field 'speed'"),
        ({"self": 1}, "a cost model has no field 'self'"),
        ('{"lplb_ep_cost": 1, "name": "x", "tile": 4}', "a cost model needs the field 'steps'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message):
    path = tmp_path / "cost.json"
    if isinstance(content, dict):
        good = {"lplb_ep_cost": 1, "name": "x", "tile": 4, "steps": [1, 2], "slope": 1}
        content = json.dumps({**good, **content})
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        CostModel.load(path)
    assert str(path) in str(error.value)


def test_the_built_in_table_serves_where_no_file_is_named():
    assert len(H200.steps) <= MAX_STEPS
    assert choose_cost("", "NVIDIA H200") == (H200, "measured on such a GPU")
    model, why = choose_cost("", "NVIDIA H100 80GB HBM3")
    assert model is H200
    assert "no table of NVIDIA H100 80GB HBM3 is built in" in why
    assert "of the CPU" in choose_cost()[1]
    with pytest.raises(FileNotFoundError):
        choose_cost("no_such_file.json")
