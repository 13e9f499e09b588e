"""Serves one engine over the Open Inference Protocol (V2, JSON and binary tensors) with KServe's SDK.

`python -m slipstream.serving.server --model NAME --release KEY --engine DIR --port P --answers FILE`

Only the paths of `PATHS` are answered: the SDK would also let any client unload the model, and fails (501) where a path
names a version.

`/metrics` has, beside the SDK's own figures, `slipstream_requests_total{status="2xx"}` of the inference endpoint and
the process's `process_resident_memory_bytes`, in the text format of Prometheus.
"""

import argparse
import asyncio
import logging
import re
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import uvloop
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER, PredictorProtocol
from kserve.errors import ModelNotReady
from kserve.model_server import app
from kserve.protocol.rest.v2_datamodels import InferenceRequest
from prometheus_client import Counter

from slipstream.engines.base import EngineManifest, Runner, load_engine, read_manifest
from slipstream.errors import DataError, SlipstreamError
from slipstream.frameworks.base import OUTPUT
from slipstream.serving.answers import AnswerLog
from slipstream.serving.client import RELEASE, REQUEST_ID, SERVER_MS, infer_path
from slipstream.serving.inputs import BadRequest, Inputs

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

WARM_UP = 20
WARM_UP_LENGTH = 16
"""Tokens of the warm-up's text where the target has no lengths."""
GRACE_S = 10
PATHS = re.compile(r"/|/metrics|/v2(/health/(live|ready)|/models(/[^/]+(/(ready|infer))?)?)?")
NOT_HERE = JSONResponse({"error": "not here; a model is asked at POST /v2/models/NAME/infer"}, 404)
MOST_BYTES = 64 * 2**20
"""Of a request's body; what is larger is refused (413) before it is read to its end."""
MOST_WAIT_S = 10.0
"""A request that waited longer for the engine is refused (503): whoever asked has given up, as Envoy does by then, and
answering it would keep the others waiting."""
INLINE_MS = 5.0
"""Inferences up to about this long run in the event loop: a hop to a thread and back costs more than they take."""


REQUESTS = Counter("slipstream_requests", "Inference requests by class of status.", ["status"])
CLASSES = ("2xx", "3xx", "4xx", "5xx")


@dataclass
class Answer:
    """What a request was answered with, handed from the model to the middleware that logs it."""

    request_id: str = ""
    output: npt.NDArray[Any] | None = None


_answer: ContextVar[Answer] = ContextVar("answer")


class EngineModel(Model):  # type: ignore[misc]  # kserve has no type information
    """An engine as a KServe model."""

    def __init__(self, name: str, manifest: EngineManifest, runner: Runner, inputs: Inputs) -> None:
        super().__init__(name)
        self._manifest = manifest
        self._runner = runner
        self._inputs = inputs
        # Longer inferences run here, so that health checks are answered meanwhile.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._turn = asyncio.Lock()
        self._ms_per_value = 0.0

    def load(self) -> bool:
        """Run the engine a few times at each length, since first runs compile and allocate; then it is ready."""
        for length in self._manifest.target.lengths or (WARM_UP_LENGTH,):
            shape = [length if size == -1 else size for size in self._manifest.input_shape]
            sample = np.ones((1, *shape), self._manifest.input_dtype)
            times = []
            for _ in range(WARM_UP):
                started = time.perf_counter()
                self._runner.run(sample)
                times.append((time.perf_counter() - started) * 1e3)
            self._ms_per_value = float(np.median(times)) / sample.size
        self.ready = True
        return True

    def get_input_types(self) -> list[dict[str, Any]]:
        """Input tensors for the protocol's metadata."""
        return self._inputs.types()

    def get_output_types(self) -> list[dict[str, Any]]:
        """Output tensor for the protocol's metadata."""
        return [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, *self._manifest.output_shape]}]

    async def predict(self, payload: InferRequest, headers: dict[str, str] | None = None) -> InferResponse:
        """Answer one request. Raises BadRequest, which becomes status 400."""
        try:
            output = await self._run(self._inputs.batch(payload))
        except DataError as error:  # a text of token ids that is too long for the engine
            raise BadRequest(f"inputs[0]: {error}") from error
        answer = _answer.get()
        answer.request_id = (headers or {}).get(REQUEST_ID) or payload.id or ""
        answer.output = output
        tensor = InferOutput(name=OUTPUT, shape=list(output.shape), datatype="FP32")
        tensor.set_data_from_numpy(output, binary_data=bool(payload.use_binary_outputs))
        return InferResponse(
            response_id=answer.request_id,
            model_name=self.name,
            infer_outputs=[tensor],
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )

    async def _run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        asked = time.monotonic()
        async with self._turn:  # a runner serves one thread at a time
            if time.monotonic() - asked > MOST_WAIT_S:
                raise Refused(503, f"the request waited for more than {MOST_WAIT_S:g} s; send fewer at a time")
            if self._ms_per_value * batch.size <= INLINE_MS:
                return self._runner.run(batch)
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._runner.run, batch)


