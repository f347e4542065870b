"""DeepEP's buffers on `torch.distributed`: the same calls with no GPU and no DeepEP.

`Buffer` is DeepEP 1.2.1's, `ElasticBuffer` is DeepEP V2's, and the names of this package are those
of `deep_ep`, so that `import lplb_ep.embedded as deep_ep` serves. Argument
names, defaults, returned shapes, row order, alignment, what stands where an index is -1 and the
order of summation follow DeepEP's documentation, tests and kernels. Differences are listed in
docs/embedded.md: dtypes and sizes are free, ranks form one node, calls are complete on return, and
memory that DeepEP leaves uninitialised is `unwritten`.
"""

import torch

from . import utils
from .elastic import ElasticBuffer, EPHandle
from .legacy import Buffer, Config
from .rows import EventHandle, EventOverlap

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
