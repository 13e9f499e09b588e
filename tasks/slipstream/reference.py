"""The reference in docs/spec.md, made from the JSON Schema, so that it cannot say anything else than the code."""

import json
import re
from collections.abc import Mapping
from typing import Any

from slipstream.spec import PATTERNS, json_schema

INTRODUCTION = """\
# The spec

<!-- Made by `slipstream schema --markdown`; tests/test_docs.py compares. Change the docstrings in spec/ instead. -->

One YAML file says what to optimize, how good it must stay, how fast it must get, where it runs and how it goes live.
[examples/fashion.yaml](../examples/fashion.yaml) is a whole one. Unknown keys are refused; `slipstream validate FILE`
names every mistake with its field and exits 2. The JSON Schema for editors is
[spec.schema.json](spec.schema.json): with the YAML language server, put

```yaml
# yaml-language-server: $schema=docs/spec.schema.json
```

on the first line. A user function is written `module:function`, or `{function: module:function, params: {…}}` with
keyword arguments; it is imported from the folder that `SLIPSTREAM_CODE` names (the checkout, by default).
"""
ORDER = ("Model", "DataFiles", "Objective", "Distill", "Prune", "Quantize", "Target", "SmallScaleTest", "Rollout",
         "Guardrails", "Training", "Resources", "Toleration", "Call")  # fmt: skip
TITLES = {"Spec": "Top level", "DataFiles": "Data files", "SmallScaleTest": "Small-scale test", "Call": "User function"}


def markdown() -> str:
    """The whole page."""
    schema = json_schema()
    sections = {"Spec": schema} | {name: schema["$defs"][name] for name in ORDER}
    assert set(schema["$defs"]) == set(ORDER), "a section of the spec is missing in ORDER"
    return "\n".join([INTRODUCTION, *(_section(name, section) for name, section in sections.items())])


def _section(name: str, section: Mapping[str, Any]) -> str:
    required = set(section.get("required", ()))
    rows = [
        f"| `{field}` | {_type(shape)} | {_default(shape, field in required)} | {_meaning(shape)} |"
        for field, shape in section["properties"].items()
    ]
    title = TITLES.get(name, name)
    about = "" if name == "Spec" else f"{section['description']}\n\n"
    return (
        f"## {title}\n\n{about}| key | value | default | meaning |\n| --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n"
    )


def _meaning(shape: Mapping[str, Any]) -> str:
    """The field's description; pydantic leaves it out where it is the same as the section's."""
    name = shape.get("$ref", "").rpartition("/")[2]
    return _cell(shape.get("description") or json_schema()["$defs"][name]["description"])


def _default(shape: Mapping[str, Any], is_required: bool) -> str:
    if is_required:
        return "required"
    default = shape.get("default")
    if default is None:
        return "none"
    return "see there" if isinstance(default, dict) and default else f"`{json.dumps(default)}`"


def _type(shape: Mapping[str, Any]) -> str:
    """What may stand there, in words."""
    for key in ("anyOf", "oneOf"):
        if key in shape:
            options = [_type(s) for s in shape[key] if s.get("type") != "null"]
            return " or ".join(dict.fromkeys(options))
    if "$ref" in shape:
        name = shape["$ref"].rpartition("/")[2]
        title = TITLES.get(name, name)
        return f"[{title.lower()}](#{title.lower().replace(' ', '-')})"
    if "enum" in shape or "const" in shape:
        return ", ".join(f"`{v}`" for v in shape.get("enum", [shape.get("const")]))
    return _plain(shape)


def _plain(shape: Mapping[str, Any]) -> str:
    kind = shape.get("type")
    if kind == "array":
        items = shape.get("prefixItems") or [shape["items"]]
        return f"{'two' if 'prefixItems' in shape else 'list'} of: {_type(items[0])}"
    if kind == "object":
        values = shape.get("patternProperties", {"": shape.get("additionalProperties")}).values()
        return f"name → {_type(next(iter(values)))}"
    if shape.get("pattern") in PATTERNS:
        return (
            PATTERNS[shape["pattern"]].removeprefix("of the form ").partition(", such")[0].replace(", nor a", " or a")
        )
    words = {"string": "text", "boolean": "true or false", "integer": "whole number"}
    return words.get(str(kind), str(kind)) + _bounds(shape)


def _bounds(shape: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    told = [f"{sign} {shape[key]:,}" for key, sign in signs.items() if key in shape]
    return f" {', '.join(told)}" if told else ""


def _cell(text: str) -> str:
    """Text that fits into one cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
