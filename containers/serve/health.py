"""Health of the container: a model server (the first process has `--port`) must be ready, a step must be able to write.

Standard library only, and nothing of it that is slow to import: it runs every 30 s during measurements.
"""

import http.client
import os
import sys
from pathlib import Path

READY = "/v2/health/ready"
"""The Open Inference Protocol's own question."""


def port(arguments: list[str]) -> int | None:
    """Port that a command line names."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag == "--port":
            return int(value)
        if flag.startswith("--port="):
            return int(flag.partition("=")[2])
    return None


def main() -> int:
    """0 when healthy."""
    number = port(Path("/proc/1/cmdline").read_text(encoding="utf-8").split("\0"))
    if number is None:
        return 0 if os.access(os.environ["SLIPSTREAM_HOME"], os.W_OK) else 1
    connection = http.client.HTTPConnection("127.0.0.1", number, timeout=5)
    try:
        connection.request("GET", READY)
        return 0 if connection.getresponse().status == 200 else 1
    except OSError as error:
        print(f"port {number}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
