"""Where an engine may be loaded: how each fact of its fingerprint may differ on the machine that loads it.

An engine states a relation for each fact (`Engine.relations`); a fact without one must be equal. Being loadable does
not guarantee equal answers: an engine whose facts differ from its build must also reproduce its recorded answers
(recorded.py).
"""

import re
from collections.abc import Mapping
from enum import Enum


class Relation(Enum):
    """How a fact here must relate to its value at the build. The value is the wording in the docs."""

    EQUAL = "equal"
    NOT_OLDER = "the same version or a later one"
    SAME_MAJOR = "the same version or a later one, with the same major number"
    INCLUDES = "all that the build had, or more"
    ANY = "any; recorded only"


def differences(
    relations: Mapping[str, Relation], built: Mapping[str, str], here: Mapping[str, str]
) -> tuple[str, ...]:
    """Return a phrase for each fact of `built` that forbids loading the engine here; empty if it may be loaded."""
    return tuple(
        f"{fact}: built with {value!r}, here {here.get(fact)!r}"
        for fact, value in built.items()
        if not _holds(relations.get(fact, Relation.EQUAL), value, here.get(fact))
    )


def _holds(relation: Relation, built: str, here: str | None) -> bool:
    if relation is Relation.ANY or here == built:
        return True
    if here is None or relation is Relation.EQUAL:
        return False
    if relation is Relation.INCLUDES:
        return set(built.split()) <= set(here.split())
    numbers = release(built), release(here)
    if not all(numbers):
        return False
    return numbers[0] <= numbers[1] and (relation is Relation.NOT_OLDER or numbers[0][0] == numbers[1][0])


def release(version: str) -> tuple[int, ...]:
    """Return the release part of a version as PEP 440 compares it: `1.32.0rc1+cpu` → (1, 32), as `1.32` is `1.32.0`.

    It is empty for text that is not a version.
    """
    leading = re.match(r"\d+(\.\d+)*", version)
    if not leading:
        return ()
    numbers = [int(number) for number in leading[0].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
