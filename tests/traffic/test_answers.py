import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slipstream.data.splits import Split
from slipstream.errors import DataError, EngineError
from slipstream.measure.metrics.base import value
from slipstream.measure.metrics.classification import TOP1, TOP5
from slipstream.measure.metrics.segmentation import MIOU
from slipstream.serving.answers import AnswerLog
from slipstream.traffic import answers
from slipstream.traffic.load import Record


def record(name: str, sample: int = 0) -> Record:
    return Record(name, sample, 0.0, 200, "v1", np.zeros((1, 3), np.float32), 1.0)


def write(log: AnswerLog, *ids: str, output: tuple[float, ...] = (1, 0, 0)) -> None:
    for name in ids:
        log.write(name, 2.5, np.array([output], np.float32))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def test_only_what_comes_after_the_mark_is_read(path: Path) -> None:
    before = answers.mark(path)
    log = AnswerLog(path, "net--v1")
    write(log, "a", "b")
    middle = answers.mark(path)
    write(log, "c")
    assert set(answers.read(before)) == {"a", "b", "c"}
    assert set(answers.read(middle)) == {"c"}
    found = answers.read(middle)["c"]
    assert found.latency_ms == 2.5
    np.testing.assert_array_equal(found.output, [1, 0, 0])


def test_a_log_that_was_rotated_meanwhile_loses_nothing(path: Path) -> None:
    log = AnswerLog(path, "net--v1", limit_bytes=600)
    write(log, "a")
    mark = answers.mark(path)
    write(log, *(f"r{i}" for i in range(8)))
    assert path.with_name("answers.jsonl.1").exists()
    assert set(answers.read(mark)) == {f"r{i}" for i in range(8)}


def test_a_log_that_was_rotated_too_often_is_an_error_and_no_silence(path: Path) -> None:
    log = AnswerLog(path, "net--v1", limit_bytes=600)
    write(log, "a")
    mark = answers.mark(path)
    write(log, *(f"r{i}" for i in range(80)))
    with pytest.raises(DataError, match="more room than the log has"):
        answers.read(mark)


def test_a_torn_line_is_passed_over(path: Path) -> None:
    write(AnswerLog(path, "net--v1"), "a")
    with path.open("a") as file:
        file.write('{"id": "b", "late\n')
    write(AnswerLog(path, "net--v1"), "c")
    assert set(answers.read(answers.Mark(path, 0, b""))) == {"a", "c"}


def test_half_a_line_is_not_read_yet(path: Path) -> None:
    log = AnswerLog(path, "net--v1")
    write(log, "a")
    with path.open("a") as file:
        file.write('{"id": "b", "late')
    assert set(answers.read(answers.Mark(path, 0, b""))) == {"a"}


def test_waiting_ends_when_all_are_there_or_the_time_is_up(path: Path) -> None:
    mark = answers.mark(path)
    write(AnswerLog(path, "net--v1"), "a")
    assert set(answers.wait_for(mark, ["a"], 60)) == {"a"}
    assert set(answers.wait_for(mark, ["a", "never"], 0.2)) == {"a"}


