"""Statistics for TensorBoard, Prometheus, and other tools that take numbers by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..errors import MissingPackageError
from .layers import LayerStats, Window, all_layers, by_name, snapshot

_SCALARS = (
    "home_imbalance",
    "imbalance",
    "bound",
    "worst_home_imbalance",
    "worst_imbalance",
    "batches",
    "recomputed",
    "sent_home",
    "reused",
    "stale",
    "timed_out",
    "rows",
    "own_rows",
    "guests",
    "guest_bytes",
)
_COUNTERS = {
    "rows": "Picks of all ranks.",
    "own_rows": "Rows that this rank computed.",
    "own_rows_at_home": "Rows that this rank would have computed without balance.",
    "largest_home_load": "Sum over batches of the largest rank load at home, in rows.",
    "largest_load": "Sum over batches of the largest rank load, in rows.",
    "bound_load": "Sum of T* over the batches whose T* is known, in rows.",
    "bound_mean_load": "Sum over these batches of the mean rank load, in rows.",
    "mean_load": "Sum over batches of the mean rank load, in rows.",
    "guests": "Experts that were copied to other ranks for a batch.",
    "guest_bytes": "Weights of all guests, in bytes.",
}


def scalars(prefix: str = "lplb_ep") -> dict[str, float]:
    """The numbers of `snapshot` by name, as Weights & Biases and others log them.

    Layers of one name are added up, as if they were one.

    Args:
        prefix: the beginning of the names, which are `prefix/layer/number`. Numbers that are not
            known, such as the imbalance of a layer without rows, are left out.
    """
    every = {
        f"{prefix}/{layer}/{name}": float(getattr(stats, name))
        for layer, stats in by_name(snapshot()).items()
        for name in _SCALARS
    }
    return {name: value for name, value in every.items() if not math.isnan(value)}


def write_tensorboard(writer: Any, step: int, prefix: str = "lplb_ep") -> None:
    """Writes the numbers of `snapshot` to TensorBoard.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or another object with `add_scalar`.
        step: the training step.
        prefix: as for `scalars`.
    """
    for name, value in scalars(prefix).items():
        writer.add_scalar(name, value, step)


def register_prometheus(registry: Any = None) -> Any:
    """Registers the statistics with Prometheus' client, which reads them whenever it is scraped.

    Counters begin with the process, and `reset` leaves them alone. Imbalances are quotients of
    their rates (docs/metrics.md).

    Args:
        registry: a `prometheus_client.CollectorRegistry`; None: the client's own.

    Returns:
        The collector, for `registry.unregister`.

    Raises:
        MissingPackageError: `prometheus-client` is not installed.
    """
    try:
        import prometheus_client
    except ImportError as error:
        raise MissingPackageError(
            "prometheus_client is not installed: pip install 'lplb-ep[prometheus]'"
        ) from error
    collector = _Collector()
    (prometheus_client.REGISTRY if registry is None else registry).register(collector)
    return collector


class _Collector:
    """As prometheus_client takes one."""

    def collect(self) -> Iterator[Any]:
        """The families of metrics."""
        from prometheus_client.core import CounterMetricFamily

        layers = [*by_name(Window().stats(all_layers())).values()]
        labels = ["layer", "rank"]
        batches = CounterMetricFamily(
            "lplb_ep_batches", "Batches that were planned.", labels=[*labels, "status"]
        )
        for stats in layers:
            for status, number in stats.by_status.items():
                batches.add_metric([*_labels(stats), status], number)
        yield batches
        for name, meaning in _COUNTERS.items():
            family = CounterMetricFamily(f"lplb_ep_{name}", meaning, labels=labels)
            for stats in layers:
                family.add_metric(_labels(stats), getattr(stats, name))
            yield family

    def describe(self) -> list[Any]:
        """Nothing, so that registering reads nothing."""
        return []


def _labels(stats: LayerStats) -> list[str]:
    return [stats.layer, str(stats.rank)]
