"""The steps with Keras: prune → cluster → quantize, each of which keeps what came before, and the engines of them.

Runs in the environment tensorflow; the chain is walked once and looked at by several tests.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.conftest import ROOT
from tests.steps.killed import Attempts
from tests.steps.training import RUN_KEY, spec_of, step
from tests.techniques.contract import Case, Make, TechniqueContract

from slipstream.contract import Artifact, Cell, StepInput, StepOutput
from slipstream.data.splits import load
from slipstream.engines.base import load_engine
from slipstream.errors import SpecError
from slipstream.frameworks.base import ONNX, framework_for, read_manifest
from slipstream.frameworks.keras import _set_threads
from slipstream.plan import flow
from slipstream.runner.run import run_step
from slipstream.spec import Spec
from slipstream.spec import load as read_spec
from slipstream.store.tracking import fetch

pytestmark = pytest.mark.slow
_set_threads(1)
CHAIN = Cell(recipe="chain")


def document(model: str) -> dict[str, Any]:
    """The example's spec on 1,600 images: 11 training steps an epoch."""
    return {
        "name": "small",
        "model": {
            "registry": f"models:/{model}@source",
            "framework": "keras",
            "train": {"function": "tests.frameworks.keras_networks:train", "params": {"epochs": 2}},
        },
        "data": {"function": "examples.fashion_keras:data", "params": {"limit": 1600}},
        "objective": {"max_drop": 10.0},  # what 320 test images can prove
        "recipes": {"chain": ["prune", "cluster", "quantize"], "pruned": ["prune", "quantize"]},
        "prune": {"method": "magnitude", "sparsity": [0.3, 0.7], "end_step": 10, "frequency": 2, "epochs": 2},
        "cluster": {"clusters": 8, "learning_rate": 0.001},
        "quantize": {"samples": 64, "epochs": 1},
        "targets": {"edge": {"engine": "litert", "threads": 1}, "server": {"engine": "openvino", "threads": 1}},
    }


class TestCluster(TechniqueContract):
    checkpoint = "*.npz"

    @pytest.fixture
    def make(self) -> Make:
        def case(name: str) -> Case:
            written = document(f"cluster-{name}") | {"recipes": {"small": ["cluster"]}}
            written["cluster"] |= {"epochs": 2}
            spec = spec_of(written)
            changes = {"clusters": 16, "epochs": 3, "learning_rate": 0.002}
            measured = frozenset({"unique_weights", "sparsity", "parameters", "test_top1"})
            return Case("cluster", spec, "small", step("retrain", spec), measured, changes)

        return case

    def content(self, artifact: Artifact) -> object:
        """The weights: names in the files are numbered by what the process made before."""
        network: Any = framework_for("keras").load(fetch(artifact))
        return [weight.tobytes() for weight in network.get_weights()]


@pytest.fixture(scope="module")
def small_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        for name, path in (("HOME", folder), ("ENVS", ROOT / ".envs"), ("CODE", ROOT)):
            patch.setenv(f"SLIPSTREAM_{name}", str(path))
        yield folder


@pytest.fixture(scope="module")
def walked(mlflow_server: str, small_home: Path) -> dict[str, StepOutput]:
    """Outputs of the chain by step, and of the builds by cell."""
    spec, outputs = spec_of(document("keras-chain")), {}
    outputs["retrain"] = step("retrain", spec)
    for name in spec.techniques("chain"):
        outputs[name] = step(name, spec, *_upstream(spec, name, CHAIN, outputs), recipe="chain")
    for cell in (Cell(recipe="chain", target=target) for target in spec.targets):
        given = StepInput(run_key=RUN_KEY, pipeline_run_id="", cell=cell, upstream=[*outputs.values()])
        outputs[cell.key] = run_step("build", spec, given)
    return outputs


def _upstream(spec: Spec, name: str, cell: Cell, outputs: dict[str, StepOutput]) -> list[StepOutput]:
    """What the flow hands to a step, but for `check`."""
    return [outputs[t.step] for t in flow.sources(flow.Task(name, cell), spec) if t.step != "check"]


def test_each_technique_keeps_what_came_before(walked: dict[str, StepOutput]) -> None:
    pruned, clustered, quantized = (walked[name].metrics for name in ("prune", "cluster", "quantize"))
    assert pruned["sparsity"] == pytest.approx(0.7, abs=0.005)
    assert clustered["sparsity"] >= pruned["sparsity"] and clustered["unique_weights"] <= 8
    assert quantized["sparsity"] >= clustered["sparsity"] and quantized["unique_weights_per_channel"] <= 8
    assert pruned["nonzero_parameters"] < 0.32 * pruned["parameters"]
    assert min(metrics["test_top1"] for metrics in (pruned, clustered, quantized)) > 50


