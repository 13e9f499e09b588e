"""The step contract: the inputs and outputs of a step, in every runtime.

`slipstream step NAME --spec SPEC --inputs IN.json --outputs OUT.json`: IN is a `StepInput`, OUT a `StepOutput`. Both
are small; bytes are stored in the MLflow artifact store and are named here by URI and sha256.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict

Answer = Literal["pass", "fail", "inconclusive"]
Json: TypeAlias = dict[str, Any]
"""A JSON object; its reader checks the values."""


class Document(BaseModel):
    """Base of every document that is written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Section(BaseModel):
    """Base of every part of a spec or of the settings: immutable, and a misspelled key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def over(self, changes: Mapping[str, Any]) -> Self:
        """Return this section with other values for some keys. Raise ValidationError for values that do not fit."""
        return self.model_validate({**self.model_dump(mode="json", exclude_unset=True), **changes})


class Artifact(Document):
    """A folder in the MLflow artifact store."""

    uri: str
    """Location in the artifact store, such as `mlflow-artifacts:/3/models/m-…/artifacts`."""
    path: str
    """Folder below the URI whose content the digest covers."""
    sha256: str
    """Digest of the folder, as `digests.folder` computes it."""
    size_bytes: int
    """Sum of the sizes of its files."""
    model_id: str | None = None
    """MLflow logged model, if it is one."""


class Release(Document):
    """One engine, deployed under a model's name."""

    model: str
    """Registered model; also the name in the Open Inference Protocol."""
    name: str
    """Name among the model's releases, which always identifies the same engine: `v3` for registry version 3,
    `baseline-1a2b3c4d` (from the engine's digest) for the unchanged model before the first release."""

    @property
    def key(self) -> str:
        return f"{self.model}--{self.name}"


class Verdict(Document):
    """A gate's answer and the evidence for it. Only `pass` passes."""

    gate: str
    answer: Answer
    reason: str
    """One sentence with the numbers in it."""
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    unit: str = ""
    n: int = 0
    """Observations behind the estimate."""
    final: bool = False
    """Whether further measurement can never change it, as for accuracy, which is measured once."""

    @property
    def passed(self) -> bool:
        return self.answer == "pass"


class Cell(Document):
    """A recipe, or a recipe on a target: the key that identifies outputs."""

    recipe: str
    target: str | None = None

    @property
    def key(self) -> str:
        return self.recipe if self.target is None else f"{self.recipe}@{self.target}"


class StepOutput(Document):
    """The result of a step."""

    step: str
    cell: Cell | None = None
    identity: str
    run_id: str
    """MLflow run in which the work was done; an earlier one when `reused`."""
    reused: bool = False
    artifact: Artifact | None = None
    metrics: dict[str, float] = {}
    verdicts: tuple[Verdict, ...] = ()
    details: Json = {}
    """Small, step-specific facts, documented in the step's module."""
    signature: str = ""
    """By the platform's key over all other fields (signing.py), added when the output is recorded."""

    def signed_part(self) -> Json:
        """Return the signed fields as JSON, so that reading the document back gives the same.

        Defaults are omitted: a field that a later version adds does not invalidate earlier signatures.
        """
        part: Json = json.loads(self.model_dump_json(exclude_defaults=True, exclude={"signature"}))
        return part


class StepInput(Document):
    """Input of a step: the pipeline run it belongs to, its cell, and its upstream outputs."""

    run_key: str
    """Name of the pipeline run, the same as Airflow's run id."""
    pipeline_run_id: str = ""
    """MLflow parent run; `run_step` looks it up from the run key."""
    cell: Cell | None = None
    upstream: tuple[StepOutput, ...] = ()
    params: Json = {}
    """Run-time choices, such as the registry version that started the run."""

    def output_of(self, step: str, cell: Cell | None = None) -> StepOutput | None:
        """Return the upstream output of `step` for `cell`, or None."""
        return next((o for o in self.upstream if o.step == step and o.cell == cell), None)


def canonical(value: object) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """Return the sha256 of a JSON value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def combine(verdicts: tuple[Verdict, ...]) -> Answer:
    """Combine verdicts: any fail is a fail; otherwise any inconclusive, or no verdict at all, is inconclusive."""
    answers = {v.answer for v in verdicts}
    if "fail" in answers:
        return "fail"
    return "pass" if answers == {"pass"} else "inconclusive"
