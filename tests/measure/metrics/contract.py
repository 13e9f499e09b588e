"""What every metric promises. A metric subclasses `MetricContract` and gives a fixture `case`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from slipstream.contract.arrays import Array
from slipstream.errors import EngineError, ModelError
from slipstream.measure.metrics.base import Metric, drop, record, value, worst_class

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Case:
    """Answers to labeled samples: perfect ones, and others that are partly wrong. At least 60 samples."""

    metric: Metric
    labels: Array
    perfect: Array
    worse: Array

    def records(self, outputs: Array) -> Array:
        self.metric.check(outputs, self.labels, "the model")
        return self.metric.evaluate(outputs, self.labels)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class Answering:
    """A model that answers from a table, in order."""

    def __init__(self, outputs: Array) -> None:
        self.outputs, self.at = outputs, 0

    def run(self, batch: Array) -> Array:
        self.at += len(batch)
        return self.outputs[self.at - len(batch) : self.at]


class MetricContract:
    def test_perfect_answers_are_worth_1_and_worse_ones_less(self, case: Case) -> None:
        assert value(case.metric, case.records(case.perfect)) == pytest.approx(1)
        assert 0 < value(case.metric, case.records(case.worse)) < 0.95

    def test_there_is_a_plain_record_for_each_sample(self, case: Case, tmp_path: Any) -> None:
        records = case.records(case.worse)
        assert records.shape == (len(case.labels),)
        np.save(tmp_path / "records.npy", records, allow_pickle=False)
        read = np.load(tmp_path / "records.npy", allow_pickle=False)
        assert value(case.metric, read) == value(case.metric, records)

    def test_the_order_of_samples_does_not_matter(self, case: Case) -> None:
        order = rng().permutation(len(case.labels))
        shuffled = case.metric.evaluate(case.worse[order], case.labels[order])
        assert value(case.metric, shuffled) == pytest.approx(value(case.metric, case.records(case.worse)))

    def test_batches_do_not_matter(self, case: Case) -> None:
        parts = [case.metric.evaluate(case.worse[s], case.labels[s]) for s in (slice(0, 7), slice(7, None))]
        assert value(case.metric, np.concatenate(parts)) == value(case.metric, case.records(case.worse))

    def test_counts_mean_the_same_as_samples_that_are_there_so_often(self, case: Case) -> None:
        drawn = rng().integers(0, len(case.labels), (3, len(case.labels)))
        counts = np.stack([np.bincount(row, minlength=len(case.labels)) for row in drawn]).astype(float)
        found = case.metric.values(case.records(case.worse), counts)
        for got, row in zip(found, drawn, strict=True):
            again = case.metric.evaluate(case.worse[row], case.labels[row])
            assert got == pytest.approx(value(case.metric, again))

    def test_classes_that_lose_are_found(self, case: Case) -> None:
        before, after = case.records(case.perfect), case.records(case.worse)
        assert set(case.metric.by_class(before, case.labels).values()) <= {1.0}
        name, lost = worst_class(case.metric, before, after, case.labels)
        assert name and lost > 5
        assert worst_class(case.metric, after, after, case.labels)[1] == 0

    def test_a_drop_lies_within_its_bounds_and_equal_answers_leave_doubt(self, case: Case) -> None:
        before, after = case.records(case.perfect), case.records(case.worse)
        found = drop(case.metric, before, after, CONFIDENCE, rng())
        assert found.estimate == pytest.approx(1 - value(case.metric, after))
        assert found.low < found.estimate < found.high
        none = drop(case.metric, after, after, CONFIDENCE, rng())
        assert none.estimate == 0 < none.high < 0.1

    def test_too_few_samples_carry_no_bound(self, case: Case) -> None:
        few = np.random.default_rng(1).permutation(len(case.labels))[:1]
        before, after = (case.metric.evaluate(o[few], case.labels[few]) for o in (case.perfect, case.worse))
        found = drop(case.metric, before, after, CONFIDENCE, rng())
        assert not found.known or found.high > 0.5
        assert not drop(case.metric, before[:0], after[:0], CONFIDENCE, rng()).known

    def test_nan_is_refused_or_in_traffic_wrong_and_different(self, case: Case) -> None:
        broken = case.perfect.copy()
        broken[3] = np.nan
        with pytest.raises(ModelError, match=rf"the model: 1 of {len(broken)} outputs hold NaN"):
            case.metric.check(broken, case.labels, "the model", ModelError)
        found, whole = case.metric.evaluate(broken, case.labels), case.records(case.perfect)
        assert value(case.metric, found) < value(case.metric, whole)
        assert case.metric.differ(broken[3], broken[3])
        assert case.metric.differ(broken[3], case.perfect[3])

    def test_an_answer_does_not_differ_from_itself_but_some_worse_ones_do(self, case: Case) -> None:
        assert not any(case.metric.differ(answer, answer) for answer in case.worse)
        assert any(case.metric.differ(a, b) for a, b in zip(case.perfect, case.worse, strict=True))

    def test_what_has_another_shape_is_no_answer(self, case: Case) -> None:
        short = case.perfect[:-1]
        with pytest.raises(EngineError, match=r"the model: outputs have shape"):
            case.metric.check(short, case.labels, "the model")
        assert case.metric.differ(case.perfect[0], case.perfect[0][..., :-1])

    def test_a_model_is_asked_in_batches(self, case: Case) -> None:
        from slipstream.data.splits import Split

        inputs = np.zeros((len(case.labels), 1), np.float32)
        found = record(Answering(case.worse), Split(inputs, case.labels), case.metric, what="the model")
        assert value(case.metric, found) == value(case.metric, case.records(case.worse))
