"""What a candidate's manifest may have called: nothing but the functions that the spec names."""

from pathlib import Path

import pytest
from tests.steps.pipeline import inputs, logged, small_spec

from slipstream.contract import Cell
from slipstream.errors import ModelError, SpecError
from slipstream.frameworks.base import MANIFEST, CandidateManifest, framework_for, require_own_architecture
from slipstream.runner.run import run_step
from slipstream.spec import Call, Spec

STUDENT = Call(function="examples.fashion:student", params={"width": 8})


def candidate(folder: Path, architecture: Call | None) -> Path:
    """A candidate folder of which only the manifest is there."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = CandidateManifest(
        framework="torch",
        architecture=architecture,
        input_shape=(1, 28, 28),
        input_dtype="float32",
        output_shape=(10,),
        parameters=1,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return small_spec(
        tmp_path / "data",
        "manifests",
        recipes={"small": ["distill", "prune"], "student": ["distill"]},
        distill={"student": STUDENT.model_dump()},
        model={
            "registry": "models:/manifests@source",
            "architecture": "examples.fashion:resnet",
            "train": "examples.fashion:train",
        },
    )


@pytest.mark.parametrize(("step", "recipe"), [("distill", "small"), ("prune", "small"), ("build", "student")])
def test_a_step_calls_no_function_that_the_spec_does_not_name(
    mlflow_server: str, home: Path, tmp_path: Path, spec: Spec, step: str, recipe: str
) -> None:
    """Even one that the platform itself signed."""
    planted = Call(function="os:system", params={"command": f"touch {tmp_path / 'PWNED'}"})
    before = ("retrain", None) if step == "distill" else ("distill", Cell(recipe=recipe))
    source = logged(spec, candidate(tmp_path / "candidate", planted), *before)
    cell = Cell(recipe=recipe, target="server" if step == "build" else None)
    with pytest.raises(ModelError, match=r"architecture os:system with .* is not the spec's model.architecture"):
        run_step(step, spec, inputs(spec, cell, source))
    assert not (tmp_path / "PWNED").exists()


def test_only_the_specs_own_architectures_pass(tmp_path: Path, spec: Spec) -> None:
    for fine in (spec.model.architecture, STUDENT, None):
        require_own_architecture(candidate(tmp_path, fine), spec)
    other = STUDENT.model_copy(update={"params": {"width": 64}})
    for bad in (other, Call(function="examples.fashion:train")):
        with pytest.raises(ModelError, match=f"architecture {bad.function} with"):
            require_own_architecture(candidate(tmp_path, bad), spec)


def test_without_a_spec_a_manifest_reaches_only_the_users_code(home: Path, tmp_path: Path) -> None:
    """The model server and MLflow's pyfunc load a candidate with no spec at hand."""
    planted = Call(function="os:system", params={"command": f"touch {tmp_path / 'PWNED'}"})
    with pytest.raises(SpecError, match=r"^os:system: cannot import os from"):
        framework_for("torch").load(candidate(tmp_path / "candidate", planted))
    assert not (tmp_path / "PWNED").exists()
