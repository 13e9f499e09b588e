"""What the tests of the training steps share: a spec on a few Fashion-MNIST images, and running its steps."""

from typing import Any

import yaml

from slipstream.contract import Cell, StepInput, StepOutput
from slipstream.runner.run import run_step
from slipstream.spec import Spec, parse

RUN_KEY = "test-run"


def document(model: str, limit: int = 200, epochs: int = 1) -> dict[str, Any]:
    """A spec for the registered model `model`, trained on `limit` images."""
    return {
        "name": "small",
        "model": {
            "registry": f"models:/{model}@source",
            "architecture": "examples.fashion:resnet",
            "train": {"function": "examples.fashion:train", "params": {"epochs": epochs}},
        },
        "data": {"function": "examples.fashion:data", "params": {"limit": limit}},
        "objective": {"max_drop": 20.0},  # what 12 test images can prove
        "recipes": {"small": ["distill", "prune"]},
        "distill": {"student": "examples.fashion:student", "epochs": 1},
        "prune": {"sparsity": [0.3, 0.5], "rounds": 2, "epochs": 1},
        "targets": {"portable": {"engine": "onnxruntime"}},
    }


def spec_of(written: dict[str, Any]) -> Spec:
    """The spec that a document says."""
    return parse(yaml.safe_dump(written), "test")


def step(name: str, spec: Spec, *upstream: StepOutput, recipe: str | None = None, **params: Any) -> StepOutput:
    """Run a step with these upstream outputs."""
    cell = Cell(recipe=recipe) if recipe else None
    given = StepInput(run_key=RUN_KEY, pipeline_run_id="", cell=cell, upstream=upstream, params=params)
    return run_step(name, spec, given)
