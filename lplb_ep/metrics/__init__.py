"""Statistics of balancing in a running program, for all layers of a process.

    from lplb_ep import metrics

    for layer in metrics.snapshot():
        print(layer)
    metrics.reset()

docs/metrics.md explains each number, and how to send them to other tools.
"""

from __future__ import annotations

from .exporters import register_prometheus as register_prometheus
from .exporters import scalars as scalars
from .exporters import write_tensorboard as write_tensorboard
from .layers import LayerStats as LayerStats
from .layers import reset as reset
from .layers import snapshot as snapshot
from .line_file import LineFile as LineFile

__all__ = [
    "LayerStats",
    "LineFile",
    "register_prometheus",
    "reset",
    "scalars",
    "snapshot",
    "write_tensorboard",
]
