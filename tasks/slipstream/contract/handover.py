"""What the steps of the release path hand on in `StepOutput.details`: a class for each, so that nobody guesses keys.

Fields that a reader does not know are ignored: outputs of an earlier or later version stay readable.
"""

from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError

from slipstream.contract import Document, StepOutput
from slipstream.contract.evidence import Race, Row
from slipstream.errors import DataError


class Details(Document):
    """Base of a step's details."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def of(cls, output: StepOutput) -> Self:
        """Read them from an output. Raise DataError when they are not those of this step."""
        try:
            return cls.model_validate(output.details)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"output of step {output.step}: details.{where}: {first['msg']}") from error

    def document(self) -> dict[str, Any]:
        """Return them as they are written."""
        return self.model_dump(mode="json")


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
