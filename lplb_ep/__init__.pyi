from typing import Any

from . import metrics as metrics
from .cost import CostModel as CostModel
from .deepep.context import attach as attach
from .deepep.context import use as use
from .errors import CompileError as CompileError
from .errors import ContractError as ContractError
from .errors import InfeasibleError as InfeasibleError
from .errors import MissingPackageError as MissingPackageError
from .errors import PlacementError as PlacementError
from .errors import RankError as RankError
from .layer import Layer as Layer
from .layer import mark_stale as mark_stale
from .layer import mark_valid as mark_valid
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

# Subclasses of DeepEP's classes or of the embedded ones: which, is known when they are first used.
Buffer: Any
ElasticBuffer: Any
EPHandle: Any
EventOverlap: Any
EventHandle: Any
Config: Any
topk_idx_t: Any
