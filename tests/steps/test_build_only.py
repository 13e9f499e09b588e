"""A target whose GPU is elsewhere, through the steps: built, its layers shown, and never passed for want of a GPU."""

import json
import sys
import zlib
from pathlib import Path

import mlflow
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT for RTX: the extra tensorrt-rtx")

from tests.engines.ahead import has_gpu, text
from tests.engines.candidates import network, quantized, write
from tests.steps.pipeline import RUN_KEY, inputs, logged, small_spec

from slipstream.contract import Cell, StepInput, StepOutput
from slipstream.contract.evidence import row_of
from slipstream.engines.inquiry import find, inquire
from slipstream.errors import EngineError, GateFailed
from slipstream.home import Home
from slipstream.reports import layers
from slipstream.runner.run import run_step
from slipstream.spec import Spec, Target
from slipstream.steps.rehearsal import rehearse
from slipstream.store import engine_cache
from slipstream.store.tracking import Tracking, fetch

pytestmark = pytest.mark.skipif(has_gpu(), reason="this machine has an NVIDIA GPU")

AHEAD = {"engine": "tensorrt", "device": "GPU", "threads": 1, "options": {"compute_capability": "8.6, 12.0"}}


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("candidates")
    return {
        "baseline": write(folder / "fp32" / "candidate", network()),
        "int8": write(folder / "int8" / "candidate", quantized(network()), is_quantized=True),
    }


@pytest.fixture
def spec(mlflow_server: str, home: Path, tmp_path: Path) -> Spec:
    name = f"ahead-{zlib.crc32(str(tmp_path).encode()):x}"
    return small_spec(tmp_path / "data", name, targets={"far": AHEAD}, recipes={"int8": ["quantize"]})


def built(spec: Spec, candidates: dict[str, Path]) -> dict[str, StepOutput]:
    """Outputs of retrain, and of build for both recipes."""
    found = {"retrain": logged(spec, candidates["baseline"])}
    upstream = [found["retrain"], logged(spec, candidates["int8"], "quantize", Cell(recipe="int8"))]
    for recipe in ("baseline", "int8"):
        given = inputs(spec, Cell(recipe=recipe, target="far"), *upstream)
        found[recipe] = run_step("build", spec, given)
    return found


def test_it_is_built_but_neither_measured_nor_passed(spec: Spec, candidates: dict[str, Path]) -> None:
    outputs = built(spec, candidates)
    assert "no NVIDIA GPU" in outputs["int8"].details["not_loadable"]
    assert "agreement" not in outputs["int8"].metrics
    assert outputs["int8"].metrics["layers_int8"] >= 3
    assert (fetch(outputs["int8"].artifact) / "model.plan").exists()  # type: ignore[arg-type]  # it is made above

    judged = []
    for recipe in ("baseline", "int8"):
        cell = Cell(recipe=recipe, target="far")
        output = run_step("validate", spec, inputs(spec, cell, *outputs.values()))
        (verdict,) = output.verdicts
        assert (verdict.gate, verdict.answer) == ("present", "inconclusive")
        assert "no NVIDIA GPU" in verdict.reason
        judged.append(output)
    again = run_step("validate", spec, inputs(spec, Cell(recipe="int8", target="far"), *outputs.values()))
    assert not again.reused, "where there is a GPU the next time, it must be measured"

    rows = [row_of(output.cell.key, output) for output in judged if output.cell is not None]
    assert [(row.status, row.evidence) for row in rows] == [("reference", None), ("inconclusive", None)]
    given = StepInput(run_key=RUN_KEY, upstream=(*outputs.values(), *judged))
    with pytest.raises(GateFailed, match=r"int8@far: inconclusive: present: not measured: .*no NVIDIA GPU"):
        run_step("select", spec, given)


def test_its_layers_are_a_table_in_mlflow_and_in_the_report(spec: Spec, candidates: dict[str, Path]) -> None:
    outputs = built(spec, candidates)
    run = mlflow.MlflowClient().get_run(outputs["int8"].run_id)
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "layers.json", "type": "table"}]
    table = mlflow.artifacts.load_dict(f"runs:/{outputs['int8'].run_id}/layers.json")
    assert len(table["data"]) == outputs["int8"].details["layers"]

    tables = layers.collect(outputs.values())
    assert [t.cell for t in tables] == ["baseline@far", "int8@far"]
    shown = layers.section(tables)
    assert "conv1, relu1" in shown and "INT8" in shown and "int8@far" in shown
    assert layers.section(()) == ""


