"""MLflow's data on the steps of a run in progress: progress, figures, verdicts, errors."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.entities import Run

from slipstream.contract import Answer
from slipstream.store import tracking


@dataclass(frozen=True)
class Progress:
    """Latest reported progress of a step."""

    done: int
    total: int
    unit: str = ""
    """Unit of the count, such as `batches`."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Figures such as the loss."""

    @property
    def share(self) -> float:
        """Share done, from 0 to 1."""
        return self.done / max(self.total, 1)


@dataclass(frozen=True)
class Note:
    """The newest MLflow run of a step and cell."""

    status: str
    """MLflow's status: RUNNING, FINISHED, FAILED."""
    run_id: str = ""
    progress: Progress | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Latest values."""
    verdicts: tuple[tuple[str, Answer, str], ...] = ()
    """Gate, answer and reason of each verdict."""
    error: str = ""
    exit_code: int | None = None
    reused: bool = False
    headline: str = ""
    """The report's headline, from the pipeline's own MLflow run, once there is a report."""


Key = tuple[str, str]
"""Step and cell key; the cell is empty for a step of the whole run."""
PIPELINE: Key = ("pipeline", "")


class Notes:
    """Reads the notes of one pipeline run. Raises MlflowException."""

    def __init__(self, client: MlflowClient, model: str, spec: str, run_key: str) -> None:
        self._client = client
        self._experiment = tracking.experiment_name(model)
        self._tags = {tracking.SPEC: spec, tracking.RUN_KEY: run_key}
        self.experiment_id: str | None = None
        """The experiment of the model; None until its first step has created it."""

    def read(self) -> dict[Key, Note]:
        """Return notes by step and cell. Empty before the first step has started, which creates the experiment."""
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return {}
        self.experiment_id = str(experiment.experiment_id)
        condition = " and ".join(f"tags.`{k}` = '{v}'" for k, v in self._tags.items())
        order = ["attributes.start_time ASC"]
        runs = self._client.search_runs([experiment.experiment_id], condition, order_by=order, max_results=1000)
        return {(r.data.tags[tracking.STEP], r.data.tags.get(tracking.CELL, "")): _note(r) for r in runs}


def _note(run: Run) -> Note:
    tags = run.data.tags
    return Note(
        status=run.info.status,
        run_id=str(run.info.run_id),
        progress=Progress(**json.loads(tags[tracking.PROGRESS])) if tracking.PROGRESS in tags else None,
        metrics=run.data.metrics,
        verdicts=tuple(_verdict(k.removeprefix("gate."), v) for k, v in tags.items() if k.startswith("gate.")),
        error=tags.get(tracking.ERROR, ""),
        exit_code=int(tags[tracking.EXIT_CODE]) if tracking.EXIT_CODE in tags else None,
        reused=tracking.REUSED in tags,
        headline=tags.get(tracking.HEADLINE, ""),
    )


def _verdict(gate: str, text: str) -> tuple[str, Answer, str]:
    answer, _, reason = text.partition(": ")
    answers: dict[str, Answer] = {"pass": "pass", "fail": "fail"}
    return gate, answers.get(answer, "inconclusive"), reason


def be_patient_elsewhere() -> None:
    """Let MLflow's client give up quickly: the display polls again, and must not hang for minutes."""
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
