"""Serves one engine over the Open Inference Protocol (V2, JSON and binary tensors) with KServe's SDK.

`python -m slipstream.serving.server --model NAME --release KEY --engine DIR --port P --answers FILE`

Only the paths of `middleware.PATHS` are answered: the SDK would also let any client unload the model, and fails (501)
where a path names a version.

Statuses of an inference request, each with `{"error": …}` unless it is 200:

    400  the request is malformed, or has more samples than a request may have (inputs.py)
    404  another model
    408  the body did not arrive in time; 413: it is larger than the largest accepted request
    422  the output holds NaN or infinity: the values overflow in this engine
    429  a limit was reached, marked by the header `x-slipstream-refused: overload`; try again later
    500  the engine failed

A refusal for overload is not a 5xx, which would blame the release: proxies eject servers for those, and the
guardrails count them. Client errors are never a 5xx either.

`/metrics` has `slipstream_requests_total{status="2xx"}` of the inference endpoint and the process's
`process_resident_memory_bytes`, in the text format of Prometheus.
"""

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import uvloop
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from kserve import Model, ModelServer
from kserve.model_server import app
from starlette.requests import ClientDisconnect

from slipstream import digests
from slipstream.contract import Json
from slipstream.contract.arrays import Array
from slipstream.engines.base import EngineManifest, Runner, load_engine, read_manifest
from slipstream.errors import DataError, EngineError, SlipstreamError
from slipstream.frameworks.base import OUTPUT
from slipstream.serving import protocol
from slipstream.serving.answers import AnswerLog
from slipstream.serving.client import REFUSED, REQUEST_ID, infer_path
from slipstream.serving.connections import Bounded, allow_files
from slipstream.serving.inputs import Inputs
from slipstream.serving.middleware import ANSWER, Releases
from slipstream.serving.protocol import MOST_ID, BadRequest

log = logging.getLogger(__name__)

WARM_UP = 20
WARM_UP_LENGTH = 16
"""Tokens of the warm-up's text if the target has no lengths."""
GRACE_S = 10
MOST_WAIT_S = 8.0
"""A request that waits longer for the engine is refused: less than Envoy's 10 s, after which the answer is
discarded."""
MOST_WAITING = 256
"""Maximum number of requests that wait for the engine; as many as Envoy has connections to a server."""
MOST_HELD_BYTES = 256 * 2**20
"""Limit for all bodies that are being read or answered."""
BODY_IDLE_S, BODY_S = 5.0, 25.0
"""Between two parts of a body, and for all of it."""
INLINE_MS = 5.0
"""Inferences up to about this long run in the event loop: switching to a thread and back takes longer."""
DECODE_INLINE_BYTES = 256 * 2**10
"""Bodies up to this size are decoded in the event loop, for the same reason."""


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
        self._waiting = 0
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

    def get_input_types(self) -> list[Json]:
        """Return input tensors for the protocol's metadata."""
        return self._inputs.types()

    def get_output_types(self) -> list[Json]:
        """Return the output tensor for the protocol's metadata."""
        return [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, *self._manifest.output_shape]}]

    async def answer(self, request: protocol.Request, batch: Array, request_id: str) -> Response:
        """Run the engine and encode its output. Raise BadRequest, Refused."""
        try:
            output = await self._run(batch)
        except DataError as error:  # a text of token ids that is too long for the engine
            raise BadRequest(f"inputs[0]: {error}") from error
        if not np.isfinite(output).all():
            raise Refused(422, "the output holds NaN or infinity: the values overflow in this engine")
        answer = ANSWER.get()
        answer.request_id, answer.output = request_id, output
        content, headers = protocol.encode(self.name, request_id, output, request.binary)
        return Response(content, headers=headers)

    async def _run(self, batch: Array) -> Array:
        """Return the outputs of a batch (N, …). Other requests run between any two of the target's largest batches."""
        most = self._manifest.target.batch[-1]
        if len(batch) <= most:
            return await self._one(batch)
        return np.concatenate([await self._one(batch[n : n + most]) for n in range(0, len(batch), most)])

    async def _one(self, batch: Array) -> Array:
        await self._take_turn()  # a runner serves one thread at a time
        try:
            if self._ms_per_value * batch.size <= INLINE_MS:
                return self._runner.run(batch)
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._runner.run, batch)
        finally:
            self._turn.release()

    async def _take_turn(self) -> None:
        if not self._turn.locked():
            await self._turn.acquire()
            return
        if self._waiting >= MOST_WAITING:
            raise Overload(f"{MOST_WAITING} requests are waiting for the engine")
        self._waiting += 1
        try:
            async with asyncio.timeout(MOST_WAIT_S):
                await self._turn.acquire()
        except TimeoutError:
            raise Overload(f"the request waited for more than {MOST_WAIT_S:g} s") from None
        finally:
            self._waiting -= 1


