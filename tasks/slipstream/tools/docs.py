"""The references docs/spec.md and docs/settings.md, made from JSON Schemas, so that they say what the code says."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.plan.settings import Settings
from slipstream.spec import PATTERNS, json_schema

SPEC = """\
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
SETTINGS = """\
# The settings

<!-- Made by `slipstream schema --settings --markdown`; tests/test_docs.py compares. Change settings.py instead. -->

One YAML file for each installation says where steps run, in which images and with how much of a machine:
`settings.yaml` in `SLIPSTREAM_HOME`, or the file that `SLIPSTREAM_SETTINGS` names. Without one, the defaults hold.
What a spec says under `resources:` goes before what stands here. Unknown keys are refused.
[runtimes.md](runtimes.md) tells how the runtimes differ.
"""
ORDER = ("Model", "DataFiles", "Objective", "Distill", "Prune", "Cluster", "Quantize", "Target", "SmallScaleTest",
         "Rollout", "Guardrails", "Waiver", "Training", "Resources", "Toleration", "Call")  # fmt: skip
TOP = "Top level"
TITLES = {"DataFiles": "Data files", "SmallScaleTest": "Small-scale test", "Call": "User function"}


def markdown() -> str:
    """The reference of the spec: a page."""
    schema = json_schema()
    plugged = [name for name in schema["$defs"] if name not in ORDER]
    return _page(SPEC, schema, (*ORDER, *plugged))


def settings_markdown() -> str:
    """The reference of the settings: a page."""
    schema = Settings.model_json_schema()
    return _page(SETTINGS, schema, ("Resources", "Toleration", "Docker", "Kubernetes", "Serving"))


def _page(introduction: str, schema: Mapping[str, Any], order: Sequence[str]) -> str:
    sections = {TOP: schema} | {name: schema["$defs"][name] for name in order}
    return "\n".join([introduction, *(_section(name, s, schema["$defs"]) for name, s in sections.items())])


def _section(name: str, section: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    required = set(section.get("required", ()))
    rows = [
        f"| `{field}` | {_type(shape)} | {_default(shape, field in required)} | {_meaning(shape, sections)} |"
        for field, shape in section["properties"].items()
    ]
    title = TITLES.get(name, name)
    about = "" if name == TOP else f"{section['description']}\n\n"
    return (
        f"## {title}\n\n{about}| key | value | default | meaning |\n| --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n"
    )


def _meaning(shape: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """The field's description; pydantic leaves it out where it is the same as the section's."""
    name = shape.get("$ref", "").rpartition("/")[2]
    return _cell(shape.get("description") or sections[name]["description"])


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
    if kind == "object" and "properties" in shape:
        return "one of them with settings"
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
    bounds = [f"{sign} {shape[key]:,}" for key, sign in signs.items() if key in shape]
    return f" {', '.join(bounds)}" if bounds else ""


def _cell(text: str) -> str:
    """Text that fits into one cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
