"""The server's side of the Open Inference Protocol (V2): a request's bytes to one tensor, and the answer's bytes.

JSON and binary tensors (KServe's and Triton's binary extension: a JSON header whose length is in an HTTP header, then
raw little-endian values). All content of a request is checked here, before the engine runs: KServe's own decoder fails
at the first error it happens to meet, in part after the inference, and repeats work for each requested output.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import orjson

from slipstream.contract import Json
from slipstream.contract.arrays import Array, Float32Array
from slipstream.frameworks.base import OUTPUT
from slipstream.serving.client import DATATYPES

HEADER_LENGTH = "inference-header-content-length"
MOST_HEADER_BYTES = 64 * 2**10
"""Maximum size of the JSON in front of binary tensors."""
MOST_ID = 256
"""Maximum characters of a request's id, which is sent back and logged."""
MOST_SHOWN = 200
"""Maximum characters of a client's input that an error repeats."""
DTYPES = {datatype: np.dtype(name) for name, datatype in DATATYPES.items()}
KINDS: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}
"""Types of JSON values by kind of dtype; those of integers are int."""


class BadRequest(ValueError):
    """The client's mistake, answered with status 400. The message says where it is."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as received; whether its data fit its shape is checked when they are read."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any] | memoryview
    """Values as nested or flat lists, or raw bytes."""

    def values(self) -> Array:
        """Return the tensor in its datatype. Raise BadRequest."""
        dtype = DTYPES[self.datatype]
        if isinstance(self.data, memoryview):
            size = dtype.itemsize * _count(self.shape)
            if len(self.data) != size:
                raise BadRequest(f"inputs[0].data: {self._what()} are {size} bytes, not {len(self.data)}")
            # A copy: an engine may want to write to what it is given.
            return np.frombuffer(self.data, dtype.newbyteorder("<")).astype(dtype).reshape(self.shape)
        values = self._flat()
        if not set(map(type, values)) <= KINDS.get(dtype.kind, {int}):  # exact types: True is an int to Python
            raise BadRequest(f"inputs[0].data: not {self._what()}")
        try:
            with np.errstate(over="ignore"):  # values beyond float32 become infinity, which is rejected
                return np.array(values, dtype).reshape(self.shape)
        except (ValueError, OverflowError) as error:
            raise BadRequest(f"inputs[0].data: not {self._what()}: {error}") from error

    def texts(self) -> list[str]:
        """Return the texts of a BYTES tensor. Raise BadRequest."""
        try:
            values = _split(self.data) if isinstance(self.data, memoryview) else self._flat()
        except (struct.error, UnicodeDecodeError) as error:
            raise BadRequest(f"inputs[0].data: not {list(self.shape)} texts in UTF-8: {error}") from error
        if len(values) != _count(self.shape):
            raise BadRequest(f"inputs[0].data: not {list(self.shape)} texts in UTF-8 but {len(values)}")
        if not all(isinstance(text, str) for text in values):
            raise BadRequest("inputs[0].data: texts are strings")
        return values

    def _what(self) -> str:
        return f"{list(self.shape)} values of {self.datatype}"

    def _flat(self) -> list[Any]:
        """Return the values, which may be nested as deep as the shape has axes."""
        values: list[Any] = list(self.data)
        for _ in self.shape[1:]:
            if not values or not all(isinstance(v, list) for v in values):
                break
            values = list(chain.from_iterable(values))
        return values


@dataclass(frozen=True)
class Request:
    """A request: one tensor, and the form of the output."""

    id: str
    tensor: Tensor
    binary: bool
    """Whether the output is sent as raw bytes."""


def decode(body: bytes, headers: Mapping[str, str]) -> Request:
    """Read a request. Raise BadRequest for what the protocol does not allow, and for more than one tensor."""
    length = headers.get(HEADER_LENGTH)
    document = _document(body, length)
    inputs = _list(document, "inputs")
    if len(inputs) != 1:
        raise BadRequest(f"inputs: one tensor is expected; there are {len(inputs)}")
    parameters = _parameters(document, "parameters")
    binary = _flag(parameters, "binary_data_output", "parameters")
    return Request(
        id=_text(document, "id", "id") if "id" in document else "",
        tensor=_tensor(inputs[0], None if length is None else memoryview(body)[int(length) :]),
        binary=_requested(document, binary),
    )


def encode(model: str, request_id: str, output: Float32Array, binary: bool) -> tuple[bytes, dict[str, str]]:
    """Return the body of an answer, and its headers."""
    tensor: Json = {"name": OUTPUT, "shape": list(output.shape), "datatype": "FP32"}
    document = {"id": request_id, "model_name": model, "model_version": None, "outputs": [tensor]}
    if not binary:
        tensor["data"] = np.ascontiguousarray(output).ravel()
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), {"content-type": "application/json"}
    raw = output.astype("<f4", copy=False).tobytes()
    tensor["parameters"] = {"binary_data_size": len(raw)}
    head = orjson.dumps(document)
    return head + raw, {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def _document(body: bytes, length: str | None) -> Json:
    if length is not None:
        # Not int(): it accepts signs, spaces and underscores.
        if not (length.isascii() and length.isdigit() and len(length) <= 9 and int(length) <= len(body)):
            raise BadRequest(f"{HEADER_LENGTH}: not a length within the body: {length[:MOST_SHOWN]}")
        if int(length) > MOST_HEADER_BYTES:
            raise BadRequest(f"{HEADER_LENGTH}: the JSON before binary tensors may have {MOST_HEADER_BYTES} bytes")
        body = body[: int(length)]
    try:
        document = orjson.loads(body)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise BadRequest(f"not an Open Inference Protocol V2 request: {error}") from error
    if not isinstance(document, dict):
        raise BadRequest("not an Open Inference Protocol V2 request: not an object")
    return document


def _tensor(entry: object, raw: memoryview | None) -> Tensor:
    where = "not an Open Inference Protocol V2 request: inputs[0]"
    if not isinstance(entry, dict):
        raise BadRequest(f"{where} is not an object")
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
        raise BadRequest(f"{where}.shape is not a list of sizes: {_shown(shape)}")
    size = _parameters(entry, "inputs[0].parameters").get("binary_data_size")
    if raw is None or size is None:
        if not isinstance(data := entry.get("data"), list):
            raise BadRequest(f"{where}.data is not a list")
        if raw:
            raise BadRequest("inputs[0].parameters.binary_data_size is missing, but bytes follow the JSON")
    else:
        if type(size) is not int or size != len(raw):
            raise BadRequest(f"inputs[0].parameters.binary_data_size: {_shown(size)}, but {len(raw)} bytes follow")
        if "data" in entry:
            raise BadRequest("inputs[0]: has both data and binary_data_size")
        data = raw
    name, datatype = _text(entry, "name", "inputs[0].name"), _text(entry, "datatype", "inputs[0].datatype")
    return Tensor(name, datatype, tuple(shape), data)


def _requested(document: Json, binary: bool) -> bool:
    """Return whether the output is requested in binary: its own parameter takes precedence over the request's."""
    outputs = _list(document, "outputs") if document.get("outputs") is not None else []
    if not outputs:
        return binary
    if len(outputs) > 1:
        raise BadRequest(f"outputs: the model has one, {OUTPUT!r}; {len(outputs)} are asked for")
    [entry] = outputs
    if not isinstance(entry, dict) or entry.get("name") != OUTPUT:
        raise BadRequest(f"outputs[0]: the model's only output is {OUTPUT!r}; got {_shown(entry)}")
    parameters = _parameters(entry, "outputs[0].parameters")
    return _flag(parameters, "binary_data", "outputs[0].parameters") if "binary_data" in parameters else binary


