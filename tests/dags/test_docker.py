"""Real containers: a stand-in `slipstream` in an image of its own, run as the runtime `docker` runs steps.

A tier of its own (`make test-docker`).
"""

import hashlib
import io
import json
import os
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.containers.conftest import docker as container_host
from tests.containers.docker import BASE, Docker, make_base

from slipstream.contract import StepInput

ROOT = Path(__file__).parents[2]

if sys.prefix == str(ROOT / ".envs/airflow"):
    import docker

__all__ = ["container_host"]
IMAGE = "slipstream-stand-in:test"
PROGRAM = "#!/usr/bin/env python3\nimport json, os, sys, time\nout = sys.argv[-1].removeprefix('--outputs=')\n"
CONTEXT = {"ti": SimpleNamespace(dag_id="optimize-fashion")}


@pytest.fixture(scope="module")
def daemon(container_host: Docker) -> Iterator[Any]:
    """The daemon, with an image whose `slipstream` runs what the variable BODY says."""
    make_base(container_host)
    before = os.environ.get("DOCKER_HOST")
    os.environ["DOCKER_HOST"] = container_host.host
    client = docker.from_env()
    files = {
        "Dockerfile": f'FROM {BASE}\nCOPY slipstream /usr/bin/\nENTRYPOINT ["slipstream"]\n',
        "slipstream": PROGRAM + "exec(os.environ['BODY'])\n",
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o755
            tar.addfile(entry, io.BytesIO(text.encode()))
    archive.seek(0)
    client.images.build(fileobj=archive, custom_context=True, tag=IMAGE, rm=True)
    yield client
    client.images.remove(IMAGE, force=True)
    os.environ.pop("DOCKER_HOST") if before is None else os.environ.update({"DOCKER_HOST": before})


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(daemon: Any, home: Path, airflow_home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `body` as the step `report`."""
    import runtimes

    monkeypatch.setenv("SLIPSTREAM_RUNTIME", "docker")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "not for steps")
    folder = home / "runs" / "fashion" / "r"
    folder.mkdir(parents=True)
    (folder / "spec.yaml").write_text((ROOT / "examples/fashion.yaml").read_text())

    def go(body: str, **more: Any) -> dict[str, Any]:
        settings = {"image": IMAGE, "environment": {"BODY": body}, **more}
        (home / "settings.yaml").write_text(json.dumps(settings))
        return runtimes.run_step("report", str(folder / "spec.yaml"), StepInput(run_key="r"), CONTEXT)

    return go


def containers(daemon: Any) -> list[str]:
    found = daemon.containers.list(all=True, filters={"label": "slipstream.run=r"})
    return [c.name for c in found]


def test_output_and_log_come_back_and_nothing_is_left(
    daemon: Any, run: Run, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = run("print('1/2', flush=True); print('2/2')\nopen(out, 'w').write(json.dumps(dict(os.environ)))")
    said = capsys.readouterr().out
    assert "1/2" in said and "2/2" in said
    assert environment["SLIPSTREAM_HOME"] == str(home)
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert not any("AIRFLOW__" in name for name in environment)
    assert containers(daemon) == []


def test_the_container_is_locked_down(run: Run) -> None:
    status = run(
        "status = dict(l.split(':\\t') for l in open('/proc/self/status').read().splitlines() if ':\\t' in l)\n"
        "try: open('/usr/bin/x', 'w'); wrote = True\n"
        "except OSError: wrote = False\n"
        "open('/tmp/x', 'w').close()\n"
        "open(out, 'w').write(json.dumps(status | {'wrote': wrote, 'uid': os.getuid()}))"
    )
    assert status["wrote"] is False
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["uid"] == os.getuid()


@pytest.mark.parametrize(("code", "final"), [(1, False), (2, True), (3, True)])
def test_exit_codes_decide_about_retries(daemon: Any, run: Run, code: int, final: bool) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    with pytest.raises(AirflowException) as raised:
        run(f"print('noise'); print('Gate failed: accuracy: fail'); print('  int8: too bad'); sys.exit({code})")
    assert isinstance(raised.value, AirflowFailException) is final
    assert str(raised.value).endswith("Gate failed: accuracy: fail\n  int8: too bad")
    assert containers(daemon) == []


def test_the_memory_limit_says_so(run: Run) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match=r"more than its memory limit \(64Mi\); raise resources\.report"):
        run("x = bytearray(256 * 2**20); print(len(x))", resources={"report": {"memory": "64Mi"}})


def test_a_missing_image_says_how_to_build_it(run: Run) -> None:
    from airflow.sdk.exceptions import AirflowException

    with pytest.raises(AirflowException, match=r"slipstream-nowhere:1 is not on this machine \(`make images`"):
        run("", image="slipstream-nowhere:1")


def test_no_daemon_is_tried_again(run: Run, tmp_path: Path) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    with pytest.raises(AirflowException, match="Docker at unix://") as raised:
        run("", docker={"url": f"unix://{tmp_path}/no.sock"})
    assert not isinstance(raised.value, AirflowFailException)


def test_stopping_ends_the_container(daemon: Any, run: Run) -> None:
    from airflow.sdk.exceptions import AirflowException

    import runtimes

    def stop_when_started() -> None:
        until(lambda: any(c.status == "running" for c in daemon.containers.list(filters={"label": "slipstream.run=r"})))
        runtimes.stop_step()

    stopper = threading.Thread(target=stop_when_started)
    stopper.start()
    began = time.monotonic()
    with pytest.raises(AirflowException):
        run("time.sleep(60)")
    stopper.join()
    assert time.monotonic() - began < 30
    assert containers(daemon) == []


def test_what_a_killed_task_left_is_replaced(daemon: Any, run: Run) -> None:
    home = hashlib.sha256(os.environ["SLIPSTREAM_HOME"].encode()).hexdigest()[:8]
    left = daemon.containers.run(
        IMAGE,
        detach=True,
        name=f"slipstream-{home}-optimize-fashion-r-report",
        environment={"BODY": "time.sleep(60)"},
        labels={"slipstream.run": "r"},
    )
    assert run("open(out, 'w').write('{\"fine\": true}')") == {"fine": True}
    with pytest.raises(docker.errors.NotFound):
        left.reload()


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
