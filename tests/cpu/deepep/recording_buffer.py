"""Classes of DeepEP's names and signatures that move nothing and record what reaches them."""

import functools
import inspect
import types

import torch
import torch.distributed as dist

import lplb_ep
from lplb_ep import Placement, Planner
from lplb_ep.layer import channels

PLACEMENT = Placement([0, 1, 2, 3, 0, 2], 1)
OTHER = Placement([3, 2, 1, 0], 1)
E, P = 4, 6
TOPK = torch.tensor([[0, 1], [2, -1], [0, 3], [0, 2]])
X = torch.zeros(4, 8)


class Event:
    def __init__(self, log, name):
        self.log, self.name, self.event = log, name, object()

    def current_stream_wait(self):
        self.log.append(("wait", self.name))


def recorded(method):
    """Writes every call down as it arrives: name, positional and keyword arguments."""

    @functools.wraps(method)
    def record(self, *args, **kwargs):
        self.log.append((method.__name__, args, kwargs))
        return method(self, *args, **kwargs)

    return record


def recorder():
    """A module with classes of DeepEP's names and signatures that move nothing."""

    class Recording:
        def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, explicitly_destroy=False):
            self.group, self.num_rdma_bytes, self.log = group, num_rdma_bytes, []
            self.runtime = types.SimpleNamespace(destroy=lambda: None)

        def capture(self):
            self.log.append(("capture", (), {}))
            return Event(self.log, "fresh")

        @recorded
        def destroy(self):
            self.runtime.destroy()
            self.runtime = None

    class Buffer(Recording):
        """As deep_ep.Buffer."""

        num_sms = 20

        @staticmethod
        def get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        ):
            return num_max_dispatch_tokens_per_rank * hidden * num_experts

        @recorded
        def get_dispatch_layout(
            self, topk_idx, num_experts, previous_event=None, async_finish=False
        ):
            in_rank = (topk_idx >= 0).any(1, keepdim=True)
            return torch.zeros(1), None, torch.zeros(num_experts), in_rank, None

        @recorded
        def dispatch(
            self,
            x,
            handle=None,
            num_tokens_per_rank=None,
            num_tokens_per_rdma_rank=None,
            is_token_in_rank=None,
            num_tokens_per_expert=None,
            topk_idx=None,
            topk_weights=None,
            previous_event=None,
        ):
            return x, topk_idx, topk_weights, [], (is_token_in_rank,), None

        @recorded
        def internode_dispatch(
            self, x, handle=None, is_token_in_rank=None, topk_idx=None, previous_event=None
        ):
            return x, topk_idx, None, [], (is_token_in_rank,), None

        @recorded
        def combine(self, x, handle, topk_weights=None):
            return x, None, None

        @recorded
        def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts):
            pass

        @recorded
        def low_latency_dispatch(
            self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, use_fp8=True
        ):
            handle = (torch.zeros(3), torch.zeros(3), 4, x.size(1), num_experts)
            return x, torch.zeros(num_experts), handle, None, None

        @recorded
        def low_latency_combine(self, x, topk_idx, topk_weights, handle, out=None):
            return x, None, None

    class EPHandle:
        pass

    class ElasticBuffer(Recording):
        """As deep_ep.ElasticBuffer."""

        @recorded
        def get_theoretical_num_sms(self, num_experts, num_topk):
            return 4

        @recorded
        def dispatch(
            self,
            x,
            topk_idx=None,
            num_experts=None,
            previous_event=None,
            handle=None,
            topk_weights=None,
            num_max_tokens_per_rank=None,
        ):
            return x, topk_idx, None, handle or EPHandle(), None

        @recorded
        def combine(self, x, handle):
            return x, None, None

    module = types.ModuleType("deep_ep")
    module.Buffer, module.ElasticBuffer, module.EPHandle = Buffer, ElasticBuffer, EPHandle
    return module


class Handle:
    pass


def targets():
    """The channels of the one group: (layer, slot) → planner."""
    found = channels.get(dist.group.WORLD, {})
    assert len({key[:2] for key in found}) == len(found)
    return {key[:2]: planner for key, planner in found.items()}


def planned(placement=PLACEMENT, topk=TOPK):
    counts = lplb_ep.planning.reference.count(topk, placement.num_experts)[None]
    return Planner(placement, rank=0, counts="given")(topk, counts=counts).topk_idx


def arrived(drop_in, name):
    """The arguments of the last call of that name to reach the inner buffer, by name."""
    (args, kwargs) = [entry[1:] for entry in drop_in.log if entry[0] == name][-1]
    return {**dict(zip(parameters(drop_in, name), args, strict=False)), **kwargs}


def parameters(drop_in, name):
    return list(inspect.signature(getattr(drop_in, name)).parameters)


def slots_seen(drop_in):
    return arrived(drop_in, "get_dispatch_layout")["topk_idx"]


class Layer(torch.nn.Module):
    def __init__(self, drop_in, num_slots=P):
        super().__init__()
        self.drop_in = drop_in
        self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(num_slots))

    def forward(self, topk_idx):
        return self.drop_in.get_dispatch_layout(topk_idx, E)
