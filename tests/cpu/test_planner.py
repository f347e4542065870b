import os
import re

import numpy as np
import oracle
import pytest
import ranks
import torch

import lplb_ep
from lplb_ep import Layer, Placement, Planner, RankError, check_plan
from lplb_ep.comm.exchange import LocalExchange
from lplb_ep.planning import error_flags, planner, solvers
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.plan import Plan, Status
from lplb_ep.planning.structs import NUM_ERROR_FLAGS


def batch(rng, placement, num_tokens, num_topk, dtype=torch.int64, none=0.05):
    """[T, K] for each rank, with a taste that differs from rank to rank."""
    E = placement.num_experts
    topks = []
    for tokens in num_tokens:
        weight = rng.lognormal(0, 1.2, E)
        topks.append(torch.from_numpy(oracle.random_topk(rng, tokens, num_topk, weight, none)))
    return [t.to(dtype) for t in topks]


def plans_with_given_counts(placement, topks):
    counts = torch.stack([cpu.count(t, placement.num_experts) for t in topks])
    for rank, topk in enumerate(topks):
        planner = Planner(placement, rank=rank, counts="given")
        yield rank, topk, planner(topk, counts=counts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("R", [1, 2, 8, 16])
def test_plans_hold_their_invariants(R, dtype):
    rng = np.random.default_rng(R)
    for _ in range(12):
        node = int(rng.choice([n for n in (1, 2, 4, 8, 16) if R % n == 0]))
        placement = oracle.random_placement(
            rng, R, int(rng.integers(9, 70)), int(rng.integers(0, 4)), num_ranks_per_node=node
        )
        num_tokens = rng.integers(0, 60, R) * (rng.random(R) < 0.8)
        topks = batch(rng, placement, num_tokens, int(rng.integers(1, 9)), dtype)
        first = None
        for rank, topk, plan in plans_with_given_counts(placement, topks):
            check_plan(plan, topk, placement, rank)
            assert int(plan.status) == Status.OPTIMAL
            first = first or plan
            for field in ("counts", "quota", "split", "rank_load", "status"):
                assert torch.equal(getattr(plan, field), getattr(first, field)), field


@pytest.mark.parametrize(
    "topk",
    [torch.zeros(0, 4).long(), torch.full((5, 4), -1), torch.zeros(9, 1).int()],
    ids=["no tokens", "no picks", "top-1 of one expert"],
)
def test_thin_batches(topk):
    placement = Placement([0, 1, 2, 3, 0, 1], 2)
    for rank, own, plan in plans_with_given_counts(placement, [topk, topk[:3]]):
        check_plan(plan, own, placement, rank)


def test_plans_on_the_cpu_beside_a_gpu_are_warned_of_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(planner, "choose_solver", lambda *asked: ("cpu", "it is too large"))
    monkeypatch.setattr(planner, "solver_fact", lambda *asked: "cpu")
    solvers.log_on_cpu.cache_clear()
    for solver in ("auto", "auto", "cpu"):
        Planner(Placement([0, 1], 1), rank=0, counts="given", solver=solver)
    assert caplog.messages == [
        "lplb_ep: LPLB_EP_SOLVER=auto: plans are made on the CPU, and each batch waits for it: "
        "it is too large"
    ]


def test_the_split_prefers_own_rank_then_node_then_rank_order():
    # Expert 0 on ranks 0 and 3 of two nodes {0, 1}, {2, 3}; ten tokens each from all ranks.
    placement = Placement([0, 1, 2, 3, 4, 5, 0, 6], 4, num_ranks_per_node=2)
    counts = torch.zeros(4, 7, dtype=torch.int32)
    counts[:, 0] = 10
    quota = torch.zeros(7, 2, dtype=torch.int32)
    quota[0] = torch.tensor([24, 16])
    shares = cpu.split(counts, quota, placement)[:, 0]
    # Rank 3 keeps its ten, and takes six of its neighbour; rank 0 takes its own node's twenty,
    # and then the rest.
    assert shares.tolist() == [[10, 0], [10, 0], [4, 6], [0, 10]]


def test_picks_go_to_copies_in_row_major_order():
    placement = Placement([0, 1, 0, 2], 2)
    topk = torch.tensor([[0, 1], [2, 0], [0, -1], [1, 0]])
    shares = torch.zeros(3, 2, dtype=torch.int32)
    shares[:, 0] = torch.tensor([3, 2, 1])
    shares[0] = torch.tensor([3, 1])
    assert cpu.rewrite(topk, shares, placement).tolist() == [[0, 1], [3, 0], [0, -1], [1, 2]]


def exchanged(group, placement, topks, **kwargs):
    planner = Planner(placement, group, **kwargs)
    topk = topks[group.rank()]
    plan = planner(topk)
    check_plan(plan, topk, placement, group.rank())
    again = planner(topk)
    assert torch.equal(plan.topk_idx, again.topk_idx)
    assert len(topk) == 0 or plan.topk_idx.data_ptr() != again.topk_idx.data_ptr()
    return plan


@pytest.mark.parametrize("R", [2, 8])
def test_exchanged_counts_give_the_plans_of_given_ones(R):
    rng = np.random.default_rng(R)
    placement = oracle.random_placement(rng, R, 40, 2)
    topks = batch(rng, placement, rng.integers(0, 50, R), 4)
    topks[-1] = topks[-1][:0]
    plans = ranks.run(R, exchanged, placement, topks)
    for (_, _, given), plan in zip(plans_with_given_counts(placement, topks), plans, strict=True):
        for field in ("topk_idx", "counts", "quota", "split", "rank_load", "status"):
            assert torch.equal(getattr(plan, field), getattr(given, field)), field


def test_one_rank_needs_no_group():
    placement = Placement([0, 1, 2, 0], 1)
    topk = torch.tensor([[0, 2], [1, -1]])
    check_plan(Planner(placement)(topk), topk, placement, 0)


def stale_on_one(group, placement, topks):
    planner = Planner(placement, group)
    topk = topks[group.rank()]
    plan = planner(topk, stale=group.rank() == 1)
    check_plan(plan, topk, placement, group.rank())
    assert torch.equal(plan.topk_idx, planner.home(topk))
    return int(plan.status), dict(planner.num_batches)


def test_one_stale_rank_sends_all_home():
    rng = np.random.default_rng(0)
    placement = oracle.random_placement(rng, 4, 20, 2)
    topks = batch(rng, placement, [9, 0, 30, 5], 3)
    expected = (Status.STALE, {Status.STALE: 1})
    assert ranks.run(4, stale_on_one, placement, topks) == [expected] * 4


def refused(group, placement, topks):
    Planner(placement, group)(topks[group.rank()])


def test_a_bad_batch_on_one_rank_raises_on_all():
    placement = Placement([0, 1, 2, 0], 2)
    topks = [torch.tensor([[0, 1]]), torch.tensor([[0, 3]])]
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, refused, placement, topks)
    (mine, peer), (theirs, own) = failure.value.errors
    assert mine == "RankError"
    assert "ranks [1] refused" in peer
    assert theirs == "ValueError"
    assert "topk_idx[0, 1] is 3; expected -1 or an expert in [0, 3)" in own


