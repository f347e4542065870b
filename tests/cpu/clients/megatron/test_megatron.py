"""Megatron-Core's MoE layers over the embedded buffers: plain, at home, and balanced by guests."""

import contextlib
import inspect
import json
import math
import os
import subprocess
import sys
from unittest import mock

import pytest
import ranks
import torch
import torch.nn.functional as F
from gpt import (
    EXPERTS,
    Run,
    Training,
    load,
    megatron,
    refusal,
    refusal_of,
    removed,
    save,
    stage,
    two_models,
)
from gpt_checks import CLOSE, OFF, ON, check_run
from layers import ROOT

from lplb_ep import Placement, PlacementError

pytest.importorskip("megatron")

HOMES = Placement.homes_only(EXPERTS, 2)
GUESTS = Placement.homes_only(EXPERTS, 2, 1)
OVERLAPPED = dict(
    ddp=dict(
        overlap_grad_reduce=True,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
        bucket_size=4000,
    )
)
RUNS = {
    "plain": (2, Run()),
    "overlapped": (4, Run(**OVERLAPPED, steps=3)),
    "recomputed": (
        2,
        Run(config=dict(recompute_granularity="selective", recompute_modules=["moe"])),
    ),
    "recomputed whole": (
        2,
        Run(
            config=dict(
                recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
            )
        ),
    ),
    "shared experts beside": (
        2,
        Run(config=dict(moe_shared_expert_intermediate_size=48, moe_shared_expert_overlap=True)),
    ),
    "tokens are dropped": (2, Run(config=dict(moe_expert_capacity_factor=1.0))),
    "gated, with biases": (
        2,
        Run(
            config=dict(gated_linear_unit=True, add_bias_linear=True, activation_func=F.silu),
            optimizer=dict(optimizer="sgd"),  # Adam makes noise of keys' biases, which do nothing
        ),
    ),
    "bfloat16": (
        2,
        Run(config=dict(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)),
    ),
    "replicas": (4, Run(balance={"replicas": 4}, steps=3)),
    "replicas, overlapped, recomputed": (
        4,
        Run(
            **OVERLAPPED,
            balance={"replicas": 4},
            config=dict(recompute_granularity="selective", recompute_modules=["moe"]),
            steps=3,
        ),
    ),
    "interleaved pipeline": (4, Run(pp=2, vpp=2, config=dict(num_layers=4))),
    "interleaved pipeline, overlapped, recomputed": (
        4,
        Run(
            pp=2,
            vpp=2,
            ddp={**OVERLAPPED["ddp"], "align_param_gather": True},
            config=dict(num_layers=4, recompute_granularity="selective", recompute_modules=["moe"]),
        ),
    ),
    "interleaved pipeline, replicas, overlapped": (
        4,
        Run(
            pp=2,
            vpp=2,
            ddp={**OVERLAPPED["ddp"], "align_param_gather": True},
            config=dict(num_layers=4),
            balance={"replicas": 2},
            steps=3,
        ),
    ),
    "tensor parallel": (4, Run(tp=2, ep=4, steps=3)),
    "tokens are dropped, replicas": (
        2,
        Run(
            config=dict(moe_expert_capacity_factor=0.5, moe_token_drop_policy="position"),
            balance={"replicas": 2},
        ),
    ),
    "router in bfloat16": (
        2,
        Run(
            config=dict(
                bf16=True,
                params_dtype=torch.bfloat16,
                pipeline_dtype=torch.bfloat16,
                moe_router_dtype=None,
            ),
        ),
    ),
    "one expert a rank, its input scaled, ranks without rows": (
        2,
        Run(
            ddp=dict(overlap_grad_reduce=True, bucket_size=4000),
            config=dict(
                num_moe_experts=2,
                moe_router_topk=1,
                moe_router_pre_softmax=True,
                moe_apply_probs_on_input=True,
                gated_linear_unit=True,
                add_bias_linear=True,
                activation_func=F.silu,
            ),
            optimizer=dict(optimizer="sgd"),
            balance={"guests": 1},
            skew=4.0,
        ),
    ),
    "frozen experts": (2, Run(frozen="local_experts")),
    "frozen first layers, replicas": (2, Run(frozen="linear_fc1", balance={"replicas": 2})),
    "frozen experts, replicas": (2, Run(frozen="local_experts", balance={"replicas": 2})),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_balanced_run_is_the_plain_one(name):
    check_run(*RUNS[name])


@pytest.mark.parametrize(("saving", "loading"), [(OFF, ON), (ON, OFF)])
@pytest.mark.parametrize("ep", [2, 4])
def test_checkpoints_have_logical_experts_alone(tmp_path, saving, loading, ep):
    """Saved with guests or without, loaded without or with them, on as many ranks or more."""
    path = str(tmp_path)
    before = ranks.run(2, save, Run(), path, environ=saving)
    results = ranks.run(ep, load, Run(ep=ep), path, environ=loading)
    plain = ranks.run(ep, load, Run(ep=ep), path, environ=OFF)
    saved = logical(before, 2)
    loaded = logical([result[0] for result in results], ep)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    for got, want in zip(results, plain, strict=True):
        torch.testing.assert_close(got[1], want[1], **CLOSE)


def logical(weights, ep):
    """Weights of all ranks, those of experts by the experts' numbers."""
    found = {}
    for rank, of_rank in enumerate(weights):
        for name, weight in of_rank.items():
            parts = name.split(".")
            if "local_experts" in parts:
                number = parts.index("local_experts") + 1
                parts[number] = str(rank * (EXPERTS // ep) + int(parts[number]))
            found[".".join(parts)] = weight
    return found


def test_the_benchmark_trains_in_every_mode(tmp_path):
    script = ROOT / "benchmarks" / "megatron_training.py"
    out = tmp_path / "out.json"
    sizes = ["--tiny", "--steps", "3", "--runs", "plain:0", "guests:0", "forced:0"]
    files = ["--json", str(out), "--picture", str(tmp_path / "out.png")]
    command = [sys.executable, str(script), *sizes, *files]
    result = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stderr
    runs = json.loads(out.read_text())["runs"]
    assert runs["guests:0"]["losses"] == pytest.approx(runs["plain:0"]["losses"], rel=1e-4)
    assert max(runs["guests:0"]["imbalance"]) < 1.05 < max(runs["plain:0"]["imbalance"])
    assert "| guests:0 |" in result.stdout
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_off_nothing_is_changed_and_removed_all_is_as_before():
    for before, during, after, _, said, _ in ranks.run(2, removed, Run(), environ=OFF):
        assert before == during == after
        assert said == "nothing is balanced: LPLB_EP is 0 or unset"
    for before, during, after, losses, said, gone in ranks.run(2, removed, Run(), environ=ON):
        assert before == after
        # One guest slot for the four experts of a rank; all but the manager still knows four.
        assert before[:5] == (4, 4, 4, False, False)
        assert during[:5] == (5, 4, 4, True, True)
        assert before[6] == during[6]
        assert losses[0] == losses[2] == pytest.approx(losses[1], rel=1e-5)
        assert said.startswith("2 MoE layers, ")
        assert "imbalance" in said
        assert gone.startswith("nothing is balanced")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.moe_token_dispatcher_type": "alltoall"}, "is 'alltoall': set 'flex'"),
        ({"config.moe_flex_dispatcher_backend": "hybridep"}, "is 'hybridep': set 'deepep'"),
        ({"config.moe_flex_dispatcher_backend": "ncclep"}, "is 'ncclep': set 'deepep'"),
        ({"token_dispatcher.tp_size": 2}, "expert_tensor_parallel_size is 2: set 1"),
        ({"config.cuda_graph_impl": "local"}, "cuda_graph_impl is 'local'"),
        ({"config.fp8": "e4m3"}, "fp8 is 'e4m3': turn it off"),
        ({"experts": torch.nn.Identity()}, "its experts are a Identity: build a SequentialMLP or"),
    ],
)
def test_models_that_are_not_supported_are_refused_by_name(change, message):
    for said in ranks.run(2, refusal, Run(), change, environ=ON):
        assert said.startswith("decoder.layers.0.mlp cannot be balanced: ")
        assert message in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guests": 0}, "guests must be a whole number from 1; got 0"),
        ({"guests": 1, "replicas": 1}, "say one of them"),
        ({"load": torch.ones(3, EXPERTS)}, "load must be [2, 8], layers and experts; got [3, 8]"),
        ({"placement": {1: HOMES}, "guests": 1}, "leave guests, replicas and load out"),
        ({"placement": {1: HOMES}}, "layers.0.mlp cannot be balanced: its placement has neither"),
        ({"placement": {2: GUESTS}}, "layers.0.mlp cannot be balanced: no placement is given"),
        ({"placement": {1: GUESTS}}, "layers.1.mlp cannot be balanced: no placement is given"),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_is_changed(options, message):
    for said, before, after in ranks.run(2, refusal_of, Run(), options, environ=ON):
        assert message in said
        assert before == after


def test_a_balanced_model_is_not_balanced_again():
    for said, before, after in ranks.run(2, refusal_of, Run(), {}, True, environ=ON):
        assert "decoder.layers.0.mlp cannot be balanced: it is balanced already: rem" in said
        assert before == after


def test_a_stage_of_the_pipeline_may_have_no_moe_layers():
    run = Run(pp=2, config=dict(num_layers=4, moe_layer_freq=[0, 0, 1, 1]))
    plain, balanced = (ranks.run(4, stage, run, environ=environ) for environ in (OFF, ON))
    assert [has for has, *_ in balanced] == [False, False, True, True]
    for (has, losses, said), (_, want, _) in zip(balanced, plain, strict=True):
        assert losses == pytest.approx(want, rel=1e-5)
        start = "2 MoE layers, " if has else "this stage of the pipeline has no MoE layers"
        assert said.startswith(start)


@pytest.mark.long
@pytest.mark.parametrize("options", [{"guests": 2}, {"replicas": 2}])
def test_of_two_balanced_models_either_may_be_given_back(options):
    for found, during in ranks.run(2, two_models, Run(balance=options), environ=ON):
        assert during
        for runs in found[1:]:
            for got, want in zip(runs, found[0], strict=True):
                assert got == pytest.approx(want, rel=1e-5)


def test_guests_stay_on_the_nodes_that_deep_ep_has():
    """Its `Buffer` has nodes of eight ranks."""
    from types import SimpleNamespace

    from lplb_ep.clients.megatron_placements import placements_for

    def placed(num_ranks, **options):
        group = SimpleNamespace(size=lambda: num_ranks)
        manager = SimpleNamespace(num_experts=32, group=group)
        layer = SimpleNamespace(token_dispatcher=SimpleNamespace(_comm_manager=manager))
        given = {"guests": None, "replicas": 0, "load": None, "given": None, **options}
        return placements_for({"a": layer}, **given)[0]

    assert placed(8).num_ranks_per_node == 8
    assert placed(16).num_ranks_per_node == 8
    load = torch.arange(32.0)[None]
    homes = placed(16, load=load)
    assert (homes.num_ranks_per_node, homes.num_guests_per_rank) == (8, 1)
    assert len({int(load[0, homes.home_rank == rank].sum()) for rank in range(16)}) == 1


def test_replicas_are_placed_by_load_behind_homes_in_order():
    from lplb_ep import solve
    from lplb_ep.clients.balance import placement_for

    load = torch.tensor([900, 300, 200, 100, 150, 150, 100, 100])
    placement = placement_for(load, num_ranks=4, replicas=1)
    assert placement.num_local_slots == 3
    assert placement.home.tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert (placement.physical_to_logical >= 0).all()
    assert int(solve(load, placement).rank_load.max()) == 500
    unknown = placement_for(torch.ones(8), num_ranks=4, replicas=2)
    table = unknown.physical_to_logical.reshape(4, 4)
    assert table[:, 2:].tolist() == [[2, 3], [4, 5], [6, 7], [0, 1]]


@pytest.mark.parametrize(
    ("load", "replicas", "message"),
    [
        ([1.0] * 8, 7, "replicas must be at most 6, the number of experts on other ranks; got 7"),
        ([1.0, -2.0, *[1.0] * 6], 1, "load of expert 1 must be finite and at least 0, got -2.0"),
        ([*[1.0] * 7, math.nan], 1, "expert 7 must be finite and at least 0, got nan"),
        ([math.inf, *[1.0] * 7], 1, "expert 0 must be finite"),
    ],
)
def test_replicas_that_cannot_be_placed_are_refused_by_name(load, replicas, message):
    from lplb_ep.clients.balance import placement_for

    with pytest.raises(PlacementError, match=message):
        placement_for(torch.tensor(load), num_ranks=4, replicas=replicas)


def sent_and_handed_on(group, run):
    """By step, in order: what copies send home, and what they still have when DDP hands on.

    Returns:
        Whether gradients are handed on, and within a backward pass; the sum of those of copies.
    """
    with megatron(run):
        return _sent_and_handed_on(run)


def _sent_and_handed_on(run):
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Buckets

    from lplb_ep.clients import megatron_replicas
    from lplb_ep.clients.balance import SharedReplacement
    from lplb_ep.clients.megatron_replicas import StaticCopies

    of_steps, copies = [], []
    # Models that were dropped before may have left lplb_ep's own part there.
    reduce, start = StaticCopies.reduce_gradients, inspect.unwrap(Buckets.start_grad_sync)

    def note(is_handed_on, layers):
        gradients = [p.main_grad for one in layers for p in one.slots.parameters()]
        homes = {id(p.main_grad) for _, p in training.named_parameters() if p.requires_grad}
        left = sum(float(g.abs().sum()) for g in gradients if id(g) not in homes)
        of_steps[-1].append((is_handed_on, torch._C._current_graph_task_id() >= 0, left))

    def reduce_gradients(self):
        copies.append(self)
        note(False, [self])
        reduce(self)

    def start_grad_sync(self, *args, **kwargs):
        if layers := [one for one in copies if one.is_in(self)]:
            note(True, layers)
        return start(self, *args, **kwargs)

    with (
        mock.patch.object(megatron_replicas, "_start_grad_sync", SharedReplacement()),
        mock.patch.object(Buckets, "start_grad_sync", start_grad_sync),
        mock.patch.object(StaticCopies, "reduce_gradients", reduce_gradients),
    ):
        training = Training(run)  # whose own part of it stands before the one above
        with contextlib.closing(training):
            batches = training.batches()
            for _ in range(run.steps):
                of_steps.append([])
                training.gradients(batches)
    return of_steps


def test_replicas_gradients_are_home_when_buckets_are_handed_on_within_a_backward_pass():
    run = Run(**OVERLAPPED, balance={"replicas": 2})
    for first, second in ranks.run(2, sent_and_handed_on, run, environ=ON):
        for step, is_backward in ((first, False), (second, True)):
            sent = [left for handed_on, _, left in step if not handed_on]
            handed_on = [left for handed_on, _, left in step if handed_on]
            assert len(handed_on) > 2  # buckets, several of a layer
            assert any(sent)
            assert not step[0][0]
            assert not any(handed_on)
            assert all(backward == is_backward for _, backward, _ in step)


SCRIPT = """
import sys
sys.path[:0] = {path!r}

import torch
import torch.distributed as dist

import gpt

def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    run = gpt.Run(steps=1, balance=dict(off=True))
    result = gpt.train(dist.group.WORLD, run)
    from lplb_ep.clients import megatron
    if rank == 0:
        print(result[0])
        print(*megatron.kept, sep="\\n")
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(main, (sys.argv[1],), 2, start_method="spawn")
"""


def test_a_program_that_is_not_edited_is_balanced(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(path=[str(ROOT / "tests")]))
    environ = {**os.environ, "LPLB_EP_GUEST_MIN_TOKENS": "1", "PYTHONPATH": str(ROOT)}
    said = []
    for number, options in enumerate([["--mode", "0"], ["--client", "megatron", "--mode", "1"]]):
        command = [sys.executable, "-m", "lplb_ep.tools.cli", "run", *options, str(script)]
        result = subprocess.run(
            [*command, str(tmp_path / f"store{number}")],
            capture_output=True,
            text=True,
            env=environ,
            timeout=170,
        )
        assert result.returncode == 0, result.stderr
        said.append(result.stdout.splitlines())
    assert said[0][1:] == [""]
    assert said[1][1].startswith("2 MoE layers, ")
    assert "0: layer 1: imbalance" in said[1][2]
    assert json.loads(said[1][0]) == pytest.approx(json.loads(said[0][0]), rel=1e-5)
