"""Array types by dtype. Shapes are documented where arrays are taken and returned."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
"""Of any dtype, such as inputs and labels, whose dtype the data function chooses."""
Float32Array: TypeAlias = npt.NDArray[np.float32]
"""Outputs, logits and weights in FP32."""
FloatArray: TypeAlias = npt.NDArray[np.floating]
"""Of any floating-point dtype."""
