"""Latency of single requests, issued and timed by MLPerf LoadGen.

LoadGen decides when a query is issued and takes its time; the figures are its own. The blocks are far shorter than
MLPerf's rules require, so nothing measured here is an MLPerf result or may be called one.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from slipstream.errors import SlipstreamError

if TYPE_CHECKING:  # not in every environment; imported when a test runs
    import mlperf_loadgen

Issue = Callable[[int], object]
"""Runs one request on the sample with this index, and returns when it is answered."""
Settings: TypeAlias = "mlperf_loadgen.TestSettings"
Queries: TypeAlias = "list[mlperf_loadgen.QuerySample]"


@dataclass(frozen=True)
class Block:
    """One LoadGen test: latency of each query in milliseconds, in the order of issue."""

    latencies_ms: npt.NDArray[np.float64]
    valid: bool
    """LoadGen's own verdict: its minimum duration, query count and early-stopping rule were met."""


def single_stream(
    issue: Issue, samples: int, *, duration_ms: int, min_queries: int, expected_ms: float, seed: int
) -> Block:
    """Run the scenario SingleStream: each query is issued when the previous one is answered.

    LoadGen prepares duration / expected queries in advance, so `expected_ms` must not be above the true latency.
    """
    import mlperf_loadgen as loadgen

    settings = _settings(loadgen, loadgen.TestScenario.SingleStream, duration_ms, min_queries, seed)
    settings.single_stream_expected_latency_ns = max(int(expected_ms * 1e6), 1)
    return _test(loadgen, issue, samples, settings)


def server(
    issue: Issue,
    samples: int,
    *,
    duration_ms: int,
    min_queries: int,
    rate_per_s: float,
    seed: int,
    limit_ms: float = 1000.0,
) -> Block:
    """Run the scenario Server: queries arrive as a Poisson process; a latency counts from the scheduled arrival.

    `limit_ms` is the latency limit of LoadGen's verdict.
    """
    import mlperf_loadgen as loadgen

    settings = _settings(loadgen, loadgen.TestScenario.Server, duration_ms, min_queries, seed)
    settings.server_target_qps = rate_per_s
    settings.server_target_latency_ns = int(limit_ms * 1e6)
    return _test(loadgen, issue, samples, settings)


def _settings(
    loadgen: ModuleType, scenario: "mlperf_loadgen.TestScenario", duration_ms: int, min_queries: int, seed: int
) -> Settings:
    settings = loadgen.TestSettings()
    settings.scenario = scenario
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = duration_ms
    settings.min_query_count = min_queries
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = seed
    return settings


def _test(loadgen: ModuleType, issue: Issue, samples: int, settings: Settings) -> Block:
    """Run one test. An exception in `issue` is raised here, not in LoadGen's C++ frames, which would not survive it."""
    failures: list[Exception] = []

    def answer(queries: Queries) -> None:
        for query in queries:
            if not failures:  # after a failure the remaining queries are answered empty, so that the test ends
                try:
                    issue(query.index)
                except Exception as error:
                    failures.append(error)
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query.id, 0, 0)])

    with tempfile.TemporaryDirectory(prefix="loadgen-") as folder:
        _start(loadgen, answer, samples, settings, folder)
        if failures:
            raise failures[0]
        return _read(Path(folder))


def _start(
    loadgen: ModuleType, answer: Callable[[Queries], None], samples: int, settings: Settings, folder: str
) -> None:
    logs = loadgen.LogSettings()
    output = loadgen.LogOutputSettings()
    output.outdir = folder
    output.copy_summary_to_stdout = False
    logs.log_output = output
    logs.enable_trace = True  # the only place where LoadGen writes the latency of every query
    sut = loadgen.ConstructSUT(answer, lambda: None)
    library = loadgen.ConstructQSL(samples, samples, lambda _: None, lambda _: None)
    try:
        loadgen.StartTestWithLogSettings(sut, library, settings, logs, "")
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(sut)


def _read(folder: Path) -> Block:
    """Return latencies from the trace (`complete_ns` counts from the scheduled time), and the summary's verdict."""
    trace = (folder / "mlperf_log_trace.json").read_text()
    samples = re.findall(r'"sample_seq":(\d+),[^}]*"complete_ns":(\d+)', trace)
    if not samples:
        raise SlipstreamError(
            f"LoadGen issued no query; its summary: {(folder / 'mlperf_log_summary.txt').read_text()}"
        )
    in_order = sorted((int(sequence), int(ns)) for sequence, ns in samples)
    valid = "Result is : VALID" in (folder / "mlperf_log_summary.txt").read_text()
    return Block(np.array([ns for _, ns in in_order], dtype=np.float64) / 1e6, valid)
