"""The base of the details in `StepOutput.details`, so that keys are checked.

Unknown fields are ignored: outputs of an earlier or later version stay readable.
"""

from typing import Self

from pydantic import ConfigDict, ValidationError

from slipstream.contract import Document, Json, StepOutput
from slipstream.errors import DataError


class Details(Document):
    """Base of a step's details."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def of(cls, output: StepOutput) -> Self:
        """Read the details of an output. Raise DataError if they are not those of this step."""
        try:
            return cls.model_validate(output.details)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"output of step {output.step}: details.{where}: {first['msg']}") from error

    def document(self) -> Json:
        """Return the details as they are written."""
        return self.model_dump(mode="json")
