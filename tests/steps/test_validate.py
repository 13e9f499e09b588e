"""validate on real engines: OpenVINO and PyTorch run small networks, a real MLflow server records them."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the environment torch")
pytest.importorskip("mlperf_loadgen", reason="needs the environment torch")

from mlflow import MlflowClient
from tests.user_code import use

from slipstream import digests
from slipstream import spec as specs
from slipstream.contract import Artifact, Cell, StepInput, StepOutput, evidence
from slipstream.data.user_code import user_function
from slipstream.engines.base import build_engine, load_engine
from slipstream.errors import DataError, InputError
from slipstream.frameworks.base import framework_for
from slipstream.home import Home
from slipstream.measure.latency import Plan
from slipstream.runner.run import run_step
from slipstream.spec import Call
from slipstream.steps import validate
from slipstream.store.tracking import PROGRESS, Tracking
from slipstream.tools.bench import measure

CODE = '''
import numpy as np
from slipstream.data.splits import Data, Split

SIZE, CLASSES = 12, 3

def data():
    rng = np.random.default_rng(0)
    def split(n):
        labels = np.arange(n, dtype=np.int64) % CLASSES
        images = rng.normal(0, 0.4, (n, 1, SIZE, SIZE)).astype(np.float32)
        for i, label in enumerate(labels):
            images[i, 0, 4 * label : 4 * label + 4] += 0.3
        return Split(images, labels)
    return Data(train=split(60), test=split(900), classes=("boot", "bag", "coat"))

def margin(outputs, labels):
    own = outputs[np.arange(len(labels)), labels]
    return np.clip((own - outputs.mean(axis=1)) / (outputs.max(axis=1) - outputs.mean(axis=1)) - 0.5, 0, 0.5) * 2

def network(heavy=True, swapped=False):
    """Sums each third of the image; the heavy branch costs time and changes nothing."""
    import torch
    from torch import nn

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(SIZE * SIZE, CLASSES)
            weight = torch.zeros(CLASSES, SIZE, SIZE)
            for c in range(CLASSES):
                weight[c, 4 * c : 4 * c + 4] = 1.0
            if swapped:
                weight[:2] = weight[[1, 0]].clone()
            self.dense.weight.data = weight.flatten(1)
            self.dense.bias.data = torch.zeros(CLASSES)
            if heavy:
                layers = [nn.Conv2d(1, 32, 3, padding=1)] + [nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)]
                self.branch = nn.Sequential(*layers)

        def forward(self, input):
            scores = self.dense(input.flatten(1))
            return scores + 1e-9 * self.branch(input).mean((1, 2, 3)).unsqueeze(1) if heavy else scores

    return Small()
'''
SPEC = """
name: case
model: {{registry: "models:/{name}@source", architecture: validate_case:network}}
data: validate_case:data
objective: {{max_drop: 1.0, latency_p99_ms: 1000}}
recipes: {{light: [quantize], same: [quantize], swapped: [quantize]}}
targets: {{server: {{engine: openvino, threads: 1}}}}
"""
SHORT = Plan(rounds=9, clean_rounds=9, max_rounds=10, block_ms=60, warmup_ms=40, block_warmup_ms=5, server_ms=100)
UNHEEDED = replace(SHORT, others_cores=99)
"""Parts of the tests run side by side: where a test is not about speed, every round counts as quiet. Nine of them: the
bound from five is the worst round, and one in which others had the core would decide."""
RECIPES = {"baseline": {}, "same": {}, "light": {"heavy": False}, "swapped": {"heavy": False, "swapped": True}}


@dataclass(frozen=True)
class Case:
    """A spec, and what retrain and build left for it."""

    spec: specs.Spec
    outputs: tuple[StepOutput, ...]

    def validate(self, recipe: str, run_key: str = "manual-1") -> StepOutput:
        cell = Cell(recipe=recipe, target="server")
        wanted = {None, cell, Cell(recipe="baseline", target="server")}
        upstream = tuple(o for o in self.outputs if o.cell in wanted)
        inputs = StepInput(run_key=run_key, pipeline_run_id="", cell=cell, upstream=upstream)
        return run_step("validate", self.spec, inputs)


def evidence_of(output: StepOutput) -> evidence.EngineEvidence:
    measured = evidence.Validated.of(output).evidence
    assert measured is not None
    return measured


def keep(home: Home, made: Path, step: str, recipe: str | None) -> StepOutput:
    """What a step that logged this folder hands on; the folder lies in the cache as if it had been fetched."""
    sha256 = digests.folder(made)
    cached = home.cache / sha256 / made.name
    if not cached.exists():
        shutil.copytree(made, cached)
    artifact = Artifact(
        uri="models:/none", path=f"data/{made.name}", sha256=sha256, size_bytes=digests.folder_size(made)
    )
    cell = Cell(recipe=recipe, target="server") if recipe else None
    return StepOutput(step=step, cell=cell, identity=f"{step}-{recipe}", run_id="none", artifact=artifact)


@pytest.fixture
def case(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, mlflow_server: str) -> Case:
    mlflow.set_tracking_uri(mlflow_server)
    (tmp_path / "validate_case.py").write_text(CODE)
    use(tmp_path, monkeypatch)
    monkeypatch.setattr(validate, "PLAN", UNHEEDED)
    spec = specs.parse(SPEC.format(name=re.sub(r"\W", "-", tmp_path.name)), "test")
    torch = framework_for("torch")
    train = user_function(Call(function="validate_case:data"))().train
    outputs = []
    for recipe, params in RECIPES.items():
        architecture = Call(function="validate_case:network", params=params)
        candidate, engine = tmp_path / recipe / "candidate", tmp_path / recipe / "engine"
        torch.save(torch.build(architecture, seed=0), architecture, train, candidate)  # type: ignore[attr-defined]
        build_engine(candidate, spec.targets["server"], engine)
        outputs.append(keep(Home.from_environment(), engine, "build", recipe))
        if recipe == "baseline":
            outputs.append(keep(Home.from_environment(), candidate, "retrain", None))
    return Case(spec, tuple(outputs))


def answers(output: StepOutput) -> dict[str, str]:
    return {v.gate: v.answer for v in output.verdicts}


def test_a_lighter_engine_with_the_same_answers_passes(case: Case) -> None:
    output = case.validate("light")
    found = evidence_of(output)
    assert answers(output) == {"accuracy": "pass", "latency": "pass", "speedup": "pass"}, output.verdicts
    assert found.samples == 900
    assert found.baseline_quality == found.engine_quality > 80
    assert found.drop_pp.low < found.drop_pp.estimate == 0 < found.drop_pp.high < 1
    assert found.speedup_reference is not None and found.speedup_reference.low > 1
    assert found.speedup_eager is not None and found.speedup_eager.estimate > 1
    if found.noise.others_cores is None or found.noise.others_cores < 1:
        assert found.speedup_eager.low > 1
    assert found.reference is not None and found.reference.p50_ms > found.latency.p50_ms
    assert found.latency.n >= 662 and found.latency.p99_ms is not None
    assert found.server is not None and found.server.rate_per_s == pytest.approx(found.latency.rate_per_s / 2)
    assert found.peak_memory_mib is not None and found.peak_memory_mib > 0
    run = MlflowClient().get_run(output.run_id)
    assert run.data.metrics["top1"] == pytest.approx(found.engine_quality)
    assert run.data.metrics["speedup_reference"] > 1
    assert json.loads(run.data.tags[PROGRESS])["unit"] == "batches and rounds"
    assert run.data.tags["gate.accuracy"].startswith("pass: drop 0.00 points")


def test_an_engine_that_confuses_two_classes_is_rejected_and_says_which_lost_most(case: Case) -> None:
    output = case.validate("swapped")
    found = evidence_of(output)
    assert answers(output)["accuracy"] == "fail"
    assert found.drop_pp.estimate > 30
    assert found.worst_class in ("boot", "bag") and found.worst_class_drop_pp > 50
    assert evidence.row_of("swapped@server", output).status == "rejected"


def test_an_engine_that_is_the_baseline_again_is_about_as_fast(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "PLAN", Plan())  # the real one: short blocks say little while other tests run
    output = case.validate("same")
    found = evidence_of(output)
    assert answers(output)["accuracy"] == "pass"
    assert found.speedup_reference is not None
    crowded = found.speedup_eager is None
    assert crowded or found.speedup_reference.estimate == pytest.approx(1, abs=0.4)
    assert found.speedup_reference.low < 1.4, "also where others took the cores"


def test_the_baselines_own_cell_is_the_reference(case: Case) -> None:
    output = case.validate("baseline")
    found = evidence_of(output)
    assert "speedup" not in answers(output)
    assert found.reference is None and found.speedup_reference is None
    assert evidence.row_of("baseline@server", output).status == "reference"


def test_an_unchanged_engine_is_not_measured_again(case: Case) -> None:
    first, second = case.validate("light"), case.validate("light")
    assert second.reused and second.run_id == first.run_id
    assert second.details == first.details


class Moody:
    """An engine that answers differently each time it is loaded: it confuses another tenth of the samples."""

    loads = 0

    def __init__(self, folder: Path) -> None:
        self._engine = load_engine(folder)
        Moody.loads += 1
        self._rng = np.random.default_rng(Moody.loads)

    def run(self, batch: np.ndarray) -> np.ndarray:
        answers = self._engine.run(batch)
        moved = self._rng.random(len(answers)) < 0.1
        answers[moved] = answers[moved][:, ::-1]
        return answers


def test_an_engine_is_scored_once_and_only_its_latency_is_measured_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A latency verdict that stays open must not be a second try for the accuracy."""
    monkeypatch.setattr(validate, "load_engine", Moody)
    few = replace(SHORT, rounds=5, clean_rounds=5, max_rounds=5, block_ms=5, min_queries=8, others_cores=99)
    monkeypatch.setattr(validate, "PLAN", few)
    lenient = case.spec.objective.model_copy(update={"max_drop": 50.0})  # so that the latency alone is open
    case = replace(case, spec=case.spec.model_copy(update={"objective": lenient}))
    first, second = (case.validate("baseline", run_key) for run_key in ("week-1", "week-2"))
    assert answers(first) == answers(second) == {"accuracy": "pass", "latency": "inconclusive"}
    assert not second.reused and second.run_id != first.run_id
    one, two = evidence_of(first), evidence_of(second)
    assert one.discordance_percent and one.discordance_percent > 2, "the engine is a moody one"
    assert (one.drop_pp, one.engine_quality, one.scores_run) == (two.drop_pp, two.engine_quality, two.scores_run)
    assert one.latency.quantiles_ms != two.latency.quantiles_ms
    alone = case.spec.model_copy(update={"targets": case.spec.targets, "seed": 7})
    third = evidence_of(replace(case, spec=alone).validate("baseline", "week-3"))
    assert third.drop_pp == one.drop_pp, "nor is a seed a second try"


