"""Trained Keras models as files: finding, reading without unpickling, and writing.

A candidate folder holds `candidate.json`, `model.keras` (what Keras trains on), `saved_model/` (only the inference, for
LiteRT and OpenVINO) and `model.onnx`.
"""

import json
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
from tf_keras.src.saving.serialization_lib import SafeModeScope

from slipstream.contract.arrays import Array, Float32Array
from slipstream.data.user_code import user_function
from slipstream.errors import ModelError
from slipstream.frameworks.base import INPUT, ONNX, OUTPUT
from slipstream.frameworks.keras_runtime import keras, tf
from slipstream.frameworks.keras_training import outputs
from slipstream.onnx.agreement.bounds import EXACT, explain_mismatch
from slipstream.onnx.agreement.reference import reference
from slipstream.spec import Call

log = logging.getLogger(__name__)

KERAS, SAVED_MODEL, GRAPH = "model.keras", "saved_model", "saved_model.pb"
OPSET = 17
"""The newest opset with which tf2onnx 1.17 writes GlobalAveragePool, which engines compute in INT8; with 18 it becomes
a ReduceMean between transposes."""


class Served:
    """A SavedModel without Keras's description: it can only answer."""

    def __init__(self, folder: Path) -> None:
        self._loaded = tf.saved_model.load(str(folder))  # keeps the variables alive
        signatures = self._loaded.signatures
        if "serving_default" not in signatures:
            raise ModelError(f"{folder}: has no signature serving_default; export the model with one")
        self._function = signatures["serving_default"]
        self.variables = list(self._function.variables)
        inputs, answers = self._function.structured_input_signature[1], self._function.structured_outputs
        if len(inputs) != 1 or len(answers) != 1:
            raise ModelError(
                f"{folder}: takes {len(inputs)} tensors and answers {len(answers)}, but must do with one each"
            )
        (self._name,) = inputs

    def __call__(self, batch: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return (N, …) outputs for inputs (N, …)."""
        (answer,) = self._function(**{self._name: batch}).values()
        return answer


Network: TypeAlias = keras.Model | Served
"""A network that Keras described, or a SavedModel that only answers."""


def find(folder: Path) -> Path:
    """Find the one trained model in a folder: a .keras file, else .h5, else a SavedModel's folder. Raise ModelError."""
    kinds = (
        sorted(folder.rglob("*.keras")),
        sorted([*folder.rglob("*.h5"), *folder.rglob("*.hdf5")]),
        [graph.parent for graph in sorted(folder.rglob(GRAPH))],
    )
    models = next((paths for paths in kinds if paths), [])
    if len(models) == 1:
        return models[0]
    raise ModelError(
        f"holds {len(models)} Keras models instead of one (a .keras or .h5 file, or a SavedModel); pickled models are "
        "never loaded, so log it with mlflow.tensorflow.log_model or as one of those"
    )


def load(path: Path, architecture: Call | None) -> Network:
    """Return the network at `find`'s path. Code in it is never run: Lambda layers are rejected.

    Keras 3 files are converted. A file that contains only weights needs `architecture`. Raise ModelError.
    """
    if architecture is not None:
        user_function(architecture)  # its module registers the layers that it defines
    try:
        with SafeModeScope(safe_mode=True):  # .h5 and SavedModel would run the bytecode of Lambda layers
            return _load(path, architecture)
    except ModelError:
        raise
    except Exception as error:  # Keras, h5py and TensorFlow share no root but Exception
        raise ModelError(f"{path}: cannot be read as a Keras model: {type(error).__name__}: {error}") from error


def _load(path: Path, architecture: Call | None) -> Network:
    if path.is_dir():
        described = (path / "keras_metadata.pb").exists()
        return keras.models.load_model(path, compile=False) if described else Served(path)
    if _written_by(path).startswith("3"):
        return _from_keras_3(path, architecture)
    if path.suffix == ".keras":
        return keras.models.load_model(path, compile=False, safe_mode=True)
    with h5py.File(path) as file:
        whole = "model_config" in file.attrs
    if whole:
        return keras.models.load_model(path, compile=False)
    network = _built(path, architecture, "holds weights alone")
    network.load_weights(path)
    return network


def _written_by(path: Path) -> str:
    """Return the version of Keras that wrote a file; empty if the file does not say."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return str(json.loads(file.read("metadata.json")).get("keras_version", ""))
    with h5py.File(path) as file:
        return str(file.attrs.get("keras_version", ""))


def _built(path: Path, architecture: Call | None, why: str) -> keras.Model:
    if architecture is None:
        raise ModelError(
            f"{path.name}: {why}, so the network must be built first: name the function that builds it, with layers "
            "of tf.keras, under model.architecture"
        )
    return user_function(architecture)(**architecture.params)


def _from_keras_3(path: Path, architecture: Call | None) -> keras.Model:
    """Return the network of a Keras 3 file: converted, or built by `architecture` with the file's weights.

    Both list weights layer by layer. Equal answers to random inputs confirm that they belong together.
    """
    from slipstream.frameworks import keras_3

    if architecture is None:
        return keras_3.convert(path)
    network, theirs = user_function(architecture)(**architecture.params), keras_3.read(path)
    source_weights = theirs.get_weights()
    shapes = [[tuple(w.shape) for w in weights] for weights in (source_weights, network.get_weights())]
    if shapes[0] != shapes[1]:
        raise ModelError(f"{path.name}: its weights do not fit model.architecture: {shapes[0]} in it, not {shapes[1]}")
    network.set_weights(source_weights)
    keras_3.require_equal(path, theirs, network, "built by model.architecture")
    return network


def write(network: Network, samples: Array, folder: Path) -> None:
    """Write `model.keras` if Keras described the network, `saved_model/` and `model.onnx` into a folder.

    Raise ModelError for NaN weights, and if ONNX Runtime answers the samples (N, …) differently.
    """
    require_finite(network)
    if isinstance(network, keras.Model):
        write_keras(network, folder / KERAS)
    serve = write_saved_model(network, samples, folder / SAVED_MODEL)
    write_onnx(serve, folder / ONNX)
    for size in {len(samples), 1}:  # what was frozen for one batch size shows only with another
        problem = explain_mismatch(outputs(network, samples[:size]), reference(folder / ONNX, samples[:size]), EXACT)
        if problem is not None:
            raise ModelError(f"{ONNX}: ONNX Runtime and Keras differ on {size} real samples: it {problem}")


def write_keras(network: keras.Model, path: Path) -> None:
    """Write a .keras file whose bytes depend only on its content: Keras adds the time of day."""
    aside = path.with_name(f"aside-{path.name}")
    network.save(aside, save_format="keras")
    with zipfile.ZipFile(aside) as original, zipfile.ZipFile(path, "w") as file:
        for name in original.namelist():
            content = original.read(name)
            if name == "metadata.json":
                content = json.dumps({**json.loads(content), "date_saved": "1980-01-01@00:00:00"}).encode()
            file.writestr(zipfile.ZipInfo(name), content)
    aside.unlink()


def write_saved_model(network: Network, samples: Array, folder: Path) -> tf.types.experimental.PolymorphicFunction:
    """Write only the inference, from tensor `input` to tensor `output`, with a dynamic batch; return its
    tf.function."""

    @tf.function(  # type: ignore[untyped-decorator] # TensorFlow has no types
        input_signature=[tf.TensorSpec((None, *samples.shape[1:]), samples.dtype, name=INPUT)], autograph=False
    )
    def serve(batch: tf.Tensor) -> dict[str, tf.Tensor]:
        return {OUTPUT: network(batch, training=False)}

    module = tf.Module()
    module.held, module.serve = list(network.variables), serve
    if isinstance(network, Served):
        module.loaded = network._loaded
    tf.saved_model.save(module, str(folder), signatures={"serving_default": serve})
    # Optional, and new each time: it holds a random id. Without it, the same network gives the same bytes.
    (folder / "fingerprint.pb").unlink(missing_ok=True)
    return serve


def write_onnx(serve: tf.types.experimental.PolymorphicFunction, path: Path) -> None:
    """Write FP32 ONNX through tf2onnx, with a dynamic batch. Raise ModelError for operators that ONNX does not have."""
    import onnx
    import tf2onnx

    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    try:
        model, _ = tf2onnx.convert.from_function(serve, input_signature=serve.input_signature, opset=OPSET)
    except Exception as error:  # tf2onnx's and TensorFlow's errors share no root but Exception
        raise ModelError(f"{path.name}: tf2onnx cannot convert the network: {error}") from error
    _drop_captured(model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"  # tf2onnx calls each unknown size unk__N
    onnx.save(model, path)


def _drop_captured(model: Any) -> None:
    """Leave `input` as the only input. tf2onnx also lists the tensors that a function captured, such as the masks of
    pruned weights, although they are constants by then: ONNX Runtime ignores them, but NNCF asks for their values."""
    used = {name for node in model.graph.node for name in node.input}
    inputs = [value for value in model.graph.input if value.name == INPUT or value.name in used]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def require_finite(network: Network) -> None:
    """Raise ModelError that names the weights with NaN or infinity."""
    bad = [v.name for v in network.variables if v.dtype.is_floating and not np.isfinite(v.numpy()).all()]
    if bad:
        raise ModelError(f"the trained network: NaN or infinity in {', '.join(bad[:5])}; the training diverged")


def kernels(network: keras.Model) -> Iterator[tuple[str, Float32Array]]:
    """Yield layer name and weight of each convolution and dense layer, which are pruned and clustered.

    Depthwise convolutions have few weights and are unchanged, as in tensorflow-model-optimization.
    """
    for layer in getattr(network, "layers", []):
        inner = layer
        while hasattr(inner, "layer"):  # the wrapper of quantization-aware training
            inner = inner.layer
        if isinstance(inner, keras.Model):
            yield from kernels(inner)
        elif compressible(inner):
            (kernel,) = [v for v in layer.variables if v.name.rpartition("/")[2].startswith("kernel:")]
            yield inner.name, kernel.numpy()


def compressible(layer: keras.layers.Layer) -> bool:
    """Return whether pruning and clustering apply to a layer's weight."""
    kinds = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, keras.layers.Dense)
    spared = (
        keras.layers.DepthwiseConv1D,
        keras.layers.DepthwiseConv2D,
        keras.layers.SeparableConv1D,
        keras.layers.SeparableConv2D,
        keras.layers.Conv1DTranspose,
        keras.layers.Conv2DTranspose,
        keras.layers.Conv3DTranspose,
    )
    return isinstance(layer, kinds) and not isinstance(layer, spared)