class Refused(Exception):
    """Refused with this status and reason."""

    headers: dict[str, str] | None = None

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Overload(Refused):
    """The server cannot answer all requests in time."""

    headers = {REFUSED: "overload", "retry-after": "1"}  # noqa: RUF012 (read only)

    def __init__(self, reason: str) -> None:
        super().__init__(429, f"{reason}; send fewer at a time")


class Server(ModelServer):  # type: ignore[misc]  # kserve has no type information
    """KServe's server on one address, HTTP only, one process, without a log line for each request.

    Its inference endpoint is replaced: FastAPI and the SDK read and write JSON with the standard library, which takes
    0.8 ms for 784 numbers where orjson takes 0.03 ms (measured on a busy machine), and validate too late (protocol.py).
    """

    def __init__(self, host: str, port: int, model: EngineModel, inputs: Inputs) -> None:
        super().__init__(
            http_port=port, workers=1, enable_grpc=False, enable_latency_logging=False, grace_period=GRACE_S
        )
        self._host = host
        self._model, self._inputs = model, inputs
        self._most_bytes = inputs.most_bytes()
        self._held_bytes = 0
        app.add_api_route(infer_path("{model_name}"), self.infer, methods=["POST"])
        for chatty in ("kserve.trace", "uvicorn.access"):
            logging.getLogger(chatty).handlers.clear()
            logging.getLogger(chatty).propagate = False

    async def infer(self, request: Request) -> Response:
        """Answer an inference request, in JSON or with binary tensors. Raise BadRequest, Refused."""
        request_id = request.headers.get(REQUEST_ID, "")
        if len(request_id) > MOST_ID:
            raise BadRequest(f"{REQUEST_ID}: has {len(request_id)} characters; {MOST_ID} are taken")
        held = _Held(self)
        try:
            body = await self._body(request, held)
            decoded, batch = await self._decoded(body, request)
            return await self._model.answer(decoded, batch, request_id or decoded.id)
        except ClientDisconnect:
            return Response(status_code=400)  # unused
        except (BadRequest, Refused):
            raise
        except Exception as error:  # one line for each request; supervisord rotates the log
            log.error("%s: %s: %s", self._model.name, type(error).__name__, str(error)[:500])
            raise Refused(500, "the engine failed; the server's log says why") from error
        finally:
            held.release()

    async def _decoded(self, body: bytes, request: Request) -> tuple[protocol.Request, Array]:
        def decode() -> tuple[protocol.Request, Array]:
            decoded = protocol.decode(body, request.headers)
            return decoded, self._inputs.batch(decoded.tensor)

        return decode() if len(body) <= DECODE_INLINE_BYTES else await asyncio.to_thread(decode)

    async def _body(self, request: Request, held: "_Held") -> bytes:
        """Return the request's body. Raise Refused as soon as it is too large or too late, Overload,
        ClientDisconnect."""
        self._require_small(_length(request))
        parts, size = [], 0
        stream = aiter(request.stream())
        try:
            async with asyncio.timeout(BODY_S) as whole:
                while True:
                    async with asyncio.timeout(BODY_IDLE_S):
                        part = await anext(stream, None)
                    if part is None:
                        break
                    size += len(part)
                    self._require_small(size)
                    held.add(len(part))
                    parts.append(part)
        except TimeoutError:
            late = f"{BODY_S:g} s" if whole.expired() else f"{BODY_IDLE_S:g} s after its last part"
            raise Refused(408, f"the body did not come within {late}") from None
        return b"".join(parts)

    def _require_small(self, size: int) -> None:
        if size > self._most_bytes:
            most = f"{self._most_bytes / 2**20:.3g} MiB"
            raise Refused(413, f"the request is larger than {most}; send fewer samples at a time")

    def setup_event_loop(self) -> None:
        """Use uvloop. KServe's own method configures a loop that `start` then does not run."""
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

    async def _serve(self) -> None:
        # KServe listens on every address, with uvicorn's own protocol, and has no options for either.
        self._rest_server.config.host = self._host
        self._rest_server.config.http = Bounded
        await super()._serve()


