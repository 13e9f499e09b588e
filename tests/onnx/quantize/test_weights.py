"""Weights alone: the right numbers for every layout, small in both engines, and exact where they can be."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tests.engines.candidates import network, write
from tests.engines.images import samples
from tests.onnx.quantize.models import attention, ids

from slipstream import digests
from slipstream.engines.base import build_engine, load_engine
from slipstream.errors import ModelError
from slipstream.onnx import graph as onnx_graph
from slipstream.onnx.quantize import Request, weights
from slipstream.onnx.quantize.coverage import require_quantized
from slipstream.onnx.session import Session
from slipstream.spec import Quantize, Target

NONE = np.empty(0)


def compressed(model: onnx.ModelProto, scheme: str, **section: object) -> onnx.ModelProto:
    return weights.quantize(model, Request(Quantize(scheme=scheme, **section), NONE, on_sample=lambda done: None))


def layer(op: str, shape: tuple[int, ...], limit: int = 7, **attributes: int) -> onnx.ModelProto:
    """A model of one layer whose weight has integers up to `limit`, which is in each row, block and column."""
    values = np.random.default_rng(0).integers(-limit, limit + 1, shape).astype(np.float32)
    values[np.indices(shape).sum(0) % 3 == 0] = limit
    inputs = {"Conv": ["batch", shape[1], 5, 5], "ConvTranspose": ["batch", shape[0], 5, 5]}
    given_shape = inputs.get(op, ["batch", shape[1] if attributes.get("transB") else shape[0]])
    graph = helper.make_graph(
        [helper.make_node(op, ["input", "w"], ["output"], "layer", **attributes)],
        "one",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, given_shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values * np.float32(0.25), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def batch_for(model: onnx.ModelProto) -> np.ndarray:
    shape = onnx_graph.dimensions(model.graph.input[0])[1:]
    return np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)


LAYERS = {
    "MatMul": ("MatMul", (64, 6), {}),
    "Gemm": ("Gemm", (64, 6), {}),
    "Gemm transposed": ("Gemm", (6, 64), {"transB": 1}),
    "Conv": ("Conv", (6, 4, 3, 3), {}),
    "ConvTranspose": ("ConvTranspose", (4, 6, 3, 3), {}),
}


@pytest.mark.parametrize("scheme", ["int8-weights", "int4-weights"])
@pytest.mark.parametrize("case", LAYERS)
def test_weights_that_fit_into_the_format_are_exact(case: str, scheme: str) -> None:
    op, shape, attributes = LAYERS[case]
    blocks = scheme == "int4-weights" and "Conv" not in op
    model = layer(op, shape, 7 if blocks else 127, **attributes)
    made, batch = compressed(model, scheme), batch_for(model)
    onnx.checker.check_model(made, full_check=True)
    np.testing.assert_allclose(Session(made).run(batch), Session(model).run(batch), rtol=1e-4, atol=1e-3)
    stored = {t.data_type for t in made.graph.initializer if t.dims == model.graph.initializer[0].dims}
    assert stored == {TensorProto.INT4 if blocks else TensorProto.INT8}


@pytest.mark.parametrize("scheme", ["int8-weights", "int4-weights"])
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_engines_keep_them_small_and_answer_nearly_the_same(engine: str, scheme: str, tmp_path: Path) -> None:
    target, batch, answers, sizes = Target(engine=engine, threads=1), samples(8), [], []
    for name, model in {"fp32": wide(), "small": compressed(wide(), scheme)}.items():
        candidate = write(tmp_path / f"{name}-candidate", model, is_quantized=name == "small")
        build_engine(candidate, target, tmp_path / name)
        answers.append(load_engine(tmp_path / name).run(batch))
        sizes.append(digests.folder_size(tmp_path / name))
    assert 0 < np.abs(answers[1] - answers[0]).max() < 0.25 * np.abs(answers[0]).max()
    assert sizes[0] > 1_000_000 and sizes[1] < (0.3 if scheme == "int8-weights" else 0.2) * sizes[0]


def wide() -> onnx.ModelProto:
    """The small network with a dense layer of 262,144 weights in it."""
    model = network()
    rng = np.random.default_rng(3)
    names = {"wide": (256, 1024), "narrow": (1024, 256)}
    for name, shape in names.items():
        values = rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    dense = next(n for n in model.graph.node if n.op_type == "Gemm")
    place = list(model.graph.node).index(dense)
    model.graph.node.insert(place, helper.make_node("MatMul", ["r", "narrow"], ["n"], "narrow_product"))
    model.graph.node.insert(place, helper.make_node("Relu", ["p"], ["r"], "wide_relu"))
    model.graph.node.insert(place, helper.make_node("MatMul", ["f", "wide"], ["p"], "wide_product"))
    dense.input[0] = "n"
    return model


def test_embedding_tables_are_int8_and_matrices_int4() -> None:
    model = attention()
    made = compressed(model, "int4-weights")
    kinds = {t.name: t.data_type for t in made.graph.initializer}
    assert kinds["words.weight_int8"] == TensorProto.INT8
    assert require_quantized(made, "int4-weights")["int4_share"] > 0.5
    text = ids(16)
    expected, got = Session(model).answers(text), Session(made).answers(text)
    assert np.abs(got - expected).max() < 0.25 * np.abs(expected).max()
    assert made.ByteSize() < 0.6 * model.ByteSize()


def test_no_block_that_fits_is_refused_with_the_mend() -> None:
    odd = layer("MatMul", (50, 6))
    assert require_quantized(compressed(odd, "int8-weights"), "int8-weights")["compressed_share"] == 1
    with pytest.raises(ModelError, match=r"multiple of quantize\.block_size; lower it"):
        require_quantized(compressed(odd, "int4-weights"), "int4-weights")


def test_a_model_without_weights_is_refused() -> None:
    model = layer("MatMul", (64, 6))
    model.graph.node[0].CopyFrom(helper.make_node("Relu", ["input"], ["output"]))
    del model.graph.initializer[:]
    with pytest.raises(ModelError, match="nothing to quantize"):
        require_quantized(compressed(model, "int8-weights"), "int8-weights")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.sampled_from([16, 32, 64]), st.integers(1, 5), st.integers(0, 2**31))
def test_a_rounded_weight_is_never_further_than_half_a_step(blocks: int, block: int, columns: int, seed: int) -> None:
    shape = (blocks * block, columns)
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    numbers, scales = weights._in_blocks(values, 0, block)
    assert scales.shape == (blocks, columns) and np.abs(numbers).max() <= 7
    assert (np.abs(numbers * scales.repeat(block, 0) - values) <= scales.repeat(block, 0) * 0.5001).all()
