"""A serving engine's steps: a table of experts, slots that it picks itself, and its dispatchers.

The dispatchers here are stand-ins. They make the calls that vLLM's classes of the same kind make,
and have the methods that callers of those use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from lplb_ep import Placement, solve

NUM_EXPERTS, NUM_TOPK, HIDDEN, MOST_TOKENS = 8, 2, 2048, 64
NUM_SLOTS = 12  # of all ranks
RECEIVED = 2**-6  # as in tests/node/over_deep_ep.py: products and sums rounded to bfloat16


def table(rng, num_layers):
    """[layers, P] with all experts, as an engine deals them out: any copy in any slot."""
    rows = []
    for _ in range(num_layers):
        copies = rng.integers(0, NUM_EXPERTS, NUM_SLOTS - NUM_EXPERTS)
        rows.append(rng.permutation(np.append(np.arange(NUM_EXPERTS), copies)))
    return torch.from_numpy(np.stack(rows))


def picks(rng, num_tokens, of_slots):
    """Experts [T, K] of a router that prefers some, and the slots [T, K] that the engine picks."""
    weights = rng.dirichlet(np.full(NUM_EXPERTS, 0.5)) + 1e-3
    weights /= weights.sum()
    experts = np.empty((num_tokens, NUM_TOPK), np.int64)
    for row in experts:
        row[:] = rng.choice(NUM_EXPERTS, NUM_TOPK, replace=False, p=weights)
    held = of_slots.numpy()
    slots = np.array([[rng.choice(np.flatnonzero(held == e)) for e in row] for row in experts])
    return torch.from_numpy(experts), torch.from_numpy(slots.reshape(experts.shape)).long()


def factor(expert):
    """By which expert e multiplies its tokens."""
    return 1 + expert / NUM_EXPERTS


class StandIn:
    """What the three kinds share: a handle for each micro-batch in flight."""

    def __init__(self, buffer, num_ranks, rank):
        self.buffer, self._num_ranks = buffer, num_ranks
        self.offset = rank * NUM_SLOTS // num_ranks
        self.handles = [None, None]

    def num_dispatchers(self):
        return self._num_ranks

    def prepare(self, *args):
        return self.prepare_async(*args)()


class HighThroughput(StandIn):
    """As vLLM's `deepep_ht`."""

    def prepare_async(self, x, weights, slots, num_experts, *_):
        layout = self.buffer.get_dispatch_layout(
            topk_idx=slots,
            num_experts=num_experts,
            previous_event=None,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        of_rank, of_rdma_rank, of_expert, is_in_rank, _ = layout
        received, local, received_weights, counts, handle, event = self.buffer.dispatch(
            x=x,
            handle=None,
            num_tokens_per_rank=of_rank,
            num_tokens_per_rdma_rank=of_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=of_expert,
            topk_idx=slots,
            topk_weights=weights,
            expert_alignment=1,
            previous_event=None,
            async_finish=True,
            allocate_on_comm_stream=False,
        )
        self.handles[current()] = handle

        def receive():
            if event.event is not None:
                event.current_stream_wait()
            elsewhere = num_experts - 1 if self.offset == 0 else 0
            ids = torch.where(local == -1, elsewhere, local + self.offset)
            return received, None, tokens(counts), ids, received_weights

        return receive

    def finalize(self, output, rows, *_):
        out, _, _ = self.buffer.combine(x=rows, handle=self.handles[current()], topk_weights=None)
        output.copy_(out)


class LowLatency(StandIn):
    """As vLLM's `deepep_ll`."""

    def prepare_async(self, x, weights, slots, num_experts, *_):
        received, counts, handle, _, hook = self.buffer.low_latency_dispatch(
            x,
            slots,
            MOST_TOKENS,
            num_experts,
            use_fp8=False,
            async_finish=False,
            return_recv_hook=True,
        )
        self.handles[current()] = handle
        return hook, lambda: (received, None, tokens(counts), None, None)

    def prepare(self, *args):
        hook, receive = self.prepare_async(*args)
        hook()
        return receive()

    def finalize(self, output, rows, weights, slots, *_):
        _, _, hook = self.buffer.low_latency_combine(
            rows,
            slots,
            weights,
            self.handles[current()],
            async_finish=False,
            zero_copy=False,
            return_recv_hook=True,
            out=output,
        )
        hook()


class Elastic(StandIn):
    """As vLLM's `deepep_v2` in a prefill: expanded, and the CPU waits for the counts."""

    def prepare_async(self, x, weights, slots, num_experts, *_):
        received, local, received_weights, handle, event = self.buffer.dispatch(
            x=x,
            topk_idx=slots,
            topk_weights=weights,
            num_experts=num_experts,
            num_max_tokens_per_rank=None,
            do_expand=True,
            do_cpu_sync=True,
            async_with_compute_stream=False,
        )
        self.handles[current()] = handle
        counts = handle.num_recv_tokens_per_expert_list

        def receive():
            assert local is None
            if event.event is not None:
                event.current_stream_wait()
            own = torch.arange(len(counts)) + self.offset
            ids = own.repeat_interleave(torch.tensor(counts)).unsqueeze(1)
            return received, None, tokens(counts), ids, received_weights.unsqueeze(1)

        return receive

    def finalize(self, output, rows, *_):
        out, _, _ = self.buffer.combine(x=rows, handle=self.handles[current()], topk_weights=None)
        output.copy_(out)


STAND_INS = {"ht": HighThroughput, "ll": LowLatency, "v2": Elastic}

_current = [0]


def current():
    """Which of the micro-batches in flight runs."""
    return _current[0]


def enter(micro_batch):
    """Goes on with another micro-batch."""
    _current[0] = micro_batch


def tokens(counts):
    """The counts of a rank's slots, as vLLM's `ExpertTokensMetadata` has them."""
    return SimpleNamespace(expert_num_tokens=torch.as_tensor(counts))


def buffer_of(kind, module, group):
    """A buffer as vLLM makes it for this kind of dispatcher."""
    if kind == "v2":
        return module.ElasticBuffer(
            group, num_max_tokens_per_rank=MOST_TOKENS, hidden=HIDDEN, num_topk=NUM_TOPK
        )
    if kind == "ht":
        return module.Buffer(group=group, num_nvl_bytes=1 << 24, num_rdma_bytes=0)
    num_bytes = module.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=MOST_TOKENS,
        hidden=HIDDEN,
        num_ranks=group.size(),
        num_experts=NUM_SLOTS,
    )
    return module.Buffer(
        group=group,
        num_nvl_bytes=0,
        num_rdma_bytes=num_bytes,
        low_latency_mode=True,
        num_qps_per_rank=NUM_SLOTS // group.size(),
    )


