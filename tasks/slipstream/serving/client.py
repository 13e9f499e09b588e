"""The client's side of the Open Inference Protocol (V2) over JSON: request bodies, answers, one call."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

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
"""NumPy dtype name → datatype of the protocol."""

MOST_BYTES = 64 * 2**20
"""Of a request's body, at most; of most engines a server takes less (serving/limits.py)."""
REFUSED = "x-slipstream-refused"
"""Header of an answer that a limit gave instead of the engine; it says which: `overload`."""

TEXT, BYTES = "text", "BYTES"
"""Name and datatype of a tensor of texts: strings in JSON, UTF-8 with a length before each in binary."""


def infer_path(model: str) -> str:
    """Path of a model's inference endpoint below its base URL."""
    return f"/v2/models/{model}/infer"


def body(batch: npt.NDArray[Any]) -> bytes:
    """The JSON body that asks for one batch, (N, …) in the model's dtype. Raises DataError for another dtype."""
    datatype = DATATYPES.get(batch.dtype.name)
    if datatype is None:
        raise DataError(f"a batch of dtype {batch.dtype} cannot be sent; use one of {', '.join(DATATYPES)}")
    tensor = {"name": INPUT, "shape": list(batch.shape), "datatype": datatype, "data": batch.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def text_body(texts: Sequence[str]) -> bytes:
    """The JSON body that asks for texts, of a release that has a tokenizer."""
    tensor = {"name": TEXT, "shape": [len(texts)], "datatype": BYTES, "data": list(texts)}
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def server_ms(response: httpx.Response) -> float | None:
    """Time that an answer took in the server; None where the server does not say."""
    try:
        return float(response.headers[SERVER_MS])
    except (KeyError, ValueError):
        return None


def outputs(response: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """The (N, …) float32 outputs in a decoded answer. Raises Unavailable when it is not an answer."""
    try:
        tensor = next(t for t in response["outputs"] if t["name"] == OUTPUT)
        return np.asarray(tensor["data"], np.float32).reshape(tensor["shape"])
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise Unavailable(f"the model server's answer has no tensor {OUTPUT!r}: {str(response)[:200]}") from error


def infer(client: httpx.Client, model: str, batch: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Ask for one batch; `client` has the model's base URL. Raises Unavailable, or DataError when it is refused."""
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
