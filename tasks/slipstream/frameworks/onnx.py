"""ONNX: a model that was trained and exported elsewhere, without its training code.

A candidate folder holds `candidate.json` and `model.onnx`. A network is a `Network`: the graph, in the form described
in onnx_graph.py. It cannot be trained, so this is a Framework, but not a Trainer.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from slipstream.contract.arrays import Array, Float32Array
from slipstream.data.splits import Split
from slipstream.errors import ModelError
from slipstream.frameworks.base import MANIFEST, ONNX, CandidateManifest
from slipstream.onnx import graph as onnx_graph
from slipstream.onnx.session import Session, require_same
from slipstream.spec import Call

log = logging.getLogger(__name__)

SAMPLES = 8
"""Number of samples on which a model's batch dimension is tested."""


@dataclass(frozen=True)
class Network:
    """A graph whose batch is dynamic, and the original graph if that had a fixed batch size."""

    model: onnx.ModelProto
    fixed: onnx.ModelProto | None = None

    @property
    def batch(self) -> int:
        """Batch size of `fixed`."""
        assert self.fixed is not None
        return onnx_graph.dimensions(self.fixed.graph.input[0])[0]


class OnnxFramework:
    """See frameworks.base.Framework."""

    def load_eager(self, candidate: Path, threads: int | None = None) -> Session:
        """Return the candidate as written: ONNX Runtime without any optimization of the graph.

        This is the baseline familiar to users of a given file. Its kernels are ONNX Runtime's fast ones, so expect less
        of a speed-up than against PyTorch or Keras.
        """
        return Session(candidate / ONNX, threads)

    def load(self, candidate: Path) -> Network:
        """Return the network of a candidate folder."""
        return Network(onnx_graph.read(candidate / ONNX))

    def find_model(self, path: Path) -> Path:
        """Return the one .onnx file in a folder, such as one that mlflow.onnx logged, or the file. Raise ModelError."""
        if path.is_file():
            if beside := onnx_graph.external_files(path):
                raise ModelError(
                    f"its weights lie in other files ({', '.join(beside[:3])}); name the folder that holds them all"
                )
            return path
        files = sorted(path.rglob("*.onnx"))
        if len(files) == 1:
            return files[0]
        raise ModelError(
            f"holds {len(files)} .onnx files instead of one; log the model with mlflow.onnx.log_model, or as a folder "
            "with one .onnx file and the files with its weights, if they are not in it"
        )

    def load_weights(self, weights: Path, architecture: Call | None) -> Network:
        """Return the network in an ONNX file, checked and in the form described in onnx_graph.py. Raise ModelError."""
        model = onnx_graph.prepare(onnx_graph.read(weights), str(weights))
        if onnx_graph.dimensions(model.graph.input[0])[0] < 0:
            return Network(model)
        return Network(onnx_graph.free_batch(model), fixed=model)

    def save(self, network: Network, architecture: Call | None, samples: Split, folder: Path) -> CandidateManifest:
        """Write a candidate folder. Raise ModelError unless a sample is answered the same in every batch."""
        model, inputs = network.model, samples.inputs[:SAMPLES]
        _require_input(model, inputs)
        outputs = _tried(network, inputs)
        manifest = CandidateManifest(
            framework="onnx",
            architecture=None,
            input_shape=onnx_graph.dimensions(model.graph.input[0])[1:],
            input_dtype=str(inputs.dtype),
            output_shape=_output_shape(model, outputs),
            parameters=onnx_graph.parameters(model),
            quantized=onnx_graph.is_quantized(model),
        )
        folder.mkdir(parents=True)
        onnx.save(model, folder / ONNX)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
        return manifest

    def logits(self, network: Network, inputs: Array) -> Float32Array:
        """Return (N, …) outputs for inputs (N, …)."""
        _require_input(network.model, inputs)
        return Session(network.model).answers(inputs)


def _require_input(model: onnx.ModelProto, inputs: Array) -> None:
    """Raise ModelError if the model does not take the data."""
    port = model.graph.input[0]
    shape, dtype = onnx_graph.dimensions(port)[1:], onnx_graph.dtype(port)
    fits = len(shape) == inputs.ndim - 1 and all(s in (-1, n) for s, n in zip(shape, inputs.shape[1:], strict=True))
    if not fits or str(inputs.dtype) != dtype:
        raise ModelError(
            f"the model takes {_shape(shape)} {dtype} (-1 may be any size), but the data is "
            f"{_shape(inputs.shape[1:])} {inputs.dtype}; change the data function"
        )


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(("N", *map(str, shape)))


def _tried(network: Network, inputs: Array) -> Float32Array:
    """Return the model's answers to samples, (N, …); each must be the same alone and among others, and as before."""
    mend = "export the model again with a dynamic first dimension (dynamic_axes or dynamic_shapes)"
    try:
        if network.fixed is not None:
            _require_as_before(network, network.fixed, inputs)
        answers = Session(network.model).answers(inputs)
        alone = Session(network.model).answers(inputs, batch=1)
        require_same(alone, answers, f"samples are not answered alike alone and in a batch of {len(inputs)}")
    except ModelError as error:
        size = f"its batch of {network.batch} cannot be made dynamic: " if network.fixed is not None else ""
        raise ModelError(f"{size}{error}; {mend}") from error
    return answers


def _require_as_before(network: Network, fixed: onnx.ModelProto, inputs: Array) -> None:
    """Raise ModelError unless samples are answered as by the model with the fixed batch size."""
    full = -(-len(inputs) // network.batch) * network.batch
    repeated = np.resize(inputs, (full, *inputs.shape[1:]))  # as many as fill the last batch
    before = Session(fixed).answers(repeated, batch=network.batch)
    require_same(before, Session(network.model).answers(repeated), "samples are not answered as before")
    log.info("the batch of %d is dynamic now; %d samples are answered as before", network.batch, len(inputs))


def _output_shape(model: onnx.ModelProto, outputs: Array) -> tuple[int, ...]:
    """Return the shape of an answer; -1 where it varies, which is possible only if the input's does."""
    if -1 not in onnx_graph.dimensions(model.graph.input[0])[1:]:
        return outputs.shape[1:]
    return onnx_graph.dimensions(onnx_graph.infer_shapes(model).graph.output[0])[1:]


FRAMEWORK = OnnxFramework()
