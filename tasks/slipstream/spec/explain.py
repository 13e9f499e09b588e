"""Validation errors in the spec's terms: file, field, problem and solution; bounded in length.

Pydantic's errors hold the rejected values by reference. They are never printed in full: a value may be as large as the
file.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from slipstream.spec.document import shortened, shown
from slipstream.spec.fields import PATTERNS
from slipstream.spec.recipes import NAME_ONLY, WITH_SETTINGS
from slipstream.spec.sections import FILES, FUNCTION

Context = Mapping[str, Any]

MOST = 20
"""Maximum number of listed problems; the rest is counted."""
INTERNAL = (FILES, FUNCTION, NAME_ONLY, WITH_SETTINGS, "[key]")
"""Parts of pydantic's locations that are not fields of the spec."""
PYDANTIC = {"Input should be": "must be", "String should": "must"}
"""Prefix of pydantic's messages, and the corresponding prefix here."""


def explain(error: ValidationError, source: str, model: type[BaseModel]) -> str:
    """Return one line for each problem of `model`'s document; `source` names the file."""
    problems = error.errors(include_url=False)
    lines = [_line(source, problem, model) for problem in problems[:MOST]]
    if len(problems) > MOST:
        lines.append(f"{source}: and {len(problems) - MOST} more problems")
    return "\n".join(lines)


def _line(source: str, error: ErrorDetails, model: type[BaseModel]) -> str:
    loc = [str(part) for part in error["loc"] if part not in INTERNAL]
    field = ".".join(shortened(part if part.isprintable() else repr(part), 60) for part in loc)
    message = _message(error, loc, model)
    return shortened(f"{source}: {field}: {message}" if field else f"{source}: {message}", len(source) + 500)


def _message(error: ErrorDetails, loc: list[str], model: type[BaseModel]) -> str:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1][:60], _keys(model, loc[:-1]), n=1)
        meant = f"did you mean `{near[0]}`?" if near else "remove it or check its spelling"
        return f"unknown key; {meant} (`slipstream schema` lists all keys)"
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    if kind in MESSAGES:
        return MESSAGES[kind](value, error.get("ctx", {}))
    message = str(error["msg"])
    for theirs, ours in PYDANTIC.items():
        message = message.replace(theirs, ours)
    return f"{message}, not {shown(value)}"


def _missing(value: object, context: Context) -> str:
    return "missing; this key is required"


def _no_mapping(value: object, context: Context) -> str:
    return f"must be a mapping of keys to values, not {shown(value)}"


def _no_list(value: object, context: Context) -> str:
    return f"must be a list, not {shown(value)}" + (f"; write [{value}]" if _is_scalar(value) else "")


def _no_text(value: object, context: Context) -> str:
    return f"must be text, not {_described(value)}" + ("; put it in quotes" if _is_scalar(value) else "")


def _short(value: object, context: Context) -> str:
    return f"must be a list of at least {context['min_length']} values, not {shown(value)}"


def _long(value: object, context: Context) -> str:
    return f"must be a list of at most {context['max_length']} values, not {shown(value)}"


def _pattern(value: object, context: Context) -> str:
    return f"{shown(value)} is not {PATTERNS[context['pattern']]}"


def _choice(value: object, context: Context) -> str:
    return f"must be {context['expected']}, not {shown(value)}{_near(value, context['expected'])}"


MESSAGES: dict[str, Callable[[object, Context], str]] = {
    "missing": _missing,
    "model_type": _no_mapping,
    "dict_type": _no_mapping,
    "tuple_type": _no_list,
    "string_type": _no_text,
    "too_short": _short,
    "too_long": _long,
    "string_pattern_mismatch": _pattern,
    "literal_error": _choice,
}
"""Message by pydantic's error type, from the rejected value and pydantic's description of the rule."""


def _described(value: object) -> str:
    """Return a value as YAML has read it; `no` is a boolean there."""
    kind = "the boolean " if isinstance(value, bool) else "the number " if isinstance(value, int | float) else ""
    return f"{kind}{shown(value)}"


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float) and len(str(shown(value))) < 60


def _near(value: object, expected: str) -> str:
    """Return `; did you mean …?` for a misspelled choice; pydantic lists choices as 'a', 'b' or 'c'."""
    choices = expected.split("'")[1::2]
    near = difflib.get_close_matches(value[:60], choices, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def _keys(model: type[BaseModel], loc: list[str]) -> list[str]:
    """Return the keys that a mapping at `loc` may have; empty if it is not a section."""
    models = [model]
    for part in loc:
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        # A mapping of names to sections, such as targets: the next part is a name, and the sections stay.
        models = [m for a in annotations for m in _sections(a)] if annotations else models
    return [key for m in models for key in m.model_fields]


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)
