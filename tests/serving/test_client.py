import json

import httpx
import numpy as np
import pytest

from slipstream.errors import DataError, Unavailable
from slipstream.serving import client


def answer(data: list[float], shape: list[int]) -> dict[str, object]:
    return {"model_name": "m", "outputs": [{"name": "output", "datatype": "FP32", "shape": shape, "data": data}]}


def test_body_carries_every_value_exactly():
    batch = np.random.default_rng(0).normal(size=(2, 1, 3, 3)).astype(np.float32)
    (tensor,) = json.loads(client.body(batch))["inputs"]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("input", "FP32", [2, 1, 3, 3])
    np.testing.assert_array_equal(np.array(tensor["data"], np.float32).reshape(batch.shape), batch)


@pytest.mark.parametrize(
    ("dtype", "name"), [("int64", "INT64"), ("uint8", "UINT8"), ("float64", "FP64"), ("bool", "BOOL")]
)
def test_body_names_the_datatype_in_the_protocols_words(dtype, name):
    assert json.loads(client.body(np.zeros((1, 2), dtype)))["inputs"][0]["datatype"] == name


def test_body_refuses_what_the_protocol_cannot_carry():
    with pytest.raises(DataError, match="complex64"):
        client.body(np.zeros((1, 2), np.complex64))


def test_outputs_are_shaped_float32():
    got = client.outputs(answer([1, 2, 3, 4], [2, 2]))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    "response", [{}, {"outputs": []}, {"error": "no"}, answer([1, 2, 3], [2, 2]), answer(["a"], [1])]
)
def test_what_is_no_answer_is_said_to_be_none(response):
    with pytest.raises(Unavailable, match="output"):
        client.outputs(response)


def test_infer_tells_a_refusal_from_a_dead_server():
    def reply(status: int) -> httpx.MockTransport:
        return httpx.MockTransport(lambda request: httpx.Response(status, json={"error": "why"}))

    batch = np.zeros((1, 2), np.float32)
    with pytest.raises(DataError, match="why"):
        client.infer(httpx.Client(base_url="http://x", transport=reply(400)), "m", batch)
    with pytest.raises(Unavailable, match="503"):
        client.infer(httpx.Client(base_url="http://x", transport=reply(503)), "m", batch)
    with pytest.raises(Unavailable, match="no answer"):
        client.infer(httpx.Client(base_url="http://127.0.0.1:9"), "m", batch)
