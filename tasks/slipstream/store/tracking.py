"""MLflow: one parent run for each pipeline run, a child for each step, logged models with their lineage.

A finished step is found again by the tag `slipstream.identity`. That tag is written last, after every artifact, so that
a step killed at any moment is never mistaken for a finished one.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from slipstream import digests, hardware
from slipstream.contract import Artifact, Cell, StepOutput
from slipstream.data.splits import Data
from slipstream.errors import EXIT_RETRY, DataError, InputError, ModelError
from slipstream.spec import Spec, dump
from slipstream.storage import cache
from slipstream.store import signing
from slipstream.store.registry import OUTAGE_CODES

if TYPE_CHECKING:  # needs pandas, which the core environment lacks
    from mlflow.models import ModelSignature

log = logging.getLogger(__name__)

IDENTITY = "slipstream.identity"
WORK = "slipstream.work"
RUN_KEY = "slipstream.run_key"
SPEC = "slipstream.spec"
STEP = "slipstream.step"
CELL = "slipstream.cell"
ERROR = "slipstream.error"
EXIT_CODE = "slipstream.exit_code"
REUSED = "slipstream.reused_from"
PROGRESS = "slipstream.progress"
HEADLINE = "slipstream.headline"
OUTPUT = "output.json"


def experiment_name(model: str) -> str:
    """Return the MLflow experiment of a registered model. Specs for the same model share it, and therefore results."""
    return f"slipstream/{model}"


@dataclass
class StepRun:
    """The MLflow run of a step in progress."""

    client: MlflowClient
    run_id: str
    experiment_id: str
    _last_beat: float = field(default=0.0, repr=False)

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters; values are cut at MLflow's limit of 6,000 characters."""
        self.client.log_batch(self.run_id, params=[Param(k, str(v)[:6000]) for k, v in values.items()])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step (an epoch, a round)."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()])

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags."""
        self.client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in values.items()])

    def progress(self, done: int, total: int, unit: str = "", **figures: float) -> None:
        """Report the step's progress, in units such as `batches`; `slipstream run --watch` draws its bars from this.

        It is a tag, which holds only the latest value: one request reads it, and no chart shows it. At most two writes
        a second.
        """
        now = time.monotonic()
        if now - self._last_beat < 0.5 and done < total:
            return
        self._last_beat = now
        figures_text = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        log.info("%d/%d %s  %s", done, total, unit, figures_text)
        self.tags({PROGRESS: json.dumps({"done": done, "total": total, "unit": unit, "figures": figures})})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log one file."""
        self.client.log_artifact(self.run_id, str(path), folder)

    def table(self, path: Path) -> None:
        """Log a JSON file with `columns` and `data` (rows) so that MLflow shows it as a table.

        `MlflowClient.log_table` would append to the table that a killed attempt left.
        """
        self.artifact(path)
        self.tags({"mlflow.loggedArtifacts": json.dumps([{"path": path.name, "type": "table"}])})

    def dataset(self, data: Data, name: str, sources: Mapping[str, str]) -> None:
        """Link the splits to this run, by digest; `sources` names the origin of each split."""
        inputs = [
            DatasetInput(
                _dataset(data, name, split, json.dumps({"source": source})), [InputTag("mlflow.data.context", split)]
            )
            for split, source in sources.items()
        ]
        self.client.log_inputs(self.run_id, datasets=inputs)

    def judges(self, output: StepOutput, engine: Artifact, data: Data, name: str) -> None:
        """Record the figures and verdicts of an output at the logged model that was judged, by its test split.

        MLflow's page of the model then shows them, and its list of models can be sorted by them.
        """
        if engine.model_id is None:
            return
        judged_on = _dataset(data, name, "test", "{}")
        context = InputTag("mlflow.data.context", "test")
        self.client.log_inputs(self.run_id, datasets=[DatasetInput(judged_on, [context])])
        self.uses([engine.model_id])
        now = int(time.time() * 1000)
        where = {"model_id": engine.model_id, "dataset_name": judged_on.name, "dataset_digest": judged_on.digest}
        figures = [Metric(k, float(v), now, 0, **where) for k, v in output.metrics.items()]
        self.client.log_batch(self.run_id, metrics=figures)
        verdicts = {f"gate.{v.gate}": f"{v.answer}: {v.reason}"[:4900] for v in output.verdicts}
        self.client.set_logged_model_tags(engine.model_id, verdicts)

    def uses(self, model_ids: Iterable[str]) -> None:
        """Link the logged models that this step uses."""
        models = [LoggedModelInput(m) for m in model_ids]
        if models:
            self.client.log_inputs(self.run_id, models=models)

    def log_model(
        self,
        folder: Path,
        name: str,
        signature: "ModelSignature",
        parents: Iterable[str] = (),
        metadata: Mapping[str, object] | None = None,
    ) -> Artifact:
        """Log a candidate or engine folder as an MLflow model. The folder's name becomes part of the path.

        `parents` are the logged models it was made from; they are linked in both directions that MLflow shows.
        """
        sha256, size = digests.folder(folder), digests.folder_size(folder)
        parents = list(parents)
        tags = {"slipstream.sha256": sha256, "slipstream.kind": folder.name}
        tags |= {"slipstream.parent": parents[-1]} if parents else {}
        with mlflow.start_run(run_id=self.run_id):
            info = mlflow.pyfunc.log_model(
                name=name,
                loader_module="slipstream.pyfunc",
                data_path=str(folder),
                signature=signature,
                pip_requirements=[f"slipstream=={digests.versions('slipstream')['slipstream']}"],
                metadata={**(metadata or {}), "sha256": sha256, "hardware": hardware.describe()},
                tags=tags,
            )
        self.uses(parents)
        # log_model ends the fluent run; the step is still in progress.
        self.client.update_run(self.run_id, status="RUNNING")
        return Artifact(
            uri=str(self.client.get_logged_model(info.model_id).artifact_location),
            path=f"data/{folder.name}",
            sha256=sha256,
            size_bytes=size,
            model_id=info.model_id,
        )

    def produces(self, model_id: str, step: int = 0) -> None:
        """Link a logged model of an earlier run as this run's output; once, since MLflow rejects a second link."""
        linked = self.client.get_run(self.run_id).outputs
        if linked and model_id in [output.model_id for output in linked.model_outputs]:
            return
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])


