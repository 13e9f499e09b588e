"""The types of a spec's fields, and descriptions of their patterns for errors."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from slipstream.contract import Section
from slipstream.spec.schedule import schedule

NAME = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
REGISTRY = r"^models:/[A-Za-z0-9_.-]+@[A-Za-z0-9_-]+$"
FUNCTION_NAME = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
MEMORY = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti)$"
PATTERNS = {
    MEMORY: "an amount of memory with a unit, such as 512Mi or 4Gi",
    FUNCTION_NAME: "of the form module:function, such as examples.fashion:data",
    NAME: "a name of lower-case letters, digits and hyphens, at most 40 of them",
    REGISTRY: "of the form models:/NAME@ALIAS, such as models:/fashion-resnet@source",
}
"""Description of each pattern, for error messages."""

RELEASE_ALIASES = ("champion", "previous", "challenger")
"""The serving, the previous and the tested release: aliases of engines, which slipstream moves itself."""

Name = Annotated[str, Field(pattern=NAME)]


def function(value: str) -> str:
    """Raise ValueError unless the value names a function."""
    if not re.fullmatch(FUNCTION_NAME, value):
        raise ValueError(f"{value!r} is not {PATTERNS[FUNCTION_NAME]}")
    return value


def registry(value: str) -> str:
    """Raise ValueError if the alias is one of slipstream's own: a retrain would point it at a checkpoint."""
    alias = value.rpartition("@")[2]
    if alias.lower() in RELEASE_ALIASES:
        raise ValueError(
            f"alias {alias} is one of {', '.join(RELEASE_ALIASES)}, which slipstream moves itself and which name "
            "engines; give the trained model an alias of its own, such as source"
        )
    return value


def percent(value: object) -> object:
    """Return the value without a percent sign: `5%` and `5` both mean five percent."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return value.strip().removesuffix("%").strip()
    return value


def _uri(value: str) -> str:
    if "://" in value and not value.startswith("s3://"):
        raise ValueError(f"{value!r} is neither a local path nor an s3:// URI")
    return value


RegisteredModel = Annotated[str, Field(pattern=REGISTRY), AfterValidator(registry)]
FunctionName = Annotated[str, AfterValidator(function)]
Percent = Annotated[
    float,
    BeforeValidator(percent, json_schema_input_type=Annotated[float, Field(ge=0, le=100)] | str),
    Field(ge=0, le=100),
]
Schedule = Annotated[str, AfterValidator(schedule)]
FileUri = Annotated[str, AfterValidator(_uri)]
Optimizer = Literal["sgd", "adamw"]


class Call(Section):
    """A function in the user's code and its keyword arguments."""

    function: FunctionName
    """`module:function`, importable from the folder that SLIPSTREAM_CODE names."""
    params: dict[str, int | float | str | bool] = Field(default={})
    """Keyword arguments."""


def _call(value: object) -> object:
    return {"function": value} if isinstance(value, str) else value


UserFunction = Annotated[
    Call, BeforeValidator(_call, json_schema_input_type=Annotated[str, Field(pattern=FUNCTION_NAME)] | Call)
]


def in_bytes(memory: str) -> int:
    """Return an amount of memory such as `4Gi` in bytes; the value matches MEMORY."""
    return round(float(memory[:-2]) * float(1024) ** ("KMGT".index(memory[-2]) + 1))
