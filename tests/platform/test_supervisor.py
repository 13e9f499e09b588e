"""What every caller may rely on when it starts a program under supervisord."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import free_port

from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.platform import launch, processes, programs, supervisor
from slipstream.platform.programs import Program
from slipstream.platform.supervisor import ABSENT, ProcessState

PRINT_AND_SLEEP = "import os, sys, time; print(os.environ.get('ANSWER'), flush=True); time.sleep(600)"


def program(name: str = "worker", **environment: str) -> Program:
    return Program(name, (sys.executable, "-c", PRINT_AND_SLEEP), environment)


def eventually(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.05)


def pid(home: Home, name: str = "worker") -> int:
    found = supervisor.state(home, name).pid
    assert found is not None
    return found


def test_a_started_program_runs_with_its_environment_and_logs(shared_home: Home) -> None:
    awkward = """50% of "it's" ; # not a comment, é"""
    supervisor.start(shared_home, program("logs", ANSWER=awkward))
    eventually(lambda: supervisor.state(shared_home, "logs").state == "RUNNING")
    assert awkward in programs.log_file(shared_home, "logs").read_text()


def test_starting_again_changes_nothing(shared_home: Home) -> None:
    supervisor.start(shared_home, program("again"))
    before = pid(shared_home, "again")
    supervisor.start(shared_home, program("again"))
    assert pid(shared_home, "again") == before


def test_a_changed_program_is_restarted_and_no_other(shared_home: Home) -> None:
    supervisor.start(shared_home, program("changed", ANSWER="41"))
    supervisor.start(shared_home, program("bystander"))
    before = pid(shared_home, "changed"), pid(shared_home, "bystander")
    supervisor.start(shared_home, program("changed", ANSWER="42"))
    eventually(lambda: "42" in programs.log_file(shared_home, "changed").read_text())
    assert pid(shared_home, "changed") != before[0]
    assert pid(shared_home, "bystander") == before[1]


def test_a_change_that_was_written_but_not_applied_is_applied_by_the_next_start(shared_home: Home) -> None:
    supervisor.start(shared_home, program("unapplied", ANSWER="41"))
    before = pid(shared_home, "unapplied")
    programs.write(shared_home, program("unapplied", ANSWER="42"))  # killed right after its first write
    supervisor.start(shared_home, program("unapplied", ANSWER="42"))
    assert pid(shared_home, "unapplied") != before


def test_a_killed_program_comes_back(shared_home: Home) -> None:
    supervisor.start(shared_home, program("killed"))
    eventually(lambda: supervisor.state(shared_home, "killed").state == "RUNNING")
    before = pid(shared_home, "killed")
    os.kill(before, signal.SIGKILL)
    eventually(lambda: supervisor.state(shared_home, "killed").pid not in (None, before))


def test_stop_removes_it_for_good_and_can_be_repeated(platform_home: Home) -> None:
    supervisor.start(platform_home, program())
    before = pid(platform_home)
    supervisor.stop(platform_home, "worker")
    supervisor.stop(platform_home, "worker")
    assert not Path(f"/proc/{before}").exists()
    supervisor.shutdown(platform_home)
    supervisor.ensure_running(platform_home)
    assert supervisor.state(platform_home, "worker") == ABSENT


