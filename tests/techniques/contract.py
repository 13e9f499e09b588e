"""What every technique must do. A test module subclasses `TechniqueContract` and gives a fixture `make`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from tests.steps.killed import Attempts
from tests.steps.pipeline import inputs

from slipstream.contract import Artifact, Cell, StepInput, StepOutput
from slipstream.data import splits
from slipstream.frameworks.base import ONNX, read_manifest
from slipstream.onnx import graph
from slipstream.onnx.session import Session
from slipstream.runner.context import module_for
from slipstream.runner.run import identity, run_step
from slipstream.spec import Spec
from slipstream.store.tracking import fetch


@dataclass(frozen=True)
class Case:
    """A technique at work: a spec with a recipe that names it, and the output of the step before it."""

    technique: str
    spec: Spec
    recipe: str
    source: StepOutput
    metrics: frozenset[str]
    """Figures that it must measure."""
    changes: Mapping[str, Any]
    """Another value for each key of its section; other keys that must change with it are in the same mapping."""
    fixed: frozenset[str] = frozenset()
    """Keys of its section that have one value only for a model of this framework."""

    @property
    def given(self) -> StepInput:
        """The IN document."""
        return inputs(self.spec, Cell(recipe=self.recipe), self.source)

    def run(self) -> StepOutput:
        """The technique's output."""
        output = run_step(self.technique, self.spec, self.given)
        assert output is not None
        return output

    def identity_with(self, *, in_recipe: bool = False, **changes: Any) -> str:
        """The step's identity when keys of its section, or the recipe's own settings, have other values."""
        document = self.spec.model_dump(mode="json")
        if changes and in_recipe:
            uses = document["recipes"][self.recipe]
            document["recipes"][self.recipe] = [{t: changes} if t == self.technique else t for t in uses]
        elif changes:
            document[self.technique] = {**(document[self.technique] or {}), **changes}
        spec = Spec.model_validate(document)
        return identity(self.technique, module_for(self.technique).settings(spec, self.given), self.given)


Make = Callable[[str], Case]


def artifact_of(output: StepOutput) -> Artifact:
    assert output.artifact is not None
    return output.artifact


class TechniqueContract:
    """Subclasses have a fixture `make`, which makes a case for a registered model of the name that it is given."""

    def test_it_makes_a_candidate_that_answers_and_measures_it(
        self, make: Make, mlflow_server: str, home: Path
    ) -> None:
        case = make("made")
        output, source = case.run(), artifact_of(case.source)
        folder, before = fetch(artifact_of(output)), read_manifest(fetch(source))
        after = read_manifest(folder)
        assert artifact_of(output).sha256 != source.sha256
        for fact in ("framework", "input_shape", "input_dtype", "output_shape"):
            assert getattr(after, fact) == getattr(before, fact), fact
        test = splits.load(case.spec).test.take(np.arange(8))
        answers = Session(graph.read(folder / ONNX)).answers(test.inputs)
        assert answers.shape == (8, *after.output_shape) and np.isfinite(answers).all()
        assert case.metrics <= set(output.metrics) and np.isfinite(list(output.metrics.values())).all()
        model = MlflowClient().get_logged_model(artifact_of(output).model_id)
        assert model.tags["slipstream.parent"] == source.model_id

    def test_the_same_work_is_done_once(self, make: Make, mlflow_server: str, home: Path) -> None:
        first = make("once").run()
        again = make("once").run()
        assert again.reused and again.artifact == first.artifact and again.metrics == first.metrics

    def test_every_setting_decides_the_identity(self, make: Make, mlflow_server: str, home: Path) -> None:
        case = make("settings")
        section = getattr(case.spec, case.technique, None)
        keys = set(type(section).model_fields) if section is not None else set()
        assert set(case.changes) | case.fixed == keys, "the case must name every key of the section"
        identities = {case.identity_with()}
        for key, value in case.changes.items():
            changes = value if isinstance(value, dict) else {key: value}
            identities.add(case.identity_with(**changes))
            assert case.identity_with(in_recipe=True, **changes) in identities, "wherever the setting is written"
        assert len(identities) == 1 + len(case.changes)

    @pytest.mark.slow
    def test_killed_it_ends_as_if_it_had_not_been(
        self, make: Make, mlflow_server: str, home: Path, tmp_path: Path
    ) -> None:
        outputs = []
        for name in ("killed", "whole"):
            case = make(name)
            written = case.spec.model_dump(mode="json")
            attempts = Attempts(case.technique, written, tmp_path / name, [case.source], recipe=case.recipe)
            if name == "killed":
                attempts.kill_at(home, self.checkpoint)
            outputs.append(attempts.finish()[0])
        killed, whole = outputs
        assert not killed.reused and not whole.reused
        assert killed.metrics == whole.metrics
        assert self.content(artifact_of(killed)) == self.content(artifact_of(whole))

    checkpoint = "*"
    """Pattern of the file in the step's work folder after whose writing it is killed."""

    def content(self, artifact: Artifact) -> object:
        """What of a candidate must be the same when the work is done again."""
        return artifact.sha256
