"""MLflow signatures of candidates and engines: one named tensor in, one out, any batch size."""

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from slipstream.frameworks.base import INPUT, OUTPUT


def signature(input_shape: tuple[int, ...], input_dtype: str, output_shape: tuple[int, ...]) -> ModelSignature:
    """Return the signature for samples of `input_shape` and float32 outputs of `output_shape`, both without the
    batch."""
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(input_dtype), (-1, *input_shape), INPUT)]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, *output_shape), OUTPUT)]),
    )
