"""distill: a smaller student with the teacher as its parent; the teacher answers once."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tests.steps.training import RUN_KEY, document, spec_of, step
from tests.techniques.contract import Case, Make, TechniqueContract
from tests.user_code import use

from slipstream.contract import Cell, StepInput, StepOutput
from slipstream.errors import ModelError
from slipstream.frameworks.base import read_manifest
from slipstream.frameworks.torch_losses import distillation_loss
from slipstream.store.tracking import fetch

torch.set_num_threads(1)


class TestDistill(TechniqueContract):
    checkpoint = "*.pt"

    @pytest.fixture
    def make(self) -> Make:
        def case(name: str) -> Case:
            written = document(f"distill-{name}")
            written["distill"] |= {"epochs": 2}
            spec = spec_of(written)
            changes = {
                "student": "examples.fashion:resnet",
                "temperature": 2.0,
                "soft_weight": 0.5,
                "epochs": 3,
                "learning_rate": 0.05,
                "optimizer": {"optimizer": "adamw", "learning_rate": 0.0005},
            }
            measured = frozenset({"test_top1", "teacher_top1", "parameters"})
            return Case("distill", spec, "small", step("retrain", spec), measured, changes)

        return case


FILES = ("spec.yaml", "in.json", "out.json")


def test_student_is_smaller_linked_and_made_with_cached_teacher_answers(
    mlflow_server: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = document("teacher")
    baseline = step("retrain", spec_of(written))
    output = step("distill", spec_of(written), baseline, recipe="small")
    assert output.artifact is not None and baseline.artifact is not None
    folder = fetch(output.artifact)
    manifest = read_manifest(folder)
    assert manifest.architecture is not None and manifest.architecture.function == "examples.fashion:student"
    assert manifest.parameters == output.metrics["parameters"] < baseline.metrics["parameters"]
    assert output.metrics["teacher_top1"] == baseline.metrics["test_top1"]

    (cached,) = (home / "cache" / "soft-answers").glob("*.npy")
    assert baseline.artifact.sha256 in cached.name
    assert np.load(cached).shape == (200, 10)
    written["distill"]["temperature"] = 2
    with caplog.at_level(logging.INFO):
        other = step("distill", spec_of(written), baseline, recipe="small")
    assert "found in the cache" in caplog.text
    assert other.artifact is not None and other.artifact.sha256 != output.artifact.sha256


def test_a_result_that_is_there_is_found_without_loading_pytorch(
    mlflow_server: str, home: Path, tmp_path: Path
) -> None:
    spec = document("quick")
    baseline = step("retrain", spec_of(spec))
    step("distill", spec_of(spec), baseline, recipe="small")
    assert list((home / "work").iterdir()) == []  # the checkpoints of steps that are done
    given = StepInput(run_key=RUN_KEY, cell=Cell(recipe="small"), upstream=(baseline,))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "in.json").write_text(given.model_dump_json())
    arguments = ["slipstream", "step", "distill"]
    arguments += [f"--{o}={tmp_path / n}" for o, n in zip(("spec", "inputs", "outputs"), FILES, strict=True)]
    code = (
        f"import sys\nsys.argv = {arguments}\nfrom slipstream.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert StepOutput.model_validate_json((tmp_path / "out.json").read_text()).reused


def test_student_for_other_classes_is_refused(
    mlflow_server: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = document("classes")
    baseline = step("retrain", spec_of(written))
    (tmp_path / "narrow_student.py").write_text(
        "def student():\n    from torch import nn\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))\n"
    )
    use(tmp_path, monkeypatch)
    written["distill"]["student"] = "narrow_student:student"
    with pytest.raises(ModelError, match="both must answer alike"):
        step("distill", spec_of(written), baseline, recipe="small")


def test_loss_is_that_of_hinton_et_al() -> None:
    """Against the definition, computed in float64 with NumPy."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (2, 7, 4))
    labels = rng.integers(0, 4, 7)
    found = distillation_loss(4.0, 0.7)(torch.tensor(student), torch.tensor(labels), torch.tensor(teacher))

    def softmax(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values)
        return np.asarray(powers / powers.sum(1, keepdims=True))

    p, q = softmax(teacher / 4), softmax(student / 4)
    soft = 16 * (p * np.log(p / q)).sum(1).mean()
    hard = -np.log(softmax(student)[np.arange(7), labels]).mean()
    assert float(found) == pytest.approx(0.7 * soft + 0.3 * hard, rel=1e-9)


def test_loss_of_a_student_that_agrees_is_only_the_hard_part() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    hard = torch.nn.functional.cross_entropy(logits, labels)
    assert float(distillation_loss(3.0, 0.9)(logits, labels, logits)) == pytest.approx(0.1 * float(hard), rel=1e-5)
