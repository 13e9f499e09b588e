"""An open-loop sender: requests leave at their scheduled time, whether or not earlier ones were answered.

Latency counts from the intended send time, so that a stalled server cannot delay its own measurement (coordinated
omission; G. Tene, "How NOT to measure latency", 2013). Gaps between requests are exponential, like those of many
independent users (a Poisson process): evenly spaced requests would hardly ever queue, and hide the tail.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace

import httpx
import numpy as np
import numpy.typing as npt

from slipstream.contract.arrays import Float32Array
from slipstream.data.splits import Split
from slipstream.errors import Unavailable
from slipstream.serving import client
from slipstream.traffic.base import Endpoint

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 12.0
"""Longer than the splitter's own timeout of 10 s, so the splitter reports whose answer is missing."""
WATCH_EVERY_S = 0.25
"""Interval between the guard's looks: a breach stops the load within this time plus the pending requests."""
TELL_EVERY_S = 0.5
HEARTBEAT_S = 0.01
STALL_S = 0.03
"""A heartbeat that is this late shows that this process itself had to wait for the machine."""
MAX_CONNECTIONS = 128


@dataclass(frozen=True)
class Record:
    """One request and its answer."""

    id: str
    """Its end is the request's position in its phase."""
    sample: int
    """Index into the split."""
    at: float
    """Intended send time, seconds since the epoch."""
    status: int
    """HTTP status; 0 if there was no answer."""
    release: str | None
    """Name of the release that answered."""
    output: Float32Array | None
    """(1, …) outputs; None unless the status is 200."""
    latency_ms: float
    """From the intended send time to the whole answer."""
    stalled_ms: float = 0.0
    """Part of the latency during which this process itself did not get the processor."""
    server_ms: float | None = None
    """Time in the server, if it reports it."""
    mirrored: "Record | None" = None
    """The shadow's answer, if the sender mirrors."""
    refused: bool = False
    """Whether a server refused it because of overload, which is not an error of the model."""

    @property
    def index(self) -> int:
        """The request's position in its phase, from 0."""
        return int(self.id.rpartition("-")[2])

    @property
    def served_ms(self) -> float:
        """Latency without the sender's own stalls: the network, the splitter and the server."""
        return max(self.latency_ms - self.stalled_ms, 0.0)

    @property
    def failed(self) -> bool:
        """No answer, a status of 5xx, or an invalid answer."""
        return self.output is None


@dataclass(frozen=True)
class Load:
    """The load to send."""

    endpoint: Endpoint
    model: str
    run: str
    """With the phase, the prefix of every request id."""
    phase: str
    split: Split
    requests: int
    rate_per_s: float
    seed: int
    mirror: Endpoint | None = None
    """Where a copy of every request goes, at the same time and with the same id."""

    def samples(self) -> npt.NDArray[np.intp]:
        """(requests,) indices into the split: a seeded order, repeated if the split is shorter."""
        order = np.random.default_rng(self.seed).permutation(len(self.split))
        return np.resize(order, self.requests)

    def times_s(self) -> npt.NDArray[np.float64]:
        """(requests,) seconds from the phase's start to each request: a seeded Poisson process."""
        rng = np.random.default_rng([self.seed, 1])
        times: npt.NDArray[np.float64] = np.cumsum(rng.exponential(1 / self.rate_per_s, self.requests))
        return times


@dataclass
class Sent:
    """Result of a load."""

    records: list[Record] = field(default_factory=list)
    aborted: str | None = None
    """Why the guard stopped the load before its end."""


Watch = Callable[[Sequence[Record]], str | None]
"""Called with all records so far; a reason stops the load. Runs in a separate thread, and may block."""


def send(load: Load, watch: Watch, progress: Callable[[int, int], None]) -> Sent:
    """Send a load; return when all requests were answered or timed out, or the guard stopped it.

    An exception of the guard also stops the load, and is raised. This takes at most requests / rate plus the request
    timeout.
    """
    sender = _Sender(load, watch)
    with _telling(lambda: progress(len(sender.sent.records), load.requests)):
        return asyncio.run(sender.run())


