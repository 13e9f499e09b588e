"""Format of figures, the same on the page and in the terminal. A figure that was not measured is a dash."""

from collections.abc import Iterable

from slipstream.contract.evidence import Interval, Row
from slipstream.plugins import short_name

DASH = "–"

STATUS_GLYPH = {"passed": "✓", "rejected": "✕", "inconclusive": "?", "missing": "!", "reference": "·"}
ANSWER_GLYPH = {"pass": "✓", "fail": "✕", "inconclusive": "?"}


METRICS = {"f1": "macro F1", "map": "mAP", "miou": "mIoU"}
"""Display names of metrics; others use their own name."""


def metric(name: str) -> str:
    """Return `top1`, `mAP`, or the name of the user's function without its module."""
    return METRICS.get(name, short_name(name))


def milliseconds(value: float | None) -> str:
    """Return three significant figures, without an exponent: 0.083, 1.25, 71.4, 854."""
    if value is None:
        return DASH
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def percent(value: float | None) -> str:
    """Return two decimals: a test set of 10,000 resolves no more."""
    return DASH if value is None else f"{value:.2f}"


def points(value: float) -> str:
    """Return a signed number of percentage points; zero has no sign."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def drop(interval: Interval) -> str:
    """Return `+0.12 [−0.05, +0.31]`: the estimate and its bounds."""
    return f"{points(interval.estimate)} [{points(interval.low)}, {points(interval.high)}]"


def ratio(value: float) -> str:
    """Return a factor with three significant figures."""
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def bounds(interval: Interval) -> str:
    """Return `7.81 to 8.25`."""
    return f"{ratio(interval.low)} to {ratio(interval.high)}".replace("×", "")


def speedup(interval: Interval | None) -> str:
    """Return `8.02× [7.81, 8.25]`."""
    if interval is None:
        return DASH
    low, high = ratio(interval.low).rstrip("×"), ratio(interval.high).rstrip("×")
    return f"{ratio(interval.estimate)} [{low}, {high}]"


def rate(value: float | None) -> str:
    """Return queries per second, with thousands separators."""
    return DASH if value is None else f"{value:,.0f}"


def size(value: int | None) -> str:
    """Return decimal kilobytes or megabytes."""
    if value is None:
        return DASH
    return f"{value / 1e3:.0f} kB" if value < 1e6 else f"{value / 1e6:.1f} MB"


def count(number: int, noun: str) -> str:
    """Return `1 engine`, `2 engines`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def best_of(rows: Iterable[Row], confidence: float) -> str:
    """Return what was done so that the best of several engines is good with the objective's confidence."""
    judged = [row.evidence for row in rows if row.evidence]
    competing = max((e.competing for e in judged), default=1)
    if competing == 1:
        return ""
    surest = max(e.confidence for e in judged)
    return (
        f"Bounds of the drop hold at {100 * surest:.4g} % each: {competing} engines compete for the release, and the "
        f"one that is picked must be good with {100 * confidence:g} %."
    )
