"""examples/optimize.ipynb, its cells run in order as a notebook runs them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT

NOTEBOOK = json.loads((ROOT / "examples/optimize.ipynb").read_text())


@pytest.mark.slow
def test_the_notebook_runs(mlflow_server: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert set(names["table"].index) == {"baseline@portable", "int8@portable", "weights@portable"}
    assert set(names["columns"]) <= set(names["table"].columns)
    assert "int8@portable" in names["report"]._repr_html_()
