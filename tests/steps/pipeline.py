"""A pipeline run on small data, for tests of single steps: its spec, and the outputs that a step builds on."""

from pathlib import Path

import numpy as np
from tests.engines.images import CLASSES, SHAPE, samples

from slipstream.contract import Cell, StepInput, StepOutput
from slipstream.frameworks.base import read_manifest
from slipstream.spec import Spec
from slipstream.store.signature import signature
from slipstream.store.tracking import Tracking

RUN_KEY = "manual-1"


def small_spec(folder: Path, name: str, *, train: np.ndarray | None = None, **changes: object) -> Spec:
    """A spec whose splits are files in `folder`: 96 training and 64 test images."""
    folder.mkdir(parents=True, exist_ok=True)
    test = samples(64, seed=11)
    splits = {"train": samples(96, seed=12) if train is None else train, "test": test}
    for split, inputs in splits.items():
        np.savez(folder / f"{split}.npz", inputs=inputs, labels=np.arange(len(inputs)) % CLASSES)
    document = {
        "name": name,
        "model": {"registry": f"models:/{name}@source", "architecture": "examples.fashion:resnet"},
        "data": {split: str(folder / f"{split}.npz") for split in splits},
        "recipes": {"int8": ["quantize"], "pruned-int8": ["prune", "quantize"]},
        "objective": {"max_drop": 20.0},  # what 64 test images can prove
        "quantize": {"samples": 32},
        "targets": {
            "server": {"engine": "openvino", "threads": 1},
            "portable": {"engine": "onnxruntime", "threads": 1},
            "far": {"engine": "openvino", "device": "GPU"},
        },
    }
    return Spec.model_validate({**document, **changes})


def logged(spec: Spec, candidate: Path, step: str = "retrain", cell: Cell | None = None) -> StepOutput:
    """The output of an earlier step that handed on `candidate`."""
    tracking = Tracking(spec)
    run = tracking.start(RUN_KEY, step, cell, f"made-by-test-{candidate}")
    manifest = read_manifest(candidate)
    shapes = signature(manifest.input_shape or SHAPE, manifest.input_dtype, manifest.output_shape)
    artifact = run.log_model(candidate, f"{spec.name}-{step}", shapes)
    output = StepOutput(step=step, cell=cell, identity=run.run_id, run_id=run.run_id, artifact=artifact)
    return tracking.finish(run, output, cache=False)


def inputs(spec: Spec, cell: Cell, *upstream: StepOutput) -> StepInput:
    """The IN document of a step."""
    return StepInput(
        run_key=RUN_KEY, pipeline_run_id=Tracking(spec).pipeline_run(RUN_KEY), cell=cell, upstream=upstream
    )
