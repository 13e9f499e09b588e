"""Quality metrics: how good answers are, sample by sample or as a set. One module for each kind, found by name here.

Nothing is imported until it is used: the spec reads this table, and so does everything that loads the spec.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricInfo:
    """What the rest knows of a metric without loading it."""

    module: str
    attribute: str
    """Name of the metric in its module."""


METRICS: dict[str, MetricInfo] = {
    "top1": MetricInfo("slipstream.measure.metrics.classification", "TOP1"),
    "top5": MetricInfo("slipstream.measure.metrics.classification", "TOP5"),
    "f1": MetricInfo("slipstream.measure.metrics.classification", "F1"),
    "map": MetricInfo("slipstream.measure.metrics.detection", "MAP"),
    "miou": MetricInfo("slipstream.measure.metrics.segmentation", "MIOU"),
}
"""Spec name → where the metric is. Any other name is the user's own, `module:function` (metrics/user.py)."""


def short_name(metric: str) -> str:
    """A metric's name in tables and charts: the spec's, or the user's function without its module."""
    return metric.rpartition(":")[2]
