"""Limits that uvicorn lacks: slow headers or bodies, headers of any size, and the number of connections.

`Bounded` closes a connection whose request does not arrive in time, and, if there are too many connections, the one
that has been without a whole request for longest. uvicorn's own `limit_concurrency` refuses new connections instead:
clients that only hold connections would then shut out all others, including the proxy in front.
"""

import asyncio
import resource
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_WITHIN_S = 10.0
"""From the connection, or the first byte of a later request, to the end of its headers."""
BODY_WITHIN_S = 30.0
"""From there to the end of the body."""
MOST_HEADER_BYTES = 64 * 2**10
MOST_CONNECTIONS = 1000
FILES = 4096
"""File descriptors that a server requests: connections, and files of the engine's libraries."""


class Bounded(HttpToolsProtocol):  # type: ignore[misc]  # uvicorn is not in the core's environment
    """uvicorn's HTTP protocol with these limits: `uvicorn.Config(http=Bounded)`."""

    idle: ClassVar[dict["Bounded", None]] = {}
    """Connections without a whole request, longest first."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the time limit for the headers; close the longest idle connection if there are too many."""
        super().connection_made(transport)
        self._expect(HEADERS_WITHIN_S)
        if len(self.connections) > MOST_CONNECTIONS:
            next(iter(Bounded.idle)).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from the idle ones."""
        self._complete()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count received bytes; headers are limited."""
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > MOST_HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """Start a request, possibly on a reused connection."""
        self._in_headers, self._header_bytes = True, 0
        self._expect(HEADERS_WITHIN_S)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note that the headers are complete."""
        self._in_headers = False
        self._expect(BODY_WITHIN_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that the request is complete."""
        self._complete()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Note that the answer was sent; uvicorn closes the connection unless another request comes in time."""
        super().on_response_complete()
        if not self.transport.is_closing() and self._deadline is None:
            Bounded.idle[self] = None

    def _expect(self, within_s: float) -> None:
        """Set the time limit for the next event."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(within_s, self.transport.abort)
        Bounded.idle.setdefault(self, None)

    def _complete(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        Bounded.idle.pop(self, None)


def allow_files() -> None:
    """Let this process open `FILES` files, if the system allows it: a login shell's 1,024 are soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
