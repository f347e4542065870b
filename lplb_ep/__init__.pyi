from typing import Any, Literal

import torch
from torch.distributed import ProcessGroup
from typing_extensions import Self

from . import embedded
from . import metrics as metrics
from .cost import CostModel as CostModel
from .deepep.context import attach as attach
from .deepep.context import use as use
from .embedded import Config as Config
from .embedded import EPHandle as EPHandle
from .embedded import EventHandle as EventHandle
from .embedded import EventOverlap as EventOverlap
from .errors import CompileError as CompileError
from .errors import ContractError as ContractError
from .errors import InfeasibleError as InfeasibleError
from .errors import MissingPackageError as MissingPackageError
from .errors import PlacementError as PlacementError
from .errors import RankError as RankError
from .layer import Layer as Layer
from .layer import mark_stale as mark_stale
from .layer import mark_valid as mark_valid
from .metrics.layers import LayerStats
from .placement.layer_files import load_placements as load_placements
from .placement.layer_files import save_placements as save_placements
from .placement.table import Placement as Placement
from .planning.check import check_plan as check_plan
from .planning.plan import Plan as Plan
from .planning.planner import Planner as Planner
from .planning.solve import Solution as Solution
from .planning.solve import solve as solve
from .problem import Problem as Problem
from .settings import Settings as Settings
from .weights.guests import Guests as Guests
from .weights.pool import GuestPool as GuestPool
from .weights.refresh import Refresher as Refresher
from .weights.replicas import Replicas as Replicas

__version__: str

class _DropIn:
    """Methods of the drop-ins beside DeepEP's."""

    def view(self, placement: Layer | Placement, slot: int = 0) -> Self: ...
    def stats(self) -> list[LayerStats]: ...

# Subclasses of DeepEP's classes or of the embedded ones; the choice is made at their first use.
# Methods that the embedded ones lack are only named, since DeepEP checks their arguments.
class Buffer(_DropIn, embedded.Buffer):
    def __init__(
        self,
        group: ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        placement: Layer | Placement | None = None,
        num_local_slots: int | None = None,
        indices: Literal["logical", "physical"] | None = None,
    ) -> None: ...
    def get_local_buffer_tensor(self, *args: Any, **kwargs: Any) -> Any: ...
    def internode_combine(self, *args: Any, **kwargs: Any) -> Any: ...
    def internode_dispatch(self, *args: Any, **kwargs: Any) -> Any: ...
    def low_latency_clean_mask_buffer(self) -> Any: ...
    def low_latency_query_mask_buffer(self, *args: Any, **kwargs: Any) -> Any: ...
    def low_latency_update_mask_buffer(self, *args: Any, **kwargs: Any) -> Any: ...

class ElasticBuffer(_DropIn, embedded.ElasticBuffer):
    def __init__(
        self,
        group: ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
        *,
        placement: Layer | Placement | None = None,
        num_local_slots: int | None = None,
        indices: Literal["logical", "physical"] | None = None,
    ) -> None: ...
    def agrs_get_inplace_tensor(self, *args: Any, **kwargs: Any) -> Any: ...
    def agrs_new_session(self, *args: Any, **kwargs: Any) -> Any: ...
    def agrs_set_config(self, *args: Any, **kwargs: Any) -> Any: ...
    def all_gather(self, *args: Any, **kwargs: Any) -> Any: ...
    def create_agrs_session(self, *args: Any, **kwargs: Any) -> Any: ...
    def destroy_agrs_session(self, *args: Any, **kwargs: Any) -> Any: ...
    def engram_fetch(self, *args: Any, **kwargs: Any) -> Any: ...
    def engram_write(self, *args: Any, **kwargs: Any) -> Any: ...
    @staticmethod
    def get_agrs_buffer_size_hint(*args: Any, **kwargs: Any) -> Any: ...
    @staticmethod
    def get_agrs_num_max_session_bytes(*args: Any, **kwargs: Any) -> Any: ...
    @staticmethod
    def get_engram_storage_size_hint(*args: Any, **kwargs: Any) -> Any: ...
    @staticmethod
    def get_pp_buffer_size_hint(*args: Any, **kwargs: Any) -> Any: ...
    def pp_recv(self, *args: Any, **kwargs: Any) -> Any: ...
    def pp_send(self, *args: Any, **kwargs: Any) -> Any: ...
    def pp_set_config(self, *args: Any, **kwargs: Any) -> Any: ...

topk_idx_t: torch.dtype
