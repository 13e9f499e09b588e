import json
from pathlib import Path

import numpy as np
import pytest

from slipstream.serving.answers import AnswerLog, read_output


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    log = AnswerLog(tmp_path / "deep" / "answers.jsonl", "m--v1")
    log.write("id-1", 1.23456789, np.array([[0.12345678, -2]], np.float32))
    line = json.loads((tmp_path / "deep" / "answers.jsonl").read_text())
    assert set(line) == {"id", "release", "at", "latency_ms", "output"}
    assert (line["id"], line["release"], line["latency_ms"]) == ("id-1", "m--v1", 1.2346)
    assert line["output"] == [[0.123457, -2.0]]
    log.close()


def test_long_answers_are_written_short_and_read_back_as_they_were(tmp_path):
    outputs = [np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((1, 5, 32, 32), (1, 10))]
    log = AnswerLog(tmp_path / "answers.jsonl", "m--v1")
    for output in outputs:
        log.write("id", 1, output)
    log.close()
    long, short = (json.loads(line)["output"] for line in (tmp_path / "answers.jsonl").read_text().splitlines())
    np.testing.assert_array_equal(read_output(long), outputs[0])
    np.testing.assert_allclose(read_output(short), outputs[1], atol=1e-6)
    assert isinstance(short, list) and len(json.dumps(long)) < 6 * outputs[0].size


def test_a_restarted_server_appends(tmp_path):
    path = tmp_path / "answers.jsonl"
    for name in ("a", "b"):
        log = AnswerLog(path, "m--v1")
        log.write(name, 1, np.zeros((1, 1)))
        log.close()
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_a_log_that_cannot_be_written_costs_no_answer_and_comes_back(tmp_path, caplog):
    full = Path("/dev/full")  # every write to it says that there is no space left
    if not full.exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "answers.jsonl"
    path.symlink_to(full)
    log = AnswerLog(path, "m--v1")
    for name in ("lost", "lost too"):
        log.write(name, 1, np.zeros((1, 1)))
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "answers are not logged: [Errno 28] No space left on device"
    ]
    path.unlink()
    for name in ("opens the file again", "kept"):
        log.write(name, 1, np.zeros((1, 1)))
    log.close()
    assert "kept" in [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_the_file_is_rotated_and_one_old_one_is_kept(tmp_path):
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path, "m--v1", limit_bytes=300)
    for i in range(40):
        log.write(str(i), 1, np.zeros((1, 4)))
    log.close()
    assert {p.name for p in tmp_path.iterdir()} == {"answers.jsonl", "answers.jsonl.1"}
    old, new = (tmp_path / "answers.jsonl.1").read_text(), path.read_text()
    kept = [int(json.loads(line)["id"]) for line in (old + new).splitlines()]
    assert kept == list(range(kept[0], 40))
    assert 300 < len(old) < 600
    assert len(new) <= 300
