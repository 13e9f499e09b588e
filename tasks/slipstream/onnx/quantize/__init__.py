"""Quantization of a candidate's ONNX: one module for each family of number formats, found by name in plugins.py.

Each has `quantize(model, request)`, which returns another model and leaves the given one unchanged.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy.typing as npt

from slipstream.plugins import SCHEMES
from slipstream.spec import Quantize


@dataclass(frozen=True)
class Request:
    """The requested quantization."""

    section: Quantize
    samples: npt.NDArray[Any]
    """(N, …) calibration samples, for schemes that compute ranges from them."""
    on_sample: Callable[[int], None]
    """Called with the number of samples seen."""


class Scheme(Protocol):
    """A module of SCHEMES."""

    def quantize(self, model: Any, request: Request) -> Any:
        """Return the quantized onnx.ModelProto. Raise ModelError."""
        ...


def scheme_for(name: str) -> Scheme:
    """Return the module of a scheme."""
    return cast(Scheme, importlib.import_module(SCHEMES[name].module))
