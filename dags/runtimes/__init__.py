"""Where steps run: as processes of this machine, as containers of its Docker daemon, as pods of a cluster.

The DAGs know `run_step` and `stop_step` and nothing else. The settings name the runtime; another place to run is
another module with a function `runtime()` that makes an object with the two methods of `Runtime`, and an entry in
`plugins.RUNTIMES`, or an entry point of another package.
"""

import importlib
import json
from typing import Any

from airflow.sdk.exceptions import AirflowFailException

from runtimes.base import Job, Runtime
from slipstream import storage
from slipstream.contract import StepInput
from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.plan import settings
from slipstream.plugins import RUNTIMES

_running: list[Runtime] = []
"""The runtime of the step that this task process waits for; a task process runs one step."""


def run_step(step: str, spec_uri: str, inputs: StepInput, context: Any) -> dict[str, Any]:
    """Run a step where the settings say and return its OUT document. Raises as `Runtime.run` does."""
    home = Home.from_environment()
    try:
        job = Job(step, spec_uri, inputs, settings.load(home), home)
        if job.settings.runtime not in RUNTIMES:
            raise InputError(f"runtime is {job.settings.runtime!r}; known: {', '.join(RUNTIMES)}")
        storage.delete(job.made)  # an earlier attempt's; a step that ends without one has failed
        storage.write_text(job.given, inputs.model_dump_json(indent=2))
        # Imported only now: a provider takes a second.
        runtime: Runtime = importlib.import_module(RUNTIMES[job.settings.runtime].module).runtime()
        _running.append(runtime)
        try:
            runtime.run(job, context)
        finally:
            _running.remove(runtime)
        return dict(json.loads(storage.read_text(job.made)))
    except InputError as error:
        raise AirflowFailException(f"{error.headline}: {error}") from error


def stop_step() -> None:
    """End the step under way; Airflow's `on_kill` ends here."""
    for runtime in _running:
        runtime.stop()
