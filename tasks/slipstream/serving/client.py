"""The client's side of the Open Inference Protocol (V2) over JSON: request bodies, answers, one call."""

import json
from collections.abc import Sequence

import httpx
import numpy as np

from slipstream.contract import Json
from slipstream.contract.arrays import Array, Float32Array
from slipstream.errors import DataError, Unavailable
from slipstream.frameworks.base import INPUT, OUTPUT

REQUEST_ID = "x-request-id"
"""Header that names a request; Envoy keeps it on the mirrored copy, so that two answers can be paired."""
RELEASE = "x-slipstream-release"
"""Header that names the release that answered."""
REFUSED = "x-slipstream-refused"
"""Header of a server's answer to a request that it refused because it is overloaded."""
SERVER_MS = "x-slipstream-server-ms"
"""Header with the time in the server in milliseconds, from request to answer."""

DATATYPES = {
    "bool": "BOOL",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
"""Protocol datatype by NumPy dtype name."""

MOST_BYTES = 64 * 2**20
"""Maximum of a request's body; for most engines a server accepts less (serving/limits.py)."""
REFUSED = "x-slipstream-refused"
"""Header of an answer that a limit gave instead of the engine; its value is the limit: `overload`."""

TEXT, BYTES = "text", "BYTES"
"""Name and datatype of a text tensor: strings in JSON, UTF-8 with a length prefix in binary."""


def infer_path(model: str) -> str:
    """Return the path of a model's inference endpoint below its base URL."""
    return f"/v2/models/{model}/infer"


def body(batch: Array) -> bytes:
    """Return the JSON body for one batch, (N, …) in the model's dtype. Raise DataError for another dtype."""
    datatype = DATATYPES.get(batch.dtype.name)
    if datatype is None:
        raise DataError(f"a batch of dtype {batch.dtype} cannot be sent; use one of {', '.join(DATATYPES)}")
    tensor = {"name": INPUT, "shape": list(batch.shape), "datatype": datatype, "data": batch.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def text_body(texts: Sequence[str]) -> bytes:
    """Return the JSON body for texts, for a release that has a tokenizer."""
    tensor = {"name": TEXT, "shape": [len(texts)], "datatype": BYTES, "data": list(texts)}
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def server_ms(response: httpx.Response) -> float | None:
    """Return an answer's time in the server, or None if the server does not report it."""
    try:
        return float(response.headers[SERVER_MS])
    except (KeyError, ValueError):
        return None


def outputs(response: Json) -> Float32Array:
    """Return the (N, …) float32 outputs in a decoded answer. Raise Unavailable if it is not an answer."""
    try:
        tensor = next(t for t in response["outputs"] if t["name"] == OUTPUT)
        return np.asarray(tensor["data"], np.float32).reshape(tensor["shape"])
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise Unavailable(f"the model server's answer has no tensor {OUTPUT!r}: {str(response)[:200]}") from error


def infer(client: httpx.Client, model: str, batch: Array) -> Float32Array:
    """Request one batch; `client` has the model's base URL. Raise Unavailable, or DataError if it is refused."""
    headers = {"content-type": "application/json"}
    try:
        response = client.post(infer_path(model), content=body(batch), headers=headers)
    except httpx.TransportError as error:
        raise Unavailable(f"{client.base_url}: no answer from {model}: {error}") from error
    if response.status_code == httpx.codes.BAD_REQUEST:
        raise DataError(f"{model}: the request was refused: {response.text[:500]}")
    if response.status_code != httpx.codes.OK:
        raise Unavailable(f"{client.base_url}: {model} answered {response.status_code}: {response.text[:500]}")
    return outputs(response.json())
