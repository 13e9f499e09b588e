"""What supervisord runs in place of a program: it becomes the program, or takes over one that already runs.

A program's command and environment are in a separate JSON file, which only its owner can read: supervisord's ini format
cannot represent every value (a quote of each kind, ` ;` and `#` start a comment), and environments contain secrets. It
is run by path, without importing slipstream, so it adds only about 20 ms and no memory.

Programs outlive a supervisord that is killed. Each leaves a record of its process; under the next supervisord this
module finds it and watches that process instead of starting a second one, so servers continue to answer. Other remains
of a program (the children of a killed parent, which may hold its port) are stopped before the program starts.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable

MARK = "SLIPSTREAM_SUPERVISED"
"""Set to the home in everything that supervisord starts, to find orphans. SLIPSTREAM_HOME cannot be used: a user's
shell may have it too."""
PROGRAM = "SLIPSTREAM_PROGRAM"
"""Name of the program that a process belongs to; its children inherit it."""
DESCRIPTION = "SLIPSTREAM_DESCRIPTION"
"""Digest of the program's description."""

Record = dict[str, "int | str"]
"""A program's process: `pid`, `identity` (see there), and `description`, the digest of the description it was started
from."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_PR_SET_PDEATHSIG = 1


def main(description: str, record: str, log: str) -> None:
    """Become the described program, or watch it; return 127 if its command cannot be executed, like a shell."""
    _write_to(log)
    with open(description, encoding="utf-8") as file:  # noqa: PTH123 (pathlib would double the start time)
        program = json.load(file)
    process = recorded(record)
    if process is not None and process["description"] == os.environ[DESCRIPTION]:
        watch(int(process["pid"]), program["stop_wait_s"])
    stop(left_over(process), program["stop_wait_s"], signal.Signals[f"SIG{program['stop_signal']}"])
    command = program["command"]
    try:
        if program["directory"]:
            os.chdir(program["directory"])
        _record(record)
        os.execvpe(command[0], command, os.environ | program["environment"])  # noqa: S606 (no shell is the point)
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error}\n")
        sys.exit(127)


def recorded(record: str) -> Record | None:
    """Return the recorded process if it is alive; None if it has ended."""
    try:
        with open(record, encoding="utf-8") as file:  # noqa: PTH123
            process: Record = json.load(file)
    except (OSError, ValueError):
        return None
    return process if identity(int(process["pid"])) == process["identity"] else None


def identity(pid: int) -> str | None:
    """Return what distinguishes a process from a later one with the same number: its start and boot. None if it
    ended."""
    try:
        fields = _stat(f"/proc/{pid}/stat")
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:  # noqa: PTH123
            boot = file.read().strip()
    except OSError:
        return None
    # Fields 3 and 22 of proc(5)'s stat: the state, where Z is a zombie, and the start in clock ticks since boot.
    return None if fields[0] == b"Z" else f"{boot}:{int(fields[19])}"


def marked(home: str) -> dict[int, str]:
    """Return the program of each process with the home's mark; empty if it names none.

    Both come from one read of a process: a second read would see processes that have started since.
    """
    mark, program = f"{MARK}={home}".encode(), f"{PROGRAM}=".encode()
    processes = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:  # noqa: PTH123
                    variables = file.read().split(b"\0")
            except OSError:  # it ended, or belongs to another user
                continue
            if mark in variables:
                names = [v.removeprefix(program).decode() for v in variables if v.startswith(program)]
                processes[int(entry)] = names[0] if names else ""
    return processes


def of_program(home: str, program: str) -> set[int]:
    """Return processes of one program: its own, and those they started."""
    return {pid for pid, name in marked(home).items() if name == program}


def left_over(process: Record | None) -> set[int]:
    """Return processes of this program: those with its mark, and its recorded one, which may be unreadable."""
    pids = of_program(os.environ[MARK], os.environ[PROGRAM])
    pids |= {int(process["pid"])} if process is not None else set()
    return pids - {os.getpid()}


def stop(pids: set[int], wait_s: float, ask: int = signal.SIGTERM) -> None:
    """Stop processes with the signal `ask`, and after `wait_s` with SIGKILL. Return when they have ended."""
    living = {pid: name for pid in pids if (name := identity(pid)) is not None}
    deadline, signaled = time.monotonic() + wait_s, False
    while living:
        late = time.monotonic() > deadline
        if not signaled or late:
            for pid in living:
                _signal(os.kill, pid, signal.SIGKILL if late else ask)
            signaled = True
        time.sleep(0.05)
        living = {pid: name for pid, name in living.items() if identity(pid) == name}


def watch(pid: int, stop_wait_s: int) -> None:
    """Represent a process that an earlier supervisord started: forward signals to it, and end when it ends.

    It ends with this supervisord, so that the next one can take the process over in the same way.
    """
    import ctypes  # needed only here

    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # supervisord died before the call above
        sys.exit(1)
    group = os.getpgid(pid)
    received: list[int] = []

    def hand_on(number: int, _: object) -> None:
        received.append(number)
        _signal(os.killpg, group, number)
        signal.alarm(max(stop_wait_s - 1, 1))  # supervisord's own SIGKILL would reach only this process

    for number in STOPS:
        signal.signal(number, hand_on)
    signal.signal(signal.SIGALRM, lambda *_: _signal(os.killpg, group, signal.SIGKILL))
    print(f"process {pid} goes on under a new supervisord", flush=True)
    _await_end(pid)
    sys.exit(0 if received else 1)


def _await_end(pid: int) -> None:
    import select

    try:
        ended = select.poll()
        ended.register(os.pidfd_open(pid), select.POLLIN)
        ended.poll()
    except ProcessLookupError:
        return
    except OSError:  # a kernel before 5.3
        before = identity(pid)
        while identity(pid) == before:
            time.sleep(0.2)


def _write_to(log: str) -> None:
    """Write directly to the log: a pipe to supervisord would break with it. slipstream bounds the file's size."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)


def _record(record: str) -> None:
    pid = os.getpid()
    text = json.dumps({"pid": pid, "identity": identity(pid), "description": os.environ[DESCRIPTION]})
    with open(f"{record}.{pid}", "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(text)
    os.replace(f"{record}.{pid}", record)  # noqa: PTH105


def _stat(path: str) -> list[bytes]:
    """Return fields of proc(5)'s stat from the third on: the command before may contain spaces and parentheses."""
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read().rpartition(b")")[2].split()


def _signal(send: Callable[[int, int], None], target: int, number: int) -> None:
    try:
        send(target, number)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main(*sys.argv[1:])