def test_stop_ends_grandchildren_too(shared_home: Home, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {note}.tmp && mv {note}.tmp {note}; wait"
    supervisor.start(shared_home, Program("parent", ("/bin/sh", "-c", script)))
    eventually(note.exists)
    grandchild = int(note.read_text())
    supervisor.stop(shared_home, "parent")
    eventually(lambda: not Path(f"/proc/{grandchild}").exists())


def test_programs_come_back_with_supervisord(platform_home: Home) -> None:
    supervisor.start(platform_home, program())
    daemon = supervisor.running_pid(platform_home)
    assert daemon is not None
    worker = pid(platform_home)
    for each in (daemon, worker):  # what a power cut does
        os.kill(each, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{daemon}").exists())
    assert supervisor.state(platform_home, "worker") == ABSENT
    supervisor.ensure_running(platform_home)
    eventually(lambda: supervisor.state(platform_home, "worker").state == "RUNNING")


def test_a_program_that_ended_is_started_again_by_start(shared_home: Home, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    flaky = Program("flaky", ("/bin/sh", "-c", f"test -e {gate} && exec sleep 600"))
    supervisor.start(shared_home, flaky)
    with supervisor._calls(shared_home) as call:
        call.stopProcess("flaky")
    gate.touch()
    supervisor.start(shared_home, flaky)
    eventually(lambda: supervisor.state(shared_home, "flaky").state == "RUNNING")


def test_what_holds_secrets_is_private(shared_home: Home) -> None:
    supervisor.start(shared_home, program("private", ANSWER="secret"))
    files = [p for p in (shared_home.root / "supervisor").rglob("*") if p.is_file() and b"secret" in p.read_bytes()]
    assert files
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}
    commands = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "ANSWER" not in commands.replace(PRINT_AND_SLEEP, "")


def test_a_home_too_deep_for_a_socket_path_works(home: Path, tmp_path: Path) -> None:
    deep = replace(Home.from_environment(), root=tmp_path / ("d" * 100))
    address = programs.socket_path(deep)
    assert not address.is_relative_to(deep.root)
    try:
        supervisor.start(deep, program())
        assert stat.S_IMODE(address.parent.stat().st_mode) == 0o700
    finally:
        supervisor.shutdown(deep)
        address.parent.rmdir()


def test_a_stale_socket_does_not_count_as_running(platform_home: Home) -> None:
    path = programs.socket_path(platform_home)
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert supervisor.running_pid(platform_home) is None
    supervisor.ensure_running(platform_home)
    assert supervisor.running_pid(platform_home) is not None


def test_a_missing_command_is_a_clear_error(shared_home: Home, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="make setup"):
        supervisor.start(shared_home, Program("absent", (str(tmp_path / "no-such"),)))


def test_a_step_whose_supervisord_died_is_told_so(platform_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.MARK, str(platform_home.root))
    with pytest.raises(Unavailable, match="slipstream up"):
        supervisor.start(platform_home, program())


def kill_supervisord(home: Home) -> int:
    daemon = supervisor.running_pid(home)
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    eventually(lambda: supervisor.running_pid(home) is None)
    return daemon


def test_what_a_killed_supervisord_left_running_is_taken_over_as_it_runs(platform_home: Home) -> None:
    supervisor.start(platform_home, program())
    eventually(lambda: supervisor.state(platform_home, "worker").state == "RUNNING")
    before = pid(platform_home)
    kill_supervisord(platform_home)
    assert supervisor.state(platform_home, "worker") == ProcessState(supervisor.ORPHANED, before)
    supervisor.start(platform_home, program())
    eventually(lambda: supervisor.state(platform_home, "worker").state == "RUNNING")
    assert pid(platform_home) == before
    assert "goes on under a new supervisord" in programs.log_file(platform_home, "worker").read_text()
    kill_supervisord(platform_home)  # the watching process goes with it, and the next one takes over likewise
    supervisor.ensure_running(platform_home)
    eventually(lambda: supervisor.state(platform_home, "worker").state == "RUNNING")
    assert pid(platform_home) == before
    os.kill(before, signal.SIGKILL)
    eventually(lambda: supervisor.state(platform_home, "worker").pid not in (None, before))


def test_what_was_taken_over_is_stopped_and_changed_like_any_other(platform_home: Home, tmp_path: Path) -> None:
    stubborn = Program("stubborn", ("/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"), stop_wait_s=2)
    supervisor.start(platform_home, program(ANSWER="41"))
    supervisor.start(platform_home, stubborn)
    before, unstopped = pid(platform_home), pid(platform_home, "stubborn")
    kill_supervisord(platform_home)
    supervisor.start(platform_home, program(ANSWER="42"))
    eventually(lambda: "42" in programs.log_file(platform_home, "worker").read_text())
    assert pid(platform_home) != before and launch.identity(before) is None
    eventually(lambda: supervisor.state(platform_home, "stubborn").state == "RUNNING")
    assert pid(platform_home, "stubborn") == unstopped
    supervisor.stop(platform_home, "stubborn")
    assert launch.identity(unstopped) is None


def test_children_of_a_killed_parent_are_stopped_before_it_starts_again(platform_home: Home) -> None:
    """As those of MLflow: the worker keeps the port, and the new parent cannot have it."""
    serve = "import socket, time; s = socket.create_server(('127.0.0.1', %d)); time.sleep(600)"
    port = free_port()
    parent = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {serve % port!r}], start_new_session=True)
sys.exit(child.wait())
"""
    supervisor.start(platform_home, Program("server", (sys.executable, "-c", parent)))
    eventually(lambda: processes.listener(port) is not None)
    before, child = pid(platform_home, "server"), processes.listener(port)
    assert child is not None and child.pid != before
    os.kill(before, signal.SIGKILL)
    eventually(lambda: (now := processes.listener(port)) is not None and now.pid != child.pid)
    assert launch.identity(child.pid) is None
    assert processes.holds_port(pid(platform_home, "server"), port)


def test_a_program_logs_on_when_supervisord_is_gone(platform_home: Home, tmp_path: Path) -> None:
    say = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.05)\n"
    say += "print('still here', flush=True); time.sleep(600)"
    supervisor.start(platform_home, Program("talker", (sys.executable, "-c", say)))
    before = pid(platform_home, "talker")
    kill_supervisord(platform_home)
    (tmp_path / "go").touch()
    eventually(lambda: "still here" in programs.log_file(platform_home, "talker").read_text())
    assert supervisor.state(platform_home, "talker").pid == before
    supervisor.ensure_running(platform_home)


def test_logs_are_bounded_while_their_program_writes_on(
    platform_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "LOG_BYTES", 1000)
    say = "import time\nfor n in range(10**6):\n    print(n, 'x' * 99, flush=True); time.sleep(0.01)"
    supervisor.start(platform_home, Program("chatty", (sys.executable, "-c", say)))
    log = programs.log_file(platform_home, "chatty")
    for number in range(1, 6):
        eventually(lambda: log.stat().st_size > 1000)
        programs.rotate_logs(platform_home)
        assert log.with_name(f"chatty.log.{min(number, 3)}").stat().st_size > 1000
    assert sorted(p.name for p in log.parent.glob("chatty*")) == ["chatty.log", *(f"chatty.log.{n}" for n in (1, 2, 3))]
    eventually(lambda: 0 < log.stat().st_size < 1000)  # no hole where the earlier lines were


def test_supervisord_gets_the_environment_of_whoever_started_it_first(
    platform_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by one of its programs, it hands that program's secrets to no other."""
    supervisor.start(platform_home, program("watch", SECRET="of the watch"))
    monkeypatch.setenv("SECRET", "of the watch")
    monkeypatch.setenv("MINE", "of the user")
    monkeypatch.setenv("SUPERVISOR_PROCESS_NAME", "watch")
    monkeypatch.setenv("SLIPSTREAM_PROGRAM", "watch")
    made = programs.base_environment(platform_home)
    assert made["MINE"] == "of the user"
    assert not made.keys() & {"SECRET", "SUPERVISOR_PROCESS_NAME", "SLIPSTREAM_PROGRAM", "SLIPSTREAM_DESCRIPTION"}