def differing(group):
    table = [0, 1, 2, 0] if group.rank() < 2 else [0, 1, 1, 2]
    Planner(Placement([*table, 0, 1, 2, 2], 4), group)


def test_differing_placements_are_named():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(4, differing)
    for kind, message in failure.value.errors:
        assert kind == "RankError"
        assert "ranks differ in placement: " in message
        assert " on ranks [0, 1]; " in message
        assert message.endswith(" on ranks [2, 3]")


def differing_planner(group, what):
    placement = Placement([0, 1, 2, 0], 2)
    odd = group.rank() == 1
    if what == "ranks":
        Planner(Placement([0, 1, 2, 0], 4) if odd else placement, group)
    elif what == "type":
        Planner([0, 1, 2, 0] if odd else placement, group)
    elif what == "counts":
        Planner(placement, group, counts="given" if odd else "auto")
    elif what == "slot":
        Planner(placement, group, slot=int(odd))
    elif what == "tensor":
        Planner(placement, group)(None if odd else torch.tensor([[0, 1]]))
    elif what == "stale":
        stale = torch.tensor([True, False]) if odd else False
        Planner(placement, group)(torch.tensor([[0, 1]]), stale=stale)
    else:
        planners = [Planner(placement, group) for _ in range(2)]
        planners[odd](torch.tensor([[0, 1]]))