def _list(document: Json, key: str) -> list[object]:
    value = document.get(key)
    if not isinstance(value, list):
        raise BadRequest(f"not an Open Inference Protocol V2 request: {key} is not a list")
    return value


def _text(document: Json, key: str, where: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or len(value) > MOST_ID:
        raise BadRequest(
            f"not an Open Inference Protocol V2 request: {where} is not a string of at most {MOST_ID} characters"
        )
    return value


def _parameters(document: Json, where: str) -> Json:
    """Return the parameters of a request or a tensor: names and scalars. Unknown ones are ignored."""
    value = document.get("parameters")
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, bool | int | float | str) for v in value.values()):
        raise BadRequest(f"not an Open Inference Protocol V2 request: {where} is not an object of scalars")
    return value


def _flag(parameters: Json, key: str, where: str) -> bool:
    value = parameters.get(key, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{where}.{key}: true or false; got {_shown(value)}")
    return value


def _split(raw: memoryview) -> list[str]:
    """Return texts, each of which follows its length in four bytes. Raise struct.error, UnicodeDecodeError."""
    texts, offset = [], 0
    while offset < len(raw):
        (length,) = struct.unpack_from("<I", raw, offset)
        (text,) = struct.unpack_from(f"{length}s", raw, offset + 4)
        texts.append(text.decode())
        offset += 4 + length
    return texts


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _shown(value: object) -> str:
    """Return a client's input, shortened for an error."""
    if isinstance(value, str | list | dict):
        value = str(value[:MOST_SHOWN]) if not isinstance(value, dict) else f"an object of {len(value)} keys"
    return str(value)[:MOST_SHOWN]
