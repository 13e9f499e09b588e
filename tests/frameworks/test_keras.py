"""Keras: the contract, and what is special about it: files, constraints, probabilities."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import onnx
import openvino as ov
import pytest
from tests.frameworks.contract import FrameworkContract, Recorder, Stopped, Stopping, channels_last, squares

from slipstream.data.splits import Data, Split
from slipstream.errors import ModelError, SpecError
from slipstream.frameworks import keras_compression, keras_files
from slipstream.frameworks.base import ONNX, CandidateManifest, Job, Schedule, SoftTargets, read_manifest
from slipstream.frameworks.keras import FRAMEWORK, _set_threads
from slipstream.frameworks.keras_losses import cross_entropy, distillation_loss, ends_in_softmax, regression_loss
from slipstream.frameworks.keras_runtime import keras, tf
from slipstream.frameworks.keras_training import OneCycle, Training
from slipstream.spec import Call, Cluster, Prune, Quantize

_set_threads(1)
pytestmark = pytest.mark.usefixtures("home")
SCHEDULE = Schedule(2, 0.02, batch_size=64)  # 5 steps an epoch
MAGNITUDE = Prune(method="magnitude", sparsity=(0.3, 0.7), end_step=10, frequency=2, epochs=2)
CLUSTER = Cluster(clusters=8)


def call(name: str, **params: Any) -> Call:
    return Call(function=f"tests.frameworks.keras_networks:{name}", params=params)


class TestKeras(FrameworkContract):
    framework = FRAMEWORK
    call = call("squares")
    weights = keras_files.KERAS
    channels_last = True


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    data = Data(channels_last(squares(400, 1)), channels_last(squares(100, 2)))
    return Job(data, seed=5, folder=tmp_path_factory.mktemp("job"), progress=Recorder())


@pytest.fixture(scope="module")
def code() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPSTREAM_CODE", str(Path(__file__).parents[2]))
        yield


@pytest.fixture(scope="module")
def trained(job: Job, code: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained candidate, which no test changes."""
    folder = tmp_path_factory.mktemp("trained") / "candidate"
    network = FRAMEWORK.build(call("squares"), job.seed)
    FRAMEWORK.fit(network, job, Schedule(2, 0.05, batch_size=32), "trained")
    FRAMEWORK.save(network, call("squares"), job.data.test, folder)
    return folder


def top1(network: Any, job: Job) -> float:
    answers = FRAMEWORK.logits(network, job.data.test.inputs)
    return float((answers.argmax(1) == job.data.test.labels).mean())


def constrained(candidate: Path, section: Any, job: Job, folder: Path) -> dict[str, float]:
    """Train a candidate under a constraint and write it to `folder`; its figures and top-1."""
    made = FRAMEWORK.constrain(candidate, section, job, SCHEDULE)
    FRAMEWORK.fit(made.network, job, SCHEDULE, folder.name)
    figures = made.finish()
    made.save(folder, job.data.test)
    return figures | {"top1": top1(made.network, job)}


