"""Quantization of a candidate's ONNX: one module for each family of number formats, found by name in plugins/.

Each has `quantize(model, request)`, which returns another model and leaves the given one unchanged.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from slipstream.contract.arrays import Array
from slipstream.plugins import SCHEMES
from slipstream.spec import Quantize

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Request:
    """The requested quantization."""

    section: Quantize
    samples: Array
    """(N, …) calibration samples, for schemes that compute ranges from them."""
    on_sample: Callable[[int], None]
    """Called with the number of samples seen."""


class Scheme(Protocol):
    """A module of SCHEMES."""

    def quantize(self, model: "onnx.ModelProto", request: Request) -> "onnx.ModelProto":
        """Return the quantized model. Raise ModelError."""
        ...


def scheme_for(name: str) -> Scheme:
    """Return the module of a scheme."""
    return cast(Scheme, importlib.import_module(SCHEMES[name].module))
