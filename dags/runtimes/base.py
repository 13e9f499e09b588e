"""Common parts of all runtimes: the job, the documents around it, and the meaning of its exit code."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from slipstream import errors, spec, storage
from slipstream.contract import StepInput
from slipstream.home import Home
from slipstream.plan.settings import Settings
from slipstream.spec import Resources, Spec


@dataclass(frozen=True)
class Job:
    """One step to run: its documents are next to the run's spec, in a folder or under an s3:// prefix."""

    step: str
    spec_uri: str
    inputs: StepInput
    settings: Settings
    home: Home

    @property
    def name(self) -> str:
        """Step and cell, such as `build-int8@server`."""
        return self.step if self.inputs.cell is None else f"{self.step}-{self.inputs.cell.key}"

    @cached_property
    def spec(self) -> Spec:
        """The run's spec."""
        return spec.load(self.spec_uri)

    @property
    def environment(self) -> str:
        """The environment that the step needs."""
        return self.spec.environment_of(self.step, self._target)

    @property
    def _target(self) -> str | None:
        return self.inputs.cell.target if self.inputs.cell else None

    @property
    def resources(self) -> Resources:
        """What the step may use."""
        return self.settings.resources_of(self.step, self.spec)

    @property
    def image(self) -> str:
        """The step's image."""
        return self.settings.image_of(self.step, self.spec, self._target)

    @property
    def given(self) -> str:
        """URI of the IN document."""
        return self._beside(f"{self.name}.in.json")

    @property
    def made(self) -> str:
        """URI of the OUT document."""
        return self._beside(f"{self.name}.out.json")

    @property
    def arguments(self) -> list[str]:
        """Arguments of the command `slipstream`, the same in every runtime."""
        return ["step", self.step, f"--spec={self.spec_uri}", f"--inputs={self.given}", f"--outputs={self.made}"]

    def _beside(self, name: str) -> str:
        return storage.join(self.spec_uri.rpartition("/")[0], name)


class Runtime(Protocol):
    """A place where steps run."""

    def run(self, job: Job, context: Context) -> None:
        """Run a step until it has ended and written its OUT document. `context` is Airflow's.

        Raise AirflowFailException for a bad input or a failed gate (no retry), AirflowException for all other errors.
        """
        ...

    def stop(self) -> None:
        """End the step that `run` is waiting for; called from a signal handler."""
        ...


def raise_for(job: Job, code: int, lines: Sequence[str], *, out_of_memory: bool = False) -> None:
    """Translate an exit code: 0 is success, bad input and failed gates are permanent, all other codes are retried.

    `lines` are the last ones that the step printed; `out_of_memory` means that it exceeded its memory limit, which
    would happen again.
    """
    if code == 0:
        return
    if out_of_memory:
        raise AirflowFailException(
            f"step {job.step} was killed: it needed more than its memory limit ({job.resources.memory}); raise "
            f"resources.{job.step}.memory in the spec or in the settings"
        )
    if code in (errors.EXIT_INPUT, errors.EXIT_GATE):
        raise AirflowFailException(message(lines))
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise AirflowException(f"step {job.step} {how}: {message(lines)}")


def message(lines: Iterable[str]) -> str:
    """Return the error that `cli.main` printed: from its headline to the end, or else the last line."""
    text = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines if line.strip()]
    headlines = tuple(f"{h}: " for h in sorted(_headlines(errors.SlipstreamError)))
    starts = [i for i, line in enumerate(text) if line.startswith(headlines)]
    return "\n".join(text[starts[-1] :] if starts else text[-1:]) or "no output"


def _headlines(kind: type[errors.SlipstreamError]) -> set[str]:
    return {kind.headline}.union(*(_headlines(sub) for sub in kind.__subclasses__()))
