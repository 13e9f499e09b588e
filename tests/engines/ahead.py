"""Targets whose GPU is elsewhere, and a candidate that takes text, for tests of TensorRT."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.engines.images import CLASSES

from slipstream.errors import EngineError
from slipstream.frameworks.base import INPUT, MANIFEST, ONNX, OUTPUT, CandidateManifest
from slipstream.measure import gpu
from slipstream.spec import Target


def has_gpu() -> bool:
    try:
        gpu.find(0)
    except EngineError:
        return False
    return True


def ahead(capability: float | str = 8.6, precision: str = "f32", **options: object) -> Target:
    """A target on a GPU that is elsewhere."""
    return Target.model_validate(
        {
            "engine": "tensorrt",
            "device": "GPU",
            "threads": 1,
            "precision": precision,
            "options": {"compute_capability": capability, **options},
        }
    )


def port(name: str, *shape: object, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def text(folder: Path) -> Path:
    """A candidate that takes token ids (N, T) of varying length: a mean of embeddings, then a dense layer."""
    rng = np.random.default_rng(0)
    weights = {"table": rng.normal(size=(50, 16)), "dense": rng.normal(size=(16, CLASSES))}
    nodes = [
        helper.make_node("Gather", ["table", INPUT], ["embedded"], "embed"),
        helper.make_node("ReduceMean", ["embedded", "axes"], ["mean"], "mean", keepdims=0),
        helper.make_node("MatMul", ["mean", "dense"], [OUTPUT], "dense"),
    ]
    constants = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    constants.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    ports = [port(INPUT, "batch", "length", kind=TensorProto.INT64)], [port(OUTPUT, "batch", CLASSES)]
    model = helper.make_model(
        helper.make_graph(nodes, "text", *ports, constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    folder.mkdir()
    onnx.save(model, folder / ONNX)
    manifest = CandidateManifest(
        framework="torch",
        architecture=None,
        input_shape=(-1,),
        input_dtype="int64",
        output_shape=(CLASSES,),
        parameters=880,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder
