"""The classes: subclasses made on first use, and the patch of the original ones."""

import pytest
import torch
from recording_buffer import OTHER, PLACEMENT, TOPK, E, P, planned

import lplb_ep
from lplb_ep import ContractError
from lplb_ep.deepep import drop_in as buffer
from lplb_ep.deepep import patch as patching


def test_drop_ins_are_subclasses_made_on_first_use(deep_ep, mode, group):
    mode("1")
    assert issubclass(lplb_ep.Buffer, deep_ep.Buffer)
    assert lplb_ep.Buffer is lplb_ep.Buffer
    assert lplb_ep.Buffer.num_sms == 20
    assert lplb_ep.Buffer.__doc__ == "As deep_ep.Buffer."
    assert issubclass(lplb_ep.ElasticBuffer, deep_ep.ElasticBuffer)
    assert lplb_ep.EPHandle is deep_ep.EPHandle


def test_the_patch_reaches_names_imported_early(deep_ep, mode, group):
    mode("1")
    early, methods = deep_ep.Buffer, dict(vars(deep_ep.Buffer))
    older = early(group)
    patching.patch()
    patching.patch()
    assert lplb_ep.Buffer is early
    drop_in = early(group, placement=PLACEMENT, num_local_slots=P)
    drop_in.get_dispatch_layout(TOPK, E)
    (call,) = drop_in.log  # planned once, however often it was patched
    assert torch.equal(call[2]["topk_idx"], planned())
    assert isinstance(drop_in.view(OTHER), early)
    older.get_dispatch_layout(TOPK, E)  # made before the patch: as it was
    assert older.log[0][1][0] is TOPK
    patching.unpatch()
    assert dict(vars(deep_ep.Buffer)) == methods


def test_buffers_made_before_the_patch_refuse_placements(deep_ep, mode, group):
    mode("1")
    older = deep_ep.Buffer(group)
    patching.patch()
    with lplb_ep.use(PLACEMENT), pytest.raises(ContractError, match="made before lplb_ep was"):
        older.get_dispatch_layout(TOPK, E)
    with pytest.raises(ContractError, match="made before lplb_ep was"):
        older.view(PLACEMENT)


def test_hybrid_buffers_are_left_alone_with_one_warning(deep_ep, mode, caplog):
    class HybridEPBuffer:
        def dispatch(self):
            pass

    deep_ep.HybridEPBuffer = HybridEPBuffer
    before = dict(vars(HybridEPBuffer))
    patching.patch()
    assert dict(vars(HybridEPBuffer)) == before
    assert caplog.text.count("HybridEPBuffer") == 1


def test_a_missing_deep_ep_is_named():
    with pytest.raises(lplb_ep.MissingPackageError, match="deep_ep is not installed"):
        buffer.choose_backend("deep_ep")
    assert buffer.choose_backend("auto")[0] == "lplb_ep.embedded"