class Refused(Exception):
    """Answered with this status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Releases:
    """ASGI middleware that names the release in every response, counts, and logs every answer after it was sent."""

    def __init__(self, application: Application, release: str, log: AnswerLog | None) -> None:
        self._application = application
        self._header = (RELEASE.encode(), release.encode())
        self._log = log
        for status in CLASSES:  # so that a figure that is missing is never taken for none
            REQUESTS.labels(status)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        started, status = time.perf_counter(), 500  # an exception is answered further out
        answer = Answer()
        _answer.set(answer)

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took = (SERVER_MS.encode(), f"{(time.perf_counter() - started) * 1e3:.4f}".encode())
                message["headers"] = [*message.get("headers", ()), self._header, took]
            await send(message)

        application = self._application if PATHS.fullmatch(scope["path"]) else NOT_HERE
        try:
            await application(scope, receive, named)
        finally:
            if scope["path"].endswith("/infer"):
                REQUESTS.labels(f"{status // 100}xx").inc()
        if answer.output is not None and self._log is not None:
            self._log.write(answer.request_id, (time.perf_counter() - started) * 1e3, answer.output)


class Server(ModelServer):  # type: ignore[misc]  # kserve has no type information
    """KServe's server on one address, HTTP only, one process, without a line for each request.

    Its inference endpoint is replaced: FastAPI reads and writes JSON with the standard library, which takes 0.8 ms
    for 784 numbers where orjson takes 0.03 ms (measured on a busy machine).
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            http_port=port, workers=1, enable_grpc=False, enable_latency_logging=False, grace_period=GRACE_S
        )
        self._host = host
        app.add_api_route(infer_path("{model_name}"), self.infer, methods=["POST"])
        for chatty in ("kserve.trace", "uvicorn.access"):
            logging.getLogger(chatty).handlers.clear()
            logging.getLogger(chatty).propagate = False

    async def infer(self, model_name: str, request: Request) -> Response:
        """Answer an inference request, in JSON or with binary tensors. Raises BadRequest, Refused, ModelNotFound."""
        headers, body = dict(request.headers), await _body(request)
        if not await self.dataplane.model_ready(model_name, disable_predictor_health_check=True):
            raise ModelNotReady(model_name)
        decoded = self._decode(body, headers, model_name)
        response, extra = await self.dataplane.infer(model_name=model_name, request=decoded, headers=headers)
        encoded, more = self.dataplane.encode(model_name, response, headers, req_attributes={})
        if isinstance(encoded, bytes):
            return Response(encoded, headers={**extra, **more}, media_type="application/octet-stream")
        return Response(orjson.dumps(encoded), headers={**extra, **more}, media_type="application/json")

    def _decode(self, body: bytes, headers: dict[str, str], model_name: str) -> InferRequest:
        binary = INFERENCE_CONTENT_LENGTH_HEADER in headers
        try:
            content = body if binary else InferenceRequest.model_validate(orjson.loads(body))
            decoded, _ = self.dataplane.decode(content, headers, PredictorProtocol.REST_V2.value, model_name)
            _ = decoded.use_binary_outputs  # fails where parameters are no object
        except Exception as error:  # KServe's decoder raises what it stumbles over: AttributeError, struct.error, …
            raise BadRequest(f"not an Open Inference Protocol V2 request: {error}") from error
        return decoded

    def setup_event_loop(self) -> None:
        """Use uvloop. KServe's own method configures a loop that `start` then does not run."""
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

    async def _serve(self) -> None:
        # KServe listens on every address and has no option for it.
        self._rest_server.config.host = self._host
        await super()._serve()


async def _body(request: Request) -> bytes:
    """The request's body. Raises Refused as soon as it is too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise Refused(413, f"the request is larger than {MOST_BYTES >> 20} MiB; send fewer samples at a time")
        parts.append(part)
    return b"".join(parts)


async def refused(request: Request, error: Exception) -> JSONResponse:
    """Status 400 for a BadRequest, its own for a Refused."""
    return JSONResponse({"error": str(error)}, error.status if isinstance(error, Refused) else 400)


def serve(arguments: argparse.Namespace) -> None:
    """Load the engine and serve until SIGTERM. Raises EngineError when the engine may not be loaded here."""
    manifest = read_manifest(arguments.engine)
    runner = load_engine(arguments.engine)
    model = EngineModel(arguments.model, manifest, runner, Inputs(manifest, arguments.engine))
    model.load()
    log = AnswerLog(arguments.answers, arguments.release) if arguments.answers else None
    server = Server(arguments.host, arguments.port)
    app.add_middleware(Releases, release=arguments.release, log=log)
    for kind in (BadRequest, Refused):
        app.add_exception_handler(kind, refused)
    try:
        server.start([model])
    finally:
        if log is not None:
            log.close()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="slipstream.serving.server", allow_abbrev=False, description=__doc__)
    parser.add_argument("--model", required=True, help="model name in the protocol")
    parser.add_argument("--release", required=True, help="key of the release, sent back in every response")
    parser.add_argument("--engine", required=True, type=Path, help="engine folder")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--answers", type=Path, help="answer log (JSON lines); none is written without it")
    parser.add_argument("--host", default="127.0.0.1")
    return parser.parse_args(argv)


def main() -> None:
    """Exit 2 when the engine is refused."""
    try:
        serve(parse(sys.argv[1:]))
    except SlipstreamError as error:
        sys.stderr.write(f"{error.headline}: {error}\n")
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
