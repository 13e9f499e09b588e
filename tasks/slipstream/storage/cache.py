"""The local cache: fetched files and folders by sha256, up to a size limit.

    CACHE/SHA256/NAME           an entry: a file or a folder; a second name for the same bytes is a link to the first
    CACHE/.locks/SHA256.use     shared: held by each process that was given the entry, until that process ends
    CACHE/.locks/SHA256.fill    exclusive: held by the process that fetches the entry
    CACHE/.locks/evict          exclusive: one process at a time makes room
    CACHE/.incoming/SHA256/     what has arrived so far; renamed into place when it is complete and verified

The locks are flock(2)'s: however a process ends, the kernel drops them. Therefore an entry in use is never
removed, the remains of a killed download are removed by the next process, and a second process waits for the first
one's download instead of fetching the same bytes again.
"""

import fcntl
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from slipstream.errors import InputError
from slipstream.home import Home

log = logging.getLogger(__name__)

LIMIT_VARIABLE = "SLIPSTREAM_CACHE_GB"
DEFAULT_LIMIT_GB = 20.0

_KEY = re.compile(r"[0-9a-f]{64}")
_LOCKS, _INCOMING = ".locks", ".incoming"
_verified: set[Path] = set()
"""Entries that this process has found or made intact."""
_held: dict[Path, int] = {}
"""Descriptors of the `.use` locks that this process holds."""
_guard = threading.Lock()
"""Lock for `_held`: if two threads close one descriptor, the second may close another file's."""


def obtain(key: str, name: str, make: Callable[[Path], None], is_intact: Callable[[Path], bool] | None = None) -> Path:
    """Return the entry `key` (64 hex digits) under `name`; if it is missing, `make` writes it to the given path.

    `make` verifies what it wrote and raises if it is not right; then nothing is kept. An existing entry is verified by
    `is_intact` when this process first asks for it; a damaged one is dropped and made again. The entry stays for as
    long as this process lives. Raise what `make` raises.
    """
    assert _KEY.fullmatch(key), key
    root = Home.from_environment().cache
    (root / _LOCKS).mkdir(parents=True, exist_ok=True)
    _hold(root, key)
    path = root / key / name
    _ensure(path, make)
    if is_intact is not None and path not in _verified and not is_intact(path):
        _discard(path, is_intact)
        _ensure(path, make)
    _verified.add(path)
    os.utime(root / key)  # last use
    return path


@contextmanager
def borrowed(key: str, name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """Like `obtain`, for small entries that are read at once: they may be evicted right after."""
    path = obtain(key, name, make)
    try:
        yield path
    finally:
        with _guard:
            os.close(_held.pop(_lock(path.parent.parent, key, "use")))


def limit_bytes() -> float:
    """Return the size limit, SLIPSTREAM_CACHE_GB × 10⁹ bytes. Raise InputError."""
    text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1
    if not limit >= 0:
        raise InputError(f"{LIMIT_VARIABLE}={text}: the cache's size limit is a number of gigabytes, such as 20")
    return limit * 1e9


def evict(root: Path, limit: float) -> None:
    """Remove the least recently used entries that are not in use until the rest is within `limit` bytes."""
    with _locked(root / _LOCKS / "evict"):
        _clear_incoming(root)
        entries = sorted(_entries(root), key=lambda entry: entry.last_used)
        total = sum(entry.size_bytes for entry in entries)
        for entry in entries:
            if total <= limit:
                return
            if _remove(root, entry.key):
                log.info("cache: removed %s, %.1f MB, the least recently used", entry.key[:12], entry.size_bytes / 1e6)
                total -= entry.size_bytes
        if total > limit:
            log.warning("cache: %.3g GB are in use, more than the limit of %.3g GB", total / 1e9, limit / 1e9)


@dataclass(frozen=True)
class _Entry:
    key: str
    size_bytes: int
    last_used: float


def _entries(root: Path) -> Iterator[_Entry]:
    for folder in root.iterdir():
        if _KEY.fullmatch(folder.name):
            size = sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
            yield _Entry(folder.name, size, folder.stat().st_mtime)


def _ensure(path: Path, make: Callable[[Path], None]) -> None:
    """Make a missing entry, in one process at a time, and room for it."""
    root, key = path.parent.parent, path.parent.name
    if not path.exists():
        with _locked(_lock(root, key, "fill")):
            if not path.exists():
                _fill(root, key, path.name, make)
        evict(root, limit_bytes())


def _fill(root: Path, key: str, name: str, make: Callable[[Path], None]) -> None:
    """Make the entry aside and move it into place; what a killed process left there is dropped first."""
    for other in (root / key).glob("*"):
        if not other.is_symlink():  # the same bytes, fetched under another name
            (root / key / name).symlink_to(other.name)
            return
    aside = root / _INCOMING / key
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        make(aside / name)
        aside.replace(root / key)
        _verified.add(root / key / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _discard(path: Path, is_intact: Callable[[Path], bool]) -> None:
    """Remove a damaged entry, unless another process has made it again meanwhile."""
    root, key = path.parent.parent, path.parent.name
    with _locked(_lock(root, key, "fill")):
        if path.exists() and not is_intact(path):
            log.warning("cache: %s is damaged; it is fetched again", path)
            _move_away(root, key)


def _move_away(root: Path, key: str) -> None:
    """Remove an entry. Renamed first: killed half-way, this leaves no half entry."""
    gone = root / _INCOMING / key
    shutil.rmtree(gone, ignore_errors=True)
    gone.parent.mkdir(exist_ok=True)
    (root / key).replace(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _remove(root: Path, key: str) -> bool:
    """Remove an entry unless it is being used or fetched; return whether it is gone."""
    use, fill = _lock(root, key, "use"), _lock(root, key, "fill")
    with _locked(use, wait=False) as unused, _locked(fill, wait=False) as idle:
        if not (unused and idle):
            return False
        _move_away(root, key)
        use.unlink(missing_ok=True)
        fill.unlink(missing_ok=True)
        return True


def _clear_incoming(root: Path) -> None:
    """Remove what killed processes left half-fetched."""
    for folder in (root / _INCOMING).glob("*"):
        with _locked(_lock(root, folder.name, "fill"), wait=False) as idle:
            if idle:
                shutil.rmtree(folder, ignore_errors=True)


def _lock(root: Path, key: str, purpose: str) -> Path:
    return root / _LOCKS / f"{key}.{purpose}"


def _hold(root: Path, key: str) -> None:
    """Keep this process's shared lock on an entry."""
    path = _lock(root, key, "use")
    with _guard:
        if path in _held and _is(_held[path], path):
            return
    while True:
        descriptor = _open(path)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is(descriptor, path):
            break
        os.close(descriptor)  # removed, with its entry, between the two calls
    with _guard:
        previous = _held.get(path)
        _held[path] = descriptor
        if previous is not None:
            os.close(previous)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock; without `wait`, yield False if it is held elsewhere."""
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            yield False
            return
        if _is(descriptor, path):
            break
        os.close(descriptor)
    try:
        yield True
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _is(descriptor: int, path: Path) -> bool:
    """Return whether an open lock file is still the one at `path`; a lock on a removed file protects nothing."""
    with suppress(FileNotFoundError):
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    return False