@pytest.mark.parametrize(
    ("what", "peer", "own"),
    [
        ("ranks", "rank 1: group has 2 ranks", "group has 2 ranks, and the placement is for 4"),
        ("type", "rank 1: placement must be", "placement must be an lplb_ep.Placement; got a li"),
        ("counts", "differ in counts: auto on ranks [0]; given", "differ in counts"),
        ("slot", "differ in slot: 0 on ranks [0]; 1 on ranks [1]", "differ in slot"),
        ("tensor", "ranks [1] refused", "topk_idx must be a tensor, an array or lists of integers"),
        ("stale", "ranks [1] refused", "Boolean value of Tensor with more than one value"),
        ("order", "ranks [1] plan another batch", "ranks [0] plan another batch"),
    ],
)
def test_what_is_wrong_on_one_rank_is_named_on_all(what, peer, own):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, differing_planner, what)
    (_, theirs), (_, its) = failure.value.errors
    assert peer in theirs
    assert own in its


def failing_to_make_steps(group, make):
    """As where one rank has no memory left, or a kernel does not compile."""

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as patch:
        if group.rank() == 1:
            patch.setattr(planner, "HostBackend", fail)
        make(group)


def make_planner(group):
    Planner(TWO, group)


def make_channel(group):
    os.environ["LPLB_EP"] = "1"
    lplb_ep.Buffer(group).view(TWO, slot=99)  # which no other test on these ranks has made


@pytest.mark.parametrize("make", [make_planner, make_channel])
def test_a_rank_that_cannot_make_its_steps_says_so_to_all(make):
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, failing_to_make_steps, make)
    (peer, message), own = failure.value.errors
    assert peer == "RankError"
    assert "rank 1: out of memory" in message
    assert own == ("RuntimeError", "out of memory")


@pytest.fixture
def flags_of(monkeypatch):
    """The error flags of a planner whose GPU has set those that are `seen`."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)

    def make(*seen):
        flags = error_flags.ErrorFlags(TWO, 0, "moe.3", timeout_s=9, abort_on_timeout=False)
        flags.flags[list(seen)] = 1
        return flags

    return make


def test_what_the_gpu_finds_late_is_told_to_the_others_too(flags_of):
    """Their GPUs may lag behind: they plan one more batch, and wait for this rank's row."""
    rows = []

    class Recorder(LocalExchange):
        def gather(self, row):
            rows.append(row)
            return row[None]

    refusing = Planner(TWO, rank=0, counts="given")
    refusing.exchange = Recorder()
    refusing._backend.raise_errors = flags_of(Status.OUT_OF_STEP).raise_errors
    with pytest.raises(RankError, match="planned different batches"):
        refusing(torch.tensor([[0, 1]]))
    assert [int(row[0]) for row in rows] == [Status.REFUSED]