def test_a_quantized_candidate_has_what_each_engine_is_built_from(walked: dict[str, StepOutput]) -> None:
    artifact = walked["quantize"].artifact
    assert artifact is not None
    candidate = fetch(artifact)
    manifest = read_manifest(candidate)
    assert manifest.quantized and manifest.sparsity >= 0.695 and manifest.unique_weights > 0
    with np.load(candidate / "calibration.npz") as arrays:
        assert arrays["inputs"].shape == (64, 28, 28, 1)
    kinds = {n.op_type for n in onnx.load(candidate / ONNX).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds
    assert (candidate / "saved_model" / "saved_model.pb").is_file()


@pytest.mark.parametrize("target", ["edge", "server"])
def test_the_engines_answer_as_the_network_before_quantization(walked: dict[str, StepOutput], target: str) -> None:
    clustered, built = walked["cluster"].artifact, walked[f"chain@{target}"].artifact
    assert clustered is not None and built is not None
    test = load(spec_of(document("keras-chain"))).test
    framework = framework_for("keras")
    expected = framework.logits(framework.load(fetch(clustered)), test.inputs)
    answers = load_engine(fetch(built)).run(test.inputs)
    assert (answers.argmax(1) == expected.argmax(1)).mean() > 0.85  # one epoch of training lies between
    assert walked[f"chain@{target}"].metrics["size_bytes"] < 200_000


def test_a_pruned_network_stays_pruned_when_it_is_trained_for_int8(walked: dict[str, StepOutput]) -> None:
    spec = spec_of(document("keras-chain"))
    pruned = step("prune", spec, walked["retrain"], recipe="pruned")
    quantized = step("quantize", spec, walked["retrain"], pruned, recipe="pruned")
    assert quantized.metrics["sparsity"] >= pruned.metrics["sparsity"] > 0.69
    assert quantized.artifact is not None
    assert [value.name for value in onnx.load(fetch(quantized.artifact) / ONNX).graph.input] == ["input"]


def test_training_for_int8_that_is_killed_ends_as_if_it_had_not_been(
    walked: dict[str, StepOutput], small_home: Path, tmp_path: Path
) -> None:
    upstream = [walked[name] for name in ("retrain", "prune", "cluster")]
    ended: list[StepOutput] = []
    for name in ("killed", "whole", "again"):
        written = document(f"keras-{name}") | {"quantize": {"samples": 64, "epochs": 3}}
        attempts = Attempts("quantize", written, tmp_path / name, upstream, recipe="chain")
        if name == "killed":
            attempts.kill_at(small_home, "*.npz")
        output, said = attempts.finish()
        assert ("resuming " in said) == (name == "killed"), said
        ended.append(output)
    killed, whole, again = (output.artifact for output in ended)
    assert killed is not None and whole is not None and again is not None
    assert whole.sha256 == again.sha256
    # TensorFlow numbers what it traces, and the resumed process traced less before: names in the graph differ.
    weights = [fetch(made) / "saved_model" / "variables" / "variables.data-00000-of-00001" for made in (killed, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert ended[0].metrics == ended[1].metrics


def test_the_example_is_a_whole_spec() -> None:
    spec = read_spec(ROOT / "examples/fashion-keras.yaml")
    assert spec.environment_of("prune", None) == spec.environment_of("build", "edge") == "tensorflow"
    assert spec.prune.sparsity == (0.3, 0.7) and spec.prune.end_step == 1000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prune": {"method": "channels"}}, "prune.method: channels cannot be done .* has magnitude, 2:4"),
        ({"prune": {"method": "magnitude", "end_step": 15, "frequency": 10}}, "frequency must divide the 15 steps"),
        ({"quantize": {"epochs": 1, "scheme": "int8-dynamic"}}, "quantization-aware training is for scheme int8"),
        ({"training": {"workers": 2}}, "training.workers: models of framework keras"),
    ],
)
def test_what_keras_cannot_do_is_refused_in_the_spec(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        spec_of({**document("refused"), **changes})


def test_what_pytorch_cannot_do_is_refused_in_the_spec() -> None:
    written = {**document("refused"), "model": {"registry": "models:/a@b", "architecture": "a:b"}}
    written |= {"targets": {"server": {"engine": "openvino"}}, "recipes": {"int8": ["quantize"]}}
    with pytest.raises(SpecError, match=r"quantize\.epochs: models of framework torch are not trained for INT8"):
        spec_of(written)
