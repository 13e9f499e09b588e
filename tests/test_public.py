"""The public API: what it has, that it is all that users' code needs, and that it costs nothing to import."""

import ast
import subprocess
import sys
from pathlib import Path

import slipstream

EXAMPLES = Path(__file__).parent.parent / "examples"
PUBLIC = {
    "Data", "DataError", "EngineInfo", "Home", "MetricInfo", "Report", "RolledBack", "RuntimeInfo", "Section",
    "SlipstreamError", "Spec", "Split", "TechniqueInfo", "Tokenizer", "Training",
    "load", "optimize", "report", "rollback", "run", "status",
}  # fmt: skip
"""Users' code depends on these names; one that goes is a change for CHANGELOG.md."""


def test_the_public_names_are_these_and_each_is_there_with_a_docstring() -> None:
    assert set(slipstream.__all__) == PUBLIC
    assert all((getattr(slipstream, name).__doc__ or "").strip() for name in PUBLIC)


def test_examples_use_only_public_names() -> None:
    paths = sorted(EXAMPLES.glob("*.py"))
    assert len(paths) > 4
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "slipstream":
                assert node.module == "slipstream" and {a.name for a in node.names} <= PUBLIC, path


def test_importing_it_loads_nothing() -> None:
    code = (
        "import sys, slipstream; print(*(m for m in sys.modules if m.startswith(('slipstream.', 'numpy', 'pydantic'))))"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.split() == []


def test_a_spec_is_loaded_as_the_command_line_loads_it() -> None:
    spec = slipstream.load(EXAMPLES / "fashion.yaml")
    assert isinstance(spec, slipstream.Spec) and spec.name == "fashion"
