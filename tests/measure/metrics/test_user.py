"""The user's own metric: a mean of scores, and clear errors when it gives something else."""

import sys
from pathlib import Path

import numpy as np
import pytest
from tests.measure.metrics.contract import Case, MetricContract

from slipstream.errors import SpecError
from slipstream.measure.metrics.base import identity, metric_for, value, worst_class
from slipstream.measure.metrics.user import UserMetric

CODE = """
import numpy as np

def within(outputs, labels):
    off = np.abs(outputs[:, 0] - labels)
    return np.clip(1 - off, 0, 1)

def pairs(outputs, labels):
    return np.stack([labels, labels])

def percent(outputs, labels):
    return np.full(len(labels), 100.0)

def nothing(outputs, labels):
    return np.full(len(labels), np.nan)

def fails(outputs, labels):
    return outputs.no_such_thing
"""


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIPSTREAM_CODE", str(tmp_path))
    (tmp_path / "user_metric_case.py").write_text(CODE)
    monkeypatch.delitem(sys.modules, "user_metric_case", raising=False)  # that of the test before
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


class TestUserMetric(MetricContract):
    @pytest.fixture
    def case(self) -> Case:
        labels = np.random.default_rng(0).uniform(1, 2, 200).astype(np.float32)
        perfect = labels[:, None, None] * np.ones((1, 1, 2), np.float32)
        noise = np.random.default_rng(1).uniform(0, 0.4, perfect.shape).astype(np.float32)
        return Case(Pair("user_metric_case:within"), labels, perfect, perfect + noise)


class Pair(UserMetric):
    """The same, on outputs of which a sample's first number counts."""

    def evaluate(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return super().evaluate(outputs[:, 0], labels)


def test_it_is_a_mean_whose_name_is_the_functions() -> None:
    metric = metric_for("user_metric_case:within")
    assert (metric.name, metric.mean) == ("within", True)
    outputs, labels = np.array([[1.0], [2.5]]), np.array([1.0, 2.0])
    records = metric.evaluate(outputs, labels)
    assert value(metric, records) == 0.75
    assert worst_class(metric, records, records * 0, labels) == ("all samples", 75.0)


def test_class_scores_differ_by_the_highest_and_other_answers_by_their_distance() -> None:
    differ = metric_for("user_metric_case:within").differ
    assert not differ(np.array([1.0, 2.0]), np.array([0.0, 9.0]))
    assert differ(np.array([1.0, 2.0]), np.array([2.0, 1.9]))
    assert not differ(np.full((2, 2), 1.0), np.full((2, 2), 1.05))
    assert differ(np.full((2, 2), 1.0), np.full((2, 2), 1.2))
    assert not differ(np.zeros((2, 2)), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairs", r"must return \(3,\) scores, one for each sample, not \(2, 3\)"),
        ("percent", "must return scores from 0 to 1, but they run from 100 to 100"),
        ("nothing", "must return scores from 0 to 1, but they run from nan"),
        ("fails", r"failed on outputs \(3, 1\) and labels \(3,\): .*AttributeError"),
    ],
)
def test_what_is_no_score_is_an_error_that_names_the_function(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"^objective.metric: user_metric_case:{name} {message}"):
        metric_for(f"user_metric_case:{name}").evaluate(np.zeros((3, 1)), np.zeros(3))


def test_its_code_is_part_of_its_identity(code: Path) -> None:
    before = identity("user_metric_case:within")
    assert before is not None and before == identity("user_metric_case:within")
    (code / "user_metric_case.py").write_text(CODE.replace("1 - off", "1 - 2 * off"))
    assert identity("user_metric_case:within") != before