@pytest.fixture(scope="module")
def pruned(trained: Path, job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("pruned") / "pruned"
    return folder, constrained(trained, MAGNITUDE, job, folder)


@pytest.fixture(scope="module")
def clustered(pruned: tuple[Path, Any], job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("clustered") / "clustered"
    return folder, constrained(pruned[0], CLUSTER, job, folder)


def test_magnitude_pruning_reaches_the_last_share_in_every_layer(pruned: tuple[Path, dict[str, float]]) -> None:
    folder, figures = pruned
    assert figures["sparsity"] == pytest.approx(0.7, abs=0.005)
    assert figures["nonzero_parameters"] == pytest.approx(figures["parameters"] - 0.7 * (72 + 1152 + 256), abs=5)
    assert figures["top1"] > 0.8
    manifest = read_manifest(folder)
    assert manifest.sparsity == figures["sparsity"] and manifest.unique_weights == 0
    for name, kernel in keras_files.kernels(FRAMEWORK.load(folder)):
        assert (kernel == 0).mean() == pytest.approx(0.7, abs=0.01), name


def test_the_zeros_are_in_every_form_of_the_candidate(pruned: tuple[Path, Any], job: Job) -> None:
    weights = [onnx.numpy_helper.to_array(w) for w in onnx.load(pruned[0] / ONNX).graph.initializer]
    assert [(w == 0).mean() > 0.69 for w in weights if w.size > 64] == [True] * 3
    inputs = job.data.test.inputs[:5]
    expected = FRAMEWORK.logits(FRAMEWORK.load(pruned[0]), inputs)
    served = tf.saved_model.load(str(pruned[0] / "saved_model")).signatures["serving_default"]
    np.testing.assert_allclose(served(input=tf.constant(inputs))["output"], expected, atol=1e-5)
    compiled = ov.compile_model(ov.convert_model(pruned[0] / "saved_model"), "CPU")
    np.testing.assert_allclose(compiled(inputs)["output"], expected, atol=0.05)  # BF16 where the CPU has it


def test_pruning_in_a_pattern_takes_the_layers_whose_inputs_come_in_fours(
    trained: Path, job: Job, tmp_path: Path
) -> None:
    figures = constrained(trained, Prune(method="2:4"), job, tmp_path / "pattern")
    kernels = dict(keras_files.kernels(FRAMEWORK.load(tmp_path / "pattern")))
    first, second, dense = kernels.values()
    assert (first == 0).sum() == 0  # one input channel
    for kernel in (second, dense):
        blocks = np.moveaxis(kernel, -2, -1).reshape(-1, 4)
        assert ((blocks == 0).sum(1) == 2).all()
    assert figures["sparsity"] == pytest.approx(0.5 * (1152 + 256) / (72 + 1152 + 256))


def test_sparsity_that_was_missed_is_an_error(trained: Path, job: Job) -> None:
    made = FRAMEWORK.constrain(trained, MAGNITUDE, job, SCHEDULE)
    with pytest.raises(ModelError, match=r"0\.0% zeros after stripping, not the 70\.0%"):
        made.finish()  # never trained, so nothing was pruned
    pattern = FRAMEWORK.constrain(trained, Prune(method="2:4"), job, SCHEDULE)
    with pytest.raises(ModelError, match="blocks of 4 weights in layer conv2d_"):
        pattern.finish()


def test_a_schedule_that_does_not_end_in_time_is_refused_before_training(trained: Path, job: Job) -> None:
    with pytest.raises(SpecError, match=r"prune\.end_step is 12, but 2 epochs of 5 steps .* train for 3 epochs"):
        FRAMEWORK.constrain(trained, MAGNITUDE.model_copy(update={"end_step": 12}), job, SCHEDULE)


def test_clustering_keeps_zeros_and_leaves_few_values(pruned: tuple[Path, Any], clustered: tuple[Path, Any]) -> None:
    folder, figures = clustered
    assert figures["unique_weights"] <= 8
    assert figures["sparsity"] >= pruned[1]["sparsity"]
    assert figures["top1"] > 0.8
    before, after = (dict(keras_files.kernels(FRAMEWORK.load(f))) for f in (pruned[0], folder))
    for name, kernel in before.items():
        assert (after[name][kernel == 0] == 0).all(), name
    assert read_manifest(folder).unique_weights == figures["unique_weights"]


def test_quantization_aware_training_keeps_zeros_and_clusters(
    clustered: tuple[Path, Any], job: Job, tmp_path: Path
) -> None:
    figures = constrained(clustered[0], Quantize(epochs=1, learning_rate=0.0005), job, tmp_path / "chain")
    assert figures["unique_weights_per_channel"] <= 8
    assert figures["sparsity"] >= clustered[1]["sparsity"]
    assert figures["top1"] > 0.8
    model = onnx.load(tmp_path / "chain" / ONNX)
    assert {n.op_type for n in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"} == set()
    onnx.checker.check_model(model, full_check=True)
    manifest = read_manifest(tmp_path / "chain")
    assert (manifest.sparsity, manifest.unique_weights) == (figures["sparsity"], figures["unique_weights"])


def test_training_for_int8_keeps_the_zeros_of_a_network_that_is_only_pruned(
    pruned: tuple[Path, Any], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the scheme for pruned networks: the one for clusters would warn that there are too many."""
    monkeypatch.setattr(keras_compression, "tfmot", _without_cluster_scheme(keras_compression.tfmot))
    made = FRAMEWORK.constrain(pruned[0], Quantize(epochs=1), job, SCHEDULE)
    FRAMEWORK.fit(made.network, job, SCHEDULE, "only-pruned")
    assert made.finish()["sparsity"] == pruned[1]["sparsity"]


def _without_cluster_scheme(tfmot: Any) -> Any:
    combine = SimpleNamespace(
        Default8BitPrunePreserveQuantizeScheme=tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme
    )
    return SimpleNamespace(experimental=SimpleNamespace(combine=combine), quantization=tfmot.quantization)


def test_litert_takes_the_trained_ranges(trained: Path, job: Job, tmp_path: Path) -> None:
    """Without calibration samples: the converter finds them in the SavedModel."""
    made = FRAMEWORK.constrain(trained, Quantize(epochs=1), job, SCHEDULE)
    FRAMEWORK.fit(made.network, job, SCHEDULE, "ranges")
    made.finish()
    made.save(tmp_path / "ranges", job.data.test)
    manifest = read_manifest(tmp_path / "ranges")
    assert (manifest.sparsity, manifest.unique_weights) == (0, 0)  # neither pruned nor clustered
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "ranges" / "saved_model"))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=converter.convert(), num_threads=1)
    signature = interpreter.get_signature_runner("serving_default")
    inputs = job.data.test.inputs
    answers = np.concatenate([signature(input=x[None])["output"] for x in inputs])
    assert (answers.argmax(1) == FRAMEWORK.logits(made.network, inputs).argmax(1)).mean() > 0.95
    assert np.int8 in {d["dtype"] for d in interpreter.get_tensor_details()}


@pytest.mark.slow
def test_a_constrained_training_that_is_killed_ends_the_same(
    trained: Path, pruned: tuple[Path, Any], clustered: tuple[Path, Any], job: Job, tmp_path: Path
) -> None:
    """Masks, clusters and the step of the schedule come back with the checkpoint."""
    for source, section, whole in ((trained, MAGNITUDE, pruned[0]), (pruned[0], CLUSTER, clustered[0])):
        folder = tmp_path / whole.name
        folder.mkdir()
        with pytest.raises(Stopped):
            stopping = Job(job.data, job.seed, folder, Stopping(after=1))
            made = FRAMEWORK.constrain(source, section, stopping, SCHEDULE)
            FRAMEWORK.fit(made.network, stopping, SCHEDULE, "killed")
        resumed = Job(job.data, job.seed, folder, job.progress)
        made = FRAMEWORK.constrain(source, section, resumed, SCHEDULE)
        FRAMEWORK.fit(made.network, resumed, SCHEDULE, "killed")
        made.finish()
        expected, found = FRAMEWORK.load(whole).get_weights(), made.network.get_weights()
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_layers_that_cannot_be_rounded_are_refused() -> None:
    network = FRAMEWORK.build(call("unknown_layer"), 0)
    shapes = {"input_shape": (8, 8, 1), "input_dtype": "float32", "output_shape": (4,)}
    manifest = CandidateManifest(framework="keras", architecture=None, parameters=260, **shapes)
    with pytest.raises(ModelError, match=r"(?s)quantize\.epochs: .*with epochs 0"):
        keras_compression.quantized(network, manifest, Quantize(epochs=1))


def test_probabilities_train_and_distil_as_logits_do(job: Job, tmp_path: Path) -> None:
    network = FRAMEWORK.build(call("probabilities"), 0)
    FRAMEWORK.fit(network, job, Schedule(3, 0.05, batch_size=32), "probabilities")
    assert ends_in_softmax(network) and not ends_in_softmax(FRAMEWORK.build(call("squares"), 0))
    answers = FRAMEWORK.logits(network, job.data.test.inputs)
    np.testing.assert_allclose(np.exp(answers).sum(1), 1, atol=1e-5)
    assert top1(network, job) > 0.9
    student = FRAMEWORK.build(call("squares"), 1)
    soft = SoftTargets(FRAMEWORK.logits(network, job.data.train.inputs), temperature=4, weight=0.9)
    FRAMEWORK.fit(student, job, Schedule(2, 0.05, batch_size=32), "student", soft)
    assert top1(student, job) > 0.9
    FRAMEWORK.save(network, None, job.data.test, tmp_path / "candidate")
    eager = FRAMEWORK.load_eager(tmp_path / "candidate", threads=1)
    np.testing.assert_allclose(eager.run(job.data.test.inputs).sum(1), 1, atol=1e-5)


def test_losses_by_hand() -> None:
    """Softmax of (ln 3, 0) is (3/4, 1/4); at temperature 2 of the teacher's (0, 0) it is (1/2, 1/2)."""
    logits, teacher = np.log([[3.0, 1.0]]).astype(np.float32), np.zeros((1, 2), np.float32)
    hard = -np.log(0.25)
    q = np.sqrt([3, 1]) / np.sqrt([3, 1]).sum()
    soft = 4 * (0.5 * np.log(0.5 / q)).sum()
    found = distillation_loss(2.0, 0.9)(logits, np.array([1]), teacher)
    assert float(found) == pytest.approx(0.9 * soft + 0.1 * hard, rel=1e-5)
    answers = np.array([[0.0, 10.0], [2.0, 30.0]], np.float32)  # standard deviations 1 and 10
    regression = regression_loss(lambda outputs, labels: 7.0, answers, 0.5)
    # Off by 0.5 and by 2 deviations: 0.5 · 0.5² and 2 − 0.5, each in one of four numbers.
    off = answers + np.array([[0.5, 20.0], [0.0, 0.0]], np.float32)
    assert float(regression(off, None, answers)) == pytest.approx(0.5 * (0.125 + 1.5) / 4 + 3.5)


def test_maps_are_trained_and_distilled_like_as_many_samples() -> None:
    """(N, classes, H, W) gives what the same places give as N·H·W samples; places labeled -1 are not judged."""
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(2, 3, 4, 5)) * k for k in (1, 2))
    labels = rng.integers(-1, 3, (2, 4, 5))
    places = [np.moveaxis(x, 1, 3).reshape(-1, 3) for x in (student, teacher)]
    judged = labels.ravel() >= 0
    exponents = np.exp(places[0])
    shares = (exponents / exponents.sum(1, keepdims=True))[judged, labels.ravel()[judged]]
    assert float(cross_entropy(student, labels)) == pytest.approx(-np.log(shares).mean())
    whole = distillation_loss(4.0, 0.7)(student, labels, teacher)
    assert float(whole) == pytest.approx(float(distillation_loss(4.0, 0.7)(places[0], labels.ravel(), places[1])))


def test_a_network_of_maps_learns_from_labels_and_from_a_teacher(job: Job, tmp_path: Path) -> None:
    """Which pixels are bright: the mean IoU of the held-out part, as the metric has it, rises."""
    splits = [Split(s.inputs, (s.inputs[:, ::2, :, 0] > 0.5).astype(np.int64)) for s in (job.data.train, job.data.test)]
    reports = [Recorder(), Recorder()]
    jobs = [Job(Data(*splits), 0, tmp_path, report, metric="miou") for report in reports]
    teacher, student = (FRAMEWORK.build(call("maps"), seed) for seed in (0, 1))
    FRAMEWORK.fit(teacher, jobs[0], Schedule(4, 0.3, batch_size=32), "teacher")
    soft = SoftTargets(FRAMEWORK.logits(teacher, splits[0].inputs), temperature=4, weight=0.9)
    FRAMEWORK.fit(student, jobs[1], Schedule(4, 0.3, batch_size=32), "student", soft)
    assert [report.epochs[3]["miou"] > 90 for report in reports] == [True, True]
    FRAMEWORK.save(teacher, call("maps"), splits[1], tmp_path / "candidate")


def test_the_rate_goes_up_and_down_as_pytorch_s_does() -> None:
    """OneCycleLR(max_lr=0.1, total_steps=10): steps 0, 2 (the peak) and 9, from PyTorch 2.13."""
    cycle = OneCycle(0.1, 10)
    found = [float(cycle(step)) for step in (0, 1, 2, 6, 9)]
    assert found == pytest.approx([0.004, 0.052, 0.1, 0.0388740, 4e-7], rel=1e-3)


def test_diverging_and_diverged_networks_are_refused(job: Job, tmp_path: Path) -> None:
    network = FRAMEWORK.build(call("squares"), 0)
    with pytest.raises(ModelError, match="lower the learning rate"):
        FRAMEWORK.fit(network, job, Schedule(2, 1e9, batch_size=32), "diverge")
    weights = network.get_weights()
    weights[0][0, 0, 0, 0] = np.inf
    network.set_weights(weights)
    with pytest.raises(ModelError, match="NaN or infinity in conv2d"):
        FRAMEWORK.save(network, None, job.data.test, tmp_path / "candidate")


def test_architectures_must_return_a_keras_2_model() -> None:
    with pytest.raises(ModelError, match="returned str, not a Keras 2 model"):
        FRAMEWORK.build(call("not_a_network"), 0)
    with pytest.raises(ModelError, match=r"that is Keras 3: build it with the layers of tf\.keras"):
        FRAMEWORK.build(call("keras_3"), 0)
    with pytest.raises(ModelError, match="architecture is missing"):
        FRAMEWORK.build(None, 0)


@pytest.mark.parametrize("name", ["data/model.keras", "data/model.h5", "data/model"])
def test_the_flavours_of_mlflow_are_found_and_read(trained: Path, job: Job, tmp_path: Path, name: str) -> None:
    """MLmodel, requirements and a pickled custom_objects lie around; the last is never touched."""
    network, path = FRAMEWORK.load(trained), tmp_path / name
    path.parent.mkdir(parents=True)
    (tmp_path / "MLmodel").write_text("flavors: {}")
    (path.parent / "custom_objects.cloudpickle").write_bytes(b"not a pickle")
    network.save(path)
    found = FRAMEWORK.load_weights(FRAMEWORK.find_model(tmp_path), None)
    inputs = job.data.test.inputs
    np.testing.assert_allclose(FRAMEWORK.logits(found, inputs), FRAMEWORK.logits(network, inputs), atol=1e-6)


def test_none_or_two_models_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds 0 Keras models"):
        FRAMEWORK.find_model(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.keras").write_bytes(b"")
    with pytest.raises(ModelError, match="holds 2 Keras models"):
        FRAMEWORK.find_model(tmp_path)
    assert FRAMEWORK.find_model(trained).name == "model.keras"  # next to its saved_model/


def test_weights_alone_need_an_architecture(trained: Path, job: Job, tmp_path: Path) -> None:
    network, path = FRAMEWORK.load(trained), tmp_path / "model.weights.h5"
    network.save_weights(path, save_format="h5")
    with pytest.raises(ModelError, match=r"holds weights alone.*model\.architecture"):
        FRAMEWORK.load_weights(path, None)
    loaded = FRAMEWORK.load_weights(path, call("squares"))
    inputs = job.data.test.inputs
    np.testing.assert_array_equal(FRAMEWORK.logits(loaded, inputs), FRAMEWORK.logits(network, inputs))


def test_weights_of_keras_3_are_taken_into_the_same_network(job: Job, tmp_path: Path) -> None:
    from tests.frameworks.keras_networks import keras_3

    network, path = keras_3(), tmp_path / "model.keras"
    network.save(path)
    loaded = FRAMEWORK.load_weights(path, call("same_as_keras_3"))
    inputs = job.data.test.inputs[:4]
    np.testing.assert_allclose(FRAMEWORK.logits(loaded, inputs), np.asarray(network(inputs)), atol=1e-5)
    with pytest.raises(ModelError, match=r"built by model.architecture, with the same weights, it differs"):
        FRAMEWORK.load_weights(path, call("same_as_keras_3", activation="tanh"))
    with pytest.raises(ModelError, match="its weights do not fit"):
        FRAMEWORK.load_weights(path, call("squares"))


def test_a_saved_model_that_keras_did_not_describe_answers_but_is_not_trained(
    trained: Path, job: Job, tmp_path: Path
) -> None:
    served = FRAMEWORK.load_weights(trained / "saved_model", None)
    inputs = job.data.test.inputs
    expected = FRAMEWORK.logits(FRAMEWORK.load(trained), inputs)
    np.testing.assert_allclose(FRAMEWORK.logits(served, inputs), expected, atol=1e-5)
    manifest = FRAMEWORK.save(served, None, job.data.test, tmp_path / "candidate")
    assert manifest.parameters == read_manifest(trained).parameters
    again = FRAMEWORK.load(tmp_path / "candidate")
    np.testing.assert_allclose(FRAMEWORK.logits(again, inputs), expected, atol=1e-5)
    with pytest.raises(ModelError, match="neither trained nor pruned"):
        FRAMEWORK.constrain(tmp_path / "candidate", MAGNITUDE, job, SCHEDULE)


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_code_in_a_file_is_not_run(tmp_path: Path, name: str) -> None:
    """A Lambda layer carries Python bytecode; this one would write a file."""
    trace = tmp_path / "ran"

    def leak(values: Any, path: str = str(trace)) -> Any:
        Path(path).write_text("here")
        return values

    network = keras.Sequential([keras.layers.Input((4,)), keras.layers.Lambda(leak)])
    network.save(tmp_path / name)
    trace.unlink()
    with pytest.raises(ModelError, match="cannot be read as a Keras model"):
        FRAMEWORK.load_weights(tmp_path / name, None)
    assert not trace.exists()


def test_the_same_weights_make_the_same_bytes(trained: Path, job: Job, tmp_path: Path) -> None:
    FRAMEWORK.save(FRAMEWORK.load(trained), call("squares"), job.data.test, tmp_path / "again")
    for name in (keras_files.KERAS, "saved_model/variables/variables.data-00000-of-00001"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes(), name


def test_a_train_function_fits_twice_and_logs(job: Job, tmp_path: Path) -> None:
    training = Training(Job(job.data, 0, tmp_path, job.progress))
    network = FRAMEWORK.build(call("squares"), 0)
    training.fit(network, epochs=1, batch_size=64)
    training.fit(network, epochs=1, batch_size=64, learning_rate=0.001, optimizer="adamw")
    assert {p.name for p in tmp_path.glob("*.npz")} == {"fit-1.npz", "fit-2.npz"}
    training.log(7, train_loss=0.5)
    assert job.progress.epochs[7] == {"train_loss": 0.5}  # type: ignore[attr-defined] # a Recorder


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": {}})
    with pytest.raises(ModelError, match=r"model\.h5: cannot be read as a Keras model"):
        FRAMEWORK.load_weights(tmp_path / "model.h5", None)


def test_threads_are_set_once(trained: Path) -> None:
    FRAMEWORK.load_eager(trained, threads=1)
    with pytest.raises(ModelError, match="already runs with 1 threads in this process, and cannot be given 2"):
        FRAMEWORK.load_eager(trained, threads=2)