class _Held:
    """Bytes that one request holds, included in the total of all."""

    def __init__(self, server: Server) -> None:
        self._server, self._size = server, 0

    def add(self, size: int) -> None:
        """Raise Overload if all requests together hold too much."""
        if self._server._held_bytes + size > MOST_HELD_BYTES:
            raise Overload(f"all requests together hold more than {MOST_HELD_BYTES >> 20} MiB")
        self._server._held_bytes += size
        self._size += size

    def release(self) -> None:
        """Release the bytes when the request is answered."""
        self._server._held_bytes -= self._size
        self._size = 0


def _length(request: Request) -> int:
    """Return the client's content length, or 0 if it gives none. The HTTP parser has checked the number."""
    return int(request.headers.get("content-length", 0))


async def refused(request: Request, error: Exception) -> JSONResponse:
    """Return status 400 for a BadRequest, its own for a Refused."""
    if isinstance(error, Refused):
        return JSONResponse({"error": str(error)}, error.status, error.headers)
    return JSONResponse({"error": str(error)}, 400)


def serve(arguments: argparse.Namespace) -> None:
    """Load the engine and serve until SIGTERM. Raise EngineError if the engine may not be loaded here.

    Nothing of the folder is read before its digest is verified to be that of the judged engine.
    """
    if arguments.sha256 is not None and (engine_sha256 := digests.folder(arguments.engine)) != arguments.sha256:
        raise EngineError(
            f"{arguments.engine}: sha256 {engine_sha256[:12]}… is not {arguments.sha256[:12]}… that was judged; deploy "
            "it again"
        )
    manifest = read_manifest(arguments.engine)
    runner = load_engine(arguments.engine)
    inputs = Inputs(manifest, arguments.engine)
    model = EngineModel(arguments.model, manifest, runner, inputs)
    model.load()
    allow_files()
    answers = AnswerLog(arguments.answers, arguments.release) if arguments.answers else None
    server = Server(arguments.host, arguments.port, model, inputs)
    app.add_middleware(Releases, model=arguments.model, release=arguments.release, log=answers)
    for kind in (BadRequest, Refused):
        app.add_exception_handler(kind, refused)
    try:
        server.start([model])
    finally:
        if answers is not None:
            answers.close()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="slipstream.serving.server", allow_abbrev=False, description=__doc__)
    parser.add_argument("--model", required=True, help="model name in the protocol")
    parser.add_argument("--release", required=True, help="key of the release, sent back in every response")
    parser.add_argument("--engine", required=True, type=Path, help="engine folder")
    parser.add_argument("--sha256", help="digest of the engine folder; another engine is refused")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--answers", type=Path, help="answer log (JSON lines); none is written without it")
    parser.add_argument("--host", default="127.0.0.1")
    return parser.parse_args(argv)


def main() -> None:
    """Run the server; exit with 2 if the engine is refused."""
    try:
        serve(parse(sys.argv[1:]))
    except SlipstreamError as error:
        sys.stderr.write(f"{error.headline}: {error}\n")
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
