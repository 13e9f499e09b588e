"""Small candidates for tests: a convolutional classifier of 1×16×16 float32 images into 5 classes, in ONNX.

`python -m tests.engines.candidates FOLDER [--quantized]` writes one from an environment that has the onnx package.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.engines.images import CLASSES, SHAPE, samples

from slipstream.frameworks.base import INPUT, MANIFEST, ONNX, OUTPUT, CandidateManifest


def network(seed: int = 0) -> onnx.ModelProto:
    """Two convolutions, a flatten, a dense layer; batch dimension `batch`."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        scale = (2 / int(np.prod(shape[1:]))) ** 0.5 if len(shape) > 1 else 0.1
        return numpy_helper.from_array(rng.normal(0, scale, shape).astype(np.float32), name)

    weights = [
        weight("w1", 8, 1, 3, 3),
        weight("b1", 8),
        weight("w2", 16, 8, 3, 3),
        weight("b2", 16),
        weight("w3", CLASSES, 256),
        weight("b3", CLASSES),
    ]
    strided = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}
    nodes = [
        helper.make_node("Conv", [INPUT, "w1", "b1"], ["c1"], "conv1", **strided),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", **strided),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("Flatten", ["r2"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], [OUTPUT], "dense", transB=1),
    ]
    return model_of("small", nodes, weights)


def model_of(name: str, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    """A checked model from images to classes."""
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", CLASSES])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def projections() -> onnx.ModelProto:
    """A normalization and three matrix products of its result, as an attention begins, and their sum."""
    rng = np.random.default_rng(0)
    inner = int(np.prod(SHAPE))
    weights = [
        numpy_helper.from_array(rng.normal(0, inner**-0.5, (inner, CLASSES)).astype(np.float32), name) for name in "qkv"
    ]
    weights.append(numpy_helper.from_array(np.ones(inner, np.float32), "scale"))
    nodes = [
        helper.make_node("Flatten", [INPUT], ["f"], "flatten"),
        helper.make_node("LayerNormalization", ["f", "scale"], ["x"], "normalize"),
        *(helper.make_node("MatMul", ["x", name], [f"{name}x"], f"project_{name}") for name in "qkv"),
        helper.make_node("Sum", ["qx", "kx", "vx"], [OUTPUT], "sum"),
    ]
    return model_of("projections", nodes, weights)


def quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with Q/DQ nodes, as steps/quantize.py makes them."""
    from slipstream.onnx.quantize import Request, static
    from slipstream.spec import Quantize

    return static.quantize(model, Request(Quantize(), samples(32, seed=2), on_sample=lambda done: None))


def write(folder: Path, model: onnx.ModelProto, *, is_quantized: bool = False) -> Path:
    """A candidate folder."""
    folder.mkdir(parents=True)
    onnx.save(model, folder / ONNX)
    manifest = CandidateManifest(
        framework="torch",
        architecture=None,
        input_shape=SHAPE,
        input_dtype="float32",
        output_shape=(CLASSES,),
        parameters=sum(int(np.prod(t.dims)) for t in network().graph.initializer),
        quantized=is_quantized,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if "--quantized" in sys.argv:
        write(target, quantized(network()), is_quantized=True)
    else:
        write(target, network())