def _dataset(data: Data, name: str, split: str, source: str) -> Dataset:
    """Return MLflow's entry for a split; its digests have at most 36 characters."""
    return Dataset(f"{name}-{split}", data.digests()[split][:36], "code", source)


def connected() -> MlflowClient:
    """Return a client of MLFLOW_TRACKING_URI's server. Raise InputError if the variable names no server."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # in a task's log each redraw is a line
    try:
        return MlflowClient()
    except MlflowException:
        scheme = mlflow.get_tracking_uri().partition(":")[0]  # the rest may hold a password
        raise InputError(
            f"MLFLOW_TRACKING_URI: set it to the address of an MLflow server, such as http://127.0.0.1:5000, not to "
            f"{scheme}:…; `slipstream status` shows the embedded one's"
        ) from None


class Tracking:
    """The runs of one spec, in the experiment of its model."""

    def __init__(self, spec: Spec, client: MlflowClient | None = None) -> None:
        self.spec = spec
        self.client = client or connected()
        self._experiment_id: str | None = None

    @property
    def experiment_id(self) -> str:
        """The spec's experiment, which is created if it does not exist."""
        if self._experiment_id is None:
            name = experiment_name(self.spec.model.name)
            experiment = self.client.get_experiment_by_name(name)
            self._experiment_id = experiment.experiment_id if experiment else self._make_experiment(name)
        return self._experiment_id

    def _make_experiment(self, name: str) -> str:
        about = (
            f"Runs of slipstream for the registered model **{self.spec.model.name}**. Each pipeline run has a child "
            "for each step; its report is the artifact `report/index.html`."
        )
        return str(self.client.create_experiment(name, tags={"mlflow.note.content": about}))

    def run(self, run_id: str) -> StepRun:
        """Return a run of this experiment."""
        return StepRun(self.client, run_id, self.experiment_id)

    def pipeline_run(self, run_key: str) -> str:
        """Return the parent run of a pipeline run; the first step that asks creates it, with the spec as its
        artifact."""
        runs = self.search({RUN_KEY: run_key, STEP: "pipeline"})
        if runs:
            return str(runs[0].info.run_id)
        tags = {RUN_KEY: run_key, STEP: "pipeline", SPEC: self.spec.name}
        run = self.client.create_run(self.experiment_id, tags=tags, run_name=run_key)
        self.client.log_text(run.info.run_id, dump(self.spec), "spec.yaml")
        self.client.log_dict(run.info.run_id, hardware.describe(), "hardware.json")
        return str(run.info.run_id)

    def search(self, tags: Mapping[str, str]) -> list[Run]:
        """Return runs of this spec with all these tags, newest first."""
        return self._search({SPEC: self.spec.name, **tags})

    def search_all(self, tags: Mapping[str, str]) -> list[Run]:
        """Return runs of all specs for the same model with all these tags, newest first."""
        return self._search(tags)

    def _search(self, tags: Mapping[str, str]) -> list[Run]:
        condition = " and ".join(f"tags.`{k}` = '{v}'" for k, v in tags.items())
        order = ["attributes.start_time DESC"]
        return list(self.client.search_runs([self.experiment_id], condition, order_by=order, max_results=1000))

    def find(self, identity: str, *, oldest: bool = False) -> StepOutput | None:
        """Return the output of a finished step with this identity, in this spec's runs or another's for the same model.

        Return the newest; `oldest` is for what only the first measurement may decide.

        The tag alone proves nothing, since anyone with access to MLflow can set it: the signed output must name this
        identity and its run. Runs whose output does not are skipped with a warning.
        """
        runs = self._search({IDENTITY: identity})
        for run in reversed(runs) if oldest else runs:
            if run.info.status != "FINISHED":
                continue
            try:
                output = self.output(run.info.run_id)
            except (DataError, ValueError, MlflowException) as error:
                if isinstance(error, MlflowException) and error.error_code in OUTAGE_CODES:
                    raise
                log.warning("MLflow run %s claims to be this step's result and is not used: %s", run.info.run_id, error)
                continue
            if output.identity == identity and output.run_id == run.info.run_id:
                return output
            log.warning("MLflow run %s carries the output of another step and is not used", run.info.run_id)
        return None

    def output(self, run_id: str) -> StepOutput:
        """Return the output document of a step's run. Raise DataError if this platform did not sign it."""
        document = mlflow.artifacts.load_dict(f"runs:/{run_id}/{OUTPUT}")
        try:
            output = StepOutput.model_validate(document)
        except ValidationError as error:
            raise DataError(f"MLflow run {run_id}: {OUTPUT} is no output of a step: {error}") from None
        return signing.require_signed(output, f"MLflow run {run_id}")

    def start(self, run_key: str, step: str, cell: Cell | None, identity: str) -> StepRun:
        """Return the child run for a step: a new one, or the one that a killed attempt left behind."""
        parent = self.pipeline_run(run_key)
        sought = {WORK: identity, RUN_KEY: run_key} | ({CELL: cell.key} if cell else {})
        unfinished = [r for r in self.search(sought) if IDENTITY not in r.data.tags]
        if unfinished:
            run_id = unfinished[0].info.run_id
            self.client.update_run(run_id, status="RUNNING")
            log.info("resuming MLflow run %s", run_id)
        else:
            name = f"{step} {cell.key}" if cell else step
            tags = {SPEC: self.spec.name, WORK: identity, RUN_KEY: run_key, STEP: step, "mlflow.parentRunId": parent}
            tags |= {CELL: cell.key} if cell else {}
            run_id = self.client.create_run(self.experiment_id, tags=tags, run_name=name).info.run_id
        return StepRun(self.client, str(run_id), self.experiment_id)

    def record(self, run: StepRun, output: StepOutput) -> StepOutput:
        """Sign and write the output, also for failed gates: a rejection needs its evidence. Return it signed."""
        output = signing.signed_output(output)
        run.metrics(output.metrics)
        run.tags({f"gate.{v.gate}": f"{v.answer}: {v.reason}"[:4900] for v in output.verdicts})
        self.client.log_dict(run.run_id, output.model_dump(mode="json"), OUTPUT)
        return output

    def finish(self, run: StepRun, output: StepOutput, *, cache: bool) -> StepOutput:
        """Write the output, then the identity that makes it findable, then the status. Return the signed output."""
        output = self.record(run, output)
        self.client.update_run(run.run_id, status="FINISHED")
        if cache:
            run.tags({IDENTITY: output.identity})
        return output

    def fail(self, run: StepRun, reason: str, exit_code: int = EXIT_RETRY) -> None:
        """Mark a step's run as failed; it is never found as finished."""
        run.tags({ERROR: reason[:4900], EXIT_CODE: exit_code})
        self.client.update_run(run.run_id, status="FAILED")

    def reuse(self, run_key: str, output: StepOutput, cell: Cell | None) -> StepOutput:
        """Record in this pipeline run that an earlier result, possibly another recipe's, replaces a cell's step."""
        run = self.start(run_key, output.step, cell, f"reused:{output.identity}")
        run.tags({REUSED: output.run_id})
        if output.artifact and output.artifact.model_id:
            run.produces(output.artifact.model_id)
        return self.finish(run, output.model_copy(update={"reused": True, "cell": cell}), cache=False)


def fetch(artifact: Artifact) -> Path:
    """Return the artifact's folder on this machine: from the cache, or downloaded, and verified by its digest.

    Raise ModelError if what arrives is not what was logged.
    """
    source = f"{artifact.uri}/{artifact.path}"

    def download(to: Path) -> None:
        with tempfile.TemporaryDirectory(dir=to.parent) as aside:
            folder = Path(mlflow.artifacts.download_artifacts(source, dst_path=aside))
            sha256 = digests.folder(folder)
            if sha256 != artifact.sha256:
                raise ModelError(
                    f"{source}: sha256 {sha256[:12]}… is not {artifact.sha256[:12]}… that was logged; the artifact "
                    "store is damaged or was tampered with"
                )
            folder.rename(to)

    def is_intact(path: Path) -> bool:
        return digests.folder(path) == artifact.sha256

    return cache.obtain(artifact.sha256, Path(artifact.path).name, download, is_intact)
