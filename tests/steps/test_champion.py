"""The pick on real engines: against the champion's own answers, and head to head."""

import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the environment torch")
pytest.importorskip("mlperf_loadgen", reason="needs the environment torch")

import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.steps.stages import ENGINES, World, WorldMaker, failing, validated

from slipstream.contract import Artifact, Cell, StepOutput
from slipstream.contract.evidence import EngineEvidence
from slipstream.engines.base import build_engine
from slipstream.errors import EngineError, GateFailed
from slipstream.frameworks.base import INPUT, MANIFEST, ONNX, OUTPUT, CandidateManifest
from slipstream.measure.latency import Plan
from slipstream.measure.metrics.base import metric_for
from slipstream.runner.context import Context
from slipstream.steps import champion, racing, scores, select
from slipstream.store.registry import CHAMPION

SHORT = Plan(rounds=6, clean_rounds=5, max_rounds=6, block_ms=30, warmup_ms=20, block_warmup_ms=2, others_cores=99)


def network(wrong: float, layers: int) -> onnx.ModelProto:
    """Answers with its input, whose largest value is the label, and confuses the classes 0 and 1 in `wrong` of them."""
    nodes, weights, last = [], [], INPUT
    for i in range(layers):  # products that change nothing and take time
        weights.append(numpy_helper.from_array(np.eye(10, dtype=np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]))
        last = f"h{i}"
    bias = np.zeros(10, np.float32)
    bias[0] = wrong
    weights.append(numpy_helper.from_array(bias, "bias"))
    nodes.append(helper.make_node("Add", [last, "bias"], [OUTPUT]))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 10]) for n in (INPUT, OUTPUT)]
    graph = helper.make_graph(nodes, "linear", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@dataclass
class Stage:
    """A world whose engines are real, and their scores."""

    world: World
    folder: Path

    def engine(self, name: str, *, wrong: float = 0.0, layers: int = 1) -> Artifact:
        """Built by OpenVINO and logged."""
        candidate, built = (self.folder / uuid.uuid4().hex / kind for kind in ("candidate", "engine"))
        candidate.mkdir(parents=True)
        onnx.save(network(wrong, layers), candidate / ONNX)
        manifest = CandidateManifest(
            framework="onnx",
            architecture=None,
            input_shape=(10,),
            input_dtype="float32",
            output_shape=(10,),
            parameters=100,
        )
        (candidate / MANIFEST).write_text(manifest.model_dump_json())
        build_engine(candidate, self.world.spec.targets["server"], built)
        key = f"{name}-{uuid.uuid4().hex}"
        self.world.log(key, built)
        return ENGINES[key]

    def cell(self, recipe: str, artifact: Artifact, context: Context) -> tuple[StepOutput, StepOutput]:
        """Outputs of build and of validate, which passed against this run's own baseline."""
        subject = scores.engine(context, artifact, recipe)
        run_id = scores.scores(context, subject, metric_for("top1")).run_id
        output = validated(recipe, size=artifact.size_bytes)  # in a crowd the smaller one wins
        found = EngineEvidence.model_validate(output.details["evidence"])
        found = found.model_copy(update={"scores_run": run_id, "competing": 2, "confidence": 0.975})
        passed = output.model_copy(update={"details": {"evidence": found.model_dump(mode="json")}})
        built = StepOutput(step="build", cell=Cell(recipe=recipe, target="server"), identity="b", run_id="r")
        return built.model_copy(update={"artifact": artifact}), passed

    def context(self, run_key: str, **engines: Artifact) -> Context:
        context = self.world.context("select", (), run_key)
        outputs = [o for recipe, artifact in engines.items() for o in self.cell(recipe, artifact, context)]
        given = context.inputs.model_copy(update={"upstream": tuple(outputs)})
        return self.world.context("select", given.upstream, run_key)


@pytest.fixture
def stage(world_maker: WorldMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(racing, "PLAN", SHORT)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2000, 10)).astype(np.float32)
    np.savez(tmp_path / "held-out.npz", inputs=inputs, labels=inputs.argmax(axis=1).astype(np.int64))
    objective = {"confidence": 0.95, "max_drop": 1.0}
    return Stage(world_maker(data={"test": str(tmp_path / "held-out.npz")}, objective=objective), tmp_path)


