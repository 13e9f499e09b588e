"""Receives MLflow's registry webhooks: `python -m slipstream.orchestrate.triggers.server`.

A delivery that cannot be handled now is answered with 503, so that MLflow sends it again; deliveries that MLflow gives
up on are found by the reconciler, which runs in the same process.
"""

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from mlflow import MlflowClient
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from slipstream import traffic
from slipstream.errors import SlipstreamError, Unavailable
from slipstream.home import Home
from slipstream.orchestrate.triggers import configuration, promotion, signature, upkeep
from slipstream.orchestrate.triggers.reconcile import INTERVAL_S, keep_reconciling, models, reconcile, report_drift
from slipstream.plan import catalog
from slipstream.platform import addresses
from slipstream.platform.airflow_api import AirflowApi
from slipstream.release import watchdog
from slipstream.serving.connections import Bounded, allow_files

log = logging.getLogger(__name__)

PATH = "/webhooks/mlflow"
NAME = "slipstream"
EVENT = "model_version_alias.created"
MOST_BYTES = 2**20
"""Maximum size of a delivery; MLflow's have some hundred bytes."""
BODY_S = 10.0
"""Time limit for the whole body."""


class Alias(BaseModel):
    """The part of a delivery that says which alias points where."""

    name: str
    alias: str
    version: str


class Delivery(BaseModel):
    """MLflow's webhook document."""

    entity: str
    action: str
    data: dict[str, object]


def create_app(home: Home, client: MlflowClient, airflow: promotion.Runs, url: str, secret: str) -> FastAPI:
    """Return the receiver with its reconciler, which also registers the webhook, until MLflow accepts it.

    `url` is the base URL by which MLflow reaches the receiver, `secret` the key that MLflow signs with.
    """

    registered = threading.Event()

    def once() -> None:
        try:
            register()
        finally:  # the reconciler finds what no webhook reports
            look()

    def register() -> None:
        if not registered.is_set():
            ensure_webhook(client, url.rstrip("/") + PATH, secret)
            registered.set()

    def look() -> None:
        reconcile(home, client, airflow)
        if knows_traffic(home):
            report_drift(home, client, traffic.controller(home))

    def watch() -> None:
        if knows_traffic(home):
            watchdog.look_at_all(models(home), lambda: traffic.controller(home), client)

    def keep_up() -> None:
        upkeep.keep_up(home)

    watching = (watch, watchdog.INTERVAL_S)
    loops = {"reconciler": (once, INTERVAL_S), "watchdog": watching, "upkeep": (keep_up, upkeep.INTERVAL_S)}
    app = FastAPI(title="slipstream triggers", lifespan=_beside(loops), docs_url=None, redoc_url=None, openapi_url=None)

    def health() -> dict[str, str]:
        return {"status": "ok"}

    async def receive(request: Request) -> dict[str, list[str]]:
        body = await _genuine(request, secret)
        try:
            return {"started": await run_in_threadpool(deliver, home, client, airflow, body)}
        except ValidationError as error:
            raise HTTPException(422, "not a delivery of MLflow") from error
        except Unavailable as error:
            log.warning("webhook put off: %s", error)
            raise HTTPException(503, str(error)) from error

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route(PATH, receive, methods=["POST"])
    return app


async def _genuine(request: Request, secret: str) -> bytes:
    """Return the body of a signed delivery. An unsigned one is refused, by its headers if possible, without reading
    it."""
    headers = request.headers
    try:
        signed = signature.read_headers(
            headers.get("X-MLflow-Delivery-Id", ""),
            headers.get("X-MLflow-Timestamp", ""),
            headers.get("X-MLflow-Signature", ""),
            time.time(),
        )
        body = await _body(request)
        signature.verify(secret, signed, body)
    except signature.SignatureError as error:
        log.warning("webhook refused: %s", error)
        raise HTTPException(401, str(error)) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the body is not complete") from error
    return body


async def _body(request: Request) -> bytes:
    """Return the body of a request. Raise HTTPException as soon as it is too large or too late; ClientDisconnect."""
    _require_small(int(request.headers.get("content-length", 0)))
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                _require_small(size)
                parts.append(part)
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not come within {BODY_S:g} s") from error
    return b"".join(parts)


def _require_small(size: int) -> None:
    if size > MOST_BYTES:
        raise HTTPException(413, f"a delivery has at most {MOST_BYTES >> 20} MiB")


def deliver(home: Home, client: MlflowClient, airflow: promotion.Runs, body: bytes) -> list[str]:
    """Act on a genuine delivery; return the names of the specs whose run was started.

    The delivery only says where to look. What counts is where the alias points now: deliveries may arrive late, twice
    or in the wrong order. Raise Unavailable, and ValidationError for an unknown document.
    """
    delivery = Delivery.model_validate_json(body)
    if f"{delivery.entity}.{delivery.action}" != EVENT:
        return []
    moved = Alias.model_validate(delivery.data)
    specs = catalog.naming(home, moved.name, moved.alias)
    version = promotion.promoted_version(client, moved.name, moved.alias) if specs else None
    if version is None:
        return []
    return [spec.name for spec in specs if promotion.start(airflow, spec, version)]


def knows_traffic(home: Home) -> bool:
    """Return whether there is traffic to compare with the registry, which needs Envoy or KServe."""
    return "SLIPSTREAM_TRAFFIC" in os.environ or home.addresses_file().exists()


def ensure_webhook(client: MlflowClient, url: str, secret: str) -> None:
    """Register the webhook, or update the registered one. MLflow does not reveal secrets, so it is always set."""
    webhooks = [w for w in client.list_webhooks(max_results=100) if w.name == NAME]
    if webhooks:
        client.update_webhook(webhooks[0].webhook_id, url=url, events=[EVENT], secret=secret, status="ACTIVE")
    else:
        client.create_webhook(NAME, url, [EVENT], "Starts slipstream when an alias moves", secret, "ACTIVE")
        log.info("registered the webhook %s", url)


Loops = Mapping[str, tuple[Callable[[], None], float]]
"""Recurring calls of the receiver's process, and their intervals in seconds, by name."""


def _beside(loops: Loops) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        threads = [
            threading.Thread(target=keep_reconciling, args=(once, stop, interval_s), name=name, daemon=True)
            for name, (once, interval_s) in loops.items()
        ]
        for thread in threads:
            thread.start()
        yield
        stop.set()
        for thread in threads:
            await run_in_threadpool(thread.join, 10)

    return lifespan


def main() -> None:
    """Serve until stopped."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    home = Home.from_environment()
    try:
        config = configuration.load(home)
    except SlipstreamError as error:
        sys.stderr.write(f"{error.headline}: {error}\n")
        sys.exit(error.exit_code)
    # MLflow's client would wait minutes for a server that is down; here the next round is the retry.
    retries = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    os.environ |= {configuration.MLFLOW: config.mlflow, **retries}
    addresses.reach_mlflow(home, os.environ)
    airflow = AirflowApi(config.airflow, config.airflow_user, config.airflow_password)
    app = create_app(home, MlflowClient(), airflow, config.url, config.secret)
    allow_files()
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning", http=Bounded)


if __name__ == "__main__":
    main()
