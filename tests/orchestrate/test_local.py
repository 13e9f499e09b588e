"""Stage 1 without Airflow: every step a process of its environment, and a report that draws itself."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from tests.steps.training import document, spec_of

import slipstream
from slipstream.errors import InputError

BIG_ENOUGH = {"name": "alone", "objective": {"max_drop": 30.0, "confidence": 0.6}, "quantize": {"samples": 64}}


@pytest.mark.slow
def test_a_spec_is_optimized_and_its_report_is_an_object(mlflow_server: str, home: Path) -> None:
    written = document("alone", limit=2000) | BIG_ENOUGH | {"recipes": {"int8": ["quantize"], "slim": ["simplify"]}}
    report = slipstream.optimize(spec_of(written))
    assert report.outcome in ("held", "rejected") and {row.cell for row in report.rows} == {
        "baseline@portable", "int8@portable", "slim@portable",
    }  # fmt: skip
    table = report.table()
    assert list(table.index) == [row.cell for row in report.rows] and table.loc["int8@portable", "size_bytes"] > 0
    console = Console(file=io.StringIO(), width=100)
    console.print(report)
    assert "int8@portable" in console.file.getvalue() and "int8@portable" in report._repr_html_()


@pytest.mark.slow
def test_what_the_check_refuses_ends_before_anything_is_trained(mlflow_server: str, home: Path) -> None:
    written = document("refused") | {"data": "examples.fashion:nothing"}
    with pytest.raises(InputError, match="small: the check refused the spec"):
        slipstream.optimize(spec_of(written))


def test_a_missing_environment_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_ENVS", str(tmp_path / "none"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"step check needs the environment torch, .*slipstream setup SPEC"):
        slipstream.optimize(spec_of(document("nowhere")))
