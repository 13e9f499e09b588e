"""Real processes: a stand-in `slipstream` in an environment of its own, run as the production runtime runs steps."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slipstream.contract import StepInput

ROOT = Path(__file__).parents[2]
HEAD = f"#!{sys.executable}\nimport json, os, sys, time\nout = sys.argv[-1].removeprefix('--outputs=')\n"


@pytest.fixture
def program(home: Path, airflow_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the step's program goes; `serve` is the environment of the step `report`."""
    monkeypatch.setenv("SLIPSTREAM_ENVS", str(tmp_path / "envs"))
    path = tmp_path / "envs/serve/bin/slipstream"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text((ROOT / "examples/fashion.yaml").read_text())
    return path


def write(program: Path, body: str) -> None:
    program.write_text(HEAD + body)
    program.chmod(0o755)


def run(spec_path: Path) -> dict[str, object]:
    import runtimes

    return runtimes.run_step("report", str(spec_path), StepInput(run_key="r"), {})


def test_output_is_returned_and_every_line_is_logged(
    program: Path, spec_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "not for steps")
    write(program, "print('1/2'); print('2/2', file=sys.stderr)\nopen(out, 'w').write(json.dumps(dict(os.environ)))\n")
    with caplog.at_level("INFO", "slipstream.step"):
        environment = run(spec_path)
    assert sorted(r.message for r in caplog.records) == ["1/2", "2/2"]
    assert not any("AIRFLOW__" in name for name in environment)
    assert environment["SLIPSTREAM_HOME"] == os.environ["SLIPSTREAM_HOME"]
    assert json.loads((spec_path.parent / "report.in.json").read_text())["run_key"] == "r"


@pytest.mark.parametrize(("code", "final"), [(1, False), (2, True), (3, True), (70, False)])
def test_exit_codes_decide_about_retries(program: Path, spec_path: Path, code: int, final: bool) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    write(program, f"print('noise'); print('Gate failed: accuracy: fail'); print('  int8: too bad'); sys.exit({code})")
    with pytest.raises(AirflowException) as raised:
        run(spec_path)
    assert isinstance(raised.value, AirflowFailException) is final
    assert str(raised.value).endswith("Gate failed: accuracy: fail\n  int8: too bad")
    assert "noise" not in str(raised.value)


def test_a_step_killed_by_a_signal_is_tried_again(program: Path, spec_path: Path) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    write(program, "os.kill(os.getpid(), 9)")
    with pytest.raises(AirflowException, match="signal 9") as raised:
        run(spec_path)
    assert not isinstance(raised.value, AirflowFailException)


def test_a_missing_environment_is_named(program: Path, spec_path: Path) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match="needs the environment serve"):
        run(spec_path)


def test_stopping_ends_the_step_and_its_children(program: Path, spec_path: Path, tmp_path: Path) -> None:
    from airflow.sdk.exceptions import AirflowException

    import runtimes

    pids = tmp_path / "pids"
    write(program, f"c = os.fork()\nif c: open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{c}}')\ntime.sleep(60)")

    def stop_when_started() -> None:
        _until(pids.exists)
        _until(lambda: len(pids.read_text().split()) == 2)
        runtimes.stop_step()

    stopper = threading.Thread(target=stop_when_started)
    stopper.start()
    with pytest.raises(AirflowException, match="signal 15"):
        run(spec_path)
    stopper.join()
    for pid in map(int, pids.read_text().split()):
        _until(lambda pid=pid: not _alive(pid))


def test_a_step_ends_when_its_task_process_is_killed(program: Path, spec_path: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    write(program, f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    code = (
        "import sys; sys.path.insert(0, 'dags'); import runtimes;"
        "from slipstream.contract import StepInput;"
        f"runtimes.run_step('report', {str(spec_path)!r}, StepInput(run_key='r'), {{}})"
    )
    task = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    _until(lambda: pid_file.exists() and pid_file.read_text() != "", seconds=40)
    task.send_signal(signal.SIGKILL)
    task.wait()
    _until(lambda: not _alive(int(pid_file.read_text())))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _until(true: object, seconds: float = 10) -> None:
    assert callable(true)
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
