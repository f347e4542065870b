"""Megatron-Core: experts at homes that a load has placed, and checkpoints that know them."""

import pytest
import ranks
from gpt import Run
from gpt_checkpoints import FULLY, SHARDED, go, placed, placements, same, settled
from gpt_checks import CLOSE, OFF, ON

pytest.importorskip("megatron")

OVERLAPPED = dict(**SHARDED, overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        pytest.param(2, {}, marks=pytest.mark.long),
        pytest.param(2, dict(balance={"placement": placements(guests=2)}), marks=pytest.mark.long),
        # Some homes are behind copies, and have no rows: DDP waits for their gradients as well.
        (2, dict(balance={"placement": placements(redundant=4)}, ddp=OVERLAPPED)),
        pytest.param(4, dict(ddp=OVERLAPPED), marks=pytest.mark.long),
    ],
)
def test_experts_at_other_homes_train_as_in_order(num_ranks, options):
    plain = ranks.run(num_ranks, go, Run(ddp=options.get("ddp", {})), environ=OFF)
    moved = ranks.run(num_ranks, go, placed(0, **options), environ=ON)
    same(plain, moved, 0, rtol=0, atol=0)
    for part in (3, 1):
        same(plain, moved, part, **CLOSE)
    assert [r[2] for r in moved] == [pytest.approx(r[2], rel=1e-5) for r in plain]
    for *_, report in moved:
        assert all(set(row.by_status) == {"OPTIMAL"} for row in report)
        assert all(row.imbalance < 1.1 for row in report)


def test_megatron_core_passes_experts_whatever_lplb_ep_indices_says():
    """Slots, as an engine's, and experts have the same numbers here, and other meanings."""
    plain = ranks.run(2, go, Run(), environ=OFF)
    moved = ranks.run(2, go, placed(0), environ={**ON, "LPLB_EP_INDICES": "physical"})
    assert [r[2] for r in moved] == [pytest.approx(r[2], rel=1e-5) for r in plain]


@pytest.mark.long
@pytest.mark.parametrize(
    ("ddp", "metadata"), [({}, FULLY), (SHARDED, {**FULLY, "singleton_local_shards": True})]
)
def test_a_checkpoint_goes_to_other_homes_and_numbers_of_ranks_with_the_optimizer(
    tmp_path, ddp, metadata
):
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        (tmp_path / path).mkdir()
    first = ranks.run(2, go, Run(ddp=ddp), None, paths[0], metadata, environ=OFF)
    here = first
    for number, (num_ranks, run, environ) in enumerate(
        [
            (4, placed(0, ep=4, ddp=ddp), ON),  # to other homes, on more ranks
            (2, placed(1, ddp=ddp), ON),  # from homes to homes
            (2, Run(ddp=ddp), OFF),  # and back
        ]
    ):
        source, target = paths[number], [*paths[1:], None][number]
        loaded = ranks.run(num_ranks, go, run, source, target, metadata, environ=environ)
        same([(result[1],) for result in here], loaded, 0, rtol=0, atol=0)
        plain = ranks.run(
            num_ranks, go, Run(ep=run.ep, ddp=ddp), source, None, metadata, environ=OFF
        )
        same(plain, loaded, 1, **CLOSE)
        here = loaded


def test_homes_are_refused_where_they_come_too_late_or_differ():
    for name, message in ranks.run(2, settled, Run(), True, environ=ON):
        assert name == "ContractError"
        assert "has its experts already: call balance() before these" in message
    # Each half of the ranks has all experts, and they agree among themselves alone.
    for name, message in ranks.run(4, settled, Run(), False, environ=ON):
        assert name == "RankError"
        assert message.startswith("homes of decoder.layers.0.mlp: ranks differ in placement: ")


def test_formats_that_know_the_optimizer_s_state_by_place_are_refused(tmp_path):
    run, by_place = placed(0, ddp=SHARDED), {"distrib_optim_sharding_type": "dp_reshardable"}
    with pytest.raises(ranks.RanksFailedError, match="'dp_reshardable', which knows"):
        ranks.run(2, go, run, None, str(tmp_path), by_place, environ=ON)
