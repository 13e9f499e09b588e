"""Details of each step's output, in `StepOutput.details`: a class for each; that of `validate` is in evidence.py."""

from typing import Literal

from pydantic import Field

from slipstream.contract import Json
from slipstream.contract.details import Details
from slipstream.contract.evidence import Race, Row


class Checked(Details):
    """Result of `check`."""

    data: dict[str, str]
    """Digest of each split."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if the data has them."""
    samples: dict[str, int] = Field(default_factory=dict)
    """Samples of each split."""
    hardware: dict[str, str] = Field(default_factory=dict)
    """The machine."""
    build_only: dict[str, str] = Field(default_factory=dict)
    """Reasons, by target, why its engines cannot be loaded here."""
    sample_size: str = ""
    """How many test samples the objective needs."""


class Retrained(Details):
    """Origin of the baseline from `retrain`."""

    version: str
    """Registry version of the trained model."""
    origin: Literal["registry", "file", "trained"]


class Distilled(Details):
    """Result of `distill`."""

    student: str
    """Function that builds it."""
    teacher_sha256: str


class Pruned(Details):
    """Result of `prune`."""

    rounds: tuple[dict[str, float], ...] = ()
    """Sparsity, quality, MACs and parameters after each round of `channels`."""


class Calibration(Details):
    """Calibration samples of `quantize`."""

    sha256: str
    """Digest of their indices and of each sample."""
    samples: int
    seed: int
    split: str


class Quantized(Details):
    """Result of `quantize`."""

    calibration: Calibration


class Built(Details):
    """Result of `build`."""

    fingerprint: dict[str, str]
    """Facts that bind the engine."""
    not_loadable: str | None = None
    """Why it cannot be loaded here; None if it can."""
    layers: int = 0
    """Rows of its table of layers; 0 for an engine that has none."""


class Scored(Details):
    """Content of an MLflow run of scores."""

    model: str
    """sha256 of the candidate or engine."""
    what: str = ""
    """Its display name."""
    test: str
    """Digest of the test split."""
    metric: str
    competing: int
    """Number of engines that competed when it was scored."""


class Raced(Details):
    """Content of an MLflow run of a race."""

    race: Race | None
    """None if no engine could be loaded."""
    absent: dict[str, str] = Field(default_factory=dict)
    """Reasons, by cell, for those that took no part."""


class Reported(Details):
    """Result of `report`."""

    outcome: str
    headline: str
    ok: bool


class RolledBack(Details):
    """Result of `rollback`."""

    champion: str
    """Version that serves."""
    previous: str | None
    """Version that a further rollback returns to."""
    left: str | None
    """Version that was replaced."""
    done: str | None = None
    """What an earlier request did, if this one had nothing to do."""


class Selection(Details):
    """Decision of `select`."""

    rows: tuple[Row, ...] = ()
    """A row for each expected cell, in the spec's order."""
    winner: str | None
    """Key of the cell whose engine is to be released; None if no engine passed."""
    version: str | None = None
    """Registry version of the winner's engine."""
    champion: str | None
    """Version that the challenger will be compared with; None before the first release."""
    already_champion: bool = False
    """Whether the winner's engine already serves."""
    best_per_target: dict[str, str | None] = Field(default_factory=dict)
    """Key of the best cell, by target."""
    missing: tuple[str, ...] = ()
    """Cells that left no evidence."""
    comparison_only: dict[str, str] = Field(default_factory=dict)
    """Reasons, by cell, for engines that are never released."""
    competing: int = 1
    """Number of engines that the bounds account for."""
    race: Race | None = None
    """The run in which the engines took turns."""
    not_raced: dict[str, str] = Field(default_factory=dict)
    """Reasons, by cell, for engines that took no part in it."""


class Observed(Details):
    """Traffic observed by `trial` and `rollout`."""

    skipped: str | None = None
    """Why nothing was tested or moved; None if something was."""
    timeline: tuple[Json, ...] = ()
    """A point for each window of requests."""
    notes: tuple[str, ...] = ()
    """Events that a reader of the verdicts should know."""


class Trial(Observed):
    """Comparison made by `trial`."""

    champion: str | None = None
    """Version; None before the first release."""
    champion_release: str = ""
    challenger: str | None = None
    """Version."""
    figures: Json = Field(default_factory=dict)
    """Numbers behind the verdicts."""


class Rollout(Observed):
    """Release made by `rollout`."""

    released: str | None = None
    """Version; None if nothing was released."""
    previous: str | None = None
    """Version that it replaced."""
