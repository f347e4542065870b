from typing import Any

from .layers import attach as attach
from .layers import use as use
from .placement import Placement as Placement
from .plan import Plan as Plan
from .plan import check_plan as check_plan
from .planner import Planner as Planner
from .refresh import Refresher as Refresher
from .replicas import Replicas as Replicas
from .settings import CompileError as CompileError
from .settings import ContractError as ContractError
from .settings import InfeasibleError as InfeasibleError
from .settings import MissingPackageError as MissingPackageError
from .settings import PlacementError as PlacementError
from .settings import RankError as RankError
from .settings import Settings as Settings
from .solver import Solution as Solution
from .solver import solve as solve

__version__: str

# Subclasses of DeepEP's classes or of the embedded ones: which, is known when they are first used.
Buffer: Any
ElasticBuffer: Any
EPHandle: Any
EventOverlap: Any
EventHandle: Any
Config: Any
topk_idx_t: Any
