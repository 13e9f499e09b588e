"""The answer log of a release: one JSON line for each answered request, so that two releases can be compared.

A line is {"id", "release", "at", "latency_ms", "output"}: the request's id, the release's key, unix time, time in the
server, and the outputs (N, …): nested lists rounded to six decimals or, beyond 1,000 numbers, as for maps, {"shape",
"float32"} with the little-endian bytes in base64, which take half the space and a tenth of the time.
"""

import base64
import json
import logging
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from slipstream.contract.arrays import Array, Float32Array

log = logging.getLogger(__name__)

LIMIT_BYTES = 64 * 2**20
DECIMALS = 6
MOST_LISTED = 1000
"""Maximum numbers of an answer that are written as a list, for readers and simple tools."""


def _written(output: Array) -> object:
    if output.size <= MOST_LISTED:
        return np.round(output.astype(np.float64), DECIMALS).tolist()
    return {"shape": list(output.shape), "float32": base64.b64encode(output.astype("<f4").tobytes()).decode()}


def read_output(entry: object) -> Float32Array:
    """Return the outputs of a line, (N, …)."""
    if isinstance(entry, dict):
        return np.frombuffer(base64.b64decode(entry["float32"]), "<f4").reshape(entry["shape"])
    return np.asarray(entry, np.float32)


class AnswerLog:
    """Appends lines to a file. Past `limit_bytes` the file becomes `NAME.1`, which replaces an older one.

    A line that cannot be written, as on a full disk, is lost, with a single warning: answers matter more than their
    log.
    """

    def __init__(self, path: Path, release: str, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path = path
        self._release = release
        self._limit = limit_bytes
        self._failing = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        # Line buffered: a reader sees whole lines at once, and a line costs one write to the page cache.
        self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def write(self, request_id: str, latency_ms: float, output: Array) -> None:
        """Append one answer."""
        line = {
            "id": request_id,
            "release": self._release,
            "at": round(time.time(), 6),
            "latency_ms": round(latency_ms, 4),
            "output": _written(output),
        }
        try:
            self._append(json.dumps(line, separators=(",", ":")) + "\n")
            self._failing = False
        except (OSError, ValueError) as error:  # ValueError: a file that could not be opened again
            if not self._failing:
                log.warning("%s: answers are not logged: %s", self._path, error)
            self._failing = True
            with suppress(OSError, ValueError):
                self._file.close()
            with suppress(OSError):
                self._open()

    def _append(self, line: str) -> None:
        self._file.write(line)
        if self._file.tell() > self._limit:
            self._file.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._open()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
