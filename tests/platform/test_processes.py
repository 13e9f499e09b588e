"""What is found in /proc, and that only this home's orphans are ever stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slipstream.home import Home
from slipstream.platform import launch, processes, supervisor
from slipstream.platform.launch import MARK
from slipstream.platform.programs import Program

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


def eventually(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.05)


def test_the_listener_on_a_port_is_named() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert processes.listener(port) is None
        server.listen()
        found = processes.listener(port)
    assert found is not None
    assert found.pid == os.getpid()
    assert "pytest" in found.command


def test_a_process_knows_when_it_started() -> None:
    before = time.time()
    with subprocess.Popen(SLEEP) as child:
        started = processes.started_at(child.pid)
        child.kill()
    # The kernel counts in hundredths of a second.
    assert before - 0.05 <= started <= time.time() + 0.05
    assert processes.started_at(child.pid) == 0.0


def test_memory_counts_the_children() -> None:
    hungry = "import subprocess, sys; b = bytearray(200 << 20); b[::4096] = b'x' * len(b[::4096]); print(flush=True)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', \"{hungry}; input()\"])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        assert 200 < processes.memory_mib(parent.pid) < 300
        parent.communicate(b"\n")


def test_orphans_of_this_home_are_stopped_and_nothing_else(
    platform_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "pid"
    escape = f"setsid sleep 600 & echo $! > {note}.tmp && mv {note}.tmp {note}; trap '' TERM; wait; sleep 600"
    supervisor.start(platform_home, Program("stubborn", ("/bin/sh", "-c", escape)))
    eventually(note.exists)
    stubborn, escaped = supervisor.state(platform_home, "stubborn").pid, int(note.read_text())
    daemon = supervisor.running_pid(platform_home)
    assert daemon is not None
    # A person's shell may carry the home; and another home's process is not ours.
    shell = subprocess.Popen(SLEEP, env=os.environ | {"SLIPSTREAM_HOME": str(platform_home.root)})
    other = subprocess.Popen(SLEEP, env=os.environ | {MARK: str(tmp_path / "other")})
    try:
        os.kill(daemon, signal.SIGKILL)
        eventually(lambda: supervisor.running_pid(platform_home) is None)
        stopped = {p.pid for p in processes.stop_orphans(platform_home, wait_s=0.5)}
        assert {stubborn, escaped} <= stopped
        assert processes.supervised(platform_home) == []
        assert shell.poll() is None
        assert other.poll() is None
    finally:
        for bystander in (shell, other):
            bystander.kill()
            bystander.wait()


def test_the_caller_and_its_ancestors_are_spared(platform_home: Home) -> None:
    inner = (
        "from pathlib import Path; from slipstream.home import Home; from slipstream.platform import processes;"
        "home = Home.from_environment(); print(len(processes.supervised(home)), len(processes.stop_orphans(home)))"
    )
    outer = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {inner!r}]).returncode)"
    marked = os.environ | {MARK: str(platform_home.root)}
    done = subprocess.run([sys.executable, "-c", outer], env=marked, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "0"]


def test_what_a_kept_program_starts_meanwhile_is_spared(
    platform_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that is taken over starts tasks while `up` looks for what is to be stopped."""
    marked = os.environ | {MARK: str(platform_home.root)}
    stray = subprocess.Popen(SLEEP, env=marked | {launch.PROGRAM: "removed"})
    tasks: list[subprocess.Popen[bytes]] = []
    look = launch.marked

    def look_and_start(home: str) -> dict[int, str]:
        found = look(home)
        if len(tasks) == 3:
            return found
        tasks.append(subprocess.Popen(SLEEP, env=marked | {launch.PROGRAM: "kept"}))
        eventually(lambda: look(home).get(tasks[-1].pid) == "kept")
        return found

    monkeypatch.setattr(launch, "marked", look_and_start)
    try:
        eventually(lambda: look(str(platform_home.root)).get(stray.pid) == "removed")
        assert [p.pid for p in processes.stop_orphans(platform_home, keep=["kept"])] == [stray.pid]
        assert tasks and all(task.poll() is None for task in tasks)
    finally:
        for each in (stray, *tasks):
            each.kill()
            each.wait()
