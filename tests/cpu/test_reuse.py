"""Batches that go by the quotas of an earlier one: the definition, and what planners make of it."""

import functools

import numpy as np
import oracle
import pytest
import ranks
import refreshing
import torch

import lplb_ep
from lplb_ep import ContractError, Layer, Placement, Planner, Problem, check_plan
from lplb_ep.layer import layer_of
from lplb_ep.planning import reference as cpu
from lplb_ep.planning.plan import Status
from lplb_ep.planning.reuse import reuse
from lplb_ep.settings import Settings

RING = Placement([0, 1, 2, 3, 2, 0], 2, home=[0, 1, 4, 3])  # slots 2 and 5 are replicas
STEPS = refreshing.EVERY  # looks at every second boundary
EXCHANGED = (Status.OPTIMAL, Status.REUSED)


def test_a_copy_gets_its_exact_share_rounded_up_or_down():
    rng = np.random.default_rng(0)
    for most in (3, 50, 2**31 // 5):
        own = torch.from_numpy(rng.integers(0, most, 40))
        quota = torch.from_numpy(rng.integers(0, most, (40, 4)) * (rng.random((40, 4)) < 0.6))
        quota[7] = 0
        for rank in range(5):
            shares = reuse(own, quota, rank, 5).long()
            assert shares.sum(1).equal(own)
            assert shares[7].tolist() == [own[7], 0, 0, 0]
            assert (shares[quota == 0].nonzero().numel() == 0) or shares[7, 0] == own[7]
            for e in (e for e in range(40) if quota[e].sum()):
                total = int(quota[e].sum())
                for given, of_copy in zip(shares[e].tolist(), quota[e].tolist(), strict=True):
                    exact = int(own[e]) * of_copy
                    assert exact // total <= given <= -(-exact // total)


def test_ranks_together_meet_the_quotas_where_all_have_as_many_picks():
    """Also where each has one pick: none of them could split it."""
    rng = np.random.default_rng(1)
    for R in (1, 2, 5, 8, 64):
        for own in (1, 2, 7, 1000):
            quota = torch.from_numpy(rng.multinomial(R * own, [0.1, 0.0, 0.6, 0.3], 30))
            picks = torch.full((30,), own)
            assert sum(reuse(picks, quota, r, R).long() for r in range(R)).equal(quota)


def test_ranks_together_stay_within_a_pick_for_each_rank():
    """Of the exact share of all their picks, whatever each has; without a turn for each rank the
    same copies would get every rest."""
    rng, R = np.random.default_rng(2), 16
    quota = torch.from_numpy(rng.integers(1, 30, (50, 3)))
    own = torch.from_numpy(rng.integers(0, 3, (R, 50)))
    got = sum(reuse(own[r], quota, r, R).long() for r in range(R)).numpy()
    exact = own.sum(0).numpy()[:, None] * quota.numpy() / quota.sum(1, keepdim=True).numpy()
    alike = sum(reuse(own[r], quota, 0, R).long() for r in range(R)).numpy()
    assert abs(got - exact).mean() < 0.5 * abs(alike - exact).mean()


def batches(seed, num_batches, num_ranks, num_experts):
    """[T, K] of each batch and rank, of loads that drift."""
    rng = np.random.default_rng(seed)
    return [
        [
            torch.from_numpy(
                oracle.random_topk(
                    rng, int(rng.integers(0, 60)), 2, rng.lognormal(0, 1, num_experts)
                )
            )
            for _ in range(num_ranks)
        ]
        for _ in range(num_batches)
    ]


@torch.no_grad()
def plan_all(group, layer, many, every):
    """How each batch ends on this rank, and its slots; checked."""
    rank = group.rank()
    planner, exact = Planner(layer, group, every=every), Planner(layer, group)
    ends, quota = [], None
    for topks in many:
        topk, counts = topks[rank], exact(topks[rank])
        plan = planner(topk)
        check_plan(plan, topk, layer.placement, rank, layer.problem)
        status = Status(int(plan.status))
        if status is Status.REUSED:
            assert plan.quota.equal(quota)
            shares = reuse(cpu.count(topk, layer.placement.num_experts), quota, rank, group.size())
            assert plan.topk_idx.equal(cpu.rewrite(topk, shares, layer.placement))
        else:
            quota = plan.quota
            assert plan.topk_idx.equal(counts.topk_idx)
        held = torch.tensor(layer.placement.physical_to_logical)[plan.topk_idx.clamp(min=0)]
        assert torch.where(plan.topk_idx < 0, -1, held).equal(topk)
        ends.append(status)
    return ends, planner.num_batches, lplb_ep.metrics.layers.stats_of([layer])[0]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("R", [2, 4])
def test_one_in_so_many_batches_is_exchanged(R, every):
    rng = np.random.default_rng(R)
    placement = oracle.random_placement(rng, R, 12, 2)
    many = batches(R, 8, R, 12)
    expected = [EXCHANGED[n % every > 0] for n in range(8)]
    for ends, by_status, _ in ranks.run(R, plan_all, Layer(placement), many, every):
        assert ends == expected
        assert by_status[Status.REUSED] == expected.count(Status.REUSED)


def test_other_objectives_are_followed_too():
    rng = np.random.default_rng(5)
    layer = Layer(oracle.random_placement(rng, 2, 12, 2), Problem(objective="experts"))
    for ends, _, _ in ranks.run(2, plan_all, layer, batches(5, 4, 2, 12), 2):
        assert ends == [*EXCHANGED, *EXCHANGED]


def test_statistics_know_loads_of_exchanged_batches_alone():
    many = batches(3, 5, 2, 4)
    for _, _, stats in ranks.run(2, plan_all, Layer(RING), many, 2):
        # Those of the planner of every batch are among them.
        rows = [sum((topk >= 0).sum().item() for topk in topks) for topks in many]
        assert stats.rows == sum(rows) + sum(rows[::2])
        assert (stats.batches, stats.reused, stats.sent_home) == (10, 2, 0)
        assert "10 batches; 2 of them by earlier quotas, of unknown loads" in str(stats)
        assert "sent home" not in str(stats)


class Counted(lplb_ep.comm.exchange.LocalExchange):
    """Counts the exchanges of one rank among others whose rows are given."""

    def __init__(self, rows, fails=()):
        self.rows, self.fails, self.num_gathered = rows, fails, 0

    def gather(self, row):
        self.num_gathered += 1
        if self.num_gathered in self.fails:
            raise lplb_ep.RankError("a rank is missing")
        return self.rows(row)


def of_two(others, status=Status.OPTIMAL):
    """Rows of rank 0, as given, and rank 1 with these counts."""

    def rows(row):
        other = row.clone()
        other[0] = status
        other[-len(others) :] = 0
        other[5 : 5 + len(others)] = torch.tensor(others)
        return torch.stack([row, other])

    return rows


def on_rank_0(layer, exchange, every):
    made = functools.partial(Planner, layer, rank=0, solver="cpu")
    planner = made(counts="given")
    planner.exchange = exchange
    planner._every = planner._backend._every = every
    return planner


HOT = torch.tensor([[0, 1], [0, 2], [0, 3], [0, -1]])


@torch.no_grad()
def test_what_an_exchange_ends_with_holds_until_the_next():
    exchange = Counted(of_two([0, 0, 0, 0]))
    planner = on_rank_0(Layer(RING), exchange, 3)
    home, moved = planner.home(HOT), planner(HOT).topk_idx
    assert not moved.equal(home)
    # Twice as many picks of it, in the same proportion.
    twice = planner(torch.cat([HOT, HOT])).topk_idx
    assert (twice == 5).sum() == 2 * (moved == 5).sum() > 0
    planner(HOT)
    exchange.rows = of_two([0, 0, 0, 0], Status.STALE)
    for status in (Status.STALE, Status.REUSED, Status.REUSED):
        plan = planner(HOT)
        assert int(plan.status) == status
        assert plan.topk_idx.equal(home)
    exchange.rows = of_two([0, 0, 0, 0])
    assert planner(HOT).topk_idx.equal(moved)
    assert exchange.num_gathered == 3


@torch.no_grad()
def test_a_batch_that_fails_is_one_of_them():
    """So that ranks of which only some have seen it fail stay in step."""
    exchange = Counted(of_two([0, 0, 0, 0]), fails=[2])
    planner = on_rank_0(Layer(RING), exchange, 2)
    planner(HOT)
    with pytest.raises(ValueError, match="expected -1 or an expert"):
        planner(torch.tensor([[9]]))
    assert exchange.num_gathered == 1
    with pytest.raises(lplb_ep.RankError, match="missing"):
        planner(HOT)
    plan = planner(HOT)
    assert int(plan.status) == Status.REUSED
    assert plan.topk_idx.equal(planner.home(HOT))  # and not by the quotas before the failure
    assert int(planner(HOT).status) == Status.OPTIMAL
    assert exchange.num_gathered == 3


@torch.no_grad()
def test_other_replicas_are_followed_by_an_exchange():
    exchange = Counted(of_two([0, 0, 0, 0]))
    layer = Layer(RING)
    layer.is_refreshable = True
    planner = on_rank_0(layer, exchange, 4)
    planner(HOT)
    planner(HOT)
    moved = RING.with_copies([0, 1, 3, 3, 2, 1])
    planner.prepare(moved)()
    layer.replace(moved)
    ends = [Status(int(planner(HOT).status)) for _ in range(5)]
    assert ends == [Status.OPTIMAL, *[Status.REUSED] * 3, Status.OPTIMAL]


@torch.no_grad()
def through_a_refresh(group):
    """Outputs of a layer on this rank; its replicas move behind the fourth batch."""
    model, outputs = refreshing.Model(group, settings=STEPS, background=refreshing.Offered), []
    for number in range(6):
        if number == 4:
            assert model.offer(refreshing.moved())
        outputs.append(model.forward("old", number)[0])
    model.check_slots()
    (stats,) = lplb_ep.metrics.layers.stats_of([layer_of(model.placement)])
    return outputs, stats.by_status


def test_a_refresh_is_followed_by_an_exchange_on_every_rank():
    environ = {**refreshing.ON, "LPLB_EP_REPLICAS": "valid"}
    exact = ranks.run(refreshing.R, through_a_refresh, environ=environ)
    reused = ranks.run(refreshing.R, through_a_refresh, environ={**environ, "LPLB_EP_EVERY": "3"})
    for (expected, every), (outputs, by_status) in zip(exact, reused, strict=True):
        assert every == {"OPTIMAL": 6}
        assert by_status == {"OPTIMAL": 3, "REUSED": 3}  # the fifth is not the fourth's
        assert all(map(torch.allclose, outputs, expected))


@torch.no_grad()
def test_loads_of_exchanged_batches_are_recorded():
    """Also where a refresh begins anew in the middle."""
    exchange, layer = Counted(of_two([0, 0, 0, 0])), Layer(RING)
    layer.is_refreshable = True
    planner = on_rank_0(layer, exchange, 3)
    planner.statistics._every = 2
    for n in range(12):
        if n == 5:
            planner.prepare(RING.with_copies([0, 1, 3, 3, 2, 1]))()
            layer.replace(planner.placement)
        exchange.rows = of_two([n, 0, 0, 0])
        planner(HOT)
    # Exchanged are 0 and 3, then 5, 8 and 11.
    samples = planner.statistics.take_samples(all_done=True)
    assert {before: int(load[0]) for before, load in samples.items()} == {0: 4, 2: 9, 4: 15}


def test_what_it_does_not_go_with_is_refused():
    for layer, arguments, named in (
        (Layer(Placement.homes_only(4, 2, num_guests_per_rank=1)), {}, "guest slots"),
        (Layer(RING, Problem(max_quota=torch.full((4, 2), 9))), {}, "max_quota"),
        (Layer(RING), {"one_launch": 9}, "one_launch"),
        (Layer(RING), {"counts": "given"}, "counts that are given"),
    ):
        with pytest.raises(ValueError, match=rf"every \(LPLB_EP_EVERY\) does not go with.*{named}"):
            Planner(layer, rank=0, every=2, **arguments)
    for wrong in (0, 2**31, 1.5):
        with pytest.raises(ValueError, match="every must be a whole number"):
            Planner(RING, rank=0, counts="given", every=wrong)
    with pytest.raises(ValueError, match="LPLB_EP_EVERY=2 needs LPLB_EP_REPLICAS=valid"):
        Settings(mode="1", every=2)
    Settings(mode="0", every=2)
    Settings(mode="1", every=2, replicas="valid")
    planner = on_rank_0(Layer(RING), Counted(of_two([0, 0, 0, 0])), 2)
    with pytest.raises(ContractError, match="LPLB_EP_EVERY above 1 is for inference"):
        planner(HOT)
    with torch.inference_mode(), pytest.raises(ContractError, match="replicas are stale"):
        planner(HOT, stale=True)


def of_other_number(group, placement):
    with torch.no_grad():
        planner = Planner(placement, group, every=2 + group.rank(), compare=False)
        planner(torch.tensor([[0, 1]]))


def test_ranks_that_exchange_at_other_times_are_found():
    for compare in (False, True):
        with pytest.raises(ranks.RanksFailedError) as failed:
            ranks.run(2, of_other_number if not compare else compared, RING)
        assert {name for name, _ in failed.value.errors} == {"RankError"}


def compared(group, placement):
    Planner(placement, group, every=2 + group.rank())


@torch.no_grad()
def through_a_buffer(group, placement, many):
    """Rows and outputs of a layer on embedded buffers, with exchanges and without."""
    local = placement.num_local_slots
    buffer = lplb_ep.Buffer(group, placement=placement, num_local_slots=local)
    weight = 1.0 + torch.arange(placement.num_experts)
    held = torch.tensor(placement.physical_to_logical).view(placement.num_ranks, -1)[group.rank()]
    outputs = []
    for topks in many:
        topk = topks[group.rank()]
        x = torch.arange(len(topk) * 8).view(-1, 8).bfloat16() % 7
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(
            topk, placement.num_experts
        )
        got, ids, probs, _, handle, _ = buffer.dispatch(
            x,
            topk_idx=topk,
            topk_weights=torch.ones(topk.shape),
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        scale = torch.where(ids < 0, 0.0, weight[held[ids.clamp(min=0)]] * probs)
        combined, _, _ = buffer.combine((got * scale.sum(1, keepdim=True)).bfloat16(), handle)
        outputs.append((x, topk, combined, len(got)))
    right = []
    for x, topk, combined, _ in outputs:
        expected = x.float() * (weight[topk.clamp(min=0)] * (topk >= 0)).sum(1, keepdim=True)
        right.append(torch.allclose(combined.float(), expected))
    (stats,) = lplb_ep.metrics.layers.stats_of([layer_of(placement)])
    return right, stats.by_status


@pytest.mark.parametrize("R", [2, 4])
def test_results_of_a_buffer_are_those_of_home(R):
    placement = oracle.random_placement(np.random.default_rng(R), R, 12, 2)
    environ = {"LPLB_EP": "1", "LPLB_EP_EVERY": "3", "LPLB_EP_REPLICAS": "valid"}
    environ["LPLB_EP_BACKEND"] = "embedded"
    for right, by_status in ranks.run(
        R, through_a_buffer, placement, batches(R, 7, R, 12), environ=environ
    ):
        assert right == [True] * 7
        assert by_status == {"OPTIMAL": 3, "REUSED": 4}