def test_of_several_faults_the_first_is_raised_and_all_are_logged(flags_of, caplog):
    flags = flags_of(*range(NUM_ERROR_FLAGS))
    with pytest.raises(ValueError, match=r"neither -1 nor an expert in \[0, 3\)"):
        flags.raise_errors()
    for message in (
        "STALE, some rank's replicas",
        "NOT_CONVERGED",
        "BAD_COUNTS",
        "INFEASIBLE, an expert's load",
        "picked an expert twice",
        "counts were not those of its topk_idx",
        "ranks [] sent no counts within 9 s",
        "ranks planned different batches",
        "a rank refused",
    ):
        assert caplog.text.count(message) == 1, message
    assert caplog.text.count("a batch of moe.3 goes to the home slots: ") == 4
    flags.raise_errors()  # once


def sent_home(group):
    said, layers = ranks.Said(), [Layer(TWO, name="moe.3"), Layer(TWO)]
    for layer in layers:
        planner = Planner(layer, group)
        for _ in range(2):
            planner(torch.tensor([[0, 1]]), stale=True)
    return said.lines, layers[1].label


def test_a_layer_that_goes_home_is_named_once_by_one_rank():
    (first, label), (second, _) = ranks.run(2, sent_home)
    assert re.fullmatch(r"layer \d+", label)
    said = [line.split(": STALE")[0] for line in first]
    goes = "goes to the home slots"
    assert said == [f"lplb_ep rank 0: a batch of {name} {goes}" for name in ("moe.3", label)]
    assert second == []


def out_of_step(group):
    planner = Planner(Placement([0, 1, 2, 0], 2), group)
    planner(torch.tensor([[0, 1]]))
    planner._backend._num_exchanges += (
        group.rank()
    )  # as if rank 1 had planned a batch that rank 0 did not
    planner(torch.tensor([[0, 1]]))


def test_batches_are_numbered():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, out_of_step)
    assert [kind for kind, _ in failure.value.errors] == ["RankError", "RankError"]


def test_every_batch_has_a_number():
    planner = Planner(Placement([0, 1, 2, 0], 1))
    for number in (1, 2, 3):
        planner(torch.tensor([[0, 1]]))
        assert planner._backend._num_exchanges == number


def numbers_of_batches(group):
    """Of planners on equal placements: made alone, and together after a rank has made one more."""
    placement = Placement.homes_only(4, 2, num_guests_per_rank=1)
    topk_idx = torch.tensor([[0], [1]])
    planners = [Planner(placement, group, compare=False) for _ in range(2)]
    if group.rank() == 1:
        Planner(placement, group, compare=False)
    planners += [Planner(placement, group) for _ in range(2)]
    Planner(placement, rank=group.rank(), counts="given")
    planners.append(Planner(placement, group, compare=False))
    return [int(one(topk_idx).number) for _ in range(2) for one in planners]


def test_no_two_batches_of_a_group_have_the_same_number():
    first, second = ranks.run(2, numbers_of_batches)
    assert first == second
    assert len({*first}) == len(first) == 10
    assert not any(number >> 24 & 255 for number in first)  # where uses of a number are counted
    placement = Placement.homes_only(4, 1, num_guests_per_rank=1)
    given = Planner(placement, rank=0, counts="given")
    assert given(torch.tensor([[0]]), torch.tensor([[1, 0, 0, 0]])).number is None


def refusing_out_of_step(group):
    planner = Planner(Placement([0, 1, 2, 0], 2), group)
    planner._backend._num_exchanges += group.rank()
    planner(torch.tensor([[0, 9 if group.rank() else 1]]))


def test_who_refuses_says_why_even_out_of_step():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, refusing_out_of_step)
    (peer, _), (own, its) = failure.value.errors
    assert (peer, own) == ("RankError", "ValueError")
    assert "topk_idx[0, 1] is 9" in its


def mixed_sizes(group):
    small = Planner(Placement([0, 1, 2, 0], 2), group)
    large = Planner(Placement(np.arange(900), 2), group)
    (large if group.rank() else small)(torch.tensor([[0, 1]]))


def test_layers_of_other_sizes_in_another_order_are_named():
    with pytest.raises(ranks.RanksFailedError) as failure:
        ranks.run(2, mixed_sizes)
    for kind, message in failure.value.errors:
        assert kind == "RankError"
        assert "plan another batch" in message