def test_who_names_one_of_several_engines_is_held_to_all_that_were_looked_at(case: Case) -> None:
    all_three = evidence_of(case.validate("light"))
    chosen = case.spec.model_copy(update={"recipes": {"light": ("quantize",)}})
    later = evidence_of(replace(case, spec=chosen).validate("light", "later"))
    assert (all_three.competing, later.competing) == (3, 3)
    assert later.confidence == all_three.confidence == pytest.approx(1 - 0.05 / 3)
    assert "98.33 % upper bound (the best of 3)" in case.validate("light").verdicts[0].reason


def test_baseline_scores_are_computed_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.validate("light")
    scored: list[str] = []
    original = validate.metrics.record

    def noting(*args: object, what: str, **kwargs: object) -> np.ndarray:
        scored.append(what)
        result: np.ndarray = original(*args, what=what, **kwargs)  # type: ignore[arg-type]
        return result

    monkeypatch.setattr(validate.metrics, "record", noting)
    case.validate("swapped")
    assert scored == ["engine swapped@server"]


def test_a_cell_without_its_engine_is_refused_by_name(case: Case) -> None:
    missing = replace(case, outputs=tuple(o for o in case.outputs if o.cell != Cell(recipe="light", target="server")))
    with pytest.raises(DataError, match="build light@server"):
        missing.validate("light")


