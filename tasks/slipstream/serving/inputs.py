"""What a model server takes: one tensor, of the engine's inputs or, where the release has a tokenizer, of texts."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from kserve import InferInput, InferRequest
from kserve.errors import InvalidInput

from slipstream.engines.base import EngineManifest
from slipstream.frameworks.base import INPUT
from slipstream.serving.client import BYTES, DATATYPES, TEXT
from slipstream.tokens import TOKENIZER, Tokenizer


class BadRequest(InvalidInput):  # type: ignore[misc]  # kserve has no type information
    """An InvalidInput that is answered without a traceback in the log: the mistake is the client's."""


class Inputs:
    """Reads requests for one engine."""

    def __init__(self, manifest: EngineManifest, folder: Path) -> None:
        """`folder` is the engine's, which has been loaded, and so checked."""
        self._dtype = np.dtype(manifest.input_dtype)
        self._datatype, self._shape = DATATYPES[manifest.input_dtype], [-1, *manifest.input_shape]
        has_tokenizer = TOKENIZER in manifest.files
        self._tokenizer = Tokenizer((folder / TOKENIZER).read_text(encoding="utf-8")) if has_tokenizer else None

    def types(self) -> list[dict[str, Any]]:
        """The tensors that a request may have, for the protocol's metadata; a request has one of them."""
        tensors = [{"name": INPUT, "datatype": self._datatype, "shape": self._shape}]
        return tensors + ([{"name": TEXT, "datatype": BYTES, "shape": [-1]}] if self._tokenizer is not None else [])

    def batch(self, payload: Any) -> npt.NDArray[Any]:
        """The request's only tensor, as (N, …) in the engine's dtype. Raises BadRequest."""
        if not isinstance(payload, InferRequest):
            raise BadRequest("the model speaks the Open Inference Protocol V2 only: POST /v2/models/NAME/infer")
        wanted = " or ".join(map(str, self.types()))
        if len(payload.inputs) != 1:
            raise BadRequest(f"inputs: one tensor is expected, {wanted}; there are {len(payload.inputs)}")
        tensor = payload.inputs[0]
        for kind in self.types():
            same = (tensor.name, tensor.datatype) == (kind["name"], kind["datatype"])
            if same and _fits(tensor.shape, kind["shape"]):
                return self._tokens(tensor) if kind["name"] == TEXT else self._values(tensor)
        got = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        raise BadRequest(f"inputs[0]: {wanted} is expected, where -1 is any size of at least 1; got {got}")

    def _values(self, tensor: InferInput) -> npt.NDArray[Any]:
        try:
            batch = np.ascontiguousarray(tensor.as_numpy(), dtype=self._dtype)
        except (ValueError, TypeError, OverflowError) as error:
            what = f"{list(tensor.shape)} values of {self._datatype}"
            raise BadRequest(f"inputs[0].data: not {what}: {error}") from error
        if np.issubdtype(batch.dtype, np.floating) and not np.isfinite(batch).all():
            raise BadRequest("inputs[0].data: holds NaN or infinity")
        if self._tokenizer is not None and not 0 <= batch.min() <= batch.max() < self._tokenizer.size:
            raise BadRequest(f"inputs[0].data: token ids go from 0 to {self._tokenizer.size - 1}")
        return batch

    def _tokens(self, tensor: InferInput) -> npt.NDArray[np.int64]:
        assert self._tokenizer is not None, "the tensor of texts is among the types only with a tokenizer"
        try:
            given = tensor.as_numpy().ravel().tolist()
            texts = [text.decode() if isinstance(text, bytes) else text for text in given]
        except (ValueError, TypeError) as error:
            raise BadRequest(f"inputs[0].data: not {list(tensor.shape)} texts in UTF-8: {error}") from error
        if not all(isinstance(text, str) for text in texts):
            raise BadRequest("inputs[0].data: texts are strings")
        return self._tokenizer.encode(texts)


def _fits(shape: Any, wanted: list[int]) -> bool:
    """Whether a shape, as a client gave it, is the wanted one, where -1 stands for any size of at least 1."""
    if not isinstance(shape, list) or len(shape) != len(wanted) or not all(isinstance(n, int) for n in shape):
        return False
    return all(n >= 1 if w == -1 else n == w for n, w in zip(shape, wanted, strict=True))
