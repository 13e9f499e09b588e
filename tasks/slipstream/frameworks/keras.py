"""Keras: networks from files or the user's functions, weights as .keras, ONNX and SavedModel for the engines.

Images are (N, height, width, channels), as returned by the data function.
"""

from pathlib import Path
from typing import TypeVar

import numpy as np

from slipstream.contract.arrays import Array, Float32Array
from slipstream.data.splits import Split
from slipstream.data.user_code import user_function
from slipstream.errors import ModelError
from slipstream.frameworks import keras_files, keras_training
from slipstream.frameworks.base import (
    INPUT,
    MANIFEST,
    CandidateManifest,
    Constrained,
    Job,
    Schedule,
    SoftTargets,
    read_manifest,
)
from slipstream.frameworks.keras_files import Network
from slipstream.frameworks.keras_runtime import keras, tf
from slipstream.spec import Call, Cluster, Prune, Quantize

T = TypeVar("T")


class KerasEager:
    """A candidate run by TensorFlow in FP32, as a graph, as in Keras's own `predict`."""

    def __init__(self, network: Network, manifest: CandidateManifest) -> None:
        shape = (None, *(None if size == -1 else size for size in manifest.input_shape))
        signature = [tf.TensorSpec(shape, manifest.input_dtype, name=INPUT)]
        self._run = tf.function(lambda batch: network(batch, training=False), input_signature=signature)

    def run(self, batch: Array) -> Array:
        """Return (N, …) float32 outputs for inputs (N, …)."""
        return np.asarray(self._run(tf.constant(batch)), np.float32)


class KerasFramework:
    """See frameworks.base.Trainer and Constraining."""

    def load_eager(self, candidate: Path, threads: int | None = None) -> KerasEager:
        """Return the candidate in FP32. `threads` applies to the whole process, which must not have used TensorFlow
        before.

        Raise ModelError if it has, with another number.
        """
        if threads is not None:
            _set_threads(threads)
        return KerasEager(self.load(candidate), read_manifest(candidate))

    def build(self, architecture: Call | None, seed: int) -> keras.Model:
        """Return the untrained network. Raise ModelError if the function does not return a Keras model, or is
        missing."""
        if architecture is None:
            raise ModelError("architecture is missing: name the function that builds the network, as module:function")
        keras_training.seed_everything(seed)
        return _require_model(user_function(architecture)(**architecture.params), architecture)

    def load(self, candidate: Path) -> Network:
        """Return the trained network of a candidate folder. Raise ModelError if its file cannot be read."""
        manifest = read_manifest(candidate)
        if manifest.quantized:
            raise ModelError(f"{candidate}: is quantized; Keras needs the candidate before quantization")
        path = candidate / keras_files.KERAS
        described = path.exists()
        return keras_files.load(path if described else candidate / keras_files.SAVED_MODEL, manifest.architecture)

    def find_model(self, path: Path) -> Path:
        """Return the path of the one trained model in a folder, or the file. Raise ModelError."""
        return path if path.is_file() else keras_files.find(path)

    def load_weights(self, weights: Path, architecture: Call | None) -> Network:
        """Return the network of a .keras or .h5 file, or of a SavedModel's folder. Raise ModelError."""
        return keras_files.load(weights, architecture)

    def save(self, network: Network, architecture: Call | None, samples: Split, folder: Path) -> CandidateManifest:
        """Write a candidate folder. Raise ModelError for NaN weights, or if ONNX Runtime and Keras disagree."""
        folder.mkdir(parents=True)
        inputs = samples.inputs[:8]
        answers = keras_training.outputs(network, inputs)
        keras_files.write(network, inputs, folder)
        manifest = CandidateManifest(
            framework="keras",
            architecture=architecture,
            input_shape=inputs.shape[1:],
            input_dtype=str(inputs.dtype),
            output_shape=answers.shape[1:],
            parameters=int(sum(np.prod(v.shape) for v in network.variables)),
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
        return manifest

    def logits(self, network: Network, inputs: Array) -> Float32Array:
        """Return (N, …) outputs for inputs (N, …); their logarithm if the network answers probabilities."""
        return keras_training.logits(network, inputs)

    def train(self, function: Call, job: Job) -> keras.Model:
        """Return the network that the user's train function returns. Raise ModelError if it returns something else."""
        keras_training.seed_everything(job.seed)
        return _require_model(user_function(function)(keras_training.Training(job), **function.params), function)

    def fit(self, network: Network, job: Job, schedule: Schedule, name: str, soft: SoftTargets | None = None) -> None:
        """Train in place, resuming from the checkpoint `name`."""
        keras_training.seed_everything(job.seed)
        keras_training.fit(network, job, schedule, name, soft=soft)

    def constrain(
        self, candidate: Path, section: Prune | Cluster | Quantize, job: Job, schedule: Schedule
    ) -> Constrained:
        """Return the candidate's network, to be trained with sparse, clustered or quantized weights."""
        from slipstream.frameworks import keras_compression  # takes seconds; not needed by retrain and validate

        network = self.load(candidate)
        keras_training.require_keras(network)
        return keras_compression.constrain(network, read_manifest(candidate), section, job, schedule)


def _set_threads(threads: int) -> None:
    """Set the threads of one operation; operations run sequentially, as one inference mostly has them."""
    parallelism = {"intra_op": threads, "inter_op": 1}
    now = {k: getattr(tf.config.threading, f"get_{k}_parallelism_threads")() for k in parallelism}
    if now == parallelism:
        return
    try:
        for name, number in parallelism.items():
            getattr(tf.config.threading, f"set_{name}_parallelism_threads")(number)
    except RuntimeError as error:
        raise ModelError(
            f"TensorFlow already runs with {now['intra_op'] or 'all'} threads in this process, and cannot be given "
            f"{threads}"
        ) from error


def _require_model(network: object, call: Call) -> keras.Model:
    if isinstance(network, keras.Model):
        return network
    kind = type(network)
    hint = "; that is Keras 3: build it with the layers of tf.keras" if kind.__module__.startswith("keras.") else ""
    raise ModelError(f"{call.function} returned {kind.__name__}, not a Keras 2 model (tf.keras.Model){hint}")


FRAMEWORK = KerasFramework()
