"""The network of candidates.py as a SavedModel, as the framework keras leaves it: for engines that start from one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper
from tests.engines.candidates import network, write
from tests.engines.images import SHAPE, samples

from slipstream.engines.litert_file import CALIBRATION, SAVED_MODEL
from slipstream.frameworks.base import INPUT, MANIFEST, OUTPUT, read_manifest
from slipstream.frameworks.keras_runtime import tf
from slipstream.spec import Quantize


def answer(x: Any, note: Callable[[Any, float], Any] = lambda x, limit: x) -> Any:
    """(N, 1, 16, 16) to (N, 5); `note` is told of each value that quantization rounds, and of its greatest size."""
    w = {t.name: numpy_helper.to_array(t) for t in network().graph.initializer}
    x = tf.transpose(note(x, 4), [0, 2, 3, 1])
    for i in "12":
        x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
        x = tf.nn.conv2d(x, note(w[f"w{i}"].transpose(2, 3, 1, 0), 1), 2, "VALID") + w[f"b{i}"]
        x = note(tf.nn.relu(x), 8)
    x = tf.reshape(tf.transpose(x, [0, 3, 1, 2]), [-1, 256])
    return note(tf.matmul(x, note(w["w3"].T, 1)) + w["b3"], 8)


def answer_with_ranges(x: Any) -> Any:
    """The same, with the nodes that quantization-aware training leaves behind."""
    return answer(x, lambda x, limit: tf.quantization.fake_quant_with_min_max_args(x, -limit, limit))


def candidate(
    folder: Path, scheme: str | None = None, function: Callable[[Any], Any] = answer, batch: int | None = None
) -> Path:
    """A candidate folder; with a scheme it is quantized, and has calibration samples unless it has ranges itself."""
    write(folder, network(), is_quantized=scheme is not None)
    module = tf.Module()
    named = tf.function(
        lambda x: {OUTPUT: function(x)}, input_signature=[tf.TensorSpec([batch, *SHAPE], tf.float32, name=INPUT)]
    )
    module.named = named
    tf.saved_model.save(module, str(folder / SAVED_MODEL), signatures=named)
    if scheme is not None:
        manifest = read_manifest(folder).model_copy(update={"quantization": Quantize(scheme=scheme)})
        (folder / MANIFEST).write_text(manifest.model_dump_json())
        if function is not answer_with_ranges:
            np.savez(folder / CALIBRATION, inputs=samples(256, seed=2))
    return folder
