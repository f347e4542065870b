"""The mode of the drop-ins, a group of one rank, and drop-ins over the recording buffers."""

import sys

import pytest
import torch.distributed as dist
from recording_buffer import recorder

from lplb_ep.deepep import drop_in as buffer
from lplb_ep.deepep import patch as patching
from lplb_ep.layer import channels


@pytest.fixture
def mode(monkeypatch):
    """Sets LPLB_EP, and further variables; the replicas' weights are taken to be valid."""

    def set_mode(value, **others):
        for variable, setting in {"LPLB_EP": value, **others}.items():
            monkeypatch.setenv(variable, setting)

    monkeypatch.setenv("LPLB_EP_REPLICAS", "valid")
    return set_mode


@pytest.fixture
def group(tmp_path):
    """A gloo group of one rank, in this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    channels.clear()
    dist.destroy_process_group()


@pytest.fixture
def make(group):
    """Makes a drop-in over the recorder: `make("Buffer", placement=...)`."""

    def make_drop_in(name="Buffer", **kwargs):
        return buffer.drop_in_of(getattr(recorder(), name))(group, **kwargs)

    return make_drop_in


@pytest.fixture
def deep_ep(monkeypatch):
    module = recorder()
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    monkeypatch.setattr(buffer, "choose_backend", lambda backend: ("deep_ep", "for the test"))
    yield module
    patching.unpatch()
