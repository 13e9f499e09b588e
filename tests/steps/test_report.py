"""The report step against a real MLflow server, with outputs shaped as the steps write them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

pytest.importorskip("matplotlib", reason="needs the environment serve")

from mlflow import MlflowClient
from tests.reports import sample
from tests.user_code import use

from slipstream import spec as specs
from slipstream.contract import Cell, StepInput, StepOutput
from slipstream.contract.evidence import row_of
from slipstream.errors import InputError, Unavailable
from slipstream.home import Home
from slipstream.platform import addresses
from slipstream.reports import find, show
from slipstream.reports.document import PAGE, REPORT, REQUEST, Report
from slipstream.runner.run import run_step
from slipstream.store.tracking import RUN_KEY, STEP, Tracking

CODE = """
import numpy as np
from slipstream.data.splits import Data, Split

def data():
    rng = np.random.default_rng(0)
    def split(n):
        return Split(rng.normal(size=(n, 1, 4, 4)).astype("float32"), np.arange(n, dtype="int64") % 2)
    return Data(train=split(32), test=split(16), classes=("Ankle boot", "Bag"))
"""


@pytest.fixture
def spec(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_server: str) -> Iterator[specs.Spec]:
    """The example spec, for a model of its own, on a small data set."""
    mlflow.set_tracking_uri(mlflow_server)
    (tmp_path / "small_data.py").write_text(CODE)
    use(tmp_path, monkeypatch)
    text = Path("examples/fashion.yaml").read_text().replace("examples.fashion:data", "small_data:data")
    name = re.sub(r"[^a-z]", "-", tmp_path.name)
    yield specs.parse(text.replace("models:/fashion-resnet", f"models:/{name}"), "test")


def report(spec: specs.Spec, run_key: str, *upstream: StepOutput, **params: object) -> tuple[StepOutput, Report]:
    """Run the step; its output, and the report that it left in MLflow."""
    upstream = tuple(o for o in upstream if o.step != "check")  # the made-up digests are not this data set's
    inputs = StepInput(run_key=run_key, pipeline_run_id="", upstream=upstream, params=params)
    output = run_step("report", spec, inputs)
    return output, find.load(find.pipeline_run(MlflowClient(), run_key))


def test_a_released_engine_ends_finished_with_page_plots_figures_and_request(spec: specs.Spec) -> None:
    output, made = report(spec, "released", *sample.whole_run())
    assert made.outcome == "released" and made.ok and output.details["ok"]
    assert (made.winner, made.version) == ("pruned-int8@server", "2")
    parent = find.pipeline_run(MlflowClient(), "released")
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["slipstream.outcome"] == "released"
    assert parent.data.metrics["winner.speedup_eager"] == pytest.approx(0.65 / 0.085)
    assert parent.data.metrics["engines.rejected"] == 3
    names = {f.path for f in MlflowClient().list_artifacts(parent.info.run_id, "report")}
    plots = {f"report/{n}" for n in ("pareto.svg", "pareto.png", "latency.svg", "timeline.svg")}
    assert names == plots | {PAGE, REPORT, REQUEST}
    body = json.loads(mlflow.artifacts.load_text(f"runs:/{parent.info.run_id}/{REQUEST}"))
    assert body["inputs"][0]["shape"] == [1, 1, 4, 4]
    assert made.sample is not None and made.sample.label == "Ankle boot"


def test_nothing_at_all_is_a_failed_run_with_every_cell_missing(spec: specs.Spec) -> None:
    _, made = report(spec, "nothing")
    assert made.outcome == "failed" and not made.ok
    assert len(made.missing) == len(made.rows) == 8
    assert find.pipeline_run(MlflowClient(), "nothing").info.status == "FAILED"


def test_a_rejected_run_is_rebuilt_from_the_evidence_that_select_saw(spec: specs.Spec) -> None:
    rejected = [o for o in sample.validate_outputs() if o.cell and o.cell.recipe in ("baseline", "distilled-int8")]
    only = spec.model_copy(update={"recipes": {"distilled-int8": spec.recipes["distilled-int8"]}})
    _, made = report(only, "rejected", *rejected)
    assert made.outcome == "rejected" and not made.ok
    assert "none of 2 engines" in made.headline and "2 engines failed the gate accuracy" in made.explanation


def test_a_missing_cell_never_ends_green(spec: specs.Spec) -> None:
    upstream = [
        o for o in sample.whole_run() if o.step != "select" and (o.cell is None or o.cell.key != "int8@portable")
    ]
    rows = [r for r in sample.rows() if r["cell"] != "int8@portable"]
    gap = row_of("int8@portable", None).model_dump(mode="json")
    upstream.append(sample.select_output(rows=[*rows, gap], missing=["int8@portable"]))
    _, made = report(spec, "missing", *upstream)
    assert made.missing == ("int8@portable",)
    assert made.outcome == "released" and not made.ok


def test_a_step_that_failed_is_named_with_its_reason_and_its_recorded_output_is_used(spec: specs.Spec) -> None:
    tracking = Tracking(spec)
    build = tracking.start("failed-trial", "build", Cell(recipe="int8", target="portable"), "i" * 64)
    tracking.fail(build, "no room on the disk")
    trial = tracking.start("failed-trial", "trial", None, "j" * 64)
    tracking.record(trial, sample.trial_output("fail").model_copy(update={"run_id": trial.run_id}))
    tracking.fail(trial, "small-scale test: fail")
    upstream = [*sample.validate_outputs(), sample.select_output()]
    _, made = report(spec, "failed-trial", *upstream)
    assert made.outcome == "stopped" and "1.2 % of 500 pairs differ" in made.explanation
    assert next((f.where, f.reason) for f in made.failures) == ("build int8@portable", "no room on the disk")
    assert len(made.timeline) == 16


def test_an_aborted_rollout_and_a_skipped_one(spec: specs.Spec) -> None:
    up_to_trial = (*sample.validate_outputs(), sample.select_output(), sample.trial_output())
    _, aborted = report(spec, "aborted", *up_to_trial, sample.rollout_output(released=False))
    assert aborted.outcome == "rolled_back" and "41 of 500 requests failed" in aborted.explanation
    _, skipped = report(spec, "skipped", *up_to_trial, skip_stages=["full_rollout"])
    assert skipped.outcome == "held" and skipped.ok
    _, refused = report(spec, "refused", *up_to_trial, skip_stages=[])
    assert refused.outcome == "held" and not refused.ok


def test_data_that_cannot_be_loaded_only_costs_the_example_request(spec: specs.Spec) -> None:
    lost = spec.model_copy(update={"data": specs.Call(function="small_data:lost")})
    _, made = report(lost, "no-data", *sample.whole_run())
    assert made.outcome == "released" and made.sample is None


def test_running_the_step_again_replaces_the_report(spec: specs.Spec) -> None:
    report(spec, "again", *sample.validate_outputs())
    _, made = report(spec, "again", *sample.whole_run())
    assert made.outcome == "released"
    assert find.pipeline_run(MlflowClient(), "again").info.status == "FINISHED"
    found = Tracking(spec).search({RUN_KEY: "again", STEP: "pipeline"})
    assert len(found) == 1


def test_find_by_key_id_and_spec_name(spec: specs.Spec) -> None:
    output, made = report(spec, "by-name", *sample.whole_run())
    client = MlflowClient()
    for reference in ("by-name", made.pipeline_run_id, output.run_id, spec.name):
        assert find.pipeline_run(client, reference).info.run_id == made.pipeline_run_id
    for wrong in ("no-such-run", "it's", "0" * 32):
        with pytest.raises(InputError):
            find.pipeline_run(client, wrong)
    Tracking(spec).pipeline_run("still-running")
    with pytest.raises(Unavailable, match="no report yet"):
        find.load(find.pipeline_run(client, "still-running"))


def test_two_specs_may_share_a_run_key_but_then_it_names_no_run(spec: specs.Spec) -> None:
    for name in ("one", "two"):
        Tracking(spec.model_copy(update={"name": name})).pipeline_run("scheduled__2026-11-29T00:00:00+00:00")
    with pytest.raises(InputError, match=r"several runs .* \(spec two\), .* \(spec one\)"):
        find.pipeline_run(MlflowClient(), "scheduled__2026-11-29T00:00:00+00:00")


def test_show_prints_the_table_the_pages_and_a_request(
    spec: specs.Spec, capsys: pytest.CaptureFixture[str], mlflow_server: str
) -> None:
    home = Home.from_environment()
    base = "http://127.0.0.1:1"
    addresses.save(home, addresses.Addresses(airflow=base, mlflow=mlflow_server, envoy=base, triggers=base))
    secrets = dict.fromkeys(addresses.Secrets.model_fields, "hush") | {"airflow_user": "admin"}
    (home.root / "secrets.json").write_text(json.dumps(secrets))
    report(spec, "shown", *sample.whole_run())
    show.show("shown", as_json=False)
    printed = capsys.readouterr().out
    assert "pruned-int8" in printed and "← picked" in printed
    assert f"{base}/dags/optimize-fashion/runs/shown" in printed
    assert "hush" not in printed  # not a terminal
    request = home.root / "runs" / "fashion" / "shown" / "request.json"
    assert json.loads(request.read_text())["inputs"]
    assert f"-d @{request}" in printed
    show.show("shown", as_json=True)
    assert json.loads(capsys.readouterr().out)["outcome"] == "released"
