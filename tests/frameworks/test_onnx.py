"""ONNX: third-party files, brought to one form, or refused with what to do."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.engines.candidates import network
from tests.engines.images import CLASSES, SHAPE, samples
from tests.onnx.quantize.models import attention, ids

from slipstream.data.splits import Split
from slipstream.errors import ModelError
from slipstream.frameworks.base import INPUT, ONNX, OUTPUT, read_manifest, trainer_for
from slipstream.frameworks.onnx import FRAMEWORK
from slipstream.onnx import graph as onnx_graph
from slipstream.onnx.session import Session


def split(inputs: np.ndarray) -> Split:
    return Split(inputs, np.arange(len(inputs)) % CLASSES)


def file(folder: Path, model: onnx.ModelProto, name: str = "given.onnx") -> Path:
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / name)
    return folder / name


def candidate(folder: Path, model: onnx.ModelProto, inputs: np.ndarray | None = None) -> Path:
    """What becomes of a file."""
    given = FRAMEWORK.load_weights(FRAMEWORK.find_model(file(folder, model)), None)
    FRAMEWORK.save(given, None, split(samples(8) if inputs is None else inputs), folder / "candidate")
    return folder / "candidate"


def refused(folder: Path, model: onnx.ModelProto, said: str, inputs: np.ndarray | None = None) -> None:
    with pytest.raises(ModelError, match=said):
        candidate(folder, model, inputs)
    assert not (folder / "candidate").exists()


def edited(edit: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = network()
    edit(model)
    return model


def with_batch(model: onnx.ModelProto, size: int) -> onnx.ModelProto:
    """The model as an exporter with a fixed batch writes it: the batch stands in its reshape, too."""
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = size
    model.graph.initializer.append(numpy_helper.from_array(np.array([size, 256]), "shape"))
    flatten = next(n for n in model.graph.node if n.op_type == "Flatten")
    flatten.CopyFrom(helper.make_node("Reshape", ["r2", "shape"], ["f"], "reshape"))
    return model


def test_a_file_becomes_a_candidate_that_answers_the_same_in_all_forms(tmp_path: Path) -> None:
    folder, inputs = candidate(tmp_path, network()), samples(8)
    manifest = read_manifest(folder)
    assert (manifest.framework, manifest.architecture, manifest.quantized) == ("onnx", None, False)
    assert (manifest.input_shape, manifest.input_dtype, manifest.output_shape) == (SHAPE, "float32", (CLASSES,))
    assert manifest.parameters == sum(int(np.prod(t.dims)) for t in network().graph.initializer)
    expected = Session(network()).run(inputs)
    eager = FRAMEWORK.load_eager(folder, threads=1)
    for size in (1, 3, 8):
        np.testing.assert_allclose(eager.run(inputs[:size]), expected[:size], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(FRAMEWORK.logits(FRAMEWORK.load(folder), inputs), expected, rtol=1e-5, atol=1e-6)


def test_eager_is_without_any_optimisation(tmp_path: Path) -> None:
    """Otherwise the baseline would already have what the engines are to show."""
    import onnxruntime as ort

    session = FRAMEWORK.load_eager(candidate(tmp_path, network()))._session
    assert session.get_session_options().graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def test_the_same_file_makes_the_same_bytes(tmp_path: Path) -> None:
    from slipstream import digests

    one, two = (digests.folder(candidate(tmp_path / name, network())) for name in ("one", "two"))
    assert one == two


def test_it_cannot_be_trained() -> None:
    with pytest.raises(ModelError, match="framework onnx: its models cannot be trained; name the framework"):
        trainer_for("onnx")


def test_names_are_changed_also_where_they_are_taken(tmp_path: Path) -> None:
    model = network()
    onnx_graph.rename(model.graph, {INPUT: "images", OUTPUT: "scores"})
    onnx_graph.rename(model.graph, {"r1": OUTPUT, "c2": INPUT})  # inner tensors with our names
    got = FRAMEWORK.load_eager(candidate(tmp_path, model)).run(samples(4))
    np.testing.assert_allclose(got, Session(network()).run(samples(4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_a_fixed_batch_becomes_dynamic(size: int, tmp_path: Path) -> None:
    folder = candidate(tmp_path, with_batch(network(), size))
    expected = Session(network()).run(samples(8))
    for other in (1, 2, 8):
        got = FRAMEWORK.load_eager(folder).run(samples(8)[:other])
        np.testing.assert_allclose(got, expected[:other], rtol=1e-5, atol=1e-6)


def test_a_batch_that_is_frozen_elsewhere_is_refused(tmp_path: Path) -> None:
    model = with_batch(network(), 4)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, CLASSES), np.float32), "each"))
    model.graph.node[-1].output[0] = "scores"
    model.graph.node.append(helper.make_node("Add", ["scores", "each"], ["output"]))
    refused(tmp_path, model, "(?s)its batch of 4 cannot be made dynamic: .*export the model again with a dynamic first")


def test_a_batch_whose_samples_change_one_another_is_refused(tmp_path: Path) -> None:
    model = network()
    model.graph.node[-1].output[0] = "scores"
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axes"))
    model.graph.node.append(helper.make_node("ReduceMean", ["scores", "axes"], ["mean"]))
    model.graph.node.append(helper.make_node("Sub", ["scores", "mean"], ["output"]))
    refused(tmp_path, model, "not answered alike alone and in a batch of 8")


def test_text_of_varying_length_keeps_its_dimension(tmp_path: Path) -> None:
    folder = candidate(tmp_path, attention(), ids(8))
    manifest = read_manifest(folder)
    assert (manifest.input_shape, manifest.input_dtype, manifest.output_shape) == ((-1,), "int64", (5,))
    assert FRAMEWORK.load_eager(folder).run(ids(3, length=6)).shape == (3, 5)


def test_an_old_opset_is_converted_and_weights_may_be_inputs(tmp_path: Path) -> None:
    model = network()
    model.opset_import[0].version, model.ir_version = 9, 3  # its operators have not changed since
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    folder = candidate(tmp_path, model)
    assert onnx_graph.opset_of(onnx.load(folder / ONNX)) == onnx_graph.OPSET
    np.testing.assert_allclose(
        FRAMEWORK.load_eager(folder).run(samples(4)), Session(network()).run(samples(4)), rtol=1e-5, atol=1e-6
    )


def test_local_functions_are_inlined_and_unused_domains_forgotten(tmp_path: Path) -> None:
    model = network()
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    body = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(helper.make_function("mine", "MyRelu", ["x"], ["y"], body, domains[:1]))
    model.graph.node[1].op_type, model.graph.node[1].domain = "MyRelu", "mine"
    model.opset_import.extend([domains[1], helper.make_opsetid("ai.onnx.ml", 3)])
    made = onnx.load(candidate(tmp_path, model) / ONNX)
    assert {n.op_type for n in made.graph.node} == {"Conv", "Relu", "Flatten", "Gemm"}
    assert [o.domain for o in made.opset_import] == [""]


def test_operators_of_others_are_named_and_counted(tmp_path: Path) -> None:
    model = network()
    for node in (model.graph.node[1], model.graph.node[3]):
        node.op_type, node.domain = "FusedRelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    refused(tmp_path, model, r"com\.microsoft\.FusedRelu \(2×\).*the one from before")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_refused(value: float, tmp_path: Path) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        values = numpy_helper.to_array(model.graph.initializer[2]).copy()
        values[0, 0, 0, 0] = value
        model.graph.initializer[2].CopyFrom(numpy_helper.from_array(values, "w2"))

    refused(tmp_path, edited(spoil), r"weight w2 holds NaN or infinity")


def test_an_infinite_mask_is_not_a_weight(tmp_path: Path) -> None:
    candidate(tmp_path, attention(float("-inf")), ids(8))


def test_a_nan_in_a_constant_is_refused(tmp_path: Path) -> None:
    model = network()
    model.graph.node[-1].output[0] = "scores"
    nan = numpy_helper.from_array(np.array(np.nan, np.float32))
    model.graph.node.append(helper.make_node("Constant", [], ["nan"], value=nan))
    model.graph.node.append(helper.make_node("Add", ["scores", "nan"], ["output"]))
    refused(tmp_path, model, "weight of a constant holds NaN")


def test_more_than_one_input_or_output_is_refused_by_name(tmp_path: Path) -> None:
    def two_outputs(model: onnx.ModelProto) -> None:
        model.graph.output.append(helper.make_tensor_value_info("f", TensorProto.FLOAT, ["batch", 256]))

    def two_inputs(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1]))

    refused(tmp_path, edited(two_outputs), r"has 2 outputs \(output, f\) instead of one; cut it with")
    refused(tmp_path, edited(two_inputs), r"has 2 inputs \(input, mask\)")


def test_labels_instead_of_scores_are_refused(tmp_path: Path) -> None:
    def labels(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "scores"
        model.graph.node.append(helper.make_node("ArgMax", ["scores"], ["output"], axis=1))
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("output", TensorProto.INT64, ["batch", 1]))

    refused(tmp_path, edited(labels), "its output is int64; it must be float: class scores")


def test_shapes_that_clash_are_refused(tmp_path: Path) -> None:
    def clash(model: onnx.ModelProto) -> None:
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 7]))

    refused(tmp_path, edited(clash), "shapes do not fit together")


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (samples(8).astype(np.float64), r"takes N×1×16×16 float32 .* the data is N×1×16×16 float64"),
        (samples(8)[:, :, :8], r"the data is N×1×8×16 float32; change the data function"),
    ],
)
def test_data_that_does_not_fit_is_refused(inputs: np.ndarray, said: str, tmp_path: Path) -> None:
    refused(tmp_path, network(), said, inputs)


def test_weights_in_other_files_come_with_their_folder(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "big.onnx", save_as_external_data=True, location="big.weights", size_threshold=0)
    with pytest.raises(ModelError, match=r"weights lie in other files \(big\.weights\); name the folder"):
        FRAMEWORK.find_model(tmp_path / "big.onnx")
    loaded = FRAMEWORK.load_weights(FRAMEWORK.find_model(tmp_path), None)
    np.testing.assert_array_equal(FRAMEWORK.logits(loaded, samples(4)), Session(network()).run(samples(4)))
    FRAMEWORK.save(loaded, None, split(samples(8)), tmp_path / "candidate")
    assert {p.name for p in (tmp_path / "candidate").iterdir()} == {"candidate.json", ONNX}
    (tmp_path / "big.weights").unlink()
    with pytest.raises(ModelError, match=r"lie in big\.weights, which is not beside it"):
        FRAMEWORK.load_weights(tmp_path / "big.onnx", None)


def test_a_folder_without_one_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds 0 \.onnx files instead of one"):
        FRAMEWORK.find_model(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.onnx").touch()
    with pytest.raises(ModelError, match="holds 2"):
        FRAMEWORK.find_model(tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("{}")
    with pytest.raises(ModelError, match="not a valid ONNX model"):
        FRAMEWORK.load_weights(tmp_path / "text.onnx", None)
