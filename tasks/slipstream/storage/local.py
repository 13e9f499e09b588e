"""Files and folders on this machine's file systems."""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG

from slipstream import digests
from slipstream.errors import DataError
from slipstream.home import write_atomically
from slipstream.storage.base import Entry


def fetch(uri: str) -> Path:
    """Return the file itself."""
    if not Path(uri).is_file():
        raise DataError(f"{uri}: no such file")
    return Path(uri)


def fetch_folder(uri: str) -> Path:
    """Return the folder itself."""
    if not Path(uri).is_dir():
        raise DataError(f"{uri}: no such folder")
    return Path(uri)


def read(uri: str) -> bytes:
    """Return a file's bytes."""
    try:
        return Path(uri).read_bytes()
    except OSError as error:
        raise DataError(f"{uri}: cannot be read: {error.strerror}") from error


def read_entry(entry: Entry) -> bytes:
    """Return a listed file's bytes."""
    return read(entry.uri)


def write(uri: str, content: bytes) -> None:
    """Write a file atomically."""
    write_atomically(Path(uri), content)


def exists(uri: str) -> bool:
    """Return whether there is a file or a folder."""
    return Path(uri).exists()


def delete(uri: str) -> None:
    """Remove a file, if it exists."""
    Path(uri).unlink(missing_ok=True)


def entries(prefix: str) -> list[Entry]:
    """Return files below a folder, at any depth."""
    files = []
    for path in sorted(Path(prefix).rglob("*")):
        with suppress(OSError):  # removed meanwhile, or a broken or circular link
            stat = path.stat()
            if S_ISREG(stat.st_mode):
                version = f"{stat.st_mtime_ns}-{stat.st_size}-{stat.st_ino}"
                files.append(Entry(str(path), version, stat.st_mtime, stat.st_size))
    return files


def upload(path: Path, uri: str) -> str:
    """Copy a file or a folder aside, then move it into place; return its digest."""
    to = Path(uri)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=to.parent) as name:
        aside = Path(name) / "new"
        if path.is_dir():
            shutil.copytree(path, aside)
            if to.exists():  # rename(2) replaces a file or an empty folder only
                to.replace(Path(name) / "old")
        else:
            shutil.copyfile(path, aside)
        aside.replace(to)
    return digests.folder(to) if path.is_dir() else digests.file(to)
