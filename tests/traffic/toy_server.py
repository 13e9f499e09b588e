"""A model server with the command line and the answer log of serving/server.py, and no model: it starts in 0.1 s.

`behaviour.json` in the engine folder says how it answers: `add` is added to the first input, `error_rate` fails,
`delay_s` waits, `broken` ends the process at once.
"""

import argparse
import json
import os
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    options: argparse.Namespace
    behaviour: dict[str, Any]
    lock = threading.Lock()
    counts: ClassVar[dict[str, int]] = {"2xx": 0, "5xx": 0}

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.reply(200, self.metrics().encode())
        else:
            self.reply(200 if self.path == "/v2/health/ready" else 404, b"{}")

    def metrics(self) -> str:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        lines = [f'slipstream_requests_total{{status="{k}"}} {v}' for k, v in self.counts.items()]
        return "\n".join([*lines, f"process_resident_memory_bytes {pages * os.sysconf('SC_PAGE_SIZE')}", ""])

    def do_POST(self) -> None:
        begun = time.perf_counter()
        content = self.rfile.read(int(self.headers["content-length"]))
        time.sleep(self.behaviour.get("delay_s", 0))
        if random.random() < self.behaviour.get("error_rate", 0):
            self.count("5xx")
            self.reply(500, b"{}")
            return
        self.count("2xx")
        tensor = json.loads(content)["inputs"][0]
        output = [float(v) for v in tensor["data"][:10]]
        output[0] += self.behaviour.get("add", 0)
        line = {
            "id": self.headers.get("x-request-id"),
            "release": self.options.release,
            "at": time.time(),
            "latency_ms": 1000 * (time.perf_counter() - begun),
            "output": [output],
        }
        if self.options.answers:
            with self.lock, self.options.answers.open("a") as log:
                log.write(json.dumps(line) + "\n")
        tensor = {"name": "output", "shape": [1, len(output)], "datatype": "FP32", "data": output}
        self.reply(200, json.dumps({"outputs": [tensor]}).encode())

    def count(self, status: str) -> None:
        with self.lock:
            self.counts[status] += 1

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-slipstream-release", self.options.release)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("model", str), ("release", str), ("engine", Path), ("port", int), ("answers", Path)):
        parser.add_argument(f"--{name}", type=kind, required=name != "answers")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--sha256")
    Handler.options = parser.parse_args()
    Handler.behaviour = json.loads((Handler.options.engine / "behaviour.json").read_text())
    if Handler.behaviour.get("broken"):
        sys.exit("this engine cannot be loaded")
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer((Handler.options.host, Handler.options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
