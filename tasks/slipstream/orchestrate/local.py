"""Stage 1 of a spec on this machine, one step after the other, without Airflow: for notebooks and scripts.

The steps are those of the DAG, each a process of its environment; MLflow is the platform's, or the one that
MLFLOW_TRACKING_URI names. Nothing is deployed: the release needs the stages that Airflow runs.
"""

import logging
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from slipstream import storage
from slipstream.contract import StepInput, StepOutput
from slipstream.errors import EXIT_GATE, InputError
from slipstream.home import Home
from slipstream.plan import flow
from slipstream.platform import addresses
from slipstream.plugins import CHECK
from slipstream.reports import find
from slipstream.reports.document import Report
from slipstream.spec import Spec, dump

log = logging.getLogger(__name__)

SKIPPED = flow.skipped_stages("accuracy_validation")


def optimize(home: Home, spec: Spec) -> Report:
    """Run the steps of stage 1 and return the run's report, even if no engine passed.

    A failed step leaves a gap, as in the DAG: steps that depend on it are omitted, and the report says so. Raise
    InputError if an environment is missing or the check rejects the spec, Unavailable if MLflow is missing.
    """
    home.prepare()
    run = _Run.begin(home, spec)
    outputs: list[StepOutput] = []
    for task in (t for stage in flow.STAGES if stage not in SKIPPED for t in flow.tasks(spec, stage)):
        try:
            upstream = flow.upstream(task.step, spec, task.cell, outputs)
        except InputError as error:
            log.warning("%s", error)
            continue
        output = run.step(task, upstream)
        if output is None and task.step == CHECK:
            raise InputError(f"{spec.name}: the check refused the spec; see above")
        outputs += [output] if output is not None else []
    return find.load(find.pipeline_run(find.connect(home), run.key))


@dataclass(frozen=True)
class _Run:
    """A run: the location of its documents, and the platform's variables for its steps."""

    home: Home
    spec: Spec
    key: str
    folder: str
    variables: Mapping[str, str]

    @classmethod
    def begin(cls, home: Home, spec: Spec) -> Self:
        variables = dict(os.environ)
        addresses.reach_mlflow(home, variables)
        key = f"local-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        folder = flow.run_folder(home, spec.name, key)
        storage.write_text(storage.join(folder, "spec.yaml"), dump(spec))
        return cls(home, spec, key, folder, variables)

    def step(self, task: flow.Task, upstream: tuple[StepOutput, ...]) -> StepOutput | None:
        """Return the output of a step, or None if it left none. Its log goes to this process's stderr."""
        environment = self.spec.environment_of(task.step, task.cell.target if task.cell else None)
        program = self.home.require_python(environment, f"step {task.step}").with_name("slipstream")
        inputs = StepInput(run_key=self.key, cell=task.cell, upstream=upstream, params={"skip_stages": SKIPPED})
        files = {name: storage.join(self.folder, f"{task.id}.{name}.json") for name in ("inputs", "outputs")}
        storage.delete(files["outputs"])
        storage.write_text(files["inputs"], inputs.model_dump_json(indent=2))
        log.info("%s", task.title)
        command = [str(program), "step", task.step, f"--spec={storage.join(self.folder, 'spec.yaml')}"]
        command += [f"--{name}={uri}" for name, uri in files.items()]
        code = subprocess.run(command, env=self.variables, check=False, stdout=subprocess.DEVNULL).returncode
        if code not in (0, EXIT_GATE):
            log.warning("%s ended with exit code %d", task.title, code)
        if not storage.exists(files["outputs"]):
            return None
        return StepOutput.model_validate_json(storage.read_text(files["outputs"]))