def dispatched(dispatcher, batch, *rest):
    """Sends a batch (rows, slots, weights); what came, which `combined` takes."""
    x, slots, weights = batch
    return dispatcher.prepare(x, weights, slots, NUM_SLOTS, None, False, *rest)


def combined(kind, dispatcher, batch, came, held, rank, reduce=None):
    """The experts' work on what came, and what comes back of it [T, H].

    Args:
        kind: of the dispatcher.
        dispatcher: the one that sent the batch.
        batch: rows, slots and weights.
        came: what `dispatched` returned.
        held: [P / R] experts in this rank's slots.
        rank: this one.
        reduce: what vLLM's classes are given to weigh and sum rows with.
    """
    x, slots, weights = batch
    rows, _, _, ids, received_weights = came
    out = torch.full_like(x, torch.nan)
    if kind == "ll":
        done = (rows.float() * factor(held)[:, None, None]).bfloat16()
    else:
        local = ids - rank * held.numel()
        mine = (local >= 0) & (local < held.numel())
        scale = factor(held)[torch.where(mine, local, 0)] * received_weights
        done = (rows.float() * scale.masked_fill(~mine, 0).sum(1, keepdim=True)).bfloat16()
        slots, weights = ids, received_weights
    dispatcher.finalize(out, done, weights, slots, False, reduce)
    return out


def check(out, x, experts, weights):
    """Every token has met its experts, wherever they were."""
    expected = x.float() * (factor(experts) * weights).sum(1, keepdim=True)
    assert ((out.float() - expected).abs() <= RECEIVED * expected.abs() + 1e-6).all()


def serve(
    group,
    kind,
    dispatchers,
    tables,
    refresh,
    num_micro_batches,
    num_steps,
    *rest,
    reduce=(),
    writes=True,
):
    """Steps of an engine, whose table is another one in some of them.

    Args:
        group: of the ranks.
        kind: of the dispatchers.
        dispatchers: of each layer.
        tables: [layers, P] the engine's table, written to in place here.
        refresh: called after each step.
        num_micro_batches: in flight together.
        num_steps: some have no tokens on one rank.
        rest: further arguments of `prepare`.
        reduce: of `finalize`; empty for none.
        writes: whether the table is written to here, or by `refresh`.

    Returns:
        For each step, layer and micro-batch: the layer, the experts [T, K] of this rank's tokens,
        the rows [P / R] of its slots, and the table then. Where a rank has no tokens, the experts
        are a dispatcher's `dummy`.
    """
    same, own = np.random.default_rng(5), np.random.default_rng((6, group.rank()))
    rank, seen = group.rank(), []
    for step in range(num_steps):
        for layer, dispatcher in enumerate(dispatchers):
            held = tables[layer].view(group.size(), -1)[rank]
            batches = []
            for micro_batch in range(num_micro_batches):
                num_tokens = 0 if (step + rank + micro_batch) % 4 == 3 else int(own.integers(1, 40))
                experts, slots = picks(own, num_tokens, tables[layer])
                x = torch.randn(num_tokens, HIDDEN).bfloat16()
                batches.append((x, slots, torch.rand(num_tokens, NUM_TOPK)))
                enter(micro_batch)
                came = dispatched(dispatcher, batches[-1], *rest)
                dummy = getattr(dispatcher, "dummy", None)
                counted = experts if num_tokens or dummy is None else dummy
                batches[-1] = (batches[-1], experts, counted, came)
            for micro_batch, (batch, experts, counted, came) in enumerate(batches):
                enter(micro_batch)
                out = combined(kind, dispatcher, batch, came, held, rank, *reduce)
                check(out, batch[0], experts, batch[2])
                seen.append((layer, counted, came[2].expert_num_tokens.tolist(), tables.clone()))
        if writes and step % 2 == 1:
            tables[step % len(tables)].copy_(table(same, 1)[0])
        refresh()
    enter(0)
    return seen


def is_best(seen_by_ranks):
    """Whether the largest load of a rank was the best for the copies that there were, each time."""
    for of_ranks in zip(*seen_by_ranks, strict=True):
        layer, _, _, tables = of_ranks[0]
        placement = Placement(tables[layer].tolist(), len(of_ranks), num_experts=NUM_EXPERTS)
        load = sum(
            torch.bincount(experts.flatten(), minlength=NUM_EXPERTS)
            for _, experts, _, _ in of_ranks
        )
        best = solve(load, placement).rank_load.max() if int(load.sum()) else 0
        assert max(sum(rows) for _, _, rows, _ in of_ranks) == int(best)


def run_with_plugins(program, folder, environ):
    """The last line that a program prints which finds this package's plugins, as if installed."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    installed = folder / "lplb_ep-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lplb-ep\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("\n".join(lines))
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, **environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
