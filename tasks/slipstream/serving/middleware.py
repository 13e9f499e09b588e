"""The middleware of the model server: the allowed paths, the answering release, counters and the log."""

import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from prometheus_client import Counter

from slipstream.contract.arrays import Array
from slipstream.serving.answers import AnswerLog
from slipstream.serving.client import RELEASE, SERVER_MS

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

PATHS = r"/|/metrics|/v2(/health/(live|ready)|/models(/{model}(/(ready|infer))?)?)?"
IS_READY = JSONResponse({"ready": True})
"""Answer to the health check, which Envoy makes four times a second. The server listens only once its engine is
loaded."""
NOT_FOUND = JSONResponse({"error": "not found; send inference requests to POST /v2/models/NAME/infer"}, 404)

REQUESTS = Counter("slipstream_requests", "Inference requests by class of status.", ["status"])
CLASSES = ("2xx", "3xx", "4xx", "5xx")


@dataclass
class Answer:
    """The answer to a request, passed from the model to the middleware that logs it."""

    request_id: str = ""
    output: Array | None = None


ANSWER: ContextVar[Answer] = ContextVar("answer")
"""Answer to the current request."""


class Releases:
    """ASGI middleware that names the release in every response, counts, and logs every answer after it was sent."""

    def __init__(self, application: Application, model: str, release: str, log: AnswerLog | None) -> None:
        self._application = application
        self._paths = re.compile(PATHS.replace("{model}", re.escape(model)))
        self._header = (RELEASE.encode(), release.encode())
        self._log = log
        for status in CLASSES:  # so that a missing figure is never mistaken for zero
            REQUESTS.labels(status)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        started, status = time.perf_counter(), 500  # an exception is answered further out
        answer = Answer()
        ANSWER.set(answer)

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took = (SERVER_MS.encode(), f"{(time.perf_counter() - started) * 1e3:.4f}".encode())
                message["headers"] = [*message.get("headers", ()), self._header, took]
            await send(message)

        application = self._application if self._paths.fullmatch(scope["path"]) else NOT_FOUND
        if scope["path"] == "/v2/health/ready":
            application = IS_READY
        try:
            await application(scope, receive, named)
        finally:
            if scope["path"].endswith("/infer"):
                REQUESTS.labels(f"{status // 100}xx").inc()
        if answer.output is not None and self._log is not None:
            self._log.write(answer.request_id, (time.perf_counter() - started) * 1e3, answer.output)
