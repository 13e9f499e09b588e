"""An address of its own for a process that plays a pod, so that a real API server will proxy to it.

The API server refuses to proxy to 127.0.0.0/8. The address is of the range for documentation (RFC 5737), lies on the
loopback interface, and is reached from this machine only.
"""

import itertools
import shutil
import socket
import socketserver
import subprocess
import threading

PORT = 8080
_numbers = itertools.count(10)


class PodAddress:
    """Forwards `address`:8080 to a port of 127.0.0.1, until `close()`. Needs the right to add an address."""

    def __init__(self, port: int) -> None:
        self.address = f"192.0.2.{next(_numbers)}"
        self._ip("add")
        handler = type("Handler", (_Forward,), {"port": port})
        self._server = socketserver.ThreadingTCPServer((self.address, PORT), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._ip("del")

    def _ip(self, what: str) -> None:
        command = ["ip", "address", what, f"{self.address}/32", "dev", "lo"]
        subprocess.run(command, check=what == "del", capture_output=True)  # it may be left from a killed run


class _Forward(socketserver.BaseRequestHandler):
    port: int

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as server:
            back = threading.Thread(target=_copy, args=(server, self.request), daemon=True)
            back.start()
            _copy(self.request, server)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with source.makefile("rb", buffering=0) as reader, target.makefile("wb", buffering=0) as writer:
        try:
            shutil.copyfileobj(reader, writer)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the other side is gone
