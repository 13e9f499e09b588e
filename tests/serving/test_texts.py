"""The real server with a release that has a tokenizer: token ids and texts are both answered."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.conftest import ROOT, free_port, wait_for
from tests.engines.texts import WORDS, document, samples

from slipstream.data.tokens import Tokenizer
from slipstream.engines.base import load_engine
from slipstream.serving import client

MODEL = "reviews"
LENGTHS = (4, 8)
TEXTS = ["a good film", "bad", "the plot was very very very very very good good good"]
"""The last is longer than the greatest length."""


@dataclass(frozen=True)
class Running:
    http: httpx.Client
    engine: Path
    log: Path

    def ask(self, *tensors: dict[str, Any]) -> httpx.Response:
        return self.http.post(client.infer_path(MODEL), json={"inputs": list(tensors)})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, port = tmp_path_factory.mktemp("text"), free_port()
    torch, lengths = ROOT / ".envs/torch/bin/python", ",".join(map(str, LENGTHS))
    subprocess.run([torch, "-m", "tests.engines.text_networks", folder, lengths], cwd=ROOT, check=True)
    options = {"model": MODEL, "release": "v1", "engine": folder / "engine", "port": port}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "slipstream.serving.server", *arguments], stdout=log, stderr=log, cwd=folder
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/v2/models/{MODEL}/ready", process)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            yield Running(http, folder / "engine", folder / "server.log")
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0


def text(data: list[Any], **changes: Any) -> dict[str, Any]:
    return {"name": "text", "shape": [len(data)], "datatype": "BYTES", "data": data} | changes


def test_the_metadata_names_both_tensors(server: Running) -> None:
    inputs = server.http.get(f"/v2/models/{MODEL}").json()["inputs"]
    assert [(i["name"], i["datatype"], i["shape"]) for i in inputs] == [
        ("input", "INT64", [-1, -1]),
        ("text", "BYTES", [-1]),
    ]


def test_texts_are_answered_as_their_ids_are(server: Running) -> None:
    ids = Tokenizer(document()).encode  # neither cut nor padded: one text at a time
    expected = [load_engine(server.engine).run(ids([t])[:, : LENGTHS[-1]])[0] for t in TEXTS]
    response = server.ask(text(TEXTS))
    assert response.status_code == 200
    np.testing.assert_allclose(client.outputs(response.json()), expected, rtol=1e-4, atol=1e-5)


def test_texts_as_binary_tensors(server: Running) -> None:
    raw = b"".join(len(t.encode()).to_bytes(4, "little") + t.encode() for t in TEXTS)
    tensor = {"name": "text", "shape": [3], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [tensor]}).encode()
    headers = {"inference-header-content-length": str(len(header)), "content-type": "application/octet-stream"}
    response = server.http.post(client.infer_path(MODEL), content=header + raw, headers=headers)
    assert response.status_code == 200
    np.testing.assert_allclose(
        client.outputs(response.json()), client.outputs(server.ask(text(TEXTS)).json()), rtol=1e-6
    )


def test_ids_of_any_length_are_answered(server: Running) -> None:
    x = samples(5).inputs[:, :7]
    for batch in (x, x[:1, :2], np.pad(x, ((0, 0), (0, 20)))):
        got = client.infer(server.http, MODEL, batch)
        np.testing.assert_allclose(got, load_engine(server.engine).run(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (text([1, 2]), "texts are strings"),
        (text(["a", "b"], shape=[3]), "not [3] texts in UTF-8"),
        (text(["a", "b"], shape=[1, 2]), "where -1 is any size"),
        (text(["a"], name="input"), "where -1 is any size"),
        (text([]), "where -1 is any size"),
        ({"name": "input", "shape": [1, 2], "datatype": "INT64", "data": [1, len(WORDS)]}, "token ids go from 0 to 13"),
        ({"name": "input", "shape": [1, 2], "datatype": "INT64", "data": [1, -1]}, "token ids go from 0 to 13"),
        ({"name": "input", "shape": [1, 9], "datatype": "INT64", "data": [2] * 9}, "9 tokens, but the target's"),
    ],
)
def test_what_cannot_be_read_is_the_clients_mistake(server: Running, tensor: dict[str, Any], said: str) -> None:
    response = server.ask(tensor)
    assert response.status_code == 400
    assert said in response.json()["error"]
    assert "Traceback" not in server.log.read_text()


def test_ids_and_texts_together_are_refused(server: Running) -> None:
    ids = {"name": "input", "shape": [1, 1], "datatype": "INT64", "data": [2]}
    response = server.ask(ids, text(["good"]))
    assert response.status_code == 400
    assert "one tensor is expected" in response.json()["error"]
