"""Schema, default values, README and guide say the same; the guide's commands work on the chart."""

import json
import re
import runpy
import shlex
import subprocess

import pytest
import yaml

from .chart import CHART, ROOT, Json, helm, tools

GUIDE = ROOT / "docs/kubernetes.md"
SCHEMA: Json = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
VALUES: Json = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def parts(found: object, path: str = "") -> list[tuple[str, Json]]:
    """Every part of the schema that describes a value."""
    if not isinstance(found, dict):
        return []
    here = [(path, found)] if path and ({"type", "enum", "$ref"} & set(found)) else []
    for name, below in {**found.get("properties", {}), **found.get("definitions", {})}.items():
        here += parts(below, f"{path}.{name}".lstrip("."))
    for name in ("items", "additionalProperties"):
        here += parts(found.get(name), f"{path}[]")
    return here


@pytest.mark.parametrize(("path", "found"), parts(SCHEMA), ids=lambda v: v if isinstance(v, str) else "")
def test_every_key_is_described_and_unknown_ones_are_refused(path: str, found: Json) -> None:
    if not path.endswith("[]"):
        assert found.get("description", "").endswith("."), path
    assert {"type", "enum", "$ref"} & set(found), path
    if found.get("type") == "object" and path not in PEERS:
        assert "additionalProperties" in found and found["additionalProperties"] is not True, path
    if found.get("properties"):
        assert found["additionalProperties"] is False, path


PEERS = ("peers[]", "networkPolicy.stepsTo[]")
"""Parts of Kubernetes' own NetworkPolicy, which its API server checks."""


def test_defaults_and_schema_have_the_same_keys() -> None:
    def compare(schema: Json, values: Json, path: str) -> None:
        known = set(schema["properties"]) - ({"global"} if not path else set())
        assert set(values) == known, path
        for name, below in schema["properties"].items():
            if below.get("properties"):
                compare(below, values[name], f"{path}.{name}")

    compare(SCHEMA, VALUES, "")


def test_the_readme_is_current() -> None:
    made = runpy.run_path(str(ROOT / "scripts/chart-readme.py"))["markdown"]()
    assert (CHART / "README.md").read_text(encoding="utf-8") == made, "run: .venv/bin/python scripts/chart-readme.py"


def commands() -> list[list[str]]:
    """The guide's shell commands, as words; a line that ends in a backslash goes on."""
    text = GUIDE.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_guide_has_commands_of_the_usual_tools_only() -> None:
    assert len(commands()) > 10
    assert {words[0] for words in commands()} <= {
        "helm",
        "kubectl",
        "make",
        "pg_dump",
        "pg_restore",
        ".venv/bin/slipstream",
    }


@pytest.mark.parametrize("words", [w for w in commands() if "helm/slipstream" in w], ids=lambda w: " ".join(w)[:60])
def test_the_guides_installations_render(words: list[str]) -> None:
    """With the same release, namespace and options, offline; `your-values.yaml` is the guide's own example."""
    example = yaml.safe_load(fenced("yaml"))
    assert words[:3] == ["helm", "upgrade", "--install"]
    options = [
        "-" if w.endswith("your-values.yaml") else w for w in words[3:] if w not in ("--wait", "--create-namespace")
    ]
    done = helm("template", *options, given=yaml.safe_dump(example))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "kubectl"], ids=lambda w: " ".join(w)[:70])
def test_the_guides_kubectl_commands_have_known_options(words: list[str]) -> None:
    plain = words[1 : words.index("--")] if "--" in words else words[1:]
    verb = next(w for w in plain if w in VERBS)
    path = {"create": [verb, plain[plain.index(verb) + 1]], "rollout": [verb, "status"]}.get(verb, [verb])
    path += ["generic"] if "generic" in plain else []
    shown = subprocess.run(
        [str(tools() / "kubectl"), *path, "--help"], capture_output=True, text=True, check=True
    ).stdout
    shown += subprocess.run([str(tools() / "kubectl"), "options"], capture_output=True, text=True, check=True).stdout
    for option in (w.partition("=")[0] for w in plain if w.startswith("-")):
        assert re.search(rf"(^|\s){re.escape(option)}[=:, ]", shown), option


VERBS = ("create", "label", "annotate", "rollout", "port-forward", "get", "logs", "delete", "exec", "scale", "describe")


def test_costs_are_those_of_the_defaults() -> None:
    airflow = yaml.safe_load((ROOT / "helm/airflow-values.yaml").read_text(encoding="utf-8"))
    components = [airflow[name] for name in ("scheduler", "apiServer", "dagProcessor", "triggerer")]
    requests = [part["resources"]["requests"] for part in (VALUES["mlflow"], VALUES["webhook"], *components)]
    cpu = sum(int(r["cpu"].removesuffix("m")) for r in requests) / 1000
    memory = sum(_gib(r["memory"]) for r in requests)
    text = GUIDE.read_text(encoding="utf-8")
    assert f"reserves {cpu:g} processors and {memory:g} GiB" in text
    rows = re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) GiB \|$", text, re.MULTILINE)
    assert [(float(c), float(m)) for c, m in rows] == [
        (int(r["cpu"].removesuffix("m")) / 1000, _gib(r["memory"])) for r in requests
    ]


def _gib(quantity: str) -> float:
    return float(quantity[:-2]) / {"Gi": 1, "Mi": 1024}[quantity[-2:]]


def fenced(language: str) -> str:
    """The guide's one block in a language."""
    [block] = re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(block)


def test_the_guide_names_every_secret() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    secrets = {
        VALUES["storage"]["secret"], VALUES["mlflow"]["database"]["secret"], VALUES["webhook"]["secret"]["name"],
        VALUES["airflow"]["secret"], VALUES["mlflow"]["login"], VALUES["signing"]["secret"],
    }  # fmt: skip
    airflow = yaml.safe_load((ROOT / "helm/airflow-values.yaml").read_text(encoding="utf-8"))
    secrets |= {airflow["data"]["metadataSecretName"], *(airflow[k] for k in airflow if k.endswith("SecretName"))}
    created = {words[words.index("generic") + 1] for words in commands() if "generic" in words}
    assert secrets == created
    for key in ("database-uri", "webhook-key", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "username", "password",
                "session-key", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "SLIPSTREAM_SIGNING_KEY",
                "fernet-key", "jwt-secret", "api-secret-key", "connection"):  # fmt: skip
        assert f"--from-literal={key}=" in text, key