def serve(stage: Stage, artifact: Artifact) -> str:
    version = stage.world.registry.register(artifact, "old@server", "run-of-old", ())
    stage.world.registry.set_alias(CHAMPION, version)
    return version


def test_an_engine_that_is_worse_than_the_champion_does_not_pass_although_its_baseline_is_as_bad(stage: Stage) -> None:
    """A weekly retrain that lost 3 points passed against itself, week after week."""
    version = serve(stage, stage.engine("old"))
    context = stage.context("week-2", int8=stage.engine("worse", wrong=0.17), small=stage.engine("same", layers=3))
    output = select.run(context)
    rows = {r["cell"]: r for r in output.details["rows"]}
    verdict = next(v for v in rows["int8@server"]["verdicts"] if v["gate"] == "champion")
    assert verdict["answer"] == "fail" and 2 < verdict["estimate"] < 5
    assert f"against champion version {version}: drop" in verdict["reason"] and "97.5 %" in verdict["reason"]
    assert rows["int8@server"]["status"] == "rejected"
    assert output.details["winner"] == "small@server"
    alone = stage.context("week-3", int8=stage.engine("worse", wrong=0.17))
    message = failing(lambda: select.run(alone), GateFailed)
    assert "int8@server: rejected: champion: against champion version" in message
    assert stage.world.recorded(alone).details["rows"], "the report shows the verdict"


def test_the_engines_meet_in_one_race_and_a_repeated_step_finds_it_again(stage: Stage) -> None:
    context = stage.context("first", int8=stage.engine("slow", layers=60), small=stage.engine("quick", layers=1))
    output = select.run(context)
    assert output.details["winner"] == "small@server"
    race = output.details["race"]
    assert set(race["rounds_ms"]) == {"int8@server", "small@server"}
    places = {r["cell"]: r["standing"]["relative"] for r in output.details["rows"] if r["standing"]}
    assert set(places) == {"int8@server", "small@server"}
    assert places["small@server"]["low"] <= 1, "the pick is the fastest, or as fast within the bounds"
    again = select.run(context)
    assert again.details["race"] == race and again.details["winner"] == "small@server"


def refuse(folder: Path) -> object:
    raise EngineError("built for another machine")


def test_a_champion_that_cannot_be_run_here_is_judged_by_its_recorded_answers_or_not_at_all(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, same = stage.engine("old"), stage.engine("same", layers=2)
    version = serve(stage, old)
    context = stage.context("upgraded", int8=same)

    def verdict() -> tuple[str, str]:
        rows = select.table(context.spec, context.inputs)
        judged = champion.compare(context, stage.world.registry, version, rows, load=refuse)  # type: ignore[arg-type]
        found = next(v for r in judged if r.cell == "int8@server" for v in r.verdicts if v.gate == "champion")
        return found.answer, found.reason

    answer, reason = verdict()
    assert answer == "inconclusive" and "cannot be compared with: built for another machine" in reason
    scores.scores(context, scores.engine(context, old, "old"), metric_for("top1"))
    monkeypatch.setattr(scores.hardware, "describe", lambda: {"cpu": "another"})
    assert verdict()[0] == "pass"


def test_the_champion_itself_needs_no_comparison(stage: Stage) -> None:
    same = stage.engine("old")
    version = serve(stage, same)
    output = select.run(stage.context("again", int8=same))
    assert output.details["already_champion"] and output.details["version"] == version
    assert not [v for r in output.details["rows"] for v in r["verdicts"] if v["gate"] == "champion"]


def test_other_test_samples_are_answered_anew(stage: Stage, world_maker: WorldMaker) -> None:
    old = stage.engine("old")
    context = stage.context("one", int8=old)

    def found(c: Context) -> str:
        return scores.scores(c, scores.engine(c, old, "old"), metric_for("top1")).run_id

    assert found(context) == found(context)
    smaller = stage.world.spec.model_copy(update={"data": world_maker().spec.data})
    other = World(stage.folder, smaller).context("select", (), "two")
    assert found(other) != found(context)
