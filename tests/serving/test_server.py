"""The real server, as its own process. Runs in the serve environment; the candidate comes from the torch one."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
from tests.conftest import ROOT, free_port, wait_for
from tests.engines.images import CLASSES, SHAPE, samples

from slipstream import digests
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
    options["sha256"] = digests.folder(engine)
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


def test_bytes_that_were_not_judged_are_refused_before_they_are_read(engine: Path, tmp_path: Path) -> None:
    """The engine's own manifest agrees with the changed file; what stage 1 judged does not."""
    judged, changed = digests.folder(engine), tmp_path / "engine"
    shutil.copytree(engine, changed)
    manifest = json.loads((changed / MANIFEST).read_text())
    name = max(manifest["files"], key=lambda file: (changed / file).stat().st_size)
    content = bytearray((changed / name).read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (changed / name).write_bytes(content)
    manifest["files"][name] = digests.file(changed / name)
    (changed / MANIFEST).write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "slipstream.serving.server", "--model", MODEL, "--release", RELEASE]
    command += ["--engine", str(changed), "--sha256", judged, "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert f"sha256 {digests.folder(changed)[:12]}… is not {judged[:12]}… that was judged" in done.stderr


@pytest.mark.parametrize("batch", [1, 3, 64], ids=["single", "batch", "the largest batch, in parts"])
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


def extended(**entries: object) -> bytes:
    return json.dumps(json.loads(client.body(samples(1))) | entries).encode()


BINARY_TEXT = {"name": "output", "parameters": {"binary_data": "yes"}}
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
    "strings": (changed(data=["0.5"] * 256), "not [1, 1, 16, 16] values of FP32"),
    "booleans": (changed(data=[True] * 256), "not [1, 1, 16, 16] values of FP32"),
    "a boolean among numbers": (changed(data=[0.5] * 255 + [True]), "not [1, 1, 16, 16] values of FP32"),
    "nested too deep": (changed(data=[[[[[0.5]]]]] * 256), "not [1, 1, 16, 16] values of FP32"),
    "too many samples": (changed(shape=[65, *SHAPE], data=[0.5] * 65 * 256), "a request may have 64, 4 times"),
    "an id that is no string": (extended(id=5), "id is not a string of at most 256"),
    "a long id": (extended(id="x" * 257), "id is not a string of at most 256"),
    "a nested id": (extended(id=[[[]]]), "id is not a string of at most 256"),
    "outputs that are no list": (extended(outputs={"name": "output"}), "outputs is not a list"),
    "an unknown output": (extended(outputs=[{"name": "other"}]), "only output is 'output'"),
    "an output twice": (extended(outputs=[{"name": "output"}] * 2), "the model has one, 'output'; 2 are"),
    "parameters of an output": (extended(outputs=[{"name": "output", "parameters": 5}]), "not an object of scalars"),
    "binary_data as text": (extended(outputs=[BINARY_TEXT]), "true or false; got yes"),
    "parameters of a request": (extended(parameters=[1]), "not an object of scalars"),
    "bytes that do not follow": (changed(parameters={"binary_data_size": 4}, data=None), "data is not a list"),
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
    "parameters of an output": binary(TENSOR | RAW, outputs=[{"name": "output", "parameters": 5}]),
    "an output 100,000 times": binary(TENSOR | RAW, outputs=[{"name": "output"}] * 100_000),
    "an output 1,000 times": binary(TENSOR | RAW, outputs=[{"name": "output"}] * 1000),
    "an id nested deep": binary(TENSOR | RAW, id=json.loads("[" * 300 + "]" * 300)),
    "10,000 samples": binary(TENSOR | RAW | {"shape": [10_000, *SHAPE]}),
    "no length": (b"{}", {"inference-header-content-length": "-1"}),
    "a length beyond the body": (b"{}", {"inference-header-content-length": "100"}),
    "a length of 5,000 digits": (b"{}", {"inference-header-content-length": "1" * 5000}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_binary_request_gets_400_too(server: Running, case: str) -> None:
    content, headers = BROKEN[case]
    response = server.post(content, **headers)
    assert response.status_code == (413 if "100,000" in case else 400)
    assert response.json().keys() == {"error"}
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
    """This engine's largest request is 64 samples of 256 values, in JSON 32 bytes each."""
    for content in (b" " * 2**20, iter([b" " * 2**19, b" " * 2**19])):  # with its length, and in chunks
        response = server.http.post(client.infer_path(MODEL), content=content)
        assert response.status_code == 413
        assert "larger than 0.562 MiB" in response.json()["error"]
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


def slow_model(seconds: float = 0.2, greatest: int = 16) -> tuple[Any, list[int]]:
    """A model whose engine takes so long for each call, and the sizes of the batches that it ran."""
    from slipstream.serving import server as module

    ran: list[int] = []

    class Slow:
        def run(self, batch: np.ndarray) -> np.ndarray:
            ran.append(len(batch))
            time.sleep(seconds)
            return batch

    manifest = SimpleNamespace(target=Target(engine="openvino", batch=(1, 1, greatest)))
    model = module.EngineModel(MODEL, cast(Any, manifest), Slow(), cast(Any, None))
    model._ms_per_value = 1e6  # so that it runs outside the event loop
    return model, ran


def test_a_request_that_waited_too_long_is_refused_and_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.serving import server as module

    monkeypatch.setattr(module, "MOST_WAIT_S", 0.3)
    model, ran = slow_model()

    async def ask() -> list[Any]:
        return await asyncio.gather(*(model._run(np.zeros(1)) for _ in range(6)), return_exceptions=True)

    refused = [r for r in asyncio.run(ask()) if isinstance(r, module.Refused)]
    assert {(r.status, r.headers[client.REFUSED]) for r in refused} == {(429, "overload")}
    assert 1 <= len(refused) == 6 - len(ran) <= 5


def test_a_request_is_refused_at_once_where_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.serving import server as module

    monkeypatch.setattr(module, "MOST_WAITING", 2)
    model, ran = slow_model()

    async def ask() -> list[Any]:
        return await asyncio.gather(*(model._run(np.zeros(1)) for _ in range(6)), return_exceptions=True)

    refused = [r for r in asyncio.run(ask()) if isinstance(r, module.Overload)]
    assert (len(refused), len(ran)) == (3, 3)


def test_a_long_batch_lets_others_have_their_turn() -> None:
    model, ran = slow_model(0.02, greatest=4)

    async def ask() -> Any:
        long = asyncio.create_task(model._run(np.arange(15)))
        await asyncio.sleep(0)
        await model._run(np.zeros(1))
        assert not long.done()
        return await long

    np.testing.assert_array_equal(asyncio.run(ask()), np.arange(15))
    assert ran == [4, 1, 4, 4, 3]


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
    document["fingerprint"]["openvino"] = "9999.1.0"
    (other / MANIFEST).write_text(json.dumps(document))
    process = start(other, free_port(), tmp_path)
    assert process.wait(timeout=60) == 2
    log = (tmp_path / "server.log").read_text()
    assert "built for another machine (openvino: built with '9999.1.0'" in log
    assert "Traceback" not in log


def test_an_output_that_overflows_is_an_error_and_not_an_answer() -> None:
    """JSON has no infinity: KServe's encoder wrote null. The values are the client's, so it is no 5xx."""
    from slipstream.serving import protocol
    from slipstream.serving import server as module

    model, _ = slow_model(0)
    request = protocol.decode(client.body(samples(1)), {})
    for value in (np.inf, np.nan):
        with pytest.raises(module.Refused, match="overflow in this engine") as refusal:
            asyncio.run(model.answer(request, np.full((1, 4), value, np.float32), "id"))
        assert refusal.value.status == 422


def test_a_long_request_id_is_refused(server: Running) -> None:
    assert server.post(client.body(samples(1)), x_request_id="x" * 257).status_code == 400


def test_what_clients_do_wrong_fills_no_log(server: Running) -> None:
    before = server.log.stat().st_size
    for content in (b"{", changed(data=["a"]), extended(outputs=[{"name": "other"}])):
        server.post(content)
    server.http.post(client.infer_path("other"), content=b"{}")
    server.http.get("/v2/models/other/ready")
    server.http.get(client.infer_path(MODEL))
    assert server.log.stat().st_size == before
