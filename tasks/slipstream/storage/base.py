"""Functions of a kind of storage. Local folders (local.py) and S3 (remote.py) are two modules with these functions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """A file in a listing."""

    uri: str
    version: str
    """Changes when the content does."""
    modified: float
    """Time of the last write, in seconds since the epoch."""
    size_bytes: int


class Store(Protocol):
    """Functions of a storage module. All raise DataError and Unavailable, with the URI in the message."""

    def fetch(self, uri: str) -> Path: ...
    def fetch_folder(self, uri: str) -> Path: ...
    def read(self, uri: str) -> bytes: ...
    def read_entry(self, entry: Entry) -> bytes: ...
    def write(self, uri: str, content: bytes) -> None: ...
    def exists(self, uri: str) -> bool: ...
    def delete(self, uri: str) -> None: ...
    def entries(self, prefix: str) -> list[Entry]: ...
    def upload(self, path: Path, uri: str) -> str: ...
