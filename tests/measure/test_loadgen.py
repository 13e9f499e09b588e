"""LoadGen's own figures for a callable whose latency is known."""

import re
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlperf_loadgen", reason="needs the torch environment")

from slipstream.measure import loadgen


def wait(ms: float) -> None:
    end = time.perf_counter() + ms / 1e3
    while time.perf_counter() < end:
        pass


def test_single_stream_times_every_query() -> None:
    asked: list[int] = []

    def issue(index: int) -> None:
        asked.append(index)
        wait(1.0)

    block = loadgen.single_stream(issue, 7, duration_ms=50, min_queries=130, expected_ms=0.3, seed=1)
    assert len(block.latencies_ms) == len(asked) >= 130
    assert set(asked) <= set(range(7))
    assert block.latencies_ms.min() >= 1.0
    assert np.quantile(block.latencies_ms, 0.2) == pytest.approx(1.0, abs=0.3)
    assert block.valid


def test_the_same_seed_asks_for_the_same_samples() -> None:
    orders = []
    for seed in (1, 1, 2):
        asked: list[int] = []
        loadgen.single_stream(asked.append, 50, duration_ms=5, min_queries=50, expected_ms=0.1, seed=seed)
        orders.append(asked[:50])
    assert orders[0] == orders[1] != orders[2]


def test_min_queries_outlasts_the_duration() -> None:
    block = loadgen.single_stream(lambda _: wait(2), 3, duration_ms=10, min_queries=64, expected_ms=1, seed=0)
    assert len(block.latencies_ms) >= 64


def test_server_latency_includes_the_wait_in_the_queue() -> None:
    """At 80 % load of a 1 ms server, requests wait: for Poisson arrivals the mean is 3 ms (M/D/1), not 1 ms."""
    block = loadgen.server(lambda _: wait(1), 5, duration_ms=600, min_queries=10, rate_per_s=800, seed=3)
    assert 250 < len(block.latencies_ms) < 800
    assert block.latencies_ms.mean() > 1.4


@pytest.mark.parametrize("scenario", ["single_stream", "server"])
def test_an_exception_in_the_subject_surfaces(scenario: str) -> None:
    calls: list[int] = []

    def issue(index: int) -> None:
        calls.append(index)
        if len(calls) == 5:
            raise RuntimeError("engine broke at query 5")

    with pytest.raises(RuntimeError, match="engine broke at query 5"):
        if scenario == "server":
            loadgen.server(issue, 3, duration_ms=50, min_queries=10, rate_per_s=500, seed=0)
        else:
            loadgen.single_stream(issue, 3, duration_ms=50, min_queries=10, expected_ms=1, seed=0)
    assert len(calls) == 5, "nothing is asked of a broken engine again"
    block = loadgen.single_stream(lambda _: wait(0.5), 3, duration_ms=20, min_queries=10, expected_ms=0.3, seed=0)
    assert len(block.latencies_ms) >= 10, "and LoadGen still works afterwards"


def test_logs_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loadgen.single_stream(lambda _: None, 3, duration_ms=5, min_queries=10, expected_ms=0.01, seed=0)
    assert not [p for p in tmp_path.iterdir() if re.search("mlperf|loadgen", p.name)]
