"""Recipes: techniques in order, each by name, or as `{name: {key: value}}` with its own settings."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Tag, WithJsonSchema

from slipstream.plugins import TECHNIQUES

NAME_ONLY, WITH_SETTINGS = "<technique>", "<settings>"
"""Parts of pydantic's locations that are not fields of the spec."""

if TYPE_CHECKING:
    Technique = str
else:
    Technique = Literal[tuple(TECHNIQUES)]


def _kind(value: object) -> str:
    return WITH_SETTINGS if isinstance(value, Mapping) else NAME_ONLY


def _one(value: dict[str, Any]) -> dict[str, Any]:
    if len(value) != 1:
        raise ValueError(f"must name one technique, such as `prune: {{rounds: 5}}`, not {', '.join(value) or 'none'}")
    return value


_SCHEMA = {
    "type": "object",
    "properties": {technique: {"type": "object"} for technique in TECHNIQUES},
    "additionalProperties": False,
    "minProperties": 1,
    "maxProperties": 1,
}
Settings = Annotated[dict[Technique, dict[str, Any]], AfterValidator(_one), WithJsonSchema(_SCHEMA)]
Use = Annotated[Annotated[Technique, Tag(NAME_ONLY)] | Annotated[Settings, Tag(WITH_SETTINGS)], Discriminator(_kind)]
"""One technique of a recipe."""


def name_of(use: str | Mapping[str, Any]) -> str:
    """Return the technique's name."""
    return use if isinstance(use, str) else next(iter(use))


def changes_of(use: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return its own settings."""
    changes: Mapping[str, Any] = {} if isinstance(use, str) else use[name_of(use)]
    return changes
