"""Steps as processes on this machine, each in the virtual environment that it needs."""

import ctypes
import logging
import os
import signal
import subprocess
from collections import deque

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowFailException

from runtimes.base import Job, raise_for
from slipstream.platform import addresses

log = logging.getLogger("slipstream.step")

GRACE_S = 4
"""Seconds between SIGTERM and SIGKILL; Airflow's own grace is 5 s."""


def runtime() -> "Subprocess":
    """Return this runtime."""
    return Subprocess()


class Subprocess:
    """The step's virtual environment on this machine, in a separate process group."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, job: Job, context: Context) -> None:
        """See Runtime."""
        program = job.home.envs / job.environment / "bin" / "slipstream"
        if not program.exists():
            raise AirflowFailException(
                f"step {job.step} needs the environment {job.environment}, but {program} does not exist; "
                "`make setup` makes the environments, and `scripts/setup tensorrt` that of the engine tensorrt"
            )
        code, lines = self._stream([str(program), *job.arguments], _environment(job))
        raise_for(job, code, lines)

    def _stream(self, command: list[str], environment: dict[str, str]) -> tuple[int, list[str]]:
        """Run to the end, copying each line into the task log; return the exit code and the last lines."""
        parent = os.getpid()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509 (two system calls, no lock taken)
        )
        self._process = process
        assert process.stdout is not None
        last: deque[str] = deque(maxlen=60)
        try:
            for line in process.stdout:
                last.append(line.rstrip())
                log.info("%s", last[-1])
            return process.wait(), list(last)
        finally:
            self.stop()

    def stop(self) -> None:
        """See Runtime."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        _signal(process, signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Runs in the child before exec: if the task process is killed with SIGKILL, the kernel ends the step.

    The signal is SIGTERM, which ends a step at once, unless it moves traffic and must first restore it.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        log.debug("process group %d has ended", process.pid)


def _environment(job: Job) -> dict[str, str]:
    """Return the step's environment: this one without Airflow's settings and secrets, plus the platform's addresses."""
    home = job.home
    variables = {k: v for k, v in os.environ.items() if not k.lstrip("_").startswith("AIRFLOW")}
    variables |= {"SLIPSTREAM_HOME": str(home.root), "SLIPSTREAM_ENVS": str(home.envs)}
    variables |= {"SLIPSTREAM_CODE": str(home.code), "PYTHONUNBUFFERED": "1"} | job.settings.environment
    if home.addresses_file().exists():
        addresses.reach_mlflow(home, variables)
    return variables