def test_only_what_decides_the_result_is_part_of_its_settings(case: Case) -> None:
    def settings(change: Callable[[dict[str, object]], object]) -> dict[str, object]:
        document = case.spec.model_dump(mode="json")
        change(document["objective"])
        spec = specs.Spec.model_validate(document)
        inputs = StepInput(run_key="r", pipeline_run_id="", cell=Cell(recipe="light", target="server"))
        return validate.settings(spec, inputs)

    same = settings(lambda objective: None)
    assert settings(lambda objective: objective.update(prefer="size")) == same
    assert settings(lambda objective: objective.update(max_drop=2.0)) != same
    assert {"openvino", "torch", "mlcommons-loadgen"} <= set(same["versions"])  # type: ignore[call-overload]
    boxes = settings(lambda objective: objective.update(metric="map"))
    assert "pycocotools" in boxes["versions"]  # type: ignore[operator]
    assert same["metric"] is None
    own = settings(lambda objective: objective.update(metric="validate_case:margin"))
    path = Path(str(sys.modules["validate_case"].__file__))
    path.write_text(path.read_text().replace("- 0.5", "- 0.25"))
    changed = settings(lambda objective: objective.update(metric="validate_case:margin"))
    assert own["metric"] is not None and own["metric"] != changed["metric"]


