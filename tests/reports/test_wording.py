"""Figures are written with the digits that they carry."""

import pytest

from slipstream.contract.evidence import Interval
from slipstream.reports import wording


@pytest.mark.parametrize(
    ("value", "text"), [(0.0834, "0.083"), (1.254, "1.25"), (71.44, "71.4"), (854.2, "854"), (None, "–")]
)
def test_milliseconds(value: float | None, text: str) -> None:
    assert wording.milliseconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.123, "+0.12"), (-0.05, "−0.05"), (0.001, "0.00"), (-0.001, "0.00")])
def test_points_are_signed_and_zero_is_not(value: float, text: str) -> None:
    assert wording.points(value) == text


def test_metrics_are_named_for_people() -> None:
    names = ("top1", "f1", "map", "miou", "mine.scores:within")
    assert [wording.metric(name) for name in names] == ["top1", "macro F1", "mAP", "mIoU", "within"]


def test_intervals() -> None:
    assert wording.drop(Interval(estimate=0.12, low=-0.05, high=0.31)) == "+0.12 [−0.05, +0.31]"
    assert wording.speedup(Interval(estimate=8.021, low=7.81, high=8.25)) == "8.02× [7.81, 8.25]"
    assert wording.bounds(Interval(estimate=12, low=9.5, high=14.04)) == "9.50 to 14.0"
    assert wording.speedup(None) == "–"


def test_sizes_and_counts() -> None:
    assert (wording.size(62_400), wording.size(23_000_000), wording.size(None)) == ("62 kB", "23.0 MB", "–")
    assert (wording.count(1, "engine"), wording.count(2, "engine")) == ("1 engine", "2 engines")
