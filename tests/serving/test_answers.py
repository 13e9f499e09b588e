import json

import numpy as np

from slipstream.serving.answers import AnswerLog


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    log = AnswerLog(tmp_path / "deep" / "answers.jsonl", "m--v1")
    log.write("id-1", 1.23456789, np.array([[0.12345678, -2]], np.float32))
    line = json.loads((tmp_path / "deep" / "answers.jsonl").read_text())
    assert set(line) == {"id", "release", "at", "latency_ms", "output"}
    assert (line["id"], line["release"], line["latency_ms"]) == ("id-1", "m--v1", 1.2346)
    assert line["output"] == [[0.123457, -2.0]]
    log.close()


def test_a_restarted_server_appends(tmp_path):
    path = tmp_path / "answers.jsonl"
    for name in ("a", "b"):
        log = AnswerLog(path, "m--v1")
        log.write(name, 1, np.zeros((1, 1)))
        log.close()
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]


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
