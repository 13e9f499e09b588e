"""Files and folders in S3, with the local cache in front.

A folder consists of its files and, written last, a manifest with their digests: a folder without one counts as missing.
The files keep their names, so that other tools, including KServe's storage initializer, can also read such a folder.
"""

from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from pydantic import ValidationError

from slipstream import digests
from slipstream.contract import Document, digest
from slipstream.errors import DataError
from slipstream.storage import cache, s3
from slipstream.storage.base import Entry

MANIFEST = digests.STORED
"""Name of a folder's manifest."""


class _Replaced(Exception):
    """An object is not the one that was listed."""


class File(Document):
    """A file of a folder."""

    sha256: str
    size_bytes: int


class Manifest(Document):
    """Contents of a folder."""

    sha256: str
    """Digest of the folder, as `digests.folder` computes it."""
    files: dict[str, File]
    """By path relative to the folder."""


def fetch(uri: str) -> Path:
    """Return a copy of an object."""
    stored = s3.require(uri)
    # Without a digest of ours, the store's own version of this object distinguishes it from all others.
    key = stored.sha256 or digest([s3.endpoint(), uri, stored.etag, stored.size_bytes])
    is_intact = (lambda path: digests.file(path) == key) if stored.sha256 else None
    return cache.obtain(key, _name(uri), lambda path: s3.download(uri, path, stored), is_intact)


def fetch_folder(uri: str) -> Path:
    """Return a copy of a folder."""
    manifest = _manifest(uri)
    if manifest is None:
        raise DataError(f"{uri}: there is no such folder, or its upload was not finished (it has no {MANIFEST})")

    def download(path: Path) -> None:
        path.mkdir()
        for name, file in manifest.files.items():
            to = path / name
            to.parent.mkdir(parents=True, exist_ok=True)
            s3.download(_below(uri, name), to, s3.Stat(file.size_bytes, "", file.sha256, None))
        if digests.folder(path) != manifest.sha256:
            raise DataError(f"{uri}: its files do not make up what its {MANIFEST} says; upload it again")

    return cache.obtain(manifest.sha256, _name(uri), download, lambda path: digests.folder(path) == manifest.sha256)


def read(uri: str) -> bytes:
    """Return an object's bytes; they are not cached."""
    return s3.read(uri)[0]


def read_entry(entry: Entry) -> bytes:
    """Return a listed object's bytes, from the cache if this version was read before."""

    def download(path: Path) -> None:
        content, stored = s3.read(entry.uri)
        if stored.etag != entry.version:
            raise _Replaced
        path.write_bytes(content)

    key = digest([s3.endpoint(), entry.uri, entry.version])
    try:
        with cache.borrowed(key, _name(entry.uri), download) as path:
            return path.read_bytes()
    except _Replaced:  # since it was listed
        return read(entry.uri)


def write(uri: str, content: bytes) -> None:
    """Store bytes as an object."""
    s3.write(uri, content)


def exists(uri: str) -> bool:
    """Return whether there is an object or a complete folder."""
    return s3.stat(uri) is not None or s3.stat(_below(uri, MANIFEST)) is not None


def delete(uri: str) -> None:
    """Remove an object, if it exists."""
    s3.delete(uri)


def entries(prefix: str) -> list[Entry]:
    """Return objects below a folder, at any depth."""
    return s3.listing(_below(prefix, ""))


def upload(path: Path, uri: str) -> str:
    """Store a file or a folder; return its digest.

    An identical folder is left unchanged; one that is replaced is missing until the new one is complete.
    """
    return _upload_folder(path, uri) if path.is_dir() else s3.upload(path, uri)


def _upload_folder(path: Path, uri: str) -> str:
    files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    if MANIFEST in files:
        raise DataError(f"{path / MANIFEST}: this name is kept for slipstream's own manifest; rename the file")
    sha256, before = digests.folder(path), _manifest(uri)
    if before is not None and before.sha256 == sha256:
        return sha256
    if before is not None:
        s3.delete(_below(uri, MANIFEST))
    stored = {
        name: File(sha256=s3.upload(file, _below(uri, name)), size_bytes=file.stat().st_size)
        for name, file in files.items()
    }
    for name in set(before.files if before else ()) - stored.keys():
        s3.delete(_below(uri, name))
    s3.write(_below(uri, MANIFEST), Manifest(sha256=sha256, files=stored).model_dump_json(indent=2).encode())
    return sha256


def _manifest(uri: str) -> Manifest | None:
    at = _below(uri, MANIFEST)
    if s3.stat(at) is None:
        return None
    try:
        manifest = Manifest.model_validate_json(s3.read(at)[0])
    except ValidationError as error:
        raise DataError(f"{at}: not a manifest of a folder: {error}") from error
    if bad := [n for n in manifest.files if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts]:
        raise DataError(f"{at}: names files outside of the folder: {', '.join(bad)}")
    return manifest


def _below(uri: str, name: str) -> str:
    return f"{uri.rstrip('/')}/{name}"


def _name(uri: str) -> str:
    """Return the name of a copy on this machine."""
    return PurePosixPath(urlparse(uri).path).name or "object"