def test_the_engine_is_asked_in_its_own_environment(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target.model_validate(AHEAD)
    finding = find(target)
    assert finding.problem is None and "no NVIDIA GPU" in (finding.not_loadable or "")
    environments = tmp_path / "envs"
    monkeypatch.setenv("SLIPSTREAM_ENVS", str(environments))
    assert inquire(Home.from_environment(), target) == finding, "in an image there is nowhere else to ask"
    environments.mkdir()
    assert "`scripts/setup tensorrt` makes it" in (inquire(Home.from_environment(), target).problem or "")
    (environments / "tensorrt").symlink_to(sys.prefix)
    there = Home.from_environment()
    assert inquire(there, target) == finding
    wrong = target.model_copy(update={"device": "CPU"})
    assert "never on the CPU" in (inquire(there, wrong).problem or "")


def test_a_build_is_rehearsed_in_the_engines_own_environment(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = tmp_path / "envs"
    environments.mkdir()
    (environments / "tensorrt").symlink_to(sys.prefix)
    monkeypatch.setenv("SLIPSTREAM_ENVS", str(environments))
    there, target = Home.from_environment(), Target.model_validate(AHEAD)
    given = {"far": target.model_copy(update={"lengths": (8, 16)}), "vague": target}
    problems = [str(problem) for problem in rehearse(there, "net", text, given, tmp_path)]
    assert len(problems) == 1
    assert problems[0].startswith("targets.vague: net cannot be built: tensorrt: axis 1 of the input varies, but")


def test_check_says_at_the_start_that_nothing_can_be_released_from_such_a_target(
    mlflow_server: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.steps.training import document, spec_of, step

    written = document("far-away")
    written["targets"]["far"] = AHEAD
    with pytest.raises(EngineError, match=r"targets\.far: .*`scripts/setup tensorrt` makes it"):
        monkeypatch.setenv("SLIPSTREAM_ENVS", str(tmp_path))
        step("check", spec_of(written))
    (tmp_path / "tensorrt").symlink_to(sys.prefix)
    output = step("check", spec_of(written))
    assert set(output.details["build_only"]) == {"far"}
    assert "no NVIDIA GPU" in output.details["build_only"]["far"]


def test_a_profiler_that_is_not_installed_is_missed_before_anything_is_trained(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    target = Target.model_validate({**AHEAD, "options": {"compute_capability": 8.6, "profile": "nsys"}})
    assert "'nsys' is not installed" in (find(target).problem or "")


def test_a_cache_is_brought_from_the_run_that_left_it(spec: Spec, home: Path, tmp_path: Path) -> None:
    tracking, mine, theirs = Tracking(spec), home / "cache" / "tensorrt" / "abc.timing-cache", tmp_path / "there"
    theirs = theirs / mine.name
    first = tracking.start(RUN_KEY, "build", Cell(recipe="a", target="far"), "first")
    with engine_cache.shared(tracking, first, theirs):
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_bytes(b"timed on the first machine")
    second = tracking.start(RUN_KEY, "build", Cell(recipe="b", target="far"), "second")
    with engine_cache.shared(tracking, second, mine):
        assert mine.read_bytes() == b"timed on the first machine"
    assert engine_cache.TAG not in tracking.client.get_run(second.run_id).data.tags, "it has not grown"
    with engine_cache.shared(tracking, second, mine):
        mine.write_bytes(b"timed on both")
    mine.unlink()
    engine_cache.restore(tracking, mine)
    assert mine.read_bytes() == b"timed on both"


def test_a_build_that_fails_shares_nothing(spec: Spec, home: Path) -> None:
    tracking, path = Tracking(spec), home / "cache" / "tensorrt" / "xyz.timing-cache"
    run = tracking.start(RUN_KEY, "build", Cell(recipe="a", target="far"), "fails")
    with pytest.raises(EngineError), engine_cache.shared(tracking, run, path):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
        raise EngineError("out of memory")
    assert engine_cache.TAG not in tracking.client.get_run(run.run_id).data.tags
