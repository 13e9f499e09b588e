"""Files and folders by URI, local paths and s3:// alike. The only place that accesses S3.

Every error names the URI: DataError if a retry does not help (credentials, no such bucket, damaged bytes), Unavailable
if it may; before that an operation is retried for about a minute (retries.py). Writes are atomic. A relative path is
relative to the current folder.
"""

from pathlib import Path

from slipstream.errors import DataError
from slipstream.storage import local
from slipstream.storage.base import Entry, Store

__all__ = [
    "Entry",
    "delete",
    "entries",
    "exists",
    "fetch",
    "fetch_folder",
    "is_remote",
    "join",
    "list_uris",
    "read_entry",
    "read_text",
    "upload",
    "write_text",
]


def is_remote(uri: str) -> bool:
    """Return whether `uri` is in S3 rather than a path. Raise DataError for another scheme."""
    scheme, separator, _ = uri.partition("://")
    if separator and scheme != "s3":
        raise DataError(f"{uri}: {scheme}:// is not supported; give a local path or an s3:// URI")
    return bool(separator)


def join(base: str, *names: str) -> str:
    """Return the URI of something below `base`."""
    return "/".join([base.rstrip("/"), *names]) if is_remote(base) else str(Path(base, *names))


def fetch(uri: str) -> Path:
    """Return a file on this machine with the content of `uri`, verified.

    From S3 it is a copy in the cache, which stays for as long as this process lives. Do not change it.
    """
    return _store(uri).fetch(uri)


def fetch_folder(uri: str) -> Path:
    """Return a folder on this machine with the content of `uri`, which `upload` stored; otherwise as `fetch`."""
    return _store(uri).fetch_folder(uri)


def read_text(uri: str) -> str:
    """Return the text of a small file."""
    return _text(uri, _store(uri).read(uri))


def read_entry(entry: Entry) -> str:
    """Return the text of a small file that `entries` found, without a request if this version was read here before."""
    return _text(entry.uri, _store(entry.uri).read_entry(entry))


def write_text(uri: str, text: str) -> None:
    """Write a small file; missing folders are created."""
    _store(uri).write(uri, text.encode())


def exists(uri: str) -> bool:
    """Return whether a file, or a folder that was stored completely, exists."""
    return _store(uri).exists(uri)


def delete(uri: str) -> None:
    """Remove a file, if it exists."""
    _store(uri).delete(uri)


def entries(prefix: str) -> list[Entry]:
    """Return files below the folder `prefix`, at any depth and in order; hidden ones (`.x`) are left out."""
    return [entry for entry in _store(prefix).entries(prefix) if not entry.uri.rpartition("/")[2].startswith(".")]


def list_uris(prefix: str) -> list[str]:
    """Return URIs of the files that `entries` finds."""
    return [entry.uri for entry in entries(prefix)]


def upload(path: Path, uri: str) -> str:
    """Store a file or a folder at `uri`, replacing existing content; return its sha256 (digests.py).

    A folder that is being replaced is missing for readers in between.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder to upload")
    return _store(uri).upload(path, uri)


def _text(uri: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not UTF-8 text: {error}") from error


def _store(uri: str) -> Store:
    if not is_remote(uri):
        return local
    from slipstream.storage import remote  # boto3 takes a while to import

    return remote
