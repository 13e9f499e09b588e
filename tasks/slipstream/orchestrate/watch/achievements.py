"""Results of a finished step, in a few words from its metrics in MLflow."""

from collections.abc import Mapping

from slipstream.plugins import BUILD, VALIDATE
from slipstream.reports import wording

TRAINED = "test_"
"""Prefix of the spec's metric on the test split, as logged by steps that make a candidate."""


def achieved(step: str, metrics: Mapping[str, float]) -> tuple[str, ...]:
    """Return results such as (`top1 91.9 %`, `−0.2 points`), or (`46 kB`); empty if the step measures nothing."""
    if step == VALIDATE:
        return tuple(_validated(metrics))
    if step == BUILD:
        return (wording.size(int(metrics["size_bytes"])),) if "size_bytes" in metrics else ()
    return tuple(_candidate(metrics))


def _candidate(metrics: Mapping[str, float]) -> list[str]:
    quality = [
        f"{wording.metric(name.removeprefix(TRAINED))} {value:.2f} %"
        for name, value in metrics.items()
        if name.startswith(TRAINED)
    ]
    if "parameters" in metrics and metrics.get("parameters_before"):
        quality.append(f"{100 * (1 - metrics['parameters'] / metrics['parameters_before']):.0f} % fewer weights")
    return quality


def _validated(metrics: Mapping[str, float]) -> list[str]:
    """Return drop, latency and gains of an engine; unmeasured ones are left out."""
    parts = []
    if "drop_pp" in metrics:
        parts.append(f"drop {wording.points(metrics['drop_pp'])} (at most {wording.points(metrics['drop_pp_high'])})")
    if "p50_ms" in metrics:
        parts.append(f"{wording.milliseconds(metrics['p50_ms'])} ms")
    for name, reference in (("speedup_eager", "eager"), ("speedup_reference", "FP32")):
        if name in metrics:
            parts.append(f"{wording.ratio(metrics[name])} {reference}")
    return parts
