"""Profilers really started, where they are installed: `perf` on an ONNX Runtime engine."""

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.engines.candidates import network, write
from tests.engines.images import samples

from slipstream.engines.base import build_engine
from slipstream.errors import EngineError
from slipstream.measure import profiles
from slipstream.spec import Target


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    candidate = write(tmp_path / "candidate", network())
    build_engine(candidate, Target(engine="onnxruntime", threads=1), tmp_path / "engine")
    return tmp_path / "engine"


def may_record(folder: Path) -> bool:
    """Whether this machine lets `perf` record."""
    if shutil.which("perf") is None:
        return False
    done = subprocess.run(
        ["perf", "record", "-q", "-o", str(folder / "try.perf"), "--", "true"], capture_output=True, check=False
    )
    return done.returncode == 0


def test_perf_records_the_engine_at_work(engine: Path, tmp_path: Path) -> None:
    if not may_record(tmp_path):
        pytest.skip("perf is not installed, or may not record here")
    found = profiles.record("perf", engine, samples(4), tmp_path / "profile", requests=50)
    assert found.name == "engine.perf" and found.stat().st_size > 1000
    said = subprocess.run(
        ["perf", "report", "--stdio", "--no-children", "-i", str(found)], capture_output=True, text=True, check=False
    )
    assert "python" in said.stdout


def test_a_profiler_that_fails_says_why(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nsys").write_text("#!/bin/sh\necho 'the driver does not answer' >&2\nexit 4\n")
    (tools / "nsys").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    with pytest.raises(EngineError, match="nsys ended with exit code 4: the driver does not answer"):
        profiles.record("nsys", engine, samples(1), tmp_path / "profile")


def test_what_is_profiled_answers_requests(engine: Path, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "samples.npy", samples(3))
    profiles.answer(engine, tmp_path / "samples.npy", requests=7)


def test_only_a_target_that_asks_is_profiled() -> None:
    assert profiles.wanted(Target(engine="onnxruntime")) is None
    profiles.require_tool(Target(engine="onnxruntime"))
    asks = Target(engine="tensorrt", device="GPU", options={"profile": "nsys"})
    assert profiles.wanted(asks) == "nsys"
