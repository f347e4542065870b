"""DeepEP's buffers on `torch.distributed`: the same calls with no GPU and no DeepEP.

`Buffer` is DeepEP 1.2.1's, `ElasticBuffer` is DeepEP V2's, and the names of this package are those
of `deep_ep`, so that `import lplb_ep.embedded as deep_ep` serves. DeepEP's documentation, tests and
kernels define argument names, defaults, returned shapes, row order, alignment, values where an
index is -1, and the order of summation.

docs/embedded.md lists the differences. Dtypes and sizes are free, ranks form one node, and calls
are complete on return. Memory that DeepEP leaves uninitialised is `unwritten`.
"""

import torch

from . import utils
from .config import Config
from .elastic import ElasticBuffer
from .events import EventHandle, EventOverlap
from .handles import EPHandle
from .legacy import Buffer

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "topk_idx_t",
    "utils",
]

topk_idx_t = torch.int64
"""The index dtype a standard build of DeepEP expects; int32 is taken here, too."""
