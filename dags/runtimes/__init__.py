"""Where steps run: as processes on this machine, as containers of its Docker daemon, or as pods of a cluster.

The DAGs use only `run_step` and `stop_step`. The settings name the runtime. To add one, write a module with a function
`runtime()` that returns an object with the two methods of `Runtime`, and add an entry to `plugins.RUNTIMES` or an entry
point to your package.
"""

import importlib
import json

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowFailException

from runtimes.base import Job, Runtime
from slipstream import storage
from slipstream.contract import Json, StepInput
from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.plan import settings
from slipstream.plugins import RUNTIMES

_running: list[Runtime] = []
"""Runtime of the step that this task process waits for; a task process runs one step."""


def run_step(step: str, spec_uri: str, inputs: StepInput, context: Context) -> Json:
    """Run a step in the configured runtime and return its OUT document. Raise as `Runtime.run` does."""
    home = Home.from_environment()
    try:
        job = Job(step, spec_uri, inputs, settings.load(home), home)
        if job.settings.runtime not in RUNTIMES:
            raise InputError(f"runtime is {job.settings.runtime!r}; known: {', '.join(RUNTIMES)}")
        storage.delete(job.made)  # left by an earlier attempt; a step that ends without one has failed
        storage.write_text(job.given, inputs.model_dump_json(indent=2))
        # Imported on use: an Airflow provider takes a second.
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
    """End the running step; called by Airflow's `on_kill`."""
    for runtime in _running:
        runtime.stop()