def test_a_batch_too_large_to_count_goes_home():
    class Full(LocalExchange):
        def gather(self, row):
            rows = torch.stack([row, row])
            rows[1, 5:7] = 2**30  # with this rank's picks, 2**31 + 2 tokens
            return rows

    planner = Planner(TWO, rank=0, counts="given")
    planner.exchange = Full()
    assert int(planner(torch.tensor([[0, 1]])).status) == Status.BAD_COUNTS


def test_counts_that_cannot_be_send_the_batch_home():
    class Broken(LocalExchange):
        def gather(self, row):
            return torch.stack([row, torch.where(torch.arange(len(row)) < 5, row, -5)])

    placement = Placement([0, 1, 2, 0], 2)
    planner = Planner(placement, rank=0, counts="given")
    planner.exchange, planner.counts = Broken(), "torch"
    topk = torch.tensor([[0, 2], [0, 1]])
    plan = planner(topk)
    assert int(plan.status) == Status.BAD_COUNTS
    assert torch.equal(plan.topk_idx, planner.home(topk))
    assert planner.num_batches == {Status.BAD_COUNTS: 1}
    check_plan(plan, topk, placement, 0)


TWO = Placement([0, 1, 2, 0], 2)


@pytest.mark.parametrize(
    ("topk", "counts", "message"),
    [
        (torch.zeros(3).long(), None, r"topk_idx must be \[T, K\] of int32 or int64; got \[3\]"),
        (torch.zeros(3, 2), None, "topk_idx must be integers; got torch.float32"),
        (
            torch.zeros(1, 1).int().expand(2**31, 1),
            None,
            "at most 2147467264 entries; got 21474836",
        ),
        (torch.tensor([[0, -2]]), None, r"topk_idx\[0, 1\] is -2"),
        (torch.tensor([[0, 1]]), torch.ones(2, 3), "counts must be integers; got torch.float32"),
        (torch.tensor([[0, 1]]), torch.ones(1, 3).int(), r"got \[1, 3\]"),
        (torch.tensor([[0, 1]]), torch.tensor([[1, 1, 0], [2**32 + 5, 0, 0]]), "got 4294967301"),
        (torch.tensor([[0, 1]]), torch.tensor([[1, 1, 0], [0, -1, 0]]), r"counts\[1, 1\] must be"),
        (torch.tensor([[0, 1]]), torch.tensor([[1, 2, 0], [0, 0, 0]]), r"counts\[0, 1\] is 2"),
    ],
)
def test_bad_batches_are_named(topk, counts, message):
    counts = torch.tensor([[1, 1, 0], [5, 0, 0]]) if counts is None else counts
    with pytest.raises(ValueError, match=message):
        Planner(TWO, rank=0, counts="given")(topk, counts=counts)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "rank must be given where there is no group"),
        ({"rank": 2}, r"rank must be in \[0, 2\); got 2"),
        ({"rank": 0}, "counts='auto' needs a group"),
        ({"rank": 0, "counts": "nvlink"}, "counts must be one of auto, nvshmem, ipc, torch, given"),
        ({"rank": 0, "counts": "given", "solver": "x"}, "solver must be one of auto, cpu, flow"),
        ({"rank": 0, "sample_every": -1}, r"sample_every must be a whole number in \[0, 2\*\*31\)"),
        ({"rank": 0, "mark_every": "4"}, r"mark_every must be a whole number .*; got '4'"),
        *(
            (
                {"rank": 0, "timeout_s": seconds},
                r"timeout_s must be a number of seconds, more than 0 and less than 2\*\*31; got ",
            )
            for seconds in (0, 2**31, "1")
        ),
    ],
)
def test_bad_planners_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Planner(TWO, **kwargs)