def test_pairs_are_made_by_id_and_missing_answers_counted(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    write(AnswerLog(path, "net--v1"), "a-0", "b-1", "c-2")
    write(AnswerLog(other, "net--v2"), "c-2", "a-0", output=(0, 1, 0))
    both = [answers.read(answers.Mark(p, 0, b"")) for p in (path, other)]
    pairs, unanswered = answers.pair([record("a-0", 4), record("b-1"), record("c-2", 2), record("unknown-3")], *both)
    assert [p.sample for p in pairs] == [4, 2]
    assert unanswered == 1
    assert answers.different(pairs, TOP1) == 2


def test_what_the_sender_mirrored_is_paired_by_like_latencies() -> None:
    def said(server_ms: float | None, output: list[float] | None, latency_ms: float = 9.0) -> Record:
        found = None if output is None else np.array([output], np.float32)
        return Record("r-0", 3, 0.0, 200, "v1", found, latency_ms, 1.0, server_ms)

    yes, no = [1.0, 0.0], [0.0, 1.0]
    records = [
        replace(said(2.0, yes), mirrored=said(3.0, no)),
        replace(said(2.0, yes), id="stock-1", mirrored=said(None, yes, 12.0)),
        replace(said(2.0, yes), id="unanswered-2", mirrored=said(None, None)),
        replace(said(None, None), id="failed-3", mirrored=said(3.0, yes)),
    ]
    pairs, unanswered = answers.FromRecords().pairs(records)
    assert [(p.champion.latency_ms, p.challenger.latency_ms) for p in pairs] == [(2.0, 3.0), (8.0, 11.0)]
    assert (answers.different(pairs, TOP1), unanswered, pairs[0].sample) == (1, 1, 3)


def answered(*output: float) -> answers.Answered:
    return answers.Answered(1.0, np.array(output, np.float32))


def test_a_nan_answer_is_different_and_wrong() -> None:
    nan = answered(float("nan"), 0, 0)
    pairs = [answers.Pair(0, nan, nan), answers.Pair(0, answered(1, 0, 0), answered(2, 0, 0))]
    split = Split(np.zeros((1, 3), np.float32), np.array([0], np.int64))
    assert answers.different(pairs, TOP1) == 1
    champion, challenger = answers.records(pairs, split, TOP1)
    np.testing.assert_array_equal(champion, [0, 1])
    np.testing.assert_array_equal(challenger, [0, 1])


def test_top5_counts_the_five_highest() -> None:
    output = answered(*[10 - i for i in range(10)])
    split = Split(np.zeros((10, 1), np.float32), np.arange(10, dtype=np.int64))
    pairs = [answers.Pair(i, output, output) for i in range(10)]
    assert answers.records(pairs, split, TOP5)[0].sum() == 5
    assert answers.records(pairs, split, TOP1)[0].sum() == 1


def test_no_pairs_have_no_scores() -> None:
    split = Split(np.zeros((1, 1), np.float32), np.zeros(1, np.int64))
    assert [len(s) for s in answers.records([], split, TOP1)] == [0, 0]
    assert json.dumps(answers.different([], TOP1)) == "0"


def test_an_answer_of_another_shape_is_wrong_and_different() -> None:
    split = Split(np.zeros((1, 3), np.float32), np.array([0], np.int64))
    pairs = [answers.Pair(0, answered(1, 0, 0), answered(1, 0))]
    champion, challenger = answers.records(pairs, split, TOP1)
    assert (champion.tolist(), challenger.tolist(), answers.different(pairs, TOP1)) == ([1], [0], 1)


def test_answers_that_cannot_be_to_these_labels_are_an_error() -> None:
    split = Split(np.zeros((1, 3), np.float32), np.array([7], np.int64))
    with pytest.raises(EngineError, match="the champion: 3 outputs, but labels run from 7 to 7"):
        answers.records([answers.Pair(0, answered(1, 0, 0), answered(1, 0, 0))], split, TOP1)


def test_maps_keep_their_shape_on_the_way_through_the_log(path: Path) -> None:
    maps = np.random.default_rng(0).normal(size=(1, 3, 24, 24)).astype(np.float32)
    AnswerLog(path, "net--v1").write("a", 2.5, maps)
    found = answers.read(answers.Mark(path, 0, b""))["a"].output
    np.testing.assert_array_equal(found, maps[0])
    split = Split(np.zeros((1, 1), np.float32), maps.argmax(1))
    pairs = [answers.Pair(0, answers.Answered(1.0, found), answers.Answered(1.0, -found))]
    champion, challenger = (value(MIOU, records) for records in answers.records(pairs, split, MIOU))
    assert (champion, answers.different(pairs, MIOU)) == (1, 1)
    assert challenger < 0.1
