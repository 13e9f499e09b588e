"""Writes the chart's README from its schema and its default values: `scripts/chart-readme.py`.

The schema is the one place where keys are described; a test compares the README with it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent.parent / "helm/slipstream"
README = CHART / "README.md"
Json = dict[str, Any]

HEAD = """\
# The slipstream chart

{description}.

Generated from `values.schema.json` by `scripts/chart-readme.py`; do not edit it by hand. To install, upgrade, back up,
scale and remove, see [docs/kubernetes.md](../../docs/kubernetes.md). Airflow is a separate release, with
[airflow-values.yaml](../airflow-values.yaml).

- Chart {version}, slipstream {app}, Kubernetes {kubernetes}; every manifest is validated against 1.30 to 1.37.
- Object names are fixed, so a namespace holds one installation.
- Values name Secrets but never contain them.
- Keys that are not listed here are errors.
"""


def markdown() -> str:
    """The README."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    parts = [
        HEAD.format(
            description=chart["description"],
            version=chart["version"],
            app=chart["appVersion"],
            kubernetes=chart["kubeVersion"].removesuffix("-0"),
        )
    ]
    for name, found in schema["properties"].items():
        if name in values:
            parts.append(section(name, resolved(found, schema), values[name], schema))
    return "\n".join(parts)


def section(name: str, found: Json, default: object, schema: Json) -> str:
    """Heading, description and table of a top-level key."""
    rows = [f"| `{k}` | {t} | {d} | {text} |" for k, t, d, text in keys(name, found, default, schema)]
    return "\n".join([f"## {name}", "", found["description"], "", *HEADER, *rows, ""])


HEADER = ("| key | type | default | meaning |", "| --- | --- | --- | --- |")


def keys(path: str, found: Json, default: object, schema: Json) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, description) of a key and of all below it."""
    inner = found.get("properties")
    if inner:
        for name, below in inner.items():
            known = default.get(name, ABSENT) if isinstance(default, dict) else ABSENT
            yield from keys(f"{path}.{name}", resolved(below, schema), known, schema)
        return
    yield path, kind(found), shown(default), found["description"]
    element = found.get("items") or found.get("additionalProperties")
    if isinstance(element, dict) and resolved(element, schema).get("properties"):
        yield from keys(f"{path}[]" if "items" in found else f"{path}.NAME", resolved(element, schema), ABSENT, schema)


ABSENT = object()
"""Default of a key that exists only if it is set."""


def resolved(found: Json, schema: Json) -> Json:
    """A part of the schema with what it refers to; its own description comes first."""
    name = found.get("$ref", "").removeprefix("#/definitions/")
    return {**schema["definitions"][name], **found} if name else found


def kind(found: Json) -> str:
    """Type in words."""
    if "enum" in found:
        return " or ".join(f"`{value}`" for value in found["enum"])
    types = found["type"] if isinstance(found["type"], list) else [found["type"]]
    names = {"array": "list", "object": "map"}
    return " or ".join(names.get(t, t) for t in types)


def shown(default: object) -> str:
    """A default value as code."""
    return "" if default is ABSENT else f"`{json.dumps(default, ensure_ascii=False)}`"


if __name__ == "__main__":
    README.write_text(markdown(), encoding="utf-8")