def test_counts_are_passed_when_and_only_when_given():
    topk = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="'given': pass counts="):
        Planner(TWO, rank=0, counts="given")(topk)
    one = Placement([0, 1, 2, 0], 1)
    with pytest.raises(ValueError, match="'local': counts= must not be passed"):
        Planner(one)(topk, counts=torch.tensor([[1, 1, 0]]))


def test_check_plan_can_fail():
    def changed(topk_idx=None, split=None, **results):
        whole = plan._results._replace(**results)
        topk_idx = plan.topk_idx if topk_idx is None else topk_idx
        return Plan(topk_idx, lambda: whole, split or plan._split, plan._judge)

    topk = torch.tensor([[0, 1], [0, 2]])
    counts = torch.tensor([[2, 1, 1], [3, 0, 0]])
    plan = Planner(TWO, rank=0, counts="given")(topk, counts=counts)
    check_plan(plan, topk, TWO, 0)
    lost = plan.topk_idx.clone()
    lost[0, 0] = -1
    misrouted = plan.topk_idx.clone()
    misrouted[0, 1] = 0
    uneven = plan.quota.clone()
    uneven[0] = torch.tensor([5, 0])
    for change, message in [
        ({"topk_idx": lost}, "-1 was not kept"),
        ({"topk_idx": misrouted}, "slot of another expert"),
        ({"split": lambda *_: plan.split * 2}, "split does not sum to the quotas"),
        ({"rank_load": plan.rank_load + 1}, "rank_load"),
    ]:
        with pytest.raises(AssertionError, match=message):
            check_plan(changed(**change), topk, TWO, 0)
    home = changed(
        quota=uneven,
        rank_load=torch.tensor([6, 1]).int(),
        topk_idx=torch.tensor([[0, 1], [0, 2]]),
    )
    with pytest.raises(AssertionError, match="the largest rank load is 6"):
        check_plan(home, topk, TWO, 0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int64])
def test_picks_and_counts_may_be_arrays_or_lists_of_any_integers(dtype):
    picks, counts = [[0, 1], [0, 2], [0, 1]], [[3, 2, 1], [9, 0, 4]]
    planner = Planner(TWO, rank=0, counts="given")
    expected = planner(torch.tensor(picks), torch.tensor(counts))
    array, other = np.array(picks, dtype), np.array(counts, dtype)
    for given in ((array, other), (torch.from_numpy(array), torch.from_numpy(other))):
        plan = planner(*given)
        assert plan.topk_idx.equal(expected.topk_idx)
        assert plan.topk_idx.dtype == torch.int64
    assert planner(picks, counts).topk_idx.equal(expected.topk_idx)
    assert planner(torch.tensor(picks).int(), counts).topk_idx.dtype == torch.int32


def test_a_plan_says_what_it_comes_to():
    planner = Planner(TWO, rank=0, counts="given")
    plan = planner(torch.tensor([[0, 1]]), torch.tensor([[1, 1, 0], [11, 0, 3]]))
    assert repr(plan) == "Plan(1 x 2 picks, OPTIMAL, imbalance 1.000, largest rank 8, bound 8)"
    idle = Planner(Placement([0, 1, 2, 0, -1, -1], 3), rank=0, counts="given")
    plan = idle([[0, 1]], [[1, 1, 0], [11, 0, 3], [0, 0, 0]])
    assert "imbalance 1.000" in repr(plan), "of the ranks that take part"
    home = planner([[0, 1]], [[1, 1, 0], [11, 0, 3]], stale=True)
    assert "STALE, imbalance 1.625" in repr(home)
    assert repr(planner(np.zeros((0, 2), int), np.zeros((2, 3), int))).startswith(
        "Plan(0 x 2 picks"
    )
    guests = Planner(Placement.homes_only(4, 2, 1), rank=0, counts="given", guest_min_tokens=1)
    assert ", 1 guests)" in repr(guests([[0], [1]], [[1, 1, 0, 0], [39, 9, 0, 0]]))