@contextmanager
def _telling(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` from time to time, in a separate thread, and once more at the end.

    It may wait for MLflow for minutes, and fail: neither may delay the sending or the guard.
    """
    over = threading.Event()

    def run() -> None:
        ended = False
        while not ended:
            ended = over.wait(TELL_EVERY_S)
            try:
                tell()
            except Exception as error:
                log.warning("traffic: nobody could be told how far the load is: %s", error)

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(TELL_EVERY_S)


@dataclass(frozen=True)
class _Begin:
    """Scheduled time of the first request."""

    clock: float
    """Seconds of the monotonic clock."""
    epoch: float
    """Seconds since the epoch."""


class _Sender:
    def __init__(self, load: Load, watch: Watch) -> None:
        self.load, self.watch = load, watch
        self.sent = Sent()
        self.stalls: list[tuple[float, float]] = []
        self.last_beat = time.perf_counter()
        self.path = client.infer_path(load.model)
        self.times_s = load.times_s()

    async def run(self) -> Sent:
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
        ends = [e for e in (self.load.endpoint, self.load.mirror) if e is not None]
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    httpx.AsyncClient(base_url=e.url, headers=e.headers, timeout=REQUEST_TIMEOUT_S, limits=limits)
                )
                for e in ends
            ]
            beat = asyncio.create_task(self._heartbeat())
            pacing = asyncio.create_task(self._pace(clients))
            guard = asyncio.create_task(self._guard())
            try:
                await asyncio.wait((pacing, guard), return_when=asyncio.FIRST_COMPLETED)
                if guard.done():
                    guard.result()
                else:
                    pacing.result()
            finally:
                for task in (beat, pacing, guard):
                    task.cancel()
                await asyncio.gather(beat, pacing, guard, return_exceptions=True)
        self.sent.aborted = self.sent.aborted or await asyncio.to_thread(self.watch, self.sent.records)
        return self.sent

    async def _pace(self, clients: Sequence[httpx.AsyncClient]) -> None:
        begin = _Begin(time.perf_counter() + 0.05, time.time() + 0.05)
        async with asyncio.TaskGroup() as group:
            for i, sample in enumerate(self.load.samples()):
                content = client.body(self.load.split.inputs[sample : sample + 1])
                await asyncio.sleep(max(0.0, begin.clock + self.times_s[i] - time.perf_counter()))
                group.create_task(self._one(clients, i, int(sample), content, begin))

    async def _one(
        self, clients: Sequence[httpx.AsyncClient], i: int, sample: int, content: bytes, begin: _Begin
    ) -> None:
        record, *copies = await asyncio.gather(*(self._ask(http, i, sample, content, begin) for http in clients))
        self.sent.records.append(replace(record, mirrored=copies[0]) if copies else record)

    async def _ask(self, http: httpx.AsyncClient, i: int, sample: int, content: bytes, begin: _Begin) -> Record:
        name = f"{self.load.run}-{self.load.phase}-{i}"
        headers = {"content-type": "application/json", client.REQUEST_ID: name}
        status, release, output, server_ms, refused = 0, None, None, None, False
        try:
            response = await http.post(self.path, content=content, headers=headers)
            status, release = response.status_code, response.headers.get(client.RELEASE) or None
            output, server_ms = _output(response), client.server_ms(response)
            refused = client.REFUSED in response.headers
        except httpx.HTTPError:
            status = 0
        end = time.perf_counter()
        intended, at = begin.clock + float(self.times_s[i]), begin.epoch + float(self.times_s[i])
        latency_ms = 1000 * (end - intended)
        stalled_ms = self._stalled_ms(intended, end)
        return Record(name, sample, at, status, release, output, latency_ms, stalled_ms, server_ms, refused=refused)

    async def _guard(self) -> None:
        while self.sent.aborted is None:
            await asyncio.sleep(WATCH_EVERY_S)
            self.sent.aborted = await asyncio.to_thread(self.watch, self.sent.records)

    async def _heartbeat(self) -> None:
        """Detects when this process did not get the processor in time."""
        while True:
            self.last_beat = time.perf_counter()
            await asyncio.sleep(HEARTBEAT_S)
            now = time.perf_counter()
            if now - self.last_beat > HEARTBEAT_S + STALL_S:
                self.stalls.append((self.last_beat, now))

    def _stalled_ms(self, begin: float, end: float) -> float:
        """Return the stalls within; a recent one may be detected here before the heartbeat detects it."""
        stalls = self.stalls[-50:]
        if end - self.last_beat > HEARTBEAT_S + STALL_S:
            stalls.append((self.last_beat, end))
        return 1000 * sum(max(min(e, end) - max(s, begin), 0.0) for s, e in stalls)


def _output(response: httpx.Response) -> Float32Array | None:
    if response.status_code != httpx.codes.OK:
        return None
    try:
        document = response.json()
        return client.outputs(document)
    except (ValueError, Unavailable):
        return None
