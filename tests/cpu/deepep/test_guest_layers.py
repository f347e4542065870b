"""MoE layers whose batches take guests: the drop-ins over embedded buffers, on gloo ranks."""

from __future__ import annotations

import os
import re
import unittest.mock

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from refreshing import Offered
from torch import nn
from torch.utils.checkpoint import checkpoint

import lplb_ep
from lplb_ep import (
    ContractError,
    GuestPool,
    Guests,
    Layer,
    Placement,
    Problem,
    RankError,
    Refresher,
    Replicas,
    Settings,
)
from lplb_ep.weights import refresh
from lplb_ep.weights.proposals import Proposal

E, G, HIDDEN, WIDTH, T, K = 8, 2, 8, 16, 24, 2
RULE = Problem(guest_tolerance=0.0, guest_min_tokens=1)


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, topk_idx, buffer):
        ctx.buffer = buffer
        if hasattr(buffer, "get_dispatch_layout"):
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, E)
            got_x, slots, got_weights, _, ctx.handle, _ = buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=weights,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
            )
        else:
            got_x, slots, got_weights, ctx.handle, _ = buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=weights,
                num_experts=E,
                num_max_tokens_per_rank=T,
                async_with_compute_stream=True,
            )
        ctx.mark_non_differentiable(slots)
        return got_x, got_weights, slots, ctx.handle

    @staticmethod
    def backward(ctx, grad_x, grad_weights, *_):
        out = ctx.buffer.combine(
            grad_x.contiguous(), ctx.handle, topk_weights=grad_weights.contiguous()
        )
        return out[0], out[1], None, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, handle, buffer):
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(x, handle)[0]

    @staticmethod
    def backward(ctx, grad):
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None


class Experts(nn.Module):
    """Stacked, with a bias."""

    def __init__(self, num_slots: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape):
            return nn.Parameter(torch.randn(num_slots, *shape, generator=generator).to(dtype))

        self.w1, self.b1, self.w2 = weight(HIDDEN, WIDTH), weight(WIDTH), weight(WIDTH, HIDDEN)


class MoE(nn.Module):
    def __init__(self, group, placement, kind, seed=0, pool=None, dtype=torch.float64, **options):
        super().__init__()
        self.layer = Layer(placement, RULE)
        self.experts = Experts(placement.num_resident_slots, 10 * seed + group.rank(), dtype)
        self.guests = Guests(self.experts, self.layer, group, pool, **options)
        self.by_mode = {}
        for mode in ("home", "1"):
            with unittest.mock.patch.dict(os.environ, LPLB_EP=mode):
                if kind == "elastic":
                    buffer = lplb_ep.ElasticBuffer(group, num_bytes=1 << 21)
                else:
                    buffer = lplb_ep.Buffer(group, 1 << 20)
            self.by_mode[mode] = buffer.view(self.layer)
        self.mode = "1"
        self.inside = None
        self.received = []

    def compute(self, x, picks, weights):
        x, by_name = self.guests.weights(x)
        out = x * 0
        for slot in range(self.layer.placement.num_local_slots):
            row, column = torch.nonzero(picks == slot, as_tuple=True)
            if len(row):
                guest = slot - self.layer.placement.num_resident_slots
                w1, b1, w2 = (
                    by_name[name][guest >= 0][guest if guest >= 0 else slot]
                    for name in ("w1", "b1", "w2")
                )
                y = torch.tanh(x[row] @ w1 + b1) @ w2
                out = out.index_add(0, row, y * weights[row, column, None])
        return out

    def forward(self, x, weights, topk_idx):
        buffer = self.by_mode[self.mode]
        got, got_weights, slots, handle = Dispatch.apply(x, weights, topk_idx, buffer)
        self.received.append(int((slots >= 0).sum()))
        if self.inside is None:
            out = self.compute(got, slots, got_weights)
        else:
            out = checkpoint(
                self.compute, got, slots, got_weights, use_reentrant=self.inside == "reentrant"
            )
        return Combine.apply(out, handle, buffer)


