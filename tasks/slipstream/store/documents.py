"""A step's IN document: read as a whole, or gathered from the OUT documents of earlier steps."""

from collections.abc import Iterable
from typing import TypeVar

from pydantic import ValidationError

from slipstream import storage
from slipstream.contract import Cell, Document, StepInput, StepOutput
from slipstream.errors import InputError
from slipstream.plan import flow
from slipstream.spec import BASELINE, Spec
from slipstream.store import signing

T = TypeVar("T", bound=Document)


def read(uri: str) -> StepInput:
    """Return an IN document. Raise InputError if it is invalid, DataError if it is missing or holds an unsigned
    output."""
    inputs = _read(uri, StepInput, "IN")
    for output in inputs.upstream:
        signing.require_signed(output, uri)
    return inputs


def gather(step: str, spec: Spec, run_key: str, cell: str, outputs: Iterable[str]) -> StepInput:
    """Return a step's IN document from the URIs of OUT documents; those that the step does not use are left out.

    Raise InputError if one is missing or invalid, DataError if this platform did not sign it.
    """
    chosen = _cell(spec, cell) if cell else None
    signed_outputs = [signing.require_signed(_read(uri, StepOutput, "OUT"), uri) for uri in outputs]
    return StepInput(run_key=run_key, cell=chosen, upstream=flow.upstream(step, spec, chosen, signed_outputs))


def _cell(spec: Spec, key: str) -> Cell:
    chosen = flow.cell_of(key)
    recipes = (BASELINE, *spec.recipes)
    if chosen.recipe not in recipes:
        raise InputError(f"--cell {key}: spec {spec.name} has no recipe {chosen.recipe}; it has {', '.join(recipes)}")
    if chosen.target is not None and chosen.target not in spec.targets:
        has = ", ".join(spec.targets)
        raise InputError(f"--cell {key}: spec {spec.name} has no target {chosen.target}; it has {has}")
    return chosen


def _read(uri: str, kind: type[T], name: str) -> T:
    text = storage.read_text(uri)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{uri}: not an {name} document: {error}") from error
