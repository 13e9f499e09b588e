"""Where a step runs: here, as a subprocess in the virtual environment that the step needs.

The DAGs know `run_step` and `stop_step` and nothing else. SLIPSTREAM_RUNTIME names the runtime; another place to
run (a container, a pod) is another class with these two methods and a line in RUNTIMES.
"""

import ctypes
import json
import logging
import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from airflow.sdk.exceptions import AirflowException, AirflowFailException

from slipstream import errors, spec
from slipstream.contract import StepInput
from slipstream.home import Home, write_atomically
from slipstream.platform import addresses
from slipstream.steps import environment_of

log = logging.getLogger("slipstream.step")

GRACE_S = 4
"""Between SIGTERM and SIGKILL; Airflow's own grace is 5 s."""


class Runtime(Protocol):
    """A place where steps run."""

    def run(self, step: str, spec_path: Path, inputs: StepInput) -> dict[str, Any]:
        """Run a step to its end and return its OUT document.

        Raises AirflowFailException for a bad input or a failed gate (no retry), AirflowException for all else.
        """
        ...

    def stop(self) -> None:
        """End the step that `run` is waiting for; called from a signal handler."""
        ...


class Subprocess:
    """The step's own virtual environment on this machine, in a process group of its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, step: str, spec_path: Path, inputs: StepInput) -> dict[str, Any]:
        """See Runtime."""
        home = Home.from_environment()
        name = step if inputs.cell is None else f"{step}-{inputs.cell.key}"
        given, made = (spec_path.parent / f"{name}.{kind}.json" for kind in ("in", "out"))
        write_atomically(given, inputs.model_dump_json(indent=2))
        made.unlink(missing_ok=True)
        environment = environment_of(step, spec.load(spec_path).model.framework)
        program = home.envs / environment / "bin" / "slipstream"
        if not program.exists():
            raise AirflowFailException(f"step {step} needs the environment {environment}, but {program} does not exist")
        command = [str(program), "step", step, f"--spec={spec_path}", f"--inputs={given}", f"--outputs={made}"]
        code, lines = self._stream(command, _environment(home))
        _raise_for(step, code, lines)
        return dict(json.loads(made.read_text(encoding="utf-8")))

    def _stream(self, command: list[str], environment: dict[str, str]) -> tuple[int, list[str]]:
        """Run to the end, each line into the task log as it comes; returns the exit code and the last lines."""
        parent = os.getpid()
        process = subprocess.Popen(
            command,
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


RUNTIMES: dict[str, Callable[[], Runtime]] = {"subprocess": Subprocess}
"""Name → what makes the runtime. Tests add one that plays recorded outputs."""

_running: list[Runtime] = []
"""The runtime of the step that this task process waits for; a task process runs one step."""


def run_step(step: str, spec_path: Path, inputs: StepInput) -> dict[str, Any]:
    """Run a step where SLIPSTREAM_RUNTIME says and return its OUT document. Raises as `Runtime.run` does."""
    name = os.environ.get("SLIPSTREAM_RUNTIME", "subprocess")
    if name not in RUNTIMES:
        raise AirflowFailException(f"SLIPSTREAM_RUNTIME is {name!r}; known: {', '.join(RUNTIMES)}")
    runtime = RUNTIMES[name]()
    _running.append(runtime)
    try:
        return runtime.run(step, spec_path, inputs)
    finally:
        _running.remove(runtime)


def stop_step() -> None:
    """End the step under way; Airflow's `on_kill` ends here."""
    for runtime in _running:
        runtime.stop()


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Runs in the child before exec: when the task process is killed with SIGKILL, the kernel ends the step.

    By SIGTERM, which ends a step at once, unless it moves traffic and has something to put back first.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        log.debug("process group %d has ended", process.pid)


def _environment(home: Home) -> dict[str, str]:
    """The step's environment: this one without Airflow's settings and secrets, and the platform's addresses."""
    kept = {k: v for k, v in os.environ.items() if not k.lstrip("_").startswith("AIRFLOW")}
    kept |= {"SLIPSTREAM_HOME": str(home.root), "SLIPSTREAM_ENVS": str(home.envs), "SLIPSTREAM_CODE": str(home.code)}
    kept |= {"PYTHONUNBUFFERED": "1"}
    if "MLFLOW_TRACKING_URI" not in kept and home.addresses_file().exists():
        kept["MLFLOW_TRACKING_URI"] = addresses.load(home).mlflow
    return kept


def _raise_for(step: str, code: int, lines: list[str]) -> None:
    """Translate an exit code: 0 is fine, bad input and failed gates are final, all else may be tried again."""
    if code == 0:
        return
    if code in (errors.EXIT_INPUT, errors.EXIT_GATE):
        raise AirflowFailException(_message(lines))
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise AirflowException(f"step {step} {how}: {_message(lines)}")


def _message(lines: Iterable[str]) -> str:
    """The error that `cli.main` printed: from its headline to the end, else the last line."""
    text = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines if line.strip()]
    headlines = tuple(f"{h}: " for h in sorted(_headlines(errors.SlipstreamError)))
    starts = [i for i, line in enumerate(text) if line.startswith(headlines)]
    return "\n".join(text[starts[-1] :] if starts else text[-1:]) or "no output"


def _headlines(kind: type[errors.SlipstreamError]) -> set[str]:
    return {kind.headline}.union(*(_headlines(sub) for sub in kind.__subclasses__()))
