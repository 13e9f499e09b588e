"""What each step hands on in `StepOutput.details`: a class for each; that of `validate` is in evidence.py."""

from typing import Any, Literal

from pydantic import Field

from slipstream.contract.details import Details
from slipstream.contract.evidence import Race, Row


class Checked(Details):
    """What `check` saw."""

    data: dict[str, str]
    """Digest of each split."""
    classes: tuple[str, ...] = ()
    """Names of the classes, where the data has them."""
    samples: dict[str, int] = Field(default_factory=dict)
    """Samples of each split."""
    hardware: dict[str, str] = Field(default_factory=dict)
    """The machine."""
    build_only: dict[str, str] = Field(default_factory=dict)
    """Targets whose engines cannot be loaded here → why."""
    sample_size: str = ""
    """How many test samples the objective needs."""


class Retrained(Details):
    """Where `retrain` has the baseline from."""

    version: str
    """Registry version of the trained model."""
    origin: Literal["registry", "file", "trained"]


class Distilled(Details):
    """What `distill` trained."""

    student: str
    """Function that builds it."""
    teacher_sha256: str


class Pruned(Details):
    """What `prune` did."""

    rounds: tuple[dict[str, float], ...] = ()
    """Sparsity, quality, MACs and parameters after each round of `channels`."""


class Calibration(Details):
    """Samples that `quantize` calibrated with."""

    sha256: str
    """Digest of their indices and of each sample."""
    samples: int
    seed: int
    split: str


class Quantized(Details):
    """What `quantize` did."""

    calibration: Calibration


class Built(Details):
    """What `build` made."""

    fingerprint: dict[str, str]
    """Facts that bind the engine."""
    not_loadable: str | None = None
    """Why it cannot be loaded here; None when it can."""
    layers: int = 0
    """Rows of its table of layers; 0 for an engine that has none."""


class Scored(Details):
    """What an MLflow run of scores holds."""

    model: str
    """sha256 of the candidate or engine."""
    what: str = ""
    """Its name for people."""
    test: str
    """Digest of the test split."""
    metric: str
    competing: int
    """Engines that competed when it was scored."""


class Raced(Details):
    """What an MLflow run of a race holds."""

    race: Race | None
    """None where no engine could be loaded."""
    absent: dict[str, str] = Field(default_factory=dict)
    """Cells that took no part → why."""


class Reported(Details):
    """What `report` said."""

    outcome: str
    headline: str
    ok: bool


class RolledBack(Details):
    """What `rollback` left."""

    champion: str
    """Version that serves."""
    previous: str | None
    """Version that a further rollback returns to."""
    left: str | None
    """Version that was left."""
    done: str | None = None
    """What an earlier request did, when this one had nothing to do."""


class Selection(Details):
    """What `select` decided."""

    rows: tuple[Row, ...] = ()
    """A row for each expected cell, in the spec's order."""
    winner: str | None
    """Key of the cell whose engine is to be released; None when no engine passed."""
    version: str | None = None
    """Registry version of the winner's engine."""
    champion: str | None
    """Version that the challenger will be compared with; None before the first release."""
    already_champion: bool = False
    """Whether the winner's engine is what serves already."""
    best_per_target: dict[str, str | None] = Field(default_factory=dict)
    """Target → key of its best cell."""
    missing: tuple[str, ...] = ()
    """Cells that left no evidence."""
    comparison_only: dict[str, str] = Field(default_factory=dict)
    """Cells of engines that are never released → why."""
    competing: int = 1
    """Engines that the bounds account for."""
    race: Race | None = None
    """The run in which the engines took turns."""
    not_raced: dict[str, str] = Field(default_factory=dict)
    """Cells that took no part in it → why."""


class Observed(Details):
    """What `trial` and `rollout` saw of the traffic."""

    skipped: str | None = None
    """Why nothing was tested or moved; None when something was."""
    timeline: tuple[dict[str, Any], ...] = ()
    """A point for each window of requests."""
    notes: tuple[str, ...] = ()
    """What happened that a reader of the verdicts should know."""


class Trial(Observed):
    """What `trial` compared."""

    champion: str | None = None
    """Version; None before the first release."""
    champion_release: str = ""
    challenger: str | None = None
    """Version."""
    figures: dict[str, Any] = Field(default_factory=dict)
    """Figures behind the verdicts."""


class Rollout(Observed):
    """What `rollout` released."""

    released: str | None = None
    """Version; None when nothing was released."""
    previous: str | None = None
    """Version that it replaced."""
