"""Steps as processes of their own, to be killed in the middle."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tests.steps.training import RUN_KEY

from slipstream.contract import Cell, StepInput, StepOutput


class Attempts:
    """Attempts at one step, with the same input in the same home."""

    def __init__(
        self,
        name: str,
        written: dict[str, Any],
        folder: Path,
        upstream: Sequence[StepOutput] = (),
        recipe: str | None = None,
    ) -> None:
        self._name, self._folder = name, folder
        cell = Cell(recipe=recipe) if recipe else None
        given = StepInput(run_key=RUN_KEY, pipeline_run_id="", cell=cell, upstream=tuple(upstream))
        folder.mkdir(exist_ok=True)
        (folder / "spec.yaml").write_text(yaml.safe_dump(written))
        (folder / "in.json").write_text(given.model_dump_json())

    @contextmanager
    def _started(self) -> Iterator[subprocess.Popen[bytes]]:
        """The step as a process, which does not outlive the test."""
        files = {"spec": "spec.yaml", "inputs": "in.json", "outputs": "out.json"}
        command = [str(Path(sys.executable).with_name("slipstream")), "step", self._name]
        with (self._folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command + [f"--{option}={self._folder / name}" for option, name in files.items()],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stderr=log,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def kill_at(self, home: Path, checkpoint: str, seconds: float = 300) -> None:
        """Start, and kill -9 as soon as there is a file of this pattern below the home's work folders."""
        deadline = time.monotonic() + seconds
        with self._started() as process:
            while not list(home.glob(f"work/{self._name}-*/{checkpoint}")):
                assert process.poll() is None, (
                    f"ended before its first checkpoint: {(self._folder / 'log').read_text()}"
                )
                assert time.monotonic() < deadline, f"no checkpoint within {seconds} s"
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL

    def finish(self) -> tuple[StepOutput, str]:
        """Output and log of the step, run to its end."""
        with self._started() as process:
            code = process.wait(timeout=300)
        said = (self._folder / "log").read_text()
        assert code == 0, said
        return StepOutput.model_validate_json((self._folder / "out.json").read_text()), said
