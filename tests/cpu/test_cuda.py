"""What of the GPU path needs no GPU: its tables, its limits, and that its kernels compile."""

import numpy as np
import oracle
import pytest

from lplb_ep import Placement, cuda, jit


@pytest.mark.parametrize("R", [1, 5, 16, 33, 64])
def test_tables_hold_every_copy_once(R):
    rng = np.random.default_rng(R)
    for _ in range(5):
        placement = oracle.random_placement(rng, R, int(rng.integers(R, 200)), 2)
        tables = cuda.tables(placement)
        C = placement.max_replicas
        copies, experts = [], []
        for g, (num_ranks, num_arcs, num_experts, _) in enumerate(tables.shape.tolist()):
            ranks = tables.ranks[g, :num_ranks]
            assert (placement.component[ranks] == placement.component[ranks[0]]).all()
            arcs = tables.arcs[g, :num_arcs]
            e, c = arcs["quota"] // C, arcs["quota"] % C
            copies += zip(e.tolist(), c.tolist(), strict=True)
            assert (ranks[arcs["rank"]] == placement.copy_rank[e, c]).all()
            for a, arc in enumerate(arcs):
                assert tables.first_arc[g, arc["rank"]] <= a < tables.first_arc[g, arc["rank"] + 1]
                holders = [r for r in range(num_ranks) if int(arc["ranks"]) >> r & 1]
                place = int(arc["place"])
                same = tables.copies[g, place : place + len(holders)]
                assert (arcs["quota"][same] // C == e[a]).all()
                assert arcs["rank"][same].tolist() == holders
            packed = tables.experts[g, :num_experts]
            experts += (packed & 0xFFFF).tolist()
            single = packed >> 16 < tables.ranks.shape[1]
            homes = placement.home_rank[packed[single] & 0xFFFF]
            assert (ranks[packed[single] >> 16] == homes).all()
        several = (placement.copy_rank >= 0).sum(1) > 1
        assert sorted(experts) == list(range(placement.num_experts))
        expert, column = np.nonzero((placement.copy_rank >= 0) & several[:, None])
        assert sorted(copies) == list(zip(expert.tolist(), column.tolist(), strict=True))


def test_components_beyond_one_block_are_refused_by_size():
    ring = Placement.from_topology("ring", num_experts=65, num_ranks=65)
    with pytest.raises(
        ValueError, match=r"at most 64 ranks and 512 experts; .* 65 ranks, 65 exper"
    ):
        cuda.tables(ring)
    everywhere = Placement(np.tile(np.arange(70), 64), 64)
    with pytest.raises(ValueError, match="4480 copies of experts with several take 117"):
        cuda.tables(everywhere)
    # Many independent groups are no matter.
    assert len(cuda.tables(Placement(np.arange(600), 100)).shape) == 100


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_every_kernel_compiles(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(tmp_path))
    for cubin in jit.compile_all(cuda.programs(), [arch]):
        assert cubin.data[:4] == b"\x7fELF"
        assert not cubin.cached
