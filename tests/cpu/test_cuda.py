"""What of the GPU path needs no GPU: its tables, its limits, and that its kernels compile."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch

from lplb_ep import Placement, cuda, jit, network


@pytest.mark.parametrize("R", [1, 5, 16, 33, 64])
def test_tables_hold_every_copy_once(R):
    rng = np.random.default_rng(R)
    for _ in range(5):
        placement = oracle.random_placement(rng, R, int(rng.integers(R, 200)), 2)
        tables = network.tables(placement, network.room(placement))
        C = placement.max_replicas
        copies, experts = [], []
        for g, (num_ranks, num_arcs, most_arcs, _) in enumerate(tables.shape.tolist()):
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
            assert np.bincount(arcs["rank"], minlength=1).max() == most_arcs
            packed = tables.experts[g][tables.experts[g] >= 0]
            several = packed[packed >> 16 >= tables.size]
            places = dict(zip((arcs["quota"] // C).tolist(), arcs["place"].tolist(), strict=True))
            assert {e & 0xFFFF: (e >> 16) - tables.size for e in several.tolist()} == places
            experts += (packed & 0xFFFF).tolist()
            single = packed >> 16 < tables.ranks.shape[1]
            homes = placement.home_rank[packed[single] & 0xFFFF]
            assert (ranks[packed[single] >> 16] == homes).all()
        several = (placement.copy_rank >= 0).sum(1) > 1
        assert sorted(experts) == list(range(placement.num_experts))
        expert, column = np.nonzero((placement.copy_rank >= 0) & several[:, None])
        assert sorted(copies) == list(zip(expert.tolist(), column.tolist(), strict=True))


def test_tables_of_any_placement_can_be_sent_to_a_device():
    for table in ([0, 1, 2, 3], [0, 1, 1, 0], [0, 1, 2, 0, 1, 2]):
        placement = Placement(table, 2)
        room = network.room(placement)
        for built in (network.tables(placement, room), network.routes(placement, room)):
            sent = cuda._upload(built, torch.device("cpu"))
            assert [t.numel() for t in sent] == [
                getattr(built, field.name).nbytes for field in dataclasses.fields(built)
            ]


def test_routes_hold_every_useful_copy_once():
    rng = np.random.default_rng(0)
    for _ in range(20):
        placement = oracle.random_placement(rng, 8, 40, 2, num_ranks_per_node=4)
        routes, found = network.routes(placement, network.room(placement)), set()
        for e, slot in enumerate(routes.lookup):
            if slot >= 0:
                assert slot == placement.home[e]
                assert (placement.copy_rank[e] >= 0).sum() == 1
                continue
            assert routes.experts[~slot] == e
            for copy in routes.copies[routes.first[~slot] : routes.first[~slot + 1]]:
                rank, node, slot, expert, quota = copy.tolist()
                assert placement.physical_to_logical[slot] == expert == e
                assert (slot // placement.num_local_slots, rank // 4) == (rank, node)
                assert placement.logical_to_physical[e, quota - e * placement.max_replicas] == slot
                found.add(slot)
        several = (placement.copy_rank >= 0).sum(1) > 1
        useful = placement.logical_to_physical[(placement.copy_rank >= 0) & several[:, None]]
        assert found == set(useful.tolist())


def random_layer(rng, R):
    placement = oracle.random_placement(rng, R, int(rng.integers(R, 60)), 2)
    placement = placement.with_copies(placement.physical_to_logical, 9)
    placement.layer.refreshed = True
    return placement


@pytest.mark.parametrize("R", [2, 8, 40])
def test_tables_of_a_refreshed_layer_have_room_for_any_other_replicas(R):
    rng = np.random.default_rng(R)
    for _ in range(4):
        first = random_layer(rng, R)
        room = network.room(first)
        sizes = {field.name: field for field in dataclasses.fields(room)}
        fitted = 0
        for _ in range(10):
            other = oracle.random_copies(rng, first)
            alone = Placement(
                other.physical_to_logical,
                R,
                home=first.home,
                max_replicas=9,
                num_experts=len(first.home),
            )
            tight = network.room(alone)
            if tight.num_components > room.num_components:
                with pytest.raises(ValueError, match="have room for num_components"):
                    network.tables(other, room)
                continue
            fitted += 1
            assert all(getattr(tight, name) <= getattr(room, name) for name in sizes)
            wide, exact = (network.tables(p, r) for p, r in ((other, room), (alone, tight)))
            wide_routes, exact_routes = (
                network.routes(p, r) for p, r in ((other, room), (alone, tight))
            )
            G, E, M = tight.num_components, tight.max_experts, tight.num_several
            # The same where they are the same size, and nothing beyond.
            assert wide.size == next(s for s in network.SIZES if s >= R)
            assert (wide.shape[:G] == exact.shape).all()
            assert not wide.shape[G:].any()
            assert (wide.arcs[:G, : tight.max_arcs] == exact.arcs).all()
            assert (wide.copies[:G, : tight.max_arcs] == exact.copies).all()
            assert (wide.experts[:G, :E] & 0xFFFF == exact.experts & 0xFFFF).all()
            assert (wide.experts[:G, E:] == -1).all()
            assert (wide.experts[G:] == -1).all()
            assert (wide_routes.lookup == exact_routes.lookup).all()
            assert (wide_routes.first[: M + 1] == exact_routes.first).all()
            assert (wide_routes.first[M:] == tight.num_copies).all()
            assert (wide_routes.copies[: tight.num_copies] == exact_routes.copies).all()
            assert wide_routes.copies.shape == (room.num_copies,)
        assert fitted


def test_components_beyond_one_block_are_refused_by_size():
    ring = Placement.from_topology("ring", num_experts=65, num_ranks=65)
    with pytest.raises(
        ValueError, match=r"at most 64 ranks and 512 experts; .* 65 ranks, 65 exper"
    ):
        network.room(ring)
    everywhere = Placement(np.tile(np.arange(70), 64), 64)
    with pytest.raises(ValueError, match=r"takes 1\d{5} for 70 experts and, .* 4480 copies"):
        cuda.num_shared_bytes(everywhere, "flow")
    half = Placement(np.tile(np.arange(40), 32), 32)  # the interior-point method keeps more
    assert cuda.num_shared_bytes(half, "flow") < cuda.MAX_SHARED_BYTES
    with pytest.raises(ValueError, match=r"cusolverdx takes 1\d{5} for .* 1280 copies"):
        cuda.num_shared_bytes(half, "cusolverdx")
    # Many independent groups are no matter.
    assert network.room(Placement(np.arange(600), 100)).num_components == 100


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_every_kernel_compiles(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("LPLB_EP_CACHE_DIR", str(tmp_path))
    for cubin in jit.compile_all(cuda.programs(), [arch]):
        assert cubin.data[:4] == b"\x7fELF"
        assert not cubin.cached
