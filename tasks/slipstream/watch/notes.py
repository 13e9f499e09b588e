"""What MLflow knows of a run's steps while they run: progress, figures, verdicts, errors."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from slipstream import tracking
from slipstream.contract import Answer

HIDDEN = ("progress",)
SHOWN = 3
"""Figures beside a bar; more would not be read."""


@dataclass(frozen=True)
class Note:
    """The newest MLflow run of a step and cell."""

    status: str
    """MLflow's: RUNNING, FINISHED, FAILED."""
    share: float = 0.0
    """Progress from 0 to 1."""
    done: int = 0
    """Epochs, rounds or requests done so far."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Latest metrics, such as the loss."""
    verdicts: tuple[tuple[str, Answer, str], ...] = ()
    """Gate, answer, reason."""
    error: str = ""
    exit_code: int | None = None
    reused: bool = False

    @property
    def total(self) -> int:
        """Epochs, rounds or requests in all; 0 when unknown."""
        return round(self.done / self.share) if self.share > 0 else 0


Key = tuple[str, str | None]
"""Step and cell key."""


class Notes:
    """Reads the notes of one pipeline run. Errors are MlflowException."""

    def __init__(self, client: MlflowClient, model: str, spec: str, run_key: str) -> None:
        self._client = client
        self._experiment = tracking.experiment_name(model)
        self._tags = {tracking.SPEC: spec, tracking.RUN_KEY: run_key}

    def read(self) -> dict[Key, Note]:
        """Step and cell → note. Empty before the first step has started: the experiment is the step's to make."""
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return {}
        wanted = " and ".join(f"tags.`{k}` = '{v}'" for k, v in self._tags.items())
        order = ["attributes.start_time ASC"]
        runs = self._client.search_runs([experiment.experiment_id], wanted, order_by=order, max_results=1000)
        return {(r.data.tags[tracking.STEP], r.data.tags.get(tracking.CELL)): self._note(r) for r in runs}

    def _note(self, run: Run) -> Note:
        tags, metrics = run.data.tags, run.data.metrics
        running = run.info.status == "RUNNING"
        return Note(
            status=run.info.status,
            share=metrics.get("progress", 0.0),
            done=self._done(run.info.run_id) if running and "progress" in metrics else 0,
            figures=dict([(k, v) for k, v in metrics.items() if k not in HIDDEN and "/" not in k][:SHOWN]),
            verdicts=tuple(_verdict(k.removeprefix("gate."), v) for k, v in tags.items() if k.startswith("gate.")),
            error=tags.get(tracking.ERROR, ""),
            exit_code=int(tags[tracking.EXIT_CODE]) if tracking.EXIT_CODE in tags else None,
            reused=tracking.REUSED in tags,
        )

    def _done(self, run_id: str) -> int:
        history: list[Any] = self._client.get_metric_history(run_id, "progress")
        return max((int(m.step) for m in history), default=0)


def _verdict(gate: str, text: str) -> tuple[str, Answer, str]:
    answer, _, reason = text.partition(": ")
    known: dict[str, Answer] = {"pass": "pass", "fail": "fail"}
    return gate, known.get(answer, "inconclusive"), reason


def be_patient_elsewhere() -> None:
    """Let MLflow's client give up quickly: the display asks again, and must not stand still for minutes."""
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
