"""Envoy's admin interface, on a Unix socket that only the platform's user can open."""

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from slipstream.errors import Unavailable
from slipstream.traffic import envoy_config
from slipstream.traffic.envoy_config import ADMIN

TIMEOUT_S = 5.0


class Admin:
    """Client of the Envoy that runs in a folder, which contains its socket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def json(self, path: str, **query: str) -> Any:
        """Return the decoded answer of a path. Raise Unavailable."""
        return json.loads(self.text(f"{path}?{urlencode(query)}"))

    def text(self, path: str) -> str:
        """Return the answer of a path. Raise Unavailable if there is none, or its status is not 200."""
        connection = _Connection(self._folder / ADMIN)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(
                f"Envoy's admin interface at {self._folder / ADMIN} does not answer: {error}; see `slipstream status`"
            ) from error
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise Unavailable(f"Envoy's admin interface at {self._folder / ADMIN} answered {response.status}: {text}")
        return text

    def ready(self) -> bool:
        """Return whether Envoy runs and has loaded its configuration."""
        try:
            self.text("/ready")
        except Unavailable:
            return False
        return True

    def ejected(self) -> dict[str, str | None]:
        """Return the fallback of each release whose server is dead or frozen, by key. Raise Unavailable.

        Without a fallback, or while that is ejected too, Envoy continues to query the server.
        """
        keys = envoy_config.ejected(self.json("/clusters", format="json"))
        routes = envoy_config.loaded_actions(self.json("/config_dump", resource="dynamic_route_configs"))
        clusters = [name.partition(envoy_config.AND) for weights, _ in routes.values() for name in weights]
        fallbacks = {key: fallback for key, _, fallback in clusters if fallback}
        return {key: fallbacks.get(key) for key in sorted(keys)}


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket, reached through its folder: a socket's own path may have 107 bytes at most."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        folder = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(TIMEOUT_S)
            self.sock.connect(f"/proc/self/fd/{folder}/{self._path.name}")
        finally:
            os.close(folder)