def test_a_metric_that_is_no_mean_is_bounded_by_the_bootstrap(case: Case) -> None:
    case = replace(case, spec=with_metric(case.spec, "f1"))
    light, swapped = (evidence_of(case.validate(recipe)) for recipe in ("light", "swapped"))
    assert light.metric == "f1"
    assert light.drop_pp.estimate == 0 < light.drop_pp.high < 1
    assert light.baseline_quality == light.engine_quality > 80
    assert swapped.drop_pp.low > 30
    assert swapped.worst_class in ("boot", "bag") and swapped.worst_class_drop_pp > 50


def test_a_metric_of_the_users_is_used_in_the_gate(case: Case) -> None:
    case = replace(case, spec=with_metric(case.spec, "validate_case:margin"))
    light, swapped = case.validate("light"), case.validate("swapped")
    assert (answers(light)["accuracy"], answers(swapped)["accuracy"]) == ("pass", "fail")
    assert evidence_of(light).metric == "margin"
    assert light.metrics["margin"] == evidence_of(light).engine_quality


def with_metric(spec: specs.Spec, metric: str) -> specs.Spec:
    return spec.model_copy(update={"objective": spec.objective.model_copy(update={"metric": metric})})


def test_bench_measures_all_engines_of_a_run_together(case: Case) -> None:
    outputs = [*case.outputs, *(case.validate(recipe) for recipe in ("baseline", "light"))]
    made = measure.measure(case.spec, "manual-1", outputs, UNHEEDED)
    assert [s.name for s in made.subjects] == ["torch eager FP32", "baseline@server", "light@server"]
    eager, baseline, light = made.subjects
    assert light.speedup_reference is not None and light.speedup_reference.estimate > 1
    if made.noise.others_cores is None or made.noise.others_cores < 1:
        assert light.speedup_reference.low > 1
    assert light.speedup_eager is not None and baseline.speedup_eager is not None and eager.speedup_eager is None
    assert baseline.speedup_reference is None and baseline.status == "reference"
    assert light.status == "passed" and light.size_bytes and light.drop_pp and light.quality == eager.quality
    assert made.engines == {"server": "openvino"} and "cores" in made.hardware and "openvino" in made.versions


def test_bench_finds_the_last_run_or_says_that_there_is_none(case: Case) -> None:
    with pytest.raises(InputError, match="no finished run with validated engines"):
        measure.last_run(Tracking(case.spec))
    case.validate("light")
    key, outputs = measure.last_run(Tracking(case.spec))
    assert key == "manual-1"
    assert [o.cell.key for o in outputs if o.cell] == ["light@server"]
    with pytest.raises(InputError, match="run other"):
        measure.last_run(Tracking(case.spec), "other")
