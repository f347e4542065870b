"""What bounds plans beside the counts: base loads, speeds and limits, in planners and buffers."""

import numpy as np
import oracle
import pytest
import ranks
import torch

import lplb_ep
from lplb_ep import InfeasibleError, Layer, Placement, Planner, Problem, check_plan
from lplb_ep.planning import reference
from lplb_ep.planning.plan import Status

PAIR = Placement([0, 1, 2, 0], 2)


def planned(layer, topks, **changes):
    """The plan of each rank, each checked against the layer's problem."""
    p = layer.placement
    counts = torch.stack([reference.count(t, p.num_experts) for t in topks])
    for rank, topk in enumerate(topks):
        planner = Planner(layer, rank=rank, counts="given", **changes)
        plan = planner(topk, counts=counts)
        check_plan(plan, topk, p, rank, layer.problem)
        yield plan


def test_base_loads_reach_the_planner():
    topks = [torch.tensor([[0]] * 6), torch.tensor([[0]] * 2)]
    plain = next(planned(Layer(PAIR), topks))
    assert plain.rank_load.tolist() == [4, 4]
    base = Problem(base_load=torch.tensor([5, 1]))
    for plan in planned(Layer(PAIR, base), topks, check=True):
        assert plan.rank_load.tolist() == [2, 6]  # 7 and 7 with the base loads


@pytest.mark.parametrize("seed", range(4))
def test_every_bound_is_kept_at_its_optimum(seed):
    rng = np.random.default_rng(seed)
    p = oracle.random_placement(rng, 8, 40, 2)
    topks = [
        torch.from_numpy(oracle.random_topk(rng, 200, 4, rng.lognormal(0, 1, 40))) for _ in range(8)
    ]
    load = sum(reference.count(t, 40) for t in topks)
    problem = Problem(
        base_load=torch.from_numpy(rng.integers(0, 300, 8)),
        speed=torch.from_numpy(rng.integers(1, 5, 8)),
        max_quota=load[:, None].expand(40, p.max_replicas) * 2 // 3 + 1,
    )
    statuses = [int(plan.status) for plan in planned(Layer(p, problem), topks)]
    several = (p.copy_rank >= 0).sum(1) > 1
    feasible = bool((problem.max_quota[~several, 0] >= load[~several]).all())
    assert statuses == [Status.OPTIMAL if feasible else Status.INFEASIBLE] * 8


def test_limits_that_do_not_suffice_send_a_batch_home():
    problem = Problem(max_quota=torch.tensor([[2, 2], [9, 0], [9, 0]]))
    fits, exceeds = torch.tensor([[0]] * 4), torch.tensor([[0]] * 5)
    none = torch.zeros(0, 1, dtype=torch.int64)
    assert next(planned(Layer(PAIR, problem), [fits, none])).quota[0].tolist() == [2, 2]
    plan = next(planned(Layer(PAIR, problem), [exceeds, none]))
    assert int(plan.status) == Status.INFEASIBLE
    assert plan.quota[0].tolist() == [5, 0]


def test_check_plan_finds_quotas_above_their_limits():
    topk, counts = torch.tensor([[0]] * 5 + [[1]]), torch.tensor([[5, 1, 0], [0, 0, 0]])
    plan = Planner(PAIR, rank=0, counts="given")(topk, counts=counts)
    assert plan.quota[0].tolist() == [2, 3]
    tight = Problem(max_quota=torch.tensor([[5, 2], [9, 0], [9, 0]]))
    with pytest.raises(AssertionError, match="a quota above its max_quota"):
        check_plan(plan, topk, PAIR, 0, tight)


@pytest.mark.parametrize(
    ("problem", "error", "message"),
    [
        (Problem(base_load=torch.tensor([1])), ValueError, r"base_load must have shape \[2\]"),
        (Problem(base_load="12"), TypeError, "base_load must be a tensor, an array or lists of"),
        (Problem(speed=torch.tensor([1, 0])), ValueError, r"speed must be in \[1, "),
        (Problem(objective="tiles"), ValueError, "objective must be one of tokens, experts, cost,"),
        (Problem(cost="h200"), TypeError, "cost must be a CostModel; got a str"),
        (
            Problem(objective="cost", speed=torch.tensor([1, 2])),
            ValueError,
            "the objective 'cost' does not go with speed: use 'tokens'",
        ),
        (
            Problem(objective="auto", max_quota=torch.ones(3, 2).long()),
            ValueError,
            "the objective 'auto' does not go with max_quota",
        ),
        (Problem(load=torch.tensor([1, 2, 3])), ValueError, "comes with each batch"),
        (
            Problem(load=torch.tensor([9, 0, 0]), max_quota=torch.ones(3, 2).int()),
            InfeasibleError,
            "expert 0 has 9 tokens",
        ),
    ],
)
def test_what_is_wrong_with_a_problem_is_named(problem, error, message):
    with pytest.raises(error, match=message):
        Layer(PAIR, problem)


def planning_differently(group):
    base = Problem(base_load=torch.tensor([group.rank(), 0]))
    Planner(Layer(PAIR, base), group)


def tagged_differently(group):
    base = Problem(base_load=torch.tensor([group.rank(), 0]))
    Planner(Layer(PAIR, base), group, compare=False)(torch.tensor([[0, 1]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [(planning_differently, "differ in problem"), (tagged_differently, "plan another batch")],
)
def test_ranks_with_other_problems_find_out(make, message):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, make)
    for kind, text in failure.value.errors:
        assert kind == "RankError"
        assert message in text


def balanced_with_base_loads(group):
    """The tokens that each rank gets through a buffer, its base load being 8 and 0."""
    layer = Layer(PAIR, Problem(base_load=torch.tensor([8, 0])))
    layer.mark_valid()
    view = lplb_ep.Buffer(group).view(layer)
    topk = torch.tensor([[0]] * 8)
    return view.get_dispatch_layout(topk, 3)[2].tolist()


def test_base_loads_reach_the_buffers():
    environ = {"LPLB_EP": "1", "LPLB_EP_BACKEND": "embedded"}
    assert ranks.run(2, balanced_with_base_loads, environ=environ) == [[4, 0, 0, 4], [0, 0, 0, 8]]


def test_a_layers_problem_is_fixed_since_planners_are_made_for_it():
    layer = Layer(PAIR)
    with pytest.raises(AttributeError):
        layer.problem = Problem(base_load=torch.tensor([8, 0]))
