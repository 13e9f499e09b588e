"""Inputs of a model server: one tensor, of the engine's inputs or, if the release has a tokenizer, of texts."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipstream.contract import Json
from slipstream.contract.arrays import Array
from slipstream.data.tokens import TOKENIZER, Tokenizer
from slipstream.engines.base import EngineManifest
from slipstream.frameworks.base import INPUT
from slipstream.serving.client import BYTES, DATATYPES, MOST_BYTES, TEXT
from slipstream.serving.protocol import BadRequest, Tensor

BATCHES = 4
"""Maximum number of the target's largest batches in a request: they run sequentially."""
MOST_TEXT = 64 * 2**10
"""Maximum characters of one text. Every text is cut to the target's greatest length, but read entirely before."""
NUMBER_BYTES = 32
"""Maximum bytes of a number in JSON, with its separator; the longest float32 has 24."""
ENVELOPE_BYTES = 64 * 2**10
"""Bytes of a request's body in addition to its values."""


class Inputs:
    """Reads requests for one engine."""

    def __init__(self, manifest: EngineManifest, folder: Path) -> None:
        """`folder` is the engine's, which has been loaded, and so checked."""
        self._dtype = np.dtype(manifest.input_dtype)
        self._datatype, self._shape = DATATYPES[manifest.input_dtype], [-1, *manifest.input_shape]
        self.most_samples = BATCHES * manifest.target.batch[-1]
        self._longest = max(manifest.target.lengths, default=0)
        has_tokenizer = TOKENIZER in manifest.files
        self._tokenizer = Tokenizer((folder / TOKENIZER).read_text(encoding="utf-8")) if has_tokenizer else None

    def types(self) -> list[Json]:
        """Return the tensors that a request may contain, for the protocol's metadata; a request has one of them."""
        tensors = [{"name": INPUT, "datatype": self._datatype, "shape": self._shape}]
        return tensors + ([{"name": TEXT, "datatype": BYTES, "shape": [-1]}] if self._tokenizer is not None else [])

    def most_bytes(self) -> int:
        """Return the maximum bytes of a body: those of the largest accepted request. Larger ones are refused unread."""
        sizes = [size if size >= 1 else self._longest for size in self._shape[1:]]
        if self._tokenizer is not None or 0 in sizes:
            return MOST_BYTES
        return min(MOST_BYTES, self.most_samples * math.prod(sizes) * NUMBER_BYTES + ENVELOPE_BYTES)

    def batch(self, tensor: Tensor) -> Array:
        """Return the tensor, as (N, …) in the engine's dtype. Raise BadRequest."""
        for kind in self.types():
            same = (tensor.name, tensor.datatype) == (kind["name"], kind["datatype"])
            if same and _fits(tensor.shape, kind["shape"]):
                self._require_few(tensor)
                return self._tokens(tensor) if kind["name"] == TEXT else self._values(tensor)
        expected = " or ".join(map(str, self.types()))
        received = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        raise BadRequest(f"inputs[0]: {expected} is expected, where -1 is any size of at least 1; got {received}")

    def _require_few(self, tensor: Tensor) -> None:
        if tensor.shape[0] > self.most_samples:
            raise BadRequest(
                f"inputs[0].shape: {tensor.shape[0]} samples, but a request may have {self.most_samples}, {BATCHES} "
                "times the target's greatest batch (`batch` in the spec); send the others in further requests"
            )

    def _values(self, tensor: Tensor) -> Array:
        if self._longest and tensor.shape[1] > BATCHES * self._longest and self._shape[1] == -1:
            raise BadRequest(f"inputs[0].shape: {tensor.shape[1]} tokens, but the target's greatest is {self._longest}")
        batch = np.ascontiguousarray(tensor.values(), dtype=self._dtype)
        if np.issubdtype(batch.dtype, np.floating) and not np.isfinite(batch).all():
            raise BadRequest("inputs[0].data: holds NaN or infinity")
        if self._tokenizer is not None and not 0 <= batch.min() <= batch.max() < self._tokenizer.size:
            raise BadRequest(f"inputs[0].data: token ids go from 0 to {self._tokenizer.size - 1}")
        return batch

    def _tokens(self, tensor: Tensor) -> npt.NDArray[np.int64]:
        assert self._tokenizer is not None, "the tensor of texts is among the types only with a tokenizer"
        texts = tensor.texts()
        longest = max(map(len, texts))
        if longest > MOST_TEXT:
            raise BadRequest(f"inputs[0].data: a text of {longest} characters; {MOST_TEXT} are taken")
        return self._tokenizer.encode(texts)


def _fits(shape: Sequence[int], expected: list[int]) -> bool:
    """Return whether a shape is the expected one, where -1 stands for any size of at least 1."""
    if len(shape) != len(expected):
        return False
    return all(n >= 1 if size == -1 else n == size for n, size in zip(shape, expected, strict=True))