def batch_of(rank: int, number: int, dtype: torch.dtype = torch.float64):
    """Most picks are of the first rank's experts; of the next batch's, of the last rank's."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    odds = torch.tensor([8.0, 8.0, 2, 2, 1, 1, 1, 1])
    odds = odds if number % 2 == 0 else odds.flip(0)
    topk_idx = torch.multinomial(odds.expand(T, E), K, generator=generator)
    x = torch.randn(T, HIDDEN, generator=generator).to(dtype)
    weights = torch.rand(T, K, generator=generator).to(dtype)
    return x.requires_grad_(), weights.requires_grad_(), topk_idx


def run_steps(layers, group, numbers, outside=False):
    """The layers one after another, several batches; leaves and returns all gradients."""
    for layer in layers:
        layer.zero_grad()
    gradients, losses = [], []
    for number in numbers:
        x, weights, topk_idx = batch_of(group.rank(), number)
        h = x
        for layer in layers:
            h = h + (
                checkpoint(layer, h, weights, topk_idx, use_reentrant=False)
                if outside
                else layer(h, weights, topk_idx)
            )
        loss = h.pow(2).sum()
        loss.backward()
        gradients += [x.grad, weights.grad]
        losses.append(loss.detach())
    gradients += [p.grad.clone() for layer in layers for p in layer.experts.parameters()]
    return losses + gradients


def largest_load(layers, group) -> int:
    loads = torch.tensor([sum(layer.received) for layer in layers])
    dist.all_reduce(loads, op=dist.ReduceOp.MAX, group=group)
    for layer in layers:
        layer.received.clear()
    return int(loads.max())


def set_mode(layers, mode):
    for layer in layers:
        layer.mode = mode


def assert_close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(1.0, float(b.abs().max()))


INSIDE = {"inside": "plain", "inside, reentrant": "reentrant", "outside and inside": "plain"}


def train(group, kind, checkpointing):
    placement = Placement.homes_only(E, group.size(), G)
    first = MoE(group, placement, kind)
    layers = [first]
    pool = GuestPool(group, G, first.experts)
    layers = [MoE(group, Placement.homes_only(E, group.size(), G), kind, s, pool) for s in (1, 2)]
    for layer in layers:
        layer.inside = INSIDE.get(checkpointing)
    set_mode(layers, "home")
    want = run_steps(layers, group, range(3))
    at_home = largest_load(layers, group)
    set_mode(layers, "1")
    got = run_steps(layers, group, range(3), outside="outside" in checkpointing)
    assert_close(got, want)
    balanced = largest_load(layers, group)
    if checkpointing == "":
        assert balanced <= 3 * T * K + 3 < at_home  # the mean, and whole tokens
    return balanced


@pytest.mark.parametrize("kind", ["legacy", "elastic"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_training_with_guests_equals_training_at_home(num_ranks, kind):
    ranks.run(num_ranks, train, kind, "")


@pytest.mark.parametrize("checkpointing", [*INSIDE, "outside"])
def test_so_it_does_with_activation_checkpointing(checkpointing):
    ranks.run(2, train, "legacy", checkpointing)


class Block(nn.Module):
    """Layers one after another, and perhaps something behind them that keeps its input."""

    def __init__(self, layers, squashes):
        super().__init__()
        self.layers, self.squashes = nn.ModuleList(layers), squashes

    def forward(self, x, weights, topk_idx):
        for layer in self.layers:
            x = x + layer(x, weights, topk_idx)
        return x.tanh() if self.squashes else x


def checkpoint_blocks(group, reentrant, squashes):
    """One checkpoint for several layers: all of them plan again before the last runs backward."""
    placements = [Placement.homes_only(E, group.size(), G) for _ in range(2)]
    first = MoE(group, placements[0], "legacy")
    (pool,) = first.guests._pools.values()
    layers = [first, MoE(group, placements[1], "legacy", 1, pool)]
    block = Block(layers, squashes)

    def run(mode, recomputes):
        set_mode(layers, mode)
        block.zero_grad()
        gradients = []
        for number in range(2):
            given = batch_of(group.rank(), number)
            if recomputes:
                out = checkpoint(block, *given, use_reentrant=reentrant)
            else:
                out = block(*given)
            out.pow(2).sum().backward()
            gradients += [given[0].grad, given[1].grad]
        return gradients + [p.grad.clone() for p in block.parameters()]

    assert_close(run("1", recomputes=True), run("home", recomputes=False))


@pytest.mark.parametrize("squashes", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_may_be_around_several_layers(reentrant, squashes):
    ranks.run(2, checkpoint_blocks, reentrant, squashes)


def no_rows(group, mode):
    """The last rank gets no rows, so its experts save nothing that would make it recompute."""
    layers = [MoE(group, Placement.homes_only(E, group.size(), G), "legacy", s) for s in (0, 1)]
    set_mode(layers, mode)
    x, weights, topk_idx = batch_of(group.rank(), 0)
    topk_idx.fill_(-1)
    if group.rank() == 0:
        topk_idx[0, 0] = 0
    h = x
    for layer in layers:
        h = checkpoint(
            lambda h, one: h.tanh() + one(h, weights, topk_idx), h, layer, use_reentrant=False
        )
    h.sum().backward()
    # Forward and again.
    assert [len(layer.received) for layer in layers] == [2, 2]
    return sum(sum(layer.received) for layer in layers)


@pytest.mark.parametrize("mode", ["home", "1"])
def test_a_rank_without_rows_recomputes_as_the_others_do(mode):
    environ = {"LPLB_EP_TIMEOUT_S": "5"}
    assert ranks.run(2, no_rows, mode, environ=environ, timeout=60) == [4, 0]


CHECKPOINTS = ("none", "layer", "layer, reentrant", "two layers", "two layers, reentrant")


class Schedule:
    """Steps of training, drawn at random: the same on all ranks."""

    def __init__(self, seed, num_layers):
        draw = np.random.default_rng(seed)
        self.blocks, self.inside = [], []
        """By block how many layers, the checkpoint around them, and whether it keeps their output.
        By layer the checkpoint inside."""
        while len(self.inside) < num_layers:
            around = str(draw.choice(CHECKPOINTS))
            size = min(2 if "two" in around else 1, num_layers - len(self.inside))
            self.blocks.append((size, around, bool(draw.integers(2))))
            # Torch has no reentrant one in a reentrant one.
            kinds = [None, "plain"] if "reentrant" in around else [None, "plain", "reentrant"]
            self.inside += draw.choice(kinds, size).tolist()
        num_batches = int(draw.integers(1, 5))
        self.modes = draw.choice(["1", "1", "1", "home"], num_batches)
        self.tokens = draw.choice(
            ["random", "random", "one expert", "some ranks", "none"], num_batches
        )
        self.order = []
        """(forward, backward or evaluate, number of the batch)"""
        begun, in_flight = 0, []
        while begun < num_batches or in_flight:
            what = draw.random()
            if what < 0.2:
                self.order.append(("evaluate", int(draw.integers(num_batches))))
            elif begun < num_batches and (what < 0.6 or not in_flight):
                self.order.append(("forward", begun))
                in_flight.append(begun)
                begun += 1
            elif in_flight:
                number = in_flight.pop(int(draw.integers(len(in_flight))))
                self.order.append(("backward", number))

    def batch(self, rank, number):
        x, weights, topk_idx = batch_of(rank, number)
        how = self.tokens[number]
        if how == "one expert":
            topk_idx[:, 0], topk_idx[:, 1] = 0, -1
        if how == "none" or (how == "some ranks" and rank % 2):
            x, weights, topk_idx = (t.detach()[:0] for t in (x, weights, topk_idx))
        return x.requires_grad_(), weights.requires_grad_(), topk_idx

    def run(self, layers, given):
        x, weights, topk_idx = given
        begin = 0
        for size, how, squashes in self.blocks:
            block = Block(layers[begin : begin + size], squashes)
            begin += size
            if how == "none" or not torch.is_grad_enabled():
                x = block(x, weights, topk_idx)
            else:
                reentrant = "reentrant" in how
                x = checkpoint(block, x, weights, topk_idx, use_reentrant=reentrant)
        return x

    def play(self, layers, rank, is_balanced):
        """Values without gradients, and all gradients."""
        outs, leaves, values = {}, [], []
        for layer, inside in zip(layers, self.inside, strict=True):
            layer.zero_grad()
            layer.inside = inside
        for what, number in self.order:
            set_mode(layers, self.modes[number] if is_balanced else "home")
            if what == "backward":
                outs.pop(number).backward()
            elif what == "evaluate":
                for layer in layers:
                    layer.inside = None
                with torch.no_grad():
                    values.append(self.run(layers, self.batch(rank, number)))
                for layer, inside in zip(layers, self.inside, strict=True):
                    layer.inside = inside
            else:
                given = self.batch(rank, number)
                leaves += given[:2]
                outs[number] = self.run(layers, given).pow(2).sum()
        leaves += [p for layer in layers for p in layer.experts.parameters()]
        return values + [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in leaves]


def any_schedule(group, kind, seeds):
    first = MoE(group, Placement.homes_only(E, group.size(), G), kind)
    (pool,) = first.guests._pools.values()
    layers = [first]
    for seed in (1, 2):
        placement = Placement.homes_only(E, group.size(), G)
        layers.append(MoE(group, placement, kind, seed, pool, layer_waits=seed == 1))
    optimizer = torch.optim.AdamW([p for one in layers for p in one.experts.parameters()])
    for seed in seeds:
        schedule = Schedule(seed, len(layers))
        want, got = (schedule.play(layers, group.rank(), balanced) for balanced in (False, True))
        for a, b in zip(got, want, strict=True):
            assert not b.numel() or (a - b).abs().max() <= 1e-9 * max(1.0, float(b.abs().max()))
        optimizer.step()


@pytest.mark.parametrize(("kind", "seeds"), [("legacy", [6, 8, 12, 15]), ("elastic", range(4))])
def test_any_schedule_of_micro_batches_and_checkpoints_equals_that_at_home(kind, seeds):
    ranks.run(2, any_schedule, kind, seeds, environ={"LPLB_EP_TIMEOUT_S": "20"})


def interleave(group):
    """Micro-batches of a pipeline: forward 0, forward 1, backward 0, forward 2, backward 1, 2."""
    layer = MoE(group, Placement.homes_only(E, group.size(), G), "legacy")

    def run(mode):
        set_mode([layer], mode)
        layer.zero_grad()
        outs = {}

        def forward(number):
            x, weights, topk_idx = batch_of(group.rank(), number)
            outs[number] = layer(x, weights, topk_idx).pow(2).sum()

        forward(0), forward(1), outs.pop(0).backward()
        forward(2), outs.pop(1).backward(), outs.pop(2).backward()
        return [p.grad.clone() for p in layer.experts.parameters()]

    want = run("home")
    assert_close(run("1"), want)
    sent = layer.guests._pools[0].transport
    with unittest.mock.patch.object(sent, "push", wraps=sent.push) as push:
        run("1")
    return push.call_count


def test_micro_batches_may_be_interleaved():
    # Each is pushed again: another one came between.
    assert ranks.run(2, interleave) == [6, 6]


def numbered(group):
    """Two layers on one pool, two batches: what moves for a batch has its number."""
    placements = [Placement.homes_only(E, group.size(), G) for _ in range(2)]
    first = MoE(group, placements[0], "legacy")
    (pool,) = first.guests._pools.values()
    layers = [first, MoE(group, placements[1], "legacy", 1, pool)]
    calls = []
    for name in ("push", "barrier", "reduce"):
        call = getattr(pool.transport, name)

        def record(*given, call=call, name=name):
            calls.append((name, int(given[-1].tensor)))
            return call(*given)

        setattr(pool.transport, name, record)
    run_steps(layers, group, range(2))
    return calls


def test_what_moves_for_a_batch_has_its_number():
    first, second = ranks.run(2, numbered)
    assert first == second
    back = ["reduce", "barrier", "push", "reduce"]
    assert [name for name, _ in first] == ["push", "push", *back] * 2
    a, b, c, d = (number for name, number in first if name == "reduce")
    assert [number for _, number in first] == [b, a, a, b, b, b, d, c, c, d, d, d]
    assert len({a, b, c, d}) == 4


def low_latency(group, hook):
    rank, R, width = group.rank(), group.size(), 128
    placement = Placement.homes_only(E, R, G)
    layer = Layer(placement, RULE)
    experts = nn.ParameterDict({"scale": nn.Parameter(torch.arange(E).view(R, -1)[rank] + 1.0)})
    guests = Guests(experts, layer, group)
    _, weights, topk_idx = batch_of(rank, 0)
    x, weights = torch.randn(T, width, dtype=torch.float32), weights.detach().float()
    L = placement.num_local_slots
    with unittest.mock.patch.dict(os.environ, LPLB_EP="1"):
        size = lplb_ep.Buffer.get_low_latency_rdma_size_hint(T, width, R, L * R)
        buffer = lplb_ep.Buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=L)
        buffer = buffer.view(layer)
    arrived = []
    transport = guests._pools[0].transport
    transport.wait = lambda: arrived.append(0)
    counts = []
    for _ in range(3):
        arrived.clear()
        recv, count, handle, _, arrive = buffer.low_latency_dispatch(
            x, topk_idx, T, E, use_fp8=False, return_recv_hook=hook
        )
        assert bool(arrived) is not hook
        if hook:
            arrive()
        assert arrived
        _, by_name = guests.weights(recv)
        scale = torch.cat(by_name["scale"])
        out, *_ = buffer.low_latency_combine(
            torch.nan_to_num(recv * scale[:, None, None]), topk_idx, weights, handle
        )
        want = (x[:, None] * (topk_idx + 1)[..., None] * weights[..., None]).sum(1)
        torch.testing.assert_close(out, want)
        counts.append(int(count.sum()))
    return counts[-1]


@pytest.mark.parametrize("hook", [False, True])
def test_low_latency_calls_take_guests(hook):
    loads = ranks.run(4, low_latency, hook)
    assert max(loads) - min(loads) <= 1


def static_and_guests(group):
    """A static replica on each rank beside the guest slots; replicas' gradients come home, too."""
    history = torch.tensor([8, 8, 2, 2, 1, 1, 1, 1])
    placement = Placement.from_history(
        history, num_ranks=2, num_redundant_per_rank=1, num_guests_per_rank=G
    )
    layer = MoE(group, placement, "legacy")
    replicas = Replicas(layer.experts, layer.layer, group)
    home = torch.tensor(placement.home)
    local = home[home // placement.num_local_slots == group.rank()] % placement.num_local_slots

    def run(mode):
        set_mode([layer], mode)
        replicas.copy_weights()
        layer.zero_grad()
        for number in (0, 1):
            x, weights, topk_idx = batch_of(group.rank(), number)
            layer(x, weights, topk_idx).pow(2).sum().backward()
        replicas.reduce_gradients()
        return [p.grad[local] for p in layer.experts.parameters()]

    want = run("home")
    at_home = largest_load([layer], group)
    assert_close(run("1"), want)
    assert largest_load([layer], group) < at_home
    # Weights are stale now: all goes home, without guests.
    x, weights, topk_idx = batch_of(group.rank(), 0)
    layer(x, weights, topk_idx).sum().backward()
    (planner,) = (p for p in layer.layer.planners if p.counts != "given")
    return [status.name for status in planner.num_batches]


def test_guests_stand_beside_replicas():
    assert ranks.run(2, static_and_guests) == [["OPTIMAL", "STALE"]] * 2


def no_guests_any_more(group):
    """On one rank they end between forward and backward, and for good."""
    layer = MoE(group, Placement.homes_only(E, 2, G), "legacy")
    want = run_steps([layer], group, [0])
    x, weights, topk_idx = batch_of(group.rank(), 0)
    out = layer(x, weights, topk_idx).pow(2).sum()
    if group.rank() == 1:
        layer.experts.half()  # cast: no guests from here
        layer.experts.double()
        layer.experts.w1.data = layer.experts.w1.data[:, :4].clone()
    out = None
    del out
    (planner,) = (p for p in layer.layer.planners if p.counts != "given")
    layer.by_mode["1"].get_dispatch_layout(topk_idx, E)
    batches = planner.num_batches
    assert {s.name: n for s, n in batches.items()} == {"OPTIMAL": 2, "STALE": 1}
    return len(want)


def test_one_rank_whose_weights_cannot_be_pushed_sends_all_home():
    ranks.run(2, no_guests_any_more)


def in_flight(group):
    layer = MoE(group, Placement.homes_only(E, 2, G), "legacy")
    buffer = layer.by_mode["1"]
    _, _, topk_idx = batch_of(group.rank(), 0)
    layout = buffer.get_dispatch_layout(topk_idx, E)
    if group.rank() == 0:
        message = "is shared by batches in flight"
    else:
        layer.guests._pools[0].clear()  # this rank takes the batch for given up
        message = "ranks [0] refused"
    with pytest.raises((ContractError, RankError), match=re.escape(message)):
        buffer.get_dispatch_layout(topk_idx, E)
    del layout
    buffer.get_dispatch_layout(topk_idx, E)  # all are in step again


def test_batches_in_flight_on_one_pool_are_refused_on_all_ranks():
    ranks.run(2, in_flight)


def home_meanwhile(group):
    """A batch that goes home is dispatched before the experts of one with guests have run."""
    first = MoE(group, Placement.homes_only(E, 2, G), "legacy")
    pool = next(iter(first.guests._pools.values()))
    second = MoE(group, Placement.homes_only(E, 2, G), "legacy", 1, pool)
    x, weights, topk_idx = batch_of(group.rank(), 0)
    got = Dispatch.apply(x, weights, topk_idx, first.by_mode["1"])
    home = Dispatch.apply(x, weights, topk_idx, second.by_mode["home"])
    for layer, (rows, rows_weights, slots, _) in ((first, got), (second, home)):
        with pytest.raises(ContractError, match="is shared by batches in flight"):
            layer.compute(rows, slots, rows_weights)
    with pytest.raises(ContractError, match="is shared by batches in flight") as error:
        second.by_mode["1"].get_dispatch_layout(topk_idx, E)
    del error, got, rows, rows_weights, slots
    second.compute(home[0], home[2], home[1])


def test_a_batch_that_goes_home_does_not_take_the_place_of_one_in_flight():
    ranks.run(2, home_meanwhile)


def failed_backward(group):
    """A backward pass fails between the pushes and the experts. Autograd keeps its nodes."""
    layer = MoE(group, Placement.homes_only(E, 2, G), "legacy")
    for _ in range(2):
        x, weights, topk_idx = batch_of(group.rank(), 0)
        loss = layer(x, weights, topk_idx).pow(2).sum()
        with torch.no_grad():
            layer.experts.w1.mul_(1.0)
        with pytest.raises(RuntimeError, match="modified inplace"):
            loss.backward()
    for mode in ("home", "1"):
        layer.mode = mode
        layer(x, weights, topk_idx).pow(2).sum().backward()


def test_after_a_backward_pass_that_failed_other_batches_go_on():
    ranks.run(2, failed_backward)


def absent(group, again):
    """A rank does not come to a push, or to where ranks meet before one: the others name it."""
    group = dist.new_group()
    guests = Guests(
        Experts(2, group.rank(), torch.float64),
        Layer(Placement.homes_only(6, 3, 1)),
        group,
    )
    table = torch.tensor([[2], [0], [0]], dtype=torch.int32)
    aside = dist.new_group()
    stay = None
    if again:
        guests.prepare()
        stay = guests.push(table)
        guests.weights(torch.ones(1))
        guests.skip()  # another batch has used the pool
    if group.rank() == 2:
        dist.barrier(aside)
        return ""
    if not again:
        guests.prepare()
    with pytest.raises(RankError) as error:
        guests.push(table) if stay is None else guests.push_again(stay)
    dist.barrier(aside)
    return str(error.value)


@pytest.mark.parametrize("again", [False, True])
def test_a_rank_that_does_not_come_to_a_push_is_named(again):
    first, second, _ = ranks.run(3, absent, again, environ={"LPLB_EP_TIMEOUT_S": "2"}, timeout=60)
    said = "ranks [2] sent no weights or gradients within 2 s"
    assert said in first
    assert said in second


def other_homes(group, slots):
    """A program puts a placement in force that `Guests` were not made for."""
    layer = MoE(group, Placement.homes_only(E, 2, G), "legacy")
    x, weights, topk_idx = batch_of(group.rank(), 0)
    layer(x, weights, topk_idx).sum().backward()
    said = ranks.Said()
    homes = torch.arange(E).flip(0).view(2, -1)
    table = torch.cat([homes, torch.full((2, slots), -1)], dim=1)
    layer.layer.replace(Placement(table.flatten(), 2, num_guests_per_rank=slots))
    layer(x, weights, topk_idx).sum().backward()
    planners = [p for p in layer.layer.current_planners() if p.counts != "given"]
    return [status.name for p in planners for status in p.num_batches], said.lines[0]


@pytest.mark.parametrize("slots", [G, G - 1])
def test_guests_made_for_other_homes_or_slots_are_not_pushed(slots):
    for statuses, said in ranks.run(2, other_homes, slots):
        assert statuses == ["STALE"]
        assert "have no guests: its placement has other homes or slots by now" in said


def one_placement_object(group):
    """It names one layer, to which the second module's `Guests` belong from then on."""
    placement = Placement.homes_only(E, 2, G)
    first, second = (Experts(E // 2, seed, torch.float64) for seed in range(2))
    mine, other = Guests(first, placement, group), Guests(second, placement, group)
    with unittest.mock.patch.dict(os.environ, LPLB_EP="1"):
        buffer = lplb_ep.Buffer(group, 1 << 20).view(placement)
    got = Dispatch.apply(*batch_of(group.rank(), 0), buffer)
    with pytest.raises(ContractError, match="since, and its batches get those"):
        mine.weights(got[0])
    other.weights(got[0])


def test_guests_of_two_modules_for_one_layer_are_told_apart():
    ranks.run(2, one_placement_object)


def refreshed(group):
    """Static replicas move between steps; guests come beside the old ones and the new ones."""
    table = torch.tensor([[0, 1, 2, 3, 7, -1, -1], [4, 5, 6, 7, 3, -1, -1]])
    placement = Placement(table.flatten(), 2, home=[0, 1, 2, 3, 7, 8, 9, 10], num_guests_per_rank=G)
    table[:, 4] = torch.tensor([4, 0])
    layer = MoE(group, placement, "legacy")
    replicas = Replicas(layer.experts, layer.layer, group)
    with unittest.mock.patch.object(refresh, "Background", Offered):
        refresher = Refresher([replicas], settings=Settings(refresh=2))
    home = torch.tensor(placement.home)
    local = home[home // placement.num_local_slots == group.rank()] % placement.num_local_slots

    def run(mode, number):
        set_mode([layer], mode)
        replicas.copy_weights()
        layer.zero_grad()
        x, weights, topk_idx = batch_of(group.rank(), number)
        layer(x, weights, topk_idx).pow(2).sum().backward()
        replicas.reduce_gradients()
        return [p.grad[local] for p in layer.experts.parameters()]

    for number in range(4):
        want = run("home", number)
        assert_close(run("1", number), want)
        if number == 1 and group.rank() == 0:
            refresher._background.offer(Proposal(0, table.flatten().numpy(), 1.5, 1.2))
        assert len(refresher.step()) == (number == 1)
    assert layer.layer.placement.physical_to_logical.tolist() == table.flatten().tolist()
    x, weights, topk_idx = batch_of(group.rank(), 0)
    replicas.copy_weights()
    out = layer(x, weights, topk_idx).sum()
    layer.layer.replace(placement.with_copies(placement.physical_to_logical))
    with pytest.raises(ContractError, match="replicas were refreshed between this batch's"):
        out.backward()


def test_static_replicas_are_refreshed_beside_guests():
    ranks.run(2, refreshed)
