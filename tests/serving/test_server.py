"""The real server, as its own process. Runs in the serve environment; the candidate comes from the torch one."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
from tests.conftest import ROOT, free_port, wait_for
from tests.engines.images import CLASSES, SHAPE, samples

from slipstream.engines.base import MANIFEST, build_engine, load_engine
from slipstream.errors import DataError
from slipstream.serving import client
from slipstream.spec import Target

MODEL, RELEASE = "small", "small--v1"


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    http: httpx.Client
    engine: Path
    answers: Path
    log: Path

    def lines(self, request_id: str, n: int = 1) -> list[dict[str, object]]:
        """The n answers to a request; the log is written just after the response has left."""
        deadline = time.monotonic() + 2
        while True:
            found = [a for a in map(json.loads, self.answers.read_text().splitlines()) if a["id"] == request_id]
            if len(found) >= n or time.monotonic() > deadline:
                return found
            time.sleep(0.01)

    def post(self, content: bytes, **headers: str) -> httpx.Response:
        sent = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return self.http.post(client.infer_path(MODEL), content=content, headers=sent)


def start(engine: Path, port: int, folder: Path) -> subprocess.Popen[bytes]:
    options = {"model": MODEL, "release": RELEASE, "engine": engine, "port": port, "answers": folder / "answers.jsonl"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "slipstream.serving.server", *arguments], stdout=log, stderr=log, cwd=folder
        )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    torch = ROOT / ".envs/torch/bin/python"
    subprocess.run([torch, "-m", "tests.engines.candidates", folder / "candidate"], cwd=ROOT, check=True)
    build_engine(folder / "candidate", Target(engine="openvino", threads=1), folder / "engine")
    return folder / "engine"


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    process = start(engine, port, folder)
    try:
        wait_for(f"http://127.0.0.1:{port}/v2/models/{MODEL}/ready", process)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            yield Running(process, http, engine, folder / "answers.jsonl", folder / "server.log")
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0


@pytest.mark.parametrize("batch", [1, 3, 2000], ids=["single", "batch", "batch outside the event loop"])
def test_answers_are_the_engines(server: Running, batch: int) -> None:
    x = samples(batch)
    got = client.infer(server.http, MODEL, x)
    assert got.shape == (batch, CLASSES)
    np.testing.assert_allclose(got, load_engine(server.engine).run(x), rtol=1e-5, atol=1e-5)


def test_every_response_names_the_release_and_every_answer_is_logged(server: Running) -> None:
    x = samples(2, seed=7)
    before = time.time()
    response = server.post(client.body(x), x_request_id="req-7")
    assert response.status_code == 200
    assert response.headers[client.RELEASE] == RELEASE
    assert response.json()["id"] == "req-7"
    (line,) = server.lines("req-7")
    assert line["release"] == RELEASE
    assert before - 1 < line["at"] < time.time() + 1
    assert 0 < line["latency_ms"] < 1000 * (time.time() - before)
    np.testing.assert_allclose(line["output"], client.outputs(response.json()), atol=1e-6)
    assert server.http.get("/v2/health/live").headers[client.RELEASE] == RELEASE


def test_the_bodys_id_serves_where_no_header_names_the_request(server: Running) -> None:
    document = {**json.loads(client.body(samples(1))), "id": "from-body"}
    assert server.post(json.dumps(document).encode()).json()["id"] == "from-body"
    assert len(server.lines("from-body")) == 1


def test_binary_tensors_in_and_out(server: Running) -> None:
    x = samples(3, seed=3)
    tensor = {"name": "input", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    response = server.http.post(client.infer_path(MODEL), content=head + x.tobytes(), headers=headers)
    assert response.status_code == 200, response.text
    length = int(response.headers["inference-header-content-length"])
    got = np.frombuffer(response.content[length:], np.float32).reshape(3, CLASSES)
    np.testing.assert_allclose(got, load_engine(server.engine).run(x), rtol=1e-5, atol=1e-5)


def test_metadata_tells_names_types_and_shapes(server: Running) -> None:
    metadata = server.http.get(f"/v2/models/{MODEL}").json()
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, *SHAPE]}]
    assert metadata["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1, CLASSES]}]
    assert server.http.get("/v2/health/ready").json() == {"ready": True}


def changed(**changes: object) -> bytes:
    document = json.loads(client.body(samples(1)))
    document["inputs"][0] |= changes
    return json.dumps(document).encode()


REFUSED = {
    "not JSON": (b"{", "not an Open Inference Protocol V2 request"),
    "not an object": (b"[]", "not an Open Inference Protocol V2 request"),
    "no inputs": (b"{}", "inputs"),
    "empty inputs": (b'{"inputs": []}', "there are 0"),
    "other name": (changed(name="image"), "'name': 'input'"),
    "other datatype": (changed(datatype="INT8"), "'datatype': 'FP32'"),
    "other shape": (changed(shape=[1, 1, 8, 32]), "16, 16"),
    "no batch": (changed(shape=[0, *SHAPE], data=[]), "at least 1"),
    "too few values": (changed(data=[0.5] * 10), "data"),
    "text": (changed(data=["a"] * 256), "data"),
    "no shape": (changed(shape=5), "not an Open Inference Protocol V2 request"),
    "NaN": (changed(data=[float("nan")] * 256), "not an Open Inference Protocol V2 request"),
    "beyond float32": (changed(data=[1e300] * 256), "NaN or infinity"),
}


@pytest.mark.parametrize(("content", "says"), REFUSED.values(), ids=REFUSED)
def test_a_bad_request_gets_400_and_is_not_an_answer(server: Running, content: bytes, says: str) -> None:
    name = f"bad-{hash((content, says))}"
    response = server.post(content, x_request_id=name)
    assert response.status_code == 400
    assert says in response.json()["error"]
    assert response.headers[client.RELEASE] == RELEASE
    assert server.post(client.body(samples(1)), x_request_id=f"after-{name}").status_code == 200
    assert server.lines(f"after-{name}")
    assert name not in [json.loads(line)["id"] for line in server.answers.read_text().splitlines()]
    assert "Traceback" not in server.log.read_text()


def binary(tensor: object, **document: object) -> tuple[bytes, dict[str, str]]:
    """A request with binary tensors, and its headers."""
    head = json.dumps({"inputs": [tensor], **document}).encode()
    return head + b"\x05\x00\x00", {"inference-header-content-length": str(len(head))}


TENSOR = {"name": "input", "datatype": "FP32", "shape": [1, *SHAPE]}
RAW = {"parameters": {"binary_data_size": 3}}
BROKEN = {
    "no tensor": binary("x"),
    "torn bytes": binary(TENSOR | RAW | {"datatype": "BYTES", "shape": [1]}),
    "torn numbers": binary(TENSOR | RAW),
    "a number as datatype": binary(TENSOR | RAW | {"datatype": 5}),
    "a number as shape": binary(TENSOR | {"shape": 5, "data": [0.5]}),
    "texts as shape": binary(TENSOR | {"shape": ["1", "1", "16", "16"], "data": [0.5] * 256}),
    "parameters that are none": binary(TENSOR | {"data": [0.5] * 256}, parameters=5),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_binary_request_gets_400_too(server: Running, case: str) -> None:
    content, headers = BROKEN[case]
    response = server.post(content, **headers)
    assert (response.status_code, response.json().keys()) == (400, {"error"})
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"/v2/repository/models/{MODEL}/unload"),
        ("POST", f"/v2/repository/models/{MODEL}/load"),
        ("POST", f"/v2/models/{MODEL}/versions/1/infer"),
        ("GET", f"/v2/models/{MODEL}/versions/1"),
        ("POST", f"/v1/models/{MODEL}:predict"),
        ("GET", "/docs"),
    ],
)
def test_only_the_protocol_is_answered_and_no_client_unloads_the_model(server: Running, method: str, path: str) -> None:
    assert server.http.request(method, path, content=client.body(samples(1))).status_code == 404
    assert server.post(client.body(samples(1))).status_code == 200


def test_a_request_that_is_too_large_is_refused_unread(server: Running) -> None:
    response = server.post(b" " * (65 * 2**20))
    assert response.status_code == 413
    assert "64 MiB" in response.json()["error"]
    assert server.post(client.body(samples(1))).status_code == 200


def test_a_bad_request_is_a_data_error_for_the_client(server: Running) -> None:
    with pytest.raises(DataError, match="16, 16"):
        client.infer(server.http, MODEL, np.zeros((1, 1, 4, 4), np.float32))


def test_requests_are_counted_and_the_time_in_the_server_is_told(server: Running) -> None:
    def counted() -> dict[str, float]:
        lines = server.http.get("/metrics").text.splitlines()
        return {k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if not line.startswith("#"))}

    before = counted()
    response = server.post(client.body(samples(2)))
    assert 0 < (client.server_ms(response) or 0) < 10_000
    server.post(b"{}")
    after = counted()
    names = [f'slipstream_requests_total{{status="{status}"}}' for status in ("2xx", "4xx", "5xx")]
    assert [after[n] - before[n] for n in names] == [1, 1, 0]
    assert after["process_resident_memory_bytes"] > 2**20


def test_another_model_is_not_found(server: Running) -> None:
    assert server.http.post(client.infer_path("other"), content=client.body(samples(1))).status_code == 404


def test_concurrent_requests_get_their_own_answers(server: Running) -> None:
    x = samples(200, seed=9)
    expected = load_engine(server.engine).run(x)

    def ask(i: int) -> bool:
        n = 1 + i % 3  # single samples and batches take different paths through the engine
        response = server.post(client.body(x[i : i + n]), x_request_id=f"many-{i}")
        return bool(np.allclose(client.outputs(response.json()), expected[i : i + n], atol=1e-5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(190)))
    assert all(len(server.lines(f"many-{i}")) == 1 for i in range(190))


def test_a_request_that_waited_too_long_is_refused_and_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.serving import server as module

    ran: list[int] = []

    class Slow:
        def run(self, batch: np.ndarray) -> np.ndarray:
            ran.append(1)
            time.sleep(0.2)
            return batch

    monkeypatch.setattr(module, "MOST_WAIT_S", 0.3)
    model = module.EngineModel(MODEL, cast(Any, None), Slow(), cast(Any, None))
    model._ms_per_value = 1e6  # so that it runs beside the event loop

    async def ask() -> list[Any]:
        return await asyncio.gather(*(model._run(np.zeros(1)) for _ in range(6)), return_exceptions=True)

    refused = [r for r in asyncio.run(ask()) if isinstance(r, module.Refused)]
    assert {r.status for r in refused} == {503}
    assert 1 <= len(refused) == 6 - len(ran) <= 5


def test_it_listens_on_one_address_and_stays_quiet(server: Running) -> None:
    assert f"http://127.0.0.1:{server.http.base_url.port}" in server.log.read_text()
    before = server.log.stat().st_size
    client.infer(server.http, MODEL, samples(1))
    assert server.log.stat().st_size == before


def test_an_engine_for_another_machine_is_refused_with_exit_2(engine: Path, tmp_path: Path) -> None:
    other = tmp_path / "engine"
    other.mkdir()
    for file in engine.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    document = json.loads((other / MANIFEST).read_text())
    document["fingerprint"]["cpu_features"] = "amx_int8"
    (other / MANIFEST).write_text(json.dumps(document))
    process = start(other, free_port(), tmp_path)
    assert process.wait(timeout=60) == 2
    log = (tmp_path / "server.log").read_text()
    assert "built for another machine (cpu_features" in log
    assert "Traceback" not in log
